"""Draws gradnorm_toy.png: half a minute on one core."""

import sys
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

# The problem is the test's.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from gradnorm_toy import GradNormToy  # found through the line above

STEPS, EVERY = 600, 20
COUNTS = (2, 10)
LABELS = {"equal": "equal weights", "gradnorm": "GradNorm"}


def main() -> None:
    torch.set_num_threads(1)  # With more, sums depend on how many there are.
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.subplots(2, len(COUNTS), sharex=True, sharey="row")
    for (upper, lower), count in zip(axes.T, COUNTS, strict=True):
        toy = GradNormToy(count)
        for method, color in (("equal", "0.5"), ("gradnorm", "tab:blue")):
            steps, losses, weights = zip(*toy.train(method, STEPS, EVERY), strict=True)
            relative = torch.stack(losses).mean(1)
            smallest = losses[-1][0]
            print(f"{count} tasks, {LABELS[method]}: {relative[-1]:.2f}, scale 1: {smallest:.2f}")
            upper.plot(steps, relative.numpy(), color=color, label=LABELS[method])
        upper.axhline(1, color="black", linewidth=0.8, linestyle="dotted")
        upper.set_title(f"{count} tasks")
        colors = colormaps["viridis"](torch.linspace(0, 0.9, count).numpy())
        for task, curve in enumerate(torch.stack(weights).T):
            label = f"{toy.scales[task]:.3g}"
            lower.plot(steps, curve.numpy(), color=colors[task], label=label)
        lower.set_xlabel("step")
        lower.legend(title="scale", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    axes[0, 0].set_ylabel("test loss / initial, mean over tasks")
    axes[1, 0].set_ylabel("GradNorm's weights")
    axes[0, 1].legend(loc="upper right")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
