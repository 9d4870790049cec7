"""Draws the example pictures anew: `python examples/draw.py`. The built-in model was never trained on these scenes."""

from __future__ import annotations

from pathlib import Path

from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.scene import make_scene

SEEDS = {"stop": HELD_OUT_SEEDS + 1899, "sun": HELD_OUT_SEEDS + 2506, "fish": HELD_OUT_SEEDS + 309}


def main() -> None:
    for name, seed in SEEDS.items():
        draw_scene(make_scene(seed)).save(Path(__file__).parent / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
