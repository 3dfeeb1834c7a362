"""Bundles as ``canvasrt build`` writes them, whose engines run on this machine's CPU, and runners over them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from canvasrt.compile.buildplan import BuildPlan
from canvasrt.compile.job import build, prepare
from canvasrt.ops.tensorrt_graph import EnginePrecision
from canvasrt.profiles.profile import Moe
from canvasrt.runtime.cuda_device import CudaDevice
from canvasrt.runtime.open_bundle import BundleOptions, Hardware, Loaded, open_bundle
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from host_gpu import HostDriver
from host_tensorrt import PLANS, Described, HostTensorRT, compiling

DENSE = Moe(formulation="dense")


def capacity(encoder: int, decoder: int) -> Moe:
    """Tokens per expert that a call of either shape range begins with."""
    return Moe(formulation="capacity", encoder_capacity=encoder, decoder_capacity=decoder)


def quiet(phase: str, done: int, whole: int) -> None:
    pass


def host_bundle(
    folder: Path,
    checkpoint: Path,
    *,
    precision: EnginePrecision = "fp32",
    profile: str = "rtx-5090",
    **options: Any,
) -> Path:
    """``options`` of the build plan. In float32 results can be compared token by token."""
    plan = BuildPlan(checkpoint=str(checkpoint), profile=profile, out=str(folder), **{"moe": DENSE, **options})
    with compiling(precision, json.dumps([precision, plan.model_dump(mode="json")])):
        return build(prepare(plan), quiet).path


class ElsewhereTensorRT(HostTensorRT):
    """Of a process that has not built the bundle: it describes the network again."""

    def described(self, plan: bytes) -> Described | None:
        precision, recipe = json.loads(plan.partition(b"\n")[0])
        with TemporaryDirectory() as folder, compiling(precision):
            build(prepare(BuildPlan.model_validate({**recipe, "out": f"{folder}/bundle"}, strict=False)), quiet)
        return list(PLANS.values())[-1]


@dataclass
class Host:
    """A machine with a GPU, as far as the runtime sees."""

    driver: HostDriver = field(default_factory=HostDriver)
    refits: str = "together"

    def __post_init__(self) -> None:
        self.library = HostTensorRT(self.driver, self.refits)

    @property
    def hardware(self) -> Hardware:
        return Hardware(device=lambda: CudaDevice(self.driver), library=lambda manifest: self.library)

    def load(self, bundle: Path, **options: Any) -> Loaded:
        """Without the first steps that a server takes, unless asked for."""
        return open_bundle(bundle, BundleOptions(**{"warms_up": False, **options}), quiet, self.hardware)

    def open(self, bundle: Path, key_step: int = 1, token_step: int = 1, **options: Any) -> TensorRTRunner:
        """With sizes rounded up to ``key_step`` and ``token_step``: the runtime's would hide most of them here."""
        runner = self.load(bundle, **options).runner
        runner._builder._key_step, runner._builder._token_step = key_step, token_step
        return runner
