"""Starts the processes of a run on one machine, watches them, and stops all of them when one dies. Needs no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from visualglm.errors import DeviceError, VisualGLMError
from visualglm.signals import keep_signals_away

_LAUNCHER = "VISUALGLM_LAUNCHER"
_FAULT = "VISUALGLM_FAULT"
_POLL_SECONDS = 0.02
# So long the others may take to find the same fault; then they are asked to end, and then not asked any more.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class _Worker:
    """One process of a run; what it writes to stderr is in `errors`, except for the first one's.

    fault: a file of `faults_told_once`, which is written when something goes wrong.
    """

    rank: int
    process: subprocess.Popen[bytes]
    fault: Path
    errors: Path | None

    @property
    def sentence(self) -> str:
        """What it leaves to the launcher to tell; empty if nothing."""
        return self.fault.read_text("utf-8") if self.fault.is_file() else ""


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python ARGUMENTS…` in `count` processes that find each other, and wait until all have ended.

    Returns the exit code of the first process where that has told itself what went wrong. Raises a `VisualGLMError`:
    what the first process left to be told, or a `DeviceError` naming any other that failed, or one that was killed.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="visualglm-") as folder:
        workers: list[_Worker] = []
        try:
            for rank in range(count):
                workers.append(_start(arguments, rank, _environment(rank, count, port), Path(folder)))
            failed = _first_to_fail(workers)
        finally:
            _stop([worker.process for worker in workers])
        return _told(failed, workers) if failed else 0


@contextmanager
def faults_told_once() -> Iterator[None]:
    """Leaves it to the launcher, if there is one, to tell a `VisualGLMError`: all processes may find the same."""
    try:
        yield
    except Exception as error:
        path = os.environ.get(_FAULT)
        if path is None:
            raise
        # Also an empty file says when it happened.
        is_ours = isinstance(error, VisualGLMError)
        Path(path).write_text(str(error) if is_ours else "", "utf-8")
        if not is_ours:
            raise
        raise SystemExit(1) from error


def leave_fault(sentence: str) -> None:
    """Leave it to the launcher to tell why this process ends; without one it is told here."""
    path = os.environ.get(_FAULT)
    if path is None:
        sys.stderr.write(f"visualglm: error: {sentence}\n")
    else:
        Path(path).write_text(sentence, "utf-8")


def is_launched() -> bool:
    """Whether this is a process of `launch`, which is stopped with it and tells so itself."""
    return _LAUNCHER in os.environ


def die_with_launcher() -> None:
    """End this process soon after the one that launched it, if one did and it should be killed."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None:
        die_with(int(launcher))


def die_with(parent: int) -> None:
    """End this process, whatever it does, a second after its parent: also one that waits for a lock or a pipe."""
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def _watch(parent: int) -> None:
    keep_signals_away()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(rank: int, count: int, port: int) -> Mapping[str, str]:
    """What torchrun sets too; and each process gets its share of the cores."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        _LAUNCHER: os.getpid(),
    }
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return threads | os.environ | {name: str(value) for name, value in found.items()}


def _start(arguments: Sequence[str], rank: int, environment: Mapping[str, str], folder: Path) -> _Worker:
    """Only the first process writes to the terminal; what the others last said is kept."""
    command = [sys.executable, *arguments]
    fault = folder / f"{rank}.fault"
    environment = {**environment, _FAULT: str(fault)}
    if rank == 0:
        return _Worker(rank, subprocess.Popen(command, env=environment), fault, None)
    errors = folder / f"{rank}.txt"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    return _Worker(rank, process, fault, errors)


def _first_to_fail(workers: Sequence[_Worker]) -> _Worker | None:
    """Waits for the first failure, or until all have ended well.

    The death of one makes others fail soon after. Where several are found at once, the one that was killed is named;
    else the one in which something went wrong first, which need not be the first to have ended.
    """
    failed: list[_Worker] = []
    is_running = True
    while is_running and not failed:
        time.sleep(_POLL_SECONDS)
        is_running = any(worker.process.poll() is None for worker in workers)
        failed = _failed(workers)
    if not failed or failed[0].process.returncode < 0:
        return failed[0] if failed else None
    _wait([worker.process for worker in workers])
    return min([*failed, *(worker for worker in _failed(workers) if worker not in failed)], key=_when)


def _failed(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those that have failed, the killed ones first."""
    failed = [worker for worker in workers if worker.process.poll()]
    return sorted(failed, key=lambda worker: worker.process.returncode > 0)


def _when(worker: _Worker) -> float:
    return worker.fault.stat().st_mtime if worker.fault.is_file() else time.time()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    _wait(processes)
    for process in processes:
        process.kill()
        process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, but no longer than they have to do so."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_SECONDS)


def _told(failed: _Worker, workers: Sequence[_Worker]) -> int:
    """The exit code of the first process, if that has told itself what went wrong; else raises what is to be told."""
    code, sentence = failed.process.returncode, failed.sentence
    if sentence and sentence == workers[0].sentence:
        raise VisualGLMError(sentence)
    if code > 0 and failed.rank == 0:
        return int(code)
    raise DeviceError(
        f"Process {failed.rank} of {len(workers)} {_end_of(failed)}; the others were stopped, "
        "and --resume goes on from the last checkpoint, if there is one."
    )


def _end_of(worker: _Worker) -> str:
    code = worker.process.returncode
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    lines = worker.errors.read_text("utf-8", "replace").split("\n") if worker.errors else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"with exit code {code}")
    said = worker.sentence or last.removeprefix("visualglm: ").removeprefix("error: ")
    return f"failed: {said.rstrip('.')}"
