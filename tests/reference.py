"""Every method as one step of plain PyTorch: the oracle of the tests, independent of the package.

`losses(tasks, *batch)` runs the model once and returns a loss for each of the tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

Tasks: TypeAlias = Sequence[str]
Values: TypeAlias = Mapping[str, Tensor]
Losses: TypeAlias = Callable[..., Values]
Optimizers: TypeAlias = Mapping[str, Optimizer]


def joint(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    weights: Mapping[str, Any] | None = None,
) -> Values:
    """Takes one step along the gradient of the weighted sum of the losses (eq. 1)."""
    evaluations = []

    def objective() -> Tensor:
        evaluations.append(losses(tasks, *batch))
        return weighted_sum(evaluations[-1], weights)

    step(optimizer, objective)
    return evaluations[0]


def alternating(optimizer: Optimizer, losses: Losses, tasks: Tasks, *batch: Any) -> Values:
    """Steps for each task in turn, at the weights that the previous step left (eq. 2)."""
    return {t: step(optimizer, lambda: losses((t,), *batch)[t]) for t in tasks}


def independent(optimizers: Optimizers, losses: Losses, tasks: Tasks, *batch: Any) -> Values:
    """Steps for each task in turn, with that task's own optimizer (eq. 3)."""
    return {t: step(optimizers[t], lambda: losses((t,), *batch)[t]) for t in tasks}


def simultaneous(optimizers: Optimizers, losses: Losses, tasks: Tasks, *batch: Any) -> Values:
    """As `independent`, with all gradients taken at the same weights (AdaTask, with Adam)."""
    values = losses(tasks, *batch)
    parameters = parameters_of(optimizers[tasks[0]])
    gradients = {
        t: torch.autograd.grad(values[t], parameters, retain_graph=True, allow_unused=True)
        for t in tasks
    }
    for t in tasks:
        optimizers[t].zero_grad()
        for parameter, gradient in zip(parameters, gradients[t], strict=True):
            parameter.grad = gradient
        optimizers[t].step()
    return values


def aggregated(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    shared: Sequence[Tensor],
    aggregate: Callable[[Tensor], Tensor],
) -> Values:
    """Steps along an aggregation of the Jacobian, which has one row per task."""
    values = losses(tasks, *batch)
    jacobian = torch.stack([gradient_vector(value, shared) for value in values.values()])
    optimizer.zero_grad()
    weighted_sum(values).backward()  # Heads get the plain gradient of their task.
    for parameter, part in zip(shared, split(aggregate(jacobian), shared), strict=True):
        parameter.grad = part
    optimizer.step()
    return values


def pcgrad(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    shared: Sequence[Tensor],
    generator: torch.Generator,
) -> Values:
    """Steps along the sum of the projected gradients."""
    orders = [torch.randperm(len(tasks), generator=generator).tolist() for _ in tasks]

    def aggregate(jacobian: Tensor) -> Tensor:
        return project_conflicts(jacobian, orders)

    return aggregated(optimizer, losses, tasks, *batch, shared=shared, aggregate=aggregate)


def project_conflicts(gradients: Sequence[Tensor] | Tensor, orders: Any) -> Tensor:
    """Projects each gradient off those it conflicts with, and sums (Yu et al., Algorithm 1)."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        projected = gradients[i].clone()
        for j in order:
            inner = projected @ gradients[j]
            if j != i and inner < 0:
                projected -= inner / (gradients[j] @ gradients[j]) * gradients[j]
        total += projected
    return total


def gradnorm(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    shared: Sequence[Tensor],
    weights: Mapping[str, Tensor],
    weight_optimizer: Optimizer,
    initial: dict[str, Tensor],
    alpha: float = 1.5,
) -> Values:
    """Takes a weighted step, then updates the weights (Chen et al., Algorithm 1)."""
    values = losses(tasks, *batch)
    norms = [gradient_vector(values[t], shared).norm() for t in tasks]
    for t in tasks:
        initial.setdefault(t, values[t].detach())
    ratios = [values[t].detach() / initial[t] for t in tasks]
    step(optimizer, lambda: weighted_sum(values, {t: weights[t].detach() for t in tasks}))
    update_weights([weights[t] for t in tasks], weight_optimizer, norms, ratios, alpha)
    return values


def update_weights(
    weights: Sequence[Tensor],
    optimizer: Optimizer,
    norms: Sequence[Tensor],
    ratios: Sequence[Tensor],
    alpha: float,
) -> None:
    """Moves the loss weights towards equal training rates; their sum stays as it was."""
    before = torch.stack([w.detach() for w in weights]).sum()
    sizes = torch.stack(list(weights)) * torch.stack(list(norms))
    rates = torch.stack(list(ratios)) / torch.stack(list(ratios)).mean()
    target = (sizes.mean() * rates**alpha).detach()
    step(optimizer, lambda: (sizes - target).abs().sum())
    with torch.no_grad():
        clamped = [w.clamp(min=1e-3) for w in weights]
        for w, value in zip(weights, clamped, strict=True):
            w.copy_(value * before / torch.stack(clamped).sum())


def balanced(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    shared: Sequence[Tensor],
    squares: dict[str, Tensor],
    shares: Mapping[str, float] | None = None,
    measure: bool = True,
    decay: float = 0.9,
) -> Values:
    """Takes a weighted step in which each task has its share of the gradient.

    `squares` holds moving averages of the squared norms; `measure` is true at every tenth step.
    """
    values = losses(tasks, *batch)
    for t in tasks if measure else ():
        new = gradient_vector(values[t], shared).square().sum()
        squares[t] = decay * squares[t] + (1 - decay) * new if t in squares else new
    norms = torch.stack([squares[t].sqrt() for t in tasks])
    parts = norms.new_tensor([shares[t] if shares else 1.0 for t in tasks])
    weights = parts / parts.mean() * norms.mean() / norms
    step(optimizer, lambda: weighted_sum(values, dict(zip(tasks, weights, strict=True))))
    return values


def scalarized(
    optimizer: Optimizer,
    losses: Losses,
    tasks: Tasks,
    *batch: Any,
    scalarize: Callable[[Tensor], Tensor],
) -> Values:
    """Steps along the gradient of a scalar function of the losses."""
    values = losses(tasks, *batch)
    step(optimizer, lambda: scalarize(torch.stack([values[t] for t in tasks])))
    return values


def step(optimizer: Optimizer, objective: Callable[[], Tensor]) -> Tensor:
    """Takes a step of any optimizer class: those with a line search evaluate more than once."""

    @torch.enable_grad()  # Some classes call it without.
    def closure() -> Any:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    value: Any = optimizer.step(closure)
    return value.detach()  # type: ignore[no-any-return]  # a tensor


def weighted_sum(values: Values, weights: Mapping[str, Any] | None = None) -> Tensor:
    """Adds up the losses, each times its weight or 1."""
    first, *others = ((weights or {}).get(t, 1.0) * value for t, value in values.items())
    total: Tensor = sum(others, first)
    return total


def gradient_vector(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Returns a gradient as one vector, zero at parameters the loss does not depend on."""
    parts = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([part.flatten() for part in parts])


def split(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Undoes `gradient_vector`: cuts a vector into tensors shaped as the parameters."""
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns an optimizer's parameters that are not frozen."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
