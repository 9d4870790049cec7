"""The decoding loop on a real model: cached as uncached, batched as alone, and rows that end when they should."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import visualglm
from visualglm.backends.torch.backend import TorchBackend
from visualglm.errors import ConfigError, PromptError, VisualGLMError
from visualglm.generation.config import GenerationConfig
from visualglm.generation.decoding import Decoding
from visualglm.model import VisualGLM
from visualglm.processing.layout import Layout, layout_from_ids

NEW_TOKENS = 14
SLOTS = 4


@dataclass(frozen=True)
class Rows:
    """Prompts of unlike length, some with an image, and the batch that pads them."""

    prompts: list[list[int]]
    starts: list[int | None]
    pixels: NDArray[np.float32]
    pad_id: int

    def batch(self) -> tuple[list[list[int]], NDArray[np.float32], list[int | None]]:
        longest = max(map(len, self.prompts))
        pads = [longest - len(ids) for ids in self.prompts]
        padded = [[self.pad_id] * pad + ids for pad, ids in zip(pads, self.prompts, strict=True)]
        return padded, self.pixels, [None if s is None else s + pad for s, pad in zip(self.starts, pads, strict=True)]

    def alone(self) -> list[tuple[list[list[int]], NDArray[np.float32] | None, int | None]]:
        images = iter(self.pixels[:, None])
        return [
            ([ids], None if s is None else next(images), s) for ids, s in zip(self.prompts, self.starts, strict=True)
        ]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> VisualGLM:
    return visualglm.load(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def rows(model: VisualGLM) -> Rows:
    random, text = np.random.default_rng(8), model.config.text
    lengths, starts = (11, 5, 17, 8, 23), [2, None, 0, None, 5]
    prompts = []
    for length, start in zip(lengths, starts, strict=True):
        ids = random.integers(20, text.vocab_size, length).tolist()
        slots = [] if start is None else [text.pad_token_id] * SLOTS
        prompts.append([*ids[: start or 0], *slots, *ids[start or 0 :], text.gmask_token_id, text.bos_token_id])
    size = model.config.vision.image_size
    pixels = random.normal(size=(3, 3, size, size)).astype(np.float32)
    return Rows(prompts, starts, pixels, text.pad_token_id)


@pytest.fixture(scope="module")
def answers(model: VisualGLM, rows: Rows) -> list[list[int]]:
    """Greedy, each row alone."""
    return [model.generate_ids(*row, max_new_tokens=NEW_TOKENS)[0] for row in rows.alone()]


def test_cached_answers_are_those_of_whole_texts(model: VisualGLM, rows: Rows, answers: list[list[int]]):
    """Each token again from the logits of the whole text so far, without a cache."""
    eos = model.config.text.eos_token_id
    for ([prompt], pixels, start), answer in zip(rows.alone(), answers, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + NEW_TOKENS:
            token = int(model.logits([text], pixels, start)[0, -1].argmax())
            if token == eos:
                break
            text.append(token)
        assert text[len(prompt) :] == answer


def test_a_batch_answers_as_its_rows_alone(model: VisualGLM, rows: Rows, answers: list[list[int]]):
    assert model.generate_ids(*rows.batch(), max_new_tokens=NEW_TOKENS) == answers
    assert len({tuple(answer) for answer in answers}) == len(answers), "the rows differ, or this would prove little"


def test_other_images_give_other_answers(model: VisualGLM, rows: Rows, answers: list[list[int]]):
    ids, pixels, starts = rows.batch()
    swapped = model.generate_ids(ids, pixels[::-1], starts, max_new_tokens=NEW_TOKENS)
    same = [new == old for new, old in zip(swapped, answers, strict=True)]
    # Two rows have no image, and the image in the middle keeps its place; the last row may answer alike to both.
    assert same[:4] == [False, True, True, True]


def test_rows_end_on_their_own(model: VisualGLM, rows: Rows, answers: list[list[int]]):
    """With an end token that some rows meet early, some late and some never."""
    lengths = set()
    # The first token of one row, one of the middle, the last of another.
    for eos in (answers[0][0], answers[2][1], answers[1][5], answers[3][-1]):
        expected = [answer[: answer.index(eos)] if eos in answer else answer for answer in answers]
        assert model.generate_ids(*rows.batch(), max_new_tokens=NEW_TOKENS, eos_token_id=eos) == expected
        lengths |= {len(answer) for answer in expected}
    assert {0, NEW_TOKENS} < lengths


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.3}])
def test_a_sample_does_not_depend_on_its_batch(model: VisualGLM, rows: Rows, options: dict[str, Any]):
    def sample(seed: int) -> list[list[int]]:
        return model.generate_ids(*rows.batch(), max_new_tokens=NEW_TOKENS, seed=seed, **options)

    alone = [model.generate_ids(*row, max_new_tokens=NEW_TOKENS, seed=3, **options)[0] for row in rows.alone()]
    assert sample(3) == sample(3) == alone
    assert sample(4) != alone


def test_a_penalty_counts_the_prompts_text_but_not_pads_or_slots(model: VisualGLM, rows: Rows):
    """Pads and slots have one id: were they counted, a row's answer would depend on the padding of its batch."""
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "repetition_penalty": 3.0}
    alone = [model.generate_ids(*row, **options)[0] for row in rows.alone()]
    assert model.generate_ids(*rows.batch(), **options) == alone


@pytest.mark.parametrize("count", [1, 2, 5])
def test_never_more_than_max_new_tokens(model: VisualGLM, rows: Rows, answers: list[list[int]], count: int):
    found = model.generate_ids(*rows.batch(), max_new_tokens=count)
    assert found == [answer[:count] for answer in answers]


def layout_of(model: VisualGLM, rows: Rows) -> tuple[Layout, list[Any]]:
    ids, pixels, starts = rows.batch()
    text = model.config.text
    layout = layout_from_ids(
        np.array(ids), pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id, image_start=starts
    )
    return layout, model.backend.encode_images(pixels)


def test_a_stopped_row_leaves_and_the_others_go_on(model: VisualGLM, rows: Rows, answers: list[list[int]]):
    layout, embeds = layout_of(model, rows)
    decoding = Decoding(model.backend, layout, embeds, GenerationConfig.from_options(max_new_tokens=NEW_TOKENS))
    found: dict[int, list[int]] = {row: [] for row in range(len(answers))}
    for step, pairs in enumerate(decoding):
        for row, token in pairs:
            found[row].append(token)
            if step == row:
                decoding.stop(row)
    assert list(found.values()) == [answer[: row + 1] for row, answer in enumerate(answers)]


def test_nothing_is_computed_once_every_row_has_stopped(model: VisualGLM, rows: Rows, monkeypatch: pytest.MonkeyPatch):
    layout, embeds = layout_of(model, rows)
    widths = []
    step = model.backend.step

    def counted(token_ids: NDArray[np.int64], *rest: Any) -> NDArray[np.float32]:
        widths.append(len(token_ids))
        return step(token_ids, *rest)

    monkeypatch.setattr(model.backend, "step", counted)
    decoding = Decoding(model.backend, layout, embeds, GenerationConfig.from_options(max_new_tokens=NEW_TOKENS))
    for number, _ in enumerate(decoding):
        for row in ((0, 3), (1,), (2, 4))[number]:
            decoding.stop(row)
    assert widths == [3, 2]


def test_the_window(model: VisualGLM, rows: Rows):
    window = model.config.text.max_sequence_length
    ids, pixels, start = rows.alone()[0]
    room = window - len(ids[0])
    (answer,) = model.generate_ids(
        ids, pixels, start, max_new_tokens=room, suppress_tokens=[model.config.text.eos_token_id]
    )
    assert len(answer) == room
    message = (
        f"A prompt of {len(ids[0])} tokens and max_new_tokens {room + 1} exceed the model's window of {window} tokens; "
        "shorten one of them."
    )
    with pytest.raises(PromptError) as caught:
        model.generate_ids(ids, pixels, start, max_new_tokens=room + 1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": [10**6]}, r"The token 1000000 does not exist: the model's tokens are 0 … \d+\."),
        ({"eos_token_id": 10**6}, r"The token 1000000 does not exist"),
        ({"suppress_tokens": range(10**4)}, r"does not exist"),
    ],
)
def test_tokens_that_do_not_exist(model: VisualGLM, rows: Rows, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        model.generate_ids(*rows.alone()[1], max_new_tokens=2, **options)


def test_all_tokens_suppressed_but_one_or_none(model: VisualGLM, rows: Rows):
    vocabulary = range(model.config.text.vocab_size)
    others = [token for token in vocabulary if token != 50]
    assert model.generate_ids(*rows.alone()[1], max_new_tokens=2, suppress_tokens=others) == [[50, 50]]
    with pytest.raises(ConfigError, match="names every token of the model"):
        model.generate_ids(*rows.alone()[1], max_new_tokens=2, suppress_tokens=vocabulary)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.5}])
def test_weights_that_give_no_numbers_end_in_a_sentence(tiny_model_dir: Path, rows: Rows, options: dict[str, Any]):
    model = visualglm.load(tiny_model_dir, backend="torch", device="cpu")
    weight = cast(TorchBackend, model.backend).model.text.norm.weight
    weight[0] = torch.nan
    with pytest.raises(VisualGLMError, match="not a finite number: in float16 numbers overflowed"):
        model.generate_ids(*rows.batch(), max_new_tokens=2, **options)


def test_float16_that_overflows_ends_in_the_same_sentence(tiny_model_dir: Path, rows: Rows):
    model = visualglm.load(tiny_model_dir, device="cpu", dtype="float16")
    cast(TorchBackend, model.backend).model.text.lm_head.weight *= 60000
    with pytest.raises(VisualGLMError, match="load it in another precision;"):
        model.generate_ids(*rows.alone()[1], max_new_tokens=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precisions_generate(tiny_model_dir: Path, rows: Rows, dtype: str, answers: list[list[int]]):
    half = visualglm.load(tiny_model_dir, device="cpu", dtype=dtype)
    found = half.generate_ids(*rows.batch(), max_new_tokens=NEW_TOKENS)
    assert [len(answer) for answer in found] == [len(answer) for answer in answers]
    same = sum(new[:1] == old[:1] for new, old in zip(found, answers, strict=True))
    assert same >= len(answers) - 1, "first tokens agree unless two are nearly equal"
