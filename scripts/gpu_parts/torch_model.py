"""TorchRunner at a model's dimensions with random weights: a step by formulation and canvases, its head, prompts."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

import canvasrt.runtime.torch_runner as torch_runner
from canvasrt.compile.source import ModelSource
from canvasrt.network.moe import MoeChoice
from canvasrt.network.names import EMBEDDING
from canvasrt.network.sampler import predict
from canvasrt.network.text import Canvas, TextInputs, _embed
from canvasrt.ops.torch_weights import TorchWeights
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.spec import ModelSpec
from gpu_parts.floors import Floors, mean_seats
from gpu_parts.random_weights import PEAKED
from gpu_parts.record import Options, Record
from gpu_parts.timing import Clock, measured, torch_clock

DTYPE = "bfloat16"
PROMPTS = 3  # runs of a prompt, of which the median counts
HEAD_ROWS = (1, 2, 4, 8)  # canvases


class MadeUp:
    """In place of a checkpoint: only dimensions."""

    quantization = None

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.shapes = spec.tensors()


class RandomWeights(TorchWeights):
    """Reads no files. Sizes are those of a trained model at its start: no number grows from layer to layer."""

    def _load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self._checkpoint.shapes[name]
        numbers = torch.randn(shape, device=self.device, dtype=dtype)
        if name == EMBEDDING:
            return numbers.mul_(PEAKED * shape[-1] ** -0.5)
        if len(shape) > 1:
            return numbers.mul_(shape[-1] ** -0.5)
        numbers.mul_(0.1).add_(1.0)
        # Scores have the scale 1: without this every query would see a single key.
        return numbers.mul_(shape[0] ** -0.5) if name.endswith("q_norm.weight") else numbers


class RandomRunner(TorchRunner):
    weights_type = RandomWeights


def run(options: Options, record: Record) -> None:
    torch_runner.torch_device(options.device)
    spec = ModelSpec.load(options.config)
    floors = Floors.of(options, ModelSource.open(options.config))
    record.note(
        device=options.device,
        numbers=DTYPE,
        parameters=sum(int(np.prod(shape)) for shape in spec.tensors().values()),
        weights="random",
        torch_cuda=torch.version.cuda,
        floor=floors.said,
        fp8="not measured: torch has no FP8 path for the whole model. FP8 products alone are measured by part gemm",
    )
    clock = torch_clock(torch, options.device)
    for turn, name in enumerate(options.formulations):
        try:
            runner = _opened(options, spec, name)
            with torch.inference_mode():
                if turn == 0:
                    _head(options, record, spec, runner, clock)
                _prompts(options, record, spec, floors, runner, name, clock)
                _steps(options, record, spec, floors, runner, name, clock)
        except Exception as error:  # the other formulations are still of use
            record.fail(name, error)
        runner = None
        _free(options, record, name)


def seats_of(options: Options, spec: ModelSpec, formulation: str, tokens: int) -> int:
    """Seats per expert of a call of so many tokens; 0 where the formulation has none."""
    return min(tokens, options.seats_factor * mean_seats(spec, tokens)) if formulation == "capacity" else 0


def computed_seats(options: Options, spec: ModelSpec, formulation: str, tokens: int) -> int | None:
    """Tokens per expert that a call computes, on average; None: all of them."""
    if formulation == "sparse":
        return mean_seats(spec, tokens)
    return seats_of(options, spec, formulation, tokens) or None


def _opened(options: Options, spec: ModelSpec, name: str) -> RandomRunner:
    torch.manual_seed(0)
    context = max(options.context, options.prefill + 1) + spec.canvas_length
    return RandomRunner(
        MadeUp(spec),
        options.device,
        DTYPE,
        slots=max(options.canvases),
        context=context,
        chunk=options.chunk,
        moe=MoeChoice(name, seats_of(options, spec, name, options.chunk)),
    )


def _steps(
    options: Options, record: Record, spec: ModelSpec, floors: Floors, runner: RandomRunner, name: str, clock: Clock
) -> None:
    rng = np.random.default_rng(0)
    for slot in range(max(options.canvases)):
        tokens = rng.integers(0, spec.vocab_size, options.context).astype(np.int32)
        runner.encode([EncodeRow(slot, tokens, 0)])
    rows = [_row(spec, rng, slot) for slot in range(max(options.canvases))]
    for canvases in options.canvases:
        tokens = canvases * spec.canvas_length
        seats = seats_of(options, spec, name, tokens)
        try:
            while _step(options, record, spec, floors, runner, name, clock, rows[:canvases], seats) > 1:
                seats = min(2 * seats, tokens)  # until no pass is repeated
        except torch.OutOfMemoryError as error:
            record.fail(f"{name}, {canvases} canvases, {seats} seats", error)


def _step(
    options: Options, record: Record, spec: ModelSpec, floors: Floors, runner: RandomRunner, name: str, clock: Clock,
    rows: list[DenoiseRow], seats: int,
) -> float:  # fmt: skip
    """Passes of the network by step."""
    runner._moe = MoeChoice(name, seats)
    for _ in range(options.warmup):  # the first ones bring prompts along
        runner.denoise(rows)
    with _networks() as count:
        times = measured(lambda: runner.denoise(rows), clock, options.steps, 0)
        passes = count() / options.steps
    computed = mean_seats(spec, len(rows) * spec.canvas_length) if name == "sparse" else seats or None
    record.row(
        "steps", moe=name, canvases=len(rows), context=options.context, seats=seats or None, **times,
        passes_per_step=passes, **floors.step(len(rows), options.context, computed, times["ms"]),
    )  # fmt: skip
    return passes


def _prompts(
    options: Options, record: Record, spec: ModelSpec, floors: Floors, runner: RandomRunner, name: str, clock: Clock
) -> None:
    """One token more than is counted: the runner encodes only what is behind the last chunk at once."""
    count = options.prefill - options.prefill % options.chunk or options.chunk
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, count + 1).astype(np.int32)

    def encode() -> None:
        runner.release(0)
        runner.encode([EncodeRow(0, tokens, 0)])

    times = measured(encode, clock, PROMPTS, 1)
    ms = times["ms"] or 0.0
    seats = computed_seats(options, spec, name, options.chunk)
    record.row(
        "prompts", moe=name, tokens=count, chunk=options.chunk, **times, tokens_per_second=1e3 * count / ms,
        **floors.prefill(count, options.chunk, seats, ms),
    )  # fmt: skip
    runner.release(0)


def _head(options: Options, record: Record, spec: ModelSpec, runner: RandomRunner, clock: Clock) -> None:
    """LM head, sampler and soft embedding of a step, and the self-conditioning that the next one begins with."""
    ops, device = runner._ops, runner._device
    for canvases in HEAD_ROWS:
        rows = canvases * spec.canvas_length
        hidden = torch.randn(rows, spec.hidden_size, device=device, dtype=runner._dtype)
        temperature, uniforms = torch.full((rows, 1), 0.6, device=device), torch.rand(rows, 1, device=device)
        canvas = Canvas(hidden.view(1, rows, -1), temperature, uniforms, None, None)
        tokens = torch.randint(0, spec.vocab_size, (1, rows), device=device)
        inputs = TextInputs(tokens, {}, None, canvas)
        parts: dict[str, Callable[[], object]] = {
            # As in a step whose logits nobody wants.
            "head, sampler and soft embedding": partial(
                predict, ops, spec, hidden, temperature, uniforms, None, wants_logits=False
            ),
            "LM head alone": partial(ops.linear, hidden, EMBEDDING),
            "embedding and self-conditioning": partial(_embed, ops, spec, inputs, "decoder"),
        }
        for part, call in parts.items():
            try:
                record.row("head", part=part, rows=rows, **measured(call, clock, options.steps, options.warmup))
            except torch.OutOfMemoryError as error:
                record.fail(f"{part}, {rows} rows", error)


def _row(spec: ModelSpec, rng: np.random.Generator, slot: int) -> DenoiseRow:
    canvas = rng.integers(0, spec.vocab_size, spec.canvas_length).astype(np.int32)
    return DenoiseRow(slot, canvas, 0.6, rng.random(spec.canvas_length, dtype=np.float32), first=False)


@contextmanager
def _networks() -> Iterator[Callable[[], int]]:
    """Counts passes through the network: a step with too few seats takes a second one."""
    calls = [0]
    network = torch_runner.text_network

    def counted(*arguments: object) -> object:
        calls[0] += 1
        return network(*arguments)

    with patch.object(torch_runner, "text_network", counted):
        yield lambda: calls[0]


def _free(options: Options, record: Record, name: str) -> None:
    """Each formulation keeps its own form of the experts: two do not fit beside each other."""
    gc.collect()
    if options.device == "cuda":
        record.row("memory", moe=name, peak_bytes=torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
