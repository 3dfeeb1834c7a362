"""Quantized checkpoints in the layouts that are published, and the numbers that a reader must get from them.

Written from the bit definitions of E4M3 and E2M1 and from real exports, and with nothing of the code that reads them.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, torch.Tensor]  # by suffix: weight, weight_scale, ...
Layout = Literal["nvfp4-experts", "nvfp4", "w4a16-nvfp4", "fp8", "fp8-dynamic", "int4-experts"]
LAYOUTS: tuple[Layout, ...] = ("nvfp4-experts", "nvfp4", "w4a16-nvfp4", "fp8", "fp8-dynamic", "int4-experts")
BLOCK = 16
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def _number(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """What the bits sign, exponent, mantissa mean; exponent 0 has no leading one."""
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    size = (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)
    return -size if code >> exponent_bits + mantissa_bits else size


E4M3 = np.array([np.nan if code & 127 == 127 else _number(code, 4, 3) for code in range(256)], np.float32)
E2M1 = np.array([_number(code, 2, 1) for code in range(16)], np.float32)


def _nearest(x: Array, sizes: Array) -> Array:
    """Code of the nearest of ``sizes`` to |x|: at a tie the even code, beyond the last the last."""
    distance = np.abs(np.abs(x.astype(np.float64))[..., None] - sizes)
    best = distance == distance.min(-1, keepdims=True)
    even = np.arange(len(sizes)) % 2 == 0
    return np.argmax(best * (1 + even), -1).astype(np.uint8)


def encode_e4m3(x: Array) -> Array:
    return _nearest(x, E4M3[:127]) | (np.signbit(x).astype(np.uint8) << 7)


def encode_e2m1(x: Array) -> Array:
    return _nearest(x, E2M1[:8]) | (np.signbit(x).astype(np.uint8) << 3)


def block_scales(x: Array, scale: np.float32) -> Array:
    """E4M3 codes of NVFP4's block scales, in ModelOpt's order of operations: largest / (6 * scale), at least 2**-9."""
    largest = np.abs(x).reshape(*x.shape[:-1], -1, BLOCK).max(-1)
    share = largest / (np.float32(6) * scale)
    return encode_e4m3(np.where(share == 0, np.float32(1), np.maximum(share, np.float32(2**-9))))


def _times_blocks(x: Array, scale: Array) -> Array:
    return x * np.repeat(scale, x.shape[-1] // scale.shape[-1], -1)


def round_fp8(x: Array, scale: Array) -> Array:
    """FP8 activations as numbers: nearest E4M3 of x / scale, saturating."""
    safe = np.where(scale == 0, np.float32(1), scale)
    return E4M3[encode_e4m3(x / safe)] * safe


def round_nvfp4(x: Array, scale: np.float32) -> Array:
    """NVFP4 activations as numbers."""
    of_block = E4M3[block_scales(x, scale)] * scale
    return _times_blocks(E2M1[encode_e2m1(x / np.repeat(of_block, BLOCK, -1))], of_block)


def midpoints(sizes: Array) -> Array:
    return (sizes[1:] + sizes[:-1]) / np.float32(2)


def activations(scale: float) -> Array:
    """(rows, 64) float32: random ones of many sizes, denormals, what saturates, ties of both formats, zeros."""
    rng = np.random.default_rng(5)
    spread = rng.standard_normal((200, 64)) * np.exp2(rng.integers(-24, 12, (200, 1)))
    tiny, huge = rng.standard_normal((20, 64)) * 2.0**-9, rng.standard_normal((20, 64)) * 4000
    ties = np.resize(np.concatenate([midpoints(E4M3[:127]), -midpoints(E4M3[:127])]), (8, 64))
    blocks = np.tile(np.concatenate([[6.0], midpoints(E2M1[:8]), -midpoints(E2M1[:8]), [0.0]]), (8, 4))
    blocks *= np.exp2(np.arange(-5, 3))[:, None]  # exact block scales: at scale 1 the ties stay ties
    sparse = spread[:40].copy()
    sparse[::2, :32], sparse[1::2, ::2] = 0, 0
    return (np.concatenate([spread, tiny, huge, ties, blocks, sparse, np.zeros((2, 64))]) * scale).astype(np.float32)


def decode_nvfp4(packed: Array, scale: Array, scale_2: np.float32) -> Array:
    """packed (out, in / 2), low half the even column; scale: E4M3 codes (out, in / 16)."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return _times_blocks(E2M1[codes], E4M3[scale] * scale_2)


def decode_int4(packed: Array, scale: Array) -> Array:
    """packed (out / 2, in), low half the even row; scale: float32 (out, in / block)."""
    codes = np.empty((packed.shape[0] * 2, packed.shape[1]), np.int8)
    codes[0::2], codes[1::2] = packed & 15, packed >> 4
    return _times_blocks(np.where(codes > 7, codes - 16, codes).astype(np.float32), scale)


def fp8_tensor(codes: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn)


def _nvfp4(matrix: Array, largest: np.float32) -> tuple[Parts, Array]:
    scale_2 = largest / np.float32(6 * 448)
    scale = block_scales(matrix, scale_2)
    codes = encode_e2m1(matrix / np.repeat(E4M3[scale] * scale_2, BLOCK, -1))
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    parts = {
        "weight": torch.from_numpy(packed),
        "weight_scale": fp8_tensor(scale),
        "weight_scale_2": torch.tensor(float(scale_2)),
    }
    return parts, decode_nvfp4(packed, scale, scale_2)


def _fp8(matrix: Array, largest: np.float32) -> tuple[Parts, Array]:
    scale = largest / np.float32(448)
    codes = encode_e4m3(matrix / scale)
    return {"weight": fp8_tensor(codes), "weight_scale": torch.tensor(float(scale))}, E4M3[codes] * scale


def _fp8_dynamic(matrix: Array, _: np.float32) -> tuple[Parts, Array]:
    stored = torch.from_numpy(np.abs(matrix).max(1, keepdims=True) / np.float32(448)).bfloat16()
    scale = stored.float().numpy()
    codes = encode_e4m3(matrix / scale)
    return {"weight": fp8_tensor(codes), "weight_scale": stored}, E4M3[codes] * scale


def _int4(matrix: Array, _: np.float32) -> tuple[Parts, Array]:
    scale = np.abs(matrix).reshape(len(matrix), -1, BLOCK).max(-1) / np.float32(7.5)  # so that -8 occurs too
    numbers = np.clip(np.rint(matrix / np.repeat(scale, BLOCK, -1)), -8, 7).astype(np.int8)
    codes = numbers.view(np.uint8) & 15
    packed = codes[0::2] | codes[1::2] << 4
    parts = {"weight": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scale)}
    return parts, decode_int4(packed, scale)


_ENCODERS = {
    "nvfp4-experts": _nvfp4,
    "nvfp4": _nvfp4,
    "w4a16-nvfp4": _nvfp4,
    "fp8": _fp8,
    "fp8-dynamic": _fp8_dynamic,
    "int4-experts": _int4,
}


@dataclass(slots=True)
class Export:
    """The content of a quantized checkpoint folder, and what reading it must give."""

    config: dict[str, Any]
    own: dict[str, Any] | None  # hf_quant_config.json
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # as stored
    values: dict[str, Array] = field(default_factory=dict)  # float32 of every text tensor of the model
    input_scales: dict[str, np.float32] = field(default_factory=dict)  # of every quantized tensor of the model

    def copy(self) -> "Export":
        """Can be changed without changing this one; the tensors themselves are shared."""
        shared = {id(each): each for each in (*self.tensors.values(), *self.values.values())}
        return copy.deepcopy(self, shared)

    def write(self, folder: Path, shards: int = 1) -> Path:
        """The tensors of a matrix lie in different shards, where there are several."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.own is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.own))
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        shard_of = {
            name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(self.tensors)
        }
        for shard in set(shard_of.values()):
            save_file({name: self.tensors[name] for name in self.tensors if shard_of[name] == shard}, folder / shard)
        index = {"metadata": {"total_size": sum(each.nbytes for each in self.tensors.values())}, "weight_map": shard_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def export(source: Path, layout: Layout) -> Export:
    """The checkpoint folder ``source`` in another layout."""
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    declared, own = _declaration(layout, config["text_config"]["num_hidden_layers"])
    result = Export(config | declared, own)
    static = layout in ("nvfp4-experts", "nvfp4", "fp8")
    rng = np.random.default_rng(len(layout))
    for name, tensor in load_file(source / "model.safetensors").items():
        stored = tensor.bfloat16()
        if not _is_quantized(layout, name):
            result.tensors[name] = stored
            if not name.startswith(VISION):
                result.values[name] = stored.float().numpy()
            continue
        whole = stored.float().numpy()
        amax = np.float32(rng.uniform(2, 20))
        input_scale = amax / np.float32(448 if layout == "fp8" else 6 * 448)
        rows = []
        for stem, matrix, largest in _matrices(name, whole):
            parts, numbers = _ENCODERS[layout](np.ascontiguousarray(matrix), largest)
            rows.append(numbers)
            if static:
                parts["input_scale"] = torch.tensor(float(input_scale))
            result.tensors |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
        result.values[name] = np.concatenate(rows).reshape(whole.shape)
        if static:
            result.input_scales[name] = input_scale
    return result


def _is_quantized(layout: Layout, name: str) -> bool:
    if ".experts." in name:
        return True
    linear = name.endswith("_proj.weight") and (".self_attn." in name or ".mlp." in name)
    return linear and name.startswith("model.decoder.layers.") and not layout.endswith("-experts")


def _matrices(name: str, whole: Array) -> Iterator[tuple[str, Array, np.float32]]:
    """Name without suffix, numbers (out, in) and the size that sets the scale of all: gate and up of NVFP4 share it."""
    if ".experts." not in name:
        yield name.removesuffix(".weight"), whole, np.abs(whole).max()
        return
    stem = name.rsplit(".", 1)[0]
    for expert, matrix in enumerate(whole):
        largest = np.abs(matrix).max()
        if name.endswith("down_proj"):
            yield f"{stem}.{expert}.down_proj", matrix, largest
        else:
            half = len(matrix) // 2
            yield f"{stem}.{expert}.gate_proj", matrix[:half], largest
            yield f"{stem}.{expert}.up_proj", matrix[half:], largest


def _declaration(layout: Layout, layers: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is added to config.json, and hf_quant_config.json."""
    if layout == "fp8-dynamic":
        return {"quantization_config": _compressed_tensors(layers)}, None
    plain = ("mlp", "router", "self_attn") if layout.endswith("-experts") else ("router",)
    sides = ("model.decoder", "model.encoder.language_model")
    excluded = [f"{side}.layers.{layer}.{part}*" for side in sides for layer in range(layers) for part in plain]
    rest = ["model.decoder.self_conditioning*", "model.encoder.embed_vision*", "model.encoder.vision_tower*"]
    excluded = sorted(["lm_head", *excluded, *rest])
    if layout == "int4-experts":
        section = {"quant_algo": "W4A16", "group_size": BLOCK, "kv_cache_quant_algo": None, "exclude_modules": excluded}
        return {}, {"producer": {"name": "canvasrt", "version": "0"}, "quantization": section}
    algorithm = {"fp8": "FP8", "w4a16-nvfp4": "W4A16_NVFP4"}.get(layout, "NVFP4")
    size = {} if layout == "fp8" else {"group_size": BLOCK}
    producer = {"name": "modelopt", "version": "0.47.0"}
    scheme = {"dynamic": False, "num_bits": 8 if layout == "fp8" else 4, "type": "float"} | size
    group = {"weights": scheme, "targets": ["Linear"]}
    if layout != "w4a16-nvfp4":
        group["input_activations"] = scheme
    declared = {
        "config_groups": {"group_0": group},
        "ignore": excluded,
        "quant_algo": algorithm,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": producer,
        "quant_method": "modelopt",
    }
    section = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", **size, "exclude_modules": excluded}
    return {"quantization_config": declared}, {"producer": producer, "quantization": section}


def _compressed_tensors(layers: int) -> dict[str, Any]:
    common = {
        "actorder": None, "block_structure": None, "group_size": None, "num_bits": 8, "observer_kwargs": {},
        "symmetric": True, "type": "float",
    }  # fmt: skip
    group = {
        "input_activations": common | {"dynamic": True, "strategy": "token", "observer": None},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": common | {"dynamic": False, "strategy": "channel", "observer": "minmax"},
    }
    conditioning = [f"model.decoder.self_conditioning.{part}_proj" for part in ("gate", "up", "down")]
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head", *conditioning, *(f"model.decoder.layers.{layer}.router.proj" for layer in range(layers))],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
