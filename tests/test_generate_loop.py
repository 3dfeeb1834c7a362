"""run_requests: equal to the published loop, independent of neighbours, and no slot is kept however a request ends."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import CapacityError
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.generate import Event, run_requests
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, RunnerLimits

Outcome = tuple[tuple[int, ...], int, str | None]

PARAMS = RequestParams(
    seed=3,
    max_tokens=40,
    max_denoising_steps=8,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    stability_threshold=1,
    confidence_threshold=0.005,
    top_k=0,
    top_p=1.0,
    stop=(),
    stop_token_ids=frozenset({1}),
    canvas=16,
    vocabulary=64,
)


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 64, length).astype(np.int32)


def request(seed: int, length: int = 9, **changes: Any) -> RequestState:
    return RequestState.new(replace(PARAMS, seed=seed, **changes), prompt(seed, length))


def outcomes(events: Sequence[Event]) -> dict[int, Outcome]:
    return {
        event.request: (event.state.output, event.state.passes, event.state.finish_reason)
        for event in events
        if event.kind == "end"
    }


def assert_all_released(runner: Any) -> None:
    assert [runner.length(slot) for slot in range(runner.limits.slots)] == [0] * runner.limits.slots


class TableModel:
    """Random tables as a network: reads context, canvas and the previous step's logits, and settles at its own pace."""

    def __init__(self, seed: int, canvas: int, vocabulary: int, eos: frozenset[int]) -> None:
        rng = np.random.default_rng(seed)
        self.shape = (canvas, vocabulary)
        self.of_canvas = rng.normal(size=(vocabulary, vocabulary)) * rng.choice([0.05, 0.5, 2.0])
        self.of_token = rng.normal(size=(vocabulary, vocabulary))
        self.gain = rng.choice([1.0, 3.0, 8.0])
        self.memory = rng.choice([0.0, 0.3, 0.6])
        self.bias = np.zeros(vocabulary)
        self.bias[list(eos)] = rng.choice([0.0, 1.0, 2.0])

    def __call__(self, context: list[int], canvas: list[int], previous: torch.Tensor | None) -> torch.Tensor:
        weights = np.cos(np.arange(1, len(context) + 1)[None] * np.arange(1, self.shape[0] + 1)[:, None])
        target = weights @ self.of_token[context] / len(context) ** 0.5 + self.bias
        logits = self.gain * target + self.of_canvas[canvas]
        if previous is not None:
            logits = logits + self.memory * previous.numpy()
        return torch.from_numpy(30 * np.tanh(logits / 30))


class TableRunner:
    """EngineRunner over a TableModel, in NumPy."""

    def __init__(self, model: TableModel, slots: int) -> None:
        canvas, vocabulary = model.shape
        self.limits = RunnerLimits(slots, 256, 7, canvas, vocabulary)
        self.model = model
        self.contexts: list[list[int]] = [[] for _ in range(slots)]
        self.previous: list[torch.Tensor | None] = [None] * slots

    def length(self, slot: int) -> int:
        return len(self.contexts[slot])

    def release(self, slot: int) -> None:
        self.contexts[slot] = []

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        for row in rows:
            self.contexts[row.slot] = self.contexts[row.slot][: row.position] + row.tokens.tolist()
            assert self.length(row.slot) < self.limits.context, "a request that never ends"

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        return [self.denoise_row(row) for row in rows]

    def denoise_row(self, row: DenoiseRow) -> DenoiseResult:
        signal = None if row.first else self.previous[row.slot]
        scaled = self.model(self.contexts[row.slot], row.canvas.tolist(), signal).numpy() / row.temperature
        self.previous[row.slot] = torch.from_numpy(scaled)
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        share = weights / total
        entropy = np.log(total[:, 0]) - (share * (scaled - scaled.max(axis=1, keepdims=True))).sum(axis=1)
        edges = np.cumsum(weights, axis=1)
        sampled = [
            np.searchsorted(row_edges, u * row_edges[-1], "right")
            for row_edges, u in zip(edges, row.uniforms, strict=True)
        ]
        return DenoiseResult(
            scaled.argmax(axis=1).astype(np.int32), np.array(sampled, np.int32), entropy.astype(np.float32)
        )


def drawn_params(rng: np.random.Generator) -> RequestParams:
    canvas, vocabulary = int(rng.integers(1, 13)), int(rng.integers(4, 40))
    t_min = float(rng.choice([0.0, 0.2, 0.4, 1.0]))
    return RequestParams(
        seed=int(rng.integers(0, 2**32)),
        max_tokens=int(rng.integers(1, 4 * canvas + 2)),
        max_denoising_steps=int(rng.choice([1, 2, 5, 12, 30])),
        t_min=t_min,
        t_max=t_min + float(rng.choice([0.1, 0.4, 1.5])),
        entropy_bound=float(rng.choice([0.01, 0.1, 1.0, 10.0])),
        stability_threshold=int(rng.integers(0, 4)),
        confidence_threshold=float(rng.choice([0.005, 0.1, 0.5, 2.0])),
        top_k=0,
        top_p=1.0,
        stop=(),
        stop_token_ids=frozenset(rng.integers(0, vocabulary, rng.integers(0, 3)).tolist()),
        canvas=canvas,
        vocabulary=vocabulary,
    )


def published(model: TableModel, params: RequestParams, prompt_ids: list[int]) -> Outcome:
    def noise(index: int, step: int) -> tuple[list[float], list[int]]:
        drawn = step_noise(params.seed, index, step, params.canvas, params.vocabulary)
        return drawn.uniforms.astype(np.float64).tolist(), drawn.tokens.tolist()

    of_loop = oracle.Settings(
        steps=params.max_denoising_steps,
        t_min=params.t_min,
        t_max=params.t_max,
        bound=params.entropy_bound,
        stability=params.stability_threshold,
        confidence=params.confidence_threshold,
        max_tokens=params.max_tokens,
        eos=params.stop_token_ids,
    )
    tokens, passes, reason = oracle.generate(model, noise, prompt_ids, of_loop)
    return tuple(tokens), passes, reason


def compared(seed: int) -> tuple[RequestParams, Outcome, Outcome]:
    rng = np.random.default_rng(seed)
    params = drawn_params(rng)
    model = TableModel(seed, params.canvas, params.vocabulary, params.stop_token_ids)
    # neighbours in other slots, with other prompts and seeds but the same canvas
    prompts = [rng.integers(0, params.vocabulary, rng.integers(1, 20)).astype(np.int32) for _ in range(3)]
    states = {
        number: RequestState.new(replace(params, seed=params.seed + number), ids) for number, ids in enumerate(prompts)
    }
    chosen = int(rng.integers(0, 3))
    found = outcomes(list(run_requests(TableRunner(model, slots=2), states)))
    return params, found[chosen], published(model, states[chosen].params, prompts[chosen].tolist())


@pytest.mark.parametrize("seed", range(120))
def test_tokens_passes_and_finish_are_those_of_the_published_loop(seed: int) -> None:
    params, found, expected = compared(seed)
    assert found == expected, params


def test_the_settings_compared_reach_every_way_to_end() -> None:
    runs = [compared(seed) for seed in range(120)]
    cut_by_steps = [run for run in runs if run[1][1] % run[0].max_denoising_steps == 0]
    assert len(runs) - len(cut_by_steps) > 20  # stopped as stable and confident
    assert len(cut_by_steps) > 20
    assert sum(outcome[2] == "stop" for _, outcome, _ in runs) > 20
    assert sum(outcome[2] == "length" for _, outcome, _ in runs) > 20
    assert sum(len(outcome[0]) > params.canvas for params, outcome, _ in runs) > 20  # more than one canvas


@settings(max_examples=30)
@given(data=st.data())
def test_a_requests_text_depends_neither_on_neighbours_nor_on_order_nor_on_slots(data: st.DataObject) -> None:
    requests = {
        number: request(
            number,
            data.draw(st.integers(1, 40)),
            max_denoising_steps=data.draw(st.integers(1, 9)),
            max_tokens=data.draw(st.integers(1, 60)),
            stability_threshold=data.draw(st.integers(0, 2)),
            top_k=data.draw(st.integers(0, 1)),
            top_p=data.draw(st.sampled_from([1.0, 0.9])),
        )
        for number in range(data.draw(st.integers(1, 6)))
    }
    alone = {
        number: outcomes(list(run_requests(FakeRunner(slots=1), {number: state})))[number]
        for number, state in requests.items()
    }
    order = data.draw(st.permutations(list(requests)))
    runner = FakeRunner(slots=data.draw(st.integers(1, 5)))
    together = outcomes(list(run_requests(runner, {number: requests[number] for number in order})))
    assert together == alone
    assert_all_released(runner)


def test_requests_beyond_the_slots_wait_and_a_freed_slot_is_filled_in_the_next_call() -> None:
    runner = FakeRunner(slots=2)
    lengths = {0: 16, 1: 48, 2: 16, 3: 16}
    requests = {
        number: request(number, max_tokens=tokens, stop_token_ids=frozenset(), max_denoising_steps=2)
        for number, tokens in lengths.items()
    }
    events = list(run_requests(runner, requests))
    assert outcomes(events).keys() == lengths.keys()
    assert [event.request for event in events if event.kind == "end"][:2] == [0, 2]
    denoised = [len(slots) for verb, slots in runner.calls if verb == "denoise"]
    # 16 tokens take two steps and 48 six; both slots are busy until the last two leave together
    assert denoised == [2] * 6
    assert max(len(slots) for verb, slots in runner.calls if verb == "encode") == 2
    assert_all_released(runner)


def test_filters_of_each_request_reach_the_runner() -> None:
    requests = {number: request(number, top_k=5 * number, top_p=1 - number / 10) for number in range(3)}
    runner, rows = FakeRunner(slots=3), []
    inner = runner.denoise
    runner.denoise = lambda asked: rows.extend(asked) or inner(asked)
    list(run_requests(runner, requests))
    assert {(row.slot, row.top_k, row.top_p) for row in rows} == {(0, 0, 1.0), (1, 5, 0.9), (2, 10, 0.8)}


def test_every_slot_is_released_once_for_each_request() -> None:
    runner = FakeRunner(slots=2)
    list(run_requests(runner, {number: request(number) for number in range(5)}))
    assert sum(verb == "release" for verb, _ in runner.calls) == 5


def test_no_requests_make_no_calls() -> None:
    runner = FakeRunner()
    assert list(run_requests(runner, {})) == []
    assert runner.calls == []


def test_a_request_brings_steps_then_its_canvas_and_one_end() -> None:
    requests = {number: request(number, stop_token_ids=frozenset({1} if number % 2 else ())) for number in range(6)}
    events = list(run_requests(FakeRunner(slots=4), requests))
    for number in requests:
        own = [event for event in events if event.request == number]
        assert re.fullmatch("(s+c)+e", "".join(event.kind[0] for event in own)), own
        steps = [event.state for event in own if event.kind == "step"]
        assert [state.passes for state in steps] == list(range(1, len(steps) + 1))
        assert all(state.draft is not None for state in steps)
        canvases = [event.state.output for event in own if event.kind == "canvas"]
        assert [len(output) for output in canvases[:-1]] == [16 * (place + 1) for place in range(len(canvases) - 1)]
        assert own[-1].state.finish_reason is not None
        assert {event.state.finish_reason for event in own if event.state is not own[-1].state} <= {None}


def test_a_stop_check_ends_a_request_after_a_canvas_with_stop() -> None:
    asked: list[tuple[int, int]] = []

    def check(number: int, state: RequestState) -> bool:
        asked.append((number, len(state.output)))
        return number == 0 and len(state.output) == 32

    requests = {number: request(number, max_tokens=64, stop_token_ids=frozenset()) for number in range(2)}
    runner = FakeRunner()
    found = outcomes(list(run_requests(runner, requests, check)))
    assert (len(found[0][0]), found[0][2]) == (32, "stop")
    assert (len(found[1][0]), found[1][2]) == (64, "length")
    assert [length for number, length in asked if number == 0] == [16, 32]
    assert [length for number, length in asked if number == 1] == [16, 32, 48, 64]
    assert_all_released(runner)


def test_a_slot_is_free_when_its_end_is_reported() -> None:
    runner = FakeRunner(slots=1)
    for event in run_requests(runner, {number: request(number) for number in range(3)}):
        assert (runner.length(0) == 0) == (event.kind == "end")


class Failing:
    """A runner whose n-th call of encode or denoise raises, before or after the work was done."""

    def __init__(self, runner: FakeRunner, fails_at: int, after: bool) -> None:
        self.runner, self.left, self.after = runner, fails_at, after
        self.limits, self.length, self.release = runner.limits, runner.length, runner.release

    def call(self, verb: Any, rows: Sequence[Any]) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise CapacityError("planted")
        result = verb(rows)
        if self.left == 0:
            raise CapacityError("planted")
        return result

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        self.call(self.runner.encode, rows)

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        return self.call(self.runner.denoise, rows)


@settings(max_examples=100)
@given(
    count=st.integers(0, 7),
    slots=st.integers(1, 4),
    fails_at=st.integers(0, 25),  # 0: never
    after=st.booleans(),
    closed_at=st.one_of(st.none(), st.integers(0, 60)),
    check_fails_at=st.one_of(st.none(), st.integers(1, 8)),
)
def test_every_slot_is_given_back_after_any_mix_of_finish_cancel_and_error(
    count: int, slots: int, fails_at: int, after: bool, closed_at: int | None, check_fails_at: int | None
) -> None:
    requests = {number: request(number, 1 + number, max_tokens=8 + 10 * number) for number in range(count)}
    runner = FakeRunner(slots=slots)
    checks = iter(range(1, 1000))

    def check(number: int, state: RequestState) -> bool:
        if next(checks) == check_fails_at:
            raise ZeroDivisionError("planted")
        return number == 2

    events: list[Event] = []
    cancelled = failed = False
    with closing(run_requests(Failing(runner, fails_at, after), requests, check)) as running:
        try:
            for event in running:
                events.append(event)
                if len(events) == closed_at:
                    cancelled = True
                    break
        except (CapacityError, ZeroDivisionError) as error:
            failed = str(error) == "planted"
    assert_all_released(runner)
    ends = [event.request for event in events if event.kind == "end"]
    assert len(ends) == len(set(ends))
    if not cancelled and not failed:
        assert sorted(ends) == list(requests)
    # and the runner serves the next caller as if nothing had been
    assert outcomes(list(run_requests(runner, {9: request(9)}))) == outcomes(
        list(run_requests(FakeRunner(), {9: request(9)}))
    )


@pytest.mark.parametrize("verb", ["encode", "denoise"])
def test_an_error_of_the_runner_reaches_the_caller(verb: str) -> None:
    runner = FakeRunner(slots=2)
    with pytest.raises(CapacityError, match="planted"):
        list(run_requests(Failing(runner, 1 if verb == "encode" else 2, after=False), {0: request(0), 1: request(1)}))
    assert_all_released(runner)
    assert sorted(slots for called, slots in runner.calls if called == "release") == [(0,), (1,)]


def test_closing_after_one_of_two_requests_ended_in_a_call_releases_the_other() -> None:
    runner = FakeRunner(slots=2)
    requests = {number: request(number, max_tokens=16, max_denoising_steps=1) for number in range(2)}
    running = run_requests(runner, requests)
    while next(running).kind != "end":
        assert runner.length(1) > 0
    assert runner.length(1) > 0
    running.close()
    assert_all_released(runner)
