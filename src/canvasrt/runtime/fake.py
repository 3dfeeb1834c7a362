"""A runner without a network, for tests and demos of everything above the seam. Deterministic; reads every input.

Its "model": the answer to a context is a hash of that context, and a canvas settles on it over a few steps. What a
denoising step returns also depends on the canvas, the temperature, the uniforms, the filters and the signal kept from
the step before, so a caller that forgets or mixes up any of them gets another text.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from canvasrt.errors import CapacityError
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow, RunnerLimits
from canvasrt.runtime.rows import check_denoise, check_encode, check_slot

SETTLE_STEPS = 3  # steps after which the argmax canvas no longer changes


class FakeRunner:
    """Implements EngineRunner. ``calls`` records (verb, slots) of every call that was accepted."""

    def __init__(
        self,
        slots: int = 4,
        context: int = 256,
        chunk: int = 32,
        canvas: int = 16,
        vocabulary: int = 64,
        eos_token_id: int = 1,
        eos_every: int = 24,
        window: int = 1 << 30,
        overlaps: bool = False,
        joins_others: bool = False,
    ) -> None:
        self._limits = RunnerLimits(slots, context, chunk, canvas, vocabulary, None, overlaps, joins_others)
        self._eos, self._eos_every = eos_token_id, eos_every
        self._window = window
        self._contexts: list[NDArray[np.int32]] = [np.zeros(0, np.int32) for _ in range(slots)]
        self._signals: list[tuple[int, bytes]] = [(0, b"")] * slots  # (steps of this canvas, hash of the last one)
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def length(self, slot: int) -> int:
        check_slot(self._limits, slot)
        return len(self._contexts[slot])

    def can_rewind(self, slot: int, length: int) -> bool:
        """Only by as much as ``window`` tokens, or to nothing, as sliding layers allow."""
        held = self.length(slot)
        return length == 0 or (length <= held and held - length <= self._window)

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        check_encode(self._limits, [len(context) for context in self._contexts], rows)
        for row in rows:
            if not self.can_rewind(row.slot, row.position):
                raise CapacityError(f"slot {row.slot} can't be rewound to {row.position} tokens")
        for row in rows:
            self._contexts[row.slot] = np.concatenate([self._contexts[row.slot][: row.position], row.tokens])
        self.calls.append(("encode", tuple(row.slot for row in rows)))

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Callable[[], None] | None = None) -> list[DenoiseResult]:
        check_denoise(self._limits, [len(context) for context in self._contexts], rows)
        if meanwhile is not None:
            meanwhile()
        self.calls.append(("denoise", tuple(row.slot for row in rows)))
        return [self._denoise_row(row) for row in rows]

    def release(self, slot: int) -> None:
        check_slot(self._limits, slot)
        self._contexts[slot] = np.zeros(0, np.int32)
        self._signals[slot] = (0, b"")
        self.calls.append(("release", (slot,)))

    def _denoise_row(self, row: DenoiseRow) -> DenoiseResult:
        steps, signal = (0, b"") if row.first else self._signals[row.slot]
        context = self._contexts[row.slot].tobytes()
        settings = np.array([row.temperature, row.top_k, row.top_p], np.float64).tobytes()
        seen = hashlib.blake2b(
            context + row.canvas.tobytes() + row.uniforms.tobytes() + settings + signal, digest_size=16
        ).digest()
        self._signals[row.slot] = (steps + 1, seen)
        size, vocabulary = self._limits.canvas, self._limits.vocabulary
        settled = _generator(context).integers(2, vocabulary, size, dtype=np.int32)
        settled[_generator(context + b"eos").integers(0, self._eos_every, size) == 0] = self._eos
        noise = _generator(seen)
        share = min(1.0, (steps + 1) / SETTLE_STEPS)
        argmax = np.where(noise.random(size) < share, settled, noise.integers(2, vocabulary, size, dtype=np.int32))
        entropy = ((1.0 - share) + 1e-3 * noise.random(size)).astype(np.float32)
        sampled = np.where(row.uniforms < 0.9, argmax, noise.integers(2, vocabulary, size, dtype=np.int32))
        logits = noise.random((size, vocabulary), dtype=np.float32) if row.want_logits else None
        return DenoiseResult(argmax.astype(np.int32), sampled.astype(np.int32), entropy, logits)


def _generator(key: bytes) -> np.random.Generator:
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
