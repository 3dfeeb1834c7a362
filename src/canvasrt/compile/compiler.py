"""Hands the engine definition to NVIDIA's compiler: shape ranges, target GPU, progress, log, and the plan as a stream.

The only file that drives a compiler; canvasrt.ops.tensorrt_api imports it. Knows nothing of bundles or profiles.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from types import ModuleType
from typing import Any

from canvasrt.compile.engine import NEXT, MoeShapes, Range, describe, ranges
from canvasrt.compile.scratch import Scratch
from canvasrt.compile.shapes import EngineShapes
from canvasrt.compile.source import ModelSource
from canvasrt.engine_weights import EngineWeight
from canvasrt.errors import CompileError
from canvasrt.ops.tensorrt_api import CompilerName, load_compiler
from canvasrt.ops.tensorrt_graph import EnginePrecision, Graph
from canvasrt.ops.tensorrt_weights import EngineWeights

Sink = Callable[[Any], int]  # takes a piece of the plan, returns how many bytes of it were written
Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all

_NO_GPU = "cudaError 35"  # the compiler's remark about a machine without a GPU, beside each refused call
_KILOBYTE = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One text engine. ``filled``: weights lie in the plan; else they are placeholders."""

    source: ModelSource
    shapes: EngineShapes
    moe: MoeShapes
    compiler: CompilerName
    sm: int  # 120 for compute capability 12.0
    filled: bool
    precision: EnginePrecision = "bf16"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    is_input: bool
    dtype: str  # in the compiler's words: "BF16", "INT32"
    shape: tuple[int, ...]  # -1: varies
    aliases: str | None  # of a K/V output: the input whose memory it is


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is known of a plan after it was written."""

    version: str  # of the compiler
    tensors: tuple[TensorInfo, ...]
    ranges: dict[str, dict[str, Range]]
    weights: tuple[EngineWeight, ...]  # constants of the plan
    inputs: tuple[EngineWeight, ...]  # weights that are inputs, by the input's name
    layers: dict[str, int]  # of the network, by kind
    seconds: float
    peak_ram_bytes: int  # that this process held at once, without pages of files that the system may drop


@dataclass(slots=True)
class BuildLog:
    """What the compiler said, for the bundle's build.log; the last errors are for the user."""

    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, severity: str, message: str) -> None:
        if _NO_GPU in message:
            return
        self.lines.append(f"{severity.lower()}: {message}")
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)


def compile_text(request: Request, sink: Sink, scratch: Scratch, progress: Progress, log: BuildLog) -> Compiled:
    """Writes the plan to ``sink`` piece by piece.

    Raises InputError where the compiler is not installed, CheckpointError for unusable weights, CompileError where it
    refuses the network or finds no GPU that it needs. Ctrl-C ends the build within a step.
    """
    started = time.monotonic()
    trt = load_compiler(request.compiler)
    logger = _logger(trt, log)
    builder = _builder(trt, logger, request, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = Graph(trt, network, request.precision)
    source = request.source
    checkpoint = source.checkpoint
    weights = EngineWeights(graph, source.spec, source.formats, checkpoint, request.filled, scratch.kept)
    inputs = describe(graph, weights, source.spec, request.shapes, request.moe)
    by_range = ranges(source.spec, request.shapes, request.moe)
    config = _config(trt, builder, request, by_range)
    peak = _run(trt, builder, network, config, sink, progress, log)
    return Compiled(
        version=str(trt.__version__),
        tensors=tuple(_tensors(network)),
        ranges=by_range,
        weights=tuple(graph.weights),
        inputs=tuple(inputs),
        layers=dict(Counter(str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers))),
        seconds=time.monotonic() - started,
        peak_ram_bytes=peak,
    )


def _builder(trt: ModuleType, logger: Any, request: Request, log: BuildLog) -> Any:
    try:
        return trt.Builder(logger)
    except Exception as error:  # pybind11 has no narrower type for a failed constructor
        raise CompileError(
            f"{request.compiler} does not start: {_said(log) or error}. It compiles on the GPU that the engine is for: "
            "run this command there, with a driver that is new enough"
        ) from None


def _config(trt: ModuleType, builder: Any, request: Request, by_range: dict[str, dict[str, Range]]) -> Any:
    config = builder.create_builder_config()
    if request.compiler == "tensorrt-rtx":  # compiles for any RTX GPU; TensorRT for the one that it runs on
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request.sm}"), 0)
    if not request.filled:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for shapes in by_range.values():
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in shapes.items():
            profile.set_shape(name, low, typical, high)
        if config.add_optimization_profile(profile) < 0:
            raise CompileError("the compiler refused a shape range: report this, with the bundle's build.log")
    return config


def _run(
    trt: ModuleType, builder: Any, network: Any, config: Any, sink: Sink, progress: Progress, log: BuildLog
) -> int:
    """The build in a thread of its own: this one has to notice Ctrl-C, and C++ would not let it. Peak memory, bytes."""
    cancelled, finished = threading.Event(), threading.Event()
    failure: list[BaseException] = []
    done: list[bool] = []
    monitor = _monitor(trt, progress, cancelled, failure)
    writer = _writer(trt, sink, cancelled)
    config.progress_monitor = monitor

    def build() -> None:
        try:
            done.append(bool(builder.build_serialized_network_to_stream(network, config, writer)))
        except BaseException as error:
            failure.append(error)
        finally:
            finished.set()

    threading.Thread(target=build, name="compiler").start()
    peak = 0
    try:
        while not finished.wait(0.2):  # not join: Python 3.11 takes a thread for ended where Ctrl-C cuts off its join
            peak = max(peak, _memory())
    except BaseException:
        cancelled.set()
        while not finished.is_set():  # it reads our memory to its end, however often Ctrl-C is pressed
            with contextlib.suppress(KeyboardInterrupt):
                finished.wait()
        raise
    if failure:
        raise failure[0]
    if done != [True] and not cancelled.is_set():
        raise CompileError(f"the compiler refused the network: {_said(log) or 'it gave no reason'}")
    return peak


def _memory() -> int:
    """Bytes that this process holds, copies of files left out; where the system does not tell, the most it held."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * _KILOBYTE
    except OSError:
        pass
    return getrusage(RUSAGE_SELF).ru_maxrss * _KILOBYTE


def _said(log: BuildLog) -> str:
    return "; ".join(log.errors[-2:])


def _logger(trt: ModuleType, log: BuildLog) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # the module is a value
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.INFO:
                log.add(severity.name, message)

    return Logger()


def _writer(trt: ModuleType, sink: Sink, cancelled: threading.Event) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]  # the module is a value
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            written = sink(data)
            if written == 0:  # a full disk: what the sink met is raised when its file is closed
                cancelled.set()
            return written

    return Writer()


def _monitor(trt: ModuleType, progress: Progress, cancelled: threading.Event, failure: list[BaseException]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # the module is a value
        """The compiler calls this from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 0))

        def _tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self._steps.get(phase, 0))
            except BaseException as error:  # nothing may be raised into C++
                failure.append(error)
                cancelled.set()

    return Monitor()


def _tensors(network: Any) -> list[TensorInfo]:
    def info(tensor: Any, is_input: bool) -> TensorInfo:
        name = tensor.name
        aliases = name.removesuffix(NEXT) if not is_input and name.startswith(("k.", "v.")) else None
        return TensorInfo(name, is_input, tensor.dtype.name, tuple(tensor.shape), aliases)

    given = [info(network.get_input(index), True) for index in range(network.num_inputs)]
    return given + [info(network.get_output(index), False) for index in range(network.num_outputs)]
