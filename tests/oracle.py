"""The published generation loop in one function, written from transformers' ``generate`` and not from CanvasRT's code.

Knows nothing of slots, batches, requests or runners. What it shares with CanvasRT is the noise, which the reference
takes from torch's global generator and a caller passes in here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

# (context ids, canvas ids, the previous step's temperature-scaled logits) -> logits (canvas, vocabulary)
Model = Callable[[list[int], list[int], torch.Tensor | None], torch.Tensor]
# canvas index, step (N + 1 for the first canvas) -> uniforms, random tokens
Noise = Callable[[int, int], tuple[list[float], list[int]]]


@dataclass(frozen=True)
class Settings:
    steps: int
    t_min: float
    t_max: float
    bound: float
    stability: int
    confidence: float
    max_tokens: int
    eos: frozenset[int]


def generate(model: Model, noise: Noise, prompt: list[int], settings: Settings) -> tuple[list[int], int, str]:
    """Answer tokens without the end-of-sequence token, decoder passes, and why it ended."""
    sequence, answer, passes, index = list(prompt), [], 0, 0
    while len(answer) < settings.max_tokens and not settings.eos & set(answer):
        canvas, previous, seen = noise(index, settings.steps + 1)[1], None, []
        for remaining in range(settings.steps, 0, -1):
            uniforms, fresh = noise(index, remaining)
            share = torch.tensor(remaining, dtype=torch.int32) / settings.steps
            logits = model(sequence, canvas, previous) / (settings.t_min + (settings.t_max - settings.t_min) * share)
            probabilities = logits.softmax(-1)
            entropies = -(probabilities * logits.log_softmax(-1)).sum(-1)
            edges = probabilities.cumsum(-1)
            canvas, spent = list(fresh), 0.0
            for position in sorted(range(len(canvas)), key=lambda p: float(entropies[p])):
                if spent <= settings.bound:
                    canvas[position] = int((edges[position] <= uniforms[position] * edges[position, -1]).sum())
                spent += float(entropies[position])
            seen.append(logits.argmax(-1).tolist())
            passes, previous = passes + 1, logits
            last = seen[-1 - settings.stability :]
            stable = len(last) == settings.stability + 1 and all(argmax == seen[-1] for argmax in last)
            if stable and float(entropies.mean()) < settings.confidence:
                break
        sequence, answer, index = sequence + seen[-1], answer + seen[-1], index + 1
    ends = [place for place, token in enumerate(answer) if token in settings.eos]
    reason: Literal["stop", "length"] = "stop" if ends and ends[0] <= settings.max_tokens else "length"
    return answer[: min([*ends, settings.max_tokens])], passes, reason
