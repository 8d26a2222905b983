"""Draws trajectories-*.png and balanced-*.png, for light and dark pages: a minute on one core."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import mtlopt

TASKS = ("first", "second")
MINIMA = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([3.0, 0.4])}
CURVATURES = {"first": torch.tensor([0.5, 2.0]), "second": torch.tensor([2.0, 0.5])}
START, STEPS, RATE = (-0.6, -0.6), 1500, 0.005
STYLES: dict[str, dict[str, Any]] = {
    "sum": {"linestyle": "solid"},
    "alternating": {"color": "tab:orange", "linestyle": "dashed"},
    "independent": {"color": "tab:blue"},
    "Balanced": {"color": "tab:purple"},
}


def loss(task: str, w: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """A bowl around the task's minimum; the last dimension of `w` has the two weights."""
    return (CURVATURES[task] * (w - MINIMA[task] - shift) ** 2).sum(-1) / 2


def make_optimizer(method: str, w: Tensor) -> mtlopt.MultiTaskOptimizer:
    if method == "independent":
        return mtlopt.IndependentOptimizer(torch.optim.Adam, [w], TASKS, lr=RATE)
    base = torch.optim.Adam([w], lr=RATE)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(base, TASKS)
    if method == "Balanced":
        return mtlopt.Balanced(base, TASKS)
    return mtlopt.JointOptimizer(base, TASKS)


@cache
def train(method: str, scale: float, noise: float) -> Tensor:
    """Returns the weights before and after each step, (STEPS + 1, 2).

    Each batch has its own minimum, `noise` away from the task's.
    """
    scales = {"first": 1.0, "second": scale}
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


def pareto_front() -> Tensor:
    """Returns the weights at which neither loss can fall without the other rising, (1001, 2)."""
    share = torch.linspace(0, 1, 1001)[:, None]  # the minima of all weighted sums
    first, second = (1 - share) * CURVATURES["first"], share * CURVATURES["second"]
    return (first * MINIMA["first"] + second * MINIMA["second"]) / (first + second)


def draw(ax: Axes, methods: Sequence[str], scale: float, noise: float, ink: str) -> None:
    x, y = torch.linspace(-1, 3.8, 97), torch.linspace(-1, 2.8, 77)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    levels = [0.1, 0.4, 1, 2, 4]
    for task, style in zip(TASKS, ("solid", "dashed"), strict=True):
        heights = loss(task, grid).numpy()
        ax.contour(x, y, heights, levels, colors="0.6", linewidths=0.8, linestyles=style)
    band = {"color": "tab:green", "linewidth": 6, "alpha": 0.45}
    ax.plot(*pareto_front().T.numpy(), **band, label="Pareto front")
    for method in methods:
        points, style = train(method, scale, noise), {"color": ink, **STYLES[method]}
        ax.plot(*points.T.numpy(), linewidth=1.8, label=method, **style)
        ax.plot(*points[-1].numpy(), "o", color=style["color"], markersize=7)
    for task in TASKS:
        at_x, at_y = MINIMA[task].tolist()
        ax.plot(at_x, at_y, "x", color=ink, markersize=7)
        ax.annotate(task, (at_x, at_y), (0, 8), textcoords="offset points", ha="center")
    title = f"second loss × {scale:g}" + (", noisy gradients" if noise else "")
    ax.set(title=title, xlabel="$w_1$", aspect="equal")


def draw_figure(
    name: str, methods: Sequence[str], panels: Sequence[tuple[float, float]], width: float
) -> None:
    """Draws a panel for each scale and noise."""
    for mode, style, ink in (("light", "default", "black"), ("dark", "dark_background", "white")):
        with matplotlib.style.context(style):
            figure = Figure(figsize=(width, 3.8), layout="constrained", facecolor="none")
            axes = figure.subplots(1, len(panels), sharey=True)
            for ax, (scale, noise) in zip(axes, panels, strict=True):
                ax.set_facecolor("none")
                draw(ax, methods, scale, noise, ink)
            axes[0].set_ylabel("$w_2$")
            handles = axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
            figure.savefig(Path(__file__).with_name(f"{name}-{mode}.png"), dpi=130)


def main() -> None:
    torch.set_num_threads(1)
    draw_figure("balanced", ("sum", "Balanced"), ((1, 0), (100, 0)), 7.5)
    draw_figure("trajectories", tuple(STYLES), ((1, 0), (100, 0), (100, 3)), 11)


if __name__ == "__main__":
    main()
