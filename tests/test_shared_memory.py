"""Memory that CPU and GPU share, as on a DGX Spark: what is free of it."""

from pathlib import Path

import pytest

from canvasrt.runtime.cuda_device import CudaDevice
from host_gpu import HostDriver


@pytest.mark.parametrize(
    ("integrated", "available_kib", "free"),
    [
        (True, 800, 800 * 1024),
        (True, 100, 300_000),
        (True, 9_999, 1_000_000),
        (True, None, 300_000),
        (False, 800, 300_000),
    ],
)
def test_memory_that_linux_would_free_is_free_where_cpu_and_gpu_share_it(
    tmp_path: Path, integrated: bool, available_kib: int | None, free: int
) -> None:
    driver = HostDriver(memory=1_000_000)
    driver.integrated = integrated
    meminfo = tmp_path / "meminfo"
    if available_kib is not None:
        meminfo.write_text(f"MemTotal:       9999 kB\nMemAvailable:   {available_kib} kB\n")
    device = CudaDevice(driver, meminfo=meminfo)
    device.allocate(700_000)  # as CUDA counts cached files
    assert device.memory() == (free, 1_000_000)
