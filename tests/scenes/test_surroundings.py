import numpy as np
import pytest

from visualglm.checkpoint.model_dir import open_model_directory
from visualglm.loading import builtin_path
from visualglm.processing.tokenizer import Tokenizer
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.held_out import questions_about
from visualglm.scenes.scene import CANVAS, make_scene
from visualglm.scenes.surroundings import SURROUNDINGS, draw_surrounded


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_a_seed_draws_the_same_picture_always(surrounding: str) -> None:
    picture = draw_surrounded(surrounding, 3)
    assert picture.size == (CANVAS, CANVAS)
    assert picture.mode == "RGB"
    assert picture.tobytes() == draw_surrounded(surrounding, 3).tobytes() != draw_surrounded(surrounding, 4).tobytes()


def test_surroundings_differ_more_than_pictures_of_one_of_them() -> None:
    """By mean color alone, though none of them is a plain color."""
    means = np.array(
        [[np.asarray(draw_surrounded(name, seed)).mean((0, 1)) for seed in range(4)] for name in SURROUNDINGS]
    )
    within = np.abs(means - means.mean(1, keepdims=True)).mean()
    between = np.abs(means.mean(1) - means.mean((0, 1))).mean()
    assert between > 3 * within


def test_the_shapes_are_those_of_the_scene() -> None:
    """Where a shape is big, both pictures have its color in its middle."""
    scene = make_scene(0, max_shapes=2)
    here, there = (np.asarray(picture) for picture in (draw_surrounded("grass", 0), draw_scene(scene)))
    for shape in scene.shapes:
        if shape.kind != "ring":
            x, y = round(shape.x), round(shape.y)
            assert np.abs(here[y, x].astype(int) - there[y, x]).max() <= 24


def test_answers_are_of_pieces_that_the_builtin_model_says() -> None:
    directory = open_model_directory(builtin_path())
    assert directory.tokenizer_path is not None
    tokenizer = Tokenizer.for_model(directory.tokenizer_path, directory.config.text)
    said = {
        piece for index in range(400) for asked in questions_about(index) for piece in tokenizer.encode(asked.answer)
    }
    assert len(set(SURROUNDINGS.values())) == len(SURROUNDINGS)
    assert {piece for answer in SURROUNDINGS.values() for piece in tokenizer.encode(answer)} <= said
