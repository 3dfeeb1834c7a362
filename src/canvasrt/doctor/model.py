"""The model that is to be served, and what each step of the chain needs for it: memory and disk, planned. Bytes.

The 26B's dimensions are part of the package, so that nothing has to be downloaded to ask.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from canvasrt.compile.choices import chosen_source
from canvasrt.compile.sizes import BF16, FLOAT32, bytes_by_format
from canvasrt.compile.source import ModelSource
from canvasrt.profiles.helm_values import PUBLISHED as PUBLISHED_BY_RECIPE
from canvasrt.profiles.profile import GpuProfile, load_profile

PUBLISHED = "google/diffusiongemma-26B-A4B-it"
ILLUSTRATION = "rtx-5090"  # whose figures are given where no GPU is here and none was named
STRIPPED_BUILD_BYTES = 4_000_000_000  # 2 to 3.4 GB were measured for the 26B
INSIDE_BUILD_WEIGHTS = 1.5  # times the weights: what the compiler held of six layers
_KERNEL_BYTES = 300_000_000  # of a plan, beside its weights
_INT4_SHARD_BYTES = 5_000_000_000  # quantized to INT4, a checkpoint is written in such pieces
_LOGITS = 4  # tensors over the vocabulary that calibration holds at once
_HERE = Path(__file__).parent / "diffusiongemma-26b-a4b"


@dataclass(frozen=True, slots=True)
class Model:
    folder: Path | None  # None: the published 26B
    source: ModelSource

    @property
    def name(self) -> str:
        return "DiffusionGemma 26B-A4B" if self.folder is None else str(self.folder)

    @property
    def has_weights(self) -> bool:
        return self.source.checkpoint is not None

    @property
    def is_quantized(self) -> bool:
        return self.source.checkpoint is not None and self.source.checkpoint.quantization is not None

    def planned(self, profile: GpuProfile) -> ModelSource:
        """As a GPU would get it: quantized by the profile's recipe, if it is not quantized yet.

        Raises InputError for a recipe that the model's dimensions don't divide into.
        """
        recipe = None if self.is_quantized else profile.choices.recipe.value
        source, _ = chosen_source(_HERE if self.folder is None else self.folder, profile, recipe)
        return replace(source, folder=Path(self.name))


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one profile. None where a step is not needed."""

    profile: str
    recipe: str  # "none": served in BF16
    published: str | None  # who has the quantized checkpoint, so that nothing has to be quantized
    source_bytes: int | None  # on disk: the BF16 checkpoint, where it is needed and not there yet
    quantized_bytes: int | None  # on disk
    bundle_bytes: int | None  # on disk
    build_disk_bytes: int  # beside the bundle, while it is built
    quantize_memory_bytes: int | None
    inside_memory_bytes: int
    stripped_memory_bytes: int


def open_model(folder: Path | None) -> Model:
    """Raises CheckpointError for a folder without a model."""
    return Model(folder, ModelSource.open(_HERE if folder is None else folder))


def needs(model: Model, profile: GpuProfile) -> Needs:
    """Raises InputError for a recipe that the model's dimensions don't divide into."""
    planned, spec = model.planned(profile), model.source.spec
    by_format = bytes_by_format(planned)
    weights = sum(by_format.values())
    recipe = profile.choices.recipe.value
    quantizes = not model.is_quantized and recipe != "none"
    full = bf16_bytes(model)
    memory = None
    if quantizes:
        covered = [shape for name, shape in spec.tensors().items() if planned.formats[name].weights != "plain"]
        largest = 2 * max(map(prod, covered)) * FLOAT32
        logits = _LOGITS * spec.canvas_length * spec.vocab_size * FLOAT32
        packed = weights - by_format.get("plain", 0)
        memory = (
            min(_INT4_SHARD_BYTES, weights) + largest if "int4" in by_format else full + packed + max(largest, logits)
        )
    known = PUBLISHED_BY_RECIPE.get(recipe) if model.folder is None and quantizes else None
    published = known.source.removeprefix("hf://") if known is not None and known.quantize is None else None
    compiled = profile.choices.compiler.value != "torch"
    return Needs(
        profile=profile.name,
        recipe=recipe,
        published=published,
        source_bytes=None if model.has_weights or published else full,
        quantized_bytes=weights if quantizes else None,
        bundle_bytes=weights + _KERNEL_BYTES if compiled else None,
        build_disk_bytes=weights if compiled else 0,
        quantize_memory_bytes=memory,
        inside_memory_bytes=max(round(INSIDE_BUILD_WEIGHTS * weights), STRIPPED_BUILD_BYTES),
        stripped_memory_bytes=STRIPPED_BUILD_BYTES,
    )


def bf16_bytes(model: Model) -> int:
    """Of the text tensors."""
    return sum(prod(shape) for shape in model.source.spec.tensors().values()) * BF16


def illustration() -> GpuProfile:
    return load_profile(ILLUSTRATION)
