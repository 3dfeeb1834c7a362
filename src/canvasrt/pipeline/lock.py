"""One maker at a time for a product: a lock that the system drops when its last holder is gone.

Children inherit it (``Lock.descriptor``), so a child that outlives a killed maker keeps others out until it ends.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from canvasrt.errors import InputError, TimedOutError

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_TRY_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Clock:
    """Injectable, so that tests need not wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class Waiting:
    """How a wait goes: ``say`` takes a line every ``every`` seconds; given up after ``timeout``, if not None."""

    say: Callable[[str], None]
    clock: Clock = Clock()
    every: float = 10.0
    timeout: float | None = None


def lock_file(folder: Path) -> Path:
    # Not .NAME.lock: that is the one of `canvasrt build`, which must find it free while its parent holds this one.
    return folder.with_name(f".{folder.name}.prepare.lock")


class Lock:
    """A context manager. Raises InputError where the file system has no locks or can't be written, TimedOutError."""

    def __init__(self, folder: Path, waiting: Waiting) -> None:
        self._folder, self._waiting = folder, waiting
        self.descriptor = -1

    def __enter__(self) -> "Lock":
        file = lock_file(self._folder)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"can't write {file.parent}: {error.strerror}. The volume must be writable to prepare a product; "
                "check where it is mounted, and as whom"
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self.descriptor)
            raise
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: removing it would let two processes lock two files of the same name.
        os.close(self.descriptor)

    def _take(self) -> None:
        clock = self._waiting.clock
        began = told = clock.now()
        waited = False
        while not self._try():
            now = clock.now()
            if not waited or now - told >= self._waiting.every:
                so_far = f", {now - began:.0f} s so far" if waited else ""
                self._waiting.say(f"waiting for {self._holder()}, who makes {self._folder}{so_far}")
                waited, told = True, now
            if self._waiting.timeout is not None and now - began >= self._waiting.timeout:
                raise TimedOutError(
                    f"{self._folder} is still being made by {self._holder()} after {now - began:.0f} s: run this again "
                    "later, or give --timeout more"
                )
            clock.sleep(_TRY_SECONDS)

    def _try(self) -> bool:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno in _NO_LOCKS:
                raise InputError(
                    f"the file system of {self._folder.parent} has no locks, so two processes could write the same "
                    "product: prepare it on another volume and copy it"
                ) from None
            raise
        return True

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(os.pread(self.descriptor, 4096, 0))
            return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
        return "another process"
