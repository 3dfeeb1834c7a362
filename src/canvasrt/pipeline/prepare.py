"""A pipeline from start to end: makes what is missing, each product once, or waits until somebody else has.

    for step in stages(pipeline): ensure(step)        # which first ensures what it needs

Knows nothing of how a stage makes its product.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from canvasrt.bundle.reader import EngineBundle
from canvasrt.errors import InputError, TimedOutError
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.fetch import Fetch
from canvasrt.pipeline.lock import Lock, Waiting
from canvasrt.pipeline.making import Build, Quantize
from canvasrt.pipeline.product import Product, layout, resolve
from canvasrt.pipeline.prune import note_use, prune
from canvasrt.pipeline.settings import Pipeline, load_pipeline, parse_source
from canvasrt.pipeline.steps import InPlace, State, Step, Tools

_POLL_SECONDS = 2.0


def stages(pipeline: Pipeline) -> tuple[Step, ...]:
    """What a server reads, in the order in which it is made; what is only built from is a step's ``needs``."""
    places = layout(pipeline)
    checkpoint: Step | None = None
    text = ""
    if pipeline.checkpoint is not None and places.checkpoint is not None:
        text = pipeline.checkpoint.source
        source = parse_source(text)
        in_place = source.scheme == "folder"
        checkpoint = (
            InPlace(places.checkpoint) if in_place else Fetch(pipeline, source, places.checkpoint, "checkpoint")
        )
        if pipeline.quantize is not None and places.quantized is not None:
            checkpoint = Quantize(pipeline.quantize, checkpoint, text, places.quantized)
    part = pipeline.bundle
    if places.bundle is None or part is None:
        assert checkpoint is not None  # load_pipeline refuses a pipeline without either
        return (checkpoint,)
    if part.source is not None:
        bundle: Step = Fetch(pipeline, parse_source(part.source), places.bundle, "bundle")
    else:
        assert checkpoint is not None
        bundle = Build(pipeline, part, checkpoint, text, places.bundle)
    # Without weights inside, the checkpoint comes first: a bundle that does not fit it is told by it.
    return (bundle,) if part.weights == "inside" or checkpoint is None else (checkpoint, bundle)


@dataclass(slots=True)
class Preparation:
    """``made`` lists the folders that were made, in that order."""

    pipeline: Pipeline
    tools: Tools
    waiting: Waiting
    made: list[Path] = field(default_factory=list)

    def run(self) -> Product:
        """Makes what is missing. Raises what stands in the way; a later run goes on from there."""
        for step in stages(self.pipeline):
            self._ensure(step)
        product = self._finished()
        note_use(product.model)
        if product.kernels is not None:
            with t.disk_errors(product.kernels):  # now: a server may be let write into it and not make it
                product.kernels.parent.mkdir(parents=True, exist_ok=True)
        return product

    def wait(self) -> Product:
        """Makes nothing. Raises TimedOutError when somebody else has not made it in time."""
        clock = self.waiting.clock
        began = told = clock.now()
        said = False
        refused: dict[Path, tuple[str, State]] = {}  # what was read to its end and found damaged, as it was then
        while True:
            faults = [fault for step in stages(self.pipeline) if (fault := self._unready(step, refused))]
            if not faults:
                return self._finished()
            now = clock.now()
            if self.waiting.timeout is not None and now - began >= self.waiting.timeout:
                raise TimedOutError(f"not prepared after {now - began:.0f} s: {faults[0]}")
            if not said or now - told >= self.waiting.every:
                self.waiting.say(f"waiting, {now - began:.0f} s so far: {faults[0]}")
                said, told = True, now
            clock.sleep(_POLL_SECONDS)

    def _ensure(self, step: Step) -> None:
        state = step.state(self.pipeline.verify)
        if state.kind == "whole":
            self.tools.say(f"{step.folder} is there and whole")
            return
        with Lock(step.folder, self.waiting) as lock:
            state = step.state(self.pipeline.verify)  # while we waited, somebody else may have made it
            if state.kind == "whole":
                self.tools.say(f"{step.folder} is there and whole, made by another process")
                return
            if state.kind == "foreign":
                raise InputError(f"{step.folder} {state.why}")
            if state.kind != "missing":
                self.tools.say(f"{step.folder} {state.why}. Making it again")
            if self.pipeline.keep is not None and step.folder == layout(self.pipeline).bundle:
                prune(step.folder, self.pipeline.keep, self.waiting)  # before: a full disk is why it is there
            if step.needs is not None:
                self._ensure(step.needs)
            step.make(self.tools, lock, state)
            self.made.append(step.folder)
            self.tools.say(f"{step.folder} is made")

    def _unready(self, step: Step, refused: dict[Path, tuple[str, State]]) -> str | None:
        state = step.state("sizes")
        if state.kind == "whole" and self.pipeline.verify == "full":
            now = _stamp(step.folder)
            seen, found = refused.get(step.folder, ("", state))
            state = found if seen == now else step.state("full")
            if state.kind != "whole":
                refused[step.folder] = now, state
        if state.kind == "foreign":
            raise InputError(f"{step.folder} {state.why}")
        return None if state.kind == "whole" else f"{step.folder} {state.why}"

    def _finished(self) -> Product:
        product = resolve(self.pipeline)
        if product.checkpoint is not None:  # a fetched bundle may be of another one
            EngineBundle.open(product.model, "sizes").check_checkpoint(product.checkpoint)
        return product


def prepared(file: Path) -> Product:
    """What a pipeline file leads to, for a server: files' sizes are looked at, and what they are made from.

    Raises InputError where it is not prepared yet, or from something else.
    """
    pipeline = load_pipeline(file)
    for step in stages(pipeline):
        state = step.state("sizes")
        if state.kind != "whole":
            raise InputError(f"not prepared yet: {step.folder} {state.why}. Prepare it: canvasrt prepare {file}")
    return resolve(pipeline)


def served(file: Path, given: list[str]) -> tuple[Path, list[str]]:
    """For ``canvasrt serve``: the model's folder, and the settings that it needs before those ``given``, which win."""
    product = prepared(file)
    settings = []
    if product.checkpoint is not None:
        settings.append(f"checkpoint={product.checkpoint}")
    if product.kernels is not None:
        with suppress(OSError):  # a folder that can't be made costs time at the next start, as the server's log says
            product.kernels.parent.mkdir(parents=True, exist_ok=True)
        settings.append(f"kernels={product.kernels}")
    return product.model, [*settings, *given]


def _stamp(folder: Path) -> str:
    """Changes when a product is replaced."""
    found = folder.stat()
    return f"{found.st_ino} {found.st_mtime_ns}"
