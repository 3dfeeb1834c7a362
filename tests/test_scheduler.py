"""Scheduler: the published loop's answers, one end for everyone, and nothing left behind however requests end."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from canvasrt.errors import BusyError, CapacityError, InputError
from canvasrt.scheduler.scheduler import Scheduler
from scheduling import (
    POLICY,
    Session,
    ask,
    fake,
    short,
    steady,
    tokens,
)
from scheduling_checks import check_answers, check_sound
from scheduling_loads import mishap_session, random_session, stop_after

SEEDS = 30
Act = Callable[[Session], None]


def one_slot(*, canvases: int = 1, prefill_tokens: int = 4) -> Session:
    return Session(replace(POLICY, canvases=canvases, prefill_tokens=prefill_tokens), fake(1))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_tokens_steps_and_events_are_those_of_the_published_loop(seed: int) -> None:
    session = random_session(seed)
    check_sound(session)


def test_the_random_sessions_reach_what_they_are_for() -> None:
    sessions = [random_session(seed) for seed in range(SEEDS)]
    ends = [(events[-1].state, events[0]) for session in sessions for events in session.events.values()]
    assert len(ends) > 200
    assert Counter(state.finish_reason for state, _ in ends).keys() == {"stop", "length"}
    assert sum(state.canvas.index > 0 for state, _ in ends) > 50
    assert sum(admitted.cached_tokens > 0 for _, admitted in ends) > 20
    assert sum(state.finish_reason == "stop" and state.stop_token is None for state, _ in ends) > 10  # stop checks
    assert max(session.runner.limits.slots - session.policy.canvases for session in sessions) > 1
    assert min(session.runner.limits.slots - session.policy.canvases for session in sessions) < 0


@pytest.mark.parametrize("seed", range(2 * SEEDS))
def test_after_any_mix_of_ends_everybody_was_told_once_and_every_slot_is_free(seed: int) -> None:
    session = mishap_session(seed)
    check_sound(session)


def test_the_mishaps_reach_every_way_to_end() -> None:
    sessions = [mishap_session(seed) for seed in range(2 * SEEDS)]
    kinds = Counter(session.kinds(number) for session in sessions for number in session.requests)
    starts_and_ends = Counter()
    for kind, number in kinds.items():
        starts_and_ends[kind[0] + kind[-1]] += number
    assert starts_and_ends.keys() == {"ae", "af", "ax", "at", "xx", "tt"}
    assert min(starts_and_ends.values()) > 15


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("canvases", [1, 5])
def test_order_slots_rows_and_pieces_change_no_answer(order: tuple[int, ...], slots: int, canvases: int) -> None:
    for prefill_tokens, priority in ((1, 1), (7, -1), (1000, 0)):
        session = Session(replace(POLICY, canvases=canvases, prefill_tokens=prefill_tokens), fake(slots))
        for number in order:
            session.submit(ask(number, 5 * number + 1, max_tokens=8 * number + 3, priority=priority * number))
        check_answers(session.finish())


def test_a_row_that_fails_ends_its_request_only() -> None:
    for verb, ticks in (("encode", 1), ("denoise", 3)):
        session = Session(replace(POLICY, canvases=3, prefill_tokens=1000), fake(3))
        session.submit(*(steady(number) for number in range(3)))
        session.ticks(ticks - 1)
        session.runner.fail_slot = (1, 1)
        session.tick()
        assert [session.events[number][-1].kind == "failed" for number in range(3)] == [False, True, False], verb
        assert isinstance(session.events[1][-1].error, CapacityError)
        session.submit(steady(3))
        session.tick()
        assert session.when("admitted", 3) == ticks + 1  # and in the same tick the slot was released before it
        session.finish()
        check_sound(session)


@pytest.mark.parametrize("after_its_work", [False, True])
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_call_that_fails_as_a_whole_ends_those_who_were_in_it(call: int, after_its_work: bool) -> None:
    session = Session(replace(POLICY, canvases=2, prefill_tokens=1000), fake(3))
    session.submit(*(steady(number) for number in range(5)))
    session.runner.fail_calls = {call: after_its_work}
    session.finish()
    failed = [number for number in session.requests if session.kinds(number)[-1] == "f"]
    assert len(failed) == (3 if call == 1 else 2)
    assert all(str(session.events[number][-1].error) == "planted" for number in failed)
    check_sound(session)


def test_a_slot_that_failed_is_emptied_though_nobody_waits_for_it() -> None:
    session = one_slot()
    session.submit(short(0, 3))
    session.runner.fail_calls = {2: True}
    session.tick()
    assert session.kinds(0) == "af"
    assert not session.scheduler.idle
    session.tick()
    assert session.scheduler.idle
    assert session.runner.length(0) == 0


CANCEL_AFTER: dict[str, int] = {"waiting": 0, "encoding": 2, "first step": 3, "mid-canvas": 5, "canvas finished": 6}


@pytest.mark.parametrize("ticks", CANCEL_AFTER.values(), ids=CANCEL_AFTER)
@pytest.mark.parametrize("between", [False, True], ids=["before a tick", "during a tick"])
@pytest.mark.parametrize("reuse", [True, False], ids=["kept", "emptied"])
def test_cancelling_takes_effect_in_the_next_tick(ticks: int, between: bool, reuse: bool) -> None:
    session = Session(replace(POLICY, canvases=1, prefill_tokens=4, reuse_prefixes=reuse), fake(1))
    session.submit(steady(0, 12), short(1, 3))
    if between:
        session.ticks(ticks)
        session.tick(between=lambda: session.cancel(0))
    else:
        session.ticks(ticks)
        session.cancel(0)
    calls = session.runner.calls
    told = [(event.request, event.kind) for event in session.tick()]
    assert told[0] == (0, "cancelled")
    assert (1, "admitted") in told
    assert session.runner.calls == calls + 2  # of request 1: three tokens and its step
    session.finish()
    check_sound(session)


def test_cancelling_what_is_not_there_does_nothing() -> None:
    session = one_slot()
    session.submit(short(0, 3))
    session.cancel(7)
    session.tick(between=lambda: session.cancel(0))  # it ends in this very tick
    assert session.kinds(0) == "ae"
    session.cancel(0)
    again = Session(session.policy, fake(1))
    again.scheduler = session.scheduler
    again.submit(short(7), short(0))
    again.finish()
    assert (again.kinds(7), again.kinds(0)) == ("ae", "ae")


@pytest.mark.parametrize("deadline", [-5.0, 0.0, 1.0], ids=["long ago", "now", "in the next tick"])
def test_a_deadline_in_the_past_ends_a_request_before_anything_is_run(deadline: float) -> None:
    session = one_slot()
    session.submit(steady(0, deadline=deadline))
    session.tick()
    assert session.kinds(0) == "t"
    assert session.runner.calls == 0
    check_sound(session)


@pytest.mark.parametrize(
    ("deadline", "kinds"),
    [(1.5, "at"), (3.0, "at"), (3.5, "at"), (6.0, "at"), (7.0, "act"), (11.0, "acct"), (100.0, "accce")],
)
def test_a_deadline_ends_a_request_while_it_encodes_and_in_any_step(deadline: float, kinds: str) -> None:
    session = one_slot()
    session.submit(steady(0, 12, deadline=deadline))  # steps from tick 3 on, four to a canvas
    session.finish()
    assert session.kinds(0) == kinds
    check_sound(session)


def test_a_deadline_ends_a_request_that_waits() -> None:
    session = one_slot()
    session.submit(steady(0), short(1, deadline=4.0), short(2))
    session.finish()
    assert session.kinds(1) == "t"
    assert session.when("timed out", 1) == 4
    check_sound(session)


def test_a_draft_follows_every_so_many_steps_and_never_the_last_one() -> None:
    session = one_slot(prefill_tokens=100)
    session.submit(steady(0, canvases=2, steps=7, draft_every=3))
    session.finish()
    assert session.kinds(0) == "addcdde"
    drafts = [event.state for event in session.events[0] if event.kind == "draft"]
    assert [state.passes for state in drafts] == [3, 6, 10, 13]
    assert all(state.draft is state.canvas for state in drafts)


def test_a_stop_check_ends_a_request_after_a_canvas() -> None:
    session = one_slot()
    session.submit(steady(0, stop_check=stop_after(2)), steady(1))
    session.finish()
    assert [len(session.events[number][-1].state.output) for number in (0, 1)] == [16, 32]
    assert session.events[0][-1].state.finish_reason == "stop"
    check_sound(session)


def test_a_full_queue_refuses_and_a_refused_request_leaves_no_trace() -> None:
    session = Session(replace(POLICY, max_waiting=2), fake(2))
    session.submit(*(short(number, 3) for number in range(4)))  # two may wait beyond the free slots
    before = session.scheduler.load
    with pytest.raises(BusyError, match=r"0 requests run and 4 wait.*max_waiting or slots"):
        session.submit(short(4))
    assert session.scheduler.load == before
    session.ticks(1)  # both that ran have ended
    session.submit(short(4), short(5))
    with pytest.raises(BusyError):
        session.submit(short(6))
    session.finish()
    assert [session.kinds(number) for number in range(6)] == ["ae"] * 6
    assert 6 not in session.events
    check_sound(session)


@pytest.mark.parametrize("max_waiting", [0, 1, 3])
def test_a_busy_server_takes_exactly_as_many_as_it_says(max_waiting: int) -> None:
    session = Session(replace(POLICY, max_waiting=max_waiting), fake(2))
    session.submit(steady(0), steady(1))
    session.tick()
    session.submit(*(short(10 + number) for number in range(max_waiting)))
    with pytest.raises(BusyError, match=f"2 requests run and {max_waiting} wait"):
        session.submit(short(99))
    session.finish()
    check_sound(session)


def test_an_id_in_use_is_refused_and_its_request_goes_on() -> None:
    session = one_slot()
    session.submit(steady(0), short(1))
    for ticks in (0, 1):
        session.ticks(ticks)
        for number in (0, 1):
            with pytest.raises(InputError, match=f"request {number} is running or waiting"):
                session.scheduler.submit(short(number))
    session.finish()
    assert (session.kinds(0), session.kinds(1)) == ("accce", "ae")
    session.scheduler.submit(short(0))  # ended: the id is free again


def test_a_request_that_is_too_long_fails_alone() -> None:
    session = Session(replace(POLICY, prefill_tokens=1000), fake(2))
    session.submit(steady(0, 150, canvases=2), steady(1, canvases=2))
    session.finish()
    assert session.events[0][-1].kind == "failed"
    assert "context of 160" in str(session.events[0][-1].error)
    assert session.kinds(1) == "ace"


def test_after_an_error_that_ends_everything_everybody_is_told() -> None:
    session = one_slot()
    session.submit(steady(0), short(1), short(2))
    session.tick()
    error = RuntimeError("planted")
    events = session.scheduler.fail_all(error, 5.0)
    assert sorted((event.request, event.kind, event.error) for event in events) == [
        (number, "failed", error) for number in range(3)
    ]
    assert session.scheduler.load.running == session.scheduler.load.waiting == 0
    session.scheduler.submit(short(1))


def test_a_request_cancelled_before_everything_failed_does_not_cancel_a_later_one_of_its_id() -> None:
    scheduler = Scheduler(fake(1).limits, POLICY, lambda slot, length: length == 0)
    scheduler.submit(short(0))
    scheduler.cancel(0)
    scheduler.fail_all(RuntimeError("planted"), 0.0)
    scheduler.submit(short(0))
    assert [event.kind for event in scheduler.plan(1.0).events] == ["admitted"]


def test_load_counts_who_waits_who_runs_and_what_is_kept() -> None:
    session = Session(replace(POLICY, canvases=2, prefill_tokens=5), fake(2))
    session.submit(steady(0, 7), short(1, 5), short(2, 5, priority=9), steady(3, 4))
    session.tick()
    load = session.scheduler.load
    assert (load.waiting, load.running, load.kept, load.context_tokens, load.kept_tokens) == (2, 2, 0, 5, 0)
    session.finish()
    load = session.scheduler.load
    assert (load.waiting, load.running, load.kept, load.context_tokens) == (0, 0, 2, 0)
    assert load.kept_tokens == sum(session.runner.length(slot) for slot in range(2))
    assert load.kept_tokens > len(tokens(0, 7)) + 24
