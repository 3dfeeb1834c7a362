"""One transformer layer: attention, then dense MLP and experts in parallel on the same residual.

Reference: transformers ``DiffusionGemmaEncoderTextLayer`` and ``DiffusionGemmaDecoderTextLayer``, which differ in the
layer scalar.
"""

from canvasrt.network.attention import Rotary, attention_block
from canvasrt.network.moe import Moe, expert_layer, gates, router_scores
from canvasrt.network.names import decoder_layer
from canvasrt.ops.protocol import Cache, Ops, T
from canvasrt.spec import LayerSpec, ModelSpec


def transformer_layer(
    ops: Ops[T],
    spec: ModelSpec,
    layer: LayerSpec,
    x: T,
    normed: T,
    rotary: Rotary[T],
    cache: Cache[T],
    scalar: T,
    moe: Moe[T],
    kept: T | None = None,
) -> tuple[T, T, T | None]:
    """x (rows, tokens, hidden), its norm without weight, and its layer scalar, (1,) or (rows, tokens, 1): (new x, its
    norm, tokens of the busiest expert where `expert_layer` tells).

    With ``kept``, indices into rows * tokens, only those tokens go on after attention, with scalars of their own: the
    new x is (kept, hidden).
    """
    prefix, eps = decoder_layer(layer.index), spec.rms_norm_eps
    attended = attention_block(ops, spec, layer, normed, rotary, cache)
    if kept is not None:
        x, attended = (ops.take_rows(ops.reshape(each, (-1, spec.hidden_size)), kept) for each in (x, attended))
    x, normed = ops.add_normed(x, attended, prefix + "post_attention_layernorm.weight", eps)
    # Router, experts and MLP read the same residual through three norms that share everything but the weight.
    normed = ops.reshape(normed, (-1, spec.hidden_size))
    names = (
        prefix + "pre_feedforward_layernorm.weight",
        prefix + "mlp.gate_proj.weight",
        prefix + "mlp.up_proj.weight",
    )
    gated, all_experts = gates(ops, layer.index, normed, names, moe)
    mlp = ops.linear(gated, prefix + "mlp.down_proj.weight")
    scores = router_scores(ops, spec, layer.index, normed)
    experts, busiest = expert_layer(ops, spec, layer.index, normed, all_experts, scores, moe)
    norms = (
        prefix + "post_feedforward_layernorm_1.weight",
        prefix + "post_feedforward_layernorm_2.weight",
        prefix + "post_feedforward_layernorm.weight",
    )
    x, normed = ops.add_branches(x, (mlp, experts), norms, scalar, eps)
    return x, normed, busiest
