"""``canvasrt bench``: speed of this runtime, and against transformers on the same prompts in the same run.

The figures of a server are `canvasrt.cli.bench_server`'s.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import (
    Device,
    Dtype,
    Exact,
    Json,
    context_for,
    errors,
    open_runner,
    params_for,
    working,
)
from canvasrt.diffusion.params import GenerationConfig, RequestOptions, RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import InputError
from canvasrt.runtime.measure import Tally, measure
from canvasrt.serve.prompts import encode_prompts, read_prompts

Ints = NDArray[np.int32]
Group = tuple[list[Ints], list[RequestParams]]  # prompts that run together

PROMPTS = "prompts.jsonl"  # beside a checkpoint: prompts that suit it
# Groups that one side runs before the other's turn: the first finds the other's weights in the processor's cache.
TURN = 8
WARM_UP = 8  # groups in which prompts of new lengths are looked for
ROWS = {
    "tokens_per_second": "tokens/s",
    "steps_per_canvas": "steps per canvas",
    "tokens_per_forward": "tokens per forward",
    "ms_per_step": "ms per step",
    "time_to_first_canvas_ms": "time to first canvas, ms",
}


def bench(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="Folder of a DiffusionGemma checkpoint. With --url, only its prompts are used, if given.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="transformers: run it too, on the same prompts, in turns.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests that run together; several as 1,8.")] = "1",
    requests: Annotated[int, typer.Option(min=1, help="Requests per concurrency, rounded up to whole groups.")] = 24,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Lines of {"prompt": TEXT}; by default prompts.jsonl of the checkpoint, else random token ids '
            "(with --url, a few questions).",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens per request.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; each next one has the next seed.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    exact: Exact = False,
    url: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Measure the server with this gRPC address instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save the figures and a plot here; with --url.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure tokens/s, steps per canvas, tokens per forward, ms per step and time to first canvas.

    Prompts of new lengths are answered once before anything counts, by each side.

    With --url, measure a server as its clients see it: also request latency and the time between canvases.
    """
    if url is not None:
        _refuse_local(against, device, dtype, exact)
        from canvasrt.cli.bench_server import Plan, bench_server, prompt_inputs  # here: gRPC may be missing

        beside = checkpoint / PROMPTS if checkpoint is not None else None
        plan = Plan(url, _levels(concurrency), requests, prompt_inputs(prompts or beside), max_tokens, seed)
        bench_server(plan, out, as_json)
        return
    if checkpoint is None:
        raise InputError("name a checkpoint's folder, or a server with --url HOST:PORT")
    if out is not None:
        raise InputError("--out is for the figures of a server: give --url too, or leave it out")
    if against not in (None, "transformers"):
        raise InputError(f"--against knows transformers only, not {against!r}")
    if against and device != "cpu":
        raise InputError("--against transformers runs on the CPU: leave --device at cpu")
    levels = _levels(concurrency)
    source = Checkpoint.open(checkpoint)
    config = GenerationConfig.load(source.folder)
    texts = _prompts(source, prompts)
    options = [RequestOptions.parse(seed=seed + index, max_tokens=max_tokens) for index in range(len(texts))]
    params = [
        params_for(source.spec, config, each, tokens, source.spec.max_context)
        for each, tokens in zip(options, texts, strict=True)
    ]
    if against and len({each.max_tokens for each in params}) > 1:
        raise InputError(
            "transformers takes one max_tokens for a whole batch: set --max-tokens to what every prompt allows"
        )
    runner = open_runner(source, device, dtype, max(levels), None, context_for(texts, params), exact)
    reference: Any = None
    if against:
        with working("loading transformers"):
            from canvasrt.reference.model import ReferenceModel

            reference = ReferenceModel.load(source, _torch_dtype(dtype))
    runs = []
    # Drawn seldom: every redraw takes time from what is measured.
    with Progress(console=errors, transient=True, refresh_per_second=1, disable=not errors.is_terminal) as progress:
        for level in levels:
            groups = list(_groups(texts, params, level, requests))
            task = progress.add_task(f"{level} at once", total=len(groups))
            runs.append(_run(runner, reference, groups, level, partial(progress.advance, task)))
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "device": device, "dtype": dtype, "runs": runs}
    if against:
        # The least of the runs: with one concurrency, simply its ratio.
        report["ratio"] = min(run["ratio"] for run in runs)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(runs)


def _refuse_local(against: str | None, device: str, dtype: str, exact: bool) -> None:
    """What only this process could heed."""
    given = {"--against": against is not None, "--device": device != "cpu", "--dtype": dtype != "float32"}
    if wrong := [name for name, there in {**given, "--exact": exact}.items() if there]:
        raise InputError(f"the server behind --url decides on its model: leave {', '.join(wrong)} out")


def _run(runner: Any, reference: Any, groups: Sequence[Group], level: int, advance: Any) -> dict[str, Any]:
    """One concurrency: both sides take turns, TURN groups at a time, so that a noisy machine is noisy for both.

    They draw the same noise too, so that the ratio is about speed and not about who drew the luckier canvas.
    """
    ours, theirs, same = Tally(), Tally(), 0
    for group in _warm_up(groups):
        measure(runner, _states(group), Tally())
        if reference is not None:
            from canvasrt.reference.measure import measure_reference

            measure_reference(reference, *group, Tally())
    for start in range(0, len(groups), TURN):
        turn = groups[start : start + TURN]
        answers = [measure(runner, _states(group), ours) for group in turn]
        if reference is not None:
            expected = [measure_reference(reference, *group, theirs) for group in turn]
            pairs = zip(chain(*answers), chain(*expected), strict=True)
            same += sum(list(answer.output) == other for answer, other in pairs)
        for _ in turn:
            advance()
    run: dict[str, Any] = {"concurrency": level, "canvasrt": ours.figures()}
    if reference is not None:
        run["transformers"] = theirs.figures()
        run["same_answers"] = same / ours.requests
        run["ratio"] = run["canvasrt"]["tokens_per_second"] / run["transformers"]["tokens_per_second"]
    return run


def _warm_up(groups: Sequence[Group]) -> list[Group]:
    """What both sides do before it counts: prompts of each length, since they compile and allocate for new shapes."""
    chosen, lengths = [], set[int]()
    for group in groups[:WARM_UP]:
        found = {len(tokens) for tokens in group[0]}
        if not found <= lengths:
            chosen.append(group)
            lengths |= found
    return chosen


def _states(group: Group) -> dict[int, RequestState]:
    prompts, params = group
    return {
        index: RequestState.new(each, tokens) for index, (tokens, each) in enumerate(zip(prompts, params, strict=True))
    }


def _levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise InputError(f"--concurrency wants whole numbers such as 8 or 1,8, not {text!r}")
    return levels


def _prompts(source: Checkpoint, file: Path | None) -> list[Ints]:
    path = file or source.folder / PROMPTS
    if file is None and not path.is_file():
        rng = np.random.default_rng(0)
        room = source.spec.max_context - 256 - source.spec.canvas_length
        lengths = rng.integers(1, max(2, min(512, room)), 64)
        return [rng.integers(0, source.spec.vocab_size, length).astype(np.int32) for length in lengths]
    return encode_prompts(source.folder, source.spec, read_prompts(path), room=source.spec.canvas_length)


def _groups(texts: Sequence[Ints], params: Sequence[RequestParams], level: int, requests: int) -> Iterator[Group]:
    for group in range(-(-requests // level)):
        chosen = [(group * level + index) % len(texts) for index in range(level)]
        yield [texts[index] for index in chosen], [params[index] for index in chosen]


def _torch_dtype(name: str) -> Any:
    from canvasrt.runtime.torch_runner import DTYPES

    return DTYPES[name]


def _print(runs: Sequence[dict[str, Any]]) -> None:
    for run in runs:
        compared = "transformers" in run
        columns = ["canvasrt", "transformers"] if compared else ["canvasrt"]
        title = f"{run['concurrency']} request{'s' if run['concurrency'] > 1 else ''} at once"
        table = Table(title, *columns)
        for key, name in ROWS.items():
            table.add_row(name, *(f"{run[column][key]:.1f}" for column in columns))
        Console().print(table)
        if compared:
            typer.echo(f"canvasrt / transformers in tokens/s: {run['ratio']:.2f}; same text: {run['same_answers']:.0%}")
