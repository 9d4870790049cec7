"""Reads the pickle inside a torch checkpoint without running anything it names.

Only the instructions that describe dictionaries of tensors are understood; the few names they may refer to stand for
values of this module. Nothing is imported, and nothing is called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

# A tensor takes about 30; the released model has 1,400 of them.
_MOST_INSTRUCTIONS = 250_000
_STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class PickleRefusedError(Exception):
    """Why a pickle is refused, as the end of a sentence that begins with the name of its file."""


class _Function(Enum):
    ORDERED_DICT = auto()
    REBUILD_TENSOR = auto()
    REBUILD_PARAMETER = auto()


_FUNCTIONS = {
    "collections.OrderedDict": _Function.ORDERED_DICT,
    "torch._utils._rebuild_tensor_v2": _Function.REBUILD_TENSOR,
    "torch._utils._rebuild_parameter": _Function.REBUILD_PARAMETER,
}


@dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclass(frozen=True)
class PickledStorage:
    """`count` elements in the archive's entry `key`."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides in elements, all of them whole numbers from 0."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(data: bytes) -> Any:
    """What `data` describes, of dict, list, tuple, str, numbers, bool, None and `PickledTensor`.

    Raises `PickleRefusedError` for anything else, naming it, and for malformed data.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == _MOST_INSTRUCTIONS:
                raise PickleRefusedError(f"has a pickle of more than {number:,} instructions, far more than that takes")
            machine.execute(opcode.name, argument)
        return machine.stack.pop()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise PickleRefusedError("holds a damaged pickle") from error


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def execute(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif name not in _IGNORED:
            raise PickleRefusedError(f"uses the pickle instruction {name}, for which a file of weights has no need")

    def mark(self, _: Any) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return items

    def put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def push_tuple(self, count: int | None) -> None:
        items = self.pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(items))

    def set_items(self, items: list[Any]) -> None:
        target = _expect(self.stack[-1], dict)
        # Other keys are never needed, and hashing a deeply nested one would exhaust the C stack.
        target.update((_expect(key, str, int), value) for key, value in zip(items[::2], items[1::2], strict=True))

    def append_items(self, items: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(items)

    def set_last(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def push_global(self, name: str) -> None:
        module, _, attribute = name.partition(" ")
        if module == "torch" and attribute in _STORAGE_DTYPES:
            self.stack.append(_StorageType(_STORAGE_DTYPES[attribute]))
        elif (full := f"{module}.{attribute}") in _FUNCTIONS:
            self.stack.append(_FUNCTIONS[full])
        else:
            raise PickleRefusedError(f"refers to {full[:100]!r}, for which a file of weights has no need")

    def push_stack_global(self, _: Any) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.push_global(f"{_expect(module, str)} {_expect(attribute, str)}")

    def push_storage(self, _: Any) -> None:
        kind, storage_type, key, _location, count = self.stack.pop()
        if kind != "storage":
            raise ValueError("only storages are kept outside the pickle")
        dtype = _expect(storage_type, _StorageType).dtype
        self.stack.append(PickledStorage(dtype, _expect(key, str), _natural(count)))

    def reduce(self, _: Any) -> None:
        arguments, function = _expect(self.stack.pop(), tuple), _expect(self.stack.pop(), _Function)
        if function is _Function.REBUILD_TENSOR:
            self.stack.append(_rebuilt_tensor(*arguments[:4]))
        elif function is _Function.REBUILD_PARAMETER:
            self.stack.append(_expect(arguments[0], PickledTensor))
        elif arguments:
            raise ValueError("an OrderedDict is made empty and filled later")
        else:
            self.stack.append({})

    def build(self, _: Any) -> None:
        """Attributes of a dictionary, such as the `_metadata` of a state dict: not needed."""
        self.stack.pop()
        _expect(self.stack[-1], dict)


def _rebuilt_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> PickledTensor:
    sizes, steps = (tuple(_natural(value) for value in _expect(values, tuple)) for values in (shape, strides))
    if len(sizes) != len(steps):
        raise ValueError("a tensor has more or fewer strides than axes")
    return PickledTensor(_expect(storage, PickledStorage), _natural(offset), sizes, steps)


def _expect(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise TypeError(f"{type(value)} where {types} is needed")
    return value


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        # Not the value: spelling out a tuple of shared tuples can take forever.
        raise ValueError(f"{type(value)} where a size is needed")
    return value


_IGNORED = ("PROTO", "FRAME", "STOP")
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
)  # fmt: skip
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "TUPLE": lambda machine, _: machine.push_tuple(None),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(None),
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "SETITEM": _Machine.set_last,
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "APPEND": lambda machine, _: machine.append_items([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append_items(machine.pop_mark()),
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": _Machine.push_stack_global,
    "BINPERSID": _Machine.push_storage,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
