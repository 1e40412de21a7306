"""The index of a data set (path and label of each image), in numpy buffers and cached on disk.

Reading a Python string changes its reference count, so every forked worker would copy millions of them; numpy buffers
stay shared. The cache is valid while every directory and file that it was made from keeps its modification time, so a
second start checks some thousand directories and not millions of files.
"""

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import write_atomically
from utils.paths import user_cache_dir

log = logging.getLogger(__name__)

# Part of every cache: raise it when the contents of an index change, or when other files count as images.
FORMAT = 4

# A change within the clock tick of the scan keeps the modification time, so data younger than this are not cached yet.
MIN_AGE_NS = 2_000_000_000


class Strings:
    """A list of strings in two numpy buffers: all bytes, and the end of each string in them."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        """`blob` (bytes,) uint8; `ends` (n,) int64, not decreasing. Raises ValueError when they do not match."""
        if len(ends) and (ends[0] < 0 or ends[-1] != len(blob) or np.any(np.diff(ends) < 0)):
            raise ValueError("the ends of the strings do not match their bytes")
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
    """The images of one split.

    paths: relative to the folder or zip of the split; labels: (n,) int32; class_names: by label, None when unknown;
    columns: further numbers for each image, (n,) each (such as the position of its bytes in a zip).
    """

    paths: Strings
    labels: np.ndarray
    class_names: list[str] | None
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


def cached(root: Path, name: str, build: Callable[[], tuple[Index, list[Path]]]) -> Index:
    """The index `name` of the data in `root`, from its cache if that is valid, else from `build`.

    Args:
        build: makes the index, and lists the directories and files below `root` that it depends on.

    The cache is in `root`, or in the user's cache folder when `root` is read-only; nowhere when there is none either.
    It is written atomically, contains plain arrays only (loading it executes nothing), and is rebuilt when it is
    damaged.
    """
    cache_files = [root / f".swin_index_{name}.npz"]
    if user_cache := user_cache_dir():
        cache_files.append(user_cache / f"{_path_digest(root)}_{name}.npz")
    for cache_file in cache_files:
        index = _load(cache_file, root)
        if index is not None:
            return index
    started = time.time_ns()
    index, sources = build()
    stamps = {os.path.relpath(source, root): _stamp(source) for source in sources}
    log.info("indexed %d images of %s in %.1f s", len(index), root / name, (time.time_ns() - started) / 1e9)
    if any(stamp[0] > started - MIN_AGE_NS for stamp in stamps.values()):
        log.info("%s was changed just now: its index is cached at a later start", root)
    else:
        _save(cache_files, index, stamps)
    return index


def _path_digest(root: Path) -> str:
    return hashlib.blake2b(os.fsencode(root.resolve()), digest_size=16).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Modification time (ns), and the size of a file."""
    status = path.stat()
    return [status.st_mtime_ns] if path.is_dir() else [status.st_mtime_ns, status.st_size]


def _save(cache_files: list[Path], index: Index, stamps: dict[str, list[int]]) -> None:
    head = {"format": FORMAT, "stamps": stamps, "class_names": index.class_names}
    arrays: dict[str, Any] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), "labels": index.labels}
    arrays |= {"blob": index.paths.blob, "ends": index.paths.ends}
    arrays |= {f"column_{name}": values for name, values in index.columns.items()}
    for cache_file in cache_files:
        try:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            if not cache_file.parent.stat().st_mode & 0o222:  # root could write there nevertheless, but should not
                raise PermissionError(f"{cache_file.parent} is marked read-only")
            write_atomically(cache_file, lambda file: np.savez(file, **arrays))
            if cache_file != cache_files[0]:
                log.info("the data are read-only: their index is cached at %s", cache_file)
            return
        except OSError as error:
            log.info("the index is not cached at %s: %s", cache_file, error)
    log.warning(
        "the index of the data could not be cached, so every start reads all folders. Set XDG_CACHE_HOME to a "
        "writable folder."
    )


def _load(cache_file: Path, root: Path) -> Index | None:
    """The index in `cache_file`; None when it is missing, out of date or damaged."""
    try:
        with np.load(cache_file, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            if head["format"] != FORMAT or any(_stamp(root / path) != stamp for path, stamp in head["stamps"].items()):
                return None
            columns = {key.removeprefix("column_"): arrays[key] for key in arrays.files if key.startswith("column_")}
            index = Index(Strings(arrays["blob"], arrays["ends"]), arrays["labels"], head["class_names"], columns)
    except FileNotFoundError:  # no cache yet, or a directory that it was made from is gone
        return None
    except Exception as error:  # zipfile and numpy raise almost any exception for damaged files
        log.warning("the cached index %s cannot be used and is rebuilt: %s", cache_file, error)
        return None
    if not head["stamps"] or not _is_consistent(index):
        log.warning("the cached index %s is inconsistent and is rebuilt", cache_file)
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
