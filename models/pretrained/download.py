"""Weight files by name, URL or path: downloaded once, continued where a download broke off, verified, kept.

Downloads lie in torch's hub folder (`TORCH_HOME` moves it). A file appears there under its name only when it is whole
and verified; until then it is `<name>.part`, beside a note of which version of the file it is a part of.
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

log = logging.getLogger(__name__)

SECONDS_WITHOUT_AN_ANSWER = 30
CHUNK = 1 << 20  # bytes
_UNKNOWN = "which is published nowhere that this project knows of"


def resolve_weights(source: str, progress: bool = False) -> Path:
    """The local file that `source` means.

    Args:
        source: a path, a name of `python -m tools.models`, or an http(s) URL; a file that exists wins over a name.
            `#sha256=HEX` behind it, at least the first 8 digits, is what the contents must have.
        progress: show how the download goes.

    Raises:
        UserError: no such file or name, a download that failed, or a wrong digest; says where to get the file.
    """
    location, _, digest = source.partition("#sha256=")
    if digest and not re.fullmatch(r"[0-9a-fA-F]{8,64}", digest):
        raise UserError(f"{source}: a SHA-256 is 64 hexadecimal digits, of which at least the first 8 must be given")
    path, url = Path(location), None
    if not path.is_file():
        release = registry.find(location)
        if release is not None:
            url, path, digest = release.url, _cache() / release.file, digest or release.sha256
        elif re.match(r"https?://", location):
            url, path = location, _cache() / _file_of(location)
        else:
            raise UserError(_not_found(location))
    if url is not None and not path.is_file():
        _download(url, path, digest.lower(), progress)
    elif digest and not (found := _sha256(path)).startswith(digest.lower()):
        raise UserError(f"{path}: SHA-256 is {found}, not {digest} as asked for. Delete it to download it again")
    return path


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_of(url: str) -> str:
    """The name of a download. Addresses that end alike (…/main/model.safetensors) get different ones."""
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{url.rsplit('/', 1)[-1].split('?')[0]}"


def _not_found(location: str) -> str:
    near = difflib.get_close_matches(location, [release.name for release in registry.RELEASES], n=1)
    guess = f"Did you mean the released {near[0]}? " if near else ""
    return (
        f"{location}: no such file. {guess}Give the path or the URL of a checkpoint, or a name that "
        "`python -m tools.models` lists"
    )


def _download(url: str, path: Path, digest: str, progress: bool) -> None:
    """Brings `url` to `path`. Of several processes that want the same file one works, and the others wait for it."""
    part, version_note = (path.with_name(path.name + ending) for ending in (".part", ".part.version"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process, which is downloading %s", url)
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.is_file():
                return
            log.info("downloading %s to %s", url, path)
            _receive(url, file, version_note, progress)
            file.flush()
            os.fsync(file.fileno())
            version_note.unlink(missing_ok=True)
            found = _sha256(part)
            if not found.startswith(digest):
                part.unlink()
                raise UserError(f"{url}: SHA-256 is {found}, not {digest} as asked for; the download was not kept")
            os.replace(part, path)
            log.info("%s is complete; its SHA-256 is %s, %s", path, found, "as it should be" if digest else _UNKNOWN)
    except (OSError, http.client.HTTPException, ValueError) as error:  # what urllib raises, and a full disk
        raise UserError(
            f"{url}: download failed ({error or type(error).__name__}). Start again to continue where it broke off, or "
            f"bring the file here by other means and give its path, or put it at {path}"
        ) from error


def _receive(url: str, file: BinaryIO, version_note: Path, progress: bool) -> None:
    """Appends to `file` what it still lacks of `url`. A connection that breaks is taken up again while it brings more.

    Raises:
        OSError, HTTPException, ValueError: nothing more comes.
    """
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            if _receive_once(url, file, version_note, progress):
                return
        except (OSError, http.client.HTTPException):
            if file.seek(0, os.SEEK_END) <= before:
                raise
        if file.seek(0, os.SEEK_END) <= before:
            raise OSError(f"the connection breaks off after {file.tell()} bytes, again and again")
        log.info("the connection broke off after %d bytes; continuing", file.tell())


def _receive_once(url: str, file: BinaryIO, version_note: Path, progress: bool) -> bool:
    """One connection; returns whether the file is complete afterwards."""
    have = file.seek(0, os.SEEK_END)
    version = version_note.read_text() if version_note.is_file() else ""
    if have and not version:  # a part of nobody knows what
        file.truncate(have := 0)
    request = urllib.request.Request(url, headers={"User-Agent": "swin"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)  # a file that has changed since comes whole
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS_WITHOUT_AN_ANSWER)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        version_note.unlink(missing_ok=True)  # the part is as long as the file or longer: it comes anew
        return _receive_once(url, file, version_note, progress)
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(have := 0)
        version_note.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], leave=False,
            disable=None if progress else True,
        ) as bar:  # fmt: skip
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or file.seek(0, os.SEEK_END) == total


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()
