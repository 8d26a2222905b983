"""Hugging Face Trainer: three tasks in a subclass of it, each one's loss logged, in seconds.

python examples/integrations/with_trainer.py --method pcgrad
python examples/integrations/with_trainer.py --folder runs/trainer --accumulate 2
python examples/integrations/with_trainer.py --resume runs/trainer/checkpoint-160
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

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


class IndependentOptimizer(mtlopt.IndependentOptimizer):
    """Trainer calls `step()` when `training_step` has stepped: there is nothing left to do.

    Saved states hold the name of the class, so with the same one they load in either.
    """

    def step(  # type: ignore[override]  # as in the package: losses come first
        self, losses: Any = None, *batch: Any, **options: Any
    ) -> dict[str, Tensor]:
        return {} if losses is None else super().step(losses, *batch, **options)


def make_optimizer(method: str, model: Network) -> mtlopt.MultiTaskOptimizer:
    """The one line that differs."""
    parameters, last = list(model.parameters()), model.trunk[-2].parameters()
    adam = torch.optim.Adam(parameters, lr=0.01)
    if method == "independent":
        return IndependentOptimizer(torch.optim.Adam, parameters, TASKS, lr=0.01)
    if method == "joint":
        return mtlopt.JointOptimizer(adam, TASKS)
    if method == "pcgrad":
        return mtlopt.PCGrad(adam, TASKS)
    return mtlopt.GradNorm(adam, TASKS, shared=last)


class MultiTaskTrainer(Trainer):
    """Steps on the tasks' losses, and logs each."""

    def __init__(self, method: str, model: Network, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self.method, self.network = method, model
        self.micro_batches: list[Any] = []
        self.values: dict[str, Tensor] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(self.method, self.network)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
        model.train()
        self.micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        wrapper: Any = self.optimizer  # Accelerate's, which takes no losses in `step`
        optimizer: mtlopt.MultiTaskOptimizer = wrapper.optimizer
        losses = partial(evaluate, model)
        self.values = optimizer.step(losses, micro_batches=self.micro_batches)
        self.micro_batches = []
        optimizer.zero_grad()  # Nothing is left for the `step()` that Trainer calls next.
        return torch.stack(list(self.values.values())).sum()

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        own = {f"loss_{task}": value.item() for task, value in self.values.items()}
        super().log(logs | own, *arguments, **options)


def main(arguments: Sequence[str] | None = None) -> MultiTaskTrainer:
    parser = argparse.ArgumentParser(description="Train three tasks with Trainer.")
    parser.add_argument("--method", choices=METHODS, default="independent")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--folder", type=Path, help="where to save a checkpoint half way")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    torch.manual_seed(0)

    data: Any = make_data(512)
    network = Network()
    everything = default_collate(data)
    before = evaluate(network, TASKS, everything)
    settings = TrainingArguments(
        output_dir=str(options.folder or mkdtemp()),
        max_steps=options.steps,
        per_device_train_batch_size=64 // options.accumulate,
        gradient_accumulation_steps=options.accumulate,
        lr_scheduler_type="cosine",
        save_strategy="steps" if options.folder else "no",
        save_steps=max(1, options.steps // 2),
        max_grad_norm=0.0,  # To clip, hook each update: optimizer.register_step_pre_hook(...)
        remove_unused_columns=False,  # Trainer would drop the targets, which `forward` lacks.
        logging_steps=80,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = MultiTaskTrainer(options.method, network, settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    after = evaluate(network, TASKS, everything)

    print(f"{options.method}, {trainer.state.global_step} steps\ntask    before    after")
    for task in TASKS:
        print(f"{task:6} {before[task].item():7.3f}  {after[task].item():7.3f}")
    return trainer


if __name__ == "__main__":
    main()
