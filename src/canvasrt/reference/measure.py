"""Measures transformers' ``generate`` on the same requests, into the same tally as canvasrt.runtime.measure."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from canvasrt.diffusion.params import RequestParams
from canvasrt.reference.model import ReferenceModel
from canvasrt.reference.noise import shared_noise
from canvasrt.runtime.measure import Tally


class _Streamer:
    """Listens to generate(): it puts the prompt, a draft after every step, and every finished canvas."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.puts = 0
        self.steps = 0
        self.step_seconds = 0.0
        self.first_canvas = 0.0
        self._in_canvas = False

    def put(self, value: Any) -> None:
        self.puts += 1
        self.last = time.perf_counter()
        self._in_canvas = False  # the time to the next draft includes encoding: not a step alone
        if self.puts == 2:
            self.first_canvas = self.last - self.started

    def put_draft(self, value: Any) -> None:
        now = time.perf_counter()
        if self._in_canvas:
            self.steps += 1
            self.step_seconds += now - self.last
        self._in_canvas, self.last = True, now

    def end(self) -> None:
        pass


def measure_reference(
    model: ReferenceModel, prompts: Sequence[NDArray[np.int32]], params: Sequence[RequestParams], tally: Tally
) -> list[list[int]]:
    """Generates for all prompts as one left-padded batch, with the noise of ``params``, and adds to ``tally``.

    Returns the answers without stop tokens and padding. All of ``params`` but the seeds must be equal. A step is timed
    from draft to draft.
    """
    with shared_noise(params):
        streamer = _Streamer()
        answers = model.generate(prompts, params[0], streamer)
    tally.seconds += time.perf_counter() - streamer.started
    tally.denoise_seconds += streamer.step_seconds
    tally.calls += streamer.steps
    tally.requests += len(answers)
    outputs = []
    for answer, each in zip(answers, params, strict=True):
        stops = [index for index, token in enumerate(answer.tokens) if token in each.stop_token_ids]
        outputs.append(answer.tokens[: stops[0]] if stops else answer.tokens[: each.max_tokens])
        tokens = len(outputs[-1]) + bool(stops)
        tally.tokens += tokens
        tally.canvases += -(-tokens // each.canvas)
        tally.passes += round(answer.passes)
    tally.first_canvas_seconds += [streamer.first_canvas] * len(answers)
    return outputs
