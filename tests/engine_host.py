"""Engines of small checkpoints, compiled for the machine in memory that host_bundles.py has, and their runners."""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

import canvasrt.network.sampler
import canvasrt.runtime.tensorrt_runner
from canvasrt.compile.job import ENGINE
from canvasrt.ops.tensorrt_graph import EnginePrecision
from canvasrt.profiles.profile import Moe
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from host_bundles import DENSE, Host, host_bundle
from host_tensorrt import PLANS

_NUMBERS = itertools.count()


class QuietLogger(trt.ILogger):
    """Keeps what TensorRT says: the interpreter asks slices for sizes that are known at run time only."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity <= trt.ILogger.WARNING:
            self.lines.append(msg)


LOGGER = QuietLogger()  # TensorRT keeps the logger of the first builder of a process


@contextlib.contextmanager
def short_search(halvings: int) -> Iterator[None]:
    """Networks described meanwhile search top-k and top-p in fewer steps: those are a third of a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvasrt.network.sampler, "BISECTIONS", halvings)
        yield


@contextlib.contextmanager
def exact_seats() -> Iterator[None]:
    """Calls repeated meanwhile get the seats that were missing and no more: small models would always get all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvasrt.runtime.tensorrt_runner, "_SEAT_STEP", 1)
        yield


class HostPlan:
    """A checkpoint's engine, compiled once into a bundle beside it; a call may run all slots' canvases."""

    def __init__(
        self,
        checkpoint: Path,
        precision: EnginePrecision = "fp32",
        moe: Moe = DENSE,
        slots: int = 1,
        context: int = 96,
        chunk: int = 16,
    ) -> None:
        folder = checkpoint.with_name(f"{checkpoint.name}-{next(_NUMBERS)}.bundle")
        sizes = {"slots": slots, "canvases": slots, "context": context, "chunk": chunk}
        self.bundle = host_bundle(folder, checkpoint, precision=precision, moe=moe, **sizes)
        plan = (self.bundle / ENGINE).read_bytes()
        self.network: Any = PLANS[plan].network
        weakref.finalize(self, PLANS.pop, plan, None)  # they are many

    def open(self, host: Host | None = None, key_step: int = 1) -> TensorRTRunner:
        """A runner with memory of its own, on ``host`` or on a machine of its own."""
        return (host or Host()).open(self.bundle, key_step=key_step, verify="sizes")


def stored(runner: TensorRTRunner, layer: int, slot: int) -> list[np.ndarray]:
    """K and V of a float32 engine, (tokens, kv_heads, head_dim)."""
    return [each.view(np.float32).transpose(1, 0, 2) for each in runner.stored(layer, slot)]
