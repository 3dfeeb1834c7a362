"""What every EngineRunner must do, whatever its hardware: run by each runner's own test file on a runner it opens.

``Opener(slots=, context=, chunk=)`` returns a fresh runner over the same weights.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import CapacityError, InputError
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow, EngineRunner

Opener = Callable[..., EngineRunner]


def params_for(runner: EngineRunner, seed: int, max_tokens: int) -> RequestParams:
    limits = runner.limits
    return RequestParams(
        seed=seed, max_tokens=max_tokens, max_denoising_steps=5, t_min=0.2, t_max=0.7, entropy_bound=1.0,
        stability_threshold=1, confidence_threshold=0.5, top_k=0, top_p=1.0, stop=(), stop_token_ids=frozenset({1}),
        canvas=limits.canvas, vocabulary=limits.vocabulary,
    )  # fmt: skip


def ragged_requests(runner: EngineRunner, count: int, seed: int) -> dict[int, RequestState]:
    """Requests of different prompt lengths, answer lengths, steps and seeds."""
    rng = np.random.default_rng(seed)
    limits = runner.limits
    requests = {}
    for index in range(count):
        prompt = rng.integers(2, limits.vocabulary, rng.integers(1, limits.context // 3)).astype(np.int32)
        params = params_for(runner, int(rng.integers(0, 2**63)), int(rng.integers(1, 3 * limits.canvas)))
        params = replace(
            params,
            max_denoising_steps=int(rng.integers(1, 8)),
            top_k=int(rng.choice([0, 3])),
            top_p=float(rng.choice([1.0, 0.8])),
        )
        requests[index] = RequestState.new(params, prompt)
    return requests


def outputs(runner: EngineRunner, requests: dict[int, RequestState]) -> dict[int, tuple[int, ...]]:
    ends = {event.request: event.state for event in run_requests(runner, requests) if event.kind == "end"}
    return {index: ends[index].output for index in requests}


def check_neighbours_order_and_batch_size_change_nothing(open_runner: Opener) -> None:
    runner = open_runner(slots=5)
    requests = ragged_requests(runner, 7, seed=0)
    alone = {index: outputs(runner, {index: state})[index] for index, state in requests.items()}
    assert len(set(alone.values())) > 1
    assert outputs(runner, requests) == alone
    backwards = dict(reversed(requests.items()))
    assert outputs(runner, backwards) == alone
    assert outputs(open_runner(slots=1), requests) == alone
    assert outputs(open_runner(slots=3, chunk=4), requests) == alone


def check_slots_come_back_after_finish_cancel_and_error(open_runner: Opener) -> None:
    runner = open_runner(slots=3)
    requests = ragged_requests(runner, 5, seed=1)
    expected = outputs(runner, requests)
    assert [runner.length(slot) for slot in range(3)] == [0, 0, 0]
    events = run_requests(runner, requests)
    for _ in range(4):
        next(events)
    events.close()
    assert [runner.length(slot) for slot in range(3)] == [0, 0, 0]
    bad = RequestState.new(params_for(runner, 0, 1), np.array([runner.limits.vocabulary], np.int32))
    with pytest.raises(InputError, match="outside the vocabulary"):
        list(run_requests(runner, {**requests, 99: bad}))
    assert [runner.length(slot) for slot in range(3)] == [0, 0, 0]
    assert outputs(runner, requests) == expected


def check_a_released_slot_leaks_nothing_into_the_next_request(open_runner: Opener) -> None:
    runner = open_runner(slots=1)
    first, second = ragged_requests(runner, 2, seed=2).values()
    fresh = outputs(open_runner(slots=1), {0: second})
    outputs(runner, {0: first})
    assert outputs(runner, {0: second}) == fresh


def check_a_released_slot_keeps_no_self_conditioning(open_runner: Opener) -> None:
    """A caller that forgets ``first`` must not get the signal of another request."""
    used, fresh = open_runner(slots=1), open_runner(slots=1)
    canvas = used.limits.canvas
    row = DenoiseRow(0, np.arange(2, 2 + canvas, dtype=np.int32), 0.5, np.zeros(canvas, np.float32), first=True)
    used.encode([EncodeRow(0, row.canvas, 0)])
    used.denoise([row])
    used.release(0)
    results = []
    for runner in (used, fresh):
        runner.encode([EncodeRow(0, row.canvas[::-1].copy(), 0)])
        results.append(runner.denoise([replace(row, first=False)])[0].entropy)
    np.testing.assert_array_equal(results[0], results[1])


def check_a_cached_prefix_gives_the_same_result_even_with_one_token_left(open_runner: Opener) -> None:
    runner = open_runner(slots=2, chunk=8)
    canvas = runner.limits.canvas
    rng = np.random.default_rng(3)
    prompt = rng.integers(2, runner.limits.vocabulary, 3 * canvas).astype(np.int32)
    row = DenoiseRow(0, prompt[:canvas], 0.5, rng.random(canvas, dtype=np.float32), first=True)
    runner.encode([EncodeRow(0, prompt, 0)])
    whole = runner.denoise([row])[0]
    for left in (1, 2):
        runner.encode([EncodeRow(0, prompt[-left:], len(prompt) - left)])
        assert runner.length(0) == len(prompt)
        again = runner.denoise([row])[0]
        np.testing.assert_array_equal(again.argmax, whole.argmax)
        np.testing.assert_array_equal(again.sampled, whole.sampled)
        np.testing.assert_allclose(again.entropy, whole.entropy, atol=1e-5)


def check_every_input_of_a_step_is_read(open_runner: Opener) -> None:
    """Changing one input changes entropy or samples: a forgotten one would go unnoticed by everything above."""
    runner = open_runner(slots=2)
    limits = runner.limits
    rng = np.random.default_rng(4)
    prompt = rng.integers(2, limits.vocabulary, 9).astype(np.int32)
    canvas = rng.integers(2, limits.vocabulary, limits.canvas).astype(np.int32)
    low = np.full(limits.canvas, 0.01, np.float32)
    base = DenoiseRow(0, canvas, 0.7, low, first=True)

    def step(row: DenoiseRow, context: np.ndarray = prompt) -> tuple[bytes, bytes]:
        runner.release(0)
        runner.encode([EncodeRow(0, context, 0)])
        runner.denoise([base])  # leaves a self-conditioning signal
        result = runner.denoise([row])[0]
        return result.sampled.tobytes(), result.entropy.tobytes()

    before = step(base)
    assert step(base) == before
    assert step(replace(base, first=False)) != before
    assert step(replace(base, temperature=1.4)) != before
    assert step(replace(base, uniforms=low + np.float32(0.97))) != before
    assert step(replace(base, canvas=np.roll(canvas, 1))) != before
    assert step(replace(base, top_k=1)) != before
    assert step(replace(base, top_p=0.3)) != before
    assert step(base, prompt[::-1].copy()) != before


def check_what_is_done_meanwhile_is_done_once_for_rows_that_are_accepted(open_runner: Opener) -> None:
    runner, done = open_runner(slots=3), []
    canvas = runner.limits.canvas
    rows = [
        DenoiseRow(slot, np.full(canvas, 2, np.int32), 0.5, np.zeros(canvas, np.float32), first=True)
        for slot in range(3)
    ]
    with pytest.raises(InputError, match="is empty"):
        runner.denoise(rows, lambda: done.append("refused"))
    runner.encode([EncodeRow(slot, np.arange(2, 5, dtype=np.int32), 0) for slot in range(3)])
    runner.denoise(rows, lambda: done.append("accepted"))
    assert done == ["accepted"]


def check_bad_rows_are_refused_and_change_nothing(open_runner: Opener) -> None:
    runner = open_runner(slots=2)
    limits = runner.limits
    good = np.arange(2, 9, dtype=np.int32)
    canvas, uniforms = np.zeros(limits.canvas, np.int32), np.zeros(limits.canvas, np.float32)
    runner.encode([EncodeRow(0, good, 0)])
    row = DenoiseRow(0, canvas, 0.5, uniforms, first=True)
    before = runner.denoise([row])[0].entropy
    refused: list[tuple[type[Exception], str, object]] = [
        (InputError, "slot 2 does not exist", EncodeRow(2, good, 0)),
        (InputError, "at least one token", EncodeRow(1, good[:0], 0)),
        (InputError, "outside the vocabulary", EncodeRow(1, good - 3, 0)),
        (InputError, "can't be at position 3", EncodeRow(1, good, 3)),
        (CapacityError, f"context of {limits.context}", EncodeRow(1, np.ones(limits.context + 1, np.int32), 0)),
        (InputError, "is empty", replace(row, slot=1)),
        (InputError, "must both be", replace(row, canvas=canvas[1:])),
        (InputError, "temperature", replace(row, temperature=0.0)),
        (InputError, "temperature", replace(row, temperature=float("nan"))),
        (InputError, r"\[0, 1\)", replace(row, uniforms=uniforms + 1)),
        (InputError, "top_p", replace(row, top_p=0.0)),
    ]
    for error, message, bad in refused:
        # A good row beside the bad one must not be run either.
        if isinstance(bad, EncodeRow):
            with pytest.raises(error, match=message):
                runner.encode([EncodeRow(0, good, 7), bad])
        else:
            with pytest.raises(error, match=message):
                runner.denoise([row, bad] if bad.slot != 0 else [bad])
        assert [runner.length(0), runner.length(1)] == [7, 0]
    for verb in (runner.release, runner.length):
        for slot in (-1, 2):
            with pytest.raises(InputError, match=f"slot {slot} does not exist"):
                verb(slot)
    with pytest.raises(InputError, match="twice"):
        runner.denoise([row, row])
    np.testing.assert_allclose(runner.denoise([row])[0].entropy, before, atol=1e-5)


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]
