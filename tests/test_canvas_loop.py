"""CanvasLoop with real threads: everyone is told once and in order, and it stops, drains and breaks without a hang."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from canvasrt.errors import BusyError, InputError
from canvasrt.runtime.fake import FakeRunner
from canvasrt.scheduler.loop import CanvasLoop, Turn
from canvasrt.scheduler.types import ENDS, Event, Policy, Request
from scheduling import LETTERS, POLICY, Watched, ask, fake, published, short, steady
from scheduling_loads import random_requests

SOON = 20.0  # seconds that nothing here takes unless it hangs


@dataclass
class Heard:
    """A listener that keeps everything."""

    events: dict[int, list[Event]] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    then: Callable[[Event], None] = lambda event: None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, events: Sequence[Event], turn: Turn | None) -> None:
        with self.changed:
            self.threads.add(threading.current_thread().name)
            self.turns += [turn] if turn else []
            for event in events:
                self.events.setdefault(event.request, []).append(event)
            self.changed.notify_all()
        for event in events:
            self.then(event)

    def kinds(self, request: int) -> str:
        return "".join(LETTERS[event.kind] for event in self.events.get(request, []))

    def ended(self, request: int) -> bool:
        return any(event.kind in ENDS for event in self.events.get(request, []))

    def wait(self, holds: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(holds, SOON), {number: self.kinds(number) for number in self.events}

    def wait_for_ends(self, requests: Sequence[int]) -> None:
        self.wait(lambda: all(self.ended(number) for number in requests))

    def check_told(self, requests: Sequence[int]) -> None:
        """Each exactly one end, after everything else."""
        told = {number: self.kinds(number) for number in requests}
        assert {each: kinds for each, kinds in told.items() if not re.fullmatch("a[dc]*[efxt]|[fxt]", kinds)} == {}


class Gated(FakeRunner):
    """Denoises only while the gate is open; ``errors``: verb -> what it raises, once it is there."""

    def __init__(self, slots: int = 3, **options: Any) -> None:
        self.gate, self.inside = threading.Event(), threading.Event()
        self.errors: dict[str, Exception] = {}
        base = {"context": 160, "chunk": 16, "canvas": 8}
        super().__init__(slots, **{**base, **options})

    def denoise(self, rows: Sequence[Any], meanwhile: Any = None) -> list[Any]:
        self.inside.set()
        assert self.gate.wait(SOON)
        return super().denoise(rows)

    def release(self, slot: int) -> None:
        if "release" in self.errors:
            raise self.errors["release"]
        super().release(slot)

    def can_rewind(self, slot: int, length: int) -> bool:
        if "can_rewind" in self.errors:
            raise self.errors["can_rewind"]
        return super().can_rewind(slot, length)


Open = Callable[..., tuple[CanvasLoop, Heard]]


def close(loop: CanvasLoop) -> None:
    closing = threading.Thread(target=loop.close, daemon=True)
    closing.start()
    closing.join(SOON)
    assert not closing.is_alive(), "close() hangs"


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens loops, closes them, and demands that no thread is left."""
    loops: list[tuple[CanvasLoop, Any]] = []

    def open_loop(runner: Any, policy: Policy = POLICY, **options: Any) -> tuple[CanvasLoop, Heard]:
        heard = Heard()
        loops.append((CanvasLoop(runner, policy, heard, **options), runner))
        return loops[-1][0], heard

    yield open_loop
    for loop, runner in loops:
        if isinstance(runner, Gated):
            runner.gate.set()
        close(loop)
    assert [thread for thread in threading.enumerate() if thread.name == "canvas-loop"] == []


def endless(number: int, **changes: Any) -> Request:
    return steady(number, 3, canvases=15, steps=1000, **changes)


def busy(opened: Open, runner: Gated, *others: Request, **policy: Any) -> tuple[CanvasLoop, Heard]:
    """A loop that is inside a call of request 99 while the others arrive: they are admitted in one tick."""
    loop, heard = opened(runner, replace(POLICY, canvases=9, prefill_tokens=1000, **policy))
    loop.submit(steady(99, 3, canvases=1))
    assert runner.inside.wait(SOON)
    for request in others:
        loop.submit(request)
    return loop, heard


@pytest.mark.parametrize("reuse", [True, False])
def test_two_hundred_requests_of_eight_threads_with_cancellations(opened: Open, reuse: bool) -> None:
    runner = Watched(fake(4))
    policy = Policy(canvases=3, prefill_tokens=30, max_waiting=1000, reuse_prefixes=reuse)
    loop, heard = opened(runner, policy)
    heard.then = lambda event: runner.ended(event.request) if event.kind in ENDS else None
    requests = random_requests(np.random.default_rng(7), 200, conversations=0.3)
    for request in requests:
        runner.expect(request)
    errors: list[BaseException] = []

    def send(part: list[Request], seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for request in part:
                loop.submit(request)
                if rng.random() < 0.3:
                    time.sleep(float(rng.choice([0, 0.001, 0.01])))
                    loop.cancel(int(rng.choice([request.id, request.id, 10_000])))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(requests[start::8], start), daemon=True) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    heard.wait_for_ends(range(200))
    assert loop.drain(SOON)
    close(loop)
    heard.check_told(range(200))
    assert heard.threads == {"canvas-loop"}
    assert runner.faults == []
    ends = [heard.kinds(number)[-1] for number in range(200)]
    assert ends.count("x") > 10
    assert ends.count("e") == 200 - ends.count("x")
    for request in requests:
        state, answer = heard.events[request.id][-1].state, published(request, fake(1))
        whole = heard.kinds(request.id)[-1] == "e"
        assert answer.output[: None if whole else len(state.output)] == state.output
    load = loop.load
    assert (load.waiting, load.running, load.context_tokens, load.kept) == (0, 0, 0, 4 if reuse else 0)
    assert sum(turn.denoised_rows for turn in heard.turns) == sum(
        each[-1].state.passes for each in heard.events.values()
    )
    assert sum(turn.encoded_tokens for turn in heard.turns) > runner.prompt_tokens > 0
    assert max(turn.denoised_rows for turn in heard.turns) == 3
    assert all(turn.seconds >= 0 for turn in heard.turns)


def test_draining_waits_for_everybody_and_takes_nobody(opened: Open) -> None:
    runner = Gated(slots=1)
    loop, heard = busy(opened, runner, *(short(number) for number in range(5)))
    started = time.monotonic()
    assert not loop.drain(0.05)
    assert time.monotonic() - started < SOON / 2
    with pytest.raises(BusyError, match="stopping"):
        loop.submit(short(50))
    runner.gate.set()
    assert loop.drain(SOON)
    heard.wait_for_ends(range(5))
    assert [heard.kinds(number) for number in (99, *range(5))] == ["ae"] * 6
    assert 50 not in heard.events
    assert loop.drain(0)
    close(loop)
    with pytest.raises(BusyError, match="stopping"):
        loop.submit(short(50))


def test_draining_an_idle_loop_returns_at_once(opened: Open) -> None:
    loop, heard = opened(fake())
    assert loop.drain(0)
    close(loop)
    assert (heard.events, heard.turns) == ({}, [])


def test_draining_ends_after_everybody_was_told(opened: Open) -> None:
    """Who drains goes on to stop the process: an end that is told later may be lost."""
    loop, heard = opened(fake())
    telling, told = threading.Event(), []

    def slow(event: Event) -> None:
        if event.kind in ENDS:
            telling.set()
            time.sleep(0.3)
            told.append(event.request)

    heard.then = slow
    loop.submit(short(0))
    assert telling.wait(SOON)
    assert loop.drain(SOON)
    assert told == [0]


def test_closing_while_busy_cancels_those_who_run_and_those_who_wait(opened: Open) -> None:
    runner = Gated(slots=2)
    loop, heard = busy(opened, runner, *(endless(number) for number in range(5)))
    runner.gate.set()
    heard.wait(lambda: heard.kinds(0) == "a")
    close(loop)
    heard.check_told([99, *range(5)])
    assert [heard.kinds(number)[-1] for number in range(5)] == ["x"] * 5
    assert {heard.kinds(number) for number in (3, 4)} == {"x"}
    close(loop)
    with pytest.raises(BusyError, match="stopping"):
        loop.submit(short(50))
    assert (loop.load.waiting, loop.load.running) == (0, 0)


def test_cancelling_and_deadlines_end_requests_that_run(opened: Open) -> None:
    now = [100.0]
    loop, heard = opened(fake(2), clock=lambda: now[0])
    loop.submit(endless(0))
    loop.submit(endless(1, deadline=107.0))
    loop.submit(endless(2, deadline=99.0))
    heard.wait(lambda: heard.kinds(0) == heard.kinds(1) == "a")
    loop.cancel(0)
    heard.wait_for_ends([0, 2])
    assert not heard.ended(1)
    now[0] = 107.0
    heard.wait_for_ends([1])
    assert [heard.kinds(number) for number in range(3)] == ["ax", "at", "t"]


def test_refusals_are_raised_where_a_request_is_submitted(opened: Open) -> None:
    runner = Gated(slots=1)
    loop, heard = busy(opened, runner, short(0), max_waiting=1)
    with pytest.raises(BusyError, match="1 requests run and 1 wait"):
        loop.submit(short(1))
    runner.gate.set()
    heard.wait_for_ends([99, 0])
    runner.gate.clear()
    loop.submit(short(2))
    with pytest.raises(InputError, match="request 2 is running or waiting"):
        loop.submit(short(2))
    runner.gate.set()
    heard.wait_for_ends([2])
    assert heard.kinds(1) == ""


@pytest.mark.parametrize("verb", ["encode", "denoise"])
def test_a_runner_that_fails_fails_who_was_in_the_call_and_serves_on(opened: Open, verb: str) -> None:
    runner = Watched(fake(1))
    loop, heard = opened(runner, replace(POLICY, prefill_tokens=1000))
    heard.then = lambda event: runner.ended(event.request) if event.kind in ENDS else None
    runner.fail_calls = {1 if verb == "encode" else 2: True}
    for number in range(3):
        runner.expect(steady(number))
        loop.submit(steady(number))
    heard.wait_for_ends(range(3))
    assert [heard.kinds(number) for number in range(3)] == ["af", "accce", "accce"]
    assert loop.broken is None
    assert runner.faults == []


def test_a_runner_that_can_not_release_breaks_the_loop_and_everybody_is_told(opened: Open) -> None:
    runner = Gated(slots=2)
    runner.errors["release"] = RuntimeError("planted")
    loop, heard = busy(opened, runner, *(endless(number) for number in range(4)), reuse_prefixes=False)
    runner.gate.set()
    heard.wait_for_ends([99, *range(4)])
    heard.check_told([99, *range(4)])
    assert [heard.kinds(number)[-1] for number in range(4)] == ["f"] * 4
    assert {str(heard.events[number][-1].error) for number in range(4)} == {"planted"}
    assert str(loop.broken) == "planted"
    with pytest.raises(BusyError, match=r"broken and must be restarted: planted"):
        loop.submit(short(50))
    loop.cancel(0)
    started = time.monotonic()
    loop.drain(SOON)
    assert time.monotonic() - started < SOON / 2
    assert (loop.load.waiting, loop.load.running) == (0, 0)
    close(loop)
    heard.check_told([99, *range(4)])


def raising(state: Any) -> bool:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_everybody_is_told_when_a_stop_check_raises(opened: Open, place: int) -> None:
    """In one tick: one request ends, one goes on, and one's check raises."""
    requests = [short(0, 3), steady(1, 3, steps=2), steady(2, 3, steps=1, stop_check=raising)]
    runner = Gated(slots=4)
    loop, heard = busy(opened, runner, *requests[place:], *requests[:place], short(3), short(4))
    runner.gate.set()
    heard.wait_for_ends([2])
    assert loop.drain(SOON)
    close(loop)
    heard.check_told([99, *range(5)])
    assert "planted" in str(heard.events[2][-1].error)


def test_everybody_is_told_when_a_question_to_the_runner_raises(opened: Open) -> None:
    """In one tick: one request is cancelled, and the runner fails while another is admitted."""
    runner = Gated(slots=1)
    prompt = steady(99, 3).state.to_encode
    loop, heard = busy(opened, runner, short(0, prompt), short(1), short(2))

    def then(event: Event) -> None:
        if (event.request, event.kind) == (99, "end"):
            runner.errors["can_rewind"] = RuntimeError("planted")
            loop.cancel(2)

    heard.then = then
    runner.gate.set()
    heard.wait_for_ends([1])
    assert loop.drain(SOON)
    close(loop)
    heard.check_told([99, *range(3)])


def test_stalled_is_the_time_since_the_last_turn_while_there_is_something_to_do(opened: Open) -> None:
    now = [100.0]
    runner = Gated(slots=1)
    loop, heard = opened(runner, clock=lambda: now[0])
    now[0] = 500.0
    assert loop.stalled() == 0
    loop.submit(ask(0, 3))
    assert runner.inside.wait(SOON)
    assert loop.stalled() == 0
    now[0] = 507.0
    assert loop.stalled() == 7
    loop.submit(ask(1, 3))  # somebody who waits is no turn
    assert loop.stalled() == 7
    runner.gate.set()
    heard.wait_for_ends([0, 1])
    assert loop.drain(SOON)
    now[0] = 900.0
    assert loop.stalled() == 0
    assert {event.time for events in heard.events.values() for event in events} == {500.0, 507.0}


def test_a_listener_may_submit_cancel_and_close(opened: Open) -> None:
    loop, heard = opened(fake(1))

    def then(event: Event) -> None:
        if (event.request, event.kind) == (0, "end"):
            loop.submit(endless(1))
            loop.submit(endless(2))
        if (event.request, event.kind) == (1, "admitted"):
            loop.cancel(1)
        if (event.request, event.kind) == (2, "admitted"):
            loop.close()

    heard.then = then
    loop.submit(short(0))
    heard.wait_for_ends(range(3))
    assert [heard.kinds(number) for number in range(3)] == ["ae", "ax", "ax"]
