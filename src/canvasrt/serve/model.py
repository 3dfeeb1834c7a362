"""Opens what is to be served: a checkpoint with its tokenizer and a runner, and how requests share it."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.staging import is_bundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import GenerationConfig
from canvasrt.errors import InputError
from canvasrt.runtime.open_bundle import BundleOptions, Hardware, open_bundle, weights_of
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.runtime.refit import Progress
from canvasrt.scheduler.types import Policy
from canvasrt.serve.intake import Served
from canvasrt.serve.settings import ServeSettings
from canvasrt.serve.tokenizer import TextCodec
from canvasrt.spec import ModelSpec

_DEFAULT_SLOTS, _DEFAULT_CONTEXT = 8, 8192


Opened = tuple[EngineRunner, Callable[[], None]]  # and what to do when nothing runs any more


@dataclass(frozen=True, slots=True)
class OpenModel:
    runner: EngineRunner
    served: Served
    policy: Policy
    close: Callable[[], None]  # when nothing runs any more: keeps what the next start can use

    @property
    def context(self) -> int:
        return self.served.context


def _nothing() -> None:
    pass


def _quiet(what: str, done: int, whole: int) -> None:
    pass


def open_served(settings: ServeSettings, context: int) -> Served:
    """What requests are checked against and texts are made with: neither weights nor torch."""
    folder = Path(settings.model)
    codec = TextCodec.load(folder) if (folder / "tokenizer.json").is_file() else None
    return Served(ModelSpec.load(folder), GenerationConfig.load(folder), context, codec)


def check_model(settings: ServeSettings) -> None:
    """Raises what is wrong with the folder and its settings before a server is started for it: reads no weights."""
    folder = Path(settings.model)
    if not is_bundle(folder):
        Checkpoint.open(folder)
        return
    bundle = EngineBundle.open(folder, "sizes")
    bundle.check_servable()
    shapes = bundle.manifest.shapes
    if settings.context not in (None, shapes.context):
        raise InputError(
            f"bundle {folder} was built for a context of {shapes.context} tokens, which no setting changes: leave out "
            f"context={settings.context}, or build it again with --context {settings.context}"
        )
    if settings.canvases is not None and settings.canvases > shapes.canvases:
        raise InputError(
            f"bundle {folder} denoises at most {shapes.canvases} canvases in a call: set canvases to that or less, or "
            f"build it again with --canvases {settings.canvases}"
        )
    weights_of(bundle, _path(settings.checkpoint))


def open_model(settings: ServeSettings, progress: Progress = _quiet, hardware: Hardware | None = None) -> OpenModel:
    """Raises CheckpointError or BundleError for a folder that can't be served, CapacityError where memory is short.

    ``progress`` hears what is loaded, bytes done and bytes in all. ``hardware``: for tests, in place of a GPU.
    """
    check_model(settings)
    folder = Path(settings.model)
    runner, close = (
        _open_bundle(settings, progress, hardware) if is_bundle(folder) else (_open_checkpoint(settings), _nothing)
    )
    limits = runner.limits
    served = open_served(settings, limits.context)
    policy = Policy(
        canvases=settings.canvases or limits.canvases or limits.slots,
        prefill_tokens=settings.prefill_tokens or limits.chunk,
        max_waiting=settings.max_waiting,
        patience=settings.patience,
        reuse_prefixes=settings.reuse_prefixes,
    )
    gc.collect()
    gc.freeze()  # else every full collection looks through all that torch and transformers made, and stops the loop
    return OpenModel(runner, served, policy, close)


def _open_bundle(settings: ServeSettings, progress: Progress, hardware: Hardware | None) -> Opened:
    options = BundleOptions(
        checkpoint=_path(settings.checkpoint),
        slots=settings.slots,
        cache=_path(settings.kernels),
        verify=settings.verify,
    )
    loaded = open_bundle(Path(settings.model), options, progress, hardware)
    return loaded.runner, loaded.keep_kernels


def _open_checkpoint(settings: ServeSettings) -> EngineRunner:
    checkpoint = Checkpoint.open(Path(settings.model))
    from canvasrt.runtime.torch_runner import TorchRunner, use_threads  # here: torch takes seconds to import

    # Each thread that calls torch has workers of its own, and where they are more than cores together, all of them
    # sleep between any two kernels instead of spinning: five times slower. The thread that loads must have none.
    use_threads(1)
    runner = TorchRunner(
        checkpoint,
        settings.device,
        settings.dtype,
        slots=settings.slots or _DEFAULT_SLOTS,
        context=settings.context or min(checkpoint.spec.max_context, _DEFAULT_CONTEXT),
        exact=settings.exact,
    )
    # One core for Triton and the threads around the runner: its own wait for each other, and for a core, at every step.
    use_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    return runner


def _path(folder: str | None) -> Path | None:
    return None if folder is None else Path(folder)
