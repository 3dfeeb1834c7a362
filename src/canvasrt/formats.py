"""How matrices can be quantized, and what a checkpoint's configuration says about it.

Reads ModelOpt's hf_quant_config.json and both forms of ``quantization_config`` in config.json: ModelOpt's and
compressed-tensors' (the format of llm-compressor and vLLM). Knows nothing of tensors, arithmetic or devices.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from canvasrt.errors import CheckpointError

NVFP4_BLOCK = 16
E4M3_MAX = 448.0  # largest finite number of FP8 E4M3
E2M1_MAX = 6.0  # largest number of FP4 E2M1

Weights = Literal["plain", "fp8", "nvfp4", "int4"]
# none: as they are; static: FP8 with the matrix's input_scale; token: FP8 scaled by each token's largest value;
# block: NVFP4, blocks of 16 scaled by their largest value within the matrix's input_scale
Activations = Literal["none", "static", "token", "block"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one matrix is stored, and how the activations that meet it are rounded."""

    weights: Weights
    activations: Activations = "none"
    block: int = 0  # weights per scale along the input axis; 0: a scale covers the whole matrix or a whole row


PLAIN = Format("plain")


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a checkpoint declares. Which tensors are quantized is told by the tensors themselves."""

    producer: Literal["modelopt", "compressed-tensors", "canvasrt"]
    eight_bit: Format | None  # of the matrices stored in FP8
    four_bit: Format | None  # of the matrices stored in packed bytes
    kv_cache: Literal["fp8"] | None

    @property
    def name(self) -> str:
        four, eight = self.four_bit, self.eight_bit
        weights = " and ".join(each.weights.upper() for each in (four, eight) if each is not None)
        return f"{weights} ({self.producer})"


# ModelOpt's names of algorithms. W4A16 is CanvasRT's INT4, in the tensor layout of ModelOpt's W4A16_AWQ.
_FP8 = Format("fp8", "static")
_MODELOPT = {
    "FP8": (_FP8, None),
    "NVFP4": (None, Format("nvfp4", "block", NVFP4_BLOCK)),
    "W4A16_NVFP4": (None, Format("nvfp4", "none", NVFP4_BLOCK)),
    "W4A16": (None, Format("int4", "none")),
}


def read_quantization(folder: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What config.json and hf_quant_config.json of ``folder`` declare; None for a checkpoint that is not quantized.

    Raises CheckpointError for a method that this version can't run, naming the file and the methods that it can.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, dict) else None
    declared = config.get("quantization_config") or nested
    own = folder / "hf_quant_config.json"
    if own.exists():
        content = _json(own)
        section = content.get("quantization") if isinstance(content, dict) else None
        if not isinstance(section, dict):
            raise _refusal(own, "has no quantization section")
        other = declared.get("quant_algo") if isinstance(declared, dict) else None
        if other is not None and other != section.get("quant_algo"):
            raise _refusal(own, f"says {section.get('quant_algo')!r} where config.json says {other!r}")
        return _modelopt(own, section, section.get("kv_cache_quant_algo"))
    if declared is None:
        return None
    where = folder / "config.json"
    if not isinstance(declared, dict):
        raise _refusal(where, "has a quantization_config that is not an object")
    method = declared.get("quant_method")
    if method == "modelopt":
        scheme = declared.get("kv_cache_scheme")
        return _modelopt(where, declared, "FP8" if _is_fp8(scheme) else scheme)
    if method == "compressed-tensors":
        return _compressed_tensors(where, declared)
    raise _refusal(where, f"is quantized by the method {method!r}")


def _modelopt(where: Path, section: Mapping[str, Any], kv: Any) -> Quantization:
    algorithm = section.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in _MODELOPT:
        raise _refusal(where, f"has the quant_algo {algorithm!r}")
    eight, four = _MODELOPT[algorithm]
    if four is not None:
        block = section.get("group_size", _group_size(section) or four.block)
        if four.weights == "nvfp4" and block != NVFP4_BLOCK:
            raise _refusal(where, f"has NVFP4 blocks of {block!r} weights instead of {NVFP4_BLOCK}")
        if type(block) is not int or block < 1:
            raise _refusal(where, f"has the group_size {block!r}")
        four = Format(four.weights, four.activations, block)
    if kv not in (None, "FP8"):
        raise _refusal(where, f"has a K/V cache in {kv!r} instead of FP8")
    producer: Literal["modelopt", "canvasrt"] = "canvasrt" if algorithm == "W4A16" else "modelopt"
    return Quantization(producer, eight, four, "fp8" if kv else None)


def _group_size(section: Mapping[str, Any]) -> Any:
    """Where ModelOpt's quantization_config keeps the block size."""
    groups = section.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    return weights.get("group_size") if isinstance(weights, dict) else None


def _compressed_tensors(where: Path, declared: Mapping[str, Any]) -> Quantization:
    groups = declared.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if (
        not isinstance(group, dict)
        or not isinstance(weights, dict)
        or not _is_fp8(weights)
        or weights.get("strategy") not in ("channel", "tensor")
        or weights.get("symmetric") is False
        or group.get("output_activations") is not None
    ):
        raise _refusal(where, "has other than one config group of symmetric FP8 weights per channel or tensor")
    inputs = group.get("input_activations")
    activations: Activations = "none"
    if inputs is not None:
        if not _is_fp8(inputs):
            raise _refusal(where, f"has the input_activations {inputs!r}")
        dynamic = inputs.get("dynamic")
        if (dynamic, inputs.get("strategy")) not in ((True, "token"), (False, "tensor")):
            raise _refusal(where, f"has the input_activations {inputs!r}")
        activations = "token" if dynamic else "static"
    kv = declared.get("kv_cache_scheme")
    if kv is not None and not _is_fp8(kv):
        raise _refusal(where, f"has the kv_cache_scheme {kv!r} instead of FP8")
    return Quantization("compressed-tensors", Format("fp8", activations), None, "fp8" if kv is not None else None)


def _is_fp8(scheme: Any) -> bool:
    return isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float"


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}). Download or copy the file again.") from None


def _refusal(where: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {fault}; this version cannot run that. It runs ModelOpt's FP8, NVFP4, W4A16_NVFP4 and CanvasRT's "
        "INT4 (W4A16), and FP8 of compressed-tensors, all with a K/V cache in BF16 or FP8. Use one of those, or the "
        "BF16 checkpoint (google/diffusiongemma-26B-A4B-it) and canvasrt quantize."
    )
