"""A GPU profile: facts with their source, and choices with their reason. YAML, validated.

Knows nothing of a checkpoint's size or of compilers: canvasrt.compile turns the choices into an engine.
"""

from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from canvasrt.errors import InputError
from canvasrt.formats import Weights
from canvasrt.settings import Settings, load_settings

V = TypeVar("V")

Compiler = Literal["tensorrt-rtx", "tensorrt", "torch"]
Formulation = Literal["dense", "capacity", "sparse"]
KvType = Literal["bf16"]  # FP8: no compiler updates such K and V in place, see docs/profiles.md

_FOLDER = Path(__file__).parent


class Fact(Settings, Generic[V]):
    """A value that somebody published."""

    value: V
    source: str = Field(min_length=8)  # an address, or a document and its page


class Choice(Settings, Generic[V]):
    """A value that we chose, and why, in figures where there are any."""

    value: V
    reason: str = Field(min_length=8)


# The upper bounds are far beyond any GPU and catch another unit: MiB, bytes per second.
Gigabytes = Annotated[float, Field(gt=0, le=4096)]
GigabytesPerSecond = Annotated[float, Field(gt=0, le=100_000)]
Teraflops = Annotated[float, Field(gt=0, le=1_000_000)]


class Throughput(Settings):
    """Dense tensor-core rates in TFLOP/s with float32 accumulation; null where the GPU has no such tensor cores."""

    bf16: Teraflops
    fp8: Teraflops | None
    fp4: Teraflops | None
    int8: Teraflops | None


class Facts(Settings):
    architecture: Fact[str]  # "Blackwell"
    compute_capability: Fact[Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]] | None  # "12.0"; null without GPU
    memory_gb: Fact[Gigabytes] | None  # 10**9 bytes, as the driver sees them; null: whatever the machine has
    memory_is_shared: bool  # with the CPU (DGX Spark, DGX Station's coherent memory does not count)
    bandwidth_gb_s: Fact[GigabytesPerSecond] | None  # 10**9 bytes per second
    tflops: Fact[Throughput] | None
    cpu_architectures: Fact[Annotated[list[Literal["amd64", "arm64"]], Field(min_length=1)]]
    product_names: Fact[list[str]]  # values of the node label nvidia.com/gpu.product


class Moe(Settings):
    """Formulation of the expert layer; with ``capacity``, tokens per expert that a call of each shape range starts with
    (a call with more is repeated with room for all).
    """

    formulation: Formulation
    encoder_capacity: Annotated[int, Field(ge=1)] | None = None
    decoder_capacity: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _capacities_where_used(self) -> "Moe":
        given = [self.encoder_capacity is not None, self.decoder_capacity is not None]
        if any(given) != (self.formulation == "capacity") or any(given) != all(given):
            raise ValueError("encoder_capacity and decoder_capacity belong to the capacity formulation, both of them")
        return self


class Choices(Settings):
    compiler: Choice[Compiler]
    recipe: Choice[str]  # of build/recipes, or "none" for BF16
    moe: Choice[Moe]
    kv_type: Choice[KvType]
    slots: Choice[Annotated[int, Field(ge=1, le=256)]]  # requests that hold K/V memory at once
    context: Choice[Annotated[int, Field(ge=512, le=262_144)]]  # tokens per slot
    chunk: Choice[Annotated[int, Field(ge=16, le=8192)]]  # context tokens that one encoder call takes
    canvases: Choice[Annotated[int, Field(ge=1, le=64)]]  # that one decoder call takes


class GpuProfile(Settings):
    """One GPU: what it is, and how CanvasRT uses it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    title: str = Field(min_length=1)
    facts: Facts
    choices: Choices

    @property
    def sm(self) -> int | None:
        """120 for compute capability 12.0; None without a GPU."""
        capability = self.facts.compute_capability
        return None if capability is None else int(capability.value.replace(".", ""))

    def runs(self, weights: Weights) -> bool:
        """Whether this GPU computes with weights of a format: FP8 from Ada on, FP4 from Blackwell on.

        The torch runtime of the cpu profile runs all of them.
        """
        sm = self.sm
        least = {"plain": 80, "int4": 80, "fp8": 89, "nvfp4": 100}
        return sm is None or sm >= least[weights]


def profile_names() -> list[str]:
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> GpuProfile:
    """A profile of this package by name, or a YAML file by path. Raises InputError that names what is wrong."""
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        if name not in profile_names():
            raise InputError(
                f"no GPU profile is called {name!r}: there are {', '.join(profile_names())}, or give a .yaml file of "
                "your own"
            )
        file = _FOLDER / f"{name}.yaml"
    profile = load_settings(file, GpuProfile, "profile")
    if file.parent == _FOLDER and profile.name != file.stem:
        raise InputError(f"profile {file} calls itself {profile.name!r}: name and file must agree")
    return profile
