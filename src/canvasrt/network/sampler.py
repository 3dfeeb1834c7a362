"""The part of a denoising step that needs the vocabulary: softcap, temperature, filters, sampling, entropy, soft
embedding.

Reference: transformers ``DiffusionGemmaForBlockDiffusion.forward`` and
``DiffusionGemmaGenerationMixin._denoising_step``. Logits never need to leave the graph: what leaves is one token, one
argmax, one entropy and one soft embedding per row.

Sampling inverts the cumulative distribution at a uniform number from the host in two levels (blocks of about
sqrt(vocabulary), then inside one block), so that it needs no random generator in the graph and no scan over the
vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Generic

from canvasrt.network.names import EMBEDDING
from canvasrt.ops.protocol import Ops, T
from canvasrt.spec import ModelSpec

# A float just below 1: keeps the target of the inverse CDF below the total after rounding, else a token of probability
# 0 at the end of the vocabulary could be drawn.
BELOW_ONE = 1.0 - 2.0**-23
# Halvings of the interval [-160, 0] that a threshold is searched in: down to 6e-7.
BISECTIONS = 28
ONE_LEVEL = 512  # vocabulary up to which a scan over all of it is as short as those of the two levels
REMOVED = -1e30  # exp() of it is 0, and 0 * it is 0 where 0 * -inf would be NaN


@dataclass(frozen=True, slots=True)
class Filters(Generic[T]):
    """Nucleus and top-k limits per row, (rows, 1) float32; no limit: the vocabulary's size, and a top_p above 1."""

    top_k: T
    top_p: T


@dataclass(frozen=True, slots=True)
class Prediction(Generic[T]):
    """What a denoising step says about each canvas row."""

    argmax: T  # (rows,) integer
    sampled: T  # (rows,) integer
    entropy: T  # (rows,) float32, nats
    soft_embeddings: T  # (rows, hidden), the self-conditioning input of the next step
    logits: T  # (rows, vocabulary) float32, softcapped, not divided by the temperature


def predict(
    ops: Ops[T], spec: ModelSpec, hidden: T, temperature: T, uniforms: T, filters: Filters[T] | None
) -> Prediction[T]:
    """hidden (rows, hidden) after the final norm; temperature and uniforms in [0, 1) are (rows, 1) float32.

    Filters act on the temperature-scaled distribution, in the order top-k, top-p (as transformers and vLLM do), and
    shape everything that follows from it: the sample, the entropy and the soft embedding.
    """
    raw = ops.cast(ops.linear(hidden, EMBEDDING), "float32")
    logits = ops.multiply(ops.tanh(ops.divide(raw, spec.softcap)), spec.softcap)
    scaled = ops.divide(logits, temperature)
    largest = ops.max(scaled, axis=-1)
    shifted = ops.subtract(scaled, largest)  # <= 0
    if filters is not None:
        shifted = _filtered(ops, shifted, filters)
    weights = ops.exp(shifted)
    total = ops.sum(weights, axis=-1)
    probabilities = ops.divide(weights, total)
    entropy = ops.subtract(ops.log(total), ops.sum(ops.multiply(probabilities, shifted), axis=-1))
    soft = ops.linear_transposed(ops.cast(probabilities, "model"), EMBEDDING)
    return Prediction(
        argmax=ops.argmax(scaled),
        sampled=_inverse_cdf(ops, spec.vocab_size, weights, uniforms),
        entropy=ops.reshape(entropy, (-1,)),
        soft_embeddings=ops.multiply(soft, ops.rounded(spec.hidden_size**0.5)),
        logits=logits,
    )


def _inverse_cdf(ops: Ops[T], vocabulary: int, weights: T, uniforms: T) -> T:
    """The token at which the cumulative sum of ``weights`` (rows, vocabulary) passes uniforms * total: (rows,)."""
    if vocabulary <= ONE_LEVEL:
        sums = ops.cumulative_sum(weights, axis=1)
        target = ops.multiply(ops.multiply(uniforms, BELOW_ONE), ops.max(sums, axis=1))
        passed = ops.sum(ops.to_float(ops.less_equal(sums, target)), axis=1)
        return ops.to_int(ops.reshape(passed, (-1,)))
    width = math.ceil(math.sqrt(vocabulary))
    blocks = math.ceil(vocabulary / width)
    padded = ops.pad_last(weights, blocks * width - vocabulary) if blocks * width > vocabulary else weights
    table = ops.reshape(padded, (-1, blocks, width))
    sums = ops.reshape(ops.sum(table, axis=2), (-1, blocks))
    edges = ops.cumulative_sum(sums, axis=1)
    target = ops.multiply(ops.multiply(uniforms, BELOW_ONE), ops.max(edges, axis=1))
    block = ops.sum(ops.to_float(ops.less_equal(edges, target)), axis=1)  # (rows, 1): edges at or below the target
    chosen = ops.reshape(ops.one_hot(ops.to_int(block), blocks), (-1, blocks))
    before = ops.sum(ops.multiply(chosen, ops.subtract(edges, sums)), axis=1)
    inside = ops.reshape(ops.sum(ops.multiply(table, ops.reshape(chosen, (0, blocks, 1))), axis=1), (-1, width))
    steps = ops.cumulative_sum(inside, axis=1)
    # Rounding can put the rest outside the block's mass on either side, where a token of probability 0 may stand.
    rest = ops.maximum(ops.subtract(target, before), 0.0)
    rest = ops.minimum(rest, ops.multiply(ops.max(steps, axis=1), BELOW_ONE))
    column = ops.sum(ops.to_float(ops.less_equal(steps, rest)), axis=1)
    return ops.to_int(ops.reshape(ops.add(ops.multiply(block, float(width)), column), (-1,)))


def _filtered(ops: Ops[T], shifted: T, filters: Filters[T]) -> T:
    """Removes what top-k, then top-p, exclude; ties at the threshold stay.

    Both thresholds are found by bisection on the logit, which needs only comparisons and sums over the vocabulary: a
    sort of 262,144 values per row builds on no TensorRT target (TopK stops at 3,840).
    """
    ones = ops.add(ops.multiply(shifted, 0.0), 1.0)
    shifted = _above(ops, shifted, ones, filters.top_k)
    weights = ops.exp(shifted)
    return _above(ops, shifted, weights, ops.multiply(filters.top_p, ops.sum(weights, axis=-1)))


def _above(ops: Ops[T], shifted: T, measure: T, wanted: T) -> T:
    """Keeps the smallest set of largest entries whose ``measure`` adds up to at least ``wanted`` (rows, 1)."""
    zero = ops.multiply(wanted, 0.0)
    low, high = ops.subtract(zero, 160.0), zero  # exp(-160) is 0 in float32: below it nothing is worth keeping apart
    for _ in range(BISECTIONS):
        middle = ops.multiply(ops.add(low, high), 0.5)
        kept = ops.sum(ops.multiply(measure, ops.to_float(ops.less_equal(middle, shifted))), axis=-1)
        enough = ops.less_equal(wanted, kept)
        low, high = ops.where(enough, middle, low), ops.where(enough, high, middle)
    return ops.where(ops.less_equal(low, shifted), shifted, REMOVED)
