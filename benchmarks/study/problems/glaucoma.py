"""The glaucoma network of `examples/refuge` on phantoms: optic disc, cup, fovea, diagnosis.

The U-Net of Pascal et al. (2022) at a sixteenth of its width on pictures of 48 pixels. Dice of disc
and cup, 1 - error / side of the fovea, AUC of the network's own diagnosis.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[3] / "examples" / "refuge"))
from refuge.losses import task_losses
from refuge.measurement.evaluation import summarise
from refuge.metrics import auc, dice
from refuge.network import TASKS, MultiTaskUNet
from refuge.photographs.data import Batch, Photographs, load_splits

SIZE = 48


@lru_cache
def load() -> dict[str, Photographs]:
    """Draws the phantoms."""
    splits = load_splits("phantom", SIZE, 0)
    return {"train": splits["train"], "validation": splits["val"], "test": splits["test"]}


class Problem:
    """An epoch of batches of 8 is 60 steps."""

    tasks = TASKS
    steps = 60
    doublings = 2
    evaluations = 6

    def __init__(self, seed: int) -> None:
        self.splits = load()
        self.model = MultiTaskUNet(width=4, norm="running")
        # Where the heads begin: glaucoma's after the encoder, the others' after the decoder.
        self.features = [self.model.encoder[-1], self.model.decoder[-1]]
        self.shared = list(self.model.encoder_convolutions()[-1].parameters())
        self.draw = torch.Generator().manual_seed(seed)

    def batches(self) -> Iterator[tuple[Batch]]:
        pictures = self.splits["train"]
        while True:
            for rows in torch.randperm(len(pictures), generator=self.draw).split(8):
                yield (pictures[rows],)

    def losses(self, tasks: Sequence[str], batch: Batch) -> dict[str, tuple[Tensor, int]]:
        return task_losses(self.model(batch.images, tasks), batch)

    def metrics(self, split: str) -> dict[str, float]:
        pictures = self.splits[split]
        answers = []
        for rows in torch.arange(len(pictures)).split(40):
            logits = self.model(pictures[rows].images)
            maps = {task: each.double().sigmoid().numpy() for task, each in logits.items()}
            answers += [{task: maps[task][i] for task in maps} for i in range(len(rows))]
        found, truth = summarise(answers), pictures[range(len(pictures))]
        overlap = {
            task: sum(map(dice, found.masks[task], truth.targets[task].numpy())) / len(pictures)
            for task in ("disc", "cup")
        }
        assert found.points is not None
        assert found.probabilities is not None
        away = torch.from_numpy(found.points) - truth.targets["fovea"]
        ranked = auc(truth.targets["glaucoma"].numpy(), found.probabilities)
        assert ranked is not None
        return overlap | {"fovea": 1 - away.norm(dim=1).mean().item() / SIZE, "glaucoma": ranked}
