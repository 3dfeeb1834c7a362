"""The interpreter against TensorRT itself, on the CPU.

TensorRT folds the values of integer constants to infer shapes: a fill layer whose shape is a tensor of the network then
shows, in the inferred shape of its output, what TensorRT computes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import tensorrt_rtx as trt
from hypothesis import assume, given
from hypothesis import strategies as st

from trt_interpreter_testing import LOGGER, Net

I64, F32 = trt.int64, trt.float32
Binary, Unary, Mode, Reduce = trt.ElementWiseOperation, trt.UnaryOperation, trt.SampleMode, trt.ReduceOperation
# Shapes are not negative.
OFFSET = 100


def flat(net: Net, tensor: trt.ITensor) -> trt.ITensor:
    """Up to eight elements as INT64 and not negative."""
    shuffle = net.network.add_shuffle(net.network.add_cast(tensor, I64).get_output(0))
    shuffle.reshape_dims = (-1,)
    offset = net.constant([OFFSET], np.int64)
    return net.network.add_elementwise(shuffle.get_output(0), offset, Binary.SUM).get_output(0)


def compare(build: Callable[[Net], trt.ITensor]) -> None:
    net = Net()
    values = flat(net, build(net))
    fill = net.network.add_fill((1,), trt.FillOperation.LINSPACE, F32)
    fill.set_input(0, values)
    try:
        folded = tuple(fill.get_output(0).shape)
    except RuntimeError:
        pytest.fail(f"TensorRT folds nothing: {LOGGER.messages[-2:]}")
    other = Net()
    (result,) = other.run(flat(other, build(other)))
    assert tuple(result.tolist()) == folded


def constant(net, values, dtype=np.int64):
    return net.constant(values, dtype)


def binary(op, a, b, dtype=np.int64):
    return lambda net: net.network.add_elementwise(constant(net, a, dtype), constant(net, b, dtype), op).get_output(0)


@pytest.mark.parametrize("op", ["SUM", "PROD", "MAX", "MIN", "SUB", "DIV", "FLOOR_DIV"])
def test_elementwise(op):
    compare(binary(getattr(Binary, op), [-7, 7, -8, 9, -1, 0], [2, -2, 4, 4, 3, 5]))


@pytest.mark.parametrize("op", ["SUM", "PROD", "MAX", "MIN", "SUB", "DIV", "FLOOR_DIV"])
def test_elementwise_of_floats(op):
    compare(binary(getattr(Binary, op), [-7.5, 7.5, -8, 9], [2, -2, 4, 4], np.float32))


def test_power():
    compare(binary(Binary.POW, [2, 3, -2], [3, 2, 3]))


@pytest.mark.parametrize("op", ["ABS", "NEG", "SIGN"])
def test_unary(op):
    compare(lambda net: net.network.add_unary(constant(net, [-5, 0, 7]), getattr(Unary, op)).get_output(0))


@pytest.mark.parametrize("op", ["ROUND", "CEIL", "FLOOR"])
def test_rounding(op):
    values = [-2.5, -1.5, -0.4, 0.5, 1.5, 2.5, 2.6]
    compare(lambda net: net.network.add_unary(constant(net, values, np.float32), getattr(Unary, op)).get_output(0))


def test_cast_truncates():
    compare(lambda net: constant(net, [-2.9, -0.5, 0.9, 3.5], np.float32))


@pytest.mark.parametrize("op", ["SUM", "PROD", "MAX", "MIN", "AVG"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_reduce(op, axes):
    values = [[3, 4, -2], [-4, 1, 0]]
    compare(lambda net: net.network.add_reduce(constant(net, values), getattr(Reduce, op), axes, True).get_output(0))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", [[0, 2], [-1, -2], [-3, -4], [3, 5]])
def test_one_hot(axis, indices):
    def build(net):
        depth, values = net.constant(3, np.int32), constant(net, [2, 7])
        return net.network.add_one_hot(net.constant(indices, np.int32), values, depth, axis).get_output(0)

    compare(build)


@pytest.mark.parametrize("mode", ["WRAP", "CLAMP", "REFLECT"])
@given(st.integers(-4, 3), st.integers(0, 4), st.integers(0, 2), st.integers(1, 4))
def test_slice_outside_the_bounds(mode, start, size, stride, length):
    def build(net):
        layer = net.network.add_slice(constant(net, list(range(1, length + 1))), (start,), (size,), (stride,))
        layer.mode = getattr(Mode, mode)
        return net.network.add_concatenation([layer.get_output(0), constant(net, [1])]).get_output(0)

    compare(build)


@given(
    st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3),
    st.permutations(range(3)),
    st.permutations(range(3)),
    st.sampled_from([(0, 0, 0), (0, -1, 1), (-1, 0, 1), (1, 1, -1), (0, 1, -1)]),
)
def test_shuffle(shape, first, second, dims):
    source = [shape[axis] for axis in first]
    copied = np.prod([length for length, dim in zip(source, dims, strict=True) if dim == 0])
    assume(np.prod(shape) % copied == 0)

    def build(net):
        layer = net.network.add_shuffle(constant(net, np.arange(np.prod(shape)).reshape(shape)))
        layer.first_transpose, layer.reshape_dims, layer.second_transpose = first, dims, second
        return layer.get_output(0)

    compare(build)


@pytest.mark.parametrize(
    ("mode", "axis", "batch", "indices"),
    [
        ("DEFAULT", 0, 0, [1, -1, 0]),
        ("DEFAULT", 1, 0, [[1], [0]]),
        ("DEFAULT", 1, 1, [[1, 0], [-1, 1]]),
        ("ELEMENT", 0, 0, [[1, 0]]),
        ("ELEMENT", 1, 0, [[1, 0], [-1, 1]]),
        ("ND", 0, 0, [[1, 0], [0, 1]]),
        ("ND", 0, 0, [[1], [0]]),
        ("ND", 0, 1, [[1], [0]]),
    ],
)
def test_gather(mode, axis, batch, indices):
    def build(net):
        data = constant(net, [[1, 2], [3, 4]])
        layer = net.network.add_gather_v2(data, constant(net, indices), getattr(trt.GatherMode, mode))
        layer.axis, layer.num_elementwise_dims = axis, batch
        return layer.get_output(0)

    compare(build)


def test_select():
    def build(net):
        condition = net.constant([True, False], np.bool_)
        return net.network.add_select(condition, constant(net, [1, 2]), constant(net, [3, 4])).get_output(0)

    compare(build)


def test_concatenate_unsqueeze_and_squeeze():
    def build(net):
        joined = net.network.add_concatenation([constant(net, [[1, 2]]), constant(net, [[5, 6], [7, 8]])])
        joined.axis = 0
        wide = net.network.add_unsqueeze(joined.get_output(0), constant(net, [1, -1])).get_output(0)
        return net.network.add_squeeze(wide, constant(net, [-1])).get_output(0)

    compare(build)


@pytest.mark.parametrize(("alpha", "beta"), [(5, 2), (0, 1), (7, -3)])
def test_fill(alpha, beta):
    def build(net):
        layer = net.network.add_fill((4,), trt.FillOperation.LINSPACE, I64)
        layer.alpha, layer.beta = alpha, beta
        return layer.get_output(0)

    compare(build)


def test_matrix_multiply():
    def build(net):
        a, b = constant(net, [[1, 2], [3, 4]], np.float32), constant(net, [[5, 6], [7, 9]], np.float32)
        kinds = trt.MatrixOperation
        return net.network.add_matrix_multiply(a, kinds.TRANSPOSE, b, kinds.NONE).get_output(0)

    compare(build)
