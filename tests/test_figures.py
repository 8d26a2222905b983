"""Paths in the documentation's figures end where their captions say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import load_script

SCRIPT = Path(__file__).parents[1] / "docs/figures/trajectories.py"


@pytest.fixture(scope="module")
def trajectories() -> Any:
    return load_script(SCRIPT)


def test_the_scale_of_a_loss_moves_the_end_of_the_sum_but_not_of_balanced(
    trajectories: Any,
) -> None:
    ends = {
        (method, scale): trajectories.train(method, scale, 0)[-1]
        for method in ("sum", "Balanced")
        for scale in (1, 100)
    }
    front = trajectories.pareto_front()
    for end in ends.values():
        assert (front - end).norm(dim=1).min() < 0.1
    minima = trajectories.MINIMA
    assert (ends["sum", 100] - minima["second"]).norm() < 0.1
    assert (ends["sum", 1] - minima["second"]).norm() > 1
    assert torch.dist(ends["Balanced", 1], ends["Balanced", 100]) < 0.05
    for minimum in minima.values():
        assert (ends["Balanced", 100] - minimum).norm() > 1
