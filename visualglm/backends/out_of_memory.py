"""Memory that runs out while a model computes, told alike by all backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from visualglm.errors import DeviceError

P = ParamSpec("P")
R = TypeVar("R")

OUT_OF_MEMORY = (
    "The memory ran out while the model was computing; "
    "use a smaller batch, a shorter prompt or fewer new tokens, or close other programs."
)


def tells_out_of_memory(is_meant: Callable[[Exception], bool]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a method of a backend: exceptions by which its library means that the memory ran out become `DeviceError`."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @wraps(method)
        def compute(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not is_meant(error):
                    raise
                raise DeviceError(OUT_OF_MEMORY) from error

        return compute

    return decorate
