"""`visualglm export`, and every command on what it makes."""

import json
from pathlib import Path

import pytest

from tests.cli.program import Invoke
from visualglm.export_cache import CACHE_VARIABLE

SHORT = ("--max-new-tokens", "6")


def test_an_export_is_made_checked_and_asked(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, picture: Path):
    made = invoke("export", tiny_model_dir, tmp_path / "lite", "--precision", "int4")
    assert made.code == 0 and "int4 in blocks of 32, KV cache int8" in made.out
    assert f"visualglm ask --model {tmp_path / 'lite'}" in made.err
    assert invoke("check", tmp_path / "lite").code == 0
    asked = invoke("ask", "-m", tmp_path / "lite", "-i", picture, *SHORT, "What is it?")
    assert asked.code == 0 and "onnx on cpu, int4" in asked.err
    again = invoke("ask", "-q", "-m", tiny_model_dir, "--dtype", "int4", "-i", picture, *SHORT, "What is it?")
    assert again.out == asked.out


@pytest.mark.parametrize("options", [(), ("--no-use-past",)])
def test_full_and_incremental_graphs_answer_alike(
    invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, picture: Path, options: tuple[str, ...]
):
    invoke("export", tiny_model_dir, tmp_path / "lite", "--precision", "fp32", *options)
    asked = invoke("ask", "-q", "-m", tmp_path / "lite", "-i", picture, *SHORT, "What is it?")
    torch = invoke("ask", "-q", "-m", tiny_model_dir, "--backend", "torch", "-i", picture, *SHORT, "What is it?")
    assert asked.out == torch.out


def test_captions_of_an_export(invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, picture: Path):
    invoke("export", "-q", tiny_model_dir, tmp_path / "lite", "--precision", "fp32")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"image": str(picture), "prompt": f"What {n}?"}) + "\n" for n in range(5)))
    answers = {}
    for name, options in (("lite", ("-m", tmp_path / "lite")), ("torch", ("-m", tiny_model_dir, "--backend", "torch"))):
        output = tmp_path / f"{name}.jsonl"
        assert invoke("caption", rows, "-o", output, "-q", *SHORT, *options).code == 0
        answers[name] = [json.loads(line)["answer"] for line in output.read_text("utf-8").splitlines()]
    assert answers["lite"] == answers["torch"] and len(answers["lite"]) == 5


def test_an_export_on_first_use_is_told_once(
    invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    first, second = (invoke("ask", "-m", tiny_model_dir, "--dtype", "int8", *SHORT, "What?") for _ in range(2))
    assert f"it is made once, as {tmp_path / 'cache'}" in first.err
    assert "it is made once" not in second.err and first.out == second.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "OUT"], "nowhere does not exist"),
        (["MODEL", "MODEL"], "is not empty; give another folder, or --force to replace it."),
        (["MODEL", "MODEL", "--force"], "is not replaced"),
        (["MODEL", "missing/OUT"], "does not exist; create the folder"),
        (["MODEL", "OUT", "--precision", "fp32", "--block-size", "64"], "Blocks of 64 are for int4 and int8"),
        (["MODEL", "OUT", "--block-size", "7"], "cannot be run; give 16, 32, 64, 128, 256, 512."),
        (["MODEL", "OUT", "--int8-layers", "qkv,lm_head"], "an exception from int4, but the precision is int8"),
        (["MODEL", "OUT", "--precision", "int4", "--int8-layers", "all"], "There are no layers named 'all'"),
        (["MODEL", "OUT", "--method", "gptq"], "is not the built-in model, for which scenes are drawn"),
        (["MODEL", "OUT", "--evaluate", "9"], "gptq and judging need rows; give --calibration FILE"),
        (["MODEL", "OUT", "--method", "gptq", "--calibration", "no.jsonl"], "no.jsonl does not exist"),
        (
            ["MODEL", "OUT", "--calibration", "no.jsonl", "--evaluate", "0"],
            "is done with the rows of no.jsonl: only gptq",
        ),
        (["MODEL", "OUT", "--seq-length", "64"], "--seq-length is for --format mindir, and the format is onnx; leave"),
        (
            ["MODEL", "OUT", "--batch-size", "2"],
            "--batch-size is for --format mindir, and the format is onnx; leave it",
        ),
        (["MODEL", "OUT", "--format", "mindir", "--method", "rtn"], "--method is for --format onnx, and the format is"),
        (["MODEL", "OUT", "--format", "mindir", "--evaluate", "0"], "--evaluate is for --format onnx, and the format"),
        (
            ["MODEL", "OUT", "--format", "mindir", "--precision", "int8"],
            "MindIR exports have no int8; give --precision",
        ),
        (
            ["MODEL", "OUT", "--format", "mindir"],
            "An export as MindIR needs MindSpore 2.10, which is not installed; run",
        ),
    ],
)
def test_what_cannot_be_exported(
    invoke: Invoke,
    tiny_model_dir: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tiny_model_dir.iterdir())
    outcome = invoke("export", *(str(tiny_model_dir) if part == "MODEL" else part for part in arguments))
    assert outcome.code == 1 and said in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and sorted(tiny_model_dir.iterdir()) == before


def test_gptq_calibrates_on_rows_and_tells_what_it_found(
    invoke: Invoke, tiny_model_dir: Path, tmp_path: Path, picture: Path
):
    rows = tmp_path / "rows.jsonl"
    lines = [{"img": picture.name, "prompt": f"What is {n}?", "label": f"{n} cats"} for n in range(7)]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options = ("--precision", "int4", "--method", "gptq", "--calibration", rows, "--int8-layers", "qkv,lm_head")
    made = invoke("export", tiny_model_dir, tmp_path / "lite", *options)
    assert made.code == 0 and "int4 (qkv, lm_head int8) in blocks of 32" in made.out
    assert "1 rows of rows.jsonl" in made.out and "perplexity" in made.out and "exact" not in made.out
    assert invoke("ask", "-m", tmp_path / "lite", "-i", picture, *SHORT, "What is it?").code == 0
    picture.unlink()
    failed = invoke("export", tiny_model_dir, tmp_path / "again", *options)
    assert failed.code == 1 and "rows.jsonl has 7 bad rows of 7" in failed.err and "does not exist" in failed.err
    assert not (tmp_path / "again").exists()


def test_the_builtin_model_is_judged_by_scenes(invoke: Invoke, builtin_model_dir: Path, tmp_path: Path):
    options = ("--precision", "int4", "--method", "gptq", "--evaluate", "2")
    made = invoke("export", builtin_model_dir, tmp_path / "lite", *options)
    assert made.code == 0 and "2 drawn scenes" in made.out and "of 15 exact" in made.out
