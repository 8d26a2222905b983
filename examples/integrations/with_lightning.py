"""Lightning: three tasks in a MultiTaskModule, in seconds.

python examples/integrations/with_lightning.py --method pcgrad
python examples/integrations/with_lightning.py --accumulate 2 --folder runs/lightning
python examples/integrations/with_lightning.py --resume "runs/lightning/epoch=9-step=80.ckpt"
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from goods import METHODS, Batch, Network, Report, evaluate, make_data, wrap
from mtlopt.lightning import MultiTaskModule


class Module(MultiTaskModule):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.network = Network()

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.network.parameters(), lr=0.01)
        optimizer = wrap(self.method, self.network, adam)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]

    def losses(self, tasks: Sequence[str], batch: Batch) -> dict[str, Tensor]:
        return evaluate(self.network, tasks, batch)


def main(arguments: Sequence[str] | None = None) -> lightning.Trainer:
    parser = argparse.ArgumentParser(description="Train three tasks with Lightning.")
    parser.add_argument("--method", choices=METHODS, default="independent")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed, 16-mixed, ...")
    parser.add_argument("--folder", type=Path, help="where to save a checkpoint every 10 epochs")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # The network is too small for more.
    torch.manual_seed(0)

    data = make_data(512)
    module = Module(options.method)
    report = Report(module.network, data)
    save = ModelCheckpoint(options.folder, every_n_epochs=10, save_top_k=-1)
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        precision=options.precision,
        accumulate_grad_batches=options.accumulate,
        callbacks=[save] if options.folder else [],
        enable_checkpointing=options.folder is not None,
        **quiet,
    )
    loader = DataLoader(data, batch_size=64 // options.accumulate)
    trainer.fit(module, loader, ckpt_path=options.resume)
    report.show(f"{options.method}, {trainer.global_step} steps")
    return trainer


if __name__ == "__main__":
    main()
