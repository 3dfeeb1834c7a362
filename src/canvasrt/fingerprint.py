"""Which checkpoint this is, told without reading all of it: an engine may only be filled from the one it was built for.

Two hashes. ``layout``: config.json and where which tensor lies; it differs for another model, quantization or
sharding. ``content``: samples of the bytes; it differs for another fine-tune of the same model, unless that changed
so few bytes (below about a thousandth) that the samples miss them. Knows nothing of what a tensor means.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvasrt.errors import CheckpointError
from canvasrt.tensorfile import AGAIN, TensorInfo, read_folder

_CONFIGS = ("config.json", "hf_quant_config.json")
_END_BYTES = 64 << 10  # at both ends of a file
_BLOCKS = 64  # evenly spaced, of
_BLOCK_BYTES = 4 << 10
_TENSORS = 1024  # at most, evenly picked of a file's: small ones lie between the blocks
_TENSOR_BYTES = 1 << 10  # from the middle of each


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """SHA-256 in hexadecimal; ``content`` is None where there were no weights to sample."""

    layout: str
    content: str | None


def fingerprint(folder: Path, *, weights: bool = True) -> Fingerprint:
    """Of a checkpoint folder; with ``weights`` false, of its configuration alone.

    Reads every header and at most about 2 MB of each file. Raises CheckpointError for a missing or damaged file.
    """
    tensors = read_folder(folder) if weights else {}
    files = sorted({info.file for info in tensors.values()})
    layout = {
        "configs": {name: _json(folder / name) for name in _CONFIGS if name == _CONFIGS[0] or (folder / name).exists()},
        "tensors": [_place(tensors[name]) for name in sorted(tensors)],
        "files": [[file.name, _size(file)] for file in files],
    }
    text = json.dumps(layout, sort_keys=True, separators=(",", ":"))
    content = _content(files, tensors) if weights else None
    return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), content)


def _place(info: TensorInfo) -> list[Any]:
    return [info.name, info.dtype, list(info.shape), info.file.name, info.offset, info.nbytes]


def _json(file: Path) -> Any:
    """Parsed, so that spacing and the order of keys do not matter."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}). {AGAIN}") from None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror}). {AGAIN}") from None


def _content(files: Sequence[Path], tensors: Mapping[str, TensorInfo]) -> str:
    digest = hashlib.sha256()
    for file in files:
        own = sorted((info.offset, info.nbytes) for info in tensors.values() if info.file == file)
        try:
            for stretch in _stretches(file, own):
                digest.update(hashlib.sha256(stretch).digest())
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read ({error.strerror}). {AGAIN}") from None
    return digest.hexdigest()


def _stretches(file: Path, tensors: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The samples of one file, in the order of ``_samples``."""
    handle = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        for offset, nbytes in sorted(_samples(size, tensors)):
            stretch = os.pread(handle, nbytes, offset)
            if len(stretch) < nbytes:
                raise CheckpointError(f"{file}: cut off while it was read. {AGAIN}")
            yield stretch
    finally:
        os.close(handle)


def _samples(size: int, tensors: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is read of a file of ``size`` bytes with these tensors (offset, bytes)."""
    ends = min(_END_BYTES, size)
    yield 0, ends
    yield size - ends, ends
    block = min(_BLOCK_BYTES, size)
    for index in range(_BLOCKS):
        yield (size - block) * index // _BLOCKS, block
    picked = min(_TENSORS, len(tensors))
    for index in range(picked):
        offset, nbytes = tensors[index * len(tensors) // picked]
        sample = min(_TENSOR_BYTES, nbytes)
        yield offset + (nbytes - sample) // 2, sample
