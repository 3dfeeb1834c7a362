"""How fast a GPU could be at most: bytes and FLOPs of one call, part by part, against its bandwidth and its rates.

Three times, each with its meaning: ``floor`` (memory and arithmetic overlap perfectly: nothing is faster),
``in_sequence`` (the parts run one after the other, each at its own bound), ``unfused`` (and every large intermediate
goes through memory). None is a measurement. Formulas and sources: docs/planning.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from canvasrt.compile.sizes import BF16, FLOAT32, sizes
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import GB, kv_per_token
from canvasrt.errors import InputError
from canvasrt.formats import Format
from canvasrt.profiles.profile import GpuProfile
from canvasrt.spec import ModelSpec

Number = Literal["bf16", "fp8", "fp4"]  # what the tensor cores multiply

TFLOP = 10**12
_MULTIPLY_ADD = 2
_READ_AND_WRITE = 2


@dataclass(frozen=True, slots=True)
class Experts:
    """How a call computes the expert layer: ``seats`` tokens per expert; None is dense, every expert on every token."""

    seats: int | None

    @property
    def name(self) -> str:
        return "dense" if self.seats is None else f"capacity {self.seats}"


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of work in a call, over all layers."""

    name: str
    nbytes: int  # read from memory: every weight, key and value once
    flops: int
    number: Number


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call reads and computes."""

    tokens: int
    parts: tuple[Part, ...]
    intermediate_bytes: int  # written and read again where kernels are not fused and caches do not hold them

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    def flops_by_number(self) -> dict[Number, int]:
        found: dict[Number, int] = {}
        for part in self.parts:
            found[part.number] = found.get(part.number, 0) + part.flops
        return found


@dataclass(frozen=True, slots=True)
class Call:
    """``rows`` sequences of ``tokens`` tokens, each with ``active`` committed tokens before it."""

    rows: int
    tokens: int
    active: int
    experts: Experts
    denoises: bool  # with LM head and sampler


@dataclass(frozen=True, slots=True)
class Rates:
    """Of one GPU."""

    bytes_per_second: float
    flops_per_second: Mapping[Number, float]

    @classmethod
    def of(cls, profile: GpuProfile) -> "Rates":
        """Numbers that the GPU has no tensor cores for are multiplied in BF16.

        Raises InputError for a profile that does not state bandwidth and rates.
        """
        facts = profile.facts
        if facts.bandwidth_gb_s is None or facts.tflops is None:
            raise InputError(f"profile {profile.name} states no bandwidth_gb_s or no tflops: add the facts")
        rate = facts.tflops.value
        numbers: dict[Number, float] = {"bf16": rate.bf16, "fp8": rate.fp8 or rate.bf16, "fp4": rate.fp4 or rate.bf16}
        return cls(facts.bandwidth_gb_s.value * GB, {number: tflops * TFLOP for number, tflops in numbers.items()})

    def memory_seconds(self, cost: Cost) -> float:
        return cost.nbytes / self.bytes_per_second

    def compute_seconds(self, cost: Cost) -> float:
        return sum(flops / self.flops_per_second[number] for number, flops in cost.flops_by_number().items())

    def floor(self, cost: Cost) -> float:
        """Seconds that no implementation of these parts is below."""
        return max(self.memory_seconds(cost), self.compute_seconds(cost))

    def part_seconds(self, part: Part) -> float:
        return max(part.nbytes / self.bytes_per_second, part.flops / self.flops_per_second[part.number])

    def in_sequence(self, cost: Cost) -> float:
        return sum(self.part_seconds(part) for part in cost.parts)

    def unfused(self, cost: Cost) -> float:
        return self.in_sequence(cost) + cost.intermediate_bytes / self.bytes_per_second

    def bound(self, cost: Cost) -> str:
        """The part that takes longest, and what of the GPU it waits for: "experts: memory", "K/V: arithmetic"."""
        part = max(cost.parts, key=self.part_seconds)
        reading = part.nbytes / self.bytes_per_second
        return f"{part.name}: {'memory' if reading >= self.part_seconds(part) else 'arithmetic'}"


def call_cost(source: ModelSource, call: Call) -> Cost:
    """Of one call of the engine."""
    spec, tokens = source.spec, call.rows * call.tokens
    seats = tokens if call.experts.seats is None else min(call.experts.seats, tokens)
    parts = []
    for (name, form), size in sizes(source).items():
        if name == "embedding":
            continue
        times = seats if name == "experts" else tokens
        parts.append(Part(name, size.nbytes, _MULTIPLY_ADD * size.elements * times, computed_in(form)))
    parts.append(_attention_part(spec, call))
    if call.denoises:
        parts += _vocabulary_parts(spec, tokens)
    return Cost(tokens, tuple(parts), _intermediates(spec, call, seats))


def denoising_step(source: ModelSource, canvases: int, active: int, experts: Experts) -> Cost:
    return call_cost(source, Call(canvases, source.spec.canvas_length, active, experts, True))


def committing_pass(source: ModelSource, canvases: int, active: int, experts: Experts) -> Cost:
    """Encodes finished canvases: one such pass for each."""
    return call_cost(source, Call(canvases, source.spec.canvas_length, active, experts, False))


def prefill_call(source: ModelSource, chunk: int, active: int, experts: Experts) -> Cost:
    return call_cost(source, Call(1, chunk, active, experts, False))


def tokens_per_second(
    canvas: int, canvases: int, tokens_per_forward: float, step_seconds: float, commit_seconds: float
) -> tuple[float, float]:
    """Of all canvases together: canvases * tokens_per_forward / step, and with the pass that commits every canvas.

    ``tokens_per_forward`` is that of a request: its tokens by its denoising steps, so a canvas at most.
    """
    per_step = min(tokens_per_forward, canvas)
    steps = canvas / per_step
    return (
        canvases * per_step / step_seconds,
        canvases * canvas / (steps * step_seconds + commit_seconds),
    )


def computed_in(form: Format) -> Number:
    """Weights whose activations are not quantized are unpacked and multiplied in BF16."""
    if form.activations == "none":
        return "bf16"
    return "fp4" if form.weights == "nvfp4" else "fp8"


def _attention_part(spec: ModelSpec, call: Call) -> Part:
    """Committed keys and values are read once; scores and mixing are computed over them and the call's own tokens."""
    window = min(call.active, spec.sliding_window - 1)
    nbytes = call.active * kv_per_token(spec, "full") + window * kv_per_token(spec, "sliding")
    flops = 0
    for layer in spec.layers:
        keys = (call.active if layer.kind == "full" else window) + call.tokens
        flops += 2 * _MULTIPLY_ADD * spec.heads * call.tokens * keys * layer.head_dim
    return Part("K/V", call.rows * nbytes, call.rows * flops, "bf16")


def _vocabulary_parts(spec: ModelSpec, tokens: int) -> list[Part]:
    """The embedding is read as LM head, and again to mix the next step's soft embeddings."""
    embedding = spec.vocab_size * spec.hidden_size
    logits = tokens * spec.vocab_size * (FLOAT32 + BF16)  # and the probabilities
    return [
        Part("embedding", 2 * embedding * BF16, 2 * _MULTIPLY_ADD * embedding * tokens, "bf16"),
        Part("logits", logits, 0, "bf16"),
    ]


def _intermediates(spec: ModelSpec, call: Call, seats: int) -> int:
    """Scores and K/V copies of full layers, the tensors of the experts, and the logits' way to memory."""
    tokens = call.rows * call.tokens
    total = 0
    for layer in spec.layers:
        if layer.kind == "full":
            keys = call.active + call.tokens
            total += spec.heads * tokens * keys * 2 * BF16  # scores and probabilities
            total += call.rows * keys * 2 * layer.kv_heads * layer.head_dim * BF16
    gate_up_and_hidden = 3 * spec.expert_size
    moved = 0 if call.experts.seats is None else 2 * spec.hidden_size  # gathered, and out
    total += len(spec.layers) * spec.experts * seats * (gate_up_and_hidden + moved) * BF16
    total *= _READ_AND_WRITE
    if call.denoises:
        total += tokens * spec.vocab_size * (FLOAT32 + BF16)  # written; reading them is a part already
    return total
