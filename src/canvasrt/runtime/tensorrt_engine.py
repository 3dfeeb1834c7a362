"""A plan of TensorRT or TensorRT-RTX in GPU memory, and its execution contexts. Knows nothing of what it computes.

Both libraries have the same API; what only TensorRT-RTX has is its runtime cache, which keeps the kernels that it
compiles on the user's GPU, and the choice of when it compiles them. The library comes as a value:
canvasrt.ops.tensorrt_api imports it.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from canvasrt.errors import BundleError, DeviceError
from canvasrt.runtime.cuda_device import CudaDevice, OutOfMemoryError

RTX = "tensorrt_rtx"
_OUT_OF_MEMORY = ("out of memory", "outofmemory", "out_of_memory", "cudaerror 2", "cudamalloc")
_LISTED = 3  # messages of the library that an error repeats

Shape = tuple[int, ...]


class TensorRTEngine:
    """One plan. ``ranges``: names of its shape ranges (optimization profiles), in the plan's order.

    Raises BundleError for a plan that the library refuses, OutOfMemoryError where the GPU has too little memory.
    """

    def __init__(self, trt: ModuleType, device: CudaDevice, plan: memoryview, ranges: Sequence[str], path: str) -> None:
        self.trt = trt
        self.device = device
        self.warnings: list[str] = []  # for who opened it
        self._ranges = list(ranges)
        self.logger, self.said = library_log(trt)
        self.said.errors.clear()  # of an engine before
        self._runtime = trt.Runtime(self.logger)
        self._check_validity(plan, path)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            self.raise_if_out_of_memory(len(plan))
            raise BundleError(
                f"{path}: {trt.__name__} refuses the plan: {self.said.last() or 'it gives no reason'}. Build the "
                "bundle again on this machine"
            )
        profiles = int(self.engine.num_optimization_profiles)
        if profiles != len(self._ranges):
            raise BundleError(
                f"{path}: the plan has {profiles} shape ranges, its manifest {len(self._ranges)}: build it again"
            )
        self._config = {name: self._runtime_config() for name in self._ranges}
        self._cache = self._runtime_cache()
        self._scratch_bytes = 0
        self._scratch = 0

    @property
    def compiles_late(self) -> bool:
        """Whether kernels of a shape get better while it is in use: TensorRT-RTX compiles them in the background."""
        return self.trt.__name__ == RTX

    def reserve(self) -> int:
        """Allocates what all contexts share, since one call runs at a time. Bytes; OutOfMemoryError where short.

        After the weights are in: only then the library knows what a call needs.
        """
        sizes = [self.engine.get_device_memory_size_for_profile_v2(index) for index in range(len(self._ranges))]
        self._scratch_bytes = max(map(int, sizes))
        self._scratch = self.device.allocate(max(self._scratch_bytes, 1))
        return self._scratch_bytes

    def context(self, shape_range: str) -> "Context":
        """A new execution context; a captured graph needs one whose shapes never change again."""
        made = self.engine.create_execution_context(runtime_config=self._config[shape_range])
        if made is None:
            self.raise_if_out_of_memory(0)
            raise DeviceError(f"no execution context for {shape_range}: {self.said.last()}")
        made.set_device_memory(self._scratch, self._scratch_bytes)
        if not made.set_optimization_profile_async(self._ranges.index(shape_range), self.device.stream):
            raise DeviceError(f"the shape range {shape_range} was refused: {self.said.last()}")
        return Context(made, self.device, self.said)

    def load_cache(self, content: bytes) -> bool:
        """Whether the kernels of an earlier process could be used: those of this GPU, driver and library version."""
        return self._cache is not None and bool(self._cache.deserialize(content))

    def cache(self) -> bytes | None:
        """The kernels that were compiled so far; None where the library compiles none at run time."""
        return None if self._cache is None else bytes(self._cache.serialize())

    def raise_if_out_of_memory(self, nbytes: int) -> None:
        if any(text in self.said.last().lower() for text in _OUT_OF_MEMORY):
            raise OutOfMemoryError(nbytes)

    def _check_validity(self, plan: memoryview, path: str) -> None:
        if self.trt.__name__ != RTX:
            return
        validity, bits = self._runtime.get_engine_validity(plan)
        if validity != self.trt.EngineValidity.INVALID:
            return
        flags = self.trt.EngineInvalidityDiagnostics.__members__.items()
        reasons = [name for name, flag in flags if int(bits) & int(flag)]
        if "INSUFFICIENT_GPU_MEMORY" in reasons:
            raise OutOfMemoryError(len(plan))
        said = ", ".join(reasons) or self.said.last() or "it gives no reason"
        raise BundleError(
            f"{path}: TensorRT-RTX says that this machine's GPU or driver can't run the plan ({said}): update the "
            "driver, or build the bundle again for this GPU"
        )

    def _runtime_config(self) -> Any:
        trt = self.trt
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if trt.__name__ == RTX:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the runner captures steps itself
            # In the background: else every request would wait for the compiler when one brings new sizes.
            strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
            config.dynamic_shapes_kernel_specialization_strategy = strategy
        return config

    def _runtime_cache(self) -> Any:
        """One for all contexts; None where there is no such thing."""
        if self.trt.__name__ != RTX:
            return None
        configs = list(self._config.values())
        cache = configs[0].create_runtime_cache()
        for config in configs:
            if not config.set_runtime_cache(cache):
                return None
        return cache


class Context:
    """An execution context with the shapes and addresses that it has now."""

    def __init__(self, context: Any, device: CudaDevice, said: "Said") -> None:
        self._context = context
        self._device = device
        self._said = said
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self.ran = False

    def bind(self, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Shapes of all inputs that vary, addresses of all tensors. Raises DeviceError for what the engine refuses."""
        changed = [name for name, shape in shapes.items() if self._shapes.get(name) != shape]
        for name in changed:
            if not self._context.set_input_shape(name, shapes[name]):
                raise DeviceError(f"{name} can't have the shape {shapes[name]}: {self._said.last()}")
            self._shapes[name] = shapes[name]
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise DeviceError(f"{name} can't lie at {address:#x}: {self._said.last()}")
                self._addresses[name] = address
        if changed:
            missing = self._context.infer_shapes()
            if missing:
                raise DeviceError(f"the engine wants shapes or addresses of {', '.join(missing)}")

    def enqueue(self) -> None:
        """Queues one run."""
        if not self._context.execute_async_v3(self._device.stream):
            raise DeviceError(f"a call of the engine failed: {self._said.last() or 'no reason was given'}")
        self.ran = True


class Said:
    """What the library complained of: its calls return False, and the reason stands here."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=_LISTED)

    def last(self) -> str:
        return "; ".join(self.errors)


_LOGGERS: dict[str, tuple[Any, Said]] = {}  # by library


def library_log(trt: ModuleType) -> tuple[Any, Said]:
    """The logger for everything of a library, and what it heard: the library keeps the first one of a process."""
    if trt.__name__ not in _LOGGERS:
        said = Said()

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # the module is a value
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    said.errors.append(message)

        _LOGGERS[trt.__name__] = Logger(), said
    return _LOGGERS[trt.__name__]
