"""Inputs of calls on their way to the GPU: packed in pinned memory, one copy for each part that changed.

Two pinned blocks take turns, so that the next call is prepared while the last one's copy may still be under way. On the
GPU each shape range has a block for what a canvas's steps have in common and one for what changes with each; where a
tensor lies in its block depends on the sizes of the call alone, as captured graphs require.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from canvasrt.runtime.cuda_device import CudaDevice, Pinned
from canvasrt.runtime.engine_call import Arrays

ALIGNMENT = 256  # bytes; of what an engine reads
_BLOCKS = 2


@dataclass(slots=True)
class _Range:
    """Where the inputs of one shape range lie on the GPU."""

    constants: int
    step: int
    key: object = None  # of the constants that are there
    addresses: dict[str, int] = field(default_factory=dict)


class Staging:
    """``sizes``: bytes that a call of each shape range may have at most, for constants and for what changes."""

    def __init__(self, device: CudaDevice, sizes: dict[str, int]) -> None:
        self._device = device
        self._ranges = {
            name: _Range(device.allocate(nbytes), device.allocate(nbytes)) for name, nbytes in sizes.items()
        }
        most = 2 * max(sizes.values())
        self._ring = [(device.pinned(most), device.event()) for _ in range(_BLOCKS)]
        self._turn = 0
        self.uploaded = 0  # bytes, ever

    def send(self, shape_range: str, key: object, constants: Callable[[], Arrays], step: Arrays) -> dict[str, int]:
        """Queues the copies; the addresses by name. ``constants`` is asked only where ``key`` is not the last one's."""
        there = self._ranges[shape_range]
        pinned, copied = self._ring[self._turn]
        self._turn = (self._turn + 1) % _BLOCKS
        self._device.wait(copied)  # else the copy that still reads this block would read what is written now
        start = 0
        if key != there.key:
            arrays = constants()
            there.key, there.addresses = key, _places(arrays, there.constants)
            start = _pack(arrays, pinned, 0)
            self._device.upload(there.constants, pinned, start)
        end = _pack(step, pinned, start)
        self._device.upload(there.step, pinned, end - start, start)
        self._device.record(copied)
        self.uploaded += end
        return there.addresses | _places(step, there.step)


def _places(arrays: Arrays, base: int) -> dict[str, int]:
    found = {}
    for name, array in arrays.items():
        found[name] = base
        base += aligned_bytes(array.nbytes)
    return found


def _pack(arrays: Arrays, target: Pinned, start: int) -> int:
    """Writes the arrays one behind the other; where they end."""
    for array in arrays.values():
        target.array[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start += aligned_bytes(array.nbytes)
    return start


def aligned_bytes(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
