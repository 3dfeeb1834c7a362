"""Profiles and models for the tests of planning. No test: what they are made of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Deployment, Setting
from canvasrt.profiles.profile import GpuProfile

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "tests" / "fixtures" / "diffusiongemma-26b-a4b"  # config.json of the 26B, without weights
DEMO = ROOT / "examples" / "sudoku" / "checkpoint"
GB = 10**9
RECIPES = ("none", "fp8", "nvfp4-experts", "nvfp4", "int4-experts")
DENSE = {"formulation": "dense"}
CAPACITY = {"formulation": "capacity", "encoder_capacity": 128, "decoder_capacity": 64}


def profile_text(
    name: str = "test-gpu",
    capability: str = "12.0",
    memory_gb: float | None = 34.0,
    shared: bool = False,
    bandwidth: float | None = 1792.0,
    tflops: dict[str, float | None] | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """What a YAML file of a profile holds; ``choices`` replace values."""
    rates = tflops or {"bf16": 209.5, "fp8": 419.0, "fp4": 1676.0, "int8": 838.0}
    values = {
        "compiler": "tensorrt-rtx", "recipe": "nvfp4-experts", "moe": CAPACITY, "kv_type": "bf16",
        "slots": 4, "context": 32_768, "chunk": 512, "canvases": 2,
    }  # fmt: skip

    def fact(value: Any) -> dict[str, Any] | None:
        return None if value is None else {"value": value, "source": "made up for a test"}

    return {
        "name": name,
        "title": "a GPU of a test",
        "facts": {
            "architecture": fact("Blackwell"),
            "compute_capability": fact(capability),
            "memory_gb": fact(memory_gb),
            "memory_is_shared": shared,
            "bandwidth_gb_s": fact(bandwidth),
            "tflops": None if bandwidth is None else fact(rates),
            "cpu_architectures": fact(["amd64"]),
            "product_names": fact([]),
        },
        "choices": {
            key: {"value": value, "reason": f"a reason for {key}"} for key, value in (values | choices).items()
        },
    }


def profile(**changes: Any) -> GpuProfile:
    return GpuProfile.model_validate(profile_text(**changes))


def profile_file(folder: Path, **changes: Any) -> str:
    file = folder / "gpu.yaml"
    file.write_text(yaml.safe_dump(profile_text(**changes)), encoding="utf-8")
    return str(file)


def published(recipe: str = "none") -> ModelSource:
    return ModelSource.open(PUBLISHED, recipe)


def deployment(source: ModelSource, **changes: Any) -> Deployment:
    return Deployment.of(source, profile(**changes))


def setting(slots: int = 4, context: int = 32_768, chunk: int = 512, canvases: int = 2) -> Setting:
    return Setting(slots, context, chunk, canvases)


SETTINGS = st.builds(
    Setting,
    slots=st.integers(1, 64),
    context=st.integers(512, 262_144),
    chunk=st.integers(16, 8192),
    canvases=st.integers(1, 16),
).map(lambda each: replace(each, slots=max(each.slots, each.canvases)))
MODELS = {recipe: published(recipe) for recipe in RECIPES}
MEMORY = st.floats(8, 300)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
