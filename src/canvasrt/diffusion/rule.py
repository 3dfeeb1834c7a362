"""The decisions of the sampler over one canvas: temperature, which positions to accept, when to stop.

Acceptance is the entropy bound of Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy
Bounded Unmasking" (arXiv 2505.24857), as transformers' ``EntropyBoundSampler`` applies it.
"""

import numpy as np
from numpy.typing import NDArray


def temperature(t_min: float, t_max: float, step: int, steps: int) -> float:
    """T(s) = t_min + (t_max - t_min) * s / N, s remaining steps of N; float32 arithmetic as in the reference."""
    share = np.float32(step) / np.float32(steps)
    return float(np.float32(t_min) + np.float32(t_max - t_min) * share)


def accept(entropy: NDArray[np.float32], bound: float) -> NDArray[np.bool_]:
    """Positions (canvas,) whose sampled token is kept: by rising entropy, while the sum of the ones before is within
    ``bound``.

    At least one position is accepted. Acceptance has no memory: every step decides about all positions anew.
    """
    order = np.argsort(entropy, kind="stable")
    ranked = entropy[order].astype(np.float64)
    accepted = np.empty(len(entropy), dtype=np.bool_)
    accepted[order] = np.cumsum(ranked) - ranked <= bound
    return accepted


def is_stable(argmax: NDArray[np.int32], history: tuple[NDArray[np.int32], ...], threshold: int) -> bool:
    """Whether the argmax canvas equals the last ``threshold`` ones: threshold 1 means two equal canvases in a row."""
    if threshold == 0:
        return True
    recent = history[-threshold:]
    return len(recent) == threshold and all(np.array_equal(argmax, earlier) for earlier in recent)
