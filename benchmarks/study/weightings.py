"""The weighted sums that are searched: by losses, by gradients, each task up and down, random."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.study.problem import Defaults, make, value_of

EQUAL = "equal"
COUNT = 8
"""How many weightings are tried besides the equal one."""
FACTOR = 5.0

Array = npt.NDArray[np.float64]
Weights = Mapping[str, float]
KNOWN: dict[type[Defaults], dict[str, Weights]] = {}
"""What has been worked out, by problem: every run of a tuned sum asks."""


def weightings(problem: type[Defaults]) -> dict[str, Weights]:
    """Returns the candidates by name, the equal one first; the same for every seed.

    Losses and gradients are those of the first batch at the initial weights of seed 0.
    """
    if problem in KNOWN:
        return KNOWN[problem]
    if problem.weightings is not None:
        return {EQUAL: dict.fromkeys(problem.tasks, 1.0), **problem.weightings}
    found = candidates(problem.tasks, *first_losses_and_norms(problem))
    KNOWN[problem] = {name: as_weights(problem.tasks, each) for name, each in found.items()}
    return KNOWN[problem]


def weighting_names(problem: type[Defaults]) -> list[str]:
    """Returns the candidates' names, without the problem's data."""
    if problem.weightings is not None:
        return [EQUAL, *problem.weightings]
    ones = np.ones(len(problem.tasks))
    return list(candidates(problem.tasks, ones, ones))


def candidates(tasks: Sequence[str], losses: Array, norms: Array) -> dict[str, Array]:
    """Returns the logarithms of the weights that are tried."""
    draw = np.random.default_rng(0)
    by_losses, by_norms = -np.log10(losses), -np.log10(norms)
    found = {EQUAL: np.zeros(len(tasks)), "1 / losses": by_losses, "1 / norms": by_norms}
    if len(tasks) == 3:
        found |= scaled(tasks, "×", FACTOR) | scaled(tasks, "/", 1 / FACTOR)
    else:
        found |= {"1 / √losses": by_losses / 2, "1 / √norms": by_norms / 2}
    if len(tasks) == 2:  # One task up is the other down.
        found |= scaled(tasks, "×", FACTOR) | scaled(tasks, "×", FACTOR**2)
    for number in range(1 + COUNT - len(found)):
        centre = by_norms if number % 2 else np.zeros(len(tasks))
        found[f"random {number + 1}"] = centre + draw.uniform(-1, 1, len(tasks))
    return found


def scaled(tasks: Sequence[str], sign: str, factor: float) -> dict[str, Array]:
    """Returns exponents that multiply one task's loss by a factor, for each task."""
    shown = max(factor, 1 / factor)
    rows = np.log10(factor) * np.eye(len(tasks))
    return {f"{task} {sign} {shown:g}": row for task, row in zip(tasks, rows, strict=True)}


def as_weights(tasks: Sequence[str], exponents: Array) -> Weights:
    """Returns weights whose mean is one."""
    powers = 10.0**exponents
    return dict(zip(tasks, map(float, powers / powers.mean()), strict=True))


def first_losses_and_norms(problem: type[Defaults]) -> tuple[Array, Array]:
    """Returns the tasks' losses and gradient norms over the parameters that two tasks share."""
    with torch.random.fork_rng(devices=[]):
        first = make(problem, 0)
        values = first.losses(problem.tasks, *next(first.batches()))
    losses = [value_of(values[task]) for task in problem.tasks]
    parameters = [p for p in first.model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    columns = zip(*rows, strict=True)
    shared = [sum(g is not None for g in column) > 1 for column in columns]
    norms = [norm([g for g, two in zip(row, shared, strict=True) if two]) for row in rows]
    sizes = [abs(loss.item()) for loss in losses]
    return np.maximum(sizes, 1e-12), np.maximum(norms, 1e-12)


def norm(gradients: Sequence[Tensor | None]) -> float:
    """Returns the norm of a gradient in parts."""
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
