"""``canvasrt inspect``: what an engine bundle holds, for which GPU and checkpoint, and why it was built that way."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from canvasrt.bundle.manifest import Engine, EngineTensor, Manifest, Region
from canvasrt.bundle.reader import EngineBundle
from canvasrt.cli.common import Json, working
from canvasrt.compile.plan_text import read_plan_text
from canvasrt.quality.size import readable

WIDTH = 120  # where the output is no terminal


def inspect(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that canvasrt build made.")],
    verify: Annotated[bool, typer.Option(help="Check every byte; without, only that files have their sizes.")] = True,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every input and output, and its shapes, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what an engine bundle is: GPU, compiler, model, shapes, memory, layers, reasons, files. Needs no GPU."""
    with working(f"checking {bundle}"):
        opened = EngineBundle.open(bundle, "full" if verify else "sizes")
    manifest = opened.manifest
    total = sum(entry.nbytes for entry in manifest.files.values())
    if as_json:
        content = {"path": str(bundle), "verified": "full" if verify else "sizes", "total_bytes": total}
        typer.echo(json.dumps(content | {"manifest": manifest.model_dump(mode="json")}))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    checked = "every byte verified" if verify else "sizes checked, content not"
    console.print(_text(f"{bundle}: {readable(total)} in {len(manifest.files)} files, {checked}"), soft_wrap=True)
    console.print(_rows(_summary(manifest)))
    if manifest.reasons:
        rows = [(reason.what, reason.value, reason.reason) for reason in manifest.reasons]
        console.print(_table("choice", "value", "reason", rows=rows))
    for name, engine in manifest.engines.items():
        for table in _engine_tables(opened, name, engine, tensors):
            console.print(table)
    files = [(name, f"{entry.nbytes:,}", entry.sha256) for name, entry in manifest.files.items()]
    console.print(_table("file", "bytes", "SHA-256", rows=files))


def _summary(manifest: Manifest) -> list[tuple[str, str]]:
    checkpoint, shapes, moe = manifest.checkpoint, manifest.shapes, manifest.moe
    capacities = [moe.encoder_capacity, moe.decoder_capacity]
    capacity = f", {capacities[0]} tokens per expert to encode, {capacities[1]} to denoise" if any(capacities) else ""
    weights = {
        "inside": "inside the plan",
        "stripped": "not in the plan: filled from the checkpoint when it is loaded",
        "none": "none, and nothing can fill them: for planning, can't be served",
    }
    return [
        ("GPU", f"sm_{manifest.target.compute_capability.replace('.', '')} (profile {manifest.target.profile})"),
        ("compiler", f"{manifest.compiler.name} {manifest.compiler.version}"),
        ("built", f"{manifest.created} by canvasrt {manifest.canvasrt}, build {manifest.build_id[:16]}"),
        ("checkpoint", f"{checkpoint.folder}, quantization {checkpoint.quantization}, layout {checkpoint.layout[:16]}"),
        ("model", ", ".join(f"{name} {value}" for name, value in manifest.model.items())),
        ("weights", weights[manifest.weights]),
        ("precision", f"{manifest.precision}, K/V {manifest.kv_type}"),
        ("experts", moe.formulation + capacity),
        (
            "shapes",
            f"{shapes.slots} slots of {shapes.context} tokens, chunk {shapes.chunk}, {shapes.canvases} canvases of "
            f"{shapes.canvas}, sliding buffer {shapes.sliding} for a window of {shapes.window}",
        ),
    ]


def _engine_tables(bundle: EngineBundle, name: str, engine: Engine, with_tensors: bool) -> Iterator[Table]:
    yield _rows([(f"engine {name}", engine.file), *_build(bundle, name, engine)])
    if with_tensors:
        yield from _tensor_tables(engine)
    for title, counts in (("layers", engine.build.layers), ("weights", engine.build.weight_bytes)):
        if counts:
            shown = sorted(counts.items(), key=lambda item: -item[1])
            rows = [(kind, str(number) if title == "layers" else readable(number)) for kind, number in shown]
            yield _table(f"{title} by {'kind' if title == 'layers' else 'format'}", "", rows=rows)


def _tensor_tables(engine: Engine) -> Iterator[Table]:
    tensors = [
        (_label(group), each.mode, each.dtype, _shape(each.shape), _alias(group)) for each, group in _groups(engine)
    ]
    yield _table("tensor", "mode", "dtype", "shape", "memory of", rows=tensors)
    ranges = [
        (shape_range, _label(group), *(_shape(size) for size in (sizes.min, sizes.opt, sizes.max)))
        for shape_range, inputs in engine.shape_ranges.items()
        for each, group in _groups(engine)
        if each.name in inputs and -1 in each.shape
        for sizes in [inputs[each.name]]
    ]
    yield _table("shape range", "tensor", "min", "opt", "max", rows=ranges)


def _build(bundle: EngineBundle, name: str, engine: Engine) -> Iterator[tuple[str, str]]:
    entry, facts = bundle.manifest.files[engine.file], engine.build
    peak = "" if facts.peak_ram_bytes is None else f", {readable(facts.peak_ram_bytes)} of memory at the peak"
    yield "plan", f"{readable(entry.nbytes)}, built in {facts.seconds:.0f} s{peak}"
    for title, weights in (("to be filled", engine.weight_map), ("bound as inputs", engine.given)):
        if weights:
            inside = sum(weight.nbytes for weight in weights if weight.file is not None)
            kept = f", of which {readable(inside)} lie in the bundle" if inside else ""
            whole = sum(weight.nbytes for weight in weights)
            yield title, f"{len(weights)} weights, {readable(whole)}{kept}"
    regions, reason = _reserved(bundle, name, engine)
    if not regions:
        yield "reserved", f"unknown: {reason}" if reason else "no device memory beside inputs, outputs and weights"
    for shape_range in engine.shape_ranges:
        own = [region.nbytes for region in regions if region.shape_range == shape_range]
        if own:
            parts = f" in {len(own)} regions, the largest {readable(max(own))}" if len(own) > 1 else ""
            yield f"reserved in {shape_range}", f"{readable(sum(own))} of device memory{parts}"


def _reserved(bundle: EngineBundle, name: str, engine: Engine) -> tuple[Sequence[Region], str | None]:
    """What the manifest says, else what the plan itself says, and why neither does."""
    if engine.build.reserved is not None:
        return engine.build.reserved, None
    text, names = read_plan_text(bundle.engine(name)), list(engine.shape_ranges)
    found = [
        Region(shape_range=names[region.shape_range], name=region.name, nbytes=region.nbytes)
        for region in text.regions()
        if region.shape_range < len(names)
    ]
    return found, text.reason


def _groups(engine: Engine) -> list[tuple[EngineTensor, list[EngineTensor]]]:
    """Tensors that differ in the numbers of their names alone (K and V of each layer), each with its first."""
    groups: dict[object, list[EngineTensor]] = {}
    for tensor in engine.tensors:
        key = (re.sub(r"\d+", "*", tensor.name), tensor.mode, tensor.dtype, tensor.shape, _inputs(engine, tensor))
        groups.setdefault(key, []).append(tensor)
    return [(group[0], group) for group in groups.values()]


def _inputs(engine: Engine, tensor: EngineTensor) -> str:
    """Its sizes in every shape range, so that a group has the same."""
    return repr([ranges.get(tensor.name) for ranges in engine.shape_ranges.values()])


def _label(group: Sequence[EngineTensor]) -> str:
    return group[0].name if len(group) == 1 else f"{re.sub(r'[0-9]+', '*', group[0].name)} ({len(group)})"


def _alias(group: Sequence[EngineTensor]) -> str:
    alias = group[0].aliases or ""
    return alias if len(group) == 1 else re.sub(r"\d+", "*", alias)


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join("?" if size == -1 else str(size) for size in sizes) or "scalar"


def _rows(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        table.add_row(_text(name), _text(value))
    return table


def _table(*columns: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(value: str) -> Text:
    # A manifest may come from elsewhere: no markup, nothing that a terminal takes for a command.
    return Text("".join(letter if letter.isprintable() else "?" for letter in value))
