"""Draws docs/pictures.png: the example pictures with questions, and what a model really answers.

    python docs/make_pictures.py [--model DIR] [--font FILE]

The font must have Chinese characters; `apt install fonts-wqy-microhei` brings one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import visualglm

ROOT = Path(__file__).parent.parent
FONT = "wqy-microhei.ttc"
QUESTIONS = {
    "stop.png": ("图里有什么？", "What is written in the picture?", "绿色菱形在哪里？"),
    "sun.png": ("Describe this image.", "图里有几个图形？", "Which is bigger, the square or the triangle?"),
    "fish.png": ("图里写了什么？", "What color is the ring?", "Is the blue square to the left of the black cross?"),
}
PICTURE, MARGIN, LINE, GAP = 448, 28, 34, 12
WIDTH, HEIGHT = PICTURE + 2 * MARGIN, 960
MARKS = "，。？！"
PAPER, QUESTION, ANSWER = "#ffffff", "#57606a", "#1f2328"


def wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines no wider than a picture; English breaks between words, Chinese anywhere but before a mark."""
    lines = [""]
    for word in text.replace(" ", " \0").split("\0"):
        for piece in word if font.getlength(word) > PICTURE else [word]:
            if piece not in MARKS and font.getlength((lines[-1] + piece).rstrip()) > PICTURE:
                lines.append("")
            lines[-1] += piece
    return lines


def panel(model: visualglm.VisualGLM, name: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One picture, and below it each question with its answer."""
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    canvas = ImageDraw.Draw(page)
    path = ROOT / "examples" / name
    with Image.open(path) as picture:
        page.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    y = MARGIN + PICTURE + 2 * GAP
    for question in QUESTIONS[name]:
        for text, color in ((question, QUESTION), (model.ask(path, question), ANSWER)):
            for line in wrap(text, font):
                canvas.text((MARGIN, y), line, fill=color, font=font)
                y += LINE
        y += GAP
    return page.crop((0, 0, WIDTH, y + MARGIN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory; else the built-in model")
    parser.add_argument("--font", default=FONT, help="a font file with Chinese characters")
    arguments = parser.parse_args()
    font = ImageFont.truetype(arguments.font, 25)
    model = visualglm.load(arguments.model)
    panels = [panel(model, name, font) for name in QUESTIONS]
    page = Image.new("RGB", (WIDTH * len(panels), max(drawn.height for drawn in panels)), PAPER)
    for column, drawn in enumerate(panels):
        page.paste(drawn, (column * WIDTH, 0))
    page.save(ROOT / "docs" / "pictures.png", optimize=True)


if __name__ == "__main__":
    main()
