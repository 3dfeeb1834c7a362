"""transformers' model of a quantized checkpoint, in float32 or bfloat16: with nothing of the code under test.

Its weights are the numbers that the stored ones stand for, and what a quantized matrix reads is rounded as its format
says. Written from tests/layouts.py; test_exact.py shows that ModelOpt's own fake quantization rounds so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from canvasrt.reference.model import ReferenceModel
from layouts import Export, Layout, round_fp8, round_nvfp4

Rounder = Callable[[torch.Tensor], torch.Tensor]
ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."


def rounded_reference(plain: Path, content: Export, layout: Layout, dtype: torch.dtype) -> ReferenceModel:
    """``content`` is the export of ``plain`` to ``layout``. Experts are rounded before the routing weights."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(plain, dtype=torch.float32).eval()
    parameters = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, numbers in content.values.items():
            parameters[name].copy_(torch.from_numpy(numbers))
    model = model.to(dtype)
    for name, module in model.named_modules():
        own = name.replace(ENCODER, DECODER)
        if name.endswith("experts"):
            rounders = [_rounder(content, layout, f"{own}.{part}") for part in ("gate_up_proj", "down_proj")]
            module.forward = lambda *inputs, experts=module, each=rounders: _experts(experts, *each, *inputs)
        elif isinstance(module, torch.nn.Linear) and name.startswith((ENCODER, DECODER)):
            rounder = _rounder(content, layout, f"{own}.weight")
            module.register_forward_pre_hook(lambda _, inputs, rounder=rounder: (rounder(inputs[0]),))
    return ReferenceModel(model)


def _rounder(content: Export, layout: Layout, name: str) -> Rounder:
    scale = content.input_scales.get(name)
    by_token = layout == "fp8-dynamic" and any(part in name for part in (".self_attn.", ".mlp.", ".experts."))
    if scale is None and not by_token:
        return lambda x: x

    def rounded(x: torch.Tensor) -> torch.Tensor:
        numbers = x.detach().float().numpy()
        if scale is None:
            found = round_fp8(numbers, np.abs(numbers).max(-1, keepdims=True) / np.float32(448))
        else:
            found = round_fp8(numbers, scale) if layout == "fp8" else round_nvfp4(numbers, scale)
        return torch.from_numpy(found).to(x.dtype)

    return rounded


def _experts(
    experts: Any, before: Rounder, between: Rounder, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    result, met = torch.zeros_like(x), before(x)
    for expert, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        tokens, places = torch.where(chosen == expert)
        gate, up = (met[tokens] @ both.T).chunk(2, -1)
        hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
        out = weights[tokens, places, None] * (between(hidden) @ down.T)
        result.index_add_(0, tokens, out.to(x.dtype))
    return result
