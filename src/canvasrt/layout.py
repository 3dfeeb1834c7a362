"""Finds each tensor of the model among the stored ones, in every layout that is published.

A plain checkpoint stores what `ModelSpec.tensors` names. A quantized one stores a matrix in several tensors (weight,
weight_scale, weight_scale_2, input_scale), and the experts of a layer one by one. Facts: checkpoint headers of Google,
NVIDIA (ModelOpt) and Red Hat (compressed-tensors). Knows nothing of arithmetic: see canvasrt.ops.torch_formats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from canvasrt.errors import CheckpointError
from canvasrt.formats import PLAIN, Format, Quantization
from canvasrt.spec import ModelSpec
from canvasrt.tensorfile import TensorInfo, listing

PLAIN_DTYPES = ("BF16", "F16", "F32")
_QUANTIZED = ("U8", "F8_E4M3")
_IGNORED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"
_WEIGHT, _SCALE, _GLOBAL, _INPUT = ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"
_SUFFIXES = (_WEIGHT, _SCALE, _GLOBAL, _INPUT)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix (out, in) as it lies in the files."""

    weight: TensorInfo  # plain or FP8 (out, in); NVFP4 U8 (out, in / 2), low half first; INT4 U8 (out / 2, in)
    scale: TensorInfo | None = None  # FP8: () or (out, 1); NVFP4: E4M3 (out, in / 16); INT4: (out, in / block)
    global_scale: TensorInfo | None = None  # NVFP4: (), times every block's scale
    input_scale: TensorInfo | None = None  # static FP8: (); NVFP4: (), times the scale of every block of activations


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the model and where its parts lie.

    ``matrices`` lie below each other in ``shape``: one, or for experts (experts, out, in) one per expert of
    down_proj, and gate and up in turn of gate_up_proj.
    """

    shape: tuple[int, ...]
    format: Format
    matrices: tuple[Matrix, ...]

    def infos(self) -> Iterator[TensorInfo]:
        for matrix in self.matrices:
            for info in (matrix.weight, matrix.scale, matrix.global_scale, matrix.input_scale):
                if info is not None:
                    yield info


@dataclass(slots=True)
class _Faults:
    missing: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # stored tensors that belong to the model, right or wrong


def stored_tensors(
    folder: Path, spec: ModelSpec, quantization: Quantization | None, found: Mapping[str, TensorInfo]
) -> dict[str, Stored]:
    """Every text tensor of the model, in the order of `ModelSpec.tensors`.

    Raises CheckpointError that lists what is missing, unexpected, of a wrong shape or dtype, or quantized where
    nothing may be.
    """
    text = {name: info for name, info in found.items() if not name.startswith(_IGNORED_PREFIXES)}
    faults = _Faults()
    result: dict[str, Stored] = {}
    for name, shape in spec.tensors().items():
        stored = _stored(name, shape, quantization, text, faults)
        if stored is not None:
            result[name] = stored
    extra = [info for name, info in text.items() if name not in faults.seen]
    _refuse(folder, quantization, faults, extra)
    return result


def _stored(
    name: str,
    shape: tuple[int, ...],
    quantization: Quantization | None,
    found: Mapping[str, TensorInfo],
    faults: _Faults,
) -> Stored | None:
    """The tensor, or None after noting what is wrong with it."""
    whole = found.get(name)
    parts = _parts(name, shape) if quantization is not None else None
    if parts is None or (whole is not None and whole.dtype in PLAIN_DTYPES):
        return _plain(name, shape, whole, faults)
    matched = [(stem, _matrix(stem, size, quantization, found, faults)) for stem, size in parts]
    matrices = [(stem, match) for stem, match in matched if match is not None]
    if len(matrices) < len(matched):
        return None
    first = matrices[0][1][1]
    odd = [(stem, form) for stem, (_, form) in matrices if form != first]
    if odd:
        stem, form = odd[0]
        faults.formats.append(f"{stem} is {form.weights}, {matrices[0][0]} is {first.weights}")
        return None
    return Stored(shape, first, tuple(matrix for _, (matrix, _) in matrices))


def _plain(name: str, shape: tuple[int, ...], info: TensorInfo | None, faults: _Faults) -> Stored | None:
    if info is None:
        faults.missing.append(f"{name} {list(shape)}")
        return None
    faults.seen.add(name)
    if info.dtype not in PLAIN_DTYPES:
        faults.dtypes.append(f"{name}: found {info.dtype}, expected {', '.join(PLAIN_DTYPES)}")
        return None
    if info.shape != shape:
        faults.shapes.append(f"{name}: found {list(info.shape)}, expected {list(shape)}")
        return None
    return Stored(shape, PLAIN, (Matrix(info),))


def _parts(name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, int]]] | None:
    """(name without suffix, (out, in)) of the matrices of a tensor that may be quantized; None for any other."""
    if name.endswith((_GATE_UP, _DOWN)):
        experts, out, size = shape
        stem = name.rsplit(".", 1)[0]
        if name.endswith(_DOWN):
            return [(f"{stem}.{expert}.down_proj", (out, size)) for expert in range(experts)]
        halves = ("gate_proj", "up_proj")
        return [(f"{stem}.{expert}.{half}", (out // 2, size)) for expert in range(experts) for half in halves]
    linear = name.endswith("_proj.weight") and (".self_attn." in name or ".mlp." in name)
    return [(name.removesuffix(_WEIGHT), (shape[0], shape[1]))] if linear else None


def _matrix(
    stem: str,
    size: tuple[int, int],
    quantization: Quantization | None,
    found: Mapping[str, TensorInfo],
    faults: _Faults,
) -> tuple[Matrix, Format] | None:
    parts = {suffix: found[stem + suffix] for suffix in _SUFFIXES if stem + suffix in found}
    faults.seen.update(info.name for info in parts.values())
    weight = parts.get(_WEIGHT)
    if weight is None:
        faults.missing.append(f"{stem}{_WEIGHT} {list(size)}")
        return None
    form, allowed = _format(weight, quantization)
    if form is None:
        faults.dtypes.append(f"{weight.name}: found {weight.dtype}, expected {' or '.join(allowed)}")
        return None
    if form.block and size[1] % form.block:
        faults.shapes.append(f"{weight.name}: {size[1]} inputs are no multiple of the block of {form.block}")
        return None
    expected = _expected(form, size)
    faults.seen.difference_update(stem + suffix for suffix in parts if suffix not in expected)
    good = True
    for suffix, (shapes, dtypes) in expected.items():
        info = parts.get(suffix)
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        if info is None:
            faults.missing.append(f"{stem}{suffix} {wanted}")
        elif info.shape not in shapes:
            faults.shapes.append(f"{info.name}: found {list(info.shape)}, expected {wanted}")
        elif info.dtype not in dtypes:
            faults.dtypes.append(f"{info.name}: found {info.dtype}, expected {' or '.join(dtypes)}")
        else:
            continue
        good = False
    if not good:
        return None
    return Matrix(weight, parts.get(_SCALE), parts.get(_GLOBAL), parts.get(_INPUT)), form


def _format(weight: TensorInfo, quantization: Quantization | None) -> tuple[Format | None, list[str]]:
    """The format that a stored dtype means in this checkpoint, if any, and the dtypes that it may have."""
    formats: dict[str, Format] = dict.fromkeys(PLAIN_DTYPES, PLAIN)
    if quantization is not None and quantization.eight_bit is not None:
        formats["F8_E4M3"] = quantization.eight_bit
    if quantization is not None and quantization.four_bit is not None:
        formats["U8"] = quantization.four_bit
    return formats.get(weight.dtype), list(formats)


_Expected = dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]


def _expected(form: Format, size: tuple[int, int]) -> _Expected:
    """For each suffix the shapes and dtypes that a matrix (out, in) of this format may have."""
    out, width = size
    scalar: tuple[tuple[int, ...], ...] = ((), (1,))
    if form.weights == "plain":
        return {_WEIGHT: ((size,), PLAIN_DTYPES)}
    if form.weights == "fp8":
        expected: _Expected = {
            _WEIGHT: ((size,), ("F8_E4M3",)),
            _SCALE: ((*scalar, (out, 1), (out,)), PLAIN_DTYPES),
        }
    elif form.weights == "nvfp4":
        expected = {
            _WEIGHT: (((out, width // 2),), ("U8",)),
            _SCALE: (((out, width // form.block),), ("F8_E4M3",)),
            _GLOBAL: (scalar, ("F32",)),
        }
    else:
        expected = {
            _WEIGHT: (((out // 2, width),), ("U8",)),
            _SCALE: (((out, width // form.block),), PLAIN_DTYPES),
        }
    if form.activations in ("static", "block"):
        expected[_INPUT] = (scalar, PLAIN_DTYPES)
    return expected


def _refuse(folder: Path, quantization: Quantization | None, faults: _Faults, extra: Sequence[TensorInfo]) -> None:
    listed = (
        ("missing tensors", faults.missing),
        ("unexpected tensors", [f"{info.name} {list(info.shape)}" for info in extra]),
        ("tensors of a wrong shape", faults.shapes),
        ("tensors of a wrong dtype", faults.dtypes),
        ("tensors of mixed formats", faults.formats),
    )
    lines = [f"{folder}: {len(items)} {fault}: {listing(items)}" for fault, items in listed if items]
    if not lines:
        return
    advice = "The weights are not those of config.json; download both again, from one checkpoint."
    if any(info.name.endswith((".k_scale", ".v_scale")) for info in extra):
        advice = (
            "k_scale and v_scale come from a calibrated K/V cache. Encoder and decoder share those names and not the "
            "values, so this version takes a cache with scale 1 only: use a recipe that casts (kv_cache: fp8)."
        )
    elif quantization is None and any(info.dtype in _QUANTIZED or info.name.endswith(_SUFFIXES[1:]) for info in extra):
        advice = (
            "These are the weights of a quantized checkpoint, but neither a quantization_config in config.json nor a "
            "hf_quant_config.json says so: download those two files of the checkpoint too."
        )
    raise CheckpointError("\n".join([*lines, advice]))
