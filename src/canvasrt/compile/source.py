"""The model that a plan or a build is about: a checkpoint, or a config.json alone with the recipe it would be quantized
by.

Planning and stripped builds need shapes and formats only, so that the real model can be planned without its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CheckpointError
from canvasrt.formats import PLAIN, Format
from canvasrt.quantize.recipe import load_recipe
from canvasrt.spec import ModelSpec

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Shapes and formats of every text tensor, and the checkpoint that holds them, if one does."""

    folder: Path
    spec: ModelSpec
    formats: Mapping[str, Format]  # of every name in spec.tensors()
    kv_cache: Literal["fp8", "bf16"]  # what the checkpoint was quantized for; bf16 where it says nothing
    quantization: str  # for people: "NVFP4 (modelopt)", "recipe nvfp4-experts", "none"
    checkpoint: Checkpoint | None

    @classmethod
    def open(cls, folder: Path, recipe: str | None = None) -> "ModelSource":
        """A checkpoint's folder, or one that holds config.json and no weights: then ``recipe`` says how they would be
        quantized ("none" or None: BF16), and it is ignored for a checkpoint, which says so itself.

        Raises CheckpointError for a damaged folder, InputError for an unknown recipe or one that the model's dimensions
        don't divide into.
        """
        if any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
            checkpoint = Checkpoint.open(folder)
            formats = {name: checkpoint.stored(name).format for name in checkpoint.names()}
            declared = checkpoint.quantization
            kv: Literal["fp8", "bf16"] = "fp8" if declared is not None and declared.kv_cache == "fp8" else "bf16"
            return cls(folder, checkpoint.spec, formats, kv, declared.name if declared else "none", checkpoint)
        spec = ModelSpec.load(folder)
        if recipe is None or recipe == "none":
            return cls(folder, spec, dict.fromkeys(spec.tensors(), PLAIN), "bf16", "none", None)
        chosen = load_recipe(recipe)
        chosen.check(spec)
        formats = {name: chosen.format if chosen.covers(name) else PLAIN for name in spec.tensors()}
        return cls(folder, spec, formats, chosen.kv_cache, f"recipe {chosen.name}", None)

    def weights(self) -> Checkpoint:
        """Raises CheckpointError where only a config.json is there."""
        if self.checkpoint is None:
            raise CheckpointError(
                f"{self.folder}: holds config.json and no weights. Put the safetensors files beside it, or build with "
                "--weights stripped for a plan without weights."
            )
        return self.checkpoint
