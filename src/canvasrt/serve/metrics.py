"""What a server tells Prometheus: names, meanings and buckets, once; recorded from the events and turns of the loop.

Triton's own nv_inference_request_success counts error responses of a streaming model too, so alerts should use these.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from canvasrt import wire
from canvasrt.scheduler.loop import Turn
from canvasrt.scheduler.types import Load

Kind = Literal["counter", "gauge", "histogram"]
# How a request may end.
OUTCOMES = ("stop", "length", *get_args(wire.ErrorKind))
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
_STEPS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILIES = (
    Family("canvasrt_requests_total", "counter", "Requests that ended, by how.", ("outcome",)),
    Family("canvasrt_model_loads_total", "counter", "Times that the model was loaded since the server started."),
    Family("canvasrt_requests_waiting", "gauge", "Requests that wait for a slot."),
    Family("canvasrt_requests_running", "gauge", "Requests that hold a slot."),
    Family("canvasrt_slots", "gauge", "Slots of K/V memory."),
    Family("canvasrt_slots_kept", "gauge", "Free slots that keep the tokens of a request that has ended."),
    Family("canvasrt_kv_capacity_tokens", "gauge", "Context tokens that all slots have room for."),
    Family("canvasrt_kv_used_tokens", "gauge", "Context tokens of running requests."),
    Family("canvasrt_kv_kept_tokens", "gauge", "Context tokens in slots that are kept."),
    Family("canvasrt_prompt_tokens_total", "counter", "Prompt tokens of admitted requests."),
    Family("canvasrt_prefix_cache_tokens_total", "counter", "Prompt tokens that were found in a kept slot."),
    Family("canvasrt_prefix_cache_hits_total", "counter", "Admitted requests that found some."),
    Family("canvasrt_canvases_total", "counter", "Canvases finished."),
    Family("canvasrt_denoising_steps_total", "counter", "Denoising steps, each request counted for itself."),
    Family("canvasrt_output_tokens_total", "counter", "Tokens of finished canvases, cut at the end of the answer."),
    Family("canvasrt_steps_per_canvas", "histogram", "Denoising steps of a finished canvas.", (), _STEPS),
    Family("canvasrt_tokens_per_forward", "histogram", "Tokens by denoising steps of a canvas.", (), _TOKENS),
    Family("canvasrt_queue_seconds", "histogram", "From arrival to a slot.", (), _SECONDS),
    Family("canvasrt_first_canvas_seconds", "histogram", "From arrival to the first finished canvas.", (), _SECONDS),
    Family("canvasrt_canvas_seconds", "histogram", "From one finished canvas to the next.", (), _SECONDS),
    Family("canvasrt_request_seconds", "histogram", "From arrival to the end.", (), _SECONDS),
    Family("canvasrt_step_seconds", "histogram", "Time of the runner in a tick, by rows.", ("rows",), _STEP_SECONDS),
)


class Metric(Protocol):
    """A time series, as Triton's Python backend has them."""

    def increment(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...


# Makes the time series of a family with these labels.
MakeMetric = Callable[[Family, Mapping[str, str]], Metric]


class Metrics:
    """Records into time series that are made when they are first needed. Any thread may call it.

    Every call of a time series goes to another process, while no other thread of this one runs: 0.15 ms that denoising
    waits. So counters and gauges are collected, and written by `flush`; a histogram takes one value at a time.
    """

    def __init__(self, make: MakeMetric, slots: int, context: int) -> None:
        self._make = make
        self._families = {family.name: family for family in FAMILIES}
        self._series: dict[tuple[str, tuple[str, ...]], Metric] = {}
        self._lock = threading.Lock()
        self._added: Counter[tuple[str, ...]] = Counter()  # since the last flush, by name and labels
        self._gauges: dict[str, float] = {}
        self._flushed: dict[str, float] = {}
        for family in FAMILIES:
            if not family.labels:
                self._of(family.name)  # so that a server without requests shows zeros, not nothing
        for outcome in OUTCOMES:
            self._of("canvasrt_requests_total", outcome)  # rate() can't see the first of a series that wasn't there
        # Triton keeps the series of a model that is loaded again: its gauges would go on telling of lost requests.
        self.load(Load(0, 0, 0, 0, 0))
        self._add("model_loads_total", 1)
        self._set("slots", slots)
        self._set("kv_capacity_tokens", slots * context)
        self.flush()

    def turn(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            if turn.denoised_rows:
                self._observe("step_seconds", turn.seconds, str(turn.denoised_rows))
                self._add("denoising_steps_total", turn.denoised_rows)
        if turns:
            self.load(turns[-1].load)

    def load(self, load: Load) -> None:
        self._set("requests_waiting", load.waiting)
        self._set("requests_running", load.running)
        self._set("slots_kept", load.kept)
        self._set("kv_used_tokens", load.context_tokens)
        self._set("kv_kept_tokens", load.kept_tokens)

    def admitted(self, seconds: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._observe("queue_seconds", seconds)
        self._add("prompt_tokens_total", prompt_tokens)
        if cached_tokens:
            self._add("prefix_cache_hits_total", 1)
            self._add("prefix_cache_tokens_total", cached_tokens)

    def canvas(self, seconds: float, first: bool, tokens: int, steps: int) -> None:
        """``seconds``: since the request arrived, or since its canvas before."""
        self._observe("first_canvas_seconds" if first else "canvas_seconds", seconds)
        self._add("canvases_total", 1)
        self._add("output_tokens_total", tokens)
        self._observe("steps_per_canvas", steps)
        self._observe("tokens_per_forward", tokens / steps)

    def ended(self, outcome: str, seconds: float) -> None:
        self._add("requests_total", 1, outcome)
        self._observe("request_seconds", seconds)

    def flush(self) -> None:
        with self._lock:
            added, self._added = self._added, Counter()
            changed = {name: value for name, value in self._gauges.items() if self._flushed.get(name) != value}
            self._flushed |= changed
            for (name, *labels), count in added.items():
                self._of(name, *labels).increment(count)
            for name, value in changed.items():
                self._of(name).set(value)

    def _add(self, name: str, value: int, *labels: str) -> None:
        with self._lock:
            self._added[f"canvasrt_{name}", *labels] += value

    def _set(self, name: str, value: float) -> None:
        with self._lock:
            self._gauges[f"canvasrt_{name}"] = value

    def _observe(self, name: str, value: float, *labels: str) -> None:
        with self._lock:
            self._of(f"canvasrt_{name}", *labels).observe(value)

    def _of(self, name: str, *labels: str) -> Metric:
        key = (name, labels)
        if key not in self._series:
            family = self._families[name]
            self._series[key] = self._make(family, dict(zip(family.labels, labels, strict=True)))
        return self._series[key]


def no_metric(family: Family, labels: Mapping[str, str]) -> Any:
    """For a server without Triton."""
    return _Nothing()


class _Nothing:
    def increment(self, value: float) -> None: ...

    def set(self, value: float) -> None: ...

    def observe(self, value: float) -> None: ...
