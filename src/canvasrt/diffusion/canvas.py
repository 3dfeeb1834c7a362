"""The state of one canvas while it is denoised: values in, values out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.rule import accept, is_stable, temperature


@dataclass(frozen=True, slots=True)
class CanvasState:
    """A canvas between two steps. ``step`` is the step to run next, counted down from N; 0 when all have run."""

    index: int  # of the canvas within its request
    step: int
    tokens: NDArray[np.int32]  # (canvas,) the input of the next step
    argmax: NDArray[np.int32] | None  # (canvas,) of the last step: the draft
    accepted: NDArray[np.bool_] | None  # (canvas,) positions settled by the last step, for display only
    history: tuple[NDArray[np.int32], ...]  # earlier argmax canvases, as many as the stop rule looks at
    done: bool

    @classmethod
    def new(cls, params: RequestParams, index: int) -> "CanvasState":
        """Uniform noise over the whole vocabulary."""
        steps = params.max_denoising_steps
        noise = step_noise(params.seed, index, steps + 1, params.canvas, params.vocabulary)
        return cls(index, steps, noise.tokens, None, None, (), False)

    def temperature(self, params: RequestParams) -> float:
        return temperature(params.t_min, params.t_max, self.step, params.max_denoising_steps)

    def uniforms(self, params: RequestParams) -> NDArray[np.float32]:
        """(canvas,) numbers in [0, 1) that this step samples its tokens with."""
        return step_noise(params.seed, self.index, self.step, params.canvas, params.vocabulary).uniforms

    def advanced(
        self,
        params: RequestParams,
        argmax: NDArray[np.int32],
        sampled: NDArray[np.int32],
        entropy: NDArray[np.float32],
    ) -> "CanvasState":
        """The state after this step's prediction, all three (canvas,): accept, renoise, and decide whether to stop."""
        accepted = accept(entropy, params.entropy_bound)
        renoised = step_noise(params.seed, self.index, self.step, params.canvas, params.vocabulary).tokens
        mean = float(np.add.reduce(entropy, dtype=np.float32) / np.float32(len(entropy)))  # mean() takes 10 us more
        confident = mean < params.confidence_threshold
        stopped = confident and is_stable(argmax, self.history, params.stability_threshold)
        history = (*self.history, argmax)[-params.stability_threshold :] if params.stability_threshold else ()
        return CanvasState(
            index=self.index,
            step=self.step - 1,
            tokens=np.where(accepted, sampled, renoised),
            argmax=argmax,
            accepted=accepted,
            history=history,
            done=stopped or self.step == 1,
        )
