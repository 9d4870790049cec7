"""Scenes: the same from the same seed, and never a matter of taste; their drawings show what they say."""

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from visualglm.scenes.draw import _RGB, draw_jumble, draw_scene
from visualglm.scenes.questions import place_of
from visualglm.scenes.scene import (
    CANVAS,
    CELL,
    COLORS,
    MAX_SHAPES,
    RADIUS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    make_jumble,
    make_scene,
)

SEEDS = range(1000)
DRAWN = range(30)
# Far above what the tint of a shape or the mixing at its edge can do.
VISIBLE = 25


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed) for seed in SEEDS]


def test_a_seed_is_a_scene(scenes: list[Scene]):
    assert scenes == [make_scene(seed) for seed in SEEDS]
    assert len({replace(scene, seed=0) for scene in scenes}) == len(scenes)


def test_the_scene_of_a_seed_is_the_same_on_every_machine():
    scene = make_scene(7)
    found = [(shape.size, shape.color, shape.kind, place_of(shape)) for shape in scene.shapes]
    assert found == [
        ("small", "black", "star", (0, 2)),
        ("small", "yellow", "heart", (1, 1)),
        ("big", "pink", "star", (2, 1)),
    ]
    assert (scene.label, scene.texture) == (None, "plain")


def test_scenes_are_valid(scenes: list[Scene]):
    for scene in scenes:
        assert 1 <= len(scene.shapes) <= MAX_SHAPES
        for shape in scene.shapes:
            low, high = RADIUS[shape.size]
            assert low <= shape.radius <= high
            for center in (shape.x, shape.y):
                assert shape.radius < center < CANVAS - shape.radius
        for left, right in combinations(scene.shapes, 2):
            assert right.x - left.x >= 13, "shapes go from left to right, clearly"
            gap = np.hypot(right.x - left.x, right.y - left.y) - left.radius - right.radius
            assert gap >= 5, "shapes do not touch"
            assert place_of(left) != place_of(right)


def test_a_shape_is_well_inside_its_place(scenes: list[Scene]):
    """Else "top" or "center" would be a matter of taste."""
    for shape in (shape for scene in scenes for shape in scene.shapes):
        for center in (shape.x, shape.y):
            assert 10 < center % CELL < CELL - 10


def test_a_label_has_its_row_to_itself(scenes: list[Scene]):
    for scene in (scene for scene in scenes if scene.label is not None):
        row = int(scene.label.y // CELL)
        assert all(place_of(shape)[1] != row for shape in scene.shapes)
        assert (
            scene.label.text.isascii() and scene.label.text.isalnum() and scene.label.text == scene.label.text.upper()
        )


def test_everything_turns_up(scenes: list[Scene]):
    shapes = [shape for scene in scenes for shape in scene.shapes]
    for values, name in ((SHAPES, "kind"), (COLORS, "color"), (SIZES, "size")):
        counts = Counter(getattr(shape, name) for shape in shapes)
        assert set(counts) == set(values)
        assert max(counts.values()) < 1.5 * min(counts.values())
    assert {scene.texture for scene in scenes} == set(TEXTURES)
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert 0.4 < sum(scene.label is not None for scene in scenes) / len(scenes) < 0.6


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_shapes_at_most(count: int):
    assert {len(make_scene(seed, max_shapes=count).shapes) for seed in range(60)} == set(range(1, count + 1))


# --- drawings ---------------------------------------------------------------------------------------------------------


def pixels(scene: Scene) -> NDArray[np.int64]:
    return np.asarray(draw_scene(scene), np.int64)


def drawn(scene: Scene, background: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a scene's picture differs visibly from its background."""
    return np.abs(pixels(scene) - background).max(axis=-1) > VISIBLE


def test_a_scene_draws_the_same_bytes():
    for seed in (0, 1, 2):
        first, second = (draw_scene(make_scene(seed)) for _ in range(2))
        assert first.mode == "RGB" and first.size == (CANVAS, CANVAS)
        assert first.tobytes() == second.tobytes()
    assert len({hashlib.sha256(draw_scene(make_scene(seed)).tobytes()).digest() for seed in DRAWN}) == len(DRAWN)


def test_what_is_drawn_is_where_the_scene_says():
    for scene in map(make_scene, DRAWN):
        background = pixels(replace(scene, shapes=(), label=None))
        taken = np.zeros((CANVAS, CANVAS), np.bool_)
        parts = [replace(scene, shapes=(shape,), label=None) for shape in scene.shapes]
        for part in parts:
            (shape,), mask = part.shapes, drawn(part, background)
            y, x = np.nonzero(mask)
            assert np.hypot(x.mean() - shape.x, y.mean() - shape.y) < 7
            assert np.hypot(x - shape.x, y - shape.y).max() < 1.25 * shape.radius + 1
            assert mask.sum() > 0.8 * shape.radius**2
            assert not (mask & taken).any(), "shapes do not overlap"
            taken |= mask
        if scene.label is not None:
            mask = drawn(replace(scene, shapes=()), background)
            y, x = np.nonzero(mask)
            assert min(x.min(), y.min()) > 0 and max(x.max(), y.max()) < CANVAS - 1, "the label is not cut"
            assert abs((x.min() + x.max()) / 2 - scene.label.x) < 5 and abs(y.mean() - scene.label.y) < 5
            assert not (mask & taken).any(), "the label lies beside the shapes"


def test_a_colour_is_nearest_to_its_own_name():
    """Told from the picture alone: the mean over each shape, tint and all, against the named colours."""
    names, named = list(_RGB), np.array(list(_RGB.values()))
    for scene in map(make_scene, DRAWN):
        background, picture = pixels(replace(scene, shapes=(), label=None)), pixels(scene)
        for shape in scene.shapes:
            inside = drawn(replace(scene, shapes=(shape,), label=None), background)
            color = np.median(picture[inside], axis=0)
            assert names[int(np.abs(named - color).sum(axis=1).argmin())] == shape.color


def test_a_jumble_holds_more_than_a_scene_and_nothing_hides_a_shape():
    jumbles = [make_jumble(seed) for seed in SEEDS]
    assert jumbles == [make_jumble(seed) for seed in SEEDS]
    assert np.mean([len(jumble.shapes) for jumble in jumbles]) > 3.5
    assert np.mean([len(jumble.labels) for jumble in jumbles]) > 1.2
    for jumble in jumbles:
        for one, other in combinations(jumble.shapes, 2):
            assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius
    assert draw_jumble(jumbles[0]).size == (CANVAS, CANVAS)
