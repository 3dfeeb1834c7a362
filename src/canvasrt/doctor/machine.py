"""What the checks ask of a machine, and the one that they run on. Nothing here waits longer than it was told to.

Knows nothing of what answers mean.
"""

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

Command = tuple[str, ...]
Answers = Mapping[Command, "Answer"]

MOST_OUTPUT = 32 << 20  # bytes of one answer: the nodes of a large cluster
_KILLED_SECONDS = 1.0  # a process that waits for a driver does not even die
_DISK_SECONDS = 5.0  # a network folder whose server is gone never answers


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one command. ``problem`` says why there is no exit code."""

    out: str = ""
    err: str = ""
    code: int | None = None
    problem: str = ""
    missing: bool = False  # there is no such program

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def said(self) -> str:
        """Why it did not succeed, in one line of at most 200 characters."""
        words = " ".join(f"{self.err} {self.out}".split()) or "nothing"
        return self.problem or f"exit code {self.code}: {words}"[:200]


@dataclass(frozen=True, slots=True)
class System:
    name: str  # "Linux"
    release: str  # of the kernel
    machine: str  # "x86_64"
    glibc: str | None  # "2.36"; None without glibc
    python: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Disk:
    place: str  # the nearest folder that exists
    total_bytes: int
    free_bytes: int


class Machine(Protocol):
    """A machine, as the checks see it. No method raises but `triton`, and none hangs."""

    @property
    def system(self) -> System: ...

    @property
    def environment(self) -> Mapping[str, str]: ...

    def run(self, command: Command, timeout: float) -> Answer: ...

    def stop(self) -> None:
        """Ends every command that runs, and each that starts later."""
        ...

    def read(self, path: str) -> str | None:
        """A small text file; None where it can't be read."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies in a folder; empty where it can't be read."""
        ...

    def disk(self, path: str) -> Disk | None: ...

    def port_problem(self, port: int) -> str:
        """Why a server could not listen there; empty where it could."""
        ...

    def version(self, package: str) -> str | None:
        """Of an installed Python package, which is not imported."""
        ...

    def triton(self) -> str:
        """Where Triton is. Raises InputError where there is none."""
        ...


class ThisMachine:
    """``environment`` is passed on to the commands; ``find_triton`` gets its PATH and raises InputError."""

    def __init__(self, environment: Mapping[str, str], find_triton: Callable[[str], str]) -> None:
        self.environment = environment
        self._find_triton = find_triton
        self._running: set[int] = set()  # process groups
        self._stopped = False

    @property
    def system(self) -> System:
        return System(
            platform.system(),
            platform.release(),
            platform.machine(),
            _glibc(),
            (sys.version_info[0], sys.version_info[1]),
        )

    def run(self, command: Command, timeout: float) -> Answer:
        program = shutil.which(command[0], path=self.environment.get("PATH", os.defpath))
        if program is None:
            return Answer(problem=f"{command[0]} was not found", missing=True)
        # Files, not pipes: a grandchild that outlives its parent would hold a pipe open for ever.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    (program, *command[1:]),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=dict(self.environment),
                    start_new_session=True,  # so that a timeout ends its children too
                )
            except (OSError, ValueError) as error:
                return Answer(problem=f"{command[0]} could not be started: {error}")
            self._running.add(process.pid)
            try:
                code = process.wait(0 if self._stopped else timeout)
            except subprocess.TimeoutExpired:
                _kill(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_KILLED_SECONDS)
                return Answer(problem=f"{command[0]} gave no answer within {timeout:g} seconds")
            except BaseException:  # Ctrl-C
                _kill(process.pid)
                raise
            finally:
                self._running.discard(process.pid)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read(MOST_OUTPUT).decode(errors="replace"))
            return Answer(texts[0], texts[1], code)

    def stop(self) -> None:
        self._stopped = True
        for group in list(self._running):
            _kill(group)

    def read(self, path: str) -> str | None:
        try:
            with open(path, "rb") as file:
                return file.read(1 << 20).decode(errors="replace")
        except (OSError, ValueError):
            return None

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except (OSError, ValueError):
            return []

    def disk(self, path: str) -> Disk | None:
        return _within(_DISK_SECONDS, lambda: _disk(Path(path)))

    def port_problem(self, port: int) -> str:
        try:
            with socket.socket() as probe:
                probe.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # as servers do: old connections don't count
                probe.bind(("0.0.0.0", port))
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def version(self, package: str) -> str | None:
        try:
            return version(package)
        except (PackageNotFoundError, OSError, ValueError, KeyError):  # the others: a damaged installation
            return None

    def triton(self) -> str:
        return self._find_triton(self.environment.get("PATH", os.defpath))


def ask(machine: Machine, commands: Iterable[tuple[Command, float]]) -> dict[Command, Answer]:
    """All commands at once, each with its timeout in seconds."""
    wanted = dict(commands)
    if not wanted:
        return {}
    with ThreadPoolExecutor(len(wanted)) as pool:
        try:
            given = {command: pool.submit(machine.run, command, timeout) for command, timeout in wanted.items()}
            return {command: answer.result() for command, answer in given.items()}
        except BaseException:  # Ctrl-C: the pool waits for its threads, and they for their commands
            machine.stop()
            raise


def _kill(group: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def _glibc() -> str | None:
    try:
        name, _, number = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        return None
    return number if name == "glibc" else None


def _disk(path: Path) -> Disk | None:
    path = path.absolute()
    for place in (path, *path.parents):
        if place.is_dir():
            usage = shutil.disk_usage(place)
            return Disk(str(place), usage.total, usage.free)
    return None


def _within(seconds: float, function: Callable[[], Disk | None]) -> Disk | None:
    found: list[Disk | None] = []

    def run() -> None:
        with contextlib.suppress(OSError, ValueError):
            found.append(function())

    thread = threading.Thread(target=run, daemon=True)  # a daemon: one that hangs does not keep the process
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
