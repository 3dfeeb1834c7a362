"""The scheduler over TensorRTRunner: requests that come, end, fail and are cancelled between steps, conversations that
go on in a slot; every answer is the published loop's over the torch lowering, one request at a time.
"""

from pathlib import Path
from typing import Any

import pytest

import scheduling
import scheduling_loads
from canvasrt.runtime.tensorrt_runner import TensorRTRunner
from canvasrt.runtime.torch_runner import TorchRunner
from host_bundles import Host, host_bundle
from scheduling import CANVAS, CONTEXT, VOCABULARY, Session
from scheduling_checks import check_sound
from scheduling_loads import random_session
from tiny import Dims, write


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = Dims(layers="sf", vocab=VOCABULARY, canvas=CANVAS, context=256, embedding_scale=1.5)
    return write(tmp_path_factory.mktemp("sessions") / "checkpoint", dims, seed=5)


@pytest.fixture(scope="module")
def bundles(checkpoint: Path) -> dict[int, Path]:
    """By canvases of a call."""
    return {
        canvases: host_bundle(
            checkpoint.parent / str(canvases), checkpoint, context=CONTEXT, chunk=16, canvases=canvases, slots=canvases
        )
        for canvases in (1, 2)
    }


@pytest.mark.parametrize("mishaps", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_are_those_of_each_request_alone(
    checkpoint: Path, bundles: dict[int, Path], monkeypatch: pytest.MonkeyPatch, seed: int, mishaps: bool
) -> None:
    opened: list[tuple[Host, TensorRTRunner]] = []
    pretended = scheduling.fake

    def engine(slots: int, **options: Any) -> Any:
        if "window" not in options:  # what thinks up requests, and not the session's runner
            return pretended(slots, **options)
        host = Host()
        opened.append((host, host.open(bundles[min(slots, 2)], key_step=8, token_step=4, slots=slots)))
        return opened[-1][1]

    monkeypatch.setattr(scheduling_loads, "fake", engine)
    monkeypatch.setattr(scheduling, "fake", lambda slots: TorchRunner.open(checkpoint, slots=slots, context=CONTEXT))
    session: Session = random_session(seed, mishaps)
    check_sound(session)
    ((host, runner),) = opened
    assert host.driver.reason == ""
    assert runner.launches > 0
