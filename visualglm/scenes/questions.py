"""Questions about a scene, and their one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from visualglm.scenes.scene import CELL, COLORS, SHAPES, SIZES, Scene, Shape
from visualglm.scenes.wording import WORDINGS, Kind, Language, Wording

Attributes = tuple[str | None, str | None, str | None]  # size, colour, kind: None says nothing of it
Pair = tuple[str, str]
_SUBSETS = [(size, color, kind) for size in (0, 1) for color in (0, 1) for kind in (0, 1)]


@dataclass(frozen=True)
class Question:
    """A question of one kind in one language, with its canonical answer."""

    kind: Kind
    language: Language
    question: str
    answer: str


def ask_about(scene: Scene, kind: Kind, language: Language, rng: np.random.Generator) -> Question | None:
    """A random question of a kind, or None where the scene allows none (comparing takes two shapes)."""
    pair = _ASKERS[kind](scene, WORDINGS[language], rng)
    return None if pair is None else Question(kind, language, *pair)


def place_of(shape: Shape) -> tuple[int, int]:
    """Column and row of the third of the canvas that holds the centre."""
    return int(shape.x // CELL), int(shape.y // CELL)


def _template(words: Wording, name: str, rng: np.random.Generator, **blanks: str) -> str:
    templates = words.templates[name]
    return templates[int(rng.integers(len(templates)))].format(**blanks)


def _matches(shape: Shape, attributes: Attributes) -> bool:
    told = zip(attributes, (shape.size, shape.color, shape.kind), strict=True)
    return all(wanted is None or wanted == actual for wanted, actual in told)


def _count(scene: Scene, attributes: Attributes) -> int:
    return sum(_matches(shape, attributes) for shape in scene.shapes)


def _mask(shape: Shape, subset: tuple[int, int, int]) -> Attributes:
    size, color, kind = subset
    return shape.size if size else None, shape.color if color else None, shape.kind if kind else None


def _unique_reference(scene: Scene, shape: Shape, rng: np.random.Generator, without: int | None = None) -> Attributes:
    """Some attributes that only `shape` has (three times None if there are none); `without` bars one of the three."""
    allowed = [subset for subset in _SUBSETS if any(subset) and (without is None or not subset[without])]
    unique = [subset for subset in allowed if _count(scene, _mask(shape, subset)) == 1]
    if not unique:
        return None, None, None
    # A noun is what people name first; the rest is spice.
    with_noun = [subset for subset in unique if subset[2]] or unique
    choice = with_noun if rng.random() < 0.75 else unique
    return _mask(shape, choice[int(rng.integers(len(choice)))])


def _pick_reference(
    scene: Scene, rng: np.random.Generator, without: int | None = None
) -> tuple[Shape, Attributes] | None:
    for index in rng.permutation(len(scene.shapes)):
        shape = scene.shapes[index]
        attributes = _unique_reference(scene, shape, rng, without)
        if any(attributes):
            return shape, attributes
    return None


def _describe(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair:
    items = [words.item.format(a=words.reference(s.size, s.color, s.kind)) for s in scene.shapes]
    if scene.label is not None:
        items.append(words.label_item.format(text=scene.label.text))
    return _template(words, "describe", rng), words.enumerate(items)


def _how_many(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair:
    if rng.random() < 0.35:
        return _template(words, "count_all", rng), words.count_answer.format(n=len(scene.shapes))
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    subset = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)][int(rng.integers(4))]
    attributes = _mask(shape, subset) if rng.random() < 0.85 else _absent(scene, subset, rng)
    question = _template(words, "count", rng, many=words.plural(words.reference(*attributes)))
    return question, words.count_answer.format(n=_count(scene, attributes))


def _color(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair | None:
    found = _pick_reference(scene, rng, without=1)
    if found is None:
        return None
    shape, attributes = found
    return _template(words, "color", rng, a=words.reference(*attributes)), words.names[shape.color]


def _shape(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair | None:
    found = _pick_reference(scene, rng, without=2)
    if found is None or rng.random() < 0.4:
        shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
        place = words.places[place_of(shape)]
        return _template(words, "shape_place", rng, place=place), words.names[shape.kind]
    shape, (size, color, _) = found
    told = words.separator.join(words.names[word] for word in (size, color) if word)
    return _template(words, "shape", rng, a=told.removesuffix("的")), words.names[shape.kind]


def _where(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair | None:
    found = _pick_reference(scene, rng)
    if found is None:
        return None
    shape, attributes = found
    return _template(words, "where", rng, a=words.reference(*attributes)), words.places[place_of(shape)]


def _absent(scene: Scene, subset: tuple[int, int, int], rng: np.random.Generator) -> Attributes:
    """Attributes that no shape has all of, but some shape all but one: it takes a close look."""
    while True:
        attributes = list(_mask(scene.shapes[int(rng.integers(len(scene.shapes)))], subset))
        changed = int(rng.choice(np.flatnonzero(subset)))
        attributes[changed] = str(rng.choice((SIZES, COLORS, SHAPES)[changed]))
        size, color, kind = attributes
        if not _count(scene, (size, color, kind)) or subset == (1, 0, 0):
            return size, color, kind


def _exists(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair:
    subset = [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (0, 1, 0), (1, 1, 0)][int(rng.integers(6))]
    shape = scene.shapes[int(rng.integers(len(scene.shapes)))]
    attributes = _mask(shape, subset) if rng.random() < 0.5 else _absent(scene, subset, rng)
    answer = words.present if _count(scene, attributes) else words.absent
    return _template(words, "exists", rng, some=words.indefinite(words.reference(*attributes))), answer


def _text(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair:
    return _template(words, "text", rng), words.no_text if scene.label is None else scene.label.text


def _compare(scene: Scene, words: Wording, rng: np.random.Generator) -> Pair | None:
    pairs = list(combinations(scene.shapes, 2))
    if not pairs:
        return None
    pair = pairs[int(rng.integers(len(pairs)))]
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    ask = [_same_color, _bigger, _left_of][int(rng.integers(3))]
    return ask(scene, first, second, words, rng) or _left_of(scene, first, second, words, rng)


def _two_references(
    scene: Scene, shapes: tuple[Shape, Shape], words: Wording, rng: np.random.Generator, without: int | None = None
) -> Pair | None:
    references = [_unique_reference(scene, shape, rng, without) for shape in shapes]
    if not all(any(attributes) for attributes in references):
        return None
    return words.reference(*references[0]), words.reference(*references[1])


def _same_color(scene: Scene, first: Shape, second: Shape, words: Wording, rng: np.random.Generator) -> Pair | None:
    named = _two_references(scene, (first, second), words, rng, without=1)
    if named is None:
        return None
    answer = words.yes if first.color == second.color else words.no
    return _template(words, "same_color", rng, a=named[0], b=named[1]), answer


def _bigger(scene: Scene, first: Shape, second: Shape, words: Wording, rng: np.random.Generator) -> Pair | None:
    named = _two_references(scene, (first, second), words, rng, without=0)
    if named is None or first.size == second.size:
        return None
    winner = named[0] if first.size == "big" else named[1]
    return _template(words, "bigger", rng, a=named[0], b=named[1]), words.bigger_answer.format(a=winner)


def _left_of(scene: Scene, first: Shape, second: Shape, words: Wording, rng: np.random.Generator) -> Pair | None:
    named = _two_references(scene, (first, second), words, rng)
    if named is None:
        return None
    answer = words.yes if first.x < second.x else words.no
    return _template(words, "left_of", rng, a=named[0], b=named[1]), answer


_ASKERS: dict[Kind, Callable[[Scene, Wording, np.random.Generator], Pair | None]] = {
    "describe": _describe,
    "count": _how_many,
    "color": _color,
    "shape": _shape,
    "where": _where,
    "exists": _exists,
    "text": _text,
    "compare": _compare,
}
