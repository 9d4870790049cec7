"""Runs a command, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import FrameType

from visualglm.cli.main import EXIT_INTERRUPTED
from visualglm.cli.output import discard, print_error, print_note
from visualglm.errors import DISK_FULL, VisualGLMError

EXIT_ERROR, EXIT_FAULT, EXIT_TERMINATED = 1, 70, 143
_STOPPED = {EXIT_INTERRUPTED: "interrupted", EXIT_TERMINATED: "terminated"}
DEBUG_VARIABLE = "VISUALGLM_DEBUG"


def end_in_order_on_sigterm() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, with nothing half-written; where ignored, it stays so."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def run(arguments: Sequence[str]) -> int | str | None:
    """Run the command that `arguments` name; returns the exit code."""
    if not (sys.warnoptions or os.environ.get(DEBUG_VARIABLE)):
        # Those of libraries: nothing a user could act on.
        warnings.simplefilter("ignore")
    # Of pydantic. There are none that this program would want, and looking for them takes a while.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if not _has_output():
        print_error("There is no stdout for results; run the command without closing it.")
        return EXIT_ERROR
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An old terminal may not have the characters of an answer: better spelled out than a crash.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run_command(arguments)
    except KeyboardInterrupt:
        return _stopped(EXIT_INTERRUPTED)
    except BrokenPipeError:
        discard(sys.stdout)
        return EXIT_ERROR
    except (VisualGLMError, OSError) as error:
        if isinstance(error, OSError):
            discard(sys.stdout)
        return _fail(_sentence(error), EXIT_ERROR)
    except MemoryError:
        return _fail("The memory does not suffice; close other programs, or use a smaller batch or model.", EXIT_ERROR)
    except Exception as error:
        remedy = f"set {DEBUG_VARIABLE}=1 to see where, and report it"
        return _fail(f"This is a fault in the program ({type(error).__name__}: {error}); {remedy}.", EXIT_FAULT)


def _has_output() -> bool:
    """Whether stdout is open; a stream that is closed must not become that of the next file to be opened."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return sys.stdout is not None


def _run_command(arguments: Sequence[str]) -> int | str | None:
    try:
        # Typer takes a while to import: not before Ctrl-C is looked after.
        from visualglm.cli.table import command_table

        command_table().main(list(arguments), prog_name="visualglm")
    except SystemExit as end:
        return _stopped(end.code) if end.code in _STOPPED else end.code
    finally:
        # Not left to the interpreter's end, where an error could no longer be told properly.
        sys.stdout.flush()
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    # It often comes twice, to a process and to its group: the second must not end the clearing up.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(EXIT_TERMINATED)


def _stopped(code: int) -> int:
    print_note(f"visualglm: {_STOPPED[code]}")
    return code


def _sentence(error: VisualGLMError | OSError) -> str:
    if isinstance(error, VisualGLMError):
        return str(error)
    if error.errno in DISK_FULL:
        what = error.filename or "the output"
        return f"The disk is full, {what} could not be written; make room and try again."
    return f"{error.filename or 'The output'} cannot be read or written ({error.strerror or error})."


def _fail(sentence: str, exit_code: int) -> int:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    print_error(sentence)
    return exit_code
