"""Small checkpoints and bundles of them: what can be checked on any GPU in seconds."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canvasrt.bundle.reader import EngineBundle
from canvasrt.compile.buildplan import BuildPlan
from canvasrt.compile.job import build, prepare
from canvasrt.ops.tensorrt_api import load_compiler
from canvasrt.profiles.profile import GpuProfile, Moe
from canvasrt.runtime.open_bundle import BundleOptions, Hardware, open_bundle
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from gpu_parts.floors import gpu_profile
from gpu_parts.record import Options, PartError, library

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DEMO = ROOT / "examples" / "sudoku" / "checkpoint"  # trained, with tokenizer and prompts
CONTEXT, CHUNK, MOST_CANVASES = 72, 16, 2
DENSE = Moe(formulation="dense")


def tests_module(name: str) -> Any:
    """A helper of tests/, which are no package."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return library(name)


def small_checkpoint(folder: Path) -> Path:
    """Every kind of layer, and a context that is longer than the window."""
    library("transformers")
    tiny = tests_module("tiny")
    return tiny.write(folder, tiny.Dims(layers="sfsf", embedding_scale=1.5), seed=5)


def check_compiler(profile: GpuProfile) -> None:
    """Raises MissingError without the compiler that the profile chooses, PartError where it chooses none."""
    name = profile.choices.compiler.value
    if name == "torch":
        raise PartError(f"profile {profile.name} has no compiler")
    library("tensorrt_rtx" if name == "tensorrt-rtx" else "tensorrt")
    library("cuda.bindings.driver")
    load_compiler(name)


def quiet(phase: str, done: int, whole: int) -> None:
    pass


@dataclass
class Bundles:
    """Of one checkpoint for one GPU, each compiled when first asked for."""

    checkpoint: Path
    folder: Path
    profile: str
    build: Callable[[BuildPlan], Path] = field(default=lambda plan: build(prepare(plan), quiet).path)
    context: int = CONTEXT
    made: dict[tuple[int, int, str], Path] = field(default_factory=dict)

    def bundle(self, canvases: int = MOST_CANVASES, chunk: int = CHUNK, moe: Moe = DENSE) -> Path:
        key = (canvases, chunk, moe.formulation)
        if key not in self.made:
            plan = BuildPlan(
                checkpoint=str(self.checkpoint), profile=self.profile, out=str(self.folder / "-".join(map(str, key))),
                context=self.context, chunk=chunk, canvases=canvases, slots=canvases, moe=moe,
            )  # fmt: skip
            self.made[key] = self.build(plan)
        return self.made[key]

    def opener(self, hardware: Hardware | None = None) -> Callable[..., TensorRTRunner]:
        """Calls of at most two canvases, whatever the slots."""

        def open_runner(slots: int, chunk: int = CHUNK) -> TensorRTRunner:
            folder = self.bundle(min(slots, MOST_CANVASES), chunk)
            options = BundleOptions(slots=slots, warms_up=False)
            return open_bundle(folder, options, quiet, hardware).runner

        return open_runner


def bundles(options: Options, checkpoint: Path, context: int = CONTEXT) -> Bundles:
    """For this machine's GPU. Raises MissingError without the libraries, InputError or PartError without the GPU."""
    profile = gpu_profile(options)
    check_compiler(profile)
    return Bundles(checkpoint, options.folder / "bundles", options.profile or profile.name, context=context)


def facts(folder: Path) -> dict[str, Any]:
    """What a table says of a bundle."""
    manifest = EngineBundle.open(folder, "sizes").manifest
    return {
        "compiler": f"{manifest.compiler.name} {manifest.compiler.version}",
        "profile": manifest.target.profile,
        "compute_capability": manifest.target.compute_capability,
    }
