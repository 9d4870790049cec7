"""MindIR graphs on MindSpore Lite. Written by its documentation; nobody here could try it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore_lite as mslite
import numpy as np
from numpy.typing import NDArray

from visualglm.errors import CheckpointError, DeviceError

_DEVICE = re.compile(r"(cpu|ascend)(?::(\d+))?")


class LiteRuntime:
    """options: the file `context.cfg`, as the recipe has one. Raises `DeviceError` if the device is unknown."""

    def __init__(self, device: str, threads: int, options: Path | None) -> None:
        found = _DEVICE.fullmatch("cpu" if device == "auto" else device)
        if found is None:
            raise DeviceError(f"The device {device!r} is unknown to the mindir backend; give auto, cpu or ascend.")
        self.threads = threads
        self.description = f"mindir by MindSpore Lite on {found[0]}"
        self._options = "" if options is None else str(options)
        self._context = mslite.Context()
        self._context.target = [found[1]]
        self._context.cpu.thread_num = threads
        if found[1] == "ascend":
            self._context.ascend.device_id = int(found[2] or 0)

    def load(self, path: Path) -> _Graph:
        """Raises `CheckpointError` if MindSpore Lite cannot read the graph."""
        model = mslite.Model()
        try:
            model.build_from_file(str(path), mslite.ModelType.MINDIR, self._context, self._options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be loaded by MindSpore Lite: it is damaged or was made by another version; "
                "export the model again, or uninstall mindspore_lite to run it by MindSpore."
            ) from error
        return _Graph(model)


class _Graph:
    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self, inputs: Sequence[NDArray[Any]], past: Sequence[Any] = ()
    ) -> tuple[NDArray[np.float32], Sequence[Any]]:
        first, *others = self._model.predict([*map(mslite.Tensor, inputs), *past])
        array: NDArray[np.float32] = first.get_data_to_numpy()
        return array, others
