"""A GPU profile as values of the Helm chart: one file per GPU in helm/canvasrt/profiles.

Knows what a published checkpoint of each recipe is called and how large it is; knows nothing of the chart's templates.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile, load_profile, profile_names

COMMAND = "canvasrt profiles --format helm --out helm/canvasrt/profiles"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Published:
    """Where a checkpoint of the 26B comes from. Bytes: of what is fetched, and of what the engine is built from."""

    source: str
    quantize: str | None  # the recipe, where nobody publishes the result
    fetched_bytes: float
    built_bytes: float


_BF16 = "hf://google/diffusiongemma-26B-A4B-it"
PUBLISHED = {
    "nvfp4-experts": Published("hf://nvidia/diffusiongemma-26B-A4B-it-NVFP4", None, 18.8e9, 18.8e9),
    "fp8": Published("hf://RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic", None, 27.1e9, 27.1e9),
    "int4-experts": Published(_BF16, "int4-experts", 51.6e9, 18.8e9),
    "none": Published(_BF16, None, 51.6e9, 51.6e9),
}


def helm_values(profile: GpuProfile) -> dict[str, Any]:
    """The chart's values for one GPU. Raises InputError for a recipe of which no checkpoint is known."""
    facts, choices = profile.facts, profile.choices
    recipe = choices.recipe.value
    if recipe not in PUBLISHED:
        raise InputError(
            f"profile {profile.name}: no checkpoint of recipe {recipe} is known, so no values can be written: "
            f"recipes are {', '.join(PUBLISHED)}"
        )
    published = PUBLISHED[recipe]
    compiled = choices.compiler.value != "torch"
    return {
        "profile": {
            "name": profile.name,
            "compiler": choices.compiler.value,
            "computeCapability": "" if facts.compute_capability is None else facts.compute_capability.value,
            "productNames": list(facts.product_names.value),
            "cpuArchitectures": list(facts.cpu_architectures.value),
            "recipe": recipe,
        },
        "model": {"source": published.source, "quantize": {"recipe": published.quantize or ""}},
        "pipeline": {"resources": _pipeline_resources(published, compiled)},
        "resources": _server_resources(published, compiled),
        "persistence": {"size": f"{_volume_gib(published, compiled)}Gi"},
    }


def helm_file(profile: GpuProfile) -> str:
    """One values file, as text."""
    head = f"# {profile.title}. Written by `{COMMAND}`; do not edit.\n"
    return head + yaml.safe_dump(helm_values(profile), sort_keys=False, width=1000)


def helm_files() -> dict[str, str]:
    """Name of the file -> content, for every profile of the package."""
    return {f"{name}.yaml": helm_file(load_profile(name)) for name in profile_names()}


def write_helm_files(folder: Path) -> list[Path]:
    """Writes every file into ``folder``, and says which. Raises InputError where it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in helm_files().items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} can't be written: {error.strerror}. Name another folder with --out") from None
    return [folder / name for name in helm_files()]


def _pipeline_resources(published: Published, compiled: bool) -> dict[str, Any]:
    """A build with weights inside holds 1.5 times the weights (docs/building.md); 6 GiB are for all else."""
    weights = 1.5 * published.built_bytes if compiled else published.built_bytes
    memory = f"{_rounded(weights / _GIB + 6)}Gi"
    return {"requests": {"cpu": "4", "memory": memory}, "limits": {"memory": memory}}


def _server_resources(published: Published, compiled: bool) -> dict[str, Any]:
    """Weights pass through this machine's memory on their way to the GPU; torch keeps them there, in float32."""
    if compiled:
        return {"requests": {"cpu": "4", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}
    memory = f"{_rounded(2 * published.built_bytes / _GIB + 8)}Gi"
    return {"requests": {"cpu": "4", "memory": memory}, "limits": {"memory": memory}}


def _volume_gib(published: Published, compiled: bool) -> int:
    """What is fetched, what is quantized from it, and two bundles: an upgrade builds beside the one that serves."""
    quantized = published.built_bytes if published.quantize else 0.0
    bundles = 2 * published.built_bytes if compiled else 0.0
    return _rounded((published.fetched_bytes + quantized + bundles) / _GIB * 1.2, 10)


def _rounded(gib: float, step: int = 4) -> int:
    """Up to a multiple of ``step``."""
    return -int(-gib // step) * step
