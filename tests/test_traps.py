"""The traps that other servers fell into, each a bug seen elsewhere.

A trap's test compares with the reference, then plants the bug and demands that the comparison notices it: so it can't
pass by not looking.

Elsewhere: the stop rule's off-by-one is in test_rule.py, ``max_new_tokens`` as a mere default in test_params.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import canvasrt.network.attention
import canvasrt.network.layer
import canvasrt.network.text
import canvasrt.runtime.torch_cache
from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.network.names import decoder_layer
from canvasrt.reference.model import ReferenceModel
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from tiny import Dims, write

Plant = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReferenceModel, Checkpoint]:
    source = Checkpoint.open(write(tmp_path_factory.mktemp("traps"), Dims(window=9), seed=11))
    return ReferenceModel.load(source), source


def difference(opened: tuple[ReferenceModel, Checkpoint], prompt_length: int = 40) -> float:
    """Largest difference of logits, relative to the largest logit, over two canvases of two steps."""
    reference, source = opened
    runner = TorchRunner(source, context=128, chunk=16)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 67, prompt_length).astype(np.int32)
    cache, worst = reference.encode(prompt), 0.0
    runner.encode([EncodeRow(0, prompt, 0)])
    for _ in range(2):
        previous = None
        for step in range(2):
            canvas = rng.integers(0, 67, 12).astype(np.int32)
            row = DenoiseRow(0, canvas, 0.6, np.zeros(12, np.float32), first=step == 0, want_logits=True)
            logits = torch.from_numpy(runner.denoise([row])[0].logits)
            expected = reference.denoise(cache, canvas, previous)
            worst = max(worst, float((logits - expected).abs().max() / expected.abs().max()))
            previous = expected / 0.6
        cache = reference.encode(canvas, cache)
        runner.encode([EncodeRow(0, canvas, runner.length(0))])
    return worst


def plant_window_per_query(patch: pytest.MonkeyPatch) -> None:
    """A canvas row sees the window - 1 tokens before itself instead of those before the canvas."""
    original = canvasrt.runtime.torch_cache.TorchCache._whole

    def wrong(self: Any, begin: int, canvas: Any, first: int, window: Any) -> Any:
        group = original(self, begin, canvas, first, window)
        if window is None:
            return group
        query = first + torch.arange(canvas.count).view(-1, 1)
        visible = torch.arange(group.begin, group.end) >= query - window
        return replace(group, mask=torch.where(visible, 0.0, -torch.inf)[None, None])

    patch.setattr(canvasrt.runtime.torch_cache.TorchCache, "_whole", wrong)


def plant_one_more_committed_token(patch: pytest.MonkeyPatch) -> None:
    """The canvas sees ``window`` committed tokens (the static-cache variant) instead of window - 1."""
    original = canvasrt.runtime.torch_cache.TorchCache._whole

    def wrong(self: Any, begin: int, canvas: Any, first: int, window: Any) -> Any:
        return original(self, begin, canvas, first, None if window is None else window + 1)

    patch.setattr(canvasrt.runtime.torch_cache.TorchCache, "_whole", wrong)


def plant_router_reads_the_experts_input(patch: pytest.MonkeyPatch) -> None:
    original = canvasrt.network.layer.router_scores

    def wrong(ops: Any, spec: Any, layer: int, normed: Any) -> Any:
        name = decoder_layer(layer) + "pre_feedforward_layernorm_2.weight"
        return original(ops, spec, layer, ops.multiply(normed, ops.weight(name, "float32")))

    patch.setattr(canvasrt.network.layer, "router_scores", wrong)


def plant_one_layer_scalar_for_both(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(canvasrt.network.text, "encoder_scalar", lambda layer: decoder_layer(layer) + "layer_scalar")


def plant_value_taken_after_the_key_norm(patch: pytest.MonkeyPatch) -> None:
    """On full layers the value is the key projection under a norm without weight, not the finished key."""
    original = canvasrt.network.attention._project

    def wrong(ops: Any, spec: Any, layer: Any, x: Any, rotary: Any) -> Any:
        q, k, v = original(ops, spec, layer, x, rotary)
        return (q, k, k) if layer.value_is_key else (q, k, v)

    patch.setattr(canvasrt.network.attention, "_project", wrong)


def plant_soft_embedding_kept_for_the_next_canvas(patch: pytest.MonkeyPatch) -> None:
    original = TorchRunner.denoise
    patch.setattr(
        TorchRunner, "denoise", lambda self, rows: original(self, [replace(row, first=False) for row in rows])
    )


def plant_no_norm_without_a_signal(patch: pytest.MonkeyPatch) -> None:
    """The first step skips the self-conditioning block altogether; its norm applies all the same."""
    original = canvasrt.network.text._embed

    def wrong(ops: Any, spec: Any, inputs: Any, phase: Any) -> Any:
        first = inputs.canvas is not None and inputs.canvas.soft_embeddings is None
        return original(ops, spec, replace(inputs, canvas=None) if first else inputs, phase)

    patch.setattr(canvasrt.network.text, "_embed", wrong)


PLANTS: list[Plant] = [value for name, value in sorted(globals().items()) if name.startswith("plant_")]


def test_without_a_planted_bug_the_reference_is_met(opened: tuple[ReferenceModel, Checkpoint]) -> None:
    assert difference(opened) < 1e-5


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__.removeprefix("plant_"))
def test_trap_is_noticed(
    opened: tuple[ReferenceModel, Checkpoint], plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert difference(opened) > 1e-3


@pytest.mark.parametrize("cached", [1, 8, 9, 39])
def test_trap_one_token_left_after_a_cached_prefix(opened: tuple[ReferenceModel, Checkpoint], cached: int) -> None:
    reference, source = opened
    prompt = np.random.default_rng(1).integers(0, 67, cached + 1).astype(np.int32)
    runner = TorchRunner(source, context=64)
    runner.encode([EncodeRow(0, prompt[:-1], 0)])
    runner.encode([EncodeRow(0, prompt[-1:], cached)])
    row = DenoiseRow(0, np.arange(12, dtype=np.int32), 0.6, np.zeros(12, np.float32), True, want_logits=True)
    expected = reference.denoise(reference.encode(prompt), row.canvas, None).numpy()
    np.testing.assert_allclose(runner.denoise([row])[0].logits, expected, atol=1e-5 * np.abs(expected).max())


def test_trap_bare_short_answers_are_kept() -> None:
    """One token and the end of the turn: not an empty answer, and not the padding behind it."""
    params = RequestParams(
        seed=0, max_tokens=256, max_denoising_steps=1, t_min=0.4, t_max=0.8, entropy_bound=0.1, stability_threshold=1,
        confidence_threshold=0.005, top_k=0, top_p=1.0, stop=(), stop_token_ids=frozenset({1, 6}), canvas=8,
        vocabulary=67,
    )  # fmt: skip
    state = RequestState.new(params, np.array([2, 5], np.int32)).encoded(2)
    canvas = np.array([42, 6, 0, 0, 0, 0, 0, 0], np.int32)
    ended = state.denoised(canvas, canvas, np.zeros(8, np.float32))
    assert (ended.output, ended.finish_reason, ended.generated) == ((42,), "stop", 2)


def test_trap_window_shorter_than_a_chunk_and_a_canvas(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path, Dims(window=3), seed=2))
    assert difference((ReferenceModel.load(source), source)) < 1e-5
