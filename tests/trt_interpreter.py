"""Executes a TensorRT network layer by layer in torch on the CPU: the proof that a network computes the right thing.

Independent of canvasrt: every parameter is read from the `INetworkDefinition`. The meaning of each layer is that of
NVIDIA's documentation (the bindings' docstrings, NvInfer.h, the operator pages). What the interpreter does not know
raises NotImplementedError with the layer and the option; what the documentation leaves undefined raises ValueError.
After each layer, type, rank and static dimensions must be those that TensorRT inferred.

Layers of FP16 or BF16 tensors compute in float32 and round their result once.
"""

import itertools
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

import tensorrt_rtx as trt
import torch

import trt_interpreter_attention
import trt_interpreter_choice
import trt_interpreter_math
import trt_interpreter_moves
import trt_interpreter_quantization
from trt_interpreter_values import (
    DT,
    TORCH_TYPES,
    Builder,
    Kernel,
    Narrow,
    Value,
    data_type,
    describe,
    layer_type,
    read_weights,
    refusal,
    weights_address,
    weights_bytes,
)


def _constant(layer: trt.IConstantLayer) -> Kernel:
    tensor = layer.get_output(0)
    value = read_weights(weights_address(layer.weights), tensor.dtype, tuple(layer.shape))
    return lambda inputs: [value]


BUILDERS: dict[trt.LayerType, tuple[type, Builder]] = {
    trt.LayerType.CONSTANT: (trt.IConstantLayer, _constant),
    **trt_interpreter_attention.BUILDERS,
    **trt_interpreter_choice.BUILDERS,
    **trt_interpreter_math.BUILDERS,
    **trt_interpreter_moves.BUILDERS,
    **trt_interpreter_quantization.BUILDERS,
}


@dataclass(frozen=True)
class Declared:
    """A tensor as TensorRT sees it: its identity, its name, and what it inferred; -1 is a dynamic dimension."""

    key: int
    name: str
    dtype: trt.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One layer: which tensors (by identity) it takes, what it does, and the tensors that it makes."""

    name: str
    kernel: Kernel
    inputs: list[int | None]
    outputs: list[Declared]


class Interpreter:
    """A network ready to run. Layers that depend on constants alone are computed here, once.

    The memory behind the network's weights must be alive during construction only; the network must stay as it is.
    """

    def __init__(self, network: trt.INetworkDefinition) -> None:
        if not network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
            raise NotImplementedError("a network that is not strongly typed is not supported by the interpreter")
        # Tensors are known by the identity of their Python objects, which pybind11 keeps only while they are alive.
        self._network = network
        given = [network.get_input(index) for index in range(network.num_inputs)]
        wanted = [network.get_output(index) for index in range(network.num_outputs)]
        for tensor in (*given, *wanted):
            if tensor.dtype not in TORCH_TYPES:
                raise NotImplementedError(f"network input or output {tensor.name!r} of type {tensor.dtype.name}")
        self._tensors: list[trt.ITensor | None] = [*given, *wanted]
        self._dimension_names = {
            tensor.name: [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))] for tensor in given
        }
        self._inputs = {tensor.name: _declared(tensor) for tensor in given}
        self._outputs = {tensor.name: id(tensor) for tensor in wanted}
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        _check_constants(layers)
        steps = _in_order([self._step(layer) for layer in layers], {id(tensor) for tensor in given})
        self._constants, self._steps = _fold(steps)
        self._uses = Counter(key for step in self._steps for key in step.inputs if key is not None)
        self._uses.update(self._outputs.values())
        self._constants = {key: value for key, value in self._constants.items() if self._uses[key]}

    def _step(self, layer: trt.ILayer) -> Step:
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        self._tensors += inputs + outputs
        keys = [None if tensor is None else id(tensor) for tensor in inputs]
        try:
            return Step(describe(layer), _kernel(layer), keys, [_declared(tensor) for tensor in outputs])
        except RuntimeError as error:
            error.add_note(f"while the interpreter read {describe(layer)}; TensorRT's log says why")
            raise

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name, for inputs by name. Neither shares memory with the other or with this object."""
        values: dict[int, Value] = {**self._constants, **self._check_inputs(inputs)}
        uses = self._uses.copy()
        with torch.inference_mode():
            for step in self._steps:
                values.update(_execute(step, values))
                for key in step.inputs:
                    if key is not None:
                        uses[key] -= 1
                for key in {*step.inputs, *(tensor.key for tensor in step.outputs)}:
                    if key is not None and uses[key] == 0:
                        values.pop(key, None)
            results = {name: values[key] for name, key in self._outputs.items()}
        assert not any(isinstance(value, Narrow) for value in results.values())
        return {name: value.clone() for name, value in results.items()}

    def _check_inputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[int, Value]:
        if inputs.keys() != self._inputs.keys():
            missing, unknown = sorted(self._inputs.keys() - inputs.keys()), sorted(inputs.keys() - self._inputs.keys())
            raise ValueError(f"network inputs: missing {missing}, unknown {unknown}")
        named: dict[str, int] = {}
        for name, tensor in self._inputs.items():
            value = inputs[name]
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                raise ValueError(f"network input {name!r} is not a torch tensor on the CPU")
            _check(tensor, value, f"network input {name!r}", ValueError)
            for label, length in zip(self._dimension_names[name], value.shape, strict=True):
                if label and named.setdefault(label, length) != length:
                    raise ValueError(f"network input {name!r}: dimension {label!r} is {length}, before {named[label]}")
        return {tensor.key: inputs[name] for name, tensor in self._inputs.items()}


def run(network: trt.INetworkDefinition, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a network by name; `Interpreter` when it is to be run more than once."""
    return Interpreter(network).run(inputs)


def _declared(tensor: trt.ITensor) -> Declared:
    return Declared(id(tensor), tensor.name, tensor.dtype, tuple(tensor.shape))


def _kernel(layer: trt.ILayer) -> Kernel:
    """What a layer does; its options are read, and refused, here."""
    if layer.num_ranks != 1:
        raise refusal(layer, f"num_ranks {layer.num_ranks}")
    if layer_type(layer) not in BUILDERS:
        raise refusal(layer, "this kind of layer")
    layer_class, builder = BUILDERS[layer_type(layer)]
    layer.__class__ = layer_class
    return builder(layer)


def _check_constants(layers: list[trt.ILayer]) -> None:
    """Refuse weights that are placeholders for a refit, before their memory is read.

    TensorRT gives weights with a null pointer consecutive addresses of one byte each, which therefore overlap. (A
    network with a single placeholder cannot be told from one without: its constant holds what lies there.)
    """
    ranges = []
    for layer in layers:
        if layer_type(layer) != trt.LayerType.CONSTANT:
            continue
        layer.__class__ = trt.IConstantLayer
        tensor, weights = layer.get_output(0), layer.weights
        if tensor.dtype not in (*TORCH_TYPES, DT.FP4, DT.INT4):
            raise refusal(layer, f"type {tensor.dtype.name}")
        weights_type = weights.dtype if isinstance(weights, trt.Weights) else _numpy_type(weights)
        if weights_type != tensor.dtype or weights.size != trt.volume(layer.shape):
            raise refusal(layer, f"{weights.size} weights of type {weights_type}")
        ranges.append((weights_address(weights), weights_bytes(tensor.dtype, weights.size), layer))
    ranges.sort(key=lambda entry: entry[:2])
    for (start, size, layer), (following, _, _) in itertools.pairwise(ranges):
        if start < following < start + min(size, 16):
            raise ValueError(f"{describe(layer)}: its weights are a placeholder without data")


def _numpy_type(array: object) -> trt.DataType:
    return next(dtype for dtype in TORCH_TYPES if dtype not in (DT.BF16, DT.FP8) and trt.nptype(dtype) == array.dtype)


def _in_order(steps: list[Step], known: set[int]) -> list[Step]:
    """The steps so that each follows those it needs; an input set late may come from a layer added later."""
    makers = {tensor.key: position for position, step in enumerate(steps) for tensor in step.outputs}
    waits = [{makers[key] for key in step.inputs if key is not None and key not in known} for step in steps]
    ready = deque(position for position, waiting in enumerate(waits) if not waiting)
    users: dict[int, list[int]] = {}
    for position, waiting in enumerate(waits):
        for maker in waiting:
            users.setdefault(maker, []).append(position)
    order = []
    while ready:
        position = ready.popleft()
        order.append(steps[position])
        for user in users.get(position, ()):
            waits[user].discard(position)
            if not waits[user]:
                ready.append(user)
    if len(order) != len(steps):
        raise NotImplementedError("a network with a cycle is not supported by the interpreter")
    return order


def _fold(steps: list[Step]) -> tuple[dict[int, Value], list[Step]]:
    """The values that depend on constants alone, and the steps that remain."""
    constants: dict[int, Value] = {}
    remaining = []
    with torch.inference_mode():
        for step in steps:
            if all(key is None or key in constants for key in step.inputs):
                constants.update(_execute(step, constants))
            else:
                remaining.append(step)
    return constants, remaining


def _execute(step: Step, values: Mapping[int, Value]) -> dict[int, Value]:
    try:
        results = step.kernel([None if key is None else values[key] for key in step.inputs])
        if len(results) != len(step.outputs):
            raise RuntimeError(f"{len(results)} outputs, TensorRT has {len(step.outputs)}")
        for tensor, value in zip(step.outputs, results, strict=True):
            _check(tensor, value, f"{step.name}, output {tensor.name!r}", RuntimeError)
    except Exception as error:
        error.add_note(f"while the interpreter executed {step.name}")
        raise
    return {tensor.key: value for tensor, value in zip(step.outputs, results, strict=True)}


def _check(tensor: Declared, value: Value, where: str, error: type[Exception]) -> None:
    """Type, rank and static dimensions of a value against what TensorRT declares."""
    if isinstance(value, torch.Tensor) and value.dtype not in TORCH_TYPES.values():
        raise error(f"{where}: {value.dtype} is no TensorRT type")
    if data_type(value) != tensor.dtype:
        raise error(f"{where}: type {data_type(value).name}, TensorRT has {tensor.dtype.name}")
    shape = tuple(value.shape)
    if len(shape) != len(tensor.shape) or any(d not in (-1, a) for d, a in zip(tensor.shape, shape, strict=True)):
        raise error(f"{where}: shape {shape}, TensorRT has {tensor.shape}")
