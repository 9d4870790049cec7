"""What fine-tuning with SwissArmyTransformer made, LoRA or P-tuning, as an adapter directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.adapter_dir import AdapterDirectory, write_adapter
from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import checked_path, read_json_object
from visualglm.checkpoint.foreign_config import SAT_CONFIG, Values
from visualglm.checkpoint.keys import SAT_KEYS, STRAY_NAMES, unpacked
from visualglm.checkpoint.manifest import Layout, Source
from visualglm.checkpoint.model_dir import ModelDirectory
from visualglm.checkpoint.peft_config import peft_values
from visualglm.checkpoint.sat import is_adapter_name, layout_of, read_state
from visualglm.checkpoint.tensors import WEIGHT_DTYPES, Tensor, as_float32, rounded, row_blocks
from visualglm.errors import CheckpointError
from visualglm.parameters import parameter_shapes, prefix_name

Floats = NDArray[np.float32]

_MATRIX = re.compile(
    r"transformer\.layers\.(?P<layer>\d{1,4})\.attention\.(?P<linear>query_key_value|dense)"
    r"\.matrix_(?P<part>[AB])\.(?P<index>\d)"
)
_PREFIX = re.compile(r"mixins\.ptuning\.prefix\.(?P<layer>\d{1,4})")
# Our names of the linear layers, and how many pairs SAT keeps for each: one for q, k and v.
_LINEARS = {"query_key_value": "qkv", "dense": "proj"}
_PAIRS = {"qkv": 3, "proj": 1}
# What SAT calls the layer beside which a pair was put.
_ORIGINAL = ".original."


def holds_sat_adapter(source: Path) -> bool:
    """Whether an archive of SAT, or a weight file of one, holds what fine-tuning added.

    Raises `CheckpointError` if it is damaged.
    """
    is_archive = (source.is_file() and source.suffix == ".pt") or (source / SAT_CONFIG.file_name).is_file()
    return is_archive and any(map(is_adapter_name, read_state(source)))


def convert_sat_adapter(
    source: Path | str, output: Path | str, *, base: ModelDirectory | None = None, force: bool = False
) -> AdapterDirectory:
    """Convert the LoRA or the prefixes in a SAT archive, or in one of its weight files, to an adapter directory.

    base: the model that was fine-tuned; the archive's own copy of it, if it has one, must be the same. Without it the
    adapter does not know where it belongs. Raises `CheckpointError` if the archive is incomplete, holds more than that,
    or does not fit the base, and if `output` cannot be written.
    """
    source = checked_path(source)
    values = read_json_object(source / SAT_CONFIG.file_name) if source.is_dir() else None
    layout = layout_of(values) if values is not None else "thirds"
    found = read_state(source)
    others = [f"{name} is {found[name].dtype}" for name in found if found[name].dtype not in WEIGHT_DTYPES]
    if others:
        raise CheckpointError(f"{source} may hold {', '.join(WEIGHT_DTYPES)} only: {listed(others)}; get it again.")
    if base is not None:
        _require_same_base(source, {name: t for name, t in found.items() if not is_adapter_name(name)}, base, layout)
    matrices, prefix = _added(source, found)
    pairs = {module: _pair(source, module, parts) for module, parts in matrices.items()}
    if layout == "per_head":
        pairs = {module: _in_thirds(source, module, pair, base) for module, pair in pairs.items()}
    rank = _common_rank(source, pairs, values or {}) if pairs else 0
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    lora = {f"{module}.lora_A": a for module, (a, _) in pairs.items()}
    lora |= {f"{module}.lora_B": b for module, (_, b) in pairs.items()}
    return write_adapter(
        output,
        base=base,
        lora_settings=peft_values(ranks, rank=rank, alpha=1.0) if pairs else None,
        lora={f"base_model.model.{name}.weight": matrix for name, matrix in lora.items()},
        prefix=prefix,
        source=Source(format="sat", layout=layout, config=values),
        force=force,
    )


def _added(source: Path, found: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Floats]], dict[str, Floats]]:
    """Matrices by module and by what follows its name ("A.0"), and prefixes by `prefix_name`."""
    matrices: dict[str, dict[str, Floats]] = {}
    prefix, unknown = {}, []
    for name in filter(is_adapter_name, found):
        matrix, of_layer = _MATRIX.fullmatch(name), _PREFIX.fullmatch(name)
        if matrix:
            module = f"text.layers.{int(matrix['layer'])}.attention.{_LINEARS[matrix['linear']]}"
            matrices.setdefault(module, {})[f"{matrix['part']}.{matrix['index']}"] = _floats(found[name])
        elif of_layer:
            prefix[prefix_name(int(of_layer["layer"]))] = _floats(found[name])
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{source} adapts layers other than the attention of the text part, which is not supported: "
            f"{listed(unknown)}."
        )
    if not matrices and not prefix:
        raise CheckpointError(f"{source} holds no adapter: neither LoRA matrices nor prefixes; give one that does.")
    return matrices, prefix


def _pair(source: Path, module: str, found: Mapping[str, Floats]) -> tuple[Floats, Floats]:
    """The matrices of a module as one pair: the rows of A stacked, B block by block."""
    count = _PAIRS[module.rpartition(".")[2]]
    wanted = [f"{part}.{index}" for part in "AB" for index in range(count)]
    if set(wanted) != set(found):
        raise CheckpointError(
            f"{source} has the matrices {listed(sorted(found))} of {module}, and should have {listed(wanted)}; "
            "get the archive again."
        )
    a, b = [found[name] for name in wanted[:count]], [found[name] for name in wanted[count:]]
    shapes = {matrix.shape for matrix in a}, {matrix[..., 0].shape for matrix in b}, {matrix.shape[-1] for matrix in b}
    if a[0].ndim != 2 or b[0].ndim != 2 or any(len(each) != 1 for each in shapes) or b[0].shape[1] != len(a[0]):
        raise CheckpointError(f"{source} has matrices of {module} that do not fit together; get the archive again.")
    return np.concatenate(a), _block_diagonal(b)


def _common_rank(source: Path, pairs: Mapping[str, tuple[Floats, Floats]], values: Values) -> int:
    """The rank of the matrices, which the configuration may state too."""
    ranks = {len(a) // _PAIRS[module.rpartition(".")[2]] for module, (a, _) in pairs.items()}
    stated = values.get("lora_rank")
    ranks |= {stated} if isinstance(stated, int) else set()
    if len(ranks) != 1 or 0 in ranks:
        raise CheckpointError(
            f"{source} has LoRA of the ranks {listed([str(rank) for rank in sorted(ranks)])}, and should have one that "
            "is above 0; get the archive again."
        )
    return ranks.pop()


def _block_diagonal(blocks: list[Floats]) -> Floats:
    rows, columns = blocks[0].shape
    result = np.zeros((len(blocks) * rows, len(blocks) * columns), np.float32)
    for index, block in enumerate(blocks):
        result[index * rows : (index + 1) * rows, index * columns : (index + 1) * columns] = block
    return result


def _in_thirds(
    source: Path, module: str, pair: tuple[Floats, Floats], base: ModelDirectory | None
) -> tuple[Floats, Floats]:
    """The pair of a qkv whose outputs come head by head, for one that has them in thirds."""
    if base is None:
        raise CheckpointError(f"{source} packs q, k and v head by head, as its base does; give that with --base MODEL.")
    a, b = pair
    text = base.config.text
    if not module.endswith(".qkv") or len(b) != 3 * text.hidden_size:
        return pair
    by_head = b.reshape(text.num_attention_heads, 3, text.head_dim, -1)
    return a, by_head.transpose(1, 0, 2, 3).reshape(b.shape)


def _require_same_base(source: Path, found: Mapping[str, Tensor], base: ModelDirectory, layout: Layout) -> None:
    """Raises `CheckpointError` if the archive has a base of its own, and it is another, or holds what no base has."""
    config = base.config
    own = {name.replace(_ORIGINAL, "."): tensor for name, tensor in found.items()}
    ours = {SAT_KEYS.name(name): name for name in parameter_shapes(config)}
    ignored = {*STRAY_NAMES, *SAT_KEYS.rotary_names(config.text)}
    unknown = [name for name in own if name not in ours and name not in ignored]
    if unknown:
        raise CheckpointError(f"{source} holds tensors that {base.path} does not have: {listed(unknown)}.")
    for name, tensor in own.items():
        if name in ours and not _is_copy(tensor, ours[name], base, layout):
            raise CheckpointError(
                f"{source} was made from another model than {base.path}: {name} differs; "
                "give its own base with --base MODEL."
            )


def _is_copy(found: Tensor, name: str, base: ModelDirectory, layout: Layout) -> bool:
    """Whether a tensor as the archive packs it, perhaps in another type, holds the numbers of the base's."""
    original = base.tensors[name]
    if found.shape != original.shape:
        return False
    array, ours = unpacked({name: found}, base.config.text, layout)[name].array(), original.array()
    return all(
        np.array_equal(array[rows], rounded(as_float32(ours[rows], original.dtype), found.dtype))
        for rows in row_blocks(found.shape)
    )


def _floats(tensor: Tensor) -> Floats:
    return as_float32(np.ascontiguousarray(tensor.array()), tensor.dtype)
