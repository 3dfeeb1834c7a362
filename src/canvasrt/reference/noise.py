"""Makes transformers' ``generate`` draw the noise that our requests draw, so that both must write the same tokens.

generate() calls torch.randint once for a new canvas and once after every torch.multinomial; nothing else is random.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch

from canvasrt.diffusion.noise import StepNoise, step_noise
from canvasrt.diffusion.params import RequestParams


class _Script:
    """Follows generate() through its canvases and steps; row b of the batch draws the noise of ``params[b]``."""

    def __init__(self, params: Sequence[RequestParams]) -> None:
        self._params = params
        self._canvas, self._step = -1, 0
        self._noise: list[StepNoise] = []
        self._sampled = False

    def randint(self, low: int, high: int, size: Sequence[int], device: object = None) -> torch.Tensor:
        first = self._params[0]
        if (low, high, tuple(size)) != (0, first.vocabulary, (len(self._params), first.canvas)):
            raise RuntimeError(f"generate() draws other noise than expected: randint({low}, {high}, {tuple(size)})")
        if self._sampled:
            self._sampled = False
            self._step -= 1
        else:
            self._canvas += 1
            self._step = first.max_denoising_steps
            self._draw(self._step + 1)
        return torch.from_numpy(np.stack([noise.tokens for noise in self._noise])).long()

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        """The inverse of the cumulative distribution, one level, in float64."""
        self._draw(self._step)
        self._sampled = True
        uniforms = torch.from_numpy(np.concatenate([noise.uniforms for noise in self._noise])).double().view(-1, 1)
        edges = probabilities.double().cumsum(-1)
        return (edges <= uniforms * edges[:, -1:]).sum(-1, keepdim=True)

    def _draw(self, step: int) -> None:
        self._noise = [step_noise(each.seed, self._canvas, step, each.canvas, each.vocabulary) for each in self._params]


@contextmanager
def shared_noise(params: Sequence[RequestParams]) -> Iterator[None]:
    """Within it, row b of the batch that transformers' ``generate`` runs draws the noise of ``params[b]``."""
    script = _Script(params)
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "randint", script.randint))
        stack.enter_context(patch.object(torch, "multinomial", script.multinomial))
        yield
