"""The GPU that is this machine's memory can fail: what a real one does not forgive is refused or shows in the bytes."""

from collections.abc import Callable

import numpy as np
import pytest

from canvasrt.errors import DeviceError
from canvasrt.runtime.cuda_device import CudaDevice, Pinned
from host_gpu import HostDriver, IllegalAddressError, real

Gpu = tuple[HostDriver, CudaDevice]
ILLEGAL = "CUDA_ERROR_ILLEGAL_ADDRESS in cuStreamSynchronize: an illegal memory access was encountered"


@pytest.fixture
def gpu() -> Gpu:
    driver = HostDriver()
    return driver, CudaDevice(driver)


def pinned(device: CudaDevice, values: bytes) -> Pinned:
    memory = device.pinned(len(values))
    memory.array[:] = np.frombuffer(values, np.uint8)
    return memory


def assert_dead(gpu: Gpu, reason: str) -> None:
    """From a wrong access on everything is refused, and the first reason stays."""
    driver, device = gpu
    with pytest.raises(DeviceError, match=ILLEGAL):
        device.synchronize()
    assert reason in driver.reason
    first = driver.reason
    for verb in (device.memory, device.event, lambda: device.allocate(8), lambda: device.pinned(8)):
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            verb()
    assert driver.reason == first


# Of 9 bytes at ``address``, to or from the ``other`` memory.
ACCESSES: dict[str, Callable[[CudaDevice, int, int, Pinned], None]] = {
    "upload": lambda device, address, other, host: device.upload(address, host, 9),
    "download": lambda device, address, other, host: device.download(host, address, 9),
    "clear": lambda device, address, other, host: device.clear(address, 9),
    "copy from": lambda device, address, other, host: device.copy(other, address, 9),
    "copy to": lambda device, address, other, host: device.copy(address, other, 9),
    "rows from": lambda device, address, other, host: device.copy_rows(other, address, 1, 2, 8),
    "rows to": lambda device, address, other, host: device.copy_rows(address, other, 1, 2, 8),
}


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("excess", [0, 1])
def test_one_byte_beyond_an_allocation_is_refused(gpu: Gpu, access: str, excess: int) -> None:
    driver, device = gpu
    address = device.allocate(9 - excess)
    ACCESSES[access](device, address, device.allocate(16), device.pinned(16))
    if excess:
        assert_dead(gpu, "are not allocated")
    else:
        device.synchronize()
        assert driver.reason == ""


@pytest.mark.parametrize("access", ACCESSES)
def test_memory_that_was_freed_is_refused(gpu: Gpu, access: str) -> None:
    _, device = gpu
    address, other, host = device.allocate(16), device.allocate(16), device.pinned(16)
    device.free(address)
    ACCESSES[access](device, address, other, host)
    assert_dead(gpu, "are not allocated")


def test_one_byte_before_an_allocation_is_refused(gpu: Gpu) -> None:
    _, device = gpu
    device.clear(device.allocate(16) - 1, 4)
    assert_dead(gpu, "are not allocated")


def test_work_that_is_queued_is_done_before_its_memory_is_freed(gpu: Gpu) -> None:
    driver, device = gpu
    address = device.allocate(16)
    device.clear(address, 16)
    device.free(address)
    device.synchronize()
    assert driver.reason == ""


@pytest.mark.parametrize(("distance", "refused"), [(0, True), (7, True), (-7, True), (8, False), (-8, False)])
def test_a_copy_over_itself_is_refused(gpu: Gpu, distance: int, refused: bool) -> None:
    driver, device = gpu
    address = device.allocate(64) + 16
    for copy in (device.copy, lambda *three: device.copy_rows(*three, 1, 8)):
        copy(address + distance, address, 8)
        if refused:
            assert_dead(gpu, "over itself")
            return
    device.synchronize()
    assert driver.reason == ""


@pytest.mark.parametrize("beyond", [0, 1])
def test_memory_that_is_not_pinned_is_refused(beyond: int) -> None:
    for moves in ("upload", "download"):
        driver = HostDriver()
        device = CudaDevice(driver)
        address, memory = device.allocate(16), device.pinned(8)
        arguments = (address, memory) if moves == "upload" else (memory, address)
        if beyond:
            with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                getattr(device, moves)(*arguments, 6, 3)
            assert "are not pinned" in driver.reason
        else:
            getattr(device, moves)(*arguments, 5, 3)
            device.synchronize()


def test_memory_that_was_pinned_once_is_refused(gpu: Gpu) -> None:
    driver, device = gpu
    memory = device.pinned(8)
    device.unpin(memory)
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS in cuMemcpyHtoDAsync"):
        device.upload(device.allocate(8), memory, 8)
    assert "are not pinned" in driver.reason


def test_a_thread_without_the_gpu_is_refused_everything_but_finding_it() -> None:
    driver = HostDriver()
    for name in ("cuMemGetInfo", "cuStreamSynchronize", "cuEventCreate", "cuGraphLaunch", "cuMemFreeHost"):
        assert getattr(driver, name)(*[0] * 9) == (real.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
    assert driver.cuDeviceGetCount() == (real.CUresult.CUDA_SUCCESS, 1)
    CudaDevice(driver)
    assert driver.cuMemGetInfo()[0] == real.CUresult.CUDA_SUCCESS


def test_copies_are_not_captured(gpu: Gpu) -> None:
    driver, device = gpu
    address, memory, event = device.allocate(8), device.pinned(8), device.event()
    work = (
        lambda: device.upload(address, memory, 8), lambda: device.download(memory, address, 8),
        lambda: device.clear(address, 8), lambda: device.copy(address, address + 4, 4), lambda: device.record(event),
        lambda: device.copy_rows(address, address + 4, 1, 1, 1),
    )  # fmt: skip
    for queue in work:
        with pytest.raises(DeviceError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), device.captured():
            queue()
        assert driver.waiting == 0


def test_a_block_that_is_overwritten_before_its_copy_is_done_delivers_the_new_bytes(gpu: Gpu) -> None:
    driver, device = gpu
    address, memory = device.allocate(8), pinned(device, b"original")
    device.upload(address, memory, 8)
    memory.array[:4] = np.frombuffer(b"OVER", np.uint8)
    device.synchronize()
    assert driver.view(address, 8).tobytes() == b"OVERinal"


def test_results_that_are_read_too_early_are_nan(gpu: Gpu) -> None:
    driver, device = gpu
    address, memory = device.allocate(8), pinned(device, b"previous")
    driver.view(address, 8)[:] = np.frombuffer(b"answered", np.uint8)
    device.download(memory, address, 8)
    assert memory.array.tobytes() == b"\xff" * 8
    assert np.isnan(memory.array.view(np.float32)).all()
    device.synchronize()
    assert memory.array.tobytes() == b"answered"


def test_memory_that_nobody_wrote_is_nan_in_every_type(gpu: Gpu) -> None:
    driver, device = gpu
    for address in (device.allocate(48), device.allocate(16)):
        assert address % 256 == 0
        for kind in (np.float16, np.float32, np.float64):
            assert np.isnan(driver.view(address, 16).view(kind)).all()
    assert device.pinned(48).array.tolist() == [0xFF] * 48


def test_work_waits_until_somebody_waits_for_it_and_is_done_in_its_order(gpu: Gpu) -> None:
    driver, device = gpu
    address, memory = device.allocate(4), pinned(device, b"\1\2\3\4")
    device.upload(address, memory, 4)
    device.clear(address + 1, 2)
    assert driver.waiting == 2
    assert driver.view(address, 4).tolist() == [0xFF] * 4
    device.synchronize()
    assert driver.view(address, 4).tolist() == [1, 0, 0, 4]


def test_bytes_are_counted_by_direction(gpu: Gpu) -> None:
    driver, device = gpu
    address, memory = device.allocate(64), device.pinned(64)
    for nbytes in (5, 20):
        device.upload(address, memory, nbytes)
    device.download(memory, address, 7)
    device.copy(address, address + 32, 32)
    assert driver.moved == {"to the GPU": 25, "from the GPU": 7}
    assert driver.calls["cuMemcpyHtoDAsync"] == 2


def test_work_of_an_engine_that_goes_astray_ends_the_gpu(gpu: Gpu) -> None:
    driver, _ = gpu
    done: list[int] = []
    driver.enqueue(lambda: done.append(1))
    driver.enqueue(lambda: driver.view(1 << 40, 4).fill(0))
    driver.enqueue(lambda: done.append(2))
    assert_dead(gpu, "4 bytes at 0x10000000000 are not allocated")
    assert done == [1]
    with pytest.raises(IllegalAddressError):
        driver.view(0, 1)


def test_a_planted_fault_comes_once(gpu: Gpu) -> None:
    driver, device = gpu
    driver.faults["cuEventCreate"] = real.CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DeviceError, match="CUDA_ERROR_LAUNCH_FAILED in cuEventCreate: a planted fault"):
        device.event()
    device.wait(device.event())
