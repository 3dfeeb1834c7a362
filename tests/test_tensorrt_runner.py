"""TensorRTRunner over bundles whose engines the network interpreter executes, on a GPU that is this machine's memory.

The runtime is the one that drives a GPU, down to the driver's functions; canvasrt.runtime.torch_runner is the yardstick
for what an engine's own answers are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from canvasrt.errors import CapacityError, DeviceError, InputError
from canvasrt.runtime.engine_contexts import EngineContexts
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, EngineRunner
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.runtime.torch_runner import TorchRunner
from contract import CHECKS, Opener, outputs, ragged_requests
from engine_host import short_search, stored
from host_bundles import DENSE, Host, capacity, host_bundle
from host_gpu import real
from tiny import Dims, write

CANVAS, VOCABULARY, CONTEXT = 12, 67, 72
FORMULATIONS = {"dense": DENSE, "capacity": capacity(3, 4)}
ROUNDING = 1e-5  # of the largest number: sums in another order


class Bundles:
    """Each compiled once; memory and machine are new for every runner."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.checkpoint = write(folder / "checkpoint", Dims(layers="sfs" + "f", embedding_scale=1.5), seed=5)

    def bundle(self, moe: str = "dense", canvases: int = 2, chunk: int = 16, **options: object) -> Path:
        name = "-".join(map(str, [moe, canvases, chunk, *options.values()]))
        if not (self._folder / name).exists():
            settings = {"context": CONTEXT, "chunk": chunk, "canvases": canvases, "slots": canvases, **options}
            host_bundle(self._folder / name, self.checkpoint, moe=FORMULATIONS[moe], **settings)
        return self._folder / name

    def torch(self, slots: int, chunk: int = 16) -> TorchRunner:
        return TorchRunner.open(self.checkpoint, slots=slots, context=CONTEXT, chunk=chunk)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("engines"))


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    """Top-k and top-p are searched in fewer steps, here and in the torch lowering: most of a small network."""
    with short_search(8):
        yield


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    assert made.driver.reason == ""  # nothing touched memory that is not its own


def opener(bundles: Bundles, moe: str, opened: list[tuple[Host, TensorRTRunner]]) -> Opener:
    """Calls of at most two canvases, whatever the slots; sizes in steps, as the runtime has them."""

    def open_runner(slots: int, chunk: int = 16) -> TensorRTRunner:
        host = Host()
        runner = host.open(bundles.bundle(moe, min(slots, 2), chunk), key_step=8, token_step=4, slots=slots)
        opened.append((host, runner))
        return runner

    return open_runner


@pytest.mark.parametrize("moe", FORMULATIONS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(bundles: Bundles, check: object, moe: str) -> None:
    opened: list[tuple[Host, TensorRTRunner]] = []
    check(opener(bundles, moe, opened))
    assert sum(host.library.calls for host, _ in opened) > 0
    assert {host.driver.reason for host, _ in opened} == {""}
    if check.__name__.startswith("check_neighbours"):
        assert all(runner.launches for _, runner in opened)  # of graphs
        assert all((moe == "capacity") == (0 < runner.repeated < runner.calls) for _, runner in opened)


@pytest.mark.parametrize("moe", FORMULATIONS)
def test_texts_are_those_of_the_torch_lowering(bundles: Bundles, moe: str) -> None:
    """Several canvases, ragged prompts, limits, early ends; some of the requests wait for a slot."""
    runner = Host().open(bundles.bundle(moe), key_step=8, token_step=4, slots=4)
    requests = ragged_requests(runner, 6, seed=11)
    assert outputs(runner, requests) == outputs(bundles.torch(4), requests)


def prompts(runner: EngineRunner, lengths: dict[int, int], seed: int = 7) -> None:
    rng = np.random.default_rng(seed)
    for slot, length in lengths.items():
        runner.encode([EncodeRow(slot, rng.integers(0, VOCABULARY, length).astype(np.int32), 0)])


def rows(slots: tuple[int, ...], seed: int, first: bool = False) -> list[DenoiseRow]:
    """The same for a slot whichever others there are."""
    found = []
    for slot in slots:
        rng = np.random.default_rng([seed, slot])
        canvas, uniforms = rng.integers(0, VOCABULARY, CANVAS).astype(np.int32), rng.random(CANVAS, dtype=np.float32)
        found.append(DenoiseRow(slot, canvas, 0.5 + slot / 10, uniforms, first))
    return found


def assert_same(ours: list[DenoiseResult], expected: list[DenoiseResult]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(mine.argmax, theirs.argmax)
        np.testing.assert_array_equal(mine.sampled, theirs.sampled)
        np.testing.assert_allclose(mine.entropy, theirs.entropy, rtol=0, atol=10 * ROUNDING)
        assert (mine.logits is None) == (theirs.logits is None)
        if mine.logits is not None and theirs.logits is not None:
            np.testing.assert_allclose(mine.logits, theirs.logits, rtol=0, atol=ROUNDING * np.abs(theirs.logits).max())


# Places, and moving them


def test_slots_that_run_together_are_brought_together_with_all_that_they_hold(bundles: Bundles, host: Host) -> None:
    ours, torch = host.open(bundles.bundle(canvases=2), slots=5), bundles.torch(5)
    for runner in (ours, torch):
        prompts(runner, {0: 5, 1: 40, 2: 9, 3: 23, 4: 30})
    for step, slots in enumerate([(0, 4), (1, 3), (0, 4), (2,), (4, 3), (1, 0), (2, 4)]):
        started = rows(slots, step, first=step < 4)
        assert_same(ours.denoise(started), torch.denoise(started))
        tokens, _ = host.library.last
        assert len(tokens["tokens"]) == len(slots)  # no row computes for nobody
    assert host.driver.calls["cuMemcpy2DAsync"] + host.driver.calls["cuMemcpyDtoDAsync"] > 0


def test_an_empty_slot_that_made_room_has_no_soft_embeddings_of_another(bundles: Bundles, host: Host) -> None:
    """Who forgets ``first`` gets zeros, as after a release."""
    ours, torch = host.open(bundles.bundle(canvases=2), slots=3), bundles.torch(3)
    for runner in (ours, torch):
        prompts(runner, {0: 30, 2: 9})
        runner.denoise(rows((0,), 0, first=True))
        runner.denoise(rows((2,), 0, first=True))
        runner.denoise(rows((0, 2), 1))  # slot 1 lies where one of them was
        prompts(runner, {1: 9}, seed=8)
    assert ours._placement.place(1) != 1
    assert_same(ours.denoise(rows((1,), 2)), torch.denoise(rows((1,), 2)))


def test_slots_that_stay_together_are_never_moved(bundles: Bundles, host: Host) -> None:
    runner = host.open(bundles.bundle(canvases=2), slots=4)
    prompts(runner, {1: 5, 2: 9})
    runner.denoise(rows((1, 2), 0, first=True))
    before = host.driver.calls["cuMemcpy2DAsync"]
    for step in range(1, 4):
        runner.denoise(rows((2, 1), step))
    assert host.driver.calls["cuMemcpy2DAsync"] == before


# Shapes


@pytest.mark.parametrize(("key_step", "token_step"), [(1, 1), (8, 4), (64, 64)])
def test_sizes_that_are_rounded_up_change_nothing(bundles: Bundles, host: Host, key_step: int, token_step: int) -> None:
    ours, torch = host.open(bundles.bundle(), key_step, token_step), bundles.torch(2)
    for runner in (ours, torch):
        prompts(runner, {0: 50, 1: 3})
        runner.encode([EncodeRow(1, np.arange(2, 7, dtype=np.int32), 3)])
    assert_same(ours.denoise(rows((0, 1), 0, True)), torch.denoise(rows((0, 1), 0, True)))
    keys = len(host.library.last[0]["keys"])
    assert keys == {1: 62, 8: 64, 64: 64}[key_step]  # 50 and a canvas


def test_a_prompt_is_padded_with_its_own_tokens(bundles: Bundles, host: Host) -> None:
    """Equal ones would all want the same experts, and with few seats the call would be repeated."""
    runner = host.open(bundles.bundle(), token_step=8)
    runner.encode([EncodeRow(0, np.arange(2, 7, dtype=np.int32), 0)])
    runner.synchronize()
    assert host.library.last[0]["tokens"].tolist() == [[2, 3, 4, 5, 6, 2, 3, 4]]
    assert runner.length(0) == 5


def test_a_context_lives_until_its_call_is_done(bundles: Bundles, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is dropped for another while its call, for which nobody waits, is still queued."""
    monkeypatch.setattr("canvasrt.runtime.engine_contexts.GRAPHS", 1)
    runner, torch = host.open(bundles.bundle(canvases=2), key_step=CONTEXT), bundles.torch(2)
    for each in (runner, torch):
        prompts(each, {0: 9})
    for step in range(4):
        for each in (runner, torch):
            each.encode([EncodeRow(0, np.arange(2 + step, 14 + step, dtype=np.int32), 9 + 12 * step)])
        assert_same(runner.denoise(rows((0,), step, True)), torch.denoise(rows((0,), step, True)))


def test_a_prompt_is_not_padded_beyond_the_context(bundles: Bundles, host: Host) -> None:
    ours, torch = host.open(bundles.bundle(), token_step=16), bundles.torch(2)
    for runner in (ours, torch):
        prompts(runner, {0: CONTEXT - CANVAS})
        runner.encode([EncodeRow(0, np.arange(2, 13, dtype=np.int32), CONTEXT - CANVAS)])
    assert ours.length(0) == torch.length(0) == CONTEXT - 1
    for layer in range(4):
        for mine, theirs in zip(stored(ours, layer, 0), torch.stored(layer, 0), strict=True):
            held = min(len(mine), len(theirs))
            np.testing.assert_allclose(mine[-held:], theirs[-held:].numpy(), atol=1e-5)


# Finished canvases


def test_finished_canvases_join_calls_of_others(bundles: Bundles, host: Host) -> None:
    """A canvas that is to be encoded costs no call of its own where its slot rests and others denoise."""
    ours, torch = host.open(bundles.bundle(canvases=3), slots=4), bundles.torch(4)
    for runner in (ours, torch):
        prompts(runner, {0: 5, 1: 20, 2: 9, 3: 7})
        runner.denoise(rows((0, 1), 0, first=True))
    calls = ours.calls
    finished = np.arange(2, 2 + CANVAS, dtype=np.int32)
    for runner in (ours, torch):
        runner.encode([EncodeRow(3, finished, 7), EncodeRow(2, finished[::-1].copy(), 9)])
    assert ours.calls == calls
    assert [ours.length(slot) for slot in range(4)] == [5, 20, 21, 19]
    assert_same(ours.denoise(rows((1, 0), 1)), torch.denoise(rows((1, 0), 1)))
    assert ours.calls == calls + 1
    assert host.library.last[0]["is_canvas"].sum().item() == 2 * CANVAS
    assert len(host.library.last[0]["tokens"]) == 3  # one of the two had room
    assert_same(ours.denoise(rows((2, 3), 2, first=True)), torch.denoise(rows((2, 3), 2, first=True)))
    assert ours.calls == calls + 3  # the other was encoded first
    assert_same(ours.denoise(rows((0, 1, 3), 3)), torch.denoise(rows((0, 1, 3), 3)))


def test_a_finished_canvas_that_is_rewound_before_it_was_encoded(bundles: Bundles, host: Host) -> None:
    ours, torch = host.open(bundles.bundle()), bundles.torch(2)
    finished = np.arange(2, 2 + CANVAS, dtype=np.int32)
    for runner in (ours, torch):
        prompts(runner, {0: 9})
        runner.encode([EncodeRow(0, finished, 9)])
        assert runner.can_rewind(0, 14)
        runner.encode([EncodeRow(0, finished[:3], 14)])
        assert runner.length(0) == 17
    assert_same(ours.denoise(rows((0,), 1, first=True)), torch.denoise(rows((0,), 1, first=True)))
    for runner in (ours, torch):
        runner.encode([EncodeRow(0, finished, 17)])
        runner.release(0)
        assert runner.length(0) == 0


# CUDA graphs


def test_steps_that_come_again_are_launched_as_graphs_and_equal_calls(bundles: Bundles, host: Host) -> None:
    captured, torch = host.open(bundles.bundle(canvases=2), key_step=CONTEXT), bundles.torch(2)
    for runner in (captured, torch):
        prompts(runner, {0: 30, 1: 9})
    for step in range(8):
        # Limits make other sizes; a call with them in between must not spoil the graph.
        asked = [replace(row, top_k=3) if step == 5 else row for row in rows((0, 1), step, first=step == 0)]
        assert_same(captured.denoise(asked), torch.denoise(asked))
    assert captured.launches == 5  # the third of its sizes on
    assert host.driver.calls["cuGraphInstantiate"] == 1
    assert host.library.contexts == 2 + 1


@pytest.mark.parametrize(("library", "captures"), [("tensorrt_rtx", 3), ("tensorrt", 1)])
def test_graphs_are_captured_again_where_better_kernels_come_later(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, library: str, captures: int
) -> None:
    monkeypatch.setattr("canvasrt.runtime.engine_contexts.RECAPTURES", (2, 4))
    host = Host()
    runner, torch = host.open(bundles.bundle(canvases=1), key_step=CONTEXT), bundles.torch(1)
    host.library.__name__ = library
    runner._contexts = EngineContexts(runner._contexts._engine, runner.device, ["encoder", "decoder"])
    for each in (runner, torch):
        prompts(each, {0: 30})
    for step in range(10):
        assert_same(runner.denoise(rows((0,), step, step == 0)), torch.denoise(rows((0,), step, step == 0)))
    assert host.driver.calls["cuGraphInstantiate"] == captures
    assert host.driver.calls["cuGraphExecDestroy"] == captures - 1
    assert runner.launches == 8


def test_graphs_are_kept_up_to_a_number(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("canvasrt.runtime.engine_contexts.GRAPHS", 1)
    host = Host()
    ours, torch = host.open(bundles.bundle(canvases=2), key_step=CONTEXT), bundles.torch(2)
    for runner in (ours, torch):
        prompts(runner, {0: 30, 1: 9})
    for step in range(12):
        slots = (0,) if step // 4 % 2 else (0, 1)
        assert_same(ours.denoise(rows(slots, step, step == 0)), torch.denoise(rows(slots, step, step == 0)))
    assert host.driver.calls["cuGraphExecDestroy"] >= 1
    assert host.driver.reason == ""


def test_an_engine_that_can_not_be_captured_is_run_call_by_call(bundles: Bundles, host: Host) -> None:
    runner, torch = host.open(bundles.bundle(canvases=2), key_step=CONTEXT), bundles.torch(2)
    host.library.capturable = False
    for each in (runner, torch):
        prompts(each, {0: 30})
    for step in range(5):
        assert_same(runner.denoise(rows((0,), step, step == 0)), torch.denoise(rows((0,), step, step == 0)))
    assert (runner.captures, runner.launches) == (False, 0)


# What crosses the bus


def test_a_step_sends_and_receives_three_numbers_per_token_and_never_logits(bundles: Bundles, host: Host) -> None:
    """Alignment apart: 3 * 256 bytes in, and as many back, are what 12 tokens of 4 bytes take."""
    runner = host.open(bundles.bundle(canvases=2), key_step=CONTEXT)
    prompts(runner, {0: 30, 1: 9})
    runner.denoise(rows((0, 1), 0, first=True))
    sent, received, allocated = runner.bytes_sent(), runner.bytes_received(), host.driver.calls["cuMemAlloc"]
    for step in range(1, 5):
        runner.denoise(rows((0, 1), step))
    assert runner.bytes_sent() - sent == runner.bytes_received() - received == 4 * 3 * 256
    assert host.driver.calls["cuMemAlloc"] == allocated  # nothing is allocated per step
    assert host.driver.calls["cuMemHostAlloc"] == 2 + 1 + 2 + 1  # staging, results, the embedding's way, a constant's


def test_logits_come_of_one_canvas_a_call(bundles: Bundles, host: Host) -> None:
    ours, torch = host.open(bundles.bundle(canvases=2), slots=3), bundles.torch(3)
    for runner in (ours, torch):
        prompts(runner, {0: 30, 1: 9, 2: 3})
    for step in range(3):
        asked = [replace(row, want_logits=row.slot != 1) for row in rows((2, 1, 0), step, first=step == 0)]
        calls = ours.calls
        assert_same(ours.denoise(asked), torch.denoise(asked))
        assert ours.calls == calls + 2


def test_what_a_caller_does_meanwhile_happens_while_the_gpu_works(bundles: Bundles, host: Host) -> None:
    runner = host.open(bundles.bundle(canvases=1), slots=3)
    prompts(runner, {0: 30, 1: 9, 2: 3})
    seen = []
    runner.denoise(rows((0, 1, 2), 0, True), lambda: seen.append(host.driver.waiting))
    assert len(seen) == 1
    assert seen[0] > 0


# Failures


def test_a_gpu_that_fails_ends_everything_with_its_reason(bundles: Bundles) -> None:
    host = Host()
    runner = host.open(bundles.bundle())
    prompts(runner, {0: 9})
    host.driver.faults["cuEventSynchronize"] = real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS in cuEventSynchronize") as first:
        runner.denoise(rows((0,), 0, True))
    for verb in (lambda: runner.denoise(rows((0,), 0, True)), lambda: runner.release(0), runner.synchronize):
        with pytest.raises(DeviceError) as again:
            verb()
        assert again.value is first.value


def test_memory_that_is_not_there_for_logits_is_no_failure_of_the_gpu(bundles: Bundles) -> None:
    host = Host()
    runner = host.open(bundles.bundle())
    prompts(runner, {0: 9})
    host.driver.total = host.driver.used
    with pytest.raises(CapacityError, match="left for a canvas of logits"):
        runner.denoise([replace(rows((0,), 0, True)[0], want_logits=True)])
    assert len(runner.denoise(rows((0,), 0, True))) == 1


def test_fewer_slots_than_canvases_are_refused(bundles: Bundles) -> None:
    with pytest.raises(InputError, match="needs as many slots"):
        Host().open(bundles.bundle(canvases=2), slots=1)
