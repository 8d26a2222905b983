"""What the protocol costs where the passes cost nothing: steps of a tiny network.

python -m benchmarks.overhead

Each method with none of its options, beside the same loop by hand, both with Adam, on one thread.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import mtlopt
from benchmarks import timing

TASKS = ("a", "b", "c", "d")
FLOORS = {
    "independent": "independent, by hand",
    "alternating": "alternating, by hand",
    "joint": "joint, by hand",
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})

    def forward(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: self.heads[task](features) for task in tasks}


def make_step(name: str, device: str) -> Callable[[], object]:
    model = Network().to(device)
    x, y = torch.randn(32, 8, device=device), torch.randn(32, 1, device=device)

    def losses(tasks: Sequence[str], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {task: mse_loss(output, y) for task, output in model(x, tasks).items()}

    adam = torch.optim.Adam
    base = adam(model.parameters())
    methods: dict[str, Callable[[], mtlopt.MultiTaskOptimizer]] = {
        "independent": lambda: mtlopt.IndependentOptimizer(adam, model.parameters(), TASKS),
        "alternating": lambda: mtlopt.AlternatingOptimizer(base, TASKS),
        "joint": lambda: mtlopt.JointOptimizer(base, TASKS),
    }
    if name in methods:
        optimizer = methods[name]()
        return lambda: optimizer.step(losses, x, y)
    if name == "joint, by hand":

        def joint() -> None:
            base.zero_grad()
            torch.stack(list(losses(TASKS, x, y).values())).sum().backward()
            base.step()

        return joint
    shared = name == "alternating, by hand"
    optimizers = {task: base if shared else adam(model.parameters()) for task in TASKS}

    def in_turn() -> None:
        for task, own in optimizers.items():
            own.zero_grad()
            losses((task,), x, y)[task].backward()
            own.step()

    return in_turn


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.set_defaults(repetitions=500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for pair in FLOORS.items() for name in reversed(pair)]
    if options.child:
        steps: dict[str, Any] = {name: make_step(name, options.device) for name in names}
        cases = {name: lambda step=step: step for name, step in steps.items()}
        # A processor's time: what else the machine does lengthens a step of microseconds most.
        clock = time.process_time if options.device == "cpu" else time.perf_counter
        print(json.dumps(timing.seconds(cases, options.repetitions, options.device, 20, clock)))
        return
    results = timing.in_processes(options, ["times"] * options.processes)
    found = timing.medians(results)
    rows = []
    for name, floor in FLOORS.items():
        times = [f"{1e6 * found[each]:.0f}" for each in (floor, name)]
        turns = 1 if name == "joint" else len(TASKS)
        more = f"{1e6 * (found[name] - found[floor]) / turns:.0f}"
        rows.append([name, *times, timing.ratio(results, name, floor), more])
    text = (
        f"A trunk of 16 units, {len(TASKS)} heads, 32 samples. Medians of {options.processes} "
        f"processes' medians over {options.repetitions} interleaved steps, in microseconds of one "
        "thread; ratios of one process's medians with their range over the processes.\n\n"
    )
    columns = ["method", "by hand", "mtlopt", "ratio", "more per update"]
    timing.write_results(options, "overhead", text + timing.write_table(columns, rows))


if __name__ == "__main__":
    main()
