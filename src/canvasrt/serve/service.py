"""Takes requests from a server, runs them in a canvas loop and answers: everything but Triton's API.

Threads: the server's calls `Service.accept` and returns at once; "intake" tokenizes and submits; "answers" makes texts
of tokens and sends them, so that a slow client or tokenizer stops no denoising step. The loop has a thread of its own,
in this process or, behind Triton, in another (`canvasrt.serve.engine_process`).
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from canvasrt import wire
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import BusyError, CanvasRTError, InputError
from canvasrt.scheduler.loop import Listener, Turn
from canvasrt.scheduler.types import ENDS, Event, Request
from canvasrt.serve.answer import AnswerText, StopText
from canvasrt.serve.intake import Intake, Served, Tensors, is_ping, read_request
from canvasrt.serve.metrics import Metrics
from canvasrt.serve.responses import Response, ping_response

_CANCEL_SECONDS = 0.05  # between two looks at whether clients are still there
_FLUSH_SECONDS = 0.5  # between two updates of metrics and log
_STALLED_SECONDS = 60.0  # a tick takes milliseconds; on a CPU with a long prompt, seconds
_OUTCOMES: dict[str, str] = {"failed": wire.FAILED, "cancelled": wire.CANCELLED, "timed out": wire.TIMED_OUT}

# One line of the log: an event's name and its fields.
Log = Callable[[str, Mapping[str, object]], None]


class Incoming(Protocol):
    """One request as the server has it. `send` and `fail` may be called from any thread, one at a time."""

    @property
    def name(self) -> str: ...  # the client's id, for the log; may be empty

    @property
    def timeout(self) -> float | None: ...  # seconds that the server gives it, if it does

    @property
    def tensors(self) -> Tensors: ...

    @property
    def parameters(self) -> Mapping[str, object]: ...

    def send(self, response: Response, final: bool) -> None: ...

    def fail(self, kind: wire.ErrorKind, message: str) -> None: ...

    def is_cancelled(self) -> bool: ...


@dataclass(slots=True)
class _Live:
    """A request between its arrival and its last response."""

    incoming: Incoming
    intake: Intake
    arrived: float
    text: AnswerText
    last_canvas: float
    passes: int = 0  # of the canvases before
    tokens: int = 0  # that the text has got
    pieces: list[str] = field(default_factory=list)  # without streaming: all that was said


class Loop(Protocol):
    """`CanvasLoop`, in this process or in another."""

    @property
    def broken(self) -> Exception | None: ...

    def stalled(self) -> float: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request: int) -> None: ...

    def drain(self, seconds: float) -> bool: ...

    def close(self) -> None: ...


class Service:
    def __init__(self, open_loop: Callable[[Listener], Loop], served: Served, metrics: Metrics, log: Log) -> None:
        self._served = served
        self._metrics = metrics
        self._log = log
        self._live: dict[int, _Live] = {}
        self._next = 0
        self._closed = False
        self._arrivals: queue.SimpleQueue[tuple[Incoming, float] | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._turns: deque[Turn] = deque()
        self._lines: deque[tuple[str, dict[str, object]]] = deque()
        self._loop = open_loop(self._hear)
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("intake", self._take_in), ("answers", self._answer))
        ]
        for thread in self._threads:
            thread.start()

    def accept(self, incoming: Incoming) -> None:
        if self._closed:
            incoming.fail(wire.BUSY, "the server is stopping: send the request to another one")
        else:
            self._arrivals.put((incoming, time.monotonic()))

    def _hear(self, events: Sequence[Event], turn: Turn | None) -> None:
        """In the thread of the loop, or of what hears it. Wakes another one only where somebody waits for an answer."""
        if turn:
            self._turns.append(turn)
        if events:
            self._news.put(events)

    def close(self, drain_seconds: float) -> None:
        """Lets running requests end, cancels the rest after ``drain_seconds``, answers everybody."""
        self._loop.drain(drain_seconds)
        self._closed = True
        self._arrivals.put(None)
        self._threads[0].join()
        self._loop.close()
        self._news.put(None)
        self._threads[1].join()

    def _take_in(self) -> None:
        while (arrival := self._arrivals.get()) is not None:
            incoming, arrived = arrival
            number, self._next = self._next, self._next + 1
            try:
                self._submit(number, incoming, arrived)
            except CanvasRTError as error:
                self._live.pop(number, None)
                kind = wire.BUSY if isinstance(error, BusyError) else wire.INVALID
                self._refuse(incoming, kind, str(error), arrived)
            except Exception as error:  # a bug of ours must not end this thread
                self._live.pop(number, None)
                self._refuse(incoming, wire.FAILED, f"{type(error).__name__}: {error}", arrived)

    def _submit(self, number: int, incoming: Incoming, arrived: float) -> None:
        if is_ping(incoming.tensors):
            self._ping(incoming)
            return
        intake = read_request(incoming.tensors, incoming.parameters, self._served)
        timeouts = [seconds for seconds in (intake.timeout, incoming.timeout) if seconds is not None]
        stops = intake.params.stop
        self._live[number] = _Live(incoming, intake, arrived, AnswerText(self._decode, stops), arrived)
        self._loop.submit(
            Request(
                id=number,
                state=RequestState.new(intake.params, intake.prompt),
                priority=intake.priority,
                deadline=arrived + min(timeouts) if timeouts else None,
                draft_every=intake.draft_every,
                stop_check=StopText(self._decode, stops) if stops else None,
            )
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._served.codec.decode(tokens) if self._served.codec else ""

    def _ping(self, incoming: Incoming) -> None:
        broken = self._loop.broken
        if broken is not None:
            incoming.fail(wire.FAILED, f"the canvas loop can't be used: {broken}")
        elif (stalled := self._loop.stalled()) > _STALLED_SECONDS:
            incoming.fail(wire.FAILED, f"the canvas loop has not turned for {stalled:.0f} seconds")
        else:
            incoming.send(ping_response(), final=True)

    def _refuse(self, incoming: Incoming, kind: wire.ErrorKind, message: str, arrived: float) -> None:
        seconds = time.monotonic() - arrived
        self._metrics.ended(kind, seconds)
        self._note("refused", {"request": incoming.name, "outcome": kind, "message": message})
        with contextlib.suppress(Exception):  # a client that is gone must not end this thread
            incoming.fail(kind, message)

    def _answer(self) -> None:
        looked = flushed = time.monotonic()
        while True:
            try:
                news = [self._news.get(timeout=_CANCEL_SECONDS)]
            except queue.Empty:
                news = []
            while not self._news.empty():
                news.append(self._news.get())
            for events in news:
                for event in events or ():
                    self._tell(event)
            now = time.monotonic()
            if None in news or now - flushed > _FLUSH_SECONDS:
                self._flush()
                flushed = now
            if None in news:
                return
            if now - looked > _CANCEL_SECONDS:
                self._look_for_cancelled()
                looked = now

    def _flush(self) -> None:
        self._metrics.turn([self._turns.popleft() for _ in range(len(self._turns))])
        self._metrics.flush()
        for _ in range(len(self._lines)):
            self._log(*self._lines.popleft())

    def _note(self, event: str, fields: dict[str, object]) -> None:
        """A line of the log, which is written at the next flush and tells when it was noted."""
        self._lines.append((event, {"time": round(time.time(), 3), **fields}))

    def _look_for_cancelled(self) -> None:
        for number, live in list(self._live.items()):
            if live.incoming.is_cancelled():
                self._loop.cancel(number)

    def _tell(self, event: Event) -> None:
        live = self._live[event.request]
        try:
            if event.kind == "admitted":
                self._metrics.admitted(event.time - live.arrived, len(live.intake.prompt), event.cached_tokens)
            elif event.kind == "draft":
                live.incoming.send(self._draft(live, event), final=False)
            elif event.kind in ("canvas", "end"):
                self._canvas(live, event)
            else:
                self._failed(live, event)
        except Exception as error:  # a client that is gone must not end this thread
            self._log("lost", {"request": live.incoming.name, "message": f"{type(error).__name__}: {error}"})
            self._loop.cancel(event.request)
        if event.kind in ENDS:
            del self._live[event.request]
            self._ended(live, event)

    def _draft(self, live: _Live, event: Event) -> Response:
        draft, codec = event.state.draft, self._served.codec
        assert draft is not None, "a draft event follows a step"
        assert draft.argmax is not None
        assert draft.accepted is not None
        tokens = draft.argmax.tolist()
        return Response(
            text=live.intake.echo + self._decode([*event.state.output, *tokens]),
            input_tokens=len(live.intake.prompt),
            cached_tokens=event.cached_tokens,
            canvas=draft.index,
            steps=event.state.passes,
            seed=live.intake.params.seed,
            pieces=codec.pieces(tokens) if codec else [],
            settled=draft.accepted.tolist(),
            is_draft=True,
        )

    def _canvas(self, live: _Live, event: Event) -> None:
        state, ended = event.state, event.kind == "end"
        added = state.output[live.tokens :]
        first = live.tokens == live.passes == 0
        text = live.text.push(added, final=ended)
        live.pieces.append((live.intake.echo if first else "") + text)
        if live.intake.stream or ended:
            live.incoming.send(self._response(live, event, len(added)), final=ended)
        self._metrics.canvas(event.time - live.last_canvas, first, len(added), state.passes - live.passes)
        live.tokens, live.passes, live.last_canvas = len(state.output), state.passes, event.time

    def _response(self, live: _Live, event: Event, added: int) -> Response:
        """To a finished canvas that added so many tokens."""
        state, ended = event.state, event.kind == "end"
        return Response(
            text="".join(live.pieces) if not live.intake.stream else live.pieces[-1],
            finish_reason=state.finish_reason or "",
            input_tokens=len(live.intake.prompt),
            cached_tokens=event.cached_tokens,
            output_tokens=added if live.intake.stream else len(state.output),
            canvas=state.canvas.index if ended else state.canvas.index - 1,
            steps=state.passes,
            seed=live.intake.params.seed,
        )

    def _failed(self, live: _Live, event: Event) -> None:
        if event.kind == "timed out":
            live.incoming.fail(wire.TIMED_OUT, f"not finished within {event.time - live.arrived:.3f} seconds")
        elif event.kind == "cancelled":
            live.incoming.fail(wire.CANCELLED, "the client is gone, cancelled, or the server is stopping")
        else:
            kind: wire.ErrorKind = wire.INVALID if isinstance(event.error, InputError) else wire.FAILED
            live.incoming.fail(kind, f"{type(event.error).__name__}: {event.error}")

    def _ended(self, live: _Live, event: Event) -> None:
        outcome = event.state.finish_reason or _OUTCOMES.get(event.kind, event.kind)
        seconds = time.monotonic() - live.arrived
        self._metrics.ended(outcome, seconds)
        fields: dict[str, Any] = {
            "request": live.incoming.name,
            "outcome": outcome,
            "prompt_tokens": len(live.intake.prompt),
            "cached_tokens": event.cached_tokens,
            "output_tokens": len(event.state.output),
            "denoising_steps": event.state.passes,
            "seed": live.intake.params.seed,
            "seconds": round(seconds, 4),
        }
        if event.error is not None:
            fields["error"] = f"{type(event.error).__name__}: {event.error}"
        self._note("ended", fields)
