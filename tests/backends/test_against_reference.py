"""Models of other sizes, batches and positions against a plain float64 reference, by way of a SAT archive.

The goldens are few; what they do not vary is varied here: sizes that share no factor, 8 queries, images in some rows of
a batch, slots at the very beginning, and residual streams so small that the eps of each norm decides.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import visualglm
from tests.backends.reference import reference_logits
from visualglm.backends.torch.backend import TorchBackend
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.config import VisualGLMConfig
from visualglm.errors import PromptError
from visualglm.model import VisualGLM

# Measured: at most 9e-7 of the largest logit.
RELATIVE = 5e-6
WINDOW = 80
PAD, GMASK, BOS = 3, 96, 98
TOKENS = {"pad_token_id": PAD, "mask_token_id": 95, "gmask_token_id": GMASK, "bos_token_id": BOS, "eos_token_id": 99}

ODD_SIZES: dict[str, Any] = {
    "vision": {"image_size": 42, "hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 44},
    "qformer": {"num_query_tokens": 8, "hidden_size": 20, "num_attention_heads": 5, "intermediate_size": 28},
    "text": {"vocab_size": 101, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 72},
}
EVEN_SIZES: dict[str, Any] = {
    "vision": {"image_size": 28, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 64},
    "qformer": {"num_query_tokens": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64},
    "text": {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 128},
}
# Streams whose variance is like the eps of the norms that read them.
TINY_STREAMS = {
    "vision.patch_embed": 2e-4,
    "vision.class_token": 3e-4,
    "vision.position_embeddings": 3e-4,
    "vision.layers.0.attention.proj": 1e-3,
    "vision.layers.0.mlp.fc2": 1e-3,
    "vision.layers.1.attention.proj": 1e-3,
    "vision.layers.1.mlp.fc2": 1e-3,
    "qformer.query_tokens": 1e-6,
    "text.word_embeddings": 3e-3,
    "projection": 2e-3,
}


def config_of(sizes: dict[str, Any], layers: int = 3, **text: Any) -> VisualGLMConfig:
    parts = {name: {**part, "num_hidden_layers": layers} for name, part in sizes.items()}
    parts["qformer"]["cross_attention_layers"] = range(0, layers, 2)
    parts["text"] |= {"max_sequence_length": WINDOW, **TOKENS, **text}
    return VisualGLMConfig.model_validate(parts)


@dataclass(frozen=True)
class Case:
    """A loaded model, and its weights in float64."""

    model: VisualGLM
    tensors: dict[str, NDArray[np.float64]]

    @property
    def config(self) -> VisualGLMConfig:
        return self.model.config

    def pixels(self, images: int) -> NDArray[np.float32]:
        size = self.config.vision.image_size
        return np.random.default_rng(images).normal(size=(images, 3, size, size)).astype(np.float32)

    def row(self, before: int, question: int, answer: int, *, has_image: bool, slot_id: int = PAD) -> list[int]:
        """A prompt with so many random ids before and after the slots, and after `<sop>`."""
        count = self.config.qformer.num_query_tokens if has_image else 0
        ids = np.random.default_rng([before, question, answer]).integers(4, 95, before + question + answer).tolist()
        slots = [slot_id] * count
        return [*ids[:before], *slots, *ids[before : before + question], GMASK, BOS, *ids[before + question :]]

    def expected(self, ids: list[int], pixels: NDArray[Any] | None = None, start: int | None = None) -> NDArray[Any]:
        return reference_logits(self.config, self.tensors, np.array(ids), pixels, start)


def case_of(folder: Path) -> Case:
    stored = open_model_directory(folder).tensors
    tensors = {name: tensor.array().astype(np.float64) for name, tensor in stored.items()}
    return Case(visualglm.load(folder, backend="torch", device="cpu"), tensors)


@pytest.fixture(scope="module")
def make_case(write_random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """A random model that has been a SAT archive on its way; made once for the same sizes."""
    made: dict[str, Case] = {}

    def make(config: VisualGLMConfig, **options: Any) -> Case:
        key = repr((config, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("case")
            convert(write_random_model(config, **options), folder / "sat", to="sat")
            convert(folder / "sat", folder / "model")
            made[key] = case_of(folder / "model")
        return made[key]

    return make


@pytest.fixture(params=["odd", "even", "one layer"])
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    configs = {"odd": config_of(ODD_SIZES), "even": config_of(EVEN_SIZES), "one layer": config_of(ODD_SIZES, layers=1)}
    return make_case(configs[request.param])


def check(found: NDArray[Any], expected: NDArray[Any]) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < RELATIVE * np.abs(expected).max()


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("slot_id", [PAD, 0])
def test_slots_wherever_they_are_and_whatever_their_ids(case: Case, before: int, slot_id: int):
    ids, pixels = case.row(before, 6, 4, has_image=True, slot_id=slot_id), case.pixels(1)
    check(case.model.logits([ids], pixels, before)[0], case.expected(ids, pixels[0], before))


def test_text_only(case: Case):
    for question, answer in ((0, 0), (1, 0), (9, 7)):
        ids = case.row(0, question, answer, has_image=False)
        check(case.model.logits([ids])[0], case.expected(ids))


def test_slots_up_to_gmask(case: Case):
    ids, pixels = case.row(2, 0, 3, has_image=True), case.pixels(1)
    check(case.model.logits([ids], pixels, 2)[0], case.expected(ids, pixels[0], 2))


@pytest.mark.parametrize(
    "as_given", [int, np.int64, np.array, lambda start: [start] * 3, lambda start: np.full(3, start)]
)
def test_one_image_start_for_a_batch_of_images(case: Case, as_given: Callable[[int], Any]):
    rows = [case.row(4, question, 9 - question, has_image=True) for question in (3, 5, 8)]
    pixels = case.pixels(3)
    logits = case.model.logits(rows, pixels, as_given(4))
    for row, ids in enumerate(rows):
        check(logits[row], case.expected(ids, pixels[row], 4))


def test_ragged_rows_with_and_without_images(case: Case):
    """Left-padded to one length; pad columns put out nothing that means anything, so they are not compared."""
    rows = [
        case.row(0, 3, 2, has_image=True),
        case.row(0, 12, 5, has_image=False),
        case.row(5, 9, 0, has_image=True),
        case.row(0, 1, 1, has_image=False),
    ]
    starts, pixels = [0, None, 5, -1], case.pixels(2)
    longest = max(map(len, rows))
    pads = [longest - len(ids) for ids in rows]
    padded = [[PAD] * pad + ids for pad, ids in zip(pads, rows, strict=True)]
    columns = [start if start in (None, -1) else start + pad for start, pad in zip(starts, pads, strict=True)]
    logits = case.model.logits(padded, pixels, columns)
    images = iter(pixels)
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        image = None if start in (None, -1) else next(images)
        check(logits[row, pads[row] :], case.expected(ids, image, None if image is None else start))


def test_right_padding_is_text_that_no_column_before_it_sees(case: Case):
    ids, pixels = case.row(2, 6, 4, has_image=True), case.pixels(1)
    padded = [*ids, 99, PAD, PAD]
    check(case.model.logits([padded], pixels, 2)[0], case.expected(padded, pixels[0], 2))


def test_pixels_of_any_memory_order_or_type(case: Case):
    ids, pixels = case.row(2, 6, 4, has_image=True), case.pixels(1)
    expected = case.model.logits([ids], pixels, 2)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    flipped = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]
    for same in (frozen, flipped, pixels.astype(np.float64), np.asfortranarray(pixels), pixels.tolist()):
        np.testing.assert_array_equal(case.model.logits(np.array([ids], np.int32), same, 2), expected)


def test_greedy_answers_are_those_of_the_reference(case: Case):
    """Token by token from the reference's logits of the whole text so far."""
    rows, starts = [case.row(2, 6, 0, has_image=True), case.row(0, 9, 0, has_image=False)], [2, None]
    pixels = case.pixels(1)
    for ids, start in zip(rows, starts, strict=True):
        image = None if start is None else pixels
        text = list(ids)
        for _ in range(6):
            text.append(int(case.expected(text, None if image is None else image[0], start)[-1].argmax()))
        found = case.model.generate_ids([ids], image, start, max_new_tokens=6, suppress_tokens=())
        expected = text[len(ids) :]
        eos = case.config.text.eos_token_id
        assert found == [expected[: expected.index(eos)] if eos in expected else expected]


def test_the_whole_window_is_filled(case: Case):
    ids = case.row(0, WINDOW - 12, 0, has_image=False)
    (answer,) = case.model.generate_ids([ids], max_new_tokens=10, suppress_tokens=[99])
    assert len(ids) + len(answer) == WINDOW
    check(case.model.logits([[*ids, *answer]])[0], case.expected([*ids, *answer]))
    with pytest.raises(PromptError, match="window of 80"):
        case.model.generate_ids([ids], max_new_tokens=11)


def test_more_images_than_go_through_the_vit_at_once(make_case: Callable[..., Case]):
    case = make_case(config_of(EVEN_SIZES))
    ids, pixels = case.row(1, 4, 0, has_image=True), case.pixels(35)
    logits = case.model.logits([ids] * 35, pixels, 1)
    for row in (0, 15, 16, 34):
        check(logits[row], case.expected(ids, pixels[row], 1))


# --- eps --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_streams(make_case: Callable[..., Case]) -> Case:
    return make_case(config_of(ODD_SIZES, layers=2), scales=TINY_STREAMS)


def test_streams_as_small_as_eps(tiny_streams: Case):
    ids, pixels = tiny_streams.row(3, 6, 4, has_image=True), tiny_streams.pixels(1)
    check(tiny_streams.model.logits([ids], pixels, 3)[0], tiny_streams.expected(ids, pixels[0], 3))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("vision", "layer_norm_eps"),
        ("vision", "final_layer_norm_eps"),
        ("qformer", "layer_norm_eps"),
        ("text", "layer_norm_eps"),
    ],
)
def test_every_eps_shows_in_them(part: str, name: str, tiny_streams: Case):
    """Else the test above would not notice a wrong one."""
    config = tiny_streams.config.model_dump()
    config[part][name] *= 2
    other = VisualGLMConfig.model_validate(config)
    ids, pixels = np.array(tiny_streams.row(3, 6, 4, has_image=True)), tiny_streams.pixels(1)[0]
    expected, found = (
        reference_logits(settings, tiny_streams.tensors, ids, pixels, 3) for settings in (tiny_streams.config, other)
    )
    assert np.abs(found - expected).max() > 10 * RELATIVE * np.abs(expected).max()


# --- archives that say less -------------------------------------------------------------------------------------------


def test_an_archive_without_the_keys_that_can_be_told_from_others(write_random_model, tmp_path: Path):
    """As older archives are: MLPs of four times the width, cross-attention in every even layer, and the usual eps."""
    config = config_of(EVEN_SIZES).model_copy(update={"dtype": "float32"})
    convert(write_random_model(config), tmp_path / "sat", to="sat")
    path = tmp_path / "sat" / "model_config.json"
    values = json.loads(path.read_text())
    for section in (values, values["eva_args"], values["qformer_args"]):
        for name in ("inner_hidden_size", "layernorm_epsilon", "layernorm_order", "model_parallel_size", "is_decoder"):
            section.pop(name, None)
    del values["image_length"], values["model_class"]
    for name in ("patch_size", "in_channels", "pre_len", "post_len", "num_classes", "use_final_layernorm"):
        values["eva_args"].pop(name, None)
    path.write_text(json.dumps(values))
    convert(tmp_path / "sat", tmp_path / "model")
    case = case_of(tmp_path / "model")
    assert case.config == config
    ids, pixels = case.row(2, 6, 4, has_image=True), case.pixels(1)
    check(case.model.logits([ids], pixels, 2)[0], case.expected(ids, pixels[0], 2))


def test_the_backend_is_torch(case: Case):
    assert isinstance(case.model.backend, TorchBackend)
    assert case.model.backend.description == "torch on cpu, float32"
