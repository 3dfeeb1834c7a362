"""Rows that can't be run are refused with their slot and reason, and leave every slot as it was."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from canvasrt.errors import CanvasRTError, CapacityError, InputError
from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.protocol import DenoiseResult, DenoiseRow, EncodeRow

CANVAS = 16
CONTEXT = 64
HELD = 40  # tokens in slots 0 and 1


def tokens(count: int, start: int = 2) -> np.ndarray:
    return (np.arange(count) % 50 + start).astype(np.int32)


def encode_row(**changes: Any) -> EncodeRow:
    return replace(EncodeRow(slot=1, tokens=tokens(3), position=HELD), **changes)


def denoise_row(**changes: Any) -> DenoiseRow:
    row = DenoiseRow(1, tokens(CANVAS), 0.8, np.full(CANVAS, 0.5, np.float32), first=True)
    return replace(row, **changes)


def opened() -> FakeRunner:
    """Slots 0 and 1 hold HELD tokens and a signal of one step; slot 2 is empty."""
    runner = FakeRunner(slots=3, context=CONTEXT, canvas=CANVAS, vocabulary=64)
    runner.encode([EncodeRow(0, tokens(HELD, 3), 0), EncodeRow(1, tokens(HELD), 0)])
    runner.denoise([denoise_row(slot=0), denoise_row(slot=1)])
    return runner


def facts(result: DenoiseResult) -> tuple[list[float], ...]:
    return result.argmax.tolist(), result.sampled.tolist(), result.entropy.tolist()


def assert_unchanged(runner: FakeRunner) -> None:
    untouched = opened()
    assert runner.calls == untouched.calls
    assert [runner.length(slot) for slot in range(3)] == [HELD, HELD, 0]
    rows = [denoise_row(slot=0, first=False), denoise_row(slot=1, first=False)]
    expected = [facts(result) for result in untouched.denoise(rows)]
    assert [facts(result) for result in runner.denoise(rows)] == expected


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (encode_row(slot=3), InputError, "slot 3 does not exist: this runner has 3 slots"),
        (encode_row(slot=-1), InputError, "slot -1 does not exist"),
        (encode_row(slot=0), InputError, r"a slot appears twice in one call: \[0, 0\]"),
        (encode_row(tokens=tokens(0)), InputError, r"slot 1: .*at least one token .*\(0,\)"),
        (encode_row(tokens=tokens(4).reshape(2, 2)), InputError, r"slot 1: .*\(2, 2\)"),
        (encode_row(tokens=np.array([5, -1], np.int32)), InputError, "slot 1: token id -1 .* vocabulary of 64"),
        (encode_row(tokens=np.array([5, 64], np.int32)), InputError, "slot 1: token id 64 .* vocabulary of 64"),
        (encode_row(position=HELD + 1), InputError, f"slot 1 holds {HELD} tokens.* position {HELD + 1}"),
        (encode_row(position=-1), InputError, f"slot 1 holds {HELD} tokens.* position -1"),
        (encode_row(tokens=tokens(25)), CapacityError, "slot 1: 65 tokens exceed the context of 64.*at least 65"),
        (encode_row(tokens=tokens(61), position=4), CapacityError, "slot 1: 65 tokens exceed the context of 64"),
    ],
)
def test_a_malformed_row_to_encode_is_refused_and_its_good_neighbour_not_encoded(
    row: EncodeRow, error: type[CanvasRTError], message: str
) -> None:
    runner = opened()
    with pytest.raises(error, match=message):
        runner.encode([EncodeRow(0, tokens(2), HELD), row])
    assert_unchanged(runner)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (denoise_row(slot=3), InputError, "slot 3 does not exist: this runner has 3 slots"),
        (denoise_row(slot=-3), InputError, "slot -3 does not exist"),
        (denoise_row(slot=0), InputError, r"a slot appears twice in one call: \[0, 0\]"),
        (denoise_row(slot=2), InputError, "slot 2 is empty: encode a prompt"),
        (
            denoise_row(canvas=tokens(15)),
            InputError,
            r"slot 1: canvas \(15,\) and uniforms \(16,\) must both be \(16,\)",
        ),
        (denoise_row(uniforms=np.zeros(17, np.float32)), InputError, r"slot 1: canvas \(16,\) and uniforms \(17,\)"),
        (denoise_row(canvas=tokens(16).reshape(1, 16)), InputError, r"slot 1: canvas \(1, 16\)"),
        (denoise_row(canvas=tokens(16) - 3), InputError, "slot 1: token id -1 "),
        (denoise_row(canvas=tokens(16) + 47), InputError, "slot 1: token id 64 "),
        (denoise_row(uniforms=np.full(16, 1.0, np.float32)), InputError, r"slot 1: uniforms must lie in \[0, 1\)"),
        (denoise_row(uniforms=np.full(16, -0.1, np.float32)), InputError, "slot 1: uniforms"),
        (denoise_row(uniforms=np.full(16, np.nan, np.float32)), InputError, "slot 1: uniforms"),
        (denoise_row(temperature=0.0), InputError, "slot 1: the temperature must be a positive number, not 0.0"),
        (denoise_row(temperature=-1.0), InputError, "slot 1: the temperature .* not -1.0"),
        (denoise_row(temperature=float("nan")), InputError, "slot 1: the temperature .* not nan"),
        (denoise_row(temperature=float("inf")), InputError, "slot 1: the temperature .* not inf"),
        (denoise_row(top_k=-1), InputError, "slot 1: top_k .* not -1, 1.0"),
        (denoise_row(top_p=0.0), InputError, "slot 1: .*top_p.* not 0, 0.0"),
        (denoise_row(top_p=1.5), InputError, "slot 1: .*top_p.* not 0, 1.5"),
        (denoise_row(top_p=float("nan")), InputError, "slot 1: .*top_p.* not 0, nan"),
    ],
)
def test_a_malformed_row_to_denoise_is_refused_and_its_good_neighbour_not_run(
    row: DenoiseRow, error: type[CanvasRTError], message: str
) -> None:
    runner = opened()
    with pytest.raises(error, match=message):
        runner.denoise([denoise_row(slot=0, first=False), row])
    assert_unchanged(runner)


def test_a_canvas_that_does_not_fit_behind_its_context_is_refused_with_the_numbers() -> None:
    runner = opened()
    runner.encode([encode_row(tokens=tokens(8))])  # 48 tokens and a canvas of 16: just fits
    runner.denoise([denoise_row()])
    runner.encode([encode_row(tokens=tokens(1), position=48)])
    with pytest.raises(CapacityError, match="slot 1: 49 context tokens and a canvas of 16 exceed the context of 64"):
        runner.denoise([denoise_row()])


def test_rows_at_the_limits_are_run() -> None:
    runner = opened()
    runner.encode([encode_row(tokens=np.array([0, 63], np.int32)), EncodeRow(0, tokens(CONTEXT), 0)])
    assert runner.length(0) == CONTEXT
    uniforms = np.array([0.0, 1 - 2.0**-24] * 8, np.float32)
    runner.denoise([denoise_row(uniforms=uniforms, top_k=0, top_p=1.0, temperature=1e-3)])


def test_an_earlier_position_rewinds_the_slot() -> None:
    runner, fresh = opened(), opened()
    runner.encode([encode_row(position=7)])
    fresh.release(1)
    fresh.encode([encode_row(tokens=np.concatenate([tokens(HELD)[:7], tokens(3)]), position=0)])
    assert runner.length(1) == 10
    row = denoise_row()
    assert facts(runner.denoise([row])[0]) == facts(fresh.denoise([row])[0])


def test_release_empties_one_slot() -> None:
    runner = opened()
    runner.release(0)
    assert [runner.length(slot) for slot in range(3)] == [0, HELD, 0]
    with pytest.raises(InputError, match="slot 0 is empty"):
        runner.denoise([denoise_row(slot=0)])


def test_calls_without_rows_do_nothing() -> None:
    runner = opened()
    runner.encode([])
    assert runner.denoise([]) == []
    assert [runner.length(slot) for slot in range(3)] == [HELD, HELD, 0]
