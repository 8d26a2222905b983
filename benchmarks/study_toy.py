"""The two-task toy of CAGrad (Liu et al., 2021), as Nash-MTL and FAMO use it too.

    python benchmarks/study_toy.py    # a minute; writes toy.md and toy.png

From five starts, with Adam and the first loss times 0.1, 1 and 100. Which point of the front a
method ends at should not depend on the unit of a loss. The rate is five times the papers' 1e-3, and
the paths as long as theirs.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchjd.aggregation
from matplotlib.figure import Figure
from torch import Tensor

import mtlopt
from measured import write_table

RESULTS = Path(__file__).parent / "results" / "study"
TASKS = ("first", "second")
STARTS = torch.tensor([(-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)])
SCALES = (0.1, 1.0, 100.0)
STEPS, RATE = 6_000, 5e-3


def values(w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both losses at `w` (..., 2)."""
    x, y = w.unbind(-1)
    above, below = (y / 2).tanh().clamp(min=0), (-y / 2).tanh().clamp(min=0)
    first = ((-x - 7) / 2 - (-y).tanh()).abs().clamp(min=5e-6).log() + 6
    second = ((-x + 3) / 2 + (-y).tanh() + 2).abs().clamp(min=5e-6).log() + 6
    bowls = [((x - a).square() + (y + 8).square() / 10) / 10 - 20 for a in (7, -7)]
    return above * first + below * bowls[0], above * second + below * bowls[1]


Make = Callable[[Tensor, float], mtlopt.MultiTaskOptimizer]


def around_adam(method: Callable[..., Any], *arguments: Any) -> Make:
    return lambda w, lr: method(torch.optim.Adam([w], lr=lr), TASKS, *arguments)


# Elementwise, so that all starts and scales are one tensor; the others take a run each.
ELEMENTWISE: dict[str, Make] = {
    "sum": around_adam(mtlopt.JointOptimizer),
    "alternating": around_adam(mtlopt.AlternatingOptimizer),
    "independent": lambda w, lr: mtlopt.IndependentOptimizer(torch.optim.Adam, [w], TASKS, lr=lr),
}
COMBINING: dict[str, Make] = {
    "PCGrad": around_adam(mtlopt.PCGrad),
    "IMTL-G": around_adam(mtlopt.Aggregated, torchjd.aggregation.IMTLG()),
    "MGDA": around_adam(mtlopt.Aggregated, torchjd.aggregation.MGDA()),
}


def descend(make: Make, starts: Tensor, scales: Tensor, steps: int, lr: float) -> Iterator[Tensor]:
    """Yields the points of every step, beginning with `starts` (..., 2).

    Args:
        make: Makes the optimizer of the points.
        starts: Where to begin.
        scales: Of the first loss, one for each start.
        steps: How many.
        lr: Adam's learning rate.
    """
    w = starts.clone().requires_grad_()
    optimizer = make(w, lr)

    def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
        first, second = values(w)
        both = {"first": (scales * first).sum(), "second": second.sum()}
        return {task: both[task] for task in tasks}

    yield starts
    for _ in range(steps):
        optimizer.step(losses)
        yield w.detach().clone()


def paths(method: str, steps: int = STEPS, lr: float = RATE, every: int = 50) -> Tensor:
    """Returns every 50th point of each scale and start, (scales, starts, points, 2)."""
    shape = (len(SCALES), len(STARTS))
    starts = STARTS.expand(*shape, 2)
    scales = torch.tensor(SCALES)[:, None].expand(shape)
    if method in ELEMENTWISE:
        points = list(descend(ELEMENTWISE[method], starts, scales, steps, lr))
        return torch.stack(points[::every], 2)
    each = [
        torch.stack(list(descend(COMBINING[method], start, scale, steps, lr))[::every])
        for start, scale in zip(starts.flatten(0, 1), scales.flatten(), strict=True)
    ]
    return torch.stack(each).view(*shape, -1, 2)


def from_front(points: Tensor) -> Tensor:
    """The distance of points (..., 2) from the front, the segment between the losses' minima."""
    x, y = points.unbind(-1)
    return torch.hypot(x - x.clamp(-7, 7), y + 8)


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Draws the paths over the contours of the sum, a panel for each scale."""
    figure = Figure(figsize=(10.5, 4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(SCALES), sharey=True)
    x, y = torch.linspace(-10, 10, 101), torch.linspace(-10, 10, 101)
    first, second = values(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1))
    for k, (axes, scale) in enumerate(zip(panels, SCALES, strict=True)):
        axes.contour(x, y, scale * first + second, 12, colors="0.85", linewidths=0.7)
        axes.plot([-7, 7], [-8, -8], color="tab:green", linewidth=6, alpha=0.35, label="front")
        for number, (method, points) in enumerate(found.items()):
            for path_ in points[k]:
                axes.plot(*path_.T, color=f"C{number}", linewidth=1.2, label=method)
                axes.plot(*path_[-1], "o", color=f"C{number}", markersize=5)
                method = "_"  # one line of the legend  # noqa: PLW2901
        axes.plot(*STARTS.T, "kx", markersize=5)
        axes.set(title=f"first loss × {scale:g}", xlabel="$w_1$", aspect="equal")
    panels[0].set_ylabel("$w_2$")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*ELEMENTWISE, *COMBINING]  # these take a run for each start and scale
    parser.add_argument("--methods", nargs="+", default=list(ELEMENTWISE), choices=known)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {method: paths(method, options.steps) for method in options.methods}
    write(found, options.out)


def write(found: dict[str, Tensor], folder: Path) -> None:
    """Writes the table of the paths' ends, and draws the paths."""
    rows = []
    for method, points in found.items():
        for k, scale in enumerate(SCALES):
            ends = points[k, :, -1]
            off = from_front(ends).tolist()
            cells = [
                f"({a:.1f}, {b:.1f}), {d:.1f}" for (a, b), d in zip(ends.tolist(), off, strict=True)
            ]
            rows.append([method, f"{scale:g}", *cells])
    columns = ["method", "first loss times", *(f"from ({a:g}, {b:g})" for a, b in STARTS.tolist())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.md").write_text(write_table(columns, rows), encoding="utf-8")
    print(write_table(columns, rows))
    draw(found, folder / "toy.png")


if __name__ == "__main__":
    main()
