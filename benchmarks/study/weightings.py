"""The weighted sums that are searched: by losses, by gradients, each task up and down, random."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import mtlopt
from benchmarks.study.plan import PLATEAU_RATES, rate
from benchmarks.study.problem import Defaults, make, value_of

EQUAL = "equal"
LAST = "1 / last losses"
COUNT = 8
"""How many weightings that need no training are tried besides the equal one."""
FACTOR = 5.0

Array = npt.NDArray[np.float64]
Weights = Mapping[str, float]

KNOWN: dict[tuple[type[Defaults], str], Weights] = {}
"""What has been worked out: every run of a tuned sum asks."""


def weights(problem: type[Defaults], name: str) -> Weights:
    """Returns one of the weightings by its name; the same for every seed."""
    if (problem, name) not in KNOWN:
        KNOWN[problem, name] = work_out(problem, name)
    return KNOWN[problem, name]


def work_out(problem: type[Defaults], name: str) -> Weights:
    """Returns one of the weightings, from the problem's losses if it depends on them."""
    if problem.weightings is not None:
        return problem.weightings[name]
    if name == LAST:
        exponents = -np.log10(last_losses(problem))
    else:
        exponents = candidates(problem.tasks, *first_losses_and_norms(problem))[name]
    return as_weights(problem.tasks, exponents)


def weighting_names(problem: type[Defaults]) -> list[str]:
    """Returns the weightings' names, the equal one first, without the problem's data."""
    if problem.weightings is not None:
        return [EQUAL, *problem.weightings]
    ones = np.ones(len(problem.tasks))
    return [*candidates(problem.tasks, ones, ones), LAST]


def candidates(tasks: Sequence[str], losses: Array, norms: Array) -> dict[str, Array]:
    """Returns the logarithms of the weights that need no training."""
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
    """Returns losses and gradient norms of the first batch, at the initial weights of seed 0.

    The gradients are those of the parameters that two tasks or more share.
    """
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


def last_losses(problem: type[Defaults]) -> Array:
    """Returns the training losses with which the plain sum ends, over the last tenth of its steps.

    It trains for the most steps that may be the plateau, with the middle learning rate and seed 0.
    """
    steps = problem.steps * 2**problem.doublings
    with torch.random.fork_rng(devices=[]):
        trained = make(problem, 0)
        adam = torch.optim.Adam(trained.model.parameters(), lr=rate(PLATEAU_RATES[1]))
        optimizer = mtlopt.JointOptimizer(adam, problem.tasks)
        scheduler = CosineAnnealingLR(optimizer, steps)
        values: dict[str, list[float]] = {task: [] for task in problem.tasks}
        for step, batch in zip(range(steps), trained.batches(), strict=False):
            found = optimizer.step(trained.losses, *batch)
            scheduler.step()
            if step >= steps * 9 // 10:
                for task, value in found.items():
                    values[task].append(abs(value.item()))
    return np.maximum([np.mean(values[task]) for task in problem.tasks], 1e-12)


def norm(gradients: Sequence[Tensor | None]) -> float:
    """Returns the norm of a gradient in parts."""
    return math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
