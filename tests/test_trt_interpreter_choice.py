"""The interpreter of TensorRT networks: the layers that convert, choose and generate elements."""

import math

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from trt_interpreter_testing import Net, bfloat16

F32, BF16, F16, I32, I64, BOOL = trt.float32, trt.bfloat16, trt.float16, trt.int32, trt.int64, trt.bool


@pytest.fixture
def net() -> Net:
    return Net()


def test_cast(net):
    x = net.input("x", F32, (4,))
    types = (I32, I64, trt.int8, BOOL, F16, BF16)
    cast = net.network.add_cast
    results = net.run(*[cast(x, dtype).get_output(0) for dtype in types], x=torch.tensor([1.9, -1.9, 0, 100.3]))
    assert [result.tolist() for result in results[:4]] == [[1, -1, 0, 100]] * 3 + [[True, True, False, True]]
    assert results[4].tolist() == np.array([1.9, -1.9, 0, 100.3], np.float16).tolist()
    assert results[5].tolist() == bfloat16(np.array([1.9, -1.9, 0, 100.3])).tolist()


def test_cast_of_integers_and_booleans(net):
    x, flag = net.input("x", I64, (-1,)), net.input("flag", BOOL, (2,))
    cast = net.network.add_cast
    interpreter = net.interpreter(
        *[cast(x, dtype).get_output(0) for dtype in (I32, F32)], cast(flag, I32).get_output(0)
    )
    result = interpreter.run({"x": torch.tensor([-5, 2**24 + 1]), "flag": torch.tensor([True, False])})
    assert [result[f"out{i}"].tolist() for i in range(3)] == [[-5, 2**24 + 1], [-5, 2**24], [1, 0]]
    with pytest.raises(ValueError, match="INT32"):
        interpreter.run({"x": torch.tensor([2**31]), "flag": torch.tensor([True, False])})


@pytest.mark.parametrize("value", [math.nan, math.inf, 2.0**31, -(2.0**31) - 512])
def test_cast_refuses_what_the_target_cannot_hold(net, value):
    x = net.input("x", F32, (1,))
    interpreter = net.interpreter(net.network.add_cast(x, I32).get_output(0))
    assert interpreter.run({"x": torch.tensor([-(2.0**31)])})["out0"].tolist() == [-(2**31)]
    with pytest.raises(ValueError, match="INT32"):
        interpreter.run({"x": torch.tensor([value])})


def test_select_broadcasts(net):
    condition, x, y = net.input("c", BOOL, (-1, 1)), net.input("x", BF16, (1, 3)), net.input("y", BF16, (1, 1))
    interpreter = net.interpreter(net.network.add_select(condition, x, y).get_output(0))
    given = {"x": torch.tensor([[1, 2, 3]]).bfloat16(), "y": torch.tensor([[9]]).bfloat16()}
    assert interpreter.run({"c": torch.tensor([[True], [False]]), **given})["out0"].tolist() == [[1, 2, 3], [9, 9, 9]]
    assert interpreter.run({"c": torch.zeros(0, 1, dtype=torch.bool), **given})["out0"].shape == (0, 3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ["MAX", "MIN"])
def test_top_k_puts_the_lower_index_of_equal_elements_first(net, op, axis):
    x = net.input("x", F32, (-1, 60))
    layer = net.network.add_topk(x, getattr(trt.TopKOperation, op), 3, 1 << axis)
    interpreter = net.interpreter(layer.get_output(0), layer.get_output(1))
    values = np.random.default_rng(4).integers(0, 3, (60, 60)).astype(np.float32)
    result = interpreter.run({"x": torch.from_numpy(values)})
    order = np.argsort(-values if op == "MAX" else values, axis=axis, kind="stable").take(range(3), axis)
    np.testing.assert_array_equal(result["out1"], order)
    np.testing.assert_array_equal(result["out0"], np.take_along_axis(values, order, axis))
    assert result["out1"].dtype == torch.int32


def test_top_k_with_k_from_a_tensor_and_64_bit_indices(net):
    x, k = net.input("x", BF16, (-1, 4)), net.input("k", I32, ())
    layer = net.network.add_topk(x, trt.TopKOperation.MAX, 1, 2, I64)
    layer.set_input(1, k)
    interpreter = net.interpreter(layer.get_output(1))
    given = torch.tensor([[1, 4, 2, 3]]).bfloat16()

    def run(x, k):
        return interpreter.run({"x": x, "k": torch.tensor(k, dtype=torch.int32)})["out0"]

    assert run(given, 3).tolist() == [[1, 3, 2]]
    assert run(given, 3).dtype == torch.int64
    assert run(given[:0], 2).shape == (0, 2)
    for k in (0, 5):
        with pytest.raises(ValueError, match="top"):
            run(given, k)


def test_top_k_of_more_than_tensorrt_sorts_is_refused(net):
    x = net.input("x", F32, (-1, 5000))
    layer = net.network.add_topk(x, trt.TopKOperation.MAX, 1, 2)
    layer.set_input(1, net.input("k", I32, ()))
    interpreter = net.interpreter(layer.get_output(0))
    given = {"x": torch.arange(5000.0).reshape(1, -1), "k": torch.tensor(3840, dtype=torch.int32)}
    assert interpreter.run(given)["out0"].shape == (1, 3840)
    with pytest.raises(ValueError, match="top 3841"):
        interpreter.run({**given, "k": given["k"] + 1})


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(net, axis):
    indices, values = net.input("i", I32, (-1, 2)), net.constant([-1.0, 5.0])
    layer = net.network.add_one_hot(indices, values, net.constant(4, np.int32), axis)
    interpreter = net.interpreter(layer.get_output(0))
    given = torch.tensor([[0, 3], [2, 2], [1, 0]], dtype=torch.int32)
    expected = np.moveaxis(np.where(np.eye(4)[given.numpy()] == 1, 5.0, -1.0), -1, axis)
    np.testing.assert_array_equal(interpreter.run({"i": given})["out0"], expected)
    assert 0 in interpreter.run({"i": given[:0]})["out0"].shape


def test_fill(net):
    static = net.network.add_fill((4,), trt.FillOperation.LINSPACE, I64)
    static.alpha, static.beta = 5, -2
    shape, start = net.input("shape", I64, (2,)), net.input("start", I32, ())
    dynamic = net.network.add_fill((0, 0), trt.FillOperation.LINSPACE, I32)
    dynamic.set_input(0, shape)
    dynamic.set_input(1, start)
    dynamic.set_input(2, net.constant([100, 10], np.int32))
    line = net.network.add_fill((1,), trt.FillOperation.LINSPACE, F32)
    line.set_input(0, net.constant([3], np.int64))
    line.alpha, line.beta = 0.5, 0.25
    interpreter = net.interpreter(static.get_output(0), dynamic.get_output(0), line.get_output(0))

    def run(*shape):
        return interpreter.run({"shape": torch.tensor(shape), "start": torch.tensor(1, dtype=torch.int32)})

    assert run(3, 4)["out0"].tolist() == [5, 3, 1, -1]
    assert run(3, 4)["out1"].tolist() == [[1, 11, 21, 31], [101, 111, 121, 131], [201, 211, 221, 231]]
    assert run(0, 4)["out1"].shape == (0, 4)
    assert run(0, 4)["out2"].tolist() == [0.5, 0.75, 1.0]


def test_random_fill_is_refused(net):
    net.network.add_fill((4,), trt.FillOperation.RANDOM_UNIFORM, F32)
    with pytest.raises(NotImplementedError, match="RANDOM_UNIFORM"):
        net.interpreter()


def test_assertion(net):
    x, y = net.input("x", F32, (-1, 2)), net.input("y", F32, (-1, 2))
    shapes = [net.network.add_shape(tensor).get_output(0) for tensor in (x, y)]
    equal = net.network.add_elementwise(*shapes, trt.ElementWiseOperation.EQUAL).get_output(0)
    net.network.add_assertion(equal, "as many rows")
    interpreter = net.interpreter(shapes[0])
    assert interpreter.run({"x": torch.zeros(3, 2), "y": torch.zeros(3, 2)})["out0"].tolist() == [3, 2]
    with pytest.raises(AssertionError, match="as many rows"):
        interpreter.run({"x": torch.zeros(3, 2), "y": torch.zeros(2, 2)})
