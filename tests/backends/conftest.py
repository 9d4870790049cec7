"""The original's own numbers, and random models of any size with a reference to hold them against."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import visualglm
from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import write_model_directory
from visualglm.checkpoint.tensors import LazyTensor
from visualglm.config import VisualGLMConfig
from visualglm.model import VisualGLM
from visualglm.parameters import parameter_shapes

GOLDENS = Path(__file__).parent.parent / "goldens"
GOLDEN_NAMES = ("a_image_b1", "c_text_only")


@dataclass(frozen=True)
class Golden:
    """What the original put out for an archive, and the archive converted and loaded."""

    model: VisualGLM
    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]

    @property
    def pixels(self) -> NDArray[np.float32] | None:
        return self.arrays.get("image")

    @property
    def image_start(self) -> int | None:
        return None if self.pixels is None else int(self.meta["pre_image"])

    @property
    def prompt(self) -> NDArray[np.int64]:
        """[1, prompt_len], up to and with `<sop>`."""
        ids: NDArray[np.int64] = self.arrays["input_ids"][:, : self.meta["prompt_len"]]
        return ids


@pytest.fixture(scope="session")
def load_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Converts and loads an archive under `tests/goldens`, once; "a_hf_layout" has the arrays of "a_image_b1"."""
    loaded: dict[str, Golden] = {}

    def load(name: str) -> Golden:
        if name not in loaded:
            folder = tmp_path_factory.mktemp("golden") / name
            convert(GOLDENS / name, folder)
            numbers = GOLDENS / ("a_image_b1" if name == "a_hf_layout" else name)
            meta = json.loads((numbers / "meta.json").read_text("utf-8"))
            with np.load(numbers / "golden.npz") as arrays:
                loaded[name] = Golden(visualglm.load(folder, backend="torch", device="cpu"), dict(arrays), meta)
        return loaded[name]

    return load


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest, load_golden: Callable[[str], Golden]) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def write_random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a float32 model directory of random weights; `scales` multiplies those whose name starts so."""

    def write(config: VisualGLMConfig, *, seed: int = 0, scales: Mapping[str, float] | None = None) -> Path:
        random = np.random.default_rng(seed)
        tensors = {}
        for name, shape in parameter_shapes(config).items():
            values = random.normal(0, 1.0 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1, shape)
            values += 1.0 if "norm" in name and name.endswith("weight") else 0.0
            for start, scale in (scales or {}).items():
                values *= scale if name.startswith(start) else 1.0
            array = values.astype(np.float32)
            tensors[name] = LazyTensor("float32", shape, partial(np.asarray, array))
        checkpoint = Checkpoint(config.model_copy(update={"dtype": "float32"}), tensors, Source(format="random"))
        return write_model_directory(tmp_path_factory.mktemp("random") / "model", checkpoint).path

    return write
