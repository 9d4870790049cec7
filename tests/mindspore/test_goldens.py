"""Every stage of the converted goldens against what the original put out, in float32 on the CPU.

The bound is a share of the largest value of each array, as for torch.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn
from numpy.typing import NDArray

import visualglm
from tests.mindspore.conftest import GOLDENS, Golden
from visualglm.backends.mindspore.backend import MindSporeBackend
from visualglm.backends.mindspore.chatglm import rotary_table
from visualglm.config import TextConfig

RELATIVE = 5e-6
ABSOLUTE_LOGITS = 2e-5
NEW_TOKENS = 12
Load = Callable[..., MindSporeBackend]


def deviation(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference as a share of the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def logits(golden: Golden, backend: MindSporeBackend, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    embeds = [] if golden.pixels is None else backend.encode_images(golden.pixels)
    return backend.logits(golden.layout(ids), embeds)


def stages(golden: Golden, backend: MindSporeBackend) -> dict[str, NDArray[Any]]:
    """The output of every part, under the names of the golden arrays."""
    model, found = backend.model, {}

    def keep(name: str, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).asnumpy()

    watched: dict[str, nn.Cell] = {"glm_proj_out": model.projection}
    for name, part in (("vit", model.vision), ("qformer", model.qformer), ("glm", model.text)):
        watched[f"{name}_out"] = part
        watched |= {f"{name}_layer{index}": layer for index, layer in enumerate(part.layers)}
    with ExitStack() as hooks:
        for name, cell in watched.items():
            hook = cell.register_forward_hook(lambda _cell, _inputs, output, name=name: keep(name, output))
            hooks.callback(hook.remove)
        first = model.vision.layers[0].register_forward_pre_hook(lambda _cell, inputs: keep("vit_embed", inputs))
        hooks.callback(first.remove)
        found["logits"] = logits(golden, backend, golden.arrays["input_ids"])
    return found


def test_every_stage(golden: Golden, load_backend: Load):
    found = stages(golden, load_backend(golden.directory, "eager"))
    names = [name for name in golden.arrays if name == "logits" or name.startswith(("vit_", "qformer_", "glm_"))]
    assert len(names) == (16 if golden.pixels is not None else 3)
    assert {name: deviation(found[name], golden.arrays[name]) for name in names} == {
        name: pytest.approx(0, abs=RELATIVE) for name in names
    }


def test_logits(golden: Golden, load_backend: Load, mode: str):
    backend = load_backend(golden.directory, mode)
    for name in ("", "train_"):
        found = logits(golden, backend, golden.arrays[f"{name}input_ids"])
        assert np.abs(found - golden.arrays[f"{name}logits"]).max() < ABSOLUTE_LOGITS


def test_logits_are_those_of_torch(golden: Golden, load_backend: Load, mode: str):
    model = visualglm.load(golden.directory.path, backend="torch", device="cpu")
    start = None if golden.pixels is None else int(golden.meta["pre_image"])
    for ids in (golden.arrays["input_ids"], golden.arrays["train_input_ids"]):
        expected = model.logits(ids, golden.pixels, start)
        assert np.abs(logits(golden, load_backend(golden.directory, mode), ids) - expected).max() < ABSOLUTE_LOGITS


def test_each_cached_step(golden: Golden, load_backend: Load, mode: str):
    backend, layout = load_backend(golden.directory, mode), golden.layout(golden.prompt)
    embeds = [] if golden.pixels is None else backend.encode_images(golden.pixels)
    found, cache = backend.prefill(layout, embeds, layout.sequence_length + NEW_TOKENS)
    steps = [found, *(backend.step(np.array([token]), layout, cache) for token in golden.arrays["gen0_ids"][:-1])]
    assert deviation(np.concatenate(steps), golden.arrays["gen0_step_logits"]) < RELATIVE
    assert [int(step.argmax()) for step in steps] == golden.arrays["gen0_ids"].tolist()


def test_left_padded_batch(load_golden: Callable[[str], Golden], load_backend: Load, mode: str):
    """Pad columns are left out: the original lets them see nothing at all, so that what they put out means nothing."""
    golden = load_golden("c_text_only")
    found = logits(golden, load_backend(golden.directory, mode), golden.arrays["lp_input_ids"])
    pads = golden.layout(golden.arrays["lp_input_ids"]).pad_lengths
    assert pads.tolist() == [0, 4]
    for row, pad in enumerate(pads):
        assert np.abs(found[row, pad:] - golden.arrays["lp_logits"][row, pad:]).max() < ABSOLUTE_LOGITS


def test_rotary_tables_are_those_of_the_original():
    with np.load(GOLDENS / "rotary" / "golden.npz") as arrays:
        positions = arrays["positions"]
        expected = np.stack([arrays["fp32_cos"], arrays["fp32_sin"]])
        rounded = np.stack([arrays["satfp16_cos"], arrays["satfp16_sin"]])
    # Half a unit in the last place of an angle is this share of it.
    allowed = 2 * 2.0**-24 * (1 + positions[:, None])
    assert (np.abs(rotary_table(TextConfig())[:, positions] - expected) <= allowed).all()
    found = rotary_table(TextConfig(rotary_inv_freq_dtype="float16"))[:, positions].astype(np.float16)
    np.testing.assert_allclose(found, rounded, rtol=0, atol=2.0**-11)


# What a reader of the original may get wrong: each fault must show well above the bound.
FAULTS: dict[str, Callable[[Any], list[tuple[Any, str, object]]]] = {
    "tanh GELU in the ViT": lambda model: [(layer.mlp, "gelu", "tanh") for layer in model.vision.layers],
    "tanh GELU in the Q-Former": lambda model: [(layer.mlp, "gelu", "tanh") for layer in model.qformer.layers],
    "exact GELU in ChatGLM": lambda model: [(layer.mlp, "gelu", "none") for layer in model.text.layers],
    "no alpha": lambda model: [(layer, "residual_scale", 1.0) for layer in model.text.layers],
    "rotary frequencies rounded": lambda model: [
        (model.text, "rotary", Tensor(model.text.rotary.asnumpy().astype(np.float16).astype(np.float32)))
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bound_is_tight_enough_to_notice(
    fault: str, load_golden: Callable[[str], Golden], load_backend: Load, monkeypatch: pytest.MonkeyPatch
):
    golden = load_golden("a_image_b1")
    backend = load_backend(golden.directory, "eager")
    for owner, name, value in FAULTS[fault](backend.model):
        monkeypatch.setattr(owner, name, value)
    found = logits(golden, backend, golden.arrays["input_ids"])
    assert deviation(found, golden.arrays["logits"]) > 2 * RELATIVE
