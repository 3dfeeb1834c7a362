"""ModelOpt's own fake quantization of transformers' model on a CPU: the oracle for a quantized checkpoint's arithmetic.

ModelOpt rounds weights and activations inside the reference model; its export is what our runner opens. Two things have
to be settled between them, since ModelOpt settles them while exporting: encoder and decoder share the larger input
scale, and matrices that read one input share the larger weight scale.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import DiffusionGemmaForBlockDiffusion

from canvasrt.quantize.modelopt_model import TensorQuantizer, mtq, quantizer_config
from canvasrt.quantize.recipe import Recipe

BACKEND = "nvfp4-on-a-cpu"


def nvfp4_backend() -> str:
    """ModelOpt's NVFP4 forward needs CUDA; this is the same from its own quantize and dequantize."""
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def rounded(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        scale = quantizer.amax.float() / (6 * 448)
        packed, blocks, scale = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=scale)
        numbers: torch.Tensor = packed.dequantize(dtype=x.dtype, scale=blocks, double_scale=scale, block_sizes={-1: 16})
        return numbers.view(x.shape)

    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, rounded)
    return BACKEND


def fake_quantized(folder: Path, recipe: Recipe, prompt: torch.Tensor) -> Any:
    """transformers' model of a float32 checkpoint with ModelOpt's quantizers, calibrated on one prompt."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    config = quantizer_config(recipe)
    for rule in config["quant_cfg"]:
        numbers = rule.get("cfg") or {}
        if str(numbers.get("num_bits")) in ("(2, 1)", "e2m1"):
            numbers["backend"] = nvfp4_backend()

    def loop(each: Any) -> None:
        with torch.no_grad():
            output = each.generate(prompt, max_new_tokens=2 * each.config.canvas_length, max_denoising_steps=3)
            each.model.encoder(input_ids=output.sequences)

    model = mtq.quantize(model, config, forward_loop=loop)
    _share_scales(model)
    return model


def _share_scales(model: Any) -> None:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and getattr(module, "_amax", None) is not None
    }
    groups: dict[str, list[Any]] = {}
    for name, quantizer in found.items():
        twin = name.replace("model.encoder.language_model.", "model.decoder.")
        if "weight_quantizer" in name and ".experts." not in name:
            for sharing in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                for part in sharing:
                    twin = twin.replace(f".{part}.", f".{'|'.join(sharing)}.")
        groups.setdefault(twin, []).append(quantizer)
    for quantizers in groups.values():
        largest = torch.stack([quantizer.amax for quantizer in quantizers]).amax(0)
        for quantizer in quantizers:
            quantizer.amax = largest.clone()
