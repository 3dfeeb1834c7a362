"""What a TensorRT tensor is on the CPU: data types, constants read from memory, and refusals that name their layer.

A value is a torch tensor, or a `Narrow` for the four-bit types that torch does not have.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorrt_rtx as trt
import torch

DT = trt.DataType

# E8M0 and the four-bit types are missing: a layer that meets one of them must say so itself.
TORCH_TYPES = {
    DT.FLOAT: torch.float32,
    DT.HALF: torch.float16,
    DT.BF16: torch.bfloat16,
    DT.INT8: torch.int8,
    DT.INT32: torch.int32,
    DT.INT64: torch.int64,
    DT.UINT8: torch.uint8,
    DT.BOOL: torch.bool,
    DT.FP8: torch.float8_e4m3fn,
}
TRT_TYPES = {torch_type: trt_type for trt_type, torch_type in TORCH_TYPES.items()}
FLOATS = frozenset({DT.FLOAT, DT.HALF, DT.BF16})
INTEGERS = frozenset({DT.INT8, DT.INT32, DT.INT64})
INDICES = frozenset({DT.INT32, DT.INT64})
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Narrow:
    """A four-bit tensor, one element per storage element.

    FP4 E2M1 is stored as float8_e4m3fn (which has each of its values), INT4 as int8.
    """

    values: torch.Tensor
    dtype: trt.DataType

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


Value = torch.Tensor | Narrow
Kernel = Callable[[list[Value | None]], list[Value]]
Builder = Callable[[trt.ILayer], Kernel]


def data_type(value: Value) -> trt.DataType:
    return value.dtype if isinstance(value, Narrow) else TRT_TYPES[value.dtype]


def layer_type(layer: trt.ILayer) -> trt.LayerType:
    """The kind of a layer, also of an IActivationLayer, whose own `type` hides it."""
    return trt.ILayer.type.fget(layer)


def describe(layer: trt.ILayer) -> str:
    return f"{layer_type(layer).name} layer {layer.name!r}"


def refusal(layer: trt.ILayer, what: str) -> NotImplementedError:
    return NotImplementedError(f"{describe(layer)}: {what} is not supported by the interpreter")


def require(layer: trt.ILayer, allowed: frozenset[trt.DataType], *indices: int) -> None:
    """Refuse a layer whose inputs of these indices are absent or of another type."""
    for index in indices:
        tensor = layer.get_input(index)
        if tensor is None:
            raise refusal(layer, f"a missing input {index}")
        if tensor.dtype not in allowed:
            raise refusal(layer, f"input {index} of type {tensor.dtype.name}")


def require_inputs(layer: trt.ILayer, count: int) -> None:
    """Refuse inputs beyond the first `count`: an option this interpreter does not know."""
    for index in range(count, layer.num_inputs):
        if layer.get_input(index) is not None:
            raise refusal(layer, f"input {index}")


def require_same_type(layer: trt.ILayer, *indices: int) -> None:
    types = {layer.get_input(index).dtype.name for index in indices}
    if len(types) > 1:
        raise refusal(layer, f"inputs of different types {sorted(types)}")


def require_same_rank(layer: trt.ILayer, *indices: int) -> None:
    ranks = {len(layer.get_input(index).shape) for index in indices}
    if len(ranks) > 1:
        raise refusal(layer, f"inputs of different ranks {sorted(ranks)}")


def axes_of(mask: int) -> list[int]:
    """The dimensions of a bit mask."""
    return [bit for bit in range(trt.Dims.MAX_DIMS) if mask >> bit & 1]


def single_axis(layer: trt.ISoftMaxLayer | trt.ITopKLayer) -> int:
    """The only dimension of a layer's bit mask."""
    axes = axes_of(layer.axes)
    if len(axes) != 1 or axes[0] >= len(layer.get_input(0).shape):
        raise refusal(layer, f"axes {axes}")
    return axes[0]


def in_float32(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Compute in float32 and round the result once to the type of the first input."""
    return function(*(tensor.float() for tensor in inputs)).to(inputs[0].dtype)


def raw(value: Value) -> torch.Tensor:
    """The elements for layers that only move them; torch cannot index or concatenate float8."""
    tensor = value.values if isinstance(value, Narrow) else value
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def like(value: Value, moved: torch.Tensor) -> Value:
    """`moved`, a result of moving `raw(value)`, with the type of `value` again."""
    tensor = value.values if isinstance(value, Narrow) else value
    restored = moved.view(tensor.dtype) if tensor.dtype == torch.float8_e4m3fn else moved
    return Narrow(restored, value.dtype) if isinstance(value, Narrow) else restored


def integers(value: Value | None) -> list[int]:
    """The elements of a shape tensor (INT32 or INT64, rank 0 or 1)."""
    assert isinstance(value, torch.Tensor)
    return [int(element) for element in value.flatten().tolist()]


class _WeightsStruct(ctypes.Structure):
    """nvinfer1::Weights."""

    _fields_ = (("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64))


def weights_address(weights: trt.Weights | np.ndarray) -> int:
    """Where the data of a constant lies.

    The bindings return an array for types NumPy knows and otherwise a `trt.Weights` without access to its pointer. The
    C++ object is then read through the first word of the pybind11 instance, and checked against type and size.
    """
    if isinstance(weights, np.ndarray):
        return weights.ctypes.data
    pointer = ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value
    struct = _WeightsStruct.from_address(pointer)
    if (struct.type, struct.count) != (int(weights.dtype), weights.size):
        raise RuntimeError("the pybind11 instance of trt.Weights does not hold its C++ object where it was expected")
    return struct.values or 0


def weights_bytes(dtype: trt.DataType, count: int) -> int:
    """Size of `count` elements; trt.Weights.nbytes is wrong for four-bit types."""
    if dtype in (DT.FP4, DT.INT4):
        return (count + 1) // 2
    return count * TORCH_TYPES[dtype].itemsize


def read_weights(address: int, dtype: trt.DataType, shape: Sequence[int]) -> Value:
    """A copy of the constant of this type at this address.

    Four-bit types are packed two per byte, low nibble first.
    """
    count = int(np.prod(shape, dtype=np.int64))
    data = bytearray(ctypes.string_at(address, weights_bytes(dtype, count)))
    if dtype not in (DT.FP4, DT.INT4):
        torch_type = TORCH_TYPES[dtype]
        return (torch.frombuffer(data, dtype=torch_type) if count else torch.empty(0, dtype=torch_type)).reshape(shape)
    packed = torch.frombuffer(data, dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count].reshape(shape)
    if dtype == DT.INT4:
        signed = codes.to(torch.int8)
        return Narrow(torch.where(signed > 7, signed - 16, signed), dtype)
    table = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)]).to(torch.float8_e4m3fn)
    return Narrow(table.view(torch.uint8)[codes.long()].view(torch.float8_e4m3fn), dtype)
