"""The bytes of each engine weight, against NumPy and torch written apart from the code that makes them."""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from canvasrt.checkpoint import Checkpoint
from canvasrt.engine_weights import EngineType, EngineWeight, Part, made, to_bf16
from canvasrt.errors import CheckpointError
from canvasrt.formats import PLAIN
from canvasrt.layout import Matrix, Stored
from canvasrt.spec import ModelSpec
from canvasrt.tensorfile import read_folder
from layouts import E4M3

rng = np.random.default_rng(0)


def checkpoint_of(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The tensors of one file, whatever their names."""
    save_file(dict(tensors), folder / "model.safetensors")
    infos = read_folder(folder)
    stored = {name: Stored(info.shape, PLAIN, (Matrix(info),)) for name, info in infos.items()}
    return Checkpoint(folder, cast(ModelSpec, SimpleNamespace()), stored)


def one(folder: Path, tensor: torch.Tensor, dtype: EngineType, count: int = 1, **more: Any) -> np.ndarray:
    """The bytes of one stored tensor as a weight of its shape."""
    source = checkpoint_of(folder, {"x": tensor})
    shape = more.pop("shape", tuple(tensor.shape))
    data = made(source, EngineWeight("w", dtype, shape, (Part("x", count),), **more))
    assert data.dtype == np.uint8
    assert data.ndim == 1
    return data


def bf16_bits(numbers: np.ndarray) -> np.ndarray:
    """Nearest, ties to even, by exact arithmetic on every candidate around each number."""
    low = (numbers.view(np.uint32) >> 16).astype(np.uint32)  # towards zero
    candidates = [low, low + 1]
    sizes = [(each << 16).astype(np.uint32).view(np.float32).astype(np.float64) for each in candidates]
    # Beyond the largest number stands the one that the next exponent would have.
    sizes[1] = np.where(np.isinf(sizes[1]), np.copysign(2.0**128, sizes[0]), sizes[1])
    distances = [np.abs(numbers.astype(np.float64) - size) for size in sizes]
    up = (distances[1] < distances[0]) | ((distances[1] == distances[0]) & (low % 2 == 1))
    return np.where(up, candidates[1], candidates[0]).astype(np.uint16)


NUMBERS = np.concatenate([
    rng.standard_normal(5000).astype(np.float32) * np.exp2(rng.integers(-140, 127, 5000)).astype(np.float32),
    # Ties with an even and an odd neighbour, just beside them, denormals, signed zeros, the largest that stays finite.
    np.array([
        0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF808000, 0xBF818000, 0x00008000, 0x00018000, 0x00000001,
        0x007FFFFF, 0, 0x80000000, 0x7F7F7FFF,
    ], np.uint32).view(np.float32),
])  # fmt: skip


def test_bf16_is_rounded_to_the_nearest_and_ties_to_even(tmp_path: Path) -> None:
    expected = bf16_bits(NUMBERS)
    np.testing.assert_array_equal(expected, torch.from_numpy(NUMBERS).bfloat16().view(torch.uint16).numpy())
    np.testing.assert_array_equal(to_bf16(NUMBERS), expected)
    np.testing.assert_array_equal(one(tmp_path, torch.from_numpy(NUMBERS), "bf16").view(np.uint16), expected)


@given(st.integers(0, 2**32 - 1))
def test_bf16_of_any_bits_is_torchs(bits: int) -> None:
    number = np.array([bits], np.uint32).view(np.float32)
    ours = torch.from_numpy(to_bf16(number)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), torch.from_numpy(number).isnan())
    if not ours.isnan().any():
        assert torch.equal(ours.view(torch.uint16), torch.from_numpy(number).bfloat16().view(torch.uint16))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFF8000, 0x7FFFFFFF])
def test_nan_stays_nan_when_rounded(bits: int) -> None:
    (rounded,) = to_bf16(np.array([bits], np.uint32).view(np.float32))
    assert rounded & 0x7F80 == 0x7F80
    assert rounded & 0x7F


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_plain_type_becomes_either(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers = torch.from_numpy(rng.standard_normal((5, 7)).astype(np.float32)).to(dtype)
    np.testing.assert_array_equal(one(tmp_path, numbers, "fp32").view(np.float32), numbers.float().numpy().ravel())
    expected = numbers.float().bfloat16().view(torch.uint16).numpy().ravel()
    np.testing.assert_array_equal(one(tmp_path, numbers, "bf16").view(np.uint16), expected)


def test_a_scalar_is_one_number(tmp_path: Path) -> None:
    data = one(tmp_path, torch.tensor(0.3), "fp32", shape=(1,))
    np.testing.assert_array_equal(data.view(np.float32), np.float32([0.3]))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_plain_numbers_that_are_not_finite_are_refused_by_tensor_and_file(
    tmp_path: Path, stored: torch.dtype, dtype: EngineType, bad: float
) -> None:
    numbers = torch.ones(3, 4, dtype=stored)
    numbers[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"x in .*model\.safetensors holds values that are NaN or infinite"):
        one(tmp_path, numbers, dtype)


def test_a_number_beyond_bf16_is_refused(tmp_path: Path) -> None:
    """Finite in float32, and infinite when rounded."""
    largest = torch.tensor([0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    one(tmp_path, largest, "fp32")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        one(tmp_path, largest, "bf16")


def test_fp8_is_taken_bit_by_bit_and_its_two_nans_refused(tmp_path: Path) -> None:
    codes = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    tensor = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(one(tmp_path, tensor, "fp8"), codes)
    np.testing.assert_array_equal(one(tmp_path, tensor, "fp32").view(np.float32), E4M3[codes])
    for nan in (0x7F, 0xFF):
        bad = np.append(codes, np.uint8(nan))
        with pytest.raises(CheckpointError, match=r"x in .* NaN"):
            one(tmp_path, torch.from_numpy(bad).view(torch.float8_e4m3fn), "fp8")


@pytest.mark.parametrize("shape", [(2, 2), (6, 10), (32, 64)])
def test_int4_goes_from_two_rows_in_a_byte_to_two_columns(tmp_path: Path, shape: tuple[int, int]) -> None:
    numbers = rng.integers(0, 16, shape, dtype=np.uint8)
    stored = numbers[0::2] | numbers[1::2] << 4
    data = one(tmp_path, torch.from_numpy(stored), "int4", shape=shape)
    found = np.array([data[index // 2] >> 4 * (index % 2) & 15 for index in range(numbers.size)])
    np.testing.assert_array_equal(found.reshape(shape), numbers)


def test_parts_lie_below_each_other_each_repeated_as_often_as_it_says(tmp_path: Path) -> None:
    first, second, third = (torch.from_numpy(rng.standard_normal(6).astype(np.float32)) for _ in range(3))
    source = checkpoint_of(tmp_path, {"a": first, "b": second, "c": third})
    weight = EngineWeight("w", "fp32", (6, 6), (Part("c", 3), Part("a"), Part("b", 2)))
    expected = np.stack([third, third, third, first, second, second])
    np.testing.assert_array_equal(made(source, weight).view(np.float32).reshape(6, 6), expected)


def test_a_scale_is_repeated_for_every_row_and_a_column_of_scales_is_not(tmp_path: Path) -> None:
    """The multiplier of query, key and value: two with one scale each, one with a scale per row."""
    rows = torch.from_numpy(rng.random((4, 1), dtype=np.float32)).bfloat16()
    source = checkpoint_of(tmp_path, {"q": torch.tensor(0.5), "k": rows, "v": torch.tensor([0.25])})
    weight = EngineWeight("m", "fp32", (1, 9), (Part("q", 3), Part("k"), Part("v", 2)))
    expected = [0.5] * 3 + rows.float().flatten().tolist() + [0.25] * 2
    assert made(source, weight).view(np.float32).tolist() == expected


@pytest.mark.parametrize(
    ("dtype", "together"),
    [("bf16", True), ("bf16", False), ("fp8", True), ("fp8", False), ("fp4", True), ("fp4", False), ("int4", False)],
)
def test_experts_lie_side_by_side(tmp_path: Path, dtype: EngineType, together: bool) -> None:
    """(experts, out, in) as (out, experts * in), from one tensor of 3 axes or from one for each expert."""
    experts, out, size = 3, 4, 8
    numbers = rng.integers(0, 16, (experts, out, size), dtype=np.uint8)
    if dtype == "bf16":
        whole = torch.from_numpy(numbers.astype(np.float32)).bfloat16()
    elif dtype == "fp8":
        whole = torch.from_numpy(numbers).view(torch.float8_e4m3fn)
    elif dtype == "fp4":
        whole = torch.from_numpy(numbers[..., 0::2] | numbers[..., 1::2] << 4)
    else:
        whole = torch.from_numpy(numbers[:, 0::2] | numbers[:, 1::2] << 4)
    tensors = {"x": whole} if together else {f"x{expert}": whole[expert].clone() for expert in range(experts)}
    source = checkpoint_of(tmp_path, tensors)
    weight = EngineWeight("w", dtype, (out, experts * size), tuple(Part(name) for name in tensors), columns=experts)
    data = made(source, weight)
    assert data.size == weight.nbytes
    expected = np.concatenate(list(numbers), axis=1).ravel()
    if dtype == "bf16":
        found = torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
    elif dtype == "fp8":
        found = data
    else:
        found = np.stack([data & 15, data >> 4], 1).ravel()
    np.testing.assert_array_equal(found, expected)


def at_offset(folder: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes, shift: int) -> Checkpoint:
    """A file whose tensor starts ``shift`` bytes behind a multiple of 16: its header is as long as it has to be."""
    for spaces in range(64):
        entry = f'{{"{name}": {{"dtype": "{dtype}", "shape": {list(shape)}, "data_offsets": [0, {len(data)}]}}}}'
        header = entry.encode() + b" " * spaces
        if (8 + len(header)) % 16 == shift:
            break
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (info,) = read_folder(folder).values()
    assert info.offset % 16 == shift
    return Checkpoint(folder, cast(ModelSpec, SimpleNamespace()), {name: Stored(shape, PLAIN, (Matrix(info),))})


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 8])
@pytest.mark.parametrize(("stored", "dtype"), [("BF16", "bf16"), ("F8_E4M3", "fp8"), ("U8", "fp4")])
def test_what_lies_in_the_file_as_it_is_wanted_is_not_copied(
    tmp_path: Path, stored: str, dtype: EngineType, shift: int
) -> None:
    content = rng.integers(0, 100, 96, dtype=np.uint8)
    shape = (4, 12) if stored == "BF16" else (4, 24)
    source = at_offset(tmp_path, "x", stored, shape, content.tobytes(), shift)
    data = made(source, EngineWeight("w", dtype, (4, 48 if dtype == "fp4" else shape[1]), (Part("x"),)))
    np.testing.assert_array_equal(data, content)
    assert np.shares_memory(data, source.array("x"))
    assert not data.flags.writeable


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
@pytest.mark.parametrize(("stored", "width"), [("F32", 4), ("F16", 2), ("BF16", 2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tensor_may_start_at_any_byte(tmp_path: Path, stored: str, width: int, dtype: EngineType, shift: int) -> None:
    numbers = torch.from_numpy(rng.standard_normal((3, 5)).astype(np.float32))
    typed = numbers.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored])
    source = at_offset(tmp_path, "x", stored, (3, 5), typed.view(torch.uint8).numpy().tobytes(), shift)
    data = made(source, EngineWeight("w", dtype, (3, 5), (Part("x"),)))
    wanted = typed.float() if dtype == "fp32" else typed.bfloat16()
    np.testing.assert_array_equal(data, wanted.view(torch.uint8).numpy().ravel())


def test_sizes_of_a_weight() -> None:
    for dtype, size in (("bf16", 2), ("fp32", 4), ("fp8", 1), ("fp4", 0.5), ("int4", 0.5)):
        weight = EngineWeight("w", cast(EngineType, dtype), (128, 2816, 704), ())
        assert (weight.count, weight.nbytes) == (128 * 2816 * 704, 128 * 2816 * 704 * size)
