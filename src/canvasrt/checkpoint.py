"""Named tensors of a checkpoint folder, memory-mapped and lazily read.

Reads safetensors only (never pickle) and parses the header itself: engines take raw pointers to BF16 and FP8 weights,
which NumPy has no types for. Knows the folder's files, every header and which text tensors the model must have.
Knows nothing of what a weight means, of devices, or of quantized layouts, which it refuses.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np

from canvasrt.errors import CheckpointError
from canvasrt.spec import ModelSpec, read_config

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_IGNORED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_ARRAY_DTYPES: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
_QUANTIZED_DTYPES = ("U8", "I8", "F8_", "F6_", "F4")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_OFFSETS = 2  # begin, end
_LISTED = 5
_AGAIN = "Download or copy the file again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is the safetensors name ("BF16"); `offset` counts bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class Checkpoint:
    """The text tensors of one validated checkpoint folder.

    Attributes: `folder`, and `spec`, the ModelSpec of its config.json.
    """

    def __init__(self, folder: Path, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> None:
        """Use `Checkpoint.open`: this trusts that `tensors` are those of `spec` and lie within their files."""
        self.folder = folder
        self.spec = spec
        self._tensors = dict(tensors)
        self._maps: dict[Path, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Validate config.json and every safetensors header in `folder`; reads no tensor data.

        Raises CheckpointError for a missing, damaged, quantized or foreign checkpoint; the message names the file.
        """
        folder = Path(folder)
        config = read_config(folder)
        _refuse_quantized_config(folder, config)
        spec = ModelSpec.from_config(config, str(folder / "config.json"))
        found = _read_folder(folder)
        return cls(folder, spec, _text_tensors(folder, spec, found))

    def names(self) -> tuple[str, ...]:
        """Names of all text tensors, in the order of `ModelSpec.tensors`."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a text tensor. Raises CheckpointError for a name that is none."""
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: no text tensor is named {name!r}. names() lists those that exist.")
        return info

    def array(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """A zero-copy read-only view of a text tensor in its shape; the pages are read when touched.

        F32 comes as float32, F16 as float16, BF16 as uint16 **bit patterns**: arithmetic on them is meaningless,
        widen with ``(bits.astype(np.uint32) << 16).view(np.float32)``. The view may be unaligned, and it keeps the
        file mapped. Raises CheckpointError for an unknown name, or where the file changed size since `open`.
        """
        info = self.info(name)
        data = self._map(info.file)[info.offset : info.offset + info.nbytes]
        return np.asarray(data).view(_ARRAY_DTYPES[info.dtype]).reshape(info.shape)

    def nbytes(self) -> int:
        """Bytes of all text tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def _map(self, file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if file not in self._maps:
            try:
                mapped = np.memmap(file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be mapped ({error}). {_AGAIN}") from None
            end = max(info.offset + info.nbytes for info in self._tensors.values() if info.file == file)
            # reading past the end of a mapped file kills the process with SIGBUS
            if mapped.size < end:
                raise CheckpointError(f"{file}: {end - mapped.size} bytes were cut off since it was opened. {_AGAIN}")
            self._maps[file] = mapped
        return self._maps[file]


def _refuse_quantized_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    if config.get("quantization_config") is not None or nested is not None:
        _refuse_quantized(folder / "config.json", "has a quantization_config")
    if (folder / "hf_quant_config.json").exists():
        _refuse_quantized(folder, "has a hf_quant_config.json")


def _refuse_quantized(where: Path, sign: str) -> NoReturn:
    raise CheckpointError(
        f"{where}: {sign}, so the checkpoint is quantized; this version cannot run quantized checkpoints. "
        "Use the BF16 checkpoint (google/diffusiongemma-26B-A4B-it)."
    )


def _read_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's safetensors files, vision included."""
    if (folder / _SINGLE).exists():
        return _read_header(folder / _SINGLE)
    if (folder / _INDEX).exists():
        return _read_shards(folder)
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder}: holds pytorch_model.bin, which is pickle and can run code when read; CanvasRT reads "
            "safetensors only. Download the safetensors files of this model."
        )
    raise CheckpointError(
        f"{folder}: no weights: neither {_SINGLE} nor {_INDEX} is there. Download the checkpoint again."
    )


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / _INDEX
    shard_of = _read_weight_map(index)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shard_of.values())):
        file = folder / shard
        if not file.exists():
            raise CheckpointError(f"{file}: the shard is missing, but {_INDEX} lists it. Download it into {folder}.")
        for name, info in _read_header(file).items():
            if name in tensors:
                other = tensors[name].file.name
                raise CheckpointError(f"{file}: tensor {name} is also in {other}. Download the checkpoint again.")
            tensors[name] = info
    misplaced = [name for name, shard in shard_of.items() if name not in tensors or tensors[name].file.name != shard]
    if misplaced:
        listed = _listing(f"{name} in {shard_of[name]}" for name in misplaced)
        raise CheckpointError(
            f"{index}: lists tensors that are not in their shards: {listed}. Index and shards are of different "
            "checkpoints; download both again."
        )
    return tensors


def _read_weight_map(index: Path) -> dict[str, str]:
    """Shard file name of each tensor, every name checked to stay in the folder."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON ({error}). {_AGAIN}") from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: found no weight_map object with tensors. {_AGAIN}")
    for name, shard in shard_of.items():
        # a plain file name cannot leave the folder; links stay allowed, the Hugging Face cache is made of them
        plain = isinstance(shard, str) and not set(shard) & set("/\\:\0") and shard.endswith(".safetensors")
        if not plain:
            raise CheckpointError(
                f"{index}: tensor {name} is in {shard!r}, which is not the plain name of a safetensors file in this "
                f"folder. Do not trust this checkpoint; download it from its publisher."
            )
    return shard_of


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = _header_bytes(file, size, stream.read(_LENGTH_BYTES))
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Check that it is a readable file.") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "the header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = _LENGTH_BYTES + header_bytes
    tensors = {name: _tensor(file, name, entry, data_start) for name, entry in header.items()}
    _check_tiling(file, tensors.values(), data_start, size)
    return tensors


def _header_bytes(file: Path, size: int, prefix: bytes) -> int:
    if len(prefix) < _LENGTH_BYTES:
        raise _damaged(file, f"{size} bytes are too few for a safetensors file")
    header_bytes: int = struct.unpack("<Q", prefix)[0]
    if header_bytes > _MAX_HEADER_BYTES:
        raise _damaged(file, f"a header of {header_bytes} bytes is announced, at most {_MAX_HEADER_BYTES} are allowed")
    if _LENGTH_BYTES + header_bytes > size:
        raise _short(file, _LENGTH_BYTES + header_bytes - size)
    return header_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != _OFFSETS:
        raise _damaged(file, f"tensor {name} has no valid dtype, shape and data_offsets")
    if dtype not in _BITS:
        raise _damaged(file, f"tensor {name} has the unknown dtype {dtype!r}")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if (end - begin) * 8 != bits:
        raise _damaged(file, f"tensor {name} takes {end - begin} bytes, {dtype} {shape} takes {bits / 8:g}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_tiling(file: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap from the header's end to the file's end."""
    end, previous = data_start, "the header"
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            fault = "overlaps" if info.offset < end else "leaves a gap after"
            raise _damaged(file, f"tensor {info.name} {fault} {previous}")
        end, previous = info.offset + info.nbytes, info.name
    if end > size:
        raise _short(file, end - size)
    if end < size:
        raise _damaged(file, f"it is {size - end} bytes longer than its header says")


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a valid safetensors file: {fault}. {_AGAIN}")


def _short(file: Path, missing_bytes: int) -> CheckpointError:
    return CheckpointError(f"{file}: the file is {missing_bytes} bytes short, so it was not copied whole. {_AGAIN}")


def _text_tensors(folder: Path, spec: ModelSpec, found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that `spec` asks for, each of the right shape and type, after refusing everything unexpected."""
    expected = spec.tensors()
    text = {name: info for name, info in found.items() if not name.startswith(_IGNORED_PREFIXES)}
    for info in text.values():
        if info.dtype.startswith(_QUANTIZED_DTYPES):
            _refuse_quantized(info.file, f"tensor {info.name} is {info.dtype}")
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in text]
    extra = [f"{name} {list(info.shape)}" for name, info in text.items() if name not in expected]
    present = {name: text[name] for name in expected if name in text}
    shapes = [
        f"{name}: found {list(info.shape)}, expected {list(expected[name])}"
        for name, info in present.items()
        if info.shape != expected[name]
    ]
    dtypes = [f"{name}: found {info.dtype}" for name, info in present.items() if info.dtype not in _ARRAY_DTYPES]
    faults = (
        ("missing tensors", missing),
        ("unexpected tensors", extra),
        ("tensors of a wrong shape", shapes),
        (f"tensors of a wrong dtype, expected {', '.join(_ARRAY_DTYPES)}", dtypes),
    )
    lines = [f"{folder}: {len(items)} {fault}: {_listing(items)}" for fault, items in faults if items]
    if lines:
        advice = "The weights are not those of config.json; download both again, from one checkpoint."
        raise CheckpointError("\n".join([*lines, advice]))
    return present


def _listing(items: Iterable[str]) -> str:
    listed = list(items)
    more = len(listed) - _LISTED
    return "; ".join(listed[:_LISTED]) + (f" + {more} more" if more > 0 else "")
