"""Quantized checkpoints of every published layout: exact values, exact rounding of activations, refusal of faults."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import layouts
from canvasrt.checkpoint import Checkpoint
from canvasrt.errors import CheckpointError
from canvasrt.formats import PLAIN, Format, Quantization
from canvasrt.ops.torch_formats import dequantized, input_scale, rounded
from layouts import BLOCK, E2M1, E4M3, LAYOUTS, Export, Layout
from tiny import Dims, write

# every size another one, so that no wrong shape fits by chance
DIMS = Dims(layers="sf", hidden=32, expert_size=48, mlp=64, experts=3, vocab=40)
LAYER = "model.decoder.layers.0"
GATE_UP = f"{LAYER}.experts.gate_up_proj"
GATE, Q = f"{LAYER}.experts.1.gate_proj", f"{LAYER}.self_attn.q_proj"
SCALE, SCALE_2 = f"{GATE}.weight_scale", f"{GATE}.weight_scale_2"
CONDITIONING = "model.decoder.self_conditioning.gate_proj"
Array = layouts.Array
Exports = dict[Layout, Export]
STATIC, TOKEN = Format("fp8", "static"), Format("fp8", "token")
NVFP4, INT4 = Format("nvfp4", "block", 16), Format("int4", "none", BLOCK)

DECLARED: dict[Layout, tuple[Quantization, str]] = {
    "nvfp4-experts": (Quantization("modelopt", None, NVFP4, "fp8"), "NVFP4"),
    "nvfp4": (Quantization("modelopt", None, NVFP4, "fp8"), "NVFP4"),
    "w4a16-nvfp4": (Quantization("modelopt", None, Format("nvfp4", "none", 16), "fp8"), "NVFP4"),
    "fp8": (Quantization("modelopt", STATIC, None, "fp8"), "FP8"),
    "fp8-dynamic": (Quantization("compressed-tensors", TOKEN, None, None), "FP8"),
    "int4-experts": (Quantization("canvasrt", None, INT4, None), "INT4"),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    source = write(tmp_path_factory.mktemp("source"), DIMS)
    plain = load_file(source / "model.safetensors")
    result = {layout: layouts.export(source, layout) for layout in LAYOUTS}
    for content in result.values():
        for name, numbers in content.values.items():
            assert np.linalg.norm(numbers - plain[name].numpy()) < 0.15 * plain[name].norm(), name
    return result


def assert_reads_exactly(folder: Path, expected: Export) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.names()) == set(expected.values)
    for name in checkpoint.names():
        np.testing.assert_array_equal(
            dequantized(checkpoint, name).float().numpy(), expected.values[name], name, strict=True
        )
    return checkpoint


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_the_exact_numbers(tmp_path: Path, exports: Exports, layout: Layout, shards: int) -> None:
    content = exports[layout]
    checkpoint = assert_reads_exactly(content.write(tmp_path, shards), content)
    declared, name = DECLARED[layout]
    assert checkpoint.quantization == declared
    assert declared.name.startswith(name)
    form = declared.eight_bit or declared.four_bit
    for tensor in checkpoint.names():
        in_parts = tensor not in content.tensors or f"{tensor}_scale" in content.tensors
        assert checkpoint.stored(tensor).format == (form if in_parts else PLAIN), tensor
        scale = input_scale(checkpoint, tensor)
        assert (None if scale is None else scale.numpy()) == content.input_scales.get(tensor), tensor
    assert checkpoint.nbytes() == sum(each.nbytes for name, each in content.tensors.items() if "vision" not in name)


@pytest.mark.parametrize("layout", ["nvfp4-experts", "w4a16-nvfp4", "fp8"])
def test_modelopts_config_says_as_much_as_its_own_file(tmp_path: Path, exports: Exports, layout: Layout) -> None:
    changed = exports[layout].copy()
    changed.own = None
    assert assert_reads_exactly(changed.write(tmp_path), changed).quantization == DECLARED[layout][0]


def test_experts_of_different_input_scales_keep_theirs(tmp_path: Path, exports: Exports) -> None:
    changed = exports["nvfp4-experts"].copy()
    for expert in range(3):
        for part, share in (("gate_proj", 0.5), ("up_proj", 0.625)):
            changed.tensors[f"{LAYER}.experts.{expert}.{part}.input_scale"] = torch.tensor(share + expert)
    found = input_scale(Checkpoint.open(changed.write(tmp_path)), GATE_UP)
    assert found is not None
    assert found.tolist() == [0.625, 1.625, 2.625]  # the larger of gate and up


def test_the_table_of_e4m3_is_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(E4M3, layouts.fp8_tensor(codes).float().numpy())
    finite = codes[np.isfinite(E4M3)]
    np.testing.assert_array_equal(layouts.encode_e4m3(E4M3[finite]), finite)
    np.testing.assert_array_equal(layouts.encode_e2m1(E2M1), np.arange(16))
    assert E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def with_gate(content: Export, numbers: Array, **parts: torch.Tensor) -> Export:
    """With other parts of one expert's gate_proj, which mean ``numbers``."""
    changed = content.copy()
    changed.tensors |= {f"{GATE}.{suffix}": part for suffix, part in parts.items()}
    changed.values[GATE_UP] = changed.values[GATE_UP].copy()
    changed.values[GATE_UP][1, : len(numbers)] = numbers
    return changed


def test_every_code_is_read(tmp_path: Path, exports: Exports) -> None:
    finite = np.flatnonzero(np.isfinite(E4M3)).astype(np.uint8)
    codes, scale = np.resize(finite, (48, 32)), torch.tensor(0.3)
    numbers = E4M3[codes] * scale.numpy()
    changed = with_gate(exports["fp8"], numbers, weight=layouts.fp8_tensor(codes), weight_scale=scale)
    assert_reads_exactly(changed.write(tmp_path / "fp8"), changed)
    packed, scales = np.resize(np.arange(256, dtype=np.uint8), (48, 16)), np.resize(finite[::3], (48, 2))
    parts = {"weight": torch.from_numpy(packed), "weight_scale": layouts.fp8_tensor(scales)}
    parts["weight_scale_2"] = torch.tensor([0.7])  # (1,), as some exporters write scalars
    changed = with_gate(exports["nvfp4"], layouts.decode_nvfp4(packed, scales, np.float32(0.7)), **parts)
    assert_reads_exactly(changed.write(tmp_path / "nvfp4"), changed)
    packed, rows = packed.reshape(24, 32), exports["int4-experts"].tensors[SCALE]
    numbers = layouts.decode_int4(packed, rows.numpy())
    changed = with_gate(exports["int4-experts"], numbers, weight=torch.from_numpy(packed))
    assert_reads_exactly(changed.write(tmp_path / "int4"), changed)


def modelopt(module: str) -> Any:
    # importorskip silences what ModelOpt says while importing: that it was not tested with this transformers
    return pytest.importorskip(f"modelopt.torch.{module}")


def test_nvfp4_packed_by_modelopt_is_read_as_modelopt_reads_it(tmp_path: Path, exports: Exports) -> None:
    library = modelopt("quantization.qtensor").NVFP4QTensor
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(3))
    matrix[5] = 0
    matrix[6, :16] *= 1e-4
    packed, scale, scale_2 = library.quantize(matrix, BLOCK)
    theirs = packed.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK}).numpy()
    weight, scales = packed._quantized_data, scale.view(torch.uint8).numpy()
    np.testing.assert_array_equal(layouts.decode_nvfp4(weight.numpy(), scales, scale_2.numpy()), theirs)
    np.testing.assert_array_equal(layouts.block_scales(matrix.numpy(), scale_2.numpy()), scales)
    changed = with_gate(exports["nvfp4"], theirs, weight=weight, weight_scale=scale, weight_scale_2=scale_2)
    assert_reads_exactly(changed.write(tmp_path), changed)


def test_int4_packed_by_modelopt_is_read(tmp_path: Path, exports: Exports) -> None:
    pack = modelopt("export.quant_utils").pack_int4_in_uint8
    numbers = torch.randint(-8, 8, (48, 32), generator=torch.Generator().manual_seed(4)).float()
    scale = torch.linspace(0.1, 0.9, 96).view(48, 2)
    values = (numbers.view(48, 2, BLOCK) * scale.unsqueeze(-1)).flatten(1)
    packed = pack(values, scale, BLOCK)
    np.testing.assert_array_equal(layouts.decode_int4(packed.numpy(), scale.numpy()), values.numpy())
    changed = with_gate(exports["int4-experts"], values.numpy(), weight=packed, weight_scale=scale)
    assert_reads_exactly(changed.write(tmp_path), changed)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0123])
def test_static_fp8_activations(scale: float) -> None:
    x = layouts.activations(scale)
    found = rounded(torch.from_numpy(x), STATIC, torch.tensor(scale)).numpy()
    np.testing.assert_array_equal(found, layouts.round_fp8(x, np.float32(scale)), strict=True)
    assert np.abs(found).max() == np.float32(448) * np.float32(scale)


def test_ties_of_fp8_go_to_the_even_code() -> None:
    x = torch.from_numpy(layouts.midpoints(E4M3[:127]))
    found = rounded(x, STATIC, torch.tensor(1.0)).numpy()
    np.testing.assert_array_equal(found, E4M3[np.arange(1, 127) // 2 * 2])
    np.testing.assert_array_equal(rounded(-x, STATIC, torch.tensor(1.0)).numpy(), -found)


@pytest.mark.parametrize("scale", [1.0, 0.0123])
def test_fp8_activations_scaled_per_token(scale: float) -> None:
    x = layouts.activations(scale)
    expected = layouts.round_fp8(x, np.abs(x).max(-1, keepdims=True) / np.float32(448))
    np.testing.assert_array_equal(rounded(torch.from_numpy(x), TOKEN, None).numpy(), expected, strict=True)
    assert not expected[-1].any()


@pytest.mark.parametrize("scale", [1.0, 0.3, pytest.param(0.0123)])
def test_nvfp4_activations(scale: float) -> None:
    x = layouts.activations(scale)
    found = rounded(torch.from_numpy(x), NVFP4, torch.tensor(scale)).numpy()
    np.testing.assert_array_equal(found, layouts.round_nvfp4(x, np.float32(scale)), strict=True)
    assert np.abs(found).max() == np.float32(6 * 448) * np.float32(scale)


def test_ties_of_nvfp4_go_to_the_even_code() -> None:
    x = torch.tensor([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 0]])
    expected = [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 0]
    assert rounded(x, NVFP4, torch.tensor(1.0)).tolist() == [expected]
    assert rounded(x / 64, NVFP4, torch.tensor(0.125)).tolist() == [[each / 64 for each in expected]]


@pytest.mark.parametrize("scale", [1.0, 0.3, pytest.param(0.0123)])
def test_nvfp4_activations_are_modelopts(scale: float) -> None:
    x, scale_2 = torch.from_numpy(layouts.activations(scale)), torch.tensor(scale)
    packed, scales, _ = modelopt("quantization.qtensor").NVFP4QTensor.quantize(
        x, BLOCK, weights_scaling_factor_2=scale_2
    )
    theirs = packed.dequantize(torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: BLOCK})
    assert torch.equal(rounded(x, NVFP4, scale_2), theirs)


@pytest.mark.parametrize("form", [STATIC, NVFP4])
def test_every_row_can_have_its_own_scale(form: Format) -> None:
    x = torch.from_numpy(layouts.activations(1.0))[:24]
    scale = torch.linspace(0.01, 2, 24)
    rows = [rounded(row, form, each) for row, each in zip(x, scale, strict=True)]
    assert torch.equal(rounded(x, form, scale.view(-1, 1)), torch.stack(rows))
    folded = rounded(x.view(2, 3, 4, 64), form, scale.view(2, 3, 4, 1))
    assert torch.equal(folded, torch.stack(rows).view(2, 3, 4, 64))


@pytest.mark.parametrize("form", [STATIC, TOKEN, NVFP4, PLAIN])
def test_rounding_gives_float32_of_bfloat16(form: Format) -> None:
    x = torch.from_numpy(layouts.activations(0.25)).bfloat16()
    found = rounded(x, form, torch.tensor(0.25))
    assert found.dtype == torch.float32
    assert torch.equal(found, rounded(x.float(), form, torch.tensor(0.25)))


@pytest.mark.parametrize("form", [STATIC, TOKEN, PLAIN, NVFP4])
def test_no_rows_are_rounded_to_no_rows(form: Format) -> None:
    assert rounded(torch.zeros(0, 64), form, torch.tensor(0.25)).shape == (0, 64)


@pytest.mark.parametrize("form", [STATIC, NVFP4])
def test_rounding_without_its_scale_is_refused(form: Format) -> None:
    with pytest.raises(ValueError, match="need an input scale"):
        rounded(torch.zeros(1, 16), form, None)


Change = Callable[[Export], None]


def put(name: str, tensor: torch.Tensor | None) -> Change:
    def change(content: Export) -> None:
        content.tensors.pop(name, None)
        if tensor is not None:
            content.tensors[name] = tensor

    return change


def plain_expert(content: Export) -> None:
    for suffix in (".weight_scale", ".input_scale"):
        del content.tensors[GATE + suffix]
    content.tensors[f"{GATE}.weight"] = torch.zeros(48, 32, dtype=torch.bfloat16)


def undeclared(content: Export) -> None:
    content.own, content.config = None, {**content.config, "quantization_config": None}


def own(**section: Any) -> Change:
    """In hf_quant_config.json, with nothing in config.json that contradicts it."""

    def change(content: Export) -> None:
        (content.own or {})["quantization"].update(section)
        content.config.get("quantization_config", {}).pop("quant_algo", None)

    return change


def contradicted(content: Export) -> None:
    content.config["quantization_config"]["quant_algo"] = "FP8"


def declared(**fields: Any) -> Change:
    """In config.json, which then is alone."""

    def change(content: Export) -> None:
        content.own = None
        content.config["quantization_config"] |= fields

    return change


def group(**fields: Any) -> Change:
    return lambda content: content.config["quantization_config"]["config_groups"]["group_0"].update(fields)


def int4_blocks(size: int) -> Change:
    """With as many whole blocks as fit."""

    def change(content: Export) -> None:
        own(group_size=size)(content)
        for name in [name for name in content.tensors if name.endswith(".weight_scale")]:
            width = content.tensors[name].shape[1] * BLOCK
            content.tensors[name] = content.tensors[name][:, : width // size].contiguous()

    return change


def fp8(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


U8 = torch.zeros(24, 32, dtype=torch.uint8)
FP4 = {"num_bits": 4, "type": "float", "group_size": 16}
INT4_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "dynamic": False}
OWN = "hf_quant_config.json"
FAULTS: list[Any] = [
    ("fp8", put(SCALE, None), [f"1 missing tensors: {SCALE} []"]),
    ("fp8", put(f"{Q}.input_scale", None), [f"1 missing tensors: {Q}.input_scale []"]),
    ("fp8-dynamic", put(f"{Q}.weight_scale", None), [f"1 missing tensors: {Q}.weight_scale"]),
    ("nvfp4-experts", put(f"{GATE}.input_scale", None), [f"1 missing tensors: {GATE}.input_scale []"]),
    ("nvfp4-experts", put(SCALE_2, None), [f"1 missing tensors: {SCALE_2} []"]),
    ("nvfp4-experts", put(f"{GATE}.weight", None), [f"1 missing tensors: {GATE}.weight"]),
    ("fp8", put(f"{Q}.weight_scale", torch.ones(3)), [f"shape: {Q}.weight_scale: found [3], expected []"]),
    ("fp8-dynamic", put(f"{Q}.weight_scale", torch.ones(1, 64)), [f"{Q}.weight_scale: found [1, 64], expected ["]),
    ("nvfp4-experts", put(SCALE, fp8(48, 1)), [f"{SCALE}: found [48, 1], expected [48, 2]"]),
    ("int4-experts", put(SCALE, torch.ones(48)), [f"{SCALE}: found [48], expected [48, 2]"]),
    ("nvfp4-experts", put(f"{GATE}.weight", U8), [f"{GATE}.weight: found [24, 32], expected [48, 16]"]),
    ("int4-experts", put(f"{GATE}.weight", U8.view(48, 16)), [f"{GATE}.weight: found [48, 16], expected [24, 32]"]),
    ("fp8", put(f"{Q}.bias", torch.ones(64)), [f"1 unexpected tensors: {Q}.bias [64]"]),
    ("nvfp4", put(f"{Q}.pre_quant_scale", torch.ones(32)), [f"1 unexpected tensors: {Q}.pre_quant_scale [32]"]),
    ("w4a16-nvfp4", put(f"{Q}.input_scale", torch.ones(())), [f"1 unexpected tensors: {Q}.input_scale []"]),
    ("fp8", plain_expert, ["mixed formats", f"{LAYER}.experts.1.gate_proj is plain", "experts.0.gate_proj is fp8"]),
    ("fp8", undeclared, ["missing", GATE_UP, f"{Q}.weight: found F8_E4M3", "quantization_config", OWN, "download"]),
    ("nvfp4", own(quant_algo="FP8"), [f"{Q}.weight: found U8", "F8_E4M3"]),
    ("nvfp4", contradicted, [OWN, "'NVFP4'", "'FP8'"]),
    ("nvfp4", own(quant_algo="W4A8_AWQ"), [OWN, "quant_algo 'W4A8_AWQ'", "NVFP4", "cannot run"]),
    ("nvfp4", own(group_size=32), [OWN, "blocks of 32", "instead of 16"]),
    ("nvfp4", own(kv_cache_quant_algo="NVFP4"), [OWN, "K/V cache in 'NVFP4'", "FP8"]),
    ("fp8", declared(quant_algo="INT8_SQ"), ["config.json", "'INT8_SQ'"]),
    ("fp8-dynamic", declared(quant_method="awq"), ["config.json", "'awq'", "compressed-tensors"]),
    ("fp8-dynamic", group(weights=INT4_GROUPS, format="pack-quantized"), ["config.json", "FP8 weights per channel"]),
    ("fp8-dynamic", group(input_activations={"num_bits": 8, "type": "int"}), ["config.json", "input_activations"]),
    ("fp8-dynamic", declared(kv_cache_scheme=FP4), ["config.json", "kv_cache_scheme", "FP8"]),
    ("nvfp4-experts", put(SCALE, torch.ones(48, 2)), [f"{SCALE}: found F32, expected F8_E4M3"]),
    ("fp8", put(f"{CONDITIONING}.weight", fp8(64, 32)), ["expected BF16, F16, F32"]),
    ("nvfp4", declared(kv_cache_scheme=FP4), ["K/V cache"]),
    ("fp8", own(quant_algo=["FP8"]), [OWN, "['FP8']"]),
    ("int4-experts", int4_blocks(32), ["32", "48"]),
]  # fmt: skip


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


@pytest.mark.parametrize(("layout", "change", "parts"), FAULTS)
def test_a_fault_is_refused_by_name(
    tmp_path: Path, exports: Exports, layout: Layout, change: Change, parts: list[str]
) -> None:
    content = exports[layout].copy()
    change(content)
    message = refusal(content.write(tmp_path))
    assert [part for part in [str(tmp_path), *parts] if part not in message] == [], message


@pytest.mark.parametrize("change", [put(SCALE, None), put(SCALE, torch.ones(3)), plain_expert])
def test_sound_tensors_beside_a_fault_are_not_called_unexpected(
    tmp_path: Path, exports: Exports, change: Change
) -> None:
    content = exports["fp8"].copy()
    change(content)
    assert "unexpected" not in refusal(content.write(tmp_path))


@pytest.mark.parametrize(("text", "part"), [("{", "not readable as JSON"), ("{}", "no quantization section")])
def test_a_damaged_quantization_file_is_refused(tmp_path: Path, exports: Exports, text: str, part: str) -> None:
    folder = exports["fp8"].write(tmp_path)
    (folder / OWN).write_text(text)
    assert re.search(f"{OWN}: .*{part}", refusal(folder))


@pytest.mark.parametrize(
    ("layout", "part", "tensor", "read"),
    [
        ("fp8", f"{Q}.weight", layouts.fp8_tensor(np.resize(np.uint8([0, 0x7F]), (64, 32))), dequantized),
        ("fp8", SCALE, torch.tensor(np.nan), dequantized),
        ("fp8-dynamic", f"{Q}.weight_scale", torch.full((64, 1), np.inf).bfloat16(), dequantized),
        ("nvfp4-experts", SCALE, layouts.fp8_tensor(np.full((48, 2), 0xFF, np.uint8)), dequantized),
        ("nvfp4-experts", SCALE_2, torch.tensor(np.inf), dequantized),
        ("int4-experts", SCALE, torch.full((48, 2), np.nan), dequantized),
        ("nvfp4-experts", f"{GATE}.input_scale", torch.tensor(np.nan), input_scale),
    ],
)
def test_numbers_that_are_none_are_refused_when_read(
    tmp_path: Path, exports: Exports, layout: Layout, part: str, tensor: torch.Tensor, read: Any
) -> None:
    content = exports[layout].copy()
    content.tensors[part] = tensor
    checkpoint = Checkpoint.open(content.write(tmp_path))
    count = int((~torch.isfinite(tensor.float())).sum())
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        read(checkpoint, GATE_UP if part.startswith(GATE) else part.removesuffix("_scale"))
    assert all(text in str(caught.value) for text in (part, "model.safetensors", f"{count} values"))
