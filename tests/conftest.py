"""Makes every test reproducible: one thread, fixed seeds, no display."""

import os
import random
from collections.abc import Iterator

# For the processes that tests start, and before matplotlib is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

# With several threads sums depend on how many there are, and parallel workers fight for the cores.
torch.set_num_threads(1)

# A first call may compile or allocate, so times say nothing; CI draws the same examples each time.
hypothesis.settings.register_profile("mtlopt", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("mtlopt")


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Seeds the global generators, and gives back torch's defaults that a test changed."""
    random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
