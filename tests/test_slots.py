"""What slots hold, against a buffer of rows that are written, moved and read one by one."""

import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.errors import CapacityError
from canvasrt.runtime.slots import Slots

SLOTS = 3
MOST = 9  # tokens of one call
WINDOWS = st.integers(1, 12)
SPARE = st.integers(0, 15)  # rows beyond a window and a call
ACTIONS = st.lists(
    st.tuples(
        st.integers(0, SLOTS - 1), st.sampled_from("wwwwpdrx"), st.integers(1, MOST), st.floats(0, 1, exclude_max=True)
    ),
    max_size=60,
)


@dataclass
class Naive:
    """One slot: which token stands in each row of its buffer. A row that means nothing holds None."""

    rows: list[int | None]
    tokens: list[int] = field(default_factory=list)  # by position, each one new

    def window(self, length: int, window: int) -> list[int]:
        return self.tokens[max(0, length - window) : length]

    def can_rewind(self, length: int, window: int) -> bool:
        return length in (0, len(self.tokens)) or all(token in self.rows for token in self.window(length, window))


class Checked:
    """Slots, and a buffer for each that is moved as they say."""

    def __init__(self, window: int, sliding: int) -> None:
        self.slots, self.window, self.sliding = Slots(SLOTS, window, sliding), window, sliding
        self.naive = [Naive([None] * sliding) for _ in range(SLOTS)]
        self.next = 0

    def write(self, slot: int, count: int, commits: int) -> None:
        """Tokens behind what the slot holds, the first ``commits`` of which belong to its context then."""
        naive, held = self.naive[slot], len(self.naive[slot].tokens)
        moved = self.slots.make_room(slot, count)
        if moved is not None:
            first, kept = moved
            assert first >= 1
            naive.rows[:kept] = naive.rows[first : first + kept]
        row = held - self.slots.start(slot)
        assert row + count <= self.sliding
        new = list(range(self.next, self.next + count))
        self.next += count
        naive.rows[row : row + count] = new
        naive.rows[row + count :] = [None] * (self.sliding - row - count)
        naive.tokens += new[:commits]
        self.slots.commit(slot, commits)
        assert set(naive.window(held, self.window)) <= set(naive.rows)  # what the first of them sees

    def rewind(self, slot: int, length: int) -> None:
        naive = self.naive[slot]
        allowed = naive.can_rewind(length, self.window)
        assert self.slots.can_rewind(slot, length) == allowed
        if not allowed:
            self.refused(slot, length)
            return
        self.slots.check_rewind(slot, length)
        self.slots.rewind(slot, length)
        del naive.tokens[length:]

    def refused(self, slot: int, length: int) -> None:
        """The smallest length that works is named, and nothing is changed."""
        before = self.slots.lengths(), self.slots.start(slot)
        for refuses in (self.slots.check_rewind, self.slots.rewind):
            with pytest.raises(CapacityError, match=f"^slot {slot} can't be rewound to {length} tokens: ") as error:
                refuses(slot, length)
        assert (self.slots.lengths(), self.slots.start(slot)) == before
        kept, named = map(int, re.findall(r"from (\d+) on only\. Rewind to (\d+) or more", str(error.value))[0])
        assert kept == self.slots.start(slot)
        assert length < named <= self.slots.length(slot)
        possible = [each for each in range(1, self.slots.length(slot) + 1) if self.slots.can_rewind(slot, each)]
        assert possible[0] == named

    def check(self) -> None:
        assert self.slots.lengths() == [len(each.tokens) for each in self.naive]
        for slot, naive in enumerate(self.naive):
            length, start = self.slots.length(slot), self.slots.start(slot)
            assert length == len(naive.tokens)
            assert 0 <= start <= max(0, length - self.window)
            assert naive.rows[: length - start] == naive.tokens[start:]


@given(WINDOWS, SPARE, ACTIONS)
def test_every_row_is_where_the_slot_says_whatever_happened_to_it(
    window: int, spare: int, actions: list[tuple[int, str, int, float]]
) -> None:
    checked = Checked(window, window + MOST + spare)
    for slot, action, count, share in actions:
        if action == "w":
            checked.write(slot, count, count)
        elif action == "p":  # padded
            checked.write(slot, count, 1 + int(share * count))
        elif action == "d":  # a canvas that does not join
            checked.write(slot, count, 0)
        elif action == "r":
            checked.rewind(slot, int(share * (checked.slots.length(slot) + 1)))
        else:
            checked.slots.release(slot)
            checked.naive[slot] = Naive([None] * checked.sliding)
        checked.check()


@given(WINDOWS, SPARE, st.lists(st.integers(1, MOST), min_size=1, max_size=30))
def test_every_length_is_answered_as_the_rows_that_are_left_allow(window: int, spare: int, counts: list[int]) -> None:
    checked = Checked(window, window + MOST + spare)
    for count in counts:
        checked.write(1, count, count)
    held = checked.slots.length(1)
    for length in range(held + 1):
        assert checked.slots.can_rewind(1, length) == checked.naive[1].can_rewind(length, window)
        if not checked.slots.can_rewind(1, length):
            checked.refused(1, length)
    checked.check()


def test_a_full_buffer_keeps_one_window_and_nothing_moves_before_it_is_full() -> None:
    slots = Slots(2, window=4, sliding=10)
    assert slots.make_room(0, 10) is None
    slots.commit(0, 6)
    assert slots.make_room(0, 4) is None
    assert slots.make_room(0, 5) == (2, 4)
    assert (slots.start(0), slots.length(0)) == (2, 6)
    slots.commit(0, 5)
    assert slots.make_room(0, 1) is None
    assert slots.make_room(0, 4) == (5, 4)
    assert (slots.start(0), slots.start(1), slots.lengths()) == (7, 0, [11, 0])


def test_a_slot_that_is_empty_again_begins_at_the_front() -> None:
    for empty in (lambda slots: slots.release(0), lambda slots: slots.rewind(0, 0)):
        slots = Slots(1, window=4, sliding=10)
        slots.commit(0, 9)
        slots.make_room(0, 5)
        assert slots.start(0) == 5
        empty(slots)
        assert (slots.length(0), slots.start(0)) == (0, 0)
        assert slots.make_room(0, 10) is None
