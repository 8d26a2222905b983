"""One network for two data sets that share no picture: written digits, and photographs.

python examples/data_sets.py

Every task brings its own batch, so T passes are paid in any case, and independent optimizers cost
what a plain loop costs. Both data sets come with scikit-learn: which digit is it, and which pixels
are missing in the middle of a piece of a photograph? Ends in a table, after a minute.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import mtlopt

TASKS = ("digit", "middle")
OUTPUTS = {"digit": 10, "middle": 4}
CRITERIA: dict[str, Any] = {"digit": cross_entropy, "middle": mse_loss}
Batch = tuple[Tensor, Tensor]


class Network(nn.Module):
    """A trunk, and for each task an adapter of low rank in it and a head behind it."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 32)
        ranks = {task: nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32)) for task in tasks}
        self.adapters = nn.ModuleDict(ranks)
        self.heads = nn.ModuleDict({task: nn.Linear(32, OUTPUTS[task]) for task in tasks})

    def forward(self, task: str, x: Tensor) -> Tensor:
        z = self.first(x).relu()
        z = (self.second(z) + self.adapters[task](z)).relu()
        output: Tensor = self.heads[task](z)
        return output


def digits() -> tuple[Batch, Batch]:
    """Returns pictures of 8 x 8 and their digits, for training and for testing."""
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def middles() -> tuple[Batch, Batch]:
    """Returns pieces of 8 x 8 without their four pixels in the middle, and these pixels."""
    gray = torch.stack([torch.tensor(picture) for picture in load_sample_images().images])
    gray = gray.float().mean(-1) / 255

    def cut(rows: Tensor) -> Batch:
        pieces = rows.unfold(1, 8, 8).unfold(2, 8, 8).reshape(-1, 8, 8).clone()
        y = pieces[:, 3:5, 3:5].flatten(1)
        pieces[:, 3:5, 3:5] = 0
        return pieces.flatten(1), y

    return cut(gray[:, :320]), cut(gray[:, 320:])


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yields batches, in a new order whenever the data set is over."""
    while True:
        yield from loader


def train(
    method: str, tasks: Sequence[str], data: Mapping[str, tuple[Batch, Batch]], steps: int
) -> Network:
    network = Network(tasks)
    adam = torch.optim.Adam(network.parameters(), lr=2e-3)
    methods: dict[str, Callable[[], mtlopt.MultiTaskOptimizer]] = {
        "joint": lambda: mtlopt.JointOptimizer(adam, tasks),
        "balanced": lambda: mtlopt.Balanced(adam, tasks),
        "independent": lambda: mtlopt.IndependentOptimizer(adam, tasks),
    }
    optimizer = methods[method]()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def losses(tasks: Sequence[str], batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        return {t: CRITERIA[t](network(t, batches[t][0]), batches[t][1]) for t in tasks}

    sets = {task: TensorDataset(*data[task][0]) for task in tasks}
    loaders = {t: forever(DataLoader(own, batch_size=64, shuffle=True)) for t, own in sets.items()}
    for _ in range(steps):
        # A batch per task, however large its data set is.
        optimizer.step(losses, {task: next(loader) for task, loader in loaders.items()})
        schedule.step()
    return network


@torch.no_grad()
def test(network: Network, task: str, held_out: Batch) -> float:
    """Returns the share of wrong digits, or the error of the pixels against their spread."""
    x, y = held_out
    output = network(task, x)
    if task == "digit":
        return 100 * (output.argmax(1) != y).float().mean().item()
    return 100 * (mse_loss(output, y) / y.var()).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description="Train one network on two data sets.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    data = {"digit": digits(), "middle": middles()}
    table: dict[str, dict[str, float]] = {}
    print("network              digits, % wrong  middles, % of variance  us a step")
    for name in ("two single networks", "joint", "balanced", "independent"):
        found: dict[str, list[float]] = {task: [] for task in TASKS}
        start = time.process_time()
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            parts = [(task,) for task in TASKS] if name == "two single networks" else [TASKS]
            for part in parts:
                method = "joint" if len(part) == 1 else name
                network = train(method, part, data, options.steps)
                for task in part:
                    found[task].append(test(network, task, data[task][1]))
        took = 1e6 * (time.process_time() - start) / options.seeds / options.steps
        table[name] = {task: mean(values) for task, values in found.items()}
        wrong, variance = table[name].values()
        print(f"{name:<19}  {wrong:>15.2f}  {variance:>22.2f}  {took:>9.0f}")
    return table


if __name__ == "__main__":
    main()
