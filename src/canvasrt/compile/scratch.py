"""Weights that the compiler points to while it works, kept in a file instead of in memory.

Experts lie apart in most checkpoints and together in an engine. The system may drop pages of a file and read them
again, so a build needs little more memory than its largest weight.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from canvasrt.bundle.staging import disk_error
from canvasrt.engine_weights import ALIGNMENT, Bytes, aligned

_ALIGNMENT = 64
_IN_MEMORY = 1 << 16  # smaller weights are not worth a page


class Scratch:
    """A nameless file in ``folder``, gone when the process is; a context manager. Views of it outlive `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, prefix="weights-")  # noqa: SIM115  # closed by close
        self._end = 0

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def kept(self, data: Bytes) -> Bytes:
        """``data`` where it stays valid and aligned: itself where it is already part of a mapped file, or small.

        Raises CapacityError when the disk is full.
        """
        if data.nbytes <= _IN_MEMORY:
            return aligned(data)
        if data.ctypes.data % ALIGNMENT == 0 and _is_mapped(data):
            return data
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        try:
            view = np.ascontiguousarray(data).reshape(-1).data
            place = start
            while view:
                written = os.pwrite(self._file.fileno(), view[: 1 << 26], place)
                view, place = view[written:], place + written
        except OSError as error:
            raise disk_error(error, self._folder, needed_bytes=data.nbytes) from None
        self._end = start + data.nbytes
        return np.memmap(self._file, np.uint8, mode="r", offset=start, shape=(data.nbytes,)).view(np.ndarray)


def _is_mapped(data: Bytes) -> bool:
    base: object = data
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False
