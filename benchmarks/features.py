"""Rules at the features beside the same rules on whole gradients: steps of a ResNet-18 with heads.

python benchmarks/features.py

A head of one matrix per task, Adam. Joint by hand, the floor, is one forward and one backward pass
of the sum. On whole gradients a rule takes a backward pass through the trunk for every task; at
the features it takes one. Peak memory is that of a process which takes three steps of one kind.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchvision.models import resnet18  # type: ignore[import-untyped]  # not typed

import measured
import mtlopt

FLOOR = "joint, by hand"


class Network(nn.Module):
    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = resnet18(num_classes=256)
        self.heads = nn.ModuleDict({task: nn.Linear(256, 1) for task in tasks})

    def forward(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        z = self.trunk(images)
        return {task: self.heads[task](z) for task in tasks}


def names() -> list[str]:
    """Lists what can be measured here."""
    rules = ["pcgrad", "upgrad"] if importlib.util.find_spec("torchjd") else ["pcgrad"]
    at_features = [f"{rule}, features" for rule in (*rules, "gradnorm")]
    return [FLOOR, "joint", *rules, *at_features]


def make_step(name: str, count: int, options: argparse.Namespace) -> Callable[[], object]:
    torch.manual_seed(0)
    tasks = [f"task{k}" for k in range(count)]
    model = Network(tasks).to(options.device)
    shape = (options.batch_size, 3, options.size, options.size)
    images = torch.randn(shape, device=options.device)
    targets = {task: torch.randn(options.batch_size, 1, device=options.device) for task in tasks}
    base = torch.optim.Adam(model.parameters(), lr=1e-4)

    def losses(tasks: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        return {task: mse_loss(o, targets[task]) for task, o in model(images, tasks).items()}

    def by_hand() -> None:
        base.zero_grad()
        torch.stack(list(losses(tasks, images).values())).sum().backward()
        base.step()

    if name == FLOOR:
        return by_hand
    rule, _, where = name.partition(", ")
    common: dict[str, Any] = {"features": model.trunk} if where else {}
    optimizer: mtlopt.MultiTaskOptimizer
    if rule == "joint":
        optimizer = mtlopt.JointOptimizer(base, tasks)
    elif rule == "pcgrad":
        optimizer = mtlopt.PCGrad(base, tasks, **common)
    elif rule == "gradnorm":
        optimizer = mtlopt.GradNorm(base, tasks, **common)
    else:
        from torchjd.aggregation import UPGrad

        optimizer = mtlopt.Aggregated(base, tasks, UPGrad(), **common)
    return lambda: optimizer.step(losses, images)


def main() -> None:
    parser = measured.make_parser(__doc__)
    parser.set_defaults(processes=3, repetitions=5)
    parser.add_argument("--tasks", type=int, nargs="+", default=(2, 4, 8, 40), help="values of T")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    if options.child:
        count, _, alone = options.child.partition(" ")
        if alone:
            step = make_step(alone, int(count), options)
            for _ in range(3):
                step()
            print(json.dumps({"bytes": measured.peak_memory(options.device)}))
            return
        steps = {name: make_step(name, int(count), options) for name in names()}
        cases: dict[str, measured.Case] = {
            name: lambda step=step: step  # type: ignore[misc]  # inferred from the annotation
            for name, step in steps.items()
        }
        print(json.dumps(measured.seconds(cases, options.repetitions, options.device, warm_up=2)))
        return
    shape = ["--size", str(options.size), "--batch-size", str(options.batch_size)]
    rows = []
    for count in options.tasks:
        results = measured.in_processes(options, [str(count)] * options.processes, shape)
        alone = [f"{count} {name}" for name in names()]
        memory = measured.in_processes(options, alone, shape) if count == options.tasks[-1] else []
        for position, (name, time) in enumerate(measured.medians(results).items()):
            row = [count, name, f"{1e3 * time:.1f}", measured.ratio(results, name, FLOOR)]
            row.append(f"{memory[position]['bytes'] / 1e6:.0f}" if memory else "")
            rows.append(row)
    text = (
        f"ResNet-18, {options.size} x {options.size} pixels, batch of {options.batch_size}. "
        f"Medians of {options.processes} processes' medians over {options.repetitions} interleaved "
        "steps; ratios of one process's medians with their range over the processes.\n\n"
    )
    columns = ["T", "step", "ms", "x joint by hand", "peak memory, MB"]
    measured.write_results(options, "features", text + measured.write_table(columns, rows))


if __name__ == "__main__":
    main()
