"""Settings for every test: repeatable property tests, one thread per worker."""

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from builds import Builds

settings.register_profile("local", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> "Builds":
    """Bundles of the real compiler, each built once for all workers."""
    from builds import Builds, shared_folder  # here: it imports transformers

    return Builds(shared_folder(tmp_path_factory.getbasetemp()))
