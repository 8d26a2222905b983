"""Draws trajectories.png: half a minute on one core."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import mtlopt

TASKS = ("first", "second")
MINIMA = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([3.0, 0.4])}
CURVATURES = {"first": torch.tensor([0.5, 2.0]), "second": torch.tensor([2.0, 0.5])}
START, STEPS, RATE = (-0.6, -0.6), 1500, 0.005
COLORS = {"joint": "black", "alternating": "tab:orange", "independent": "tab:blue"}


def loss(task: str, w: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """A bowl around the task's minimum; the last dimension of `w` has the two weights."""
    return (CURVATURES[task] * (w - MINIMA[task] - shift) ** 2).sum(-1) / 2


def make_optimizer(method: str, w: Tensor) -> mtlopt.MultiTaskOptimizer:
    if method == "independent":
        return mtlopt.IndependentOptimizer(torch.optim.Adam, [w], TASKS, lr=RATE)
    base = torch.optim.Adam([w], lr=RATE)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(base, TASKS)
    return mtlopt.JointOptimizer(base, TASKS)


def train(method: str, scales: Mapping[str, float], noise: float) -> Tensor:
    """Returns the weights before and after each step, (STEPS + 1, 2).

    Each batch has its own minimum, `noise` away from the task's.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.tensor(START, requires_grad=True)
    optimizer = make_optimizer(method, w)

    def losses(tasks: Sequence[str], shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {task: scales[task] * loss(task, w, shifts[task]) for task in tasks}

    points = [w.detach().clone()]
    for _ in range(STEPS):
        shifts = {task: noise * torch.randn(2, generator=generator) for task in TASKS}
        optimizer.step(losses, shifts)
        points.append(w.detach().clone())
    return torch.stack(points)


def draw(ax: Axes, scale: float, noise: float) -> None:
    scales = {"first": 1.0, "second": scale}
    x, y = torch.linspace(-1, 3.8, 97), torch.linspace(-1, 2.8, 77)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    levels = [0.1, 0.4, 1, 2, 4]
    for task, style in zip(TASKS, ("solid", "dashed"), strict=True):
        heights = loss(task, grid).numpy()
        ax.contour(x, y, heights, levels, colors="0.75", linewidths=0.8, linestyles=style)
    # No loss can fall without the other rising: the minima of all weighted sums.
    share = torch.linspace(0, 1, 101)[:, None]
    first, second = ((1 - share) * CURVATURES["first"], share * CURVATURES["second"])
    front = (first * MINIMA["first"] + second * MINIMA["second"]) / (first + second)
    ax.plot(*front.T.numpy(), color="tab:green", linewidth=5, alpha=0.35, label="compromises")
    for method, color in COLORS.items():
        points = train(method, scales, noise)
        ax.plot(*points.T.numpy(), color=color, linewidth=1.6, label=method)
        ax.plot(*points[-1].numpy(), "o", color=color, markersize=7)
    for task in TASKS:
        at_x, at_y = MINIMA[task].tolist()
        ax.plot(at_x, at_y, "x", color="black", markersize=7)
        ax.annotate(task, (at_x, at_y), (0, 8), textcoords="offset points", ha="center")
    title = f"second loss × {scale:g}" + (", noisy gradients" if noise else "")
    ax.set(title=title, xlabel="$w_1$", aspect="equal")


def main() -> None:
    torch.set_num_threads(1)
    figure = Figure(figsize=(11, 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (scale, noise) in zip(axes, ((1, 0), (100, 0), (100, 3)), strict=True):
        draw(ax, scale, noise)
    axes[0].set_ylabel("$w_2$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
