"""TensorRT's runtime on the CPU: plans are deserialized, refitted and executed, and the network interpreter computes.

`compiling` lets ``canvasrt build`` run as it is, up to NVIDIA's compiler: what would be compiled is kept, and the plan
names it. `HostTensorRT` stands for the module tensorrt_rtx where a plan is loaded; all else is the real module's. Every
call's shapes must lie in the ranges that the engine is built for.
"""

import contextlib
import ctypes
import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from canvasrt.compile import compiler, job
from canvasrt.ops.tensorrt_graph import EnginePrecision, Graph
from host_gpu import HostDriver, IllegalAddressError
from rtx_only import RTX_ONLY
from trt_interpreter import Interpreter
from trt_interpreter_values import TORCH_TYPES, weights_address, weights_bytes

SCRATCH_BYTES = 4096


class Described:
    """What a plan stands for. The network's constants lie in arrays that the graph keeps."""

    def __init__(self, builder: Any, graph: Graph, network: Any, ranges: dict[str, Any]) -> None:
        self.network, self.ranges, self._alive = network, ranges, (builder, graph)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        named = {layer.name: layer for layer in layers if layer.type == trt.LayerType.CONSTANT}
        self.placeholders = {
            name: layer for name, layer in named.items() if network.are_weights_marked_refittable(name)
        }
        for layer in self.placeholders.values():
            layer.__class__ = trt.IConstantLayer
        # At once, while the memory that the weights lie in exists.
        self.interpreter = None if self.placeholders else Interpreter(network)


PLANS: dict[bytes, Described] = {}
_NUMBERS = itertools.count()


@contextlib.contextmanager
def compiling(precision: EnginePrecision, recipe: str = "") -> Iterator[None]:
    """``canvasrt.compile.job.build`` writes bundles whose plans `HostTensorRT` runs.

    ``recipe`` lies in the plan, and says how another process describes the same network.
    """
    graphs: list[Graph] = []
    asked: list[dict[str, Any]] = []

    class KeptGraph(Graph):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            graphs.append(self)

    def config(trt_: Any, builder: Any, request: Any, by_range: dict[str, Any]) -> None:
        asked.append(by_range)

    def run(trt_: Any, builder: Any, network: Any, config: Any, sink: Any, progress: Any, log: Any) -> int:
        plan = f"{recipe}\n{next(_NUMBERS)}".encode()
        PLANS[plan] = Described(builder, graphs[-1], network, asked[-1])
        sink(plan)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "Graph", KeptGraph)
        patch.setattr(compiler, "_config", config)
        patch.setattr(compiler, "_run", run)
        patch.setattr(job, "Request", partial(job.Request, precision=precision))
        yield


class HostTensorRT:
    """``refits``: "together", where no weight may be missing when the first are put in, or "apart".

    ``calls`` counts engine calls; ``last`` keeps what the last one was given and gave.
    """

    __version__ = trt.__version__

    def __init__(self, driver: HostDriver, refits: str = "together", name: str = "tensorrt_rtx") -> None:
        self.__name__ = name
        self.driver = driver
        self.refits = refits
        self.calls = 0
        self.last: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        self.refitted: list[list[str]] = []  # names, by refit
        self.validity = (trt.EngineValidity.VALID, 0)
        self.capturable = True
        self.contexts = 0
        self.kernels = b"kernels of this GPU"

    def described(self, plan: bytes) -> Described | None:
        """Of a plan of this process; subclasses know others."""
        return PLANS.get(plan)

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == "tensorrt" and name in RTX_ONLY:
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")
        return getattr(trt, name)

    def Runtime(self, logger: Any) -> "HostRuntime":
        return HostRuntime(self, logger)

    def Refitter(self, engine: "HostCudaEngine", logger: Any) -> "HostRefitter":
        return HostRefitter(self, engine, logger)


class Datacenter:
    """A base whose subclasses have only what the library of their module has."""

    _module: HostTensorRT

    def __getattribute__(self, name: str) -> Any:
        if name in RTX_ONLY and self._module.__name__ == "tensorrt":
            raise AttributeError(f"TensorRT has no {name}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RTX_ONLY and self._module.__name__ == "tensorrt":
            raise AttributeError(f"TensorRT has no {name}")
        super().__setattr__(name, value)


class HostRuntime(Datacenter):
    def __init__(self, module: HostTensorRT, logger: Any) -> None:
        self._module, self._logger = module, logger

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        return self._module.validity

    def deserialize_cuda_engine(self, serialized_engine: Any) -> "HostCudaEngine | None":
        described = self._module.described(bytes(serialized_engine))
        if described is None:
            self._logger.log(trt.ILogger.ERROR, "Serialization assertion failed: magic tag does not match")
            return None
        return HostCudaEngine(self._module, described, self._logger)


class HostCudaEngine:
    def __init__(self, module: HostTensorRT, described: Described, logger: Any) -> None:
        self.module, self.described, self.logger = module, described, logger
        self.interpreter = described.interpreter
        self.num_optimization_profiles = len(described.ranges)

    def create_runtime_config(self) -> "HostRuntimeConfig":
        return HostRuntimeConfig(self.module)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH_BYTES * (profile_index + 1)

    def create_execution_context(self, *, runtime_config: "HostRuntimeConfig") -> "HostContext":
        assert runtime_config.strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.module.contexts += 1
        return HostContext(self)


class HostRuntimeConfig(Datacenter):
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, module: HostTensorRT) -> None:
        self._module = module
        self.strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        module = self._module
        return SimpleNamespace(deserialize=lambda blob: bytes(blob) == module.kernels, serialize=lambda: module.kernels)

    def set_runtime_cache(self, cache: Any) -> bool:
        return True


class HostContext:
    def __init__(self, engine: HostCudaEngine) -> None:
        self._engine = engine
        self._driver = engine.module.driver
        network = engine.described.network
        self._inputs = [network.get_input(index) for index in range(network.num_inputs)]
        self._outputs = [network.get_output(index) for index in range(network.num_outputs)]
        self._types = {each.name: each.dtype for each in (*self._inputs, *self._outputs)}
        self._shapes = {each.name: tuple(each.shape) for each in self._inputs if -1 not in tuple(each.shape)}
        self._dynamic = {each.name for each in self._inputs} - self._shapes.keys()
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._range: dict[str, Any] | None = None
        self._version = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._range = list(self._engine.described.ranges.values())[profile_index]
        self._least_scratch = self._engine.get_device_memory_size_for_profile_v2(profile_index)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._range is not None, "no shape range was chosen"
        low, _, high = self._range[name]
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._engine.logger.log(trt.ILogger.ERROR, f"{name}: {shape} is outside of {low} to {high}")
            return False
        self._shapes[name] = shape
        self._version += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._types or memory % 16:
            self._engine.logger.log(trt.ILogger.ERROR, f"{name} at {memory:#x}: no such tensor, or not aligned")
            return False
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return sorted(self._dynamic - self._shapes.keys())

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if self._scratch is None or self._scratch[1] < self._least_scratch:
            engine.logger.log(trt.ILogger.ERROR, f"{self._scratch} is not enough device memory")
            return False
        if missing := sorted(self._types.keys() - self._addresses.keys()):
            engine.logger.log(trt.ILogger.ERROR, f"Address is not set for {missing[0]}")
            return False
        if engine.interpreter is None:
            engine.logger.log(trt.ILogger.ERROR, "the engine's weights have not been refitted")
            return False
        if self._driver.capturing and not engine.module.capturable:
            engine.logger.log(trt.ILogger.ERROR, "operation not permitted when stream is capturing")
            return False
        # A captured call keeps these; a context that has got other shapes meanwhile has changed what they rely on.
        shapes, addresses, version = dict(self._shapes), dict(self._addresses), self._version
        captured = self._driver.capturing
        this = weakref.ref(self)

        def execute() -> None:
            if this() is None:
                raise IllegalAddressError("a context was destroyed while its call was queued")
            if captured and version != this()._version:
                raise IllegalAddressError("a captured call ran after its context had got other shapes")
            this()._execute(shapes, addresses)

        self._driver.enqueue(execute)
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        module = self._engine.module
        module.calls += 1
        assert self._scratch is not None
        self._driver.view(*self._scratch).fill(0xFF)  # of all contexts: nothing that matters may lie there
        inputs = {name: self._tensor(name, shape, addresses[name]).clone() for name, shape in shapes.items()}
        interpreter = self._engine.interpreter
        assert interpreter is not None
        outputs = interpreter.run(inputs)
        module.last = (inputs, outputs)
        for name, value in outputs.items():
            self._tensor(name, tuple(value.shape), addresses[name]).copy_(value)

    def _tensor(self, name: str, shape: tuple[int, ...], address: int) -> torch.Tensor:
        """The memory itself."""
        kind = TORCH_TYPES[self._types[name]]
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=kind)
        return torch.from_numpy(self._driver.view(address, nbytes)).view(kind).view(shape)


class HostRefitter:
    def __init__(self, module: HostTensorRT, engine: HostCudaEngine, logger: Any) -> None:
        self._module, self._engine, self._logger = module, engine, logger
        self._set: dict[str, tuple[int, int]] = {}
        self._done: dict[str, np.ndarray] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.described.placeholders)

    def get_missing_weights(self) -> list[str]:
        if self._module.refits == "apart":
            return []
        return [name for name in self.get_all_weights() if name not in self._set and name not in self._done]

    def set_named_weights(self, name: str, weights: Any) -> bool:
        layer = self._engine.described.placeholders.get(name)
        if layer is None or (layer.get_output(0).dtype, trt.volume(layer.shape)) != (weights.dtype, weights.size):
            self._logger.log(trt.ILogger.ERROR, f"{name}: rejected, {weights.size} of {weights.dtype}")
            return False
        if weights_address(weights) % 16:
            self._logger.log(trt.ILogger.ERROR, f"{name}: not aligned to 16 bytes")
            return False
        self._set[name] = (weights_address(weights), weights_bytes(weights.dtype, weights.size))
        return True

    def unset_named_weights(self, weights_name: str) -> bool:
        return self._set.pop(weights_name, None) is not None

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            return False
        for name, (address, nbytes) in self._set.items():
            # Now, as the library does: what was given back too early is read as what lies there instead.
            content = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address)).copy()
            self._done[name] = content
            layer = self._engine.described.placeholders[name]
            layer.weights = trt.Weights(layer.get_output(0).dtype, content.ctypes.data, trt.volume(layer.shape))
        self._module.refitted.append(list(self._set))
        if len(self._done) == len(self._engine.described.placeholders):
            self._engine.interpreter = Interpreter(self._engine.described.network)
        return True
