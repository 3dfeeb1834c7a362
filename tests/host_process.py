"""For an engine process of a test: bundles run on the network interpreter, and the GPU fails when told to.

CANVASRT_TEST_FAULT names a file: while it exists, the next wait for the GPU fails as after an illegal access.
"""

import os
from pathlib import Path
from typing import Any

import canvasrt.runtime.open_bundle
from host_bundles import ElsewhereTensorRT, Host
from host_gpu import HostDriver, real

FAULT = "CANVASRT_TEST_FAULT"


class FailingDriver(HostDriver):
    def cuEventSynchronize(self, hEvent: Any) -> Any:
        if FAULT in os.environ and Path(os.environ[FAULT]).exists():
            return (real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        return super().cuEventSynchronize(hEvent)


class HostHardware(canvasrt.runtime.open_bundle.Hardware):
    def __init__(self) -> None:
        host = Host(FailingDriver())
        host.library = ElsewhereTensorRT(host.driver)
        super().__init__(host.hardware.device, host.hardware.library)


def install() -> None:
    """For all of this process."""
    canvasrt.runtime.open_bundle.Hardware = HostHardware
