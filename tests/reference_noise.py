"""Makes transformers' ``generate`` draw the noise that our requests draw, so that both must write the same tokens.

generate() calls torch.randint once for a new canvas and once after every torch.multinomial; nothing else is random.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.params import RequestParams


class _Script:
    def __init__(self, params: Sequence[RequestParams]) -> None:
        self.params = params
        self.canvas, self.step = -1, 0
        self.sampled = False

    def _rows(self, step: int, what: str) -> torch.Tensor:
        rows = [
            getattr(step_noise(each.seed, self.canvas, step, each.canvas, each.vocabulary), what)
            for each in self.params
        ]
        return torch.from_numpy(np.stack(rows))

    def randint(self, low: int, high: int, size: Sequence[int], device: object = None) -> torch.Tensor:
        first = self.params[0]
        assert (low, high, tuple(size)) == (0, first.vocabulary, (len(self.params), first.canvas))
        if self.sampled:
            self.sampled = False
            self.step -= 1
            return self._rows(self.step + 1, "tokens").long()
        self.canvas += 1
        self.step = first.max_denoising_steps
        return self._rows(self.step + 1, "tokens").long()

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        """The inverse of the cumulative distribution, one level, in float64."""
        assert num_samples == 1
        self.sampled = True
        uniforms = self._rows(self.step, "uniforms").reshape(-1, 1).double()
        edges = probabilities.double().cumsum(-1)
        return (edges <= uniforms * edges[:, -1:]).sum(-1, keepdim=True)


@contextmanager
def shared_noise(params: Sequence[RequestParams]) -> Iterator[None]:
    """Within it, row b of transformers' batch draws the noise of ``params[b]``."""
    script = _Script(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", script.randint)
        patch.setattr(torch, "multinomial", script.multinomial)
        yield
