"""Folders with a config.json: small ones for tests, and the real one cut to its first layers."""

import json
from pathlib import Path


def tiny_config(folder: Path) -> Path:
    """The model with every kind of layer and all that is large made small."""
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
        },
        "sliding_window": 9,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "max_position_embeddings": 256,
        "use_bidirectional_attention": "vision",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 8,
    }
    content = {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": 12,
        "boi_token_id": 3,
        "image_token_id": 4,
        "eoi_token_id": 5,
        "eos_token_id": [1],
        "text_config": text,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def shortened(config: Path, layers: int, folder: Path) -> Path:
    """A folder with the config.json of a model that has the first ``layers`` layers only."""
    content = json.loads((config / "config.json").read_text(encoding="utf-8"))
    text = content["text_config"]
    text["layer_types"] = text["layer_types"][:layers]
    text["num_hidden_layers"] = layers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
