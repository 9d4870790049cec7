"""`visualglm evaluate`: figures of the built-in model on drawn scenes, kept, compared and shown."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import Invoke
from visualglm.scenes.dataset import HELD_OUT_SEEDS
from visualglm.scenes.draw import draw_scene
from visualglm.scenes.scene import make_scene

DESCRIBE = "图里有什么？"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten questions about two scenes, of which the last has a wrong label."""
    rows: list[dict[str, Any]] = []
    for number in range(2):
        draw_scene(make_scene(HELD_OUT_SEEDS + number)).save(tmp_path / f"{number}.png")
        labels = (
            "一个小的红色五角星，一个小的粉色正方形，一个大的蓝色圆形和文字IN。",
            "一个大的黑色五角星和文字DOOR。",
        )
        rows.append({"img": f"{number}.png", "prompt": DESCRIBE, "label": labels[number]})
        rows += [{"img": f"{number}.png", "prompt": "What is written?", "label": ["IN", "DOOR", "SUN"]}] * 4
    rows[-1] = rows[-1] | {"label": "nothing at all"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def figures(out: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for line in out.splitlines() if (cells := re.split(r"  +", line))}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_table(invoke: Invoke, data: Path):
    outcome = invoke("evaluate", data, "--batch-size", 4)
    assert outcome.code == 0 and "rows/s" in outcome.err
    found = figures(outcome.out)
    assert found["metric"] == ["all", "Chinese", "other"] and found["rows"] == ["10", "2", "8"]
    assert found["exact match (%)"] == ["90.000", "100.000", "87.500"]
    assert found["VQA accuracy (%)"] == found["ROUGE-L (%)"] == ["90.000", "100.000", "87.500"]
    assert found["BLEU-4 (0-100)"][1] == "100.000" and float(found["loss (nats a token)"][1]) < 0.05
    assert found.keys() >= {"CIDEr-D (0-10)", "perplexity", "tokens of the loss"}


def test_results_are_kept_and_gone_on_with(invoke: Invoke, data: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    command = ("evaluate", data, "-o", output, "--batch-size", 4)
    first = invoke(*command)
    rows = read(output)
    assert [row["row"] for row in rows] == list(range(1, 11))
    assert [row["exact_match"] for row in rows] == [1] * 9 + [0] and rows[1]["answer"] == "IN"
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b'{"row": 6') + 20])
    again = invoke(*command)
    assert "has 5 of 10 rows already" in again.err and again.out == first.out
    for before, after in zip(rows, read(output), strict=True):
        assert {**before, "loss": pytest.approx(before["loss"], abs=1e-5)} == after
    finished = invoke(*command)
    assert "has 10 of 10" in finished.err and "loaded" not in finished.err and finished.out == first.out
    assert "was begun with the loss True" in invoke(*command, "--no-loss").error
    assert invoke(*command, "--no-loss", "--overwrite").code == 0 and "loss" not in read(output)[0]


def test_before_and_after(invoke: Invoke, data: Path, tmp_path: Path):
    before, after, page = tmp_path / "before.jsonl", tmp_path / "after.jsonl", tmp_path / "page.html"
    invoke("evaluate", data, "-o", before, "--max-new-tokens", 2, "--no-loss")
    outcome = invoke("evaluate", data, "-o", after, "--compare", before, "--html", page)
    found = figures(outcome.out.split("rows, Chinese")[0])
    assert found["metric"] == ["before", "after", "change", "worse", "improved", "same"]
    assert found["exact match (%)"] == ["40.000", "90.000", "+50.000", "0", "5", "5"]
    text = page.read_text("utf-8")
    assert text.count('class="improved"') == 5 and text.count("<img ") == 10 and str(before) in text
    assert f"written: {page}" in outcome.err
    (tmp_path / "other.jsonl").write_text('{"prompt": "what?", "label": "a"}\n')
    error = invoke("evaluate", tmp_path / "other.jsonl", "--compare", before).error
    assert "only results of the same questions can be compared" in error


def test_errors_in_rows(invoke: Invoke, data: Path, tmp_path: Path):
    with open(data, "a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "long " * 300, "label": "x"}) + "\n")
    outcome = invoke("evaluate", data, "-o", tmp_path / "out.jsonl", "--no-loss")
    assert outcome.code == 0 and "1 of 11 rows have an error" in outcome.err
    assert figures(outcome.out)["rows with an error"] == ["1", "0", "1"]
    assert figures(outcome.out)["exact match (%)"][0] == "90.000"
    assert invoke("evaluate", data, "-o", tmp_path / "out.jsonl", "--no-loss", "--strict").code == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"prompt": "a", "label": "b"}\n{"img": 3}\n', "line 2"),
        ('{"prompt": "a"}\n', "line 1: there is no label"),
        ('[{"prompt": "a", "label": ""}]', "row 1: the label"),
        ("{\n", "line 1: this is no JSON"),
        ("", "has no rows"),
        ('{"img": "missing.png", "prompt": "a", "label": "b"}\n', "missing.png does not exist"),
    ],
)
def test_bad_data(rows: str, words: str, invoke: Invoke, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(rows)
    assert words in invoke("evaluate", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl").error
    assert not (tmp_path / "out.jsonl").exists()


def test_nothing_is_written_over(invoke: Invoke, data: Path, tmp_path: Path):
    evaluate, content = ("evaluate", data, "--no-loss"), data.read_bytes()
    assert "is the input" in invoke(*evaluate, "-o", data).error
    assert "not replaced" in invoke(*evaluate, "--html", data).error
    assert "not replaced" in invoke(*evaluate, "--html", tmp_path / "0.png").error
    for name in ("x", "x.meta.json"):
        assert "for the results" in invoke(*evaluate, "-o", tmp_path / "x", "--html", tmp_path / name).error
    assert "cannot be written" in invoke(*evaluate, "--html", tmp_path / "no" / "page.html").error
    assert "is the input" in invoke(*evaluate, "-o", tmp_path / "0.png", "--compare", tmp_path / "0.png").error
    assert "does not exist" in invoke("evaluate", tmp_path / "nowhere").error
    assert "cannot be read" in invoke(*evaluate, "--compare", tmp_path / "nowhere").error
    assert data.read_bytes() == content and not (tmp_path / "x").exists()
    page = tmp_path / "page.html"
    assert invoke(*evaluate, "--html", page).code == invoke(*evaluate, "--html", page).code == 0


def test_without_sacrebleu(invoke: Invoke, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    outcome = invoke("evaluate", data, "--no-loss")
    assert outcome.code == 0 and "visualglm[evaluate]" in outcome.err and "BLEU" not in outcome.out
