"""What a part is asked for and what it says: options, and a record that is on disk before the next thing can fail."""

import importlib
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from canvasrt.errors import CanvasRTError, DeviceError

PASSED, FAILED, MISSING = "passed", "failed", "not installed"


class MissingError(Exception):
    """A library that a part needs is not installed: nothing is known of the GPU then."""


class PartError(Exception):
    """A part can't run, and the message says all."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of the command line. ``folder``: for what a part writes. Lengths are tokens, but for ``canvases``."""

    config: Path  # folder of the config.json whose dimensions are measured
    folder: Path
    device: str = "cuda"
    steps: int = 20
    warmup: int = 5
    canvases: tuple[int, ...] = (1, 2, 4, 8)
    context: int = 1024  # committed before the canvas
    contexts: tuple[int, ...] = (512, 4096)  # of the bundle, beside the largest
    prefill: int = 2048
    chunk: int = 512
    tokens: tuple[int, ...] = (256, 512, 1024, 2048)  # of one product
    formulations: tuple[str, ...] = ("dense", "capacity", "sparse")
    seats_factor: int = 4  # seats per expert of the capacity formulation, by the mean
    profile: str | None = None
    bundle: Path | None = None
    checkpoint: Path | None = None
    build: tuple[str, ...] = ()  # options of canvasrt build


@dataclass(slots=True)
class Record:
    """Figures and tables of one part. With ``file``, written after every change: a crash of CUDA leaves what was found.

    ``failures``: what went wrong while the rest of the part went on.
    """

    name: str
    file: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    status: str = FAILED
    reason: str = "the part did not end"

    def note(self, **figures: Any) -> None:
        self.figures |= figures
        self.save()

    def row(self, table: str, **cells: Any) -> None:
        self.tables.setdefault(table, []).append(cells)
        self.save()

    def fail(self, what: str, error: BaseException | str) -> None:
        self.failures.append({"what": what, **described(error)})
        self.save()

    def end(self, error: BaseException | None = None) -> None:
        """The verdict. Without an error, the part passed where nothing was noted as a failure."""
        if isinstance(error, MissingError):
            self.status, self.reason = MISSING, str(error)
        elif error is not None:
            self.status, self.reason = FAILED, described(error)["message"]
            if not self.failures or self.failures[-1]["message"] != self.reason:
                self.failures.append({"what": self.name, **described(error)})
        elif self.failures:
            first, more = self.failures[0], len(self.failures) - 1
            self.status = FAILED
            self.reason = f"{first['what']}: {first['message']}" + (f" (and {more} more)" if more else "")
        else:
            self.status, self.reason = PASSED, ""
        self.save()

    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = {"status": self.status}
        if self.reason:
            found["reason"] = self.reason
        return found | self.figures | self.tables | ({"failures": self.failures} if self.failures else {})

    def save(self) -> None:
        if self.file is not None:
            partial = self.file.with_suffix(".part")
            partial.write_text(json.dumps(self.content(), indent=1, default=str) + "\n", encoding="utf-8")
            partial.replace(self.file)  # whole or not at all: the next line may be the last that this process runs


def described(error: BaseException | str) -> dict[str, str]:
    """Message, and for what nobody expected its type and traceback."""
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, CanvasRTError | DeviceError | PartError | MissingError):
        return {"message": str(error), "type": type(error).__name__}
    text = str(error) or "no message"
    trace = "".join(traceback.format_exception(error))
    return {"message": f"{type(error).__name__}: {text}", "type": type(error).__name__, "traceback": trace}


def library(name: str) -> ModuleType:
    """A module by name. Raises MissingError where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingError(f"{name} is not installed: {error}") from None
