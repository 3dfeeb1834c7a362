"""``canvasrt verify`` on this GPU, as a user runs it: the torch runner against transformers, a bundle against torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from canvasrt.errors import CanvasRTError
from canvasrt.profiles.profile import Moe
from canvasrt.runtime.cuda_device import open_device
from gpu_parts.record import MissingError, Options, PartError, Record, library
from gpu_parts.small import DEMO, DENSE, MOST_CANVASES, bundles

_KEPT = 2000  # characters of what the command said
CONTEXT, CHUNK, SAMPLES = 512, 128, 16
FORMULATIONS = (DENSE, Moe(formulation="capacity", encoder_capacity=64, decoder_capacity=48))


def run(options: Options, record: Record) -> None:
    """On the demo's checkpoint: a bundle is compared over prompts, which want a tokenizer."""
    library("torch")
    compare(record, "torch", [str(DEMO), "--device", options.device])
    try:
        open_device()  # first: without a GPU nothing need be built
        made = bundles(options, DEMO, CONTEXT)
        for moe in FORMULATIONS:
            bundle = made.bundle(MOST_CANVASES, CHUNK, moe)
            more = ["--device", options.device, "--samples", str(SAMPLES)]
            compare(record, f"bundle, {moe.formulation}", [str(bundle), "--checkpoint", str(DEMO), *more])
    except (CanvasRTError, PartError) as error:
        record.fail("bundle", error)
    except MissingError as error:
        record.note(missing=str(error))
        if not record.failures:
            raise


def compare(record: Record, what: str, arguments: Sequence[str]) -> None:
    code, output, said = canvasrt("verify", *arguments, "--json")
    found: dict[str, Any] = {"exit_code": code}
    try:
        found["output"] = json.loads(output)
    except ValueError:
        found["output"] = output[-_KEPT:]
    record.note(**{what: found})
    if code != 0:
        record.fail(f"canvasrt verify of {what}", f"exit code {code}: {said.strip()[-_KEPT:] or 'it said nothing'}")


def canvasrt(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    command = [sys.executable, "-m", "canvasrt.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr
