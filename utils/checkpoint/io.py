"""Checkpoint files: written whole or not at all, read without executing anything that is in them.

A checkpoint is a dict of plain values and tensors; `docs/FORMATS.md` lists its entries. Files written by the original
Swin code are read too: they contain a pickled yacs config, which becomes a plain dict.
"""

import logging
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from utils.checkpoint import digest
from utils.errors import UserError
from utils.files import TEMPORARY, link_atomically, write_atomically

log = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
LARGEST_CLAIM = 1 << 30  # bytes that a tensor may have beyond those of its storage

# Classes that training programs pickle beside their weights. They are read as a dict: their code is never run, and
# the unpickler accepts this one type of mapping.
_READ_AS_DICT = [(OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "argparse.Namespace")]
_HARMLESS_GLOBAL = re.compile(r"(collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.\w*Storage|torch\.Size)$")


def read_checkpoint(path: Path | str) -> dict:
    """The contents of a checkpoint, or of a file of safetensors, on the CPU.

    Raises:
        UserError: missing, damaged, not a checkpoint, a wrong digest, or a pickle that names code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path")
    contents = _load(path)
    _require_dense(contents, path, [])
    return contents


def _load(path: Path) -> dict:
    if _is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(_why_unreadable(path, error)) from error
    _require_whole(path)
    try:
        with torch.serialization.safe_globals(_READ_AS_DICT):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise almost anything; none of it gets further
        raise UserError(_why_unreadable(path, error)) from error
    if not isinstance(contents, dict):
        kind = type(contents).__name__
        raise UserError(f"{path}: not a checkpoint: it holds a {kind}, not a dict of weights. Give one")
    return contents


def _require_dense(contents: object, path: Path, above: list[int]) -> None:
    """Every tensor lies in memory value by value, as training saves them: none sparse, quantised, or a few bytes that
    claim to be terabytes; and no dict is in itself.
    """
    if isinstance(contents, torch.Tensor):
        dense = contents.layout is torch.strided and contents.device.type == "cpu" and not contents.is_quantized
        if not dense or contents.nbytes - contents.untyped_storage().nbytes() > LARGEST_CLAIM:
            raise UserError(f"{path}: holds a tensor that is no plain array of numbers. Save the weights as plain ones")
    elif isinstance(contents, dict | list | tuple):
        if id(contents) in above or len(above) > 50:
            raise UserError(f"{path}: not a checkpoint: its entries are nested without end. Take another copy")
        for value in contents.values() if isinstance(contents, dict) else contents:
            _require_dense(value, path, [*above, id(contents)])


def extract_state_dict(contents: dict, source: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint: under `model` or `state_dict`, or the file as a whole.

    Raises:
        UserError: there is none, or not all of its numbers are finite.
    """
    weights = contents.get("model", contents.get("state_dict", contents))
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        listed = ", ".join(str(key)[:80] for key in list(contents)[:8])
        raise UserError(f"{source}: no weights found; its entries are {listed}. Give a file that holds some")
    weights = {str(name): value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise UserError(f"{source}: {broken[0]}{more}: not all values are finite. Take another copy, or an earlier one")
    return weights


def write_weights(path: Path, weights: dict[str, torch.Tensor], key: str = "") -> None:
    """Writes a state dict: in the format of safetensors where the path ends so, else in that of PyTorch.

    Args:
        key: the entry of a PyTorch file that is to hold the state dict; "" for a file that is the state dict.

    Raises:
        UserError: the disk is full or not writable; what was there before is unharmed.
    """
    # Each tensor on its own: of a view, PyTorch would write all that it is a view of, and safetensors refuses it.
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    try:
        if path.suffix == SAFETENSORS:
            data = safetensors.torch.save(weights, metadata={"format": "pt"})
            write_atomically(path, lambda file: file.write(data))
        else:
            write_atomically(path, lambda file: torch.save({key: weights} if key else weights, file))
    except (OSError, RuntimeError) as error:  # torch.save wraps a write error in a RuntimeError
        raise UserError(f"{path}: could not be written ({error}). Make room, or give another place") from error


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its beginning: eight bytes of length, then a text in JSON."""
    with open(path, "rb") as file:
        return path.suffix == SAFETENSORS or file.read(9)[8:] == b"{"


def _require_whole(path: Path) -> None:
    """Checks the digest of all its bytes that a file of this program carries; of other files, the checksum of each of
    their records. torch.load looks at neither.
    """
    try:
        whole = digest.verify_digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}). Take another copy") from error
    if whole:
        return
    if whole is False:
        raise UserError(f"{path}: damaged: it is not what was saved, by its SHA-256. Take another copy")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        return  # truncated, of the format before torch 1.6, or no checkpoint: torch.load finds out
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        damaged = str(error)
    if damaged:
        raise UserError(f"{path}: damaged: {damaged} does not match its checksum. Take another copy")


def _why_unreadable(path: Path, error: Exception) -> str:
    code = [name for name in _globals_in_pickle(path) if not _HARMLESS_GLOBAL.match(name)]
    known = {name for _, name in _READ_AS_DICT}
    code = [name for name in code if name not in known]
    if code:
        return (
            f"{path}: refused, nothing in it was run. Its pickle refers to {', '.join(code[:8])}, which is code, not "
            "weights. If you trust its origin, save its state_dict alone with a program that reads it"
        )
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if path.stat().st_size == 0:
        first_line = "it is empty"
    elif "Weights only load failed" in first_line:
        first_line = "its pickle is not one that weights are saved in"
    return f"{path}: not a readable checkpoint: {first_line}. It may be truncated or damaged; take another copy"


def _globals_in_pickle(path: Path) -> list[str]:
    """Names of modules' members that the file's pickle refers to, found by reading its opcodes without running them."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                pickled = [archive.read(name)]
        else:
            pickled = _pickles_one_after_another(path.read_bytes())
        names: dict[str, None] = {}
        for data in pickled:
            strings: list[str] = []
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    names[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, LookupError, StopIteration, OSError, EOFError, RuntimeError, zipfile.BadZipFile):
        return []  # not a pickle at all, or a damaged one: the caller says so
    return list(names)


def _pickles_one_after_another(data: bytes) -> list[bytes]:
    """Files from before torch 1.6 are several pickles in a row: magic number, version, system, contents, keys."""
    pickles: list[bytes] = []
    start = 0
    while len(pickles) < 5 and start < len(data) and data[start] == 0x80:
        end = start
        for _, _, position in pickletools.genops(data[start:]):
            end = start + position + 1
        pickles.append(data[start:end])
        start = end
    return pickles or [data]


class CheckpointFolder:
    """The checkpoints of one run: `last.pth`, `best.pth` and `epoch_NNNN.pth`.

    Only the process that holds the run's lock may write. `last.pth` is written; the other two are further names of the
    same file, so that an epoch costs one write.
    """

    def __init__(self, folder: Path, keep: int):
        """`keep` is how many numbered checkpoints stay; 0 keeps all."""
        self.folder = folder
        self.keep = keep
        self.last = folder / "last.pth"
        self.best = folder / "best.pth"

    def prepare(self) -> None:
        """Makes the folder and removes what a killed process left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f".*{TEMPORARY}"):
            leftover.unlink()

    def save(self, contents: dict, epoch: int | None = None, best: bool = False) -> None:
        """Writes `last.pth`, and names it `epoch_NNNN.pth` and `best.pth` too where asked.

        `last.pth` comes last: a process killed in between finds the earlier one, makes the same epoch again, and
        leaves all names as they should be.

        Raises:
            UserError: the disk is full or not writable; the earlier checkpoints are unharmed.
        """
        numbered = [] if epoch is None else [self.folder / f"epoch_{epoch:04d}.pth"]
        first, *others = [*numbered, *([self.best] if best else []), self.last]
        try:
            write_atomically(first, lambda file: digest.save(contents, file))
            for other in others:
                link_atomically(first, other)
            if self.keep:
                for old in self.numbered()[self.keep :]:
                    old.unlink()
        except (OSError, RuntimeError) as error:  # torch.save wraps a write error in a RuntimeError
            raise UserError(
                f"{first}: could not be written ({_root_cause(error)}). Earlier checkpoints are unharmed; make room or "
                "give another --output, and start again"
            ) from error

    def numbered(self) -> list[Path]:
        """The numbered checkpoints, newest epoch first."""
        found = self.folder.glob("epoch_*.pth")
        return sorted((p for p in found if re.fullmatch(r"epoch_\d+", p.stem)), key=lambda p: -int(p.stem[6:]))

    def newest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that can be read, with its contents, or None in a folder without checkpoints.

        That is `last.pth`; where it is missing or damaged, the one of the others with the most samples on its clock.

        Raises:
            UserError: there are checkpoints, and none of them can be read.
        """
        others = [self.numbered(), [self.best] if self.best.exists() else []]
        if not self.last.exists():
            if not any(others):
                return None
            log.warning("%s: missing — trying the one before it", self.last)
        elif found := _first_readable([self.last]):
            return found
        readable = [found for paths in others if (found := _first_readable(paths))]
        if not readable:
            raise UserError(f"{self.folder}: none of its checkpoints can be read. Start anew with another --tag")
        return max(readable, key=lambda found: _clock(found[1]))


def _first_readable(paths: list[Path]) -> tuple[Path, dict] | None:
    for path in paths:
        try:
            return path, read_checkpoint(str(path))
        except UserError as error:
            log.warning("%s — trying the one before it", error)
    return None


def _clock(contents: dict) -> int:
    state = contents.get("state")
    samples = state.get("samples") if isinstance(state, dict) else None
    return samples if isinstance(samples, int) else -1


def _root_cause(error: BaseException) -> BaseException:
    """What the file system said; torch.save raises an error of its own while that one is on its way."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def not_finite(contents: dict) -> str | None:
    """The name of the first tensor in `contents` that holds a number that is not finite. Waits for the device."""
    found = list(_floats(contents, ""))
    # The largest magnitude is infinite or NaN where any is: one pass, without a copy of the size of the tensor.
    largest = [torch.linalg.vector_norm(value, torch.inf) for _, value in found]
    for device in {value.device for value in largest}:
        names = [name for name, value in found if value.device == device]
        finite = torch.stack([value.isfinite() for value in largest if value.device == device]).tolist()
        if not all(finite):
            return names[finite.index(False)]
    return None


def _floats(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _floats(each, f"{name}.{key}".lstrip("."))
