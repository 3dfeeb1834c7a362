"""CUDA's driver API over this machine's memory: what the runtime asks of a GPU happens, as late as a GPU may do it.

Stands for the module cuda.bindings.driver (whose enumerations and structures it uses) and takes the same arguments,
which a test compares. Work waits in the stream until somebody waits for it, so that memory which is changed too early
or read too soon shows. Memory that nobody wrote holds NaN. Accesses outside of an allocation are refused, and from then
on everything is, as on a GPU.
"""

import bisect
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import driver as real

OK = real.CUresult.CUDA_SUCCESS
Bytes = np.ndarray
Operation = Callable[[], None]


class IllegalAddressError(Exception):
    """What a kernel or a copy must not do; the driver makes CUDA_ERROR_ILLEGAL_ADDRESS of it."""


class HostDriver:
    """One GPU. ``faults``: results that functions give instead of doing something, by function, once each;
    ``faults_at``: from their n-th call on.

    ``calls`` counts functions, ``moved`` bytes by direction. ``executed`` counts operations that were done.
    """

    CUresult = real.CUresult
    CUdevice_attribute = real.CUdevice_attribute
    CUstream_flags = real.CUstream_flags
    CUmemorytype = real.CUmemorytype
    CUstreamCaptureMode = real.CUstreamCaptureMode
    CUDA_MEMCPY2D = real.CUDA_MEMCPY2D

    def __init__(
        self,
        memory: int = 1 << 30,
        capability: tuple[int, int] = (12, 0),
        name: str = "NVIDIA GeForce RTX 5090",
        version: int = 13000,
        gpus: int = 1,
    ) -> None:
        self.total, self.name, self.version, self.gpus = memory, name, version, gpus
        self.capability = capability
        self.integrated = False  # whether it shares its memory with the CPU
        self.faults: dict[str, real.CUresult] = {}
        self.faults_at: dict[str, tuple[int, real.CUresult]] = {}  # from that many calls on
        self.calls: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self._memory: dict[int, Bytes] = {}  # of the GPU, by address
        self._pinned: dict[int, Bytes] = {}
        self._bases: list[int] = []
        self._queue: list[Operation] = []
        self._capture: list[Operation] | None = None
        self._spoiled = False  # what is being captured
        self._kept: list[Bytes] = []  # memory that was given back: its address does not come again
        self._dead: real.CUresult | None = None
        self.reason = ""  # of its death
        self._current = threading.local()
        self._handles: dict[int, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._guarded(name, found) if name.startswith("cu") else found

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name == "cuGetErrorString":
                return function(*arguments)
            if name in self.faults:
                return (self.faults.pop(name),)
            if name in self.faults_at and self.calls[name] >= self.faults_at[name][0]:
                return (self.faults_at[name][1],)
            if self._dead is not None:
                return (self._dead,)
            needs_context = not name.startswith(("cuInit", "cuDriver", "cuDevice", "cuCtx"))
            if needs_context and not getattr(self._current, "set", False):
                return (real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
            try:
                return function(*arguments)
            except IllegalAddressError as error:
                self._dead, self.reason = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, str(error)
                return (self._dead,)

        return call

    # What an engine does: memory at an address, and work in the stream

    @property
    def used(self) -> int:
        return sum(each.nbytes for each in self._memory.values())

    @property
    def waiting(self) -> int:
        """Operations that are queued and not done."""
        return len(self._queue)

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    def view(self, address: int, nbytes: int) -> Bytes:
        """Bytes of the GPU's memory. Raises IllegalAddressError for any that are not allocated."""
        place = bisect.bisect_right(self._bases, int(address)) - 1
        base = self._bases[place] if place >= 0 else 0
        whole = self._memory.get(base)
        if whole is None or int(address) - base + nbytes > whole.nbytes:
            raise IllegalAddressError(f"{nbytes} bytes at {int(address):#x} are not allocated")
        return whole[int(address) - base : int(address) - base + nbytes]

    def enqueue(self, operation: Operation) -> None:
        (self._queue if self._capture is None else self._capture).append(operation)

    # The API

    def cuInit(self, Flags: int) -> Any:
        return (OK,)

    def cuDriverGetVersion(self) -> Any:
        return OK, self.version

    def cuDeviceGetCount(self) -> Any:
        return OK, self.gpus

    def cuDeviceGet(self, ordinal: int) -> Any:
        return OK, real.CUdevice(ordinal)

    def cuDeviceGetName(self, length: int, dev: Any) -> Any:
        return OK, self.name.encode()[: length - 1].ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attrib: Any, dev: Any) -> Any:
        if attrib == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED:
            return OK, int(self.integrated)
        return OK, self.capability[attrib == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR]

    def cuDevicePrimaryCtxRetain(self, dev: Any) -> Any:
        return OK, SimpleNamespace(name="context")

    def cuCtxSetCurrent(self, ctx: Any) -> Any:
        self._current.set = True
        return (OK,)

    def cuGetErrorString(self, error: Any) -> Any:
        return OK, b"an illegal memory access was encountered" if error == self._dead else b"a planted fault"

    def cuMemGetInfo(self) -> Any:
        return OK, self.total - self.used, self.total

    def cuMemAlloc(self, bytesize: int) -> Any:
        if bytesize == 0:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        if self.used + bytesize > self.total:
            return (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        address, content = _allocated(bytesize)
        self._memory[address] = content
        bisect.insort(self._bases, address)
        return OK, real.CUdeviceptr(address)

    def cuMemFree(self, dptr: Any) -> Any:
        self._drain()
        if int(dptr) not in self._memory:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        self._bases.remove(int(dptr))
        return self._freed(self._memory.pop(int(dptr)))

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> Any:
        if bytesize == 0:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        address, content = _allocated(bytesize)
        self._pinned[address] = content
        return OK, address

    def cuMemFreeHost(self, p: int) -> Any:
        if p not in self._pinned:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        return self._freed(self._pinned.pop(p))

    def cuMemcpyHtoDAsync(self, dstDevice: Any, srcHost: int, ByteCount: int, hStream: Any) -> Any:
        source = self._host(srcHost, ByteCount)
        self.moved["to the GPU"] += ByteCount
        return self._queued(lambda: _put(self.view(dstDevice, ByteCount), source))

    def cuMemcpyDtoHAsync(self, dstHost: int, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
        target = self._host(dstHost, ByteCount)
        target[:] = 0xFF  # read before the copy is done
        self.moved["from the GPU"] += ByteCount
        return self._queued(lambda: _put(target, self.view(srcDevice, ByteCount)))

    def cuMemcpyDtoDAsync(self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> Any:
        return self._queued(lambda: self._copy(int(dstDevice), int(srcDevice), ByteCount))

    def cuMemcpy2DAsync(self, pCopy: Any, hStream: Any) -> Any:
        device = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert (pCopy.srcMemoryType, pCopy.dstMemoryType) == (device, device)
        assert pCopy.WidthInBytes <= min(pCopy.srcPitch, pCopy.dstPitch)
        target, source, rows = int(pCopy.dstDevice), int(pCopy.srcDevice), pCopy.Height
        width, to_next, from_next = pCopy.WidthInBytes, pCopy.dstPitch, pCopy.srcPitch

        def copy() -> None:
            for row in range(rows):
                self._copy(target + row * to_next, source + row * from_next, width)

        return self._queued(copy)

    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> Any:
        return self._queued(lambda: self.view(dstDevice, N).fill(uc))

    def cuStreamCreate(self, Flags: int) -> Any:
        return OK, real.CUstream(1 << 20)

    def cuStreamDestroy(self, hStream: Any) -> Any:
        return (OK,)

    def cuStreamSynchronize(self, hStream: Any) -> Any:
        self._drain()
        return (OK,)

    def cuEventCreate(self, Flags: int) -> Any:
        return OK, SimpleNamespace(behind=None)

    def cuEventRecord(self, hEvent: Any, hStream: Any) -> Any:
        def happen() -> None:
            hEvent.behind = None

        hEvent.behind = happen
        return self._queued(happen)

    def cuEventSynchronize(self, hEvent: Any) -> Any:
        while hEvent.behind is not None:
            self._step()
        return (OK,)

    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> Any:
        return OK, 1.0

    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> Any:
        self._capture = []
        return (OK,)

    def cuStreamEndCapture(self, hStream: Any) -> Any:
        captured, self._capture = self._capture, None
        if self._spoiled:
            self._spoiled = False
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,)
        return OK, captured

    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> Any:
        return OK, list(hGraph)

    def cuGraphDestroy(self, hGraph: Any) -> Any:
        hGraph.clear()
        return (OK,)

    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> Any:
        for operation in list(hGraphExec):
            self.enqueue(operation)
        return (OK,)

    def cuGraphExecDestroy(self, hGraphExec: Any) -> Any:
        hGraphExec.clear()
        return (OK,)

    def _queued(self, operation: Operation) -> Any:
        if self._capture is not None:  # ours captures nothing but engine calls
            self._spoiled = True
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._queue.append(operation)
        return (OK,)

    def _freed(self, content: Bytes) -> Any:
        content[:] = 0xFF
        self._kept.append(content)
        return (OK,)

    def _drain(self) -> None:
        while self._queue:
            self._step()

    def _step(self) -> None:
        self._queue.pop(0)()

    def _host(self, address: int, nbytes: int) -> Bytes:
        for base, content in self._pinned.items():
            if base <= address and address + nbytes <= base + content.nbytes:
                return content[address - base : address - base + nbytes]
        raise IllegalAddressError(f"{nbytes} bytes at {address:#x} are not pinned")

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        if abs(target - source) < nbytes:
            raise IllegalAddressError(f"a copy of {nbytes} bytes over itself has no defined result")
        _put(self.view(target, nbytes), self.view(source, nbytes))


def _allocated(nbytes: int) -> tuple[int, Bytes]:
    """Aligned to 256 bytes; every number in it is NaN, whatever its type."""
    whole = np.full(nbytes + 256, 0xFF, np.uint8)
    skipped = -whole.ctypes.data % 256
    content = whole[skipped : skipped + nbytes]
    return content.ctypes.data, content


def _put(target: Bytes, source: Bytes) -> None:
    target[:] = source
