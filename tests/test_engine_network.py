"""The network that the compiler gets, run layer by layer on the CPU: it computes what transformers' model computes."""

from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx as trt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canvasrt.checkpoint import Checkpoint
from canvasrt.profiles.profile import Moe
from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import EncodeRow
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.runtime.torch_runner import TorchRunner
from engine_host import HostPlan, exact_seats, short_search, stored
from host_bundles import DENSE, capacity
from parity import close, difference, request_logits, walk_and_compare
from tiny import Dims, write

TOLERANCE = 2e-5  # of the largest logit
VARIED = 5e-4  # for any dimensions: see test_parity.py

# What is special, dimensions, prompt tokens, chunk, capacity of both ranges.
CASES: dict[str, tuple[Dims, int, int, int]] = {
    "all kinds": (Dims(), 40, 16, 4),
    "one row of the last chunk": (Dims(layers="sf"), 33, 16, 9),
    "a prompt of one token": (Dims(layers="fsf"), 1, 16, 3),
    "a window longer than all": (Dims(layers="sssf", window=80), 20, 7, 30),
    "a window of two tokens": (Dims(layers="sfsf", window=2, canvas=7), 25, 10, 2),
    "no sliding layer": (Dims(layers="fff", kv_heads=4, full_kv_heads=2), 30, 31, 5),
    "one expert": (Dims(layers="ssf", experts=1, top_k=1, kv_heads=1, full_kv_heads=4), 30, 16, 12),
    "every expert": (Dims(layers="fsf", experts=9, top_k=9, rotary_share=1.0), 17, 16, 1),
    "wide heads, 1 group": (Dims(layers="fsf", full_head_dim=288, full_kv_heads=1), 30, 13, 6),
    "wide heads, 2 groups": (Dims(layers="fsf", full_head_dim=288, full_kv_heads=2, canvas=5), 30, 8, 6),
    "wide heads, 4 groups": (Dims(layers="fsf", full_head_dim=288, full_kv_heads=4), 30, 16, 6),
    "wide sliding heads": (Dims(layers="ssf", head_dim=264, heads=6, kv_heads=2, full_kv_heads=3), 30, 16, 6),
    "two levels of 25": (Dims(layers="fsf", vocab=625, rotary_share=0.5), 20, 16, 6),
    "a prime vocabulary": (Dims(layers="sf", vocab=521, canvas=3), 20, 16, 6),
    "a canvas of one token": (Dims(layers="fsf", canvas=1), 20, 3, 1),
    "a canvas longer than a chunk": (Dims(layers="ssf", canvas=30, window=5), 20, 4, 8),
}


def runner_of(folder: Path, moe: Moe, prompt: int, chunk: int, canvas: int) -> TensorRTRunner:
    return HostPlan(folder, moe=moe, slots=2, context=max(2 * canvas, prompt + 3 * canvas), chunk=chunk).open()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    dims, length, chunk, seats = CASES[case]
    reference = ReferenceModel.load(Checkpoint.open(write(tmp_path, dims, seed=len(case))))
    prompt = np.random.default_rng(length).integers(0, dims.vocab, length).astype(np.int32)
    for moe in (DENSE, capacity(seats, seats)):
        runner = runner_of(tmp_path, moe, length, chunk, dims.canvas)
        walk_and_compare(runner, reference, prompt, np.random.default_rng(0), TOLERANCE)


@st.composite
def dimensions(draw: st.DrawFn) -> Dims:
    kv_heads, full_kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    experts = draw(st.integers(1, 9))
    return Dims(
        vocab=draw(st.sampled_from([20, 150, 514, 640])),
        hidden=draw(st.sampled_from([16, 24, 40])),
        mlp=draw(st.sampled_from([16, 56])),
        heads=int(np.lcm(kv_heads, full_kv_heads)) * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 18])),
        full_kv_heads=full_kv_heads,
        full_head_dim=draw(st.sampled_from([8, 20, 258])),
        layers=draw(st.sampled_from(["f", "ssf", "fsf", "ffsf"])),
        window=draw(st.integers(2, 30)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        expert_size=draw(st.sampled_from([8, 20])),
        canvas=draw(st.integers(1, 20)),
        rotary_share=draw(st.sampled_from([0.25, 0.5, 1.0])),
    )


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=5)
@given(dims=dimensions(), data=st.data())
def test_logits_equal_transformers_for_varied_dimensions(
    tmp_path_factory: pytest.TempPathFactory, dims: Dims, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 1000))
    folder = write(tmp_path_factory.mktemp("checkpoint"), dims, seed)
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, dims.vocab, data.draw(st.integers(1, 2 * dims.window))).astype(np.int32)
    seats = [data.draw(st.integers(1, 40)) for _ in range(2)]
    moe = data.draw(st.sampled_from([DENSE, capacity(*seats)]))
    runner = runner_of(folder, moe, len(prompt), data.draw(st.integers(3, 20)), dims.canvas)
    walk_and_compare(runner, ReferenceModel.load(Checkpoint.open(folder)), prompt, rng, VARIED)


@pytest.mark.parametrize("chunk", [1, 5, 9, 50])
def test_prefill_in_chunks_leaves_the_keys_and_values_of_transformers(tmp_path: Path, chunk: int) -> None:
    write(tmp_path, Dims(layers="sfsf"))
    prompt = np.random.default_rng(chunk).integers(0, 67, 50).astype(np.int32)
    runner = HostPlan(tmp_path, slots=2, context=64, chunk=chunk).open()
    runner.encode([EncodeRow(1, prompt, 0)])
    assert runner.calls == -(-50 // chunk)
    cache = ReferenceModel.load(Checkpoint.open(tmp_path)).encode(prompt)
    for index, layer in enumerate(cache.layers):
        for ours, theirs in zip(stored(runner, index, 1), (layer.keys, layer.values), strict=True):
            expected = theirs[0].transpose(0, 1)
            assert close(ours[-len(expected) :], expected, TOLERANCE)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_too_wide_for_a_fused_kernel_are_folded_into_the_tokens(tmp_path: Path, heads: int) -> None:
    """Then the attention layer has as many query heads as K/V heads, and may be decomposed."""
    write(tmp_path, Dims(layers="sf", full_head_dim=288, full_kv_heads=heads))
    plan = HostPlan(tmp_path)
    network = plan.network
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if trt.ILayer.type.fget(layer) == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            query_heads, head_dim = layer.get_input(0).shape[1], layer.get_input(0).shape[3]
            found.append((query_heads, head_dim, layer.attention.decomposable))
    assert found == [(4, 16, False), (heads, 288, True)]


def test_a_repetition_may_overflow_again(tmp_path: Path) -> None:
    """The busiest expert is told of numbers that an earlier layer's overflow spoiled: only another call knows more."""
    write(tmp_path, Dims(experts=8), seed=5)
    with short_search(1), exact_seats():
        runner = HostPlan(tmp_path, moe=capacity(3, 2)).open()
        ours = request_logits(runner)
    assert runner.calls - runner.repeated == 7
    assert runner.repeated > 7
    assert difference(ours, request_logits(TorchRunner.open(tmp_path, context=96, chunk=16))) < TOLERANCE


def test_a_repeated_call_finds_what_the_first_one_wrote_and_writes_it_anew(tmp_path: Path) -> None:
    """An engine writes K and V in place: later layers of a call that overflowed have left wrong ones."""
    write(tmp_path, Dims(layers="sf", embedding_scale=1.5), seed=5)
    prompt = np.random.default_rng(2).integers(0, 67, 40).astype(np.int32)
    roomy, tight = (HostPlan(tmp_path, moe=capacity(seats, seats), context=64).open() for seats in (99, 1))
    for runner in (roomy, tight):
        runner.encode([EncodeRow(0, prompt, 0)])
    assert (roomy.repeated, roomy.calls) == (0, 3)
    assert tight.repeated >= 3
    for layer in range(2):
        for ours, expected in zip(stored(tight, layer, 0), stored(roomy, layer, 0), strict=True):
            assert np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max()
