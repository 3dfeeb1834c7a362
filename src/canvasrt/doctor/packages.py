"""Python packages and Triton: what is installed, never imported."""

from canvasrt.doctor.checks import Check, Group, Status, numbers
from canvasrt.doctor.machine import Machine
from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile

LEAST_BINDINGS = (13, 0)
_COMPILERS = {  # extra, package
    "tensorrt-rtx": ("rtx", "tensorrt_rtx_cu13"),
    "tensorrt": ("tensorrt", "tensorrt_cu13"),
}
_OPTIONAL = {  # package: extra, what it is for
    "torch": ("torch", "running checkpoints without an engine"),
    "nvidia-modelopt": ("quantize", "canvasrt quantize"),
    "tritonclient": ("client", "talking to a server"),
}


def package_checks(machine: Machine, profiles: list[GpuProfile], has_gpu: bool, containers: bool) -> list[Check]:
    """``profiles`` are those of GPUs that are here or named; ``containers``: Docker can give them GPUs instead."""
    group = Group("packages")
    wanted = sorted({profile.choices.compiler.value for profile in profiles} - {"torch"})
    for compiler in wanted or ["tensorrt-rtx"]:
        extra, package = _COMPILERS[compiler]
        install = f"pip install 'canvasrt[{extra}]'"
        version, bindings = machine.version(package), machine.version("cuda-bindings")
        if version is not None:
            group.ok(package, version)
        elif compiler == "tensorrt" and not has_gpu:
            group.skipped(package, "not installed; TensorRT compiles on the GPU itself, not here")
        elif not wanted:
            group.skipped(package, "not installed: it builds engines for RTX cards, also here", install)
        elif containers or not has_gpu:
            group.warning(
                package,
                f"not installed: {compiler} builds and runs engines",
                f"{install}{', or use our image' if containers else ''}",
            )
        else:
            group.fault(package, f"not installed: {compiler} builds and runs engines", install)
        if bindings is not None and numbers(bindings) < LEAST_BINDINGS:
            group.fault("cuda-bindings", f"{bindings} is for an older CUDA", "pip install -U 'cuda-bindings>=13'")
        elif bindings is not None:
            group.ok("cuda-bindings", bindings)
        elif has_gpu and wanted:
            group.add("warning" if containers else "fault", "cuda-bindings", "not installed: it runs engines", install)
        else:
            group.skipped("cuda-bindings", "not installed: it runs engines on a GPU", install)
    for package, (extra, purpose) in _OPTIONAL.items():
        version = machine.version(package)
        if version is None:
            group.skipped(package, f"not installed; it is for {purpose}", f"pip install 'canvasrt[{extra}]'")
        else:
            group.ok(package, version)
    try:
        group.ok("Triton", machine.triton())
    except InputError as error:
        finding, _, fix = str(error).partition(". ")
        status: Status = "warning" if has_gpu else "skipped"
        group.add(status, "Triton", finding, fix or "Use NVIDIA's container (nvcr.io/nvidia/tritonserver)")
    return group.checks
