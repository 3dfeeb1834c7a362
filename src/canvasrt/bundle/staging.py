"""A folder that appears whole or not at all: made beside its place under another name, renamed when it is complete.

One build at a time for each target, by a lock that the system drops when its holder dies. Knows nothing of what lies
in the folder, except how to tell a bundle from somebody's other files.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from canvasrt.bundle.manifest import MANIFEST
from canvasrt.errors import BundleError, CanvasRTError, CapacityError

_SUFFIXES = (".partial", ".replaced")
_MARKER = ".canvasrt-build"  # in a partial folder: ours, so it may be cleaned up
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, a damaged one too: its manifest says so near its start."""
    try:
        with (folder / MANIFEST).open("rb") as stream:
            return b'"format_version"' in stream.read(256)
    except OSError:
        return False


def refuse_target(target: Path, force: bool) -> None:
    """Raises BundleError for a place where a new bundle may not be put."""
    if target.name.endswith(_SUFFIXES):
        raise BundleError(f"{target}: names that end in {' or '.join(_SUFFIXES)} are those of unfinished builds")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise BundleError(f"{target} exists and is not a folder: name another place for the bundle")
    if not any(target.iterdir()):
        return
    if not is_bundle(target):
        raise BundleError(
            f"{target} holds other files and is not a bundle, so it is left alone: name another folder, or empty it"
        )
    if not force:
        raise BundleError(f"{target} holds a bundle already: name another folder, or replace it with --force")


class Staging:
    """``open`` it, fill ``folder``, ``publish`` it; ``discard`` in any case. Not for use by several threads."""

    def __init__(self, target: Path, force: bool) -> None:
        self.target = Path(os.path.realpath(target))  # a link to a bundle stays, what it leads to is replaced
        if not self.target.name:
            raise BundleError(f"{target} can't be a bundle: name a folder in it")
        self.folder = self.target.with_name(f"{self.target.name}.partial")
        self._replaced = self.target.with_name(f"{self.target.name}.replaced")
        self._lock_file = self.target.with_name(f".{self.target.name}.lock")
        self._force = force
        self._lock: int | None = None

    def open(self) -> None:
        """Makes an empty folder, in place of what a build that died has left."""
        refuse_target(self.target, self._force)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self._recover()
        refuse_target(self.target, self._force)
        for folder in (self.folder, self._replaced):
            if os.path.lexists(folder) and not _is_leftover(folder):
                raise BundleError(
                    f"{folder} is in the way: a build uses this name, and what is there is not of an earlier build. "
                    "Move it, or name another target"
                )
        _clean(self.folder)
        self.folder.mkdir()
        (self.folder / _MARKER).touch()

    def publish(self) -> None:
        """Gives the folder its name. A crash leaves what was there before or what is new, whole."""
        refuse_target(self.target, self._force)
        (self.folder / _MARKER).unlink()  # from here on it is known by its manifest
        sync_folder(self.folder)
        if not is_bundle(self.target):
            os.rename(self.folder, self.target)  # over nothing, or over an empty folder
        elif not _exchange(self.folder, self.target):
            _clean(self._replaced)
            os.rename(self.target, self._replaced)  # a crash just here is repaired by _recover
            os.rename(self.folder, self.target)
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Removes all but the target, and lets others build it. Does nothing the second time."""
        if self._lock is None:
            return
        try:
            self._recover()
            if _is_leftover(self.folder):
                _clean(self.folder)
        finally:
            lock, self._lock = self._lock, None
            try:
                # The name goes before the lock: who opened this file and waits finds that it is no longer the one.
                self._lock_file.unlink(missing_ok=True)
            finally:
                os.close(lock)

    def _take_lock(self) -> None:
        while True:
            lock = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(lock, self._lock_file):
                    self._lock = lock
                    return
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise BundleError(
                        f"another build of {self.target} is running: wait for it, or name another target"
                    ) from None
                if error.errno in _NO_LOCKS:
                    raise BundleError(
                        f"the file system of {self.target.parent} has no locks, so two builds could mix: build on "
                        "another one and copy the bundle"
                    ) from None
                raise
            finally:
                if self._lock is None:
                    os.close(lock)

    def _recover(self) -> None:
        """Finishes or takes back a replacement that was cut off between its two renames."""
        if _is_leftover(self._replaced):
            if is_bundle(self.target):
                _clean(self._replaced)
            elif not self.target.exists():
                os.rename(self._replaced, self.target)


@contextlib.contextmanager
def disk_errors(place: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk into CapacityError, and what else the system says into BundleError."""
    try:
        yield
    except CanvasRTError:
        raise
    except OSError as error:
        raise disk_error(error, place, needed_bytes) from None


def disk_error(error: OSError, place: Path, needed_bytes: int | None = None) -> CanvasRTError:
    """What an error of the system means to the user; ``needed_bytes`` is what was still to be written there."""
    if error.errno not in _FULL:
        return BundleError(f"can't write {place}: {error.strerror or error}")
    needs = "" if needed_bytes is None else f", at least {needed_bytes:,} bytes more are needed"
    if error.errno == errno.EFBIG:
        return CapacityError(f"can't write {place}: files may not grow larger here{needs}. Raise the limit (ulimit -f)")
    free = free_bytes(place)
    cause = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    return CapacityError(f"can't write {place}: {cause}: {free:,} bytes free{needs}. Make room, then build again")


def free_bytes(place: Path) -> int:
    """Free on the disk of a path that need not exist yet."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't, and need not
            raise
    finally:
        os.close(handle)


def _is_leftover(folder: Path) -> bool:
    """Whether a folder is what an earlier build left, and so may be removed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / _MARKER).exists() or is_bundle(folder) or not any(folder.iterdir())


def _clean(folder: Path) -> None:
    if not folder.exists():
        return
    # What tells that it is ours goes last, so that a removal that was cut off can be finished.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == _MARKER, path.name == MANIFEST)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def _same_file(handle: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino) and stat.S_ISREG(held.st_mode)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system can't."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(second))
