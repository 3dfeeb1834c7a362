"""Builds small TensorRT networks for the tests of the interpreter."""

from collections.abc import Sequence

import numpy as np
import tensorrt_rtx as trt
import torch

import trt_interpreter


class QuietLogger(trt.ILogger):
    """Refused networks are expected, and so is the missing GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        self.messages.append(message)


# TensorRT keeps the logger of the first builder of a process.
LOGGER = QuietLogger()


class Net:
    """A network under construction, with the arrays its weights point to."""

    def __init__(self) -> None:
        self._builder = trt.Builder(LOGGER)
        self._arrays: list[np.ndarray] = []
        self.network = self._builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def input(self, name: str, dtype: trt.DataType, shape: Sequence[int]) -> trt.ITensor:
        return self.network.add_input(name, dtype, tuple(shape))

    def constant(self, values: object, dtype: type = np.float32) -> trt.ITensor:
        """A constant of a type that NumPy has."""
        array = np.array(values, dtype=dtype)
        self._arrays.append(array)
        # A pointer rather than the array: the bindings make a vector of a scalar.
        weights = trt.Weights(_TYPES[array.dtype.type], array.ctypes.data, array.size)
        return self.network.add_constant(array.shape, weights).get_output(0)

    def packed(self, data: bytes | Sequence[int], dtype: trt.DataType, shape: Sequence[int]) -> trt.ITensor:
        """A constant of any type from its bytes."""
        array = np.frombuffer(bytes(data), dtype=np.uint8).copy()
        self._arrays.append(array)
        weights = trt.Weights(dtype, array.ctypes.data, int(np.prod(shape)))
        return self.network.add_constant(tuple(shape), weights).get_output(0)

    def interpreter(self, *outputs: trt.ITensor) -> trt_interpreter.Interpreter:
        for position, tensor in enumerate(outputs):
            tensor.name = f"out{position}"
            self.network.mark_output(tensor)
        return trt_interpreter.Interpreter(self.network)

    def run(self, *outputs: trt.ITensor, **inputs: torch.Tensor) -> list[torch.Tensor]:
        results = self.interpreter(*outputs).run(inputs)
        return [results[f"out{position}"] for position in range(len(outputs))]


_TYPES = {
    np.float32: trt.DataType.FLOAT,
    np.float16: trt.DataType.HALF,
    np.int8: trt.DataType.INT8,
    np.int32: trt.DataType.INT32,
    np.int64: trt.DataType.INT64,
    np.bool_: trt.DataType.BOOL,
    np.uint8: trt.DataType.UINT8,
}


def bfloat16(values: np.ndarray) -> torch.Tensor:
    """float32 rounded to the nearest bfloat16, ties to even, by its bits."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return torch.from_numpy(rounded.astype(np.uint16)).view(torch.bfloat16)
