"""Hugging Face Trainer: three tasks in a MultiTaskTrainer, in seconds.

python examples/integrations/with_trainer.py --method pcgrad
python examples/integrations/with_trainer.py --folder runs/trainer --accumulate 2
python examples/integrations/with_trainer.py --resume runs/trainer/checkpoint-160
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import mtlopt
from goods import METHODS, Batch, Network, Report, evaluate, make_data, wrap
from mtlopt.transformers import MultiTaskTrainer


class GoodsTrainer(MultiTaskTrainer):
    method = "independent"

    def make_optimizer(self, optimizer: torch.optim.Optimizer) -> mtlopt.MultiTaskOptimizer:
        network: Any = self.model
        return wrap(self.method, network, optimizer)

    def losses(self, model: nn.Module, tasks: Sequence[str], inputs: Batch) -> dict[str, Tensor]:
        return evaluate(model, tasks, inputs)


def main(arguments: Sequence[str] | None = None) -> MultiTaskTrainer:
    parser = argparse.ArgumentParser(description="Train three tasks with Trainer.")
    parser.add_argument("--method", choices=METHODS, default="independent")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--folder", type=Path, help="where to save a checkpoint halfway")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    torch.manual_seed(0)

    data = make_data(512)
    network = Network()
    report = Report(network, data)
    settings = TrainingArguments(
        output_dir=str(options.folder or mkdtemp()),
        max_steps=options.steps,
        learning_rate=0.01,
        per_device_train_batch_size=64 // options.accumulate,
        gradient_accumulation_steps=options.accumulate,
        bf16=options.precision == "bf16",
        lr_scheduler_type="cosine",
        save_strategy="steps" if options.folder else "no",
        save_steps=max(1, options.steps // 2),
        remove_unused_columns=False,  # Trainer would drop the targets, which `forward` lacks.
        logging_steps=80,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = GoodsTrainer(network, settings, train_dataset=data)
    trainer.method = options.method
    trainer.train(resume_from_checkpoint=str(options.resume) if options.resume else None)
    report.show(f"{options.method}, {trainer.state.global_step} steps")
    return trainer


if __name__ == "__main__":
    main()
