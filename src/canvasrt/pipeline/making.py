"""The stages that compute: quantize and build, each as a child process of our own command line.

A child gives all its memory back, and torch and NVIDIA's compilers never enter this process. Knows nothing of how
weights are quantized or engines built.
"""

import hashlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from canvasrt.bundle.manifest import Manifest
from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.staging import is_bundle, sync_folder
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import BundleError, CapacityError, CheckpointError, InputError, ServerError
from canvasrt.fingerprint import Fingerprint, fingerprint
from canvasrt.inputs import input_folder
from canvasrt.pipeline import transfer as t
from canvasrt.pipeline.fetch import sync
from canvasrt.pipeline.lock import Lock
from canvasrt.pipeline.receipt import (
    Entry,
    Receipt,
    difference,
    hash_files,
    read_receipt,
    receipt_file,
    write_receipt,
)
from canvasrt.pipeline.settings import BundlePart, Pipeline, QuantizePart, Verify
from canvasrt.pipeline.steps import WHOLE, State, Step, Tools

_EXIT_INPUT, _EXIT_CAPACITY = 2, 3
_LIBRARIES = {
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
}


class Quantize:
    """A Step: a checkpoint in a recipe's format."""

    def __init__(self, part: QuantizePart, needs: Step, source: str, folder: Path) -> None:
        self._part, self._source = part, source
        self.needs: Step | None = needs
        self._checkpoint = needs.folder
        self.folder = folder
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._journal = folder.with_name(f"{folder.name}.partial.json")

    @property
    def made_from(self) -> dict[str, JsonValue]:
        """What is not known, since the checkpoint is not there any more, is None."""
        found = fingerprint_of(self._checkpoint)
        return {
            "source": self._source,
            "fingerprint": None if found is None else [found.layout, found.content],
            "recipe": self._part.recipe,
            "recipe_sha256": _recipe_sha256(self._part.recipe),
            "samples": self._part.samples,
        }

    def state(self, verify: Verify) -> State:
        if not self.folder.exists():
            return State("missing", "is not there")
        receipt = read_receipt(receipt_file(self.folder))
        if receipt is None:
            return State("foreign", f"is there without {receipt_file(self.folder).name}, so it is not ours: remove it")
        if differs := difference(receipt.made_from, self.made_from):
            return State("other", f"was quantized from something else: {differs}")
        faults = receipt.faults(self.folder, verify)
        return State("broken", "; ".join(f"{name} {fault}" for name, fault in faults.items())) if faults else WHOLE

    def make(self, tools: Tools, lock: Lock, state: State) -> None:
        wanted = Receipt(made_from=self.made_from)
        made = self._partial / "checkpoint"
        with t.disk_errors(self._partial):
            if not self._goes_on(wanted):
                t.remove(self._partial)
                self._partial.mkdir(parents=True)
                write_receipt(self._journal, wanted)
        if not made.exists():
            # No report: it needs source and result in memory at once. `canvasrt verify --source` writes one.
            command = ["quantize", str(self._checkpoint), "--recipe", self._part.recipe, "--out", str(made)]
            command += ["--device", self._part.device, "--no-report"]
            command += [] if self._part.samples is None else ["--samples", str(self._part.samples)]
            run_child("quantize", command, tools, lock, self._partial)
        Checkpoint.open(made)
        names = sorted(file.name for file in made.iterdir() if file.is_file())
        tools.say(f"checking {self.folder.name}")
        hashes = hash_files(made, names)
        files = {name: Entry(sha256=hashes[name], nbytes=(made / name).stat().st_size) for name in names}
        with t.disk_errors(self.folder):
            for name in names:
                sync(made / name)
            sync_folder(made)
            t.remove(self.folder)
            write_receipt(receipt_file(self.folder), wanted.model_copy(update={"files": files}))
            os.rename(made, self.folder)
            sync_folder(self.folder.parent)
            t.remove(self._partial)
            self._journal.unlink(missing_ok=True)

    def _goes_on(self, wanted: Receipt) -> bool:
        """Whether what is unfinished there is of the same inputs: a calibration, or all of it."""
        journal = read_receipt(self._journal)
        return self._partial.is_dir() and journal is not None and journal.made_from == wanted.made_from


class Build:
    """A Step: a bundle of engines."""

    def __init__(self, pipeline: Pipeline, part: BundlePart, needs: Step, source: str, folder: Path) -> None:
        self._pipeline, self._part, self._source = pipeline, part, source
        self.needs: Step | None = needs
        self._checkpoint = needs.folder
        self.folder = folder

    @property
    def made_from(self) -> dict[str, JsonValue]:
        made = self._pipeline.quantize
        recipe: list[JsonValue] = [] if made is None else [made.recipe, made.samples]
        return {"source": self._source, "quantize": recipe}

    def state(self, verify: Verify) -> State:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return State("missing", "is not there")
        receipt = read_receipt(receipt_file(self.folder))
        if not is_bundle(self.folder) and receipt is None:
            return State("foreign", "holds other files and is no bundle: remove it, or choose another bundle.name")
        try:
            manifest = EngineBundle.open(self.folder, "sizes").manifest
            if differs := stale(self.needs) or self._differs(manifest, receipt):
                return State("other", differs)
            if verify == "full":
                EngineBundle.open(self.folder, "full")
        except BundleError as error:
            return State("broken", f"is damaged: {error}")
        return WHOLE

    def _differs(self, manifest: Manifest, receipt: Receipt | None) -> str | None:
        profile = self._pipeline.gpu_profile()
        found = fingerprint_of(self._checkpoint)
        identity = manifest.checkpoint
        if found is not None and (identity.layout, identity.content) != (found.layout, found.content):
            return f"was built from another checkpoint than {self._checkpoint}"
        if found is None:  # only the receipt tells: the checkpoint is not kept
            if receipt is None:
                return f"has no {receipt_file(self.folder).name}, and {self._checkpoint} is not there to compare with"
            if differs := difference(receipt.made_from, self.made_from):
                return f"was built from another checkpoint: {differs}"
        if manifest.profile != profile.model_dump(mode="json"):
            return f"was built for another profile, or another edition of it: {manifest.target.profile}"
        if manifest.weights != self._part.weights:
            return f"has its weights {manifest.weights}, and {self._part.weights} is wanted"
        if manifest.options != self._part.options():
            return f"was built with the options {manifest.options}, and {self._part.options()} are wanted"
        compiler = manifest.compiler
        installed = _installed(compiler.name)
        if installed not in (None, compiler.version):
            return f"was compiled by {compiler.name} {compiler.version}, and {installed} is installed"
        return None

    def make(self, tools: Tools, lock: Lock, state: State) -> None:
        command = ["build", "--checkpoint", str(self._checkpoint), "--profile", self._pipeline.profile]
        command += ["--out", str(self.folder), "--weights", self._part.weights]
        for name, value in self._part.options().items():
            command += [f"--{name}", str(value)]
        if is_bundle(self.folder):
            command.append("--force")
        else:
            t.remove(self.folder)  # empty, or ours by its receipt, with a manifest that is no longer one
        run_child("build", command, tools, lock, self.folder.with_name(f"{self.folder.name}.partial"))
        with t.disk_errors(self.folder):
            write_receipt(receipt_file(self.folder), Receipt(made_from=self.made_from))
        found = self.state("sizes")
        if found.kind != "whole":
            raise ServerError(f"{self.folder} was built, and {found.why}")


def run_child(what: str, arguments: list[str], tools: Tools, lock: Lock, watched: Path) -> None:
    """Our own command line. Raises CapacityError for exit code 3, InputError for 2, ServerError for others."""
    tools.say(f"{what}: canvasrt {' '.join(arguments)}")
    command = [sys.executable, "-m", "canvasrt.cli.main", *arguments]
    code = tools.children.run(what, command, tools.environment, lock.descriptor, watched)
    if code == 0:
        return
    said = f"{what} failed with exit code {code}; its lines above say why"
    if code == _EXIT_INPUT:
        raise InputError(said)
    if code == _EXIT_CAPACITY:
        raise CapacityError(said)
    if code < 0:
        likely = ": most likely the memory of this machine or container is too small" if code == -9 else ""
        raise ServerError(f"{what} was ended by signal {-code}{likely}. The next run goes on where it can")
    raise ServerError(said)


def stale(needs: Step | None) -> str | None:
    """Why what is made from a product is no longer what is wanted, although it may fit that product."""
    try:
        state = None if needs is None else needs.state("sizes")
    except CheckpointError:  # an input that is not kept here
        return None
    return f"its checkpoint {state.why}" if state is not None and state.kind == "other" else None


def fingerprint_of(folder: Path) -> Fingerprint | None:
    """None for a checkpoint that is not there, or not whole."""
    try:
        return fingerprint(folder)
    except CheckpointError:
        return None


def _recipe_sha256(recipe: str) -> str:
    """Raises InputError for a recipe that is not there."""
    own = Path(recipe).suffix in (".yaml", ".yml")
    file = Path(recipe) if own else input_folder("recipes") / f"{recipe}.yaml"
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"quantize.recipe {recipe}: {file.name} can't be read ({error.strerror})") from None


def _installed(compiler: str) -> str | None:
    """The version of the library that would run the engines; None where there is none, as on a machine that waits."""
    for name in _LIBRARIES[compiler]:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
