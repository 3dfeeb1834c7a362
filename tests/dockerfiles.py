"""Reads a Dockerfile, and carries out on this machine what is ours in it. No test: what tests of images are made of.

An image's files lie below a folder, and every absolute path of ours (``PATHS``) is rewritten to lie there. A base image
is stood in for by a fresh environment of this machine's Python. What can't be carried out here, such as installing
Debian's packages, has to be named by the caller; what nobody named is an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PATHS = ("opt", "wheels", "build", "models", "etc/canvasrt", "tmp")  # absolute paths that an image of ours has
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_KNOWN = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL", "USER",
    "WORKDIR",
}  # fmt: skip
_OURS = re.compile(rf"(?<![\w.}}/-])/(?={'|'.join(PATHS)})(?=(?:{'|'.join(PATHS)})(?:$|[^\w-]))")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_PAIR = re.compile(r"""([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)""")


class NotUnderstoodError(Exception):
    """A Dockerfile has what this file can't carry out."""


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    flags: tuple[str, ...]
    value: str
    line: int

    def words(self) -> list[str]:
        """Of the exec form, a JSON array."""
        found = json.loads(self.value)
        assert isinstance(found, list)
        return found


@dataclass(frozen=True, slots=True)
class Stage:
    base: str
    name: str
    instructions: tuple[Instruction, ...]

    def last(self, name: str) -> Instruction:
        return [each for each in self.instructions if each.name == name][-1]

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    arguments: dict[str, str]  # before the first FROM
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        (found,) = (stage for stage in self.stages if stage.name == name)
        return found


@dataclass(slots=True)
class Image:
    """What a stage leaves, with paths as they lie here."""

    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: Path = Path("/")
    user: str = ""
    command: list[str] = field(default_factory=list)  # ENTRYPOINT and CMD
    health: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    not_executed: list[str] = field(default_factory=list)


def read(file: Path) -> Dockerfile:
    """Raises NotUnderstoodError for an instruction that is not known."""
    arguments: dict[str, str] = {}
    stages: list[tuple[str, str, list[Instruction]]] = []
    for instruction in _instructions(file.read_text()):
        if instruction.name not in _KNOWN:
            raise NotUnderstoodError(f"{file.name}:{instruction.line}: {instruction.name}")
        if instruction.name == "FROM":
            base, _, name = instruction.value.partition(" AS ")
            stages.append((base, name, []))
        elif stages:
            stages[-1][2].append(instruction)
        else:
            key, _, value = instruction.value.partition("=")
            arguments[key] = value
    return Dockerfile(arguments, tuple(Stage(base, name, tuple(found)) for base, name, found in stages))


def _instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    parts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        parts.append(line.strip().removesuffix("\\").strip())
        if line.rstrip().endswith("\\"):
            continue
        name, _, value = " ".join(parts).partition(" ")
        flags = []
        while value.startswith("--") and name in ("COPY", "HEALTHCHECK", "RUN"):
            flag, _, value = value.partition(" ")
            flags.append(flag)
        found.append(Instruction(name, tuple(flags), value.strip(), number))
        parts = []
    return found


def expand(text: str, values: Mapping[str, str]) -> str:
    """Docker's variables; one without a value is empty."""
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[3]) or found[2] or "", text)


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """``path`` is relative to the context; ``patterns`` are the lines of .dockerignore. The last that fits decides."""
    ignored = False
    places = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for line in patterns:
        pattern = line.strip().removeprefix("!").strip("/")
        if pattern and not pattern.startswith("#") and any(_glob(pattern).fullmatch(place) for place in places):
            ignored = not line.strip().startswith("!")
    return ignored


def _glob(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meant = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meant.get(piece, re.escape(piece)) for piece in pieces))


@dataclass
class Builder:
    """Carries out stages below ``root``, which no other process may use meanwhile."""

    file: Dockerfile
    context: Path
    root: Path
    arguments: Mapping[str, str]  # --build-arg
    elsewhere: Mapping[str, str]  # how a RUN begins that is not carried out here -> why
    machine: Mapping[str, str] = field(default_factory=dict)  # more environment of each RUN
    done: dict[str, Image] = field(default_factory=dict)

    def build(self, name: str) -> Image:
        """Leaves the stage's files in ``root``. Raises NotUnderstoodError, or CalledProcessError of a RUN."""
        image = self._build(name)
        self._taken(name).rename(self.root)
        return image

    def moved(self, text: str) -> str:
        """Paths of ours, where they lie here."""
        return _OURS.sub(f"{self.root}/", text)

    def _build(self, name: str) -> Image:
        if name in self.done:
            return self.done[name]
        stage = self.file.stage(name)
        base = expand(stage.base, {**self.file.arguments, **self.arguments})
        if base in {each.name for each in self.file.stages}:
            image = self._build(base)
            image.arguments = {}  # those of a stage end with it
            shutil.rmtree(self.root, ignore_errors=True)
            self._taken(base).rename(self.root)
        elif base.startswith("python:"):
            self._fresh()
            image = Image({"PATH": f"{self.root}/usr/local/bin:{SYSTEM_PATH}"}, folder=self.root)
        else:
            raise NotUnderstoodError(f"{base} can't be had here")
        for instruction in stage.instructions:
            self._carry_out(instruction, image)
        self.root.rename(self._kept(name))
        self.done[name] = image
        return image

    def _carry_out(self, instruction: Instruction, image: Image) -> None:
        values = {**image.arguments, **image.environment}
        value = expand(self.moved(instruction.value), values)
        match instruction.name:
            case "ARG":
                key, _, default = value.partition("=")
                image.arguments[key] = self.arguments.get(key, default)
            case "ENV" | "LABEL":
                into = image.environment if instruction.name == "ENV" else image.labels
                into.update({key: text.strip('"') for key, text in _PAIR.findall(value)})
            case "WORKDIR":
                image.folder = Path(value)
                image.folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(instruction.flags, instruction.value.split(), image)
            case "RUN":
                self._run(instruction, image)
            case "USER":
                image.user = value
            case "ENTRYPOINT" | "CMD":
                image.command += [self.moved(word) for word in instruction.words()]
            case "HEALTHCHECK":
                image.health = json.loads(instruction.value.removeprefix("CMD "))
            case _:  # EXPOSE, STOPSIGNAL: for whoever runs the image
                pass

    def _run(self, instruction: Instruction, image: Image) -> None:
        if any(instruction.value.startswith(beginning) for beginning in self.elsewhere):
            image.not_executed.append(instruction.value)
            return
        if any(not flag.startswith("--mount=type=cache") for flag in instruction.flags):
            raise NotUnderstoodError(f"line {instruction.line}: RUN {' '.join(instruction.flags)}")
        # pip's own settings of this machine, and its cache: a build has both from where it runs.
        machine = {key: text for key, text in os.environ.items() if key == "HOME" or key.startswith("PIP_")}
        environment = {**machine, **self.machine, **image.arguments, **image.environment}
        command = ["/bin/sh", "-ec", self.moved(instruction.value)]
        subprocess.run(command, check=True, cwd=image.folder, env=environment, stdin=subprocess.DEVNULL)

    def _copy(self, flags: tuple[str, ...], words: list[str], image: Image) -> None:
        *sources, last = words
        target = Path(self.moved(last)) if last.startswith("/") else image.folder / last
        for flag in flags:
            stage = flag.removeprefix("--from=")
            if stage == flag or len(sources) != 1:
                raise NotUnderstoodError(f"COPY {flag}")
            aside = self.root.with_name(f"{self.root.name}.aside-{stage}")
            self.root.rename(aside)  # the other stage is built in its place
            self._build(stage)
            aside.rename(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{self._taken(stage)}{sources[0]}").rename(target)
            return
        patterns = (self.context / ".dockerignore").read_text().splitlines()
        for source in sources:
            start = self.context / source
            for file in sorted(start.rglob("*")) if start.is_dir() else [start]:
                if file.is_file() and not is_ignored(file.relative_to(self.context).as_posix(), patterns):
                    place = target / (file.relative_to(start) if start.is_dir() else file.name)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, place)

    def _kept(self, stage: str) -> Path:
        return self.root.with_name(f"{self.root.name}.{stage}")

    def _taken(self, stage: str) -> Path:
        """Its files, which may be moved: tens of thousands. Whoever wants the stage again builds it again."""
        del self.done[stage]
        return self._kept(stage)

    def _fresh(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        python = getattr(sys, "_base_executable", sys.executable)
        place = self.root / "usr" / "local"
        subprocess.run([python, "-m", "venv", "--without-pip", str(place)], check=True)
        # pip as it lies beside this machine's Python: venv would take seconds to install its own.
        inside = Path("lib") / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        shutil.copytree(Path(sys.prefix) / inside / "pip", place / inside / "pip")
        (place / "bin" / "pip").write_text(f'#!/bin/sh\nexec {place}/bin/python -m pip "$@"\n')
        (place / "bin" / "pip").chmod(0o755)
        (self.root / "tmp").mkdir()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below ``folder``."""
    found = {}
    for file in folder.rglob("*"):
        facts = file.lstat()
        if not file.is_dir() or file.is_symlink():
            found[str(file.relative_to(folder))] = (facts.st_size, facts.st_mtime_ns)
    return found


def size(folder: Path) -> int:
    """Bytes of the files below ``folder``."""
    return sum(length for length, _ in listing(folder).values())
