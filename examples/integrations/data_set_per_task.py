"""A data set per task with Lightning, Trainer or Accelerate, on made-up data, in seconds.

python examples/integrations/data_set_per_task.py lightning
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset, default_collate

import mtlopt

TASKS = ("kind", "size")
Batches = Mapping[str, Any]


def make_data() -> dict[str, TensorDataset]:
    return {
        "kind": TensorDataset(torch.randn(200, 8), torch.randint(3, (200,))),
        "size": TensorDataset(torch.randn(50, 5), torch.randn(50, 1)),
    }


def make_loaders() -> dict[str, DataLoader[Any]]:
    return {task: DataLoader(own, 10, shuffle=True) for task, own in make_data().items()}


class Network(nn.Module):
    """An adapter for each data set, a trunk, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"kind": nn.Linear(8, 16), "size": nn.Linear(5, 16)})
        self.trunk = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.heads = nn.ModuleDict({"kind": nn.Linear(16, 3), "size": nn.Linear(16, 1)})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {t: self.heads[t](self.trunk(self.adapters[t](x))) for t, x in inputs.items()}


def task_losses(model: nn.Module, tasks: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    here = [task for task in tasks if batches.get(task) is not None]
    outputs = model({task: batches[task][0] for task in here})
    criteria: dict[str, Any] = {"kind": cross_entropy, "size": mse_loss}
    return {task: criteria[task](outputs[task], batches[task][1]) for task in here}


def independent(parameters: Iterable[nn.Parameter]) -> mtlopt.IndependentOptimizer:
    return mtlopt.IndependentOptimizer(torch.optim.Adam, parameters, TASKS, lr=1e-3)


def with_lightning() -> int:
    import lightning
    from lightning.pytorch.utilities import CombinedLoader

    from mtlopt.lightning import MultiTaskModule

    class Module(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Network()

        def configure_optimizers(self) -> Any:
            return independent(self.parameters())

        def losses(self, tasks: Sequence[str], batch: Batches) -> dict[str, Tensor]:
            return task_losses(self.network, tasks, batch)

    trainer = lightning.Trainer(max_epochs=2, log_every_n_steps=10, enable_checkpointing=False)
    trainer.fit(Module(), CombinedLoader(make_loaders(), "max_size_cycle"))
    return trainer.global_step


def with_trainer() -> int:
    from transformers import TrainingArguments

    from mtlopt.transformers import MultiTaskTrainer

    class Trainer(MultiTaskTrainer):
        def make_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
            return mtlopt.IndependentOptimizer(optimizer, TASKS)

        def losses(self, model: nn.Module, tasks: Any, inputs: Any) -> dict[str, Tensor]:
            return task_losses(model, tasks, inputs)

    data = make_data()
    longest = max(len(own) for own in data.values())
    cycled = {t: Subset(own, [i % len(own) for i in range(longest)]) for t, own in data.items()}
    settings = TrainingArguments(
        output_dir=mkdtemp(),
        num_train_epochs=2,
        per_device_train_batch_size=10,
        remove_unused_columns=False,  # Trainer would drop the tasks, which `forward` does not name.
        use_cpu=True,
        save_strategy="no",
        report_to="none",
    )
    stack: Any = StackDataset(**cycled)
    trainer = Trainer(Network(), settings, data_collator=default_collate, train_dataset=stack)
    return trainer.train().global_step


def with_accelerate() -> int:
    from accelerate import Accelerator

    network = Network()
    optimizer = independent(network.parameters())
    made = make_loaders().values()
    model, _, longer, shorter = Accelerator(cpu=True).prepare(network, optimizer, *made)
    steps = 0
    for _ in range(2):
        for kind, size in zip(longer, cycle(shorter), strict=False):
            optimizer.step(
                lambda tasks, batches: task_losses(model, tasks, batches),
                {"kind": kind, "size": size},
            )
            steps += 1
    return steps


PROGRAMS = {"lightning": with_lightning, "trainer": with_trainer, "accelerate": with_accelerate}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{PROGRAMS[sys.argv[1]]()} steps")
