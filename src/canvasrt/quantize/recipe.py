"""A quantization recipe: which matrices get which format, and what calibrates their scales. YAML, validated.

Knows nothing of ModelOpt: canvasrt.quantize.modelopt_model turns a recipe into its configuration.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from canvasrt.errors import InputError
from canvasrt.formats import NVFP4_BLOCK, Format
from canvasrt.inputs import input_folder
from canvasrt.settings import Settings, load_settings
from canvasrt.spec import ModelSpec

Part = Literal["experts", "attention", "mlp"]
WeightFormat = Literal["nvfp4", "nvfp4-weights", "fp8", "int4"]

_FOLDING = ("awq", "smoothquant", "svdquant")


def _algorithm(name: str) -> str:
    if any(folding in name.lower().replace("_", "") for folding in _FOLDING):
        raise ValueError(
            f"{name} folds a scale into the weights. Encoder and decoder share them, so it would be folded twice and "
            "corrupt the checkpoint (17-18 % error measured). Use max."
        )
    if name != "max":
        raise ValueError(f"{name} is not supported: use max, which needs no search and runs on a CPU")
    return name


class Calibration(Settings):
    """Prompts that are answered while ModelOpt looks for the largest activations."""

    file: str = Field(min_length=1)  # in build/calibration
    samples: int = Field(ge=1, le=100_000)
    canvases: int = Field(ge=1, le=64)  # per prompt, where the model does not end earlier
    steps: int = Field(ge=1, le=48)  # denoising steps per canvas


class Recipe(Settings):
    """One recipe. ``tensors`` names the parts that are quantized; everything else stays in BF16."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")
    why: str = Field(min_length=1)
    tensors: dict[Part, WeightFormat] = Field(min_length=1)
    block: int | None = Field(default=None, ge=16, le=1024)  # weights per scale, int4 only
    kv_cache: Literal["fp8", "bf16"]  # fp8: cast with scale 1, so that encoder and decoder can't disagree on a scale
    algorithm: Annotated[str, AfterValidator(_algorithm)]
    modelopt: str | None = None  # a recipe shipped with nvidia-modelopt that says the same in its own words
    calibration: Calibration | None

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        formats = set(self.tensors.values())
        if len(formats) > 1:
            raise ValueError(f"tensors mixes {' and '.join(sorted(formats))}: one recipe, one format")
        if ("int4" in formats) != (self.block is not None):
            raise ValueError("block is for int4, and int4 needs it: 64 suits an expert width of 704")
        if self.format.activations in ("static", "block") and self.calibration is None:
            raise ValueError(f"{self.weights} scales activations, so it needs calibration")
        return self

    @property
    def weights(self) -> WeightFormat:
        return next(iter(self.tensors.values()))

    @property
    def format(self) -> Format:
        """What the quantized matrices are stored as."""
        formats = {
            "nvfp4": Format("nvfp4", "block", NVFP4_BLOCK),
            "nvfp4-weights": Format("nvfp4", "none", NVFP4_BLOCK),
            "fp8": Format("fp8", "static"),
            "int4": Format("int4", "none", self.block or 0),
        }
        return formats[self.weights]

    def covers(self, name: str) -> bool:
        """Whether a tensor of the model, by its name in `ModelSpec.tensors`, is quantized."""
        part: Part | None = None
        if ".experts." in name:
            part = "experts"
        elif name.endswith("_proj.weight"):
            part = "attention" if ".self_attn." in name else "mlp" if ".mlp." in name else None
        return part in self.tensors

    def check(self, spec: ModelSpec) -> None:
        """Raises InputError when a matrix of the model does not divide into this recipe's blocks, naming it."""
        block = self.format.block
        for name, shape in spec.tensors().items():
            if not block or not self.covers(name):
                continue
            if shape[-1] % block:
                raise InputError(
                    f"recipe {self.name} stores {self.weights} blocks of {block} weights along the input axis, and "
                    f"{name} has {shape[-1]} inputs, which is no multiple of {block}. Use fp8, or leave this part out."
                )
            rows = shape[-2] // (2 if name.endswith("gate_up_proj") else 1)
            if self.weights == "int4" and rows % 2:
                raise InputError(f"recipe {self.name} packs two rows to a byte: {name} has an odd number of rows")


def recipe_names() -> list[str]:
    return sorted(file.stem for file in input_folder("recipes").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe of build/recipes by name, or a YAML file by path.

    Raises InputError that names the file, the key and what is allowed.
    """
    file = Path(name)
    if file.suffix not in (".yaml", ".yml") and name in recipe_names():
        file = input_folder("recipes") / f"{name}.yaml"
    elif file.suffix not in (".yaml", ".yml"):
        raise InputError(f"no recipe is called {name!r}: there are {', '.join(recipe_names())}, or give a .yaml file")
    return load_settings(file, Recipe, "recipe")
