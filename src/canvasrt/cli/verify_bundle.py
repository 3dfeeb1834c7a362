"""``canvasrt verify BUNDLE``: does the compiled engine compute what the torch lowering of the same network computes?"""

import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import context_for, open_engine, open_runner, progress_bar
from canvasrt.cli.evaluation import held_out
from canvasrt.errors import InputError
from canvasrt.quality.compare import compare
from canvasrt.runtime.open_bundle import BundleOptions

# Nats per position, median of the prompts. Rounding gave 1e-5 (BF16) to 8e-3 (NVFP4) on the demo checkpoint, in
# another order of summation as much; a network that lacks a part gives more than 1.
MAX_KL = 0.1


def verify_bundle(
    bundle: Path,
    checkpoint: Path | None,
    device: str,
    dtype: str,
    evaluation: Path | None,
    samples: int | None,
    max_kl: float,
    as_json: bool,
) -> bool:
    """Whether they agree. ``device`` and ``dtype`` are the torch side's; the engine's is the GPU."""
    if checkpoint is None:
        raise InputError(f"{bundle} is a bundle: name the checkpoint to compare it with: --checkpoint FOLDER")
    source = Checkpoint.open(checkpoint)
    loaded = open_engine(bundle, BundleOptions(checkpoint=checkpoint, same_checkpoint=True))
    engine = loaded.runner
    _, requests = held_out(source, evaluation, samples, engine.limits.context)
    needed = context_for([each.to_encode for each in requests], [each.params for each in requests])
    exact = source.quantization is not None and dtype == "float32"
    torch = open_runner(source, device, dtype, 1, None, needed, exact=exact)
    with progress_bar() as progress:
        task = progress.add_task("comparing with torch", total=len(requests))
        found = compare(torch, engine, requests, lambda: progress.advance(task)).comparison
    agrees = found.kl_median <= max_kl  # false for NaN
    arithmetic = f"{dtype}{', exact' if exact else ''} on {device}"
    if as_json:
        figures = {"agrees": agrees, "torch": arithmetic, "max_kl": max_kl, **dataclasses.asdict(found)}
        typer.echo(json.dumps({**figures, "prompts": len(requests), "warnings": list(loaded.warnings)}))
        return agrees
    table = Table("", f"engine against torch ({arithmetic})")
    table.add_row("KL, nats per position, median of the prompts", f"{found.kl_median:.2e} (at most {max_kl:g})")
    table.add_row("KL, mean", f"{found.kl:.2e}")
    table.add_row("same most likely token", f"{found.top1_agreement:.2%}")
    table.add_row("steps per canvas", f"{found.steps_per_canvas:.2f} (torch {found.source_steps_per_canvas:.2f})")
    table.add_row("prompts", str(len(requests)))
    Console().print(table)
    verdict = "agrees with" if agrees else "DIFFERS from"
    typer.echo(f"{bundle} {verdict} the torch lowering of {checkpoint}")
    return agrees
