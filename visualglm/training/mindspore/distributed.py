"""The processes of a run: one alone, or several that meet through MindSpore's own cluster.

They are those of `--nproc`, or of torchrun, which say where they meet and no more; those of msrun; or those of a rank
table on Ascend devices, which nobody here could try.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from secrets import token_bytes
from socket import gethostbyname, gethostname
from typing import TypeVar, cast

import numpy as np
from mindspore import Tensor, communication, ops

from visualglm.backends.mindspore.load import CPU
from visualglm.errors import DeviceError, VisualGLMError
from visualglm.signals import held_signals
from visualglm.training.launch import die_with_launcher
from visualglm.training.mindspore.scheduler import Scheduler

T = TypeVar("T")

# By what others than this package tell a process where it belongs.
_MSRUN, _RANK_TABLE, _MSRUN_COUNT = "MS_ROLE", "RANK_TABLE_FILE", "MS_WORKER_NUM"
# How the exchange begins to complain when another process is gone.
_LOST = ("timed out", "Timed out", "Connection", "AllReduce", "collective", "HCCL")
_LONGEST_MESSAGE = 512
# What MindSpore is to wait for processes that do not come, in seconds; as long as under msrun.
_LONGEST_WAIT = "600"


@dataclass(frozen=True)
class Processes:
    """This process among those of its run, on its device.

    links: in the first process the connections to all others by rank, in the others the one to the first. MindSpore's
    own exchange gives up on a CPU when a process comes half a minute late, which may be encoding pictures; these wait,
    and notice at once who is gone.
    scheduler: by which they met, where this process started it.
    """

    rank: int
    world_size: int
    device_name: str
    links: tuple[Connection, ...] = ()
    scheduler: Scheduler | None = None

    def wait(self) -> None:
        """Until all processes are here."""
        self._exchange(None)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each of `values` over all processes, alike in all of them."""
        return [sum(parts) for parts in zip(*self._exchange([float(value) for value in values]), strict=True)]

    def add_up(self, gradients: Tensor) -> Tensor:
        """The sum of `gradients`, float32 of any shape, over all processes."""
        if self.world_size == 1:
            return gradients
        gradients.asnumpy()  # what is not computed yet must not be waited for there
        self.wait()
        with lost_process_named(self):
            return ops.AllReduce()(gradients)

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, or the `VisualGLMError` it raises there, in all of them."""
        outcome: T | VisualGLMError | None = None
        if self.rank == 0:
            try:
                outcome = work()
            except VisualGLMError as error:
                outcome = error
        outcome = cast("T | VisualGLMError", self._exchange(outcome)[0])
        if isinstance(outcome, VisualGLMError):
            raise outcome
        return outcome

    def leave(self) -> None:
        """The end of what these processes do together."""
        self.wait()
        for link in self.links:
            link.close()
        if self.scheduler:
            self.scheduler.leave()
        if self.world_size > 1:
            communication.release()

    def _exchange(self, own: T) -> list[T]:
        """What each process brings, by rank, in all of them."""
        with lost_process_named(self):
            if self.rank:
                self.links[0].send(own)
                return cast("list[T]", self.links[0].recv())
            brought = [own, *(link.recv() for link in self.links)]
            for link in self.links:
                link.send(brought)
            return brought


def join_processes(device_name: str) -> Processes:
    """Meet the other processes, if the environment names any. Raises `DeviceError` if they cannot be met.

    The device must have been chosen before.
    """
    die_with_launcher()
    scheduler = None
    if "WORLD_SIZE" in os.environ and not _is_set(_MSRUN) and not _is_set(_RANK_TABLE):
        scheduler = _meet_like_torchrun()
    if not _is_set(_MSRUN) and not _is_set(_RANK_TABLE):
        _require_alone()
        return Processes(0, 1, device_name)
    if not _is_set(_MSRUN) and device_name == CPU:
        raise DeviceError(
            f"A rank table ({_RANK_TABLE}) is one of Ascend devices, and this process computes on the CPU; "
            "unset it, or give --device ascend."
        )
    atexit.register(_end_quietly)
    try:
        # It answers Ctrl-C itself from here on, with lines of its own.
        with held_signals():
            communication.init()
        rank, world_size = communication.get_rank(), communication.get_group_size()
        return Processes(rank, world_size, device_name, _linked(rank, world_size), scheduler)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].strip().rstrip(".")
        raise DeviceError(
            f"The processes of the run did not find each other ({reason}); start all of them, with the same "
            "MS_SCHED_HOST and MS_SCHED_PORT, or the same rank table."
        ) from error


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name))


def _require_alone() -> None:
    count = os.environ.get(_MSRUN_COUNT, "")
    if count not in ("", "1"):
        raise DeviceError(
            f"{_MSRUN_COUNT} is {count} and {_MSRUN} is not set, so that this process does not know its place in the "
            f"run; start it with msrun, or unset {_MSRUN_COUNT}."
        )


def local_rank() -> int:
    """Which of the processes on this machine this is: it takes the device of that number."""
    names = ("DEVICE_ID", "LOCAL_RANK", "MS_NODE_ID")
    return int(next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), "0"))


@contextmanager
def lost_process_named(processes: Processes) -> Iterator[None]:
    """Turns the error of an exchange whose other side is gone into a `DeviceError`."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        if processes.world_size == 1 or not (any(word in str(error) for word in _LOST) or _is_cut(error)):
            raise
        raise DeviceError(
            f"Another of the {processes.world_size} processes of the run is gone, and process {processes.rank} cannot "
            "go on without it; --resume goes on from the last checkpoint."
        ) from error


def _is_cut(error: Exception) -> bool:
    return isinstance(error, EOFError | ConnectionError)


def _linked(rank: int, world_size: int) -> tuple[Connection, ...]:
    """See `Processes.links`. Where the first process listens, and the key it asks for, all are told by MindSpore."""
    if rank:
        told, port, hexadecimal = _told(b"").split(" ")
        link = Client((told, int(port)), authkey=bytes.fromhex(hexadecimal))
        link.send(rank)
        return (link,)
    host, key = os.environ.get("MS_SCHED_HOST") or gethostbyname(gethostname()), token_bytes(16)
    with Listener((host, 0), backlog=world_size, authkey=key) as listener:
        _told(f"{host} {listener.address[1]} {key.hex()}".encode())
        found = [listener.accept() for _ in range(1, world_size)]
    by_rank = {link.recv(): link for link in found}
    return tuple(by_rank[other] for other in range(1, world_size))


def _told(message: bytes) -> str:
    """The message of the first process, as numbers: float32 is what every device can exchange."""
    numbers = np.zeros(_LONGEST_MESSAGE, np.float32)
    numbers[: len(message)] = np.frombuffer(message, np.uint8)
    (found,) = ops.Broadcast(0)((Tensor(numbers),))
    told: bytes = found.asnumpy().astype(np.uint8).tobytes()
    return told.rstrip(b"\0").decode()


def _end_quietly() -> None:
    """What the threads of the exchange write to stderr when the process has ended is of no use to anybody."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _meet_like_torchrun() -> Scheduler | None:
    """Tell MindSpore what torchrun's variables say.

    Its cluster wants one more process, by which all others meet: the first starts it, and gets it.
    """
    count, rank = os.environ["WORLD_SIZE"], os.environ["RANK"]
    if count == "1":
        return None
    place = {"MS_SCHED_HOST": os.environ["MASTER_ADDR"], "MS_SCHED_PORT": os.environ["MASTER_PORT"]}
    os.environ.setdefault("MS_TOPO_TIMEOUT", _LONGEST_WAIT)
    os.environ.update(place, MS_WORKER_NUM=count, MS_NODE_ID=rank, MS_ROLE="MS_WORKER")
    return Scheduler({**os.environ, "MS_ROLE": "MS_SCHED"}) if rank == "0" else None
