"""Quantize, dequantize and dynamic quantize: FP8 E4M3, FP4 E2M1, INT8 and INT4."""

from collections.abc import Callable

import tensorrt_rtx as trt
import torch

from trt_interpreter_values import (
    DT,
    E2M1_VALUES,
    FLOATS,
    TORCH_TYPES,
    Builder,
    Kernel,
    Narrow,
    Value,
    refusal,
    require,
    require_inputs,
)

E4M3_MAX, E2M1_MAX = 448.0, 6.0
SMALLEST_BLOCK_SCALE = 2.0**-9
NVFP4_BLOCK = 16
INTEGER_RANGES = {DT.INT8: (-128, 127), DT.INT4: (-8, 7)}
QUANTIZED = frozenset({DT.INT8, DT.INT4, DT.FP8, DT.FP4})


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest float8_e4m3fn, ties to even, beyond 448 to 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: torch.Tensor) -> Narrow:
    """float32 to the nearest FP4 E2M1, ties to the even code, beyond 6 to 6."""
    if x.isnan().any():
        raise ValueError("NaN has no FP4 value")
    levels = torch.tensor(E2M1_VALUES)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs()
    code = torch.bucketize(magnitude, middles)
    # bucketize leaves a tie below; the code above is even when the one below is odd.
    tied = magnitude == middles[code.clamp(max=len(middles) - 1)]
    code = torch.where(tied & (code % 2 == 1), code + 1, code)
    return Narrow(torch.copysign(levels[code], x).to(torch.float8_e4m3fn), DT.FP4)


def quantize(layer: trt.IQuantizeLayer) -> Kernel:
    """clamp(round(x / scale)), rounding ties to even."""
    require(layer, FLOATS, 0)
    target = layer.to_type
    if target not in QUANTIZED:
        raise refusal(layer, f"type {target.name}")
    expand = _scale_expander(layer)

    def kernel(inputs: list[Value | None]) -> list[Value]:
        scaled = inputs[0].float() / expand(inputs)
        if target == DT.FP8:
            return [to_e4m3(scaled)]
        if target == DT.FP4:
            return [to_e2m1(scaled)]
        if scaled.isnan().any():
            raise ValueError("NaN has no integer value")
        rounded = scaled.round().clamp(*INTEGER_RANGES[target]).to(torch.int8)
        return [rounded if target == DT.INT8 else Narrow(rounded, target)]

    return kernel


def dequantize(layer: trt.IDequantizeLayer) -> Kernel:
    """x * scale in float32, rounded once to the output type."""
    require(layer, QUANTIZED, 0)
    if layer.to_type not in FLOATS:
        raise refusal(layer, f"type {layer.to_type.name}")
    target = TORCH_TYPES[layer.to_type]
    expand = _scale_expander(layer)

    def kernel(inputs: list[Value | None]) -> list[Value]:
        codes = inputs[0].values if isinstance(inputs[0], Narrow) else inputs[0]
        return [(codes.float() * expand(inputs)).to(target)]

    return kernel


def _scale_expander(
    layer: trt.IQuantizeLayer | trt.IDequantizeLayer,
) -> Callable[[list[Value | None]], torch.Tensor]:
    """A function of the inputs that gives the scale in float32, broadcastable to the data.

    A scalar is per tensor, a vector per index of `axis`, a tensor of the data's rank per block along one of the last
    two dimensions.
    """
    require(layer, FLOATS, 1)
    # Input 2, the zero point, must be zero where it is given at all.
    require_inputs(layer, 2)
    rank, scale_rank, axis = len(layer.get_input(0).shape), len(layer.get_input(1).shape), layer.axis
    block_shape = _block_shape(layer)
    if axis < -1 or axis >= rank or scale_rank not in (0, 1, rank):
        raise refusal(layer, f"axis {axis} with a scale of rank {scale_rank}")
    if block_shape and scale_rank != rank:
        raise refusal(layer, f"block shape {block_shape} with a scale of rank {scale_rank}")

    def expand(inputs: list[Value | None]) -> torch.Tensor:
        shape, scale = tuple(inputs[0].shape), inputs[1].float()
        if not (scale > 0).all():
            raise ValueError("a scale that is not positive")
        if scale_rank == 0 or (scale_rank == 1 and axis == -1 and scale.shape == (1,)):
            return scale.reshape(())
        if scale_rank == 1 and not block_shape and axis != -1:
            if scale.shape[0] != shape[axis]:
                raise ValueError(f"{scale.shape[0]} scales along axis {axis} of shape {shape}")
            return scale.reshape([-1 if dim == axis else 1 for dim in range(rank)])
        if scale_rank != rank:
            raise ValueError(f"scale of shape {tuple(scale.shape)} without an axis")
        return _expand_blocks(scale, shape, block_shape)

    return expand


def _block_shape(layer: trt.IQuantizeLayer | trt.IDequantizeLayer) -> list[int]:
    """The explicit block shape, empty if there is none; the bindings raise RuntimeError if it was never set."""
    try:
        return list(layer.block_shape)
    except RuntimeError:
        return []


def _expand_blocks(scale: torch.Tensor, shape: tuple[int, ...], block_shape: list[int]) -> torch.Tensor:
    """Repeat the scale of each block over its elements."""
    blocked = [dim for dim, (length, count) in enumerate(zip(shape, scale.shape, strict=True)) if length != count]
    if len(blocked) > 1 or any(dim < len(shape) - 2 for dim in blocked):
        raise ValueError(f"scale of shape {tuple(scale.shape)} for data of shape {shape}")
    sizes = [1] * len(shape)
    for dim in blocked:
        if scale.shape[dim] == 0 or shape[dim] % scale.shape[dim]:
            raise ValueError(f"scale of shape {tuple(scale.shape)} for data of shape {shape}")
        sizes[dim] = shape[dim] // scale.shape[dim]
        scale = scale.repeat_interleave(sizes[dim], dim)
    if block_shape and [shape[dim] if size == -1 else size for dim, size in enumerate(block_shape)] != sizes:
        raise ValueError(f"block shape {block_shape}, scale of shape {tuple(scale.shape)}, data of shape {shape}")
    return scale


def dynamic_quantize(layer: trt.IDynamicQuantizeLayer) -> Kernel:
    """NVFP4: blocks of 16 along `axis`, with a double-quantization scale g as input 1.

    The documentation gives no formula; this is ModelOpt's, whose order matters: block scale = E4M3(amax / (6 * g)) in
    float32 and at least 2**-9, data = E2M1(x / (block scale * g)). Outputs: data, block scales.
    """
    require(layer, FLOATS, 0)
    require(layer, FLOATS, 1)
    require_inputs(layer, 2)
    rank = len(layer.get_input(0).shape)
    kind = (layer.to_type, layer.scale_type, layer.block_size)
    if kind != (DT.FP4, DT.FP8, NVFP4_BLOCK) or list(layer.block_shape):
        raise refusal(layer, f"quantization {kind} with block shape {list(layer.block_shape)}")
    axis = layer.axis + rank if layer.axis < 0 else layer.axis
    if rank not in (2, 3) or axis not in (rank - 2, rank - 1):
        raise refusal(layer, f"axis {layer.axis} of rank {rank}")

    def kernel(inputs: list[Value | None]) -> list[Value]:
        x, scale = inputs[0].float(), inputs[1].float()
        if scale.numel() != 1 or not scale.item() > 0:
            raise ValueError(f"double-quantization scale {scale.tolist()}")
        if x.shape[axis] % NVFP4_BLOCK:
            raise ValueError(f"{x.shape[axis]} elements in blocks of {NVFP4_BLOCK}")
        scale = scale.reshape(())
        blocks = x.unflatten(axis, (x.shape[axis] // NVFP4_BLOCK, NVFP4_BLOCK))
        largest = blocks.abs().amax(axis + 1)
        block_scale = to_e4m3((largest / (E2M1_MAX * scale)).clamp(min=SMALLEST_BLOCK_SCALE))
        data = to_e2m1(blocks / (block_scale.float() * scale).unsqueeze(axis + 1))
        return [Narrow(data.values.flatten(axis, axis + 1), DT.FP4), block_scale]

    return kernel


_TYPES = trt.LayerType
BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    _TYPES.QUANTIZE: (trt.IQuantizeLayer, quantize),
    _TYPES.DEQUANTIZE: (trt.IDequantizeLayer, dequantize),
    _TYPES.DYNAMIC_QUANTIZE: (trt.IDynamicQuantizeLayer, dynamic_quantize),
}
