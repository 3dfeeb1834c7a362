"""The state of one request: a context that grows by finished canvases, and the tokens of the answer.

A request alternates between encoding (its prompt, then each finished canvas that is not the last) and denoising.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from canvasrt.diffusion.canvas import CanvasState
from canvasrt.diffusion.params import RequestParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request between two calls of the runner.

    ``to_encode`` is what must join the context before the canvas can be denoised; empty while denoising.
    """

    params: RequestParams
    context: int  # tokens encoded so far
    to_encode: NDArray[np.int32]
    canvas: CanvasState  # to denoise next
    draft: CanvasState | None = None  # the canvas that the last step advanced: what a user may be shown
    output: tuple[int, ...] = ()  # answer tokens, without the stop token
    passes: int = 0  # denoising steps run so far
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the token id that ended the answer, if one did

    @property
    def generated(self) -> int:
        """Tokens generated, the stop token included: what tokens per forward counts (reference: all but padding)."""
        return len(self.output) + (self.stop_token is not None)

    @classmethod
    def new(cls, params: RequestParams, prompt: NDArray[np.int32]) -> "RequestState":
        return cls(params, 0, prompt, CanvasState.new(params, 0))

    def encoded(self, count: int) -> "RequestState":
        """After the runner appended the first ``count`` tokens of ``to_encode`` to the context."""
        return replace(self, context=self.context + count, to_encode=self.to_encode[count:])

    def denoised(
        self, argmax: NDArray[np.int32], sampled: NDArray[np.int32], entropy: NDArray[np.float32]
    ) -> "RequestState":
        """After one step. A canvas that is done becomes output, and what to encode next unless the
        request is finished.
        """
        canvas = self.canvas.advanced(self.params, argmax, sampled, entropy)
        state = replace(self, canvas=canvas, draft=canvas, passes=self.passes + 1)
        return state._finished_canvas(argmax) if canvas.done else state

    def stopped(self) -> "RequestState":
        """Ended from outside the token ids, by a stop string: nothing is left to encode."""
        return replace(self, finish_reason="stop", to_encode=self.to_encode[:0])

    def _finished_canvas(self, tokens: NDArray[np.int32]) -> "RequestState":
        """The result of a canvas is its last argmax canvas, cut at the first stop token or at max_tokens."""
        room = self.params.max_tokens - len(self.output)
        found = tokens.tolist()  # one canvas: NumPy's isin() takes longer to start than a set to be asked
        stops = self.params.stop_token_ids
        end = next((index for index, token in enumerate(found) if token in stops), len(found))
        output = (*self.output, *found[: min(end, room)])
        if end < len(found) and end <= room:
            return replace(self, output=output, finish_reason="stop", stop_token=found[end])
        if len(output) == self.params.max_tokens:
            return replace(self, output=output, finish_reason="length")
        following = CanvasState.new(self.params, self.canvas.index + 1)
        return replace(self, output=output, to_encode=tokens, canvas=following)
