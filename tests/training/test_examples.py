import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visualglm.backends.base import ImageEmbeds
from visualglm.config import VisualGLMConfig
from visualglm.errors import ConfigError, DataError
from visualglm.processing.image import load_image, preprocess
from visualglm.processing.prompt import Turn, build_prompt
from visualglm.processing.tokenizer import Tokenizer
from visualglm.training.examples import IGNORED_LABEL, Example, ExampleDataset, build_example, plan_examples
from visualglm.training.image_cache import ImageCache
from visualglm.training.rows import RowIndex, TrainingRow, open_rows

Build = Callable[..., Example]
TURNS: tuple[Turn, ...] = (("one cat?", "a red cat"), ("two dogs?", "the lazy dog"), ("3?", "a sofa"))


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_path)


@pytest.fixture
def build(tokenizer: Tokenizer, tiny_config: VisualGLMConfig) -> Build:
    def build(turns: Sequence[Turn], turn: int = 0, *, image: bool = True, max_length: int = 192) -> Example:
        source = Path("a.png") if image else None
        row = TrainingRow("a.png" if image else None, source, tuple(turns))
        return build_example(row, turn, tokenizer, tiny_config, max_length)

    return build


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., RowIndex]:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png")

    def write_file(*rows: dict[str, Any]) -> RowIndex:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_rows(tmp_path / "rows.jsonl")

    return write_file


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("turn", [0, 2])
def test_an_example_is_what_the_model_is_asked_and_the_answer(
    build: Build, tokenizer: Tokenizer, tiny_config: VisualGLMConfig, turn: int, image: bool
) -> None:
    example = build(TURNS, turn, image=image)
    question, answer = TURNS[turn]
    prompt = build_prompt(tokenizer, tiny_config, question, history=TURNS[:turn], has_image=image, max_new_tokens=20)
    answer_ids = [*tokenizer.encode(answer), tokenizer.eos_id]
    assert example.input_ids.tolist() == [*prompt.input_ids, *answer_ids]
    ignored = [IGNORED_LABEL] * (len(prompt.input_ids) - 1)
    assert example.labels.tolist() == [*ignored, tokenizer.bos_id, *answer_ids]
    assert example.image_start == prompt.image_start and (example.image_start is not None) == image
    assert (example.cut, example.dropped_turns) == (0, 0)
    assert example.input_ids.dtype == example.labels.dtype == np.int64


def test_a_long_answer_is_cut_and_nothing_else(build: Build, tokenizer: Tokenizer) -> None:
    turns = [("what?", "dog " * 300)]
    example = build(turns)
    whole = [*tokenizer.encode(turns[0][1]), tokenizer.eos_id]
    short = build([("what?", "dog")])
    prompt = short.input_ids[: list(short.input_ids).index(tokenizer.bos_id) + 1].tolist()
    assert len(example.input_ids) == 192
    assert example.input_ids.tolist() == [*prompt, *whole[: 192 - len(prompt)]]
    assert example.cut == len(whole) - (192 - len(prompt))
    assert tokenizer.eos_id not in example.input_ids


@pytest.mark.parametrize("room", range(1, 8))
def test_what_does_not_fit_goes_in_order_turns_then_answer(build: Build, tokenizer: Tokenizer, room: int) -> None:
    alone, whole = len(build(TURNS[2:]).input_ids), len(build(TURNS, 2).input_ids)
    answer = len(tokenizer.encode(TURNS[2][1])) + 1
    longest = alone - answer + room
    example = build(TURNS, 2, max_length=longest)
    assert len(example.input_ids) <= longest
    assert (example.cut, example.dropped_turns) == (max(0, answer - room), 2)
    assert build(TURNS, 2, max_length=whole).dropped_turns == 0
    fewer = build(TURNS, 2, max_length=whole - 1)
    assert (fewer.cut, fewer.dropped_turns) == (0, 1)


@pytest.mark.parametrize("image, what", [(True, "question 2 with the image"), (False, "question 2")])
def test_a_question_that_does_not_fit_is_refused(build: Build, image: bool, what: str) -> None:
    shorten = "shorten the question."
    for question, longest, remedy in (
        ("why " * 300, 192, shorten),
        ("what is in the picture?", 12, f"raise data.max_length or {shorten}"),
    ):
        with pytest.raises(DataError) as raised:
            build([("one?", "1"), (question, "a")], 1, image=image, max_length=longest)
        assert str(raised.value) == f"{what} leaves no room for its answer in {longest} tokens; {remedy}"


def test_special_tokens_in_a_row_are_text(build: Build, tokenizer: Tokenizer) -> None:
    example = build([("<sop> [gMASK] <img></img>?", "<eop> <sop>")])
    ids = example.input_ids.tolist()
    assert (ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id), ids.count(tokenizer.gmask_id)) == (1, 1, 1)
    assert ids.count(tokenizer.pad_id) == 4


# --- plans ------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"img": "a.png", "conversations": [list(turn) for turn in TURNS]},
    {"prompt": "what?", "label": "a cat"},
    {"img": "a.png", "prompt": "what?", "label": "dog " * 300},
    {"conversations": [["what? " * 10, "a cat " * 3], ["what?", "dog " * 15]]},
]


def test_every_answer_is_an_example(
    write: Callable[..., RowIndex], build: Build, tokenizer: Tokenizer, tiny_config: VisualGLMConfig
) -> None:
    index = write(*ROWS)
    plan = plan_examples(index, tokenizer, tiny_config, max_length=100)
    assert list(zip(plan.rows.tolist(), plan.turns.tolist(), strict=True)) == [
        *[(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0), (3, 1)]
    ]
    assert plan.has_image.tolist() == [True, True, True, False, True, False, False]
    assert plan.lengths[:3].tolist() == [len(build(TURNS, turn).input_ids) for turn in range(3)]
    assert plan.lengths[4] == 100
    assert (plan.cut > 0).tolist() == [False] * 4 + [True] + [False] * 2
    assert plan.dropped_turns.tolist() == [0] * 6 + [1]
    last = plan_examples(index, tokenizer, tiny_config, max_length=100, loss_on="last")
    assert list(zip(last.rows.tolist(), last.turns.tolist(), strict=True)) == [(0, 2), (1, 0), (2, 0), (3, 1)]
    some = plan.of_rows(np.array([3, 0]))
    assert some.rows.tolist() == [0, 0, 0, 3, 3] and some.lengths.tolist() == plan.lengths[[0, 1, 2, 5, 6]].tolist()


def test_what_was_left_out_is_noted(
    write: Callable[..., RowIndex], tokenizer: Tokenizer, tiny_config: VisualGLMConfig
) -> None:
    index = write(*ROWS)
    plan = plan_examples(index, tokenizer, tiny_config)
    text, cut = plan.notes(index)
    assert text == (f"3 of 7 answers to learn have no image and are of text alone; the first is {index.path}, line 2.")
    assert cut == (
        f"1 of 7 answers to learn had their answer cut, by {plan.cut[4]} tokens in all, to fit; "
        f"the first is {index.path}, line 3."
    )
    assert plan.of_rows(np.array([0])).notes(index) == []


def test_bad_rows_are_told_at_once(
    write: Callable[..., RowIndex], tokenizer: Tokenizer, tiny_config: VisualGLMConfig
) -> None:
    long = {"img": "a.png", "prompt": "why " * 300, "label": "b"}
    index = write(ROWS[0], long, {"img": "gone.png", "prompt": "a", "label": "b"}, {"img": "a.png", "prompt": "a"})
    with pytest.raises(DataError) as raised:
        plan_examples(index, tokenizer, tiny_config)
    first, *others = str(raised.value).splitlines()
    assert first == f"{index.path} has 3 bad rows of 4:"
    assert others[0].startswith("line 2: question 1 with the image leaves no room for its answer in 192 tokens")
    assert "gone.png does not exist" in others[1] and "line 4: there is no label" in others[2]


def test_rows_longer_than_the_window_are_refused(
    write: Callable[..., RowIndex], tokenizer: Tokenizer, tiny_config: VisualGLMConfig
) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.max_length is 193, more than the 192 tokens of the model; give less"
    ):
        plan_examples(write(*ROWS), tokenizer, tiny_config, max_length=193)


# --- items ------------------------------------------------------------------------------------------------------------


def test_items_hold_pixels_or_embeddings(
    write: Callable[..., RowIndex], tokenizer: Tokenizer, tiny_config: VisualGLMConfig, tmp_path: Path
) -> None:
    index = write(*ROWS)
    plan = plan_examples(index, tokenizer, tiny_config)
    dataset = ExampleDataset(index, plan, tokenizer, tiny_config)
    assert len(dataset) == 7 and dataset.images() == [tmp_path / "a.png"]
    again: ExampleDataset = pickle.loads(pickle.dumps(dataset))
    for number in range(7):
        for item in (dataset[number], again[number]):
            assert item.row == plan.rows[number] and len(item.example.input_ids) == plan.lengths[number]
            assert (item.pixels is not None) == plan.has_image[number] and item.image_embeds is None
    pixels = preprocess(load_image(tmp_path / "a.png"), 28)
    np.testing.assert_array_equal(dataset[0].pixels, pixels)

    cache = ImageCache(tmp_path / "cache", tiny_config, "0" * 64, "float32")
    embeds = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    cache.fill(dataset.images(), lambda pixels: [ImageEmbeds(embeds) for _ in pixels])
    item = ExampleDataset(index, plan, tokenizer, tiny_config, cache=cache)[1]
    assert item.pixels is None
    np.testing.assert_array_equal(item.image_embeds, embeds)


def test_an_image_that_went_is_told_by_line(
    write: Callable[..., RowIndex], tokenizer: Tokenizer, tiny_config: VisualGLMConfig, tmp_path: Path
) -> None:
    index = write(*ROWS)
    dataset = ExampleDataset(index, plan_examples(index, tokenizer, tiny_config), tokenizer, tiny_config)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: The image .*a\.png does not exist"):
        dataset[4]
