"""The methods of the study: how each makes its optimizer, and whom it is for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torchjd.aggregation as A
import torchjd.scalarization as S
from torch import nn

import mtlopt
from benchmarks.study.problem import Defaults

REFERENCE, SUM, TUNED = "single", "sum", "tuned sum"
Build = Callable[[Defaults, Sequence[Any], float], Any]


class Method(NamedTuple):
    """One row of the tables."""

    build: Build
    tasks: int = 2
    """The fewest tasks that it differs from another method with."""


def adam(problem: Defaults, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(problem.model.parameters(), lr=lr)


def independent(**options: Any) -> Build:
    def build(problem: Defaults, tasks: Sequence[Any], lr: float) -> Any:
        return mtlopt.IndependentOptimizer(
            torch.optim.Adam, problem.model.parameters(), tasks, lr=lr, **options
        )

    return build


def groups_of(size: int) -> Build:
    def build(problem: Defaults, tasks: Sequence[Any], lr: float) -> Any:
        generator = torch.Generator().manual_seed(problem.seed)
        return independent()(problem, mtlopt.random_groups(tasks, size, generator), lr)

    return build


def aggregated(make: Callable[[int], nn.Module], features: bool = False) -> Build:
    def build(problem: Defaults, tasks: Sequence[str], lr: float) -> Any:
        options: dict[str, Any] = {"features": needed(problem.features)} if features else {}
        return mtlopt.Aggregated(adam(problem, lr), tasks, make(len(tasks)), **options)

    return build


def scalarized(make: Callable[[int], nn.Module]) -> Build:
    return lambda p, tasks, lr: mtlopt.Scalarized(adam(p, lr), tasks, make(len(tasks)))


def gradnorm(problem: Defaults, tasks: Sequence[str], lr: float) -> Any:
    shared = needed(problem.shared)
    return mtlopt.GradNorm(adam(problem, lr), tasks, shared=shared)


def needed(value: Any) -> Any:
    """Returns what a problem must have for this method.

    Raises:
        LookupError: If it has none.
    """
    if value is None:
        raise LookupError("the problem names no such part of its network")
    return value


def nash(count: int) -> nn.Module:
    # Its weights are the solution of a program, and kept for ten steps, as its authors may.
    return A.NashMTL(count, update_weights_every=10)


AGGREGATORS: Mapping[str, Callable[[int], nn.Module]] = {
    "UPGrad": lambda count: A.UPGrad(),
    "CAGrad": lambda count: A.CAGrad(c=0.5),
    "IMTL-G": lambda count: A.IMTLG(),
    "ConFIG": lambda count: A.ConFIG(),
    "Nash-MTL": nash,
    "MGDA": lambda count: A.MGDA(),
}
METHODS: Mapping[str, Method] = {
    SUM: Method(lambda p, tasks, lr: mtlopt.JointOptimizer(adam(p, lr), tasks)),
    "uncertainty (UW)": Method(scalarized(S.UW)),
    "DWA": Method(scalarized(lambda count: S.DWA())),
    "FAMO": Method(scalarized(S.FAMO)),
    "STCH": Method(scalarized(lambda count: S.STCH(mu=1.0))),
    "GradNorm": Method(gradnorm),
    "alternating": Method(lambda p, tasks, lr: mtlopt.AlternatingOptimizer(adam(p, lr), tasks)),
    "independent": Method(independent()),
    "independent, simultaneous": Method(independent(schedule="simultaneous")),
    "independent, groups of 2": Method(groups_of(2), tasks=3),
    "independent, per_step=1": Method(independent(per_step=1)),
    "independent, per_step=4": Method(independent(per_step=4), tasks=5),
    "PCGrad": Method(lambda p, tasks, lr: mtlopt.PCGrad(adam(p, lr), tasks)),
    "PCGrad, features": Method(
        lambda p, tasks, lr: mtlopt.PCGrad(adam(p, lr), tasks, features=needed(p.features))
    ),
    **{name: Method(aggregated(make)) for name, make in AGGREGATORS.items()},
    **{
        f"{name}, features": Method(aggregated(make, features=True))
        for name, make in AGGREGATORS.items()
        if name != "ConFIG"  # does not work from the Gramian
    },
}


def names(problem: type[Defaults]) -> list[str]:
    """Lists the methods that a problem is for."""
    run = [name for name, method in METHODS.items() if len(problem.tasks) >= method.tasks]
    run.insert(1, TUNED)
    if problem.single:
        run[:0] = [f"{REFERENCE}:{task}" for task in problem.tasks]
    return run


def make_optimizer(problem: Defaults, method: str, lr: float, weighting: int) -> Any:
    """Makes what a method's name stands for.

    Args:
        problem: Whose parameters it trains.
        method: A name of `METHODS`, "tuned sum", or "single:TASK".
        lr: Adam's learning rate.
        weighting: Which of the problem's weightings, for the tuned sum.
    """
    if method.startswith(f"{REFERENCE}:"):
        return mtlopt.JointOptimizer(adam(problem, lr), (method.partition(":")[2],))
    if method == TUNED:
        weights = problem.weightings()[weighting]
        return mtlopt.JointOptimizer(adam(problem, lr), problem.tasks, weights=weights)
    return METHODS[method].build(problem, problem.tasks, lr)
