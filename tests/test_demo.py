"""The demo checkpoint solves what it promises, through our runtime, and its answers can span several canvases."""

import json

import pytest
from solve import CHECKPOINT, as_prompt, as_request, count_solved, held_out, solve_all

from canvasrt.checkpoint import Checkpoint
from canvasrt.reference.verify import Verifier
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.measure import Tally
from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.serve.tokenizer import TextCodec

GOAL = 0.95
HELP = "Send six rows of a puzzle such as 12.|4.6"


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(CHECKPOINT)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec.load(CHECKPOINT)


# Two puzzles in one request are harder for this model: 92 % over 512 of them.
@pytest.mark.parametrize(("requests", "puzzles", "goal"), [(256, 1, GOAL), (64, 2, 0.88)])
def test_held_out_puzzles_are_solved(
    source: Checkpoint, codec: TextCodec, requests: int, puzzles: int, goal: float
) -> None:
    tally = Tally()
    runner = TorchRunner(source, slots=16, context=512)
    solved = solve_all(runner, source, codec, held_out(requests, puzzles), tally)
    assert solved >= goal * requests * puzzles
    assert tally.canvases == requests * puzzles  # one canvas per puzzle: two puzzles are an answer of two canvases
    assert tally.passes / tally.canvases < 12  # far fewer than the 48 steps that are allowed: the stop rule works


def test_bfloat16_solves_them_too(source: Checkpoint, codec: TextCodec) -> None:
    runner = TorchRunner(source, dtype="bfloat16", slots=16, context=512)
    assert solve_all(runner, source, codec, held_out(64), Tally()) >= GOAL * 64


def test_text_that_is_no_puzzle_gets_a_short_answer(source: Checkpoint, codec: TextCodec) -> None:
    """Shorter than a canvas: the turn ends inside it, and the padding behind it is not part of the answer."""
    runner = TorchRunner(source, slots=4, context=512)
    texts = ["hello", "what can you do?", "tell me a story", "sudoku"]
    states = {i: as_request(source, codec, 512, text, seed=i) for i, text in enumerate(texts)}
    ends = [event.state for event in run_requests(runner, states) if event.kind == "end"]
    assert [codec.decode(end.output) for end in ends] == [HELP] * len(texts)
    assert {end.finish_reason for end in ends} == {"stop"}


def test_a_damaged_answer_does_not_count_as_solved() -> None:
    grids = held_out(1)[0]
    assert count_solved(as_prompt(grids), grids) == 0
    assert count_solved("", grids) == 0
    wrong = ("123|456\n456|123\n231|564\n564|231\n312|645\n645|312",)
    assert count_solved(wrong[0], grids) == 0  # a valid grid that ignores the givens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_agrees_with_the_reference(source: Checkpoint, dtype: str) -> None:
    checks = list(Verifier(source, dtype).checks())
    assert len(checks) == 6
    assert all(check.passed for check in checks), checks


def test_the_checkpoint_is_in_the_published_format_and_small(source: Checkpoint) -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 12e6
    kinds = {layer.kind for layer in source.spec.layers}
    assert kinds == {"sliding", "full"}
    assert source.spec.experts == 8
    names = {file.name for file in CHECKPOINT.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "prompts.jsonl"} <= names
    lines = [json.loads(line) for line in (CHECKPOINT / "prompts.jsonl").read_text().splitlines()]
    assert len(lines) == 24
