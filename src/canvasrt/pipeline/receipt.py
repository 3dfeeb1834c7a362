"""What lies beside a product: what it was made from, and size and SHA-256 of each of its files.

Written whole or not at all. Knows nothing of how a product is made.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, ValidationError

from canvasrt import __version__
from canvasrt.bundle.staging import sync_folder
from canvasrt.pipeline.settings import Verify
from canvasrt.settings import Settings

_THREADS = 4  # that hash; it releases Python's lock
MadeFrom = Mapping[str, JsonValue]


class Entry(Settings):
    """Of one file; ``version`` is what its source calls this content, such as an ETag."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    nbytes: Annotated[int, Field(ge=0)]
    version: str | None = None


class Receipt(Settings):
    format_version: Literal[1] = 1
    made_from: dict[str, JsonValue]
    revision: str | None = None  # what of the source was fetched: a commit, a manifest's digest
    canvasrt: str = __version__
    made_at: str = ""
    files: dict[str, Entry] = Field(default_factory=dict)  # none for a bundle built here: its manifest has them

    def faults(self, folder: Path, verify: Verify) -> dict[str, str]:
        """File names and what is wrong with them."""
        found = {name: fault for name, entry in self.files.items() if (fault := _size_fault(folder / name, entry))}
        if verify == "full":
            hashes = hash_files(folder, [name for name in self.files if name not in found])
            changed = [name for name, sha256 in hashes.items() if sha256 != self.files[name].sha256]
            found |= dict.fromkeys(changed, "has another SHA-256 than its receipt says: its content changed")
        return found


def receipt_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.receipt.json")


def read_receipt(file: Path) -> Receipt | None:
    """None where there is none, or one that this version can't read."""
    try:
        return Receipt.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def write_receipt(file: Path, receipt: Receipt) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    content = receipt.model_copy(update={"made_at": now}).model_dump(mode="json")
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    sync_folder(file.parent)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file; an empty text for one that can't be read."""
    listed = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(listed, pool.map(lambda name: _sha256(folder / name), listed), strict=True))


def difference(found: MadeFrom, wanted: MadeFrom) -> str | None:
    """What differs, for people; a wanted None is not known, and so differs from nothing."""
    for key, value in wanted.items():
        if value is not None and found.get(key) != value:
            return f"{key} {_short(found.get(key))}, and {_short(value)} is wanted"
    return None


def _short(value: JsonValue) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _size_fault(file: Path, entry: Entry) -> str | None:
    try:
        nbytes = file.stat().st_size
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None if nbytes == entry.nbytes else f"has {nbytes:,} bytes, its receipt says {entry.nbytes:,}"


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
