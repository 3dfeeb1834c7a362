"""Calls of the text engine, against docs/engine.md read token by token: who sees whom, what goes through the head."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canvasrt.bundle.manifest import Shapes
from canvasrt.runtime.engine_call import KEY_STEP, Arrays, Call, CallBuilder, CallRow, _inverse_frequencies
from canvasrt.runtime.protocol import DenoiseRow
from canvasrt.spec import LayerSpec, ModelSpec

PUBLISHED = ModelSpec.load(Path(__file__).parent / "fixtures" / "diffusiongemma-26b-a4b")
CANVAS, WINDOW, CONTEXT, VOCABULARY = 5, 7, 90, 67
SLIDING = LayerSpec(0, "sliding", 8, 2, 10_000.0, 4)
FULL = LayerSpec(1, "full", 16, 1, 1_000_000.0, 3, rope_factor=2.0)
SPEC = replace(PUBLISHED, vocab_size=VOCABULARY, hidden_size=24, layers=(SLIDING, FULL, replace(SLIDING, index=2)))
SHAPES = Shapes(slots=6, context=CONTEXT, chunk=16, canvases=4, canvas=CANVAS, window=WINDOW, sliding=40)
BUILDER = CallBuilder(SPEC, SHAPES, key_step=8, token_step=4)


@st.composite
def denoise_rows(draw: st.DrawFn, slot: int, limits: tuple[int, ...] = (0, 3, VOCABULARY, 99)) -> DenoiseRow:
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return DenoiseRow(
        slot=slot,
        canvas=rng.integers(0, VOCABULARY, CANVAS).astype(np.int32),
        temperature=draw(st.sampled_from([0.4, 0.8, 1.0])),
        uniforms=rng.random(CANVAS, dtype=np.float32),
        first=draw(st.booleans()),
        top_k=draw(st.sampled_from(limits)),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        want_logits=draw(st.booleans()),
    )


@st.composite
def call_rows(draw: st.DrawFn, slot: int, count: int = CANVAS, joins: bool | None = None) -> CallRow:
    joins = draw(st.booleans()) if joins is None else joins
    held = draw(st.integers(0 if joins else 1, CONTEXT - count))
    start = draw(st.integers(0, max(0, held - WINDOW)))
    canvas = None if joins else draw(denoise_rows(slot))
    tokens = np.random.default_rng(held).integers(0, VOCABULARY, count).astype(np.int32)
    return CallRow(slot, held, start, tokens if canvas is None else canvas.canvas, canvas)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    if draw(st.integers(0, 3)) == 0:
        return BUILDER.prompt(draw(call_rows(0, draw(st.integers(1, 16)), joins=True)), 0)
    slots = draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=4))
    return BUILDER.canvases([draw(call_rows(slot)) for slot in slots], 0)


def arrays(call: Call) -> Arrays:
    return BUILDER.constants(call) | BUILDER.step_inputs(call)


# Who sees whom


def seen(row: CallRow, token: int, kind: str) -> list[int]:
    """Positions."""
    position = row.held + token
    if row.canvas is None:
        return [each for each in range(position + 1) if kind == "full" or position - each <= WINDOW]
    context = [each for each in range(row.held) if kind == "full" or row.held - each <= WINDOW]
    return context + list(range(row.held, row.held + len(row.tokens)))


@given(calls())
def test_every_token_sees_the_rows_of_the_positions_that_it_may_see(call: Call) -> None:
    found = arrays(call)
    for kind in ("full", "sliding"):
        first, end = (found[f"{name}.{kind}"].reshape(len(call.rows), -1) for name in ("first", "end"))
        for index, row in enumerate(call.rows):
            origin = row.start if kind == "sliding" else 0
            for token in range(len(row.tokens)):
                rows = [position - origin for position in seen(row, token, kind)]
                assert list(range(first[index, token], end[index, token])) == rows
                assert rows[0] >= 0
                if kind == "full":
                    assert rows[-1] < call.sizes.keys
            assert found[f"write.{kind}"][index] == row.held - origin


@given(calls())
def test_tokens_come_row_by_row_and_canvases_are_marked(call: Call) -> None:
    found = arrays(call)
    expected = [(int(token), row.canvas is not None) for row in call.rows for token in row.tokens]
    assert list(zip(found["tokens"].tolist(), found["is_canvas"].ravel().tolist(), strict=True)) == expected


@given(calls(), st.sampled_from([0, 1000, 131_072]))
def test_rotary_factors_are_those_of_the_position(call: Call, further: int) -> None:
    """In float32 an angle is known to its last bit only, and so is its frequency."""
    call = replace(call, rows=tuple(replace(row, held=row.held + further) for row in call.rows))
    found = BUILDER.constants(call)
    for kind, layer in {"full": FULL, "sliding": SLIDING}.items():
        cos, sin = (found[f"{name}.{kind}"].reshape(-1, layer.head_dim // 2) for name in ("cos", "sin"))
        positions = [row.held + token for row in call.rows for token in range(len(row.tokens))]
        for position, ours_cos, ours_sin in zip(positions, cos, sin, strict=True):
            for pair in range(layer.head_dim // 2):
                turns = pair < layer.rotary_pairs
                angle = position * layer.rope_theta ** (-2 * pair / layer.head_dim) / layer.rope_factor if turns else 0
                allowed = 2e-7 + angle * 2**-22
                assert abs(ours_cos[pair] - math.cos(angle)) <= allowed
                assert abs(ours_sin[pair] - math.sin(angle)) <= allowed


@pytest.mark.parametrize("layer", [SLIDING, FULL, *PUBLISHED.layers[4:6]], ids=lambda layer: f"{layer.head_dim}")
def test_frequencies_are_those_of_transformers_to_the_last_bit_or_so(layer: LayerSpec) -> None:
    exponents = torch.arange(0, 2 * layer.rotary_pairs, 2, dtype=torch.float) / layer.head_dim
    expected = torch.cat(
        [1.0 / (layer.rope_theta**exponents), torch.zeros(layer.head_dim // 2 - layer.rotary_pairs)]
    ) / layer.rope_factor  # fmt: skip
    ours = _inverse_frequencies(layer)
    assert ours.dtype == np.float32
    assert np.abs(ours.view(np.int32) - expected.numpy().view(np.int32)).max() <= 1


# The head


@given(calls())
def test_what_goes_through_the_head_is_aligned_and_limited_rows_come_last(call: Call) -> None:
    found = arrays(call)
    denoised = [(index, row.canvas) for index, row in enumerate(call.rows) if row.canvas is not None]
    free = [each for each in denoised if each[1].top_k in (0, VOCABULARY) and each[1].top_p == 1]
    limited = [each for each in denoised if each not in free]
    expected = [(index, canvas, token) for index, canvas in free + limited for token in range(CANVAS)]
    assert call.order == tuple(index for index, _ in free + limited)
    assert (call.sizes.head, call.sizes.limited) == (len(expected), len(limited) * CANVAS)
    assert found["head_rows"].ravel().tolist() == [index * CANVAS + token for index, _, token in expected]
    for name, value in (
        ("temperature", lambda row, at: row.temperature),
        ("uniforms", lambda row, at: row.uniforms[at]),
    ):
        np.testing.assert_array_equal(found[name], np.array([value(row, at) for _, row, at in expected], np.float32))
    last = [canvas for _, canvas, _ in expected[len(expected) - call.sizes.limited :]]
    assert found["top_k"].tolist() == [min(row.top_k, VOCABULARY) if row.top_k else VOCABULARY for row in last]
    expected_p = [row.top_p if row.top_p < 1 else 2 for row in last]
    np.testing.assert_array_equal(found["top_p"], np.array(expected_p, np.float32))
    wanted = [place for place, (_, canvas, _) in enumerate(expected) if canvas.want_logits]
    assert found["logit_rows"].tolist() == wanted
    assert call.sizes.logits == len(wanted)


# Shapes and sizes


@given(calls(), st.sampled_from([0, 3]))
def test_shapes_are_those_of_the_arrays(call: Call, seats: int) -> None:
    sizes = call.sizes._replace(seats=seats)
    assert (sizes.rows, sizes.tokens) == (len(call.rows), len(call.rows[0].tokens))
    shapes, found = BUILDER.shapes(sizes), arrays(call)
    resident = {"soft": (sizes.rows, sizes.tokens, 24), "keys": (sizes.keys,)} | ({"seats": (3,)} if seats else {})
    assert {name: shape for name, shape in shapes.items() if name not in found} == resident
    for name, array in found.items():
        assert array.size == math.prod(shapes[name]), name
        kind = np.bool_ if name == "is_canvas" else np.float32
        if name in ("tokens", "head_rows", "logit_rows") or name.startswith(("first.", "end.", "write.")):
            kind = np.int32
        assert array.dtype == kind, name


def test_a_prompt_brings_nothing_to_the_head() -> None:
    row = CallRow(3, 20, 4, np.arange(6, dtype=np.int32), None)
    call = BUILDER.prompt(row, 9)
    assert call.sizes == ("encoder", 1, 6, 0, 0, 0, 32, 9)
    assert (call.rows, call.order) == ((row,), ())
    assert {arrays(call)[name].size for name in ("head_rows", "temperature", "uniforms", "top_k", "logit_rows")} == {0}


def test_a_piece_of_a_prompt_is_padded_where_there_is_room() -> None:
    for held in range(CONTEXT):
        for count in range(1, min(16, CONTEXT - held) + 1):
            up = next(each for each in (4, 8, 12, 16) if each >= count)
            assert BUILDER.padded(held, count) == (up if held + up <= CONTEXT else count)


def test_padding_stops_at_the_chunk() -> None:
    builder = CallBuilder(SPEC, SHAPES.model_copy(update={"chunk": 14}), token_step=4)
    assert [builder.padded(0, count) for count in (1, 4, 5, 12, 13, 14)] == [4, 4, 8, 12, 14, 14]


def keys(builder: CallBuilder, needed: int) -> int:
    return builder.prompt(CallRow(0, needed - 1, 0, np.zeros(1, np.int32), None), 0).sizes.keys


@pytest.mark.parametrize("context", [131_072, 5000, 300])
def test_keys_suffice_fit_and_come_again(context: int) -> None:
    builder = CallBuilder(PUBLISHED, SHAPES.model_copy(update={"context": context}))
    needed = [*range(1, context, 1 if context < 10_000 else 7), context]
    found = [keys(builder, each) for each in needed]
    assert all(least <= each <= context for least, each in zip(needed, found, strict=True))
    assert found == sorted(found)
    assert len(set(found)) < 150
    excess = [each - least - max(KEY_STEP, least // 16) for least, each in zip(needed, found, strict=True)]
    assert max(excess) < 0


@given(st.lists(st.integers(1, CONTEXT - CANVAS), min_size=1, max_size=4))
def test_keys_are_those_of_the_longest_row(lengths: list[int]) -> None:
    empty = np.zeros(CANVAS, np.int32)
    rows = [CallRow(slot, held, 0, empty, None) for slot, held in enumerate(lengths)]
    needed = max(lengths) + CANVAS
    assert BUILDER.canvases(rows, 0).sizes.keys == min(-(-needed // 8) * 8, CONTEXT)


# What steps have in common


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def changed(row: CallRow, **changes: Any) -> CallRow:
    assert row.canvas is not None
    return replace(row, canvas=replace(row.canvas, **changes))


@st.composite
def similar(draw: st.DrawFn) -> Call:
    """Of few different rows, so that two are often alike."""
    rows = []
    for slot in range(draw(st.integers(1, 2))):
        held = draw(st.sampled_from([20, 21]))
        canvas = draw(st.one_of(st.none(), denoise_rows(slot, limits=(0, 3))))
        rows.append(CallRow(slot, held, draw(st.sampled_from([0, 9])), np.full(CANVAS, slot, np.int32), canvas))
    return BUILDER.canvases(rows, 0)


@settings(max_examples=200)
@given(similar(), similar())
def test_keys_are_equal_where_constants_are(one: Call, other: Call) -> None:
    assert (one.key == other.key) == same(BUILDER.constants(one), BUILDER.constants(other))


def test_what_changes_with_a_step_is_not_in_the_key_and_all_else_is() -> None:
    canvas = DenoiseRow(2, np.arange(CANVAS, dtype=np.int32), 0.5, np.zeros(CANVAS, np.float32), True, 3, 0.9)
    row, other = CallRow(2, 30, 9, canvas.canvas, canvas), CallRow(4, 12, 0, canvas.canvas, None)
    call = BUILDER.canvases([row, other], 0)
    constants = BUILDER.constants(call)
    step = changed(
        row, temperature=0.9, uniforms=np.ones(CANVAS, np.float32) / 2, first=False, canvas=canvas.canvas + 1
    )
    again = BUILDER.canvases([replace(step, tokens=canvas.canvas + 1), replace(other, tokens=canvas.canvas + 2)], 0)
    assert again.key == call.key
    assert same(BUILDER.constants(again), constants)
    assert not same(BUILDER.step_inputs(again), BUILDER.step_inputs(call))
    different = [
        [replace(row, held=31), other], [replace(row, start=8), other], [other, row], [row],
        [row, replace(other, held=9)], [changed(row, top_k=4), other], [changed(row, top_p=0.8), other],
        [changed(row, want_logits=True), other], [changed(row, top_k=0, top_p=1.0), other],
        [replace(row, canvas=None), other],
    ]  # fmt: skip
    for rows in different:
        made = BUILDER.canvases(rows, 0)
        assert made.key != call.key
        assert not same(BUILDER.constants(made), constants)
    both = [replace(row, slot=slot, canvas=canvas) for slot in (2, 4)]
    first, second = ([changed(each, want_logits=each.slot == slot) for each in both] for slot in (2, 4))
    assert BUILDER.canvases(first, 0).key != BUILDER.canvases(second, 0).key
    assert BUILDER.canvases([row, other], 5).key != call.key
    assert len({hash(made.key) for made in (call, again)}) == 1
