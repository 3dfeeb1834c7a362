"""The interpreter of TensorRT networks: its walk, its checks, its constants."""

import gc
import weakref

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

import trt_interpreter
from trt_interpreter_testing import Net

F32, BF16, I32, I64 = trt.float32, trt.bfloat16, trt.int32, trt.int64
SUM = trt.ElementWiseOperation.SUM


def counting(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


@pytest.fixture
def net() -> Net:
    return Net()


# The walk


def test_a_network_runs_again_with_other_lengths_and_leaves_its_inputs_alone(net):
    x = net.input("x", F32, (-1, 3))
    doubled = net.network.add_elementwise(x, x, SUM).get_output(0)
    interpreter = net.interpreter(net.network.add_elementwise(doubled, x, SUM).get_output(0), doubled)
    for rows in (2, 0, 5):
        given = torch.randn(rows, 3)
        before = given.clone()
        result = interpreter.run({"x": given})
        assert torch.equal(result["out1"], 2 * before)
        torch.testing.assert_close(result["out0"], 3 * before)
        assert torch.equal(given, before)


def test_run_is_a_shortcut(net):
    x = net.input("x", F32, (2,))
    y = net.network.add_identity(x).get_output(0)
    y.name = "y"
    net.network.mark_output(y)
    assert trt_interpreter.run(net.network, {"x": torch.ones(2)})["y"].tolist() == [1, 1]


def test_outputs_share_no_memory_with_constants_or_inputs(net):
    x = net.input("x", F32, (2,))
    constant = net.constant([1.0, 2.0])
    interpreter = net.interpreter(net.network.add_identity(x).get_output(0), constant)
    given = torch.zeros(2)
    results = interpreter.run({"x": given})
    results["out0"].fill_(7)
    results["out1"].fill_(7)
    assert given.tolist() == [0, 0]
    assert interpreter.run({"x": given})["out1"].tolist() == [1, 2]


def test_constants_outlive_the_arrays_of_the_network(net):
    array = np.full(1000, 3.0, np.float32)
    weights = trt.Weights(F32, array.ctypes.data, 1000)
    interpreter = net.interpreter(net.network.add_constant((1000,), weights).get_output(0))
    array[:] = 5
    del array
    gc.collect()
    assert interpreter.run({})["out0"].unique().tolist() == [3]


def test_a_layer_may_use_one_that_was_added_later(net):
    x = net.input("x", F32, (2, 3))
    shuffle = net.network.add_shuffle(x)
    dims = net.constant([3, 2], np.int64)
    shuffle.set_input(1, net.network.add_elementwise(dims, net.constant([0, 0], np.int64), SUM).get_output(0))
    (result,) = net.run(shuffle.get_output(0), x=counting(2, 3))
    assert result.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_tensors_may_share_a_name(net):
    x = net.input("x", F32, (2,))
    first = net.network.add_elementwise(x, x, SUM).get_output(0)
    second = net.network.add_elementwise(first, x, SUM).get_output(0)
    first.name = second.name = "same"
    (result,) = net.run(net.network.add_elementwise(second, first, SUM).get_output(0), x=torch.ones(2))
    assert result.tolist() == [5, 5]


def test_the_same_network_can_be_read_twice(net):
    x = net.input("x", F32, (1,))
    y = net.network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    first = net.interpreter(y)
    second = trt_interpreter.Interpreter(net.network)
    assert first.run({"x": -torch.ones(1)})["out0"] == second.run({"x": -torch.ones(1)})["out0"] == 0


def test_intermediate_tensors_are_freed(net, monkeypatch):
    x = net.input("x", F32, (4,))
    tensor = x
    for _ in range(20):
        tensor = net.network.add_elementwise(tensor, tensor, SUM).get_output(0)
    interpreter = net.interpreter(tensor)
    made, alive, execute = [], [], trt_interpreter._execute

    def spy(step, values):
        alive.append(sum(made_before() is not None for made_before in made))
        results = execute(step, values)
        made.extend(weakref.ref(value) for value in results.values())
        return results

    monkeypatch.setattr(trt_interpreter, "_execute", spy)
    assert interpreter.run({"x": torch.ones(4)})["out0"].tolist() == [2**20] * 4
    assert (len(alive), max(alive)) == (20, 1)


def test_layers_of_constants_run_once(net, monkeypatch):
    x = net.input("x", F32, (2,))
    doubled = net.network.add_elementwise(net.constant([1.0, 2.0]), net.constant([1.0, 2.0]), SUM).get_output(0)
    interpreter = net.interpreter(net.network.add_elementwise(x, doubled, SUM).get_output(0))
    names, execute = [], trt_interpreter._execute
    monkeypatch.setattr(trt_interpreter, "_execute", lambda step, values: names.append(step) or execute(step, values))
    assert interpreter.run({"x": torch.zeros(2)})["out0"].tolist() == [2, 4]
    assert len(names) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing"),
        ({"x": torch.zeros(2, 3), "m": torch.zeros(2, 4), "z": torch.zeros(1)}, "unknown"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64), "m": torch.zeros(2, 4)}, "no TensorRT type"),
        ({"x": torch.zeros(2, 3, dtype=torch.bfloat16), "m": torch.zeros(2, 4)}, "TensorRT has FLOAT"),
        ({"x": torch.zeros(2, 4), "m": torch.zeros(2, 4)}, "shape"),
        ({"x": torch.zeros(2), "m": torch.zeros(2, 4)}, "shape"),
        ({"x": np.zeros((2, 3), np.float32), "m": torch.zeros(2, 4)}, "torch tensor"),
        ({"x": torch.zeros(2, 3), "m": torch.zeros(5, 4)}, "rows"),
    ],
)
def test_wrong_inputs_are_refused(net, inputs, message):
    x, m = net.input("x", F32, (-1, 3)), net.input("m", F32, (-1, 4))
    x.set_dimension_name(0, "rows")
    m.set_dimension_name(0, "rows")
    interpreter = net.interpreter(net.network.add_concatenation([x]).get_output(0))
    with pytest.raises(ValueError, match=message):
        interpreter.run(inputs)


def test_a_result_that_is_not_what_tensorrt_inferred_is_an_error(net, monkeypatch):
    x = net.input("x", F32, (2, 3))
    net.interpreter(net.network.add_activation(x, trt.ActivationType.TANH).get_output(0))
    wrong = {"shape": torch.zeros(2, 2), "rank": torch.zeros(6), "type": torch.zeros(2, 3).half()}
    for what, value in wrong.items():
        builder = (trt.IActivationLayer, lambda layer, value=value: lambda inputs: [value])
        monkeypatch.setitem(trt_interpreter.BUILDERS, trt.LayerType.ACTIVATION, builder)
        with pytest.raises(RuntimeError, match="type HALF" if what == "type" else "shape"):
            trt_interpreter.run(net.network, {"x": torch.zeros(2, 3)})


def test_an_unknown_layer_is_refused_by_name(net):
    x = net.input("x", F32, (1, 1, 4, 4))
    layer = net.network.add_pooling_nd(x, trt.PoolingType.MAX, (2, 2))
    layer.name = "pool"
    with pytest.raises(NotImplementedError, match=r"POOLING layer 'pool'"):
        net.interpreter(layer.get_output(0))


def test_normalization_and_loops_are_refused(net):
    x = net.input("x", F32, (2, 4))
    scale = net.constant([[1.0] * 4])
    net.network.add_normalization_v2(x, scale, scale, 2)
    with pytest.raises(NotImplementedError, match="NORMALIZATION"):
        net.interpreter()


def test_quantized_network_inputs_and_outputs_are_refused(net):
    net.input("x", trt.fp4, (2, 16))
    with pytest.raises(NotImplementedError, match="'x' of type FP4"):
        net.interpreter()
    other = Net()
    with pytest.raises(NotImplementedError, match="'out0' of type INT4"):
        other.interpreter(other.packed([0], trt.int4, (2,)))


# Constants


def test_constants_of_numpy_types(net):
    values = {np.float32: [0.1, -2], np.float16: [0.5, 3], np.int8: [-3, 4], np.int32: [-5, 6], np.int64: [7, 2**40]}
    values[np.bool_] = [True, False]
    results = net.run(*[net.constant([given], dtype) for dtype, given in values.items()])
    for result, (dtype, given) in zip(results, values.items(), strict=True):
        np.testing.assert_array_equal(result.numpy(), np.array([given], dtype))
        assert result.numpy().dtype == dtype


def test_bfloat16_and_fp8_constants(net):
    bfloat16 = net.packed([0x80, 0x3F, 0x20, 0xC0], BF16, (2,))
    fp8 = net.packed([0x38, 0x7E, 0x01, 0xC4], trt.fp8, (2, 2))
    first, second = net.run(bfloat16, fp8)
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    assert first.tolist() == [1.0, -2.5]
    assert second.float().tolist() == [[1.0, 448.0], [2.0**-9, -3.0]]


def test_scalar_and_empty_constants(net):
    empty = net.network.add_constant((0, 4), trt.Weights(F32)).get_output(0)
    scalar, nothing = net.run(net.constant(2.5), empty)
    assert (scalar.shape, scalar.item(), nothing.shape) == ((), 2.5, (0, 4))


def test_placeholder_weights_are_refused(net):
    tensors = [net.network.add_constant((64,), trt.Weights(dtype, 0, 64)).get_output(0) for dtype in (F32, BF16)]
    with pytest.raises(ValueError, match="placeholder"):
        net.interpreter(*tensors)
