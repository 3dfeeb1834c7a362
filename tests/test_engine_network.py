"""The network that the compiler gets, run layer by layer on the CPU: it computes what transformers' model computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx as trt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from canvasrt.checkpoint import Checkpoint
from canvasrt.compile.engine import MoeShapes
from canvasrt.compile.source import ModelSource
from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from contract import CHECKS, Opener
from engine_host import HostEngine, short_search
from parity import close, difference, request_logits, walk_and_compare
from tiny import Dims, write

TOLERANCE = 2e-5  # of the largest logit
VARIED = 5e-4  # for any dimensions: see test_parity.py
DENSE = MoeShapes("dense")

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


def engine_of(folder: Path, moe: MoeShapes, prompt: int, chunk: int, canvas: int) -> HostEngine:
    source = ModelSource.open(folder)
    return HostEngine(source, moe=moe, slots=2, context=max(2 * canvas, prompt + 3 * canvas), chunk=chunk)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, case: str) -> None:
    dims, length, chunk, capacity = CASES[case]
    reference = ReferenceModel.load(Checkpoint.open(write(tmp_path, dims, seed=len(case))))
    prompt = np.random.default_rng(length).integers(0, dims.vocab, length).astype(np.int32)
    for moe in (DENSE, MoeShapes("capacity", capacity, capacity)):
        engine = engine_of(tmp_path, moe, length, chunk, dims.canvas)
        walk_and_compare(engine, reference, prompt, np.random.default_rng(0), TOLERANCE)


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
    moe = data.draw(st.sampled_from([DENSE, MoeShapes("capacity", *seats)]))
    engine = engine_of(folder, moe, len(prompt), data.draw(st.integers(3, 20)), dims.canvas)
    walk_and_compare(engine, ReferenceModel.load(Checkpoint.open(folder)), prompt, rng, VARIED)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny"), Dims(layers="sf", embedding_scale=1.5), seed=5)


@pytest.mark.parametrize("chunk", [1, 5, 9, 50])
def test_prefill_in_chunks_leaves_the_keys_and_values_of_transformers(tmp_path: Path, chunk: int) -> None:
    write(tmp_path, Dims(layers="sfsf"))
    prompt = np.random.default_rng(chunk).integers(0, 67, 50).astype(np.int32)
    engine = HostEngine(ModelSource.open(tmp_path), context=64, chunk=chunk)
    engine.encode([EncodeRow(1, prompt, 0)])
    assert engine.calls == -(-50 // chunk)
    cache = ReferenceModel.load(Checkpoint.open(tmp_path)).encode(prompt)
    for index, layer in enumerate(cache.layers):
        for ours, theirs in zip(engine.stored(index, 1), (layer.keys, layer.values), strict=True):
            expected = theirs[0].transpose(0, 1)
            assert close(ours[-len(expected) :].numpy(), expected, TOLERANCE)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_too_wide_for_a_fused_kernel_are_folded_into_the_tokens(tmp_path: Path, heads: int) -> None:
    """Then the attention layer has as many query heads as K/V heads, and may be decomposed."""
    write(tmp_path, Dims(layers="sf", full_head_dim=288, full_kv_heads=heads))
    network = HostEngine(ModelSource.open(tmp_path)).network
    found = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if trt.ILayer.type.fget(layer) == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            query_heads, head_dim = layer.get_input(0).shape[1], layer.get_input(0).shape[3]
            found.append((query_heads, head_dim, layer.attention.decomposable))
    assert found == [(4, 16, False), (heads, 288, True)]


ENGINES: dict[str, HostEngine] = {}


@pytest.mark.parametrize("moe", [DENSE, MoeShapes("capacity", 9, 16)], ids=lambda moe: moe.formulation)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(tiny: Path, check: object, moe: MoeShapes) -> None:
    opened: list[HostEngine] = []
    check(opener(tiny, moe, opened))
    assert sum(engine.calls for engine in opened) > 0
    if moe.formulation == "capacity" and check.__name__.startswith("check_neighbours"):
        assert all(any(0 < each.overflows < each.calls for each in opened if each.limits.slots == n) for n in (1, 3, 5))


def opener(folder: Path, moe: MoeShapes, opened: list[HostEngine]) -> Opener:
    """Networks are kept between tests; memory is not."""

    def open_runner(slots: int, chunk: int = 16) -> HostEngine:
        key = f"{moe} {slots} {chunk}"
        if key not in ENGINES:
            with short_search(8):  # the contract is about who is where
                ENGINES[key] = HostEngine(ModelSource.open(folder), moe=moe, slots=slots, context=72, chunk=chunk)
        opened.append(ENGINES[key].fresh())
        return opened[-1]

    return open_runner


def test_a_repetition_may_overflow_again(tmp_path: Path) -> None:
    """The busiest expert is told of numbers that an earlier layer's overflow spoiled: only another call knows more."""
    write(tmp_path, Dims(experts=8), seed=5)
    with short_search(1):
        engine = HostEngine(ModelSource.open(tmp_path), moe=MoeShapes("capacity", 3, 2), slots=1, context=96)
    ours = request_logits(engine)
    assert engine.calls - engine.overflows == 7
    assert engine.overflows > 7
    assert difference(ours, request_logits(TorchRunner.open(tmp_path, context=96, chunk=16))) < TOLERANCE


def test_a_repeated_call_finds_what_the_first_one_wrote_and_writes_it_anew(tiny: Path) -> None:
    """An engine writes K and V in place: later layers of a call that overflowed have left wrong ones."""
    prompt = np.random.default_rng(2).integers(0, 67, 40).astype(np.int32)
    source = ModelSource.open(tiny)
    roomy = HostEngine(source, moe=MoeShapes("capacity", 99, 99), context=64)
    tight = HostEngine(source, moe=replace(roomy.moe, encoder_capacity=1, decoder_capacity=1), context=64)
    for engine in (roomy, tight):
        engine.encode([EncodeRow(0, prompt, 0)])
    assert (roomy.overflows, roomy.calls) == (0, 3)
    assert tight.overflows >= 3
    for layer in range(2):
        for ours, expected in zip(tight.stored(layer, 0), roomy.stored(layer, 0), strict=True):
            assert close(ours.numpy(), expected, TOLERANCE)
