"""The words of the two languages: names, question templates and the one canonical form of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from visualglm.scenes.scene import COLORS, SHAPES, SIZES

Language = Literal["en", "zh"]
Kind = Literal["describe", "count", "color", "shape", "where", "exists", "text", "compare"]
KINDS: tuple[Kind, ...] = ("describe", "count", "color", "shape", "where", "exists", "text", "compare")
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True)
class Wording:
    """One language. Templates name their blanks; `{a}` and `{b}` are references such as "red circle"."""

    names: dict[str, str]
    places: dict[tuple[int, int], str]
    separator: str
    article: str
    article_before_vowel: str
    plural_ending: str
    sibilant_plural: str
    any_shape: str
    templates: dict[str, tuple[str, ...]]
    yes: str
    no: str
    present: str
    absent: str
    no_text: str
    count_answer: str
    bigger_answer: str
    item: str
    label_item: str
    item_separator: str
    last_separator: str
    full_stop: str

    def reference(self, size: str | None, color: str | None, kind: str | None) -> str:
        """A phrase such as "big red circle", with whatever is not None."""
        words = [self.names[word] for word in (size, color) if word]
        return self.separator.join([*words, self.names[kind] if kind else self.any_shape])

    def plural(self, reference: str) -> str:
        return reference + (self.sibilant_plural if reference.endswith("s") else self.plural_ending)

    def indefinite(self, reference: str) -> str:
        """A reference to any such thing: "a red circle", "an orange circle"."""
        return (self.article_before_vowel if reference[0] in "aeiou" else self.article) + reference

    def enumerate(self, items: Sequence[str]) -> str:
        text = self.item_separator.join(items[:-1])
        text = f"{text}{self.last_separator}{items[-1]}" if text else items[0]
        return text[0].upper() + text[1:] + self.full_stop


def _names(words: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in words.split())


EN = Wording(
    names={word: word for word in (*SIZES, *COLORS, *SHAPES)},
    places={
        (0, 0): "top left",
        (1, 0): "top",
        (2, 0): "top right",
        (0, 1): "left",
        (1, 1): "center",
        (2, 1): "right",
        (0, 2): "bottom left",
        (1, 2): "bottom",
        (2, 2): "bottom right",
    },
    separator=" ",
    article="a ",
    article_before_vowel="an ",
    plural_ending="s",
    sibilant_plural="es",
    any_shape="shape",
    templates={
        "describe": (
            "What is in the picture?",
            "What is in this image?",
            "Describe the picture.",
            "Describe this image.",
            "What do you see?",
            "What can you see in the picture?",
        ),
        "count_all": (
            "How many shapes are there?",
            "How many shapes are in the picture?",
            "How many shapes do you see?",
        ),
        "count": (
            "How many {many} are there?",
            "How many {many} are in the picture?",
            "How many {many} do you see?",
        ),
        "color": (
            "What color is the {a}?",
            "What colour is the {a}?",
            "What is the color of the {a}?",
        ),
        "shape": (
            "What shape is {a}?",
            "Which shape is {a}?",
            "What is the shape that is {a}?",
        ),
        "shape_place": (
            "What shape is in the {place}?",
            "Which shape is in the {place}?",
        ),
        "where": ("Where is the {a}?", "Where is the {a} in the picture?", "In which part is the {a}?"),
        "exists": ("Is there {some}?", "Is there {some} in the picture?", "Do you see {some}?"),
        "text": (
            "What is written?",
            "What is written in the picture?",
            "What does the text say?",
            "What text is there?",
        ),
        "same_color": ("Are the {a} and the {b} the same color?", "Do the {a} and the {b} have the same color?"),
        "bigger": ("Which is bigger, the {a} or the {b}?", "Which one is bigger, the {a} or the {b}?"),
        "left_of": ("Is the {a} to the left of the {b}?", "Is the {a} left of the {b}?"),
    },
    yes="yes",
    no="no",
    present="yes",
    absent="no",
    no_text="no text",
    count_answer="{n}",
    bigger_answer="the {a}",
    item="a {a}",
    label_item="the text {text}",
    item_separator=", ",
    last_separator=" and ",
    full_stop=".",
)

ZH = Wording(
    names=_names(
        "small=小的 big=大的 red=红色 orange=橙色 yellow=黄色 green=绿色 blue=蓝色 purple=紫色 pink=粉色 black=黑色 "
        "circle=圆形 square=正方形 triangle=三角形 diamond=菱形 star=五角星 cross=十字 heart=爱心 ring=圆环"
    ),
    places={
        (0, 0): "左上方",
        (1, 0): "上方",
        (2, 0): "右上方",
        (0, 1): "左侧",
        (1, 1): "中间",
        (2, 1): "右侧",
        (0, 2): "左下方",
        (1, 2): "下方",
        (2, 2): "右下方",
    },
    separator="",
    article="",
    article_before_vowel="",
    plural_ending="",
    sibilant_plural="",
    any_shape="图形",
    templates={
        "describe": (
            "图里有什么？",
            "图片里有什么？",
            "这张图里有什么？",
            "描述这张图片。",
            "描述一下这张图片。",
            "你看到了什么？",
        ),
        "count_all": ("有几个图形？", "图里有几个图形？", "图里有多少个图形？"),
        "count": ("有几个{many}？", "图里有几个{many}？", "图里有多少个{many}？"),
        "color": ("{a}是什么颜色？", "{a}是什么颜色的？", "图里的{a}是什么颜色？"),
        "shape": ("{a}的图形是什么形状？", "{a}的是什么图形？", "{a}的图形是什么？"),
        "shape_place": ("{place}是什么图形？", "{place}的图形是什么形状？"),
        "where": ("{a}在哪里？", "{a}在图的什么位置？", "图里的{a}在哪里？"),
        "exists": ("有{some}吗？", "图里有{some}吗？", "图里有没有{some}？"),
        "text": ("写了什么？", "图里写了什么？", "图里的文字是什么？", "上面写着什么？"),
        "same_color": ("{a}和{b}颜色相同吗？", "{a}和{b}的颜色一样吗？"),
        "bigger": ("{a}和{b}哪个更大？", "哪个更大，{a}还是{b}？"),
        "left_of": ("{a}在{b}的左边吗？", "{a}是在{b}左边吗？"),
    },
    yes="是的",
    no="不是",
    present="有",
    absent="没有",
    no_text="没有文字",
    count_answer="{n}个",
    bigger_answer="{a}",
    item="一个{a}",
    label_item="文字{text}",
    item_separator="，",
    last_separator="和",
    full_stop="。",
)

WORDINGS: dict[Language, Wording] = {"en": EN, "zh": ZH}
TEXT_ONLY: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Hello", "Hello! Give me a picture and ask me about it."),
        ("Hi", "Hello! Give me a picture and ask me about it."),
        ("Who are you?", "I am a small demonstration model that knows drawn shapes, numbers and short words."),
        ("What can you do?", "I can describe, count and compare drawn shapes and read short words."),
    ),
    "zh": (
        ("你好", "你好！给我一张图片，问我吧。"),
        ("您好", "你好！给我一张图片，问我吧。"),
        ("你是谁？", "我是一个小小的演示模型，只认识画出来的图形、数字和短词。"),
        ("你能做什么？", "我能描述、数出和比较画出来的图形，也能读短词。"),
    ),
}
NO_PICTURE: dict[Language, str] = {"en": "There is no picture. Please give me one.", "zh": "没有图片，请给我一张图片。"}
