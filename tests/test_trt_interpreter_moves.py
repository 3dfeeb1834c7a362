"""The interpreter of TensorRT networks: the layers that move elements."""

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch

from trt_interpreter_testing import Net

F32, BF16, I32, I64 = trt.float32, trt.bfloat16, trt.int32, trt.int64


def counting(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


@pytest.fixture
def net() -> Net:
    return Net()


# Shuffle


def shuffled(net, x, dims=None, *, first=None, second=None, zero_is_placeholder=True):
    layer = net.network.add_shuffle(x)
    if first:
        layer.first_transpose = first
    if isinstance(dims, trt.ITensor):
        layer.set_input(1, dims)
    elif dims is not None:
        layer.reshape_dims = dims
    if second:
        layer.second_transpose = second
    layer.zero_is_placeholder = zero_is_placeholder
    return layer.get_output(0)


def test_shuffle_transposes_reshapes_and_transposes(net):
    x = net.input("x", F32, (2, 3, 4))
    given = counting(2, 3, 4)
    # A zero copies the dimension after the first transpose: 4, not 2.
    outputs = [
        shuffled(net, x, first=(2, 0, 1)),
        shuffled(net, x, (0, -1), first=(2, 0, 1)),
        shuffled(net, x, (6, 2, 2), second=(1, 2, 0)),
        shuffled(net, x, (4, 3, 2), first=(1, 0, 2), second=(2, 1, 0)),
    ]
    expected = given.numpy()
    results = net.run(*outputs, x=given)
    np.testing.assert_array_equal(results[0], expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(results[1], expected.transpose(2, 0, 1).reshape(4, 6))
    np.testing.assert_array_equal(results[2], expected.reshape(6, 2, 2).transpose(1, 2, 0))
    np.testing.assert_array_equal(results[3], expected.transpose(1, 0, 2).reshape(4, 3, 2).transpose(2, 1, 0))


def test_shuffle_with_dimensions_from_a_tensor_and_no_rows(net):
    x, dims = net.input("x", F32, (-1, 6)), net.input("dims", I64, (3,))
    interpreter = net.interpreter(shuffled(net, x, dims), shuffled(net, x, (-1, 3)))
    result = interpreter.run({"x": counting(4, 6), "dims": torch.tensor([0, 3, -1])})
    assert result["out0"].shape == (4, 3, 2)
    result = interpreter.run({"x": counting(0, 6), "dims": torch.tensor([0, 3, 2])})
    assert (result["out0"].shape, result["out1"].shape) == ((0, 3, 2), (0, 3))


def test_a_wildcard_beside_a_length_of_zero_has_no_solution(net):
    x = net.input("x", F32, (-1, 6))
    interpreter = net.interpreter(shuffled(net, x, (0, -1)))
    assert interpreter.run({"x": counting(2, 6)})["out0"].shape == (2, 6)
    with pytest.raises(ValueError, match="solution") as caught:
        interpreter.run({"x": counting(0, 6)})
    assert "SHUFFLE layer" in caught.value.__notes__[0]


def test_a_zero_that_is_no_placeholder_is_a_length(net):
    x, dims = net.input("x", F32, (-1, 6)), net.input("dims", I32, (2,))
    interpreter = net.interpreter(shuffled(net, x, dims, zero_is_placeholder=False))
    given = torch.tensor([6, 0], dtype=torch.int32)
    assert interpreter.run({"x": counting(0, 6), "dims": given})["out0"].shape == (6, 0)
    with pytest.raises(ValueError, match="volume"):
        interpreter.run({"x": counting(1, 6), "dims": given})


def test_shape_squeeze_and_unsqueeze(net):
    x = net.input("x", BF16, (-1, 1, 3, 1))
    add = net.network
    outputs = [
        add.add_shape(x).get_output(0),
        add.add_squeeze(x, net.constant([-1, 1], np.int64)).get_output(0),
        add.add_squeeze(x, net.constant([1], np.int32)).get_output(0),
        add.add_unsqueeze(x, net.constant([0, -1], np.int64)).get_output(0),
        add.add_squeeze(x).get_output(0),
    ]
    interpreter = net.interpreter(*outputs)
    for rows in (0, 2):
        result = interpreter.run({"x": torch.zeros(rows, 1, 3, 1, dtype=torch.bfloat16)})
        assert (result["out0"].dtype, result["out0"].tolist()) == (torch.int64, [rows, 1, 3, 1])
        shapes = [tuple(result[f"out{i}"].shape) for i in (1, 2, 3, 4)]
        assert shapes == [(rows, 3), (rows, 3, 1), (1, rows, 1, 3, 1, 1), (rows, 3)]
    with pytest.raises(ValueError, match="dynamic dimension is 1"):
        interpreter.run({"x": torch.zeros(1, 1, 3, 1, dtype=torch.bfloat16)})


def test_concatenation_also_of_fp8_and_of_nothing(net):
    x, y = net.input("x", trt.fp8, (-1, 2)), net.input("y", trt.fp8, (-1, 2))
    layer = net.network.add_concatenation([x, y, x])
    layer.axis = 0
    interpreter = net.interpreter(layer.get_output(0))
    a = torch.tensor([[1.0, -0.5]]).to(torch.float8_e4m3fn)
    nothing = a[:0]
    assert interpreter.run({"x": a, "y": nothing})["out0"].float().tolist() == [[1, -0.5], [1, -0.5]]
    assert interpreter.run({"x": nothing, "y": a})["out0"].float().tolist() == [[1, -0.5]]


# Slice


def sliced(net, x, start, size, stride, mode=trt.SampleMode.STRICT_BOUNDS, axes=None, **inputs):
    layer = net.network.add_slice(x, start, size, stride)
    layer.mode = mode
    if axes is not None:
        layer.axes = axes
    for index, tensor in inputs.items():
        layer.set_input(int(index[1:]), tensor)
    return layer.get_output(0)


def test_slice_with_strides_and_axes(net):
    x = net.input("x", F32, (4, 6))
    outputs = [
        sliced(net, x, (1, 0), (2, 3), (1, 2)),
        sliced(net, x, (2, 5), (3, 2), (0, 0)),
        sliced(net, x, (1,), (4,), (1,), axes=(1,)),
        sliced(net, x, (2,), (2,), (1,), axes=(-2,)),
    ]
    given = counting(4, 6).numpy()
    results = net.run(*outputs, x=torch.from_numpy(given))
    np.testing.assert_array_equal(results[0], given[1:3, 0:5:2])
    np.testing.assert_array_equal(results[1], np.full((3, 2), 17.0))
    np.testing.assert_array_equal(results[2], given[:, 1:5])
    np.testing.assert_array_equal(results[3], given[2:4])


def test_slice_from_tensors(net):
    x, start, size = net.input("x", F32, (-1, 6)), net.input("start", I64, (2,)), net.input("size", I32, (2,))
    layer = sliced(net, x, (0, 0), (0, 0), (1, 2), i1=start, i2=size)
    strides = sliced(net, x, (0, 1), (1, 2), (1, 1), i3=net.constant([1, 3], np.int64))
    interpreter = net.interpreter(layer, strides)

    def run(start, size):
        start, size = torch.tensor(start), torch.tensor(size, dtype=torch.int32)
        return interpreter.run({"x": counting(3, 6), "start": start, "size": size})

    assert run([1, 2], [2, 2])["out0"].tolist() == [[8, 10], [14, 16]]
    assert run([1, 2], [2, 2])["out1"].tolist() == [[1, 4]]
    assert run([3, 0], [0, 3])["out0"].shape == (0, 3)
    for start, size in (([2, 0], [2, 1]), ([-1, 0], [1, 1]), ([0, 4], [1, 2])):
        with pytest.raises(ValueError, match="slice from"):
            run(start, size)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("WRAP", [1, 2, 0, 1, 2, 0, 1]), ("CLAMP", [0, 0, 0, 1, 2, 2, 2]), ("REFLECT", [2, 1, 0, 1, 2, 1, 0])],
)
def test_slice_outside_the_bounds(net, mode, expected):
    x = net.input("x", F32, (3,))
    (result,) = net.run(sliced(net, x, (-2,), (7,), (1,), getattr(trt.SampleMode, mode)), x=counting(3))
    assert result.tolist() == expected


def test_slice_with_a_fill_value(net):
    x, fill = net.input("x", F32, (-1, 2)), net.constant(9.0)
    interpreter = net.interpreter(sliced(net, x, (-1, 0), (3, 3), (1, 1), trt.SampleMode.FILL, i4=fill))
    assert interpreter.run({"x": counting(1, 2)})["out0"].tolist() == [[9, 9, 9], [0, 1, 9], [9, 9, 9]]
    assert interpreter.run({"x": counting(0, 2)})["out0"].tolist() == [[9, 9, 9]] * 3


def test_slice_options_that_are_refused(net):
    x = net.input("x", F32, (3,))
    sliced(net, x, (2,), (3,), (-1,))
    with pytest.raises(NotImplementedError, match="negative stride"):
        net.interpreter()
    other = Net()
    x = other.input("x", F32, (3,))
    sliced(other, x, (0,), (3,), (1,), trt.SampleMode.FILL)
    with pytest.raises(NotImplementedError, match="fill value"):
        other.interpreter()


# Gather and scatter


def gathered(net, data, indices, mode="DEFAULT", axis=0, batch=0):
    layer = net.network.add_gather_v2(data, indices, getattr(trt.GatherMode, mode))
    layer.axis = axis
    layer.num_elementwise_dims = batch
    return layer.get_output(0)


def test_gather_along_an_axis(net):
    x, i = net.input("x", F32, (2, 5, 3)), net.input("i", I32, (-1, 2))
    interpreter = net.interpreter(*[gathered(net, x, i, axis=axis) for axis in range(3)])
    given = counting(2, 5, 3)
    indices = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.int32)
    result = interpreter.run({"x": given, "i": indices})
    for axis in range(3):
        np.testing.assert_array_equal(result[f"out{axis}"], np.take(given.numpy(), indices.numpy(), axis))
    assert interpreter.run({"x": given, "i": indices[:0]})["out1"].shape == (2, 0, 2, 3)


def test_gather_outside_stores_zero_and_counts_negative_indices_of_static_axes_from_the_end(net):
    x, i = net.input("x", F32, (3,)), net.input("i", I64, (-1,))
    dynamic = net.input("d", F32, (-1,))
    interpreter = net.interpreter(gathered(net, x, i), gathered(net, dynamic, i))

    def run(*indices):
        return interpreter.run({"x": counting(3) + 1, "d": counting(3) + 1, "i": torch.tensor(indices)})

    assert run(2, 3, 0)["out0"].tolist() == run(2, 3, 0)["out1"].tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="dynamic"):
        run(-1)
    static = Net()
    x, i = static.input("x", F32, (3,)), static.input("i", I64, (2,))
    (result,) = static.run(gathered(static, x, i), x=counting(3) + 1, i=torch.tensor([-1, -4]))
    assert result.tolist() == [3, 0]


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("data_rows", "index_rows"), [(3, 3), (1, 3), (3, 1)])
def test_gather_with_an_elementwise_dimension(net, axis, data_rows, index_rows):
    x, i = net.input("x", F32, (-1, 4, 5)), net.input("i", I64, (-1, 2, 3))
    interpreter = net.interpreter(gathered(net, x, i, axis=axis, batch=1))
    data, indices = counting(data_rows, 4, 5), torch.randint(0, 4, (index_rows, 2, 3))
    expected = [
        np.take(data[min(row, data_rows - 1)].numpy(), indices[min(row, index_rows - 1)].numpy(), axis - 1)
        for row in range(3)
    ]
    np.testing.assert_array_equal(interpreter.run({"x": data, "i": indices})["out0"], np.stack(expected))
    empty = interpreter.run({"x": data[:0], "i": indices[:0]})["out0"]
    assert empty.shape == (0, *expected[0].shape)


def test_gather_elements(net):
    x, i = net.input("x", BF16, (-1, 4)), net.input("i", I64, (-1, 2))
    interpreter = net.interpreter(gathered(net, x, i, "ELEMENT", axis=1))
    given = counting(2, 4, dtype=torch.bfloat16)
    result = interpreter.run({"x": given, "i": torch.tensor([[3, 0], [1, 7]])})
    assert result["out0"].tolist() == [[3, 0], [5, 0]]
    assert interpreter.run({"x": given[:0], "i": torch.zeros(0, 2).long()})["out0"].shape == (0, 2)


@pytest.mark.parametrize(("depth", "batch"), [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2)])
def test_gather_nd(net, depth, batch):
    x, i = net.input("x", F32, (2, 3, 4)), net.input("i", I32, (2, 3, depth))
    data, indices = counting(2, 3, 4), torch.randint(0, 2, (2, 3, depth), dtype=torch.int32)
    (result,) = net.run(gathered(net, x, i, "ND", batch=batch), x=data, i=indices)
    for row in range(2):
        for column in range(3):
            where = ((), (row,), (row, column))[batch] + tuple(indices[row, column].tolist())
            np.testing.assert_array_equal(result[row, column], data.numpy()[where])


def scattered(net, data, indices, updates, mode, axis=0):
    layer = net.network.add_scatter(data, indices, updates, getattr(trt.ScatterMode, mode))
    layer.axis = axis
    return layer.get_output(0)


def test_scatter_elements(net):
    x, i, u = net.input("x", F32, (2, 4)), net.input("i", I32, (2, -1)), net.input("u", F32, (2, -1))
    interpreter = net.interpreter(scattered(net, x, i, u, "ELEMENT", axis=1))

    def run(indices):
        indices = torch.tensor(indices, dtype=torch.int32)
        return interpreter.run({"x": counting(2, 4), "i": indices, "u": 90 + counting(*indices.shape)})["out0"]

    assert run([[3, 0], [1, 2]]).tolist() == [[91, 1, 2, 90], [4, 92, 93, 7]]
    assert torch.equal(run([[], []]), counting(2, 4))
    assert run([[1, 1], [0, 1]])[0, 1] in (90, 91)  # which of the two is not documented
    with pytest.raises(ValueError, match="bounds"):
        run([[4], [0]])


def test_scatter_nd(net):
    x, i, u = net.input("x", F32, (3, 2)), net.input("i", I64, (-1, 1)), net.input("u", F32, (-1, 2))
    interpreter = net.interpreter(scattered(net, x, i, u, "ND"))

    def run(*rows):
        given = {"x": counting(3, 2), "i": torch.tensor(rows).reshape(-1, 1).long(), "u": 90 + counting(len(rows), 2)}
        return interpreter.run(given)["out0"]

    assert run(2, 0).tolist() == [[92, 93], [2, 3], [90, 91]]
    assert torch.equal(run(), counting(3, 2))
    for rows, message in (((1, 1), "same element"), ((3,), "bounds"), ((-1,), "bounds")):
        with pytest.raises(ValueError, match=message):
            run(*rows)
