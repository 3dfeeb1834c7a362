"""Settings for every test: repeatable property tests, one thread per worker."""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

try:
    import torch
except ImportError:
    pass
else:
    torch.set_num_threads(1)
