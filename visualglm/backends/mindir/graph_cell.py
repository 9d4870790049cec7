"""MindIR graphs on MindSpore itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from numpy.typing import NDArray

from visualglm.backends.mindspore.load import use_device
from visualglm.errors import CheckpointError
from visualglm.signals import held_signals


class MindSporeRuntime:
    """Raises `DeviceError` if the device is not there."""

    def __init__(self, device: str, threads: int) -> None:
        self.description = f"mindir on {use_device(device)}"
        ms.set_context(runtime_num_threads=threads)

    @property
    def threads(self) -> int:
        return int(ms.get_context("runtime_num_threads"))

    def load(self, path: Path) -> _Graph:
        """Raises `CheckpointError` if MindSpore cannot read the graph."""
        try:
            with held_signals():
                return _Graph(nn.GraphCell(ms.load(str(path))))
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be loaded by MindSpore {ms.__version__}: it is damaged or was made by another version; "
                "export the model again."
            ) from error


class _Graph:
    def __init__(self, cell: nn.GraphCell) -> None:
        self._cell = cell

    def __call__(
        self, inputs: Sequence[NDArray[Any]], past: Sequence[Tensor] = ()
    ) -> tuple[NDArray[np.float32], Sequence[Tensor]]:
        with held_signals():
            outputs = self._cell(*map(Tensor.from_numpy, inputs), *past)
            first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
            array: NDArray[np.float32] = first.asnumpy()
        return array, others
