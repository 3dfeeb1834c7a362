"""What slots hold, counted in tokens: lengths, the bounded sliding buffers, how far back a slot can be rewound.

Sliding layers append to a buffer that is longer than their window; when it is full, the window that the next token
still sees moves to the front. Knows nothing of where the memory is: whoever owns it moves the rows that `make_room`
names.
"""

from dataclasses import dataclass

from canvasrt.errors import CapacityError


@dataclass(slots=True)
class _Slot:
    length: int = 0  # context tokens
    start: int = 0  # position of the first token in the sliding buffers


class Slots:
    """``window``: committed tokens that a sliding layer's token sees before itself; ``sliding``: rows of its buffer."""

    def __init__(self, count: int, window: int, sliding: int) -> None:
        self._window = window
        self._sliding = sliding
        self._slots = [_Slot() for _ in range(count)]

    def length(self, slot: int) -> int:
        return self._slots[slot].length

    def start(self, slot: int) -> int:
        """Position of the first token that the sliding buffers hold."""
        return self._slots[slot].start

    def lengths(self) -> list[int]:
        return [slot.length for slot in self._slots]

    def release(self, slot: int) -> None:
        self._slots[slot] = _Slot()

    def can_rewind(self, slot: int, length: int) -> bool:
        """Whether what comes before ``length`` is there; a length that is not reached forgets nothing."""
        held, start = self._slots[slot].length, self._slots[slot].start
        return length == 0 or length >= held or max(0, length - self._window) >= start

    def check_rewind(self, slot: int, length: int) -> None:
        """Raises CapacityError when the window before ``length`` has been dropped."""
        if not self.can_rewind(slot, length):
            start = self._slots[slot].start
            raise CapacityError(
                f"slot {slot} can't be rewound to {length} tokens: its sliding layers keep positions from {start} "
                f"on only. Rewind to {start + self._window} or more, or release the slot and encode again."
            )

    def rewind(self, slot: int, length: int) -> None:
        """Forgets the tokens from ``length`` on. Raises CapacityError as `check_rewind`."""
        self.check_rewind(slot, length)
        self._slots[slot].length = min(length, self._slots[slot].length)
        if length == 0:
            self._slots[slot].start = 0

    def commit(self, slot: int, count: int) -> None:
        """The ``count`` tokens last written belong to the context now."""
        self._slots[slot].length += count

    def make_room(self, slot: int, count: int) -> tuple[int, int] | None:
        """Rows of the sliding buffers, (first, count), that must move to the front before ``count`` tokens are written.

        None where there is room. The slot counts as if they had been moved.
        """
        state = self._slots[slot]
        held = state.length - state.start
        if held + count <= self._sliding:
            return None
        keep = min(held, self._window)
        state.start = state.length - keep
        return held - keep, keep
