"""What tritonserver and the model in it write: passes on what a user wants to see and keeps the last lines.

Until the server is ready it writes pages about itself, which are shown only when it fails.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import BinaryIO

STOPPED = '"event": "stopped"'  # in the model's log
LOST = '"event": "engine lost"'
_LAST, _SHOWN = 40, 15
_OWN = re.compile(r"^\S+ ([IWEF]) \d+ \w+\.(cc|h):\d+\] ")  # not a line of the model, whose source is a .py
_TABLE = re.compile(r"^([+|]|\s*$)")
_REFUSAL = re.compile(
    r"is at UNAVAILABLE state: (?:\w+: )?(TritonModelException|\w+): (.*?)(?:\n+At:\n|\n?;?\n*\Z)", re.S
)


class TritonLog:
    def __init__(self, show: Callable[[str], None], verbose: bool) -> None:
        self._show = show
        self._verbose = verbose
        self._started = False
        self._refused = False
        self.stopped = asyncio.Event()  # the model has answered everybody and lets go of what it holds
        self.lost = asyncio.Event()  # the model's engine process has ended, which the model can't mend
        self._last: deque[str] = deque(maxlen=_LAST)

    async def read(self, output: BinaryIO) -> None:
        """Until the pipe ends."""
        stream = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), output)
        rest = b""
        while chunk := await stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._line(line.decode(errors="replace"))
        if rest:
            self._line(rest.decode(errors="replace"))

    @property
    def refusal(self) -> str | None:
        """The sentence with which the model refused to load, where it did."""
        return model_error("\n".join(self._last))

    def show_last(self) -> None:
        if not self._verbose:
            for line in list(self._last)[-_SHOWN:]:
                self._pass_on(line)

    def _pass_on(self, line: str) -> None:
        self._show(line if line.startswith("{") else f"triton: {line}")  # the model's log stays JSON

    def _line(self, line: str) -> None:
        table = _TABLE.match(line) is not None
        if not table:
            self._last.append(line)
        own = _OWN.match(line)
        if "Started HTTPService" in line:
            self._started = True
        # Not Triton's own "All models are stopped": it counts no streams, and says so while they still run.
        if line.startswith("{") and STOPPED in line:
            self.stopped.set()
        if line.startswith("{") and LOST in line:
            self.lost.set()
        self._refused = self._refused or line.startswith("error: creating server")  # a traceback follows
        loud = not self._refused if own is None else self._started and own[1] != "I"
        if self._verbose or (loud and not table):
            self._pass_on(line)


def model_error(text: str) -> str | None:
    """The model's own sentence in Triton's words about a model that can't be loaded; None where it has none."""
    found = list(_REFUSAL.finditer(text))
    return found[-1][2].strip() if found and found[-1][1] == "TritonModelException" else None
