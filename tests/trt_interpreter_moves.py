"""Layers that move elements without computing with them: shuffle, slice, gather, scatter, concatenation, ..."""

import math

import tensorrt_rtx as trt
import torch

from trt_interpreter_values import (
    INDICES,
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
)


def identity(layer: trt.IIdentityLayer) -> Kernel:
    require_inputs(layer, 1)
    return lambda inputs: [inputs[0]]


def shape(layer: trt.IShapeLayer) -> Kernel:
    require_inputs(layer, 1)
    return lambda inputs: [torch.tensor(tuple(inputs[0].shape), dtype=torch.int64)]


def shuffle(layer: trt.IShuffleLayer) -> Kernel:
    """Transpose, reshape, transpose. A 0 copies a dimension of the input as transposed first."""
    require_inputs(layer, 2)
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    dynamic = layer.num_inputs > 1 and layer.get_input(1) is not None
    if dynamic:
        require(layer, INDICES, 1)
    static = None if dynamic or layer.reshape_dims is None else list(layer.reshape_dims)
    placeholder = layer.zero_is_placeholder

    def kernel(inputs: list[Value | None]) -> list[Value]:
        source = raw(inputs[0])
        source = source.permute(first[: source.dim()])
        dims = integers(inputs[1]) if dynamic else static
        if dims is not None:
            source = source.reshape(resolve_dims(dims, tuple(source.shape), placeholder))
        return [like(inputs[0], source.permute(second[: source.dim()]))]

    return kernel


def resolve_dims(dims: list[int], source: tuple[int, ...], placeholder: bool) -> list[int]:
    """The dimensions of a reshape. TensorRT refuses a -1 beside a length of 0: it has no single solution."""
    if any(length < -1 for length in dims) or dims.count(-1) > 1:
        raise ValueError(f"reshape to {dims}")
    if placeholder:
        if 0 in dims[len(source) :]:
            raise ValueError(f"reshape of {list(source)} to {dims}: no dimension to copy")
        dims = [source[axis] if length == 0 else length for axis, length in enumerate(dims)]
    volume, known = math.prod(source), math.prod(length for length in dims if length != -1)
    if -1 in dims:
        if known == 0 or volume % known:
            raise ValueError(f"reshape of {list(source)} to {dims}: infinite number of solutions or no solution")
        dims = [volume // known if length == -1 else length for length in dims]
    if math.prod(dims) != volume:
        raise ValueError(f"reshape of {list(source)} to {dims} changes the volume")
    return dims


def squeeze(layer: trt.ISqueezeLayer) -> Kernel:
    """Removes the axes of input 1, or without it the dimensions that are 1 in the network definition."""
    require_inputs(layer, 2)
    declared = tuple(layer.get_input(0).shape)
    given = layer.num_inputs > 1 and layer.get_input(1) is not None

    def kernel(inputs: list[Value | None]) -> list[Value]:
        source, rank = raw(inputs[0]), len(declared)
        axes = integers(inputs[1]) if given else [axis for axis, length in enumerate(declared) if length == 1]
        axes = _normal_axes(axes, rank)
        if not given and any(length == -1 and source.shape[axis] == 1 for axis, length in enumerate(declared)):
            raise ValueError("squeeze without axes: a dynamic dimension is 1")
        if any(source.shape[axis] != 1 for axis in axes):
            raise ValueError(f"squeeze of axes {axes} of shape {tuple(source.shape)}")
        return [like(inputs[0], source.reshape([n for axis, n in enumerate(source.shape) if axis not in axes]))]

    return kernel


def unsqueeze(layer: trt.IUnsqueezeLayer) -> Kernel:
    require(layer, INDICES, 1)
    require_inputs(layer, 2)

    def kernel(inputs: list[Value | None]) -> list[Value]:
        source = raw(inputs[0])
        axes = integers(inputs[1])
        for axis in sorted(_normal_axes(axes, source.dim() + len(axes))):
            source = source.unsqueeze(axis)
        return [like(inputs[0], source)]

    return kernel


def _normal_axes(axes: list[int], rank: int) -> list[int]:
    normal = [axis + rank if axis < 0 else axis for axis in axes]
    if len(set(normal)) != len(normal) or not all(0 <= axis < rank for axis in normal):
        raise ValueError(f"axes {axes} of rank {rank}")
    return normal


def concatenation(layer: trt.IConcatenationLayer) -> Kernel:
    require_same_type(layer, *range(layer.num_inputs))
    require_same_rank(layer, *range(layer.num_inputs))
    axis = layer.axis

    return lambda inputs: [like(inputs[0], torch.cat([raw(value) for value in inputs], dim=axis))]


def slice_(layer: trt.ISliceLayer) -> Kernel:
    """Inputs: data, then optionally start, size, stride, fill value, axes."""
    mode, modes = layer.mode, trt.SampleMode
    if mode not in (modes.STRICT_BOUNDS, modes.WRAP, modes.CLAMP, modes.FILL, modes.REFLECT):
        raise refusal(layer, f"mode {mode}")
    given = [index < layer.num_inputs and layer.get_input(index) is not None for index in range(6)]
    if given[4] != (mode == modes.FILL):
        raise refusal(layer, f"mode {mode.name} {'with' if given[4] else 'without'} a fill value")
    if given[4]:
        require_same_type(layer, 0, 4)
    for index in (1, 2, 3, 5):
        if given[index]:
            require(layer, INDICES, index)
    static = {1: layer.start, 2: layer.shape, 3: layer.stride, 5: layer.axes}
    static = {index: None if dims is None else list(dims) for index, dims in static.items()}
    if any(stride < 0 for stride in static[3] or ()):
        raise refusal(layer, "a negative stride")

    def kernel(inputs: list[Value | None]) -> list[Value]:
        source = raw(inputs[0])
        start, size, stride, axes = (
            integers(inputs[index]) if given[index] else static[index] for index in (1, 2, 3, 5)
        )
        axes = list(range(source.dim())) if axes is None else _normal_axes(axes, source.dim())
        if not len(start) == len(size) == len(stride) == len(axes) or min(size, default=0) < 0:
            raise ValueError(f"slice start {start}, size {size}, stride {stride}, axes {axes}")
        if min(stride, default=0) < 0:
            raise refusal(layer, "a negative stride")
        fill = None
        if given[4]:
            fill = raw(inputs[4]).reshape(())
        return [like(inputs[0], _slice(source, axes, start, size, stride, mode, fill))]

    return kernel


def _slice(
    source: torch.Tensor,
    axes: list[int],
    start: list[int],
    size: list[int],
    stride: list[int],
    mode: trt.SampleMode,
    fill: torch.Tensor | None,
) -> torch.Tensor:
    lengths = dict(zip(axes, size, strict=True))
    target = [lengths.get(axis, length) for axis, length in enumerate(source.shape)]
    if 0 in target:
        return source.new_empty(target)
    for axis, first, count, step in zip(axes, start, size, stride, strict=True):
        length = source.shape[axis]
        coordinates = first + step * torch.arange(count)
        outside = (coordinates < 0) | (coordinates >= length)
        if mode == trt.SampleMode.FILL and length == 0:
            return fill.expand(target).clone()
        if outside.any():
            coordinates = _resample(coordinates, length, mode)
        elif step == 1:
            source = source.narrow(axis, first, count)
            continue
        source = source.index_select(axis, coordinates)
        if mode == trt.SampleMode.FILL:
            shape = [count if dim == axis else 1 for dim in range(source.dim())]
            source = torch.where(outside.reshape(shape), fill, source)
    return source


def _resample(coordinates: torch.Tensor, length: int, mode: trt.SampleMode) -> torch.Tensor:
    """Coordinates outside [0, length) moved inside it."""
    if mode == trt.SampleMode.STRICT_BOUNDS or length == 0:
        raise ValueError(f"slice from {int(coordinates.min())} to {int(coordinates.max())} of length {length}")
    if mode == trt.SampleMode.WRAP:
        return coordinates % length
    if mode == trt.SampleMode.REFLECT and length > 1:
        period = 2 * (length - 1)
        return torch.where(coordinates % period < length, coordinates % period, period - coordinates % period)
    return coordinates.clamp(0, length - 1)


def gather(layer: trt.IGatherLayer) -> Kernel:
    require(layer, INDICES, 1)
    require_inputs(layer, 2)
    declared, mode, batch = tuple(layer.get_input(0).shape), layer.mode, layer.num_elementwise_dims
    axis = layer.axis + len(declared) if layer.axis < 0 else layer.axis
    modes = {
        trt.GatherMode.DEFAULT: lambda data, indices: _gather(data, indices, axis, batch, declared),
        trt.GatherMode.ELEMENT: lambda data, indices: _gather_elements(data, indices, axis, declared),
        trt.GatherMode.ND: lambda data, indices: _gather_nd(data, indices, batch, declared),
    }
    largest = {trt.GatherMode.DEFAULT: 1, trt.GatherMode.ELEMENT: 0, trt.GatherMode.ND: len(declared) - 1}
    if mode not in modes or not 0 <= batch <= largest[mode] or (mode == trt.GatherMode.DEFAULT and axis < batch):
        raise refusal(layer, f"mode {mode} along axis {axis} with {batch} elementwise dimensions")
    return lambda inputs: [like(inputs[0], modes[mode](raw(inputs[0]), inputs[1].long()))]


def _inside(indices: torch.Tensor, length: int, declared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that can be read, and which of them are inside: "Zero will be stored for OOB access" (NvInfer.h).

    "If an axis of Data has dynamic length, using a negative index for it has undefined behavior."
    """
    if (indices < 0).any():
        if declared == -1:
            raise ValueError("gather: a negative index along an axis of dynamic length is undefined")
        indices = torch.where(indices < 0, indices + length, indices)
    inside = (indices >= 0) & (indices < length)
    return torch.where(inside, indices, 0), inside


def _gather(
    data: torch.Tensor, indices: torch.Tensor, axis: int, batch: int, declared: tuple[int, ...]
) -> torch.Tensor:
    """DEFAULT: data [B, *before, length, *after] by indices [B, *I] is [B, *before, *I, *after]; B if batch is 1."""
    if batch == 0:
        data, indices, axis, declared = data.unsqueeze(0), indices.unsqueeze(0), axis + 1, (1, *declared)
    rows = torch.broadcast_shapes(data.shape[:1], indices.shape[:1])[0]
    before, after, chosen = data.shape[1:axis], data.shape[axis + 1 :], indices.shape[1:]
    flat, inside = _inside(indices.reshape(indices.shape[0], math.prod(chosen)), data.shape[axis], declared[axis])
    flat, inside = flat.expand(rows, -1), inside.expand(rows, -1)
    if data.shape[axis] == 0 or rows == 0:
        result = data.new_zeros((rows, *before, *chosen, *after))
    else:
        table = data.expand(rows, *data.shape[1:]).movedim(axis, 1)
        found = table[torch.arange(rows).unsqueeze(1), flat]
        found = torch.where(inside.reshape(*flat.shape, *[1] * (found.dim() - 2)), found, found.new_zeros(()))
        result = found.movedim(1, axis).reshape(rows, *before, *chosen, *after)
    return result if batch else result.squeeze(0)


def _gather_elements(data: torch.Tensor, indices: torch.Tensor, axis: int, declared: tuple[int, ...]) -> torch.Tensor:
    if any(data.shape[dim] < length for dim, length in enumerate(indices.shape) if dim != axis):
        raise ValueError(f"gather of elements {tuple(indices.shape)} from {tuple(data.shape)} along {axis}")
    if data.shape[axis] == 0:
        return data.new_zeros(indices.shape)
    indices, inside = _inside(indices, data.shape[axis], declared[axis])
    return torch.where(inside, data.gather(axis, indices), data.new_zeros(()))


def _gather_nd(data: torch.Tensor, indices: torch.Tensor, batch: int, declared: tuple[int, ...]) -> torch.Tensor:
    depth = indices.shape[-1]
    if data.shape[:batch] != indices.shape[:batch] or not 1 <= depth <= data.dim() - batch:
        raise ValueError(
            f"gather ND of {tuple(indices.shape)} from {tuple(data.shape)}, {batch} elementwise dimensions"
        )
    target = (*indices.shape[:-1], *data.shape[batch + depth :])
    if 0 in data.shape[: batch + depth]:
        return data.new_zeros(target)
    where = [
        torch.arange(length).reshape([-1 if axis == dim else 1 for axis in range(indices.dim() - 1)])
        for dim, length in enumerate(data.shape[:batch])
    ]
    inside = torch.ones(indices.shape[:-1], dtype=torch.bool)
    for position in range(depth):
        dim = batch + position
        column, column_inside = _inside(indices[..., position], data.shape[dim], declared[dim])
        where.append(column)
        inside &= column_inside
    found = data[tuple(where)]
    return torch.where(inside.reshape(*inside.shape, *[1] * (found.dim() - inside.dim())), found, found.new_zeros(()))


def scatter(layer: trt.IScatterLayer) -> Kernel:
    """Indices must be inside and name no element twice: anything else is undefined."""
    require(layer, INDICES, 1)
    require_same_type(layer, 0, 2)
    require_inputs(layer, 3)
    mode, axis = layer.mode, layer.axis
    if mode not in (trt.ScatterMode.ELEMENT, trt.ScatterMode.ND):
        raise refusal(layer, f"mode {mode}")
    axis = axis + len(layer.get_input(0).shape) if axis < 0 else axis

    def kernel(inputs: list[Value | None]) -> list[Value]:
        data, indices, updates = raw(inputs[0]), inputs[1].long(), raw(inputs[2])
        element = mode == trt.ScatterMode.ELEMENT
        lengths = torch.tensor(data.shape[axis : axis + 1] if element else data.shape[: indices.shape[-1]])
        if ((indices < 0) | (indices >= lengths)).any():
            raise ValueError("scatter: an index out of bounds is undefined")
        result = _scatter_elements(data, indices, updates, axis) if element else _scatter_nd(data, indices, updates)
        return [like(inputs[0], result)]

    return kernel


def _scatter_elements(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: int) -> torch.Tensor:
    if indices.shape != updates.shape:
        raise ValueError(f"scatter of {tuple(updates.shape)} to indices {tuple(indices.shape)}")
    """Of several writes to one element one counts, and which one is not documented: whichever torch takes."""
    return data.scatter(axis, indices, updates)


def _scatter_nd(data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    depth = indices.shape[-1]
    if updates.shape != (*indices.shape[:-1], *data.shape[depth:]):
        raise ValueError(f"scatter ND of {tuple(updates.shape)} to indices {tuple(indices.shape)}")
    if indices[..., 0].numel() == 0:
        return data.clone()
    where = indices.unbind(-1)
    writes = torch.zeros(data.shape[:depth], dtype=torch.int32)
    writes = writes.index_put(where, torch.ones(indices.shape[:-1], dtype=torch.int32), accumulate=True)
    if (writes > 1).any():
        raise ValueError("scatter: writes to the same element are undefined")
    return data.index_put(where, updates)


_TYPES = trt.LayerType
BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    _TYPES.IDENTITY: (trt.IIdentityLayer, identity),
    _TYPES.SHAPE: (trt.IShapeLayer, shape),
    _TYPES.SHUFFLE: (trt.IShuffleLayer, shuffle),
    _TYPES.SQUEEZE: (trt.ISqueezeLayer, squeeze),
    _TYPES.UNSQUEEZE: (trt.IUnsqueezeLayer, unsqueeze),
    _TYPES.CONCATENATION: (trt.IConcatenationLayer, concatenation),
    _TYPES.SLICE: (trt.ISliceLayer, slice_),
    _TYPES.GATHER: (trt.IGatherLayer, gather),
    _TYPES.SCATTER: (trt.IScatterLayer, scatter),
}
