"""What `features=` makes of the price: whole steps beside the joint loop by hand, and peak memory.

python -m benchmarks.features --tasks 2 4 8 40

A ResNet-18 trunk with a linear head of ten classes for each of T tasks, SGD with momentum; and the
glaucoma network, cut where its heads begin: at the outputs of its encoder and of its decoder. A
step of Balanced is the mean over ten, of which one measures. Times are of the processor, on one
thread, where the device is one: a shared machine lengthens a step, not its work.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mtlopt
from benchmarks import timing

sys.path.append(str(Path(__file__).parents[1] / "examples" / "refuge"))
from refuge.network import TASKS, MultiTaskUNet

BY_HAND = "joint, by hand"
NAMES = (
    BY_HAND,
    "joint",
    "balanced",
    "balanced, features",
    "pcgrad",
    "pcgrad, features",
    "gradnorm, features",
    "upgrad, features",
)
EVERY = 10
SLOW = ("pcgrad", "upgrad, features")  # not for many tasks
MANY = 8


class Problem:
    """A network, its parameters, what its tasks share, and their losses on one batch."""

    def __init__(self, count: int, options: argparse.Namespace) -> None:
        from torchvision.models import resnet18  # type: ignore[import-untyped]  # not typed

        torch.manual_seed(0)
        x = torch.randn(options.batch_size, 3, options.size, options.size, device=options.device)
        self.tasks: tuple[str, ...] = tuple(f"task {k}" for k in range(count))
        self.features: Any
        self.model: nn.Module
        if count:
            trunk = resnet18(num_classes=1)
            trunk.fc = nn.Identity()
            heads = nn.ModuleDict({task: nn.Linear(512, 10) for task in self.tasks})
            self.model = nn.ModuleList([trunk, heads]).to(options.device)
            labels = torch.randint(10, (count, options.batch_size), device=options.device)
            targets = dict(zip(self.tasks, labels, strict=True))
            self.features = trunk

            def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
                z = trunk(x)
                return {task: cross_entropy(heads[task](z), targets[task]) for task in tasks}
        else:
            self.tasks = TASKS
            network = MultiTaskUNet(width=options.width).to(options.device)
            self.model = network
            self.features = [network.encoder[-1], network.decoder[-1]]

            def losses(tasks: Sequence[str]) -> dict[str, Tensor]:
                return {t: logits.square().mean() for t, logits in network(x, tasks).items()}

        self.losses: Callable[[Sequence[str]], Mapping[str, Tensor]] = losses
        self.base = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)


def make_step(name: str, count: int, options: argparse.Namespace) -> Callable[[], object]:
    problem = Problem(count, options)
    base, tasks, features = problem.base, problem.tasks, problem.features
    if name == BY_HAND:

        def joint() -> None:
            base.zero_grad()
            torch.stack(list(problem.losses(tasks).values())).sum().backward()
            base.step()

        return joint
    optimizer: mtlopt.MultiTaskOptimizer
    if name == "joint":
        optimizer = mtlopt.JointOptimizer(base, tasks)
    elif name.startswith("balanced"):
        optimizer = mtlopt.Balanced(
            base, tasks, features=features if "," in name else None, every=EVERY
        )
    elif name.startswith("pcgrad"):
        optimizer = mtlopt.PCGrad(base, tasks, features=features if "," in name else None)
    elif name.startswith("gradnorm"):
        optimizer = mtlopt.GradNorm(base, tasks, features=features)
    else:
        from torchjd.aggregation import UPGrad

        optimizer = mtlopt.Aggregated(base, tasks, UPGrad(), features=features)
    return lambda: optimizer.step(problem.losses)


def names_for(count: int, options: argparse.Namespace) -> list[str]:
    return [name for name in options.methods if count <= MANY or name not in SLOW]


def repeated(step: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [step() for _ in range(times)]


def measure(child: str, options: argparse.Namespace) -> dict[str, Any]:
    what, _, rest = child.partition(":")
    count, _, name = rest.partition(":")
    if what == "memory":
        step = make_step(name, int(count), options)
        for _ in range(3):
            step()
        return {"bytes": timing.peak_memory(options.device)}
    lengths = {n: EVERY if n.startswith("balanced") else 1 for n in names_for(int(count), options)}
    steps = {n: repeated(make_step(n, int(count), options), k) for n, k in lengths.items()}
    cases = {n: lambda step=step: step for n, step in steps.items()}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    found = timing.seconds(cases, options.repetitions, options.device, clock=clock)
    return {name: [time / lengths[name] for time in own] for name, own in found.items()}


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 40])
    parser.add_argument("--size", type=int, default=64, help="side of the pictures")
    parser.add_argument("--width", type=int, default=16, help="of the glaucoma network")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--times-only", action="store_true", help="leave out the peak memory")
    options = parser.parse_args()
    options.methods = [BY_HAND, *(name for name in options.methods if name != BY_HAND)]
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return
    arguments = ["--size", options.size, "--width", options.width]
    arguments += ["--batch-size", options.batch_size, "--methods", *options.methods]
    rows = []
    for count in [*options.tasks, 0]:
        children = [f"times:{count}"] * options.processes
        results = timing.in_processes(options, children, list(map(str, arguments)))
        found = timing.medians(results)
        names = names_for(count, options)
        children = [] if options.times_only else [f"memory:{count}:{name}" for name in names]
        peaks = [
            peak["bytes"] / 2**20
            for peak in timing.in_processes(options, children, list(map(str, arguments)))
        ]
        for position, name in enumerate(names):
            more = [f"{peaks[position] - peaks[0]:+.0f}"] if peaks else []
            label = f"ResNet-18, T = {count}" if count else "glaucoma network, T = 4"
            times = [f"{1e3 * found[name]:.0f}", timing.ratio(results, name, BY_HAND)]
            rows.append([label, name, *times, *more])
    text = (
        f"A step of Balanced is the mean over {EVERY}, of which one measures. "
        f"Batches of {options.batch_size} pictures of {options.size} x {options.size}; the "
        f"glaucoma network of width {options.width}. Medians of {options.processes} processes' "
        f"medians over {options.repetitions} interleaved steps; ratios with their range over the "
        "processes"
    )
    columns = ["network", "method", "ms", "times the joint loop by hand"]
    if options.times_only:
        text += ".\n\n"
    else:
        columns.append("MiB more")
        text += "; peak memory of a process of its own, above the joint loop's; TorchJD "
        text += "and its solver are in UPGrad's.\n\n"
    timing.write_results(options, "features", text + timing.write_table(columns, rows))


if __name__ == "__main__":
    main()
