"""A step takes the passes that the page on costs states."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torchjd.aggregation import UPGrad
from torchjd.scalarization import UW

import mtlopt

PAGE = Path(__file__).parents[1] / "docs/what-it-costs.md"
T = 4
METHODS: dict[str, Any] = {
    "JointOptimizer": mtlopt.JointOptimizer,
    "Scalarized": lambda base, tasks, **k: mtlopt.Scalarized(base, tasks, UW(len(tasks)), **k),
    "AlternatingOptimizer": mtlopt.AlternatingOptimizer,
    "IndependentOptimizer": mtlopt.IndependentOptimizer,
    "Balanced": mtlopt.Balanced,
    "GradNorm": mtlopt.GradNorm,
    "PCGrad": mtlopt.PCGrad,
    "Aggregated": lambda base, tasks, **k: mtlopt.Aggregated(base, tasks, UPGrad(), **k),
}


def rows() -> list[tuple[str, str, str]]:
    """Returns the table: methods, and numbers of passes as terms of T."""
    table = PAGE.read_text(encoding="utf-8").split("## Time")[0]
    return re.findall(r"^\| (.*`.*) \| (.*) \| (.*) \|$", table, re.MULTILINE)


def count(method: str, **options: Any) -> list[Counter[str]]:
    """Returns the passes through the trunk in each of two steps."""
    tasks = [f"task {number}" for number in range(T)]
    last = torch.nn.Linear(16, 16)
    trunk = torch.nn.Sequential(torch.nn.Linear(8, 16), last)
    heads = torch.nn.ModuleDict({task: torch.nn.Linear(16, 1) for task in tasks})
    if options.get("features"):
        options["features"] = trunk
    if method == "GradNorm":
        options["shared"] = list(last.parameters())
    adam = torch.optim.Adam([*trunk.parameters(), *heads.parameters()])
    optimizer = METHODS[method](adam, tasks, **options)
    passes: Counter[str] = Counter()
    trunk.register_forward_hook(lambda *_: passes.update(["forward"]))
    # A pass that ends at the last layer counts too.
    last.weight.register_hook(lambda _: passes.update(["backward"]))

    def losses(asked: Any) -> dict[str, torch.Tensor]:
        z = trunk(torch.ones(4, 8))
        return {task: heads[task](z).square().mean() + 1 for task in asked}

    found = []
    for _ in range(2):
        passes.clear()
        optimizer.step(losses)
        found.append(Counter(passes))
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_step_takes_the_passes_of_its_row(row: tuple[str, str, str]) -> None:
    methods, forward, backward = row
    options: dict[str, Any] = {}
    if "features=" in methods:
        options["features"] = True
    if "simultaneous" in methods:
        options["schedule"] = "simultaneous"
    if "losses" in methods:
        options["by"] = "losses"
    always, _, measuring = backward.partition(", and ")
    for name in re.findall(r"`([A-Z]\w+)", methods):
        first, second = count(name, **options)
        extra = T if measuring else 0
        assert first == {"forward": terms(forward), "backward": terms(always) + extra}, name
        assert second == {"forward": terms(forward), "backward": terms(always)}, name


def terms(text: str) -> int:
    """Returns the value of a sum such as `1 + T`."""
    return sum(T if term == "T" else int(term) for term in text.split(" + "))


def test_every_method_has_a_row() -> None:
    named = " ".join(methods for methods, *_ in rows())
    assert set(METHODS) == set(re.findall(r"`([A-Z]\w+)", named))
