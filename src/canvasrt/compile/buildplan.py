"""A build plan: which checkpoint becomes an engine for which GPU, and where it differs from the GPU's profile. YAML."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from canvasrt.profiles.profile import Moe
from canvasrt.settings import Settings, load_settings

Tokens = Annotated[int, Field(ge=1, le=262_144)]
Weights = Literal["inside", "stripped"]


class BuildPlan(Settings):
    """What a person decides; null is left to the profile. Paths are relative to the working directory."""

    checkpoint: str = Field(min_length=1)
    profile: str = Field(min_length=1)  # a name, or a YAML file
    out: str = Field(min_length=1)
    weights: Weights = "inside"
    recipe: str | None = None  # for a config.json without weights: what they would be quantized by
    context: Tokens | None = None  # per slot, the canvas included
    slots: Annotated[int, Field(ge=1, le=256)] | None = None
    canvases: Annotated[int, Field(ge=1, le=64)] | None = None
    chunk: Tokens | None = None
    moe: Moe | None = None

    def options(self) -> dict[str, str | int]:
        """Of the command line that builds this: all but checkpoint, profile, out and weights."""
        names = ("recipe", "context", "slots", "canvases", "chunk")
        found: dict[str, str | int] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.moe is not None:
            sizes = (self.moe.encoder_capacity, self.moe.decoder_capacity)
            found["moe"] = ":".join([self.moe.formulation, *(str(size) for size in sizes if size is not None)])
        return found


def load_plan(file: Path) -> BuildPlan:
    """Raises InputError that names the file, the key and what is allowed."""
    return load_settings(file, BuildPlan, "build plan")
