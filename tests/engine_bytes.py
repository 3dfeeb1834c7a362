"""What fills a stripped engine, made from its manifest and the checkpoint's files alone, and the numbers that it means.

Shares no code with canvasrt.engine_weights: torch converts, and the tables of layouts.py decode.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canvasrt.bundle.manifest import WeightEntry
from canvasrt.engine_weights import EngineWeight
from layouts import E2M1, E4M3, VISION

Array = np.ndarray[Any, np.dtype[Any]]
BITS = {"bf16": 16, "fp32": 32, "fp8": 8, "fp4": 4, "int4": 4}
TYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F8_E4M3": torch.uint8, "U8": torch.uint8}
_SUFFIX = re.compile(rb"_constant[A-Z][A-Za-z0-9]*")
_LONGEST_NAME = 200
_LENGTH_BYTES = 8


@cache
def stored_tensors(folder: Path) -> dict[str, tuple[str, str, list[int], int, int]]:
    """Of every tensor: file, dtype, shape, offset from the file's start, bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                place = _LENGTH_BYTES + size + begin
                found[name] = (file.name, entry["dtype"], entry["shape"], place, end - begin)
    return found


def needed_tensors(folder: Path) -> set[str]:
    """The stored tensors that an engine's weights are made of: scales of activations are numbers in the plan."""
    names = stored_tensors(folder)
    return {name for name in names if not name.startswith(VISION) and not name.endswith(".input_scale")}


def faults(folder: Path, entries: Sequence[WeightEntry]) -> list[str]:
    """Parts that are not where the files say that a tensor is, or lie outside of their file."""
    stored = stored_tensors(folder)
    found = []
    for entry in entries:
        for part in entry.parts:
            file, _, _, offset, nbytes = stored[part.tensor]
            if (part.file, part.offset, part.nbytes) != (file, offset, nbytes):
                found.append(f"{entry.name}: {part.tensor} is at {part.offset}, expected {offset} of {file}")
            if part.offset + part.nbytes > (folder / part.file).stat().st_size:
                found.append(f"{entry.name}: {part.tensor} ends behind its file")
    return found


def rebuilt(folder: Path, entry: WeightEntry) -> bytes:
    """The bytes of a weight, as the manifest says that they are made."""
    stored = stored_tensors(folder)
    pieces = []
    for part in entry.parts:
        with (folder / part.file).open("rb") as stream:
            stream.seek(part.offset)
            raw = bytearray(stream.read(part.nbytes))
        _, dtype, shape, _, _ = stored[part.tensor]
        tensor = torch.frombuffer(raw, dtype=TYPES[dtype]).reshape(shape or [1])
        rows = _converted(tensor, entry.transform).reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else tensor.numel())
        if entry.transform == "int4":
            rows = _packed_by_columns(tensor)
        pieces.append(rows.repeat_interleave(part.count, 0) if tensor.numel() > 1 else rows.repeat(part.count, 1))
    if not entry.columns:
        return b"".join(piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces)
    height = entry.shape[-2]
    matrices = [matrix for piece in pieces for matrix in piece.reshape(-1, height, piece.shape[-1])]
    assert len(matrices) == entry.columns
    return torch.cat(matrices, 1).contiguous().view(torch.uint8).numpy().tobytes()


def _converted(tensor: torch.Tensor, transform: str) -> torch.Tensor:
    return tensor.to({"bf16": torch.bfloat16, "fp32": torch.float32}.get(transform, tensor.dtype))


def _packed_by_columns(tensor: torch.Tensor) -> torch.Tensor:
    """Two rows in a byte to two columns in a byte."""
    whole = torch.stack([tensor & 15, tensor >> 4], 1).reshape(-1, tensor.shape[-1])
    return whole[:, 0::2] | whole[:, 1::2] << 4


def numbers(content: bytes, entry: WeightEntry) -> Array:
    """float32 in the engine's shape, without the scales that lie in other entries."""
    raw = np.frombuffer(content, np.uint8)
    if entry.dtype in ("fp4", "int4"):
        codes = np.stack([raw & 15, raw >> 4], 1).reshape(entry.shape)
        return E2M1[codes] if entry.dtype == "fp4" else np.where(codes > 7, codes.astype(np.int8) - 16, codes)
    if entry.dtype == "fp8":
        return E4M3[raw].reshape(entry.shape)
    kind = torch.bfloat16 if entry.dtype == "bf16" else torch.float32
    return torch.frombuffer(bytearray(content), dtype=kind).float().numpy().reshape(entry.shape)


def matrices(folder: Path, entries: Sequence[WeightEntry]) -> dict[str, Array]:
    """float32 of every weight of the plan, scales applied: (..., out, in)."""
    by_name = {entry.name: entry for entry in entries}

    def of(name: str) -> Array:
        return numbers(rebuilt(folder, by_name[name]), by_name[name])

    found = {}
    for name in by_name:
        if name.endswith((".scale", ".multiplier")) and name.rpartition(".")[0] in by_name:
            continue
        whole = of(name).astype(np.float32)
        if f"{name}.scale" in by_name:
            scale = of(f"{name}.scale")
            whole = whole * np.repeat(scale, whole.shape[-1] // scale.shape[-1], -1)
        if f"{name}.multiplier" in by_name:
            multiplier = of(f"{name}.multiplier")
            assert by_name[f"{name}.multiplier"].dtype == "fp32"
            whole = whole * np.swapaxes(multiplier, -1, -2)
        found[name] = whole
    return found


def expected_matrix(name: str, values: Mapping[str, Array]) -> Array:
    """What a weight stands for, by its name: ``A.q_proj.weight+k_proj`` are two tensors below each other."""
    first, *others = name.split("+")
    stem = first.removesuffix(".bf16").removesuffix(".fp32")
    if stem.endswith(".self_attn.qk_norm"):
        raise KeyError(name)  # rows for heads: the caller knows how many
    parts = [values[stem]]
    for other in others:
        parts.append(values[f"{stem.rsplit('.', 2)[0]}.{other}.weight"])
    return np.concatenate(parts) if others else parts[0]


def names_in(plan: bytes) -> set[str]:
    """The weights that a stripped plan wants to be given: it holds NAME_constantTYPE behind the length of that."""
    found = set()
    for match in _SUFFIX.finditer(plan):
        for start in range(match.start() - 1, match.start() - _LONGEST_NAME, -1):
            if plan[start - _LENGTH_BYTES : start] == (match.end() - start).to_bytes(_LENGTH_BYTES, "little"):
                found.add(plan[start : match.start()].decode())
                break
    return found


def stretches(content: bytes, entry: WeightEntry | EngineWeight, length: int = 64) -> tuple[bytes, bytes]:
    """Bytes of the second row and of the second column of a weight's first matrix, packed as they are."""
    raw = np.frombuffer(content, np.uint8)
    bits = BITS[entry.dtype]
    if bits == 4:
        codes = np.stack([raw & 15, raw >> 4], 1).reshape(entry.shape)
    else:
        codes = raw.view(np.dtype(f"u{bits // 8}")).reshape(entry.shape)
    matrix = codes.reshape(-1, *codes.shape[-2:])[0]

    def packed(line: Array) -> bytes:
        line = line[0::2] | line[1::2] << 4 if bits == 4 else line
        return np.ascontiguousarray(line).tobytes()[:length]

    return packed(matrix[1]), packed(matrix[:, 1])
