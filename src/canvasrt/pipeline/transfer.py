"""What all sources of files share: which names are taken, partial files that are gone on with, retries, the disk.

Names and sizes come from outside and are not trusted. Knows nothing of any protocol.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Protocol

from canvasrt.bundle.staging import free_bytes
from canvasrt.errors import CapacityError, InputError, ServerError
from canvasrt.pipeline.lock import Clock

Kind = Literal["checkpoint", "bundle"]
Say = Callable[[str], None]

PART = ".part"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_CHECKPOINT_FILES = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", "tokenizer.model")
_NO_BUNDLE_FILES = (".md", ".py", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", PART)
_NEEDED = {"checkpoint": "config.json", "bundle": "manifest.json"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIES = 5  # without a byte of progress
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds
_SPARE_BYTES = 64 << 20  # left free on the disk
_AT_ONCE = 4  # files


@dataclass(frozen=True, slots=True)
class Credentials:
    """From the environment, read in cli/. Never printed: no repr shows them, and `scrub` takes them out of texts."""

    hf_token: str | None = field(default=None, repr=False)
    hf_endpoint: str | None = field(default=None, repr=False)
    aws_key: str | None = field(default=None, repr=False)
    aws_secret: str | None = field(default=None, repr=False)
    aws_session: str | None = field(default=None, repr=False)
    oci_username: str | None = field(default=None, repr=False)
    oci_password: str | None = field(default=None, repr=False)

    def scrub(self, text: str) -> str:
        for each in fields(self):
            value = getattr(self, each.name)
            if value and each.name not in ("hf_endpoint", "oci_username"):
                text = text.replace(value, "***")
        text = re.sub(r"://[^/@\s]*@", "://***@", " ".join(text.split()))
        return re.sub(r"\?[^\s)'\"]*=[^\s)'\"]*", "?***", text)  # of addresses that are signed


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """``version`` differs where the content does; ``digest`` is "sha256:HEX" or "git:HEX", None where none is told."""

    name: str
    nbytes: int
    version: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one state of a source; ``revision`` names that state, so that it can be asked for again."""

    revision: str | None
    files: tuple[RemoteFile, ...]


class Origin(Protocol):
    """A source. Raises InputError for what trying again can't mend, ServerError for what it may."""

    def listing(self, revision: str | None) -> Listing:
        """``revision``: of an earlier listing, to be gone on with; None for what the source names today."""

    def download(self, listing: Listing, files: tuple[RemoteFile, ...], folder: Path) -> None:
        """``files``, some of the listing's, into ``folder``; each has its name only when it has all its bytes."""

    def close(self) -> None:
        """Lets go of all connections."""


def taken(name: str, kind: Kind) -> bool:
    """Whether a file of a source belongs to what is fetched. Raises InputError for a name that is not plain."""
    if kind == "checkpoint" and not name.endswith(_CHECKPOINT_FILES):
        return False
    if kind == "bundle" and (name.endswith(_NO_BUNDLE_FILES) or name.startswith(".git")):
        return False
    if _NAME.fullmatch(name) is None:
        raise InputError(
            f"the source has a file named {name[:100]!r}, which is not a plain file name and could lead out of its "
            "folder: do not trust this source"
        )
    return True


def check_listing(where: str, kind: Kind, listing: Listing) -> None:
    """Raises InputError for a source that holds no checkpoint or bundle, or the same name twice."""
    names = [file.name for file in listing.files]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise InputError(f"{where} lists the file {twice} twice: do not trust this source")
    if _NEEDED[kind] not in names:
        there = f"{len(names)} other files" if names else "nothing"
        raise InputError(
            f"{where} holds no {kind}: there is no {_NEEDED[kind]} at its top, but {there}. Check the name"
        )


def check_room(folder: Path, listing: Listing) -> None:
    """Raises CapacityError where what is missing in ``folder`` does not fit on its disk."""
    total = sum(file.nbytes for file in listing.files)
    needed = max(total - bytes_in(folder), 0)
    free = free_bytes(folder)
    if needed and free < needed + _SPARE_BYTES:
        raise CapacityError(
            f"no room for {folder}: {total:,} bytes in all, {needed:,} of them still missing, and {free:,} are free "
            "on that disk. Make room, or give a larger volume"
        )


def bytes_in(folder: Path) -> int:
    """Of all files below a folder, also while others come and go."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def bytes_of_files(folder: Path) -> int:
    """Of the files right in a folder: what a library keeps beside them for itself is no progress."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """A full disk becomes CapacityError, other errors of the system InputError."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, place) from None


def disk_error(error: OSError, place: Path) -> CapacityError | InputError:
    if error.errno in _FULL:
        why = {errno.EFBIG: "files may not grow larger here", errno.EDQUOT: "the quota is used up"}
        return CapacityError(
            f"can't write {place}: {why.get(error.errno or 0, 'the disk is full')}, {free_bytes(place):,} bytes free. "
            "Make room, then run the same command again: it goes on where it was"
        )
    return InputError(f"can't write {place}: {error.strerror or error}")


def download_part(file: RemoteFile, folder: Path, read: Callable[[int], tuple[int, Iterable[bytes]]]) -> None:
    """One file, gone on with where it was cut off. ``read`` gets the bytes that are there, and gives those from which
    it begins (the same, or 0) and what follows.

    Raises ServerError where the bytes are too few or too many, and as ``read``.
    """
    part = folder / (file.name + PART)
    have = part.stat().st_size if part.exists() else 0
    if have >= file.nbytes:
        have = 0
    start, chunks = read(have)
    with disk_errors(part):
        stream = part.open("r+b" if start else "wb")
    with stream:
        stream.truncate(start)
        stream.seek(start)
        done = start
        for chunk in chunks:
            done += len(chunk)
            if done > file.nbytes:
                break
            with disk_errors(part):
                stream.write(chunk)
        with disk_errors(part):
            stream.flush()
            os.fsync(stream.fileno())
    if done != file.nbytes:
        if done > file.nbytes:
            part.unlink()
        raise ServerError(f"{file.name} was cut off after {done:,} of {file.nbytes:,} bytes")
    os.replace(part, folder / file.name)


def several(action: Callable[[RemoteFile], None], files: Iterable[RemoteFile]) -> None:
    """A few files at once; raises the first failure."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(action, file) for file in files]:
            done.result()


def with_retries(action: Callable[[], None], progress: Callable[[], int], say: Say, clock: Clock) -> None:
    """Again after a ServerError, with growing pauses; gives up after five in a row without progress."""
    tries, before = 0, progress()
    while True:
        try:
            return action()
        except ServerError as error:
            now = progress()
            tries = 1 if now > before else tries + 1
            before = now
            if tries >= _TRIES:
                raise ServerError(f"{error}; given up after {tries} tries") from None
            pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE)
            say(f"{error}; trying again in {pause:.0f} s")
            clock.sleep(pause)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it; nothing where there is nothing."""
    with disk_errors(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
