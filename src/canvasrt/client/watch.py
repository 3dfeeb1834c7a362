"""Notices that a server is gone although the connection stands: Triton never answers what its dead process held.

Knows nothing of gRPC.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from canvasrt.errors import BusyError, CanvasRTError, TimedOutError

_LOOKS_PER_QUIET = 4
_LONGEST_SLEEP = 1.0


class Watched(Protocol):
    """A request that waits for its next response."""

    last_heard: float  # by time.monotonic()

    def give_up(self, reason: CanvasRTError) -> None:
        """Ends it with that error, from any thread."""
        ...


class Watch:
    """Calls ``ping`` when a request was quiet for ``quiet_seconds``, and gives up the quiet ones where it fails.

    A server that answers pings may still have lost a request, so ``silence_seconds`` without a response end it too.
    """

    def __init__(self, ping: Callable[[], object], quiet_seconds: float, silence_seconds: float) -> None:
        self._ping = ping
        self._quiet_seconds = quiet_seconds
        self._silence_seconds = silence_seconds
        self._watched: set[Watched] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, watched: Watched) -> None:
        with self._lock:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="canvasrt-watch", daemon=True)
                self._thread.start()

    def discard(self, watched: Watched) -> None:
        with self._lock:
            self._watched.discard(watched)

    def stop(self) -> list[Watched]:
        """Ends the thread and returns what is still watched."""
        self._stop.set()
        with self._lock:
            return list(self._watched)

    def join(self) -> None:
        """Waits for the thread, which may be in a ping."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        asked = time.monotonic()
        while not self._stop.wait(min(self._quiet_seconds / _LOOKS_PER_QUIET, _LONGEST_SLEEP)):
            now = time.monotonic()
            for each in self._silent(now, self._silence_seconds):
                each.give_up(TimedOutError(f"the server sent nothing for {self._silence_seconds:g} seconds"))
            quiet = self._silent(now, self._quiet_seconds)
            if quiet and now - asked >= self._quiet_seconds:
                asked = now
                try:
                    self._ping()
                except BusyError:
                    continue  # a server that is stopping refuses even pings, and still ends what it has begun
                except CanvasRTError as error:
                    for each in self._silent(now, self._quiet_seconds):
                        each.give_up(error)

    def _silent(self, now: float, seconds: float) -> list[Watched]:
        with self._lock:
            return [each for each in self._watched if now - each.last_heard >= seconds]
