"""Who holds which slot, and which ended request's tokens a slot still keeps for a request that begins like it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Kept:
    tokens: Tokens  # (n,) the slot's whole context
    used: int  # turn in which it was given back


class SlotTable:
    """``can_rewind(slot, length)`` says whether the runner can forget a slot's tokens from ``length`` on."""

    def __init__(self, slots: int, can_rewind: Callable[[int, int], bool]) -> None:
        self._can_rewind = can_rewind
        self._empty = list(range(slots))
        self._kept: dict[int, _Kept] = {}
        self._turn = 0

    @property
    def free(self) -> int:
        return len(self._empty) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def kept_tokens(self) -> int:
        return sum(len(kept.tokens) for kept in self._kept.values())

    def take(self, prompt: Tokens) -> tuple[int, int]:
        """A slot for a request, and how many tokens of its prompt the slot holds already.

        At least one token is left to encode. A slot that keeps the longest common prefix is taken where that is at
        least half of what it keeps; an empty one comes next, so that a few common tokens destroy no conversation;
        then the one that was given back longest ago.
        """
        shared = {slot: self._shared(slot, prompt) for slot in self._kept}
        worth = [slot for slot, count in shared.items() if count and 2 * count >= len(self._kept[slot].tokens)]
        if worth:
            slot = max(worth, key=lambda each: (shared[each], -self._kept[each].used))
        elif self._empty:
            return self._empty.pop(0), 0
        else:
            slot = min(self._kept, key=lambda each: self._kept[each].used)
        del self._kept[slot]
        return slot, shared[slot]

    def give(self, slot: int, kept: Tokens | None) -> None:
        """``kept``: the slot's context, to be reused; None when it was emptied."""
        self._turn += 1
        if kept is None or len(kept) == 0:
            self._empty.append(slot)
        else:
            self._kept[slot] = _Kept(kept, self._turn)

    def _shared(self, slot: int, prompt: Tokens) -> int:
        tokens = self._kept[slot].tokens
        length = min(len(tokens), len(prompt) - 1)
        differ = np.flatnonzero(tokens[:length] != prompt[:length])
        shared = int(differ[0]) if len(differ) else length
        return shared if shared and self._can_rewind(slot, shared) else 0
