"""FakeRunner: a stand-in for a model that reads every input, so that a caller's mistake changes its text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from canvasrt.runtime.fake import FakeRunner
from canvasrt.runtime.protocol import DenoiseRow, EncodeRow

ROW = DenoiseRow(0, np.arange(16, dtype=np.int32) + 5, 0.8, np.full(16, 0.3, np.float32), first=True)
FEW = np.full(16, 0.3, np.float32)
FEW[7] = 0.30001


def fake_step(context: Sequence[int] = (5, 6, 7), before: DenoiseRow | None = ROW, **changes: Any) -> tuple[Any, ...]:
    """What FakeRunner's second step says, after the step ``before``."""
    runner = FakeRunner()
    runner.encode([EncodeRow(0, np.array(context, np.int32), 0)])
    if before is not None:
        runner.denoise([before])
    (result,) = runner.denoise([replace(ROW, **({"first": False} | changes))])
    return result.argmax.tolist(), result.sampled.tolist(), result.entropy.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"context": (5, 6, 8)},
        {"context": (6, 5, 7)},
        {"context": (5, 6, 7, 7)},
        {"canvas": np.arange(16, dtype=np.int32)[::-1] + 5},
        {"uniforms": FEW},
        {"temperature": 0.8000001},
        {"first": True},
        {"top_k": 1},
        {"top_p": 0.999},
        {"before": replace(ROW, temperature=0.7)},
        {"before": replace(ROW, uniforms=FEW)},
        {"before": None},
    ],
    ids="-".join,
)
def test_the_fake_reads_every_input(changes: dict[str, Any]) -> None:
    assert fake_step() == fake_step()
    assert fake_step(**changes)[2] != fake_step()[2]  # the entropies, which depend on everything


def test_the_fake_gives_the_same_in_every_slot_and_logits_when_asked() -> None:
    runner = FakeRunner(slots=3)
    runner.encode([EncodeRow(slot, np.array([5, 6, 7], np.int32), 0) for slot in range(3)])
    rows = [replace(ROW, slot=slot, want_logits=slot == 1) for slot in (2, 0, 1)]
    results = runner.denoise(rows)
    assert len({tuple(result.entropy.tolist()) for result in results}) == 1
    assert [result.logits is not None for result in results] == [False, False, True]
    assert results[2].logits.shape == (16, 64)
