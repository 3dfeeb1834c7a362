"""A GPU through the CUDA driver API: memory, copies, one stream, events, graphs. All of the runtime's CUDA is here.

Addresses are integers, sizes are bytes. Nothing waits unless it says so: work is queued in one stream and done in its
order. Knows nothing of engines.
"""

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt.errors import DeviceError, InputError

LEAST_CUDA = 13000  # of the driver: TensorRT and cuda-bindings are built for CUDA 13
_NAME_BYTES = 128


class OutOfMemoryError(Exception):
    """The GPU, or the memory that it can reach of this machine, has no ``nbytes`` left. Nothing else is wrong."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"{nbytes:,} bytes")
        self.nbytes = nbytes


class Pinned:
    """Memory of this machine that the GPU copies to and from by itself: ``array`` (nbytes,) uint8."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class CudaDevice:
    """One GPU as this process sees it. ``driver`` is the module cuda.bindings.driver.

    Usable from any thread, by one at a time. Raises DeviceError for every call that CUDA refuses, but for
    OutOfMemoryError where memory is asked for, and InputError in the constructor where there is no usable GPU.
    """

    def __init__(self, driver: Any, ordinal: int = 0, meminfo: Path = Path("/proc/meminfo")) -> None:
        self._cuda = driver
        self._meminfo = meminfo
        self._current = threading.local()
        try:
            self._call("cuInit", 0)
            self.cuda_version = int(self._call("cuDriverGetVersion"))
            count = int(self._call("cuDeviceGetCount"))
        except (DeviceError, RuntimeError) as error:  # RuntimeError: the bindings find no driver library
            raise InputError(
                f"no usable NVIDIA driver on this machine ({error}): run nvidia-smi; in a container, ask for the GPU "
                "(docker run --gpus all)"
            ) from None
        if self.cuda_version < LEAST_CUDA:
            raise InputError(
                f"the NVIDIA driver supports CUDA {_version(self.cuda_version)}, and TensorRT here needs "
                f"{_version(LEAST_CUDA)} or newer: install a newer driver (nvidia-smi shows the present one)"
            )
        if not 0 <= ordinal < count:
            raise InputError(f"GPU {ordinal} does not exist: CUDA sees {count} (see CUDA_VISIBLE_DEVICES)")
        device = self._call("cuDeviceGet", ordinal)
        self.name = bytes(self._call("cuDeviceGetName", _NAME_BYTES, device)).split(b"\0")[0].decode()
        attributes = driver.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.compute_capability = f"{major}.{minor}"
        self._shares_memory = bool(
            self._call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_INTEGRATED, device)
        )
        # The primary context, which TensorRT takes too.
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self.use()
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING  # the default stream would make each wait for the other
        self._stream = self._call("cuStreamCreate", flags.value)
        self.stream = int(self._stream)
        self._device_memory: list[int] = []
        self._pinned: list[int] = []

    def use(self) -> None:
        """Makes this GPU the calling thread's. Every thread must, before anything else."""
        if not getattr(self._current, "set", False):
            self._call("cuCtxSetCurrent", self._context)
            self._current.set = True

    def memory(self) -> tuple[int, int]:
        """Bytes that are free now, for all processes, and bytes that the GPU has.

        Of memory that is shared with the CPU (DGX Spark), what Linux would free counts too, as NVIDIA advises: CUDA
        takes cached files for used memory, and after a build they fill it.
        """
        free, total = map(int, self._call("cuMemGetInfo"))
        if self._shares_memory:
            found = re.search(r"^MemAvailable: +([0-9]+) kB$", _text(self._meminfo), re.MULTILINE)
            free = min(max(free, int(found[1]) * 1024 if found else 0), total)
        return free, total

    def allocate(self, nbytes: int) -> int:
        """The address of new memory of the GPU, aligned to 256 bytes, its content undefined. Waits for the GPU."""
        address = int(self._allocated("cuMemAlloc", nbytes))
        self._device_memory.append(address)
        return address

    def free(self, address: int) -> None:
        """Gives memory back that `allocate` gave. Waits for the GPU."""
        self._device_memory.remove(address)
        self._call("cuMemFree", address)

    def pinned(self, nbytes: int) -> Pinned:
        address = int(self._allocated("cuMemHostAlloc", nbytes, 0))
        self._pinned.append(address)
        return Pinned(address, nbytes)

    def unpin(self, memory: Pinned) -> None:
        """Gives memory back that `pinned` gave; its array must not be touched any more."""
        self._pinned.remove(memory.address)
        self._call("cuMemFreeHost", memory.address)

    def upload(self, target: int, source: Pinned, nbytes: int, start: int = 0) -> None:
        """Copies bytes of ``source`` from ``start`` on: they must stay as they are until the copy is done."""
        self._call("cuMemcpyHtoDAsync", target, source.address + start, nbytes, self._stream)

    def download(self, target: Pinned, source: int, nbytes: int, start: int = 0) -> None:
        """Copies to ``target`` from byte ``start`` on, which may be read when the copy is done."""
        self._call("cuMemcpyDtoHAsync", target.address + start, source, nbytes, self._stream)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Within the GPU, between places that do not overlap."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def copy_rows(self, target: int, source: int, nbytes: int, rows: int, pitch: int) -> None:
        """``rows`` times ``nbytes``, each ``pitch`` bytes behind the one before, on both sides."""
        wanted = self._cuda.CUDA_MEMCPY2D()
        wanted.srcMemoryType = wanted.dstMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        wanted.srcDevice, wanted.dstDevice = source, target
        wanted.srcPitch = wanted.dstPitch = pitch
        wanted.WidthInBytes, wanted.Height = nbytes, rows
        self._call("cuMemcpy2DAsync", wanted, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Fills with zeros."""
        self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)

    def event(self) -> Any:
        return self._call("cuEventCreate", 0)

    def record(self, event: Any) -> None:
        """The event happens when all that is queued now is done."""
        self._call("cuEventRecord", event, self._stream)

    def wait(self, event: Any) -> None:
        """Until an event that was recorded has happened; at once for one that never was."""
        self._call("cuEventSynchronize", event)

    def milliseconds(self, first: Any, second: Any) -> float:
        """Between two events that have happened, by the GPU's clock."""
        return float(self._call("cuEventElapsedTime", first, second))

    def synchronize(self) -> None:
        """Waits until all that is queued is done."""
        self._call("cuStreamSynchronize", self._stream)

    @contextmanager
    def captured(self) -> Iterator[list[Any]]:
        """What is queued meanwhile is not done but kept as a graph, the only element of the list afterwards."""
        found: list[Any] = []
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            yield found
        finally:
            graph = self._call("cuStreamEndCapture", self._stream)
        found.append(self._call("cuGraphInstantiate", graph, 0))
        self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """Gives a graph back, which must not be running."""
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        """Gives all memory back. The object must not be used any more."""
        self.synchronize()
        for address in self._device_memory:
            self._call("cuMemFree", address)
        for address in self._pinned:
            self._call("cuMemFreeHost", address)
        self._call("cuStreamDestroy", self._stream)
        self._device_memory, self._pinned = [], []

    def _allocated(self, function: str, nbytes: int, *more: int) -> Any:
        result, *values = getattr(self._cuda, function)(nbytes, *more)
        if result == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError(nbytes)
        return self._checked(function, result, values)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a driver function returns beside its status: nothing, a value, or several."""
        result, *values = getattr(self._cuda, function)(*arguments)
        return self._checked(function, result, values)

    def _checked(self, function: str, result: Any, values: list[Any]) -> Any:
        if result != self._cuda.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"CUDA error {result.name} in {function}{self._explanation(result)}")
        return values[0] if len(values) == 1 else values

    def _explanation(self, result: Any) -> str:
        status, text = self._cuda.cuGetErrorString(result)
        return f": {text.decode()}" if status == self._cuda.CUresult.CUDA_SUCCESS and text else ""


def open_device(ordinal: int = 0) -> CudaDevice:
    """Raises InputError where cuda-bindings, a driver that is new enough, or the GPU is missing."""
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise InputError(
            f"cuda-bindings can't be loaded ({error}): pip install 'canvasrt[rtx]' for RTX cards and DGX Spark, "
            "'canvasrt[tensorrt]' for datacenter GPUs"
        ) from None
    return CudaDevice(driver, ordinal)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
