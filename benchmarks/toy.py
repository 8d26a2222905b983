"""The two-task toy of CAGrad (Liu et al., 2021), as Nash-MTL and FAMO use it too.

    python -m benchmarks.toy    # half an hour; writes toy.npz, toy.md and toy.png

From five starts, with Adam at 1e-3 and the first loss times 0.1, 1 and 100. The Pareto front, where
neither loss can fall without the other rising, is the segment between the two minima. Which of its
points a method ends at should not depend on the unit of a loss.
"""

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchjd.scalarization as S
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import mtlopt
from benchmarks.study.methods import AGGREGATORS
from benchmarks.timing import write_table

RESULTS = Path(__file__).parent / "results" / "study"
TASKS = ("first", "second")
STARTS = torch.tensor([(-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)])
SCALES = (0.1, 1.0, 100.0)
STEPS, RATE = 30_000, 1e-3
ON_FRONT = 1.0
"""An end nearer than this to the Pareto front is drawn filled; the others are hollow."""


def values(w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both losses at `w` (..., 2)."""
    x, y = w.unbind(-1)
    above, below = (y / 2).tanh().clamp(min=0), (-y / 2).tanh().clamp(min=0)
    first = ((-x - 7) / 2 - (-y).tanh()).abs().clamp(min=5e-6).log() + 6
    second = ((-x + 3) / 2 + (-y).tanh() + 2).abs().clamp(min=5e-6).log() + 6
    bowls = [((x - a).square() + (y + 8).square() / 10) / 10 - 20 for a in (7, -7)]
    return above * first + below * bowls[0], above * second + below * bowls[1]


Make = Callable[[Tensor, float], mtlopt.MultiTaskOptimizer]


def around_adam(method: Callable[..., Any], *rules: Callable[[int], Any]) -> Make:
    # A rule may keep a state: each path has its own.
    return lambda w, lr: method(torch.optim.Adam([w], lr=lr), TASKS, *(make(2) for make in rules))


# Elementwise, so that all starts and scales are one tensor; the others take a run each.
ELEMENTWISE: dict[str, Make] = {
    "sum": around_adam(mtlopt.JointOptimizer),
    "alternating": around_adam(mtlopt.AlternatingOptimizer),
    "independent": lambda w, lr: mtlopt.IndependentOptimizer(torch.optim.Adam, [w], TASKS, lr=lr),
}
COMBINING: dict[str, Make] = {
    "Balanced": around_adam(mtlopt.Balanced),
    "uncertainty (UW)": around_adam(mtlopt.Scalarized, S.UW),
    "FAMO": around_adam(mtlopt.Scalarized, S.FAMO),
    "GradNorm": lambda w, lr: mtlopt.GradNorm(torch.optim.Adam([w], lr=lr), TASKS, shared=[w]),
    "PCGrad": around_adam(mtlopt.PCGrad),
    **{name: around_adam(mtlopt.Aggregated, make) for name, make in AGGREGATORS.items()},
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
        walk(method, start, scale, steps, lr, every)
        for start, scale in zip(starts.flatten(0, 1), scales.flatten(), strict=True)
    ]
    return torch.stack(each).view(*shape, -1, 2)


def walk(method: str, start: Tensor, scale: Tensor, steps: int, lr: float, every: int) -> Tensor:
    """Returns every so many points of one path, (points, 2); one that comes to rest stays there.

    Where a rule has no answer (a gradient of zero, a loss that is negative) the path ends: what
    follows is NaN.
    """
    torch.set_num_threads(1)
    points = torch.full((1 + steps // every, 2), float("nan"))
    try:
        for step, point in enumerate(descend(COMBINING[method], start, scale, steps, lr)):
            at, between = divmod(step, every)
            if between == 0:
                points[at] = point
                back = at - max(1, 1000 // every)
                if back >= 0 and (point - points[back : at + 1]).abs().max() < 2 * lr:
                    points[at:] = point
                    break
    except (ValueError, FloatingPointError, RuntimeError) as error:
        print(f"{method} from {start.tolist()}, times {scale.item():g}: {error}")
    return points


def from_front(points: Tensor) -> Tensor:
    """Returns the distance of points (..., 2) from the Pareto front between the losses' minima."""
    x, y = points.unbind(-1)
    return torch.hypot(x - x.clamp(-7, 7), y + 8)


def draw(found: dict[str, Tensor], path: Path) -> None:
    """Draws the paths over the contours of the sum, with a panel per method, a colour per scale."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(
        figsize=(0.4 + 2.3 * columns, 0.7 + 2.3 * rows), layout="constrained", facecolor="white"
    )
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    line = torch.linspace(-10, 10, 101)
    total = sum(values(torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)))
    for axes in panels[len(found) :]:
        axes.axis("off")
    for axes, (method, points) in zip(panels, found.items(), strict=False):
        axes.contour(line, line, total, 12, colors="0.88", linewidths=0.6)
        axes.plot(
            [-7, 7], [-8, -8], color="tab:green", linewidth=6, alpha=0.35, label="Pareto front"
        )
        for k, scale in enumerate(SCALES):
            for number, walked in enumerate(points[k]):
                label = f"first loss × {scale:g}" if number == 0 else "_"
                axes.plot(*walked.T, color=f"C{k}", linewidth=1.2, label=label)
                fill = f"C{k}" if from_front(walked[-1]) < ON_FRONT else "white"
                axes.plot(
                    *walked[-1], "o", color=f"C{k}", markerfacecolor=fill, markersize=8 - 2 * k
                )
        axes.plot(*STARTS.T, "kx", markersize=4)
        axes.set(aspect="equal", xlim=(-10.5, 10.5), ylim=(-10.5, 10.5))
        axes.set_title(method, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [*ELEMENTWISE, *COMBINING]
    parser.add_argument(
        "--methods", nargs="*", default=known, help="run only these; none: only draw", choices=known
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "toy.npz"
    found = dict(np.load(kept)) if kept.exists() else {}
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(options.processes, context) as pool:
        going = {method: pool.submit(paths, method, options.steps) for method in options.methods}
        for method, future in tqdm(going.items(), unit="method"):
            # Every 300th point, in half a pixel of the picture.
            found[method] = future.result()[:, :, ::6].numpy().astype(np.float16)
            np.savez_compressed(kept, **found)
    ordered = {m: torch.tensor(found[m]).float() for m in known if m in found}
    write(ordered, options.out)


def write(found: dict[str, Tensor], folder: Path) -> None:
    """Writes the table of the paths' ends, and draws the paths."""
    rows = []
    for method, points in found.items():
        for k, scale in enumerate(SCALES):
            last = points[k, :, -1]
            cells = [
                f"({a:.1f}, {b:.1f}), {'on' if d < ON_FRONT else f'{d:.1f} off'}"
                if math.isfinite(d)
                else "broke off"
                for (a, b), d in zip(last.tolist(), from_front(last).tolist(), strict=True)
            ]
            rows.append([method, f"{scale:g}", *cells])
    columns = ["method", "first loss times", *(f"from ({a:g}, {b:g})" for a, b in STARTS.tolist())]
    (folder / "toy.md").write_text(write_table(columns, rows), encoding="utf-8")
    print(write_table(columns, rows))
    draw(found, folder / "toy.png")


if __name__ == "__main__":
    main()
