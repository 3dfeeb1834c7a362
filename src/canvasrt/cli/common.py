"""What the commands share: argument types, opening a checkpoint with a sign of life, request states from prompts."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import GenerationConfig, RequestOptions, RequestParams, resolve
from canvasrt.errors import CapacityError
from canvasrt.runtime.open_bundle import BundleOptions, Loaded, open_bundle
from canvasrt.spec import ModelSpec

if TYPE_CHECKING:
    from canvasrt.runtime.torch_runner import TorchRunner

CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a DiffusionGemma checkpoint.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Round a quantized checkpoint's activations too, as a GPU engine does; slower.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

errors = Console(stderr=True)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Shows that something takes a while, on a terminal only."""
    with errors.status(message):
        yield


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        # Its own handle of the stream: ModelOpt's chatter is silenced by redirecting sys.stderr, and this must go on.
        console=Console(file=sys.stderr),
        transient=True,
        disable=not errors.is_terminal,  # elsewhere it would only leave empty lines
    )


def open_runner(
    checkpoint: Checkpoint, device: str, dtype: str, slots: int, context: int | None, needed: int, exact: bool = False
) -> "TorchRunner":
    """A runner with ``context`` tokens a slot; by default just what the requests need.

    Raises CapacityError when ``needed`` tokens exceed the context that was asked for or the model's.
    """
    canvas, most = checkpoint.spec.canvas_length, checkpoint.spec.max_context
    if context is not None and needed > context:
        raise CapacityError(f"these requests need a context of {needed} tokens and --context is {context}")
    from canvasrt.runtime.torch_runner import TorchRunner  # here: torch takes seconds to import, and may be missing

    wanted = context or min(max(needed, 2 * canvas), most)
    with working(f"loading {checkpoint.folder}"):
        return TorchRunner(checkpoint, device, dtype, slots=slots, context=wanted, exact=exact)


def open_engine(bundle: Path, options: BundleOptions) -> Loaded:
    """A bundle's engine on this machine's GPU, with a progress bar. Raises as `open_bundle`."""
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}

        def told(part: str, done: int, whole: int) -> None:
            if part not in tasks:
                tasks[part] = progress.add_task(f"loading {part}", total=whole)
            progress.update(tasks[part], completed=done)

        loaded = open_bundle(bundle, options, told)
    for warning in loaded.warnings:
        typer.echo(f"warning: {warning}", err=True)
    return loaded


def free_memory(device: str) -> int:
    """Bytes that are free on the CPU's side or on the GPU."""
    from canvasrt.runtime.torch_runner import available_bytes, torch_device

    return available_bytes(torch_device(device))


def params_for(
    spec: ModelSpec, config: GenerationConfig, options: RequestOptions, prompt: NDArray[np.int32], context: int
) -> RequestParams:
    return resolve(
        config,
        options,
        eos_token_ids=spec.eos_token_ids,
        canvas=spec.canvas_length,
        vocabulary=spec.vocab_size,
        prompt_tokens=len(prompt),
        context=context,
    )


def context_for(prompts: Sequence[NDArray[np.int32]], params: Sequence[RequestParams]) -> int:
    """Context tokens that the longest of these requests takes: a cut canvas takes its whole length too."""
    return max(
        len(prompt) + -(-each.max_tokens // each.canvas) * each.canvas
        for prompt, each in zip(prompts, params, strict=True)
    )
