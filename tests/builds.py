"""Bundles that the real compiler makes, each built once for all tests and workers, and ``canvasrt build`` as a process.

A build takes seconds of a core: whoever asks first builds, the others wait for the same one.
"""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from canvasrt.bundle.reader import EngineBundle
from canvasrt.cli.main import main
from layouts import LAYOUTS, Export, export
from planning import DEMO, PUBLISHED, ROOT
from tiny import Dims, write

TINY = Dims(layers="f", mlp=48, expert_size=32)  # the smallest that every format divides into
CAPABILITIES = {"rtx-4090": "8.9", "l40s": "8.9", "rtx-5090": "12.0", "rtx-pro-6000": "12.0", "dgx-spark": "12.1"}
WIDE = "wide-"  # and a number of layers: with the 26B's widths, from a config.json
FIRST = "first-"


def canvasrt(
    *arguments: object, before: Callable[[], None] | None = None, cwd: Path = ROOT, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "canvasrt.cli.main", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, cwd=cwd, preexec_fn=before
    )


def run_here(*arguments: object) -> tuple[int, str, str]:
    """``canvasrt`` in this process: exit code, standard output, standard error. Raises what would be a traceback."""
    before, out, said = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["canvasrt", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), said.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line did not end with an exit code")


def options(checkpoint: Path, profile: str, out: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--profile", profile, "--out", str(out), *more]


@dataclass(frozen=True)
class Built:
    """A bundle, what it was built from, and what the command printed."""

    checkpoint: Path
    path: Path
    printed: dict[str, Any]  # with --json
    said: str  # standard error

    def open(self) -> EngineBundle:
        return EngineBundle.open(self.path)

    @property
    def plan(self) -> bytes:
        return (self.path / "text.engine").read_bytes()


class Builds:
    """``folder`` is one for all workers of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._exports: dict[str, Export] = {}

    def checkpoint(self, name: str) -> Path:
        """demo, one of layouts.LAYOUTS (the demo in it), own-int4 (by canvasrt quantize), tiny, tiny-LAYOUT, wide-N,
        published (the 26B's config.json), or first-N (the same, for its first layers)."""
        if name in ("demo", "published"):
            return DEMO if name == "demo" else PUBLISHED
        return self._once(f"checkpoint-{name}", lambda folder: self._make(name, folder))

    def export(self, name: str) -> Export:
        """What reading a checkpoint in a layout must give."""
        if name not in self._exports:
            source = self.checkpoint("tiny") if name.startswith("tiny-") else DEMO
            layout = next(each for each in LAYOUTS if each == name.removeprefix("tiny-"))
            self._exports[name] = export(source, layout)
        return self._exports[name]

    def bundle(self, checkpoint: str, profile: str, *more: str) -> Built:
        """Raises AssertionError with what the command said where it fails."""
        source = self.checkpoint(checkpoint)
        name = "-".join(["bundle", checkpoint, profile, *more]).replace("/", "_")

        def build(folder: Path) -> None:
            done = canvasrt("build", *options(source, profile, folder / "out", *more), "--json")
            (folder / "said.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

        folder = self._once(name, build)
        code, printed, said = json.loads((folder / "said.json").read_text())
        assert code == 0, said
        return Built(source, folder / "out", json.loads(printed), said)

    def _make(self, name: str, folder: Path) -> None:
        if name == "tiny":
            write(folder, TINY)
        elif name == "own-int4":
            arguments = (DEMO, "--recipe", "int4-experts", "--out", folder, "--no-report")
            done = canvasrt("quantize", *arguments)
            assert done.returncode == 0, done.stderr
        elif name.startswith(WIDE):
            (folder / "config.json").write_text(json.dumps(widths_of_the_26b(int(name.removeprefix(WIDE)))))
        elif name.startswith(FIRST):
            (folder / "config.json").write_text(json.dumps(first_layers_of_the_26b(int(name.removeprefix(FIRST)))))
        else:
            self.export(name).write(folder)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self._folder / name
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / ".done").exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                (folder / ".done").touch()
        return folder


def shared_folder(base: Path) -> Path:
    """The folder of a run that all its workers see; ``base`` is pytest's of this worker."""
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "builds"
    folder.mkdir(exist_ok=True)
    return folder


def widths_of_the_26b(layers: int) -> dict[str, Any]:
    """A config.json with its widths, experts and heads, but few layers (the last one full) and a small vocabulary."""
    config: dict[str, Any] = json.loads((PUBLISHED / "config.json").read_text())
    text = config["text_config"]
    text["layer_types"] = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    text["num_hidden_layers"], text["vocab_size"], config["image_token_id"] = layers, 1024, 1000
    return config


def first_layers_of_the_26b(layers: int) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PUBLISHED / "config.json").read_text())
    text = config["text_config"]
    text["layer_types"], text["num_hidden_layers"] = text["layer_types"][:layers], layers
    return config


def plain_values(checkpoint: Path) -> dict[str, np.ndarray]:
    """float32 of every tensor of a checkpoint that is not quantized, rounded to BF16."""
    stored = load_file(checkpoint / "model.safetensors")
    return {name: tensor.bfloat16().float().numpy() for name, tensor in stored.items()}


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a folder: its inode, time of change and content."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in files
    }


def option_of(arguments: Sequence[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None
