"""The commands on MindSpore, in fresh processes: answers on stdout, notes on stderr, and no word of MindSpore's."""

import json
from pathlib import Path

import pytest

import visualglm
from tests.adapters import write_random_adapter
from tests.cli.program import Outcome, finish, spawn
from visualglm.loading import BUILTIN_NOTICE, builtin_path, choose

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
QUESTION = "图里有什么？"


def run(*arguments: object) -> Outcome:
    return finish(spawn(*arguments))


@pytest.fixture(scope="module")
def expected() -> str:
    return visualglm.load(backend="torch", device="cpu").ask(EXAMPLES / "stop.png", QUESTION)


@pytest.mark.parametrize("graph_mode", [None, 0, 1])
def test_ask(graph_mode, expected):
    chosen = () if graph_mode is None else ("--graph-mode", graph_mode)
    outcome = run("ask", "--backend", "mindspore", *chosen, "--image", EXAMPLES / "stop.png", QUESTION)
    assert (outcome.code, outcome.out) == (0, f"{expected}\n"), outcome.err
    notice, loaded, speed = outcome.err.splitlines()
    mode = "eager" if graph_mode else "graph"
    assert notice == BUILTIN_NOTICE and f"mindspore on cpu, float32, {mode}" in loaded and "tokens/s" in speed


def test_quiet_is_quiet(expected):
    outcome = run("ask", "-q", "--backend", "mindspore", "--graph-mode", 1, "-i", EXAMPLES / "stop.png", QUESTION)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{expected}\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--device", "ascend", "--device-id", 1),
            "The device 'ascend:1' cannot be used by the installed MindSpore 2.10",
        ),
        (("--device", "cpu", "--dtype", "bfloat16"), "MindSpore has no bfloat16 on a CPU; give float32"),
        (("--dtype", "int4"), "The mindspore backend has no int4; give --backend onnx, or another precision."),
        (("--device-id", 1), "The device 'auto:1' is not there: MindSpore sees no Ascend card"),
        (("--device", "Ascend:1"), "The device 'ascend:1' cannot be used by the installed MindSpore 2.10"),
    ],
)
def test_what_is_not_to_be_had(options, message):
    assert message in run("ask", "-q", "--backend", "mindspore", *options, QUESTION).error


def test_it_is_taken_where_nothing_else_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VISUALGLM_CACHE", str(tmp_path))
    monkeypatch.setattr("visualglm.loading.find_spec", lambda name: name if name == "mindspore" else None)
    assert choose(builtin_path(), backend="auto", device="auto", dtype="auto").backend == "mindspore"
    assert choose(None, backend="auto", device="auto", dtype="auto").backend == "onnx"
    assert choose(None, backend="auto", device="ascend:1", dtype="auto").backend == "mindspore"


def test_an_adapter_is_merged(tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", builtin_path())
    outcome = run(
        *("ask", "-q", "--backend", "mindspore", "--graph-mode", 1, "--adapter", adapter.path),
        *("-i", EXAMPLES / "stop.png", QUESTION),
    )
    model = visualglm.load(backend="torch", device="cpu", adapter=adapter.path)
    assert outcome.out == f"{model.ask(EXAMPLES / 'stop.png', QUESTION)}\n"


def test_prefixes_are_for_torch(tmp_path: Path):
    adapter = write_random_adapter(tmp_path / "adapter", builtin_path(), prefix_length=3)
    outcome = run("ask", "-q", "--backend", "mindspore", "--adapter", adapter.path, QUESTION)
    assert "The mindspore backend cannot run the adapter" in outcome.error
    assert "learned prefixes (P-tuning); give --backend torch." in outcome.error


def test_chat_caption_and_evaluate(tmp_path: Path, expected: str):
    chosen = ("-q", "--backend", "mindspore", "--graph-mode", 0)
    with spawn("chat", *chosen, "--image", EXAMPLES / "stop.png") as process:
        assert expected in finish(process, f"{QUESTION}\n").out
    rows = tmp_path / "rows.jsonl"
    row = {"image": str(EXAMPLES / "stop.png"), "prompt": QUESTION, "label": expected}
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    assert run("caption", *chosen, rows, "--output", tmp_path / "captions.jsonl").code == 0
    assert json.loads((tmp_path / "captions.jsonl").read_text("utf-8").splitlines()[0])["answer"] == expected
    outcome = run("evaluate", *chosen, rows)
    assert outcome.code == 0 and "100" in outcome.out, outcome
