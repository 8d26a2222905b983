"""A step where each task brings its own batch, beside plain loops with a pass per task.

python -m benchmarks.data_sets

The loops by hand take T forward passes, backward passes and updates too: with one Adam for all
tasks (a step after each batch), and with T. The sum of all tasks takes T passes and one update.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mtlopt
from benchmarks import timing

FLOOR = "one Adam, by hand"
Batches = Mapping[str, tuple[Tensor, Tensor]]


class Network(nn.Module):
    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({task: nn.Linear(128, 10) for task in tasks})

    def forward(self, task: str, x: Tensor) -> Tensor:
        output: Tensor = self.heads[task](self.trunk(x))
        return output


def make_step(name: str, count: int, device: str) -> Callable[[], object]:
    tasks = [f"task {k}" for k in range(count)]
    model = Network(tasks).to(device)
    drawn = {t: (torch.randn(64, 1, 28, 28), torch.randint(10, (64,))) for t in tasks}
    batches = {t: (x.to(device), y.to(device)) for t, (x, y) in drawn.items()}

    def losses(tasks: Sequence[str], batches: Batches) -> dict[str, Tensor]:
        return {t: cross_entropy(model(t, batches[t][0]), batches[t][1]) for t in tasks}

    adam = partial(torch.optim.Adam, list(model.parameters()))
    if name == "independent":
        optimizer = mtlopt.IndependentOptimizer(adam(), tasks)
        return lambda: optimizer.step(losses, batches)
    if name == "joint":
        joint = mtlopt.JointOptimizer(adam(), tasks)
        return lambda: joint.step(losses, batches)
    one = adam()
    optimizers = {task: one if name == FLOOR else adam() for task in tasks}

    def in_turn() -> None:
        for task, own in optimizers.items():
            own.zero_grad()
            losses([task], batches)[task].backward()
            own.step()

    return in_turn


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8])
    parser.set_defaults(repetitions=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = (FLOOR, "T Adams, by hand", "independent", "joint")
    if options.child:
        cases = {}
        for name in names:
            step = make_step(name, int(options.child), options.device)
            cases[name] = lambda step=step: step
        print(json.dumps(timing.seconds(cases, options.repetitions, options.device, 3)))
        return
    rows = []
    for count in options.tasks:
        results = timing.in_processes(options, [str(count)] * options.processes)
        found = timing.medians(results)
        times = [f"{1e3 * found[name]:.1f}" for name in names]
        ratios = [timing.ratio(results, name, FLOOR) for name in names[1:]]
        rows.append([count, *times, *ratios])
    text = (
        "Two convolutions and a linear layer as the trunk (0.2 million weights), a head and a "
        "batch of 64 pictures of 28 x 28 per task. "
        f"Medians of {options.processes} processes' medians over {options.repetitions} "
        "interleaved steps, in milliseconds of one thread; ratios to one Adam by hand, of one "
        "process's medians, with their range over the processes.\n\n"
    )
    columns = ["T", *names, *(f"{name}, ratio" for name in names[1:])]
    timing.write_results(options, "data_sets", text + timing.write_table(columns, rows))


if __name__ == "__main__":
    main()
