"""One attention block: fused projection, per-head norms, rotary embedding, K/V append, grouped attention.

Reference: transformers ``DiffusionGemmaEncoderTextAttention`` and ``DiffusionGemmaDecoderTextAttention``, which differ
only in what the cache makes visible.
"""

from dataclasses import dataclass
from typing import Generic

from canvasrt.network.names import decoder_layer
from canvasrt.ops.protocol import Cache, Ops, T
from canvasrt.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Rotary(Generic[T]):
    """Rotary factors of the tokens of one call for one kind of layer, both (rows, tokens, 1, head_dim)."""

    cos: T
    signed_sin: T  # the first half negated, so that rotate_half is a plain roll


def attention_block(ops: Ops[T], spec: ModelSpec, layer: LayerSpec, x: T, rotary: Rotary[T], cache: Cache[T]) -> T:
    """x (rows, tokens, hidden) normed, without the norm's weight: the output projection's result of the same shape."""
    q, k, v = _project(ops, spec, layer, x, rotary)
    mixed = cache.attend(ops, layer.index, q, k, v)
    return ops.linear(mixed, decoder_layer(layer.index) + "self_attn.o_proj.weight")


def append_only(ops: Ops[T], spec: ModelSpec, layer: LayerSpec, x: T, rotary: Rotary[T], cache: Cache[T]) -> None:
    """Writes K and V and stops: all that a context token's last layer is needed for."""
    _, k, v = _project(ops, spec, layer, x, rotary)
    cache.append(layer.index, k, v)


def _project(ops: Ops[T], spec: ModelSpec, layer: LayerSpec, x: T, rotary: Rotary[T]) -> tuple[T, T, T]:
    prefix = decoder_layer(layer.index) + "self_attn."
    names = [prefix + "q_proj.weight", prefix + "k_proj.weight"]
    if not layer.value_is_key:
        names.append(prefix + "v_proj.weight")
    projected = ops.linear_scaled(x, decoder_layer(layer.index) + "input_layernorm.weight", *names)
    queries, keys = (prefix + "q_norm.weight", spec.heads), (prefix + "k_norm.weight", layer.kv_heads)
    # Full layers have no value projection: the value is the key projection, normed without weight and not rotated.
    return ops.heads(
        projected,
        layer.head_dim,
        queries,
        keys,
        layer.value_is_key,
        spec.rms_norm_eps,
        rotary.cos,
        rotary.signed_sin,
    )
