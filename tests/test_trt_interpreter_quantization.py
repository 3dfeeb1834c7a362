"""The interpreter of TensorRT networks: quantize, dequantize and dynamic quantize."""

import math

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from trt_interpreter_testing import Net, bfloat16

F32, BF16, FP8, FP4, INT8, INT4 = trt.float32, trt.bfloat16, trt.fp8, trt.fp4, trt.int8, trt.int4
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# Every finite non-negative E4M3 value, by its bits.
E4M3 = [i / 8 * 2.0**-6 for i in range(8)] + [(1 + i % 8 / 8) * 2.0 ** (i // 8 - 7) for i in range(8, 127)]


@pytest.fixture
def net() -> Net:
    return Net()


def nearest(x: float, levels: list[float]) -> float:
    """The nearest level by comparison, ties to the level of even index, with the sign of x."""
    distances = [abs(abs(x) - level) for level in levels]
    best = min(range(len(levels)), key=lambda index: (distances[index], index % 2))
    return math.copysign(levels[best], x)


def quantized(net, dtype, scale, *values, axis=None, source=F32):
    """The values of quantize(x), read by casting FP8 or dequantizing by 1."""
    layer = net.network.add_quantize(net.input("x", source, np.shape(values[0])), scale, dtype)
    if axis is not None:
        layer.axis = axis
    back = net.network.add_dequantize(layer.get_output(0), net.constant(1.0), F32)
    given = torch.tensor(values[0])
    return net.run(back.get_output(0), x=given if source == F32 else given.bfloat16())[0]


# Rounding


def test_fp8_rounds_to_nearest_even_and_saturates(net):
    cases = {
        0.3: 0.3125,
        1.0625: 1.0,  # tie of 1 and 1.125
        1.1875: 1.25,  # tie of 1.125 and 1.25
        -17.0: -16.0,  # tie of 16 and 18
        449.0: 448.0,
        1e9: 448.0,
        -math.inf: -448.0,
        2.0**-10: 0.0,  # tie of 0 and the smallest
        3 * 2.0**-11: 2.0**-9,
        3 * 2.0**-10: 2.0**-8,  # tie of 1 and 2 times the smallest
    }
    assert quantized(net, FP8, net.constant(1.0), list(cases)).tolist() == list(cases.values())


def test_fp8_agrees_with_a_search_of_all_values(net):
    values = (np.random.default_rng(0).normal(size=2000) * np.geomspace(1e-3, 300, 2000)).astype(np.float32)
    result = quantized(net, FP8, net.constant(1.0), values.tolist())
    assert result.tolist() == [nearest(float(x), E4M3) for x in values]


def test_fp4_rounds_to_nearest_even_and_saturates(net):
    ties = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}
    cases = {**ties, **{-x: -y for x, y in ties.items()}, 0.26: 0.5, 5.01: 6, 6.9: 6, 100: 6, -1e30: -6, 2.49: 2, 0: 0}
    values = [*cases, *[0] * (32 - len(cases))]
    scale = net.constant(np.ones((1, 2)))
    assert quantized(net, FP4, scale, [values])[0, : len(cases)].tolist() == list(cases.values())


def test_int8_and_int4_round_to_even_and_clamp(net):
    values = [0.5, 1.5, -2.5, 2.6, 127.4, 127.6, 1e9, -128.6, -1e9]
    result = quantized(net, INT8, net.constant(1.0), values)
    assert result.tolist() == [0, 2, -2, 3, 127, 127, 127, -128, -128]
    other = Net()
    values = [0.5, 1.5, -2.5, 7.4, 7.6, 100, -8.4, -9]
    result = quantized(other, INT4, other.constant(np.ones((1, 2))), [values])
    assert result.tolist() == [[0, 2, -2, 7, 7, 7, -8, -8]]


@pytest.mark.parametrize(("dtype", "shape"), [(FP4, (1, 2)), (INT8, ()), (INT4, (1, 2))])
def test_nan_has_no_value_in_narrow_types(net, dtype, shape):
    with pytest.raises(ValueError, match="NaN"):
        quantized(net, dtype, net.constant(np.ones(shape)), [[math.nan] * 32])


def test_quantize_divides_bfloat16_by_its_scale_in_float32(net):
    result = quantized(net, FP8, net.constant(0.1), [1.0, 3.0], source=BF16)
    assert result.tolist() == [10.0, 30.0]


# Scales


def test_scales_per_tensor_and_per_axis(net):
    codes = net.packed([0x38, 0x40, 0xB8, 0x7E, 0x00, 0x01], FP8, (2, 3))  # 1 2 -1 448 0 2**-9
    add = net.network.add_dequantize
    outputs = [add(codes, net.constant(0.5), F32), add(codes, net.constant([0.5, 2]), BF16)]
    outputs += [add(codes, net.constant([1, 2, 4]), F32), add(codes, net.constant([3.0]), F32)]
    outputs[1].axis, outputs[2].axis = 0, 1
    results = net.run(*[layer.get_output(0) for layer in outputs])
    assert results[0].tolist() == [[0.5, 1, -0.5], [224, 0, 2.0**-10]]
    assert results[1].tolist() == [[0.5, 1, -0.5], [896, 0, 2.0**-8]]
    assert results[2].tolist() == [[1, 4, -4], [448, 0, 2.0**-7]]
    assert results[3].tolist() == [[3, 6, -3], [1344, 0, 3 * 2.0**-9]]
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_quantize_per_axis(net):
    result = quantized(net, INT8, net.constant([1.0, 0.5]), [[1.0, 1.0], [3.0, 3.0]], axis=1)
    assert result.tolist() == [[1, 2], [3, 6]]


def test_dequantize_rounds_the_product_once(net):
    codes = net.packed([0x3F], FP8, (1,))  # 1.875
    (result,) = net.run(net.network.add_dequantize(codes, net.constant(1.01), BF16).get_output(0))
    assert torch.equal(result, bfloat16(np.array([np.float32(1.875) * np.float32(1.01)])))


def test_int4_constants_are_packed_low_nibble_first_and_dequantized_by_block(net):
    codes = net.packed([0x21, 0x87, 0xF0, 0x9A], INT4, (2, 4))  # 1 2 7 -8 / 0 -1 -6 -7
    scales = net.constant([[1.0, 10.0], [0.5, 2.0]])
    (result,) = net.run(net.network.add_dequantize(codes, scales, F32).get_output(0))
    assert result.tolist() == [[1, 2, 70, -80], [0, -0.5, -12, -14]]


def test_blocks_along_the_second_to_last_dimension(net):
    codes = net.packed([0x21, 0x43], INT4, (4, 1))
    (result,) = net.run(net.network.add_dequantize(codes, net.constant([[1.0], [10.0]]), F32).get_output(0))
    assert result.tolist() == [[1], [2], [30], [40]]


def test_fp4_constants_with_fp8_scales_of_scales(net):
    """The layout of an NVFP4 checkpoint: FP4 [N, K], FP8 [N, K / 16], a float32 scalar."""
    codes = list(range(16))
    data = bytes(codes[2 * i] | codes[2 * i + 1] << 4 for i in range(8))
    weights = net.packed(data * 4, FP4, (2, 32))
    scales = net.packed([0x38, 0x40, 0x34, 0x08], FP8, (2, 2))  # 1 2 / 0.75 2**-6
    scale = net.network.add_dequantize(scales, net.constant(0.5), BF16).get_output(0)
    (result,) = net.run(net.network.add_dequantize(weights, scale, BF16).get_output(0))
    row = np.array(E2M1 + [-x for x in E2M1])
    expected = [[*(row * 0.5), *(row * 1.0)], [*(row * 0.375), *(row * 2.0**-7)]]
    np.testing.assert_array_equal(result.float(), np.array(expected))


def test_scales_per_expert(net):
    """FP8 block scales [E, N, K / 16] with one float32 scale per expert."""
    scales = net.packed([0x38, 0x40], FP8, (2, 1, 1))
    layer = net.network.add_dequantize(scales, net.constant([0.5, 4.0]), BF16)
    layer.axis = 0
    weights = net.packed([0x22] * 16, FP4, (2, 1, 16))
    (result,) = net.run(net.network.add_dequantize(weights, layer.get_output(0), BF16).get_output(0))
    assert result.tolist() == [[[0.5] * 16], [[8.0] * 16]]


def test_four_bit_values_move_and_keep_their_type(net):
    weights = net.packed([0x21, 0x43, 0x65, 0xA7] * 8, FP4, (2, 32))
    shuffle = net.network.add_shuffle(weights)
    shuffle.reshape_dims, shuffle.second_transpose = (4, 16), (1, 0)
    scale = net.constant(np.ones((1, 4)))
    (result,) = net.run(net.network.add_dequantize(shuffle.get_output(0), scale, F32).get_output(0))
    row = [0.5, 1, 1.5, 2, 3, 4, 6, -1]
    np.testing.assert_array_equal(result, np.array([row * 8]).reshape(4, 16).T)


def test_quantization_of_no_rows(net):
    x = net.input("x", BF16, (-1, 32))
    scale = net.constant(0.5)
    eight = net.network.add_quantize(x, scale, FP8).get_output(0)
    dynamic = net.network.add_dynamic_quantize(x, 1, 16, FP4, FP8)
    dynamic.set_input(1, scale)
    inner = net.network.add_dequantize(dynamic.get_output(1), scale, BF16).get_output(0)
    outputs = [
        net.network.add_dequantize(eight, scale, BF16),
        net.network.add_dequantize(dynamic.get_output(0), inner, BF16),
    ]
    given = torch.zeros(0, 32).bfloat16()
    for result in net.run(*[layer.get_output(0) for layer in outputs], x=given):
        assert result.shape == (0, 32)


# Dynamic quantization


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("scale", [1.0, 0.0123, 1e-4])
def test_dynamic_quantization_is_that_of_a_naive_loop(net, axis, scale):
    rows = 48 if axis == 0 else 5
    x = net.input("x", BF16, (-1 if axis else rows, 32))
    layer = net.network.add_dynamic_quantize(x, axis % 2, 16, FP4, FP8)
    layer.set_input(1, net.constant(scale))
    plain = net.network.add_dequantize(layer.get_output(1), net.constant(1.0), F32).get_output(0)
    ones = net.network.add_elementwise(plain, plain, trt.ElementWiseOperation.DIV).get_output(0)
    codes = net.network.add_dequantize(layer.get_output(0), ones, F32).get_output(0)
    given = np.random.default_rng(1).normal(size=(rows, 32)) * np.geomspace(1e-3, 2, 32)
    given[:16, :16] = 0
    given = bfloat16(given)
    values, scales, eights = net.run(codes, plain, layer.get_output(1), x=given)
    assert eights.dtype == torch.float8_e4m3fn
    source, values, scales = (given.float().numpy(), values.numpy(), scales.numpy())
    if axis == 0:
        source, values, scales = source.T, values.T, scales.T
    g = np.float32(scale)
    for row, block in np.ndindex(scales.shape):
        elements = source[row, block * 16 : block * 16 + 16]
        amax = np.float32(max(abs(elements)))
        expected = nearest(float(max(amax / (np.float32(6) * g), np.float32(2.0**-9))), E4M3)
        assert scales[row, block] == expected
        for element, value in zip(elements, values[row, block * 16 : block * 16 + 16], strict=True):
            assert value == nearest(float(element / (np.float32(expected) * g)), E2M1)


def test_dynamic_quantization_saturates_its_block_scale(net):
    x = net.input("x", F32, (1, 32))
    layer = net.network.add_dynamic_quantize(x, 1, 16, FP4, FP8)
    layer.set_input(1, net.constant([1.0]))
    inner = net.network.add_dequantize(layer.get_output(1), net.constant(1.0), F32).get_output(0)
    outer = net.network.add_dequantize(layer.get_output(0), inner, F32).get_output(0)
    scale, result = net.run(inner, outer, x=torch.full((1, 32), 1e6))
    assert (scale.tolist(), result.unique().tolist()) == ([[448.0] * 2], [2688.0])


@pytest.mark.parametrize(
    ("amax", "scale", "expected"),
    [(0.025646384805440903, 0.2574695646762848, 0.015625), (0.05950779840350151, 0.597411572933197, 0.017578125)],
)
def test_the_block_scale_is_divided_by_six_times_the_scale(net, amax, scale, expected):
    """Ties of E4M3 that amax / 6 / scale rounds the other way."""
    x = net.input("x", F32, (1, 32))
    layer = net.network.add_dynamic_quantize(x, 1, 16, FP4, FP8)
    layer.set_input(1, net.constant(scale))
    scales = net.network.add_dequantize(layer.get_output(1), net.constant(1.0), F32).get_output(0)
    assert net.run(scales, x=torch.full((1, 32), amax))[0].tolist() == [[expected] * 2]


# Refusals


def test_options_that_are_refused(net):
    x = net.input("x", F32, (2, 32))
    net.network.add_dynamic_quantize(x, 1, 16, FP4, FP8)
    with pytest.raises(NotImplementedError, match="missing input 1"):
        net.interpreter()
    other = Net()
    other.network.add_dynamic_quantize(other.input("x", F32, (2, 32)), 1, 32, FP8, trt.DataType.E8M0)
    with pytest.raises(NotImplementedError, match="DYNAMIC_QUANTIZE"):
        other.interpreter()


def test_zero_points_are_refused(net):
    layer = net.network.add_dequantize(net.packed([1, 2], INT8, (2,)), net.constant(1.0), F32)
    layer.set_input(2, net.packed([0], INT8, ()))
    with pytest.raises(NotImplementedError, match="input 2"):
        net.interpreter()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scales_must_be_positive(net, scale):
    layer = net.network.add_dequantize(net.packed([1, 2], INT8, (2,)), net.constant(scale), F32)
    with pytest.raises(ValueError, match="positive"):
        net.interpreter(layer.get_output(0))


def test_explicit_block_shapes(net):
    layer = net.network.add_dequantize(net.packed([0x11] * 4, INT4, (2, 4)), net.constant(np.ones((2, 2))), F32)
    layer.block_shape = (1, 2)
    interpreter = net.interpreter(layer.get_output(0))
    assert interpreter.run({})["out0"].tolist() == [[1] * 4] * 2
    layer.block_shape = (1, 4)
    with pytest.raises(ValueError, match="block shape"):
        net.interpreter()
