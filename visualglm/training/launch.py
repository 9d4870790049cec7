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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visualglm.errors import DeviceError

_LAUNCHER = "VISUALGLM_LAUNCHER"
_POLL_SECONDS = 0.02
# A process is asked to end, and after so long it is not asked any more.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class _Worker:
    """One process of a run; what it writes to stderr is in `errors`, except for the first one's."""

    rank: int
    process: subprocess.Popen[bytes]
    errors: Path | None


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `python ARGUMENTS…` in `count` processes that find each other, and wait until all have ended.

    Returns the exit code of the first process, which has told itself what went wrong. Raises `DeviceError` naming any
    other that failed, or one that was killed; the others are stopped first.
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
        if failed is None:
            return 0
        code = failed.process.returncode
        if code > 0 and failed.rank == 0:
            return code
        raise DeviceError(
            f"Process {failed.rank} of {count} {_end_of(failed)}; the others were stopped, "
            "and --resume goes on from the last checkpoint, if there is one."
        )


def die_with_launcher() -> None:
    """End this process soon after the one that launched it, if one did and it should be killed."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None:
        die_with(int(launcher))


def die_with(parent: int) -> None:
    """End this process, whatever it does, a second after its parent: also one that waits for a lock or a pipe."""
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="parent-watch").start()


def _watch(parent: int) -> None:
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
    if rank == 0:
        return _Worker(rank, subprocess.Popen(command, env=environment), None)
    errors = folder / f"{rank}.txt"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    return _Worker(rank, process, errors)


def _first_to_fail(workers: Sequence[_Worker]) -> _Worker | None:
    """Waits for the first failure, or until all have ended well.

    The death of one makes others fail soon after: where several are found at once, the one that was killed is named.
    """
    running = list(workers)
    while running:
        ended = [worker for worker in running if worker.process.poll() is not None]
        failed = [worker for worker in ended if worker.process.returncode]
        if failed:
            return min(failed, key=lambda worker: (worker.process.returncode > 0, worker.rank))
        running = [worker for worker in running if worker not in ended]
        time.sleep(_POLL_SECONDS)
    return None


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_of(worker: _Worker) -> str:
    code = worker.process.returncode
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    lines = worker.errors.read_text("utf-8", "replace").split("\n") if worker.errors else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), f"with exit code {code}")
    return f"failed: {said.removeprefix('visualglm: ').removeprefix('error: ').rstrip('.')}"
