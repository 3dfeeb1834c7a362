"""Decides who runs: admission, priorities, prefill between steps, fairness. Knows no devices, threads or clocks.

A tick encodes finished canvases and at most `Policy.prefill_tokens` of prompts, then denoises at most `Policy.canvases`
canvases. What that promises, with S slots and C = Policy.canvases:

- A canvas that is ready takes a step at least once in ceil(S / C) ticks: rows that waited longest go first. Where the
  runner joins finished canvases to others' steps, that is a turn too: two such times lie between two canvases.
- A prompt of n tokens is encoded within S * ceil(n / prefill_tokens) ticks of its admission: same order.
- A tick encodes at most prefill_tokens and C canvases, however long prompts are: that bounds the time of a step.
- A waiting request sees at most `Policy.patience` later ones admitted before it, whatever their priority.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from canvasrt.diffusion.request import RequestState
from canvasrt.errors import BusyError, InputError
from canvasrt.runtime.protocol import EncodeRow, RunnerLimits
from canvasrt.runtime.rows import denoise_row
from canvasrt.scheduler.slots import SlotTable, Tokens
from canvasrt.scheduler.types import Event, EventKind, Load, Outcome, Policy, Request, Tick


@dataclass(slots=True)
class _Waiting:
    request: Request
    passed: int = 0  # later requests that were admitted before it


@dataclass(slots=True)
class _Running:
    request: Request
    state: RequestState
    slot: int
    cached: int
    encoded: int  # tick in which its prompt had the first turn; at first, the one before its admission
    stepped: int  # tick in which it was last denoised; at first, the same
    context: list[Tokens] = field(default_factory=list)  # what the slot holds, in pieces


class Scheduler:
    """For one thread at a time. `plan` and `apply` take turns; `submit` and `cancel` may come between any two."""

    def __init__(self, limits: RunnerLimits, policy: Policy, can_rewind: Callable[[int, int], bool]) -> None:
        """``can_rewind``: the runner's; a question that changes nothing."""
        self._policy = policy
        self._joins_others = limits.joins_others
        self._slots = SlotTable(limits.slots, can_rewind)
        self._waiting: list[_Waiting] = []  # in the order of arrival
        self._running: dict[int, _Running] = {}  # by slot
        self._ids: set[int] = set()
        self._cancelled: set[int] = set()
        self._release: list[int] = []  # slots to empty before they are used again
        self._tick = 0

    @property
    def idle(self) -> bool:
        """Whether the next tick would do nothing."""
        return not (self._waiting or self._running or self._release)

    @property
    def load(self) -> Load:
        return Load(
            waiting=len(self._waiting),
            running=len(self._running),
            kept=self._slots.kept,
            context_tokens=sum(each.state.context for each in self._running.values()),
            kept_tokens=self._slots.kept_tokens,
        )

    def submit(self, request: Request) -> None:
        """Raises BusyError when no slot is free and `Policy.max_waiting` requests wait, InputError for an id in use."""
        if request.id in self._ids:
            raise InputError(f"request {request.id} is running or waiting: ids are for one request at a time")
        room = self._policy.max_waiting + self._slots.free
        if len(self._waiting) >= room:
            raise BusyError(
                f"{len(self._running)} requests run and {len(self._waiting)} wait, which is all that this server "
                "takes: try again later, or raise max_waiting or slots"
            )
        self._ids.add(request.id)
        self._waiting.append(_Waiting(request))

    def cancel(self, request: int) -> None:
        """Takes effect in the next tick. An id that is not there is left alone: it may have ended just now."""
        if request in self._ids:
            self._cancelled.add(request)

    def cancel_all(self) -> None:
        self._cancelled |= self._ids

    def fail_all(self, error: Exception, now: float) -> list[Event]:
        """Ends every request, for an error after which nothing can be run."""
        waiting, self._waiting = self._waiting, []
        events = [Event(each.request.id, "failed", each.request.state, now, error=error) for each in waiting]
        self._ids.difference_update(each.request.id for each in waiting)
        self._cancelled.clear()
        return events + [self._end(each, "failed", now, error) for each in list(self._running.values())]

    def plan(self, now: float) -> Tick:
        """The next tick. ``now``: seconds, for deadlines."""
        self._tick += 1
        events = [*self._dropped(now), *self._admitted(now)]
        release, self._release = tuple(self._release), []
        encode = self._rows_to_encode()
        left = {row.slot: len(self._running[row.slot].state.to_encode) - len(row.tokens) for row in encode}
        ready = [each for each in self._running.values() if left.get(each.slot, len(each.state.to_encode)) == 0]
        ready.sort(key=lambda each: each.stepped)  # stable: those that are equal go in the order of their admission
        turn = ready[: self._policy.canvases]
        for each in turn:
            each.stepped = self._tick
        if self._joins_others:
            encode, turn = self._joining(encode, turn)
        denoise = [denoise_row(each.slot, each.state) for each in turn]
        return Tick(self._tick, release, tuple(encode), tuple(denoise), tuple(events))

    def _joining(self, encode: list[EncodeRow], turn: list[_Running]) -> tuple[list[EncodeRow], list[_Running]]:
        """Where others denoise, a finished canvas takes its turn as a row beside them and denoises from the next tick
        on: it would be a call of its own if it did so in this one.
        """
        finished = {row.slot for row in encode if self._running[row.slot].state.canvas.index > 0}
        later = finished - {each.slot for each in turn}
        stepping = [each for each in turn if each.slot not in finished]
        return [row for row in encode if row.slot not in later], stepping or turn

    def apply(self, tick: Tick, outcome: Outcome, now: float) -> list[Event]:
        """What the tick brought. Requests whose slot failed end; everybody else goes on."""
        events = [self._end(self._running[slot], "failed", now, error) for slot, error in outcome.failed.items()]
        for row in tick.encode:
            if each := self._running.get(row.slot):
                each.state = each.state.encoded(len(row.tokens))
                each.context.append(row.tokens)
        for denoised in tick.denoise:
            if each := self._running.get(denoised.slot):
                result = outcome.denoised[denoised.slot]
                before, each.state = each.state, each.state.denoised(result.argmax, result.sampled, result.entropy)
                try:
                    events += self._news(each, before, now)
                except Exception as error:  # of a stop check, which is the caller's
                    events.append(self._end(each, "failed", now, error))
        return events

    def _news(self, each: _Running, before: RequestState, now: float) -> list[Event]:
        request, state = each.request, each.state
        done = state.canvas.index != before.canvas.index or state.finish_reason is not None
        if done and state.finish_reason is None and request.stop_check is not None and request.stop_check(state):
            state = each.state = state.stopped()
        if state.finish_reason is not None:
            return [self._end(each, "end", now)]
        if done:
            return [Event(request.id, "canvas", state, now, each.cached)]
        steps = state.params.max_denoising_steps - state.canvas.step
        if request.draft_every and steps % request.draft_every == 0:
            return [Event(request.id, "draft", state, now, each.cached)]
        return []

    def _dropped(self, now: float) -> list[Event]:
        """Ends requests that were cancelled or are too late."""
        events = []
        for each in list(self._running.values()):
            kind = self._why_dropped(each.request, now)
            if kind:
                events.append(self._end(each, kind, now))
        for entry in list(self._waiting):
            kind = self._why_dropped(entry.request, now)
            if kind:
                self._waiting.remove(entry)
                self._ids.discard(entry.request.id)
                events.append(Event(entry.request.id, kind, entry.request.state, now))
        self._cancelled.clear()
        return events

    def _why_dropped(self, request: Request, now: float) -> EventKind | None:
        if request.id in self._cancelled:
            return "cancelled"
        return "timed out" if request.deadline is not None and now >= request.deadline else None

    def _admitted(self, now: float) -> list[Event]:
        events = []
        while self._waiting and self._slots.free:
            impatient = [entry for entry in self._waiting if entry.passed >= self._policy.patience]
            # min() takes the first of equals, which is the one that arrived first.
            entry = impatient[0] if impatient else min(self._waiting, key=lambda each: each.request.priority)
            for earlier in self._waiting[: self._waiting.index(entry)]:
                earlier.passed += 1
            self._waiting.remove(entry)
            events.append(self._admit(entry.request, now))
        return events

    def _admit(self, request: Request, now: float) -> Event:
        prompt = request.state.to_encode
        try:
            slot, cached = self._slots.take(prompt)
        except Exception as error:  # of can_rewind, which is the runner's
            self._ids.discard(request.id)
            return Event(request.id, "failed", request.state, now, error=error)
        state = request.state.encoded(cached)
        held = [prompt[:cached]] if cached else []
        before = self._tick - 1  # else it would go behind all that are served in this tick, and they twice before it
        self._running[slot] = _Running(request, state, slot, cached, before, before, held)
        return Event(request.id, "admitted", state, now, cached)

    def _rows_to_encode(self) -> list[EncodeRow]:
        pending = [each for each in self._running.values() if len(each.state.to_encode)]
        pending.sort(key=lambda each: each.encoded)
        rows, whole = [], self._policy.prefill_tokens
        room = whole
        for each in pending:
            tokens = each.state.to_encode
            if each.state.canvas.index == 0:  # a prompt; a finished canvas is encoded whole
                if room == whole:  # what others leave over is no turn: a long prompt would live on single tokens
                    each.encoded = self._tick
                tokens = tokens[:room]
                room -= len(tokens)
            if len(tokens):
                rows.append(EncodeRow(each.slot, tokens, each.state.context))
        return rows

    def _end(self, each: _Running, kind: EventKind, now: float, error: Exception | None = None) -> Event:
        del self._running[each.slot]
        self._ids.discard(each.request.id)
        self._cancelled.discard(each.request.id)
        if kind == "failed" or not self._policy.reuse_prefixes:  # nobody knows what a slot holds that has failed
            self._release.append(each.slot)
            self._slots.give(each.slot, None)
        else:
            self._slots.give(each.slot, np.concatenate(each.context) if each.context else None)
        return Event(each.request.id, kind, each.state, now, each.cached, error)
