"""``canvasrt profiles``: the GPUs that CanvasRT knows, what it chose for each and why, and which one is here."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from canvasrt.cli.common import Json
from canvasrt.errors import InputError
from canvasrt.profiles import detect, helm_values
from canvasrt.profiles.profile import Choice, Fact, GpuProfile, Moe, Throughput, load_profile, profile_names

if TYPE_CHECKING:
    from canvasrt.compile.budget import Fit

NOTHING_MATCHED = 1
WIDTH = 100  # of sources and reasons
INDENT = 22  # of values behind their labels
BEGIN, END = "<!-- The table of the profiles; do not edit. -->", "<!-- End of the table. -->"

# What `show` calls a fact or a choice, and the unit behind its value.
_LABELS = {
    "architecture": ("architecture", ""),
    "compute_capability": ("compute capability", ""),
    "memory_gb": ("memory", " GB"),
    "bandwidth_gb_s": ("bandwidth", " GB/s"),
    "tflops": ("tensor cores", ""),
    "cpu_architectures": ("CPU", ""),
    "product_names": ("node label", ""),
    "compiler": ("compiler", ""),
    "recipe": ("recipe", ""),
    "moe": ("experts", ""),
    "kv_type": ("K and V", ""),
    "slots": ("slots", ""),
    "context": ("context", " tokens per slot"),
    "chunk": ("chunk", " tokens"),
    "canvases": ("canvases", " per call"),
}

Format = Annotated[str, typer.Option("--format", help="table, or helm: values for the chart.")]

app = typer.Typer(help="GPU profiles: facts with their source, choices with their reason.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def profiles(
    context: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a checkpoint, or of a config.json alone (then each profile's recipe): say where it fits."
        ),
    ] = None,
    form: Format = "table",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the files of --format helm; without it they are printed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the GPU profiles; show NAME prints one with sources and reasons, detect says which one this machine is."""
    if context.invoked_subcommand is not None:
        if checkpoint is not None or as_json or form != "table" or out is not None:
            raise InputError(
                f"put options behind the command: canvasrt profiles {context.invoked_subcommand} ... --json; "
                "--checkpoint, --format and --out are for the list"
            )
        return
    _check_format(form)
    if form == "helm":
        _write_helm(out, checkpoint, as_json)
        return
    if out is not None:
        raise InputError("--out is for --format helm: the table is printed")
    every = [load_profile(name) for name in profile_names()]
    fits = None if checkpoint is None else _fits(checkpoint, every)
    if as_json:
        typer.echo(json.dumps([_as_json(profile, fits) for profile in every]))
        return
    head, rows = _rows(every)
    if fits is not None:
        head = (*head, "fits")
        rows = [(*row, _in_short(fits[row[0]])) for row in rows]
    typer.echo(_aligned(head, rows))
    for name, fit in (fits or {}).items():
        if not fit.ok:
            typer.echo(f"{name}: {fit.advice}", err=True)


def _check_format(form: str) -> None:
    if form not in ("table", "helm"):
        raise InputError(f"--format {form} is unknown: table or helm")


def _write_helm(out: Path | None, checkpoint: Path | None, as_json: bool) -> None:
    if checkpoint is not None or as_json:
        raise InputError("--format helm writes YAML for every profile: leave out --checkpoint and --json")
    if out is None:
        typer.echo("---\n".join(helm_values.helm_files().values()), nl=False)
        return
    for file in helm_values.write_helm_files(out):
        typer.echo(f"wrote {file}", err=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A profile of the list, or a YAML file of your own.")],
    form: Format = "table",
    as_json: Json = False,
) -> None:
    """Print one profile: every fact with its source, every choice with its reason; or as values for the chart."""
    profile = load_profile(name)
    _check_format(form)
    if form == "helm":
        typer.echo(helm_values.helm_file(profile), nl=False)
        return
    if as_json:
        typer.echo(json.dumps(_as_json(profile, None)))
        return
    typer.echo(f"{profile.name}: {profile.title}\n\nFacts, and who says so")
    for key, fact in _items(profile.facts):
        if isinstance(fact, Fact):
            _print_entry(key, fact.value, fact.source)
    if profile.facts.memory_is_shared and profile.facts.memory_gb is not None:
        typer.echo("  The memory is shared with the CPU.")
    typer.echo("\nChoices, and why")
    for key, choice in _items(profile.choices):
        if isinstance(choice, Choice):
            _print_entry(key, choice.value, choice.reason)


@app.command("detect")
def detect_gpus(as_json: Json = False) -> None:
    """Say which profile each GPU of this machine is. Exit code 1 where none of them has one."""
    matches = detect.detect()
    if as_json:
        typer.echo(json.dumps([asdict(match) | {"profile": match.profile} for match in matches]))
    else:
        for index, match in enumerate(matches):
            typer.echo(f"GPU {index}: {_described(match.gpu)}: {_verdict(match)}")
            for note in match.notes:
                typer.echo(textwrap.fill(note, WIDTH, initial_indent="  ", subsequent_indent="  "))
    if all(match.profile is None for match in matches):
        raise typer.Exit(NOTHING_MATCHED)


def with_table(page: str) -> str:
    """A Markdown page with the table between its two marker lines renewed. Raises InputError without the markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise InputError(
            f"the page needs the lines {BEGIN} and {END} around the table of the profiles, once and in order"
        )
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{markdown_table()}\n\n{END}{rest.split(END)[1]}"


def markdown_table() -> str:
    """The profiles of the package, one a row."""
    head, rows = _rows([load_profile(name) for name in profile_names()])
    lines = [head, ("---",) * len(head), *((f"`{name}`", *rest) for name, *rest in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(every: Iterable[GpuProfile]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("name", "GPU", "SM", "memory", "bandwidth", "compiler", "recipe", "experts", "slots x context", "canvases")
    rows: list[tuple[str, ...]] = []
    for profile in every:
        facts, choices = profile.facts, profile.choices
        rows.append(
            (
                profile.name,
                profile.title,
                "-" if facts.compute_capability is None else facts.compute_capability.value,
                "-" if facts.memory_gb is None else f"{facts.memory_gb.value:.1f} GB",
                "-" if facts.bandwidth_gb_s is None else f"{facts.bandwidth_gb_s.value:,.0f} GB/s",
                choices.compiler.value,
                choices.recipe.value,
                _moe(choices.moe.value),
                f"{choices.slots.value} x {choices.context.value:,}",
                str(choices.canvases.value),
            )
        )
    return head, rows


def _aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns two spaces apart, for people and for awk; never cut to a terminal's width."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _fits(checkpoint: Path, every: Iterable[GpuProfile]) -> "dict[str, Fit]":
    """By profile. Raises CheckpointError for a damaged folder."""
    from canvasrt.compile.budget import Fit, fits
    from canvasrt.compile.sizes import with_recipe
    from canvasrt.compile.source import ModelSource
    from canvasrt.quantize.recipe import load_recipe

    source = ModelSource.open(checkpoint)
    found = {}
    for profile in every:
        name = profile.choices.recipe.value
        planned = source
        try:
            if source.checkpoint is None:
                planned = with_recipe(source, None if name == "none" else load_recipe(name))
        except InputError as error:  # a recipe that this model's dimensions don't divide into
            found[profile.name] = Fit(False, None, None, str(error))
            continue
        found[profile.name] = fits(planned, profile)
    return found


def _in_short(fit: "Fit") -> str:
    if fit.needed_bytes is None or fit.free_bytes is None:
        return "at start" if fit.ok else "no"
    return f"{'yes' if fit.ok else 'no'}: {fit.needed_bytes / 1e9:.1f} of {fit.free_bytes / 1e9:.1f} GB"


def _as_json(profile: GpuProfile, fits: "dict[str, Fit] | None") -> dict[str, Any]:
    value = profile.model_dump(mode="json") | {"sm": profile.sm}
    return value if fits is None else value | {"fit": asdict(fits[profile.name])}


def _items(section: Any) -> Iterable[tuple[str, Any]]:
    return ((key, getattr(section, key)) for key in type(section).model_fields)


def _print_entry(key: str, value: Any, text: str) -> None:
    label, unit = _LABELS[key]
    typer.echo(f"  {label:<{INDENT - 4}}  {_shown(value)}{unit}")
    wrapped = textwrap.wrap(text, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    typer.echo(textwrap.indent("\n".join(wrapped), "      "))


def _shown(value: Any) -> str:
    if isinstance(value, Moe):
        return _moe(value)
    if isinstance(value, Throughput):
        return ", ".join(f"{kind.upper()} {_number(rate)}" for kind, rate in _items(value)) + " TFLOP/s, dense"
    if isinstance(value, list):
        return (",\n" + " " * INDENT).join(value) or "none"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")


def _moe(moe: Moe) -> str:
    if moe.formulation != "capacity":
        return moe.formulation
    return f"capacity {moe.encoder_capacity}/{moe.decoder_capacity}"


def _described(gpu: detect.Gpu) -> str:
    capability = "compute capability unknown" if gpu.compute_capability is None else f"SM {gpu.compute_capability}"
    memory = "memory not reported" if gpu.memory_bytes is None else f"{gpu.memory_bytes / 1e9:.1f} GB"
    driver = "" if gpu.driver is None else f", driver {gpu.driver}"
    return f"{gpu.name} ({capability}, {memory}{driver})"


def _verdict(match: detect.Match) -> str:
    if match.profile is None:
        return f"no profile; nearest is {match.nearest}"
    return match.profile if match.certainty == "product" else f"{match.profile}, as a guess"
