"""The interpreter of TensorRT networks: attention, key/value cache update, rotary embedding."""

import math

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from trt_interpreter_testing import Net, bfloat16

F32, BF16, I32, I64, BOOL = trt.float32, trt.bfloat16, trt.int32, trt.int64, trt.bool
Causal = trt.CausalMaskKind
SOFTMAX = trt.AttentionNormalizationOp.SOFTMAX
RANDOM = np.random.default_rng(7)


@pytest.fixture
def net() -> Net:
    return Net()


def attention(net, dtype=F32, causal=Causal.NONE, heads=6, kv_heads=2, width=16):
    shapes = {"q": (-1, heads, -1, width), "k": (-1, kv_heads, -1, width), "v": (-1, kv_heads, -1, width)}
    tensors = [net.input(name, dtype, shape) for name, shape in shapes.items()]
    return net.network.add_attention_v2(*tensors, SOFTMAX, causal)


def qkv(batch=2, rows=3, columns=5, heads=6, kv_heads=2, width=16):
    shapes = {"q": (batch, heads, rows, width), "k": (batch, kv_heads, columns, width)}
    shapes["v"] = shapes["k"]
    return {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def naive(q, k, v, visible=None, bias=None):
    """Attention by loops in float64; visible(batch, head, row, column) and bias alike."""
    result = np.zeros(q.shape)
    group = q.shape[1] // k.shape[1]
    for b, h, i in np.ndindex(q.shape[:3]):
        columns = [j for j in range(k.shape[2]) if visible is None or visible(b, h, i, j)]
        scores = [float(q[b, h, i].astype(np.float64) @ k[b, h // group, j].astype(np.float64)) for j in columns]
        if bias is not None:
            scores = [score + bias(b, h, i, j) for score, j in zip(scores, columns, strict=True)]
        weights = [math.exp(score - max(scores)) for score in scores]
        for weight, j in zip(weights, columns, strict=True):
            result[b, h, i] += weight / sum(weights) * v[b, h // group, j]
    return result


def tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_attention_with_grouped_heads_has_no_scale(net):
    interpreter = net.interpreter(attention(net).get_output(0))
    given = qkv()
    np.testing.assert_allclose(interpreter.run(tensors(given))["out0"], naive(**given), rtol=1e-4, atol=1e-5)
    for batch, rows in ((0, 3), (2, 0)):
        assert interpreter.run(tensors(qkv(batch, rows)))["out0"].shape == (batch, 6, rows, 16)


@pytest.mark.parametrize("decomposable", [True, False])
def test_attention_of_bfloat16_keeps_scores_in_float32(net, decomposable):
    layer = attention(net, BF16)
    layer.decomposable = decomposable
    given = {name: bfloat16(array) for name, array in qkv().items()}
    result = net.interpreter(layer.get_output(0)).run(given)["out0"]
    exact = naive(**{name: tensor.float().numpy() for name, tensor in given.items()})
    # One rounding: at most half a unit in the last place of a bfloat16.
    np.testing.assert_allclose(result.float(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (2, 1), (1, 6), (2, 6)])
def test_attention_with_a_boolean_mask(net, mask_batch, mask_heads):
    layer = attention(net)
    layer.mask = net.input("m", BOOL, (mask_batch, mask_heads, -1, -1))
    mask = RANDOM.random((mask_batch, mask_heads, 3, 5)) < 0.5
    mask[..., 2] = True
    given = qkv()
    result = net.interpreter(layer.get_output(0)).run(tensors({**given, "m": mask}))["out0"]

    def visible(b, h, i, j):
        return mask[b % mask_batch, h % mask_heads, i, j]

    np.testing.assert_allclose(result, naive(**given, visible=visible), rtol=1e-4, atol=1e-5)


def test_attention_with_an_additive_mask(net):
    layer = attention(net)
    layer.mask = net.input("m", F32, (-1, 1, -1, -1))
    mask = RANDOM.normal(size=(2, 1, 3, 5)).astype(np.float32)
    mask[0, 0, 0, 1] = -np.inf
    given = qkv()
    result = net.interpreter(layer.get_output(0)).run(tensors({**given, "m": mask}))["out0"]
    expected = naive(**given, bias=lambda b, h, i, j: mask[b, 0, i, j])
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "offset"), [(Causal.UPPER_LEFT, 0), (Causal.LOWER_RIGHT, 2)])
def test_attention_with_a_causal_mask(net, kind, offset):
    given = qkv(rows=3, columns=5)
    result = net.interpreter(attention(net, causal=kind).get_output(0)).run(tensors(given))["out0"]
    expected = naive(**given, visible=lambda b, h, i, j: j <= i + offset)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_with_key_value_lengths(net, masked):
    layer = attention(net)
    if masked:
        layer.mask = net.input("m", BOOL, (1, 1, -1, -1))
    layer.key_value_lengths = net.input("n", I32, (-1,))
    interpreter = net.interpreter(layer.get_output(0))
    given, lengths = qkv(), np.array([2, 5], np.int32)
    mask = np.array([[True, False, True, True, True]] * 3).reshape(1, 1, 3, 5)
    inputs = {**given, "n": lengths, **({"m": mask} if masked else {})}
    expected = naive(**given, visible=lambda b, h, i, j: j < lengths[b] and (j != 1 or not masked))
    np.testing.assert_allclose(interpreter.run(tensors(inputs))["out0"], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lengths"):
        interpreter.run(tensors({**inputs, "n": lengths + 1}))


def test_a_query_that_attends_to_nothing_gives_nan(net):
    layer = attention(net)
    layer.mask = net.input("m", BOOL, (1, 1, -1, -1))
    mask = np.ones((1, 1, 3, 5), bool)
    mask[0, 0, 1] = False
    result = net.interpreter(layer.get_output(0)).run(tensors({**qkv(), "m": mask}))["out0"]
    assert result.isnan().all(dim=-1).all(dim=1).tolist() == [[False, True, False]] * 2
    other = Net()
    result = other.interpreter(attention(other).get_output(0)).run(tensors(qkv(columns=0)))["out0"]
    assert result.isnan().all()


def test_a_mask_that_does_not_fit_is_refused(net):
    layer = attention(net)
    layer.mask = net.input("m", BOOL, (-1, 1, -1, -1))
    interpreter = net.interpreter(layer.get_output(0))
    for shape in ((1, 1, 1, 5), (1, 1, 3, 4), (3, 1, 3, 5)):
        with pytest.raises(ValueError, match="mask"):
            interpreter.run(tensors({**qkv(), "m": np.ones(shape, bool)}))


def packed(layer, net):
    layer.key_value_form = trt.AttentionIOForm.PACKED_NHD


def unnormalized(layer, net):
    layer.norm_op = trt.AttentionNormalizationOp.NONE


def quantized(layer, net):
    layer.normalization_quantize_scale = net.constant(0.5)


def query_lengths(layer, net):
    layer.query_lengths = net.input("n", I32, (-1,))


def lengths_and_lower_right(layer, net):
    layer.causal_kind = Causal.LOWER_RIGHT
    layer.key_value_lengths = net.input("n", I32, (-1,))


def ranks(layer, net):
    layer.num_ranks = 2


@pytest.mark.parametrize("change", [packed, unnormalized, quantized, query_lengths, lengths_and_lower_right, ranks])
def test_attention_options_that_are_refused(net, change):
    change(attention(net), net)
    with pytest.raises(NotImplementedError, match="ATTENTION_INPUT layer"):
        net.interpreter()


def test_a_causal_mask_beside_a_mask_cannot_be_set(net):
    """TensorRT drops the second of the two with no more than a message in its log."""
    layer = attention(net, causal=Causal.UPPER_LEFT)
    layer.mask = net.input("m", BOOL, (1, 1, -1, -1))
    assert layer.mask is None


# Key/value cache update


def cache_update(net, dtype=BF16, index_type=I32):
    cache, update = net.input("cache", dtype, (-1, 2, 8, 4)), net.input("update", dtype, (-1, 2, -1, 4))
    return net.network.add_kv_cache_update(cache, update, net.input("at", index_type, (-1,)), trt.KVCacheMode.LINEAR)


@pytest.mark.parametrize("index_type", [I32, I64])
def test_cache_update_writes_each_row_at_its_index_and_leaves_the_input_alone(net, index_type):
    interpreter = net.interpreter(cache_update(net, index_type=index_type).get_output(0))
    cache, update = torch.randn(3, 2, 8, 4).bfloat16(), torch.randn(3, 2, 2, 4).bfloat16()
    before, at = cache.clone(), [6, 0, 3]
    torch_type = torch.int32 if index_type == I32 else torch.int64
    result = interpreter.run({"cache": cache, "update": update, "at": torch.tensor(at, dtype=torch_type)})["out0"]
    expected = before.clone()
    for row, head, step in np.ndindex(3, 2, 2):
        expected[row, head, at[row] + step] = update[row, head, step]
    assert torch.equal(result, expected)
    assert torch.equal(cache, before)


def test_cache_update_of_nothing(net):
    interpreter = net.interpreter(cache_update(net).get_output(0))
    cache = torch.randn(2, 2, 8, 4).bfloat16()
    at = torch.tensor([8, 0], dtype=torch.int32)
    assert torch.equal(interpreter.run({"cache": cache, "update": cache[:, :, :0], "at": at})["out0"], cache)
    empty = interpreter.run({"cache": cache[:0], "update": cache[:0, :, :2], "at": at[:0]})["out0"]
    assert empty.shape == (0, 2, 8, 4)


@pytest.mark.parametrize("at", [[7, 0], [0, -1], [0]])
def test_cache_update_refuses_writes_outside(net, at):
    interpreter = net.interpreter(cache_update(net).get_output(0))
    cache = torch.randn(2, 2, 8, 4).bfloat16()
    with pytest.raises(ValueError, match=r"cache|indices"):
        interpreter.run({"cache": cache, "update": cache[:, :, :2], "at": torch.tensor(at, dtype=torch.int32)})


def test_cache_update_options_that_are_refused(net):
    cache_update(net)
    with pytest.raises(NotImplementedError, match="network output"):
        net.interpreter()
    other = Net()
    x, at = other.input("x", BF16, (1, 2, 8, 4)), other.input("at", I32, (1,))
    cache = other.network.add_identity(x).get_output(0)
    layer = other.network.add_kv_cache_update(cache, x, at, trt.KVCacheMode.LINEAR)
    with pytest.raises(NotImplementedError, match="network input"):
        other.interpreter(layer.get_output(0))
    other = Net()
    layer = cache_update(other)
    layer.update_form = trt.AttentionIOForm.PACKED_NHD
    with pytest.raises(NotImplementedError, match="PACKED_NHD"):
        other.interpreter(layer.get_output(0))


# Rotary embedding


def rotated(x, angles, width, interleaved):
    """Each pair as a complex number times exp(i * angle)."""
    result = x.astype(np.float64)
    for b, n, s, i in np.ndindex(*x.shape[:3], width // 2):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        turned = complex(x[b, n, s, first], x[b, n, s, second]) * np.exp(1j * angles[b, s, i])
        result[b, n, s, first], result[b, n, s, second] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 4, 8])
@pytest.mark.parametrize("by_position", [False, True])
def test_rotary_embedding(net, interleaved, rotary, by_position):
    width = rotary or 8
    x = net.input("x", F32, (-1, 3, -1, 8))
    shape = (20, width // 2) if by_position else (-1, -1, width // 2)
    caches = [net.input(name, F32, shape) for name in ("cos", "sin")]
    layer = net.network.add_rotary_embedding(x, *caches, interleaved, rotary)
    if by_position:
        layer.set_input(3, net.input("p", I64, (-1, -1)))
    interpreter = net.interpreter(layer.get_output(0))
    given = RANDOM.normal(size=(2, 3, 5, 8)).astype(np.float32)
    table = RANDOM.uniform(-3, 3, (20, width // 2)).astype(np.float32)
    positions = RANDOM.integers(0, 20, (2, 5))
    cache = table if by_position else table[positions]
    inputs = {"x": given, "cos": np.cos(cache), "sin": np.sin(cache), **({"p": positions} if by_position else {})}
    result = interpreter.run(tensors(inputs))["out0"]
    np.testing.assert_allclose(result, rotated(given, table[positions], width, interleaved), rtol=1e-4, atol=1e-5)
    inputs["x"] = given[:, :, :0]
    if by_position:
        inputs["p"] = positions[:, :0]
    else:
        inputs |= {"cos": inputs["cos"][:, :0], "sin": inputs["sin"][:, :0]}
    assert interpreter.run(tensors(inputs))["out0"].shape == (2, 3, 0, 8)
    if by_position:
        with pytest.raises(ValueError, match="positions"):
            interpreter.run(tensors({**inputs, "x": given, "p": positions + 20}))


def test_rotary_embedding_of_bfloat16_rounds_once(net):
    x, cos, sin = net.input("x", BF16, (1, 1, 1, 2)), net.input("c", BF16, (1, 1, 1)), net.input("s", BF16, (1, 1, 1))
    layer = net.network.add_rotary_embedding(x, cos, sin, False, 0)
    # 1 * 1 - 2**-9 * 1: the products are exact, and the difference rounds to 1 - 2**-8 or 1, the even one.
    given = {"x": torch.tensor([1, 2.0**-9]).reshape(1, 1, 1, 2), "c": torch.ones(1, 1, 1), "s": torch.ones(1, 1, 1)}
    (result,) = net.run(layer.get_output(0), **{name: tensor.bfloat16() for name, tensor in given.items()})
    assert result.flatten().tolist() == [1.0, 1.0]
