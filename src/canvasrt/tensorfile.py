"""Safetensors files of a folder: every header parsed and checked, no tensor data read.

Never pickle, and not the safetensors library: engines take raw pointers to BF16 and FP8 weights, which NumPy has no
types for. Knows nothing of which tensors a model has or of what they mean.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from canvasrt.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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
AGAIN = "Download or copy the file again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is the safetensors name ("BF16"); `offset` counts bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_folder(folder: Path) -> dict[str, TensorInfo]:
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
        listed = listing(f"{name} in {shard_of[name]}" for name in misplaced)
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
        raise CheckpointError(f"{index}: not readable as JSON ({error}). {AGAIN}") from None
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{index}: found no weight_map object with tensors. {AGAIN}")
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
    return CheckpointError(f"{file}: not a valid safetensors file: {fault}. {AGAIN}")


def _short(file: Path, missing_bytes: int) -> CheckpointError:
    return CheckpointError(f"{file}: the file is {missing_bytes} bytes short, so it was not copied whole. {AGAIN}")


def listing(items: Iterable[str]) -> str:
    """The first few items for a message, and how many more there are."""
    listed = list(items)
    more = len(listed) - _LISTED
    return "; ".join(listed[:_LISTED]) + (f" + {more} more" if more > 0 else "")
