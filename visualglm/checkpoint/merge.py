"""A model and an adapter as one model: weights that are added up when they are read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import AdapterDirectory, LoraPair, require_base, require_finite
from visualglm.checkpoint.manifest import MergedAdapter, Source
from visualglm.checkpoint.model_dir import (
    ModelDirectory,
    fill_model_directory,
    open_model_directory,
    read_weights,
    staged_checkpoint,
)
from visualglm.checkpoint.progress import ByteProgress, Report
from visualglm.checkpoint.tensors import RowTensor, Tensor, as_float32, rounded, row_blocks
from visualglm.config import DType
from visualglm.errors import CheckpointError

# Half a unit in the last place of a number near 1, and the smallest number there is.
_ROUNDING: Mapping[str, tuple[float, float]] = {
    "float32": (2.0**-24, 2.0**-149),
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-133),
}
_PROBES = 4


@dataclass(frozen=True)
class MergedDirectory(ModelDirectory):
    """A model directory as it is with an adapter; nothing of it is on the disk."""

    adapter: AdapterDirectory

    @property
    def fingerprint(self) -> str:
        """Of both."""
        return fingerprint_of_both(self.manifest.fingerprint, self.adapter)


@dataclass(frozen=True)
class Deviation:
    """How far what was written is from base and adapter, of the largest output of a layer, on random inputs."""

    module: str
    relative: float


@dataclass(frozen=True)
class Merge:
    """What was written, and how far each merged layer is from base(x) + Δ(x)."""

    output: ModelDirectory
    adapter: AdapterDirectory
    deviations: tuple[Deviation, ...]


def fingerprint_of_both(base: str, adapter: AdapterDirectory) -> str:
    """Identifies a model with an adapter."""
    return sha256(f"{base} {adapter.fingerprint}".encode()).hexdigest()


def merged(directory: ModelDirectory, adapter: AdapterDirectory, dtype: DType | None = "float32") -> MergedDirectory:
    """`directory` as it is with `adapter`: a view whose tensors are computed when they are read.

    dtype: of the weights that the adapter changes; float32 loses nothing of them. None: what each is in `directory`.
    Raises `CheckpointError` if the adapter belongs to another model, has values that are not finite, or prefixes,
    which no weights can hold.
    """
    require_base(adapter, directory)
    require_finite(adapter)
    if adapter.prefix:
        raise CheckpointError(
            f"The adapter {adapter.path} has learned prefixes (P-tuning), which cannot be merged into weights; "
            "use it with --adapter and --backend torch."
        )
    tensors = dict(directory.tensors)
    for module, pair in adapter.lora.items():
        name = f"{module}.weight"
        tensors[name] = _merged_tensor(name, tensors[name], pair, dtype or tensors[name].dtype)
    for name, tensor in adapter.trained.items():
        tensors[name] = _in_type(name, tensor, dtype or tensors[name].dtype)
    facts = {field.name: getattr(directory, field.name) for field in fields(ModelDirectory)}
    manifest = directory.manifest.model_copy(update={"source": _source(directory, adapter)})
    return MergedDirectory(**facts | {"tensors": tensors, "manifest": manifest}, adapter=adapter)


def merge(
    directory: ModelDirectory,
    adapter: AdapterDirectory,
    output: Path | str,
    *,
    dtype: DType | None = "float32",
    force: bool = False,
    report: Report | None = None,
) -> Merge:
    """Write `directory` with `adapter` as the model directory `output`, which appears whole or not at all.

    dtype: see `merged`. Before it appears, each merged layer is read back and held against base(x) + Δ(x) on random
    x. Raises `CheckpointError` as `merged` does, and if `output` is in use, the disk fills up, a merged weight is too
    large for the type, or a layer deviates by more than its type explains.
    """
    checkpoint = merged(directory, adapter, dtype).checkpoint
    _require_apart(Path(output), directory.path, adapter.path)
    with staged_checkpoint(output, checkpoint, force=force) as folder:
        fill_model_directory(folder, checkpoint, ByteProgress(checkpoint.size_bytes, report))
        deviations = _prove(directory, adapter, read_weights(folder, directory.config))
    return Merge(open_model_directory(output), adapter, deviations)


def _source(directory: ModelDirectory, adapter: AdapterDirectory) -> Source:
    """That of the base, which is still the way back into its format, and what was added."""
    source = directory.manifest.source
    added = MergedAdapter(
        base=directory.fingerprint, adapter=adapter.fingerprint, adapter_name=adapter.path.resolve().name
    )
    return source.model_copy(update={"merged": (*(source.merged or ()), added)})


def _require_apart(output: Path, *sources: Path) -> None:
    """The output would be deleted first, and the source with it."""
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise CheckpointError(f"{output} holds {source}, which is to be merged; give another folder.")


def _prove(
    directory: ModelDirectory, adapter: AdapterDirectory, written: Mapping[str, Tensor]
) -> tuple[Deviation, ...]:
    random = np.random.default_rng(0)
    proven = []
    for module, pair in adapter.lora.items():
        name = f"{module}.weight"
        x = random.standard_normal((pair.a.shape[1], _PROBES))
        proven.append(Deviation(module, _deviation(directory.tensors[name], pair, written[name], x, name)))
    return tuple(proven)


def _deviation(base: Tensor, pair: LoraPair, written: Tensor, x: NDArray[np.float64], name: str) -> float:
    """max |written(x) - base(x) - Δ(x)| / max |base(x) + Δ(x)|; `CheckpointError` if rounding does not explain it."""
    unit, least = _ROUNDING[written.dtype]
    inner = pair.scale * (_float64(pair.a) @ x)
    off = largest = 0.0
    for rows in row_blocks(base.shape):
        weight, made = _float64(base, rows), _float64(written, rows)
        expected = weight @ x + _float64(pair.b, rows) @ inner
        difference = np.abs(made @ x - expected)
        # Twice, since float64 rounds too.
        allowed = 2 * (unit * np.abs(made) + least) @ np.abs(x)
        if not (difference <= allowed).all():
            raise CheckpointError(
                f"{name} as it was written is not the sum of base and adapter; check the disk, and merge again."
            )
        off, largest = max(off, float(difference.max())), max(largest, float(np.abs(expected).max()))
    return off / largest if largest else 0.0


def _merged_tensor(name: str, weight: Tensor, pair: LoraPair, dtype: str) -> RowTensor:
    """weight + scale * b @ a, [out, in], added up in float64."""

    def rows(part: slice) -> NDArray[Any]:
        delta = _float64(pair.b, part) @ _float64(pair.a)
        return _rounded(_float64(weight, part) + pair.scale * delta, dtype, name)

    return RowTensor(dtype, weight.shape, rows)


def _in_type(name: str, tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    return RowTensor(dtype, tensor.shape, lambda part: _rounded(_float64(tensor, part), dtype, name))


def _float64(tensor: Tensor, rows: slice = slice(None)) -> NDArray[np.float64]:
    return as_float32(tensor.array()[rows], tensor.dtype).astype(np.float64)


def _rounded(values: NDArray[np.floating[Any]], dtype: str, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        result = rounded(values.astype(np.float32), dtype)
    if not np.isfinite(as_float32(result, dtype)).all():
        remedy = "train the adapter again" if dtype == "float32" else "give --dtype float32"
        raise CheckpointError(f"The merged {name} has values too large for {dtype}; {remedy}.")
    return result
