"""The GPU memory that belongs to slots: K and V of every layer, and the soft embeddings that a canvas keeps.

A buffer is (places, heads, rows, row bytes), so that a call that runs neighbouring places gets one address. Sliding
layers' rows move to the front when their buffer is full; whole places change with each other. Everything is queued.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from canvasrt.runtime.cuda_device import CudaDevice

EXCHANGE_BYTES = 16 << 20  # through which two places are exchanged, piece by piece

Kind = Literal["full", "sliding", "soft"]


@dataclass(frozen=True, slots=True)
class Buffer:
    name: str
    kind: Kind
    heads: int
    rows: int  # of one head of one place
    row_bytes: int

    @property
    def head_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def place_bytes(self) -> int:
        return self.heads * self.head_bytes


@dataclass(frozen=True, slots=True)
class Held:
    """Rows of a place that hold something, by kind of buffer."""

    full: int
    sliding: int
    soft: int

    def of(self, kind: Kind) -> int:
        return {"full": self.full, "sliding": self.sliding, "soft": self.soft}[kind]


class KvMemory:
    """Raises OutOfMemoryError where the GPU has too little."""

    def __init__(self, device: CudaDevice, buffers: list[Buffer], places: int) -> None:
        self._device = device
        self._buffers = buffers
        self._addresses: dict[str, int] = {}
        for buffer in buffers:
            nbytes = places * buffer.place_bytes
            self._addresses[buffer.name] = device.allocate(nbytes)
            # A masked key has the weight 0, and 0 times whatever another process left there may be NaN.
            device.clear(self._addresses[buffer.name], nbytes)
        self._scratch = device.allocate(EXCHANGE_BYTES)

    def address(self, name: str, place: int) -> int:
        return self._addresses[name] + place * self._buffer(name).place_bytes

    def addresses(self, place: int) -> dict[str, int]:
        """Of every buffer, by its name."""
        return {buffer.name: self._at(buffer, place) for buffer in self._buffers}

    def read(self, name: str, place: int, rows: int) -> NDArray[np.uint8]:
        """(heads, rows, row bytes) as they are when everything queued is done: waits."""
        buffer = self._buffer(name)
        nbytes = rows * buffer.row_bytes
        if nbytes == 0:
            return np.zeros((buffer.heads, 0, buffer.row_bytes), np.uint8)
        pinned = self._device.pinned(buffer.heads * nbytes)
        for head in range(buffer.heads):
            source = self._at(buffer, place) + head * buffer.head_bytes
            self._device.download(pinned, source, nbytes, head * nbytes)
        self._device.synchronize()
        found = pinned.array.reshape(buffer.heads, rows, buffer.row_bytes).copy()
        self._device.unpin(pinned)
        return found

    def clear_soft(self, place: int) -> None:
        for buffer in self._buffers:
            if buffer.kind == "soft":
                self._device.clear(self._at(buffer, place), buffer.place_bytes)

    def move_to_front(self, place: int, first: int, count: int) -> None:
        """Rows of the sliding layers from ``first`` on become rows from 0 on; first >= 1."""
        for buffer in self._buffers:
            if buffer.kind == "sliding":
                start, width = self._at(buffer, place), buffer.row_bytes
                # In pieces as long as the way they go: source and target of a copy must not overlap.
                for row in range(0, count, first):
                    piece = min(first, count - row) * width
                    source = start + (first + row) * width
                    self._device.copy_rows(start + row * width, source, piece, buffer.heads, buffer.head_bytes)

    def exchange(self, a: int, b: int, held_a: Held, held_b: Held) -> None:
        """Two places change with each other; ``held`` is what each holds."""
        for buffer in self._buffers:
            rows_a, rows_b = held_a.of(buffer.kind), held_b.of(buffer.kind)
            at_a, at_b = self._at(buffer, a), self._at(buffer, b)
            if rows_a and rows_b:
                self._swap(buffer, at_a, at_b, max(rows_a, rows_b))
            elif rows_a:
                self._copy(buffer, at_b, at_a, rows_a)
            elif rows_b:
                self._copy(buffer, at_a, at_b, rows_b)

    def _copy(self, buffer: Buffer, target: int, source: int, rows: int) -> None:
        self._device.copy_rows(target, source, rows * buffer.row_bytes, buffer.heads, buffer.head_bytes)

    def _swap(self, buffer: Buffer, a: int, b: int, rows: int) -> None:
        for start, nbytes in _stretches(buffer, rows):
            for piece in range(start, start + nbytes, EXCHANGE_BYTES):
                size = min(EXCHANGE_BYTES, start + nbytes - piece)
                self._device.copy(self._scratch, a + piece, size)
                self._device.copy(a + piece, b + piece, size)
                self._device.copy(b + piece, self._scratch, size)

    def _at(self, buffer: Buffer, place: int) -> int:
        return self._addresses[buffer.name] + place * buffer.place_bytes

    def _buffer(self, name: str) -> Buffer:
        return next(buffer for buffer in self._buffers if buffer.name == name)


def _stretches(buffer: Buffer, rows: int) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of the first rows of every head; in one stretch where most rows are used: fewer copies."""
    if 2 * rows >= buffer.rows:
        yield 0, buffer.place_bytes
        return
    for head in range(buffer.heads):
        yield head * buffer.head_bytes, rows * buffer.row_bytes
