"""The GPU as the runtime uses it, and the host driver that stands for one: both against cuda.bindings.driver itself."""

import ast
import ctypes
import inspect
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from canvasrt.errors import DeviceError, InputError
from canvasrt.runtime import cuda_device
from canvasrt.runtime.cuda_device import CudaDevice, OutOfMemoryError, open_device
from host_gpu import HostDriver, real

SOURCE = ast.parse(Path(cuda_device.__file__).read_text(encoding="utf-8"))
UNKNOWN = real.CUresult.CUDA_ERROR_UNKNOWN
HANDLES = {
    "ctx": real.CUcontext,
    "hEvent": real.CUevent,
    "hStart": real.CUevent,
    "hEnd": real.CUevent,
    "hGraph": real.CUgraph,
    "hGraphExec": real.CUgraphExec,
}

Verb = Callable[[CudaDevice], Any]


def functions() -> set[str]:
    """Of the driver, that the module names."""
    texts = {node.value for node in ast.walk(SOURCE) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    attributes = {node.attr for node in ast.walk(SOURCE) if isinstance(node, ast.Attribute)}
    return {name for name in texts | attributes if re.fullmatch(r"cu[A-Z]\w+", name)}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def has_driver() -> bool:
    try:
        return bool(real.cuInit(0)[0] == real.CUresult.CUDA_SUCCESS)
    except RuntimeError:
        return False


@pytest.fixture
def driver() -> HostDriver:
    return HostDriver()


@pytest.fixture
def device(driver: HostDriver) -> CudaDevice:
    return CudaDevice(driver)


# The interface, as NVIDIA's bindings have it


def test_every_function_that_is_used_exists_in_both_drivers() -> None:
    assert len(functions()) > 25
    assert functions() == {name for name in vars(HostDriver) if re.fullmatch(r"cu[A-Z]\w+", name)}
    assert {name for name in functions() if not callable(getattr(real, name, None))} == set()


@pytest.mark.parametrize("name", sorted(functions()))
def test_the_host_driver_takes_the_same_arguments_as_the_real_one(name: str) -> None:
    assert parameters(vars(HostDriver)[name]) == parameters(getattr(real, name))


def test_every_call_gives_as_many_arguments_as_the_function_takes() -> None:
    calls = [node for node in ast.walk(SOURCE) if isinstance(node, ast.Call) and node.args]
    named = [node for node in calls if isinstance(node.args[0], ast.Constant) and node.args[0].value in functions()]
    given = [(str(node.args[0].value), len(node.args) - 1) for node in named if isinstance(node.args[0], ast.Constant)]
    assert {name for name, _ in given} == functions() - {"cuGetErrorString"}
    assert [(name, len(parameters(getattr(real, name)))) for name, _ in given] == given


def test_enumerations_and_fields_that_are_used_exist() -> None:
    used = {node.attr for node in ast.walk(SOURCE) if isinstance(node, ast.Attribute) and node.attr.startswith("CU")}
    types = {name for name in used if hasattr(real, name)}
    assert types == {name for name in vars(HostDriver) if name.startswith("CU")}
    members = {each for name in types for each in getattr(getattr(real, name), "__members__", {})}
    assert used - types - members == set()
    written = {
        node.attr for node in ast.walk(SOURCE)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wanted"
    }  # fmt: skip
    assert len(written) == 8
    assert written <= set(dir(real.CUDA_MEMCPY2D))


@pytest.mark.skipif(has_driver(), reason="the arguments are made up: a driver would act on them")
def test_the_real_functions_accept_the_arguments_that_are_given() -> None:
    """The bindings convert arguments before they look for the driver, and refuse those of a wrong type."""
    given: dict[str, tuple[Any, ...]] = {}

    class Recording(HostDriver):
        def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                given[name] = arguments
                return guarded(*arguments)

            guarded = super()._guarded(name, function)
            return call

    device = CudaDevice(Recording())
    for verb in VERBS.values():
        verb(device)
    device.close()
    assert given.keys() | {"cuGetErrorString"} == functions()
    for name, arguments in given.items():
        function = getattr(real, name)
        as_real = [
            HANDLES[parameter](1) if parameter in HANDLES else value
            for parameter, value in zip(parameters(function), arguments, strict=True)
        ]
        with pytest.raises(RuntimeError, match="driver"):
            function(*as_real)


# What is refused at the start


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_a_machine_without_a_driver_is_told_to_run_nvidia_smi() -> None:
    with pytest.raises(InputError, match=r"no usable NVIDIA driver on this machine \(.*run nvidia-smi.*--gpus all"):
        open_device()


def test_bindings_that_are_missing_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(InputError, match=r"cuda-bindings can't be loaded .*canvasrt\[rtx\].*canvasrt\[tensorrt\]"):
        open_device()


@pytest.mark.parametrize("function", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"])
def test_a_driver_that_does_not_start_is_told_apart_from_one_that_fails(driver: HostDriver, function: str) -> None:
    driver.faults[function] = real.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(InputError, match=f"CUDA_ERROR_NO_DEVICE in {function}.*: run nvidia-smi"):
        CudaDevice(driver)


@pytest.mark.parametrize(("version", "shown"), [(12990, "12.99"), (12080, "12.8"), (11040, "11.4")])
def test_an_old_driver_is_refused_with_both_versions(version: int, shown: str) -> None:
    with pytest.raises(InputError, match=f"supports CUDA {re.escape(shown)}, and TensorRT here needs 13.0 or newer"):
        CudaDevice(HostDriver(version=version))


@pytest.mark.parametrize(("gpus", "ordinal"), [(0, 0), (1, 1), (2, 5), (2, -1)])
def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(gpus: int, ordinal: int) -> None:
    with pytest.raises(InputError, match=rf"GPU {ordinal} does not exist: CUDA sees {gpus} \(see CUDA_VISIBLE_DEVICES"):
        CudaDevice(HostDriver(gpus=gpus), ordinal)


def test_a_gpu_tells_its_name_capability_version_and_memory() -> None:
    driver = HostDriver(memory=1 << 20, capability=(8, 9), name="NVIDIA L4", version=13010, gpus=2)
    device = CudaDevice(driver, 1)
    assert (device.name, device.compute_capability, device.cuda_version) == ("NVIDIA L4", "8.9", 13010)
    assert device.memory() == (1 << 20, 1 << 20)
    device.allocate(1000)
    assert device.memory() == ((1 << 20) - 1000, 1 << 20)
    assert device.stream == 1 << 20
    assert CudaDevice(HostDriver(name="N" * 500)).name == "N" * 127


# Failures


def captured(device: CudaDevice) -> Any:
    with device.captured() as found:
        pass
    return found[0]


def timed(device: CudaDevice) -> float:
    first, second = device.event(), device.event()
    for event in (first, second):
        device.record(event)
        device.wait(event)
    return device.milliseconds(first, second)


def rows(device: CudaDevice) -> None:
    address = device.allocate(64)
    device.copy_rows(address, address + 32, 8, 2, 16)


# By the function that each calls last
VERBS: dict[str, Verb] = {
    "cuMemGetInfo": lambda device: device.memory(),
    "cuMemAlloc": lambda device: device.allocate(8),
    "cuMemFree": lambda device: device.free(device.allocate(8)),
    "cuMemHostAlloc": lambda device: device.pinned(8),
    "cuMemFreeHost": lambda device: device.unpin(device.pinned(8)),
    "cuMemcpyHtoDAsync": lambda device: device.upload(device.allocate(8), device.pinned(8), 8),
    "cuMemcpyDtoHAsync": lambda device: device.download(device.pinned(8), device.allocate(8), 8),
    "cuMemcpyDtoDAsync": lambda device: device.copy(device.allocate(8), device.allocate(8), 8),
    "cuMemcpy2DAsync": rows,
    "cuMemsetD8Async": lambda device: device.clear(device.allocate(8), 8),
    "cuEventCreate": lambda device: device.event(),
    "cuEventRecord": lambda device: device.record(device.event()),
    "cuEventSynchronize": lambda device: device.wait(device.event()),
    "cuEventElapsedTime": timed,
    "cuStreamSynchronize": lambda device: device.synchronize(),
    "cuStreamBeginCapture": captured,
    "cuStreamEndCapture": captured,
    "cuGraphInstantiate": captured,
    "cuGraphDestroy": captured,
    "cuGraphLaunch": lambda device: device.launch(captured(device)),
    "cuGraphExecDestroy": lambda device: device.drop(captured(device)),
    "cuStreamDestroy": lambda device: CudaDevice(device._cuda).close(),
}
AT_START = {
    "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
    "cuStreamCreate",
}  # fmt: skip


def test_every_function_is_made_to_fail() -> None:
    others = {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuGetErrorString"}
    assert VERBS.keys() | AT_START | others == functions()


@pytest.mark.parametrize("function", VERBS)
def test_a_function_that_fails_is_named_with_its_error(driver: HostDriver, device: CudaDevice, function: str) -> None:
    driver.faults[function] = UNKNOWN
    with pytest.raises(DeviceError, match=f"^CUDA error CUDA_ERROR_UNKNOWN in {function}: a planted fault$"):
        VERBS[function](device)
    assert driver.faults == {}


@pytest.mark.parametrize("function", sorted(AT_START))
def test_a_gpu_that_fails_at_the_start_is_no_mistake_of_the_user(driver: HostDriver, function: str) -> None:
    driver.faults[function] = UNKNOWN
    with pytest.raises(DeviceError, match=f"^CUDA error CUDA_ERROR_UNKNOWN in {function}: "):
        CudaDevice(driver)


def test_an_error_without_an_explanation_is_still_told(driver: HostDriver, device: CudaDevice) -> None:
    driver.faults |= {"cuMemGetInfo": UNKNOWN}
    driver.cuGetErrorString = lambda error: (real.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    with pytest.raises(DeviceError, match=r"^CUDA error CUDA_ERROR_UNKNOWN in cuMemGetInfo$"):
        device.memory()


def test_memory_that_is_not_there_is_no_failure_of_the_gpu(driver: HostDriver, device: CudaDevice) -> None:
    for allocate, function in ((device.allocate, "cuMemAlloc"), (device.pinned, "cuMemHostAlloc")):
        driver.faults[function] = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(OutOfMemoryError, match=r"^12,345 bytes$") as error:
            allocate(12_345)
        assert error.value.nbytes == 12_345
    small = CudaDevice(HostDriver(memory=1000))
    with pytest.raises(OutOfMemoryError):
        small.allocate(1001)
    small.free(small.allocate(1000))
    small.allocate(1000)


def test_a_failure_of_memory_is_told_from_a_lack_of_it(driver: HostDriver, device: CudaDevice) -> None:
    driver.faults["cuStreamSynchronize"] = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY in cuStreamSynchronize"):
        device.synchronize()


def test_every_thread_must_make_the_gpu_its_own(driver: HostDriver, device: CudaDevice) -> None:
    with ThreadPoolExecutor(1) as other:
        with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_CONTEXT in cuMemAlloc"):
            other.submit(device.allocate, 8).result()
        for _ in range(3):
            other.submit(device.use).result()
        address = other.submit(device.allocate, 8).result()
    device.free(address)
    assert driver.calls["cuCtxSetCurrent"] == 2  # once for each of two threads


# Moving bytes


def pinned(device: CudaDevice, values: Any) -> cuda_device.Pinned:
    memory = device.pinned(len(values))
    memory.array[:] = values
    return memory


def content(driver: HostDriver, address: int, nbytes: int) -> list[int]:
    return driver.view(address, nbytes).tolist()


def test_an_upload_takes_the_bytes_from_where_it_starts(driver: HostDriver, device: CudaDevice) -> None:
    source, target = pinned(device, range(20)), device.allocate(10)
    device.upload(target + 2, source, 5, start=7)
    assert content(driver, target, 10) == [0xFF] * 10  # nothing is done until somebody waits
    device.synchronize()
    assert content(driver, target, 10) == [0xFF, 0xFF, 7, 8, 9, 10, 11, 0xFF, 0xFF, 0xFF]


def test_a_download_puts_the_bytes_to_where_it_starts(driver: HostDriver, device: CudaDevice) -> None:
    source, target = device.allocate(10), pinned(device, [1] * 12)
    driver.view(source, 10)[:] = range(20, 30)
    device.download(target, source + 3, 4, start=6)
    assert target.array[6:10].tolist() == [0xFF] * 4
    device.synchronize()
    assert target.array.tolist() == [1] * 6 + [23, 24, 25, 26] + [1] * 2


def test_copies_and_zeros_within_the_gpu(driver: HostDriver, device: CudaDevice) -> None:
    memory = device.allocate(64)
    driver.view(memory, 64)[:] = range(64)
    device.copy(memory + 40, memory + 3, 5)
    device.clear(memory + 50, 4)
    assert content(driver, memory, 64) == list(range(64))
    device.synchronize()
    expected = np.arange(64)
    expected[40:45], expected[50:54] = range(3, 8), 0
    assert content(driver, memory, 64) == expected.tolist()


def test_rows_are_copied_with_their_pitch_and_nothing_between_them(driver: HostDriver, device: CudaDevice) -> None:
    source, target = device.allocate(100), device.allocate(100)
    driver.view(source, 100)[:], driver.view(target, 100)[:] = range(100), 200
    device.copy_rows(target + 5, source + 1, 3, 4, 20)
    device.synchronize()
    expected = np.full(100, 200)
    for row in range(4):
        expected[5 + 20 * row : 8 + 20 * row] = range(1 + 20 * row, 4 + 20 * row)
    assert content(driver, target, 100) == expected.tolist()


def test_pinned_memory_is_the_array_that_is_shown(device: CudaDevice) -> None:
    memory = pinned(device, [1, 2, 3])
    assert memory.array.dtype == np.uint8
    assert ctypes.string_at(memory.address, 3) == b"\1\2\3"


# The order of work


def test_an_event_happens_when_what_was_queued_before_it_is_done(driver: HostDriver, device: CudaDevice) -> None:
    done: list[int] = []
    never, event = device.event(), device.event()
    driver.enqueue(lambda: done.append(1))
    device.record(event)
    driver.enqueue(lambda: done.append(2))
    device.wait(never)
    assert done == []
    device.wait(event)
    assert done == [1]
    device.wait(event)
    device.synchronize()
    assert done == [1, 2]
    assert timed(device) > 0


def test_what_is_captured_is_done_at_every_launch_and_not_before(driver: HostDriver, device: CudaDevice) -> None:
    done: list[int] = []
    with device.captured() as found:
        driver.enqueue(lambda: done.append(1))
        driver.enqueue(lambda: done.append(2))
        assert found == []
    (graph,) = found
    device.synchronize()
    assert done == []
    for times in (1, 2, 3):
        device.launch(graph)
        device.synchronize()
        assert done == [1, 2] * times
    device.drop(graph)
    assert [driver.calls[name] for name in ("cuGraphInstantiate", "cuGraphDestroy", "cuGraphExecDestroy")] == [1] * 3


def test_a_capture_that_fails_is_ended(driver: HostDriver, device: CudaDevice) -> None:
    with pytest.raises(ValueError, match="no engine"), device.captured() as found:
        raise ValueError("no engine")
    assert (found, driver.capturing) == ([], False)
    device.clear(device.allocate(8), 8)


def test_closing_gives_all_memory_back_when_the_work_is_done(driver: HostDriver, device: CudaDevice) -> None:
    kept, gone = [device.allocate(8), device.allocate(16)], device.allocate(32)
    device.unpin(device.pinned(8))
    back = device.pinned(8)
    device.free(gone)
    device.clear(kept[0], 8)
    device.download(back, kept[0], 8)
    assert driver.waiting == 2
    device.close()
    assert (driver.waiting, driver.used, driver._pinned, driver.reason) == (0, 0, {}, "")
    assert driver.calls["cuStreamDestroy"] == 1
