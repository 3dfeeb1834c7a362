"""The text network in one form: encoder and decoder are the same layers, told apart by inputs.

Encoder tokens (prompt, finished canvases) and canvas tokens differ in the layer scalar, in the input embedding (only a
canvas token passes through self-conditioning), in the masks and in what the cache shows them; see docs/architecture.md.
Reference: transformers ``modeling_diffusion_gemma.py`` (DiffusionGemmaEncoderTextModel, DiffusionGemmaDecoderModel).
"""

from dataclasses import dataclass
from typing import Generic, Literal

from canvasrt.network.attention import Rotary, append_only
from canvasrt.network.layer import transformer_layer
from canvasrt.network.moe import Moe
from canvasrt.network.names import EMBEDDING, FINAL_NORM, SELF_CONDITIONING, decoder_layer, encoder_scalar
from canvasrt.network.sampler import Filters, Prediction, predict
from canvasrt.ops.protocol import Cache, Ops, T
from canvasrt.spec import LayerKind, ModelSpec

# What the tokens of a call are. "mixed" reads it per token; the others leave out what such tokens do not need.
Phase = Literal["encoder", "decoder", "mixed"]


@dataclass(frozen=True, slots=True)
class Canvas(Generic[T]):
    """What canvas tokens bring beside their ids. A row is one token that goes through head and sampler."""

    # (rows, tokens, hidden): zero at a canvas's first step and for encoder tokens; None: zero everywhere
    soft_embeddings: T | None
    temperature: T  # (head rows, 1) float32
    uniforms: T  # (head rows, 1) float32 in [0, 1)
    filters: Filters[T] | None
    head_rows: T | None  # (head rows,) indices into rows * tokens; None: all of them
    logit_rows: T | None = None  # (n,) indices into the head rows whose logits are wanted; None: all of them
    wants_logits: bool = True  # False: of no row


@dataclass(frozen=True, slots=True)
class TextInputs(Generic[T]):
    """One call: ``rows`` sequences of ``tokens`` tokens each, padded where the rows differ in length."""

    tokens: T  # (rows, tokens) integer
    rotary: dict[LayerKind, Rotary[T]]
    cache: Cache[T]
    canvas: Canvas[T] | None  # None exactly when the phase is "encoder"
    is_canvas: T | None = None  # (rows, tokens, 1) boolean, only for "mixed"
    # The last layer computes only head rows after its attention. For lowerings that can tell that there are any: a
    # compiled kernel may not take none.
    narrows: bool = False


@dataclass(frozen=True, slots=True)
class TextOutputs(Generic[T]):
    prediction: Prediction[T] | None  # None when the phase is "encoder": all it leaves is K and V
    busiest: T | None  # (1, 1) float32, "capacity" only: more than its seats: repeat the call with more


def text_network(ops: Ops[T], spec: ModelSpec, inputs: TextInputs[T], phase: Phase, moe: Moe[T]) -> TextOutputs[T]:
    """Runs or describes one call, depending on the lowering."""
    x = _embed(ops, spec, inputs, phase)
    normed = ops.rms(x, spec.rms_norm_eps)
    busiest: T | None = None
    for layer in spec.layers:
        rotary, is_last = inputs.rotary[layer.kind], layer is spec.layers[-1]
        if phase == "encoder" and is_last:
            append_only(ops, spec, layer, normed, rotary, inputs.cache)  # nobody reads the rest
            break
        kept = inputs.canvas.head_rows if is_last and inputs.narrows and inputs.canvas is not None else None
        scalar = _scalar(ops, layer.index, inputs, phase if kept is None else "decoder")
        x, normed, more = transformer_layer(ops, spec, layer, x, normed, rotary, inputs.cache, scalar, moe, kept)
        if more is not None:
            busiest = more if busiest is None else ops.maximum(busiest, more)
    if inputs.canvas is None:
        return TextOutputs(None, busiest)
    rows = ops.reshape(normed, (-1, spec.hidden_size))
    if inputs.canvas.head_rows is not None and not inputs.narrows:
        rows = ops.take_rows(rows, inputs.canvas.head_rows)
    hidden = ops.scaled(rows, FINAL_NORM)
    canvas = inputs.canvas
    prediction = predict(
        ops,
        spec,
        hidden,
        canvas.temperature,
        canvas.uniforms,
        canvas.filters,
        canvas.logit_rows,
        canvas.wants_logits,
    )
    return TextOutputs(prediction, busiest)


def _embed(ops: Ops[T], spec: ModelSpec, inputs: TextInputs[T], phase: Phase) -> T:
    x = ops.multiply(ops.embedding(inputs.tokens, EMBEDDING), ops.rounded(spec.hidden_size**0.5))
    if inputs.canvas is None:
        return x
    # The norm without weight applies at the first step too, where there is no signal.
    total = x
    if inputs.canvas.soft_embeddings is not None:
        total = ops.add(x, _signal(ops, spec, inputs.canvas.soft_embeddings))
    conditioned = ops.cast(ops.rms(total, spec.rms_norm_eps), "model")
    return conditioned if inputs.is_canvas is None else ops.where(inputs.is_canvas, conditioned, x)


def _signal(ops: Ops[T], spec: ModelSpec, soft_embeddings: T) -> T:
    """What the last step's prediction adds to the embeddings: nothing where it is zero."""
    normed = ops.rms(soft_embeddings, spec.rms_norm_eps)
    gated = ops.gated_linear(
        normed,
        SELF_CONDITIONING + "pre_norm.weight",
        SELF_CONDITIONING + "gate_proj.weight",
        SELF_CONDITIONING + "up_proj.weight",
    )
    return ops.linear(gated, SELF_CONDITIONING + "down_proj.weight")


def _scalar(ops: Ops[T], layer: int, inputs: TextInputs[T], phase: Phase) -> T:
    own, other = encoder_scalar(layer), decoder_layer(layer) + "layer_scalar"
    if phase == "encoder":
        return ops.weight(own)
    if phase == "decoder":
        return ops.weight(other)
    if inputs.is_canvas is None:
        raise ValueError("a mixed call needs is_canvas")
    return ops.where(inputs.is_canvas, ops.weight(other), ops.weight(own))
