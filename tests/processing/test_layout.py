"""Positions, masks and padding, held against rows written out by hand and against a plain loop."""

from typing import Any

import numpy as np
import pytest

from visualglm.errors import PromptError
from visualglm.processing.layout import NO_IMAGE, Layout, layout_from_ids, pad_batch

PAD, GMASK, BOS = 3, 8, 9
TOKENS = {"pad_token_id": PAD, "bos_token_id": BOS}


def layout_of(rows: list[list[int]], image_start: Any = None) -> Layout:
    return layout_from_ids(np.array(rows), **TOKENS, image_start=image_start)


def test_a_row_written_out():
    layout = layout_of([[11, 12, GMASK, BOS, 13, 14]])
    assert layout.context_lengths.tolist() == [3] and layout.pad_lengths.tolist() == [0]
    assert layout.position_ids().tolist() == [[[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]]
    assert layout.attention_mask()[0].astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def test_a_padded_row_written_out():
    layout = layout_of([[11, 12, GMASK, BOS, 13], [PAD, PAD, GMASK, BOS, 13]])
    assert layout.pad_lengths.tolist() == [0, 2] and layout.context_lengths.tolist() == [3, 1]
    assert layout.position_ids()[1].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 2]]
    assert layout.attention_mask()[1].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_any_row_against_a_plain_loop():
    random = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            [*random.integers(10, 20, random.integers(1, 6)), BOS, *random.integers(10, 20, random.integers(0, 4))]
            for _ in range(3)
        ]
        layout = pad_batch(rows, [None] * 3, **TOKENS)
        positions, mask = layout.position_ids(), layout.attention_mask()
        for row, ids in enumerate(rows):
            pad, context = layout.sequence_length - len(ids), ids.index(BOS)
            for column in range(len(ids)):
                answer = max(0, column - context + 1)
                assert positions[row, :, pad + column].tolist() == [min(column, context - 1), answer]
                seen = [other < context or other <= column for other in range(len(ids))]
                assert mask[row, pad + column].tolist() == [False] * pad + seen


def test_positions_go_on_behind_the_prompt():
    layout = layout_of([[11, GMASK, BOS], [PAD, GMASK, BOS]])
    assert layout.position_ids(3, 5).tolist() == [[[1, 1], [2, 3]], [[0, 0], [2, 3]]]
    np.testing.assert_array_equal(layout.position_ids(stop=9)[:, :, 3:5], layout.position_ids(3, 5))


def test_padding_then_finding_it_again():
    rows, starts = [[11, GMASK, BOS], [PAD, PAD, 12, GMASK, BOS, 13], [11, PAD, PAD, GMASK, BOS]], [None, 0, 1]
    padded = pad_batch(rows, starts, **TOKENS)
    assert padded.input_ids.tolist() == [
        [PAD, PAD, PAD, 11, GMASK, BOS],
        [PAD, PAD, 12, GMASK, BOS, 13],
        [PAD, 11, PAD, PAD, GMASK, BOS],
    ]
    assert padded.pad_lengths.tolist() == [3, 0, 1]
    assert padded.image_starts.tolist() == [NO_IMAGE, 0, 2]
    assert padded.context_lengths.tolist() == [2, 4, 4]
    found = layout_of(padded.input_ids.tolist(), padded.image_starts)
    for name in ("input_ids", "pad_lengths", "context_lengths", "image_starts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(padded, name))
        assert getattr(found, name).dtype == np.int64


def test_slots_at_the_start_of_a_row_are_no_padding():
    ids = [PAD, PAD, PAD, 11, BOS]
    assert layout_of([ids], 0).pad_lengths.tolist() == [0]
    assert layout_of([ids], 1).pad_lengths.tolist() == [1]
    assert layout_of([ids]).pad_lengths.tolist() == [3]


def test_padding_on_the_right_is_text():
    layout = layout_of([[11, BOS, 12, PAD, PAD]])
    assert layout.pad_lengths.tolist() == [0]
    assert layout.attention_mask()[0, 4].all()


def test_kept_rows():
    layout = layout_of([[11, GMASK, BOS], [PAD, GMASK, BOS], [11, 12, BOS]], [None, None, 0])
    kept = layout.keep_rows(np.array([2, 1]))
    assert kept.input_ids.tolist() == [[11, 12, BOS], [PAD, GMASK, BOS]]
    assert (kept.pad_lengths.tolist(), kept.image_starts.tolist()) == ([0, 1], [0, NO_IMAGE])
    np.testing.assert_array_equal(kept.position_ids(), layout.position_ids()[[2, 1]])


@pytest.mark.parametrize(("start", "expected"), [(None, [11, PAD, PAD, PAD, 12, BOS]), (3, [11, 12, BOS])])
def test_text_ids_are_neither_padding_nor_slots(start: int | None, expected: list[int]):
    layout = layout_of([[PAD, PAD, 11, PAD, PAD, PAD, 12, BOS]], start)
    assert layout.text_ids(0, image_length=3).tolist() == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [-1, -1]),
        (-1, [-1, -1]),
        (-7, [-1, -1]),
        (1, [1, 1]),
        (np.int32(1), [1, 1]),
        (np.array(1), [1, 1]),
        ([1, None], [1, -1]),
        ((None, 0), [-1, 0]),
        ([-1, 2], [-1, 2]),
        (np.array([1, -1]), [1, -1]),
    ],
)
def test_image_start_in_any_likely_form(given: Any, expected: list[int]):
    layout = layout_of([[11, 12, 13, BOS], [11, 12, 13, BOS]], given)
    assert layout.image_starts.tolist() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], r"image_start names 1 rows, but input_ids has 2; give one for each row\."),
        ([1, 2, 3], r"image_start names 3 rows, but input_ids has 2"),
        ([], r"image_start names 0 rows"),
        ([[1], [2]], r"image_start names 2 rows"),
        (1.5, r"image_start is 1\.5; give one column or one for each row, as integers, or None for no image\."),
        ("1", r"image_start is '1'; give one column"),
        ([1, "2"], r"image_start is \[1, '2'\]; give one column"),
        ([0, 2**70], r"image_start is .*; give one column"),
    ],
)
def test_image_start_that_cannot_be(given: Any, message: str):
    with pytest.raises(PromptError, match=message):
        layout_of([[11, 12, 13, BOS], [11, 12, 13, BOS]], given)


@pytest.mark.parametrize("ids", [[11, 12], [BOS, 11], [PAD, BOS, 11], [PAD, PAD]])
def test_a_row_without_a_context_before_sop(ids: list[int]):
    message = r"Row 1 of input_ids has no <sop> \(id 9\) after its first token; end each prompt with \[gMASK\] <sop>\."
    with pytest.raises(PromptError, match=message):
        layout_of([[11, BOS, 12][: len(ids)], ids])
