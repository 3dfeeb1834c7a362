"""Rows from the states of requests, and the checks that every runner makes of rows before it touches its own state."""

import math
from collections.abc import Sequence

import numpy as np

from canvasrt.diffusion.request import RequestState
from canvasrt.errors import CapacityError, InputError
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow, RunnerLimits


def denoise_row(slot: int, state: RequestState, want_logits: bool = False) -> DenoiseRow:
    """The next step of a request whose context is encoded."""
    params, canvas = state.params, state.canvas
    return DenoiseRow(
        slot=slot,
        canvas=canvas.tokens,
        temperature=canvas.temperature(params),
        uniforms=canvas.uniforms(params),
        first=canvas.step == params.max_denoising_steps,
        top_k=params.top_k,
        top_p=params.top_p,
        want_logits=want_logits,
    )


def check_encode(limits: RunnerLimits, lengths: Sequence[int], rows: Sequence[EncodeRow]) -> None:
    """Raises InputError for a malformed row, CapacityError for one that does not fit.

    ``lengths``: tokens held per slot.
    """
    _check_slots(limits, [row.slot for row in rows])
    for row in rows:
        if row.tokens.ndim != 1 or len(row.tokens) == 0:
            raise InputError(f"slot {row.slot}: a row to encode needs at least one token (shape {row.tokens.shape})")
        _check_tokens(limits, row.slot, row.tokens)
        if not 0 <= row.position <= lengths[row.slot]:
            raise InputError(
                f"slot {row.slot} holds {lengths[row.slot]} tokens; the next can't be at position {row.position}"
            )
        end = row.position + len(row.tokens)
        if end > limits.context:
            raise CapacityError(
                f"slot {row.slot}: {end} tokens exceed the context of {limits.context}. Send a shorter prompt or open "
                f"the runner with a context of at least {end}."
            )


def check_denoise(limits: RunnerLimits, lengths: Sequence[int], rows: Sequence[DenoiseRow]) -> None:
    """Raises InputError for a malformed row, CapacityError when the canvas does not fit behind the context."""
    _check_slots(limits, [row.slot for row in rows])
    shape = (limits.canvas,)
    for row in rows:
        held = lengths[row.slot]
        if held == 0:
            raise InputError(f"slot {row.slot} is empty: encode a prompt of at least one token before denoising")
        if row.canvas.shape != shape or row.uniforms.shape != shape:
            raise InputError(
                f"slot {row.slot}: canvas {row.canvas.shape} and uniforms {row.uniforms.shape} must both be {shape}"
            )
        _check_tokens(limits, row.slot, row.canvas)
        if not (row.uniforms.min() >= 0 and row.uniforms.max() < 1):
            raise InputError(f"slot {row.slot}: uniforms must lie in [0, 1)")
        if not (math.isfinite(row.temperature) and row.temperature > 0):
            raise InputError(f"slot {row.slot}: the temperature must be a positive number, not {row.temperature}")
        if row.top_k < 0 or not 0 < row.top_p <= 1:
            raise InputError(f"slot {row.slot}: top_k >= 0 and 0 < top_p <= 1 expected, not {row.top_k}, {row.top_p}")
        if held + limits.canvas > limits.context:
            raise CapacityError(
                f"slot {row.slot}: {held} context tokens and a canvas of {limits.canvas} exceed the context of "
                f"{limits.context}. Ask for fewer tokens or open the runner with a larger context."
            )


def is_limited(row: DenoiseRow, vocabulary: int) -> bool:
    """Whether top-k or top-p takes tokens away: filters cost a third of a step, so rows without them skip them."""
    return row.top_k not in (0, vocabulary) or row.top_p < 1


def filter_limits(row: DenoiseRow, vocabulary: int) -> tuple[float, float]:
    """top-k and top-p as the network's filters take them."""
    # 2: rounded sums of probabilities can reach 1 before the last token, and a row without a limit must lose none
    return float(min(row.top_k or vocabulary, vocabulary)), row.top_p if row.top_p < 1 else 2.0


def check_slot(limits: RunnerLimits, slot: int) -> None:
    """Raises InputError for a slot that the runner does not have; a negative one would silently mean another."""
    if not 0 <= slot < limits.slots:
        raise InputError(f"slot {slot} does not exist: this runner has {limits.slots} slots, counted from 0")


def _check_slots(limits: RunnerLimits, slots: list[int]) -> None:
    for slot in slots:
        check_slot(limits, slot)
    if len(set(slots)) != len(slots):
        raise InputError(f"a slot appears twice in one call: {sorted(slots)}")


def _check_tokens(limits: RunnerLimits, slot: int, tokens: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> None:
    if tokens.dtype != np.int32:
        raise InputError(f"slot {slot}: token ids must be int32, not {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= limits.vocabulary:
        bad = low if low < 0 else high
        raise InputError(f"slot {slot}: token id {bad} is outside the vocabulary of {limits.vocabulary}")
