"""Runners whose work happens elsewhere: finished canvases that ride along, and news that are told meanwhile."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import scheduling_loads
from canvasrt.runtime.fake import FakeRunner
from canvasrt.scheduler.loop import CanvasLoop
from canvasrt.scheduler.scheduler import Scheduler
from scheduling import POLICY, Session, fake, steady
from scheduling_checks import check_sound
from scheduling_loads import more_canvases_than_rows, random_session

SOON = 20.0


@pytest.fixture
def _joining(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling_loads, "fake", lambda *a, **b: fake(*a, **b, joins_others=True))


def gaps(session: Session) -> list[int]:
    """Ticks from one step of a request to its next."""
    return [after - before for ticks in session.runner.steps.values() for before, after in pairwise(ticks)]


@pytest.mark.usefixtures("_joining")
@pytest.mark.parametrize("seed", range(20))
def test_texts_are_the_same_and_nobody_is_lost(seed: int) -> None:
    check_sound(random_session(seed, mishaps=seed % 2 == 1))


@pytest.mark.usefixtures("_joining")
@pytest.mark.parametrize(("slots", "canvases"), [(2, 1), (4, 2), (5, 3), (4, 4)])
def test_a_canvas_takes_a_turn_in_so_many_ticks_and_a_finished_one_a_turn_more(slots: int, canvases: int) -> None:
    session = more_canvases_than_rows(slots, canvases)
    assert max(gaps(session)) <= 2 * -(-slots // canvases)


def two_of_different_lengths(joins_others: bool) -> Session:
    """A canvas of two steps beside one of six."""
    session = Session(replace(POLICY, canvases=2), fake(2, joins_others=joins_others))
    session.submit(steady(0, 3, canvases=3, steps=2), steady(1, 3, canvases=1, steps=6))
    return session


def test_a_finished_canvas_rides_along_where_others_denoise_and_goes_on_in_the_next_tick() -> None:
    riding, apart = two_of_different_lengths(True).finish(), two_of_different_lengths(False).finish()
    assert apart.runner.steps == {0: [1, 2, 3, 4, 5, 6], 1: [1, 2, 3, 4, 5, 6]}
    assert riding.runner.steps == {0: [1, 2, 4, 5, 7, 8], 1: [1, 2, 3, 4, 5, 6]}  # in 3 it rides, in 7 it is alone


def test_canvases_that_finish_together_denoise_at_once() -> None:
    session = Session(replace(POLICY, canvases=2), fake(2, joins_others=True))
    session.submit(steady(0, 3, canvases=2, steps=3), steady(1, 3, canvases=2, steps=3))
    assert session.finish().runner.steps == {slot: [1, 2, 3, 4, 5, 6] for slot in (0, 1)}


def test_a_canvas_that_waits_for_its_turn_is_encoded_in_it() -> None:
    """Else it would stand in the way of the denoising of its own slot."""
    session = Session(replace(POLICY, canvases=1), fake(2, joins_others=True))
    session.submit(steady(0, canvases=2, steps=1), steady(1, canvases=2, steps=5))
    while not session.scheduler.idle:
        session.tick()
        commits = [row for row in session.runner.held if len(row)]
        assert commits
    check_sound(session)


def test_the_check_notices_a_scheduler_that_encodes_all_that_waited_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler._joining

    def eager(self: Scheduler, encode: list[Any], turn: list[Any]) -> Any:
        kept, stepping = original(self, encode, turn)
        return encode if stepping is turn else kept, stepping

    monkeypatch.setattr(Scheduler, "_joining", eager)
    monkeypatch.setattr(scheduling_loads, "fake", lambda *a, **b: fake(*a, **b, joins_others=True))
    noticed = 0
    for seed in range(20):
        try:
            check_sound(random_session(seed, mishaps=True))
        except AssertionError:
            noticed += 1
    assert noticed > 0


class Far(FakeRunner):
    """A device that is busy while `denoise` waits for it; notes who was told of what meanwhile."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(slots=2, context=160, chunk=16, canvas=8, overlaps=True)
        self._heard = heard

    def denoise(self, rows: Sequence[Any], meanwhile: Any = None) -> list[Any]:
        self._heard.append("starts")
        found = super().denoise(rows, meanwhile)
        self._heard.append("ends")
        return found


def test_news_of_a_step_are_told_while_the_next_one_runs_and_the_last_at_once() -> None:
    heard: list[str] = []
    done = threading.Event()

    def listen(events: Sequence[Any], turn: Any) -> None:
        heard.extend(event.kind for event in events)
        if any(event.kind == "end" for event in events):
            done.set()

    loop = CanvasLoop(Far(heard), POLICY, listen)
    loop.submit(steady(0, canvases=2, steps=2, draft_every=1))
    assert done.wait(SOON)
    loop.close()
    assert heard == [
        "starts", "admitted", "ends", "starts", "draft", "ends", "starts", "canvas", "ends", "starts", "draft", "ends",
        "end",
    ]  # fmt: skip
