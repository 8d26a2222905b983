"""Accelerate: three tasks in your own training loop, prepared for any device, in seconds.

python examples/integrations/with_accelerate.py --method pcgrad
python examples/integrations/with_accelerate.py --precision bf16 --accumulate 2
python examples/integrations/with_accelerate.py --folder runs/accelerate
python examples/integrations/with_accelerate.py --resume runs/accelerate/20
accelerate launch --cpu --num_processes 2 examples/integrations/with_accelerate.py
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from goods import METHODS, Batch, Network, Report, evaluate, make_data, wrap


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

    data = make_data(512)
    network = Network()
    report = Report(network, data)

    # No `gradient_accumulation_steps`: the optimizer averages micro-batches, task by task.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, mixed_precision=options.precision, kwargs_handlers=[unused])
    # A step per task: DDP reduces each gradient. The other methods do so themselves.
    own = options.method != "independent" and accelerator.num_processes > 1
    group = {"process_group": dist.group.WORLD} if own else {}
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    # `accelerator.scaler` is None but for fp16, which wants a GPU; `save_state` saves it.
    optimizer = wrap(options.method, network, adam, scaler=accelerator.scaler, **group)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    loader: Any = DataLoader(data, batch_size=64 // options.accumulate, shuffle=True)
    prepared, _, loader = accelerator.prepare(network, optimizer, loader)
    # Not prepared: Accelerate would step it once for each process.
    accelerator.register_for_checkpointing(schedule)
    model = accelerator.unwrap_model(prepared) if own else prepared

    first = 0
    if options.resume:
        accelerator.load_state(str(options.resume))
        first = int(options.resume.name)
    for epoch in range(first, options.epochs):
        micro_batches: list[Batch] = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == options.accumulate:
                # Not Accelerate's wrapper of it, whose `step` takes no losses.
                optimizer.step(partial(evaluate, model), micro_batches=micro_batches)
                schedule.step()
                micro_batches = []
        if options.folder and (epoch + 1) % 10 == 0:
            accelerator.save_state(str(options.folder / str(epoch + 1)))
    if accelerator.is_main_process:
        report.show(f"{options.method}, {options.epochs} epochs")
    return network


if __name__ == "__main__":
    main()
