"""An engine bundle on this GPU: load, first step, steps by canvases, context and CUDA graphs, prompts, bytes on PCIe.

The bundle is built from a config.json alone and gets random weights, or is one that the user has.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from canvasrt.bundle.manifest import Manifest
from canvasrt.bundle.reader import EngineBundle
from canvasrt.compile.choices import chosen_source
from canvasrt.compile.source import ModelSource
from canvasrt.errors import CanvasRTError, DeviceError
from canvasrt.profiles.profile import GpuProfile
from canvasrt.runtime.engine_memory import text_engine
from canvasrt.runtime.open_bundle import BundleOptions, Hardware, Loaded, cache_file, open_bundle
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.spec import ModelSpec
from gpu_parts.floors import Floors, gpu_profile
from gpu_parts.random_weights import RandomSource
from gpu_parts.record import Options, PartError, Record
from gpu_parts.small import check_compiler, facts
from gpu_parts.timing import Clock, DriverGpu, measured
from gpu_parts.verify import canvasrt

PROMPTS = 3  # runs of a prompt, of which the median counts
LEAST_WARMUP = 4  # a step is captured the third time that it runs


class Phases:
    """Listens to a load: when each of its parts was spoken of first and last."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._started = time.perf_counter()

    def __call__(self, phase: str, done: int, whole: int) -> None:
        if not self._last:
            self._started = time.perf_counter()
        self._last[phase] = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """``ready_s``: what else there is, K/V memory and execution contexts above all."""
        now = time.perf_counter()
        plan = self._last.get("plan", self._started)
        given = [last for phase, last in self._last.items() if phase not in ("plan", "weights", "first steps")]
        inputs = max([plan, *given])
        filled = self._last.get("weights", inputs)
        return {
            "deserialize_s": plan - self._started,
            "inputs_s": inputs - plan,
            "refit_s": filled - inputs,
            "ready_s": now - filled,
            "load_s": now - self._started,
        }


def run(options: Options, record: Record, hardware: Hardware | None = None) -> None:
    hardware = hardware or Hardware()
    device = hardware.device()  # first: without a GPU nothing need be built
    hardware = Hardware(device=lambda: device, library=hardware.library)
    folder = options.bundle or built(options, record)
    bundle = EngineBundle.open(folder, "sizes")
    manifest = bundle.manifest
    record.note(
        bundle=facts(folder),
        weights="random" if manifest.weights == "none" else "the bundle's",
        shapes=manifest.shapes.model_dump(),
        moe=manifest.moe.model_dump(),
        quantization=manifest.checkpoint.quantization,
        plan_bytes=manifest.nbytes(text_engine(manifest).file),
        kernel_cache_bytes=_size(cache_file(folder)),
    )
    loaded = load(options, record, bundle, hardware)
    runner, spec = loaded.runner, ModelSpec.load(folder)
    record.note(planned_bytes=dict(loaded.memory.items()), gpu_memory=list(runner.device.memory()))
    floors = floors_of(options, bundle)
    record.note(floor=floors.said)
    clock = DriverGpu(runner.device)
    first_steps(record, spec, runner)
    prompts(options, record, manifest, spec, floors, runner, clock)
    steps(options, record, manifest, spec, floors, runner, clock)
    loaded.keep_kernels()
    record.note(
        warnings=list(loaded.warnings), graphs_work=runner.captures, kernel_cache_bytes_after=_size(cache_file(folder))
    )


def built(options: Options, record: Record) -> Path:
    """``canvasrt build`` of the config.json for this GPU. Raises PartError with what it said."""
    profile = gpu_profile(options)
    check_compiler(profile)
    out = options.folder / "bundle"
    arguments = ["--checkpoint", str(options.config), "--profile", options.profile or profile.name, "--out", str(out)]
    started = time.perf_counter()
    code, output, said = canvasrt("build", *arguments, "--weights", "stripped", "--json", *options.build)
    record.note(build_s=time.perf_counter() - started, build_options=list(options.build))
    if code != 0:
        raise PartError(f"canvasrt build failed with exit code {code}: {said.strip() or output.strip()}")
    return out


def load(options: Options, record: Record, bundle: EngineBundle, hardware: Hardware) -> Loaded:
    """With random weights where nothing else can fill the bundle. Raises as open_bundle."""
    phases, source = Phases(), None
    if bundle.manifest.weights == "none":
        engine = text_engine(bundle.manifest)
        source = RandomSource((*engine.weight_map, *engine.given))
    opened = BundleOptions(checkpoint=options.checkpoint, verify="sizes", warms_up=False)
    loaded = open_bundle(bundle.path, opened, phases, hardware, source)
    record.note(**phases.seconds(), **({} if source is None else {"random_weights_s": source.seconds}))
    return loaded


def floors_of(options: Options, bundle: EngineBundle) -> Floors:
    """By the profile that the bundle was built for, in the formats of its weights."""
    manifest = bundle.manifest
    profile = GpuProfile.model_validate(manifest.profile)
    try:
        if options.checkpoint is not None:
            return Floors(ModelSource.open(options.checkpoint), profile)
        if manifest.weights == "none":
            recipe: Any = manifest.plan["recipe"]
            return Floors(chosen_source(bundle.path, profile, recipe)[0], profile)
    except CanvasRTError as error:
        return Floors(None, None, f"no floor: {error}")
    return Floors(None, None, "no floor: give --checkpoint, which tells the formats of the weights")


def first_steps(record: Record, spec: ModelSpec, runner: TensorRTRunner) -> None:
    """What the first request waits for: TensorRT-RTX compiles kernels now, unless its cache has them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, spec.vocab_size, spec.canvas_length + 1).astype(np.int32)
    started = time.perf_counter()
    runner.encode([EncodeRow(0, tokens[: min(len(tokens), runner.limits.chunk)], 0)])
    runner.synchronize()
    encoded = time.perf_counter()
    results = runner.denoise([_row(spec, rng, 0)])
    stepped = time.perf_counter()
    record.note(first_prompt_ms=1e3 * (encoded - started), first_step_ms=1e3 * (stepped - encoded))
    if not np.isfinite(results[0].entropy).all():
        record.fail("first step", "the engine computes NaN")
    runner.release(0)


def prompts(
    options: Options, record: Record, manifest: Manifest, spec: ModelSpec, floors: Floors, runner: TensorRTRunner,
    clock: Clock,
) -> None:  # fmt: skip
    chunk = manifest.shapes.chunk
    count = min(options.prefill, manifest.shapes.context - spec.canvas_length)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, count).astype(np.int32)

    def encode() -> None:
        runner.release(0)
        runner.encode([EncodeRow(0, tokens, 0)])

    times = measured(encode, clock, PROMPTS, 2)
    ms = times["ms"] or 0.0
    record.row(
        "prompts", tokens=count, chunk=chunk, **times, tokens_per_second=1e3 * count / ms,
        **floors.prefill(count, chunk, manifest.moe.encoder_capacity, ms),
    )  # fmt: skip
    runner.release(0)


def steps(
    options: Options, record: Record, manifest: Manifest, spec: ModelSpec, floors: Floors, runner: TensorRTRunner,
    clock: Clock,
) -> None:  # fmt: skip
    """Contexts from short to long, each slot's extended by what is missing."""
    rng = np.random.default_rng(2)
    most, largest = manifest.shapes.canvases, manifest.shapes.context - spec.canvas_length
    captures = runner.captures
    for context in sorted({min(each, largest) for each in (*options.contexts, largest)}):
        for slot in range(most):
            missing = rng.integers(0, spec.vocab_size, context - runner.length(slot)).astype(np.int32)
            if len(missing):
                runner.encode([EncodeRow(slot, missing, runner.length(slot))])
        rows = [_row(spec, rng, slot) for slot in range(most)]
        for canvases in range(1, most + 1):
            for graphs in (True, False) if captures else (False,):
                runner.captures = graphs
                try:
                    step(options, record, manifest, floors, runner, clock, rows[:canvases], context, graphs)
                except DeviceError:
                    raise  # CUDA refuses all that follows
                except CanvasRTError as error:
                    record.fail(f"{canvases} canvases, context {context}", error)
        runner.captures = captures
    for slot in range(most):
        runner.release(slot)


def step(
    options: Options, record: Record, manifest: Manifest, floors: Floors, runner: TensorRTRunner, clock: Clock,
    rows: list[DenoiseRow], context: int, graphs: bool,
) -> None:  # fmt: skip
    warmup = max(options.warmup, LEAST_WARMUP)
    for _ in range(warmup):
        runner.denoise(rows)
    before = (runner.bytes_sent(), runner.bytes_received(), runner.calls, runner.launches)
    times = measured(lambda: runner.denoise(rows), clock, options.steps, 0)
    after = (runner.bytes_sent(), runner.bytes_received(), runner.calls, runner.launches)
    sent, received, calls, launches = ((b - a) / options.steps for a, b in zip(before, after, strict=True))
    record.row(
        "steps", canvases=len(rows), context=context, graphs=graphs, **times, calls_per_step=calls,
        graph_launches_per_step=launches, bytes_sent=sent, bytes_received=received,
        **floors.step(len(rows), context, manifest.moe.decoder_capacity, times["ms"]),
    )  # fmt: skip


def _row(spec: ModelSpec, rng: np.random.Generator, slot: int) -> DenoiseRow:
    canvas = rng.integers(0, spec.vocab_size, spec.canvas_length).astype(np.int32)
    return DenoiseRow(slot, canvas, 0.6, rng.random(spec.canvas_length, dtype=np.float32), first=False)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
