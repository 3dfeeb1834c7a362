"""Closed-loop load: so many workers, each of which sends its next request when the one before has ended.

Measures what a client sees. Knows nothing of gRPC: what sends a request is passed in.
"""

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from canvasrt.client.failures import kind_of
from canvasrt.client.tensors import Response
from canvasrt.client.waiting import wait_for_end
from canvasrt.errors import CanvasRTError

Send = Callable[[int], Iterable[Response]]  # sends the request of that number and yields its responses
PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Outcome:
    """One request as its worker saw it; times in seconds from when it was sent."""

    seconds: float = 0.0
    first_canvas_seconds: float | None = None
    gaps_seconds: list[float] = field(default_factory=list)  # between two finished canvases
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    canvases: int = 0
    steps: int = 0
    error: str | None = None  # its kind; the figures leave such a request out


@dataclass(frozen=True, slots=True)
class Load:
    """What one concurrency did."""

    concurrency: int
    seconds: float  # from the first request sent to the last one ended
    outcomes: Sequence[Outcome]


def run_load(
    send: Send,
    requests: int,
    concurrency: int,
    done: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Load:
    """Sends requests 0 to ``requests`` - 1 by ``concurrency`` threads. ``done`` is called after each, by any of them.

    An interrupt (Ctrl-C) lets no further request start; those that run are left to the caller, who closes the client.
    """
    numbers = itertools.count()  # next() on it is atomic
    outcomes: list[Outcome | None] = [None] * requests
    failed: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set() and (number := next(numbers)) < requests:
                outcomes[number] = observe(send, number, clock)
                done()
        except BaseException as error:  # a bug, which the caller must see
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"load-{index}", daemon=True) for index in range(concurrency)]
    started = clock()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            wait_for_end(thread)
    finally:
        stop.set()
    seconds = clock() - started
    if failed:
        raise failed[0]
    return Load(concurrency, seconds, [outcome for outcome in outcomes if outcome is not None])


def observe(send: Send, number: int, clock: Callable[[], float]) -> Outcome:
    """Sends one request and reads it to its end. An error of ours ends it and is noted by its kind."""
    outcome = Outcome()
    started = last = clock()
    try:
        for response in send(number):
            if response.is_draft:
                continue
            now = clock()
            if outcome.first_canvas_seconds is None:
                outcome.first_canvas_seconds = now - started
            else:
                outcome.gaps_seconds.append(now - last)
            last = now
            outcome.output_tokens += response.num_output_tokens
            outcome.input_tokens, outcome.cached_tokens = response.num_input_tokens, response.num_cached_tokens
            outcome.canvases, outcome.steps = response.canvas_index + 1, response.denoising_steps
    except CanvasRTError as error:
        outcome.error = kind_of(error)
    outcome.seconds = clock() - started
    return outcome


def percentile(values: Iterable[float], percent: float) -> float | None:
    """By nearest rank: the least of the values that at least ``percent`` % of them do not exceed; None without values.

    It is always a value that was measured, never one between two.
    """
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1] if ordered else None


def figures(load: Load) -> dict[str, object]:
    """The figures of one concurrency, of its requests that were answered; errors are counted by kind beside them.

    Times in milliseconds, as {"mean", "p50", "p90", "p99"}:
    request latency and time to first canvas, over requests; inter-canvas time, over all pairs of finished canvases that
    follow each other in one request, so a request of one canvas adds nothing to it.
    Throughputs are sums over the whole time of the load: tokens, or answered requests, per second.
    Steps per canvas and tokens per forward are ratios of sums too, so a long request weighs more than a short one;
    a forward counts for each request that shares it, and a token is one that was delivered.
    """
    answered = [outcome for outcome in load.outcomes if outcome.error is None]
    tokens, steps = sum(each.output_tokens for each in answered), sum(each.steps for each in answered)
    canvases, prompt = sum(each.canvases for each in answered), sum(each.input_tokens for each in answered)
    firsts = [each.first_canvas_seconds for each in answered if each.first_canvas_seconds is not None]
    return {
        "concurrency": load.concurrency,
        "requests": len(load.outcomes),
        "answered": len(answered),
        "errors": dict(sorted(Counter(each.error for each in load.outcomes if each.error).items())),
        "seconds": load.seconds,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / load.seconds,
        "requests_per_second": len(answered) / load.seconds,
        "steps_per_canvas": _ratio(steps, canvases),
        "tokens_per_forward": _ratio(tokens, steps),
        "cached_prompt_share": _ratio(sum(each.cached_tokens for each in answered), prompt),
        "time_to_first_canvas_ms": _times(firsts),
        "inter_canvas_ms": _times([gap for each in answered for gap in each.gaps_seconds]),
        "request_latency_ms": _times([each.seconds for each in answered]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _times(seconds: Sequence[float]) -> dict[str, float] | None:
    """None without any."""
    if not seconds:
        return None
    ranks = {f"p{percent}": 1e3 * (percentile(seconds, percent) or 0.0) for percent in PERCENTILES}
    return {"mean": 1e3 * sum(seconds) / len(seconds), **ranks}
