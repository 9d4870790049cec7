"""`visualglm caption`: one row of output for each of input, in order, whatever interrupts it."""

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import visualglm
from tests.cli.program import Invoke, Outcome, draw, finish, spawn
from visualglm.cli.caption import DEFAULT_PROMPT
from visualglm.cli.program import run
from visualglm.cli.row_log import RowLog
from visualglm.errors import DataError
from visualglm.model import VisualGLM

WINDOW = 192
SHORT = ("--max-new-tokens", "6")
PICTURES = 200


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> VisualGLM:
    return visualglm.load(tiny_model_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures, and one that is none."""
    path = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES - 1):
        draw(path / f"{number:03}.png", number)
    (path / "100a.jpg").write_text("no picture")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_folder(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, tmp_path: Path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    names = ["b.png", "A.PNG", "c.jpeg", "deeper/d.png", ".hidden.png", "notes.txt"]
    for number, name in enumerate(names):
        draw(tmp_path / "in" / "x.png", number).rename(tmp_path / "in" / name)
    caption = ("caption", tmp_path / "in", "-m", tiny_model_dir, *SHORT, "--batch-size", 2)
    outcome = invoke(*caption, "-o", tmp_path / "out.jsonl")
    assert (outcome.code, outcome.out) == (0, "")
    assert read(tmp_path / "out.jsonl") == [
        {
            "image": name,
            "prompt": DEFAULT_PROMPT,
            "answer": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
        }
        for name in ("A.PNG", "b.png", "c.jpeg")
        for reply in model.reply_batch([(tmp_path / "in" / name, DEFAULT_PROMPT)], max_new_tokens=6)
    ]
    assert "out.jsonl: 3 rows, 0 with an error" in outcome.err
    invoke(*caption, "--recursive", "--prompt", "What?", "-o", tmp_path / "all.jsonl")
    rows = read(tmp_path / "all.jsonl")
    assert [row["image"] for row in rows] == ["A.PNG", "b.png", "c.jpeg", "deeper/d.png"]
    assert {row["prompt"] for row in rows} == {"What?"}


def test_a_file_name_that_is_no_text(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    name = os.fsdecode(b"\xff.png")
    (tmp_path / "in").mkdir()
    draw(tmp_path / "in" / name, 1)
    caption = ("caption", tmp_path / "in", "-o", tmp_path / "out.jsonl", "-m", tiny_model_dir, *SHORT)
    assert invoke(*caption).code == invoke(*caption).code == 0
    [row] = read(tmp_path / "out.jsonl")
    assert row["image"] == name and "answer" in row


def test_json_lines(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, tmp_path: Path):
    """Ids, prompts of their own, text only, both names for the image, and what cannot be answered."""
    picture = draw(tmp_path / "p.png", 3)
    source = write(
        tmp_path / "in.jsonl",
        [
            {"image": "p.png", "id": 7, "label": "not used"},
            {"img": str(picture), "prompt": "What is it?", "id": "b"},
            {"prompt": "你好"},
            {"image": "missing.png"},
            {"image": "p.png", "prompt": "long " * 300},
            {"image": "p.png", "prompt": "<img>p.png</img>"},
        ],
    )
    outcome = invoke("caption", source, "-o", tmp_path / "out.jsonl", "-m", tiny_model_dir, *SHORT)
    rows = read(tmp_path / "out.jsonl")
    assert [row.get("id") for row in rows] == [7, "b", None, None, None, None]
    assert [row["image"] for row in rows] == ["p.png", str(picture), None, "missing.png", "p.png", "p.png"]
    for row in (rows[0], rows[1], rows[2], rows[5]):
        assert row["answer"] == model.ask(picture if row["image"] else None, row["prompt"], max_new_tokens=6)
    assert "missing.png does not exist" in rows[3]["error"] and "answer" not in rows[3]
    assert "shorten the question" in rows[4]["error"]
    assert (outcome.code, outcome.out) == (0, "")
    assert "6 rows, 2 with an error" in outcome.err


def test_strict(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    source = write(tmp_path / "in.jsonl", [{"image": "missing.png"}])
    caption = ("caption", source, "-o", tmp_path / "out.jsonl", "-m", tiny_model_dir, *SHORT, "--strict")
    assert invoke(*caption).code == 1
    assert invoke(*caption).code == 1, "the error of the run before counts too"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b'{"image": "a.png"}\n{"image": \n', "in.jsonl, line 2: this is no JSON"),
        (b'{"image": "a.png"}\n\n["a.png"]\n', 'in.jsonl, line 3: this is ["a.png"], not a JSON object'),
        (b'{"image": 5}\n', "line 1: the image is 5; write the path of a file"),
        (b'{"image": "a.png", "prompt": ""}\n', 'line 1: the prompt is ""'),
        (b'{"text": "a.png"}\n', "line 1: there is neither an image nor a prompt"),
        (b'{"image": "a.png", "id": [1]}\n', "line 1: the id is [1]"),
        (b'{"image": "\xff.png"}\n', "line 1: this is no JSON"),
        (b"[" * 100_000, "line 1: this is no JSON"),
        (b"\n \n", "has no rows"),
    ],
    ids=range(9),
)
def test_malformed_lines_are_told_before_anything_is_run(
    lines: bytes, words: str, invoke: Invoke, tiny_model_dir: Path, tmp_path: Path
):
    (tmp_path / "in.jsonl").write_bytes(lines)
    outcome = invoke("caption", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", tiny_model_dir)
    assert words in outcome.error
    assert "loaded" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_wrong_input_and_output(invoke: Invoke, tiny_model_dir: Path, picture: Path, tmp_path: Path):
    def error(source: Path, output: Path, *options: str) -> str:
        return invoke("caption", source, "-o", output, "-m", tiny_model_dir, *options).error

    out, source = tmp_path / "out.jsonl", write(tmp_path / "in.jsonl", [{"prompt": "What?"}])
    (tmp_path / "empty").mkdir()
    assert "neither a folder nor a file" in error(tmp_path / "nothing", out)
    assert "holds no image" in error(tmp_path / "empty", out)
    assert "this is no JSON" in error(picture, out)
    assert "is the input" in error(source, source, "--overwrite")
    assert "no regular file" in error(source, tmp_path)
    assert "no regular file" in error(source, Path("/dev/full"))
    assert "No such file or directory" in error(source, tmp_path / "no" / "folder.jsonl")
    assert "no in.jsonl.meta.json to go on from" in error(write(tmp_path / "other.jsonl", [{"prompt": "?"}]), source)


def test_the_longest_answer_goes_by_the_window(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, tmp_path: Path):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "What?"}]), tmp_path / "out.jsonl"
    invoke("caption", source, "-o", out, "-m", tiny_model_dir)
    assert [row["answer"] for row in read(out)] == [model.ask(None, "What?", max_new_tokens=WINDOW // 2)]
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["max_new_tokens"] == WINDOW // 2


def test_what_leaves_no_row_any_room_is_told_once(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    row = {"image": str(draw(images / "a.png", 1)), "prompt": "long " * 300}
    source, out = write(tmp_path / "in.jsonl", [row, row]), tmp_path / "out.jsonl"

    def caption(*arguments: object) -> Outcome:
        return invoke("caption", *arguments, "-o", out, "-m", tiny_model_dir)

    no_room = "the model's window of 192 tokens has no room for the question of any row"
    assert f"With 180 tokens for the answer, {no_room}" in caption(source, "--max-new-tokens", 180).error
    assert f"With 96 tokens for the answer, {no_room}" in caption(images, "--prompt", row["prompt"]).error
    assert "the model's window of 192 tokens has to" in caption(source, "--max-new-tokens", WINDOW).error
    assert not out.exists() and not out.with_name("out.jsonl.meta.json").exists()
    write(source, [row, {"prompt": "?"}])
    assert caption(source, "--max-new-tokens", 180).code == 0
    assert ["error" in row for row in read(out)] == [True, False]


def test_resume_refuses_what_is_not_its_own(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    caption = ("caption", source, "-o", out, "-m", tiny_model_dir)
    assert invoke(*caption, *SHORT).code == 0
    whole = out.read_bytes()
    assert "was begun with the max_new_tokens 6, and now it is 7" in invoke(*caption, "--max-new-tokens", 7).error
    assert "was begun with the model " in change_and_run(invoke, out, caption, b'"model": "', b'"model": "0')
    write(source, [{"prompt": "a"}, {"prompt": "c"}])
    assert "line 2 is not of row 2 of this input" in invoke(*caption, *SHORT).error
    write(source, [{"prompt": "a"}])
    assert "line 2 is not of row 2 of this input" in invoke(*caption, *SHORT).error
    assert out.read_bytes() == whole
    assert invoke(*caption, *SHORT, "--overwrite").code == 0
    assert [row["prompt"] for row in read(out)] == ["a"]
    write(source, [{"prompt": "a"}, {"prompt": "d"}])
    assert invoke(*caption, *SHORT).code == 0
    assert [row["prompt"] for row in read(out)] == ["a", "d"], "rows that were added to the input are answered"


def change_and_run(invoke: Invoke, out: Path, caption: tuple[object, ...], old: bytes, new: bytes) -> str:
    sidecar = out.with_name("out.jsonl.meta.json")
    kept = sidecar.read_bytes()
    sidecar.write_bytes(kept.replace(old, new))
    error = invoke(*caption, *SHORT).error
    sidecar.write_bytes(kept)
    return error


def test_overwriting_waits_until_there_are_rows(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path):
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    caption = ("caption", source, "-o", out, "-m", tiny_model_dir, *SHORT)
    invoke(*caption)
    whole = out.read_bytes()
    assert "cuda:99" in invoke(*caption, "--overwrite", "--device", "cuda:99").error
    assert out.read_bytes() == whole


def test_a_torn_last_line_is_cut_off(invoke: Invoke, tiny_model_dir: Path, folder: Path, tmp_path: Path):
    source = write(tmp_path / "in.jsonl", [{"image": str(folder / f"{number:03}.png")} for number in range(7)])
    out = tmp_path / "out.jsonl"
    caption = ("caption", source, "-o", out, "-m", tiny_model_dir, *SHORT, "--batch-size", 3)
    invoke(*caption)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (b"".join(lines[:3]) + lines[3][:20], lines[0][:-1], b"".join(lines[:5]), b"", whole):
        out.write_bytes(kept)
        assert invoke(*caption).code == 0
        assert out.read_bytes() == whole


def test_two_at_once(tmp_path: Path):
    with RowLog(tmp_path / "out.jsonl", {}), pytest.raises(DataError, match="Another process is writing"):
        RowLog(tmp_path / "out.jsonl", {})
    assert not (tmp_path / "out.jsonl").exists(), "without a row there is no file"


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert run([str(part) for part in caption_of(folder, tiny_model_dir, out)]) == 0
    return out.read_bytes()


def caption_of(folder: Path, model: Path, out: Path) -> tuple[object, ...]:
    return ("caption", folder, "-o", out, "-m", model, "--batch-size", 8, "--max-new-tokens", 24)


def kill_in_the_middle(command: tuple[object, ...], out: Path, how: signal.Signals) -> int:
    """Kill the command as soon as it has added rows; returns how many there are then."""
    size = out.stat().st_size if out.exists() else 0
    process = spawn(*command)
    deadline = time.monotonic() + 120
    while not out.exists() or out.stat().st_size <= size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(how)
    finish(process)
    return out.read_bytes().count(b"\n")


def test_kill_in_mid_run_and_resume(
    invoke: Invoke, folder: Path, tiny_model_dir: Path, uninterrupted: bytes, tmp_path: Path
):
    out = tmp_path / "out.jsonl"
    command = caption_of(folder, tiny_model_dir, out)
    rows = [kill_in_the_middle(command, out, how) for how in (signal.SIGKILL, signal.SIGINT)]
    assert 0 < rows[0] < rows[1] < PICTURES
    outcome = invoke(*command)
    assert outcome.code == 0
    assert f"has {rows[1]} of {PICTURES} rows already" in outcome.err
    assert f"answered {PICTURES - rows[1]} rows" in outcome.err
    assert f"{PICTURES} rows, 1 with an error" in outcome.err
    assert out.read_bytes() == uninterrupted
    assert [row["image"] for row in read(out)] == sorted(path.name for path in folder.iterdir())


def test_full_disk_in_mid_run_and_resume(
    invoke: Invoke, folder: Path, tiny_model_dir: Path, uninterrupted: bytes, tmp_path: Path
):
    out = tmp_path / "out.jsonl"
    command = caption_of(folder, tiny_model_dir, out)
    limit = len(uninterrupted) // 3
    outcome = finish(
        spawn(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)))
    )
    assert "out.jsonl cannot be written (File too large); what is in it is whole; make room" in outcome.error
    assert uninterrupted.startswith(out.read_bytes()) and out.read_bytes().endswith(b"\n")
    assert invoke(*command).code == 0
    assert out.read_bytes() == uninterrupted


def test_the_built_in_model_answers_the_examples(invoke: Invoke, builtin_model_dir: Path, tmp_path: Path):
    source = Path(__file__).parents[2] / "examples" / "questions.jsonl"
    assert invoke("caption", source, "-o", tmp_path / "out.jsonl", "--strict").code == 0
    answers = {row["id"]: row["answer"] for row in read(tmp_path / "out.jsonl")}
    assert answers["stop-word"] == "STOP"
    assert answers["sun-count"].startswith("3")
    assert len(answers) == 7 and all(answers.values())
