"""Write a SAT archive of random float16 weights, to measure conversion with: `make_archive.py FOLDER [--preset full]`.

All weights repeat one block of random bytes, so that the disk sets the pace and not the random generator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visualglm.checkpoint.contents import Checkpoint
from visualglm.checkpoint.manifest import Source
from visualglm.checkpoint.model_dir import staged_checkpoint
from visualglm.checkpoint.progress import ByteProgress
from visualglm.checkpoint.sat import write_sat
from visualglm.checkpoint.tensors import Piece
from visualglm.config import QFormerConfig, TextConfig, VisionConfig, VisualGLMConfig
from visualglm.parameters import Shape, parameter_count, parameter_shapes

BLOCK_BYTES = 64 << 20
PRESETS = {
    "small": VisualGLMConfig(
        vision=VisionConfig(num_hidden_layers=4),
        qformer=QFormerConfig(num_hidden_layers=2, cross_attention_layers=(0,)),
        text=TextConfig(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_hidden_layers=4),
    ),
    "full": VisualGLMConfig(),
}


@dataclass(frozen=True)
class RepeatedTensor:
    """A float16 tensor whose elements are taken from one block again and again."""

    block: NDArray[np.float16]
    shape: Shape
    dtype: str = "float16"

    def array(self) -> NDArray[Any]:
        return np.resize(self.block, self.shape)

    def pieces(self) -> Iterator[Piece]:
        remaining = 2 * prod(self.shape)
        data = self.block.view(np.uint8).data
        while remaining:
            piece = data[: min(remaining, len(data))]
            remaining -= len(piece)
            yield piece

    def regrouped(self, groups: Shape, axes: Shape) -> RepeatedTensor:
        return self


def write_archive(folder: Path, config: VisualGLMConfig, report: Callable[[int, int], None] | None = None) -> int:
    """Write the archive; returns its size in bytes."""
    block = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, dtype=np.float32).astype(np.float16)
    tensors = {name: RepeatedTensor(block, shape) for name, shape in parameter_shapes(config).items()}
    checkpoint = Checkpoint(config=config, tensors=tensors, source=Source(format="random"))
    with staged_checkpoint(folder, checkpoint, force=True) as staged:
        write_sat(staged, checkpoint, ByteProgress(checkpoint.size_bytes, report))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    arguments = parser.parse_args()
    config = PRESETS[arguments.preset]
    size = write_archive(arguments.folder, config)
    print(f"{arguments.folder}: {parameter_count(config):,} parameters, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
