"""The processes of a run: one alone, or several that meet, share the work and add up what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from visualglm.backends.torch.load import choose_device, exact_dtype
from visualglm.errors import DeviceError, VisualGLMError
from visualglm.training.launch import die_with_launcher

T = TypeVar("T")

# The first process may be busy with all images before the others go on. A process that dies is noticed at once.
_LONGEST_WAIT = timedelta(hours=2)
# How the libraries of the exchange begin to complain when another process is gone.
_LOST = ("gloo", "NCCL", "HCCL", "Connection", "Broken pipe", "store")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run, on its device."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    @property
    def device_name(self) -> str:
        """For messages: there is but one CPU, whatever its number."""
        return "cpu" if self.device.type == "cpu" else str(self.device)

    def wait(self) -> None:
        """Until all processes are here."""
        with lost_process_named():
            self.accelerator.wait_for_everyone()

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each of `values` over all processes."""
        if self.world_size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=exact_dtype(self.device), device=self.device)
        distributed.all_reduce(totals)
        return [float(total) for total in totals.tolist()]

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` returns in the first process, or the `VisualGLMError` it raises there, in all of them."""
        if self.world_size == 1:
            return work()
        outcome: list[T | VisualGLMError | None] = [None]
        if self.is_first:
            try:
                outcome = [work()]
            except VisualGLMError as error:
                outcome = [error]
        distributed.broadcast_object_list(outcome, src=0, device=self.device)
        if isinstance(outcome[0], VisualGLMError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def replicate(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over all processes by DDP; itself where there is one process.

        What is not trained must be the same in all processes: it is not sent to them.
        """
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        frozen |= {name for name, _ in module.named_buffers()}
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)  # type: ignore[no-untyped-call]
        self.accelerator.free_memory()  # of what was trained before
        prepared: nn.Module = self.accelerator.prepare_model(module)
        return prepared

    def leave(self) -> None:
        """The end of what these processes do together."""
        self.accelerator.end_training()


def join_processes(device: str = "auto") -> Processes:
    """Meet the processes that `--nproc`, torchrun or `accelerate launch` started; alone without them.

    Over gloo on CPUs, NCCL on CUDA devices, HCCL on those of Ascend. Raises `DeviceError` if the device is not there.
    """
    die_with_launcher()
    chosen = _own_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # A process may have trained before, on another device.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Rows without an image leave parts out. That gradients lie in the same buckets in every step, also in the first
    # one of a resumed run, comes with it: no sum is taken in another order.
    replicas = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    handlers = [replicas, InitProcessGroupKwargs(timeout=_LONGEST_WAIT)]
    return Processes(Accelerator(cpu=chosen.type == "cpu", kwargs_handlers=handlers))


def _own_device(name: str) -> torch.device:
    """On a machine with several cards each process has its own."""
    rank, count = (int(os.environ.get(variable, "0")) for variable in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cards = torch.cuda.device_count()
    if name == "cuda" or (name == "auto" and cards):
        if count > cards:
            raise DeviceError(f"{count} processes need a card each, but this machine has {cards}; start {cards or 1}.")
        name = f"cuda:{rank}"
    return choose_device(name)


def shard(module: nn.Module, processes: Processes) -> None:
    """Split the parameters of `module` over all processes, block by block (FSDP2).

    The elements of every `nn.ModuleList` in it are blocks, whose parameters are gathered when they are needed.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for part in list(module.modules()):
        if isinstance(part, nn.ModuleList):
            for block in part:
                fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded. Shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, own: Tensor) -> Tensor:
    """The sharded tensor of which this process holds `own`, split as `tensor` is; `own` itself if that is whole."""
    if not isinstance(tensor, DTensor):
        return own
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Turns the error of an exchange whose other side is gone into a `DeviceError`."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_initialized() or not any(word in str(error) for word in _LOST):
            raise
        rank, size = distributed.get_rank(), distributed.get_world_size()
        raise DeviceError(
            f"Another of the {size} processes of the run is gone, and process {rank} cannot go on without it; "
            "--resume goes on from the last checkpoint."
        ) from error
