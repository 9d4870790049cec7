"""Every question is read again, word by word, and answered anew from the scene; one question has one answer."""

import re
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from visualglm.processing.answer import clean_answer
from visualglm.processing.prompt import TEMPLATES, template_for
from visualglm.scenes.questions import Question, ask_about
from visualglm.scenes.scene import COLORS, SHAPES, SIZES, Scene, Shape, make_scene
from visualglm.scenes.wording import KINDS, LANGUAGES, NO_PICTURE, TEXT_ONLY, WORDINGS, Language, Wording

SEEDS = range(150)
DRAWS = 6


def asked(seeds: range = SEEDS) -> Iterator[tuple[Scene, Question]]:
    for seed in seeds:
        scene, rng = make_scene(seed), np.random.default_rng(seed)
        for kind in KINDS:
            for language in LANGUAGES:
                for _ in range(DRAWS):
                    question = ask_about(scene, kind, language, rng)
                    if question is not None:
                        yield scene, question


@pytest.fixture(scope="module")
def questions() -> list[tuple[Scene, Question]]:
    return list(asked())


# --- a reader of questions that knows the words but not how questions are made ----------------------------------------


def pattern(language: Language, name: str) -> list[re.Pattern[str]]:
    """The templates of one name, with a reference such as "big red circle" for every blank that takes one."""
    words = WORDINGS[language]
    blank = words.separator
    size, color, shape = ("|".join(words.names[word] for word in group) for group in (SIZES, COLORS, SHAPES))
    noun = f"(?:{shape}|{words.any_shape})"
    told = f"(?:(?:{size}){blank}?)?(?:(?:{color}){blank}?)?"
    blanks = {
        "a": f"(?P<a>{told}{noun})",
        "b": f"(?P<b>{told}{noun})",
        "some": f"(?:a (?![aeiou])|an (?=[aeiou])|(?![a-z]))(?P<a>{told}{noun})",
        "many": f"(?P<a>{told}{noun})(?:s|es)?",
        "place": f"(?P<place>{'|'.join(sorted(words.places.values(), key=len, reverse=True))})",
    }
    if name == "shape":
        bare = "|".join(words.names[word].removesuffix("的") for word in SIZES)
        blanks["a"] = f"(?P<a>{bare}|(?:(?:{size}){blank}?)?(?:{color})?)"
    patterns = []
    for template in words.templates[name]:
        parts = re.split(r"\{(\w+)\}", template)
        patterns.append(re.compile("".join(blanks[p] if i % 2 else re.escape(p) for i, p in enumerate(parts))))
    return patterns


def described(words: Wording, phrase: str, scene: Scene) -> list[Shape]:
    """The shapes that a phrase fits."""
    told = {name for name in (*SIZES, *COLORS, *SHAPES) if words.names[name].removesuffix("的") in phrase}
    return [shape for shape in scene.shapes if told <= {shape.size, shape.color, shape.kind}]


def only(shapes: list[Shape]) -> Shape:
    (shape,) = shapes
    return shape


def place(words: Wording, shape: Shape) -> str:
    column, row = (0 if center < 224 / 3 else 1 if center < 448 / 3 else 2 for center in (shape.x, shape.y))
    return words.places[column, row]


def two(scene: Scene, words: Wording, found: dict[str, str]) -> tuple[Shape, Shape]:
    return only(described(words, found["a"], scene)), only(described(words, found["b"], scene))


def color(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    return words.names[only(described(words, found["a"], scene)).color]


def shape(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    return words.names[only(described(words, found["a"], scene)).kind]


def shape_place(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    return words.names[only([shape for shape in scene.shapes if place(words, shape) == found["place"]]).kind]


def same_color(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    first, second = two(scene, words, found)
    return words.yes if first.color == second.color else words.no


def bigger(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    first, second = two(scene, words, found)
    assert abs(first.radius - second.radius) > 5, "a difference that shows"
    return words.bigger_answer.format(a=found["a"] if first.radius > second.radius else found["b"])


def left_of(scene: Scene, words: Wording, found: dict[str, str]) -> str:
    first, second = two(scene, words, found)
    return words.yes if first.x < second.x else words.no


ANSWERS: dict[str, Callable[[Scene, Wording, dict[str, str]], str]] = {
    "count_all": lambda scene, words, _: words.count_answer.format(n=len(scene.shapes)),
    "count": lambda scene, words, found: words.count_answer.format(n=len(described(words, found["a"], scene))),
    "color": color,
    "shape": shape,
    "shape_place": shape_place,
    "where": lambda scene, words, found: place(words, only(described(words, found["a"], scene))),
    "exists": lambda scene, words, found: words.present if described(words, found["a"], scene) else words.absent,
    "text": lambda scene, words, _: scene.label.text if scene.label else words.no_text,
    "same_color": same_color,
    "bigger": bigger,
    "left_of": left_of,
}
NAMES = {
    "count": ("count_all", "count"),
    "color": ("color",),
    "shape": ("shape", "shape_place"),
    "where": ("where",),
    "exists": ("exists",),
    "text": ("text",),
    "compare": ("same_color", "bigger", "left_of"),
}
PATTERNS = {
    (language, name): pattern(language, name) for language in LANGUAGES for names in NAMES.values() for name in names
}


def read(question: Question) -> list[tuple[str, re.Match[str]]]:
    return [
        (name, match)
        for name in NAMES[question.kind]
        for regex in PATTERNS[question.language, name]
        if (match := regex.fullmatch(question.question))
    ]


@pytest.mark.parametrize("kind", NAMES)
def test_answers_are_right(kind: str, questions: list[tuple[Scene, Question]]):
    used = set()
    for scene, question in questions:
        if question.kind == kind:
            readings = read(question)
            assert readings, question
            for name, match in readings:
                assert ANSWERS[name](scene, WORDINGS[question.language], match.groupdict()) == question.answer, question
                used.add((question.language, name))
    assert used == {(language, name) for language in LANGUAGES for name in NAMES[kind]}


def test_descriptions_name_everything_from_left_to_right(questions: list[tuple[Scene, Question]]):
    for scene, question in questions:
        if question.kind != "describe":
            continue
        words = WORDINGS[question.language]
        assert question.question in words.templates["describe"]
        text = question.answer.removesuffix(words.full_stop)
        assert text != question.answer
        items = re.split(f"{re.escape(words.item_separator)}|{re.escape(words.last_separator)}", text)
        if scene.label is not None:
            assert items.pop().lower() == words.label_item.format(text=scene.label.text).lower()
        assert len(items) == len(scene.shapes)
        for item, shape in zip(items, scene.shapes, strict=True):
            assert item.lower() == words.item.format(a=words.reference(shape.size, shape.color, shape.kind))


def test_one_question_has_one_answer():
    for seed in range(60):
        answers: dict[str, set[str]] = {}
        scene, rng = make_scene(seed), np.random.default_rng(seed)
        for kind in KINDS:
            for language in LANGUAGES:
                for _ in range(30):
                    question = ask_about(scene, kind, language, rng)
                    if question is not None:
                        answers.setdefault(question.question, set()).add(question.answer)
        assert {text: found for text, found in answers.items() if len(found) > 1} == {}


def test_questions_are_repeatable_and_come_in_every_wording(questions: list[tuple[Scene, Question]]):
    assert list(asked(range(20))) == list(asked(range(20)))
    used = {
        (question.language, name, regex.pattern)
        for _, question in questions
        if question.kind != "describe"
        for name in NAMES[question.kind]
        for regex in PATTERNS[question.language, name]
        if regex.fullmatch(question.question)
    }
    assert len(used) == sum(map(len, PATTERNS.values()))


def test_both_answers_of_yes_and_no_come_up(questions: list[tuple[Scene, Question]]):
    for kind, name in (("exists", "present"), ("compare", "yes")):
        for language in LANGUAGES:
            positive = getattr(WORDINGS[language], name)
            answers = [
                question.answer == positive
                for _, question in questions
                if (question.kind, question.language) == (kind, language)
            ]
            assert 0.25 < np.mean(answers) < 0.75, "guessing one of them does not pay"


def test_comparing_takes_two_shapes():
    scene = make_scene(next(seed for seed in range(100) if len(make_scene(seed).shapes) == 1))
    rng = np.random.default_rng(0)
    for language in LANGUAGES:
        assert {ask_about(scene, "compare", language, rng) for _ in range(20)} == {None}
        for kind in KINDS[:-1]:
            assert any(ask_about(scene, kind, language, rng) for _ in range(20)), kind


def test_texts_are_of_their_language_and_left_alone_by_the_clean_up(questions: list[tuple[Scene, Question]]):
    """The template is chosen by the question's characters, and an answer comes back as it was taught."""
    texts = [(q.language, q.question, q.answer) for _, q in questions]
    texts += [(language, *pair) for language in LANGUAGES for pair in TEXT_ONLY[language]]
    texts += [
        (language, texts[0][1] if language == "en" else "有什么？", NO_PICTURE[language]) for language in LANGUAGES
    ]
    for language, question, answer in texts:
        assert template_for(question) == TEMPLATES[language]
        assert clean_answer(answer) == answer
        assert question == question.strip() and "  " not in question and "{" not in question + answer


def test_the_languages_say_the_same_things():
    english, chinese = WORDINGS["en"], WORDINGS["zh"]
    assert set(english.names) == set(chinese.names) == {*SIZES, *COLORS, *SHAPES}
    assert set(english.places) == set(chinese.places) == {(x, y) for x in range(3) for y in range(3)}
    assert (
        set(english.templates)
        == set(chinese.templates)
        == {"describe", *(n for names in NAMES.values() for n in names)}
    )
    for words in (english, chinese):
        assert len(set(words.names.values())) == len(words.names)
        assert len(set(words.places.values())) == 9


@pytest.mark.parametrize(
    ("reference", "plural"),
    [("cross", "crosses"), ("big red circle", "big red circles"), ("shape", "shapes"), ("star", "stars")],
)
def test_plurals(reference: str, plural: str):
    assert WORDINGS["en"].plural(reference) == plural
    assert WORDINGS["zh"].plural("红色圆形") == "红色圆形"
