"""``canvasrt build``: a checkpoint becomes a bundle of engines for one GPU."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from canvasrt.bundle.reader import EngineBundle
from canvasrt.cli.common import Json, errors
from canvasrt.compile.buildplan import BuildPlan, Weights, load_plan
from canvasrt.compile.compiler import Progress as Report
from canvasrt.compile.job import ENGINE, Prepared, built, prepare
from canvasrt.compile.job import build as run_build
from canvasrt.errors import InputError
from canvasrt.profiles.profile import Moe

Tokens = Annotated[int | None, typer.Option(min=1)]


def build(
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN.yaml]", help="A build plan; or give --checkpoint, --profile, --out.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; with --weights stripped, config.json alone is enough.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="A GPU profile by name, or a YAML file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the bundle, engines/NAME by convention.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="inside: in the bundle, which then is all that a server needs. stripped: filled in from the "
            "checkpoint at load; a small bundle that builds in a minute or two."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="For a config.json alone: the recipe that the weights would be quantized by.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Context tokens per slot, the canvas included.")] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests that hold K/V memory at once.")] = None,
    canvases: Annotated[int | None, typer.Option(min=1, help="Canvases that one denoising call takes.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Context tokens that one encoder call takes.")] = None,
    moe: Annotated[str | None, typer.Option(help="dense, or capacity:ENCODER:DECODER in tokens per expert.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again, and replace the bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a checkpoint for a GPU: TensorRT-RTX for RTX cards and DGX Spark, here and now, without a GPU;
    TensorRT for datacenter GPUs, on the GPU itself.

    What is left out is the profile's choice; `canvasrt plan` shows what fits. A bundle that is up to date stays.
    """
    prepared = prepare(
        _plan(
            plan,
            {
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "profile": profile,
                "out": None if out is None else str(out),
                "weights": weights,
                "recipe": recipe,
                "context": context,
                "slots": slots,
                "canvases": canvases,
                "chunk": chunk,
                "moe": None if moe is None else _moe(moe),
            },
        )
    )
    done = None if force else built(prepared)
    fresh = done is None
    if done is None:
        for reason in () if as_json else prepared.reasons:
            errors.print(
                f"{reason.what}: {reason.value}  [dim]# {reason.reason}[/dim]", highlight=False, soft_wrap=True
            )
        with _progress() as report:
            done = run_build(prepared, report, force)
    _print(done, fresh, prepared, as_json)


def _plan(file: Path | None, given: dict[str, object]) -> BuildPlan:
    """The file's content, or the command line's; options beside a file replace what it says."""
    given = {name: value for name, value in given.items() if value is not None}
    if file is None:
        missing = [f"--{name}" for name in ("checkpoint", "profile", "out") if name not in given]
        if missing:
            raise InputError(f"{', '.join(missing)} missing: give them, or a build plan such as those in build/plans")
        content: dict[str, object] = {}
    else:
        content = load_plan(file).model_dump()
    merged = content | given
    if merged.get("weights", "inside") not in get_args(Weights):
        raise InputError(f"--weights {merged['weights']} is unknown: inside or stripped")
    try:
        return BuildPlan.model_validate(merged)
    except ValidationError as error:
        faults = [f"--{detail['loc'][0]} {detail['input']}: {detail['msg']}" for detail in error.errors()]
        raise InputError("; ".join(faults)) from None


def _moe(text: str) -> Moe:
    name, *sizes = text.split(":")
    if name == "dense" and not sizes:
        return Moe(formulation="dense")
    if name == "capacity" and len(sizes) == 2 and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return Moe(formulation="capacity", encoder_capacity=int(sizes[0]), decoder_capacity=int(sizes[1]))
    raise InputError(f"--moe {text} is unknown: dense, or capacity:ENCODER:DECODER such as capacity:128:64")


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar for each phase that the compiler is in; on a terminal only."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total or None)
            bars.update(tasks[phase], completed=done, total=total or None)

        yield report


def _print(bundle: EngineBundle, fresh: bool, prepared: Prepared, as_json: bool) -> None:
    manifest = bundle.manifest
    plan_bytes = manifest.files[ENGINE].nbytes
    facts = manifest.engines["text"].build
    if as_json:
        content = {
            "bundle": str(bundle.path),
            "built": fresh,
            "plan_bytes": plan_bytes,
            "seconds": facts.seconds,
            "peak_ram_bytes": facts.peak_ram_bytes,
            "compute_capability": manifest.target.compute_capability,
            "compiler": f"{manifest.compiler.name} {manifest.compiler.version}",
            "weights": manifest.weights,
        }
        typer.echo(json.dumps(content))
        return
    state = (
        f"built in {facts.seconds:.0f} s" if fresh else f"up to date since {manifest.created} (--force builds again)"
    )
    typer.echo(
        f"{bundle.path}: {manifest.target.profile} ({manifest.target.compute_capability}), "
        f"{manifest.compiler.name} {manifest.compiler.version}, weights {manifest.weights}, "
        f"plan {plan_bytes / 1e6:.1f} MB; {state}"
    )
    if manifest.weights == "none":
        typer.echo("built from a config.json alone: it shows what the engine is and can't be served")
    typer.echo(f"see what is in it: canvasrt inspect {bundle.path}")
