"""``canvasrt verify``: is what we compute what the reference computes?"""

import dataclasses
import json

import typer
from rich.console import Console
from rich.table import Table

from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import CheckpointPath, Device, Dtype, Json, working

FAILED = 1


def verify(
    checkpoint: CheckpointPath,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: int = typer.Option(0, help="Seed of the random prompts and canvases that are compared."),
    as_json: Json = False,
) -> None:
    """Compare this runtime with transformers' reference on a checkpoint: exit code 0 when they agree, 1 when not."""
    source = Checkpoint.open(checkpoint)
    with working("loading the reference implementation"):
        from canvasrt.reference.verify import (
            LEAST_COSINE,
            MAX_DIFFERENCE,
            MAX_ERROR_RATIO,
            Verifier,
        )  # imports torch and transformers' models

        verifier = Verifier(source, dtype, device, seed)
    with working("comparing"):
        checks = list(verifier.checks())
    passed = all(check.passed for check in checks)
    if as_json:
        typer.echo(json.dumps({"passed": passed, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        rounded = any(check.error_ratio is not None for check in checks)
        table = Table("check", "max difference", "cosine", *(["error / theirs"] if rounded else []), "")
        for check in checks:
            verdict = "ok" if check.passed else "FAILED"
            ratio = [] if check.error_ratio is None else [f"{check.error_ratio:.2f}"]
            table.add_row(check.name, f"{check.max_difference:.1e}", f"{check.cosine:.8f}", *ratio, verdict)
        Console().print(table)
        allowed = (
            f"mean error at most {MAX_ERROR_RATIO} times that of transformers in {dtype}, both against float32"
            if rounded
            else f"{MAX_DIFFERENCE:g} of the largest value, cosine {LEAST_COSINE:g}"
        )
        verdict = "agrees with" if passed else "DIFFERS from"
        typer.echo(f"{checkpoint} in {dtype} on {device} {verdict} transformers (allowed: {allowed})")
    if not passed:
        raise typer.Exit(FAILED)
