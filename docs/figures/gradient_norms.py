"""Prints how the tasks of the glaucoma study differ in loss and gradient, at the first weights.

python docs/figures/gradient_norms.py
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "refuge"))
import mtlopt
from data import load_splits
from methods import build_network
from network import TASKS
from settings import Settings
from train import make_losses

settings = Settings(width=8, size=64)
photographs = load_splits("phantom", settings.size, settings.seed, wanted=["train"])["train"]
network = build_network(settings).train()
losses = make_losses(settings, network)
draw = torch.Generator().manual_seed(0)
values, norms = [], []
for _ in range(10):
    batch = photographs[torch.randperm(len(photographs), generator=draw)[: settings.batch_size]]
    found = losses(TASKS, batch)
    values.append(torch.stack([found[task][0].detach() for task in TASKS]))
    norms.append(mtlopt.conflicts(found, network.encoder.parameters(), TASKS).norms)
for task, value, norm in zip(TASKS, sum(values) / 10, sum(norms) / 10, strict=True):
    print(f"{task:9} loss {value:.3f}  gradient norm over the encoder {norm:.3f}")
points = load_splits("phantom", settings.size, 0, wanted=["test"])["test"].input_points()
away = (points - (settings.size - 1) / 2).norm(dim=1).mean() * 256 / settings.size
print(f"The picture's centre is {away:.0f} px of 256 from the fovea.")
