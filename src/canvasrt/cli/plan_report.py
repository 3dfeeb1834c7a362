"""What ``canvasrt plan`` answers, as tables and as JSON."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from canvasrt.compile.budget import advice, gigabytes, nearest
from canvasrt.compile.choices import Reason
from canvasrt.compile.forecast import Prefill, Step
from canvasrt.compile.roofline import TFLOP
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import GB, Activations, Deployment, Setting, VramBudget
from canvasrt.profiles.profile import GpuProfile
from canvasrt.runtime.memory import MemoryBudget
from canvasrt.spec import ModelSpec

WIDTH = 120  # where the output is no terminal
TORCH = (
    "The {name} profile compiles nothing: the torch runtime (canvasrt generate) takes whatever memory the machine has, "
    "and refuses at its start what does not fit. In float32, for the slots, context and chunk above:"
)


@dataclass(frozen=True, slots=True)
class Plan:
    source: ModelSource
    profile: GpuProfile
    reasons: tuple[Reason, ...]
    setting: Setting
    budget: VramBudget
    memory_bytes: int
    fits: bool
    largest: dict[str, int | None]  # of each setting, with the others as they are
    steps: tuple[Step, ...]
    prefill: tuple[Prefill, ...]


def print_plan(made: Plan) -> None:
    console = _console()
    facts, spec = made.profile.facts, made.source.spec
    console.print(f"{made.source.folder}: {_model(spec)}", soft_wrap=True, highlight=False)
    speed = "" if facts.bandwidth_gb_s is None else f", {facts.bandwidth_gb_s.value:,.0f} GB/s"
    shared = ", shared with the CPU" if facts.memory_is_shared else ""
    console.print(
        f"{made.profile.title} ({made.profile.name}): {gigabytes(made.memory_bytes)} GB{shared}{speed}",
        soft_wrap=True,
        highlight=False,
    )
    settings = _table("setting", "value", "why", texts=("setting", "value", "why"))
    for reason in made.reasons:
        settings.add_row(reason.what, reason.value, reason.reason)
    console.print(settings)
    console.print(_budget(made))
    if not made.fits:
        return
    console.print(_largest(made))
    for note, table in (_steps(made.steps), _speeds(made.steps), _prefill(made.prefill)):
        console.print(table)
        console.print(note, highlight=False)


def print_torch_plan(profile: GpuProfile, setting: Setting, needed: MemoryBudget) -> None:
    console = _console()
    console.print(f"slots {setting.slots}, context {setting.context}, chunk {setting.chunk}", highlight=False)
    console.print(TORCH.format(name=profile.name), highlight=False)
    table = _table("memory", "GB", texts=("memory",))
    rows = {
        "weights": needed.weight_bytes,
        "K/V of full layers": needed.full_kv_bytes,
        "K/V of sliding layers": needed.sliding_kv_bytes,
        "denoising": needed.soft_bytes + needed.sampler_bytes,
        "total": needed.total_bytes,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / GB:.3f}")
    console.print(table)


def plan_as_json(made: Plan) -> dict[str, Any]:
    spec, source, budget = made.source.spec, made.source, made.budget
    on = Deployment.of(source, made.profile)
    near = None if made.fits else nearest(on, made.setting)
    return {
        "checkpoint": str(source.folder),
        "weights": weights_of(source),
        "parameters": sum(prod(shape) for shape in spec.tensors().values()),
        "profile": made.profile.name,
        "setting": asdict(made.setting),
        "reasons": {reason.what: reason.reason for reason in made.reasons},
        "fits": made.fits,
        "memory_bytes": made.memory_bytes,
        "budget": {
            "weights": dict(budget.weights),
            "full_kv_bytes": budget.full_kv_bytes,
            "sliding_kv_bytes": budget.sliding_kv_bytes,
            **{name: _stages(getattr(budget, name)) for name in ("encoder", "decoder")},
            "activations_bytes": budget.activations.total_bytes,
            "io_bytes": budget.io_bytes,
            "overhead_bytes": budget.overhead_bytes,
            "total_bytes": budget.total_bytes,
        },
        "largest": made.largest,
        "nearest": None if near is None else asdict(near),
        "advice": "" if made.fits else advice(source, made.profile, made.setting),
        "steps": [asdict(step) for step in made.steps],
        "prefill": [asdict(prefill) for prefill in made.prefill],
    }


def weights_of(source: ModelSource) -> str:
    return "BF16" if source.quantization == "none" else source.quantization


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _table(*columns: str, title: str | None = None, texts: tuple[str, ...] = ()) -> Table:
    """Columns are numbers, but for the named ones."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        text = column in texts
        table.add_column(column, justify="left" if text else "right", no_wrap=column not in ("why", "value"))
    return table


def _model(spec: ModelSpec) -> str:
    tensors = spec.tensors()
    whole = sum(prod(shape) for shape in tensors.values())
    experts = sum(prod(shape) for name, shape in tensors.items() if ".experts." in name)
    active = whole - experts + experts * spec.experts_per_token // spec.experts
    full = sum(layer.kind == "full" for layer in spec.layers)
    return (
        f"{_count(whole)} parameters, {_count(active)} active; {len(spec.layers) - full} sliding and {full} full "
        f"layers, {spec.experts} experts, canvas {spec.canvas_length}, context up to {spec.max_context:,}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"


def _budget(made: Plan) -> Table:
    table = _table("memory", "GB", "share", title="Memory of the GPU, planned", texts=("memory",))

    def row(name: str, size: int, share: bool = True) -> None:
        table.add_row(name, f"{size / GB:.3f}", f"{100 * size / made.memory_bytes:.1f}%" if share else "")

    for name, size in made.budget.items().items():
        row(name, size)
        if name == "weights":
            for form, part in made.budget.weights.items():
                row(f"  {'BF16' if form == 'plain' else form.upper()}", part, False)
        if name == "activations":
            for part_name, part in _activations(made.budget):
                row(part_name, part, False)
    table.add_section()
    row("total", made.budget.total_bytes)
    row("free" if made.fits else "lacking", abs(made.memory_bytes - made.budget.total_bytes))
    return table


def _stages(of: Activations) -> dict[str, Any]:
    return asdict(of) | {"largest_stage": of.largest_stage, "total_bytes": of.total_bytes}


def _activations(budget: VramBudget) -> list[tuple[str, int]]:
    of = budget.activations
    rows = [(f"  of the {'encoder' if of is budget.encoder else 'decoder'}: residual stream", of.residual_bytes)]
    return rows + [(f"  {name}, in shared memory", size) for name, size in of.stages.items()]


def _largest(made: Plan) -> Table:
    table = _table("setting", "asked", "fits up to", title="Largest that fits", texts=("setting",))
    for name, value in made.largest.items():
        table.add_row(name, f"{getattr(made.setting, name):,}", "none" if value is None else f"{value:,}")
    return table


def _steps(steps: tuple[Step, ...]) -> tuple[str, Table]:
    table = _table(
        "active", "canvases", "experts", "read GB", "TFLOP", "floor ms", "in sequence", "unfused", "longest part",
        title="One denoising step, at best", texts=("experts", "longest part"),
    )  # fmt: skip
    for step in steps:
        table.add_row(
            f"{step.active:,}", str(step.canvases), _mark(step),
            f"{step.read_bytes / GB:.3g}", f"{step.flops / TFLOP:.3g}",
            *(f"{ms:.3g}" for ms in (step.floor_ms, step.in_sequence_ms, step.unfused_ms)), step.bound,
        )  # fmt: skip
    return (
        "active: committed tokens. floor: memory and arithmetic overlap perfectly. in sequence: part after part, each "
        "at its own bound. unfused: and large intermediate results go through memory. *: the profile's choice. "
        "Arithmetic, not a measurement.",
        table,
    )


def _speeds(steps: tuple[Step, ...]) -> tuple[str, Table]:
    forwards = [speed.tokens_per_forward for speed in steps[0].speeds]
    table = _table(
        "active", "canvases", "experts",
        *(f"{name}\nat {each}" for each in forwards for name in ("request", "total", "committed")),
        title="Tokens per second, at best, at tokens per forward", texts=("experts",),
    )  # fmt: skip
    for step in steps:
        numbers = [f"{each:,.0f}" for speed in step.speeds for each in (speed.per_request, speed.total,
                                                                      speed.total_with_commit)]  # fmt: skip
        table.add_row(f"{step.active:,}", str(step.canvases), _mark(step), *numbers)
    return (
        "total = canvases x tokens per forward / step (in sequence); tokens per forward = tokens / denoising steps of "
        "a request. committed: with one more pass per canvas, which encodes it.",
        table,
    )


def _mark(step: Step) -> str:
    return step.experts + (" *" if step.chosen else "")


def _prefill(rows: tuple[Prefill, ...]) -> tuple[str, Table]:
    table = _table(
        "active", "chunk", "experts", "read GB", "TFLOP", "floor ms", "in sequence", "tokens/s", "longest part",
        title="Prefill of one chunk, at best", texts=("experts", "longest part"),
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row.active:,}", f"{row.chunk:,}", row.experts, f"{row.read_bytes / GB:.3g}", f"{row.flops / TFLOP:.3g}",
            f"{row.floor_ms:.3g}", f"{row.in_sequence_ms:.3g}", f"{row.tokens_per_second:,.0f}", row.bound,
        )  # fmt: skip
    return "active: tokens before the chunk.", table
