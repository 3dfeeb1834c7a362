"""Speeds that a profile could reach with a model at most: the rows of `canvasrt plan`'s tables.

Knows which calls are worth a row; what they cost is in canvasrt.compile.roofline.
"""

from dataclasses import dataclass

from canvasrt.compile.roofline import (
    Cost,
    Experts,
    Part,
    Rates,
    committing_pass,
    denoising_step,
    prefill_call,
    tokens_per_second,
)
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Setting
from canvasrt.profiles.profile import GpuProfile
from canvasrt.spec import ModelSpec

TOKENS_PER_FORWARD = (15, 20)  # what was published for the 26B
ACTIVE = (1024, 4096)  # committed tokens, and as many as the context has room for
_HEADROOM = 4  # seats per expert of the formulation that a profile does not choose, in tokens it gets on average
_SEATS_STEP = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, all other things ideal."""

    tokens_per_forward: int
    per_request: float  # without committing
    total: float  # of all canvases, without committing
    total_with_commit: float


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step of ``canvases`` canvases with ``active`` committed tokens each."""

    active: int
    canvases: int
    experts: str
    chosen: bool  # whether the profile computes the experts so
    parts: tuple[Part, ...]
    read_bytes: int
    flops: int
    intermediate_bytes: int
    floor_ms: float
    in_sequence_ms: float
    unfused_ms: float
    bound: str
    commit_ms: float  # one pass that encodes the finished canvases, in sequence
    speeds: tuple[Speed, ...]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One encoder call of a whole chunk with ``active`` tokens before it."""

    active: int
    chunk: int
    experts: str
    read_bytes: int
    flops: int
    floor_ms: float
    in_sequence_ms: float
    bound: str
    tokens_per_second: float


def forecast_steps(source: ModelSource, profile: GpuProfile, setting: Setting) -> list[Step]:
    """Raises InputError for a profile that states no bandwidth or rates."""
    rates = Rates.of(profile)
    rows = []
    for active in _contexts(source.spec, setting):
        for canvases in sorted({1, setting.canvases}):
            for experts, chosen in _formulations(source.spec, profile, canvases):
                rows.append(_step(source, profile, rates, active, canvases, experts, chosen))
    return rows


def forecast_prefill(source: ModelSource, profile: GpuProfile, setting: Setting) -> list[Prefill]:
    """Of the first chunk and of the last one that the context has room for."""
    rates = Rates.of(profile)
    experts = Experts(profile.choices.moe.value.encoder_capacity)
    rows = []
    for active in sorted({0, max(setting.context - source.spec.canvas_length - setting.chunk, 0)}):
        cost = prefill_call(source, setting.chunk, active, experts)
        seconds = rates.in_sequence(cost)
        rows.append(
            Prefill(
                active=active,
                chunk=setting.chunk,
                experts=experts.name,
                read_bytes=cost.nbytes,
                flops=cost.flops,
                floor_ms=_ms(rates.floor(cost)),
                in_sequence_ms=_ms(seconds),
                bound=rates.bound(cost),
                tokens_per_second=round(setting.chunk / seconds, 1),
            )
        )
    return rows


def _step(
    source: ModelSource,
    profile: GpuProfile,
    rates: Rates,
    active: int,
    canvases: int,
    experts: Experts,
    chosen: bool,
) -> Step:
    cost = denoising_step(source, canvases, active, experts)
    commit = rates.in_sequence(committing_pass(source, canvases, active, experts))
    return Step(
        active=active,
        canvases=canvases,
        experts=experts.name,
        chosen=chosen,
        parts=cost.parts,
        read_bytes=cost.nbytes,
        flops=cost.flops,
        intermediate_bytes=cost.intermediate_bytes,
        floor_ms=_ms(rates.floor(cost)),
        in_sequence_ms=_ms(rates.in_sequence(cost)),
        unfused_ms=_ms(rates.unfused(cost)),
        bound=rates.bound(cost),
        commit_ms=_ms(commit),
        speeds=tuple(_speed(source.spec, rates, cost, canvases, commit, each) for each in TOKENS_PER_FORWARD),
    )


def _speed(
    spec: ModelSpec, rates: Rates, cost: Cost, canvases: int, commit_seconds: float, tokens_per_forward: int
) -> Speed:
    total, with_commit = tokens_per_second(
        spec.canvas_length, canvases, tokens_per_forward, rates.in_sequence(cost), commit_seconds
    )
    return Speed(tokens_per_forward, round(total / canvases, 1), round(total, 1), round(with_commit, 1))


def _contexts(spec: ModelSpec, setting: Setting) -> list[int]:
    most = setting.context - spec.canvas_length
    return sorted({each for each in ACTIVE if each < most} | {most})


def _formulations(spec: ModelSpec, profile: GpuProfile, canvases: int) -> list[tuple[Experts, bool]]:
    """What the profile chooses, then the other one, to compare."""
    seats = profile.choices.moe.value.decoder_capacity
    if seats is not None:
        return [(Experts(min(seats, canvases * spec.canvas_length)), True), (Experts(None), False)]
    tokens = canvases * spec.canvas_length
    average = tokens * spec.experts_per_token / spec.experts
    roomy = -(-int(_HEADROOM * average) // _SEATS_STEP) * _SEATS_STEP
    return [(Experts(None), True), (Experts(min(max(roomy, 1), tokens)), False)]


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
