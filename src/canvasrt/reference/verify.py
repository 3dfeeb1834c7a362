"""Compares the torch runtime with the reference on one checkpoint, check by check, both fed the same tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.noise import step_noise
from canvasrt.diffusion.rule import temperature
from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import DTYPES, TorchRunner

STEPS = 4  # denoising steps compared per canvas
# Largest difference allowed, relative to the largest value, and smallest cosine. Float32 leaves room for another order
# of summation only; bfloat16 rounds at other places than the reference (facts: norms and rotary embedding in float32
# here).
TOLERANCES = {"float32": (1e-4, 0.999999), "bfloat16": (0.1, 0.999)}

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    max_difference: float  # largest |ours - reference| / largest |reference|
    cosine: float
    passed: bool


class Verifier:
    """Checks for one checkpoint: prefill, denoising with self-conditioning, a second canvas, a ragged batch, chunks."""

    def __init__(self, checkpoint: Checkpoint, dtype: str = "float32", device: str = "cpu", seed: int = 0) -> None:
        spec = checkpoint.spec
        self._spec, self._seed, self._dtype = spec, seed, dtype
        self._size = spec.canvas_length
        rng = np.random.default_rng(seed)
        # Longer than the sliding window where the model's context allows it: the window is what others get wrong.
        longest = min(spec.sliding_window + self._size + 7, spec.max_context - 3 * self._size, 2048)
        lengths = [max(2, longest), max(2, longest // 2), 3]
        self._prompts: list[Ints] = [rng.integers(0, spec.vocab_size, n).astype(np.int32) for n in lengths]
        context = max(lengths) + 3 * self._size
        self._runner = TorchRunner(checkpoint, device, dtype, slots=len(lengths), context=context, chunk=context)
        self._chunked = TorchRunner(checkpoint, device, dtype, slots=1, context=context, chunk=max(2, self._size // 3))
        self._reference = ReferenceModel.load(checkpoint, DTYPES[dtype])

    def checks(self) -> Iterator[Check]:
        """Runs the checks one by one; a check does not depend on whether another passed."""
        runner, reference = self._runner, self._reference
        prompt = self._prompts[0]
        cache = reference.encode(prompt)
        runner.encode([EncodeRow(0, prompt, 0)])
        yield self._compare_context("prefill: keys and values of every layer", runner, 0, cache)
        self._chunked.encode([EncodeRow(0, prompt, 0)])
        yield self._compare_context("prefill in chunks", self._chunked, 0, cache)
        finished, logits = self._walk([0], [cache], canvas=0)
        yield self._compare(f"canvas 1: logits of {STEPS} steps, self-conditioned", logits)
        cache = reference.encode(finished[0], cache)
        runner.encode([EncodeRow(0, finished[0], len(prompt))])
        yield self._compare_context("finished canvas encoded", runner, 0, cache)
        _, logits = self._walk([0], [cache], canvas=1)
        yield self._compare("canvas 2: logits", logits)
        slots = range(len(self._prompts))
        caches = [reference.encode(each) for each in self._prompts]
        runner.encode([EncodeRow(slot, self._prompts[slot], 0) for slot in slots])
        _, logits = self._walk(list(slots), caches, canvas=2)
        yield self._compare(f"ragged batch of {len(caches)}: logits", logits)

    def _walk(
        self, slots: list[int], caches: Sequence[Any], canvas: int
    ) -> tuple[list[Ints], list[tuple[torch.Tensor, torch.Tensor]]]:
        """STEPS steps of one canvas per slot; both sides see the same canvases, each its own self-conditioning."""
        size, vocabulary = self._size, self._spec.vocab_size
        tokens = [step_noise(self._seed + slot, canvas, STEPS + 1, size, vocabulary).tokens for slot in slots]
        previous: list[torch.Tensor | None] = [None] * len(slots)
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(STEPS, 0, -1):
            heat = temperature(0.4, 0.8, step, STEPS)
            noise = [step_noise(self._seed + slot, canvas, step, size, vocabulary) for slot in slots]
            rows = [
                DenoiseRow(slot, row, heat, one.uniforms, first=step == STEPS, want_logits=True)
                for slot, row, one in zip(slots, tokens, noise, strict=True)
            ]
            results = self._runner.denoise(rows)
            for index, result in enumerate(results):
                expected = self._reference.denoise(caches[index], tokens[index], previous[index])
                assert result.logits is not None  # asked for above
                pairs.append((torch.from_numpy(result.logits), expected))
                previous[index] = expected / heat
            tokens = [np.where(np.arange(size) % 2 == step % 2, r.sampled, r.argmax).astype(np.int32) for r in results]
        return [result.argmax for result in results], pairs

    def _compare_context(self, name: str, runner: TorchRunner, slot: int, cache: Any) -> Check:
        pairs = []
        for index, layer in enumerate(cache.layers):
            for ours, theirs in zip(runner.stored(index, slot), (layer.keys, layer.values), strict=True):
                expected = theirs[0].transpose(0, 1)
                pairs.append((ours[-len(expected) :].cpu(), expected))
        return self._compare(name, pairs)

    def _compare(self, name: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Check:
        worst, cosine = 0.0, 1.0
        for ours, theirs in pairs:
            a, b = ours.double().flatten(), theirs.double().flatten()
            if a.shape != b.shape:
                return Check(name, float("inf"), 0.0, False)
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)))
            cosine = min(cosine, float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
        allowed, least = TOLERANCES[self._dtype]
        # Written so that NaN fails.
        return Check(name, worst, cosine, worst <= allowed and cosine >= least)
