"""Checkpoint files: written completely or not at all, and read without executing anything that they contain.

A checkpoint is a dict of plain values and tensors; `docs/FORMATS.md` lists its entries. Files of the original Swin code
are read too: they contain a pickled yacs config, which becomes a plain dict.
"""

import functools
import json
import logging
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from utils.checkpoint import digest
from utils.checkpoint.stand_ins import STAND_INS, to_plain
from utils.errors import UserError
from utils.files import write_atomically

log = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
INDEX_SUFFIX = ".index.json"
MAX_EXCESS_BYTES = 1 << 30  # bytes that a tensor may claim beyond those of its storage (a view may repeat them)

# Names that the unpickler itself knows, besides those of `STAND_INS`.
_HARMLESS_GLOBAL = re.compile(
    r"(collections\.(OrderedDict|Counter)|torch\._utils\._rebuild_\w+|torch\.nn\.parameter\.Parameter|_codecs\.encode|"
    r"torch\.(\w*Storage|Size|Tensor|device|bool|b?float\d\w*|u?int\d+|complex\d+)|builtins\.(set|complex|bytearray))$"
)


def read_checkpoint(path: Path | str) -> dict:
    """Reads a checkpoint or a safetensors file into a dict of CPU tensors and plain values.

    Args:
        path: the file, or the index of weights that `save_pretrained` spread over several files.

    Raises:
        UserError: missing, damaged, not a checkpoint, a wrong digest, or a pickle that refers to code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path")
    contents = _load_shards(path) if path.name.endswith(INDEX_SUFFIX) else _load(path)
    try:
        to_plain(contents, functools.partial(_require_dense, path))
    except ValueError as error:
        raise UserError(f"{path}: not a checkpoint: {error}. Use another copy") from error
    return contents


def _load(path: Path) -> dict:
    if _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(_why_unreadable(path, error)) from error
    _verify_checksums(path)
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise almost anything
        raise UserError(_why_unreadable(path, error)) from error
    if not isinstance(contents, dict):
        found = type(contents).__name__
        raise UserError(f"{path}: not a checkpoint: it holds a {found}, not a dict of weights. Give one")
    return contents


def _load_shards(index: Path) -> dict:
    """Reads the files next to `index` that hold parts of one state dict; `weight_map` names the file of each tensor."""
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(files.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable index of weights ({error}). Use another copy") from error
    contents: dict = {}
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is no file next to it. Use another copy")
        if not (index.parent / name).is_file():
            raise UserError(f"{index}: {name} is missing, which holds a part of the weights. Get it too")
        contents |= _load(index.parent / name)
    missing = sorted(files.keys() - contents.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{index}: {missing[0]}{more}: in none of the files {', '.join(names)}. Use another copy")
    return contents


def _require_dense(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """Refuses a tensor that is no plain array.

    Training saves dense tensors. Sparse or quantized ones, or a few bytes that claim to be terabytes, are not its own.
    """
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not dense or tensor.nbytes - tensor.untyped_storage().nbytes() > MAX_EXCESS_BYTES:
        raise UserError(f"{path}: holds a tensor that is no plain array of numbers. Save the weights as plain ones")
    return tensor


def write_weights(path: Path, weights: dict[str, torch.Tensor], key: str = "") -> None:
    """Writes a state dict, as safetensors if the path ends in .safetensors, else with torch.save.

    Args:
        key: the entry of a torch.save file that holds the state dict; "" if the file is the state dict itself.

    Raises:
        UserError: the disk is full or not writable; the previous file is unharmed.
    """
    # Of a view, PyTorch would write the whole storage, and safetensors refuses it.
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    try:
        if path.suffix == SAFETENSORS:
            data = safetensors.torch.save(weights, metadata={"format": "pt"})
            write_atomically(path, lambda file: file.write(data))
        else:
            write_atomically(path, lambda file: torch.save({key: weights} if key else weights, file))
    except (OSError, RuntimeError) as error:  # torch.save wraps a write error in a RuntimeError
        raise UserError(f"{path}: could not be written ({error}). Free some space, or choose another path") from error


def _is_safetensors(path: Path) -> bool:
    """By its suffix, or by its first bytes: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return path.suffix == SAFETENSORS or file.read(9)[8:] == b"{"


def _verify_checksums(path: Path) -> None:
    """Verifies the digest of our own files, and the CRC-32 of each record of others. torch.load checks neither."""
    try:
        valid = digest.verify_digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}). Use another copy") from error
    if valid:
        return
    if valid is False:
        raise UserError(f"{path}: damaged: its SHA-256 is not that of the file that was saved. Use another copy")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        return  # truncated, from before torch 1.6, or not a checkpoint: torch.load reports it
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path}: damaged: {damaged} does not match its checksum. Use another copy")


def _why_unreadable(path: Path, error: Exception) -> str:
    """The error message for a file that could not be loaded."""
    code = [name for name in _globals_in_pickle(path) if not _HARMLESS_GLOBAL.match(name) and name not in STAND_INS]
    if code:
        return (
            f"{path}: refused, nothing in it was run. Its pickle refers to {', '.join(code[:8])}, which is code, not "
            "weights. If you trust its origin, save its state_dict alone with a program that reads it"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if path.stat().st_size == 0:
        reason = "it is empty"
    elif "Weights only load failed" in reason:
        reason = "its pickle is not a pickle of weights"
    return f"{path}: not a readable checkpoint: {reason}. It may be truncated or damaged; use another copy"


def _globals_in_pickle(path: Path) -> list[str]:
    """Names that the file's pickle would import, found by reading its opcodes without running them."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                pickles = [archive.read(name)]
        else:
            pickles = _consecutive_pickles(path.read_bytes())
        names: dict[str, None] = {}
        for data in pickles:
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in ("GLOBAL", "INST"):
                    # Pickles for Python 2 call the module of the built-in types by its name there.
                    names[str(argument).replace(" ", ".").replace("__builtin__.", "builtins.", 1)] = None
                elif opcode.name == "STACK_GLOBAL":
                    names[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, LookupError, StopIteration, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return []  # not a pickle, or a damaged one: the caller reports that
    return list(names)


def _consecutive_pickles(data: bytes) -> list[bytes]:
    """Splits a file from before torch 1.6: several pickles in a row (magic number, version, system, contents, keys)."""
    pickles: list[bytes] = []
    start = 0
    while len(pickles) < 5 and start < len(data) and data[start] == 0x80:
        end = start
        for _, _, position in pickletools.genops(data[start:]):
            end = start + (position or 0) + 1
        pickles.append(data[start:end])
        start = end
    return pickles or [data]


def not_finite(contents: dict) -> str | None:
    """Returns the name of the first tensor in `contents` with a value that is not finite. Synchronizes the device."""
    tensors = list(_float_tensors(contents, ""))
    # The maximum norm is infinite or NaN if any value is: one pass, without a temporary of the tensor's size.
    norms = [torch.linalg.vector_norm(value, torch.inf) for _, value in tensors]
    for device in {norm.device for norm in norms}:
        names = [name for name, value in tensors if value.device == device]
        finite = torch.stack([norm.isfinite() for norm in norms if norm.device == device]).tolist()
        if not all(finite):
            return names[finite.index(False)]
    return None


def _float_tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _float_tensors(each, f"{name}.{key}".lstrip("."))
