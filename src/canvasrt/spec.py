"""The model's dimensions, read from a checkpoint's config.json and validated once.

Knows both forms of the config (as published, and as transformers saves it) and the names and shapes of the text
tensors that follow from it. Knows nothing of weights, devices, quantization or the vision tower. Defaults are those
of transformers' DiffusionGemmaTextConfig, except that a dimension must be stated: the class defaults of dimensions
belong to no published model.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from canvasrt.errors import CheckpointError

LayerKind = Literal["sliding", "full"]

_MODEL_TYPE = "diffusion_gemma"
_REPOSITORY = "google/diffusiongemma-26B-A4B-it"
_SLIDING_PATTERN = 6  # every sixth layer is full where layer_types is absent
_SHOWN_CHARACTERS = 60


def _must(holds: Callable[[Any], bool], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("refused", "{expected}", {"expected": expected})
        return value

    return AfterValidator(check)


_Size = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=1, le=4096)]
_TokenId = Annotated[int, Field(ge=0, lt=2**20)]
_AsList = BeforeValidator(lambda value: [value] if isinstance(value, int) else value)
_TokenIds = Annotated[list[_TokenId], Field(min_length=1, max_length=64), _AsList]
_LayerKey = Annotated[int, BeforeValidator(lambda key: int(key) if re.fullmatch("[0-9]{1,4}", str(key)) else key)]
_Tied = Annotated[bool, _must(bool, "true: encoder, decoder and LM head must share their weights")]
_Unbiased = Annotated[
    bool, _must(lambda bias: not bias, "false: attention projections with a bias are not implemented")
]
_Activation = Annotated[str, _must("gelu_pytorch_tanh".__eq__, '"gelu_pytorch_tanh", the only one implemented')]
_Direction = Annotated[str | None, _must((None, "vision").__contains__, 'null or "vision": the encoder must be causal')]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Attention geometry of one layer.

    Frequency pair i of a head is ``rope_theta ** (-2 * i / head_dim) / rope_factor`` for ``i < rotary_pairs`` and 0
    for the pairs from there up to ``head_dim // 2``.
    """

    index: int
    kind: LayerKind
    head_dim: int
    kv_heads: int
    rope_theta: float
    rotary_pairs: int
    rope_factor: float = 1.0

    @property
    def value_is_key(self) -> bool:
        """Whether the layer has no v_proj and takes the output of k_proj (before norm and RoPE) as value."""
        return self.kind == "full"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the text network is: dimensions, layers and special tokens. All lengths are in tokens or elements."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    heads: int
    layers: tuple[LayerSpec, ...]
    sliding_window: int
    experts: int
    experts_per_token: int
    expert_size: int
    canvas_length: int
    max_context: int
    rms_norm_eps: float
    softcap: float
    bos_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    image_token_id: int
    bidirectional_images: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "ModelSpec":
        """Validate a parsed config.json; `source` is what messages call it.

        Raises CheckpointError with one line for each field that is wrong.
        """
        model_type = config.get("model_type")
        if model_type != _MODEL_TYPE:
            raise _refusal(source, [("model_type", model_type, f'"{_MODEL_TYPE}"')])
        try:
            parsed = _Config.model_validate(dict(config))
        except ValidationError as error:
            raise _refusal(source, _pydantic_problems(error)) from None
        if problems := [*_scalar_problems(parsed), *_layout_problems(parsed.text_config)]:
            raise _refusal(source, problems)
        layers = tuple(_layer(parsed.text_config, *item) for item in enumerate(_layer_types(parsed.text_config)))
        if problems := list(_geometry_problems(parsed.text_config, layers)):
            raise _refusal(source, problems)
        return _build(parsed, layers)

    @classmethod
    def load(cls, folder: Path) -> "ModelSpec":
        """Read and validate `folder`/config.json. Raises CheckpointError as `read_config` and `from_config` do."""
        return cls.from_config(read_config(folder), str(folder / "config.json"))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every text tensor of the BF16 layout; matrices are [out, in]."""
        hidden = self.hidden_size
        conditioning = "model.decoder.self_conditioning."
        shapes: dict[str, tuple[int, ...]] = {
            "model.decoder.embed_tokens.weight": (self.vocab_size, hidden),
            "model.decoder.norm.weight": (hidden,),
            f"{conditioning}pre_norm.weight": (hidden,),
            **_gated_mlp(conditioning, hidden, self.mlp_size),
        }
        for layer in self.layers:
            shapes |= self._layer_tensors(layer)
        return shapes

    def _layer_tensors(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        hidden, experts, expert_size = self.hidden_size, self.experts, self.expert_size
        query_size, key_size = self.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        prefix = f"model.decoder.layers.{layer.index}."
        attention = f"{prefix}self_attn."
        values = {} if layer.value_is_key else {f"{attention}v_proj.weight": (key_size, hidden)}
        return {
            f"{attention}q_proj.weight": (query_size, hidden),
            f"{attention}k_proj.weight": (key_size, hidden),
            **values,
            f"{attention}o_proj.weight": (hidden, query_size),
            f"{attention}q_norm.weight": (layer.head_dim,),
            f"{attention}k_norm.weight": (layer.head_dim,),
            **{f"{prefix}{norm}.weight": (hidden,) for norm in _LAYER_NORMS},
            **_gated_mlp(f"{prefix}mlp.", hidden, self.mlp_size),
            f"{prefix}router.proj.weight": (experts, hidden),
            f"{prefix}router.scale": (hidden,),
            f"{prefix}router.per_expert_scale": (experts,),
            f"{prefix}experts.gate_up_proj": (experts, 2 * expert_size, hidden),
            f"{prefix}experts.down_proj": (experts, hidden, expert_size),
            f"{prefix}layer_scalar": (1,),
            f"model.encoder.language_model.layers.{layer.index}.layer_scalar": (1,),
        }


_LAYER_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Parse `folder`/config.json without judging its content.

    Raises CheckpointError where the folder or the file is missing, or the file is no JSON object.
    """
    if not folder.is_dir():
        raise _no_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: config.json is missing. Give the checkpoint's folder, or download it again.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Download or copy the file again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found {_shown(config)}, expected a JSON object. Download the file again.")
    return config


def _no_folder(folder: Path) -> CheckpointError:
    advice = "Give the folder that holds config.json and the safetensors files."
    if folder.exists():
        return CheckpointError(f"{folder}: is a file, not a folder. {advice}")
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        download = f"hf download {folder} --local-dir DIR"
        advice = f"If it is a Hugging Face model id, download it first: {download}, then give DIR."
    return CheckpointError(f"{folder}: no such folder. {advice}")


def _gated_mlp(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _Rope(_Fields):
    rope_type: Literal["default", "proportional"] = "default"
    rope_theta: float = Field(gt=1, le=1e12)
    partial_rotary_factor: float = Field(default=1.0, ge=0, le=1)
    factor: float = Field(default=1.0, gt=0, le=1e6)


class _Overrides(_Fields):
    # an override of anything else would be ignored by the network, so it is refused
    model_config = ConfigDict(extra="forbid")
    head_dim: _Size | None = None
    num_key_value_heads: _Count | None = None


_DEFAULT_ROPE: dict[str, _Rope | None] = {
    "sliding_attention": _Rope(rope_theta=10_000.0),
    "full_attention": _Rope(rope_type="proportional", partial_rotary_factor=0.25, rope_theta=1_000_000.0),
}
_Ropes = Annotated[dict[str, _Rope | None], BeforeValidator(lambda value: _DEFAULT_ROPE if value is None else value)]


class _TextConfig(_Fields):
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)]
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Size
    global_head_dim: _Size = 512
    num_global_key_value_heads: _Count | None = None
    per_layer_config: dict[_LayerKey, _Overrides] | None = None  # transformers pads the keys: "05"
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    rope_parameters: _Ropes = _DEFAULT_ROPE
    partial_rotary_factor: None = None  # transformers would copy it into every rope_parameters that lacks it
    sliding_window: int = Field(ge=2, le=2**20)
    num_experts: _Count
    top_k_experts: _Count
    moe_intermediate_size: _Size
    max_position_embeddings: int = Field(ge=1, le=2**24)
    rms_norm_eps: float = Field(default=1e-6, gt=0, lt=1)
    final_logit_softcapping: float = Field(default=30.0, gt=0, le=1e6)
    hidden_activation: _Activation = "gelu_pytorch_tanh"
    attention_bias: _Unbiased = False
    tie_word_embeddings: _Tied = True
    use_bidirectional_attention: _Direction = None
    bos_token_id: _TokenId = 2
    pad_token_id: _TokenId = 0
    eos_token_id: _TokenIds = [1]


class _Config(_Fields):
    text_config: _TextConfig
    canvas_length: int = Field(default=256, ge=1, le=65536)
    eos_token_id: _TokenIds | None = None  # stated here by Gemma configs; wins over text_config's
    image_token_id: _TokenId = 258_880
    tie_word_embeddings: _Tied = True


_Problem = tuple[str, Any, str]  # field of config.json, value found, what is expected and why


def _scalar_problems(config: _Config) -> Iterator[_Problem]:
    text = config.text_config
    if text.top_k_experts > text.num_experts:
        yield "text_config.top_k_experts", text.top_k_experts, f"at most num_experts ({text.num_experts})"
    tokens = [("image_token_id", config.image_token_id)]
    tokens += [(f"text_config.{name}_token_id", getattr(text, f"{name}_token_id")) for name in ("bos", "pad")]
    tokens += [("text_config.eos_token_id", token) for token in text.eos_token_id]
    tokens += [("eos_token_id", token) for token in config.eos_token_id or ()]
    for field, token in tokens:
        if token >= text.vocab_size:
            yield field, token, f"a token id below vocab_size ({text.vocab_size})"


def _layout_problems(text: _TextConfig) -> Iterator[_Problem]:
    layers = text.num_hidden_layers
    if text.layer_types is not None and len(text.layer_types) != layers:
        yield "text_config.layer_types", len(text.layer_types), f"num_hidden_layers ({layers}) entries"
        return
    for key in text.per_layer_config or {}:
        if key >= layers:
            yield "text_config.per_layer_config", key, f"layer indices below num_hidden_layers ({layers})"
    for layer_type in sorted(set(_layer_types(text))):
        field, rope = f"text_config.rope_parameters.{layer_type}", text.rope_parameters.get(layer_type)
        if rope is None:
            yield field, None, "rope_type and rope_theta: layer_types has layers of this type"
        elif rope.rope_type == "default" and (share := rope.partial_rotary_factor) != 1:
            yield f"{field}.partial_rotary_factor", share, '1 with rope_type "default" ("proportional" takes less)'


def _geometry_problems(text: _TextConfig, layers: tuple[LayerSpec, ...]) -> Iterator[_Problem]:
    for kind in sorted({layer.kind for layer in layers}):
        head_dims = sorted({layer.head_dim for layer in layers if layer.kind == kind})
        if len(head_dims) > 1:
            reason = f"one head_dim for all {kind} layers: they share a RoPE table"
            yield "text_config.per_layer_config", head_dims, reason
        published = kind == "full" and "per_layer_config" not in text.model_fields_set
        field = "text_config.global_head_dim" if published else "text_config.head_dim"
        for odd in (head_dim for head_dim in head_dims if head_dim % 2):
            yield field, odd, f"an even number on {kind} layers: RoPE rotates pairs"
        for kv_heads in sorted({layer.kv_heads for layer in layers if layer.kind == kind}):
            if text.num_attention_heads % kv_heads:
                reason = f"a multiple of the {kv_heads} key-value heads of {kind} layers"
                yield "text_config.num_attention_heads", text.num_attention_heads, reason


def _layer_types(text: _TextConfig) -> list[str]:
    layers = range(1, text.num_hidden_layers + 1)
    types: list[str] = list(text.layer_types or ())
    types = types or ["full_attention" if layer % _SLIDING_PATTERN == 0 else "sliding_attention" for layer in layers]
    types[-1] = "full_attention"  # transformers forces it, whatever the file says
    return types


def _overrides(text: _TextConfig, index: int, layer_type: str) -> _Overrides:
    if "per_layer_config" in text.model_fields_set:
        return (text.per_layer_config or {}).get(index, _Overrides())
    if layer_type == "full_attention":
        return _Overrides(head_dim=text.global_head_dim, num_key_value_heads=text.num_global_key_value_heads)
    return _Overrides()


def _layer(text: _TextConfig, index: int, layer_type: str) -> LayerSpec:
    rope = text.rope_parameters[layer_type]
    assert rope is not None, "checked by _layout_problems"
    overrides = _overrides(text, index, layer_type)
    head_dim = overrides.head_dim or text.head_dim
    proportional = rope.rope_type == "proportional"
    return LayerSpec(
        index=index,
        kind="full" if layer_type == "full_attention" else "sliding",
        head_dim=head_dim,
        kv_heads=overrides.num_key_value_heads or text.num_key_value_heads,
        rope_theta=rope.rope_theta,
        rotary_pairs=int(rope.partial_rotary_factor * head_dim // 2) if proportional else head_dim // 2,
        rope_factor=rope.factor if proportional else 1.0,
    )


def _build(config: _Config, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    text = config.text_config
    return ModelSpec(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        mlp_size=text.intermediate_size,
        heads=text.num_attention_heads,
        layers=layers,
        sliding_window=text.sliding_window,
        experts=text.num_experts,
        experts_per_token=text.top_k_experts,
        expert_size=text.moe_intermediate_size,
        canvas_length=config.canvas_length,
        max_context=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        softcap=text.final_logit_softcapping,
        bos_token_id=text.bos_token_id,
        pad_token_id=text.pad_token_id,
        eos_token_ids=tuple(config.eos_token_id or text.eos_token_id),
        image_token_id=config.image_token_id,
        bidirectional_images=text.use_bidirectional_attention == "vision",
    )


def _pydantic_problems(error: ValidationError) -> list[_Problem]:
    problems: list[_Problem] = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"] if part != "[key]")
        found, expected = item["input"], item["msg"].removeprefix("Input should be ")
        if item["type"] == "missing":
            found, expected = ..., "a value: the field is required"
        elif item["type"] == "extra_forbidden":
            expected = "head_dim and num_key_value_heads only"
        problems.append((field, found, expected))
    return problems


def _refusal(source: str, problems: list[_Problem]) -> CheckpointError:
    lines = [f"{source}: {field}: found {_shown(found)}, expected {expected}" for field, found, expected in problems]
    advice = f"CanvasRT cannot run this model. Restore the file if it was edited; else use a model like {_REPOSITORY}."
    return CheckpointError("\n".join([*lines, advice]))


def _shown(value: Any) -> str:
    """`value` as JSON would have it, on one line and cut to a readable length."""
    text = "nothing" if value is ... else json.dumps(value, default=repr)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
