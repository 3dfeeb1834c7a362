"""The in-graph sampler: inverse CDF in two levels, filters by bisection, against plain and library versions."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

import canvasrt.network.sampler
from canvasrt.network.sampler import REMOVED, Filters, _block_width, _inverse_cdf, _kept, _least_kept, predict
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights
from canvasrt.spec import ModelSpec

OPS = TorchOps(cast(TorchWeights, SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))))
JUST_BELOW_ONE = 1.0 - 2.0**-24


def sample(weights: torch.Tensor, uniforms: torch.Tensor) -> list[int]:
    drawn = _inverse_cdf(
        OPS, weights.shape[-1], weights, weights, lambda columns: columns, uniforms.float().view(-1, 1)
    )
    return drawn.tolist()


SERVED = canvasrt.network.sampler.ONE_LEVEL


@pytest.fixture(params=[0, SERVED], ids=["two levels", "as served"], scope="module", autouse=True)
def levels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small vocabularies, which these tests need, would not reach the two levels otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvasrt.network.sampler, "ONE_LEVEL", request.param)
        yield


@given(vocabulary=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_two_levels_draw_the_token_of_one_level(vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # whole numbers: sums are exact, so both must agree at the edges too
    weights = torch.randint(0, 5, (20, vocabulary), generator=generator).float()
    weights[:, int(torch.randint(vocabulary, (1,), generator=generator))] += 1
    uniforms = torch.rand(20, generator=generator)
    edges = weights.double().cumsum(-1)
    target = uniforms.double().view(-1, 1) * (1 - 2.0**-23) * edges[:, -1:]
    near_edge = ((edges - target).abs() < 1e-5 * edges[:, -1:]).any(-1)
    expected = (edges <= target).sum(-1)
    drawn = torch.tensor(sample(weights, uniforms))
    assert bool(((drawn == expected) | near_edge).all())


@pytest.mark.parametrize("uniform", [0.0, 0.3, JUST_BELOW_ONE])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    for vocabulary in (1, 2, 9, 10, 112, 1000):
        for only in {0, vocabulary // 2, vocabulary - 1}:
            weights = torch.zeros(1, vocabulary)
            weights[0, only] = 0.7
            assert sample(weights, torch.tensor([uniform])) == [only]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(500, 300, generator=generator) * (torch.rand(500, 300, generator=generator) < 0.05)
    weights[:, 7] = 1e-3
    drawn = sample(weights, torch.full((500,), uniform))
    assert bool((weights[torch.arange(500), drawn] > 0).all())


@pytest.mark.parametrize("vocabulary", [112, 4096])
def test_a_target_at_the_edge_of_a_block_draws_no_token_of_probability_zero(vocabulary: int) -> None:
    """Just at an edge the rounded rest can be negative, and the block's first token may have probability 0."""
    generator = torch.Generator().manual_seed(0)
    width = _block_width(vocabulary)
    for _ in range(20):
        weights = torch.zeros(1, vocabulary)
        chosen = torch.randperm(vocabulary, generator=generator)[: vocabulary // 9]
        weights[0, chosen] = (torch.randn(len(chosen), generator=generator) * 2).exp()
        padded = torch.nn.functional.pad(weights, (0, -vocabulary % width)).view(-1, width)
        edges = padded.sum(1).cumsum(0)
        ticks = (edges / edges[-1] * 2**24).long().view(-1, 1) + torch.arange(-6, 7)
        uniforms = ticks[(ticks >= 0) & (ticks < 2**24)].float() * 2.0**-24
        drawn = sample(weights.expand(len(uniforms), -1), uniforms)
        assert bool((weights[0, drawn] > 0).all())


def test_samples_follow_the_distribution_over_the_published_vocabulary() -> None:
    """262,144 tokens, of which a few hundred carry the mass: counts within 5 sigma of their expectation."""
    rng = np.random.default_rng(0)
    weights = torch.zeros(1, 262_144)
    tokens = rng.choice(262_144, 300, replace=False)
    weights[0, tokens] = torch.from_numpy(rng.random(300, dtype=np.float32))
    draws = 400
    counts = np.zeros(262_144)
    for _ in range(4):
        drawn = sample(weights.expand(draws, -1), torch.from_numpy(rng.random(draws, dtype=np.float32)))
        np.add.at(counts, drawn, 1)
    share = (weights[0] / weights.sum()).numpy().astype(np.float64)
    assert counts[share == 0].sum() == 0
    sigma = np.sqrt(4 * draws * share * (1 - share)) + 1e-9
    assert np.all(np.abs(counts - 4 * draws * share)[share > 0] <= 5 * sigma[share > 0])


def filtered(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    shifted = logits - logits.amax(-1, keepdim=True)
    rows = len(logits)
    filters = Filters(torch.full((rows, 1), float(top_k)), torch.full((rows, 1), top_p))
    return _kept(OPS, shifted, _least_kept(OPS, shifted, filters)) > REMOVED


@given(
    vocabulary=st.integers(2, 300),
    top_k=st.integers(1, 300),
    top_p=st.floats(0.01, 0.999),
    spread=st.floats(0.1, 20),
    seed=st.integers(0, 2**31),
)
def test_filters_keep_what_the_library_keeps(
    vocabulary: int, top_k: int, top_p: float, spread: float, seed: int
) -> None:
    logits = torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    kept = filtered(logits, min(top_k, vocabulary), top_p)
    scores = TopKLogitsWarper(min(top_k, vocabulary))(None, logits)
    expected = TopPLogitsWarper(top_p)(None, scores) > -torch.inf
    # The library sums from the smallest up in float32: allow another token where the sum meets top_p within rounding.
    probabilities = scores.softmax(-1).double()
    for row in range(16):
        if not torch.equal(kept[row], expected[row]):
            mass = sorted(float(probabilities[row][mask].sum()) for mask in (kept[row], expected[row]))
            assert abs(int(kept[row].sum()) - int(expected[row].sum())) == 1
            assert abs(mass[0] - top_p) < 1e-5


def test_a_row_without_limits_loses_nothing_to_rounding() -> None:
    logits = torch.randn(8, 112, generator=torch.Generator().manual_seed(1)) * 10
    assert bool(filtered(logits, 112, 2.0).all())


def test_only_the_last_rows_are_limited_each_by_its_own_limits() -> None:
    """Through ``predict``: entropy tells how many tokens are left of an even distribution."""
    source = SimpleNamespace(vocab_size=112, softcap=30.0, hidden_size=4)
    ops = TorchOps(cast(TorchWeights, Even()))
    filters = Filters(torch.tensor([[3.0], [112.0]]), torch.tensor([[2.0], [0.5]]))
    temperature, uniforms = torch.tensor([[0.5], [0.7], [1.0], [2.0], [0.4]]), torch.full((5, 1), 0.99)
    found = predict(ops, cast(ModelSpec, source), torch.ones(5, 4), temperature, uniforms, filters)
    logits = found.logits / temperature
    for row, kept in enumerate((112, 112, 112, 3)):
        expected = torch.distributions.Categorical(logits=logits[row].topk(kept).values).entropy()
        torch.testing.assert_close(found.entropy[row], expected, atol=1e-4, rtol=1e-4)
    probabilities = logits[4].softmax(-1).sort(descending=True).values
    kept = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    expected = torch.distributions.Categorical(probs=probabilities[:kept]).entropy()
    torch.testing.assert_close(found.entropy[4], expected, atol=1e-4, rtol=1e-4)


class Even:
    """Weights of an embedding whose logits are 112 different numbers for every row."""

    dtype, device = torch.float32, torch.device("cpu")

    def fused(self, names: tuple[str, ...]) -> torch.Tensor:
        return torch.linspace(-1, 1, 112).view(-1, 1).expand(-1, 4).contiguous()

    def transposed(self, name: str) -> torch.Tensor:
        return self.fused((name,)).t()


@pytest.mark.parametrize(("vocabulary", "width"), [(262_144, 512), (1000, 40), (1018, 509), (1009, 1009), (4, 2)])
def test_blocks_divide_the_vocabulary(vocabulary: int, width: int) -> None:
    assert _block_width(vocabulary) == width


def test_the_likeliest_token_always_survives() -> None:
    logits = torch.randn(8, 112, generator=torch.Generator().manual_seed(2))
    kept = filtered(logits, 1, 0.01)
    assert kept.sum(-1).tolist() == [1] * 8
    assert bool(kept[torch.arange(8), logits.argmax(-1)].all())
