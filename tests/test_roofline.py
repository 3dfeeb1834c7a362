"""The roofline against the numbers of the project's fact sheet, which come from elsewhere, and against hand arithmetic.

The sheet: GB read and FLOPs of one denoising step of the 26B at 4k context and batch 1, and the least time per GPU.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.compile.forecast import forecast_prefill, forecast_steps
from canvasrt.compile.roofline import (
    Cost,
    Experts,
    Part,
    Rates,
    committing_pass,
    computed_in,
    denoising_step,
    prefill_call,
    tokens_per_second,
)
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Setting
from canvasrt.errors import InputError
from canvasrt.formats import Format
from planning import CAPACITY, DEMO, DENSE, RECIPES, profile, published, setting

ROUTED = Experts(16)  # 256 tokens x 8 of 128 experts, spread evenly: what the sheet calls routed
SOURCES = {recipe: published(recipe) for recipe in RECIPES}


def step(recipe: str, experts: Experts = ROUTED, canvases: int = 1, active: int = 4096) -> Cost:
    return denoising_step(SOURCES[recipe], canvases, active, experts)


def part(cost: Cost, name: str) -> Part:
    (found,) = (each for each in cost.parts if each.name == name)
    return found


def rates(bandwidth: float, bf16: float, fp8: float | None, fp4: float | None) -> Rates:
    tflops = {"bf16": bf16, "fp8": fp8, "fp4": fp4, "int8": None}
    return Rates.of(profile(bandwidth=bandwidth, tflops=tflops))


@pytest.mark.parametrize(
    ("recipe", "gigabytes"), [("none", 52.7), ("fp8", 28.2), ("nvfp4-experts", 19.8), ("nvfp4", 17.5)]
)
def test_the_bytes_of_a_step_are_those_of_the_fact_sheet(recipe: str, gigabytes: float) -> None:
    assert step(recipe).nbytes / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_the_flops_of_a_step_are_those_of_the_fact_sheet() -> None:
    routed, dense = step("none"), step("none", Experts(None))
    assert routed.flops / 1e12 == pytest.approx(2.66, rel=0.02)
    vocabulary = part(routed, "embedding").flops + part(routed, "conditioning").flops
    assert vocabulary / 1e12 == pytest.approx(0.76, rel=0.02)
    assert part(dense, "experts").flops / 1e12 == pytest.approx(11.7, rel=0.02)
    assert part(routed, "embedding").nbytes / 1e9 == pytest.approx(2.95, rel=0.02)


@pytest.mark.parametrize(
    ("gpu", "recipe", "milliseconds"),
    [
        ((3350, 989, 1979, None), "fp8", 8.7),
        ((3350, 989, 1979, None), "nvfp4-experts", 6.2),
        ((4800, 989, 1979, None), "fp8", 6.4),
        ((4800, 989, 1979, None), "nvfp4-experts", 4.7),
        ((1792, 209.5, 419, 1676), "fp8", 20.2),
        ((1792, 209.5, 419, 1676), "nvfp4-experts", 16.7),
        ((1008, 165.2, 330.3, None), "nvfp4-experts", 25),
        ((1792, 503.8, 1007.6, 2015), "fp8", 16.3),
        ((1792, 503.8, 1007.6, 2015), "nvfp4-experts", 11.6),
        ((273, 125, 250, 500), "fp8", 105),
        ((273, 125, 250, 500), "nvfp4-experts", 74.6),
        ((8000, 2250, 4500, 9000), "fp8", 3.6),
        ((8000, 2250, 4500, 9000), "nvfp4-experts", 2.6),
    ],
    ids=str,
)
def test_the_parts_in_sequence_take_what_the_fact_sheet_says(
    gpu: tuple[float, float, float | None, float | None], recipe: str, milliseconds: float
) -> None:
    """Rates from the GPUs' data sheets, dense and with float32 accumulation."""
    on, cost = rates(*gpu), step(recipe)
    assert 1e3 * on.in_sequence(cost) == pytest.approx(milliseconds, rel=0.02)
    assert on.floor(cost) <= on.in_sequence(cost) <= on.unfused(cost)


def test_a_step_by_hand() -> None:
    """Full layers: 5 of 16 heads of 512 and 2 K/V heads. Sliding ones: 25 of 16 of 256 and 8, a window of 1023."""
    cost = step("nvfp4-experts", Experts(64), canvases=3, active=5000)
    tokens = 3 * 256
    kv = part(cost, "K/V")
    assert kv.nbytes == 3 * (5000 * 20_480 + 1023 * 204_800)
    assert kv.flops == 3 * 4 * 16 * 256 * (5 * 5256 * 512 + 25 * (1023 + 256) * 256)
    experts = part(cost, "experts")
    elements = 30 * 128 * 3 * 704 * 2816
    assert experts.nbytes == elements * 9 // 16 + 4 * 30 * 128 * (1408 + 2816)
    assert (experts.flops, experts.number) == (2 * elements * 64, "fp4")
    embedding = part(cost, "embedding")
    assert (embedding.nbytes, embedding.flops) == (2 * 2 * 262_144 * 2816, 2 * 2 * 262_144 * 2816 * tokens)
    assert part(cost, "logits").nbytes == tokens * 262_144 * 6
    assert cost.nbytes == sum(each.nbytes for each in cost.parts)
    assert sum(cost.flops_by_number().values()) == cost.flops
    scores, copies = 5 * 16 * tokens * 5256 * 4, 5 * 3 * 5256 * 2 * 2 * 512 * 2
    seats = 30 * 128 * 64 * (2 * 2816 + 3 * 704) * 2
    assert cost.intermediate_bytes == 2 * (scores + copies + seats) + tokens * 262_144 * 6


def test_committing_reads_no_vocabulary() -> None:
    denoise, commit = step("fp8"), committing_pass(SOURCES["fp8"], 1, 4096, ROUTED)
    names = {each.name for each in denoise.parts}
    assert names - {each.name for each in commit.parts} == {"embedding", "logits"}
    assert denoise.nbytes - commit.nbytes == 4 * 262_144 * 2816 + 256 * 262_144 * 6
    assert commit.flops == prefill_call(SOURCES["fp8"], 256, 4096, ROUTED).flops


@pytest.mark.parametrize(
    ("form", "number"),
    [
        (Format("plain"), "bf16"),
        (Format("nvfp4", "block", 16), "fp4"),
        (Format("nvfp4", "none", 16), "bf16"),
        (Format("fp8", "static"), "fp8"),
        (Format("fp8", "token"), "fp8"),
        (Format("fp8", "none"), "bf16"),
        (Format("int4", "none", 64), "bf16"),
    ],
)
def test_what_the_tensor_cores_multiply(form: Format, number: str) -> None:
    assert computed_in(form) == number


def test_a_gpu_without_tensor_cores_for_a_number_multiplies_in_bf16() -> None:
    on = rates(1000, 100, None, None)
    assert on.flops_per_second == {"bf16": 1e14, "fp8": 1e14, "fp4": 1e14}


def test_seats_beyond_the_tokens_of_a_call_cost_nothing_more() -> None:
    assert part(step("none", Experts(1000)), "experts").flops == part(step("none", Experts(None)), "experts").flops
    assert part(step("none", Experts(128)), "experts").flops * 2 == part(step("none", Experts(None)), "experts").flops


@given(
    st.sampled_from(RECIPES),
    st.integers(1, 8),
    st.integers(0, 200_000),
    st.one_of(st.none(), st.integers(1, 512)),
    st.floats(100, 8000),
    st.floats(50, 3000),
)
def test_the_three_times_are_in_order_and_grow_with_the_work(
    recipe: str, canvases: int, active: int, seats: int | None, bandwidth: float, bf16: float
) -> None:
    on = rates(bandwidth, bf16, 2 * bf16, 4 * bf16)
    cost = step(recipe, Experts(seats), canvases, active)
    assert max(on.memory_seconds(cost), on.compute_seconds(cost)) == on.floor(cost)
    assert on.floor(cost) <= on.in_sequence(cost) * (1 + 1e-12)
    assert on.in_sequence(cost) < on.unfused(cost)
    more = step(recipe, Experts(seats), canvases + 1, active + 1000)
    assert on.in_sequence(more) > on.in_sequence(cost)
    assert on.in_sequence(more) / (canvases + 1) < 2 * on.in_sequence(cost) / canvases  # weights are read once for all


def test_what_bounds_a_step_is_its_longest_part() -> None:
    assert rates(1000, 1000, 2000, 4000).bound(step("none")) == "experts: memory"
    assert rates(8000, 50, 100, 200).bound(step("none", Experts(None))) == "experts: arithmetic"
    assert rates(8000, 50, 100, 200).bound(step("none", active=200_000)) == "K/V: arithmetic"


def test_tokens_per_second_by_hand() -> None:
    """16 steps of 10 ms and a commit of 8 ms for 256 tokens of each of 2 canvases."""
    total, committed = tokens_per_second(256, 2, 16, 0.010, 0.008)
    assert total == pytest.approx(2 * 16 / 0.010)
    assert committed == pytest.approx(2 * 256 / 0.168)


def test_no_step_makes_more_tokens_than_a_canvas_has() -> None:
    assert tokens_per_second(8, 1, 20, 0.010, 0.010) == pytest.approx((800, 400))


def test_the_forecast_shows_both_formulations_and_both_numbers_of_canvases() -> None:
    rows = forecast_steps(SOURCES["nvfp4-experts"], profile(moe=CAPACITY), setting())
    assert [(row.active, row.canvases, row.experts, row.chosen) for row in rows] == [
        (active, canvases, experts, chosen)
        for active in (1024, 4096, 32_768 - 256)
        for canvases in (1, 2)
        for experts, chosen in (("capacity 64", True), ("dense", False))
    ]
    for row in rows:
        assert row.read_bytes == sum(each.nbytes for each in row.parts)
        for speed in row.speeds:
            assert speed.total == pytest.approx(row.canvases * speed.per_request, rel=1e-3)
            assert speed.total == pytest.approx(
                1e3 * row.canvases * speed.tokens_per_forward / row.in_sequence_ms, 1e-3
            )
            passes = 256 / speed.tokens_per_forward * row.in_sequence_ms + row.commit_ms
            assert speed.total_with_commit == pytest.approx(1e3 * 256 * row.canvases / passes, 1e-3)


def test_dense_is_compared_with_four_times_the_mean_load() -> None:
    rows = forecast_steps(SOURCES["none"], profile(moe=DENSE), setting(context=1280))
    assert [(row.active, row.canvases, row.experts) for row in rows if not row.chosen] == [
        (1024, 1, "capacity 64"), (1024, 2, "capacity 128"),
    ]  # fmt: skip
    assert all(row.experts == "dense" for row in rows if row.chosen)


@pytest.mark.parametrize(("context", "active"), [(1024, [0, 256]), (512, [0, 0]), (32_768, [0, 32_000])])
def test_prefill_is_that_of_the_first_and_of_the_last_chunk(context: int, active: list[int]) -> None:
    rows = forecast_prefill(SOURCES["nvfp4"], profile(), setting(context=context))
    assert [row.active for row in rows] == sorted(set(active))
    for row in rows:
        assert (row.chunk, row.experts) == (512, "capacity 128")
        assert row.tokens_per_second == pytest.approx(1e3 * 512 / row.in_sequence_ms, rel=1e-3)


def test_a_small_model_has_a_forecast_too() -> None:
    rows = forecast_steps(ModelSource.open(DEMO), profile(), Setting(4, 1024, 512, 2))
    assert {row.active for row in rows} == {1024 - 48}
    assert all(row.floor_ms > 0 for row in rows)


@pytest.mark.parametrize("changes", [{"bandwidth": None}])
def test_a_profile_without_rates_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"test-gpu states no bandwidth_gb_s or no tflops"):
        Rates.of(profile(**changes))
