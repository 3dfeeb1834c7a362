"""The planned memory against arithmetic by hand and against real plans, and what each part of it depends on."""

from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canvasrt.compile.sizes import sizes, stored_bytes, unpacked_bytes, with_recipe
from canvasrt.compile.source import ModelSource
from canvasrt.compile.vram import Setting, VramBudget
from canvasrt.formats import Format
from canvasrt.quantize.recipe import load_recipe
from planning import (
    CAPACITY,
    DEMO,
    DENSE,
    GB,
    MODELS,
    RECIPES,
    SETTINGS,
    deployment,
    published,
    quick,
    setting,
)  # fmt: skip

# The 26B by hand. Elements:
EXPERTS = 30 * 128 * 3 * 704 * 2816
ATTENTION = 25 * (2 * 16 + 2 * 8) * 256 * 2816 + 5 * (2 * 16 + 2) * 512 * 2816  # q and o, k, v where there is one
MLP = 30 * 3 * 2112 * 2816
EMBEDDING = 262_144 * 2816
CONDITIONING = 3 * 2112 * 2816 + 2816
OTHER = 30 * (128 * 2816 + 2816 + 128 + 7 * 2816 + 2) + 25 * 2 * 256 + 5 * 2 * 512 + 2816  # router, norms, scalars
ALL = EXPERTS + ATTENTION + MLP + EMBEDDING + CONDITIONING + OTHER
# Output channels, each with a float32 scale in FP8 and NVFP4
EXPERT_ROWS = 30 * 128 * (2 * 704 + 2816)
ATTENTION_ROWS = 25 * ((16 + 8 + 8) * 256 + 2816) + 5 * ((16 + 2) * 512 + 2816)
MLP_ROWS = 30 * (2 * 2112 + 2816)
LINEAR = EXPERTS + ATTENTION + MLP
LINEAR_ROWS = EXPERT_ROWS + ATTENTION_ROWS + MLP_ROWS


def test_the_parameters_are_those_that_are_published() -> None:
    assert round(ALL / 1e9, 2) == 25.25
    assert [round(n / 1e9, 3) for n in (ATTENTION, MLP, EXPERTS, EMBEDDING)] == [1.110, 0.535, 22.838, 0.738]
    found = {part: size.elements for (part, _), size in sizes(published()).items()}
    assert found == {
        "experts": EXPERTS, "attention": ATTENTION, "mlp": MLP, "embedding": EMBEDDING, "conditioning": CONDITIONING,
        "other": OTHER,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("none", {"plain": 2 * ALL}),
        ("fp8", {"fp8": LINEAR + 4 * LINEAR_ROWS, "plain": 2 * (ALL - LINEAR)}),
        # an E4M3 scale per 16 weights
        ("nvfp4-experts", {"nvfp4": EXPERTS * 9 // 16 + 4 * EXPERT_ROWS, "plain": 2 * (ALL - EXPERTS)}),
        ("nvfp4", {"nvfp4": LINEAR * 9 // 16 + 4 * LINEAR_ROWS, "plain": 2 * (ALL - LINEAR)}),
        # a BF16 scale per 64 weights
        ("int4-experts", {"int4": EXPERTS // 2 + EXPERTS // 32, "plain": 2 * (ALL - EXPERTS)}),
    ],
)
def test_weights_by_format_are_those_counted_by_hand(recipe: str, weights: dict[str, int]) -> None:
    found = deployment(published(recipe)).weights
    assert found == weights
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize(
    ("form", "nbytes"),
    [
        (Format("plain"), 2 * 32 * 64),
        (Format("fp8", "static"), 32 * 64 + 4 * 32),
        (Format("fp8", "token"), 32 * 64 + 4 * 32),
        (Format("nvfp4", "block", 16), 32 * 32 + 32 * 4 + 4 * 32),
        (Format("nvfp4", "none", 16), 32 * 32 + 32 * 4 + 4 * 32),
        (Format("int4", "none", 64), 32 * 32 + 2 * 32),
    ],
)
def test_a_matrix_in_each_format(form: Format, nbytes: int) -> None:
    assert stored_bytes((32, 64), form) == nbytes


def test_the_26b_by_hand() -> None:
    """5 full layers with 2 heads of 512, 25 sliding ones with 8 of 256; a call of 2 canvases, and one of 256 tokens."""
    found = deployment(published("nvfp4-experts")).budget(setting(chunk=256))
    sliding = 1023 + 256 + 256
    assert found.full_kv_bytes == 4 * 32_768 * 20_480
    assert found.sliding_kv_bytes == 4 * sliding * 204_800
    for activations, tokens, rows in ((found.decoder, 512, 2), (found.encoder, 256, 1)):
        # four in BF16 and one in float32 of the hidden size; queries, keys and values of a full layer in both
        assert activations.residual_bytes == tokens * (2816 * 12 + (16 + 2 * 2) * 512 * 6)
        scores = 16 * tokens * 32_768 * 2
        masks = (8 * tokens * 32_768 * 2, tokens * sliding * 2)  # a line for each of 8 query heads of a group
        assert activations.attention == (scores, scores, rows * 32_768 * 2 * 512 * 2, *masks)
        gate_up, hidden, gathered = (128 * tokens * width * 2 for width in (1408, 704, 2816))
        assert activations.experts == (gate_up, hidden, gathered, 0, *masks)
    vocabulary = 512 * 262_144
    assert found.decoder.sampler == (vocabulary * 4,) * 4 + (vocabulary * 2,)
    assert sum(found.encoder.sampler) == 0
    # scores, and the sampler's tensors, are as large as each other: 512 MiB
    assert found.decoder.total_bytes == found.decoder.residual_bytes + 4 * 2**29 + 2**28
    assert found.activations is found.decoder
    tokens = 256 + 512  # of a call of each range
    soft, inputs = (4 * 256 + tokens) * 2816 * 2, 2 * tokens * ((256 + 512) * 4 + 64)
    counts = (32_768 + 512) * 4
    assert found.io_bytes == soft + inputs + counts + 256 * 262_144 * 4 + 2**24
    assert found.overhead_bytes == 700_000_000 + 34 * GB * 3 // 100
    caches = found.full_kv_bytes + found.sliding_kv_bytes
    assert found.total_bytes == sum(found.items().values())
    assert found.total_bytes == (
        found.weight_bytes + caches + found.decoder.total_bytes + found.io_bytes + found.overhead_bytes
    )
    assert 24 * GB < found.total_bytes < 27 * GB


def test_the_demo_by_hand() -> None:
    """2 full layers with 1 head of 64, 4 sliding ones with 2 of 32; hidden 128, canvas 48, vocabulary 112."""
    source = ModelSource.open(DEMO)
    experts, attention = 6 * 8 * 3 * 64 * 128, 4 * (2 * 4 + 2 * 2) * 32 * 128 + 2 * (2 * 4 + 1) * 64 * 128
    mlp, other = 6 * 3 * 256 * 128, 6 * (8 * 128 + 128 + 8 + 7 * 128 + 2) + 4 * 2 * 32 + 2 * 2 * 64 + 128
    rest = 112 * 128 + 3 * 256 * 128 + 128
    found = deployment(source, moe=DENSE).budget(setting(slots=3, context=512, chunk=96, canvases=1))
    assert found.weights == {"plain": 2 * (experts + attention + mlp + other + rest)}
    assert found.full_kv_bytes == 3 * 512 * 2 * 2 * 64 * 2
    assert found.sliding_kv_bytes == 3 * (95 + 96 + 48) * 4 * 2 * 2 * 32 * 2
    scores, masks = 4 * 96 * 512 * 2, (4 * 96 * 512 * 2, 96 * (95 + 96 + 48) * 2)
    assert found.encoder.attention == (scores, scores, 512 * 64 * 2, *masks)
    assert found.encoder.experts == (96 * 8 * 128 * 2, 96 * 8 * 64 * 2, 0, *masks)
    assert found.encoder.residual_bytes == 96 * (128 * 12 + (4 + 2 * 1) * 64 * 6)
    assert found.decoder.sampler == (48 * 112 * 4,) * 4 + (48 * 112 * 2,)
    assert found.activations is found.encoder


WEIGHTS_ONLY = load_recipe("nvfp4-experts").model_copy(
    update={"tensors": {"experts": "nvfp4-weights"}, "calibration": None}
)


@pytest.mark.parametrize(
    ("recipe", "context", "chunk", "canvases", "encoder", "decoder"),
    [
        ("nvfp4-experts", 131_072, 1024, 4, 11_070_551_808, 12_390_181_632),
        ("fp8", 32_768, 1024, 4, 2_793_060_096, 4_865_567_488),
        ("int4-experts", 32_768, 256, 1, 752_403_712, 1_216_668_928),
        ("nvfp4-experts", 65_536, 512, 2, 2_850_401_024, 3_510_216_448),
    ],
)
def test_activations_are_what_plans_reserve(
    recipe: str, context: int, chunk: int, canvases: int, encoder: int, decoder: int
) -> None:
    """TensorRT-RTX 1.7.1.116, the whole 26B: `scripts/bench_builds.py` measures it, docs/measurements has the table."""
    found = deployment(published(recipe), moe=CAPACITY).budget(
        setting(slots=4, context=context, chunk=chunk, canvases=canvases)
    )
    assert encoder <= found.encoder.total_bytes < 1.1 * encoder
    assert decoder <= found.decoder.total_bytes < 1.1 * decoder


@pytest.mark.parametrize(("keys", "reserved"), [(8192, 159e6), (131_072, 2.4e9)])
def test_full_attention_of_one_canvas_is_what_a_plan_reserves(keys: int, reserved: float) -> None:
    """TensorRT-RTX 1.7 for one full layer alone: its queries and results besides, which are in the residual stream."""
    decoder = deployment(published()).budget(setting(canvases=1, context=keys)).decoder
    assert sum(decoder.attention[:3]) < 1.02 * reserved
    assert 0.99 * reserved < sum(decoder.attention[:3]) + decoder.residual_bytes < 1.15 * reserved


def test_a_weight_only_nvfp4_matrix_is_unpacked_and_others_are_not() -> None:
    decoder = deployment(with_recipe(published(), WEIGHTS_ONLY)).budget(setting()).decoder
    assert 128 * 1408 * 2816 * 2 in decoder.experts  # gate and up of a layer
    for recipe in RECIPES:
        assert unpacked_bytes(published(recipe)) == 0


def parts_of(found: VramBudget) -> dict[str, Any]:
    activations = {
        f"{name}.{part}": value
        for name in ("encoder", "decoder")
        for part, value in asdict(getattr(found, name)).items()
    }
    return {key: value for key, value in asdict(found).items() if key not in ("encoder", "decoder")} | activations


def str_of(value: object) -> str:
    """A set's own text differs from process to process, and xdist compares the names of tests."""
    return ",".join(sorted(value)) if isinstance(value, set) else str(value)


BASE: dict[str, Any] = {"slots": 8, "context": 16_384, "chunk": 1024, "canvases": 4}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"slots": 9}, {"full_kv_bytes", "sliding_kv_bytes", "io_bytes"}),
        (
            {"context": 20_480},
            {
                "full_kv_bytes", "encoder.attention", "decoder.attention", "encoder.experts", "decoder.experts",
                "io_bytes",
            },
        ),
        (  # masks are as wide as the sliding layers' buffers, and inputs as long as the larger call
            {"chunk": 2048},
            {
                "sliding_kv_bytes", "encoder.residual_bytes", "encoder.attention", "encoder.experts", "io_bytes",
                "decoder.attention", "decoder.experts",
            },
        ),
        (
            {"canvases": 3},
            {"decoder.residual_bytes", "decoder.attention", "decoder.experts", "decoder.sampler", "io_bytes"},
        ),
        ({"moe": DENSE}, {"encoder.experts", "decoder.experts"}),
        ({"moe": CAPACITY | {"decoder_capacity": 32}}, set()),  # room is kept for a call that overflows
        ({"recipe": "fp8"}, {"weights"}),
        ({"memory_gb": 96.0}, {"overhead_bytes"}),
        ({"shared": True}, {"overhead_bytes"}),
        ({"bandwidth": 3000.0}, set()),
    ],
    ids=str_of,
)  # fmt: skip
def test_each_part_reacts_to_what_it_depends_on_and_to_nothing_else(change: dict[str, Any], parts: set[str]) -> None:
    def planned(**changes: Any) -> dict[str, Any]:
        numbers = {key: changes.pop(key) for key in list(changes) if key in BASE}
        source = published(changes.pop("recipe", "none"))
        return parts_of(deployment(source, **changes).budget(setting(**(BASE | numbers))))

    before, after = planned(), planned(**change)
    assert {name for name in before if before[name] != after[name]} == parts


@quick
@given(st.sampled_from(RECIPES), SETTINGS, st.sampled_from(list(BASE)), st.integers(1, 4000))
def test_more_of_anything_never_takes_less(recipe: str, some: Setting, name: str, more: int) -> None:
    on = deployment(MODELS[recipe])
    larger = replace(some, **{name: min(getattr(some, name) + more, 262_144)})
    larger = replace(larger, slots=max(larger.slots, larger.canvases))
    before, after = on.budget(some), on.budget(larger)
    assert all(after.items()[part] >= size for part, size in before.items().items())
