"""Measures a set of requests over a runner: the figures that ``canvasrt generate`` and ``bench`` print."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, EngineRunner, RunnerLimits


@dataclass(slots=True)
class Tally:
    """Sums over one or more groups of requests that ran together."""

    requests: int = 0
    tokens: int = 0  # generated, end-of-sequence tokens included
    canvases: int = 0
    passes: int = 0  # denoising steps, each request counted for itself
    calls: int = 0  # denoising calls of the runner, however many rows each had
    seconds: float = 0.0
    denoise_seconds: float = 0.0
    first_canvas_seconds: list[float] = field(default_factory=list)  # per request, from the start of its group

    def figures(self) -> dict[str, float]:
        """The published measures, by the names that the benchmark's JSON uses."""
        first = sorted(self.first_canvas_seconds)
        return {
            "tokens_per_second": self.tokens / self.seconds,
            "steps_per_canvas": self.passes / self.canvases,
            "tokens_per_forward": self.tokens / self.passes,
            "ms_per_step": 1e3 * self.denoise_seconds / self.calls,
            "time_to_first_canvas_ms": 1e3 * first[len(first) // 2],
            "requests": self.requests,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


class TimedRunner:
    """Passes every verb on to a runner and adds up the time that denoising takes."""

    def __init__(self, runner: EngineRunner) -> None:
        self._runner = runner
        self.calls = 0
        self.seconds = 0.0

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    def length(self, slot: int) -> int:
        return self._runner.length(slot)

    def can_rewind(self, slot: int, length: int) -> bool:
        return self._runner.can_rewind(slot, length)

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        self._runner.encode(rows)

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Callable[[], None] | None = None) -> list[DenoiseResult]:
        started = time.perf_counter()
        results = self._runner.denoise(rows, meanwhile)
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return results

    def release(self, slot: int) -> None:
        self._runner.release(slot)


def measure(runner: EngineRunner, requests: Mapping[int, RequestState], tally: Tally) -> list[RequestState]:
    """Runs the requests together, adds to ``tally`` and returns the final states in the order of ``requests``."""
    timed = TimedRunner(runner)
    first: dict[int, float] = {}
    final: dict[int, RequestState] = {}
    started = time.perf_counter()
    for event in run_requests(timed, requests):
        if event.kind == "canvas":
            first.setdefault(event.request, time.perf_counter() - started)
            tally.canvases += 1
        elif event.kind == "end":
            final[event.request] = event.state
    tally.seconds += time.perf_counter() - started
    tally.denoise_seconds += timed.seconds
    tally.calls += timed.calls
    tally.requests += len(final)
    tally.tokens += sum(state.generated for state in final.values())
    tally.passes += sum(state.passes for state in final.values())
    tally.first_canvas_seconds += first.values()
    return [final[request] for request in requests]
