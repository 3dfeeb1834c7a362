"""Where in the K/V memory each slot lies. A call binds neighbouring places, so those that run together lie together.

Requests come and go, and every gap between those that are left would be a row of a call that computes for nobody. A
move costs one copy of a slot, a gap a row of every step. Pure: says what to exchange, and knows nothing of memory.
"""

from collections.abc import Callable, Sequence


class Placement:
    """A permutation: every slot has a place, every place a slot."""

    def __init__(self, count: int) -> None:
        self._places = list(range(count))  # by slot
        self._slots = list(range(count))  # by place

    def place(self, slot: int) -> int:
        return self._places[slot]

    def gather(self, slots: Sequence[int], cost: Callable[[int], int]) -> tuple[int, list[tuple[int, int]]]:
        """Brings slots together, in any order: the first of their places, and the pairs of slots to exchange.

        They count as exchanged. ``cost``: of moving a slot, 0 for an empty one. Takes the cheapest neighbouring
        places, the first of equal ones, so that slots that hold something and lie together already stay.
        """
        places = [self._places[slot] for slot in slots]
        if max(places) - min(places) == len(places) - 1:  # nearly every step: nothing to search
            return min(places), []
        wanted = set(slots)

        def price(first: int) -> int:
            inside = set(self._slots[first : first + len(wanted)])
            return sum(cost(slot) for slot in inside ^ wanted)  # those that come and those that make room

        first = min(range(len(self._slots) - len(wanted) + 1), key=price)
        window = range(first, first + len(wanted))
        coming = [slot for slot in slots if self._places[slot] not in window]
        leaving = [self._slots[place] for place in window if self._slots[place] not in wanted]
        pairs = list(zip(coming, leaving, strict=True))
        for one, other in pairs:
            a, b = self._places[one], self._places[other]
            self._slots[a], self._slots[b] = other, one
            self._places[one], self._places[other] = b, a
        return first, pairs
