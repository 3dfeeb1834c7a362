"""From a bundle's folder to a runner: everything that can be wrong is found before memory is taken.

The order is that of what a person can mend: the bundle, the checkpoint, the library, the GPU, its memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

from canvasrt.bundle.manifest import Manifest
from canvasrt.bundle.reader import EngineBundle, Verify
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import BundleError, CapacityError
from canvasrt.ops.tensorrt_api import load_compiler
from canvasrt.runtime.cuda_device import CudaDevice, OutOfMemoryError, open_device
from canvasrt.runtime.engine_memory import EngineMemory, check_memory, engine_memory, shortage, text_engine
from canvasrt.runtime.refit import Progress, Weights, WeightSource, refit, to_device
from canvasrt.runtime.tensorrt_engine import RTX, TensorRTEngine
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.spec import ModelSpec

_NAMES = {RTX: "tensorrt-rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where the GPU and NVIDIA's library come from: elsewhere than by default only in tests."""

    device: Callable[[], CudaDevice] = open_device
    library: Callable[[Manifest], ModuleType] = field(default=lambda manifest: load_compiler(manifest.compiler.name))


@dataclass(frozen=True, slots=True)
class BundleOptions:
    """``checkpoint``: folder, for bundles whose weights are not inside. ``slots``: None for the bundle's own number.

    ``cache``: file that keeps the kernels which TensorRT-RTX compiles on this GPU; None for one beside the bundle.
    ``verify``: "full" reads every byte of the bundle first. ``same_checkpoint``: the checkpoint must be the bundle's
    even where it is not needed.
    """

    checkpoint: Path | None = None
    slots: int | None = None
    cache: Path | None = None
    verify: Verify = "full"
    captures: bool = True
    warms_up: bool = True
    same_checkpoint: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    runner: TensorRTRunner
    engine: TensorRTEngine
    memory: EngineMemory
    kernels: Path

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self.engine.warnings)

    def keep_kernels(self) -> None:
        """Writes down what TensorRT-RTX has compiled so far, so that the next start need not; else warns."""
        _save_cache(self.engine, self.kernels)


def open_bundle(
    folder: Path,
    options: BundleOptions,
    progress: Progress,
    hardware: Hardware | None = None,
    weights: Weights | None = None,
) -> Loaded:
    """``weights``: made up, for a benchmark of a bundle that nothing can fill.

    Raises BundleError for a bundle that is damaged, or not for this GPU, library or checkpoint; CheckpointError for
    unusable weights; InputError without a usable driver; CapacityError where memory is short, with what to change.
    """
    hardware = hardware or Hardware()
    bundle = EngineBundle.open(folder, options.verify)
    manifest = bundle.manifest
    if weights is None:
        bundle.check_servable()
        if options.same_checkpoint and options.checkpoint is not None:
            bundle.check_checkpoint(options.checkpoint)
        weights = WeightSource(bundle, weights_of(bundle, options.checkpoint))
    trt = hardware.library(manifest)
    bundle.check_compiler(_NAMES[trt.__name__], str(trt.__version__))
    device = hardware.device()
    bundle.check_gpu(device.compute_capability, device.name)
    spec, slots = ModelSpec.load(bundle.path), options.slots or manifest.shapes.slots
    needed = engine_memory(manifest, spec, slots)
    check_memory(needed, *device.memory(), device.name)
    try:
        engine, given = _load(bundle, options, weights, trt, device, progress)
        runner = TensorRTRunner(engine, manifest, spec, slots, given)
    except OutOfMemoryError as error:
        free, total = device.memory()
        raise CapacityError(
            f"the GPU had no {error} left while the bundle was loaded. {shortage(needed, free, total, device.name)}"
        ) from None
    runner.captures = options.captures
    if options.warms_up:
        runner.warm_up(lambda done, whole: progress("first steps", done, whole))
    loaded = Loaded(runner, engine, needed, options.cache or cache_file(bundle.path))
    loaded.keep_kernels()
    return loaded


def _load(
    bundle: EngineBundle,
    options: BundleOptions,
    weights: Weights,
    trt: ModuleType,
    device: CudaDevice,
    progress: Progress,
) -> tuple[TensorRTEngine, dict[str, int]]:
    """The engine with its weights, and the addresses of those that are inputs."""
    text = text_engine(bundle.manifest)
    plan = bundle.map(text.file)
    progress("plan", 0, len(plan))
    engine = TensorRTEngine(trt, device, plan, list(text.shape_ranges), f"{bundle.path}/{text.file}")
    progress("plan", len(plan), len(plan))
    _load_cache(engine, options.cache or cache_file(bundle.path))
    given = {entry.name: to_device(device, weights.made(entry), partial(progress, entry.name)) for entry in text.given}
    if text.weight_map:
        refit(engine, text.weight_map, weights, progress)
    return engine, given


def cache_file(bundle: Path) -> Path:
    """Beside the bundle, whose own files never change once it is written."""
    real = Path(os.path.realpath(bundle))
    return real.with_name(f"{real.name}.kernels")


def weights_of(bundle: EngineBundle, folder: Path | None) -> Checkpoint | None:
    """The checkpoint that fills a bundle's weights, where they are not inside. Raises BundleError for a missing or
    another one.
    """
    if not bundle.manifest.needs_checkpoint:
        return None
    if folder is None:
        wanted = bundle.manifest.checkpoint.folder
        raise BundleError(
            f"bundle {bundle.path} holds no weights: they are read from the checkpoint that it was built from "
            f"({wanted}). Name its folder (canvasrt serve: --set checkpoint=FOLDER; canvasrt generate and verify: "
            "--checkpoint FOLDER), or build the bundle with --weights inside"
        )
    bundle.check_checkpoint(folder)
    return Checkpoint.open(folder)


def _load_cache(engine: TensorRTEngine, file: Path) -> None:
    """An unusable cache only costs time: the library compiles again."""
    try:
        content = file.read_bytes()
    except OSError:
        return
    if content and not engine.load_cache(content):
        engine.warnings.append(f"{file} was made by another GPU, driver or library: kernels are compiled again")


def _save_cache(engine: TensorRTEngine, file: Path) -> None:
    content = engine.cache()
    if content is None:
        return
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)  # whole or not at all: another process may be reading it
    except OSError as error:
        engine.warnings.append(
            f"compiled kernels can't be kept in {file} ({error.strerror}), so that the next start compiles them again"
        )
