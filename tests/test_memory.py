"""The memory budget against arithmetic by hand, and the advice that a refusal gives."""

import re
from typing import Any

import pytest

from canvasrt.errors import CapacityError
from canvasrt.runtime.memory import budget, check_budget, sliding_rows
from canvasrt.runtime.protocol import RunnerLimits
from canvasrt.spec import ModelSpec

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "global_head_dim": 6,
    "num_global_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "sliding_window": 32,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 5,
}
SPEC = ModelSpec.from_config(
    {"model_type": "diffusion_gemma", "canvas_length": 16, "image_token_id": 63, "text_config": TEXT}, "x/config.json"
)

EMBEDDING = 64 * 8 + 8  # and the final norm
CONDITIONING = 8 + 3 * 8 * 12
MLP_AND_EXPERTS = 3 * 8 * 12 + (4 * 8 + 8 + 4) + 4 * (2 * 5 * 8 + 8 * 5)
NORMS_AND_SCALARS = 7 * 8 + 2
SLIDING = 16 * 8 + 2 * 8 * 8 + 8 * 16 + 2 * 4  # q, k and v, o, norms of q and k
FULL = 24 * 8 + 6 * 8 + 8 * 24 + 2 * 6  # no v
WEIGHTS = EMBEDDING + CONDITIONING + 3 * (MLP_AND_EXPERTS + NORMS_AND_SCALARS) + 2 * SLIDING + FULL


def limits(context: int = 512, slots: int = 2, chunk: int = 24) -> RunnerLimits:
    return RunnerLimits(slots=slots, context=context, chunk=chunk, canvas=16, vocabulary=64)


def refusal(asked: RunnerLimits, element_bytes: int, available_bytes: int) -> str:
    with pytest.raises(CapacityError) as caught:
        check_budget(SPEC, asked, element_bytes, available_bytes)
    return str(caught.value)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_budget_is_the_arithmetic_by_hand(element_bytes: int) -> None:
    found = budget(SPEC, limits(), element_bytes)
    rows = 31 + 24 + 16
    assert found.weight_bytes == WEIGHTS * element_bytes
    assert found.full_kv_bytes == 2 * 512 * (2 * 1 * 6) * element_bytes
    assert found.sliding_kv_bytes == 2 * rows * 2 * (2 * 2 * 4) * element_bytes
    assert found.soft_bytes == 2 * 16 * 8 * element_bytes
    assert found.sampler_bytes == 6 * 2 * 16 * SPEC.vocab_size * 4
    parts = (found.weight_bytes, found.full_kv_bytes, found.sliding_kv_bytes, found.soft_bytes, found.sampler_bytes)
    assert found.total_bytes == sum(parts)


@pytest.mark.parametrize(("chunk", "rows"), [(1, 31 + 16 + 16), (16, 31 + 16 + 16), (100, 31 + 100 + 16)])
def test_a_sliding_buffer_holds_window_chunk_and_canvas_whatever_the_context(chunk: int, rows: int) -> None:
    assert sliding_rows(SPEC, limits(chunk=chunk)) == rows
    assert sliding_rows(SPEC, limits(chunk=chunk, context=4096)) == rows


def test_a_longer_context_costs_full_attention_only() -> None:
    short, long = budget(SPEC, limits(512), 2), budget(SPEC, limits(1024), 2)
    assert long.total_bytes - short.total_bytes == 2 * 512 * 12 * 2
    assert long.sliding_kv_bytes == short.sliding_kv_bytes


def test_memory_that_just_suffices_is_taken_and_one_byte_less_refused() -> None:
    needed = budget(SPEC, limits(), 2)
    assert check_budget(SPEC, limits(), 2, needed.total_bytes) == needed
    refusal(limits(), 2, needed.total_bytes - 1)


def test_a_context_beyond_the_model_is_refused_with_max_position_embeddings() -> None:
    message = refusal(limits(4097), 2, 10**12)
    assert "4097" in message
    assert "4096" in message
    assert "max_position_embeddings" in message
    check_budget(SPEC, limits(4096), 2, 10**12)


@pytest.mark.parametrize("context", [1, 15, 16])
def test_a_context_without_room_for_a_prompt_is_refused(context: int) -> None:
    message = refusal(limits(context), 2, 10**12)
    assert f"context {context} " in message
    assert "16 tokens" in message
    check_budget(SPEC, limits(17), 2, 10**12)


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("missing", [1, 1000, 20_000])
def test_the_context_that_a_refusal_advises_is_the_largest_that_fits(slots: int, missing: int) -> None:
    asked = limits(4000, slots=slots)
    available = budget(SPEC, asked, 2).total_bytes - missing
    message = refusal(asked, 2, available)
    match = re.search(r"largest context that fits with (\d+) slots? is (\d+)", message)
    assert match is not None, message
    assert int(match[1]) == slots
    fitting = int(match[2])
    check_budget(SPEC, limits(fitting, slots=slots), 2, available)
    refusal(limits(fitting + 1, slots=slots), 2, available)


def test_where_no_context_fits_fewer_slots_are_advised_and_then_fit() -> None:
    available = budget(SPEC, limits(17, slots=1), 2).total_bytes
    assert "fewer slots than 2" in refusal(limits(512, slots=2), 2, available)
    check_budget(SPEC, limits(17, slots=1), 2, available)


@pytest.mark.parametrize("slots", [1, 3])
def test_where_the_weights_alone_do_not_fit_another_machine_is_advised(slots: int) -> None:
    message = refusal(limits(slots=slots), 2, WEIGHTS * 2)
    assert "more memory" in message
    assert "quantized" in message


def test_a_refusal_tells_what_is_needed_and_what_is_there() -> None:
    message = refusal(limits(), 2**22, 2**33)
    needed = budget(SPEC, limits(), 2**22)
    for size in (needed.total_bytes, needed.weight_bytes, needed.full_kv_bytes, needed.sliding_kv_bytes, 2**33):
        assert f"{size / 2**30:.2f} GiB" in message
