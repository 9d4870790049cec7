"""Fine-tunes the built-in model on twenty pictures, and shows what it then knows: `make finetune-demo`.

    python examples/finetune_demo.py [--output DIR] [--seed N] [--set KEY=VALUE ...]

It was never asked what is behind the shapes. This draws 20 pictures to learn from, 100 others, and 100 scenes of the
kind that the model was trained for; then it runs, and shows, the commands that a user would: ask, fine-tune, ask again.
It ends with 1 unless the new question is answered and the old ones still are. Needs the extra "train".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from visualglm.scenes.held_out import picture_of, questions_about
from visualglm.scenes.surroundings import QUESTION, SURROUNDINGS, draw_surrounded

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    sys.exit("The demonstration needs what fine-tuning needs; `pip install '.[train]'` adds it.")

RECIPE = Path(os.path.relpath(Path(__file__).parent.parent / "configs" / "finetune-demo.yaml"))
TRAINED = 20
MOST_BEFORE, LEAST_AFTER, MOST_LOST = 0.10, 0.90, 0.02
"""Shares of right answers: to the new question before and after, and of those to old questions."""

Labelled = tuple[Image.Image, list[tuple[str, str]]]
"""A picture, with questions and their answers."""


class Asked(NamedTuple):
    """What `visualglm evaluate` wrote down before and after, a result for each row."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]

    @property
    def pairs(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The results of each row, before and after."""
        return list(zip(self.before, self.after, strict=True))

    @property
    def shares(self) -> tuple[float, float]:
        """Of rows that were answered as labelled, before and after."""
        before, after = (sum(row["exact_match"] for row in rows) / len(rows) for rows in self)
        return before, after

    def line(self, what: str) -> str:
        before, after = self.shares
        return f"{what:<10}  {len(self.after):5}  {100 * before:6.1f} %  {100 * after:6.1f} %"


class Demo:
    """One demonstration, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapter = folder / "run" / "adapter"

    def draw(self, seed: int, unseen: int, scenes: int) -> None:
        """The three data sets: `train`, `unseen` and `old`."""
        first = 10_000 * seed
        self._write("train", (_surrounded(first + number, number) for number in range(TRAINED)))
        self._write("unseen", (_surrounded(first + TRAINED + number, number) for number in range(unseen)))
        self._write("old", (_scene(number) for number in range(scenes)))

    def ask(self, *options: object) -> None:
        _run("ask", *options, "--image", self.folder / "unseen" / "000.png", QUESTION, "--quiet")

    def evaluate(self, name: str, when: str, *options: object) -> None:
        _run("evaluate", self.folder / f"{name}.jsonl", *options, "--output", self._results(name, when), "--quiet")

    def finetune(self, seed: int, settings: Iterable[str]) -> None:
        rows, changes = self.folder / "train.jsonl", [part for setting in settings for part in ("--set", setting)]
        _run("finetune", RECIPE, "--train", rows, "--output", self.adapter.parent, "--seed", seed, *changes)

    def evaluate_again(self, name: str) -> None:
        page = self.folder / f"{name}.html"
        self.evaluate(
            name, "after", "--adapter", self.adapter, "--compare", self._results(name, "before"), "--html", page
        )

    def asked(self, name: str) -> Asked:
        return Asked(*(_json_lines(self._results(name, when)) for when in ("before", "after")))

    def _results(self, name: str, when: str) -> Path:
        return self.folder / f"{name}.{when}.jsonl"

    def _write(self, name: str, labelled: Iterable[Labelled]) -> None:
        """Pictures as files in `name/`, and the rows of all of them in `name.jsonl`."""
        (self.folder / name).mkdir(parents=True)
        with (self.folder / f"{name}.jsonl").open("w", encoding="utf-8") as rows:
            for number, (picture, pairs) in enumerate(labelled):
                image = f"{name}/{number:03}.png"
                picture.save(self.folder / image)
                for question, answer in pairs:
                    row = {"img": image, "prompt": question, "label": answer}
                    rows.write(json.dumps(row, ensure_ascii=False) + "\n")


def _surrounded(seed: int, number: int) -> Labelled:
    """The surroundings take turns."""
    surrounding = list(SURROUNDINGS)[number % len(SURROUNDINGS)]
    return draw_surrounded(surrounding, seed), [(QUESTION, SURROUNDINGS[surrounding])]


def _scene(number: int) -> Labelled:
    return picture_of(number), [(asked.question, asked.answer) for asked in questions_about(number)]


def _run(*arguments: object) -> None:
    """One command, shown as it is typed; the demonstration ends if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['visualglm', *words])}", flush=True)
    done = subprocess.run([sys.executable, "-m", "visualglm.cli", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def show(new: Asked, old: Asked) -> None:
    """Some answers side by side, and how many are right."""
    print(f"\n{QUESTION}\n\n{'picture':<16}{'label':<8}{'before':<40}after")
    for before, after in new.pairs[: 2 * len(SURROUNDINGS)]:
        said = textwrap.shorten(before["answer"], 38, placeholder=" …")
        print(f"{after['image']:<16}{after['references'][0]:<8}{said:<40}{after['answer']}")
    print("\nanswered as labelled\nquestions     rows    before     after")
    print(new.line("background"))
    print(old.line("all others"))


def faults(new: Asked, old: Asked) -> list[str]:
    """What was not reached, a sentence each."""
    (new_before, new_after), (old_before, old_after) = new.shares, old.shares
    # 0.99 - 0.97 is a little more than 0.02.
    lost = round(old_before - old_after, 9)
    checks = {
        f"The new question was answered before, {new_before:.1%} of the time.": new_before < MOST_BEFORE,
        f"The new question is answered {new_after:.1%} of the time, and not {LEAST_AFTER:.0%}.": (
            new_after >= LEAST_AFTER
        ),
        f"Old questions lost {100 * lost:.1f} points, and not at most {100 * MOST_LOST:.0f}.": lost <= MOST_LOST,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


def draw_poster(folder: Path, new: Asked, picture: Path) -> None:
    """A picture of each surrounding with the answers before and after, and the curve of the loss."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplot_mosaic(
        [[0, 1, 2, "loss"], [3, 4, 5, "loss"]], width_ratios=(1, 1, 1, 2.2), gridspec_kw={"wspace": 0.08}
    )
    for place, (before, after) in enumerate(new.pairs[: len(SURROUNDINGS)]):
        with Image.open(folder / after["image"]) as drawn:
            axes[place].imshow(drawn)
        axes[place].set_axis_off()
        said = textwrap.shorten(before["answer"], 24, placeholder=" …")
        axes[place].set_title(f"before: {said}\nafter: {after['answer']}", fontsize=11)
    log = _json_lines(folder / "run" / "log.jsonl")
    axes["loss"].plot([row["step"] for row in log], [row["losses"]["loss"] for row in log], linewidth=1)
    axes["loss"].set(title=f"{TRAINED} other pictures learnt", xlabel="step", ylabel="loss", yscale="log")
    figure.suptitle(QUESTION, fontsize=14)
    figure.savefig(picture, dpi=90)


def demonstrate(given: argparse.Namespace) -> None:
    """All of it; exits with a sentence for each figure that was missed."""
    demo = Demo(given.output)
    print(f"drawing {TRAINED} pictures to learn from, {given.unseen} others and {given.scenes} scenes", flush=True)
    demo.draw(given.seed, given.unseen, given.scenes)
    demo.ask()
    for name in ("unseen", "old"):
        demo.evaluate(name, "before")
    demo.finetune(given.seed, given.set)
    demo.ask("--adapter", demo.adapter)
    for name in ("unseen", "old"):
        demo.evaluate_again(name)
    new, old = demo.asked("unseen"), demo.asked("old")
    show(new, old)
    draw_poster(demo.folder, new, demo.folder / "demo.png")
    print(f"\n{demo.folder}: demo.png, unseen.html and old.html show the answers, run/curve.png the loss.")
    missed = faults(new, old)
    if missed:
        sys.exit("\n".join(missed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/finetune-demo"), help="a folder that is not there yet")
    add("--seed", type=int, default=1, help="decides which pictures are drawn, and how training goes")
    add("--unseen", type=int, default=100, help="pictures to be asked about the background")
    add("--scenes", type=int, default=100, help="scenes to be asked the old questions about")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe")
    given = parser.parse_args()
    if given.seed < 0 or given.unseen < 1 or given.scenes < 1:
        parser.error("--seed must be at least 0, --unseen and --scenes at least 1.")
    if given.output.exists():
        sys.exit(f"{given.output} is there already; remove it, or name another folder as --output.")
    try:
        demonstrate(given)
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
