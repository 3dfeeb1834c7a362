"""Checks of what happened in a session: each raises AssertionError, so that planted faults can be shown to be noticed.

Fair: the promises of scheduler.py. Sound: the published loop's answers, and nobody and nothing lost.
"""

import re

import numpy as np

from canvasrt.scheduler.types import ENDS
from scheduling import Session, ask


def check_answers(session: Session) -> None:
    """Who ended has the answer of the published loop, by as many steps and events; who was ended has its beginning."""
    for number, request in session.requests.items():
        answer, last = session.answer(number), session.events[number][-1]
        if last.kind != "end":
            assert answer.output[: len(last.state.output)] == last.state.output, number
            continue
        assert last.state.output == answer.output, number
        assert (last.state.finish_reason, last.state.passes) == (answer.reason, sum(answer.steps)), number
        drafts = ["d" * ((steps - 1) // request.draft_every if request.draft_every else 0) for steps in answer.steps]
        assert session.kinds(number) == "a" + "c".join(drafts) + "e", number


def check_conservation(session: Session) -> None:
    """One end for everyone, nothing left behind, nothing encoded twice, and every slot can be used again."""
    assert session.runner.faults == []
    assert session.scheduler.idle
    load = session.scheduler.load
    assert (load.waiting, load.running, load.context_tokens) == (0, 0, 0)
    encoded = unsure = 0
    for number, events in session.events.items():
        assert re.fullmatch("a[dc]*[efxt]|[fxt]", session.kinds(number)), (number, session.kinds(number))
        assert str(events[-1].error) in ("None", "planted"), (number, events[-1].error)
        passes = [event.state.passes for event in events if event.kind in ("draft", "canvas", "end")]
        assert passes == sorted(set(passes)), number
        state, prompt = events[-1].state, session.requests[number].state.to_encode
        encoded += min(state.context, len(prompt)) - events[0].cached_tokens
        if events[-1].kind == "failed":  # perhaps in the tick that encoded its last tokens
            unsure += len(prompt) - min(state.context, len(prompt))
    assert encoded <= session.runner.prompt_tokens <= encoded + unsure
    assert not session.runner.dirty
    slots = range(session.runner.limits.slots)
    sizes = {"canvas": session.runner.limits.canvas, "vocabulary": session.runner.limits.vocabulary}
    session.submit(*(ask(10_000 + slot, 3, **sizes) for slot in slots))
    admitted = [event.request for event in session.tick() if event.kind == "admitted"]
    assert admitted == [10_000 + slot for slot in slots]
    session.finish()
    check_answers(session)
    assert session.runner.faults == []


def check_steps(session: Session) -> None:
    """A canvas that is ready takes a step at least once in ceil(S / C) ticks."""
    most = -(-session.runner.limits.slots // session.policy.canvases)
    for request, ticks in session.runner.steps.items():
        ready = [session.runner.ready[request], *(tick + 1 for tick in ticks)]
        waited = max(tick - since + 1 for tick, since in zip(ticks, ready, strict=False))
        assert waited <= most, f"request {request} waited {waited} ticks for a step, not {most}"


def check_prefill(session: Session) -> None:
    """A prompt is encoded within S * ceil(n / prefill_tokens) ticks, the one of its admission counted."""
    for request, ready in session.runner.ready.items():
        left = len(session.requests[request].state.to_encode) - session.events[request][0].cached_tokens
        most = session.runner.limits.slots * -(-left // session.policy.prefill_tokens)
        took = ready - session.when("admitted", request) + 1
        assert took <= most, f"{left} tokens of request {request} took {took} ticks, not {most}"


def check_patience(session: Session) -> None:
    """Nobody sees more than ``patience`` later ones admitted before it, or before it was ended."""
    places = {number: place for place, number in enumerate(session.requests)}
    waiting: dict[int, int] = {}
    for what, request, _ in session.log:
        if what == "submit":
            waiting[request] = 0
        elif what == "admitted" or what in ENDS:
            waiting.pop(request, None)
        if what == "admitted":
            for other in waiting:
                waiting[other] += places[other] < places[request]
                assert waiting[other] <= session.policy.patience, f"{waiting[other]} passed request {other}"


def check_deadlines(session: Session) -> None:
    """Who has not ended by its deadline is told so in the first tick that begins then, and takes no step in it."""
    for number, request in session.requests.items():
        if request.deadline is not None:
            due = max(int(np.ceil(request.deadline)), session.when("submit", number) + 1)
            last = session.events[number][-1]
            holds = {"timed out": last.time == due, "cancelled": last.time <= due}
            assert holds.get(last.kind, last.time < due), (number, last.kind, last.time, due)
            assert all(tick < due for tick in session.runner.steps.get(number, [])), number


def check_cancels(session: Session) -> None:
    """Who was cancelled has ended by the next tick, and takes no step in it."""
    submitted = set()
    for what, number, tick in session.log:
        if what == "submit":
            submitted.add(number)
        if what == "cancel" and number in submitted:
            assert session.events[number][-1].time <= tick + 1, number
            assert all(step <= tick for step in session.runner.steps.get(number, [])), number


def check_order(session: Session) -> None:
    """The most urgent goes first, of equals the one that came first; who was passed too often goes before them."""
    places = {number: place for place, number in enumerate(session.requests)}
    passed: dict[int, int] = {}
    for what, request, tick in session.log:
        if what == "submit":
            passed[request] = 0
        elif what == "admitted":
            impatient = [number for number in passed if passed[number] >= session.policy.patience]
            urgent = min(passed, key=lambda number: (session.requests[number].priority, places[number]))
            assert request == min(impatient, key=places.__getitem__, default=urgent), (tick, request, urgent)
            del passed[request]
            for number in passed:
                passed[number] += places[number] < places[request]
        elif what in ENDS:
            passed.pop(request, None)


def check_fair(session: Session) -> None:
    check_steps(session)
    check_prefill(session)
    check_patience(session)
    check_order(session)


def check_sound(session: Session) -> None:
    """Conservation last: it uses the slots again."""
    check_answers(session)
    check_deadlines(session)
    check_cancels(session)
    check_conservation(session)
