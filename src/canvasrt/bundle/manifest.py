"""What a bundle's manifest.json says: the engines and how they were built, in enough detail to build them again.

The format is described for people in engines/README.md. Knows nothing of reading or writing the files.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator

from canvasrt.settings import Settings

FORMAT_VERSION: Final = 1
MANIFEST = "manifest.json"
ZEROS = "0" * 64

CompilerName = Literal["tensorrt-rtx", "tensorrt"]
# inside: in the plan. stripped: placeholders, filled from the checkpoint at load. none: placeholders that nothing can
# fill, of a build from a config.json alone, for planning and tests.
WeightsMode = Literal["inside", "stripped", "none"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = r"^[0-9a-f]{64}$"


def _plain_name(name: str) -> str:
    # A plain name can't leave the folder, nor be hidden in it.
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} is not a plain file name and could lead out of the folder: do not trust this bundle"
        )
    return name


def _own_name(name: str) -> str:
    if name == MANIFEST:
        raise ValueError(f"{MANIFEST} can't list itself")
    return _plain_name(name)


BundleFileName = Annotated[str, AfterValidator(_own_name)]
ShardName = Annotated[str, AfterValidator(_plain_name)]
Digest = Annotated[str, Field(pattern=_DIGEST)]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]  # "12.0"
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Shape = tuple[Annotated[int, Field(ge=0)], ...]


class Compiler(Settings):
    name: CompilerName
    version: str = Field(min_length=1)  # exact: "1.7.1.116"


class Target(Settings):
    """The GPU that the engines run on, and no other."""

    compute_capability: Capability
    profile: str = Field(min_length=1)


class Shapes(Settings):
    """As canvasrt.compile.shapes.EngineShapes. All in tokens, but for slots and canvases."""

    slots: Count
    context: Count
    chunk: Count
    canvases: Count
    canvas: Count
    window: Annotated[int, Field(ge=0)]
    sliding: Count


class Moe(Settings):
    """How the expert layer is computed; capacities (tokens per expert) where the formulation has them."""

    formulation: str = Field(min_length=1)
    encoder_capacity: Count | None = None
    decoder_capacity: Count | None = None


class CheckpointIdentity(Settings):
    """What the engines were built from: see canvasrt.fingerprint."""

    folder: str = Field(min_length=1)  # its name, for people
    quantization: str = Field(min_length=1)  # "NVFP4 (modelopt)", "none"
    layout: Digest  # of config.json, every tensor's name, type, shape and place, and the files' sizes
    content: Digest | None  # of samples of the tensors' bytes; null where there were no weights


class FileEntry(Settings):
    sha256: Digest
    nbytes: Bytes


class ShapeRange(Settings):
    """Of one input in one shape range (TensorRT's optimization profile)."""

    min: Shape
    opt: Shape
    max: Shape

    @model_validator(mode="after")
    def _ordered(self) -> "ShapeRange":
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError("min, opt and max have different numbers of dimensions")
        if not all(low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError("min, opt and max are not in that order")
        return self


class EngineTensor(Settings):
    """One input or output of an engine."""

    name: str = Field(min_length=1)
    mode: Literal["input", "output"]
    dtype: str = Field(min_length=1)  # "bfloat16"
    shape: tuple[Annotated[int, Field(ge=-1)], ...]  # -1: varies
    aliases: str | None = None  # the input whose memory it is: of K and V caches, and of a weight that is two inputs


class WeightPart(Settings):
    """A stretch of bytes of one checkpoint file."""

    file: ShardName
    offset: Bytes  # from the file's start
    nbytes: Bytes
    tensor: str = Field(min_length=1)  # the name that the checkpoint has for it
    count: Count = 1  # how often its content is repeated: a scale for every row


class WeightEntry(Settings):
    """A placeholder of a stripped engine, or an input that is a weight, and what fills it: ``file``, else ``parts``."""

    name: str = Field(min_length=1)  # as the engine knows it
    dtype: str = Field(min_length=1)
    shape: Shape
    nbytes: Bytes
    transform: str = Field(min_length=1)  # how the parts' bytes become the engine's: "copy", "concat", "bf16", ...
    parts: tuple[WeightPart, ...] = ()  # below each other, or with ``columns`` side by side
    columns: Annotated[int, Field(ge=0)] = 0  # matrices side by side
    file: BundleFileName | None = None  # of the bundle, which holds the bytes as the engine wants them

    @model_validator(mode="after")
    def _adds_up(self) -> "WeightEntry":
        parts = sum(part.nbytes * part.count for part in self.parts)
        if self.transform in ("copy", "concat") and self.parts and parts != self.nbytes:
            raise ValueError(f"{self.name} takes {self.nbytes} bytes, its parts have {parts}")
        if self.transform == "copy" and len(self.parts) > 1:
            raise ValueError(f"{self.name} is a copy of {len(self.parts)} parts: several are a concat")
        return self


class Region(Settings):
    """Temporary device memory that a call in one shape range reserves: see canvasrt.compile.plan_text."""

    shape_range: str
    name: str = Field(min_length=1)
    nbytes: Bytes


class BuildFacts(Settings):
    """What building one engine took and gave."""

    seconds: Annotated[float, Field(ge=0)]
    peak_ram_bytes: Bytes | None = None
    layers: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)  # of the network, by kind
    weight_bytes: dict[str, Bytes] = Field(default_factory=dict)  # by format
    reserved: tuple[Region, ...] | None = None  # null: the plan's text does not tell


class Engine(Settings):
    """One plan. ``shape_ranges`` is in the order of the plan's optimization profiles."""

    file: BundleFileName
    shape_ranges: dict[str, dict[str, ShapeRange]] = Field(min_length=1)  # "encoder" -> tensor -> range
    tensors: tuple[EngineTensor, ...] = Field(min_length=1)
    build: BuildFacts
    weight_map: tuple[WeightEntry, ...] = ()  # placeholders in the plan
    given: tuple[WeightEntry, ...] = ()  # inputs that are weights, bound once: never in the plan, stripped or not

    @model_validator(mode="after")
    def _tensors_agree(self) -> "Engine":
        modes = {tensor.name: tensor.mode for tensor in self.tensors}
        if len(modes) != len(self.tensors):
            raise ValueError("two tensors have the same name")
        for tensor in self.tensors:
            if tensor.aliases is not None and (tensor.aliases == tensor.name or modes.get(tensor.aliases) != "input"):
                raise ValueError(f"{tensor.name} aliases {tensor.aliases}, which is no other input")
        for weight in self.given:
            if modes.get(weight.name) != "input":
                raise ValueError(f"{weight.name} is given as an input, and the engine has none of that name")
        for name, ranges in self.shape_ranges.items():
            unknown = [tensor for tensor in ranges if modes.get(tensor) != "input"]
            if unknown:
                raise ValueError(f"shape range {name} speaks of {unknown[0]}, which is no input")
        for region in self.build.reserved or ():
            if region.shape_range not in self.shape_ranges:
                raise ValueError(f"memory is reserved in {region.shape_range}, which is no shape range")
        return self


class Reason(Settings):
    """One automatic choice: ``moe``, ``dense``, and why."""

    what: str = Field(min_length=1)
    value: str
    reason: str = Field(min_length=1)


class Manifest(Settings):
    """The whole of manifest.json. ``files``, ``created`` and ``self_sha256`` are filled in by BundleWriter.finish."""

    format_version: Literal[1] = FORMAT_VERSION
    self_sha256: Digest = ZEROS  # of this file with these 64 digits as zeros
    build_id: Digest  # equal for builds that give the same bundle: see build_id
    created: str = Field(default="1970-01-01T00:00:00Z", pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z$")
    canvasrt: str = Field(min_length=1)  # version
    compiler: Compiler
    target: Target
    checkpoint: CheckpointIdentity
    weights: WeightsMode
    options: dict[str, str | int] = Field(default_factory=dict)  # of `canvasrt build` beyond checkpoint, profile, out
    precision: str = Field(min_length=1)
    kv_type: Literal["bf16"]
    shapes: Shapes
    moe: Moe
    model: dict[str, JsonValue]  # summary for people
    reasons: tuple[Reason, ...] = ()
    profile: dict[str, JsonValue]  # content of the GPU profile as it was used
    plan: dict[str, JsonValue]  # content of the build plan as it was used
    log: BundleFileName = "build.log"
    files: dict[BundleFileName, FileEntry] = Field(default_factory=dict)  # all but manifest.json
    engines: dict[str, Engine] = Field(min_length=1)

    def faults(self) -> list[str]:
        """What of a finished manifest contradicts itself."""
        named = {f"engines.{name}.file": engine.file for name, engine in self.engines.items()} | {"log": self.log}
        found = [f"{key}: {file} is not among files" for key, file in named.items() if file not in self.files]
        for name, engine in self.engines.items():
            if self.nbytes(engine.file) == 0:
                found.append(f"engines.{name}.file: {engine.file} is empty")
            if self.weights == "inside" and engine.weight_map:
                found.append(f"engines.{name}.weight_map: weights are inside the plan, so there is nothing to fill")
            if self.weights == "stripped" and not engine.weight_map:
                found.append(f"engines.{name}.weight_map: says nothing of how to fill the stripped weights")
            for weight in (*engine.weight_map, *engine.given):
                if weight.file is not None and self.nbytes(weight.file) != weight.nbytes:
                    found.append(f"engines.{name}: {weight.name} wants {weight.nbytes} bytes of {weight.file}")
        return found

    def nbytes(self, file: str) -> int | None:
        return self.files[file].nbytes if file in self.files else None

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the checkpoint must be there when the engines are loaded."""
        weights = [weight for engine in self.engines.values() for weight in (*engine.weight_map, *engine.given)]
        return self.weights != "none" and any(weight.file is None for weight in weights)

    def to_bytes(self) -> bytes:
        """The file's content, ``self_sha256`` computed."""
        blank = (self.model_copy(update={"self_sha256": ZEROS}).model_dump_json(indent=1) + "\n").encode()
        return blank.replace(ZEROS.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def digest_of(content: bytes, self_sha256: str) -> str:
    """The hash that a manifest file with this ``self_sha256`` must carry."""
    return hashlib.sha256(content.replace(self_sha256.encode(), ZEROS.encode(), 1)).hexdigest()


def build_id(
    *,
    canvasrt: str,
    compiler: Compiler,
    target: Target,
    checkpoint: CheckpointIdentity,
    profile: Mapping[str, Any],
    plan: Mapping[str, Any],
    weights: WeightsMode,
    options: Mapping[str, str | int],
) -> str:
    """A hash over all that decides a build's result. Names for people are left out: a moved checkpoint is the same."""
    content = {
        "format_version": FORMAT_VERSION,
        "canvasrt": canvasrt,
        "compiler": compiler.model_dump(mode="json"),
        "target": target.model_dump(mode="json"),
        "checkpoint": checkpoint.model_dump(mode="json", exclude={"folder"}),
        "profile": dict(profile),
        "plan": dict(plan),
        "weights": weights,
        "options": dict(options),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def build_command(manifest: Manifest, *, out: str, checkpoint: str | None = None, profile: str | None = None) -> str:
    """The command that builds such a bundle again, or the like for another profile, quoted for a shell."""
    return command_text(
        checkpoint or manifest.checkpoint.folder,
        profile or manifest.target.profile,
        out,
        {"weights": manifest.weights, **manifest.options},
    )


def command_text(checkpoint: str, profile: str, out: str, options: Mapping[str, str | int]) -> str:
    words = ["canvasrt", "build", "--checkpoint", checkpoint, "--profile", profile, "--out", out]
    for name, value in options.items():
        if (name, value) != ("weights", "inside"):  # the default
            # Placeholders are all that a config.json alone can give: there is no mode to ask for.
            words += [f"--{name}", "stripped" if (name, value) == ("weights", "none") else str(value)]
    return shlex.join(words)
