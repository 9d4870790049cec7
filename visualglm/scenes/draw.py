"""Scenes drawn with Pillow, in the font that Pillow itself brings, so that a seed draws the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from math import cos, pi, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visualglm.scenes.scene import CANVAS, Jumble, Label, Scene, Shape

_RGB = {
    "red": (214, 30, 34),
    "orange": (242, 132, 18),
    "yellow": (240, 216, 30),
    "green": (36, 150, 56),
    "blue": (34, 78, 206),
    "purple": (120, 40, 160),
    "pink": (246, 118, 186),
    "black": (22, 22, 24),
}
SUPERSAMPLE = 2

Pixels = NDArray[Any]
Point = tuple[float, float]


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, 224 by 224 pixels."""
    return _draw(scene.shapes, () if scene.label is None else (scene.label,), scene.texture, scene.seed)


def draw_jumble(jumble: Jumble) -> Image.Image:
    """The picture of a jumble, as that of a scene."""
    return _draw(jumble.shapes, jumble.labels, jumble.texture, jumble.seed)


def _draw(shapes: Iterable[Shape], labels: Iterable[Label], texture: str, seed: int) -> Image.Image:
    rng = np.random.default_rng([seed, 1])
    picture = draw_shapes(_background(texture, rng), shapes, rng)
    for label in labels:
        _draw_label(ImageDraw.Draw(picture), label)
    return picture


def draw_shapes(background: Image.Image, shapes: Iterable[Shape], rng: np.random.Generator) -> Image.Image:
    """Shapes before a background that is SUPERSAMPLE times as large as the picture of them that comes back."""
    canvas = ImageDraw.Draw(background)
    for shape in shapes:
        _draw_shape(canvas, shape, _tint(rng, _RGB[shape.color], 12))
    return background.reduce(SUPERSAMPLE)


def _tint(rng: np.random.Generator, color: tuple[int, int, int], spread: int) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(level + rng.integers(-spread, spread + 1), 0, 255)) for level in color)
    return red, green, blue


# --- backgrounds: two pale tones, mixed by a pattern between 0 and 1 ------------------------------------------------


def _plain(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    return np.zeros_like(x)


def _gradient(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    angle = rng.uniform(0, 2 * pi)
    return 0.5 + ((x - 0.5) * cos(angle) + (y - 0.5) * sin(angle)) / 1.5


def _stripes(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    angle, count = rng.uniform(0, pi), rng.uniform(5, 12)
    return ((x * cos(angle) + y * sin(angle)) * count % 1 < 0.5).astype(np.float64)


def _checks(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    count = rng.uniform(4, 11)
    return ((x * count % 2 < 1) ^ (y * count % 2 < 1)).astype(np.float64)


def _dots(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    count, radius = rng.uniform(6, 13), rng.uniform(0.18, 0.33)
    return (np.hypot(x * count % 1 - 0.5, y * count % 1 - 0.5) < radius).astype(np.float64)


def _noise(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    grain = int(rng.integers(1, 4))
    cells = rng.random((CANVAS // grain + 1, CANVAS // grain + 1))
    return np.kron(cells, np.ones((grain, grain)))[:CANVAS, :CANVAS]


def _waves(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    count, swing, length = rng.uniform(4, 9), rng.uniform(0.02, 0.06), rng.uniform(2, 5)
    return 0.5 + 0.5 * np.sin(2 * pi * count * (y + swing * np.sin(2 * pi * length * x)))


def _bricks(x: Pixels, y: Pixels, rng: np.random.Generator) -> Pixels:
    count, mortar = rng.uniform(4, 8), rng.uniform(0.08, 0.16)
    row = np.floor(y * count)
    return ((y * count % 1 < mortar) | ((x * count / 2 + row / 2) % 1 < mortar / 2)).astype(np.float64)


_PATTERNS: dict[str, Callable[[Pixels, Pixels, np.random.Generator], Pixels]] = {
    "plain": _plain,
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "noise": _noise,
    "waves": _waves,
    "bricks": _bricks,
}


def _background(texture: str, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / CANVAS
    light = rng.uniform(205, 250, 3)
    dark = np.clip(light + rng.uniform(-38, -14) + rng.uniform(-10, 10, 3), 150, 255)
    mix = Image.fromarray((255 * np.clip(_PATTERNS[texture](x, y, rng), 0, 1)).astype(np.uint8))
    size = CANVAS * SUPERSAMPLE
    mix = mix.resize((size, size), Image.Resampling.NEAREST)
    ramps = np.linspace(light, dark, 256).round().astype(np.uint8).T
    return Image.merge("RGB", [mix.point(ramp.tolist()) for ramp in ramps])


# --- shapes -----------------------------------------------------------------------------------------------------------


def _polygon(corners: int, start: float = -90.0) -> list[Point]:
    angles = [(start + 360 * index / corners) * pi / 180 for index in range(corners)]
    return [(cos(angle), sin(angle)) for angle in angles]


def _star() -> list[Point]:
    outer, inner = _polygon(5), _polygon(5, -54)
    return [point for pair in zip(outer, [(0.42 * x, 0.42 * y) for x, y in inner], strict=True) for point in pair]


def _heart() -> list[Point]:
    turns = [2 * pi * index / 60 for index in range(60)]
    return [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16 - 0.05) for t in turns]


_CROSS = [
    (a * sx, b * sy)
    for sx, sy, pair in (
        (1, -1, ((0.32, 0.95), (0.32, 0.32), (0.95, 0.32))),
        (1, 1, ((0.95, 0.32), (0.32, 0.32), (0.32, 0.95))),
        (-1, 1, ((0.32, 0.95), (0.32, 0.32), (0.95, 0.32))),
        (-1, -1, ((0.95, 0.32), (0.32, 0.32), (0.32, 0.95))),
    )
    for a, b in pair
]

_OUTLINES: dict[str, list[Point]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)],
    "star": _star(),
    "cross": _CROSS,
    "heart": _heart(),
}


def _draw_shape(canvas: ImageDraw.ImageDraw, shape: Shape, color: tuple[int, int, int]) -> None:
    x, y, radius = (value * SUPERSAMPLE for value in (shape.x, shape.y, shape.radius))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.kind == "circle":
        canvas.ellipse(box, fill=color)
    elif shape.kind == "ring":
        canvas.ellipse(box, outline=color, width=round(0.34 * radius))
    else:
        turn = shape.angle * pi / 180
        canvas.polygon(
            [
                (x + radius * (px * cos(turn) - py * sin(turn)), y + radius * (px * sin(turn) + py * cos(turn)))
                for px, py in _OUTLINES[shape.kind]
            ],
            fill=color,
        )


# --- labels -----------------------------------------------------------------------------------------------------------


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(height)


def _draw_label(canvas: ImageDraw.ImageDraw, label: Label) -> None:
    canvas.text(
        (label.x, label.y),
        label.text,
        fill=label.ink,
        font=_font(label.height),
        anchor="mm",
        stroke_width=1 if label.bold else 0,
        stroke_fill=label.ink,
    )
