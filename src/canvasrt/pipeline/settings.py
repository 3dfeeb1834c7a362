"""The pipeline file: where a checkpoint comes from, what is made of it, and where that lies. YAML, validated.

Knows nothing of how anything is fetched or made.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from canvasrt.errors import InputError
from canvasrt.profiles.profile import GpuProfile, load_profile
from canvasrt.settings import Settings, load_settings

Verify = Literal["full", "sizes"]
Scheme = Literal["hf", "s3", "oci", "folder"]

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HF = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?")
_S3 = re.compile(r"([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/([A-Za-z0-9!_.*'()/-]{1,900})")
_OCI = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]{1,5})?)/([a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::([A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(sha256:[0-9a-f]{64}))?"
)
_KINDS = (
    "hf://ORG/NAME or hf://ORG/NAME@REVISION, s3://BUCKET/PREFIX, oci://HOST/REPOSITORY:TAG or "
    "oci://HOST/REPOSITORY@sha256:..., or a folder"
)
_LABEL = 80  # letters of a source in the name of its folder


@dataclass(frozen=True, slots=True)
class Source:
    """Where files come from: ``place`` is ORG/NAME, BUCKET, HOST/REPOSITORY or a folder; ``detail`` the revision,
    the prefix, the tag or digest.
    """

    text: str
    scheme: Scheme
    place: str
    detail: str | None

    @property
    def label(self) -> str:
        """A plain name for people; not unique."""
        text = Path(self.text).absolute().name if self.scheme == "folder" else self.text.partition("://")[2]
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("/", "--")).strip("-._")
        return plain[-_LABEL:].lstrip("-._") or "checkpoint"


def parse_source(text: str) -> Source:
    """Raises ValueError for one of no known kind."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Source(text, "folder", text, None)
    fault = f"{_shown(text)} is no source: give {_KINDS}"
    if ".." in rest:
        raise ValueError(fault)
    if scheme == "hf" and (found := _HF.fullmatch(rest)):
        return Source(text, "hf", found[1], found[2])
    if scheme == "s3" and (found := _S3.fullmatch(rest)) and (prefix := found[2].strip("/")):
        return Source(f"s3://{found[1]}/{prefix}", "s3", found[1], prefix)
    if scheme == "oci" and (found := _OCI.fullmatch(rest)):
        return Source(text, "oci", f"{found[1]}/{found[2]}", found[3] or found[4])
    raise ValueError(fault)


def _shown(text: str) -> str:
    """Without what stands before an @ in the place of a host: it may be a password."""
    return re.sub(r"://[^/@]*@", "://...@", text)


def _source(text: str) -> str:
    parse_source(text)
    return text


def _folder_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name) is None:
        raise ValueError(f"{name!r} must be a plain folder name, of letters, digits, '.', '_' and '-'")
    if name.endswith((".partial", ".replaced", ".receipt.json")):
        raise ValueError(f"{name!r} ends like the names of unfinished things: choose another")
    return name


def _recipe(name: str) -> str:
    if not name.endswith((".yaml", ".yml")) and re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,63}", name) is None:
        raise ValueError(f"{name!r} must be the name of a recipe, such as fp8, or a .yaml file")
    return name


SourceText = Annotated[str, Field(min_length=1), AfterValidator(_source)]
Tokens = Annotated[int, Field(ge=1, le=262_144)]


class CheckpointPart(Settings):
    source: SourceText


class QuantizePart(Settings):
    recipe: Annotated[str, AfterValidator(_recipe)]  # of build/recipes, or a YAML file
    device: Literal["cpu", "cuda"] = "cpu"
    samples: Annotated[int, Field(ge=1)] | None = None


class BundlePart(Settings):
    name: Annotated[str, AfterValidator(_folder_name)]
    source: SourceText | None = None
    weights: Literal["inside", "stripped"] = "inside"
    context: Tokens | None = None
    slots: Annotated[int, Field(ge=1, le=256)] | None = None
    canvases: Annotated[int, Field(ge=1, le=64)] | None = None
    chunk: Tokens | None = None

    def options(self) -> dict[str, str | int]:
        """Of ``canvasrt build``, as a manifest has them."""
        names = ("context", "slots", "canvases", "chunk")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class S3Part(Settings):
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/@\s]+/?$")] | None = None  # https://minio.example:9000
    region: str | None = None


class OciPart(Settings):
    insecure: bool = False


class Pipeline(Settings):
    """One pipeline file; see docs/preparing.md. Relative paths are relative to the working directory."""

    volume: str = Field(min_length=1)
    profile: str = Field(min_length=1)
    checkpoint: CheckpointPart | None = None
    quantize: QuantizePart | None = None
    bundle: BundlePart | None = None
    kernels: str | None = Field(default=None, min_length=1)
    s3: S3Part = S3Part()
    oci: OciPart = OciPart()
    verify: Verify = "full"
    keep: Annotated[int, Field(ge=1, le=1000)] | None = None  # bundles on the volume, the wanted one included

    @model_validator(mode="after")
    def _fits_together(self) -> "Pipeline":
        fetched = self.bundle is not None and self.bundle.source is not None
        if fetched and self.quantize is not None:
            raise ValueError("quantize and bundle.source exclude each other: a bundle that is fetched has its weights")
        if self.checkpoint is None and not fetched:
            raise ValueError("checkpoint.source is missing: say where the checkpoint comes from")
        if self.checkpoint is None and self.bundle is not None and self.bundle.weights == "stripped":
            raise ValueError("bundle.weights is stripped, so checkpoint.source must say what fills the bundle")
        return self

    def gpu_profile(self) -> GpuProfile:
        """Raises InputError for a profile that is not there."""
        return load_profile(self.profile)

    @property
    def folder(self) -> Path:
        return Path(self.volume)


def load_pipeline(file: Path) -> Pipeline:
    """Raises InputError that names the file, the key and what is allowed."""
    pipeline = load_settings(file, Pipeline, "pipeline file")
    profile = pipeline.gpu_profile()
    compiler = profile.choices.compiler.value
    if compiler != "torch" and pipeline.bundle is None:
        raise InputError(
            f"pipeline file {file}: profile {profile.name} runs engines of {compiler}, so bundle.name is missing: the "
            f"folder below {pipeline.volume}/engines that the bundle gets"
        )
    if compiler == "torch" and pipeline.checkpoint is None:
        raise InputError(
            f"pipeline file {file}: profile {profile.name} runs checkpoints and no bundles, so checkpoint.source is "
            "missing"
        )
    return pipeline
