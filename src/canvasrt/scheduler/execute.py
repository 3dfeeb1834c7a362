"""Runs one tick on a runner, so that a row that can't be run harms nobody else's."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from canvasrt.errors import CanvasRTError
from canvasrt.runtime.protocol import DenoiseResult, EngineRunner
from canvasrt.scheduler.types import Outcome, Tick

Row = TypeVar("Row", bound=Any)


def execute(runner: EngineRunner, tick: Tick, meanwhile: Callable[[], None] | None = None) -> Outcome:
    """``meanwhile`` may be called several times, or never. Errors of `EngineRunner.release` pass through: the runner
    can't be used any more.
    """
    for slot in tick.release:
        runner.release(slot)
    failed: dict[int, Exception] = {}
    denoised: dict[int, DenoiseResult] = {}
    _call(runner.encode, tick.encode, failed)
    rows = [row for row in tick.denoise if row.slot not in failed]
    for row, result in _call(lambda rows: runner.denoise(rows, meanwhile), rows, failed):
        denoised[row.slot] = result
    return Outcome(denoised, failed)


def _call(
    verb: Callable[[Sequence[Row]], Any], rows: Sequence[Row], failed: dict[int, Exception]
) -> list[tuple[Row, Any]]:
    """The rows that could be run, with their results."""
    if not rows:
        return []
    try:
        results = verb(rows)
    except CanvasRTError as error:  # raised before anything was changed, so the others can be run without that row
        if len(rows) == 1:
            failed[rows[0].slot] = error
            return []
        return [pair for row in rows for pair in _call(verb, [row], failed)]
    except Exception as error:  # whatever a device raises: what these slots hold is unknown now
        failed.update((row.slot, error) for row in rows)
        return []
    return list(zip(rows, results or [None] * len(rows), strict=True))
