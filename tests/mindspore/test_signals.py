"""Ctrl-C and SIGTERM, whatever MindSpore is doing: one line, the exit code of the guide, and nothing half-written."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cli.program import change_config, finish, spawn
from tests.cli.terminal import CTRL_C, Terminal
from tests.cli.test_chat import leave_with_ctrl_c

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
ASK = ("ask", "--backend", "mindspore", "-i", EXAMPLES / "stop.png", "What does the sign say?")
EXPORT = ("export", "MODEL", "OUT", "--format", "mindir")
FINETUNE = ("finetune", "--backend", "mindspore", "--train", EXAMPLES / "labelled.jsonl", "--output", "OUT")
WORDS = {signal.SIGINT: (130, "visualglm: interrupted"), signal.SIGTERM: (143, "visualglm: terminated")}


@pytest.mark.parametrize(
    ("command", "seconds", "how"),
    [
        pytest.param(ASK, 1.5, signal.SIGINT, id="import-SIGINT"),
        pytest.param(ASK, 1.5, signal.SIGTERM, id="import-SIGTERM"),
        pytest.param(ASK, 4.0, signal.SIGINT, id="compile-SIGINT"),
        pytest.param(ASK, 4.0, signal.SIGTERM, id="compile-SIGTERM"),
        pytest.param((*ASK, "--graph-mode", 1), 2.5, signal.SIGINT, id="eager"),
        pytest.param(EXPORT, 5.0, signal.SIGTERM, id="export"),
        pytest.param((*FINETUNE, "--steps", 5), 9.0, signal.SIGINT, id="finetune"),
    ],
)
def test_one_line_and_nothing_else(
    command: tuple[object, ...], seconds: float, how: signal.Signals, tiny_model_dir: Path, tmp_path: Path
):
    output, here = tmp_path / "out", tmp_path / "here"
    here.mkdir()
    named = {"MODEL": tiny_model_dir, "OUT": output}
    process = spawn(*(named.get(str(word), word) for word in command), cwd=here, start_new_session=True)
    time.sleep(seconds)
    process.send_signal(how)
    outcome = finish(process)
    assert not list(here.iterdir())
    assert "[ERROR]" not in outcome.err and "Traceback" not in outcome.err and "Exception" not in outcome.err
    if outcome.code == 0:
        return  # on a fast machine the work was done
    assert (outcome.code, outcome.err.splitlines()[-1]) == WORDS[how] and outcome.err.count("visualglm: ") == 1, outcome
    assert command[0] != "export" or list(tmp_path.iterdir()) == [here]


@pytest.mark.parametrize("graph_mode", [0, 1])
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(graph_mode: int, tiny_model_dir: Path, tmp_path: Path):
    """More than once: MindSpore puts up a handler of its own with every graph that it runs."""
    patient = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    change_config(patient, "text", max_sequence_length=8_192)
    chosen = ("--backend", "mindspore", "--graph-mode", graph_mode, "--max-new-tokens", 8_000)
    with Terminal("chat", "-m", patient, *chosen) as terminal:
        terminal.expect("\n> ")
        for _ in range(2):
            terminal.type("What?\n")
            terminal.expect("What?\n")
            terminal.expect(" ")
            terminal.type(CTRL_C)
            terminal.expect("\n(stopped)\n> ")
        assert leave_with_ctrl_c(terminal) == 0
