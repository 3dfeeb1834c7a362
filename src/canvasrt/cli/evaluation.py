"""What ``canvasrt quantize`` and ``canvasrt verify --source`` share: held-out prompts, and the report about them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import context_for, open_runner, params_for, progress_bar
from canvasrt.diffusion.params import GenerationConfig, RequestOptions
from canvasrt.diffusion.request import RequestState
from canvasrt.inputs import input_folder
from canvasrt.quality.compare import Outputs, compare
from canvasrt.quality.report import Report, rows
from canvasrt.quality.size import bytes_on_disk, bytes_per_step
from canvasrt.serve.prompts import PromptLine, encode_prompts, read_prompts
from canvasrt.serve.tokenizer import TextCodec

EVALUATION = "evaluation.jsonl"  # beside a checkpoint: held-out prompts that suit it


def evaluate(
    source: Checkpoint,
    quantized: Checkpoint,
    recipe: str,
    file: Path | None,
    samples: int | None,
    device: str,
    exact: bool = True,
) -> Report:
    """Compares the two on the prompts of ``file``, by default the source's evaluation.jsonl or the general ones.

    Raises CapacityError when both do not fit the memory together.
    """
    lines, requests = held_out(source, file, samples, source.spec.max_context)
    needed = context_for([each.to_encode for each in requests], [each.params for each in requests])
    runners = [
        open_runner(checkpoint, device, "float32", 1, None, needed, exact=exact) for checkpoint in (source, quantized)
    ]
    with progress_bar() as progress:
        task = progress.add_task("comparing with the source", total=len(requests))
        compared = compare(runners[0], runners[1], requests, lambda: progress.advance(task))
    solved, source_solved = (
        _solved(source.folder, lines, outputs) for outputs in (compared.outputs, compared.source_outputs)
    )
    return Report(
        recipe=recipe,
        source=source.folder.resolve().name,
        arithmetic="exact" if exact else "dequantized",
        prompts=len(lines),
        comparison=compared.comparison,
        solved=solved,
        source_solved=source_solved,
        bytes_on_disk=bytes_on_disk(quantized),
        source_bytes_on_disk=bytes_on_disk(source),
        bytes_per_step=bytes_per_step(quantized),
        source_bytes_per_step=bytes_per_step(source),
    )


def held_out(
    source: Checkpoint, file: Path | None, samples: int | None, context: int
) -> tuple[list[PromptLine], list[RequestState]]:
    """The prompts of ``file``, by default the checkpoint's evaluation.jsonl or the general ones, and requests of them.

    ``context``: tokens that prompt and answer may take.
    """
    own = source.folder / EVALUATION
    lines = read_prompts(file or (own if own.exists() else input_folder("calibration") / "held-out.jsonl"))[:samples]
    config = GenerationConfig.load(source.folder)
    prompts = encode_prompts(source.folder, source.spec, lines, source.spec.canvas_length)
    params = [
        params_for(source.spec, config, RequestOptions.parse(seed=index), prompt, context)
        for index, prompt in enumerate(prompts)
    ]
    return lines, [RequestState.new(each, prompt) for each, prompt in zip(params, prompts, strict=True)]


def print_reports(found: Sequence[Report], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found] if len(found) > 1 else asdict(found[0])))
        return
    head, *lines = rows(found)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _solved(folder: Path, lines: list[PromptLine], outputs: Outputs) -> float | None:
    """The share of prompts with a known answer that got exactly that."""
    known = [(line.answer, output) for line, output in zip(lines, outputs, strict=True) if line.answer is not None]
    if not known:
        return None
    codec = TextCodec.load(folder)
    return sum(codec.decode(output).strip() == answer.strip() for answer, output in known) / len(known)
