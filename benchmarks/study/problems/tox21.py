"""Tox21: twelve toxicity assays of 7,831 molecules, a sixth of the labels missing; AUC.

The small baseline of MoleculeNet (Wu et al., 2018): Morgan fingerprints of radius 2 in 1,024
bits, one hidden layer, a random split (80, 10 and 10 %). A batch's loss is the mean over the labels
that are known.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from benchmarks.study.problems.heads import LinearHeads

FILE = Path(os.environ.get("MTLOPT_DATA", "data")) / "tox21.csv"
BITS = 1024
TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
Split = tuple[Tensor, Tensor, Tensor]
"""Fingerprints (n, bits), labels (n, 12), and which are known."""


@lru_cache
def load() -> dict[str, Split]:
    """Reads the file, and makes the fingerprints."""
    if not FILE.exists():
        raise SystemExit(
            f"{FILE} is missing: put MoleculeNet's tox21.csv (smiles and 12 columns) there."
        )
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
    except ImportError:
        raise SystemExit("Tox21 needs fingerprints: pip install rdkit.") from None
    rdBase.DisableLog("rdApp.*")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=BITS)
    prints, labels = [], []
    with open(FILE, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            molecule = Chem.MolFromSmiles(row["smiles"])
            if molecule is not None:
                prints.append(generator.GetFingerprintAsNumPy(molecule))
                labels.append([float(row[task] or "nan") for task in TASKS])
    x, y = torch.tensor(np.array(prints)).float(), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    tenth = len(y) // 10
    parts = order.split([len(y) - 2 * tenth, tenth, tenth])
    return {
        name: (x[rows], y[rows].nan_to_num(), ~y[rows].isnan())
        for name, rows in zip(("train", "validation", "test"), parts, strict=True)
    }


class Problem:
    """An epoch of batches of 128 is 48 steps."""

    tasks = TASKS
    single = False  # Twelve networks, each with its own search, would take as long as all the rest.
    steps = 50
    doublings = 2

    def __init__(self, seed: int) -> None:
        self.splits = load()
        self.draw = torch.Generator().manual_seed(seed)
        self.features = nn.Sequential(nn.Linear(BITS, 64), nn.ReLU(), nn.Dropout(0.5))
        self.heads = LinearHeads(64, TASKS)
        self.model = nn.ModuleList([self.features, self.heads])
        self.shared = list(self.features.parameters())
        # Molecules that have none of the labels are in no batch.
        self.rows = self.splits["train"][2].any(1).nonzero()[:, 0]

    def batches(self) -> Iterator[Split]:
        x, y, known = self.splits["train"]
        while True:
            for rows in self.rows[torch.randperm(len(self.rows), generator=self.draw)].split(128)[
                :-1
            ]:
                yield x[rows], y[rows], known[rows]

    def losses(
        self, tasks: Sequence[str], x: Tensor, y: Tensor, known: Tensor
    ) -> dict[str, tuple[Tensor, int]]:
        if len(tasks) < len(TASKS):
            columns = [TASKS.index(task) for task in tasks]
            y, known = y[:, columns], known[:, columns]
        errors = cross_entropy(self.heads(self.features(x), tasks), y, known, reduction="none")
        counts = known.sum(0)
        means = errors.sum(0) / counts.clamp(min=1)
        return {
            task: (mean, count)
            for task, mean, count in zip(tasks, means, counts.tolist(), strict=True)
            if count
        }

    def metrics(self, split: str) -> dict[str, float]:
        x, y, known = self.splits[split]
        outputs = self.heads(self.features(x), TASKS)
        return {
            task: float(roc_auc_score(y[known[:, k], k], outputs[known[:, k], k]))
            for k, task in enumerate(TASKS)
        }
