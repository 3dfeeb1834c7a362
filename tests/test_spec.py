"""ModelSpec against transformers' own config and model classes, and the refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, Gemma4VisionConfig
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import DiffusionGemmaTextConfig
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

from canvasrt.errors import CanvasRTError, CheckpointError, InputError
from canvasrt.spec import LayerSpec, ModelSpec

PUBLISHED_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "use_bidirectional_attention": "vision",
    "attention_dropout": 0.0,
}
PUBLISHED: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "canvas_length": 32,
    "image_token_id": 95,
    "text_config": PUBLISHED_TEXT,
}
REMOVED = object()


def changed(**text: Any) -> dict[str, Any]:
    config = copy.deepcopy(PUBLISHED)
    config["text_config"] |= text
    config["text_config"] = {key: value for key, value in config["text_config"].items() if value is not REMOVED}
    return config


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return ModelSpec.from_config(config, "x/config.json")


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        spec_of(config)
    return str(caught.value)


def frequencies(layer: LayerSpec) -> torch.Tensor:
    pairs = torch.arange(layer.head_dim // 2, dtype=torch.float64)
    inverse = layer.rope_theta ** (-2 * pairs / layer.head_dim) / layer.rope_factor
    return torch.where(pairs < layer.rotary_pairs, inverse, 0.0).float()


@st.composite
def text_configs(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 14))
    heads = draw(st.sampled_from([4, 8, 12]))
    kinds = st.sampled_from(["sliding_attention", "full_attention"])
    full_rope = {
        "rope_type": draw(st.sampled_from(["proportional", "default"])),
        "rope_theta": draw(st.sampled_from([1e4, 1e6])),
    }
    if full_rope["rope_type"] == "proportional":
        full_rope["partial_rotary_factor"] = draw(st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]))
        full_rope["factor"] = draw(st.sampled_from([1.0, 8.0]))
    optional: dict[str, Any] = {
        "global_head_dim": draw(st.integers(2, 40)) * 2,
        "num_global_key_value_heads": draw(st.sampled_from([None, 1, 2, 4])),
        "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
        "rope_parameters": {
            "full_attention": full_rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e3, 1e4]))},
        },
        "eos_token_id": draw(st.sampled_from([3, [3], [1, 6]])),
    }
    text = PUBLISHED_TEXT | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.integers(1, 40)) * 2,
    }
    for key in ("global_head_dim", "num_global_key_value_heads"):
        text.pop(key)
    return text | {key: value for key, value in optional.items() if draw(st.booleans())}


@settings(max_examples=40, deadline=None)
@given(text_configs())
def test_both_config_forms_give_the_layers_that_transformers_builds(text: dict[str, Any]) -> None:
    published = json.loads(json.dumps(PUBLISHED | {"text_config": text}))
    oracle = DiffusionGemmaTextConfig(**copy.deepcopy(text))
    whole = DiffusionGemmaConfig(text_config=oracle, canvas_length=32, image_token_id=95)
    saved = json.loads(json.dumps(whole.to_dict()))
    assert "per_layer_config" in saved["text_config"]
    assert "global_head_dim" not in saved["text_config"]

    spec = spec_of(published)

    assert spec_of(saved) == spec
    assert len(spec.layers) == oracle.num_hidden_layers
    rotary = DiffusionGemmaTextRotaryEmbedding(oracle)
    for layer, layer_type in zip(spec.layers, oracle.layer_types, strict=True):
        expected = oracle.per_layer_config[layer.index]
        assert (layer.head_dim, layer.kv_heads) == (expected.head_dim, expected.num_key_value_heads)
        assert f"{layer.kind}_attention" == layer_type
        assert layer.value_is_key == (layer_type == "full_attention")
        torch.testing.assert_close(frequencies(layer), getattr(rotary, f"{layer_type}_inv_freq"), rtol=1e-5, atol=0)


def test_tensor_names_and_shapes_are_those_of_the_transformers_model() -> None:
    vision = Gemma4VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, head_dim=16
    )
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**PUBLISHED_TEXT), vision_config=vision, image_token_id=95
    )
    with torch.device("meta"):
        model = DiffusionGemmaForBlockDiffusion(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    vision_prefixes = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
    tied = {
        name
        for name in state
        if name == "lm_head.weight"
        or (name.startswith("model.encoder.language_model.") and not name.endswith("layer_scalar"))
    }
    expected = {name: shape for name, shape in state.items() if not name.startswith(vision_prefixes)}
    assert spec_of(PUBLISHED).tensors() == {name: shape for name, shape in expected.items() if name not in tied}


def test_the_published_dimensions_are_read_in_full() -> None:
    config = changed(
        vocab_size=262_144,
        hidden_size=2816,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        final_logit_softcapping=20.0,
    )
    spec = spec_of(config)
    assert (spec.vocab_size, spec.hidden_size, spec.heads, spec.canvas_length) == (262_144, 2816, 16, 32)
    assert (spec.mlp_size, spec.experts, spec.experts_per_token, spec.expert_size) == (48, 4, 2, 8)
    assert (spec.sliding_window, spec.max_context, spec.softcap, spec.rms_norm_eps) == (64, 512, 20.0, 1e-6)
    assert [layer.index for layer in spec.layers if layer.value_is_key] == [5, 11, 17, 23, 29]
    assert spec.layers[5] == LayerSpec(5, "full", 512, 2, 1e6, 64)
    assert spec.layers[4] == LayerSpec(4, "sliding", 256, 8, 1e4, 128)
    shapes = spec.tensors()
    assert shapes["model.decoder.layers.5.self_attn.k_proj.weight"] == (1024, 2816)
    assert "model.decoder.layers.5.self_attn.v_proj.weight" not in shapes


def test_absent_optional_fields_take_the_defaults_of_transformers() -> None:
    spec = spec_of(changed(use_bidirectional_attention=REMOVED, global_head_dim=REMOVED))
    assert (spec.bos_token_id, spec.pad_token_id, spec.eos_token_ids, spec.softcap) == (2, 0, (1,), 30.0)
    assert not spec.bidirectional_images
    assert spec.layers[5].head_dim == 512
    assert spec_of(PUBLISHED).bidirectional_images


def test_layer_keys_padded_by_transformers_are_understood() -> None:
    text = {"num_hidden_layers": 12, "per_layer_config": {"05": {"head_dim": 32}, "11": {"head_dim": 32}}}
    assert [layer.head_dim for layer in spec_of(changed(**text)).layers] == ([16] * 5 + [32]) * 2


def test_eos_tokens_of_the_outer_config_win() -> None:
    assert spec_of(changed(eos_token_id=7) | {"eos_token_id": [1, 50]}).eos_token_ids == (1, 50)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ({"use_bidirectional_attention": "all"}, ["use_bidirectional_attention", '"all"', "encoder must be causal"]),
        ({"attention_bias": True}, ["text_config.attention_bias: found true, expected false", "not implemented"]),
        ({"hidden_activation": "silu"}, ["hidden_activation", '"silu"', "gelu_pytorch_tanh"]),
        ({"tie_word_embeddings": False}, ["text_config.tie_word_embeddings: found false", "share their weights"]),
        ({"num_attention_heads": 5}, ["num_attention_heads: found 5", "multiple of the 2 key-value heads"]),
        ({"num_global_key_value_heads": 3}, ["num_attention_heads: found 4", "3 key-value heads of full"]),
        ({"sliding_window": 1}, ["text_config.sliding_window: found 1", "greater than or equal to 2"]),
        ({"top_k_experts": 5}, ["text_config.top_k_experts: found 5", "num_experts (4)"]),
        ({"head_dim": 15}, ["text_config.head_dim: found 15", "even number on sliding"]),
        ({"global_head_dim": 25}, ["text_config.global_head_dim: found 25", "even number on full"]),
        ({"bos_token_id": 96}, ["text_config.bos_token_id: found 96", "below vocab_size (96)"]),
        ({"eos_token_id": [1, 200]}, ["text_config.eos_token_id: found 200", "below vocab_size (96)"]),
        ({"pad_token_id": -1}, ["text_config.pad_token_id: found -1", "greater than or equal to 0"]),
        ({"layer_types": ["full_attention"]}, ["layer_types: found 1", "num_hidden_layers (7)"]),
        ({"layer_types": ["linear_attention"] * 7}, ["layer_types.0", "linear_attention", "full_attention"]),
        ({"per_layer_config": {"9": {}}}, ["per_layer_config: found 9", "below num_hidden_layers (7)"]),
        ({"per_layer_config": {"full": {}}}, ['per_layer_config.full: found "full"', "integer"]),
        ({"per_layer_config": {"5": {"sliding_window": 8}}}, ["per_layer_config.5.sliding_window", "head_dim and"]),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, ["found [8, 16]", "all sliding layers", "RoPE table"]),
        ({"hidden_size": "32"}, ['text_config.hidden_size: found "32"', "integer"]),
        ({"num_experts": REMOVED}, ["text_config.num_experts: found nothing", "required"]),
        ({"rms_norm_eps": float("nan")}, ["text_config.rms_norm_eps: found NaN", "finite"]),
        ({"vocab_size": 2**40}, ["text_config.vocab_size", "less than or equal"]),
        ({"partial_rotary_factor": 0.5}, ["text_config.partial_rotary_factor: found 0.5"]),
    ],
)
def test_a_field_that_cannot_be_run_is_refused_with_its_reason(text: dict[str, Any], parts: list[str]) -> None:
    message = refusal(changed(**text))
    assert message.startswith("x/config.json: ")
    assert [part for part in parts if part not in message] == []
    assert "pydantic" not in message
    assert "CanvasRT cannot run this model" in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("full", "part"),
    [
        ({"rope_type": "yarn", "rope_theta": 1e6}, 'full_attention.rope_type: found "yarn"'),
        (
            {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "partial_rotary_factor: found 0.25",
        ),
        ({"rope_type": "default"}, "full_attention.rope_theta: found nothing"),
        (None, "rope_parameters.full_attention: found null"),
    ],
)
def test_an_unknown_rope_is_refused(full: dict[str, Any] | None, part: str) -> None:
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": full}
    assert part in refusal(changed(rope_parameters=ropes))


def test_each_wrong_field_has_its_own_line() -> None:
    lines = refusal(changed(hidden_size=0, num_experts="4")).splitlines()
    assert [line.split(": ")[1] for line in lines[:-1]] == ["text_config.hidden_size", "text_config.num_experts"]


@pytest.mark.parametrize(
    ("outer", "part"),
    [
        ({"model_type": "gemma3"}, 'model_type: found "gemma3", expected "diffusion_gemma"'),
        ({"tie_word_embeddings": False}, "x/config.json: tie_word_embeddings: found false"),
        ({"image_token_id": 96}, "image_token_id: found 96, expected a token id below vocab_size (96)"),
        ({"eos_token_id": [96]}, "x/config.json: eos_token_id: found 96"),
        ({"canvas_length": 0}, "canvas_length: found 0"),
        ({"text_config": None}, "text_config: found null"),
    ],
)
def test_wrong_outer_fields_are_refused(outer: dict[str, Any], part: str) -> None:
    assert part in refusal(copy.deepcopy(PUBLISHED) | outer)


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal(changed(hidden_size="x" * 5000))) < 500


def test_load_reads_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert ModelSpec.load(tmp_path) == spec_of(PUBLISHED)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "config.json is missing"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[1]", "found [1], expected a JSON object"),
    ],
)
def test_an_unreadable_config_is_refused(tmp_path: Path, content: bytes | None, part: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.load(tmp_path)
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "ownload" in str(caught.value)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder.*holds config\.json"):
        ModelSpec.load(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        ModelSpec.load(tmp_path / "file")


def test_every_checkpoint_error_is_an_input_error() -> None:
    assert issubclass(CheckpointError, InputError)
    assert issubclass(InputError, CanvasRTError)
