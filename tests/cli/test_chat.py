"""`visualglm chat`, through a terminal and through a pipe."""

import shutil
from pathlib import Path

import pytest

import visualglm
from tests.cli.program import Invoke, change_config, draw
from tests.cli.terminal import CTRL_C, CTRL_D, Terminal, on_terminal
from visualglm.cli.chat import HELP, command_in
from visualglm.model import VisualGLM

SHORT = ("--max-new-tokens", "6")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> VisualGLM:
    return visualglm.load(tiny_model_dir)


def conversation(model: VisualGLM, image: Path | None, *questions: str) -> list[str]:
    """The answers of the library, each question with all that was said before."""
    history: list[tuple[str, str]] = []
    for question in questions:
        history.append((question, model.ask(image, question, history=history, max_new_tokens=6)))
    return [answer for _, answer in history]


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (":image a b.png", (":image", "a b.png")),
        (":image", (":image", "")),
        (":quit", (":quit", "")),
        ("stop", (":quit", "")),
        ("clear", (":clear", "")),
        ("stop it", None),
        ("What is :image?", None),
        (":)", None),
        (":save it", (":save", "it")),
        ("/etc/passwd", None),
    ],
)
def test_commands_and_questions(line: str, command: tuple[str, str] | None):
    assert command_in(line) == command


def test_history_image_and_clear(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, picture: Path, tmp_path: Path):
    other = draw(tmp_path / "other picture.png", 9)
    outcome = invoke(
        *("chat", "-m", tiny_model_dir, "-i", picture, *SHORT),
        stdin=f"one\n\n  two \n:clear\nthree\n:image '{other}'\nfour\n:image\nfive\nstop\nsix\n",
    )
    assert outcome.code == 0
    assert outcome.out.split("\n") == [
        *conversation(model, picture, "one", "two"),
        *conversation(model, picture, "three"),
        *conversation(model, other, "four"),
        *conversation(model, None, "five"),
        "",
    ]
    assert outcome.err.splitlines()[1:] == [
        "What was said is forgotten.",
        f"Now about '{other}'; what was said before is forgotten.",
        "Now about no image; what was said before is forgotten.",
    ]


def test_errors_are_told_and_it_goes_on(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM, picture: Path):
    outcome = invoke(
        *("chat", "-m", tiny_model_dir, "-i", picture, *SHORT),
        stdin=f"one\n:image missing.png\n{'long ' * 300}\ntwo\n",
    )
    assert outcome.out.split("\n")[:-1] == conversation(model, picture, "one", "two"), "image and history are as before"
    errors = [line for line in outcome.err.splitlines() if line.startswith("visualglm: error: ")]
    assert "missing.png does not exist" in errors[0] and "shorten the question" in errors[1] and len(errors) == 2
    assert outcome.code == 1


def test_dropped_turns_are_told(invoke: Invoke, tiny_model_dir: Path, model: VisualGLM):
    long = "once upon a time " * 4
    outcome = invoke("chat", "-m", tiny_model_dir, "--max-new-tokens", 20, stdin=f"{long}\n" * 4)
    assert "(the model's window is full; oldest turns forgotten: 1)" in outcome.err
    assert outcome.code == 0 and len(outcome.out.splitlines()) >= 4


def test_unknown_commands_are_told(invoke: Invoke, tiny_model_dir: Path):
    outcome = invoke("chat", "-m", tiny_model_dir, stdin=":save it\n")
    assert (outcome.code, outcome.out) == (1, "")
    assert "There is no command :save; the commands are :image, :clear, :adapter, :help, :quit." in outcome.err


def test_bad_image_at_the_start(invoke: Invoke, tiny_model_dir: Path):
    assert "does not exist" in invoke("chat", "-m", tiny_model_dir, "-i", "missing.png").error


def test_terminal(tiny_model_dir: Path, model: VisualGLM, picture: Path):
    """Chinese is typed and shown, bad images are told, and Ctrl-D leaves."""
    with Terminal("chat", "-m", tiny_model_dir, "-i", picture, *SHORT) as terminal:
        terminal.expect("Type a question, or :help.\n> ")
        answers = conversation(model, picture, "描述这张图片。", "What?")
        for question, answer in zip(("描述这张图片。", "What?"), answers, strict=True):
            terminal.type(f"{question}\n")
            assert terminal.expect("\n> ") == f"{question}\n{on_terminal(answer)}"
        terminal.type(":image missing.png\n")
        assert "missing.png does not exist" in terminal.expect("\n> ")
        terminal.type(":help\n")
        assert terminal.expect("\n> ") == f":help\n{HELP}"
        terminal.type(CTRL_D)
        assert terminal.end() == (0, "\n")


def test_ctrl_c_stops_the_answer_and_then_leaves(tiny_model_dir: Path, tmp_path: Path):
    """The answer would take minutes: the model never ends one by itself."""
    patient = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    change_config(patient, "text", max_sequence_length=200_000)
    with Terminal("chat", "-m", patient, "--max-new-tokens", 100_000) as terminal:
        terminal.expect("\n> ")
        terminal.type("What?\n")
        terminal.expect("What?\n")
        terminal.expect(" ")
        terminal.type(CTRL_C)
        terminal.expect("\n(stopped)\n> ")
        press_ctrl_c_at_the_prompt(terminal)
        terminal.type(":clear\n")
        terminal.expect("\n> ")
        assert leave_with_ctrl_c(terminal) == 0


def leave_with_ctrl_c(terminal: Terminal) -> int:
    """The exit code."""
    press_ctrl_c_at_the_prompt(terminal)
    terminal.type(CTRL_C)
    if not terminal.ends(5):
        terminal.type(CTRL_C)
    return terminal.end()[0]


def press_ctrl_c_at_the_prompt(terminal: Terminal) -> None:
    """Between showing the prompt and waiting for a key, readline does not notice a signal before the next one."""
    terminal.type(CTRL_C)
    if not terminal.shows("\n(once more to leave)\n> ", 5):
        terminal.type(CTRL_C)
        terminal.expect("\n(once more to leave)\n> ")


def test_terminal_with_answers_into_a_file(tiny_model_dir: Path, model: VisualGLM, tmp_path: Path):
    """The prompt goes where the notes go: the file has answers alone."""
    out = tmp_path / "answers.txt"
    with Terminal("chat", "-q", "-m", tiny_model_dir, *SHORT, stdout=out) as terminal:
        terminal.expect("> ")
        terminal.type("What?\nquit\n")
        assert terminal.end()[0] == 0
    assert out.read_text("utf-8").split("\n")[:-1] == conversation(model, None, "What?")
