"""Two runners compared with numbers computed here, the report about it, and the sizes in that report."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from canvasrt.checkpoint import Checkpoint
from canvasrt.diffusion.params import RequestParams
from canvasrt.diffusion.request import RequestState
from canvasrt.errors import CapacityError, CheckpointError
from canvasrt.quality import report as reports
from canvasrt.quality.compare import Comparison, compare
from canvasrt.quality.report import Report, markdown, rows
from canvasrt.quality.size import bytes_on_disk, bytes_per_step
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.generate import run_requests
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow
from canvasrt.runtime.torch_runner import TorchRunner
from tiny import Dims, write

PARAMS = RequestParams(
    seed=3,
    max_tokens=40,
    max_denoising_steps=8,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    stability_threshold=1,
    confidence_threshold=0.005,
    top_k=0,
    top_p=1.0,
    stop=(),
    stop_token_ids=frozenset({1}),
    canvas=16,
    vocabulary=64,
)
Change = Callable[[DenoiseResult], DenoiseResult]
COMPARISON = Comparison(0.00123, 0.0007, 0.974, -0.0021, 14.25, 13.5, 4096)
REPORT = Report("fp8", "model", "exact", 24, COMPARISON, 0.5, None, 26_000_000_000, 51_600_000_000, 99_000_000, 10**8)


class Recorded(FakeRunner):
    """A FakeRunner that keeps what it was asked with want_logits and what it said, and may change what it says."""

    def __init__(self, change: Change = lambda result: result, **limits: int) -> None:
        super().__init__(**limits)
        self._change = change
        self.seen: list[tuple[DenoiseRow, DenoiseResult]] = []

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        results = [self._change(result) for result in super().denoise(rows)]
        self.seen += [pair for pair in zip(rows, results, strict=True) if pair[0].want_logits]
        return results


class Failing(FakeRunner):
    """Runs out of memory at the given call of a kind, counted from 1; "free": a step without want_logits."""

    def __init__(self, kind: str, call: int) -> None:
        super().__init__()
        self._kind, self._left = kind, call

    def _count(self, kind: str) -> None:
        self._left -= kind == self._kind
        if self._left == 0:
            raise CapacityError("no memory")

    def encode(self, rows: Sequence[EncodeRow]) -> None:
        self._count("encode")
        super().encode(rows)

    def denoise(self, rows: Sequence[DenoiseRow], meanwhile: Any = None) -> list[DenoiseResult]:
        self._count("denoise" if rows[0].want_logits else "free")
        return super().denoise(rows)


def request(seed: int, length: int = 9, **changes: Any) -> RequestState:
    prompt = np.random.default_rng(seed).integers(2, 5, length).astype(np.int32)
    return RequestState.new(replace(PARAMS, seed=seed, **changes), prompt)


def ignore() -> None:
    """Progress of no interest."""


def final(runner: Any, state: RequestState) -> RequestState:
    return [event.state for event in run_requests(runner, {0: state})][-1]


def assert_all_released(runners: Sequence[FakeRunner]) -> None:
    assert [runner.length(slot) for runner in runners for slot in range(4)] == [0] * 8


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def mean_kl(pairs: Sequence[tuple[np.ndarray, np.ndarray, float]]) -> float:
    """Over all positions of (source logits, other logits, temperature)."""
    each = []
    for source, other, temperature in pairs:
        p, q = softmax(source, temperature), softmax(other, temperature)
        each += [float((p_row * np.log(p_row / q_row)).sum()) for p_row, q_row in zip(p, q, strict=True)]
    return sum(each) / len(each)


def altered(result: DenoiseResult) -> DenoiseResult:
    """Other logits, a quarter nat more entropy, and in the first three of 16 positions another best token."""
    argmax = result.argmax.copy()
    argmax[:3] = 2 + (argmax[:3] - 1) % 60
    logits = None if result.logits is None else 5 * result.logits**2
    return replace(result, argmax=argmax, entropy=result.entropy + np.float32(0.25), logits=logits)


ENDLESS = request(6, stop_token_ids=frozenset(), top_k=7, top_p=0.9)
REQUESTS = [request(1), request(2, 30), request(5, 17, max_tokens=16), ENDLESS]


def test_a_runner_equals_its_twin() -> None:
    calls: list[int] = []
    runners = FakeRunner(), FakeRunner()
    found = compare(*runners, REQUESTS, lambda: calls.append(1))
    alone = [final(FakeRunner(), state) for state in REQUESTS]
    assert found.source_outputs == found.outputs == [state.output for state in alone]
    steps = sum(state.passes for state in alone) / sum(state.canvas.index + 1 for state in alone)
    assert found.comparison == Comparison(0.0, 0.0, 1.0, 0.0, steps, steps, 16 * sum(state.passes for state in alone))
    assert len({len(output) for output in found.outputs}) > 1
    assert len(calls) == len(REQUESTS)
    assert_all_released(runners)


def test_two_runners_of_one_checkpoint_are_equal_and_of_two_are_not(tmp_path: Path) -> None:
    dims = Dims(layers="sf")
    folders = [write(tmp_path / str(seed), dims, seed) for seed in (0, 0, 1)]
    runners = [TorchRunner(Checkpoint.open(folder), slots=1, context=64) for folder in folders]
    state = request(3, canvas=12, vocabulary=67, max_tokens=24, max_denoising_steps=3)
    same = compare(runners[0], runners[1], [state], ignore)
    assert (same.comparison.kl, same.comparison.top1_agreement, same.comparison.entropy_difference) == (0, 1, 0)
    assert same.outputs == same.source_outputs
    other = compare(runners[0], runners[2], [state], ignore)
    assert other.comparison.kl > 0.1
    assert other.comparison.top1_agreement < 0.9
    assert other.source_outputs == same.source_outputs != other.outputs


def test_differences_are_means_over_all_positions_of_all_steps() -> None:
    source, other = Recorded(), Recorded(altered)
    found = compare(source, other, REQUESTS, ignore).comparison
    pairs = [(a.logits, b.logits, row.temperature) for (row, a), (_, b) in zip(source.seen, other.seen, strict=True)]
    assert len({row.temperature for row, _ in source.seen}) > 2
    assert found.positions == 16 * len(pairs)
    assert found.kl == pytest.approx(mean_kl(pairs), rel=1e-9)
    assert found.top1_agreement == 13 / 16
    # both saw the same canvases with the same signal, or the entropies would not be a quarter nat off everywhere
    assert found.entropy_difference == pytest.approx(0.25, abs=1e-7)


def test_both_see_the_canvases_of_the_sources_own_run() -> None:
    source, other = Recorded(), Recorded(altered)
    found = compare(source, other, REQUESTS, ignore)
    canvases = [
        step.draft.tokens
        for state in REQUESTS
        for step in (event.state for event in run_requests(FakeRunner(), {0: state}) if event.kind == "step")
        if step.draft is not None and not step.draft.done
    ]
    for ours, theirs in zip(source.seen, other.seen, strict=True):
        for field in fields(DenoiseRow):
            np.testing.assert_array_equal(getattr(ours[0], field.name), getattr(theirs[0], field.name))
    seen = [row.canvas for row, _ in source.seen if not row.first]
    np.testing.assert_array_equal(seen, canvases)
    assert found.source_outputs == [final(FakeRunner(), state).output for state in REQUESTS]
    assert found.outputs == [final(Recorded(altered), state).output for state in REQUESTS] != found.source_outputs


def test_steps_per_canvas_are_those_of_free_runs() -> None:
    """One that is never confident takes every step of every canvas."""
    found = compare(FakeRunner(), Recorded(altered), REQUESTS, ignore).comparison
    alone = [final(FakeRunner(), state) for state in REQUESTS]
    assert found.steps_per_canvas == PARAMS.max_denoising_steps
    assert found.source_steps_per_canvas == sum(s.passes for s in alone) / sum(s.canvas.index + 1 for s in alone)
    assert found.source_steps_per_canvas < PARAMS.max_denoising_steps


def constant(logits: np.ndarray) -> Recorded:
    """Of 150 positions: more than are held at once, and no multiple of that."""
    return Recorded(lambda result: replace(result, logits=logits), canvas=150, vocabulary=5)


@pytest.mark.parametrize(
    ("t_min", "t_max", "steps"), [(0.05, 0.05, [0.05]), (1.0, 1.0, [1.0]), (3.0, 3.0, [3.0]), (0.5, 2.0, [2.0, 1.25])]
)
def test_kl_is_of_the_distributions_at_the_temperature_of_the_step(
    t_min: float, t_max: float, steps: list[float]
) -> None:
    """And from source to other: the other way round it is another number."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(150, 5)).astype(np.float32) for _ in range(2))
    state = request(1, canvas=150, vocabulary=5, max_tokens=150, max_denoising_steps=2, t_min=t_min, t_max=t_max)
    found = compare(constant(a), constant(b), [state], ignore).comparison.kl
    assert found == pytest.approx(mean_kl([(a, b, temperature) for temperature in steps]), rel=1e-6)
    assert found != pytest.approx(mean_kl([(b, a, temperature) for temperature in steps]), rel=1e-3)


def test_distributions_far_apart_have_a_finite_difference() -> None:
    a, b = (np.full((150, 5), -30, np.float32) for _ in range(2))
    a[:, 0] = b[:, 1] = 30
    state = request(1, canvas=150, vocabulary=5, t_min=0.01, t_max=0.01, max_tokens=150)
    assert compare(constant(a), constant(b), [state], ignore).comparison.kl == pytest.approx(60 / 0.01, rel=1e-5)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("kind", "call"), [("encode", 1), ("encode", 2), ("denoise", 1), ("denoise", 4), ("free", 3)])
def test_slots_are_released_after_an_error(place: int, kind: str, call: int) -> None:
    runners = [FakeRunner(), FakeRunner()]
    runners[1 if kind == "free" else place] = Failing(kind, call)  # the source has no run of its own
    with pytest.raises(CapacityError, match="no memory"):
        compare(runners[0], runners[1], REQUESTS, ignore)
    assert_all_released(runners)


@pytest.mark.parametrize("report", [REPORT, replace(REPORT, solved=None, source_solved=1.0)])
def test_a_report_is_read_as_it_was_written(tmp_path: Path, report: Report) -> None:
    reports.write(report, tmp_path)
    assert reports.read(tmp_path) == report
    assert json.loads((tmp_path / "quality.json").read_text())["comparison"]["kl"] == report.comparison.kl
    assert (tmp_path / "quality.md").read_text() == markdown([report])


def test_a_folder_without_a_report_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        reports.read(tmp_path)
    assert f"canvasrt verify {tmp_path} --source CHECKPOINT" in str(caught.value)


def damaged(**changes: Any) -> str:
    return json.dumps(asdict(REPORT) | changes)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "null", "{}", damaged()[:-9], damaged(colour=1), damaged(comparison=None), damaged(comparison={})),
        damaged(comparison=asdict(COMPARISON) | {"colour": 1}),
        damaged(comparison=[1, 2, 3, 4, 5, 6]),
        damaged().replace('"solved": 0.5, ', ""),
        pytest.param(damaged(comparison=asdict(COMPARISON) | {"kl": "low"})),
        pytest.param(damaged(bytes_on_disk=None)),
        pytest.param("[" * 100_000),
    ],
    ids=range(14),
)
def test_a_damaged_report_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "quality.json").write_text(text)
    with pytest.raises(CheckpointError, match="make it again") as caught:
        reports.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "quality.json"))


def test_the_table_has_a_column_per_report_behind_the_source() -> None:
    second = replace(REPORT, recipe="nvfp4", comparison=replace(COMPARISON, kl=0.5, steps_per_canvas=15.0), solved=None)
    expected = [
        ["", "model", "fp8", "nvfp4"],
        ["KL, nats per position", "0", "1.23e-03", "5.00e-01"],
        ["KL, median of the prompts", "0", "7.00e-04", "7.00e-04"],
        ["same most likely token", "100.0%", "97.4%", "97.4%"],
        ["entropy difference, nats", "0", "-2.1e-03", "-2.1e-03"],
        ["steps per canvas", "13.50", "14.25", "15.00"],
        ["solved", "-", "50.0%", "-"],
        ["on disk", "51.60 GB", "26.00 GB", "26.00 GB"],
        ["read per step", "0.10 GB", "99.00 MB", "99.00 MB"],
    ]
    assert rows([REPORT, second]) == expected
    table, note = markdown([REPORT, second]).split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines == [expected[0], ["---"] * 4, *expected[1:]]
    assert note == "24 held-out prompts, exact arithmetic.\n"


def test_a_step_reads_the_embedding_twice_and_nothing_of_the_encoder(tmp_path: Path) -> None:
    source = Checkpoint.open(write(tmp_path, Dims(layers="sf")))
    embedding, experts, mlp, router = 67 * 32, 4 * 3 * 24 * 32, 3 * 48 * 32, 4 * 32 + 32 + 4
    sliding = 64 * 32 + 2 * 32 * 32 + 32 * 64 + 2 * 16  # q, k and v, o, norms
    full = 128 * 32 + 32 * 32 + 32 * 128 + 2 * 32  # no v
    layers = sliding + full + 2 * (experts + mlp + router + 7 * 32 + 1)
    once = embedding + 32 + (mlp + 32) + layers  # final norm, self-conditioning
    assert bytes_per_step(source) == 4 * (once + embedding)
    assert source.nbytes() == 4 * (once + 2)  # the encoder's two scalars
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert bytes_on_disk(source) == sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)


def test_a_runner_is_not_compared_with_itself() -> None:
    runner = FakeRunner()
    with pytest.raises(ValueError, match="open two"):
        compare(runner, runner, REQUESTS, ignore)
