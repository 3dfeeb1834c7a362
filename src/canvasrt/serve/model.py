"""Opens what is to be served: a checkpoint with its tokenizer and a runner, and how requests share it."""

import gc
import os
from dataclasses import dataclass
from pathlib import Path

from canvasrt.bundle.staging import is_bundle
from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import GenerationConfig
from canvasrt.errors import BundleError
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.scheduler.types import Policy
from canvasrt.serve.intake import Served
from canvasrt.serve.settings import ServeSettings
from canvasrt.serve.tokenizer import TextCodec

_DEFAULT_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class OpenModel:
    runner: EngineRunner
    served: Served
    policy: Policy

    @property
    def context(self) -> int:
        return self.served.context


def open_served(settings: ServeSettings, context: int) -> Served:
    """What requests are checked against and texts are made with: neither weights nor torch."""
    folder = Path(settings.model)
    codec = TextCodec.load(folder) if (folder / "tokenizer.json").is_file() else None
    return Served(Checkpoint.open(folder).spec, GenerationConfig.load(folder), context, codec)


def open_model(settings: ServeSettings) -> OpenModel:
    """Raises CheckpointError or BundleError for a folder that can't be served, CapacityError where memory is short."""
    folder = Path(settings.model)
    if is_bundle(folder):
        raise BundleError(
            f"{folder} is an engine bundle, and this version has no runner for engines yet: serve the checkpoint that "
            "it was built from, on a CPU"
        )
    checkpoint = Checkpoint.open(folder)
    spec = checkpoint.spec
    from canvasrt.runtime.torch_runner import TorchRunner, use_threads  # here: torch takes seconds to import

    # Each thread that calls torch has workers of its own, and where they are more than cores together, all of them
    # sleep between any two kernels instead of spinning: five times slower. The thread that loads must have none.
    use_threads(1)
    runner = TorchRunner(
        checkpoint,
        settings.device,
        settings.dtype,
        slots=settings.slots,
        context=settings.context or min(spec.max_context, _DEFAULT_CONTEXT),
        exact=settings.exact,
    )
    served = open_served(settings, runner.limits.context)
    policy = Policy(
        canvases=settings.canvases or runner.limits.slots,
        prefill_tokens=settings.prefill_tokens or runner.limits.chunk,
        max_waiting=settings.max_waiting,
        patience=settings.patience,
        reuse_prefixes=settings.reuse_prefixes,
    )
    # One core for Triton and the threads around the runner: its own wait for each other, and for a core, at every step.
    use_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    gc.collect()
    gc.freeze()  # else every full collection looks through all that torch and transformers made, and stops the loop
    return OpenModel(runner, served, policy)
