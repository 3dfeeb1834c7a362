"""What `open_model` does beside opening: the threads that torch gets."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from canvasrt.runtime.torch_runner import TorchRunner
from canvasrt.serve.model import open_model
from canvasrt.serve.settings import ServeSettings
from planning import DEMO


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_who_opens_a_model_leaves_no_worker_threads_beside_those_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets of OpenMP threads on the same cores sleep between any two kernels: a fifth of the speed."""
    seen: list[int] = []
    original = TorchRunner.__init__

    def watched(self: TorchRunner, *given: Any, **options: Any) -> None:
        seen.append(torch.get_num_threads())
        original(self, *given, **options)
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(TorchRunner, "__init__", watched)
    open_model(ServeSettings.parse(DEMO, ["slots=1", "context=128", "threads=2"]))
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
