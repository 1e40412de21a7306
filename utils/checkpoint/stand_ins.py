"""Plain data in the place of classes that training programs pickle next to their weights, so that none of them runs.

numpy's scalars become numbers and its arrays tensors or lists, paths become texts, mappings and namespaces dicts. All
stand-ins are written here, and look at what they get: numpy's own functions trust the pickle with sizes and types.
"""

import datetime
import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import torch

MAX_NESTING = 50

_READABLE = re.compile(r"b1|[iu][1248]|f[248]|c8|c16|[SU][1-9]\d*")  # of numpy's types: numbers and texts
_STATE_SIZES = (8, 9)  # of a pickled dtype: version, byte order, three parts of compound types, size, …


class _DType:
    """A `numpy.dtype`: of numbers, texts or objects, not of compound types."""

    def __init__(self, name: str, *_flags: bool):
        self._name = name if isinstance(name, str) else bytes(name).decode("ascii")
        self._byteorder = "="

    def __setstate__(self, state: tuple) -> None:
        if len(state) not in _STATE_SIZES or any(part is not None for part in state[2:5]):
            raise ValueError(f"{self._name}: an array of compound values")
        byteorder = state[1] if isinstance(state[1], str) else bytes(state[1]).decode("ascii")
        if byteorder not in ("<", ">", "=", "|"):
            raise ValueError(f"{self._name}: unknown byte order")
        self._byteorder = byteorder

    def is_object(self) -> bool:
        return self._name in ("O", "O8", "O4")

    def read(self, data: object, count: int) -> np.ndarray:
        """Returns the `count` values in `data`, as numpy stores them."""
        if not _READABLE.fullmatch(self._name):
            raise ValueError(f"an array of numpy's type {self._name[:20]!r}")
        dtype = np.dtype(self._byteorder + self._name)
        if not isinstance(data, bytes) or len(data) != count * dtype.itemsize:
            raise ValueError("an array whose size is not that of its data")
        return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))  # a copy: writable, in this machine's order


class _Array:
    """A `numpy.ndarray`. `plain` returns its value, once the unpickler has set its state."""

    def __init__(self, *_unused: object):
        self._value: object = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran_order, data = state
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array without a shape")
        if not isinstance(dtype, _DType):
            raise ValueError("an array without a type")
        if dtype.is_object():
            if type(data) is not list or len(data) != math.prod(shape):
                raise ValueError("an array whose size is not that of its data")
            self._value = data
            return
        values = dtype.read(data, math.prod(shape)).reshape(shape, order="F" if fortran_order else "C")
        self._value = values.tolist() if values.dtype.kind in "SU" else torch.from_numpy(values.copy())

    def plain(self) -> object:
        return self._value


def _new_array(*_unused: object) -> _Array:
    return _Array()


def _scalar(dtype: _DType, data: object) -> object:
    if not isinstance(dtype, _DType):
        raise ValueError("a number without a type")
    return data if dtype.is_object() else dtype.read(data, 1)[0].item()


def _default_dict(*_factory: object) -> OrderedDict:
    return OrderedDict()


def _posix_path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _time_of(kind: Callable[..., object]) -> Callable[..., str]:
    def stand_in(*arguments: object) -> str:
        return str(kind(*arguments))

    return stand_in


def _type(*_unused: object) -> None:
    """A built-in type, which is pickled as the factory of a defaultdict or the type of an argument."""


def _no_bytes() -> bytes:
    """How protocol 2 writes bytes of length zero. Takes no size to fill."""
    return b""


_PATHS = {
    _posix_path: ("PosixPath", "PurePosixPath"),
    _windows_path: ("WindowsPath", "PureWindowsPath"),
}

# Maps names in pickles to their stand-ins. OrderedDict is the one mapping whose attributes the unpickler sets: it
# reads the attributes of yacs' configurations and of argparse's namespaces into its own, and never looks at them.
STAND_INS: dict[str, Callable[..., object]] = {
    "yacs.config.CfgNode": OrderedDict,
    "argparse.Namespace": OrderedDict,
    "types.SimpleNamespace": OrderedDict,
    "collections.defaultdict": _default_dict,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _new_array for core in ("core", "_core")},
    **{
        f"{module}.{name}": function
        for function, names in _PATHS.items()
        for name in names
        for module in ("pathlib", "pathlib._local")
    },
    **{
        f"datetime.{kind.__name__}": _time_of(kind)
        for kind in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
    },
    "builtins.frozenset": frozenset,
    "builtins.bytes": _no_bytes,
    **{f"builtins.{name}": _type for name in ("bool", "dict", "float", "int", "list", "str", "tuple")},
}


def to_plain(value: object, replace: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """Returns `value` with every stand-in replaced by its plain value and every tensor by what `replace` returns.

    Raises:
        ValueError: it contains itself, or is nested too deeply.
    """
    return _Plain(replace).convert(value, 0)


class _Plain:
    def __init__(self, replace: Callable[[torch.Tensor], torch.Tensor]):
        self._replace = replace
        # By identity: an object may lie in many places. Keeps what it has seen, so that no identity occurs twice.
        self._seen: dict[int, tuple[object, object]] = {}
        self._open: set[int] = set()

    def convert(self, value: object, depth: int) -> object:
        if isinstance(value, torch.Tensor):
            return self._replace(value)
        if not isinstance(value, dict | list | tuple | _Array | _DType):
            return value
        if id(value) in self._open or depth > MAX_NESTING:
            raise ValueError("its entries are nested without end")
        if id(value) not in self._seen:
            self._open.add(id(value))
            self._seen[id(value)] = (value, self._converted(value, depth + 1))
            self._open.remove(id(value))
        return self._seen[id(value)][1]

    def _converted(self, value: object, depth: int) -> object:
        if isinstance(value, _Array):
            return self.convert(value.plain(), depth)
        if isinstance(value, _DType):
            return None
        if isinstance(value, dict):
            for key, each in value.items():
                value[key] = self.convert(each, depth)
            return value
        if isinstance(value, list):
            value[:] = [self.convert(each, depth) for each in value]
            return value
        if isinstance(value, tuple):
            return tuple(self.convert(each, depth) for each in value) if type(value) is tuple else value
        return value
