"""Resolves a name, URL or path of weights to a local file: downloads it once, resumably, and verifies its digest.

Downloads are kept in torch's hub folder (set TORCH_HOME to move it). While it is downloaded, a file is called
`<name>.part`, and `<name>.part.version` records which version of the file it is; it gets its own name once it is
complete and verified.
"""

import difflib
import fcntl
import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

from models.pretrained import registry
from utils.errors import UserError
from utils.locks import try_lock, wait_for_lock
from utils.paths import expand_user

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a response
CHUNK = 1 << 20  # bytes

# What `save_pretrained` of transformers and timm writes into a folder: whole, or an index of several files.
_FILES_OF_FOLDERS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_WEIGHT_SUFFIXES = (".pth", ".safetensors", ".bin", ".pt", ".ckpt")


def resolve_weights(source: str, progress: bool = False) -> Path:
    """The local file for `source`, downloaded if necessary.

    Args:
        source: a path, a name listed by `python -m tools.models`, or an http(s) URL; an existing file takes precedence
            over a name. A folder stands for the file that `save_pretrained` wrote into it. `#sha256=HEX` after it, at
            least the first 8 digits, is verified.
        progress: show a progress bar.

    Raises:
        UserError: no such file or name, a failed download, or a wrong digest; says where to get the file.
    """
    location, _, digest = expand_user(source, "weights").partition("#sha256=")
    if digest and not re.fullmatch(r"[0-9a-fA-F]{8,64}", digest):
        raise UserError(f"{source}: a SHA-256 has 64 hexadecimal digits, of which at least the first 8 must be given")
    path, url = _file_in_folder(Path(location)), None
    if not path.is_file():
        release = registry.find(location)
        if release is not None:
            url, path, digest = release.url, _cache_dir() / release.file, digest or release.sha256
        elif re.match(r"https?://", location):
            url, path = location, _cache_dir() / _file_name(location)
        else:
            raise UserError(_not_found(location))
    if url is not None and not path.is_file():
        _download(url, path, digest.lower(), progress)
    elif digest and not (actual := _sha256(path)).startswith(digest.lower()):
        raise UserError(f"{path}: SHA-256 is {actual}, expected {digest}. Delete it to download it again")
    return path


def _file_in_folder(path: Path) -> Path:
    """The weight file in the folder `path`; `path` itself if it is no folder, or one without such a file."""
    return next((path / name for name in _FILES_OF_FOLDERS if (path / name).is_file()), path)


def _cache_dir() -> Path:
    hub = torch.hub.get_dir()
    if hub.startswith("~"):  # PyTorch would create a folder of that name in the working directory
        raise UserError(
            f"weights cannot be kept in {hub}: the present user has no home folder. Set TORCH_HOME to a writable folder"
        )
    return Path(hub) / "checkpoints"


def _file_name(url: str) -> str:
    """The name of a downloaded file: unique to the URL, because many end in the same name."""
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rsplit('/', 1)[-1].split('?')[0]}"


def _not_found(location: str) -> str:
    if Path(location).is_dir():
        inside = [path for depth in ("*", "*/*") for path in sorted(Path(location).glob(depth))]
        files = [str(path) for path in inside if path.suffix in _WEIGHT_SUFFIXES and not path.name.startswith(".")]
        such_as = f", such as {files[0]}" if files else ""
        return f"{location}: is a folder without {' or '.join(_FILES_OF_FOLDERS[::2])}. Name the file to read{such_as}"
    similar = difflib.get_close_matches(location, [release.name for release in registry.RELEASES], n=1)
    hint = f"Did you mean the released {similar[0]}? " if similar else ""
    return (
        f"{location}: no such file. {hint}Give the path or the URL of a checkpoint, or a name that "
        "`python -m tools.models` lists"
    )


def _download(url: str, path: Path, digest: str, progress: bool) -> None:
    """Downloads `url` to `path`. If several processes want the same file, one downloads it and the others wait."""
    part, version_file = (path.with_name(path.name + ending) for ending in (".part", ".part.version"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            _wait_for_lock(file, part, url)
            if path.is_file():
                return
            log.info("downloading %s to %s", url, path)
            _receive(url, file, version_file, progress)
            file.flush()
            os.fsync(file.fileno())
            version_file.unlink(missing_ok=True)
            actual = _sha256(part)
            if not actual.startswith(digest):
                part.unlink()
                raise UserError(f"{url}: SHA-256 is {actual}, expected {digest}; the download was deleted")
            os.replace(part, path)
            check = "as expected" if digest else "not verified: no published digest is known"
            log.info("%s is complete; SHA-256 %s (%s)", path, actual, check)
    except (OSError, http.client.HTTPException, ValueError) as error:  # raised by urllib, or by a full disk
        raise UserError(
            f"{url}: download failed ({error or type(error).__name__}). Start again to continue it, or get the file by "
            f"other means and give its path, or put it at {path}"
        ) from error


def _wait_for_lock(file: BinaryIO, part: Path, url: str) -> None:
    consequence = "two processes that download the same file would not notice each other"
    if not try_lock(fcntl.flock, file.fileno(), part, consequence):
        log.info("waiting for another process, which is downloading %s", url)
        wait_for_lock(fcntl.flock, file.fileno(), part, consequence)


def _receive(url: str, file: BinaryIO, version_file: Path, progress: bool) -> None:
    """Appends the missing rest of `url` to `file`. Reconnects after a lost connection, if it made any progress.

    Raises:
        OSError, HTTPException, ValueError: no further bytes arrive.
    """
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            if _receive_once(url, file, version_file, progress):
                return
        except (OSError, http.client.HTTPException):
            if file.seek(0, os.SEEK_END) <= before:
                raise
        if file.seek(0, os.SEEK_END) <= before:
            raise OSError(f"the connection was lost after {file.tell()} bytes several times")
        log.info("the connection was lost after %d bytes; continuing", file.tell())


def _receive_once(url: str, file: BinaryIO, version_file: Path, progress: bool) -> bool:
    """Downloads over one connection. Returns whether the file is complete."""
    have = file.seek(0, os.SEEK_END)
    version = version_file.read_text() if version_file.is_file() else ""
    if have and not version:  # unknown which version of the file this is a part of
        file.truncate(have := 0)
    request = urllib.request.Request(url, headers={"User-Agent": "swin"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)  # if the file has changed, the server sends all of it
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        version_file.unlink(missing_ok=True)  # the part is not shorter than the file: download all of it
        return _receive_once(url, file, version_file, progress)
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(have := 0)
        version_file.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], leave=False,
            disable=None if progress else True,
        ) as bar:  # fmt: skip
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or file.seek(0, os.SEEK_END) == total


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()
