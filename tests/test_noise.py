"""Keyed noise: every part of the key counts, nothing else does, and published seeds keep their meaning."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from canvasrt.diffusion.noise import StepNoise, step_noise

KEY = {"seed": 7, "canvas_index": 2, "step": 48}
SEEDS = st.integers(0, 2**64 - 1)
MASK = 2**64 - 1

# of seed 1234, canvas 1, step 48; computed with philox() below, apart from NumPy
GOLDEN_TOKENS = [122140, 203501, 156052, 37567, 204043, 258019]
GOLDEN_UNIFORMS = [12474926, 13712139, 4428451, 2541703, 14280934, 10577071]  # times 2^24


def equal(left: StepNoise, right: StepNoise) -> bool:
    return np.array_equal(left.uniforms, right.uniforms) and np.array_equal(left.tokens, right.tokens)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """One block of Philox 4x64-10 in plain integers, as in figure 2 and section 4.3 of Salmon et al."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & MASK, (left >> 64) ^ d ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [a, b, c, d]


@given(SEEDS, st.integers(0, 1000), st.integers(1, 1025), st.sampled_from([112, 262_144]))
@example(2**64 - 1, 0, 1025, 112)
@example(2**63 + 1, 3, 1, 262_144)
def test_noise_is_philox_by_the_book(seed: int, canvas_index: int, step: int, vocabulary: int) -> None:
    noise = step_noise(seed, canvas_index, step, 6, vocabulary)
    # NumPy counts up before its first block
    words = [word for block in (1, 2, 3) for word in philox([block, 0, step, 0], [seed, canvas_index])]
    assert noise.uniforms.tolist() == [(word >> 40) / 2**24 for word in words[0::2]]
    assert noise.tokens.tolist() == [(word >> 32) * vocabulary >> 32 for word in words[1::2]]


def test_published_seeds_keep_their_noise() -> None:
    noise = step_noise(1234, 1, 48, 6, 262_144)
    assert noise.tokens.tolist() == GOLDEN_TOKENS
    assert (noise.uniforms * 2**24).tolist() == GOLDEN_UNIFORMS
    assert noise.tokens.dtype == np.int32
    assert noise.uniforms.dtype == np.float32


@given(SEEDS, st.integers(0, 1000), st.integers(1, 1025))
def test_the_same_key_gives_the_same_noise(seed: int, canvas_index: int, step: int) -> None:
    assert equal(step_noise(seed, canvas_index, step, 16, 112), step_noise(seed, canvas_index, step, 16, 112))


@pytest.mark.parametrize("part", list(KEY))
@pytest.mark.parametrize("change", [-1, 1, 5])
def test_every_part_of_the_key_changes_uniforms_and_tokens(part: str, change: int) -> None:
    noise = step_noise(**KEY, length=32, vocabulary=262_144)
    other = step_noise(**(KEY | {part: KEY[part] + change}), length=32, vocabulary=262_144)
    assert not np.isin(noise.uniforms, other.uniforms).all()
    assert np.mean(noise.uniforms == other.uniforms) < 0.1
    assert np.mean(noise.tokens == other.tokens) < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**63 - 1, 2**63, 2**63 + 2**20, 2**64 - 2])
def test_neighbouring_seeds_differ_over_the_whole_range(seed: int) -> None:
    assert not equal(step_noise(seed, 0, 1, 16, 262_144), step_noise(seed + 1, 0, 1, 16, 262_144))


@given(SEEDS, st.integers(1, 1025), st.integers(1, 64), st.integers(0, 64))
def test_a_position_has_the_same_noise_on_a_longer_canvas(seed: int, step: int, length: int, more: int) -> None:
    short, long = step_noise(seed, 0, step, length, 112), step_noise(seed, 0, step, length + more, 112)
    assert equal(short, StepNoise(long.uniforms[:length], long.tokens[:length]))
    assert len(long.uniforms) == len(long.tokens) == length + more


def test_the_largest_word_gives_a_uniform_below_one_and_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, **_: object) -> None: ...

        def random_raw(self, count: int) -> np.ndarray:
            return np.resize(np.array([MASK, MASK, 0, 0], np.uint64), count)

    monkeypatch.setattr(np.random, "Philox", Extreme)
    noise = step_noise(0, 0, 1, 2, 262_144)
    assert noise.uniforms[0] < 1
    assert noise.uniforms.tolist() == [1 - 2.0**-24, 0]
    assert noise.tokens.tolist() == [262_143, 0]


@pytest.mark.parametrize("vocabulary", [1, 2, 112, 262_144])
def test_tokens_stay_inside_the_vocabulary_and_uniforms_inside_the_unit_interval(vocabulary: int) -> None:
    noise = step_noise(3, 0, 1, 50_000, vocabulary)
    assert noise.tokens.min() >= 0
    assert noise.tokens.max() < vocabulary
    assert noise.uniforms.min() >= 0
    assert noise.uniforms.max() < 1


def chi_square_deviation(values: np.ndarray, bins: int) -> float:
    """Standard deviations by which Pearson's statistic exceeds (or falls short of) what uniform values give."""
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (bins - 1)) / (2 * (bins - 1)) ** 0.5


def test_noise_is_uniform() -> None:
    small, large = step_noise(11, 0, 1, 100_000, 112), step_noise(11, 0, 1, 100_000, 262_144)
    samples = {
        "tokens of a vocabulary of 112": (small.tokens, 112),
        "high bits of tokens": (large.tokens >> 10, 256),
        "low bits of tokens": (large.tokens & 255, 256),
        "high bits of uniforms": ((large.uniforms * 256).astype(np.int64), 256),
        "low bits of uniforms": ((large.uniforms * 2**24).astype(np.int64) & 255, 256),
        "both at one position": ((large.uniforms * 16).astype(np.int64) * 16 + (large.tokens >> 14), 256),
    }
    deviations = {name: chi_square_deviation(values, bins) for name, (values, bins) in samples.items()}
    assert {name: value for name, value in deviations.items() if abs(value) > 5} == {}


def test_noise_is_uniform_over_steps_and_canvases_too() -> None:
    steps = np.concatenate([step_noise(5, 0, step, 16, 262_144).tokens for step in range(1, 1025)])
    canvases = np.concatenate([step_noise(5, index, 1, 16, 262_144).tokens for index in range(1024)])
    assert abs(chi_square_deviation(steps >> 10, 256)) < 5
    assert abs(chi_square_deviation(canvases >> 10, 256)) < 5
