"""``canvasrt verify``: is what we compute what the reference computes, or how far is a quantized checkpoint from its
source?
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from canvasrt.bundle.staging import is_bundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.cli.common import Device, Dtype, Json, working
from canvasrt.cli.evaluation import evaluate, print_reports
from canvasrt.cli.verify_bundle import MAX_KL, verify_bundle
from canvasrt.errors import InputError

FAILED = 1


def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of a DiffusionGemma checkpoint or an engine bundle.")
    ],
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: int = typer.Option(0, help="Seed of the random prompts and canvases that are compared."),
    source: Annotated[
        Path | None, typer.Option(help="The checkpoint that CHECKPOINT was quantized from: compare with it instead.")
    ] = None,
    of: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", help="For a bundle: the checkpoint that it was built from, run by torch on --device."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Held-out prompts for --source or a bundle; by default evaluation.jsonl of the checkpoint, else ours."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Prompts to compare with --source or a bundle; all by default.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0, help="Exit with 1 when the KL divergence is larger: of a bundle the median, 0.1 by default."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare this runtime with transformers' reference on a checkpoint: exit code 0 when they agree, 1 when not.

    With --source, say how far a quantized checkpoint is from the one that it was made of, in the exact arithmetic of
    its format. For an engine bundle, compare the engine on the GPU with torch on its checkpoint (--checkpoint).
    """
    if is_bundle(checkpoint):
        if source is not None:
            raise InputError("--source is for checkpoints: a bundle is compared with its own, --checkpoint FOLDER")
        limit = MAX_KL if max_kl is None else max_kl
        agrees = verify_bundle(checkpoint, of, device, dtype, evaluation, samples, limit, as_json)
        raise typer.Exit(0 if agrees else FAILED)
    if of is not None:
        raise InputError(f"--checkpoint belongs to a bundle, and {checkpoint} is none")
    if source is not None:
        _compare_with_source(
            Checkpoint.open(checkpoint), Checkpoint.open(source), evaluation, samples, device, max_kl, as_json
        )
        return
    if evaluation is not None or samples is not None or max_kl is not None:
        raise InputError("--evaluation, --samples and --max-kl belong to --source CHECKPOINT")
    _compare_with_transformers(checkpoint, device, dtype, seed, as_json)


def _compare_with_source(
    quantized: Checkpoint,
    source: Checkpoint,
    evaluation: Path | None,
    samples: int | None,
    device: str,
    max_kl: float | None,
    as_json: bool,
) -> None:
    if quantized.spec != source.spec:
        raise InputError(
            f"{quantized.folder} and {source.folder} are different models: their config.json differ in dimensions"
        )
    if source.quantization is not None:
        raise InputError(f"{source.folder} is quantized itself: --source wants the BF16 checkpoint")
    found = evaluate(source, quantized, quantized.folder.resolve().name, evaluation, samples, device)
    print_reports([found], as_json)
    if max_kl is not None and found.comparison.kl > max_kl:
        typer.echo(f"KL {found.comparison.kl:.2e} exceeds --max-kl {max_kl:g}", err=True)
        raise typer.Exit(FAILED)


def _compare_with_transformers(checkpoint: Path, device: str, dtype: str, seed: int, as_json: bool) -> None:
    source = Checkpoint.open(checkpoint)
    with working("loading the reference implementation"):
        from canvasrt.reference.verify import (
            LEAST_COSINE,
            MAX_DIFFERENCE,
            MAX_ERROR_RATIO,
            MAX_LOGITS_RATIO,
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
            f"mean error at most {MAX_ERROR_RATIO} times that of transformers in {dtype} for keys and values and "
            f"{MAX_LOGITS_RATIO} times for logits, all against float32"
            if rounded
            else f"{MAX_DIFFERENCE:g} of the largest value, cosine {LEAST_COSINE:g}"
        )
        verdict = "agrees with" if passed else "DIFFERS from"
        typer.echo(f"{checkpoint} in {dtype} on {device} {verdict} transformers (allowed: {allowed})")
    if not passed:
        raise typer.Exit(FAILED)
