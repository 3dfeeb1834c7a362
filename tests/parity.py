"""Requests walked through runners and through transformers' model, step by step, compared by logits."""

from collections.abc import Sequence

import numpy as np
import torch

from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow, EngineRunner

TOLERANCE = 1e-4  # of the largest reference value


def close(ours: np.ndarray, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    expected = theirs.numpy()
    return bool(np.abs(ours - expected).max() <= tolerance * np.abs(expected).max())


def walk_and_compare(
    runner: EngineRunner,
    reference: ReferenceModel,
    prompt: np.ndarray,
    rng: np.random.Generator,
    tolerance: float = TOLERANCE,
) -> None:
    """Prefill, three self-conditioned steps, the canvas encoded, a second canvas: logits equal at every step."""
    spec_canvas, vocab = runner.limits.canvas, runner.limits.vocabulary
    cache = reference.encode(prompt)
    runner.encode([EncodeRow(0, prompt, 0)])
    position = len(prompt)
    for canvas_index in range(2):
        previous = None
        for step in range(3):
            canvas = rng.integers(0, vocab, spec_canvas).astype(np.int32)
            temperature = float(rng.uniform(0.4, 0.8))
            uniforms = rng.random(spec_canvas, dtype=np.float32)
            row = DenoiseRow(0, canvas, temperature, uniforms, first=step == 0, want_logits=True)
            result = runner.denoise([row])[0]
            expected = reference.denoise(cache, canvas, previous)
            assert close(result.logits, expected, tolerance), f"canvas {canvas_index}, step {step}"
            scaled = torch.distributions.Categorical(logits=expected / temperature)
            assert np.allclose(result.entropy, scaled.entropy().numpy(), atol=1e-3)
            previous = expected / temperature
        cache = reference.encode(canvas, cache)
        runner.encode([EncodeRow(0, canvas, position)])
        position += spec_canvas


def request_logits(runner: EngineRunner, slot: int = 0) -> list[np.ndarray]:
    """Of one request: a prompt, three self-conditioned steps, the canvas encoded, the next canvas's first step."""
    size, vocabulary = runner.limits.canvas, runner.limits.vocabulary
    rng = np.random.default_rng(0)
    prompt = rng.integers(5, vocabulary, 31).astype(np.int32)
    uniforms = np.full(size, 0.5, np.float32)
    runner.encode([EncodeRow(slot, prompt, 0)])
    found = []
    for step in range(4):
        canvas = rng.integers(5, vocabulary, size).astype(np.int32)
        row = DenoiseRow(slot, canvas, 0.6, uniforms, first=step in (0, 3), want_logits=True)
        logits = runner.denoise([row])[0].logits
        assert logits is not None
        found.append(logits)
        if step == 2:
            runner.encode([EncodeRow(slot, canvas, len(prompt))])
    return found


def difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest, relative to the largest expected number of its step."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
