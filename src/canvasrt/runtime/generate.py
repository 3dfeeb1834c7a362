"""Drives requests over a runner in one thread: what ``canvasrt generate``, ``bench`` and the demo use.

Requests share every call whatever their lengths and steps, wait while all slots are taken, and give their slot back
however they end. The server has a scheduler of its own; this loop has no priorities, deadlines or fairness.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.protocol import EncodeRow, EngineRunner
from canvasrt.runtime.rows import denoise_row


@dataclass(frozen=True, slots=True)
class Event:
    """One request's news: a "step" (``state.draft`` is its canvas), a "canvas" that was finished, or its "end"."""

    request: int
    kind: Literal["step", "canvas", "end"]
    state: RequestState


# Called with a request's state after each finished canvas; True ends the request there (stop strings).
StopCheck = Callable[[int, RequestState], bool]


def run_requests(
    runner: EngineRunner, requests: Mapping[int, RequestState], stop_check: StopCheck | None = None
) -> Iterator[Event]:
    """Runs all requests to their end, yielding events as they happen; ``requests`` maps the caller's ids to new states.

    Closing the iterator cancels what is left. Errors of the runner pass through; slots are released in every case.
    """
    waiting = deque(requests.items())
    active: dict[int, tuple[int, RequestState]] = {}  # slot -> request id, state
    with _released(runner, active):
        while waiting or active:
            for slot in range(runner.limits.slots):
                if waiting and slot not in active:
                    active[slot] = waiting.popleft()
            _encode(runner, active)
            for slot, event in _denoise(runner, active, stop_check):
                if event.kind == "end":
                    del active[slot]
                    runner.release(slot)
                yield event


def _encode(runner: EngineRunner, active: dict[int, tuple[int, RequestState]]) -> None:
    rows = [
        EncodeRow(slot, state.to_encode, state.context) for slot, (_, state) in active.items() if len(state.to_encode)
    ]
    if rows:
        runner.encode(rows)
        for row in rows:
            request, state = active[row.slot]
            active[row.slot] = (request, state.encoded(len(row.tokens)))


def _denoise(
    runner: EngineRunner, active: dict[int, tuple[int, RequestState]], stop_check: StopCheck | None
) -> list[tuple[int, Event]]:
    rows = [denoise_row(slot, state) for slot, (_, state) in active.items()]
    events: list[tuple[int, Event]] = []
    for row, result in zip(rows, runner.denoise(rows), strict=True):
        request, before = active[row.slot]
        state = before.denoised(result.argmax, result.sampled, result.entropy)
        canvas_done = len(state.to_encode) > 0 or state.finish_reason is not None
        if canvas_done and stop_check is not None and stop_check(request, state):
            state = state.stopped()
        active[row.slot] = (request, state)
        kinds: list[Literal["step", "canvas", "end"]] = ["step"]
        kinds += ["canvas"] if canvas_done else []
        kinds += ["end"] if state.finish_reason else []
        events += [(row.slot, Event(request, kind, state)) for kind in kinds]
    return events


@contextmanager
def _released(runner: EngineRunner, active: dict[int, tuple[int, RequestState]]) -> Iterator[None]:
    try:
        yield
    finally:
        for slot in active:
            runner.release(slot)
