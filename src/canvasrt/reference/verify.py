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
# Float32: largest difference relative to the largest value, and least cosine. Room for another order of summation only.
MAX_DIFFERENCE, LEAST_COSINE = 1e-4, 0.999999
# Bfloat16: how much further from the float32 reference we may be, on average, than transformers in bfloat16 is. A bound
# on single values would say little: one rounded router score changes an expert, in their run or in ours.
MAX_ERROR_RATIO = 1.5
# The same for logits. One flipped expert reaches a whole canvas through attention and self-conditioning, in their run
# or in ours: over 12 seeds on two checkpoints single checks gave 0.3 to 3.2, with a geometric mean of 0.9.
MAX_LOGITS_RATIO = 5.0

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    max_difference: float  # largest |ours - reference| / largest |reference|, the reference in float32
    cosine: float
    error_ratio: float | None  # our mean difference over that of transformers in bfloat16; None for float32
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
        # The first is the truth, the second (for bfloat16) the yardstick of what rounding costs.
        self._references = [ReferenceModel.load(checkpoint)]
        if dtype != "float32":
            self._references.append(ReferenceModel.load(checkpoint, DTYPES[dtype]))

    def checks(self) -> Iterator[Check]:
        """Runs the checks one by one; a check does not depend on whether another passed."""
        runner = self._runner
        prompt = self._prompts[0]
        caches = [reference.encode(prompt) for reference in self._references]
        runner.encode([EncodeRow(0, prompt, 0)])
        yield self._compare_context("prefill: keys and values of every layer", runner, 0, caches)
        self._chunked.encode([EncodeRow(0, prompt, 0)])
        yield self._compare_context("prefill in chunks", self._chunked, 0, caches)
        finished, logits = self._walk([0], [caches], canvas=0)
        yield self._compare(f"canvas 1: logits of {STEPS} steps, self-conditioned", logits)
        caches = [each.encode(finished[0], cache) for each, cache in zip(self._references, caches, strict=True)]
        runner.encode([EncodeRow(0, finished[0], len(prompt))])
        yield self._compare_context("finished canvas encoded", runner, 0, caches)
        _, logits = self._walk([0], [caches], canvas=1)
        yield self._compare("canvas 2: logits", logits)
        slots = range(len(self._prompts))
        all_caches = [[reference.encode(each) for reference in self._references] for each in self._prompts]
        runner.encode([EncodeRow(slot, self._prompts[slot], 0) for slot in slots])
        _, logits = self._walk(list(slots), all_caches, canvas=2)
        yield self._compare(f"ragged batch of {len(all_caches)}: logits", logits)

    def _walk(
        self, slots: list[int], caches: Sequence[Sequence[Any]], canvas: int
    ) -> tuple[list[Ints], list[list[torch.Tensor]]]:
        """STEPS steps of one canvas per slot; all sides see the same canvases, each its own self-conditioning.

        ``caches`` has one cache per slot and reference. Returns the last argmax canvases and [ours, *references] by
        step and slot.
        """
        size, vocabulary = self._size, self._spec.vocab_size
        tokens = [step_noise(self._seed + slot, canvas, STEPS + 1, size, vocabulary).tokens for slot in slots]
        previous: list[list[torch.Tensor | None]] = [[None] * len(self._references) for _ in slots]
        compared: list[list[torch.Tensor]] = []
        for step in range(STEPS, 0, -1):
            heat = temperature(0.4, 0.8, step, STEPS)
            noise = [step_noise(self._seed + slot, canvas, step, size, vocabulary) for slot in slots]
            rows = [
                DenoiseRow(slot, row, heat, one.uniforms, first=step == STEPS, want_logits=True)
                for slot, row, one in zip(slots, tokens, noise, strict=True)
            ]
            results = self._runner.denoise(rows)
            for index, result in enumerate(results):
                expected = [
                    reference.denoise(cache, tokens[index], before)
                    for reference, cache, before in zip(self._references, caches[index], previous[index], strict=True)
                ]
                assert result.logits is not None  # asked for above
                compared.append([torch.from_numpy(result.logits), *expected])
                previous[index] = [logits / heat for logits in expected]
            tokens = [np.where(np.arange(size) % 2 == step % 2, r.sampled, r.argmax).astype(np.int32) for r in results]
        return [result.argmax for result in results], compared

    def _compare_context(self, name: str, runner: TorchRunner, slot: int, caches: Sequence[Any]) -> Check:
        compared = []
        for index in range(len(self._spec.layers)):
            for which, ours in zip(("keys", "values"), runner.stored(index, slot), strict=True):
                expected = [getattr(cache.layers[index], which)[0].transpose(0, 1) for cache in caches]
                compared.append([ours[-len(expected[0]) :].cpu(), *expected])
        return self._compare(name, compared, MAX_ERROR_RATIO)

    def _compare(
        self, name: str, compared: Sequence[Sequence[torch.Tensor]], max_ratio: float = MAX_LOGITS_RATIO
    ) -> Check:
        """Each of ``compared`` is [ours, the float32 reference] or [ours, the float32 reference, the rounded one]."""
        worst, cosine, our_error, their_error = 0.0, 1.0, 0.0, 0.0
        for tensors in compared:
            ours, exact, *rounded = (tensor.double().flatten() for tensor in tensors)
            if ours.shape != exact.shape:
                return Check(name, float("inf"), 0.0, None, False)
            largest = exact.abs().max().clamp(min=1e-30)
            worst = max(worst, float((ours - exact).abs().max() / largest))
            cosine = min(cosine, float(torch.nn.functional.cosine_similarity(ours, exact, dim=0)))
            our_error += float((ours - exact).abs().mean() / largest)
            their_error += float((rounded[0] - exact).abs().mean() / largest) if rounded else 0.0
        # The comparisons are written so that NaN fails.
        if self._dtype == "float32":
            return Check(name, worst, cosine, None, worst <= MAX_DIFFERENCE and cosine >= LEAST_COSINE)
        ratio = our_error / max(their_error, 1e-30)
        return Check(name, worst, cosine, ratio, ratio <= max_ratio)
