"""A source becomes a folder on the volume: listed, fetched beside its place, checked byte by byte, then renamed.

What is whole in an unfinished folder is not fetched again. Knows the sources' common shape, not their protocols.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from pydantic import Field

from canvasrt.bundle.reader import EngineBundle
from canvasrt.bundle.staging import sync_folder
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import BundleError, InputError, ServerError
from canvasrt.pipeline import transfer as t
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
from canvasrt.pipeline.settings import Pipeline, Source, Verify
from canvasrt.pipeline.steps import WHOLE, State, Step, Tools
from canvasrt.settings import Settings

Connect = Callable[[Source, Pipeline, t.Credentials, t.Kind], t.Origin]
_REPORT_SECONDS = 10.0


class Journal(Settings):
    """Of an unfinished fetch: what its files are of."""

    source: str
    revision: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class Fetch:
    """A Step."""

    needs: Step | None = None

    def __init__(self, pipeline: Pipeline, source: Source, folder: Path, kind: t.Kind) -> None:
        self._pipeline, self._source, self._kind = pipeline, source, kind
        self.folder = folder
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._journal = folder.with_name(f"{folder.name}.partial.json")

    @property
    def made_from(self) -> dict[str, str | None]:
        return {
            "source": self._source.text,
            "endpoint": self._pipeline.s3.endpoint if self._source.scheme == "s3" else None,
        }

    def state(self, verify: Verify) -> State:
        if not self.folder.exists():
            return State("missing", "is not there")
        receipt = read_receipt(receipt_file(self.folder))
        if receipt is None:
            return State(
                "foreign",
                f"is there without {receipt_file(self.folder).name}, so where it is from can't be told: remove it, or "
                "name it as a source of its own",
            )
        if differs := difference(receipt.made_from, self.made_from):
            return State("other", f"was fetched from another place: {differs}")
        faults = receipt.faults(self.folder, verify)
        if not faults and self._kind == "bundle":
            self._check_fit(EngineBundle.open(self.folder, "sizes"))
        return State("broken", "; ".join(f"{name} {fault}" for name, fault in faults.items())) if faults else WHOLE

    def make(self, tools: Tools, lock: Lock, state: State) -> None:
        origin = self._connect(tools)
        with t.disk_errors(self._partial):
            if state.kind == "broken":
                self._take_apart()
            self._partial.mkdir(parents=True, exist_ok=True)

        def run() -> None:
            self._fetch(origin, tools)

        try:
            t.with_retries(run, lambda: t.bytes_of_files(self._partial), tools.say, tools.clock)
        finally:
            origin.close()

    def _connect(self, tools: Tools) -> t.Origin:
        connect: Connect
        if self._source.scheme == "hf":  # each library takes a second to import, and may be missing
            from canvasrt.pipeline.hub import connect
        elif self._source.scheme == "s3":
            from canvasrt.pipeline.s3 import connect
        else:
            from canvasrt.pipeline.oci import connect
        return connect(self._source, self._pipeline, tools.credentials, self._kind)

    def _take_apart(self) -> None:
        """A damaged product becomes an unfinished one: what is whole of it stays, at the same revision."""
        receipt = read_receipt(receipt_file(self.folder))
        assert receipt is not None  # else it is not ours
        t.remove(self._partial)
        versions = {name: entry.version or "" for name, entry in receipt.files.items()}
        self._write(Journal(source=self._source.text, revision=receipt.revision, versions=versions))
        bad = receipt.faults(self.folder, "full")
        os.rename(self.folder, self._partial)
        for name in bad:
            t.remove(self._partial / name)

    def _fetch(self, origin: t.Origin, tools: Tools) -> None:
        journal = self._read()
        listing = origin.listing(journal.revision)
        t.check_listing(self._source.text, self._kind, listing)
        versions = {file.name: file.version for file in listing.files}
        with t.disk_errors(self._partial):
            for path in self._partial.iterdir():  # of another revision, or not of this source
                name = path.name.removesuffix(t.PART)
                if name not in versions or journal.versions.get(name) != versions[name]:
                    t.remove(path)
            self._write(Journal(source=self._source.text, revision=listing.revision, versions=versions))
        missing = tuple(file for file in listing.files if not self._has(file))
        t.check_room(self._partial, listing)
        total = sum(file.nbytes for file in listing.files)
        there = total - sum(file.nbytes for file in missing)
        tools.say(
            f"fetching {self._source.text}: {len(missing)} of {len(listing.files)} files, {size(total - there)} of "
            f"{size(total)} are missing"
        )
        if missing:
            with Reports(tools.say, f"fetching {self._source.text}", self._partial, total):
                origin.download(listing, missing, self._partial)
        self._finish(listing, tools)

    def _has(self, file: t.RemoteFile) -> bool:
        path = self._partial / file.name
        return path.is_file() and path.stat().st_size == file.nbytes

    def _finish(self, listing: t.Listing, tools: Tools) -> None:
        names = [file.name for file in listing.files]
        tools.say(f"checking {size(sum(file.nbytes for file in listing.files))} of {self.folder.name}")
        hashes = hash_files(self._partial, names)
        bad = [file.name for file in listing.files if not _is_right(self._partial / file.name, file, hashes)]
        if bad:
            for name in bad:
                t.remove(self._partial / name)
            raise ServerError(f"{', '.join(bad)} of {self._source.text} arrived with another SHA-256 than published")
        self._check_content()
        files = {
            file.name: Entry(sha256=hashes[file.name], nbytes=file.nbytes, version=file.version)
            for file in listing.files
        }
        with t.disk_errors(self.folder):
            t.remove(self._partial / ".cache")
            for name in names:
                sync(self._partial / name)
            sync_folder(self._partial)
            made_from = {key: value for key, value in self.made_from.items() if value is not None}
            t.remove(self.folder)  # of another source, or nothing
            write_receipt(
                receipt_file(self.folder), Receipt(made_from=dict(made_from), revision=listing.revision, files=files)
            )
            os.rename(self._partial, self.folder)
            sync_folder(self.folder.parent)
            self._journal.unlink(missing_ok=True)

    def _check_content(self) -> None:
        """Raises CheckpointError or BundleError for files that all arrived and are no checkpoint or bundle."""
        if self._kind == "checkpoint":
            Checkpoint.open(self._partial)
        else:
            self._check_fit(EngineBundle.open(self._partial, "full"))

    def _check_fit(self, bundle: EngineBundle) -> None:
        """Raises BundleError for a bundle that is not for this pipeline's GPU, or without the weights it promises."""
        bundle.check_servable()
        profile = self._pipeline.gpu_profile()
        wanted, target = profile.facts.compute_capability, bundle.manifest.target
        if wanted is not None and wanted.value != target.compute_capability:
            raise BundleError(
                f"{self._source.text} was built for {target.profile} ({target.compute_capability}), and profile "
                f"{profile.name} is {wanted.value}: name the bundle of this GPU, or the profile of that one"
            )
        if bundle.manifest.needs_checkpoint and self._pipeline.bundle and self._pipeline.bundle.weights == "inside":
            raise BundleError(
                f"{self._source.text} has no weights inside: say bundle.weights: stripped, and checkpoint.source"
            )

    def _read(self) -> Journal:
        try:
            journal = Journal.model_validate_json(self._journal.read_bytes())
        except (OSError, ValueError):
            return Journal(source=self._source.text)
        return journal if journal.source == self._source.text else Journal(source=self._source.text)

    def _write(self, journal: Journal) -> None:
        partial = self._journal.with_name(f"{self._journal.name}.new")
        partial.write_text(journal.model_dump_json(), encoding="utf-8")
        os.replace(partial, self._journal)


class Reports(AbstractContextManager["Reports"]):
    """A line every ten seconds: how much of ``total`` bytes has come to a folder."""

    def __init__(self, say: t.Say, what: str, folder: Path, total: int, seconds: float = _REPORT_SECONDS) -> None:
        self._say, self._what, self._folder, self._total, self._seconds = say, what, folder, total, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Reports":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        before = t.bytes_in(self._folder)
        while not self._done.wait(self._seconds):
            now = t.bytes_in(self._folder)
            share = min(now / self._total, 1.0) if self._total else 1.0
            speed = max(now - before, 0) / self._seconds
            self._say(f"{self._what}: {share:.0%}, {size(now)} of {size(self._total)}, {size(int(speed))}/s")
            before = now


def size(nbytes: int) -> str:
    """For people, of 10**6 or 10**9."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def sync(file: Path) -> None:
    """Makes a file's content survive a power cut before its name tells that it is whole."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_right(path: Path, file: t.RemoteFile, hashes: dict[str, str]) -> bool:
    if not hashes[file.name] or path.stat().st_size != file.nbytes:
        return False
    kind, _, digest = (file.digest or "").partition(":")
    if kind == "sha256":
        return hashes[file.name] == digest
    if kind == "git":  # how git names the content of a file
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == digest
    if kind:
        raise InputError(f"{file.name} has a digest of the unknown kind {kind!r}")
    return True
