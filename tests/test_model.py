"""The public API on a model of random weights: its answers mean nothing, but every way to them must agree."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import visualglm
from visualglm.backends.base import ImageEmbeds
from visualglm.errors import ConfigError, ImageError, PromptError, TokenizerError
from visualglm.generation.config import GenerationConfig
from visualglm.model import VisualGLM
from visualglm.processing.answer import clean_answer
from visualglm.processing.image import ImageLimits

QUESTION = "What is in the picture?"
SHORT: dict[str, Any] = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> VisualGLM:
    return visualglm.load(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Plain, but for some noise: averages of mere noise are all alike."""
    random = np.random.default_rng(0)
    colors = np.array([(250, 20, 20), (10, 200, 250), (90, 10, 120)], np.uint8)
    return [
        Image.fromarray(color // 2 + random.integers(0, 120, (40 + 9 * n, 64, 3), np.uint8))
        for n, color in enumerate(colors)
    ]


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# --- asking -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_its_ids_decoded_and_cleaned(model: VisualGLM, images: list[Image.Image]):
    config = GenerationConfig.from_options(**SHORT)
    prompt = model.prompt(QUESTION, has_image=True, config=config)
    pixels = model._pixels(images[0])[None]
    (ids,) = model.generate_ids([prompt.input_ids], pixels, prompt.image_start, **SHORT)
    assert model.ask(images[0], QUESTION, **SHORT) == clean_answer(model.tokenizer.decode(ids)) != ""


def test_any_source_of_the_same_image(model: VisualGLM, images: list[Image.Image], tmp_path: Path):
    image, data = images[0], png(images[0])
    path = tmp_path / "image.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answers = {
        model.ask(source, QUESTION, **SHORT)
        for source in (image, data, str(path), path, url, np.asarray(image), model.encode_image(image))
    }
    assert len(answers) == 1
    assert answers != {model.ask(images[1], QUESTION, **SHORT)}, "another image, another answer"
    assert answers != {model.ask(None, QUESTION, **SHORT)}, "no image, another answer"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 5}, {"stop": "a"}, {"repetition_penalty": 1.4}])
@pytest.mark.parametrize("question", [QUESTION, "这张图片里有什么？"])
def test_pieces_make_up_the_answer(model: VisualGLM, images: list[Image.Image], options: dict[str, Any], question: str):
    pieces = list(model.stream(images[0], question, max_new_tokens=40, **options))
    assert all(pieces)
    assert "".join(pieces) == model.ask(images[0], question, max_new_tokens=40, **options)


def test_faults_show_when_a_stream_is_asked_for(model: VisualGLM):
    with pytest.raises(PromptError):
        model.stream(None, " ", **SHORT)
    with pytest.raises(ImageError):
        model.stream("nowhere.png", QUESTION, **SHORT)


def test_stop_strings(model: VisualGLM, images: list[Image.Image]):
    whole = model.ask(images[0], QUESTION, max_new_tokens=30)
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    stopped = model.ask(images[0], QUESTION, max_new_tokens=30, stop=stop)
    assert stopped == clean_answer(whole[: whole.index(stop)])
    (reply,) = model.reply_batch([(images[0], QUESTION)], max_new_tokens=30, stop=[stop, "never"])
    assert reply.text == stopped and 0 < reply.new_tokens < 30


def test_an_encoded_image_answers_as_the_image(model: VisualGLM, images: list[Image.Image]):
    embeds = model.encode_image(images[0])
    assert isinstance(embeds, ImageEmbeds)
    assert embeds.array.shape == (model.config.qformer.num_query_tokens, model.config.text.hidden_size)
    for question in (QUESTION, "描述这张图片。"):
        history = [("Q", "A")]
        assert model.ask(embeds, question, history=history, **SHORT) == model.ask(
            images[0], question, history=history, **SHORT
        )


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(model: VisualGLM, images: list[Image.Image]) -> list[tuple[Any, str]]:
    return [
        (images[0], QUESTION),
        (None, "a red cat sits on a sofa, and 3 dogs, and the quick brown fox?"),
        (model.encode_image(images[1]), "描述这张图片。"),
        (images[2], "Q"),
        (None, "这张图片里有什么？"),
        (images[0], "is the lazy dog on the sofa?"),
        (np.asarray(images[1]), QUESTION),
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "seed": 2}, {"stop": "e"}])
def test_a_batch_answers_as_each_row_alone(model: VisualGLM, pairs, batch_size: int, options: dict[str, Any]):
    expected = [model.ask(image, question, **SHORT, **options) for image, question in pairs]
    assert model.ask_batch(pairs, batch_size=batch_size, **SHORT, **options) == expected
    assert len(set(expected)) > 4


def test_replies_count_tokens(model: VisualGLM, pairs):
    replies = model.reply_batch(iter(pairs), **SHORT)
    config = GenerationConfig.from_options(**SHORT)
    for (image, question), reply in zip(pairs, replies, strict=True):
        prompt = model.prompt(question, has_image=image is not None, config=config)
        assert reply.prompt_tokens == len(prompt.input_ids)
        assert 0 <= reply.new_tokens <= 12 and reply.dropped_turns == 0
    assert model.ask_batch([]) == []


def test_each_row_of_a_batch_has_its_own_history(model: VisualGLM, pairs):
    histories = [[("What?", "a cat")] * (index % 3) for index in range(len(pairs))]
    replies = model.reply_batch(pairs, histories=histories, batch_size=4, **SHORT)
    assert [reply.text for reply in replies] == [
        model.ask(image, question, history=history, **SHORT)
        for (image, question), history in zip(pairs, histories, strict=True)
    ]
    with pytest.raises(PromptError, match=f"There are 1 histories for {len(pairs)} questions"):
        model.reply_batch(pairs, histories=[()], **SHORT)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([(None, "a")], {"batch_size": 0}, r"batch_size is 0, but a batch has at least one row; give 1 or more\."),
        (["image.png"], {}, r"Row 1 of the batch is not a pair; give \(image, question\), with None for no image\."),
        ([(None, "a"), (None, "b", "c")], {}, r"Row 2 of the batch is not a pair"),
        ([(None, "a"), (None, "")], {}, r"The question is empty"),
        ([(None, "a")], {"batch_size": "a"}, r"batch_size is 'a', but must be a whole number; give 1 or more\."),
        ([(None, "a")], {"batch_size": 1.5}, r"batch_size is 1\.5, but must be a whole number"),
        ([(None, "a")], {"batch_size": None}, r"batch_size is None, but must be a whole number"),
        (None, {}, r"The batch must be a list of \(image, question\) pairs, not NoneType; give such a list\."),
        (5, {}, r"The batch must be a list of \(image, question\) pairs, not int"),
    ],
)
def test_batches_that_cannot_be(model: VisualGLM, pairs: Any, options: dict[str, Any], message: str):
    with pytest.raises(PromptError, match=message):
        model.ask_batch(pairs, **SHORT, **options)


# --- conversations ----------------------------------------------------------------------------------------------------


def test_history_changes_the_answer_and_its_oldest_turns_are_dropped(model: VisualGLM, images: list[Image.Image]):
    config = GenerationConfig.from_options(**SHORT)
    long = [(f"a red cat sits on a sofa {n}", "the quick brown fox") for n in range(30)]
    prompt = model.prompt(QUESTION, history=long, has_image=True, config=config)
    window = model.config.text.max_sequence_length
    assert 0 < prompt.dropped_turns < 30
    assert len(prompt.input_ids) <= window - 12
    kept = long[prompt.dropped_turns :]
    assert prompt.input_ids == model.prompt(QUESTION, history=kept, has_image=True, config=config).input_ids
    more = model.prompt(QUESTION, history=long[prompt.dropped_turns - 1 :], has_image=True, config=config)
    assert more.dropped_turns == 1, "as many are kept as there is room for"
    embeds = model.encode_image(images[0])
    with pytest.warns(UserWarning, match=r"the oldest \d+ turns are left out"):
        answers = [model.ask(embeds, QUESTION, history=history, **SHORT) for history in (long, kept, kept[1:], ())]
    assert answers[0] == answers[1] and len(set(answers)) == 3


def test_a_question_that_does_not_fit(model: VisualGLM):
    window = model.config.text.max_sequence_length
    message = rf"The question takes \d+ tokens and 12 are kept for the answer, more than the window of {window}; "
    with pytest.raises(PromptError, match=message):
        model.ask(None, "cat " * window, **SHORT)
    with pytest.raises(PromptError, match=rf"and {window} are kept for the answer"):
        model.ask(None, QUESTION, max_new_tokens=window)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"language": "fr"}, PromptError, "The language 'fr' is unknown; give auto, zh or en"),
        ({"language": ["a"]}, PromptError, r"The language \['a'\] is unknown; give auto, zh or en"),
        ({"history": "before"}, PromptError, "The history is not a list"),
        ({"history": [("a", "b", "c")]}, PromptError, "Entry 1 of the history is not a pair of texts"),
        ({"beams": 2}, ConfigError, "The generation option beams is unknown"),
        ({"eos_token_id": 10**6}, ConfigError, "The token 1000000 does not exist"),
    ],
)
def test_questions_that_cannot_be_put(model: VisualGLM, options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        model.ask(None, QUESTION, **SHORT, **options)


@pytest.mark.parametrize(("question", "kind"), [(5, "int"), (b"What?", "bytes")])
def test_a_question_that_is_no_text(model: VisualGLM, question: Any, kind: str):
    with pytest.raises(PromptError, match=f"The question must be text, not {kind}; write what you want to know"):
        model.ask(None, question)


@pytest.mark.parametrize("question", ["", " \n\t", None])
def test_no_question(model: VisualGLM, question: Any):
    with pytest.raises(PromptError, match=r"The question is empty; write what you want to know\."):
        model.ask(None, question)


def test_a_model_without_a_tokenizer_speaks_ids_only(model: VisualGLM):
    mute = VisualGLM(model.backend, None, name="mute")
    message = (
        r"The model mute has no tokenizer\.model, so it cannot be asked in words; convert it again with --tokenizer"
    )
    for ask in (lambda: mute.ask(None, QUESTION), lambda: mute.ask_batch([(None, QUESTION)]), lambda: mute.tokenizer):
        with pytest.raises(TokenizerError, match=message):
            ask()
    ids = [[50, 51, model.config.text.gmask_token_id, model.config.text.bos_token_id]]
    assert mute.generate_ids(ids, max_new_tokens=3) == model.generate_ids(ids, max_new_tokens=3)


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_image_encoded_by_another_model(model: VisualGLM):
    message = r"The encoded image is \[32, 4096\] and this model's are \[4, 32\]: .*; encode it with this one\."
    foreign = ImageEmbeds(np.zeros((32, 4096), np.float32))
    for ask in (lambda: model.ask(foreign, QUESTION, **SHORT), lambda: model.ask_batch([(foreign, QUESTION)], **SHORT)):
        with pytest.raises(ImageError, match=message):
            ask()


def test_limits_and_urls_are_those_of_the_model(model: VisualGLM, images: list[Image.Image]):
    strict = VisualGLM(model.backend, model.tokenizer, image_limits=ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="over the limit of 100 pixels"):
        strict.ask(images[0], QUESTION, **SHORT)
    with pytest.raises(ImageError, match="URLs are not allowed"):
        model.ask("http://localhost/image.png", QUESTION, **SHORT)


@pytest.mark.parametrize("image", [5, object(), np.zeros((4, 4)), b"", "no such file.png"])
def test_what_is_no_image(model: VisualGLM, image: Any):
    with pytest.raises(ImageError):
        model.ask(image, QUESTION, **SHORT)


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids(model: VisualGLM) -> list[list[int]]:
    """Two rows with slots from column 1 to 4."""
    text = model.config.text
    return [[50 + row, 3, 3, 3, 3, 60, 61, text.gmask_token_id, text.bos_token_id] for row in range(2)]


@pytest.fixture(scope="module")
def pixels(model: VisualGLM) -> NDArray[np.float32]:
    size = model.config.vision.image_size
    return np.random.default_rng(1).normal(size=(2, 3, size, size)).astype(np.float32)


def test_logits(model: VisualGLM, ids: list[list[int]], pixels: NDArray[np.float32]):
    logits = model.logits(ids, pixels, 1)
    assert logits.shape == (2, 9, model.config.text.vocab_size) and logits.dtype == np.float32
    second = model.logits(ids, pixels[1:], [None, 1])
    np.testing.assert_allclose(second[1], logits[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(second[0], model.logits(ids[:1])[0], rtol=0, atol=1e-5)
    for none in (None, -1, [None, -1]):
        np.testing.assert_array_equal(model.logits(ids, image_start=none), model.logits(ids))
    np.testing.assert_array_equal(model.logits(ids, pixels[:0], None), model.logits(ids))
    assert np.abs(model.logits(ids)[1] - logits[1]).max() > 1e-2


def test_the_last_place_for_an_image(model: VisualGLM, ids: list[list[int]], pixels: NDArray[np.float32]):
    """Up to the column before `<sop>`."""
    assert np.isfinite(model.logits(ids, pixels, 4)).all()
    for start in (5, 8, 9, 2**62, 2**63 - 1):
        with pytest.raises(PromptError, match="image_start leaves no room for the 4 image slots before <sop>"):
            model.logits(ids, pixels, start)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([50, 8], r"input_ids must be integers \[batch, seq\], not int64 \[2\]\."),
        ([], r"input_ids must be integers \[batch, seq\], not float64 \[0\]\."),
        ([[]], r"input_ids must be integers \[batch, seq\], not float64 \[1, 0\]\."),
        ([[1.0, 2.0]], r"not float64 \[1, 2\]\."),
        ([[[50, 8]]], r"not int64 \[1, 1, 2\]\."),
        ([["a", "b"]], r"input_ids must be integers"),
        ([[True, False]], r"not bool \[1, 2\]\."),
        ([[50, 51], [50]], r"input_ids cannot be read as an array \(.*\); give one of numbers\."),
        ([[50, -1]], r"input_ids must lie in 0 … \d+; found -1 … 50\."),
        ([[50, 10**6]], r"input_ids must lie in 0 … \d+; found 50 … 1000000\."),
        ([[50] * 193], r"input_ids have 193 columns, but the model's window is 192; shorten them\."),
        ([[50, 51]], r"Row 0 of input_ids has no <sop>"),
    ],
)
def test_ids_that_cannot_be(model: VisualGLM, given: Any, message: str):
    for call in (model.logits, model.generate_ids):
        with pytest.raises(PromptError, match=message) as caught:
            call(given)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "start"),
    [
        ((1, 3, 28, 28), 1),
        ((3, 3, 28, 28), 1),
        ((2, 3, 28, 28), None),
        ((2, 3, 28, 28), [1, None]),
        ((3, 28, 28), [1, None]),
        ((2, 1, 28, 28), 1),
        ((2, 3, 42, 42), 1),
        ((2, 28, 28, 3), 1),
        (None, 1),
        (None, [None, 0]),
    ],
)
def test_pixels_that_do_not_fit(model: VisualGLM, ids: list[list[int]], shape: tuple[int, ...] | None, start: Any):
    images = 0 if start is None else 2 if start == 1 else 1
    found = [0, 3, 28, 28] if shape is None else list(shape)
    message = f"pixels must be float32 [{images}, 3, 28, 28] (one image for each row with an image_start), not {found}."
    with pytest.raises(PromptError) as caught:
        model.logits(ids, None if shape is None else np.zeros(shape, np.float32), start)
    assert str(caught.value) == message


@pytest.mark.parametrize("pixels", ["image.png", [[1], [2, 3]], [[object()]]])
def test_pixels_that_are_no_numbers(model: VisualGLM, ids: list[list[int]], pixels: Any):
    with pytest.raises(PromptError, match=r"pixels cannot be read as an array \("):
        model.logits(ids, pixels, 1)


@pytest.mark.parametrize("start", [[1], [1, 1, 1], 1.5, "1", [1, "1"]])
def test_image_start_that_cannot_be(model: VisualGLM, ids: list[list[int]], pixels: Any, start: Any):
    with pytest.raises(PromptError, match=r"^image_start "):
        model.logits(ids, pixels, start)


def test_answers_of_ids_end_before_eos(model: VisualGLM, ids: list[list[int]], pixels: NDArray[np.float32]):
    answers = model.generate_ids(ids, pixels, 1, max_new_tokens=6)
    for row, answer in enumerate(answers):
        for place in (0, 3):
            eos = answer[place]
            ended = model.generate_ids(ids, pixels, 1, max_new_tokens=6, eos_token_id=eos)[row]
            assert ended == answer[: answer.index(eos)]


def test_a_stream_counts_its_tokens_as_it_goes(model: VisualGLM):
    answer = model.stream(None, QUESTION, **SHORT)
    assert answer.new_tokens == 0
    text = "".join(answer)
    [reply] = model.reply_batch([(None, QUESTION)], **SHORT)
    assert (text, answer.prompt_tokens, answer.new_tokens) == (reply.text, reply.prompt_tokens, reply.new_tokens)
