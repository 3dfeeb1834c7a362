"""One transformer layer: attention, then dense MLP and experts in parallel on the same residual.

Reference: transformers ``DiffusionGemmaEncoderTextLayer`` and ``DiffusionGemmaDecoderTextLayer``, which differ in the
layer scalar.
"""

from dataclasses import dataclass

from canvasrt.network.attention import Rotary, append_only, attention_block
from canvasrt.network.moe import Formulation, expert_layer, route
from canvasrt.network.names import decoder_layer
from canvasrt.ops.protocol import Cache, Ops, T
from canvasrt.spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class MoeChoice:
    """How the expert layer is computed.

    A GPU profile decides. ``capacity`` is in tokens per expert, for "capacity" only.
    """

    formulation: Formulation
    capacity: int = 0


def norm(ops: Ops[T], spec: ModelSpec, x: T, name: str) -> T:
    """RMSNorm with weight: float32 inside, the model's precision outside (reference: DiffusionGemmaRMSNorm)."""
    return weighted(ops, ops.rms(x, spec.rms_norm_eps), name)


def weighted(ops: Ops[T], normed: T, name: str) -> T:
    return ops.cast(ops.multiply(normed, ops.weight(name, "float32")), "model")


def transformer_layer(
    ops: Ops[T],
    spec: ModelSpec,
    layer: LayerSpec,
    x: T,
    rotary: Rotary[T],
    mask: T | None,
    cache: Cache[T],
    scalar: T,
    moe: MoeChoice,
) -> tuple[T, T | None]:
    """x (rows, tokens, hidden) and its layer scalar, (1,) or (rows, tokens, 1): (new x, tokens over MoE capacity)."""
    prefix, eps = decoder_layer(layer.index), spec.rms_norm_eps
    attended = attention_block(ops, spec, layer, ops.rms(x, eps), rotary, mask, cache)
    x = ops.add_scaled(x, ops.rms(attended, eps), prefix + "post_attention_layernorm.weight")
    # Router, experts and MLP read the same residual through three norms that share everything but the weight.
    normed = ops.rms(ops.reshape(x, (-1, spec.hidden_size)), eps)
    mlp = ops.linear_scaled(
        normed,
        prefix + "pre_feedforward_layernorm.weight",
        prefix + "mlp.gate_proj.weight",
        prefix + "mlp.up_proj.weight",
    )
    mlp = ops.linear(ops.gated_gelu(mlp), prefix + "mlp.down_proj.weight")
    expert_input = weighted(ops, normed, prefix + "pre_feedforward_layernorm_2.weight")
    routing = route(ops, spec, layer.index, normed)
    experts, over = expert_layer(ops, spec, layer.index, expert_input, routing, moe.formulation, moe.capacity)
    both = ops.add_scaled(
        weighted(ops, ops.rms(mlp, eps), prefix + "post_feedforward_layernorm_1.weight"),
        ops.rms(experts, eps),
        prefix + "post_feedforward_layernorm_2.weight",
    )
    normed = ops.reshape_like(ops.rms(both, eps), x)
    x = ops.add_scaled(x, normed, prefix + "post_feedforward_layernorm.weight")
    return ops.multiply(x, scalar), over


def context_tail(ops: Ops[T], spec: ModelSpec, layer: LayerSpec, x: T, rotary: Rotary[T], cache: Cache[T]) -> None:
    """The last layer of a call that only fills the context: its K and V, and nothing that nobody reads."""
    append_only(ops, spec, layer, ops.rms(x, spec.rms_norm_eps), rotary, cache)
