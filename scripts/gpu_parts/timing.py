"""Time of one thing that is done again and again: by this machine's clock around it, and by the GPU's own.

``ms``: from before the call until the GPU has nothing left to do, so with everything that the CPU does. ``gpu_ms``:
between two CUDA events in the stream; null without a GPU. Both are medians.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol


class Clock(Protocol):
    def wait(self) -> None:
        """Until all queued work is done."""

    def mark(self) -> Any:
        """An event that happens when what is queued now is done."""

    def between(self, first: Any, second: Any) -> float | None:
        """Milliseconds between two events that have happened."""


class NoGpu:
    def wait(self) -> None:
        pass

    def mark(self) -> None:
        return None

    def between(self, first: Any, second: Any) -> None:
        return None


class TorchGpu:
    """torch's current stream."""

    def __init__(self, torch: Any) -> None:
        self._cuda = torch.cuda

    def wait(self) -> None:
        self._cuda.synchronize()

    def mark(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second))


class DriverGpu:
    """The stream of a canvasrt.runtime.cuda_device.CudaDevice."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def wait(self) -> None:
        self._device.synchronize()

    def mark(self) -> Any:
        event = self._device.event()
        self._device.record(event)
        return event

    def between(self, first: Any, second: Any) -> float:
        return float(self._device.milliseconds(first, second))


def torch_clock(torch: Any, device: str) -> Clock:
    return TorchGpu(torch) if device == "cuda" else NoGpu()


def measured(run: Callable[[], object], clock: Clock, steps: int, warmup: int) -> dict[str, float | None]:
    """``ms``, ``gpu_ms``, and the extremes of ``ms`` over ``steps`` calls after ``warmup`` that do not count."""
    for _ in range(warmup):
        run()
    wall: list[float] = []
    device: list[float] = []
    for _ in range(steps):
        clock.wait()
        started = time.perf_counter()
        first = clock.mark()
        run()
        second = clock.mark()
        clock.wait()
        wall.append(1e3 * (time.perf_counter() - started))
        between = clock.between(first, second)
        if between is not None:
            device.append(between)
    return {
        "ms": median(wall),
        "gpu_ms": median(device) if device else None,
        "ms_least": min(wall),
        "ms_most": max(wall),
    }
