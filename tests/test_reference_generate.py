"""Token for token what transformers' generate() writes, when both draw the same noise: alone and in ragged batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.reference.model import ReferenceModel
from canvasrt.reference.noise import shared_noise
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.torch_runner import TorchRunner
from tiny import Dims, write

DIMS = Dims(context=512, embedding_scale=2.5)
CONTEXT = 200


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReferenceModel, Checkpoint]:
    source = Checkpoint.open(write(tmp_path_factory.mktemp("generate"), DIMS, seed=3))
    return ReferenceModel.load(source), source


def random_params(rng: np.random.Generator) -> RequestParams:
    """Settings under which canvases of a random model stop early, late and not at all, and some answers meet an EOS."""
    t_min = float(rng.uniform(0.0, 0.5))
    eos = rng.integers(0, DIMS.vocab, rng.integers(0, 3))
    return RequestParams(
        seed=int(rng.integers(0, 2**63)),
        max_tokens=DIMS.canvas * int(rng.integers(1, 5)),
        max_denoising_steps=int(rng.integers(1, 13)),
        t_min=t_min,
        t_max=t_min + float(rng.uniform(0.01, 0.5)),
        entropy_bound=float(rng.choice([0.1, 2.0, 100.0])),
        stability_threshold=int(rng.integers(0, 3)),
        confidence_threshold=float(rng.choice([0.1, 1.0, 10.0])),
        top_k=0,
        top_p=1.0,
        stop=(),
        stop_token_ids=frozenset(eos.tolist()),
        canvas=DIMS.canvas,
        vocabulary=DIMS.vocab,
    )


def until_stop(tokens: list[int], params: RequestParams) -> tuple[int, ...]:
    stops = [index for index, token in enumerate(tokens) if token in params.stop_token_ids]
    return tuple(tokens[: stops[0]] if stops else tokens)


def run(runner: TorchRunner, prompts: list[np.ndarray], params: list[RequestParams]) -> list[RequestState]:
    states = {i: RequestState.new(each, prompt) for i, (each, prompt) in enumerate(zip(params, prompts, strict=True))}
    ends = {event.request: event.state for event in run_requests(runner, states) if event.kind == "end"}
    return [ends[index] for index in sorted(ends)]


@pytest.mark.parametrize("seed", range(24))
def test_one_request_writes_the_tokens_of_transformers_generate(
    opened: tuple[ReferenceModel, Checkpoint], seed: int
) -> None:
    reference, source = opened
    rng = np.random.default_rng(seed)
    params = random_params(rng)
    prompt = rng.integers(0, DIMS.vocab, rng.integers(1, 50)).astype(np.int32)
    with shared_noise([params]):
        expected = reference.generate([prompt], params)[0]
    state = run(TorchRunner(source, context=CONTEXT, chunk=int(rng.integers(1, 64))), [prompt], [params])[0]
    assert state.output == until_stop(expected.tokens, params)
    assert state.passes == round(expected.passes)
    assert (state.finish_reason == "stop") == bool(set(expected.tokens) & params.stop_token_ids)


@pytest.mark.parametrize("seed", range(100, 108))
def test_a_ragged_batch_writes_the_tokens_of_transformers_generate(
    opened: tuple[ReferenceModel, Checkpoint], seed: int
) -> None:
    reference, source = opened
    rng = np.random.default_rng(seed)
    shared = random_params(rng)
    size = int(rng.integers(2, 6))
    params = [replace(shared, seed=int(rng.integers(0, 2**63))) for _ in range(size)]
    prompts = [rng.integers(0, DIMS.vocab, rng.integers(1, 40)).astype(np.int32) for _ in range(size)]
    with shared_noise(params):
        expected = reference.generate(prompts, shared)
    # Fewer slots than requests: some wait and join while others are in the middle of their canvases.
    slots = int(rng.integers(1, size + 1))
    for state, answer in zip(
        run(TorchRunner(source, slots=slots, context=CONTEXT), prompts, params), expected, strict=True
    ):
        assert state.output == until_stop(answer.tokens, shared)


def test_the_settings_above_cover_what_they_should(opened: tuple[ReferenceModel, Checkpoint], tmp_path: Path) -> None:
    """Several canvases, early stops and full runs, stops by token and by length: else equality would say little."""
    _, source = opened
    runner = TorchRunner(source, context=CONTEXT)
    states = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        params = random_params(rng)
        prompt = rng.integers(0, DIMS.vocab, rng.integers(1, 50)).astype(np.int32)
        states += run(runner, [prompt], [params])
    assert sum(state.canvas.index > 0 for state in states) >= 8
    full = [state.passes == (state.canvas.index + 1) * state.params.max_denoising_steps for state in states]
    assert 5 <= sum(full) <= 19
    assert {state.finish_reason for state in states} == {"stop", "length"}
