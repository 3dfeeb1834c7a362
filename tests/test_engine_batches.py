"""Rows of different requests in one engine call: nobody sees a neighbour, memory of others, or what was there before.

And the sampler behind them, against the torch runner and against the distribution that the logits stand for.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, EngineRunner
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.runtime.torch_runner import TorchRunner
from engine_host import HostPlan, stored
from host_bundles import DENSE, Host, capacity
from tiny import Dims, write

CANVAS = 12
VOCABULARY = 640  # two levels of 32 and 20
LENGTHS = (1, 40, 9, 23)  # of prompts: a window of 9 holds the first and the third whole
ROUNDING = 1e-5  # of the largest number: sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("batches"), Dims(layers="fsf", vocab=VOCABULARY, embedding_scale=2.0, window=9), seed=8
    )


@pytest.fixture(scope="module")
def dense(folder: Path) -> HostPlan:
    return HostPlan(folder, slots=5, context=72)


@pytest.fixture(scope="module", params=[DENSE, capacity(9, 24)], ids=lambda moe: moe.formulation)
def plan(folder: Path, dense: HostPlan, request: pytest.FixtureRequest) -> HostPlan:
    return dense if request.param == DENSE else HostPlan(folder, moe=request.param, slots=5, context=72)


def prompts(seed: int = 7) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]


def canvases(slots: Sequence[int], seed: int, first: bool, asked: int = 3) -> list[DenoiseRow]:
    """A row for each slot, the same whichever other slots there are; only ``asked`` wants logits: one canvas a call."""
    rows = []
    for slot in slots:
        rng = np.random.default_rng([seed, slot])
        canvas, uniforms = rng.integers(0, VOCABULARY, CANVAS).astype(np.int32), rng.random(CANVAS, dtype=np.float32)
        rows.append(DenoiseRow(slot, canvas, 0.5 + slot / 10, uniforms, first, want_logits=slot == asked))
    return rows


def assert_same(ours: DenoiseResult, expected: DenoiseResult) -> None:
    np.testing.assert_array_equal(ours.argmax, expected.argmax)
    np.testing.assert_array_equal(ours.sampled, expected.sampled)
    np.testing.assert_allclose(ours.entropy, expected.entropy, rtol=0, atol=ROUNDING)
    assert (ours.logits is None) == (expected.logits is None)
    if ours.logits is not None and expected.logits is not None:
        np.testing.assert_allclose(ours.logits, expected.logits, rtol=0, atol=ROUNDING * np.abs(expected.logits).max())


def fill(runner: EngineRunner, slots: Sequence[int]) -> None:
    for slot, prompt in zip(slots, prompts(), strict=True):
        runner.encode([EncodeRow(slot, prompt, 0)])


SLOTS = (4, 0, 3, 2)  # not in order, one left out


def test_a_ragged_batch_equals_each_row_alone(plan: HostPlan) -> None:
    host = Host()
    together, alone = plan.open(host), plan.open()
    for runner in (together, alone):
        fill(runner, SLOTS)
    before = together.calls - together.repeated
    for asked, first in ((4, True), (0, True), (3, True), (2, True), (4, False), (0, False)):
        rows = canvases(SLOTS, 0, first, asked)
        for ours, row in zip(together.denoise(rows), rows, strict=True):
            assert_same(ours, alone.denoise([row])[0])
        assert len(host.library.last[0]["tokens"]) == 4
    assert together.calls - together.repeated - before == 6


@pytest.mark.parametrize("others", [(), (0, 4)], ids=["alone", "beside two that denoise"])
def test_a_canvas_committed_in_a_decoder_call_equals_one_encoded_as_a_prompt(
    plan: HostPlan, others: tuple[int, ...]
) -> None:
    """Slot 3 ends its canvas; the others go on in the same call, and all denoise once more."""
    host = Host()
    together, apart = plan.open(host), plan.open()
    for runner in (together, apart):
        fill(runner, SLOTS)
        runner.denoise(canvases(SLOTS, 0, first=True))
    finished = np.random.default_rng(3).integers(0, VOCABULARY, CANVAS).astype(np.int32)
    together.encode([EncodeRow(3, finished, 9)])
    apart.encode([EncodeRow(3, finished[:5], 9)])
    apart.encode([EncodeRow(3, finished[5:], 14)])
    rows = canvases(others, 1, first=False)
    found = together.denoise(rows)
    kept = [stored(together, layer, 3) for layer in range(3)]
    inputs, outputs = host.library.last
    assert inputs["is_canvas"].sum().item() == len(others) * CANVAS
    assert [len(outputs[name]) for name in ("argmax", "soft.next")] == [len(others) * CANVAS] * 2
    for ours, expected in zip(found, apart.denoise(rows), strict=True):
        assert_same(ours, expected)
    assert together.length(3) == apart.length(3) == 21
    for layer in range(3):
        for ours, expected in zip(kept[layer], stored(apart, layer, 3), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)
    following = [replace(row, first=row.slot == 3) for row in canvases(SLOTS, 2, first=False)]
    for ours, expected in zip(together.denoise(following), apart.denoise(following), strict=True):
        assert_same(ours, expected)


def memory(runner: TensorRTRunner, host: Host) -> dict[str, np.ndarray]:
    """K, V and soft embeddings of all places, by buffer, as they lie there: (places, heads, rows, numbers)."""
    runner.synchronize()
    found = {}
    for buffer in runner._memory._buffers:
        content = host.driver.view(runner._memory.address(buffer.name, 0), runner.limits.slots * buffer.place_bytes)
        found[buffer.name] = content.view(np.float32).reshape(runner.limits.slots, buffer.heads, buffer.rows, -1)
    return found


def test_a_call_writes_nothing_but_the_places_of_its_own_tokens(plan: HostPlan) -> None:
    host = Host()
    runner = plan.open(host)
    fill(runner, SLOTS)
    before = {name: content.copy() for name, content in memory(runner, host).items()}
    runner.denoise(canvases((2, 3), 0, first=True))
    after = memory(runner, host)
    inputs, _ = host.library.last
    for layer in runner._spec.layers:
        for name in (f"k.{layer.index}", f"v.{layer.index}"):
            changed = (before[name] != after[name]).any(3).any(1)
            assert not changed[[0, 1, 4]].any()
            for place, start in zip((2, 3), inputs[f"write.{layer.kind}"].tolist(), strict=True):
                assert changed[place].nonzero()[0].tolist() == list(range(start, start + CANVAS))
    assert (before["soft"] != after["soft"]).any((1, 2, 3)).tolist() == [False, False, True, True, False]


def test_memory_that_was_never_written_is_never_read(plan: HostPlan) -> None:
    """Bit by bit the same over buffers of zeros and of huge numbers; longer reads of the full layers' change nothing.

    Huge and not NaN: a masked key has the weight 0, and 0 * NaN is NaN. A runtime must give it finite memory.
    """
    found = []
    for poison, step in ((0.0, 1), (1e30, 1), (-1e30, 32), (3.0, 72)):
        host = Host()
        runner = plan.open(host, key_step=step)
        for content in memory(runner, host).values():
            assert not content.any()  # not the NaN of memory that is new
            content[:] = poison
        fill(runner, SLOTS)
        results = runner.denoise(canvases(SLOTS, 0, first=True)) + runner.denoise(canvases(SLOTS, 1, first=False))
        found.append(results)
    for results in found[1:]:
        for ours, expected in zip(results, found[0], strict=True):
            assert_same(ours, expected)
    for ours, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(ours.entropy, expected.entropy)


def test_a_long_conversation_moves_the_sliding_buffers_and_equals_a_fresh_prefill(plan: HostPlan) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCABULARY, 60).astype(np.int32)
    (row,) = canvases([1], 5, first=True, asked=1)
    grown, fresh, position, moved = plan.open(), plan.open(), 0, 0
    while position < 60:  # canvases denoised in between write scratch behind the context
        piece = tokens[position : position + int(rng.integers(1, 20))]
        grown.encode([EncodeRow(1, piece, position)])
        grown.denoise([row])
        position += len(piece)
        moved = max(moved, grown._slots.start(1))
    assert moved > 0
    fresh.encode([EncodeRow(1, tokens, 0)])
    assert_same(grown.denoise([row])[0], fresh.denoise([row])[0])


def test_more_seats_than_needed_change_nothing(folder: Path) -> None:
    found = []
    for seats in (CANVAS, 4 * CANVAS):
        runner = HostPlan(folder, moe=capacity(seats, seats), slots=5, context=72).open()
        fill(runner, SLOTS)
        found.append(runner.denoise(canvases(SLOTS, 0, first=True)))
    assert runner.repeated == 0
    for ours, expected in zip(*found, strict=True):
        assert_same(ours, expected)


# Sampler


LIMITS = {"none": (0, 1.0), "top-k": (3, 1.0), "top-p": (0, 0.4), "both": (20, 0.7), "all": (9999, 1.0)}


def sampler_rows(first: bool) -> list[DenoiseRow]:
    rows = canvases(SLOTS, 3, first)
    limits = [LIMITS[name] for name in ("top-p", "none", "both", "top-k")]  # the engine wants the limited ones last
    return [
        replace(row, top_k=top_k, top_p=top_p, temperature=heat, want_logits=index == 1)
        for index, (row, (top_k, top_p), heat) in enumerate(zip(rows, limits, (0.9, 0.3, 1.7, 0.6), strict=True))
    ]


def test_rows_with_and_without_limits_share_a_call_as_in_the_torch_runner(dense: HostPlan, folder: Path) -> None:
    host = Host()
    ours, expected = dense.open(host), TorchRunner.open(folder, slots=5, context=72, chunk=16)
    for runner in (ours, expected):
        fill(runner, SLOTS)
    for step in range(3):
        rows = sampler_rows(first=step == 0)
        for mine, theirs in zip(ours.denoise(rows), expected.denoise(rows), strict=True):
            np.testing.assert_array_equal(mine.argmax, theirs.argmax)
            np.testing.assert_array_equal(mine.sampled, theirs.sampled)
            np.testing.assert_allclose(mine.entropy, theirs.entropy, atol=1e-4, rtol=1e-4)
            assert (mine.logits is None) == (theirs.logits is None)
            if mine.logits is not None:
                np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-5 * np.abs(theirs.logits).max())
        for slot in SLOTS:
            soft = memory(ours, host)["soft"][ours._placement.place(slot), 0]
            np.testing.assert_allclose(soft, expected._soft[slot][0], atol=1e-4, rtol=1e-4)
        inputs, outputs = host.library.last
        assert (len(inputs["top_k"]), len(outputs["logits"]), len(outputs["argmax"])) == (36, 12, 48)


@pytest.mark.parametrize("name", LIMITS)
def test_samples_and_entropy_are_those_of_the_filtered_logits(dense: HostPlan, name: str) -> None:
    top_k, top_p = LIMITS[name]
    runner = dense.open()
    fill(runner, SLOTS)
    rows = [replace(row, top_k=top_k, top_p=top_p, want_logits=True) for row in canvases(SLOTS, 4, first=True)]
    for row, result in zip(rows, runner.denoise(rows), strict=True):
        for position in range(CANVAS):
            scaled = result.logits[position].astype(np.float64) / row.temperature
            shares = np.exp(scaled - scaled.max())
            order = np.argsort(-shares)
            if top_k:
                shares[order[top_k:]] = 0
            shares /= shares.sum()
            if top_p < 1:
                shares[order[np.cumsum(shares[order]) - shares[order] >= top_p]] = 0
            shares /= shares.sum()
            token = int(result.sampled[position])
            assert shares[token] > 0
            edge = np.cumsum(shares)[token]
            assert edge - shares[token] - 1e-5 <= row.uniforms[position] <= edge + 1e-5
            entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)))
            assert abs(result.entropy[position] - entropy) < 1e-4
            assert result.argmax[position] == result.logits[position].argmax()


def test_an_encoder_call_predicts_nothing(dense: HostPlan) -> None:
    host = Host()
    runner = dense.open(host)
    runner.encode([EncodeRow(0, prompts()[1], 0)])
    runner.synchronize()
    _, outputs = host.library.last
    assert {name: tuple(outputs[name].shape) for name in ("argmax", "sampled", "entropy", "soft.next", "logits")} == {
        "argmax": (0,), "sampled": (0,), "entropy": (0,), "soft.next": (0, 32), "logits": (0, VOCABULARY),
    }  # fmt: skip


def test_uniforms_at_both_ends_draw_the_first_and_the_last_likely_token(dense: HostPlan) -> None:
    runner = dense.open()
    fill(runner, SLOTS)
    for uniform, end in ((0.0, 0), (1.0 - 2.0**-24, -1)):
        row = replace(canvases([3], 6, True)[0], uniforms=np.full(CANVAS, uniform, np.float32), top_k=5)
        (result,) = runner.denoise([row])
        for position in range(CANVAS):
            kept = np.sort(np.argsort(-result.logits[position])[:5])
            assert result.sampled[position] == kept[end]
