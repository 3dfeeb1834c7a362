"""The promises of scheduler.py under loads that work against them, and faults planted to see that the checks notice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import canvasrt.scheduler.scheduler
from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.request import RequestState
from canvasrt.scheduler.scheduler import Scheduler
from canvasrt.scheduler.slots import SlotTable
from scheduling import POLICY, Session, fake, short, steady
from scheduling_checks import check_fair, check_order, check_patience, check_prefill, check_sound, check_steps
from scheduling_loads import (
    long_prompt_beside_canvases,
    mishap_session,
    more_canvases_than_rows,
    prompts_beside_a_long_one,
    random_session,
    urgent_arrivals,
)

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("seed", range(26))
@pytest.mark.parametrize("mishaps", [False, True])
def test_the_promises_hold_under_random_loads(seed: int, mishaps: bool) -> None:
    check_fair(random_session(seed, mishaps))


@pytest.mark.parametrize(("slots", "canvases"), [(2, 1), (3, 1), (4, 2), (5, 2), (5, 3), (6, 5), (4, 4), (2, 9)])
def test_a_ready_canvas_steps_once_in_so_many_ticks_when_there_are_more_than_rows(slots: int, canvases: int) -> None:
    session = more_canvases_than_rows(slots, canvases)
    check_steps(session)
    full = [number for number in session.runner.steps if len(session.runner.steps[number]) > 1]
    assert len(full) > 10


def test_a_newcomer_steps_in_its_turn() -> None:
    """Two slots, one row: whoever came after a step of the other goes next, or in the tick after that."""
    session = Session(replace(POLICY, canvases=1), fake(2))
    session.submit(steady(0, 3))
    session.ticks(2)
    session.submit(steady(1, 3))
    session.finish()
    assert session.when("admitted", 1) == 3
    assert session.runner.steps[1][0] <= 4


@pytest.mark.parametrize("prefill", [10, 30])
@pytest.mark.parametrize("piece", [1, 4])
@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_leftovers_of_other_prompts_do_not_cost_a_long_one_its_turn(slots: int, piece: int, prefill: int) -> None:
    session = prompts_beside_a_long_one(slots, piece, prefill - piece, prefill)
    check_prefill(session)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_long_prompts_take_turns(slots: int) -> None:
    session = Session(replace(POLICY, canvases=1, prefill_tokens=10), fake(slots))
    for number in range(slots):
        session.submit(steady(number, 45 + number, canvases=1))
        session.tick()
    check_prefill(session.finish())


def test_a_long_prompt_does_not_stall_running_canvases() -> None:
    session = long_prompt_beside_canvases()
    check_fair(session)
    encoding = range(session.when("admitted", 50), session.runner.ready[50])
    assert len(encoding) >= 9
    for number in range(3):  # three rows and three canvases: the prompt takes none of their steps
        steps = session.runner.steps[number]
        assert [tick for tick in encoding if steps[0] <= tick <= steps[-1] and tick not in steps] == []
    check_sound(session)  # with it, how much a tick encodes


@pytest.mark.parametrize("patience", [0, 1, 5, 16])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_urgent_arrivals_without_end_pass_a_waiting_request_only_so_often(patience: int, slots: int) -> None:
    session = urgent_arrivals(patience, slots)
    check_patience(session)
    check_order(session)
    passed = session.admissions().index(50) - slots  # without those that were there before
    assert passed == patience
    assert session.when("admitted", 51) <= session.when("admitted", 50) + 1
    check_sound(session)


def test_everybody_is_admitted_after_its_patience_whatever_the_priorities() -> None:
    """Patience is counted for each: many who wait do not add theirs up."""
    session = Session(replace(POLICY, patience=3), fake(1))
    session.submit(*(short(number, 3, priority=10 - number) for number in range(10)))
    session.finish()
    check_patience(session)
    check_order(session)
    assert session.admissions() == [9, 8, 7, 0, 1, 2, 3, 4, 5, 6]


def test_priorities_order_admissions_and_equal_ones_go_in_the_order_of_arrival() -> None:
    session = Session(POLICY, fake(1))
    session.submit(steady(99, 3))
    session.tick()
    session.submit(*(short(number, 3, priority=priority) for number, priority in enumerate([3, 1, 2, 1, 3, 2])))
    session.finish()
    check_order(session)
    assert session.admissions() == [99, 1, 3, 2, 5, 0, 4]


def test_a_request_that_leaves_the_queue_is_not_counted() -> None:
    session = Session(replace(POLICY, patience=1), fake(1))
    session.submit(steady(99, 3))
    session.tick()
    session.submit(short(0, priority=3), short(1, priority=1), short(2, priority=2))
    session.cancel(1)
    session.finish()
    assert session.admissions() == [99, 2, 0]


def plant_slot_leaked_on_cancel(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._end

    def wrong(self: Any, each: Any, kind: str, now: float, error: Any = None) -> Any:
        with patch.context() as inner:
            if kind == "cancelled":
                inner.setattr(SlotTable, "give", lambda *_: None)
            return original(self, each, kind, now, error)

    patch.setattr(Scheduler, "_end", wrong)


def plant_failed_slot_not_emptied(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._end

    def wrong(self: Any, each: Any, kind: str, now: float, error: Any = None) -> Any:
        event = original(self, each, "cancelled" if kind == "failed" else kind, now, error)
        return replace(event, kind=kind)

    patch.setattr(Scheduler, "_end", wrong)


def plant_noise_keyed_by_row(patch: pytest.MonkeyPatch) -> None:
    original = canvasrt.scheduler.scheduler.denoise_row

    def wrong(slot: int, state: RequestState) -> Any:
        size, vocabulary = state.params.canvas, state.params.vocabulary
        noise = step_noise(slot, state.canvas.index, state.canvas.step, size, vocabulary)
        return replace(original(slot, state), uniforms=noise.uniforms)

    patch.setattr(canvasrt.scheduler.scheduler, "denoise_row", wrong)


def plant_finished_canvas_never_encoded(patch: pytest.MonkeyPatch) -> None:
    original = RequestState._finished_canvas

    def wrong(self: RequestState, argmax: Any) -> RequestState:
        state = original(self, argmax)
        return replace(state, to_encode=state.to_encode[:0])

    patch.setattr(RequestState, "_finished_canvas", wrong)


def plant_finished_canvas_encoded_twice(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._rows_to_encode

    def wrong(self: Any) -> Any:
        rows = original(self)
        later = [self._running[row.slot].state.canvas.index > 0 for row in rows]
        return [replace(row, tokens=np.tile(row.tokens, 1 + twice)) for row, twice in zip(rows, later, strict=True)]

    patch.setattr(Scheduler, "_rows_to_encode", wrong)


def plant_every_step_is_a_first_one(patch: pytest.MonkeyPatch) -> None:
    original = canvasrt.scheduler.scheduler.denoise_row
    patch.setattr(
        canvasrt.scheduler.scheduler, "denoise_row", lambda slot, state: replace(original(slot, state), first=True)
    )


def plant_slot_taken_by_two(patch: pytest.MonkeyPatch) -> None:
    original = SlotTable.take

    def wrong(self: Any, prompt: Any) -> Any:
        slot, shared = original(self, prompt)
        self.give(slot, None)
        return slot, shared

    patch.setattr(SlotTable, "take", wrong)


def plant_prefix_one_token_too_long(patch: pytest.MonkeyPatch) -> None:
    original = SlotTable._shared

    def wrong(self: Any, slot: int, prompt: Any) -> int:
        shared = original(self, slot, prompt)
        return shared + (0 < shared < min(len(self._kept[slot].tokens), len(prompt) - 1))

    patch.setattr(SlotTable, "_shared", wrong)


def plant_rewind_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    original = SlotTable._shared

    def wrong(self: Any, slot: int, prompt: Any) -> int:
        with patch.context() as inner:
            inner.setattr(self, "_can_rewind", lambda *_: True)
            return original(self, slot, prompt)

    patch.setattr(SlotTable, "_shared", wrong)


def plant_deadline_ignored(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._why_dropped
    patch.setattr(Scheduler, "_why_dropped", lambda self, request, now: original(self, request, float("-inf")))


def plant_cancel_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "cancel", lambda *_: None)


def plant_policy(patch: pytest.MonkeyPatch, **other: int) -> None:
    original = Scheduler.__init__

    def wrong(self: Any, limits: Any, policy: Any, can_rewind: Any) -> None:
        original(self, limits, replace(policy, **other), can_rewind)

    patch.setattr(Scheduler, "__init__", wrong)


def plant_prompts_encoded_in_one_piece(patch: pytest.MonkeyPatch) -> None:
    plant_policy(patch, prefill_tokens=10**9)


def plant_more_rows_than_allowed(patch: pytest.MonkeyPatch) -> None:
    plant_policy(patch, canvases=10**9)


def plant_fair_patience_ignored(patch: pytest.MonkeyPatch) -> None:
    plant_policy(patch, patience=10**9)


def plant_fair_priority_ignored(patch: pytest.MonkeyPatch) -> None:
    plant_policy(patch, patience=0)


def plant_fair_rows_that_waited_go_last(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler.plan

    def wrong(self: Any, now: float) -> Any:
        for each in self._running.values():
            each.stepped = -abs(each.stepped)
        return original(self, now)

    patch.setattr(Scheduler, "plan", wrong)


def plant_fair_prompts_that_waited_go_last(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler.plan

    def wrong(self: Any, now: float) -> Any:
        for each in self._running.values():
            each.encoded = -abs(each.encoded)
        return original(self, now)

    patch.setattr(Scheduler, "plan", wrong)


def sound_evidence() -> None:
    for seed in range(8):
        check_sound(random_session(seed, reuse_prefixes=True))
        check_sound(mishap_session(seed))


def fair_evidence() -> None:
    for session in (urgent_arrivals(), more_canvases_than_rows(4, 2), prompts_beside_a_long_one(4, 1, 9)):
        check_fair(session)


PLANTS: list[Plant] = [
    value for name, value in sorted(globals().items()) if name.startswith("plant_") and name != "plant_policy"
]


def test_without_a_planted_fault_the_checks_pass() -> None:
    sound_evidence()
    fair_evidence()


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.removeprefix("plant_"))
def test_a_planted_fault_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        fair_evidence() if plant.__name__.startswith("plant_fair") else sound_evidence()
