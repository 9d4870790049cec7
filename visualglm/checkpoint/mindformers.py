"""Checkpoints of the MindFormers recipe: a folder with one `.ckpt` file each of ViT, Q-Former and language model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path

from visualglm.checkpoint.checks import check_tensors, listed
from visualglm.checkpoint.contents import Checkpoint, main_dtype
from visualglm.checkpoint.files import write_file
from visualglm.checkpoint.foreign import TOKENIZER
from visualglm.checkpoint.keys import HF_KEYS, STRAY_NAMES
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.mindformers_config import OWN_CONFIG, mindformers_config
from visualglm.checkpoint.mindformers_keys import (
    GLM,
    LITE,
    LITE_NAMES,
    QFORMER,
    ROTARY,
    SHARED,
    STRAY,
    VIT,
    place,
    places,
)
from visualglm.checkpoint.mindspore_ckpt import mindspore_pieces, read_mindspore
from visualglm.checkpoint.model_dir import license_of, write_side_files
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.rotary import check_rotary, rotary_tensor
from visualglm.checkpoint.sha256sums import SUMS, require_unchanged, sums
from visualglm.checkpoint.tensors import Tensor, row_blocks, tensor_bytes
from visualglm.checkpoint.weights_license import WEIGHTS_LICENSE
from visualglm.config import VisualGLMConfig
from visualglm.errors import CheckpointError
from visualglm.parameters import Shape, parameter_shapes

NAME = "mindformers"
FILES = (VIT, QFORMER, GLM)

Files = dict[str, dict[str, Tensor]]
"""Tensors by file and name."""


def read_mindformers(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; raises `CheckpointError` if it is incomplete or not of VisualGLM."""
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        beside = f" ({LITE} holds the embeddings alone)" if (path / LITE).is_file() else ""
        raise CheckpointError(f"{path} lacks {listed(missing)}{beside}; put all three files of a model there.")
    own = [OWN_CONFIG] if (path / OWN_CONFIG).is_file() else []
    require_unchanged(path, [*FILES, *own])
    found = {name: read_mindspore(path / name) for name in FILES}
    rotary = {name: tensor for name, tensor in found[GLM].items() if ROTARY.fullmatch(name)}
    config = _config(path, found, rotary)
    shapes = parameter_shapes(config)
    _check(path, found, shapes, rotary)
    check_rotary(path / GLM, rotary, config.text)
    tensors = {name: place(name).ours(found[place(name).file], shape) for name, shape in shapes.items()}
    stray = {STRAY_NAMES[0]: found[GLM][STRAY]} if STRAY in found[GLM] else {}
    return Checkpoint(
        config=config.model_copy(update={"dtype": main_dtype(tensors)}),
        tensors=tensors,
        source=Source(format=NAME),
        extras={**rotary, **stray},
        tokenizer_path=path / TOKENIZER if (path / TOKENIZER).exists() else None,
        license_text=license_of(path) or WEIGHTS_LICENSE,
    )


def write_mindformers(folder: Path, checkpoint: Checkpoint, progress: ByteProgress) -> None:
    """Write the three files and `glm_6b_for_lite.ckpt` into an empty folder; `OSError` if that fails.

    Their hashes go beside them: readers before MindSpore 2.3, as the recipe's, take a checksum inside for damage.
    """
    files = mindformers_tensors(checkpoint)
    files[LITE] = {name: files[GLM][name] for name in LITE_NAMES if name in files[GLM]}
    found = progress.run(
        partial(write_file, folder / name, progress.track(mindspore_pieces(tensors))) for name, tensors in files.items()
    )
    own = write_file(folder / OWN_CONFIG, [checkpoint.config.model_dump_json(indent=2).encode()])
    write_file(folder / SUMS, [sums(dict(zip([*files, OWN_CONFIG], [*found, own], strict=True)))])
    write_side_files(folder, checkpoint, TOKENIZER)


def mindformers_tensors(checkpoint: Checkpoint) -> Files:
    """What the three files hold of a model."""
    files: Files = {name: {} for name in FILES}
    for name, each in places(checkpoint.tensors):
        files[each.file] |= each.theirs(checkpoint.tensors[name])
    stored = {name: tensor for name, tensor in checkpoint.extras.items() if name not in STRAY_NAMES}
    text = checkpoint.config.text
    if checkpoint.source.format == NAME:
        files[GLM] |= stored
    else:
        frequencies = next(iter(stored.values()), None) or rotary_tensor(text, checkpoint.config.dtype)
        files[GLM] |= dict.fromkeys(HF_KEYS.rotary_names(text), frequencies)
    if STRAY_NAMES[0] in checkpoint.extras:
        files[GLM][STRAY] = checkpoint.extras[STRAY_NAMES[0]]
    return files


def repeated_bytes(checkpoint: Checkpoint) -> int:
    """How much larger the files are than the checkpoint, some of which they have twice."""
    files = mindformers_tensors(checkpoint)
    tensors = [*(tensor for file in files.values() for tensor in file.values())]
    tensors += [files[GLM][name] for name in LITE_NAMES if name in files[GLM]]
    return max(0, sum(map(tensor_bytes, tensors)) - checkpoint.size_bytes)


def _config(path: Path, found: Files, rotary: Mapping[str, Tensor]) -> VisualGLMConfig:
    shapes = {name: tensor.shape for tensors in found.values() for name, tensor in tensors.items()}
    # A quarter of a head each: two rows of positions turn pairs.
    quarters = {tensor.shape for tensor in rotary.values()}
    head_dim = 4 * prod(quarters.pop()) if len(quarters) == 1 else None
    return mindformers_config(path, shapes, head_dim)


def _check(path: Path, found: Files, shapes: Mapping[str, Shape], rotary: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` unless each file has its tensors, and those that two have are the same."""
    expected: dict[str, dict[str, Shape]] = {name: {} for name in FILES}
    for name, each in places(shapes):
        expected[each.file] |= dict.fromkeys(each.names, each.shape(shapes[name]))
    allowed = {GLM: {*rotary, STRAY}}
    for name, tensors in found.items():
        wanted = expected[name] | {each: tensors[each].shape for each in allowed.get(name, ()) if each in tensors}
        # Numbers by themselves, such as of an epoch, are what training keeps beside the weights.
        held = {each: tensor for each, tensor in tensors.items() if each in wanted or prod(tensor.shape) != 1}
        check_tensors(path / name, held, wanted)
    for name in SHARED:
        theirs = place(name).names[0]
        if not is_same(found[VIT][theirs], found[QFORMER][theirs]):
            raise CheckpointError(
                f"{path} is not one model: {theirs} differs in {VIT} and {QFORMER}; put files of one model together."
            )


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are of one type and shape and hold the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    mine, theirs = one.array(), other.array()
    return all(mine[rows].tobytes() == theirs[rows].tobytes() for rows in row_blocks(one.shape))
