"""Workers that are processes: they draw nothing, and end with the process they read for."""

import multiprocessing
import os
import signal
import time
from itertools import count
from multiprocessing.connection import Connection

import psutil
import pytest
import torch

from visualglm.errors import DataError
from visualglm.training.torch.read_ahead import read_by_processes


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_all_come_in_order_and_no_random_number_is_drawn(workers: int) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert list(read_by_processes(_double, iter(range(20)), workers)) == list(range(0, 40, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_worker_that_dies_is_told() -> None:
    with pytest.raises(DataError, match=r"^A process that reads rows has died .* set data\.workers lower"):
        list(read_by_processes(_die_at_seven, range(20), 1))


def test_workers_end_with_the_process_they_read_for() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_read_for_ever, args=(sender,))
    reader.start()
    workers = receiver.recv()
    reader.kill()
    reader.join()
    deadline = time.monotonic() + 10
    while any(_is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(workers) == 2


def _double(number: int) -> int:
    return 2 * number


def _die_at_seven(number: int) -> int:
    """As a system without memory ends a process."""
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _read_for_ever(started: Connection) -> None:
    numbers = read_by_processes(_double, count(), 2)
    next(numbers)
    started.send([worker.pid for worker in multiprocessing.active_children()])
    for _ in numbers:
        pass


def _is_alive(pid: int) -> bool:
    """Where nobody waits for orphans, they stay as zombies."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
