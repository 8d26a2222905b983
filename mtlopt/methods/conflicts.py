"""conflicts(): measures how the tasks' gradients conflict at the present weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mtlopt._gradients.arithmetic import conflict_fraction, cosines, gram, with_gaps
from mtlopt._gradients.evaluation import Evaluation
from mtlopt._gradients.losses import (
    SINGLE_PROCESS,
    LossesFunction,
    LossEvaluator,
    ReadyLosses,
    Task,
    check_parameters,
    check_tasks,
    list_batches,
    names_of,
)
from mtlopt._gradients.report import Report

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True)
class ConflictReport:
    """Reports the angles between the tasks' gradients; a missing gradient counts as zero.

    Attributes:
        tasks: The T tasks, groups as tuples.
        norms: (T,) Euclidean norms in float64 on the CPU; NaN for an absent task, as below.
        cosines: (T, T) cosines; a negative one is a conflict.
        conflict_fraction: Fraction of pairs of present tasks that conflict, 0 without pairs.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.ones(2, requires_grad=True)
        >>> report = mtlopt.conflicts({"a": w.sum(), "b": -3 * w[0]}, [w], ["a", "b"])
        >>> report.cosines[0, 1]  # (1, 1) and (-3, 0)
        tensor(-0.7071, dtype=torch.float64)

    References:
        Yu et al., 2020 (arXiv 2001.06782), Definition 1: gradients conflict if their cosine is
        negative.
    """

    tasks: tuple[Task, ...]
    norms: Tensor
    cosines: Tensor
    conflict_fraction: float

    def plot(self) -> "matplotlib.figure.Figure":
        """Draws the cosines as a heat map, and the norms as bars.

        Returns:
            A matplotlib figure, not yet shown or saved.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`plot` needs matplotlib: pip install matplotlib.") from error
        names = ["+".join(task) if isinstance(task, tuple) else task for task in self.tasks]
        size = max(3.0, 0.7 * len(names))
        figure = Figure(figsize=(2 * size + 1.5, size + 0.6), layout="constrained")
        angles, lengths = figure.subplots(1, 2, width_ratios=(3, 2))
        image = angles.imshow(self.cosines.numpy(), vmin=-1, vmax=1, cmap="RdBu")
        ticks = range(len(names))
        angles.set_xticks(ticks, names, rotation=30, ha="right", rotation_mode="anchor")
        angles.set_yticks(ticks, names)
        for i in ticks:
            for j in ticks:
                cosine = self.cosines[i, j].item()
                color = "white" if abs(cosine) > 0.6 else "black"  # dark ends
                angles.text(j, i, f"{cosine:.2f}", ha="center", va="center", color=color)
        angles.set_title(f"cosines, {self.conflict_fraction:.0%} of pairs in conflict")
        figure.colorbar(image, ax=angles, shrink=0.8)
        lengths.barh(ticks, self.norms.numpy(), color="0.4")
        lengths.set_yticks(ticks, names)
        lengths.invert_yaxis()
        lengths.set_title("gradient norms")
        return figure


def conflicts(
    losses: LossesFunction | ReadyLosses,
    params: Iterable[Tensor],
    tasks: Iterable[Task],
    *batch: Any,
) -> ConflictReport:
    """Measures how the tasks' gradients conflict at the present weights, without moving anything.

    It runs one forward pass: in training mode batch norm updates its statistics and dropout draws.

    Args:
        losses: Function ``losses(tasks, *batch)``, called once for all tasks, or ready losses.
        params: Parameters to differentiate, usually those that the tasks share; ``.grad`` is left
            as it is.
        tasks: Names of the tasks; a tuple of names is a group, one objective.
        *batch: Passed on to `losses`.

    Returns:
        The report, on the CPU.

    Raises:
        ValueError: If `params` holds no parameter that requires a gradient, or a loss is not a
            scalar with a graph.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.zeros(2, requires_grad=True)
        >>> gradients = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-3.0, 4.0])}
        >>> report = mtlopt.conflicts({t: w @ g for t, g in gradients.items()}, [w], ["a", "b"])
        >>> report.norms, report.conflict_fraction
        (tensor([3., 5.], dtype=torch.float64), 1.0)
        >>> report.cosines
        tensor([[ 1.0000, -0.6000],
                [-0.6000,  1.0000]], dtype=torch.float64)

    References:
        Yu et al., 2020 (arXiv 2001.06782), Definition 1.
    """
    checked = check_tasks(tasks)
    parameters = [p for p in check_parameters("params", params) if p.requires_grad]
    if not parameters:
        raise ValueError("`params` must hold at least one that requires a gradient, got none.")
    rows, _ = Evaluation(
        LossEvaluator(losses, names_of(*checked)),
        checked,
        list_batches(losses, batch, None, {}),
        parameters,
        SINGLE_PROCESS,
        Report(),
        parameters_only=True,
    ).per_task()
    present, count = [k for k, t in enumerate(checked) if t in rows.gradients], len(checked)
    # The user chose the parameters, so all count, shared or not.
    products = gram(list(rows.gradients.values()), shared=False)
    norms = with_gaps(products.diagonal().sqrt(), present, count)
    angles = with_gaps(cosines(products), present, count)
    return ConflictReport(checked, norms, angles, conflict_fraction(products).item())
