"""The tables of docs/targets: what a GPU's profile chooses and what the planner expects of it, for the 26B.

Everything comes from the profiles and from canvasrt.compile; nothing is measured, and no figure of others is in it.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence

from canvasrt.compile.budget import largest_canvases, largest_context, largest_slots
from canvasrt.compile.forecast import TOKENS_PER_FORWARD, Prefill, Step, forecast_prefill, forecast_steps
from canvasrt.compile.roofline import tokens_per_second
from canvasrt.compile.vram import GB, Deployment, Setting
from canvasrt.diffusion.params import GenerationConfig
from canvasrt.doctor.model import Needs, needs, open_model
from canvasrt.profiles.helm_values import PUBLISHED
from canvasrt.profiles.profile import GpuProfile, load_profile

PAGES = {  # page of docs/targets without .md -> profiles, one a column
    "rtx-4090": ("rtx-4090",),
    "rtx-5090": ("rtx-5090",),
    "rtx-pro-6000": ("rtx-pro-6000",),
    "h100": ("h100", "h200", "b200"),
    "dgx-spark": ("dgx-spark",),
    "dgx-station": ("dgx-station",),
}
OVERVIEW = "README"
BEGIN, END = "<!-- Written by scripts/generate_docs.py; do not edit. -->", "<!-- End of the tables. -->"
_PARTS = (  # of the memory, as VramBudget.items() calls them: those of one row
    ("weights",),
    ("K/V of full layers", "K/V of sliding layers"),
    ("activations",),
    ("inputs and outputs", "driver and reserve"),
)
_ACTIVE = 1024  # committed tokens of a short conversation; the other row is a full context

Rows = list[tuple[str, ...]]


def with_target_table(page_name: str, text: str) -> str:
    """A page of docs/targets, named without .md, with what stands between its two marker lines renewed.

    Ends the process with a sentence for an unknown page, or one whose marker lines are not there once and in order.
    """
    if page_name != OVERVIEW and page_name not in PAGES:
        sys.exit(f"docs/targets/{page_name}.md is in no table: add it to PAGES in scripts/target_tables.py")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"docs/targets/{page_name}.md needs the lines {BEGIN} and {END}, once and in order")
    before, rest = text.split(BEGIN)
    made = overview() if page_name == OVERVIEW else tables([load_profile(name) for name in PAGES[page_name]])
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def overview() -> str:
    """Every target in one row."""
    rows = []
    for page, names in PAGES.items():
        for target in (_Target(load_profile(name)) for name in names):
            choices, setting = target.profile.choices, target.setting
            rows.append(
                (
                    f"[{target.profile.title}]({page}.md)",
                    f"`{target.profile.name}`",
                    choices.recipe.value,
                    f"{setting.slots} x {setting.context:,}",
                    f"{target.budget.total_bytes / GB:.1f} of {target.on.memory_bytes / GB:.1f}",
                    f"{target.step(1, _ACTIVE).floor_ms:.3g}",
                )
            )
    head = ("GPU", "profile", "recipe", "slots x context", "GB planned", "floor of a step, ms")
    return _markdown(head, rows)


def tables(profiles: Sequence[GpuProfile]) -> str:
    """What is chosen and what fits, a column a profile; then steps; then what the words mean."""
    targets = [_Target(profile) for profile in profiles]
    columns = [dict(target.properties()) for target in targets]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    several = len(targets) > 1
    steps = [((f"`{t.profile.name}`",) if several else ()) + row for t in targets for row in t.speeds()]
    counts = _steps_per_canvas(targets[0].canvas)
    times = ("committed", "canvases", "read GB", "floor ms", "in sequence", "unfused")
    head = ((("profile",) if several else ()), times, tuple(f"{count:.3g} steps" for count in counts))
    note = "GB are 10⁹ bytes. Arithmetic, not a measurement: [what the columns say](README.md#what-the-tables-say)."
    chosen = _markdown(("", *(f"`{profile.name}`" for profile in profiles)), rows)
    return f"{chosen}\n\n{_markdown(sum(head, ()), steps)}\n\n{note}"


class _Target:
    """The 26B on one GPU, with the profile's choices."""

    def __init__(self, profile: GpuProfile) -> None:
        model = open_model(None)
        self.profile = profile
        self.source = model.planned(profile)
        self.canvas = self.source.spec.canvas_length
        self.needs: Needs = needs(model, profile)
        self.on = Deployment.of(self.source, profile)
        self.setting = Setting.of(profile, self.source.spec)
        self.budget = self.on.budget(self.setting)
        self.steps = [step for step in forecast_steps(self.source, profile, self.setting) if step.chosen]
        self.prefill: list[Prefill] = forecast_prefill(self.source, profile, self.setting)

    def step(self, canvases: int, active: int) -> Step:
        (found,) = (each for each in self.steps if (each.canvases, each.active) == (canvases, active))
        return found

    def properties(self) -> Iterator[tuple[str, str]]:
        facts, choices, setting = self.profile.facts, self.profile.choices, self.setting
        moe, parts = choices.moe.value, self.budget.items()
        assert facts.bandwidth_gb_s is not None  # Rates.of has asked for it
        shared = ", shared with the CPU" if facts.memory_is_shared else ""
        yield "memory", f"{self.on.memory_bytes / GB:.1f} GB{shared}, {facts.bandwidth_gb_s.value:,.0f} GB/s"
        experts = f"capacity {moe.encoder_capacity}/{moe.decoder_capacity}"
        experts = experts if moe.formulation == "capacity" else moe.formulation
        yield "compiler, recipe, experts", f"{choices.compiler.value}, {choices.recipe.value}, {experts}"
        yield from self._files(self.needs)
        yield (
            "slots x context; canvases; chunk",
            f"{setting.slots} x {setting.context:,}; {setting.canvases}; {setting.chunk:,}",
        )
        for names in _PARTS:
            yield f"{'; '.join(names)}", "; ".join(f"{parts.pop(name) / GB:.2f}" for name in names) + " GB"
        assert not parts, f"_PARTS lacks {', '.join(parts)}"
        total = self.budget.total_bytes
        free = self.on.memory_bytes - total
        yield (
            "planned in all",
            f"**{total / GB:.2f} GB** ({100 * total / self.on.memory_bytes:.0f} %), {free / GB:.2f} GB free",
        )
        largest = (find(self.on, setting) for find in (largest_context, largest_slots, largest_canvases))
        yield (
            "fits up to, each alone: context, slots, canvases",
            " / ".join("none" if n is None else f"{n:,}" for n in largest),
        )
        rates = [f"{each.tokens_per_second:,.0f}" for each in self.prefill]
        yield "prefill, at best", f"{' to '.join(reversed(rates))} tokens/s"

    def _files(self, need: Needs) -> Iterator[tuple[str, str]]:
        published = PUBLISHED[need.recipe]
        source = published.source.removeprefix("hf://")
        yield "download", f"{source}, {published.fetched_bytes / GB:.1f} GB"
        quantized = 0.0
        if published.quantize is not None:
            quantized = published.built_bytes
            yield (
                "quantized here",
                f"{quantized / GB:.1f} GB, with {(need.quantize_memory_bytes or 0) / GB:.1f} GB of memory",
            )
        bundle = need.bundle_bytes or 0
        whole = published.fetched_bytes + quantized + bundle + need.build_disk_bytes
        yield "bundle; disk for all, with what its build takes", f"{bundle / GB:.1f} GB; {whole / GB:.0f} GB"
        inside, stripped = need.inside_memory_bytes / GB, need.stripped_memory_bytes / GB
        yield "memory to build, weights inside; stripped", f"{inside:.1f} GB; {stripped:.1f} GB"

    def speeds(self) -> Iterator[tuple[str, ...]]:
        """Of a short conversation with one canvas and with all, and of a full context with all."""
        most = max(step.active for step in self.steps)
        wanted = dict.fromkeys([(1, _ACTIVE), (self.setting.canvases, _ACTIVE), (self.setting.canvases, most)])
        for canvases, active in wanted:
            step = self.step(canvases, active)
            times = (step.floor_ms, step.in_sequence_ms, step.unfused_ms)
            yield (
                f"{active:,}",
                str(canvases),
                f"{step.read_bytes / GB:.3g}",
                *(f"{ms:.3g}" for ms in times),
                *(f"{self._rate(step, count):,.0f}" for count in _steps_per_canvas(self.canvas)),
            )

    def _rate(self, step: Step, steps_per_canvas: float) -> float:
        seconds, commit = step.in_sequence_ms / 1e3, step.commit_ms / 1e3
        return tokens_per_second(self.canvas, step.canvases, self.canvas / steps_per_canvas, seconds, commit)[1]


def _steps_per_canvas(canvas: int) -> tuple[float, ...]:
    """The most that are taken, then as many as were published."""
    return (GenerationConfig().max_denoising_steps, *(canvas / each for each in TOKENS_PER_FORWARD))


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ("---",) * len(head), *rows])
