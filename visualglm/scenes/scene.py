"""What a scene holds, and how one is made up from a seed. Nothing here draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CANVAS = 224
CELL = CANVAS / 3
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "big")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots", "noise", "waves", "bricks")
_WORDS = """
CAT DOG SUN SKY TEA BUS CAR MAP BOX CUP HAT PEN RED TOP ZOO FOX BIRD FISH TREE MOON STAR BOOK
DOOR RAIN SNOW WIND FIRE SHIP TAXI OPEN STOP EXIT GO UP NO YES HI OK ON IN
"""
WORDS = tuple(_WORDS.split())
RADIUS = {"small": (15, 19), "big": (29, 34)}
MAX_SHAPES = 4
_JITTER = 17
_MIN_GAP = 5
_MIN_ORDER_GAP = 13


@dataclass(frozen=True)
class Shape:
    """A figure with its centre (x, y) and radius in pixels of the canvas."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Label:
    """A number or a short word, with its centre and the height of its font in pixels of the canvas."""

    text: str
    x: float
    y: float
    height: int
    bold: bool
    ink: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One to four shapes from left to right, perhaps a label, before a background."""

    shapes: tuple[Shape, ...]
    label: Label | None
    texture: str
    seed: int


@dataclass(frozen=True)
class Jumble:
    """Many shapes in no order, and labels: not to be asked about, but to learn to see from."""

    shapes: tuple[Shape, ...]
    labels: tuple[Label, ...]
    texture: str
    seed: int


def make_scene(seed: int, *, max_shapes: int = MAX_SHAPES) -> Scene:
    """The scene of a seed: always the same one on every machine."""
    rng = np.random.default_rng(seed)
    with_label = rng.random() < 0.5
    label_row = int(rng.integers(3)) if with_label else None
    cells = [(column, row) for row in range(3) if row != label_row for column in range(3)]
    count = int(rng.integers(1, max_shapes + 1))
    shapes: tuple[Shape, ...] = ()
    while not shapes:
        shapes = _place_shapes(rng, cells, count)
    label = None if label_row is None else _make_label(rng, label_row)
    return Scene(shapes, label, _pick_texture(rng), seed)


def make_jumble(seed: int) -> Jumble:
    """The jumble of a seed: each third of the canvas holds a label or up to three shapes."""
    rng = np.random.default_rng([seed, 3])
    labels, shapes = [], []
    for row in range(3):
        if rng.random() < 0.45:
            labels.append(_make_label(rng, row))
        else:
            shapes += [_make_shape(rng, column, row) for column in range(3) if rng.random() < 0.85]
    # Shapes drawn later may hide earlier ones: the earlier ones go.
    apart = [shape for index, shape in enumerate(shapes) if all(_gap(shape, other) > 0 for other in shapes[:index])]
    return Jumble(tuple(apart), tuple(labels), _pick_texture(rng), seed)


def _pick_texture(rng: np.random.Generator) -> str:
    return "plain" if rng.random() < 0.3 else TEXTURES[int(rng.integers(1, len(TEXTURES)))]


def _gap(first: Shape, second: Shape) -> float:
    """Pixels between the circles around two shapes."""
    return float(np.hypot(first.x - second.x, first.y - second.y)) - first.radius - second.radius


def _place_shapes(rng: np.random.Generator, cells: list[tuple[int, int]], count: int) -> tuple[Shape, ...]:
    """Shapes in cells of their own, from left to right; none if two would touch or their order were unclear."""
    chosen = rng.permutation(len(cells))[:count]
    shapes = sorted((_make_shape(rng, *cells[index]) for index in chosen), key=lambda shape: shape.x)
    for index, left in enumerate(shapes):
        for right in shapes[index + 1 :]:
            if _gap(left, right) < _MIN_GAP or right.x - left.x < _MIN_ORDER_GAP:
                return ()
    return tuple(shapes)


def _make_shape(rng: np.random.Generator, column: int, row: int) -> Shape:
    size = SIZES[int(rng.integers(2))]
    radius = float(rng.uniform(*RADIUS[size]))
    x, y = (
        float(np.clip((cell + 0.5) * CELL + rng.uniform(-_JITTER, _JITTER), radius + 3, CANVAS - radius - 3))
        for cell in (column, row)
    )
    kind, color = SHAPES[int(rng.integers(len(SHAPES)))], COLORS[int(rng.integers(len(COLORS)))]
    return Shape(kind, color, size, x, y, radius, float(rng.uniform(-12, 12)))


def _make_label(rng: np.random.Generator, row: int) -> Label:
    text = str(rng.integers(10 ** int(rng.integers(1, 4)))) if rng.random() < 0.5 else str(rng.choice(WORDS))
    height = int(rng.integers(38, 49))
    half_width = 0.36 * height * len(text)
    x = float(rng.uniform(half_width + 4, CANVAS - half_width - 4))
    y = float((row + 0.5) * CELL + rng.uniform(-8, 8))
    level = int(rng.integers(0, 50))
    return Label(text, x, y, height, bool(rng.integers(2)), (level, level, level + int(rng.integers(0, 40))))
