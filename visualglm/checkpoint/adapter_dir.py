"""The adapter directory: what fine-tuning changed of a model, in PEFT's format with a manifest beside it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import (
    checked_path,
    file_pieces,
    hash_pieces,
    read_json_object,
    readable,
    staged_folder,
    write_file,
)
from visualglm.checkpoint.instead import adapter_inside, require_model_folder
from visualglm.checkpoint.keys import hf_modules
from visualglm.checkpoint.listed_files import open_manifest, require_sizes
from visualglm.checkpoint.manifest import ADAPTER, MANIFEST, FileRecord, FolderManifest, Sha256, Source
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.peft_config import PEFT_CONFIG, LoraSettings, read_lora_settings
from visualglm.checkpoint.pickle_reader import read_torch_archive
from visualglm.checkpoint.replaceable import require_replaceable_as
from visualglm.checkpoint.safetensors_file import read_safetensors, safetensors_pieces
from visualglm.checkpoint.tensors import (
    WEIGHT_DTYPES,
    LazyTensor,
    Piece,
    StoredTensor,
    as_float32,
    row_blocks,
    tensor_bytes,
)
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.parameters import parameter_shapes, prefix_name

PEFT_WEIGHTS, PEFT_PICKLED = "adapter_model.safetensors", "adapter_model.bin"
TRAINED, PREFIX = "trained.safetensors", "prefix.safetensors"

_OVERHEAD_BYTES = 1_000_000
_MOST_FAULTS = 3
_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# Looked up, not multiplied.
_NOT_LINEAR = "text.word_embeddings"


class AdapterManifest(FolderManifest):
    """The manifest of an adapter. base_fingerprint, base_name: of the model that it belongs to, None if that is not
    known. settings: how it was trained, for readers."""

    kind = ADAPTER

    format: Literal["visualglm-adapter"] = "visualglm-adapter"
    base_fingerprint: Sha256 | None
    base_name: str | None
    settings: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class LoraPair:
    """What is added to a linear layer: scale * (x @ a.T) @ b.T. a: [rank, in], b: [out, rank]."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterDirectory:
    """An opened adapter.

    manifest: None for one that PEFT wrote elsewhere. lora: pairs by the names of their modules. trained: whole
    parameters in place of the model's, by their names. prefix: by `prefix_name`, in every layer or in none.
    fingerprint: identifies all of it.
    """

    path: Path
    manifest: AdapterManifest | None
    settings: LoraSettings | None
    fingerprint: str
    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    trained: Mapping[str, StoredTensor] = field(default_factory=dict)
    prefix: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def knows_base(self) -> bool:
        """Whether it says which model it belongs to."""
        return self.manifest is not None and self.manifest.base_fingerprint is not None

    @property
    def warning(self) -> str | None:
        """What users should be told, if something is left unchecked."""
        if self.knows_base:
            return None
        return (
            f"The adapter {self.path} does not say which model it belongs to; "
            "that it fits this one is all that could be checked."
        )

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All of them, by their names in messages."""
        pairs = {f"{name}.lora_A": pair.a for name, pair in self.lora.items()}
        pairs |= {f"{name}.lora_B": pair.b for name, pair in self.lora.items()}
        return {**pairs, **self.trained, **self.prefix}

    @property
    def parameter_count(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def open_adapter(path: Path | str) -> AdapterDirectory:
    """Open and check an adapter: all but the hash of whole parameters, and whether its numbers are finite.

    Raises `CheckpointError` if it is none, of a newer version, its files are missing or changed, its configuration is
    not valid or asks for more than plain LoRA, or its tensors are not what the configuration says.
    """
    path = checked_path(path)
    require_model_folder(path)
    if (path / MANIFEST).is_file():
        manifest = open_manifest(path, AdapterManifest)
        require_sizes(path, manifest)
        _require_unchanged(path, manifest)
        return _read(path, manifest, {name: record.sha256 for name, record in manifest.files.items()})
    if not (path / PEFT_CONFIG).is_file():
        known = adapter_inside(path) or f"a folder made by `{ADAPTER.command}`, `visualglm convert` or PEFT"
        raise CheckpointError(f"{path} is no adapter: neither {MANIFEST} nor {PEFT_CONFIG} is there; give {known}.")
    weights = next((name for name in (PEFT_WEIGHTS, PEFT_PICKLED) if (path / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{path} has neither {PEFT_WEIGHTS} nor {PEFT_PICKLED}; get the adapter again.")
    return _read(path, None, {name: hash_pieces(file_pieces(path / name)) for name in (PEFT_CONFIG, weights)}, weights)


def write_adapter(
    path: Path | str,
    *,
    base: ModelDirectory | None,
    lora_settings: Mapping[str, Any] | None = None,
    lora: Mapping[str, NDArray[Any]] | None = None,
    trained: Mapping[str, NDArray[Any]] | None = None,
    prefix: Mapping[str, NDArray[Any]] | None = None,
    source: Source,
    base_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    force: bool = False,
) -> AdapterDirectory:
    """Write an adapter that appears under `path` whole or not at all.

    base: the model it belongs to, None if that is not known; base_name: what users call it, else the name of its
    folder. lora_settings: the values of PEFT's `adapter_config.json`; lora: float arrays by PEFT's names
    (`base_model.model.text.layers.0.attention.qkv.lora_A.weight`). trained, prefix: float arrays, see
    `AdapterDirectory`. settings: how it was trained. force: replace a folder that holds an adapter and nothing else.
    Raises `CheckpointError` if the tensors fit neither the settings nor the base, or are not finite, `path` is in use,
    or the disk fills up.
    """
    path = checked_path(path)
    parts = {
        name: {key: _lazy(key, array) for key, array in arrays.items()}
        for name, arrays in ((PEFT_WEIGHTS, lora), (TRAINED, trained), (PREFIX, prefix))
        if arrays
    }
    if not parts:
        raise CheckpointError(f"The adapter {path} would hold nothing; train something before it is written.")
    files: dict[str, Iterable[Piece]] = {name: safetensors_pieces(tensors) for name, tensors in parts.items()}
    if PEFT_WEIGHTS in parts:
        files[PEFT_CONFIG] = [json.dumps(dict(lora_settings or {}), indent=2).encode()]
    tensors = [tensor for part in parts.values() for tensor in part.values()]
    facts = {
        "parameter_count": sum(prod(tensor.shape) for tensor in tensors),
        "source": source,
        "base_fingerprint": base.fingerprint if base else None,
        "base_name": base_name or (base.path.resolve().name if base else None),
        "settings": dict(settings or {}),
    }
    needed = sum(map(tensor_bytes, tensors)) + _OVERHEAD_BYTES
    replaceable = partial(require_replaceable_as, AdapterManifest)
    with staged_folder(path, needed_bytes=needed, force=force, require_replaceable=replaceable) as folder:
        _fill(folder, files, facts)
        written = replace(open_adapter(folder), path=path)
        require_finite(written)
        if base:
            require_base(written, base)
    return open_adapter(path)


def require_base(adapter: AdapterDirectory, directory: ModelDirectory) -> None:
    """Raises `CheckpointError` if `adapter` belongs to another model than `directory`, or does not fit it.

    One that does not say where it belongs (see `knows_base`) is asked only whether it fits.
    """
    manifest = adapter.manifest
    if manifest and manifest.base_fingerprint and manifest.base_fingerprint != directory.fingerprint:
        raise CheckpointError(
            f"The adapter {adapter.path} belongs to the model {readable(manifest.base_name or 'unknown')} (fingerprint "
            f"{manifest.base_fingerprint[:12]}), and {directory.path} is another one ({directory.fingerprint[:12]}); "
            "give it with the model that it was trained on."
        )
    if adapter.lora.keys() & hf_modules(directory.config).keys():
        raise CheckpointError(
            f"The adapter {adapter.path} was trained on the Hugging Face model, where layers have other names; "
            f"convert it with `visualglm convert {shlex.quote(str(adapter.path))} OUT --base MODEL`, and give OUT."
        )
    faults = list(_misfits(adapter, directory.config))
    if faults:
        raise CheckpointError(f"The adapter {adapter.path} does not fit the model {directory.path}: {listed(faults)}.")


def require_finite(adapter: AdapterDirectory) -> None:
    """Raises `CheckpointError` that names the first tensor with a value that is no finite number."""
    for name, tensor in adapter.tensors.items():
        # Mapped anew for each part of it: what was read of a mapping stays in memory as long as that lives.
        parts = (as_float32(tensor.array()[rows], tensor.dtype) for rows in row_blocks(tensor.shape))
        if not all(np.isfinite(part).all() for part in parts):
            raise CheckpointError(
                f"The tensor {readable(name)} of the adapter {adapter.path} holds values that are not finite numbers; "
                "use an earlier checkpoint of the training."
            )


def _read(
    path: Path, manifest: AdapterManifest | None, hashes: Mapping[str, str], weights: str = PEFT_WEIGHTS
) -> AdapterDirectory:
    """The adapter with these files, of which `weights` has LoRA."""
    settings = None
    if PEFT_CONFIG in hashes or weights in hashes:
        settings = read_lora_settings(read_json_object(path / PEFT_CONFIG), path / PEFT_CONFIG)
    found = AdapterDirectory(
        path=path,
        manifest=manifest,
        settings=settings,
        fingerprint=sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest(),
        lora=_read_lora(path / weights, settings) if settings else {},
        trained=_read_floats(path / TRAINED) if TRAINED in hashes else {},
        prefix=_read_floats(path / PREFIX) if PREFIX in hashes else {},
    )
    if not found.tensors:
        raise CheckpointError(f"The adapter {path} holds nothing; {ADAPTER.remedy}.")
    return found


def _require_unchanged(path: Path, manifest: AdapterManifest) -> None:
    """What is read only when it is needed may be gigabytes; all else is hashed, since exports are cached by it."""
    for name, record in manifest.files.items():
        if name != TRAINED and hash_pieces(file_pieces(path / name)) != record.sha256:
            raise CheckpointError(f"{path / name} changed since it was written; {ADAPTER.remedy}.")


def _read_lora(path: Path, settings: LoraSettings) -> dict[str, LoraPair]:
    pairs: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in _read_floats(path).items():
        match = _LORA_NAME.fullmatch(name)
        if match:
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            unknown.append(name)
    faults = [f"{name} is no part of a LoRA pair" for name in unknown]
    faults += [fault for name, pair in pairs.items() for fault in _pair_faults(name, pair, settings.rank(name))]
    faults += settings.target_faults(pairs) if pairs else ["it is empty"]
    if faults:
        raise CheckpointError(f"{path} is not what its {PEFT_CONFIG} says: {listed(faults, _MOST_FAULTS)}.")
    return {name: LoraPair(pair["A"], pair["B"], settings.scale(name)) for name, pair in pairs.items()}


def _pair_faults(module: str, pair: Mapping[str, StoredTensor], rank: int) -> Iterator[str]:
    for part, axis in (("A", 0), ("B", 1)):
        tensor = pair.get(part)
        if tensor is None:
            yield f"{module} lacks lora_{part}"
        elif len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            yield f"lora_{part} of {module} is {list(tensor.shape)} and not of rank {rank}"


def _read_floats(path: Path) -> dict[str, StoredTensor]:
    tensors = read_torch_archive(path) if path.name == PEFT_PICKLED else read_safetensors(path)
    others = [
        f"{name} is {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if tensor.dtype not in WEIGHT_DTYPES or not tensor.shape
    ]
    if others:
        raise CheckpointError(
            f"{path} may hold arrays of {', '.join(WEIGHT_DTYPES)} only: {listed(others)}; get it again."
        )
    return tensors


def _misfits(adapter: AdapterDirectory, config: VisualGLMConfig) -> Iterator[str]:
    shapes = parameter_shapes(config)
    linear = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    unknown = [module for module in adapter.lora if module not in linear or module == _NOT_LINEAR]
    if unknown:
        yield f"the model has no linear layer {listed(unknown)}"
    for module, pair in adapter.lora.items():
        found = (pair.b.shape[0], pair.a.shape[1])
        if module not in unknown and linear[module] != found:
            yield f"the pair of {module} is for {list(found)}, and its weight is {list(linear[module])}"
    for name, tensor in adapter.trained.items():
        if name not in shapes:
            yield f"the model has no parameter {name}"
        elif tensor.shape != shapes[name]:
            yield f"{name} is {list(tensor.shape)} instead of {list(shapes[name])}"
    overlap = {f"{module}.weight" for module in adapter.lora}.intersection(adapter.trained)
    yield from (f"{name} is given as a whole and with a LoRA pair" for name in sorted(overlap))
    if adapter.prefix:
        yield from _prefix_misfits(adapter.prefix, config)


def _prefix_misfits(prefix: Mapping[str, StoredTensor], config: VisualGLMConfig) -> Iterator[str]:
    text = config.text
    length = next((tensor.shape[2] for tensor in prefix.values() if len(tensor.shape) == 4), 0)
    shape = (2, text.num_attention_heads, length, text.head_dim)
    names: Collection[str] = [prefix_name(layer) for layer in range(text.num_hidden_layers)]
    yield from (f"{name} is missing" for name in names if name not in prefix)
    yield from (f"the model has no {name}" for name in prefix if name not in names)
    yield from (
        f"{name} is {list(tensor.shape)} instead of {list(shape)}"
        for name, tensor in prefix.items()
        if name in names and (tensor.shape != shape or not length)
    )


def _lazy(name: str, array: NDArray[Any]) -> LazyTensor:
    if array.dtype.name not in ("float32", "float16"):
        raise CheckpointError(f"The tensor {name} of the adapter is {array.dtype}; give float32 or float16.")
    return LazyTensor(array.dtype.name, array.shape, lambda: array)


def _fill(folder: Path, files: Mapping[str, Iterable[Piece]], facts: Mapping[str, Any]) -> None:
    hashes = {name: write_file(folder / name, pieces) for name, pieces in files.items()}
    records = {name: FileRecord(sha256=hashes[name], size=(folder / name).stat().st_size) for name in hashes}
    write_file(folder / MANIFEST, [AdapterManifest(files=records, **facts).to_json()])
