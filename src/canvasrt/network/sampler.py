"""The part of a denoising step that needs the vocabulary: softcap, temperature, filters, sampling, entropy, soft
embedding.

Reference: transformers ``DiffusionGemmaForBlockDiffusion.forward`` and
``DiffusionGemmaGenerationMixin._denoising_step``. Logits never need to leave the graph: what leaves is one token, one
argmax, one entropy and one soft embedding per row.

Sampling inverts the cumulative distribution at a uniform number from the host, so that it needs no random generator in
the graph: over a large vocabulary in two levels (blocks of about sqrt(vocabulary), then inside one block), which needs
no scan over all of it. A lowering that scans fast has the whole of it in one piece (``Ops.draw``).
"""

import math
from collections.abc import Callable
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
    """Nucleus and top-k limits of the **last** rows, (limited rows, 1) float32; the rows before have none.

    No limit: the vocabulary's size, and a top_p above 1.
    """

    top_k: T
    top_p: T


@dataclass(frozen=True, slots=True)
class Prediction(Generic[T]):
    """What a denoising step says about each canvas row."""

    argmax: T  # (rows,) integer
    sampled: T  # (rows,) integer
    entropy: T  # (rows,) float32, nats
    soft_embeddings: T  # (rows, hidden), the self-conditioning input of the next step
    # (rows that were asked for, vocabulary) float32, softcapped, not divided by the temperature; None: nobody asked
    logits: T | None


def predict(
    ops: Ops[T],
    spec: ModelSpec,
    hidden: T,
    temperature: T,
    uniforms: T,
    filters: Filters[T] | None,
    logit_rows: T | None = None,
    wants_logits: bool = True,
) -> Prediction[T]:
    """hidden (rows, hidden) after the final norm; temperature and uniforms in [0, 1) are (rows, 1) float32.

    Filters act on the temperature-scaled distribution, in the order top-k, top-p (as transformers and vLLM do), and
    shape everything that follows from it: the sample, the entropy and the soft embedding.
    """
    raw = ops.linear(hidden, EMBEDDING)
    limits = None if filters is None else (filters.top_k, filters.top_p)
    drawn = ops.draw(raw, spec.softcap, temperature, uniforms, limits, BISECTIONS)
    if drawn is None:
        drawn = _draw(ops, spec, raw, temperature, uniforms, filters)
    argmax, sampled, entropy, shares = drawn
    soft = ops.linear_transposed(ops.cast(shares, "model"), EMBEDDING)
    logits = None
    if wants_logits:
        logits = _softcapped(ops, spec, raw if logit_rows is None else ops.take_rows(raw, logit_rows))
    soft = ops.multiply(soft, ops.rounded(spec.hidden_size**0.5))
    return Prediction(argmax, sampled, entropy, soft, logits)


def _draw(
    ops: Ops[T], spec: ModelSpec, raw: T, temperature: T, uniforms: T, filters: Filters[T] | None
) -> tuple[T, T, T, T]:
    """What ``Ops.draw`` gives."""
    scaled = ops.divide(_softcapped(ops, spec, raw), temperature)
    largest = ops.max(scaled, axis=1)
    least: T | None = None
    if filters is not None:
        parts = [ops.split_rows(each, filters.top_k) for each in (raw, temperature, largest)]
        (_, limited), (_, hot), (free, top) = parts
        found = _least_kept(ops, ops.subtract(ops.divide(_softcapped(ops, spec, limited), hot), top), filters)
        least = ops.concat([ops.add(ops.multiply(free, 0.0), REMOVED), found], axis=0)
    shifted = _kept(ops, ops.subtract(scaled, largest), least)  # <= 0
    weights = ops.exp(shifted)
    total = ops.sum(weights, axis=1)
    share = ops.divide(ops.sum(ops.multiply(weights, shifted), axis=1), total)

    def weights_of(columns: T) -> T:
        """The weights of some columns of ``raw``, (rows, blocks, n).

        Computed again where they are needed: a compiler then reads two bytes per logit in every pass over the
        vocabulary, and keeps no float32 copy of it.
        """
        hot, top = (ops.reshape(each, (-1, 1, 1)) for each in (temperature, largest))
        below = ops.subtract(ops.divide(_softcapped(ops, spec, columns), hot), top)
        return ops.exp(_kept(ops, below, None if least is None else ops.reshape(least, (-1, 1, 1))))

    return (
        ops.argmax(raw),  # softcap and temperature keep the order
        _inverse_cdf(ops, spec.vocab_size, raw, weights, weights_of, uniforms),
        ops.reshape(ops.subtract(ops.log(total), share), (-1,)),
        ops.divide(weights, total),
    )


def _softcapped(ops: Ops[T], spec: ModelSpec, raw: T) -> T:
    raw = ops.cast(raw, "float32")
    return ops.multiply(ops.tanh(ops.divide(raw, spec.softcap)), spec.softcap)


def _inverse_cdf(ops: Ops[T], vocabulary: int, raw: T, weights: T, weights_of: Callable[[T], T], uniforms: T) -> T:
    """The token at which the cumulative sum of weights (rows, vocabulary) passes uniforms * total: (rows,).

    ``weights_of`` makes the same weights of columns of ``raw`` (rows, vocabulary), (rows, blocks, n) both.
    """
    if vocabulary <= ONE_LEVEL:
        steps = ops.cumulative_sum(weights, axis=1)
        target = ops.multiply(ops.multiply(uniforms, BELOW_ONE), ops.max(steps, axis=1))
        return ops.to_int(ops.reshape(ops.sum(ops.to_float(ops.less_equal(steps, target)), axis=1), (-1,)))
    width = _block_width(vocabulary)
    count = vocabulary // width
    table = ops.reshape(raw, (-1, count, width))
    sums = ops.reshape(ops.sum(weights_of(table), axis=2), (-1, count))
    edges = ops.cumulative_sum(sums, axis=1)
    target = ops.multiply(ops.multiply(uniforms, BELOW_ONE), ops.max(edges, axis=1))
    block = ops.sum(ops.to_float(ops.less_equal(edges, target)), axis=1)  # (rows, 1): edges at or below the target
    chosen = ops.reshape(ops.one_hot(ops.to_int(block), count), (-1, count))
    before = ops.sum(ops.multiply(chosen, ops.subtract(edges, sums)), axis=1)
    place = ops.add(ops.multiply(ops.row_numbers(block), float(count)), ops.reshape(block, (-1,)))
    columns = ops.take_rows(ops.reshape(table, (-1, width)), ops.to_int(place))
    steps = ops.cumulative_sum(ops.reshape(weights_of(ops.reshape(columns, (-1, 1, width))), (-1, width)), axis=1)
    # Rounding can put the rest outside the block's mass on either side, where a token of probability 0 may stand.
    rest = ops.maximum(ops.subtract(target, before), 0.0)
    rest = ops.minimum(rest, ops.multiply(ops.max(steps, axis=1), BELOW_ONE))
    column = ops.sum(ops.to_float(ops.less_equal(steps, rest)), axis=1)
    return ops.to_int(ops.reshape(ops.add(ops.multiply(block, float(width)), column), (-1,)))


def _block_width(vocabulary: int) -> int:
    """The divisor nearest above the square root."""
    return next(width for width in range(math.isqrt(vocabulary - 1) + 1, vocabulary + 1) if vocabulary % width == 0)


def _least_kept(ops: Ops[T], shifted: T, filters: Filters[T]) -> T:
    """The threshold of each row (rows, 1): top-k, then top-p, keep what is at or above it; ties stay.

    Both are found by bisection on the logit, which needs only comparisons and sums over the vocabulary: a sort of
    262,144 values per row builds on no TensorRT target (TopK stops at 3,840).
    """
    ones = ops.add(ops.multiply(shifted, 0.0), 1.0)
    by_rank = _above(ops, shifted, ones, filters.top_k)
    weights = ops.exp(_kept(ops, shifted, by_rank))
    by_mass = _above(ops, shifted, weights, ops.multiply(filters.top_p, ops.sum(weights, axis=1)))
    return ops.maximum(by_rank, by_mass)


def _kept(ops: Ops[T], shifted: T, least: T | None) -> T:
    return shifted if least is None else ops.where(ops.less_equal(least, shifted), shifted, REMOVED)


def _above(ops: Ops[T], shifted: T, measure: T, wanted: T) -> T:
    """The largest threshold from which on the entries' ``measure`` adds up to at least ``wanted``: (rows, 1)."""
    zero = ops.multiply(wanted, 0.0)
    low, high = ops.subtract(zero, 160.0), zero  # exp(-160) is 0 in float32: below it nothing is worth keeping apart
    for _ in range(BISECTIONS):
        middle = ops.multiply(ops.add(low, high), 0.5)
        kept = ops.sum(ops.multiply(measure, ops.to_float(ops.less_equal(middle, shifted))), axis=1)
        enough = ops.less_equal(wanted, kept)
        low, high = ops.where(enough, middle, low), ops.where(enough, high, middle)
    return low
