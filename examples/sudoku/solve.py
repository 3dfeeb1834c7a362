"""Held-out puzzles, as requests to a runner, and the judgement of its answers.

Held out means: made by the same generator from seeds that training does not use.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from puzzles import Grid, from_text, is_solution, make_puzzle, to_text

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import GenerationConfig, RequestOptions, resolve
from canvasrt.diffusion.request import RequestState
from canvasrt.runtime.measure import Tally, measure
from canvasrt.runtime.protocol import EngineRunner
from canvasrt.serve.tokenizer import TextCodec

CHECKPOINT = Path(__file__).parent / "checkpoint"
TEST_SEED = 2_000_000


def held_out(requests: int, puzzles: int = 1, seed: int = TEST_SEED) -> list[list[Grid]]:
    """``requests`` lists of ``puzzles`` puzzles each, 12 to 24 of the 36 cells blank."""
    rng = random.Random(seed + puzzles)
    return [[make_puzzle(rng, rng.randint(12, 24))[0] for _ in range(puzzles)] for _ in range(requests)]


def as_prompt(grids: Sequence[Grid]) -> str:
    return "\n".join(to_text(grid) for grid in grids)


def as_request(source: Checkpoint, codec: TextCodec, context: int, prompt: str, seed: int) -> RequestState:
    """A request with the checkpoint's own generation settings."""
    tokens = codec.encode_chat([{"role": "user", "content": prompt}])
    params = resolve(
        GenerationConfig.load(source.folder),
        RequestOptions(seed=seed),
        eos_token_ids=source.spec.eos_token_ids,
        canvas=source.spec.canvas_length,
        vocabulary=source.spec.vocab_size,
        prompt_tokens=len(tokens),
        context=context,
    )
    return RequestState.new(params, tokens)


def count_solved(answer: str, grids: Sequence[Grid]) -> int:
    """How many of the request's puzzles the answer solves: rows, columns, boxes and givens all checked."""
    lines = answer.split("\n")
    parts = [from_text("\n".join(lines[6 * index : 6 * index + 6])) for index in range(len(grids))]
    return sum(part is not None and is_solution(part, grid) for part, grid in zip(parts, grids, strict=True))


def solve_all(
    runner: EngineRunner, source: Checkpoint, codec: TextCodec, requests: Sequence[Sequence[Grid]], tally: Tally
) -> int:
    """Runs the requests together, as many at once as the runner has slots, and returns how many puzzles were solved."""
    states = {
        index: as_request(source, codec, runner.limits.context, as_prompt(grids), seed=index)
        for index, grids in enumerate(requests)
    }
    ends = measure(runner, states, tally)
    return sum(count_solved(codec.decode(end.output), grids) for end, grids in zip(ends, requests, strict=True))
