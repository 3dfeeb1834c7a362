"""Which compiler builds for a profile, and whether it can do so here; if not, the command that does, and where."""

import shlex
from dataclasses import dataclass

from canvasrt.bundle.manifest import command_text
from canvasrt.compile.buildplan import BuildPlan
from canvasrt.errors import CompileError, InputError
from canvasrt.ops.tensorrt_api import CompilerName, load_compiler
from canvasrt.profiles.profile import GpuProfile

_IMAGE = "python:3.11"  # the wheels bring TensorRT; the driver comes from the NVIDIA Container Toolkit


@dataclass(frozen=True, slots=True)
class Target:
    compiler: CompilerName
    version: str  # of the compiler that is installed
    sm: int
    capability: str  # "12.0"


def find_target(profile: GpuProfile, plan: BuildPlan) -> Target:
    """Raises InputError for a profile that nothing is compiled for, CompileError where its compiler is not here."""
    name, capability = profile.choices.compiler.value, profile.facts.compute_capability
    if name == "torch" or capability is None:
        raise InputError(
            f"profile {profile.name} has nothing to compile: the torch runtime runs a checkpoint as it is "
            f"(canvasrt generate {plan.checkpoint} ...)"
        )
    sm = profile.sm
    assert sm is not None  # it has a compute capability
    try:
        module = load_compiler(name)
    except InputError as error:
        if name == "tensorrt-rtx":
            raise
        raise CompileError(f"{error}\n{elsewhere(profile, plan)}") from None
    return Target(name, str(module.__version__), sm, capability.value)


def elsewhere(profile: GpuProfile, plan: BuildPlan) -> str:
    """What to run on a machine with the GPU, word for word."""
    command = command_text(plan.checkpoint, plan.profile, plan.out, {"weights": plan.weights, **plan.options()})
    inside = shlex.quote(f"pip install '.[tensorrt]' && {command}")
    return (
        f"TensorRT compiles on the GPU itself. On a machine with the GPU ({profile.title}), in a checkout of canvasrt "
        "and with the checkpoint below it, run:\n"
        f'  docker run --rm --gpus all -v "$PWD":/work -w /work {_IMAGE} sh -c {inside}\n'
        f"or without a container: pip install '.[tensorrt]' && {command}"
    )
