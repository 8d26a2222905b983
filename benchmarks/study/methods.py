"""The methods of the study: how each makes its optimizer, and which constants are searched."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torchjd.aggregation as A
import torchjd.scalarization as S
from torch import nn

import mtlopt
from benchmarks.study.problem import Defaults
from benchmarks.study.rules import NormalisedSTCH, SumOfLogarithms
from benchmarks.study.weightings import EQUAL, weighting_names, weights

REFERENCE, SUM, TUNED = "single", "sum", "tuned sum"
BY_LOSSES, UNTUNED = "Balanced, by losses", "Balanced, by losses, default"
ALIASES = {TUNED: SUM, UNTUNED: BY_LOSSES}
"""Methods whose runs and costs are stored under another's name: they differ in the search alone."""
DEFAULT = ""
"""The variant of a method that has no constant to search."""

# Families, which the figures' colours stand for.
SUMS, WEIGHTING, COMBINING, PER_TASK, ALONE = (
    "weighted sum",
    "loss weighting",
    "gradient combination",
    "per-task updates",
    "single-task networks",
)

Variant = Mapping[str, Any]
"""The constants of one variant."""
Build = Callable[..., Any]
"""Makes the optimizer of a problem, its tasks and a learning rate; constants by keyword."""


class Method(NamedTuple):
    """One row of the tables."""

    build: Build
    family: str
    variants: Sequence[Variant] = ({},)
    """Constants that are searched, the published ones first."""
    tasks: int = 2
    """The fewest tasks with which it differs from the other methods."""
    needs: str = ""
    """The attribute that a problem must define."""


def adam(problem: Defaults, lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(problem.model.parameters(), lr=lr, fused=True)


def weighted(problem: Defaults, tasks: Sequence[Any], lr: float, **weights: float) -> Any:
    return mtlopt.JointOptimizer(adam(problem, lr), tasks, weights=weights or None)


def independent(**options: Any) -> Build:
    def build(problem: Defaults, tasks: Sequence[Any], lr: float) -> Any:
        return mtlopt.IndependentOptimizer(
            torch.optim.Adam, problem.model.parameters(), tasks, lr=lr, fused=True, **options
        )

    return build


def in_pairs(problem: Defaults, tasks: Sequence[Any], lr: float) -> Any:
    generator = torch.Generator().manual_seed(problem.seed)
    return independent()(problem, mtlopt.random_groups(tasks, 2, generator), lr)


def pcgrad(problem: Defaults, tasks: Sequence[str], lr: float, features: Any = None) -> Any:
    return mtlopt.PCGrad(adam(problem, lr), tasks, features=features)


def aggregated(make: Callable[..., nn.Module], at_features: bool = False) -> Build:
    def build(problem: Defaults, tasks: Sequence[str], lr: float, **options: Any) -> Any:
        where: dict[str, Any] = {"features": problem.features} if at_features else {}
        return mtlopt.Aggregated(adam(problem, lr), tasks, make(len(tasks), **options), **where)

    return build


def scalarized(make: Callable[..., nn.Module]) -> Build:
    def build(
        problem: Defaults, tasks: Sequence[str], lr: float, rate: float = 1.0, **options: Any
    ) -> Any:
        base = adam(problem, lr)
        optimizer = mtlopt.Scalarized(base, tasks, make(len(tasks), **options))
        for group in base.param_groups[1:]:  # the rule's own parameters
            group["lr"] = lr * rate
        return optimizer

    return build


def gradnorm(at_features: bool = False) -> Build:
    def build(problem: Defaults, tasks: Sequence[str], lr: float, **options: Any) -> Any:
        where: dict[str, Any] = {"shared": problem.shared}
        if at_features:
            where = {"features": problem.features}
        return mtlopt.GradNorm(adam(problem, lr), tasks, **where, **options)

    return build


def balanced(at_features: bool = False, by: Literal["gradients", "losses"] = "gradients") -> Build:
    def build(problem: Defaults, tasks: Sequence[str], lr: float, **options: Any) -> Any:
        where: dict[str, Any] = {"features": problem.features} if at_features else {}
        return mtlopt.Balanced(adam(problem, lr), tasks, by=by, **where, **options)

    return build


def nash(count: int) -> nn.Module:
    # Its weights solve a program, which its authors allow to be solved every few steps.
    return A.NashMTL(count, update_weights_every=10)


def famo(count: int, gamma: float, weight_lr: float) -> nn.Module:
    return S.FAMO(count, lr=weight_lr, weight_decay=gamma)


def grid(**values_of: Sequence[float]) -> list[Variant]:
    """Returns every combination of constants, that of the first values first."""
    found: list[Variant] = [{}]
    for name, values in values_of.items():
        found = [{**each, name: value} for each in found for value in values]
    return found


RATES = grid(rate=(1, 3, 10, 30, 100, 300, 1000, 0.3, 0.1))
ALPHAS = grid(alpha=(1.5, 0, 0.5), weight_lr=(0.025, 0.1, 0.4))
MUS = grid(mu=(1, 0.01, 0.03, 0.1, 0.3, 0.5, 2, 4, 8))
# Not at every step, which would cost more than the step that is timed.
EVERY = grid(decay=(0.9, 0.5, 0.99), every=(10, 30, 100))
AGGREGATORS: Mapping[str, Callable[..., nn.Module]] = {
    "UPGrad": lambda count: A.UPGrad(),
    "CAGrad": lambda count, c=0.5: A.CAGrad(c=c),
    "IMTL-G": lambda count: A.IMTLG(),
    "ConFIG": lambda count: A.ConFIG(),
    "Nash-MTL": nash,
    "MGDA": lambda count: A.MGDA(),
}
CONSTANTS = {"CAGrad": grid(c=(0.5, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9))}
METHODS: Mapping[str, Method] = {
    SUM: Method(weighted, SUMS),
    "uncertainty (UW)": Method(scalarized(S.UW), WEIGHTING, RATES),
    "IMTL-L": Method(scalarized(S.IMTLL), WEIGHTING, RATES),
    "DWA": Method(
        scalarized(lambda count, **options: S.DWA(**options)),
        WEIGHTING,
        grid(temperature=(2, 0.1, 0.2, 0.5, 1, 4, 8, 16, 32)),
    ),
    "FAMO": Method(
        scalarized(famo), WEIGHTING, grid(gamma=(1e-3, 1e-5, 1e-2), weight_lr=(0.025, 0.005, 0.1))
    ),
    "STCH": Method(scalarized(lambda count, mu: S.STCH(mu=mu)), WEIGHTING, MUS),
    "STCH, normalised": Method(scalarized(NormalisedSTCH), WEIGHTING, MUS),
    "geometric mean": Method(scalarized(lambda count: S.GeometricMean()), WEIGHTING),
    "sum of logarithms": Method(scalarized(lambda count: SumOfLogarithms()), WEIGHTING),
    "GradNorm": Method(gradnorm(), WEIGHTING, ALPHAS, needs="shared"),
    "GradNorm, features": Method(gradnorm(True), WEIGHTING, ALPHAS, needs="features"),
    "Balanced": Method(balanced(), WEIGHTING, EVERY),
    "Balanced, features": Method(balanced(True), WEIGHTING, EVERY, needs="features"),
    BY_LOSSES: Method(
        balanced(by="losses"),
        WEIGHTING,
        grid(decay=(0.9, 0, 0.3, 0.5, 0.7, 0.8, 0.95, 0.98, 0.99)),
    ),
    UNTUNED: Method(balanced(by="losses"), WEIGHTING, grid(decay=(0.9,))),
    "alternating": Method(
        lambda p, tasks, lr: mtlopt.AlternatingOptimizer(adam(p, lr), tasks), PER_TASK
    ),
    "independent": Method(independent(), PER_TASK),
    "independent, simultaneous": Method(independent(schedule="simultaneous"), PER_TASK),
    "independent, groups of 2": Method(in_pairs, PER_TASK, tasks=3),
    "independent, per_step=1": Method(independent(per_step=1), PER_TASK),
    "PCGrad": Method(pcgrad, COMBINING),
    "PCGrad, features": Method(
        lambda p, tasks, lr: pcgrad(p, tasks, lr, p.features), COMBINING, needs="features"
    ),
    **{
        name: Method(aggregated(make), COMBINING, CONSTANTS.get(name, ({},)))
        for name, make in AGGREGATORS.items()
    },
    "IMTL-G, features": Method(
        aggregated(AGGREGATORS["IMTL-G"], at_features=True), COMBINING, needs="features"
    ),
}


def names(problem: type[Defaults]) -> list[str]:
    """Lists the methods that a problem is for, as far as its class tells."""
    found = [name for name, method in METHODS.items() if len(problem.tasks) >= method.tasks]
    found.insert(1, TUNED)
    alone = [f"{REFERENCE}:{task}" for task in problem.tasks if problem.single]
    return alone + [name for name in found if name not in problem.left_out]


def family(method: str) -> str:
    """Returns the family of a method, also of one that is only in the tables."""
    if method.startswith(REFERENCE):
        return ALONE
    return SUMS if method.startswith(TUNED) else METHODS[method].family


def stored_as(method: str) -> str:
    """Returns the name under which a method's runs are stored: the tuned sum is a sum."""
    return ALIASES.get(method, method)


def variants(problem: type[Defaults], method: str) -> list[str]:
    """Returns the names of a method's variants, the default first."""
    if method == TUNED:
        return weighting_names(problem)
    if method == SUM:
        return [EQUAL]
    if method.startswith(f"{REFERENCE}:"):
        return [DEFAULT]
    return list(constants(method))


def constants(method: str) -> dict[str, Variant]:
    """Returns a method's variants by name."""
    return {
        " ".join(f"{name}={value:g}" for name, value in each.items()): each
        for each in METHODS[method].variants
    }


def make_optimizer(problem: Defaults, method: str, lr: float, variant: str) -> Any:
    """Makes what a method's name stands for.

    Args:
        problem: Whose parameters it trains.
        method: A name of `METHODS`, or "single:TASK".
        lr: Adam's learning rate.
        variant: The name of a variant.

    Raises:
        LookupError: If the problem lacks what the method needs.
    """
    if method.startswith(f"{REFERENCE}:"):
        return mtlopt.JointOptimizer(adam(problem, lr), (method.partition(":")[2],))
    chosen = METHODS[method]
    if chosen.needs and getattr(problem, chosen.needs) is None:
        raise LookupError(f"the problem defines no `{chosen.needs}`")
    found: Variant = {}
    if method != SUM:
        found = constants(method)[variant]
    elif variant != EQUAL:
        found = weights(type(problem), variant)
    return chosen.build(problem, problem.tasks, lr, **found)
