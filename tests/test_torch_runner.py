"""TorchRunner: the contract of every runner, its memory limits, its slots."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CapacityError, CheckpointError, InputError
from canvasrt.network.moe import MoeChoice
from canvasrt.runtime import torch_cache
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow, EngineRunner
from canvasrt.runtime.torch_cache import TorchCache
from canvasrt.runtime.torch_runner import TorchRunner
from contract import CHECKS, Opener
from tiny import Dims, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write(tmp_path_factory.mktemp("runner"), Dims(embedding_scale=1.5), seed=5))


def opener(kind: str, source: Checkpoint) -> Opener:
    def open_runner(slots: int, chunk: int = 16) -> EngineRunner:
        if kind == "fake":
            return FakeRunner(slots=slots, context=120, chunk=chunk, canvas=12)
        moe = {"sparse": MoeChoice("sparse"), "dense": MoeChoice("dense"), "capacity": MoeChoice("capacity", 5)}[kind]
        return TorchRunner(source, slots=slots, context=120, chunk=chunk, moe=moe)

    return open_runner


@pytest.mark.parametrize("kind", ["sparse", "dense", "capacity", "fake"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(source: Checkpoint, kind: str, check: object) -> None:
    check(opener(kind, source))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract_on_a_gpu(source: Checkpoint, check: object) -> None:
    check(lambda slots, chunk=16: TorchRunner(source, "cuda", slots=slots, context=120, chunk=chunk))


def test_rewinding_behind_the_kept_window_is_refused_with_what_is_possible(source: Checkpoint) -> None:
    runner = TorchRunner(source, context=200, chunk=16)  # the sliding buffers hold 8 + 16 + 12 tokens
    tokens = np.random.default_rng(0).integers(0, 67, 150).astype(np.int32)
    runner.encode([EncodeRow(0, tokens, 0)])
    with pytest.raises(CapacityError, match=r"can't be rewound to 20 tokens.*keep positions from"):
        runner.encode([EncodeRow(0, tokens[:1], 20)])
    assert runner.length(0) == 150
    runner.encode([EncodeRow(0, tokens, 0)])  # from the start is always possible
    assert runner.length(0) == 150


def test_a_long_conversation_compacts_the_sliding_buffers_and_equals_a_fresh_prefill(source: Checkpoint) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 67, 180).astype(np.int32)
    row = DenoiseRow(0, tokens[:12], 0.5, np.zeros(12, np.float32), first=True, want_logits=True)
    grown, fresh = (TorchRunner(source, context=200, chunk=16) for _ in range(2))
    position = 0
    while position < 180:  # canvases denoised in between write scratch behind the context
        piece = tokens[position : position + int(rng.integers(1, 20))]
        grown.encode([EncodeRow(0, piece, position)])
        grown.denoise([row])
        position += len(piece)
    fresh.encode([EncodeRow(0, tokens, 0)])
    ours, expected = grown.denoise([row])[0].logits, fresh.denoise([row])[0].logits
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_capacity_overflow_repeats_the_call_with_every_expert(source: Checkpoint) -> None:
    """With room for one token per expert nearly every call overflows; the result must not show it."""
    prompt = np.random.default_rng(2).integers(0, 67, 40).astype(np.int32)
    row = DenoiseRow(0, prompt[:12], 0.5, np.zeros(12, np.float32), first=True, want_logits=True)
    results = []
    for moe in (MoeChoice("capacity", 1), MoeChoice("sparse")):
        runner = TorchRunner(source, context=64, moe=moe)
        runner.encode([EncodeRow(0, prompt, 0)])
        results.append(runner.denoise([row])[0].logits)
    np.testing.assert_allclose(results[0], results[1], atol=1e-4 * np.abs(results[1]).max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.4.experts.down_proj",
        "model.decoder.norm.weight",
        "model.decoder.self_conditioning.up_proj.weight",
    ],
)
def test_weights_that_are_not_finite_stop_the_start(tmp_path: Path, name: str, bad: float) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[3] = bad
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} in .* holds 1 values that are NaN or infinite"):
        TorchRunner(Checkpoint.open(tmp_path), context=64)


def test_impossible_settings_are_refused_before_memory_is_taken(source: Checkpoint) -> None:
    with pytest.raises(CapacityError, match="exceeds the 256 positions"):
        TorchRunner(source, context=257)
    with pytest.raises(CapacityError, match="no room for a prompt"):
        TorchRunner(source, context=12)
    with pytest.raises(CapacityError, match=r"GiB weights.*Use fewer slots"):
        TorchRunner(source, context=256, slots=2**30)
    with pytest.raises(InputError, match="device 'tpu' is unknown"):
        TorchRunner(source, device="tpu")
    with pytest.raises(InputError, match="dtype 'float8' is unknown"):
        TorchRunner(source, dtype="float8")
    with pytest.raises(InputError, match="at least one slot"):
        TorchRunner(source, slots=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_asking_for_cuda_without_a_gpu_says_so(source: Checkpoint) -> None:
    with pytest.raises(InputError, match="no NVIDIA GPU"):
        TorchRunner(source, device="cuda")


def test_prompts_join_the_step_of_the_rows_that_denoise_already(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for two new prompts, their first steps and another row's second; results as if each were alone."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 67, count).astype(np.int32) for count in (17, 5, 11)]
    canvases = rng.integers(0, 67, (3, 12)).astype(np.int32)
    uniforms = rng.random((3, 12), dtype=np.float32)

    def row(slot: int, index: int, first: bool) -> DenoiseRow:
        return DenoiseRow(slot, canvases[index], 0.6, uniforms[index], first, want_logits=True)

    together = TorchRunner(source, slots=3, context=64)
    together.encode([EncodeRow(1, prompts[1], 0)])
    together.denoise([row(1, 1, first=True)])
    together.encode([EncodeRow(slot, prompts[slot], 0) for slot in (2, 0)])
    calls: list[int] = []
    original = TorchRunner._run

    def counted(self: TorchRunner, phase: str, parts: list[np.ndarray], *more: object) -> object:
        calls.append(sum(len(part) for part in parts))
        return original(self, phase, parts, *more)

    monkeypatch.setattr(TorchRunner, "_run", counted)
    results = together.denoise([row(2, 2, True), row(0, 0, True), row(1, 1, False)])
    assert calls == [17 + 11 + 4 + 3 * 12]  # the tokens of prompts are a multiple of 8
    for slot, result in zip((2, 0, 1), results, strict=True):
        alone = TorchRunner(source, context=64)
        alone.encode([EncodeRow(0, prompts[slot], 0)])
        if slot == 1:
            alone.denoise([row(0, 1, first=True)])
        (expected,) = alone.denoise([row(0, slot, first=slot != 1)])
        np.testing.assert_allclose(result.logits, expected.logits, atol=2e-4)
        np.testing.assert_array_equal(result.sampled, expected.sampled)
    assert [together.length(slot) for slot in range(3)] == [17, 5, 11]


def test_freed_memory_is_used_again_without_page_faults() -> None:
    """In a process of its own, whose allocator nobody else has set."""
    code = (
        "import resource, numpy as np; from canvasrt.runtime.allocator import keep_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(50): [np.full(75_000, 1.0) for _ in range(20)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); before = faults(); kept = keep_freed_memory(); faults(); print(kept, before, faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    assert kept == "True"
    assert int(before) > 5_000  # 50 times 12 MB are 147,000 pages of 4 KiB: else this test could not fail
    assert int(after) < int(before) / 10


def test_arrays_that_can_not_be_written_to_are_copied_for_torch(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is shared, so the first tokens of a canvas are read-only."""
    original = torch.from_numpy
    runner = TorchRunner(source, context=64)
    canvas, prompt = np.arange(12, dtype=np.int32), np.arange(9, dtype=np.int32)
    for array in (canvas, prompt):
        array.flags.writeable = False
    handed: list[bool] = []  # torch warns of it only once in a process
    monkeypatch.setattr(torch, "from_numpy", lambda array: handed.append(array.flags.writeable) or original(array))
    runner.encode([EncodeRow(0, prompt, 0)])
    for first in (True, False):
        runner.denoise([DenoiseRow(0, canvas, 0.5, np.zeros(12, np.float32), first)])
    assert handed
    assert all(handed)


@pytest.mark.parametrize("most", [3, 0], ids=["calls", "masks"])
def test_plans_of_earlier_calls_are_used_again_and_only_a_few_are_kept(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(torch_cache, "CALLS", 3)
    monkeypatch.setattr(torch_cache, "MASKED", 1 << 20 if most else 0)
    rng = np.random.default_rng(4)
    made: list[object] = []
    original = TorchCache._plan

    def counted(self: TorchCache, kind: str, *more: object) -> object:
        made.append(kind)
        return original(self, kind, *more)

    monkeypatch.setattr(TorchCache, "_plan", counted)
    runner = TorchRunner(source, context=64)
    planned = []
    for length in (9, 14, 9, 20, 31, 9):
        prompt, canvas = (rng.integers(0, 67, count).astype(np.int32) for count in (length, 12))
        row = DenoiseRow(0, canvas, 0.7, rng.random(12, dtype=np.float32), first=True, want_logits=True)
        logits = []
        for each in (TorchRunner(source, context=64), runner):
            each.encode([EncodeRow(0, prompt, 0)])
            made.clear()
            logits.append(each.denoise([row])[0].logits)
        np.testing.assert_array_equal(*logits)
        planned.append(bool(made))
        assert len(runner._cache._calls) <= max(most, 1)
        runner.release(0)
    assert planned == ([True, True, False, True, True, False] if most else [True] * 6)


def test_a_row_gets_logits_when_it_asks_for_them_and_no_other(source: Checkpoint) -> None:
    rng = np.random.default_rng(5)
    runner = TorchRunner(source, slots=3, context=64)
    prompts, canvases = rng.integers(0, 67, (3, 10)).astype(np.int32), rng.integers(0, 67, (3, 12)).astype(np.int32)
    runner.encode([EncodeRow(slot, prompts[slot], 0) for slot in range(3)])
    uniforms = np.zeros(12, np.float32)
    for wanted in ({1}, set(), {0, 1, 2}):
        rows = [DenoiseRow(slot, canvases[slot], 0.6, uniforms, True, want_logits=slot in wanted) for slot in range(3)]
        results = runner.denoise(rows)
        assert {slot for slot in range(3) if results[slot].logits is not None} == wanted
        for slot in wanted:
            np.testing.assert_array_equal(results[slot].logits.argmax(-1), results[slot].argmax)
