"""Writes gradient_norms.md: how the glaucoma study's tasks differ at the first weights."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "refuge"))
import mtlopt
from refuge.methods import build_network
from refuge.network import TASKS
from refuge.photographs.data import PHANTOM, Photographs
from refuge.photographs.phantoms import phantom_records
from refuge.settings import Settings
from train import make_losses

settings = Settings(width=8, size=64)
records = phantom_records(PHANTOM)
photographs = Photographs(records["train"][: 10 * settings.batch_size], settings.size)
network = build_network(settings).train()
losses = make_losses(settings, network)
values, norms = [], []
for batch in torch.arange(len(photographs)).split(settings.batch_size):
    found = losses(TASKS, photographs[batch])
    values.append(torch.stack([found[task][0].detach() for task in TASKS]))
    norms.append(mtlopt.conflicts(found, network.encoder.parameters(), TASKS).norms)
rows = {"": TASKS, "---": ["---"] * len(TASKS)}
for name, of_batches in (("loss", values), ("gradient norm over the encoder", norms)):
    rows[name] = [f"{value:.2g}" for value in (sum(of_batches) / 10).tolist()]
foveas = torch.tensor([record.fovea for record in records["test"]])
away = (foveas - (PHANTOM - 1) / 2).norm(dim=1).mean() * 256 / PHANTOM
Path(__file__).with_suffix(".md").write_text(
    "".join(f"| {' | '.join([name, *cells])} |\n" for name, cells in rows.items())
    + f"\nA guess of the picture's centre is {away:.0f} px of 256 away from the fovea.\n"
)
