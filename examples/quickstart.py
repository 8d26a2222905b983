"""One training loop, every method, and a sum with tuned weights: three tasks, made-up data.

python examples/quickstart.py                    (a table of all, about a minute)
python examples/quickstart.py --method pcgrad    (one of them, seconds)
python examples/quickstart.py --method gradnorm --plot runs/quickstart
tensorboard --logdir runs/quickstart
torchrun --nproc-per-node 2 examples/quickstart.py
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.nn.parallel import DistributedDataParallel

import mtlopt

METHODS = ("joint", "balanced", "alternating", "independent", "pcgrad", "gradnorm", "upgrad", "uw")
OF_TORCHJD = ("upgrad", "uw")
TASKS = ("price", "days", "sold")
Targets = Mapping[str, Tensor]
Losses = Callable[[Sequence[str], Tensor, Targets], dict[str, Tensor]]


class Network(nn.Module):
    """A trunk so narrow that the tasks interfere, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(2, 1) for task in TASKS})

    def forward(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: self.heads[task](features).squeeze(1) for task in tasks}


def make_data(count: int) -> tuple[Tensor, Targets]:
    """Samples items for sale, and three targets that differ in kind and in scale."""
    inputs = torch.randn(count, 8)
    cost, rarity, demand = (inputs @ torch.randn(8, 3) / 8**0.5).T
    sold = (demand > cost).float()
    return inputs, {"price": 4 * cost, "days": torch.tanh(rarity - cost), "sold": sold}


def make_losses(model: nn.Module) -> Losses:
    criteria: dict[str, Any] = dict.fromkeys(TASKS, mse_loss)
    criteria["sold"] = binary_cross_entropy_with_logits

    # The optimizer says which tasks it wants now.
    def losses(tasks: Sequence[str], inputs: Tensor, targets: Targets) -> dict[str, Tensor]:
        outputs = model(inputs, tasks)
        return {task: criteria[task](outputs[task], targets[task]) for task in tasks}

    return losses


def make_optimizer(  # noqa: PLR0911  # a method, a return
    method: str,
    model: Network,
    group: dist.ProcessGroup | None = None,
    lr: float = 0.01,
    record: Literal["updates"] | None = None,
    weights: Mapping[str, float] | None = None,
) -> mtlopt.MultiTaskOptimizer:
    """The one line that differs."""
    parameters, last = list(model.parameters()), model.trunk[-2].parameters()
    adam = torch.optim.Adam(parameters, lr=lr)
    if method == "independent":
        return mtlopt.IndependentOptimizer(adam, TASKS, record=record)
    if method == "alternating":
        return mtlopt.AlternatingOptimizer(adam, TASKS, record=record)
    if method == "joint":
        return mtlopt.JointOptimizer(adam, TASKS, weights, process_group=group)
    if method == "balanced":
        return mtlopt.Balanced(adam, TASKS, shared=last, process_group=group)
    if method == "pcgrad":
        return mtlopt.PCGrad(adam, TASKS, process_group=group)
    if method == "gradnorm":
        return mtlopt.GradNorm(adam, TASKS, shared=last, process_group=group)
    from torchjd import aggregation, scalarization  # noqa: PLC0415  # an optional package

    if method == "upgrad":
        return mtlopt.Aggregated(adam, TASKS, aggregation.UPGrad(), process_group=group)
    return mtlopt.Scalarized(adam, TASKS, scalarization.UW(len(TASKS)), process_group=group)


def train(
    method: str, seed: int, steps: int, weights: Mapping[str, float] | None = None
) -> tuple[Tensor, float]:
    """Returns each task's loss on new data, in % of chance level, and the seconds per step."""
    torch.manual_seed(seed)
    inputs, targets = make_data(1024)
    seen, new = slice(512), slice(512, None)  # The second half is not trained on.
    model = Network()
    losses, optimizer = make_losses(model), make_optimizer(method, model, weights=weights)
    start = time.process_time()
    for _ in range(steps):
        rows = torch.randint(512, (64,))
        batch = {task: values[seen][rows] for task, values in targets.items()}
        optimizer.step(losses, inputs[seen][rows], batch)
    seconds = (time.process_time() - start) / steps
    # Chance is a constant guess: the mean, or the share of items that were sold.
    guesses = {task: values[seen].mean().expand(512) for task, values in targets.items()}
    truth = {task: values[new] for task, values in targets.items()}
    chance = {task: mse_loss(guesses[task], truth[task]) for task in ("price", "days")}
    chance["sold"] = binary_cross_entropy_with_logits(guesses["sold"].logit(), truth["sold"])
    with torch.no_grad():
        found = losses(TASKS, inputs[new], truth)
    return torch.stack([100 * found[task] / chance[task] for task in TASKS]), seconds


def compare(steps: int, seeds: int) -> None:
    """Prints what every method, and a sum whose weights were searched for, reach."""
    print("Loss on new data in % of chance level, lower is better:", end=" ")
    print(f"{steps} steps, mean ± standard error of {seeds} seeds\n", flush=True)
    # Adam ignores a common factor, so one weight may stay 1. The search uses another seed.
    tries = [{"price": p, "days": d} for p, d in product((1, 0.1, 0.01), (0.1, 1, 10))]
    best = min(tries, key=lambda weights: train("joint", seeds, steps, weights)[0].mean().item())
    installed = importlib.util.find_spec("torchjd") is not None
    methods = [method for method in METHODS if installed or method not in OF_TORCHJD]
    print("method       price   days   sold    all three    time of a step")
    means, price_of_joint = {}, 0.0
    for name in ("joint", "tuned sum", *methods[1:]):
        options = ("joint", best) if name == "tuned sum" else (name, None)
        runs = [train(options[0], seed, steps, options[1]) for seed in range(seeds)]
        reached = torch.stack([losses for losses, _ in runs])
        seconds = sum(cost for _, cost in runs)
        price_of_joint = price_of_joint or seconds
        means[name] = reached.mean(1)
        numbers = " ".join(f"{value:6.1f}" for value in reached.mean(0))
        spread = f"{means[name].mean():5.1f} ± {means[name].std() / seeds**0.5:3.1f}"
        print(f"{name:11} {numbers}   {spread:12} {seconds / price_of_joint:8.1f} x", flush=True)
    if not installed:
        print(f"Left out: {', '.join(OF_TORCHJD)}, which need TorchJD: pip install '.[torchjd]'")
    tuned = means.pop("tuned sum")
    first = min(means, key=lambda name: means[name].mean().item())
    ahead = int((tuned < means[first]).sum())
    print(
        f"\nWithout a search {first} does best, with {means[first].mean():.0f} % of chance level; "
        f"the sum whose weights took {len(tries)} trial runs (price {best['price']}, days "
        f"{best['days']}, sold 1) reaches {tuned.mean():.0f} %, and beats {first} on {ahead} of "
        f"{seeds} seeds."
    )


class Plots:
    """Writes event files for TensorBoard, conflicts.png and training.png."""

    def __init__(self, folder: Path, method: str) -> None:
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415  # only for --plot
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # only for --plot
        except ImportError as error:
            raise SystemExit(f"{error}; for --plot: pip install matplotlib tensorboard") from None
        self.folder, self.method = folder, method
        self.figure = Figure(figsize=(9, 3.2), layout="constrained")
        self.writer = SummaryWriter(str(folder))
        self.curves: dict[str, list[Tensor]] = {}

    def add_conflicts(self, step: int, report: mtlopt.ConflictReport) -> None:
        figure = report.plot()
        if step == 0:
            figure.savefig(self.folder / "conflicts.png", dpi=150)
        self.writer.add_figure("conflicts", figure, step)
        self.add(step, {"trunk_norms": report.norms})

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if value.ndim == 0:  # PCGrad's conflict fraction
                self.writer.add_scalar(name, value, step)
            elif value.ndim == 1:  # One number per task: losses, norms, coefficients, weights
                self.curves.setdefault(name, []).append(value)
                for task, own in zip(TASKS, value, strict=True):
                    self.writer.add_scalar(f"{name}/{task}", own, step)

    def close(self) -> None:
        self.writer.close()
        shown = ("losses", "weights", "shares", "update_shares")
        names = [name for name in shown if name in self.curves]
        axes = self.figure.subplots(1, len(names), squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            ax.plot(torch.stack(self.curves[name]).numpy(), linewidth=1)
            ax.set(title=f"{self.method}: {name.replace('_', ' ')}", xlabel="step")
            ax.set_yscale("log" if name == "losses" else "linear")
            ax.grid(alpha=0.3)
        self.figure.legend(axes[0].lines, TASKS, loc="outside right center")
        self.figure.savefig(self.folder / "training.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train three tasks with one or all methods.")
    parser.add_argument("--method", choices=METHODS, help="train one and print its losses")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5, help="how many, where all are compared")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write pictures and event files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    parallel = dist.is_torchelastic_launched()  # by torchrun
    if options.seeds < 2:
        parser.error(f"--seeds must be at least 2, got {options.seeds}: --seeds 5")
    if options.method is None and not parallel and not options.plot:
        compare(options.steps, options.seeds)
        return
    method = options.method or "balanced"
    torch.manual_seed(0)

    if parallel:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)

    inputs, targets = make_data(512)
    model = Network()
    losses = evaluate = make_losses(model)
    if parallel and method in ("independent", "alternating"):
        # A step per task: DDP averages each gradient. The other methods do so themselves, in the
        # process group, before they combine the tasks' gradients.
        losses = make_losses(DistributedDataParallel(model, find_unused_parameters=True))
    group = dist.group.WORLD if parallel else None
    record: Literal["updates"] | None = "updates" if options.plot else None
    optimizer = make_optimizer(method, model, group, record=record)
    plots = Plots(options.plot, method) if options.plot and rank == 0 else None

    optimizer.diagnostics()  # A step per task takes its norms from the first call on.
    own = torch.arange(rank, len(inputs), ranks)  # each process its part of the data
    before = evaluate(TASKS, inputs, targets)
    for step in range(options.steps):
        rows = own[torch.randint(len(own), (64 // ranks,))]
        if plots and step % 100 == 0:
            shared = model.trunk.parameters()
            report = mtlopt.conflicts(evaluate, shared, TASKS, inputs, targets)
            plots.add_conflicts(step, report)
        values = optimizer.step(losses, inputs[rows], {t: y[rows] for t, y in targets.items()})
        if plots:
            drawn = torch.stack([values[task] for task in TASKS])
            plots.add(step, {"losses": drawn, **optimizer.diagnostics()})
    after = evaluate(TASKS, inputs, targets)

    if rank == 0:
        print(f"{method}, {options.steps} steps\ntask    before    after")
        for task in TASKS:
            print(f"{task:6} {before[task].item():7.3f}  {after[task].item():7.3f}")
    if plots:
        plots.close()
    if parallel:
        dist.barrier()  # None leaves while another still talks to it.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
