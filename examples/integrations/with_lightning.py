"""Lightning: three tasks in one LightningModule with manual optimization, in seconds.

python examples/integrations/with_lightning.py --method pcgrad
python examples/integrations/with_lightning.py --precision bf16-mixed --folder runs/lightning
python examples/integrations/with_lightning.py --resume "runs/lightning/epoch=9-step=80.ckpt"
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
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


class Module(lightning.LightningModule):
    """The optimizer owns the backward passes, so Lightning must not."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.method = method
        self.network = Network()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Lightning makes a scaler for "16-mixed" and saves its state; the optimizer uses it.
        optimizer = make_optimizer(self.method, self.network, self.trainer.scaler)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)]

    def losses(self, tasks: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        return evaluate(self.network, tasks, batch)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        values = optimizer.step(self.losses, batch)
        # Lightning's wrapper of the optimizer counts steps, but has no place for losses in its
        # own `step`. Without this count ModelCheckpoint and `max_steps` do nothing.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.log_dict(values)


def main(arguments: Sequence[str] | None = None) -> lightning.Trainer:
    parser = argparse.ArgumentParser(description="Train three tasks with Lightning.")
    parser.add_argument("--method", choices=METHODS, default="independent")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, 16-mixed, ...")
    parser.add_argument("--folder", type=Path, help="where to save a checkpoint every 10 epochs")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    torch.manual_seed(0)

    data: Any = make_data(512)
    module = Module(options.method)
    everything = default_collate(data)
    before = evaluate(module.network, TASKS, everything)
    save = ModelCheckpoint(options.folder, every_n_epochs=10, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        precision=options.precision,
        callbacks=[save] if options.folder else [],
        enable_checkpointing=options.folder is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=64), ckpt_path=options.resume)
    after = evaluate(module.network, TASKS, everything)

    print(f"{options.method}, {trainer.global_step} steps\ntask    before    after")
    for task in TASKS:
        print(f"{task:6} {before[task].item():7.3f}  {after[task].item():7.3f}")
    return trainer


if __name__ == "__main__":
    main()
