"""Whole steps of the glaucoma network, beside the bare passes that each method cannot avoid.

python -m benchmarks.steps

Adam, four tasks, random pictures with all labels. By hand means the loop without this package:
for independent, its T optimizers; for PCGrad, one forward and T backward passes and Adam's step,
without any combination; for GradNorm, one forward and one backward pass, T more from the losses to
the last encoder convolution, and Adam's step. The peers, from PyPI, are left out where they are
not installed. Peak memory is that of a process which takes three steps of one kind.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtlopt
from benchmarks import timing

sys.path.append(str(Path(__file__).parents[1] / "examples" / "refuge"))
from refuge.losses import task_losses
from refuge.network import TASKS, MultiTaskUNet
from refuge.photographs.data import Batch

FLOORS = {
    "joint": "joint, by hand",
    "independent": "independent, by hand",
    "pcgrad": "pcgrad, bare passes",
    "pcgrad, pytorch_optimizer": "pcgrad, bare passes",
    "pcgrad, TorchJD": "pcgrad, bare passes",
    "pcgrad, TorchJD one by one": "pcgrad, bare passes",
    "gradnorm": "gradnorm, bare passes",
    "gradnorm, gradnorm-pytorch": "gradnorm, bare passes",
}


class Problem:
    """A network and a batch for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        size, count, device = options.size, options.batch_size, options.device
        self.model = MultiTaskUNet(width=options.width).to(device)
        masks = torch.rand(2, count, size, size) < 0.5
        targets = {
            "disc": masks[0],
            "cup": masks[1],
            "fovea": torch.rand(count, 2) * size,
            "glaucoma": torch.arange(count) % 2 == 0,
        }
        known = {task: torch.ones(count, dtype=torch.bool) for task in TASKS}
        self.batch = Batch(torch.rand(count, 3, size, size), targets, known).to(device)
        self.parameters = list(self.model.parameters())
        # The last convolution that all four tasks share.
        self.shared: Tensor = self.model.encoder[-1][3].weight  # type: ignore[index]

    def adam(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters, lr=1e-4)

    def losses(self, tasks: Sequence[str], batch: Batch) -> dict[str, Any]:
        return task_losses(self.model(batch.images, tasks), batch)

    def values(self, *tasks: str) -> list[Tensor]:
        return [loss for loss, _ in self.losses(tasks, self.batch).values()]


def make_step(name: str, problem: Problem) -> Callable[[], object]:
    method, _, by = name.partition(", ")
    if by:
        return BY_HAND[name](problem)
    base: Any = problem.adam()
    optimizer: mtlopt.MultiTaskOptimizer
    if method == "joint":
        optimizer = mtlopt.JointOptimizer(base, TASKS)
    elif method == "independent":
        adam = torch.optim.Adam
        optimizer = mtlopt.IndependentOptimizer(adam, problem.parameters, TASKS, lr=1e-4)
    elif method == "pcgrad":
        optimizer = mtlopt.PCGrad(base, TASKS)
    else:
        optimizer = mtlopt.GradNorm(base, TASKS, shared=[problem.shared])
    return lambda: optimizer.step(problem.losses, problem.batch)


def joint_by_hand(problem: Problem) -> Callable[[], object]:
    base = problem.adam()

    def step() -> None:
        base.zero_grad()
        torch.stack(problem.values(*TASKS)).sum().backward()
        base.step()

    return step


def independent_by_hand(problem: Problem) -> Callable[[], object]:
    optimizers = {task: problem.adam() for task in TASKS}

    def step() -> None:
        for task, optimizer in optimizers.items():
            optimizer.zero_grad()
            problem.values(task)[0].backward()
            optimizer.step()

    return step


def pcgrad_bare_passes(problem: Problem) -> Callable[[], object]:
    base = problem.adam()

    def step() -> None:
        gradients = []
        for position, loss in enumerate(losses := problem.values(*TASKS)):
            base.zero_grad()
            loss.backward(retain_graph=position + 1 < len(losses))
            gradients.append([parameter.grad for parameter in problem.parameters])
        for parameter, *own in zip(problem.parameters, *gradients, strict=True):
            parameter.grad = next(part for part in own if part is not None)
        base.step()

    return step


def pcgrad_pytorch_optimizer(problem: Problem) -> Callable[[], object]:
    from pytorch_optimizer import PCGrad

    surgery = PCGrad(problem.adam(), reduction="sum")

    def step() -> None:
        surgery.zero_grad()
        surgery.pc_backward(problem.values(*TASKS))  # type: ignore[arg-type]  # takes losses
        surgery.step()

    return step


def pcgrad_torchjd(problem: Problem, chunk: int | None = None) -> Callable[[], object]:
    from torchjd import aggregation, autojac

    base, aggregator = problem.adam(), aggregation.PCGrad()

    def step() -> None:
        base.zero_grad()
        autojac.backward(problem.values(*TASKS), parallel_chunk_size=chunk)
        autojac.jac_to_grad(problem.parameters, aggregator, optimize_gramian_computation=True)
        base.step()

    return step


def gradnorm_bare_passes(problem: Problem) -> Callable[[], object]:
    base = problem.adam()

    def step() -> None:
        base.zero_grad()
        losses = problem.values(*TASKS)
        for loss in losses:
            torch.autograd.grad(loss, problem.shared, retain_graph=True)
        torch.stack(losses).sum().backward()
        base.step()

    return step


def gradnorm_pytorch(problem: Problem) -> Callable[[], object]:
    from gradnorm_pytorch import GradNormLossWeighter

    base = problem.adam()
    weighter = GradNormLossWeighter(
        num_losses=len(TASKS),
        learning_rate=0.025,
        restoring_force_alpha=1.5,
        grad_norm_parameters=problem.shared,
    )

    def step() -> None:
        base.zero_grad()
        weighter.backward(problem.values(*TASKS))
        base.step()

    return step


BY_HAND: dict[str, Callable[[Problem], Callable[[], object]]] = {
    "joint, by hand": joint_by_hand,
    "independent, by hand": independent_by_hand,
    "pcgrad, bare passes": pcgrad_bare_passes,
    "pcgrad, pytorch_optimizer": pcgrad_pytorch_optimizer,
    "pcgrad, TorchJD": pcgrad_torchjd,
    "pcgrad, TorchJD one by one": partial(pcgrad_torchjd, chunk=1),
    "gradnorm, bare passes": gradnorm_bare_passes,
    "gradnorm, gradnorm-pytorch": gradnorm_pytorch,
}


def names() -> list[str]:
    """Lists what can be measured here."""
    packages = {"TorchJD": "torchjd", "gradnorm-pytorch": "gradnorm_pytorch"}
    packages["pytorch_optimizer"] = "pytorch_optimizer"
    missing = [peer for peer, module in packages.items() if not importlib.util.find_spec(module)]
    every = dict.fromkeys(name for pair in FLOORS.items() for name in reversed(pair))
    return [name for name in every if not any(peer in name for peer in missing)]


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, float]:
    step = make_step(name, Problem(options))
    for _ in range(3):
        step()
    found = {"bytes": float(timing.peak_memory(options.device))}
    if options.device.startswith("cuda"):
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        found["copies"] = sum("DtoH" in event.name for event in profile.events() or [])
    return found


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--memory", nargs="*", choices=names(), default=names(), help="a process each; default: all"
    )
    options = parser.parse_args()
    if options.child in FLOORS or options.child in FLOORS.values():
        print(json.dumps(measure_memory(options.child, options)))
        return
    if options.child:
        steps = {name: make_step(name, Problem(options)) for name in names()}
        cases: dict[str, timing.Case] = {
            name: lambda step=step: step  # type: ignore[misc]  # inferred from the annotation
            for name, step in steps.items()
        }
        print(json.dumps(timing.seconds(cases, options.repetitions, options.device)))
        return

    shape = ["--width", str(options.width), "--size", str(options.size)]
    shape += ["--batch-size", str(options.batch_size)]
    results = timing.in_processes(options, ["times"] * options.processes, shape)
    found = timing.medians(results)
    sizes = timing.in_processes(options, options.memory, shape)
    memory = dict(zip(options.memory, sizes, strict=True))
    rows = []
    for name, time in found.items():
        floor = FLOORS.get(name)
        row = [name, f"{1e3 * time:.0f}", timing.ratio(results, name, floor) if floor else ""]
        row.append(f"{time / found['joint, by hand']:.2f}")
        own = memory.get(name, {})
        row.append(f"{own['bytes'] / 1e6:.0f}" if own else "")
        if options.device.startswith("cuda"):
            row.append(f"{own['copies']:.0f}" if own else "")
        rows.append(row)
    text = (
        f"Width {options.width}, {options.size} x {options.size} pixels, batch of "
        f"{options.batch_size}. Medians of {options.processes} processes' medians over "
        f"{options.repetitions} interleaved steps; ratios of one process's medians with their "
        "range over the processes; peak memory of a process with everything in it.\n\n"
    )
    columns = ["step", "ms", "x its bare passes", "x joint by hand", "peak memory, MB"]
    if options.device.startswith("cuda"):
        columns.append("copies to the host")
    text += timing.write_table(columns, rows)
    values = sum(p.numel() for p in MultiTaskUNet(width=options.width).parameters())
    text += f"\nOne gradient is {values * 4 / 1e6:.0f} MB.\n"
    timing.write_results(options, "steps", text)


if __name__ == "__main__":
    main()
