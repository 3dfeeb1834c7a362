"""One transformer layer: attention, then dense MLP and experts in parallel on the same residual.

Reference: transformers ``DiffusionGemmaEncoderTextLayer`` and ``DiffusionGemmaDecoderTextLayer``, which differ in the
layer scalar.
"""

from canvasrt.network.attention import Rotary, append_only, attention_block
from canvasrt.network.moe import Moe, expert_layer, gates, route
from canvasrt.network.names import decoder_layer
from canvasrt.network.norm import weighted
from canvasrt.ops.protocol import Cache, Ops, T
from canvasrt.spec import LayerSpec, ModelSpec


def transformer_layer(
    ops: Ops[T],
    spec: ModelSpec,
    layer: LayerSpec,
    x: T,
    rotary: Rotary[T],
    cache: Cache[T],
    scalar: T,
    moe: Moe[T],
    kept: T | None = None,
) -> tuple[T, T | None]:
    """x (rows, tokens, hidden) and its layer scalar, (1,) or (rows, tokens, 1): (new x, tokens of the busiest expert
    where `expert_layer` tells).

    With ``kept``, indices into rows * tokens, only those tokens go on after attention, with scalars of their own: the
    new x is (kept, hidden).
    """
    prefix, eps = decoder_layer(layer.index), spec.rms_norm_eps
    attended = attention_block(ops, spec, layer, ops.rms(x, eps), rotary, cache)
    if kept is not None:
        x, attended = (ops.take_rows(ops.reshape(each, (-1, spec.hidden_size)), kept) for each in (x, attended))
    x = ops.add_scaled(x, ops.rms(attended, eps), prefix + "post_attention_layernorm.weight")
    # Router, experts and MLP read the same residual through three norms that share everything but the weight.
    normed = ops.rms(ops.reshape(x, (-1, spec.hidden_size)), eps)
    names = (
        prefix + "pre_feedforward_layernorm.weight",
        prefix + "mlp.gate_proj.weight",
        prefix + "mlp.up_proj.weight",
    )
    gated, all_experts = gates(ops, layer.index, normed, names, moe)
    mlp = ops.linear(gated, prefix + "mlp.down_proj.weight")
    routing = route(ops, spec, layer.index, normed)
    experts, busiest = expert_layer(ops, spec, layer.index, normed, all_experts, routing, moe)
    both = ops.add_scaled(
        weighted(ops, ops.rms(mlp, eps), prefix + "post_feedforward_layernorm_1.weight"),
        ops.rms(experts, eps),
        prefix + "post_feedforward_layernorm_2.weight",
    )
    normed = ops.reshape_like(ops.rms(both, eps), x)
    x = ops.add_scaled(x, normed, prefix + "post_feedforward_layernorm.weight")
    return ops.multiply(x, scalar), busiest


def context_tail(ops: Ops[T], spec: ModelSpec, layer: LayerSpec, x: T, rotary: Rotary[T], cache: Cache[T]) -> None:
    """The last layer of a call that only fills the context: its K and V, and nothing that nobody reads."""
    append_only(ops, spec, layer, ops.rms(x, spec.rms_norm_eps), rotary, cache)
