"""Layers that compute with elements: elementwise, unary, activation, reduce, matrix multiply, softmax, ..."""

import math
import re
from collections.abc import Callable

import tensorrt_rtx as trt
import torch

from trt_interpreter_values import (
    DT,
    FLOATS,
    INDICES,
    INTEGERS,
    Builder,
    Kernel,
    Value,
    axes_of,
    describe,
    in_float32,
    integers,
    refusal,
    require,
    require_inputs,
    require_same_rank,
    require_same_type,
    single_axis,
)

_BINARY = trt.ElementWiseOperation
_UNARY = trt.UnaryOperation
_ACTIVATION = trt.ActivationType
_REDUCE = trt.ReduceOperation
_MATRIX = trt.MatrixOperation

ARITHMETIC: dict[trt.ElementWiseOperation, Callable[..., torch.Tensor]] = {
    _BINARY.SUM: torch.add,
    _BINARY.PROD: torch.mul,
    _BINARY.MAX: torch.maximum,
    _BINARY.MIN: torch.minimum,
    _BINARY.SUB: torch.sub,
    _BINARY.DIV: torch.div,
    _BINARY.POW: torch.pow,
    _BINARY.FLOOR_DIV: lambda a, b: torch.floor(a / b),
}
COMPARISONS = {_BINARY.EQUAL: torch.eq, _BINARY.GREATER: torch.gt, _BINARY.LESS: torch.lt}
LOGICAL = {_BINARY.AND: torch.logical_and, _BINARY.OR: torch.logical_or, _BINARY.XOR: torch.logical_xor}
UNARY: dict[trt.UnaryOperation, Callable[[torch.Tensor], torch.Tensor]] = {
    _UNARY.EXP: torch.exp,
    _UNARY.LOG: torch.log,
    _UNARY.SQRT: torch.sqrt,
    _UNARY.RECIP: torch.reciprocal,
    _UNARY.ABS: torch.abs,
    _UNARY.NEG: torch.neg,
    _UNARY.SIN: torch.sin,
    _UNARY.COS: torch.cos,
    _UNARY.TAN: torch.tan,
    _UNARY.SINH: torch.sinh,
    _UNARY.COSH: torch.cosh,
    _UNARY.ASIN: torch.asin,
    _UNARY.ACOS: torch.acos,
    _UNARY.ATAN: torch.atan,
    _UNARY.ASINH: torch.asinh,
    _UNARY.ACOSH: torch.acosh,
    _UNARY.ATANH: torch.atanh,
    _UNARY.CEIL: torch.ceil,
    _UNARY.FLOOR: torch.floor,
    _UNARY.ERF: torch.erf,
    _UNARY.SIGN: torch.sign,
    _UNARY.ROUND: torch.round,
}
INTEGER_UNARY = (_UNARY.ABS, _UNARY.NEG, _UNARY.SIGN)
PREDICATES = {_UNARY.ISINF: torch.isinf, _UNARY.ISNAN: torch.isnan}


def elementwise(layer: trt.IElementWiseLayer) -> Kernel:
    require_inputs(layer, 2)
    require_same_type(layer, 0, 1)
    require_same_rank(layer, 0, 1)
    op = layer.op
    if op in LOGICAL:
        require(layer, frozenset({DT.BOOL}), 0, 1)
        return lambda inputs: [LOGICAL[op](*inputs)]
    require(layer, FLOATS | INTEGERS, 0, 1)
    if op in COMPARISONS:
        return lambda inputs: [COMPARISONS[op](*inputs)]
    if op not in ARITHMETIC:
        raise refusal(layer, f"operation {op}")
    if layer.get_input(0).dtype in FLOATS:
        return lambda inputs: [in_float32(ARITHMETIC[op], *inputs)]
    return lambda inputs: [_integer_arithmetic(layer, op, *inputs)]


def _integer_arithmetic(
    layer: trt.ILayer, op: trt.ElementWiseOperation, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Integers: DIV truncates, as TensorRT's own folding of constants does; the documentation does not say."""
    if op in (_BINARY.DIV, _BINARY.FLOOR_DIV):
        if (b == 0).any():
            raise ValueError(f"{describe(layer)}: division of integers by zero")
        return torch.div(a, b, rounding_mode="trunc" if op == _BINARY.DIV else "floor")
    if op == _BINARY.POW and (b < 0).any():
        raise ValueError(f"{describe(layer)}: negative power of integers")
    return ARITHMETIC[op](a, b)


def unary(layer: trt.IUnaryLayer) -> Kernel:
    require_inputs(layer, 1)
    op = layer.op
    if op == _UNARY.NOT:
        require(layer, frozenset({DT.BOOL}), 0)
        return lambda inputs: [torch.logical_not(inputs[0])]
    if op in PREDICATES:
        require(layer, FLOATS, 0)
        return lambda inputs: [PREDICATES[op](inputs[0])]
    if op not in UNARY:
        raise refusal(layer, f"operation {op}")
    require(layer, FLOATS | INTEGERS if op in INTEGER_UNARY else FLOATS, 0)
    if layer.get_input(0).dtype in INTEGERS:
        return lambda inputs: [UNARY[op](inputs[0])]
    return lambda inputs: [in_float32(UNARY[op], inputs[0])]


def activation(layer: trt.IActivationLayer) -> Kernel:
    """The formulas of the ActivationType documentation."""
    require_inputs(layer, 1)
    require(layer, FLOATS, 0)
    alpha, beta = layer.alpha, layer.beta
    functions: dict[trt.ActivationType, Callable[[torch.Tensor], torch.Tensor]] = {
        _ACTIVATION.RELU: lambda x: x.clamp(min=0),
        _ACTIVATION.SIGMOID: torch.sigmoid,
        _ACTIVATION.TANH: torch.tanh,
        _ACTIVATION.LEAKY_RELU: lambda x: torch.where(x >= 0, x, alpha * x),
        _ACTIVATION.ELU: lambda x: torch.where(x >= 0, x, alpha * (torch.exp(x) - 1)),
        _ACTIVATION.SELU: lambda x: torch.where(x > 0, beta * x, beta * (alpha * torch.exp(x) - alpha)),
        _ACTIVATION.SOFTSIGN: lambda x: x / (1 + x.abs()),
        _ACTIVATION.SOFTPLUS: lambda x: alpha * torch.log(torch.exp(beta * x) + 1),
        _ACTIVATION.CLIP: lambda x: x.clamp(max=beta).clamp(min=alpha),
        _ACTIVATION.HARD_SIGMOID: lambda x: (alpha * x + beta).clamp(0, 1),
        _ACTIVATION.SCALED_TANH: lambda x: alpha * torch.tanh(beta * x),
        _ACTIVATION.THRESHOLDED_RELU: lambda x: torch.where(x > alpha, x, torch.zeros_like(x)),
        _ACTIVATION.GELU_ERF: lambda x: 0.5 * x * (1 + torch.erf(math.sqrt(0.5) * x)),
        _ACTIVATION.GELU_TANH: lambda x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (0.044715 * x * x * x + x)))
        ),
    }
    if layer.type not in functions:
        raise refusal(layer, f"activation {layer.type}")
    function = functions[layer.type]
    return lambda inputs: [in_float32(function, inputs[0])]


def reduce(layer: trt.IReduceLayer) -> Kernel:
    require_inputs(layer, 1)
    op, axes, keep = layer.op, axes_of(layer.axes), layer.keep_dims
    dtype = layer.get_input(0).dtype
    require(layer, FLOATS | INDICES, 0)
    if op not in EMPTY:
        raise refusal(layer, f"operation {op} of {dtype.name}")
    if not axes or axes[-1] >= len(layer.get_input(0).shape):
        raise refusal(layer, f"axes {axes}")

    def compute(x: torch.Tensor) -> torch.Tensor:
        if any(x.shape[axis] == 0 for axis in axes):
            lengths = [1 if axis in axes else length for axis, length in enumerate(x.shape)]
            result = torch.full(lengths, _empty(op, x.dtype), dtype=x.dtype)
            return result if keep else result.squeeze(axes)
        if op == _REDUCE.PROD:
            for axis in reversed(axes):
                x = x.prod(axis, keepdim=keep, dtype=x.dtype)
            return x
        if op == _REDUCE.SUM:
            return x.sum(axes, keepdim=keep, dtype=x.dtype)
        if op == _REDUCE.AVG and not x.is_floating_point():
            # Truncates, as TensorRT's own folding of constants does.
            count = math.prod(x.shape[axis] for axis in axes)
            return torch.div(x.sum(axes, keepdim=keep, dtype=x.dtype), count, rounding_mode="trunc")
        return {_REDUCE.MAX: torch.amax, _REDUCE.MIN: torch.amin, _REDUCE.AVG: torch.mean}[op](x, axes, keep)

    if dtype in FLOATS:
        return lambda inputs: [in_float32(compute, inputs[0])]
    return lambda inputs: [compute(inputs[0])]


# "The result of reducing across an empty volume" (NvInfer.h).
EMPTY = {_REDUCE.SUM: 0.0, _REDUCE.PROD: 1.0, _REDUCE.MAX: -math.inf, _REDUCE.MIN: math.inf, _REDUCE.AVG: math.nan}


def _empty(op: trt.ReduceOperation, dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or op in (_REDUCE.SUM, _REDUCE.PROD):
        return EMPTY[op]
    if op == _REDUCE.AVG:
        return 0
    return torch.iinfo(dtype).min if op == _REDUCE.MAX else torch.iinfo(dtype).max


def matrix_multiply(layer: trt.IMatrixMultiplyLayer) -> Kernel:
    """Batch dimensions of 1 broadcast; both inputs have the same number of them."""
    require_inputs(layer, 2)
    require(layer, FLOATS, 0, 1)
    require_same_type(layer, 0, 1)
    ops = (layer.op0, layer.op1)
    if any(op not in (_MATRIX.NONE, _MATRIX.TRANSPOSE, _MATRIX.VECTOR) for op in ops):
        raise refusal(layer, f"operations {ops}")
    vectors = [op == _MATRIX.VECTOR for op in ops]
    batches = [len(layer.get_input(i).shape) - (1 if vectors[i] else 2) for i in range(2)]
    if batches[0] != batches[1] or batches[0] < 0:
        raise refusal(layer, f"inputs of {batches} batch dimensions")

    def compute(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a.unsqueeze(-2) if vectors[0] else a.mT if ops[0] == _MATRIX.TRANSPOSE else a
        b = b.unsqueeze(-1) if vectors[1] else b.mT if ops[1] == _MATRIX.TRANSPOSE else b
        result = torch.matmul(a, b)
        result = result.squeeze(-1) if vectors[1] else result
        return result.squeeze(-1 if vectors[1] else -2) if vectors[0] else result

    return lambda inputs: [in_float32(compute, *inputs)]


def softmax(layer: trt.ISoftMaxLayer) -> Kernel:
    require_inputs(layer, 1)
    require(layer, FLOATS, 0)
    axis = single_axis(layer)
    return lambda inputs: [in_float32(lambda x: torch.softmax(x, axis), inputs[0])]


def cumulative(layer: trt.ICumulativeLayer) -> Kernel:
    require_inputs(layer, 2)
    require(layer, FLOATS | INDICES, 0)
    require(layer, INDICES, 1)
    if layer.op != trt.CumulativeOperation.SUM:
        raise refusal(layer, f"operation {layer.op}")
    exclusive, reverse = layer.exclusive, layer.reverse

    def compute(x: torch.Tensor, axis: int) -> torch.Tensor:
        x = x.flip(axis) if reverse else x
        if exclusive and x.shape[axis]:
            zero = torch.zeros_like(x.narrow(axis, 0, 1))
            x = torch.cat((zero, x.narrow(axis, 0, x.shape[axis] - 1)), dim=axis)
        x = x.cumsum(axis, dtype=x.dtype)
        return x.flip(axis) if reverse else x

    def kernel(inputs: list[Value | None]) -> list[Value]:
        (axis,) = integers(inputs[1])
        if not inputs[0].is_floating_point():
            return [compute(inputs[0], axis)]
        return [in_float32(lambda x: compute(x, axis), inputs[0])]

    return kernel


def einsum(layer: trt.IEinsumLayer) -> Kernel:
    count = layer.num_inputs
    require(layer, FLOATS, *range(count))
    require_same_type(layer, *range(count))
    equation = layer.equation.replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if not re.fullmatch(r"[a-z,]*(->[a-z]*)?", equation) or any(len(set(term)) != len(term) for term in terms):
        raise refusal(layer, f"equation {layer.equation!r}")
    return lambda inputs: [in_float32(lambda *tensors: torch.einsum(equation, *tensors), *inputs)]


_TYPES = trt.LayerType
BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    _TYPES.ELEMENTWISE: (trt.IElementWiseLayer, elementwise),
    _TYPES.UNARY: (trt.IUnaryLayer, unary),
    _TYPES.ACTIVATION: (trt.IActivationLayer, activation),
    _TYPES.REDUCE: (trt.IReduceLayer, reduce),
    _TYPES.MATRIX_MULTIPLY: (trt.IMatrixMultiplyLayer, matrix_multiply),
    _TYPES.SOFTMAX: (trt.ISoftMaxLayer, softmax),
    _TYPES.CUMULATIVE: (trt.ICumulativeLayer, cumulative),
    _TYPES.EINSUM: (trt.IEinsumLayer, einsum),
}
