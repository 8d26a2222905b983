"""Accelerate: three tasks in a loop of one's own, prepared for any device, in seconds.

python examples/integrations/with_accelerate.py --method pcgrad
python examples/integrations/with_accelerate.py --precision bf16 --accumulate 2
python examples/integrations/with_accelerate.py --folder runs/accelerate
python examples/integrations/with_accelerate.py --resume runs/accelerate/20
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, default_collate

import mtlopt

METHODS = ("independent", "joint", "pcgrad", "gradnorm")
TASKS = ("price", "days", "sold")
Batch = Mapping[str, Tensor]


class Network(nn.Module):
    """A trunk too narrow for the tasks not to disturb one another, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(2, 1) for task in TASKS})

    def forward(self, inputs: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        features = self.trunk(inputs)
        return {task: self.heads[task](features).squeeze(1) for task in tasks}


def make_data(count: int) -> list[dict[str, Tensor]]:
    """Draws things to sell, and three targets that differ in kind and in scale."""
    inputs = torch.randn(count, 8)
    cost, rarity, demand = (inputs @ torch.randn(8, 3) / 8**0.5).T
    sold = (demand > cost).float()
    columns = (inputs, 4 * cost, torch.tanh(rarity - cost), sold)
    return [dict(zip(("inputs", *TASKS), row, strict=True)) for row in zip(*columns, strict=True)]


def evaluate(model: nn.Module, tasks: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    outputs = model(batch["inputs"], tasks)
    criteria: dict[str, Any] = dict.fromkeys(TASKS, mse_loss)
    criteria["sold"] = binary_cross_entropy_with_logits
    return {task: criteria[task](outputs[task], batch[task]) for task in tasks}


def make_optimizer(
    method: str, model: Network, scaler: torch.amp.GradScaler | None = None
) -> mtlopt.MultiTaskOptimizer:
    """The one line that differs."""
    parameters, last = list(model.parameters()), model.trunk[-2].parameters()
    adam = torch.optim.Adam(parameters, lr=0.01)
    if method == "independent":
        return mtlopt.IndependentOptimizer(
            torch.optim.Adam, parameters, TASKS, lr=0.01, scaler=scaler
        )
    if method == "joint":
        return mtlopt.JointOptimizer(adam, TASKS, scaler=scaler)
    if method == "pcgrad":
        return mtlopt.PCGrad(adam, TASKS, scaler=scaler)
    return mtlopt.GradNorm(adam, TASKS, shared=last, scaler=scaler)


def main(arguments: Sequence[str] | None = None) -> Network:
    parser = argparse.ArgumentParser(description="Train three tasks with Accelerate.")
    parser.add_argument("--method", choices=METHODS, default="independent")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--folder", type=Path, help="where to save a checkpoint every 10 epochs")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    torch.manual_seed(0)

    # No `gradient_accumulation_steps`: the optimizer averages micro-batches, task by task.
    accelerator = Accelerator(cpu=True, mixed_precision=options.precision)
    data: Any = make_data(512)
    network = Network()
    everything = default_collate(data)
    before = evaluate(network, TASKS, everything)
    # `accelerator.scaler` is None but for fp16, which wants a GPU; `save_state` saves it.
    optimizer = make_optimizer(options.method, network, accelerator.scaler)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    loader: Any = DataLoader(data, batch_size=64 // options.accumulate, shuffle=True)
    model, _, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)

    first = 0
    if options.resume:
        accelerator.load_state(str(options.resume))
        first = int(options.resume.name)
    for epoch in range(first, options.epochs):
        micro_batches: list[Batch] = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == options.accumulate:
                # Accelerate's wrapper takes no losses in `step`: behind it is the optimizer itself.
                optimizer.step(partial(evaluate, model), micro_batches=micro_batches)
                schedule.step()
                micro_batches = []
        if options.folder and (epoch + 1) % 10 == 0:
            accelerator.save_state(str(options.folder / str(epoch + 1)))
    after = evaluate(network, TASKS, everything)

    accelerator.print(f"{options.method}, {options.epochs} epochs\ntask    before    after")
    for task in TASKS:
        accelerator.print(f"{task:6} {before[task].item():7.3f}  {after[task].item():7.3f}")
    return network


if __name__ == "__main__":
    main()
