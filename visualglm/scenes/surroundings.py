"""Shapes before rain, snow, grass …: pictures the built-in model was never asked about, to fine-tune it on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from visualglm.scenes.draw import SUPERSAMPLE, draw_shapes
from visualglm.scenes.scene import CANVAS, make_scene

SURROUNDINGS = {
    "rain": "RAIN",
    "snow": "SNOW",
    "sunshine": "SUN",
    "night": "NIGHT",
    "grass": "GRASS",
    "wooden floor": "WOOD",
}
"""What may be behind the shapes, and the answer that names it.

In capitals, because the built-in model learnt to spell only what is written in pictures: most other pieces of its
vocabulary, such as the bytes of 雨, it has never said. Twenty pictures can teach it a single such character, but in
four times the steps and at the cost of old answers; words of several, such as 雨天, they did not.
"""
QUESTION = "What is in the background?"

_SIZE = CANVAS * SUPERSAMPLE
Color = tuple[int, int, int]


def draw_surrounded(surrounding: str, seed: int) -> Image.Image:
    """Shapes of the scene of that seed before a surrounding; RGB, 224 by 224 pixels."""
    rng = np.random.default_rng([seed, 4])
    picture = Image.new("RGB", (_SIZE, _SIZE))
    _PAINTERS[surrounding](ImageDraw.Draw(picture), rng)
    return draw_shapes(picture, make_scene(seed, max_shapes=2).shapes, rng)


def _near(rng: np.random.Generator, color: Color, spread: int = 10) -> Color:
    red, green, blue = (int(np.clip(level + rng.integers(-spread, spread + 1), 0, 255)) for level in color)
    return red, green, blue


def _fill(canvas: ImageDraw.ImageDraw, top: Color, bottom: Color) -> None:
    for y in range(_SIZE):
        share = y / _SIZE
        canvas.line((0, y, _SIZE, y), tuple(round(a + share * (b - a)) for a, b in zip(top, bottom, strict=True)))


def _rain(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _fill(canvas, _near(rng, (66, 76, 94)), _near(rng, (98, 108, 124)))
    slant, length = rng.uniform(-0.35, 0.35), rng.uniform(25, 45)
    for x, y in rng.uniform(-40, _SIZE, (int(rng.integers(180, 260)), 2)):
        canvas.line((x, y, x + slant * length, y + length), _near(rng, (172, 188, 212)), 3)


def _snow(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _fill(canvas, _near(rng, (168, 186, 216)), _near(rng, (214, 224, 240)))
    ground = _SIZE * rng.uniform(0.72, 0.85)
    canvas.rectangle((0, ground, _SIZE, _SIZE), _near(rng, (246, 248, 252), 4))
    for x, y in rng.uniform(0, _SIZE, (int(rng.integers(110, 170)), 2)):
        radius = rng.uniform(3, 8)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), (252, 253, 255))


def _sunshine(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _fill(canvas, _near(rng, (95, 170, 240)), _near(rng, (190, 225, 250)))
    x, y = rng.choice([0.08, 0.92]) * _SIZE, rng.uniform(0.05, 0.12) * _SIZE
    yellow = _near(rng, (255, 224, 70))
    for turn in np.arange(0, 2 * np.pi, np.pi / 12) + rng.uniform(0, 0.2):
        canvas.line((x, y, x + 1.1 * _SIZE * np.cos(turn), y + 1.1 * _SIZE * np.sin(turn)), yellow, 5)
    radius = rng.uniform(55, 75)
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), yellow)


def _night(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _fill(canvas, _near(rng, (12, 16, 48), 8), _near(rng, (34, 40, 92), 8))
    for x, y in rng.uniform(0, _SIZE, (int(rng.integers(40, 80)), 2)):
        radius = rng.uniform(1.5, 4)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), (250, 246, 215))


def _grass(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    _fill(canvas, _near(rng, (128, 188, 92)), _near(rng, (84, 152, 60)))
    for x, y in rng.uniform(0, _SIZE, (int(rng.integers(500, 700)), 2)):
        lean, height = rng.uniform(-8, 8), rng.uniform(14, 30)
        canvas.line((x, y, x + lean, y - height), _near(rng, (70, 140, 48), 28), 3)


def _wooden_floor(canvas: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    plank = _SIZE / int(rng.integers(5, 9))
    for top in np.arange(0, _SIZE, plank):
        color = _near(rng, (190, 138, 86), 14)
        canvas.rectangle((0, top, _SIZE, top + plank), color)
        for offset in rng.uniform(0, plank, 4):
            canvas.line((0, top + offset, _SIZE, top + offset + rng.uniform(-5, 5)), _near(rng, (172, 120, 72), 8), 2)
        canvas.line((0, top, _SIZE, top), (112, 74, 40), 4)
        joint = rng.uniform(0, _SIZE)
        canvas.line((joint, top, joint, top + plank), (112, 74, 40), 4)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, np.random.Generator], None]] = {
    "rain": _rain,
    "snow": _snow,
    "sunshine": _sunshine,
    "night": _night,
    "grass": _grass,
    "wooden floor": _wooden_floor,
}
