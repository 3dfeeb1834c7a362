"""Child processes of a stage: signs of life while one runs, and an end with their whole group."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from canvasrt.errors import ServerError
from canvasrt.pipeline.fetch import size
from canvasrt.pipeline.transfer import Say, bytes_in

_REPORT_SECONDS = 30.0
_END_SECONDS = 10.0  # from asking a child to end to killing it


class ChildProcesses:
    """One at a time."""

    def __init__(self, say: Say, report_seconds: float = _REPORT_SECONDS) -> None:
        self._say, self._seconds = say, report_seconds
        self._running: subprocess.Popen[bytes] | None = None

    def run(self, what: str, command: list[str], environment: Mapping[str, str], lock: int, watched: Path) -> int:
        """Its exit code, minus the number of the signal that ended it. What it prints goes to standard error."""
        began = time.monotonic()
        try:
            # In a session of its own, so that all that it starts can be ended with it. It inherits the lock: where this
            # process is killed and the child goes on, nobody else begins the same.
            self._running = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            raise ServerError(f"{what} can't be started: {error.strerror}") from None
        try:
            while True:
                try:
                    return self._running.wait(self._seconds)
                except subprocess.TimeoutExpired:
                    took = time.monotonic() - began
                    self._say(f"{what}: {took:.0f} s so far, {size(bytes_in(watched))} written")
        finally:
            self.end()

    def end(self) -> None:
        """Ends what runs; for a signal handler too, whose caller never goes on."""
        child, self._running = self._running, None
        if child is None or child.returncode is not None:
            return
        with suppress(ProcessLookupError, ChildProcessError):
            os.killpg(child.pid, signal.SIGTERM)
            limit = time.monotonic() + _END_SECONDS
            # Not child.wait(): where a signal came into one, its lock is held.
            while os.waitpid(child.pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > limit:
                    os.killpg(child.pid, signal.SIGKILL)
                time.sleep(0.05)
            child.returncode = -signal.SIGTERM  # it was waited for, which nobody else can do again
