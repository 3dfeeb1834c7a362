"""A TensorRT network under construction: literals, shapes that are known at run time only, and NumPy's broadcasting.

Knows nothing of the model. ``trt`` is the module of either compiler; tensors are its ITensor.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from canvasrt.engine_weights import EngineType, EngineWeight, to_bf16

Tensor = Any  # trt.ITensor, of whichever module
Size = int | tuple[Tensor, int] | Tensor  # a length, that of an axis of a tensor, or a tensor (1,) int64
EnginePrecision = Literal["bf16", "fp32"]  # what the network computes in; fp32 is for comparing it with its reference


class Graph:
    """Adds layers to one network. Arrays that the network points to live as long as this does."""

    def __init__(self, trt: ModuleType, network: Any, precision: EnginePrecision) -> None:
        self.trt = trt
        self.network = network
        self.precision = precision
        types = trt.DataType
        self.float32 = types.FLOAT
        self.int32 = types.INT32
        self.model = types.BF16 if precision == "bf16" else types.FLOAT
        self.types: dict[EngineType, Any] = {
            "bf16": types.BF16,
            "fp32": types.FLOAT,
            "fp8": types.FP8,
            "fp4": types.FP4,
            "int4": types.INT4,
        }
        self._kept: list[NDArray[Any]] = []
        self._literals: dict[tuple[str, bytes, tuple[int, ...]], Tensor] = {}
        self.weights: list[EngineWeight] = []

    def input(self, name: str, dtype: Any, shape: Sequence[int], dimensions: Sequence[str] = ()) -> Tensor:
        """-1 in ``shape`` for lengths that vary; ``dimensions`` names axes, equal names have equal lengths."""
        tensor = self.network.add_input(name, dtype, tuple(shape))
        for axis, dimension in enumerate(dimensions):
            if dimension:
                tensor.set_dimension_name(axis, dimension)
        return tensor

    def output(self, tensor: Tensor, name: str) -> None:
        tensor.name = name
        self.network.mark_output(tensor)

    # Constants

    def literal(self, values: Any, dtype: Any = None) -> Tensor:
        """A small constant of the build: float32, integers as int32, booleans as they are, or ``dtype``."""
        array = np.array(values)
        if array.dtype != np.bool_:
            array = array.astype(np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32)
        if dtype == self.trt.DataType.INT64:
            array = array.astype(np.int64)
        elif dtype == self.trt.DataType.BF16:
            array = to_bf16(array.astype(np.float32))
        elif dtype == self.float32:
            array = array.astype(np.float32)
        key = (f"{array.dtype} {dtype}", array.tobytes(), array.shape)
        if key not in self._literals:
            self._kept.append(array)  # the network keeps a pointer, not a copy
            weights = self._pointing(self.trt.DataType.BF16, array, array.size) if array.dtype == np.uint16 else None
            layer = self.network.add_constant(array.shape, weights or self.trt.Weights(array))
            self._literals[key] = layer.get_output(0)
        return self._literals[key]

    def constant(self, weight: EngineWeight, data: NDArray[np.uint8] | None) -> Tensor:
        """A weight of the checkpoint; without ``data`` a placeholder that is filled in when the plan is loaded."""
        dtype = self.types[weight.dtype]
        if data is None:
            weights = self.trt.Weights(dtype, 0, weight.count)
        else:
            self._kept.append(data)
            weights = self._pointing(dtype, data, weight.count)
        layer = self.network.add_constant(weight.shape, weights)
        layer.name = weight.name
        self.weights.append(weight)
        if data is None:
            # By layer.weights: the compiler knows weights by identity, and `weights` is a copy.
            self.network.set_weights_name(layer.weights, weight.name)
            self.network.mark_weights_refittable(weight.name)
        return layer.get_output(0)

    def _pointing(self, dtype: Any, array: NDArray[Any], count: int) -> Any:
        return self.trt.Weights(dtype, array.ctypes.data, count)

    # Shapes

    def shape(self, x: Tensor) -> Tensor:
        """(rank,) int64."""
        return self.network.add_shape(x).get_output(0)

    def sizes(self, *sizes: Size) -> Tensor:
        """Lengths as a tensor (n,) int64, for layers that take them at run time."""
        parts = []
        for size in sizes:
            if isinstance(size, int):
                parts.append(self.literal([size], self.trt.DataType.INT64))
            elif isinstance(size, tuple):
                tensor, axis = size
                parts.append(self.network.add_slice(self.shape(tensor), (axis,), (1,), (1,)).get_output(0))
            else:
                parts.append(size)
        return self.concat(parts, 0)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """-1 is inferred, 0 keeps the input's length of that axis."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = tuple(shape)
        return layer.get_output(0)

    def reshape_to(self, x: Tensor, *sizes: Size) -> Tensor:
        layer = self.network.add_shuffle(x)
        layer.set_input(1, self.sizes(*sizes))
        return layer.get_output(0)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        layer = self.network.add_shuffle(x)
        layer.first_transpose = tuple(order)
        return layer.get_output(0)

    def slice(self, x: Tensor, axis: int, start: int | Tensor, size: Size) -> Tensor:
        """``size`` elements of one axis from ``start`` on, which may be a tensor (1,) int64."""
        rank = len(x.shape)
        axis %= rank
        fixed = [0 if _varies(x, other) else x.shape[other] for other in range(rank)]
        fixed[axis] = size if isinstance(size, int) else 0
        origin = [0] * rank
        origin[axis] = start if isinstance(start, int) else 0
        layer = self.network.add_slice(x, tuple(origin), tuple(fixed), (1,) * rank)
        if not isinstance(start, int):
            zeros = [self.literal([0], self.trt.DataType.INT64)] * rank
            zeros[axis] = start
            layer.set_input(1, self.concat(zeros, 0))
        if not isinstance(size, int) or any(_varies(x, other) for other in range(rank) if other != axis):
            wanted: list[Size] = [(x, other) if _varies(x, other) else int(x.shape[other]) for other in range(rank)]
            wanted[axis] = size
            layer.set_input(2, self.sizes(*wanted))
        return layer.get_output(0)

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        layer = self.network.add_concatenation(list(parts))
        layer.axis = axis % len(parts[0].shape)
        return layer.get_output(0)

    # Arithmetic

    def elementwise(self, operation: str, a: Tensor, b: Tensor | float) -> Tensor:
        """An ElementWiseOperation by name, with NumPy's broadcasting; a number takes the type of ``a``."""
        if isinstance(b, (int, float)):
            b = self.literal(b, a.dtype) if a.dtype != self.int32 else self.literal(int(b))
        a, b = self.aligned(a, b)
        return self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)).get_output(0)

    def aligned(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Leading axes of length 1 until all have the same rank: TensorRT broadcasts within equal ranks only."""
        rank = max(len(tensor.shape) for tensor in tensors)
        return tuple(self._with_rank(tensor, rank) for tensor in tensors)

    def _with_rank(self, x: Tensor, rank: int) -> Tensor:
        missing = rank - len(x.shape)
        if missing == 0:
            return x
        if sum(_varies(x, axis) for axis in range(len(x.shape))) > 1:
            return self.reshape_to(x, *[1] * missing, *[(x, axis) for axis in range(len(x.shape))])
        return self.reshape(x, [1] * missing + [-1 if _varies(x, a) else x.shape[a] for a in range(len(x.shape))])

    def unary(self, operation: str, x: Tensor) -> Tensor:
        return self.network.add_unary(x, getattr(self.trt.UnaryOperation, operation)).get_output(0)

    def activation(self, kind: str, x: Tensor) -> Tensor:
        return self.network.add_activation(x, getattr(self.trt.ActivationType, kind)).get_output(0)

    def reduce(self, operation: str, x: Tensor, axis: int) -> Tensor:
        """Keeps the axis with length 1."""
        bit = 1 << (axis % len(x.shape))
        return self.network.add_reduce(x, getattr(self.trt.ReduceOperation, operation), bit, True).get_output(0)

    def cast(self, x: Tensor, dtype: Any) -> Tensor:
        return x if x.dtype == dtype else self.network.add_cast(x, dtype).get_output(0)

    def product(self, a: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """a (..., m, k) times b (..., k, n), or with ``transposed`` b (..., n, k)."""
        modes = self.trt.MatrixOperation
        layer = self.network.add_matrix_multiply(a, modes.NONE, b, modes.TRANSPOSE if transposed else modes.NONE)
        return layer.get_output(0)


def _varies(x: Tensor, axis: int) -> bool:
    return int(x.shape[axis]) < 0
