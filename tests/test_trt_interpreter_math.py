"""The interpreter of TensorRT networks: the layers that compute with elements."""

import math

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from trt_interpreter_testing import Net, bfloat16

F32, BF16, F16, I32, I64, BOOL = trt.float32, trt.bfloat16, trt.float16, trt.int32, trt.int64, trt.bool
Binary, Unary, Activation, Reduce = (
    trt.ElementWiseOperation,
    trt.UnaryOperation,
    trt.ActivationType,
    trt.ReduceOperation,
)
NONE, TRANSPOSE, VECTOR = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE, trt.MatrixOperation.VECTOR


@pytest.fixture
def net() -> Net:
    return Net()


# Elementwise, unary, activation


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("SUM", np.add),
        ("PROD", np.multiply),
        ("MAX", np.maximum),
        ("MIN", np.minimum),
        ("SUB", np.subtract),
        ("DIV", np.divide),
        ("POW", np.power),
        ("FLOOR_DIV", lambda a, b: np.floor(a / b)),
        ("EQUAL", np.equal),
        ("GREATER", np.greater),
        ("LESS", np.less),
    ],
)
def test_elementwise_of_floats_broadcasts_and_rounds_once(net, op, function):
    a, b = np.random.default_rng(0).uniform(0.5, 4, (2, 4, 3)).astype(np.float32)
    a, b = a[:, :1], b[:1]
    b[0, 0] = a[0, 0]
    x, y = net.input("x", F32, (-1, 1)), net.input("y", F32, (1, 3))
    p, q = net.input("p", BF16, (-1, 1)), net.input("q", BF16, (1, 3))
    outputs = [net.network.add_elementwise(*pair, getattr(Binary, op)).get_output(0) for pair in ((x, y), (p, q))]
    narrow = [bfloat16(values) for values in (a, b)]
    given = {"x": torch.from_numpy(a), "y": torch.from_numpy(b), "p": narrow[0], "q": narrow[1]}
    interpreter = net.interpreter(*outputs)
    result = interpreter.run(given)
    np.testing.assert_allclose(result["out0"], function(a, b), rtol=1e-6)
    rounded = function(*(values.float().numpy() for values in narrow))
    assert torch.equal(result["out1"], torch.from_numpy(rounded) if rounded.dtype == bool else bfloat16(rounded))
    assert interpreter.run({**given, "x": given["x"][:0], "p": given["p"][:0]})["out0"].shape == (0, 3)


def test_elementwise_of_integers(net):
    x, y = net.input("x", I32, (4,)), net.input("y", I32, (4,))
    ops = ("SUM", "PROD", "MAX", "MIN", "SUB", "FLOOR_DIV", "DIV", "EQUAL", "GREATER", "LESS")
    interpreter = net.interpreter(*[net.network.add_elementwise(x, y, getattr(Binary, op)).get_output(0) for op in ops])
    x, y = (torch.tensor(values, dtype=torch.int32) for values in ([7, 8, 1, 9], [2, 4, 5, 9]))
    results = {op: interpreter.run({"x": x, "y": y})[f"out{i}"] for i, op in enumerate(ops)}
    assert {op: result.tolist() for op, result in results.items()} == {
        "SUM": [9, 12, 6, 18],
        "PROD": [14, 32, 5, 81],
        "MAX": [7, 8, 5, 9],
        "MIN": [2, 4, 1, 9],
        "SUB": [5, 4, -4, 0],
        "FLOOR_DIV": [3, 2, 0, 1],
        "DIV": [3, 2, 0, 1],
        "EQUAL": [False, False, False, True],
        "GREATER": [True, True, False, False],
        "LESS": [False, False, True, False],
    }
    with pytest.raises(ValueError, match="zero"):
        interpreter.run({"x": x, "y": y * 0})


def test_logical_operations(net):
    x, y = net.input("x", BOOL, (4,)), net.input("y", BOOL, (4,))
    outputs = [net.network.add_elementwise(x, y, op).get_output(0) for op in (Binary.AND, Binary.OR, Binary.XOR)]
    outputs.append(net.network.add_unary(x, Unary.NOT).get_output(0))
    a, b = torch.tensor([0, 0, 1, 1]).bool(), torch.tensor([0, 1, 0, 1]).bool()
    results = net.run(*outputs, x=a, y=b)
    assert [result.int().tolist() for result in results] == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]]


UNARY = {
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": lambda x: 1 / x,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "SINH": np.sinh,
    "COSH": np.cosh,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "ASINH": np.arcsinh,
    "ACOSH": np.arccosh,
    "ATANH": np.arctanh,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ERF": np.vectorize(math.erf),
    "SIGN": np.sign,
    "ROUND": np.round,
}


@pytest.mark.parametrize("op", UNARY)
def test_unary(net, op):
    domain = {"LOG": (0.1, 5), "SQRT": (0, 5), "ASIN": (-1, 1), "ACOS": (-1, 1), "ATANH": (-0.9, 0.9), "ACOSH": (1, 5)}
    values = np.linspace(*domain.get(op, (-3.5, 3.5)), 8, dtype=np.float32)
    x, y = net.input("x", F32, (-1,)), net.input("y", BF16, (-1,))
    interpreter = net.interpreter(*[net.network.add_unary(t, getattr(Unary, op)).get_output(0) for t in (x, y)])
    narrow = bfloat16(values)
    result = interpreter.run({"x": torch.from_numpy(values), "y": narrow})
    np.testing.assert_allclose(result["out0"], UNARY[op](values), rtol=1e-5, atol=1e-6)
    exact = UNARY[op](narrow.double().numpy())
    np.testing.assert_allclose(result["out1"].float(), exact, rtol=2**-8, atol=1e-6)
    assert interpreter.run({"x": torch.zeros(0), "y": narrow[:0]})["out1"].shape == (0,)


def test_sign_round_and_predicates(net):
    x = net.input("x", F32, (6,))
    ops = (Unary.SIGN, Unary.ROUND, Unary.ISINF, Unary.ISNAN)
    given = torch.tensor([0.5, 1.5, -2.5, 0, -math.inf, math.nan])
    sign, rounded, infinite, nan = net.run(*[net.network.add_unary(x, op).get_output(0) for op in ops], x=given)
    assert sign[:5].tolist() == [1, 1, -1, 0, -1]
    assert rounded[:4].tolist() == [0, 2, -2, 0]
    assert infinite.tolist() == [False] * 4 + [True, False]
    assert nan.tolist() == [False] * 5 + [True]


ACTIVATIONS = {
    "RELU": lambda x, a, b: max(x, 0),
    "SIGMOID": lambda x, a, b: 1 / (1 + math.exp(-x)),
    "TANH": lambda x, a, b: math.tanh(x),
    "LEAKY_RELU": lambda x, a, b: x if x >= 0 else a * x,
    "ELU": lambda x, a, b: x if x >= 0 else a * math.expm1(x),
    "SELU": lambda x, a, b: b * x if x > 0 else b * a * math.expm1(x),
    "SOFTSIGN": lambda x, a, b: x / (1 + abs(x)),
    "SOFTPLUS": lambda x, a, b: a * math.log1p(math.exp(b * x)),
    "CLIP": lambda x, a, b: max(a, min(b, x)),
    "HARD_SIGMOID": lambda x, a, b: max(0, min(1, a * x + b)),
    "SCALED_TANH": lambda x, a, b: a * math.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: x if x > a else 0,
    "GELU_ERF": lambda x, a, b: x * math.erfc(-x / math.sqrt(2)) / 2,
    # The formula of the documentation, with tanh(y) = 1 - 2 / (1 + exp(2 y)).
    "GELU_TANH": lambda x, a, b: x * (1 - 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(net, name):
    values = np.linspace(-4, 4, 9, dtype=np.float32)
    outputs = []
    for tensor in (net.input("x", F32, (-1,)), net.input("y", BF16, (-1,))):
        layer = net.network.add_activation(tensor, getattr(Activation, name))
        layer.alpha, layer.beta = 0.75, 1.5
        outputs.append(layer.get_output(0))
    interpreter = net.interpreter(*outputs)
    result = interpreter.run({"x": torch.from_numpy(values), "y": bfloat16(values)})
    expected = np.array([ACTIVATIONS[name](float(x), 0.75, 1.5) for x in values])
    np.testing.assert_allclose(result["out0"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result["out1"].float(), expected, rtol=2**-8, atol=1e-6)
    assert interpreter.run({"x": torch.zeros(0), "y": bfloat16(values[:0])})["out0"].shape == (0,)


# Reductions


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("axes", [(0,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("op", ["SUM", "PROD", "MAX", "MIN", "AVG"])
def test_reduce(net, op, axes, keep):
    x = net.input("x", F32, (-1, 2, 3))
    interpreter = net.interpreter(
        net.network.add_reduce(x, getattr(Reduce, op), sum(1 << axis for axis in axes), keep).get_output(0)
    )
    values = np.random.default_rng(1).normal(size=(4, 2, 3)).astype(np.float32)
    function = {"SUM": np.sum, "PROD": np.prod, "MAX": np.max, "MIN": np.min, "AVG": np.mean}[op]
    result = interpreter.run({"x": torch.from_numpy(values)})["out0"]
    np.testing.assert_allclose(result, function(values, axis=axes, keepdims=keep), rtol=1e-5)
    empty = interpreter.run({"x": torch.zeros(0, 2, 3)})["out0"]
    assert tuple(empty.shape) == np.sum(values[:0], axis=axes, keepdims=keep).shape
    if 0 in axes:
        expected = {"SUM": 0, "PROD": 1, "MAX": -math.inf, "MIN": math.inf, "AVG": math.nan}[op]
        np.testing.assert_array_equal(empty, np.full(tuple(empty.shape), expected))


def test_reduce_of_bfloat16_accumulates_in_float32(net):
    x = net.input("x", BF16, (1, 1001))
    given = torch.ones(1, 1001, dtype=torch.bfloat16)
    (result,) = net.run(net.network.add_reduce(x, Reduce.SUM, 2, False).get_output(0), x=given)
    assert result.tolist() == [1000]  # 1001 rounded once: a bfloat16 sum stops at 256


def test_reduce_of_integers(net):
    x = net.input("x", I32, (-1, 2))
    outputs = [net.network.add_reduce(x, op, 1, False).get_output(0) for op in (Reduce.SUM, Reduce.PROD, Reduce.MAX)]
    interpreter = net.interpreter(*outputs)
    result = interpreter.run({"x": torch.tensor([[1, 2], [3, -4]], dtype=torch.int32)})
    assert [result[f"out{i}"].tolist() for i in range(3)] == [[4, -2], [3, -8], [3, 2]]
    result = interpreter.run({"x": torch.zeros(0, 2, dtype=torch.int32)})
    assert [result[f"out{i}"].tolist() for i in range(3)] == [[0, 0], [1, 1], [-(2**31)] * 2]


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax(net, axis):
    x, y = net.input("x", F32, (-1, 5)), net.input("y", BF16, (-1, 5))
    layers = [net.network.add_softmax(tensor) for tensor in (x, y)]
    for layer in layers:
        layer.axes = 1 << axis
    interpreter = net.interpreter(*[layer.get_output(0) for layer in layers])
    values = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32) * 10
    narrow = bfloat16(values)

    def naive(logits):
        weights = np.exp(logits - logits.max(axis, keepdims=True))
        return weights / weights.sum(axis, keepdims=True)

    result = interpreter.run({"x": torch.from_numpy(values), "y": narrow})
    np.testing.assert_allclose(result["out0"], naive(values.astype(np.float64)), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(result["out1"].float(), naive(narrow.double().numpy()), rtol=2**-8, atol=1e-30)
    assert interpreter.run({"x": torch.zeros(0, 5), "y": narrow[:0]})["out0"].shape == (0, 5)


# Matrix multiply and einsum


@pytest.mark.parametrize("op0", [NONE, TRANSPOSE])
@pytest.mark.parametrize("op1", [NONE, TRANSPOSE])
def test_matrix_multiply_transposes_and_broadcasts_batches(net, op0, op1):
    a, b = torch.randn(2, 1, 3, 4), torch.randn(1, 5, 4, 6)
    given_a, given_b = (a.mT if op0 == TRANSPOSE else a), (b.mT if op1 == TRANSPOSE else b)
    x, y = net.input("x", F32, (-1, 1, *given_a.shape[2:])), net.input("y", F32, (1, -1, *given_b.shape[2:]))
    interpreter = net.interpreter(net.network.add_matrix_multiply(x, op0, y, op1).get_output(0))
    result = interpreter.run({"x": given_a, "y": given_b})["out0"]
    np.testing.assert_allclose(result, a.double() @ b.double(), rtol=1e-4, atol=1e-5)
    assert interpreter.run({"x": given_a[:0], "y": given_b})["out0"].shape == (0, 5, 3, 6)


def test_matrix_multiply_with_vectors(net):
    matrix, vector = torch.randn(3, 4), torch.randn(4)
    m, v, t = net.input("m", F32, (3, 4)), net.input("v", F32, (4,)), net.input("t", F32, (4, 3))
    results = net.run(
        net.network.add_matrix_multiply(m, NONE, v, VECTOR).get_output(0),
        net.network.add_matrix_multiply(v, VECTOR, t, NONE).get_output(0),
        net.network.add_matrix_multiply(v, VECTOR, v, VECTOR).get_output(0),
        net.network.add_matrix_multiply(m, VECTOR, m, VECTOR).get_output(0),
        m=matrix,
        v=vector,
        t=matrix.T,
    )
    expected = (matrix @ vector, matrix @ vector, vector @ vector, (matrix * matrix).sum(1))
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value)


def test_matrix_multiply_of_bfloat16_accumulates_in_float32_and_rounds_once(net):
    x, y = net.input("x", BF16, (2, 300)), net.input("y", BF16, (300, 2))
    a, b = bfloat16(np.random.default_rng(3).normal(size=(2, 2, 300)))
    (result,) = net.run(net.network.add_matrix_multiply(x, NONE, y, NONE).get_output(0), x=a, y=b.T)
    exact = a.double().numpy() @ b.double().numpy().T
    assert torch.equal(result, bfloat16(exact.astype(np.float32)))


def test_matrix_multiply_of_no_columns_is_zero(net):
    x, y = net.input("x", F32, (2, -1)), net.input("y", F32, (-1, 3))
    product = net.network.add_matrix_multiply(x, NONE, y, NONE).get_output(0)
    (result,) = net.run(product, x=torch.zeros(2, 0), y=torch.zeros(0, 3))
    assert result.tolist() == [[0] * 3] * 2


def test_einsum(net):
    x, y = net.input("x", F32, (-1, 3, 4)), net.input("y", F32, (5, 4))
    equations = ("bij,kj->bki", "bij,kj->", "bij,kj->ijk")
    interpreter = net.interpreter(*[net.network.add_einsum([x, y], equation).get_output(0) for equation in equations])
    a, b = torch.randn(2, 3, 4), torch.randn(5, 4)
    result = interpreter.run({"x": a, "y": b})
    for position, equation in enumerate(equations):
        expected = np.einsum(equation, a.double().numpy(), b.double().numpy())
        np.testing.assert_allclose(result[f"out{position}"], expected, rtol=1e-4, atol=1e-4)
    assert interpreter.run({"x": a[:0], "y": b})["out0"].shape == (0, 5, 3)


def test_a_diagonal_of_einsum_is_refused(net):
    x = net.input("x", F32, (3, 3))
    net.network.add_einsum([x], "ii->i")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"'ii->i'|shape"):
        net.interpreter()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_cumulative_sum(net, axis, exclusive, reverse):
    x, y = net.input("x", F32, (-1, 4)), net.input("y", I32, (-1, 4))
    interpreter = net.interpreter(
        *[
            net.network.add_cumulative(
                tensor, net.constant(axis, np.int32), trt.CumulativeOperation.SUM, exclusive, reverse
            ).get_output(0)
            for tensor in (x, y)
        ]
    )
    values = np.random.default_rng(5).integers(-9, 9, (3, 4)).astype(np.float32)
    lines = np.moveaxis(values, axis, -1)
    length = lines.shape[-1]
    expected = np.zeros_like(lines)
    for j in range(length):
        start, stop = (j + exclusive, length) if reverse else (0, j + 1 - exclusive)
        expected[..., j] = lines[..., start:stop].sum(-1)
    result = interpreter.run({"x": torch.from_numpy(values), "y": torch.from_numpy(values).int()})
    for output in ("out0", "out1"):
        np.testing.assert_array_equal(result[output], np.moveaxis(expected, -1, axis))
    assert interpreter.run({"x": torch.zeros(0, 4), "y": torch.zeros(0, 4).int()})["out1"].shape == (0, 4)
