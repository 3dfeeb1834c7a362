"""``canvasrt quantize``: a BF16 checkpoint in, a quantized one and a report about its quality out."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import Device, Json, free_memory, progress_bar, working
from canvasrt.cli.evaluation import evaluate, print_reports
from canvasrt.errors import CapacityError, InputError
from canvasrt.quality import report as reports
from canvasrt.quality.size import readable
from canvasrt.serve.prompts import read_prompts

if TYPE_CHECKING:
    from canvasrt.quantize.recipe import Recipe

DEFAULT_RECIPE = "nvfp4-experts"
DOES_NOT_FIT = 3


def quantize(
    checkpoint: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT", help="Folder of a BF16 checkpoint; with --compare, of quantized ones."),
    ],
    recipe: Annotated[
        str, typer.Option(help="nvfp4-experts, nvfp4, fp8, int4-experts, or a YAML file like those in build/recipes.")
    ] = DEFAULT_RECIPE,
    out: Annotated[Path | None, typer.Option(help="Folder of the quantized checkpoint; must not exist yet.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Lines of prompts; by default the checkpoint's calibration.jsonl, else the recipe's file."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Prompts to calibrate with; the recipe says how many.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Held-out prompts for the report; by default the checkpoint's evaluation.jsonl, else ours."),
    ] = None,
    report: Annotated[bool, typer.Option(help="Compare the result with the source and write quality.json.")] = True,
    device: Device = "cpu",
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it needs and whether that fits; change nothing.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print the reports of quantized checkpoints side by side.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint with NVIDIA ModelOpt: NVFP4, FP8 or INT4 by a recipe, with a quality report beside it."""
    if compare:
        print_reports([reports.read(folder) for folder in checkpoint], as_json)
        return
    if len(checkpoint) > 1:
        raise InputError("one checkpoint at a time: several are for --compare")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is unknown: use cpu or cuda")
    with working("loading ModelOpt"):
        from canvasrt.quantize.job import QuantizeJob, calibration_lines  # imports torch
        from canvasrt.quantize.recipe import load_recipe
    chosen = load_recipe(recipe)
    source = Checkpoint.open(checkpoint[0])
    if plan:
        lines = calibration_lines(source, chosen, calibration, samples)
        _plan(source, chosen, out, len(lines), device, as_json)
        return
    if out is None:
        raise InputError("name the folder of the result: --out DIR")
    if evaluation is not None:
        read_prompts(evaluation)  # a mistake in it must not wait until the checkpoint is made
    job = QuantizeJob(source, chosen, out, calibration, samples, device)
    lacks = _room(source, chosen, out, device).lacks
    if lacks:
        raise CapacityError("does not fit: " + "; ".join(lacks) + ". Use a larger machine; --plan says more.")
    try:
        with progress_bar() as progress:
            made = job.run(_Stages(progress))
    except KeyboardInterrupt:
        typer.echo(f"{out} was not made; a calibration that has finished is kept for the same command", err=True)
        raise
    typer.echo(f"{out}: {made.quantization.name if made.quantization else ''}, {readable(made.nbytes())}", err=True)
    if not report:
        return
    try:
        found = evaluate(source, made, chosen.name, evaluation, None, device)
    except CapacityError as error:
        raise CapacityError(
            f"{out} is complete, but has no report, since source and result do not fit here together: {error} "
            f"On a larger machine: canvasrt verify {out} --source {checkpoint[0]}"
        ) from None
    reports.write(found, out)
    print_reports([found], as_json)


class _Stages:
    """One progress bar after the other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total)

    def advance(self) -> None:
        assert self._task is not None  # a stage comes first
        self._progress.advance(self._task)


@dataclass(frozen=True, slots=True)
class _Room:
    """What is free here, and what of a job does not fit in."""

    memory_bytes: int
    disk_bytes: int
    lacks: list[str]


def _room(source: Checkpoint, recipe: "Recipe", out: Path | None, device: str) -> _Room:
    from canvasrt.quantize.plan import sizes

    needs = sizes(source, recipe)
    place = (out or Path.cwd()).resolve()
    while not place.exists():
        place = place.parent
    memory, disk = free_memory(device), shutil.disk_usage(place).free
    wanted = ((f"{device} memory", needs.memory_bytes, memory), (f"disk at {place}", needs.disk_bytes, disk))
    lacks = [
        f"{name}: {readable(needed)} needed, {readable(free)} free" for name, needed, free in wanted if needed > free
    ]
    return _Room(memory, disk, lacks)


def _plan(source: Checkpoint, recipe: "Recipe", out: Path | None, samples: int, device: str, as_json: bool) -> None:
    from canvasrt.quantize.plan import measure_speed, plan

    room = _room(source, recipe, out, device)
    memory, disk, lacks = room.memory_bytes, room.disk_bytes, room.lacks
    with working("measuring this machine"):
        needs = plan(source, recipe, samples, measure_speed(device))
    if as_json:
        here = {"free_memory_bytes": memory, "free_disk_bytes": disk, "fits": not lacks}
        typer.echo(json.dumps(asdict(needs) | here))
    else:
        table = Table("", "needed", "here")
        table.add_row(f"{device} memory at the peak", readable(needs.memory_bytes), f"{readable(memory)} free")
        table.add_row("disk", readable(needs.disk_bytes), f"{readable(disk)} free")
        passes = f"{needs.passes} passes of the model" if needs.passes else "none: weights only"
        table.add_row("calibration", f"about {_duration(needs.calibration_seconds)}", passes)
        table.add_row("packing and export", f"about {_duration(needs.export_seconds)}", "")
        Console().print(table)
        for lack in lacks:
            typer.echo(f"does not fit: {lack}", err=True)
    if lacks:
        raise typer.Exit(DOES_NOT_FIT)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
