"""The processes of a run: one alone, or several that meet through MindSpore's own cluster.

They are those of `--nproc`, or of torchrun, which say where they meet and no more; those of msrun; or those of a rank
table on Ascend devices, which nobody here could try.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from mindspore import Tensor, communication, ops
from numpy.typing import NDArray

from visualglm.backends.mindspore.load import CPU
from visualglm.errors import DeviceError, VisualGLMError
from visualglm.training.launch import die_with_launcher

T = TypeVar("T")

# By what others than this package tell a process where it belongs.
_MSRUN, _RANK_TABLE = "MS_ROLE", "RANK_TABLE_FILE"
# How the exchange begins to complain when another process is gone.
_LOST = ("timed out", "Timed out", "Connection", "AllReduce", "AllGather", "Broadcast", "collective", "HCCL")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run, on its device."""

    rank: int
    world_size: int
    device_name: str

    def wait(self) -> None:
        """Until all processes are here."""
        self.sums([0.0])

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each of `values` over all processes, alike in all of them."""
        exact = np.array(values, np.float64)
        if self.world_size == 1:
            return [float(value) for value in exact]
        # What every device can exchange is float32: two of them hold what one of float64 does, all but its last bits.
        high = exact.astype(np.float32)
        halves = np.stack([high, (exact - high).astype(np.float32)])
        with lost_process_named(self):
            found = ops.AllGather()(Tensor(halves[None])).asnumpy()
        return [float(total) for total in found.astype(np.float64).sum((0, 1))]

    def add_up(self, gradients: Tensor) -> Tensor:
        """The sum of `gradients`, float32 of any shape, over all processes."""
        if self.world_size == 1:
            return gradients
        with lost_process_named(self):
            return ops.AllReduce()(gradients)

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, or the `VisualGLMError` it raises there, in all of them."""
        if self.world_size == 1:
            return work()
        outcome: T | VisualGLMError | None = None
        if self.rank == 0:
            try:
                outcome = work()
            except VisualGLMError as error:
                outcome = error
        outcome = cast("T | VisualGLMError", pickle.loads(self._from_first(pickle.dumps(outcome))))
        if isinstance(outcome, VisualGLMError):
            raise outcome
        return outcome

    def leave(self) -> None:
        """The end of what these processes do together."""
        if self.world_size > 1:
            self.wait()
            communication.release()

    def _from_first(self, data: bytes) -> bytes:
        """The `data` of the first process: bytes as numbers, which is all that is exchanged everywhere."""
        (size,) = self.sums([len(data) if self.rank == 0 else 0])
        numbers = np.zeros(int(size), np.float32)
        if self.rank == 0:
            numbers[:] = np.frombuffer(data, np.uint8)
        with lost_process_named(self):
            (found,) = ops.Broadcast(0)((Tensor(numbers),))
        values: NDArray[np.uint8] = found.asnumpy().astype(np.uint8)
        return values.tobytes()


def join_processes(device_name: str) -> Processes:
    """Meet the other processes, if the environment names any. Raises `DeviceError` if they cannot be met.

    The device must have been chosen before.
    """
    die_with_launcher()
    if "WORLD_SIZE" in os.environ and _MSRUN not in os.environ and _RANK_TABLE not in os.environ:
        _meet_like_torchrun()
    if _MSRUN not in os.environ and _RANK_TABLE not in os.environ:
        return Processes(0, 1, device_name)
    if _MSRUN not in os.environ and device_name == CPU:
        raise DeviceError(
            f"A rank table ({_RANK_TABLE}) is one of Ascend devices, and this process computes on the CPU; "
            "unset it, or give --device ascend."
        )
    atexit.register(_end_quietly)
    try:
        communication.init()
        return Processes(communication.get_rank(), communication.get_group_size(), device_name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise DeviceError(
            f"The processes of the run did not find each other ({reason}); start all of them, with the same "
            "MS_SCHED_HOST and MS_SCHED_PORT, or the same rank table."
        ) from error


def local_rank() -> int:
    """Which of the processes on this machine this is: it takes the device of that number."""
    names = ("DEVICE_ID", "LOCAL_RANK", "MS_NODE_ID")
    return int(next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), "0"))


@contextmanager
def lost_process_named(processes: Processes) -> Iterator[None]:
    """Turns the error of an exchange whose other side is gone into a `DeviceError`."""
    try:
        yield
    except RuntimeError as error:
        if processes.world_size == 1 or not any(word in str(error) for word in _LOST):
            raise
        raise DeviceError(
            f"Another of the {processes.world_size} processes of the run is gone, and process {processes.rank} cannot "
            "go on without it; --resume goes on from the last checkpoint."
        ) from error


def _end_quietly() -> None:
    """What the threads of the exchange write to stderr when the process has ended is of no use to anybody."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _meet_like_torchrun() -> None:
    """Tell MindSpore what torchrun's variables say. Its cluster wants one more process, by which all others meet."""
    count, rank = os.environ["WORLD_SIZE"], os.environ["RANK"]
    if count == "1":
        return
    place = {"MS_SCHED_HOST": os.environ["MASTER_ADDR"], "MS_SCHED_PORT": os.environ["MASTER_PORT"]}
    os.environ.update(place, MS_WORKER_NUM=count, MS_NODE_ID=rank, MS_ROLE="MS_WORKER")
    if rank == "0":
        environment = {**os.environ, "MS_ROLE": "MS_SCHED"}
        command = [sys.executable, "-m", "visualglm.training.mindspore.scheduler"]
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
