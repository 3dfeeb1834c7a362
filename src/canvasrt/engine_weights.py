"""The weights that an engine takes, each described by the checkpoint tensors it is made of, and the making.

The build puts them into a plan or leaves them out; a runtime that loads a plan without weights makes the same ones
again from the same description, which the bundle's manifest keeps. NumPy only: a serving image has no torch. Knows
nothing of compilers or of what a weight means to the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CheckpointError

EngineType = Literal["bf16", "fp32", "fp8", "fp4", "int4"]
Bytes = NDArray[np.uint8]

_BITS: dict[EngineType, int] = {"bf16": 16, "fp32": 32, "fp8": 8, "fp4": 4, "int4": 4}
ALIGNMENT = 16  # bytes
_FLOAT32_SIGNIFICANT = 16  # bits of a float32 that a BF16 number lacks
_E4M3_NAN = 0x7F  # without its sign


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor, by its name in the files, as ``count`` equal pieces below each other."""

    tensor: str
    count: int = 1  # how often its content is repeated: a scale for every row, a norm for every head


@dataclass(frozen=True, slots=True)
class EngineWeight:
    """``parts`` lie below each other (axis -2 of the whole, row-major), or with ``columns`` side by side.

    ``fp8``, ``fp4`` and block scales are taken bit by bit, ``bf16`` and ``fp32`` are converted from whatever plain type
    is stored (round to nearest, ties to even). ``int4`` comes from bytes that hold two rows each (the even row in the
    low half) and goes to bytes that hold two columns each (the even column in the low half).
    """

    name: str
    dtype: EngineType
    shape: tuple[int, ...]  # in numbers, not bytes
    parts: tuple[Part, ...]
    columns: int = 0  # side by side: matrices of one part, 0 for none. A part of 3 axes counts as that many matrices

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.count * _BITS[self.dtype] // 8


def made(checkpoint: Checkpoint, weight: EngineWeight) -> Bytes:
    """The bytes of a weight; a view of the mapped file where they lie there as they are.

    Raises CheckpointError for NaN or infinity, naming tensor and file.
    """
    pieces = [_piece(checkpoint, weight, part) for part in weight.parts]
    if weight.columns:
        return _side_by_side(pieces, weight)
    if len(pieces) == 1:
        return pieces[0].reshape(-1)
    whole = np.empty(weight.nbytes, np.uint8)
    start = 0
    for piece in pieces:
        flat = piece.reshape(-1)
        whole[start : start + flat.size] = flat
        start += flat.size
    return whole


def aligned(data: Bytes) -> Bytes:
    """Where a compiler or a copy to a GPU may read it: a tensor of a safetensors file may start anywhere."""
    return data if data.ctypes.data % ALIGNMENT == 0 else data.copy()


def _piece(checkpoint: Checkpoint, weight: EngineWeight, part: Part) -> Bytes:
    """The bytes of one part, (rows, bytes of a row)."""
    array = checkpoint.array(part.tensor)
    stored = checkpoint.info(part.tensor).dtype
    if weight.dtype == "int4":
        converted = _columns_packed(array)
    elif weight.dtype in ("bf16", "fp32"):
        converted = _plain(array, stored, weight.dtype)
        _check_finite(checkpoint, part.tensor, converted, weight.dtype)
    else:
        converted = np.asarray(array)
        if stored == "F8_E4M3" and bool(((converted & _E4M3_NAN) == _E4M3_NAN).any()):
            raise _not_finite(checkpoint, part.tensor)
    width = converted.shape[-1] if converted.ndim else 1
    rows = converted.reshape(-1, width)
    if part.count > 1:
        rows = np.repeat(rows, part.count, axis=0)
    return np.ascontiguousarray(rows).view(np.uint8).reshape(rows.shape[0], -1)


def _plain(array: NDArray[Any], stored: str, wanted: EngineType) -> NDArray[Any]:
    """Plain numbers as float32, or as the bit patterns of BF16 in uint16."""
    if stored == "BF16":
        if wanted == "bf16":
            return array
        return (array.astype(np.uint32) << _FLOAT32_SIGNIFICANT).view(np.float32)
    if stored == "F8_E4M3":  # block scales of a network whose precision is float32
        return _e4m3(array)
    numbers = array.astype(np.float32, copy=False)
    return numbers if wanted == "fp32" else to_bf16(numbers)


def to_bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns, rounded to nearest with ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounding = ((bits >> _FLOAT32_SIGNIFICANT) & 1) + np.uint32(0x7FFF)
    rounded = ((bits + rounding) >> _FLOAT32_SIGNIFICANT).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _e4m3(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """E4M3 bit patterns as numbers, by a table of all 256."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    size[(code & _E4M3_NAN) == _E4M3_NAN] = np.nan
    table = np.where(code > _E4M3_NAN, -size, size).astype(np.float32)
    return table[bits]


def _columns_packed(array: NDArray[np.uint8]) -> Bytes:
    """(out / 2, in) with two rows to a byte to (out, in / 2) with two columns to a byte."""
    low, high = array & 15, array >> 4
    whole = np.empty((array.shape[0] * 2, array.shape[1] // 2), np.uint8)
    whole[0::2] = low[:, 0::2] | (low[:, 1::2] << 4)
    whole[1::2] = high[:, 0::2] | (high[:, 1::2] << 4)
    return whole


def _side_by_side(pieces: Sequence[Bytes], weight: EngineWeight) -> Bytes:
    """``columns`` matrices of equal height in a row: (experts, out, in) as (out, experts * in)."""
    matrices = weight.columns
    height = weight.shape[-2]
    whole = np.empty((height, weight.nbytes // height), np.uint8)
    width = whole.shape[1] // matrices
    column = 0
    for piece in pieces:
        for matrix in piece.reshape(-1, height, width):
            whole[:, column : column + width] = matrix
            column += width
    return whole.reshape(-1)


def _check_finite(checkpoint: Checkpoint, name: str, converted: NDArray[Any], dtype: EngineType) -> None:
    exponent = 0x7F80
    bad = (converted & exponent) == exponent if dtype == "bf16" else ~np.isfinite(converted)
    if bool(bad.any()):
        raise _not_finite(checkpoint, name)


def _not_finite(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} in {checkpoint.info(name).file} holds values that are NaN or infinite: the file is damaged or "
        "training diverged. Download or export the checkpoint again."
    )
