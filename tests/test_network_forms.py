"""One network in several forms: a mixed call, the expert formulations and the kernels give equal results."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from canvasrt.checkpoint import Checkpoint
from canvasrt.network.attention import Rotary
from canvasrt.network.moe import Moe, expert_layer, gates, router_scores
from canvasrt.network.text import Canvas, TextInputs, text_network
from canvasrt.ops import torch_ops, torch_products
from canvasrt.ops.protocol import Ops
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_products import PACKED
from canvasrt.ops.torch_weights import TorchWeights
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.torch_cache import CacheCall, TorchCache
from canvasrt.runtime.torch_runner import TorchRunner
from tiny import Dims, write

CANVAS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write(tmp_path_factory.mktemp("forms"), seed=21))


@dataclass
class StackedCache:
    """Row 0 goes through one call, row 1 through another."""

    calls: tuple[CacheCall, CacheCall]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for call, *row in zip(self.calls, k.split(1), v.split(1), strict=True):
            call.append(layer, *row)

    def attend(
        self, ops: Ops[torch.Tensor], layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        rows = zip(self.calls, q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([call.attend(ops, layer, *row) for call, *row in rows])


@torch.inference_mode()
def test_a_mixed_call_equals_an_encoder_call_and_a_decoder_call(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row encodes a chunk while the other denoises a canvas: the form that an engine with both phases runs."""
    monkeypatch.setattr(torch_ops, "ROWS", 1)  # rows of the stacked call have the same length
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 67, n).astype(np.int32) for n in (20, 31)]
    chunk, canvas = (rng.integers(0, 67, CANVAS).astype(np.int32) for _ in range(2))
    uniforms = rng.random(CANVAS, dtype=np.float32)
    apart, mixed = (TorchRunner(source, slots=2, context=96) for _ in range(2))
    for runner in (apart, mixed):
        runner.encode([EncodeRow(slot, prompt, 0) for slot, prompt in enumerate(prompts)])
        runner.denoise([DenoiseRow(1, canvas, 0.7, uniforms, first=True)])  # leaves a self-conditioning signal
        runner._encode_pending(0)
    row = DenoiseRow(1, canvas, 0.5, uniforms, first=False, want_logits=True)
    expected = apart.denoise([row])[0]
    apart.encode([EncodeRow(0, chunk, 20)])

    cache: TorchCache = mixed._cache
    calls = (cache.open([(0, CANVAS)], []), cache.open([], [1]))
    stacked = StackedCache(calls)
    rotary = [mixed._rotary_of(call) for call in calls]
    soft = torch.cat([torch.zeros_like(mixed._soft[1]), mixed._soft[1]])
    inputs = TextInputs(
        tokens=torch.from_numpy(np.stack([chunk, canvas]).astype(np.int64)),
        rotary={
            kind: Rotary(*(torch.cat([getattr(r[kind], part) for r in rotary]) for part in ("cos", "signed_sin")))
            for kind in ("full", "sliding")
        },
        cache=stacked,
        canvas=Canvas(
            soft_embeddings=soft,
            temperature=torch.full((CANVAS, 1), 0.5),
            uniforms=torch.from_numpy(uniforms).view(-1, 1),
            filters=None,
            head_rows=torch.arange(CANVAS, 2 * CANVAS),  # only the canvas goes through head and sampler
        ),
        is_canvas=torch.tensor([False, True]).view(2, 1, 1).expand(2, CANVAS, 1),
    )
    prediction = text_network(mixed._ops, source.spec, inputs, "mixed", Moe("dense")).prediction
    assert prediction is not None
    cache.slots.commit(0, CANVAS)
    np.testing.assert_allclose(prediction.logits.numpy(), expected.logits, atol=2e-4)
    np.testing.assert_array_equal(prediction.sampled.numpy(), expected.sampled)
    for layer in range(len(source.spec.layers)):
        for ours, theirs in zip(mixed.stored(layer, 0), apart.stored(layer, 0), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_expert_formulations_equal_each_other(tmp_path_factory: pytest.TempPathFactory, tokens: int) -> None:
    source = Checkpoint.open(write(tmp_path_factory.mktemp("moe"), Dims(experts=7, top_k=3), seed=tokens))
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    scores = router_scores(ops, source.spec, 1, ops.rms(x, 1e-6))
    assert scores.shape == (tokens, 7)
    layer = "model.decoder.layers.1."
    names = (
        layer + "pre_feedforward_layernorm.weight",
        layer + "mlp.gate_proj.weight",
        layer + "mlp.up_proj.weight",
    )
    results = {}
    for name in ("dense", "capacity", "sparse"):
        moe = Moe(name, torch.arange(tokens).float())
        mlp, gated = gates(ops, 1, x, names, moe)
        torch.testing.assert_close(mlp, ops.gated_linear(x, *names), atol=1e-5, rtol=1e-5)
        results[name], busiest = expert_layer(ops, source.spec, 1, x, gated, scores, moe)
        assert busiest is None or busiest.item() <= tokens
    torch.testing.assert_close(results["dense"], results["sparse"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results["capacity"], results["sparse"], atol=1e-5, rtol=1e-5)


def test_capacity_tells_how_many_tokens_the_busiest_expert_got(source: Checkpoint) -> None:
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    scores = router_scores(ops, source.spec, 0, ops.rms(x, 1e-6))
    busiest = int(scores.topk(source.spec.experts_per_token).indices.flatten().bincount().max())
    for capacity in (busiest - 2, busiest, busiest + 1):
        _, told = expert_layer(ops, source.spec, 0, x, None, scores, Moe("capacity", torch.arange(capacity).float()))
        assert told is not None
        assert told.item() == busiest


def test_the_onednn_product_equals_the_plain_one(source: Checkpoint) -> None:
    """It is reached under private names of torch: this fails when an upgrade changes what is behind them."""
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(48, 32, generator=generator)
    large = torch.randn(2 * PACKED // 512 + 2, 512, generator=generator) / 8
    # The last two are large enough for oneDNN, the very last too large for a second layout.
    for shape, matrix in (((1, 32), few), ((3, 5, 32), few), ((4000, 32), few), ((10, 512), large)):
        x = torch.randn(*shape, generator=generator)
        torch.testing.assert_close(ops._product(x, matrix), x @ matrix.T, atol=1e-5, rtol=1e-5)
        gate, up = (x @ half.T for half in matrix.chunk(2))
        expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
        torch.testing.assert_close(ops._gated(x, matrix), expected, atol=1e-5, rtol=1e-5)


def test_no_more_matrices_are_kept_twice_than_there_is_room_for(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_products, "PACKED_IN_ALL", 40 * 1024)
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    x, matrices = torch.randn(100, 1024), [torch.randn(size, 1024) / 32 for size in (24, 24, 16)]
    for matrix in matrices:
        for _ in range(2):  # kept once, however often it is asked for
            torch.testing.assert_close(ops._product(x, matrix), x @ matrix.T, atol=1e-5, rtol=1e-5)
    assert ops._products is not None
    assert [ops._products._wholes[id(matrix)][1] is matrix for matrix in matrices] == [False, True, False]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (6, 1)])
def test_the_attention_of_few_tokens_equals_the_fused_kernel(source: Checkpoint, heads: int, kv_heads: int) -> None:
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(1, 7, heads + 3, 16, generator=generator)[:, :, :heads]  # as the network has it: part of a product
    keys, values = (torch.randn(1, 40, kv_heads, 16, generator=generator).transpose(1, 2) for _ in range(2))
    everything_visible = torch.zeros(1, 1, 1, 40)  # a mask, so the fused kernel runs
    expected = ops.attention(q, keys, values, everything_visible)
    torch.testing.assert_close(ops.attention(q, keys, values, None), expected, atol=1e-5, rtol=1e-5)


def test_rotary_factors_meet_heads_times_their_norm_weights(source: Checkpoint) -> None:
    ops = TorchOps(TorchWeights(source, torch.device("cpu"), torch.float32))
    norm = "model.decoder.layers.0.self_attn.q_norm.weight"
    x = torch.randn(1, 3, 2, 16)
    weighted = x * ops.weight(norm, "float32")
    for _ in range(3):
        angles = torch.randn(1, 3, 1, 8)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
        for _ in range(2):
            expected = weighted * cos + weighted.roll(8, -1) * sin
            torch.testing.assert_close(ops.rotate(x, cos, sin, (norm, 2)), expected)
