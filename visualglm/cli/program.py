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

from visualglm.cli.main import EXIT_INTERRUPTED, EXIT_TERMINATED, STOPPED
from visualglm.cli.output import discard, print_error, print_note
from visualglm.errors import DISK_FULL, VisualGLMError
from visualglm.signals import ENDING

EXIT_ERROR, EXIT_FAULT = 1, 70
DEBUG_VARIABLE = "VISUALGLM_DEBUG"
_SOON = 0.01


def end_in_order_on_sigterm() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, with nothing half-written; where ignored, it stays so."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)
    if hasattr(signal, "setitimer"):
        sys.unraisablehook = _come_again


def end_whatever_comes() -> None:
    """From now on Ctrl-C and SIGTERM change nothing: all is done or given up, and the interpreter is about to end."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


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
        return _stopped(end.code) if end.code in STOPPED else end.code
    finally:
        # Not left to the interpreter's end, where an error could no longer be told properly.
        sys.stdout.flush()
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    # It often comes twice, to a process and to its group: the second must not end the clearing up.
    if not _is_leaving(sys.exception()):
        raise SystemExit(EXIT_TERMINATED)


def _is_leaving(handled: BaseException | None) -> bool:
    """Whether what is being handled, or what was when that came up, is the end of the program."""
    return handled is not None and (isinstance(handled, SystemExit) or _is_leaving(handled.__context__))


def _come_again(dropped: sys.UnraisableHookArgs) -> None:
    """A signal whose exception Python had to drop, as in the midst of an import, is as good as not yet come."""
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(dropped.exc_type)
    if number is None:
        sys.__unraisablehook__(dropped)
        return
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, _SOON)


def _stopped(code: int) -> int:
    from visualglm.training.launch import is_launched

    if not is_launched():
        print_note(f"visualglm: {STOPPED[code]}")
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
