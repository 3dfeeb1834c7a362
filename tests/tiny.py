"""Random checkpoints of any dimensions, made with transformers' own model class and written as it writes them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
    Gemma4VisionConfig,
)


@dataclass(frozen=True, slots=True)
class Dims:
    vocab: int = 67
    hidden: int = 32
    mlp: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    full_kv_heads: int = 1
    full_head_dim: int = 32
    layers: str = "ssfsf"  # s: sliding, f: full; the last is full
    window: int = 9
    experts: int = 4
    top_k: int = 2
    expert_size: int = 24
    canvas: int = 12
    context: int = 256
    rotary_share: float = 0.25
    embedding_scale: float = 0.5  # larger: more peaked logits


def new_model(dims: Dims, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """Weights large enough that every part shows in the logits; encoder and decoder layer scalars differ."""
    torch.manual_seed(seed)
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    text = DiffusionGemmaTextConfig(
        vocab_size=dims.vocab, hidden_size=dims.hidden, intermediate_size=dims.mlp, num_hidden_layers=len(dims.layers),
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, head_dim=dims.head_dim,
        global_head_dim=dims.full_head_dim, num_global_key_value_heads=dims.full_kv_heads,
        layer_types=[kinds[letter] for letter in dims.layers], sliding_window=dims.window, num_experts=dims.experts,
        top_k_experts=dims.top_k, moe_intermediate_size=dims.expert_size, max_position_embeddings=dims.context,
        pad_token_id=0, eos_token_id=1, bos_token_id=2, use_bidirectional_attention="vision",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional", "partial_rotary_factor": dims.rotary_share, "rope_theta": 1_000_000.0,
            },
        },
    )  # fmt: skip
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=16, patch_size=4, position_embedding_size=8,
    )  # fmt: skip
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=dims.canvas, boi_token_id=3, image_token_id=4,
        eoi_token_id=5, architectures=["DiffusionGemmaForBlockDiffusion"],
    )  # fmt: skip
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "scale")):
                parameter.copy_(0.5 + torch.rand_like(parameter))
            elif "vision" not in name:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        for side in (model.model.encoder.language_model.layers, model.model.decoder.layers):
            for layer in side:
                # scale 1 attention: keep the softmax of random weights from being one-hot
                layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
                layer.layer_scalar.copy_(0.5 + torch.rand(1))
        model.model.decoder.embed_tokens.weight.mul_(dims.embedding_scale)
    return model


def write(folder: Path, dims: Dims | None = None, seed: int = 0) -> Path:
    """A float32 checkpoint folder with config.json and model.safetensors; no tokenizer."""
    new_model(dims or Dims(), seed).save_pretrained(folder)
    return folder
