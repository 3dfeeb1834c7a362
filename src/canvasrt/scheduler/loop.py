"""The thread that turns the scheduler and the runner: the only one that touches a runner, and where time comes from.

tick = scheduler.plan(now); outcome = execute(runner, tick); emit(scheduler.apply(tick, outcome, now))
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from canvasrt.errors import BusyError
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.scheduler.execute import execute
from canvasrt.scheduler.scheduler import Scheduler
from canvasrt.scheduler.types import Event, Load, Outcome, Policy, Request, Tick


@dataclass(frozen=True, slots=True)
class Turn:
    """What one tick did and took, for metrics."""

    encoded_tokens: int
    denoised_rows: int
    seconds: float  # of the runner
    load: Load  # after it


class Listener(Protocol):
    """Called from the loop's thread: it must be quick and never raise."""

    def __call__(self, events: Sequence[Event], turn: Turn | None) -> None: ...


class CanvasLoop:
    """Runs requests from any thread until it is closed.

    ``listener`` gets every event of a request in order; each request that was submitted ends with exactly one event.
    """

    def __init__(
        self,
        runner: EngineRunner,
        policy: Policy,
        listener: Listener,
        clock: Callable[[], float] = time.monotonic,
        on_broken: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """``on_broken`` is called when an error has ended the loop and everybody was told."""
        self._runner = runner
        self._listener = listener
        self._clock = clock
        self._on_broken = on_broken
        self._overlaps = runner.limits.overlaps
        self._news: list[tuple[Sequence[Event], Turn | None]] = []  # not told yet, in order
        self._scheduler = Scheduler(runner.limits, policy, runner.can_rewind)
        self._lock = threading.Lock()  # of the scheduler and what follows
        self._changed = threading.Condition(self._lock)
        self._draining = self._closing = False
        self._resting = False  # everything that has happened was told
        self._broken: Exception | None = None
        self._turned = clock()
        self._thread = threading.Thread(target=self._run, name="canvas-loop", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> Exception | None:
        """The error that ended the loop, if one did: nothing runs any more."""
        return self._broken

    @property
    def load(self) -> Load:
        with self._lock:
            return self._scheduler.load

    def stalled(self) -> float:
        """Seconds since the loop last turned, while it had something to do; 0 when it is idle."""
        with self._lock:
            return 0.0 if self._scheduler.idle else self._clock() - self._turned

    def submit(self, request: Request) -> None:
        """Raises BusyError when too many wait, or the loop stops or is broken; then no event follows."""
        with self._changed:
            if self._broken is not None:
                raise BusyError(f"the server is broken and must be restarted: {self._broken}")
            if self._draining:
                raise BusyError("the server is stopping: send the request to another one")
            if self._scheduler.idle:
                self._turned = self._clock()
            self._scheduler.submit(request)
            self._resting = False
            self._changed.notify_all()

    def cancel(self, request: int) -> None:
        with self._changed:
            self._scheduler.cancel(request)

    def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for the others; whether they ended in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._resting, seconds)

    def close(self) -> None:
        """Cancels what still runs and ends the thread."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except Exception as error:
            self._break(error)

    def _wait(self) -> bool:
        """Until there is something to do; False when the loop is to end and nothing is left."""
        with self._changed:
            if self._closing:
                self._scheduler.cancel_all()
            while self._scheduler.idle:
                self._resting = True
                self._changed.notify_all()  # drain() may be waiting for this
                if self._closing:
                    return False
                self._changed.wait()
            self._resting = False
            return True

    def _turn(self) -> None:
        with self._lock:
            tick = self._scheduler.plan(self._clock())
        self._news.append((tick.events, None))
        if not (self._overlaps and tick.denoise):
            self._tell()
        started = self._clock()
        outcome = execute(self._runner, tick, self._tell if self._overlaps else None)
        ended = self._clock()
        with self._lock:
            events = self._scheduler.apply(tick, outcome, ended)
            self._turned = ended
            load, idle = self._scheduler.load, self._scheduler.idle
        self._news.append((events, _report(tick, outcome, ended - started, load)))
        # Where a device works meanwhile, the next step starts first: until then it has nothing to do.
        if idle or not self._overlaps:
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, []
        for events, turn in news:
            if events or turn:
                self._listener(events, turn)

    def _break(self, error: Exception) -> None:
        """A runner that can't release a slot, or a fault of ours: everybody is told, and nothing hangs."""
        with self._changed:
            self._broken = error
            events = self._scheduler.fail_all(error, self._clock())
        self._news.append((events, None))
        self._tell()
        with self._changed:
            self._resting = True
            self._changed.notify_all()
        self._on_broken(error)


def _report(tick: Tick, outcome: Outcome, seconds: float, load: Load) -> Turn:
    return Turn(sum(len(row.tokens) for row in tick.encode), len(outcome.denoised), seconds, load)
