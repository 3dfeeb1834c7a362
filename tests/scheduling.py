"""What the scheduler's tests share: requests, the published loop, a runner that checks what it is asked, sessions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import CapacityError
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, EngineRunner
from canvasrt.scheduler.execute import execute
from canvasrt.scheduler.scheduler import Scheduler
from canvasrt.scheduler.types import ENDS, Event, Policy, Request, Tick

CANVAS, VOCABULARY, CONTEXT = 8, 64, 160
PARAMS = RequestParams(
    seed=0, max_tokens=16, max_denoising_steps=4, t_min=0.4, t_max=0.8, entropy_bound=0.1, stability_threshold=1,
    confidence_threshold=0.005, top_k=0, top_p=1.0, stop=(), stop_token_ids=frozenset({1}), canvas=CANVAS,
    vocabulary=VOCABULARY,
)  # fmt: skip
POLICY = Policy(canvases=2, prefill_tokens=16, max_waiting=1000)
LETTERS = {"admitted": "a", "draft": "d", "canvas": "c", "end": "e", "failed": "f", "cancelled": "x", "timed out": "t"}


def fake(slots: int = 4, **options: Any) -> FakeRunner:
    return FakeRunner(slots=slots, context=CONTEXT, chunk=16, canvas=CANVAS, vocabulary=VOCABULARY, **options)


def tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length).astype(np.int32)


def ask(number: int, prompt: int | np.ndarray = 9, **changes: Any) -> Request:
    """Request ``number`` with its own seed; ``prompt`` is the tokens or how many. The rest changes either part."""
    own = {name: changes.pop(name) for name in list(changes) if name in Request.__dataclass_fields__}
    ids = tokens(number, prompt) if isinstance(prompt, int) else prompt
    return Request(number, RequestState.new(replace(PARAMS, **{"seed": number, **changes}), ids), **own)


def short(number: int, prompt: int | np.ndarray = 9, **changes: Any) -> Request:
    """One canvas of one step."""
    return ask(number, prompt, **{"max_tokens": 1, "max_denoising_steps": 1, **changes})


def steady(number: int, prompt: int | np.ndarray = 9, canvases: int = 4, steps: int = 4, **changes: Any) -> Request:
    """Exactly ``canvases`` canvases of ``steps`` steps."""
    fixed = {"stop_token_ids": frozenset(), "confidence_threshold": 1e-9, "max_tokens": canvases * CANVAS}
    return ask(number, prompt, **{**fixed, "max_denoising_steps": steps, **changes})


@dataclass(frozen=True)
class Answer:
    output: tuple[int, ...]
    reason: str
    steps: tuple[int, ...]  # of each canvas
    context: tuple[int, ...]  # prompt and the finished canvases that were encoded


def published(request: Request, runner: EngineRunner) -> Answer:
    """The published loop: one request, slot 0, nothing shared with the scheduler but the noise."""
    params = request.state.params
    full = params.max_denoising_steps
    context, answer, counts = request.state.to_encode.tolist(), [], []
    while True:
        runner.release(0)
        runner.encode([EncodeRow(0, np.array(context, np.int32), 0)])
        canvas = step_noise(params.seed, len(counts), full + 1, params.canvas, params.vocabulary).tokens
        seen: list[list[int]] = []
        for left in range(full, 0, -1):
            noise = step_noise(params.seed, len(counts), left, params.canvas, params.vocabulary)
            share = np.float32(left) / np.float32(full)
            heat = float(np.float32(params.t_min) + np.float32(params.t_max - params.t_min) * share)
            row = DenoiseRow(0, canvas, heat, noise.uniforms, left == full, params.top_k, params.top_p)
            (result,) = runner.denoise([row])
            canvas, spent = noise.tokens.copy(), 0.0
            for place in sorted(range(params.canvas), key=lambda p: float(result.entropy[p])):
                if spent <= params.entropy_bound:
                    canvas[place] = result.sampled[place]
                spent += float(result.entropy[place])
            seen.append(result.argmax.tolist())
            last = seen[-1 - params.stability_threshold :]
            same = len(last) == params.stability_threshold + 1 and all(each == seen[-1] for each in last)
            if same and float(result.entropy.mean()) < params.confidence_threshold:
                break
        counts.append(len(seen))
        answer += seen[-1]
        ends = [place for place, token in enumerate(answer) if token in params.stop_token_ids]
        cut = min([*ends, params.max_tokens])
        stopped = ends and ends[0] <= params.max_tokens
        if stopped or len(answer) >= params.max_tokens or asked_to_stop(request, tuple(answer)):
            reason = "length" if not stopped and len(answer) >= params.max_tokens else "stop"
            return Answer(tuple(answer[:cut]), reason, tuple(counts), tuple(context))
        context += seen[-1]


def asked_to_stop(request: Request, output: tuple[int, ...]) -> bool:
    return request.stop_check is not None and request.stop_check(replace(request.state, output=output))


class Watched:
    """A runner that checks every row against what its request must be at, and fails where it is told to.

    A row tells whose it is by its noise. What is wrong is listed in ``faults``: an exception would be taken for one
    of the runner's.
    """

    def __init__(self, runner: EngineRunner) -> None:
        self.runner, self.limits = runner, runner.limits
        self.faults: list[str] = []
        self.tick = self.calls = self.prompt_tokens = 0
        self.fail_slot: tuple[int, int] | None = None  # from this call on, the next row of this slot
        self.fail_calls: dict[int, bool] = {}  # call -> whether its work is done before it raises
        self.dirty: set[int] = set()  # slots that failed and were not released since
        self.held = [np.zeros(0, np.int32) for _ in range(self.limits.slots)]
        self.filled = [0] * self.limits.slots  # tick of the last encode
        self.tenant: dict[int, int] = {}  # slot -> request that has denoised there and not ended
        self.noise: dict[bytes, tuple[int, int, int]] = {}  # uniforms -> request, canvas, step
        self.requests: dict[int, Request] = {}
        self.context: dict[int, list[int]] = {}
        self.last: dict[int, tuple[int, int, list[int]]] = {}  # canvas, step and argmax of a request's last step
        self.steps: dict[int, list[int]] = {}  # ticks
        self.ready: dict[int, int] = {}  # tick in which the prompt was complete

    def can_rewind(self, slot: int, length: int) -> bool:
        return self.runner.can_rewind(slot, length)

    def length(self, slot: int) -> int:
        return self.runner.length(slot)

    def expect(self, request: Request) -> None:
        params = request.state.params
        self.requests[request.id] = request
        self.context[request.id] = request.state.to_encode.tolist()
        for index in range(-(-params.max_tokens // params.canvas) + 1):
            for step in range(1, params.max_denoising_steps + 1):
                drawn = step_noise(params.seed, index, step, params.canvas, params.vocabulary)
                self.noise[drawn.uniforms.tobytes()] = (request.id, index, step)

    def ended(self, request: int) -> None:
        self.tenant = {slot: each for slot, each in self.tenant.items() if each != request}

    def look_at(self, tick: Tick, policy: Policy) -> None:
        self.tick = tick.number
        commits = [row for row in tick.encode if row.slot in self.tenant]
        prompts = sum(len(row.tokens) for row in tick.encode if row.slot not in self.tenant)
        self._demand(prompts <= policy.prefill_tokens, f"{prompts} prompt tokens in a tick")
        self._demand(len(commits) <= policy.canvases, f"{len(commits)} canvases encoded in a tick")
        self._demand(len(tick.denoise) <= policy.canvases, f"{len(tick.denoise)} rows in a denoising call")
        self._demand(not set(tick.release) & self.tenant.keys(), "a slot in use is released")
        for rows in (tick.encode, tick.denoise):
            self._demand(len({row.slot for row in rows}) == len(rows), "two rows for one slot")

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        self._call(self.runner.encode, rows)
        for row in rows:
            held, tenant = self.held[row.slot], self.tenant.get(row.slot)
            if tenant is None:
                self.prompt_tokens += len(row.tokens)
            else:
                self._demand(row.position == len(held), f"canvas of {tenant} at {row.position}, not {len(held)}")
                self._demand(row.tokens.tolist() == self.last[tenant][2], f"{tenant} encodes another canvas")
            self.held[row.slot] = np.concatenate([held[: row.position], row.tokens])
            self.filled[row.slot] = self.tick

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        results = self._call(self.runner.denoise, rows)
        for row, result in zip(rows, results, strict=True):
            self._stepped(row, result)
        return results

    def release(self, slot: int) -> None:
        self.runner.release(slot)
        self.dirty.discard(slot)
        self.held[slot] = self.held[slot][:0]

    def _stepped(self, row: DenoiseRow, result: DenoiseResult) -> None:
        if row.uniforms.tobytes() not in self.noise:
            self.faults.append(f"slot {row.slot} in tick {self.tick}: noise of no request")
            return
        request, canvas, step = self.noise[row.uniforms.tobytes()]
        full = self.requests[request].state.params.max_denoising_steps
        if request not in self.last:
            self.ready[request] = self.filled[row.slot]
            allowed = [(0, full)]
        else:
            before, left, argmax = self.last[request]
            allowed = [(before, left - 1), (before + 1, full)]
            if canvas == before + 1:
                self.context[request] += argmax
        self._demand(self.tenant.setdefault(row.slot, request) == request, f"{request} is in the slot of another")
        self._demand((canvas, step) in allowed, f"{request} runs step {step} of canvas {canvas}, not {allowed}")
        self._demand(row.first == (step == full), f"{request} has first={row.first} in step {step} of {full}")
        self._demand(self.held[row.slot].tolist() == self.context[request], f"{request} sees another context")
        self.last[request] = (canvas, step, result.argmax.tolist())
        self.steps.setdefault(request, []).append(self.tick)

    def _call(self, verb: Callable[[Any], Any], rows: Sequence[Any]) -> Any:
        slots = {row.slot for row in rows}
        self._demand(not slots & self.dirty, f"slots {slots & self.dirty} have failed and were not released")
        self.calls += 1
        if self.fail_slot and self.calls >= self.fail_slot[0] and self.fail_slot[1] in slots:
            if len(rows) == 1:
                self.fail_slot = None
                self.dirty |= slots
            raise CapacityError("planted")
        if self.calls in self.fail_calls:
            if self.fail_calls[self.calls]:
                verb(rows)
            self.dirty |= slots
            raise RuntimeError("planted")
        return verb(rows)

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            self.faults.append(f"tick {self.tick}: {what}")


class Session:
    """A scheduler over a watched runner; the clock shows the number of the tick."""

    def __init__(
        self, policy: Policy = POLICY, runner: EngineRunner | None = None, alone: EngineRunner | None = None
    ) -> None:
        """``alone``: a runner of the same network for the published loop."""
        self.policy = policy
        self.alone = alone or fake(1)
        self.answers: dict[int, Answer] = {}
        self.runner = Watched(runner or fake())
        self.scheduler = Scheduler(self.runner.limits, policy, self.runner.can_rewind)
        self.now = 0
        self.requests: dict[int, Request] = {}  # in the order of arrival
        self.log: list[tuple[str, int, int]] = []  # what, request, tick
        self.events: dict[int, list[Event]] = {}

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.submit(request)
            self.requests[request.id] = request
            self.events[request.id] = []
            self.log.append(("submit", request.id, self.now))
            self.runner.expect(request)

    def cancel(self, request: int) -> None:
        self.scheduler.cancel(request)
        self.log.append(("cancel", request, self.now))

    def tick(self, between: Callable[[], None] = lambda: None) -> list[Event]:
        """``between``: called while the runner works."""
        self.now += 1
        tick = self.scheduler.plan(float(self.now))
        self._note(tick.events)
        self.runner.look_at(tick, self.policy)
        outcome = execute(self.runner, tick)
        between()
        events = self.scheduler.apply(tick, outcome, float(self.now))
        self._note(events)
        return [*tick.events, *events]

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.tick()

    def finish(self, limit: int = 3000) -> "Session":
        for _ in range(limit):
            if self.scheduler.idle:
                return self
            self.tick()
        raise AssertionError(f"not idle after {limit} ticks")

    def when(self, what: str, request: int) -> int:
        """The first tick in which it happened."""
        return next(tick for kind, number, tick in self.log if (kind, number) == (what, request))

    def answer(self, request: int) -> Answer:
        """What the published loop says."""
        if request not in self.answers:
            self.answers[request] = published(self.requests[request], self.alone)
        return self.answers[request]

    def kinds(self, request: int) -> str:
        return "".join(LETTERS[event.kind] for event in self.events[request])

    def admissions(self) -> list[int]:
        return [request for what, request, _ in self.log if what == "admitted"]

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events[event.request].append(event)
            self.log.append((event.kind, event.request, self.now))
            if event.kind in ENDS:
                self.runner.ended(event.request)
