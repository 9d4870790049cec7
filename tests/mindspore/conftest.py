"""Models on MindSpore, each loaded once: eager, and as graphs."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visualglm.backends.mindspore.backend import MindSporeBackend
from visualglm.backends.mindspore.environment import prepare_mindspore
from visualglm.backends.mindspore.load import load_mindspore_backend
from visualglm.checkpoint.convert import convert
from visualglm.checkpoint.model_dir import ModelDirectory, open_model_directory
from visualglm.processing.layout import Layout, layout_from_ids

GOLDENS = Path(__file__).parent.parent / "goldens"
MODES = {"eager": False, "graph": True}
_WORKER = "PYTEST_XDIST_WORKER"
_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()


def pytest_configure() -> None:
    """Tests that run beside others keep to a core of their own.

    MindSpore shares every small operator out among the threads of all cores, which here only wait for one another.
    """
    worker = os.environ.get(_WORKER, "").removeprefix("gw")
    if worker:
        keep_to([core for place, core in enumerate(sorted(_CORES)) if place == int(worker) % len(_CORES)])


def keep_to(cores: Collection[int]) -> None:
    """Where this process computes from now on, and those that it starts; nothing is done for no cores."""
    if cores:
        os.sched_setaffinity(0, cores)


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For a test that starts several processes, which on one core would wait for one another."""
    kept = os.sched_getaffinity(0) if _CORES else set()
    keep_to(_CORES)
    yield
    keep_to(kept)


@pytest.fixture(scope="session", autouse=True)
def environment(export_cache: Path) -> None:
    """As the package sets it up, so that nothing is written where the tests are run."""
    prepare_mindspore()


@dataclass(frozen=True)
class Golden:
    """What the original put out for an archive, and the archive converted."""

    directory: ModelDirectory
    arrays: Mapping[str, NDArray[Any]]
    meta: Mapping[str, Any]

    @property
    def pixels(self) -> NDArray[np.float32] | None:
        return self.arrays.get("image")

    @property
    def prompt(self) -> NDArray[np.int64]:
        """[1, prompt_len], up to and with `<sop>`."""
        ids: NDArray[np.int64] = self.arrays["input_ids"][:, : self.meta["prompt_len"]]
        return ids

    def layout(self, ids: NDArray[np.int64]) -> Layout:
        text = self.directory.config.text
        start = None if self.pixels is None else int(self.meta["pre_image"])
        return layout_from_ids(ids, pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id, image_start=start)


@pytest.fixture(scope="session")
def load_golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Golden]:
    """Converts an archive under `tests/goldens`, once."""
    loaded: dict[str, Golden] = {}

    def load(name: str) -> Golden:
        if name not in loaded:
            folder = tmp_path_factory.mktemp("golden") / name
            convert(GOLDENS / name, folder)
            meta = json.loads((GOLDENS / name / "meta.json").read_text("utf-8"))
            with np.load(GOLDENS / name / "golden.npz") as arrays:
                loaded[name] = Golden(open_model_directory(folder), dict(arrays), meta)
        return loaded[name]

    return load


@pytest.fixture(params=["a_image_b1", "c_text_only"])
def golden(request: pytest.FixtureRequest, load_golden: Callable[[str], Golden]) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def load_backend() -> Callable[[ModelDirectory, str], MindSporeBackend]:
    """Loads a model directory in a mode of `MODES`, once."""
    loaded: dict[tuple[Path, str], MindSporeBackend] = {}

    def load(directory: ModelDirectory, mode: str) -> MindSporeBackend:
        key = (directory.path, mode)
        if key not in loaded:
            loaded[key] = load_mindspore_backend(directory, "cpu", compiled=MODES[mode], threads=1)
        return loaded[key]

    return load


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)
