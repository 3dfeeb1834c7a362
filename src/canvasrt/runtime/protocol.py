"""The seam to hardware: ``encode``, ``denoise``, ``release``, and the rows that cross it.

A row names its request's slot and never its place in a batch; a runner may batch, pad or split rows as its hardware
likes, and a row's result must not depend on its neighbours. Knows nothing of devices, prompts as text, or scheduling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RunnerLimits:
    """What a runner has room for, fixed when it is opened."""

    slots: int  # requests that can hold K/V memory at once
    context: int  # tokens per slot: prompt, finished canvases and the canvas being denoised
    chunk: int  # context tokens per row that one pass encodes; longer rows are split
    canvas: int  # tokens of a canvas
    vocabulary: int
    canvases: int | None = None  # rows that one call denoises; more of them are several calls. None: any number
    # Another device computes: what a caller does meanwhile costs nothing.
    overlaps: bool = False
    # A finished canvas costs no call of its own where its slot does not denoise before the next call.
    joins_others: bool = False


@dataclass(frozen=True, slots=True)
class EncodeRow:
    """Append tokens to a slot's context: a piece of a prompt, or a finished canvas."""

    slot: int
    tokens: NDArray[np.int32]  # (n,), n >= 1
    position: int  # of the first token; smaller than the slot's length: the slot is rewound to it first (prefix reuse)


@dataclass(frozen=True, slots=True)
class DenoiseRow:
    """One denoising step of one canvas. The slot keeps the self-conditioning signal between steps."""

    slot: int
    canvas: NDArray[np.int32]  # (canvas,)
    temperature: float  # > 0
    uniforms: NDArray[np.float32]  # (canvas,) in [0, 1): position p samples the token at this point of its distribution
    first: bool  # the canvas's first step: no self-conditioning yet
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    want_logits: bool = False


@dataclass(frozen=True, slots=True)
class DenoiseResult:
    argmax: NDArray[np.int32]  # (canvas,)
    sampled: NDArray[np.int32]  # (canvas,)
    entropy: NDArray[np.float32]  # (canvas,) nats, of the temperature-scaled and filtered distribution
    logits: NDArray[np.float32] | None = None  # (canvas, vocabulary) softcapped, before temperature; when asked for


class EngineRunner(Protocol):
    """Runs the network for rows of different requests, lengths and steps in one call.

    Every verb raises InputError or CapacityError before anything is changed when a row can't be run.
    """

    @property
    def limits(self) -> RunnerLimits: ...

    def length(self, slot: int) -> int:
        """Context tokens that the slot holds."""
        ...

    def can_rewind(self, slot: int, length: int) -> bool:
        """Whether the next tokens may be encoded at position ``length``; always so at 0 and behind the last token."""
        ...

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        """Appends each row's tokens to its slot's context."""
        ...

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Callable[[], None] | None = None) -> list[DenoiseResult]:
        """One step for each row, in the rows' order; contexts stay as they are.

        ``meanwhile`` is called once when the rows were accepted, while the device works if another one does.
        """
        ...

    def release(self, slot: int) -> None:
        """Empties the slot."""
        ...
