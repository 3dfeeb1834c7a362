"""On a CPU in float32 a request's numbers have the same bits whatever else is in the batch and however its context was
cut into pieces. Else its tokens would depend on its neighbours: rarely, and only where two tokens are nearly as likely.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from canvasrt.checkpoint import Checkpoint
from canvasrt.network.moe import MoeChoice
from canvasrt.ops import torch_attention, torch_products
from canvasrt.ops.torch_attention import TILE, causal_attention
from canvasrt.ops.torch_products import Products
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from planning import DEMO
from tiny import Dims, write

STEPS = 3
MODELS = {
    "demo": None,
    "odd": Dims(context=512, vocab=61, hidden=40, mlp=27, expert_size=11, experts=5, canvas=7, embedding_scale=1.5),
    "one token": Dims(context=512, canvas=1, window=5, embedding_scale=1.5),
    "groups": Dims(
        context=512, heads=6, kv_heads=3, full_kv_heads=2, head_dim=8, window=30, layers="sf", embedding_scale=1.5
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dims = MODELS[request.param]
    return Checkpoint.open(DEMO if dims is None else write(tmp_path_factory.mktemp("invariance"), dims, seed=3))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Few tests: threads that wait for each other are slow beside another process of tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Request:
    """A prompt and the inputs of some steps of its canvas."""

    def __init__(self, source: Checkpoint, seed: int, most: int = 90) -> None:
        rng = np.random.default_rng(seed)
        spec = source.spec
        size, vocabulary = spec.canvas_length, spec.vocab_size
        self.prompt = rng.integers(2, vocabulary, rng.integers(1, most)).astype(np.int32)
        self.canvases = rng.integers(2, vocabulary, (STEPS, size)).astype(np.int32)
        self.uniforms = rng.random((STEPS, size), dtype=np.float32)
        self.temperature = float(rng.uniform(0.3, 0.9))
        self.limits = {"top_k": int(rng.choice([0, 5])), "top_p": float(rng.choice([1.0, 0.9]))}

    def row(self, slot: int, step: int) -> DenoiseRow:
        return DenoiseRow(
            slot, self.canvases[step], self.temperature, self.uniforms[step], step == 0, want_logits=True, **self.limits
        )

    def alone(self, runner: TorchRunner, slot: int = 0) -> list[DenoiseResult]:
        runner.release(slot)
        runner.encode([EncodeRow(slot, self.prompt, 0)])
        return [runner.denoise([self.row(slot, step)])[0] for step in range(STEPS)]


def same_bits(found: DenoiseResult, expected: DenoiseResult) -> bool:
    return all(
        np.array_equal(getattr(found, name), getattr(expected, name))
        for name in ("argmax", "sampled", "entropy", "logits")
    )


@pytest.mark.parametrize("moe", [None, MoeChoice("sparse")], ids=["as chosen", "sparse"])
def test_neighbours_change_no_bit(source: Checkpoint, moe: MoeChoice | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests that come one after another, so that prompts join the steps of others and sizes vary."""
    monkeypatch.setattr(torch_products, "TRIED_AT", 5)  # both libraries take part
    runner = TorchRunner(source, slots=8, context=160, moe=moe)
    requests = [Request(source, seed) for seed in range(8)]
    expected = [request.alone(runner) for request in requests]
    again = [request.alone(runner, slot) for slot, request in enumerate(requests)]
    found: list[list[DenoiseResult]] = [[] for _ in requests]
    for slot in range(8):
        runner.release(slot)
    for tick in range(4 + STEPS):
        coming = [slot for slot in (2 * tick, 2 * tick + 1) if slot < 8]
        if coming:
            runner.encode([EncodeRow(slot, requests[slot].prompt, 0) for slot in coming])
        running = [slot for slot in range(8) if slot // 2 <= tick and len(found[slot]) < STEPS]
        if tick % 2:
            running.reverse()
        results = runner.denoise([requests[slot].row(slot, len(found[slot])) for slot in running])
        for slot, result in zip(running, results, strict=True):
            found[slot].append(result)
    for slot in range(8):
        for step in range(STEPS):
            assert same_bits(again[slot][step], expected[slot][step])
            assert same_bits(found[slot][step], expected[slot][step]), (slot, step)


@pytest.mark.usefixtures("two_threads")
def test_a_neighbour_changes_no_bit_with_two_threads() -> None:
    source = Checkpoint.open(DEMO)
    runner = TorchRunner(source, slots=2, context=160)
    requests = [Request(source, seed) for seed in range(2)]
    expected = [request.alone(runner) for request in requests]
    for slot, request in enumerate(requests):
        runner.release(slot)
        runner.encode([EncodeRow(slot, request.prompt, 0)])
    for step in range(STEPS):
        found = runner.denoise([request.row(slot, step) for slot, request in enumerate(requests)])
        assert [same_bits(found[slot], expected[slot][step]) for slot in range(2)] == [True, True]


def test_cuts_of_a_context_change_no_bit(source: Checkpoint) -> None:
    """Pieces of any length, canvases denoised in between, a prefix that another prompt has left."""
    rng = np.random.default_rng(0)
    wanted = Request(source, 20, most=2)
    tokens = rng.integers(2, source.spec.vocab_size, 300).astype(np.int32)
    whole, cut = TorchRunner(source, context=400, chunk=400), TorchRunner(source, slots=3, context=400, chunk=64)
    whole.encode([EncodeRow(0, tokens, 0)])
    expected = [whole.stored(layer, 0) for layer in range(len(source.spec.layers))]
    position = 0
    while position < len(tokens):
        piece = tokens[position : position + int(rng.choice([1, 2, 5, 30, 90]))]
        if rng.random() < 0.3:  # other tokens, of another request, are rewound to what is common
            other = rng.integers(2, source.spec.vocab_size, 20).astype(np.int32)
            cut.encode([EncodeRow(1, np.concatenate([piece, other]), position)])
        neighbour = Request(source, position)
        cut.release(2)
        cut.encode([EncodeRow(1, piece, position), EncodeRow(2, neighbour.prompt, 0)])
        cut.denoise([wanted.row(1, 0), neighbour.row(2, 0)])
        position += len(piece)
    for layer, pair in enumerate(expected):
        for found, needed in zip(cut.stored(layer, 1), pair, strict=True):
            count = min(len(found), len(needed))  # of sliding layers each has kept what it had room for
            assert torch.equal(found[-count:], needed[-count:]), layer
    step = wanted.row(0, 0)
    assert same_bits(cut.denoise([wanted.row(1, 0)])[0], whole.denoise([step])[0])


@example(rows=[2, 16, 48, 384], sizes=(128, 256))
@example(rows=[1, 2, 3], sizes=(2048, 24))  # a layout for many rows has its own path for one
@example(rows=[1, 700], sizes=(1100, 40))
@example(rows=[103], sizes=(169, 209))  # rows that do not begin at a multiple of 64 bytes
@example(rows=[1], sizes=(2, 1))  # two numbers that MKL adds in another order are the same now and then
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_a_row_of_a_product_does_not_change_with_the_others(rows: list[int], sizes: tuple[int, int]) -> None:
    _check_rows(rows, sizes)


@pytest.mark.usefixtures("two_threads")
def test_a_row_of_a_product_does_not_change_with_the_others_with_two_threads() -> None:
    for sizes in ((128, 256), (128, 8), (512, 128), (40, 81)):
        _check_rows([1, 2, 48, 384], sizes)


def _check_rows(rows: list[int], sizes: tuple[int, int]) -> None:
    taken, out = sizes
    generator = torch.Generator().manual_seed(taken)
    x, matrix = torch.randn(900, taken, generator=generator), torch.randn(2 * out, taken, generator=generator)
    turned = torch.randn(taken, out, generator=generator).t()
    products = Products()
    calls = (products.linear, matrix), (products.linear, turned), (products.once, turned), (products.gated, matrix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_products, "TRIED_AT", 2)  # both libraries take part
        for multiply, by in calls:
            expected = multiply(x, by)
            for count in rows:
                for some in (slice(count), slice(17, 17 + count)):
                    for _ in range(3):
                        assert torch.equal(multiply(x[some], by), expected[some])


def test_mkl_is_taken_only_where_it_gives_the_same_bits_in_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_products, "TRIED_AT", 2)
    monkeypatch.setattr(torch_products, "may_try_mkl", lambda: True)
    x, matrix = torch.randn(48, 128), torch.randn(128, 128)
    called: list[str] = []

    def taken_after_trial(linear: object, seconds: float) -> bool:
        """``linear`` takes so many seconds in the trial, oneDNN one."""
        steps = iter([step for _ in range(torch_products.PROBES) for step in (0.0, seconds, 0.0, 1.0)])
        monkeypatch.setattr(torch_products, "perf_counter", lambda: next(steps))
        monkeypatch.setattr(torch_products, "functional", SimpleNamespace(linear=linear))
        products = Products()
        expected = products.linear(x, matrix)
        assert torch.equal(products.linear(x, matrix), expected)
        called.clear()
        assert torch.equal(products.linear(x, matrix), expected)
        return called == ["mkl"]

    def exact(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        called.append("mkl")
        return torch_products.product(x, matrix)

    def other_order(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return exact(x.flip(-1), matrix.flip(-1))

    assert taken_after_trial(exact, 0.5)
    assert not taken_after_trial(exact, 2.0)
    assert not taken_after_trial(other_order, 0.5)


def test_mkl_is_not_tried_on_processors_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, expected in (("GenuineIntel", True), ("AuthenticAMD", False)):
        (tmp_path / maker).write_text(f"vendor_id : {maker}\n")
        assert torch_products.may_try_mkl(str(tmp_path / maker)) is expected
    assert not torch_products.may_try_mkl(str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not torch_products.may_try_mkl(str(tmp_path / "GenuineIntel"))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("scores", [1 << 22, 5000], ids=["at once", "in parts"])
def test_long_contexts_are_attended_to_in_tiles_and_agree_with_the_plain_formula(
    window: int | None, groups: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "SCORES", scores)
    count, share, dim = 2 * TILE + 90, 2, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, count, groups * share, dim, generator=generator)
    keys, values = (torch.randn(1, count, groups, dim, generator=generator).transpose(1, 2) for _ in range(2))

    products = Products()

    def piece(begin: int, end: int) -> torch.Tensor:
        low = 0 if window is None else max(0, begin - window)
        query, key = torch.arange(begin, end).view(-1, 1), torch.arange(low, end)
        visible = (key <= query) & (True if window is None else key >= query - window)
        mask = torch.where(visible, 0.0, -torch.inf)[None, None]
        return causal_attention(q[:, begin:end], keys[:, :, low:end], values[:, :, low:end], mask, low, products)

    whole = piece(0, count)
    for cuts in ((1,), (TILE,), (TILE - 1, TILE + 1), (count - 1,), (100, 170, 400)):
        ends = (0, *cuts, count)
        assert torch.equal(torch.cat([piece(*pair) for pair in pairwise(ends)], 1), whole), cuts
    query, key = torch.arange(count).view(-1, 1), torch.arange(count)
    visible = (key <= query) & (True if window is None else key >= query - window)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2).double(), keys.double(), values.double(), visible, scale=1.0, enable_gqa=True
    )
    torch.testing.assert_close(whole.double(), plain.transpose(1, 2).flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 instructions")
@pytest.mark.parametrize(
    ("torch_name", "onednn", "mkl", "numba"),
    [("default", "SSE41", "SSE4_2", "nehalem"), ("avx2", "AVX2", "AVX2", "haswell")],
)
def test_older_processors_change_no_bit_either(torch_name: str, onednn: str, mkl: str, numba: str) -> None:
    """Their kernels add in other orders: the same tests, in a process that may not use newer instructions."""
    names = {"ATEN_CPU_CAPABILITY": torch_name, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    names["NUMBA_CPU_NAME"] = numba
    chosen = "demo or groups or long_contexts or a_row_of_a_product_does_not_change_with_the_others"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", f"({chosen}) and not threads", __file__]
    done = subprocess.run(command, env={**os.environ, **names}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
