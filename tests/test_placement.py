"""Where slots lie, against every arrangement there is."""

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from canvasrt.runtime.placement import Placement


@st.composite
def rounds(draw: st.DrawFn, most: int = 9, cheapest: int = 0) -> tuple[int, list[tuple[list[int], list[int]]]]:
    """(slots, what is brought together one after another, with what moving each slot costs then)"""
    count = draw(st.integers(1, most))
    wanted = st.lists(st.integers(0, count - 1), unique=True, min_size=1)
    costs = st.lists(st.integers(cheapest, 9), min_size=count, max_size=count)
    return count, draw(st.lists(st.tuples(wanted, costs), min_size=1, max_size=8))


def places(placement: Placement, count: int) -> list[int]:
    return [placement.place(slot) for slot in range(count)]


@given(rounds())
def test_the_slots_lie_in_neighbouring_places_from_the_first_on(
    asked: tuple[int, list[tuple[list[int], list[int]]]],
) -> None:
    count, steps = asked
    placement = Placement(count)
    for slots, costs in steps:
        first, _ = placement.gather(slots, costs.__getitem__)
        assert sorted(places(placement, count)) == list(range(count))
        assert sorted(map(placement.place, slots)) == list(range(first, first + len(slots)))


@given(rounds())
def test_contents_that_are_exchanged_as_told_lie_where_the_slots_do(
    asked: tuple[int, list[tuple[list[int], list[int]]]],
) -> None:
    """With the places of before, as all pairs of one answer are apart from each other."""
    count, steps = asked
    placement = Placement(count)
    contents = list(range(count))  # by place
    for slots, costs in steps:
        before = places(placement, count)
        _, pairs = placement.gather(slots, costs.__getitem__)
        moved = [slot for pair in pairs for slot in pair]
        assert len(set(moved)) == len(moved)
        for one, other in pairs:
            a, b = before[one], before[other]
            contents[a], contents[b] = contents[b], contents[a]
        assert [contents[placement.place(slot)] for slot in range(count)] == list(range(count))
        assert {slot for slot in range(count) if before[slot] != placement.place(slot)} == set(moved)


@given(rounds(cheapest=1))
def test_slots_that_lie_together_are_never_moved(asked: tuple[int, list[tuple[list[int], list[int]]]]) -> None:
    count, steps = asked
    placement = Placement(count)
    for slots, costs in steps:
        first, _ = placement.gather(slots, costs.__getitem__)
        before = places(placement, count)
        for again in (slots, slots[::-1]):
            assert placement.gather(again, costs.__getitem__) == (first, [])
        assert places(placement, count) == before


@settings(max_examples=40)
@given(rounds(most=5))
def test_no_arrangement_moves_less(asked: tuple[int, list[tuple[list[int], list[int]]]]) -> None:
    count, steps = asked
    placement = Placement(count)
    for slots, costs in steps:
        before = places(placement, count)
        first, pairs = placement.gather(slots, costs.__getitem__)
        least = min(
            sum(costs[slot] for slot in range(count) if arrangement[slot] != before[slot])
            for arrangement in permutations(range(count))
            if max(arrangement[slot] for slot in slots) - min(arrangement[slot] for slot in slots) < len(slots)
        )
        assert sum(costs[slot] for pair in pairs for slot in pair) == least
        assert 0 <= first <= count - len(slots)


@given(st.integers(3, 9), st.data())
def test_an_empty_slot_makes_room_before_one_that_holds_something(count: int, data: st.DataObject) -> None:
    """Two slots apart, whose neighbours between them and the ends are all but one full."""
    left = data.draw(st.integers(0, count - 3))
    right = data.draw(st.integers(left + 2, count - 1))
    beside = [place for place in (left - 1, left + 1, right - 1, right + 1) if 0 <= place < count]
    empty = data.draw(st.sampled_from(beside))
    costs = [0 if slot == empty else 5 for slot in range(count)]
    placement = Placement(count)
    _, pairs = placement.gather([left, right], costs.__getitem__)
    assert [other for _, other in pairs] == [empty]


def test_the_first_of_equal_windows_is_taken() -> None:
    placement = Placement(6)
    assert placement.gather([1, 4], lambda slot: 1) == (0, [(4, 0)])
    assert places(placement, 6) == [4, 1, 2, 3, 0, 5]
    assert placement.gather([4], lambda slot: 1) == (0, [])
    assert placement.gather(range(6), lambda slot: 1) == (0, [])


def test_what_is_large_stays_and_what_is_small_comes() -> None:
    placement = Placement(5)
    lengths = [10, 0, 0, 0, 500]
    assert placement.gather([0, 4], lengths.__getitem__) == (3, [(0, 3)])
    assert places(placement, 5) == [3, 1, 2, 0, 4]
