"""Finds each tensor of the model among the stored ones, in every layout that is published.

A plain checkpoint stores what `ModelSpec.tensors` names. A quantized one stores a matrix in several tensors (weight,
weight_scale, weight_scale_2, input_scale), and the experts of a layer one by one. Facts: checkpoint headers of Google,
NVIDIA (ModelOpt) and Red Hat (compressed-tensors). Knows nothing of arithmetic: see canvasrt.ops.torch_formats.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from canvasrt.errors import CheckpointError
from canvasrt.formats import PLAIN, Format, Quantization
from canvasrt.spec import ModelSpec
from canvasrt.tensorfile import TensorInfo, listing

PLAIN_DTYPES = ("BF16", "F16", "F32")
_SCALARS = ("F32", "BF16", "F16")
_IGNORED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_MATRIX = 2  # axes
_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"
_WEIGHT, _SCALE, _GLOBAL, _INPUT = ".weight", ".weight_scale", ".weight_scale_2", ".input_scale"


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
    used = {info.name for stored in result.values() for info in stored.infos()}
    touched = used | {line.split()[0].removesuffix(":") for line in (*faults.shapes, *faults.dtypes, *faults.formats)}
    extra = [f"{name} {list(info.shape)}" for name, info in text.items() if name not in touched]
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
    if name in found and found[name].dtype in PLAIN_DTYPES:
        return _plain(found[name], shape, faults)
    parts = _parts(name, shape) if quantization is not None else None
    if parts is None:
        if name in found:
            faults.dtypes.append(f"{name}: found {found[name].dtype}")
        else:
            faults.missing.append(f"{name} {list(shape)}")
        return None
    matrices: list[Matrix] = []
    formats: set[Format] = set()
    for stem, size in parts:
        matched = _matrix(stem, size, quantization, found, faults)
        if matched is None:
            return None
        matrices.append(matched[0])
        formats.add(matched[1])
    if len(formats) > 1:
        stems = f"{parts[0][0]} to {parts[-1][0]}"
        faults.formats.append(f"{stems}: {' and '.join(sorted(each.weights for each in formats))} in one tensor")
        return None
    return Stored(shape, formats.pop(), tuple(matrices))


def _plain(info: TensorInfo, shape: tuple[int, ...], faults: _Faults) -> Stored | None:
    if info.shape != shape:
        faults.shapes.append(f"{info.name}: found {list(info.shape)}, expected {list(shape)}")
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
    weight = found.get(stem + _WEIGHT)
    if weight is None:
        faults.missing.append(f"{stem}{_WEIGHT} {list(size)}")
        return None
    form = _format(weight, quantization)
    if form is None:
        faults.dtypes.append(f"{weight.name}: found {weight.dtype}")
        return None
    parts: dict[str, TensorInfo] = {}
    good = True
    for suffix, (shapes, dtypes) in _expected(form, size).items():
        info = found.get(stem + suffix)
        if info is None:
            faults.missing.append(f"{stem}{suffix} {list(shapes[0])}")
            good = False
        elif info.shape not in shapes:
            faults.shapes.append(f"{info.name}: found {list(info.shape)}, expected {list(shapes[0])}")
            good = False
        elif info.dtype not in dtypes:
            faults.dtypes.append(f"{info.name}: found {info.dtype}")
            good = False
        else:
            parts[suffix] = info
    if not good:
        return None
    return Matrix(parts[_WEIGHT], parts.get(_SCALE), parts.get(_GLOBAL), parts.get(_INPUT)), form


def _format(weight: TensorInfo, quantization: Quantization | None) -> Format | None:
    if weight.dtype in PLAIN_DTYPES:
        return PLAIN
    if quantization is None:
        return None
    return {"F8_E4M3": quantization.eight_bit, "U8": quantization.four_bit}.get(weight.dtype)


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
            _SCALE: ((*scalar, (out, 1), (out,)), _SCALARS),
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
            _SCALE: (((out, width // form.block),), _SCALARS),
        }
    if form.activations in ("static", "block"):
        expected[_INPUT] = (scalar, _SCALARS)
    return expected


def _refuse(folder: Path, quantization: Quantization | None, faults: _Faults, extra: Iterable[str]) -> None:
    expected = ", ".join(PLAIN_DTYPES) if quantization is None else f"those of {quantization.name}"
    listed = (
        ("missing tensors", faults.missing),
        ("unexpected tensors", list(extra)),
        ("tensors of a wrong shape", faults.shapes),
        (f"tensors of a wrong dtype, expected {expected}", faults.dtypes),
        ("tensors of mixed formats", faults.formats),
    )
    lines = [f"{folder}: {len(items)} {fault}: {listing(items)}" for fault, items in listed if items]
    if not lines:
        return
    advice = "The weights are not those of config.json; download both again, from one checkpoint."
    if quantization is None and any(name.endswith((_SCALE, _GLOBAL, _INPUT)) for name in _names(extra)):
        advice = (
            "These are the weights of a quantized checkpoint, but neither a quantization_config in config.json nor a "
            "hf_quant_config.json says so: download those two files of the checkpoint too."
        )
    raise CheckpointError("\n".join([*lines, advice]))


def _names(lines: Iterable[str]) -> Iterator[str]:
    return (line.split()[0] for line in lines)
