"""The compiled kernels of the CPU runner against the primitives that they stand for, in many torch calls each."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvasrt.network import sampler
from canvasrt.network.sampler import Filters, _draw
from canvasrt.ops import cpu_kernels
from canvasrt.ops.torch_fused import FusedTorchOps
from canvasrt.ops.torch_ops import TorchOps
from canvasrt.ops.torch_weights import TorchWeights
from canvasrt.spec import ModelSpec

Tensor = torch.Tensor

EPS = 1e-6


class Vectors:
    """Random weights of the shapes that are asked for; stands in for `TorchWeights`."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, **sizes: int) -> None:
        self._vectors = {name: torch.randn(size) for name, size in sizes.items()}

    def small(self, name: str, dtype: torch.dtype) -> Tensor:
        assert dtype is torch.float32
        return self._vectors[name]


def both(**sizes: int) -> tuple[FusedTorchOps, TorchOps]:
    weights = cast(TorchWeights, Vectors(**sizes))
    return FusedTorchOps(weights), TorchOps(weights)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def strided(*shape: int) -> Tensor:
    """Random numbers that do not lie side by side."""
    return torch.randn(*shape[:-1], shape[-1] + 3)[..., : shape[-1]]


Rows = st.integers(1, 40)
Size = st.integers(1, 70)


@settings(max_examples=60)
@given(rows=Rows, size=Size, seed=st.integers(0, 9))
def test_norms(rows: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    fused, plain = both(w=size)
    x, y = strided(1, rows, size), strided(1, rows, size)
    near(fused.rms(x, EPS), plain.rms(x, EPS))
    total, normed = fused.add_normed(x, y, "w", EPS)
    near(total, plain.add_normed(x, y, "w", EPS)[0])
    near(normed, plain.rms(total, EPS))  # of our sum: where it is nearly 0, the last bits are all that there is


@settings(max_examples=60)
@given(rows=Rows, size=st.integers(4, 70), flat=st.booleans(), per_token=st.booleans(), seed=st.integers(0, 9))
def test_the_end_of_a_layer(rows: int, size: int, flat: bool, per_token: bool, seed: int) -> None:
    """From 4 numbers on: the sum of the branches is normed, and fewer may all be nearly 0 by chance."""
    torch.manual_seed(seed)
    fused, plain = both(a=size, b=size, c=size)
    shape = (rows, size) if flat else (1, rows, size)
    factor = torch.randn(*shape[:-1], 1) if per_token else torch.randn(1)
    x, branches = strided(*shape), (strided(rows, size), strided(rows, size))
    total, normed = fused.add_branches(x, branches, ("a", "b", "c"), factor, EPS)
    assert total.shape == normed.shape == shape
    near(total, plain.add_branches(x, branches, ("a", "b", "c"), factor, EPS)[0])
    near(normed, plain.rms(total, EPS))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    half=st.integers(1, 20),
    value_is_key=st.booleans(),
    seed=st.integers(0, 9),
)
def test_heads(rows: int, tokens: int, kv_heads: int, share: int, half: int, value_is_key: bool, seed: int) -> None:
    torch.manual_seed(seed)
    fused, plain = both(q=2 * half, k=2 * half)
    count = kv_heads * (share + (1 if value_is_key else 2))
    projected = strided(rows, tokens, count * 2 * half)
    cos, sin = (torch.randn(rows, tokens, 1, 2 * half) for _ in range(2))
    arguments = (2 * half, ("q", kv_heads * share), ("k", kv_heads), value_is_key, EPS, cos, sin)
    for found, expected in zip(fused.heads(projected, *arguments), plain.heads(projected, *arguments), strict=True):
        assert found.shape == expected.shape
        near(found, expected)


@settings(max_examples=60)
@given(
    rows=Rows,
    experts=st.integers(1, 12),
    size=st.integers(1, 40),
    part=st.booleans(),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_chosen_experts(rows: int, experts: int, size: int, part: bool, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    chosen = data.draw(st.integers(1, experts))
    fused, plain = both(scale=experts)
    gated = strided(rows, experts * size) if part else torch.randn(experts * size, rows).t()
    # Far apart: the last chosen ones have weights that are 0 in float32.
    scores = torch.randn(rows, experts) * data.draw(st.sampled_from([1.0, 300.0]))
    arguments = (scores, "scale", experts, chosen)
    near(fused.choose_experts(gated, *arguments), plain.choose_experts(gated, *arguments))


def test_experts_that_are_nearly_or_just_as_good_are_chosen_once() -> None:
    fused, _ = both(scale=4)
    chosen = fused.choose_experts(torch.ones(1, 8), torch.zeros(1, 4), "scale", 4, 3)
    scale = fused._weights.small("scale", torch.float32)
    near(chosen.view(4, 2), (torch.tensor([1.0, 1, 1, 0]) / 3 * scale).unsqueeze(1).expand(4, 2))


def test_an_expert_that_is_not_chosen_leaves_nothing() -> None:
    fused, _ = both(scale=3)
    gated = torch.tensor([[1.0, 2.0, torch.nan]])
    assert fused.choose_experts(gated, torch.tensor([[3.0, 2.0, 1.0]]), "scale", 3, 2).isfinite().all()


def test_a_nan_comes_through_and_stays_in_its_row() -> None:
    torch.manual_seed(0)
    fused, _ = both(a=32, b=32, c=32, d=8, scale=4)
    x, y, z = (torch.randn(1, 5, 32) for _ in range(3))
    bad = torch.tensor([False, False, True, False, False])
    for index in range(3):
        parts = [part.clone() for part in (x, y, z)]
        parts[index][0, 2, 7] = torch.nan
        a, b, c = parts
        results = list(fused.add_branches(a, (b[0], c[0]), ("a", "b", "c"), torch.ones(1), EPS))
        if index < 2:
            results += fused.add_normed(a, b, "a", EPS)
        for result in results:
            assert torch.equal(result[0].isnan().any(-1), bad), index
    x[0, 2, 7] = torch.nan
    assert torch.equal(fused.rms(x, EPS)[0].isnan().any(-1), bad)
    cos, sin = torch.randn(2, 1, 5, 1, 8)
    for result in fused.heads(x, 8, ("d", 2), ("d", 1), False, EPS, cos, sin):
        assert result[0, [0, 1, 3, 4]].isfinite().all()
    queries, _, _ = fused.heads(x, 8, ("d", 3), ("d", 1), True, EPS, cos, sin)
    assert queries[0, 2, 0].isnan().all()  # the head that has it, which is the first
    scores = torch.randn(5, 4)
    scores[2] = torch.nan
    assert torch.equal(fused.choose_experts(torch.ones(5, 4), scores, "scale", 4, 2).isnan().any(-1), bad)


CAP = 30.0


def drawn(raw: Tensor, temperature: Tensor, uniforms: Tensor, limits: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """argmax, sampled, entropy, shares."""
    result = both()[0].draw(raw, CAP, temperature, uniforms, limits, sampler.BISECTIONS)
    assert result is not None
    return list(result)


@settings(max_examples=100)
@given(
    rows=st.integers(1, 12),
    size=st.sampled_from([2, 3, 61, 112, 1024]),
    limited=st.integers(0, 12),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_the_sampler(rows: int, size: int, limited: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    limited = min(limited, rows)
    plain, spec = both()[1], cast(ModelSpec, SimpleNamespace(vocab_size=size, softcap=CAP))
    raw, temperature = strided(rows, size).mul_(spread), torch.rand(rows, 1) + 0.3
    uniforms = torch.rand(rows, 1)
    top_k = torch.where(torch.rand(limited, 1) < 0.4, float(size), torch.randint(1, size + 1, (limited, 1)).float())
    top_p = torch.where(torch.rand(limited, 1) < 0.4, 2.0, torch.rand(limited, 1) * 0.9 + 0.05)
    limits = (top_k, top_p) if limited else None
    argmax, sampled, entropy, shares = drawn(raw, temperature, uniforms, limits)
    expected = _draw(plain, spec, raw, temperature, uniforms, None if limits is None else Filters(*limits))
    assert torch.equal(argmax.long(), expected[0])
    near(entropy, expected[2])
    near(shares, expected[3])
    edges = expected[3].double().cumsum(1)
    token = sampled.long().unsqueeze(1)
    below = torch.cat([torch.zeros(rows, 1), edges], 1).gather(1, token)
    assert (below <= uniforms + 1e-5).all()
    assert (edges.gather(1, token) >= uniforms - 1e-5).all()
    assert (shares.gather(1, token) > 0).all()


def test_the_kernel_draws_below_the_same_edge_as_the_network() -> None:
    """Neither module may import the other."""
    assert cpu_kernels.BELOW_ONE == sampler.BELOW_ONE


def test_probabilities_are_as_exact_as_float32_can_be() -> None:
    torch.manual_seed(0)
    raw, temperature = torch.randn(50, 300) * 40, torch.full((50, 1), 0.6)
    shares = drawn(raw, temperature, torch.zeros(50, 1), None)[3].double()
    scaled = (raw / CAP).tanh() * CAP / temperature  # float32: rounded before anything here is
    exact = (scaled - scaled.amax(1, keepdim=True)).double().softmax(1)
    seen = exact > 1e-30  # smaller ones may be 0
    assert exact[seen].min() < 1e-29
    assert ((shares - exact).abs() / exact)[seen].max() < 5e-7
    assert shares[~seen].max() < 1e-29


def test_equal_only_after_the_softcap_is_not_equal() -> None:
    raw = torch.tensor([[4000.0, 5000.0, 4500.0]])
    assert drawn(raw, torch.ones(1, 1), torch.zeros(1, 1), None)[0].tolist() == [1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    raw = torch.full((1, 9), -4000.0)
    raw[0, 4] = 4000.0
    results = drawn(raw, torch.full((1, 1), 0.5), torch.full((1, 1), uniform), None)
    assert results[1].tolist() == [4]
    assert results[3][0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_limits_of_a_row_change_no_bit_of_another() -> None:
    torch.manual_seed(1)
    raw, temperature, uniforms = torch.randn(7, 112) * 4, torch.rand(7, 1) + 0.3, torch.rand(7, 1)
    alone = drawn(raw, temperature, uniforms, None)
    beside = drawn(raw, temperature, uniforms, (torch.full((3, 1), 4.0), torch.full((3, 1), 0.8)))
    part = drawn(raw[2:5], temperature[2:5], uniforms[2:5], (torch.full((1, 1), 4.0), torch.full((1, 1), 0.8)))
    for ours, theirs, some in zip(alone, beside, part, strict=True):
        assert torch.equal(ours[:4], theirs[:4])
        assert torch.equal(some[:2], ours[2:4])
        assert torch.equal(some[2], theirs[4])
    assert not torch.equal(alone[3][4:], beside[3][4:])


def test_a_nan_among_logits_is_seen_in_its_row_only() -> None:
    torch.manual_seed(2)
    raw = torch.randn(3, 50)
    raw[1, 20] = torch.nan
    argmax, sampled, entropy, shares = drawn(raw, torch.ones(3, 1), torch.full((3, 1), 0.5), None)
    assert entropy.isnan().tolist() == [False, True, False]
    assert shares.isnan().any(1).tolist() == [False, True, False]
    assert ((sampled >= 0) & (sampled < 50) & (argmax >= 0) & (argmax < 50)).all()


@pytest.mark.parametrize("size", [8, 33, 128])
def test_a_row_has_the_same_bits_in_any_company(size: int) -> None:
    torch.manual_seed(size)
    fused, _ = both(a=size, b=size, c=size, scale=size, q=2 * size)
    x, y, z = (torch.randn(29, size) for _ in range(3))
    gated, scores = torch.randn(29, 3 * size), torch.randn(29, size)
    cos, sin = torch.randn(2, 1, 29, 1, 2 * size)
    projected = torch.randn(1, 29, 8 * size)

    def results(rows: slice) -> list[Tensor]:
        a, b, c = x[rows], y[rows], z[rows]
        factor = a[:, :1]
        q, k, v = fused.heads(projected[:, rows], 2 * size, ("q", 2), ("q", 1), False, EPS, cos[:, rows], sin[:, rows])
        return [
            fused.rms(a, EPS),
            *fused.add_normed(a, b, "a", EPS),
            *fused.add_branches(a, (b, c), ("a", "b", "c"), factor, EPS),
            fused.choose_experts(gated[rows], scores[rows], "scale", size, 2),
            *(each[0] for each in (q, k, v)),
        ]

    whole = results(slice(0, 29))
    for rows in (slice(0, 1), slice(28, 29), slice(3, 20), slice(1, 29)):
        for part, everything in zip(results(rows), whole, strict=True):
            assert torch.equal(part, everything[rows])


def test_without_a_folder_to_keep_compiled_code_in_it_is_compiled_again() -> None:
    """As in a container that may write nowhere."""
    program = (
        "import torch\n"
        "from canvasrt.ops import cpu_kernels\n"
        "x = torch.full((1, 4), 3.0)\n"
        "out = torch.empty(1, 4)\n"
        "cpu_kernels.rms(x.data_ptr(), out.data_ptr(), 1, 4, 0.0)\n"
        "print(out.tolist())\n"
    )
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}  # only for code in an archive
    done = subprocess.run([sys.executable, "-c", program], env=nowhere, capture_output=True, text=True, check=False)
    assert done.stdout == "[[1.0, 1.0, 1.0, 1.0]]\n", done.stderr
