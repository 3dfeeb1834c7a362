"""The network against transformers on random checkpoints of varied dimensions, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canvasrt.checkpoint import Checkpoint
from canvasrt.network.moe import MoeChoice
from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from parity import close, walk_and_compare
from tiny import Dims, write

VARIED = 5e-4  # the same for any dimensions: a canvas of one token and heads of four numbers amplify rounding


@st.composite
def dimensions(draw: st.DrawFn) -> Dims:
    kv_heads, full_kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    heads = np.lcm(kv_heads, full_kv_heads) * draw(st.sampled_from([1, 2]))
    experts = draw(st.integers(1, 9))
    return Dims(
        vocab=draw(st.integers(20, 150)),
        hidden=draw(st.sampled_from([16, 24, 40])),
        mlp=draw(st.sampled_from([16, 56])),
        heads=int(heads),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 18])),
        full_kv_heads=full_kv_heads,
        full_head_dim=draw(st.sampled_from([8, 16, 20])),
        layers=draw(st.sampled_from(["sf", "ssfsf", "f", "sssssf", "fsf"])),
        window=draw(st.integers(2, 30)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        expert_size=draw(st.sampled_from([8, 20])),
        canvas=draw(st.integers(1, 20)),
        rotary_share=draw(st.sampled_from([0.25, 0.5, 1.0])),
    )


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=25)
@given(dims=dimensions(), data=st.data())
def test_logits_equal_transformers_for_varied_dimensions(
    tmp_path_factory: pytest.TempPathFactory, dims: Dims, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    source = Checkpoint.open(write(tmp_path_factory.mktemp("checkpoint"), dims, seed))
    reference = ReferenceModel.load(source)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, dims.vocab, data.draw(st.integers(1, 3 * dims.window + 5))).astype(np.int32)
    formulation = data.draw(st.sampled_from(["sparse", "dense", "capacity"]))
    moe = MoeChoice(formulation, data.draw(st.integers(1, 40)) if formulation == "capacity" else 0)
    context = len(prompt) + 3 * dims.canvas
    # Any chunk length must give the same prefill.
    runner = TorchRunner(source, context=context, chunk=data.draw(st.integers(1, len(prompt) + 1)), moe=moe)
    walk_and_compare(runner, reference, prompt, rng, VARIED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ReferenceModel]:
    source = Checkpoint.open(write(tmp_path_factory.mktemp("tiny")))
    return source, ReferenceModel.load(source)


@pytest.mark.parametrize("chunk", [1, 2, 5, 9, 31, 64])
def test_prefill_in_chunks_equals_one_piece_past_the_sliding_window(
    tiny: tuple[Checkpoint, ReferenceModel], chunk: int
) -> None:
    source, reference = tiny
    prompt = np.random.default_rng(chunk).integers(0, 67, 64).astype(np.int32)
    runner = TorchRunner(source, context=128, chunk=chunk)
    runner.encode([EncodeRow(0, prompt, 0)])
    cache = reference.encode(prompt)
    for index, layer in enumerate(cache.layers):
        for ours, theirs in zip(runner.stored(index, 0), (layer.keys, layer.values), strict=True):
            expected = theirs[0].transpose(0, 1)
            assert close(ours[-len(expected) :].numpy(), expected)


def test_a_ragged_batch_equals_the_reference_row_by_row(tiny: tuple[Checkpoint, ReferenceModel]) -> None:
    source, reference = tiny
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 67, length).astype(np.int32) for length in (1, 40, 9, 23)]
    runner = TorchRunner(source, slots=6, context=128, chunk=16)
    slots = [4, 0, 5, 2]  # not in order, not neighbours
    runner.encode([EncodeRow(slot, prompt, 0) for slot, prompt in zip(slots, prompts, strict=True)])
    rows = [
        DenoiseRow(
            slot, rng.integers(0, 67, 12).astype(np.int32), 0.5 + slot / 10, rng.random(12, dtype=np.float32), True,
            want_logits=True,
        )
        for slot in slots
    ]  # fmt: skip
    for result, row, prompt in zip(runner.denoise(rows), rows, prompts, strict=True):
        assert close(result.logits, reference.denoise(reference.encode(prompt), row.canvas, None))


def test_bfloat16_is_no_further_from_float32_than_the_reference_is(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path, Dims(hidden=64, mlp=64)))
    exact, rounded = ReferenceModel.load(source), ReferenceModel.load(source, torch.bfloat16)
    runner = TorchRunner(source, dtype="bfloat16", context=128)
    rng = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(
        12
    ):  # a rounded router score can change an expert: only the average over many canvases says anything
        prompt, canvas = rng.integers(0, 67, 40).astype(np.int32), rng.integers(0, 67, 12).astype(np.int32)
        expected = exact.denoise(exact.encode(prompt), canvas, None)
        runner.encode([EncodeRow(0, prompt, 0)])
        row = DenoiseRow(0, canvas, 0.6, np.zeros(12, np.float32), True, want_logits=True)
        ours.append((torch.from_numpy(runner.denoise([row])[0].logits) - expected).abs().mean())
        theirs.append((rounded.denoise(rounded.encode(prompt), canvas, None).float() - expected).abs().mean())
        runner.release(0)
    assert sum(theirs) > 0
    assert sum(ours) <= 1.2 * sum(theirs)
