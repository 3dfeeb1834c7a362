"""Compares two runners on the same requests: every step on the same canvas, then each on its own.

Knows nothing of quantization, of devices or of text: a runner is anything that implements EngineRunner.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.protocol import DenoiseResult, EncodeRow, EngineRunner
from canvasrt.runtime.rows import denoise_row

Floats = NDArray[np.float32]
Outputs = list[tuple[int, ...]]

_ROWS = 64  # canvas rows whose probabilities are held at once, in float64


@dataclass(frozen=True, slots=True)
class Comparison:
    """Means over all positions of all steps, but for the steps per canvas, which are of free runs."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a report is validated with it

    kl: float  # nats per position: KL(source || other) of the distributions at the step's temperature
    kl_median: float  # the same, median over requests of the request's mean: one lost canvas does not move it
    top1_agreement: float  # share of positions whose most likely token is the same
    entropy_difference: float  # nats per position, other - source
    steps_per_canvas: float  # of the other
    source_steps_per_canvas: float
    positions: int  # compared, over all steps and requests


@dataclass(frozen=True, slots=True)
class Compared:
    comparison: Comparison
    source_outputs: Outputs  # answer tokens of each request
    outputs: Outputs


def compare(
    source: EngineRunner, other: EngineRunner, requests: Sequence[RequestState], advance: Callable[[], None]
) -> Compared:
    """Runs each request three times: on both with the source's canvases, and on the other with its own.

    ``advance`` is called once per request. On the source's canvases both see the same tokens at every step, while each
    keeps its own self-conditioning signal: a difference is the checkpoint's, and not that of an earlier draw.
    """
    if source is other:
        raise ValueError("the two runners share a slot's self-conditioning signal: open two")
    means: list[float] = []
    sums = np.zeros(3)
    positions = 0
    source_outputs, outputs = [], []
    steps, canvases = np.zeros(2), np.zeros(2)
    for request in requests:
        final, parts = _together(source, other, request)
        own = _alone(other, request)
        means.append(sum(part[0] for part in parts) / (len(parts) * request.params.canvas))
        for part in parts:
            sums += part
            positions += request.params.canvas
        for index, state in enumerate((final, own)):
            steps[index] += state.passes
            canvases[index] += state.canvas.index + 1
        source_outputs.append(final.output)
        outputs.append(own.output)
        advance()
    kl, same, entropy = sums / positions
    per_canvas = steps / canvases
    result = Comparison(
        kl=float(kl),
        kl_median=float(np.median(means)),
        top1_agreement=float(same),
        entropy_difference=float(entropy),
        steps_per_canvas=float(per_canvas[1]),
        source_steps_per_canvas=float(per_canvas[0]),
        positions=positions,
    )
    return Compared(result, source_outputs, outputs)


def _together(
    source: EngineRunner, other: EngineRunner, state: RequestState
) -> tuple[RequestState, list[NDArray[np.float64]]]:
    """The source's final state, and the sums of KL, agreement and entropy difference of each step."""
    runners, parts = (source, other), []
    try:
        while state.finish_reason is None:
            if len(state.to_encode):
                for runner in runners:
                    runner.encode([EncodeRow(0, state.to_encode, state.context)])
                state = state.encoded(len(state.to_encode))
            row = denoise_row(0, state, want_logits=True)
            expected, found = (runner.denoise([row])[0] for runner in runners)
            parts.append(_step(expected, found, row.temperature))
            state = state.denoised(expected.argmax, expected.sampled, expected.entropy)
    finally:
        for runner in runners:
            runner.release(0)
    return state, parts


def _alone(runner: EngineRunner, request: RequestState) -> RequestState:
    return next(event.state for event in run_requests(runner, {0: request}) if event.kind == "end")


def _step(expected: DenoiseResult, found: DenoiseResult, temperature: float) -> NDArray[np.float64]:
    assert expected.logits is not None  # asked for
    assert found.logits is not None
    kl = 0.0
    for start in range(0, len(expected.argmax), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = _log_softmax(expected.logits[rows], temperature)
        kl += float((np.exp(log_p) * (log_p - _log_softmax(found.logits[rows], temperature))).sum())
    same = float((expected.argmax == found.argmax).sum())
    entropy = float((found.entropy.astype(np.float64) - expected.entropy).sum())
    return np.array([kl, same, entropy])


def _log_softmax(logits: Floats, temperature: float) -> NDArray[np.float64]:
    scaled = logits.astype(np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
