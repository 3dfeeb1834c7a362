"""A slot's tokens serve the next request that begins like it: how much is found, which slot, and never another answer.

On FakeRunner, which reads every token of its context, and on TorchRunner, whose sliding buffers forget.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from canvasrt.checkpoint import Checkpoint
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.scheduler.slots import SlotTable
from canvasrt.scheduler.types import Request
from scheduling import POLICY, VOCABULARY, Session, ask, fake, short, steady, tokens
from scheduling_checks import check_sound
from scheduling_loads import random_session
from tiny import Dims, write

WIDE = replace(POLICY, prefill_tokens=1000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write(tmp_path_factory.mktemp("reuse"), Dims(embedding_scale=1.5), seed=5))


def joined(*parts: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def cached(session: Session, request: Request) -> int:
    """Runs it alone to its end; tokens of its prompt that were found in a slot."""
    session.submit(request)
    session.finish()
    return session.events[request.id][0].cached_tokens


def talk(session: Session, make: Callable[..., Request], turns: int = 4, first: int = 0) -> list[tuple[int, int]]:
    """A conversation: for each turn what was found, and what the turn before had left behind."""
    found, prompt, left = [], tokens(first + 70, 11), 0
    for turn in range(first, first + turns):
        found.append((cached(session, make(turn, prompt)), left))
        answer = session.answer(turn)
        left = len(answer.context)
        shown = joined(session.requests[turn].state.to_encode, answer.output)
        prompt = joined(shown, tokens(first + turn + 80, 4))
    return found


def test_each_turn_finds_what_the_turn_before_had_encoded() -> None:
    session = Session(POLICY, fake(2))
    found = talk(session, lambda number, prompt: steady(number, prompt, canvases=3))
    assert found[0] == (0, 0)
    assert [count for count, _ in found[1:]] == [left for _, left in found[1:]]  # its last canvas was not encoded
    assert found[-1][0] > 60
    check_sound(session)


def test_without_reuse_nothing_is_found_and_slots_are_emptied() -> None:
    session = Session(replace(POLICY, reuse_prefixes=False), fake(2))
    found = talk(session, lambda number, prompt: steady(number, prompt, canvases=3))
    assert [count for count, _ in found] == [0] * 4
    assert [session.runner.length(slot) for slot in range(2)] == [0, 0]
    assert session.scheduler.load.kept == 0
    check_sound(session)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 40])
@pytest.mark.parametrize("prefill", [1, 16])
def test_a_prompt_sent_again_leaves_one_token_to_encode(length: int, prefill: int) -> None:
    session = Session(replace(POLICY, prefill_tokens=prefill), fake(1))
    prompt = tokens(1, length)
    assert cached(session, short(0, prompt)) == 0
    assert cached(session, steady(1, prompt, seed=3)) == length - 1
    assert cached(session, short(2, prompt[: length // 2 + 1])) == length // 2
    check_sound(session)


@pytest.mark.parametrize("more", [1, 2, 9])
def test_a_prompt_that_goes_on_finds_all_of_the_earlier_one(more: int) -> None:
    session = Session(WIDE, fake(1))
    prompt = tokens(1, 20)
    cached(session, short(0, prompt))
    assert cached(session, steady(1, joined(prompt, tokens(2, more)))) == 20
    check_sound(session)


@pytest.mark.parametrize("place", [1, 12, 19])
def test_a_prompt_that_differs_finds_what_is_before_the_difference(place: int) -> None:
    session = Session(WIDE, fake(1))
    prompt = tokens(1, 20)
    other = prompt.copy()
    other[place] = prompt[place] % (VOCABULARY - 2) + 1
    assert cached(session, short(0, prompt)) == 0
    assert cached(session, steady(1, other)) == place
    check_sound(session)


@pytest.mark.parametrize(("window", "found"), [(0, 0), (3, 0), (14, 0), (15, 5), (100, 5)])
def test_a_slot_that_can_not_be_rewound_is_encoded_anew(window: int, found: int) -> None:
    session = Session(WIDE, fake(1, window=window))
    prompt = tokens(1, 20)
    assert cached(session, short(0, prompt)) == 0
    assert cached(session, steady(1, joined(prompt[:5], tokens(2, 9)))) == found
    check_sound(session)


@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_what_a_cancelled_request_had_encoded_is_reused(ticks: int) -> None:
    session = Session(replace(POLICY, prefill_tokens=6), fake(1))
    prompt = tokens(1, 30)
    session.submit(short(0, prompt))
    session.ticks(ticks)
    session.cancel(0)
    session.tick()
    assert cached(session, steady(1, prompt)) == 6 * ticks
    check_sound(session)


def test_a_request_cancelled_before_its_own_tokens_leaves_only_the_common_ones() -> None:
    """The runner still holds the tokens of the request before; they must not be found."""
    session = Session(replace(POLICY, prefill_tokens=2, canvases=3), fake(2))
    common, ends = tokens(1, 20), [tokens(number, 9) for number in (2, 3)]
    session.submit(short(0, joined(common, ends[0])))
    session.finish()
    session.submit(short(1, tokens(5, 2)), short(2, joined(common, ends[1])))
    session.tick()  # request 1 takes all that a tick encodes
    assert session.events[2][0].cached_tokens == 20
    session.cancel(2)
    session.tick()
    assert session.scheduler.load.kept_tokens == 20 + 2
    assert cached(session, steady(3, joined(common, ends[0]))) == 20
    check_sound(session)


def test_a_request_cancelled_before_any_token_leaves_nothing_to_find() -> None:
    session = Session(replace(POLICY, prefill_tokens=2, canvases=3), fake(2))
    session.submit(short(0, tokens(1, 2)))
    session.tick()
    session.submit(short(1, tokens(5, 2)), short(2, tokens(6, 2)), short(3, tokens(7, 2)))
    session.tick()
    session.cancel(2)
    session.finish()
    assert cached(session, short(4, tokens(6, 2))) == 0
    check_sound(session)


def test_a_slot_that_failed_is_not_reused() -> None:
    for verb_call in (2, 3):
        session = Session(WIDE, fake(1))
        prompt = tokens(1, 20)
        session.submit(steady(0, prompt))
        session.runner.fail_calls = {verb_call: True}
        session.finish()
        assert session.kinds(0)[-1] == "f"
        assert cached(session, steady(1, prompt)) == 0
        check_sound(session)


def test_of_two_branches_at_once_one_finds_the_slot_and_the_other_begins_anew() -> None:
    session = Session(WIDE, fake(2))
    prompt = tokens(1, 20)
    cached(session, short(0, prompt))
    session.submit(*(steady(number, joined(prompt, tokens(number, 4))) for number in (1, 2)))
    session.finish()
    assert [session.events[number][0].cached_tokens for number in (1, 2)] == [20, 0]
    check_sound(session)


def table(*kept: np.ndarray, slots: int = 3, can_rewind: Callable[[int, int], bool] = lambda *_: True) -> SlotTable:
    """Slots 0, 1, ... keep these, given back in this order."""
    made = SlotTable(slots, can_rewind)
    taken = [made.take(tokens(99, 1))[0] for _ in kept]
    for slot, ids in zip(taken, kept, strict=True):
        made.give(slot, ids)
    return made


def test_the_slot_with_the_longest_common_prefix_is_taken() -> None:
    base = tokens(1, 30)
    made = table(base[:10], base[:20], joined(base[:15], tokens(2, 5)))
    assert made.take(base) == (1, 20)
    assert made.take(base) == (2, 15)
    assert made.take(base) == (0, 10)
    assert made.free == 0


def test_an_empty_slot_is_taken_before_a_long_conversation_with_a_short_common_beginning() -> None:
    base = tokens(1, 30)
    made = table(base, tokens(2, 30))
    assert made.take(joined(base[:14], tokens(3, 9))) == (2, 0)
    assert made.take(joined(base[:15], tokens(3, 9))) == (0, 15)
    assert made.kept == 1


def test_without_an_empty_slot_the_one_given_back_longest_ago_leaves_first() -> None:
    kept = [joined([number], tokens(number, 20)) for number in (5, 6, 7)]
    made = table(*kept)
    assert made.take(joined(kept[0], tokens(1, 1))) == (0, 21)
    made.give(0, kept[0])
    assert [made.take(joined([50 + turn], tokens(3, 4)))[0] for turn in range(3)] == [1, 2, 0]


def test_of_equally_long_prefixes_the_one_given_back_longest_ago_is_taken() -> None:
    """Conversations that share a system prompt: a new one must not end the one that was heard last."""
    system = tokens(1, 20)
    talks = [joined(system, [number], tokens(number, 5)) for number in (5, 6, 7)]
    made = table(*talks)
    assert made.take(joined(talks[0], tokens(9, 1))) == (0, 26)
    made.give(0, talks[0])  # the latest
    assert made.take(joined(system, [50], tokens(8, 5))) == (1, 20)


def test_the_one_given_back_longest_ago_is_not_emptied_of_what_it_shares() -> None:
    base = tokens(1, 30)
    made = table(base, slots=1)
    assert made.take(joined(base[:4], [50], base[:5])) == (0, 4)


def test_a_slot_is_asked_whether_it_can_be_rewound_and_where() -> None:
    base, asked = tokens(1, 30), []
    made = table(base, slots=2, can_rewind=lambda slot, length: asked.append((slot, length)) or length != 20)
    assert made.take(base[:21]) == (1, 0)
    assert made.take(base[:20]) == (0, 19)
    assert asked == [(0, 20), (0, 19)]


@pytest.mark.parametrize("seed", range(100, 115))
def test_answers_are_the_same_with_and_without_reuse(seed: int) -> None:
    outputs = []
    for reuse in (True, False):
        session = random_session(seed, reuse_prefixes=reuse)
        found = [events[0].cached_tokens for events in session.events.values()]
        assert reuse or not any(found)
        outputs.append({number: events[-1].state.output for number, events in session.events.items()})
    assert outputs[0] == outputs[1]


def on_torch(source: Checkpoint, slots: int, chunk: int = 16, **policy: Any) -> Session:
    alone = TorchRunner(source, slots=1, context=220, chunk=64)
    runner = TorchRunner(source, slots=slots, context=220, chunk=chunk)  # keeps 8 + 16 + 12 sliding tokens a slot
    return Session(replace(POLICY, **policy), runner, alone)


def tiny_ask(number: int, prompt: int | np.ndarray, canvases: int = 2, **changes: Any) -> Request:
    sizes = {"canvas": 12, "vocabulary": 67, "max_tokens": 12 * canvases, "confidence_threshold": 0.5}
    return ask(number, prompt, **{**sizes, "entropy_bound": 1.0, "stop_token_ids": frozenset(), **changes})


def test_torch_conversations_side_by_side_equal_fresh_prefills(source: Checkpoint) -> None:
    """Contexts far longer than the sliding buffers: they are compacted many times, and rewound only at their ends."""
    session = on_torch(source, 2, prefill_tokens=40)
    for first in (0, 10):
        found = talk(session, tiny_ask, turns=5, first=first)
        assert [count for count, _ in found[1:]] == [left for _, left in found[1:]]
    assert found[-1][0] > 100
    check_sound(session)


def test_torch_one_token_left_after_a_long_cached_prefix(source: Checkpoint) -> None:
    session = on_torch(source, 1, prefill_tokens=1000)
    for number, length in enumerate((1, 2, 13, 60)):
        prompt = tokens(number, length)
        assert cached(session, tiny_ask(2 * number, prompt, canvases=1)) == 0
        # One canvas was denoised behind the prompt and is scratch: all but one token can be found again.
        assert cached(session, tiny_ask(2 * number + 1, prompt, seed=77 + number)) == length - 1
    check_sound(session)


@pytest.mark.parametrize("chunk", [8, 16])
def test_torch_a_compacted_slot_is_encoded_anew_where_its_window_is_gone(source: Checkpoint, chunk: int) -> None:
    session = on_torch(source, 1, chunk, prefill_tokens=1000)
    prompt, found = tokens(1, 150), {}
    for number, place in enumerate((149, 147, 140, 130, 100, 20, 0)):
        cached(session, tiny_ask(2 * number, prompt, canvases=1))
        other = joined(prompt[:place], prompt[place : place + 1] - 1, tokens(60 + number, 9))
        found[place] = cached(session, tiny_ask(2 * number + 1, other))
    assert found == dict.fromkeys(found, 0) | {149: 149, 147: 147}
    check_sound(session)


@pytest.mark.parametrize(
    ("slots", "policy"),
    [
        (1, {"canvases": 1, "prefill_tokens": 7}),
        (3, {"canvases": 2, "prefill_tokens": 20}),
        (4, {"canvases": 4, "prefill_tokens": 1000, "reuse_prefixes": False}),
    ],
)
def test_torch_ragged_requests_together_equal_each_alone(
    source: Checkpoint, slots: int, policy: dict[str, Any]
) -> None:
    session = on_torch(source, slots, **policy)
    rng = np.random.default_rng(4)
    shared = tokens(9, 25)
    for number in range(7):
        prompt = joined(shared[: rng.integers(0, 26)], tokens(number, int(rng.integers(1, 30))))
        filters = {"top_k": int(rng.choice([0, 5])), "top_p": float(rng.choice([1.0, 0.8]))}
        session.submit(tiny_ask(number, prompt, canvases=int(rng.integers(1, 4)), **filters))
        session.ticks(int(rng.integers(0, 3)))
    session.cancel(3)
    session.finish()
    check_sound(session)
