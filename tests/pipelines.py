"""Pipelines of tests, prepared in this process with a clock that does not wait, and the files of small checkpoints."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from canvasrt.pipeline.lock import Clock, Waiting
from canvasrt.pipeline.prepare import Preparation
from canvasrt.pipeline.product import Product
from canvasrt.pipeline.settings import Pipeline, load_pipeline
from canvasrt.pipeline.steps import Tools
from canvasrt.pipeline.transfer import Credentials


def write(file: Path, **content: Any) -> Path:
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


@dataclass
class Time:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, self.sleep)


class NoChildren:
    def run(self, what: str, command: list[str], environment: Mapping[str, str], lock: int, watched: Path) -> int:
        raise AssertionError(f"no child is wanted: {command}")


@dataclass
class Job:
    """``canvasrt prepare`` in this process."""

    file: Path
    credentials: Credentials = field(default_factory=Credentials)
    said: list[str] = field(default_factory=list)
    time: Time = field(default_factory=Time)
    children: Any = field(default_factory=NoChildren)
    timeout: float | None = None
    made: list[str] = field(default_factory=list)  # names of folders

    def run(self) -> Product:
        return self._do("run")

    def wait(self) -> Product:
        return self._do("wait")

    def _do(self, what: str) -> Product:
        tools = Tools(self.said.append, self.credentials, dict(os.environ), self.children, self.time.clock)
        waiting = Waiting(self.said.append, self.time.clock, timeout=self.timeout)
        job = Preparation(self.pipeline, tools, waiting)
        product: Product = getattr(job, what)()
        self.made = [folder.name for folder in job.made]
        return product

    @property
    def pipeline(self) -> Pipeline:
        return load_pipeline(self.file)

    @property
    def log(self) -> str:
        return "\n".join(self.said)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def flip(file: Path, place: int = -1) -> None:
    """Changes one byte and neither size nor name."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def everything_below(folder: Path) -> str:
    """Names and content of all small files, to be searched for what must not be there."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".safetensors")]
    return "\n".join(f"{file}: {file.read_bytes()!r}" for file in files)
