"""The sampler's decisions against transformers' own sampler, temperature schedule and stopping criteria."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from canvasrt.diffusion.rule import accept, is_stable, temperature

GRID = 1 / 64  # entropies that are multiples of it add up without rounding, in float32 and in float64


def reference_acceptance(logits: torch.Tensor, bound: float) -> np.ndarray:
    rows, vocabulary = logits.shape
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=bound), rows, vocabulary, 48)
    canvas = torch.zeros(1, rows, dtype=torch.int64)
    return sampler.accept_canvas(canvas, canvas + 1, logits[None], 48)[0].numpy() == 1


def reference_acceptance_of_entropies(entropy: np.ndarray, bound: float) -> np.ndarray:
    """What the reference accepts when its entropies are exactly these."""
    values = torch.from_numpy(entropy)[None]
    with mock.patch("torch.distributions.Categorical") as categorical:
        categorical.return_value.entropy.return_value = values
        return reference_acceptance(torch.zeros(len(entropy), 2), bound)


def reference_temperature(t_min: float, t_max: float, step: int, steps: int) -> float:
    class Scores:
        def __truediv__(self, divisor: Any) -> Any:
            return divisor

    processor = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    # generate() passes the step as an int32 tensor, which makes the arithmetic float32
    divisor = processor(None, Scores(), cur_step=torch.tensor(step, dtype=torch.int32))
    assert divisor.dtype == torch.float32
    return float(divisor)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 50),
    sharpness=st.floats(0, 30),
    bound=st.floats(1e-3, 20),
)
def test_acceptance_is_the_reference_samplers_on_random_logits(
    seed: int, rows: int, vocabulary: int, sharpness: float, bound: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = sharpness * torch.rand(rows, 1, generator=generator)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    entropy = torch.distributions.Categorical(logits=logits).entropy().numpy()
    ranked = np.sort(entropy).astype(np.float64)
    close = np.abs(np.cumsum(ranked) - ranked - bound) < 1e-4  # rounding may decide here, in either direction
    assume(not close.any())
    accepted, expected = accept(entropy, bound), reference_acceptance(logits, bound)
    assert sorted(entropy[accepted]) == sorted(entropy[expected])  # torch.sort may put equals in any order
    if len(set(entropy.tolist())) == rows:
        np.testing.assert_array_equal(accepted, expected)


@settings(max_examples=200)
@given(
    entropy=st.lists(st.integers(0, 24), min_size=1, max_size=40),
    bound=st.integers(1, 200),
)
@example(entropy=[0] * 40, bound=1)
@example(entropy=[7], bound=1)
@example(entropy=[4, 4, 4], bound=4)  # the second has exactly the bound before it
@example(entropy=[4, 4, 4], bound=8)
@example(entropy=[24] * 40, bound=10**6)
def test_acceptance_is_the_reference_samplers_where_sums_are_exact(entropy: list[int], bound: int) -> None:
    values = np.array(entropy, np.float32) * np.float32(GRID)
    accepted, expected = accept(values, bound * GRID), reference_acceptance_of_entropies(values, bound * GRID)
    assert sorted(values[accepted]) == sorted(values[expected])
    if len(set(entropy)) == len(entropy):
        np.testing.assert_array_equal(accepted, expected)


@pytest.mark.parametrize(
    ("entropy", "bound", "expected"),
    [
        ([0.0, 0.0, 0.0], 0.1, [True, True, True]),
        ([3.0], 0.1, [True]),
        ([5.0, 3.0, 4.0], 0.1, [False, True, False]),  # one is always accepted: the lowest
        ([9.0, 8.0, 7.0], 1e9, [True, True, True]),
        ([0.5, 0.25, 0.25], 0.25, [False, True, True]),  # a sum before equal to the bound is within it
        ([0.5, 0.25, 0.25], 0.5, [True, True, True]),
        ([0.5, 0.25, 0.25], 0.49, [False, True, True]),
        ([2.0, 2.0, 2.0], 1.0, [True, False, False]),  # of equals, the first
        ([4.0, 0.0, 1.0, 2.0], 1.5, [False, True, True, True]),
    ],
)
def test_positions_are_accepted_by_rising_entropy_within_the_bound(
    entropy: list[float], bound: float, expected: list[bool]
) -> None:
    assert accept(np.array(entropy, np.float32), bound).tolist() == expected


@given(st.lists(st.floats(0, 12, width=32), min_size=1, max_size=64), st.floats(1e-9, 100))
def test_at_least_one_position_is_accepted_and_none_with_more_entropy_than_a_refused_one(
    entropy: list[float], bound: float
) -> None:
    values = np.array(entropy, np.float32)
    accepted = accept(values, bound)
    assert accepted.any()
    if not accepted.all():
        assert values[accepted].max() <= values[~accepted].min()


@settings(max_examples=200)
@given(
    t_min=st.floats(0, 2),
    span=st.floats(0, 3),
    steps=st.integers(1, 1024),
    data=st.data(),
)
def test_the_temperature_is_the_references_to_the_last_bit(
    t_min: float, span: float, steps: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, steps))
    t_max = t_min + span
    assert temperature(t_min, t_max, step, steps) == reference_temperature(t_min, t_max, step, steps)


def test_the_published_schedule_falls_from_t_max_at_the_first_step_to_just_above_t_min() -> None:
    schedule = [temperature(0.4, 0.8, step, 48) for step in range(48, 0, -1)]
    assert schedule[0] == float(np.float32(0.8))
    assert schedule[-1] == pytest.approx(0.4 + 0.4 / 48)
    assert schedule == [reference_temperature(0.4, 0.8, step, 48) for step in range(48, 0, -1)]


@pytest.mark.parametrize("threshold", [0, 1, 2, 3])
@settings(max_examples=30)
@given(choices=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_stability_is_the_references_over_random_sequences(threshold: int, choices: list[int]) -> None:
    canvases = np.array([[1, 2, 3], [1, 2, 4], [0, 2, 3]], np.int32)
    criteria = StableAndConfidentStoppingCriteria(stability_threshold=threshold, confidence_threshold=1e9)
    history: tuple[np.ndarray, ...] = ()
    for choice in choices:
        argmax = canvases[choice]
        expected = bool(criteria(torch.from_numpy(argmax)[None].long(), torch.zeros(1, 3, 5))[0])
        assert is_stable(argmax, history, threshold) == expected
        history = (*history, argmax)


def test_threshold_one_needs_two_equal_canvases_in_a_row() -> None:
    first, other = np.array([1, 2], np.int32), np.array([1, 3], np.int32)
    assert not is_stable(first, (), 1)
    assert is_stable(first, (first,), 1)
    assert not is_stable(first, (other,), 1)
    assert not is_stable(first, (first, other), 1)  # equal, but not in a row
    assert not is_stable(first, (first,), 2)
    assert is_stable(first, (other, first, first), 2)


def test_threshold_zero_is_stable_at_once() -> None:
    assert is_stable(np.array([1], np.int32), (), 0)
