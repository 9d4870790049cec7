"""Checkpoints in several files: an index that names the file of every tensor, as Hugging Face writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from visualglm.checkpoint.checks import listed
from visualglm.checkpoint.files import is_plain_name, read_json_object, readable
from visualglm.checkpoint.tensors import StoredTensor, Tensor, tensor_bytes
from visualglm.errors import CheckpointError

# Hashing takes longest, and goes on in as many threads as there are shards; only the embeddings are larger than this.
MAX_SHARD_BYTES = 1_000_000_000


def split_into_shards(tensors: Mapping[str, Tensor], stem: str, suffix: str) -> dict[str, dict[str, Tensor]]:
    """File names and the tensors of each, in order: `stem + suffix`, or `stem-00001-of-0000N + suffix` and so on."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor_bytes(tensor) > MAX_SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor_bytes(tensor)
    if len(groups) == 1:
        return {stem + suffix: groups[0]}
    return {f"{stem}-{n:05d}-of-{len(groups):05d}{suffix}": group for n, group in enumerate(groups, 1)}


def index_json(shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """The index that goes with `shards`."""
    total = sum(tensor_bytes(tensor) for shard in shards.values() for tensor in shard.values())
    weight_map = {name: file_name for file_name, shard in shards.items() for name in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def read_sharded(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """All tensors that `index` names, each file opened by `read`.

    Raises `CheckpointError` if the index is malformed, files are missing (all are named), or hold other tensors.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names; get it again.")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if not is_plain_name(name)]
    if outside:
        raise CheckpointError(f"{index} names a file outside its folder, {readable(outside[0])}; do not use it.")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files named in {index.name}: "
            f"{listed(missing)}; get them too."
        )
    shards = {name: read(index.parent / name) for name in files}
    found = {name: shards[file_name][name] for name, file_name in weight_map.items() if name in shards[file_name]}
    return found | {name: tensor for shard in shards.values() for name, tensor in shard.items() if name not in found}
