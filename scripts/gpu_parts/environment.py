"""What machine this is: GPU, driver, CUDA, versions of the libraries. Loads none of them but the CUDA driver's."""

import os
import platform
import subprocess
from importlib import import_module, metadata
from typing import Any

from gpu_parts.record import Options, PartError, Record

LIBRARIES = {  # by the names that wheels have
    "canvasrt": ("canvasrt",),
    "torch": ("torch",),
    "tensorrt_rtx": ("tensorrt_rtx_cu13", "tensorrt_rtx"),
    "tensorrt": ("tensorrt_cu13", "tensorrt"),
    "cuda-bindings": ("cuda-bindings",),
    "transformers": ("transformers",),
    "numpy": ("numpy",),
}
FIELDS = ("name", "memory.total", "memory.used", "compute_cap", "driver_version", "power.limit", "clocks.max.sm")
_SMI_SECONDS = 30


def facts() -> dict[str, Any]:
    """``gpus`` is empty and ``no_gpu`` says why where nvidia-smi shows none."""
    found: dict[str, Any] = {"gpus": [], "cuda": cuda_version(), "versions": versions()}
    try:
        found["gpus"] = gpus()
    except PartError as error:
        found["no_gpu"] = str(error)
    found |= {"python": platform.python_version(), "machine": platform.machine()}
    return found | {"cpu_cores": len(os.sched_getaffinity(0))}


def gpus() -> list[dict[str, str]]:
    """nvidia-smi's own words: memory in MiB, power in W, clocks in MHz. Raises PartError without a GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PartError(f"no NVIDIA GPU to be seen: nvidia-smi does not run ({error})") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = " ".join((done.stdout + done.stderr).split()) or "nothing"
        raise PartError(f"no NVIDIA GPU to be seen: nvidia-smi says {said}")
    return [dict(zip(FIELDS, map(str.strip, line.split(",")), strict=False)) for line in lines]


def cuda_version() -> str | None:
    """The newest CUDA that the driver supports; None where there is no driver or no cuda-bindings."""
    try:
        driver = import_module("cuda.bindings.driver")
        status, number = driver.cuDriverGetVersion()
    except (ImportError, RuntimeError):
        return None
    return None if status.value or not number else f"{number // 1000}.{number % 1000 // 10}"


def versions() -> dict[str, str | None]:
    """None: not installed."""
    return {name: _version(wheels) for name, wheels in LIBRARIES.items()}


def _version(wheels: tuple[str, ...]) -> str | None:
    for wheel in wheels:
        try:
            return metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
    return None


def run(options: Options, record: Record) -> None:
    found = facts()
    record.note(**found)
    if not found["gpus"]:
        raise PartError(found["no_gpu"])
