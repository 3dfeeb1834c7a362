"""``canvasrt bench --url``: what a server does under load, for each number of clients at once."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from canvasrt import __version__
from canvasrt.cli.common import errors
from canvasrt.client.connection import Client
from canvasrt.client.load import PERCENTILES, figures, run_load
from canvasrt.client.tensors import Response
from canvasrt.errors import InputError, ServerError
from canvasrt.serve.prompts import PromptLine, read_prompts

Inputs = Mapping[str, Any]

# Where neither --prompts nor a checkpoint with prompts is given.
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "Explain to a child how a rainbow comes about.",
    "List five things to check before a long drive, and why.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that tells whether a text is a palindrome.",
    "Name three causes of the French Revolution and explain one of them.",
    "A train travels 180 km in two and a half hours. What is its mean speed?",
)
JSON_FILE, PLOT_FILE = "bench.json", "bench.png"
SEEDS = 2**64
ROWS = {  # figures that are one number: name, decimals
    "output_tokens_per_second": ("output tokens/s", 1),
    "requests_per_second": ("requests/s", 2),
    "steps_per_canvas": ("steps per canvas", 2),
    "tokens_per_forward": ("tokens per forward", 2),
    "cached_prompt_share": ("share of prompt tokens from the cache", 2),
}
TIMES = {
    "time_to_first_canvas_ms": "time to first canvas",
    "inter_canvas_ms": "inter-canvas time",
    "request_latency_ms": "request latency",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of the server."""

    url: str
    levels: Sequence[int]  # numbers of clients at once, one after the other
    requests: int  # per level
    prompts: Sequence[Inputs]
    max_tokens: int | None
    seed: int  # of the first request of every level; each next one has the next seed


def prompt_inputs(file: Path | None) -> list[dict[str, object]]:
    """The lines of a prompts file as inputs of requests; our own questions without one."""
    lines = read_prompts(file) if file else [_question(text) for text in QUESTIONS]
    return [{"messages": list(line.messages)} if line.messages else {"input_ids": list(line.tokens)} for line in lines]


def bench_server(plan: Plan, out: Path | None, as_json: bool) -> None:
    """Runs the plan, prints its table, and saves figures and plot into ``out``."""
    if out is not None:
        _make(out)
    report = measure(plan)
    if out is not None:
        from canvasrt.cli.bench_plot import save_plot  # here: matplotlib may be missing

        (out / JSON_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        save_plot(report["runs"], out / PLOT_FILE)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        Console().print(table(report["runs"]))
        if out is not None:
            typer.echo(f"saved {out / JSON_FILE} and {out / PLOT_FILE}", err=True)


def measure(plan: Plan) -> dict[str, Any]:
    """The report. Every level sends the same requests, after a round that is not counted.

    Raises what the server answers to a ping, and ServerError when a level got no answer at all.
    """
    runs = []
    with (
        Client(plan.url) as client,
        Progress(console=errors, transient=True, refresh_per_second=1, disable=not errors.is_terminal) as progress,
    ):
        client.ping()

        def send(number: int) -> Iterable[Response]:
            inputs = plan.prompts[number % len(plan.prompts)]
            return client.generate(max_tokens=plan.max_tokens, seed=(plan.seed + number) % SEEDS, **inputs)

        for level in plan.levels:
            task = progress.add_task(f"{level} at once", total=plan.requests)
            run_load(send, level, level)
            load = run_load(send, plan.requests, level, partial(progress.advance, task))
            runs.append(figures(load))
            if not runs[-1]["answered"]:
                raise ServerError(f"no request was answered with {level} at once: {_errors(runs[-1])}")
    return {
        "url": plan.url,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "canvasrt": __version__,
        "prompts": len(plan.prompts),
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
        "runs": runs,
    }


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """A column for each level."""
    shown = Table("at once", *(str(run["concurrency"]) for run in runs))
    for key, (name, decimals) in ROWS.items():
        shown.add_row(name, *(_number(run[key], decimals) for run in runs))
    for key, name in TIMES.items():
        for rank in (f"p{percent}" for percent in PERCENTILES):
            values = [run[key][rank] if run[key] else None for run in runs]
            shown.add_row(f"{name} {rank}, ms", *(_number(value, 1) for value in values))
    shown.add_row("requests answered", *(f"{run['answered']}/{run['requests']}" for run in runs))
    shown.add_row("errors", *(_errors(run) or "none" for run in runs))
    return shown


def _question(text: str) -> PromptLine:
    return PromptLine("questions", ({"role": "user", "content": text},))


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _errors(run: dict[str, Any]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in run["errors"].items())


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be made ({error.strerror})") from None
