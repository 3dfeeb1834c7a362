"""Writing a bundle: every file hashed on its way to the disk, nothing under the final name before all is complete.

    with BundleWriter(out, force=False, expected_bytes=plan_bytes) as bundle:
        bundle.copy_model_files(checkpoint)
        with bundle.create("text.engine") as file:
            ...  # file.write(data), or file.sink as the callback of a compiler
        bundle.finish(manifest)

Knows nothing of how an engine is made.
"""

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol

from canvasrt.bundle.manifest import MANIFEST, FileEntry, Manifest
from canvasrt.bundle.staging import Staging, disk_error, disk_errors, free_bytes
from canvasrt.errors import BundleError, CapacityError, CheckpointError

_BLOCK_BYTES = 1 << 20
# What the serve side reads of a checkpoint besides its weights. Only the first has to be there.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def model_files(checkpoint: Path) -> dict[str, str]:
    """The files that a bundle takes from a checkpoint, and the SHA-256 of each: they decide what a bundle is, too."""
    there = [checkpoint / name for name in _MODEL_FILES if (checkpoint / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in there}


class Data(Protocol):
    """Anything that memoryview takes: bytes, an array, what a compiler hands to a stream."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class BundleFile:
    """One file of a bundle being written. A context manager, `write` and `sink` in between; a failure removes it."""

    def __init__(self, path: Path, expected_bytes: int | None, on_close: Callable[[str, FileEntry], None]) -> None:
        self._path, self._expected, self._on_close = path, expected_bytes, on_close
        self._hash = hashlib.sha256()
        self._failure: BaseException | None = None
        self._handle = -1
        self.nbytes = 0  # written so far

    def write(self, data: Data) -> int:
        """All of ``data``, and its length. Raises CapacityError when the disk is full."""
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            try:
                written = os.write(self._handle, view[:_BLOCK_BYTES])
            except OSError as error:
                more = len(view) if self._expected is None else max(self._expected - self.nbytes, len(view))
                raise disk_error(error, self._path, more) from None
            self._hash.update(view[:written])
            self.nbytes += written
            view = view[written:]
        return total

    def sink(self, data: Data) -> int:
        """As `write`, for a compiler's callback: where C++ is the caller nothing may be raised, Ctrl-C included.

        Returns 0 from the first failure on, and leaving the file's context raises it.
        """
        try:
            return 0 if self._failure is not None else self.write(data)
        except BaseException as failure:
            self._failure = failure
            return 0

    def __enter__(self) -> "BundleFile":
        # Unbuffered: an error belongs to the write that met it, and engines come in large pieces.
        with disk_errors(self._path):
            self._handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises what `sink` met, also in place of the error that a compiler raises after it."""
        try:
            self._close(error)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        if error is None:
            self._on_close(self._path.name, FileEntry(sha256=self._hash.hexdigest(), nbytes=self.nbytes))
        else:
            self._path.unlink(missing_ok=True)

    def _close(self, error: BaseException | None) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            if error is None:
                with disk_errors(self._path):
                    os.fsync(self._handle)
        finally:
            with disk_errors(self._path):  # a network file system may tell only now
                os.close(self._handle)


class BundleWriter:
    """A bundle in the making, beside ``target``. What is not finished when the context ends is removed.

    Raises on entering: BundleError for a target that is taken, not a bundle, or being built by somebody else;
    CapacityError when the disk has less than ``expected_bytes``.
    """

    def __init__(self, target: Path, *, force: bool = False, expected_bytes: int | None = None) -> None:
        self.target = target
        self._expected = expected_bytes
        self._staging = Staging(target, force)
        self._files: dict[str, FileEntry] = {}

    @property
    def folder(self) -> Path:
        """Where the files lie until the bundle is finished."""
        return self._staging.folder

    def __enter__(self) -> "BundleWriter":
        try:
            with disk_errors(self.target):
                self._staging.open()
                free = free_bytes(self.folder)
                if self._expected is not None and free < self._expected:
                    raise CapacityError(
                        f"can't write {self.target}: {self._expected:,} bytes are needed and {free:,} are free on that "
                        "disk. Make room, or name a target on another disk"
                    )
        except BaseException:
            self._staging.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._staging.discard()
        except OSError as left:
            if error is None:  # else the first error matters; the next build of this target cleans up
                raise BundleError(f"{self.folder} can't be removed, remove it: {left.strerror or left}") from None

    def create(self, name: str, expected_bytes: int | None = None) -> BundleFile:
        """A new file; ``expected_bytes`` only serves the message of a full disk."""
        if name in (MANIFEST, *self._files):
            raise ValueError(f"{name} is written once")
        return BundleFile(self.folder / name, expected_bytes, self._files.__setitem__)

    def write(self, name: str, content: bytes) -> None:
        with self.create(name) as file:
            file.write(content)

    def copy(self, source: Path, name: str | None = None) -> None:
        """A copy of a file, under its own name if no other is given."""
        try:
            with source.open("rb") as stream, self.create(name or source.name, source.stat().st_size) as file:
                while block := stream.read(_BLOCK_BYTES):
                    file.write(block)
        except OSError as error:  # writing raises ours
            raise CheckpointError(f"{source}: can't be copied into the bundle: {error.strerror or error}") from None

    def copy_model_files(self, checkpoint: Path) -> None:
        """config.json, generation_config.json, tokenizer and chat template, as far as the checkpoint has them."""
        for name in _MODEL_FILES:
            if name == "config.json" or (checkpoint / name).exists():
                self.copy(checkpoint / name)

    def finish(self, manifest: Manifest) -> Manifest:
        """Writes the manifest with hashes and time filled in, and gives the bundle its name."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whole = manifest.model_copy(update={"files": dict(self._files), "created": now})
        content = whole.to_bytes()
        checked = Manifest.model_validate_json(content)
        if faults := checked.faults():
            raise BundleError(f"{self.target} would contradict itself: {'; '.join(faults)}")
        with BundleFile(self.folder / MANIFEST, None, lambda name, entry: None) as file:
            file.write(content)
        with disk_errors(self.target):
            self._staging.publish()
        return checked
