"""Noise that depends on (seed, canvas index, step, position) and on nothing else.

A request's text therefore never depends on its neighbours, on the batch or on arrival time. The generator is Philox
4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter-based: NumPy here, a few lines
on a device.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepNoise:
    uniforms: NDArray[np.float32]  # (canvas,) in [0, 1), multiples of 2^-24
    tokens: NDArray[np.int32]  # (canvas,) uniform over the vocabulary


@lru_cache(maxsize=1024)  # a step asks twice: for the uniforms before it and for the tokens after it
def step_noise(seed: int, canvas_index: int, step: int, length: int, vocabulary: int) -> StepNoise:
    """Noise of one step; ``step`` counts the remaining steps, N to 1, and N + 1 stands for the canvas's first tokens.

    Position p uses words 2p and 2p + 1 of the stream, so that its noise does not depend on the canvas's length.
    """
    # An array: NumPy turns a list with a large seed into floats, and seeds that differ by 2048 into the same noise.
    key = np.array([seed, canvas_index], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[0, 0, step, 0]).random_raw(2 * length)
    uniforms = (words[0::2] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    # Multiply and shift: exactly uniform for a power of two, off by less than vocabulary * 2^-32 otherwise.
    tokens = ((words[1::2] >> np.uint64(32)) * np.uint64(vocabulary)) >> np.uint64(32)
    noise = StepNoise(uniforms, tokens.astype(np.int32))
    noise.uniforms.flags.writeable = noise.tokens.flags.writeable = False  # shared by all who ask
    return noise
