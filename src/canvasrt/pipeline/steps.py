"""What every stage of a pipeline is to the one that runs them, and the checkpoint that needs no stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from canvasrt.checkpoint import Checkpoint
from canvasrt.pipeline.lock import Clock, Lock
from canvasrt.pipeline.settings import Verify
from canvasrt.pipeline.transfer import Credentials, Say


@dataclass(frozen=True, slots=True)
class State:
    """Of a product on the volume. ``why`` completes "FOLDER ..." for all but whole.

    broken: ours and damaged. other: ours, and made from something else. foreign: not ours, so left alone.
    """

    kind: Literal["whole", "missing", "broken", "other", "foreign"]
    why: str = ""


WHOLE = State("whole")


@dataclass(frozen=True, slots=True)
class Tools:
    """What a stage works with. ``environment`` is that of child processes, which get no token."""

    say: Say
    credentials: Credentials
    environment: Mapping[str, str]
    children: "Children"
    clock: Clock = field(default_factory=Clock)


class Children(Protocol):
    def run(self, what: str, command: list[str], environment: Mapping[str, str], lock: int, watched: Path) -> int:
        """The exit code; a negative one for a signal. ``lock`` is a descriptor that the child holds on to."""


class Step(Protocol):
    """One product and how it is made. ``needs`` is what must be there first to make it."""

    folder: Path
    needs: "Step | None"

    def state(self, verify: Verify) -> State:
        """Raises CheckpointError where an input that nobody can make is missing or damaged."""

    def make(self, tools: Tools, lock: Lock, state: State) -> None:
        """Makes the product, or makes it again, from what ``state`` found. The lock is held, ``needs`` is whole."""


class InPlace:
    """A checkpoint in a folder of the user's: never copied, made or changed."""

    needs: "Step | None" = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state(self, verify: Verify) -> State:
        Checkpoint.open(self.folder)
        return WHOLE

    def make(self, tools: Tools, lock: Lock, state: State) -> None:
        raise AssertionError("a checkpoint that is used in place is whole, or its state raises")
