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
        from canvasrt.reference.verify import TOLERANCES, Verifier  # imports torch and transformers' models

        verifier = Verifier(source, dtype, device, seed)
    with working("comparing"):
        checks = list(verifier.checks())
    passed = all(check.passed for check in checks)
    if as_json:
        typer.echo(json.dumps({"passed": passed, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        table = Table("check", "max difference", "cosine", "")
        for check in checks:
            verdict = "ok" if check.passed else "FAILED"
            table.add_row(check.name, f"{check.max_difference:.1e}", f"{check.cosine:.8f}", verdict)
        Console().print(table)
        allowed, cosine = TOLERANCES[dtype]
        verdict = "agrees with" if passed else "DIFFERS from"
        typer.echo(
            f"{checkpoint} in {dtype} on {device} {verdict} transformers "
            f"(allowed: {allowed:g} of the largest value, cosine {cosine:g})"
        )
    if not passed:
        raise typer.Exit(FAILED)
