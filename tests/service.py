"""A service over a runner without a network, and requests to it: what the tests of everything below Triton use."""

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from canvasrt import wire
from canvasrt.diffusion.params import GenerationConfig
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.scheduler.loop import CanvasLoop
from canvasrt.scheduler.types import Policy
from canvasrt.serve.intake import Served
from canvasrt.serve.metrics import Family, Metrics
from canvasrt.serve.responses import Response
from canvasrt.serve.service import Service
from canvasrt.serve.tokenizer import TextCodec
from canvasrt.spec import ModelSpec
from planning import DEMO

_DTYPES = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "UINT32": np.uint32, "UINT64": np.uint64,
           "FP32": np.float32}  # fmt: skip
_INPUTS = {tensor.name: tensor for tensor in wire.INPUTS}


def tensors(**values: Any) -> dict[str, np.ndarray]:
    """As Triton hands them to a model: [1, n], texts as bytes."""
    made = {}
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        made[name] = np.array(items, dtype=_DTYPES[_INPUTS[name].dtype]).reshape(1, len(items))
    return made


class Asked:
    """A request and what it was answered; implements Incoming."""

    def __init__(self, parameters: Mapping[str, object] | None = None, timeout: float | None = None, **values: Any):
        self.name = "asked"
        self.timeout = timeout
        self.tensors = tensors(**values)
        self.parameters = dict(parameters or {})
        self.gone = threading.Event()  # the client
        self.said: list[Response] = []
        self.failure: tuple[str, str] | None = None
        self.ends = 0
        self._ended = threading.Event()
        self.first = threading.Event()

    def send(self, response: Response, final: bool) -> None:
        self.said.append(response)
        self.first.set()
        if final:
            self._end()

    def fail(self, kind: wire.ErrorKind, message: str) -> None:
        self.failure = (kind, message)
        self._end()

    def is_cancelled(self) -> bool:
        return self.gone.is_set()

    def _end(self) -> None:
        self.ends += 1
        self._ended.set()

    def wait(self, timeout: float = 30) -> "Asked":
        assert self._ended.wait(timeout), "no answer"
        return self

    @property
    def text(self) -> str:
        assert self.failure is None, self.failure
        return "".join(response.text for response in self.said if not response.is_draft)


class Recorded:
    """A metric that remembers."""

    def __init__(self) -> None:
        self.value = 0.0
        self.observed: list[float] = []

    def increment(self, value: float) -> None:
        self.value += value

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.observed.append(value)


class Desk:
    """A service, its metrics and its log."""

    def __init__(self, runner: EngineRunner, served: Served, policy: Policy) -> None:
        self.metrics: dict[tuple[str, ...], Recorded] = {}
        self.lines: queue.SimpleQueue[tuple[str, Mapping[str, object]]] = queue.SimpleQueue()
        made = Metrics(self._metric, runner.limits.slots, runner.limits.context)
        self.service = Service(
            lambda listener: CanvasLoop(runner, policy, listener),
            served,
            made,
            lambda event, fields: self.lines.put((event, fields)),
        )

    def _metric(self, family: Family, labels: Mapping[str, str]) -> Recorded:
        return self.metrics.setdefault((family.name, *labels.values()), Recorded())

    def ask(self, asked: Asked) -> Asked:
        self.service.accept(asked)
        return asked

    def value(self, name: str, *labels: str) -> float:
        found = self.metrics.get((f"canvasrt_{name}", *labels))
        return found.value if found else 0.0

    def settles(self, name: str, value: float, *labels: str) -> bool:
        """Metrics follow the answers by a moment."""
        until = time.monotonic() + 10
        while self.value(name, *labels) != value and time.monotonic() < until:
            time.sleep(0.01)
        return self.value(name, *labels) == value


class Gate(FakeRunner):
    """A runner that waits before each step until it is let go, so that a test can act in between."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.open = threading.Event()
        self.steps = threading.Semaphore(0)

    def denoise(self, rows: Any, meanwhile: Any = None) -> Any:
        if not self.open.is_set():
            self.steps.acquire(timeout=30)
        return super().denoise(rows)


def served(runner: EngineRunner, codec: bool = True) -> Served:
    """The demo's tokenizer and vocabulary over any runner of that vocabulary."""
    config = GenerationConfig(max_denoising_steps=6, confidence_threshold=0.5, eos_token_id=(1,))
    return Served(ModelSpec.load(DEMO), config, runner.limits.context, _codec() if codec else None)


@cache
def _codec() -> TextCodec:
    return TextCodec.load(DEMO)


def fake(**options: int) -> FakeRunner:
    return FakeRunner(**{"canvas": 48, "vocabulary": 112, "context": 512, "slots": 4, **options})


@contextmanager
def desk(runner: EngineRunner | None = None, **policy: Any) -> Iterator[Desk]:
    runner = runner or fake()
    made = Desk(runner, served(runner), Policy(**{"canvases": 4, "prefill_tokens": 64, "max_waiting": 16, **policy}))
    try:
        yield made
    finally:
        if isinstance(runner, Gate):
            runner.open.set()
            runner.steps.release(1000)
        made.service.close(10)
