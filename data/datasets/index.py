"""What a data set consists of (a path and a label for each image), in flat buffers and cached on disk.

Millions of Python strings would be copied into every forked worker as soon as their reference counts are touched;
numpy buffers are not. The cache is valid for as long as every directory and file it was made from has the same time
stamp, so a second start looks at some thousand directories and not at millions of files.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.paths import user_cache_dir

log = logging.getLogger(__name__)

# Part of every cache: raise it when what an index holds changes, or when other files count as images.
FORMAT = 2

# A change within the clock tick of the scan leaves the same time stamp. What is younger than this is not cached yet.
SETTLED_NS = 2_000_000_000


class Strings:
    """A list of strings in two numpy buffers: all bytes, and where each string ends."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        """`blob` (bytes,) uint8; `ends` (n,) int64, rising. Raises ValueError when they do not fit each other."""
        if len(ends) and (ends[0] < 0 or ends[-1] != len(blob) or np.any(np.diff(ends) < 0)):
            raise ValueError("the ends of the strings do not fit their bytes")
        self.blob = blob
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        blob, ends = bytearray(), array("q")
        for string in strings:
            blob += os.fsencode(string)
            ends.append(len(blob))
        return cls(np.frombuffer(bytes(blob), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.blob[start : self.ends[i]].tobytes())


@dataclass(frozen=True)
class Index:
    """Every image of one split.

    paths: relative to the folder or zip of the split; labels: (n,) int32; class_names: by label, None when unknown;
    columns: further numbers for each image, (n,) each (where its bytes lie in a zip).
    """

    paths: Strings
    labels: np.ndarray
    class_names: list[str] | None
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def cached(root: Path, name: str, build: Callable[[], tuple[Index, list[Path]]]) -> Index:
    """The index `name` of the data in `root`, from its cache where that is valid, else from `build`.

    Args:
        build: makes the index, and says which directories and files below `root` it depends on.

    The cache lies in `root`, or in the user's cache folder where `root` may not be written. It is written aside and
    renamed, holds plain arrays only (nothing in it is executed), and is rebuilt when it is damaged.
    """
    places = [root / f".swin_index_{name}.npz", _user_cache() / f"{_digest(root)}_{name}.npz"]
    for place in places:
        index = _load(place, root)
        if index is not None:
            return index
    started = time.time_ns()
    index, sources = build()
    stamps = {os.path.relpath(source, root): _stamp(source) for source in sources}
    log.info("indexed %d images of %s in %.1f s", len(index), root / name, (time.time_ns() - started) / 1e9)
    if any(stamp[0] > started - SETTLED_NS for stamp in stamps.values()):
        log.info("%s was changed just now: its index is cached at a later start", root)
    else:
        _save(places, index, stamps)
    return index


def _user_cache() -> Path:
    return user_cache_dir()


def _digest(root: Path) -> str:
    return hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Modification time (ns); for a file its size too (a directory's means nothing)."""
    status = path.stat()
    return [status.st_mtime_ns] if path.is_dir() else [status.st_mtime_ns, status.st_size]


def _save(places: list[Path], index: Index, stamps: dict[str, list[int]]) -> None:
    head = {"format": FORMAT, "stamps": stamps, "class_names": index.class_names}
    arrays = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), "labels": index.labels}
    arrays |= {"blob": index.paths.blob, "ends": index.paths.ends}
    arrays |= {f"column_{name}": values for name, values in index.columns.items()}
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write_aside(place, arrays)
            if place != places[0]:
                log.info("the data are read-only: their index is cached at %s", place)
            return
        except OSError as error:
            log.info("the index is not cached at %s: %s", place, error)
    log.warning(
        "the index of the data could not be cached, so every start reads all folders. Set XDG_CACHE_HOME to a "
        "folder that can be written."
    )


def _write_aside(place: Path, arrays: dict[str, np.ndarray]) -> None:
    if not place.parent.stat().st_mode & 0o222:  # root may write there all the same, and is not meant to
        raise PermissionError(f"{place.parent} is marked read-only")
    aside = place.with_name(f"{place.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            np.savez(file, **arrays)
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


def _load(place: Path, root: Path) -> Index | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            if head["format"] != FORMAT or any(_stamp(root / path) != stamp for path, stamp in head["stamps"].items()):
                return None
            columns = {key.removeprefix("column_"): arrays[key] for key in arrays.files if key.startswith("column_")}
            index = Index(Strings(arrays["blob"], arrays["ends"]), arrays["labels"], head["class_names"], columns)
    except FileNotFoundError:  # no cache yet, or a directory that it was made from is gone
        return None
    except Exception as error:  # damaged files make zipfile and numpy raise almost anything; none of it gets further
        log.warning("the cached index %s cannot be used and is made anew: %s", place, error)
        return None
    if not head["stamps"] or not _is_consistent(index):
        log.warning("the cached index %s is inconsistent and is made anew", place)
        return None
    return index


def _is_consistent(index: Index) -> bool:
    names, labels = index.class_names, index.labels
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return False
    vectors = (labels, *index.columns.values())
    if any(values.ndim != 1 or values.dtype.kind != "i" or len(values) != len(index.paths) for values in vectors):
        return False
    return len(labels) > 0 and labels.min() >= 0 and (names is None or labels.max() < len(names))
