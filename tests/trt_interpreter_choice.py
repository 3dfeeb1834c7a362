"""Layers that convert, choose or generate elements: cast, select, top-k, one-hot, fill, assertion."""

import tensorrt_rtx as trt
import torch

from trt_interpreter_values import (
    DT,
    FLOATS,
    INDICES,
    INTEGERS,
    TORCH_TYPES,
    Builder,
    Kernel,
    Value,
    integers,
    like,
    raw,
    refusal,
    require,
    require_inputs,
    require_same_rank,
    require_same_type,
    single_axis,
)

CASTS = frozenset(TORCH_TYPES) - {DT.FP8}
TOP_K_MAX = 3840


def cast(layer: trt.ICastLayer) -> Kernel:
    """Floating point to integer truncates. What the target cannot hold is undefined and refused."""
    require_inputs(layer, 1)
    require(layer, CASTS, 0)
    if layer.to_type not in CASTS:
        raise refusal(layer, f"a cast to {layer.to_type.name}")
    target = TORCH_TYPES[layer.to_type]

    def kernel(inputs: list[Value | None]) -> list[Value]:
        source = inputs[0]
        if target == torch.bool:
            return [source != 0]
        if not target.is_floating_point and not _holds(torch.iinfo(target), source):
            raise ValueError(f"cast to {layer.to_type.name}: a value outside its range")
        return [source.to(target)]

    return kernel


def _holds(limits: torch.iinfo, source: torch.Tensor) -> bool:
    """Whether all elements, truncated, are within the limits; NaN is not."""
    if source.is_floating_point():
        # int64's maximum is no float64, but the number above it is.
        whole = source.double().trunc()
        return bool(((whole >= limits.min) & (whole < float(limits.max + 1))).all())
    source = source.long()
    return bool(((source >= limits.min) & (source <= limits.max)).all())


def select(layer: trt.ISelectLayer) -> Kernel:
    require_inputs(layer, 3)
    require(layer, frozenset({DT.BOOL}), 0)
    require_same_type(layer, 1, 2)
    require_same_rank(layer, 0, 1, 2)
    return lambda inputs: [like(inputs[1], torch.where(inputs[0], raw(inputs[1]), raw(inputs[2])))]


def top_k(layer: trt.ITopKLayer) -> Kernel:
    """Sorted values and their indices. Of equal elements the lower index comes first, which TensorRT only implies:
    it is the rule of the ONNX operator that this layer implements."""
    require_inputs(layer, 2)
    require(layer, FLOATS | INDICES, 0)
    axis, op = single_axis(layer), layer.op
    if op not in (trt.TopKOperation.MAX, trt.TopKOperation.MIN):
        raise refusal(layer, f"operation {op}")
    dynamic = layer.num_inputs > 1 and layer.get_input(1) is not None
    if dynamic:
        require(layer, INDICES, 1)
    static, index_type = layer.k, TORCH_TYPES[layer.indices_type]

    def kernel(inputs: list[Value | None]) -> list[Value]:
        x = inputs[0]
        k = integers(inputs[1])[0] if dynamic else static
        if not 0 < k <= min(TOP_K_MAX, x.shape[axis]):
            raise ValueError(f"top {k} of {x.shape[axis]} elements")
        values, indices = torch.sort(x, dim=axis, descending=op == trt.TopKOperation.MAX, stable=True)
        return [values.narrow(axis, 0, k), indices.narrow(axis, 0, k).to(index_type)]

    return kernel


def one_hot(layer: trt.IOneHotLayer) -> Kernel:
    """Inputs: indices, [off, on], depth. Negative indices count from the end; beyond the depth nothing is on.

    So does TensorRT's own folding of constants, and so suggests the example of the operator's page.
    """
    require_inputs(layer, 3)
    require(layer, INDICES, 0, 2)
    require(layer, FLOATS | INTEGERS | {DT.BOOL}, 1)
    axis = layer.axis

    def kernel(inputs: list[Value | None]) -> list[Value]:
        indices, (off, on), (depth,) = inputs[0].long(), inputs[1].unbind(), integers(inputs[2])
        indices = torch.where(indices < 0, indices + depth, indices)
        position = axis + indices.dim() + 1 if axis < 0 else axis
        classes = torch.arange(depth).reshape([-1] + [1] * (indices.dim() - position))
        return [torch.where(indices.unsqueeze(position) == classes, on, off)]

    return kernel


def fill(layer: trt.IFillLayer) -> Kernel:
    """LINSPACE: alpha + sum over axes of beta[axis] * index[axis]. Inputs, each optional: shape, alpha, beta."""
    require_inputs(layer, 3)
    if layer.operation != trt.FillOperation.LINSPACE:
        raise refusal(layer, f"operation {layer.operation}")
    given = [index < layer.num_inputs and layer.get_input(index) is not None for index in range(3)]
    if given[1] != given[2]:
        raise refusal(layer, "only one of alpha and beta as an input")
    if layer.to_type not in INDICES | {DT.FLOAT}:
        raise refusal(layer, f"type {layer.to_type.name}")
    for index in (1, 2):
        if given[index]:
            require(layer, frozenset({layer.to_type}), index)
    target = TORCH_TYPES[layer.to_type]
    static_shape = None if given[0] else list(layer.shape)
    static = (layer.alpha, layer.beta)
    if target != torch.float32 and not given[1] and any(value != int(value) for value in static):
        raise refusal(layer, f"alpha and beta {static} of type {layer.to_type.name}")

    def kernel(inputs: list[Value | None]) -> list[Value]:
        dims = integers(inputs[0]) if given[0] else static_shape
        alpha = inputs[1].reshape(()) if given[1] else torch.tensor(static[0], dtype=target)
        beta = inputs[2] if given[2] else torch.tensor([static[1]], dtype=target)
        if beta.shape != (len(dims),):
            raise ValueError(f"fill of shape {dims} with a delta of shape {tuple(beta.shape)}")
        result = torch.zeros(dims, dtype=target) + alpha
        for axis, length in enumerate(dims):
            steps = torch.arange(length, dtype=target) * beta[axis]
            result = result + steps.reshape([-1] + [1] * (len(dims) - axis - 1))
        return [result]

    return kernel


def assertion(layer: trt.IAssertionLayer) -> Kernel:
    require_inputs(layer, 1)
    require(layer, frozenset({DT.BOOL}), 0)

    def kernel(inputs: list[Value | None]) -> list[Value]:
        if not inputs[0].all():
            raise AssertionError(layer.message)
        return []

    return kernel


_TYPES = trt.LayerType
BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    _TYPES.CAST: (trt.ICastLayer, cast),
    _TYPES.SELECT: (trt.ISelectLayer, select),
    _TYPES.TOPK: (trt.ITopKLayer, top_k),
    _TYPES.ONE_HOT: (trt.IOneHotLayer, one_hot),
    _TYPES.FILL: (trt.IFillLayer, fill),
    _TYPES.ASSERTION: (trt.IAssertionLayer, assertion),
}
