"""UCI Adult (Becker and Kohavi, 1996) as two tasks: income above 50,000, and never married.

The pair of MMoE (Ma et al., 2018) on the smaller of the two census sets. `relationship` and
`marital-status` give the second task away and are no inputs. A shared bottom with embeddings; AUC.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

FOLDER = Path(os.environ.get("MTLOPT_DATA", "data")) / "adult"
NUMBERS, WORDS, MARRIAGE, INCOME = (0, 2, 4, 10, 11, 12), (1, 3, 6, 8, 9, 13), 5, 14
Split = tuple[Tensor, Tensor, Tensor]
"""Numbers (n, 6), indices of words (n, 6), labels (n, 2)."""


@lru_cache
def load() -> tuple[dict[str, Split], list[int]]:
    """Reads the files; validation is every fifth row of `adult.data`."""
    rows = {}
    for name in ("adult.data", "adult.test"):
        if not (FOLDER / name).exists():
            source = "https://archive.ics.uci.edu/dataset/2/adult"
            raise SystemExit(f"{FOLDER / name} is missing: unpack the files of {source} there.")
        with open(FOLDER / name, encoding="utf-8") as file:
            lines = csv.reader(file, skipinitialspace=True)
            rows[name] = [row for row in lines if row and row[0].isdigit()]  # no headers
    train = rows["adult.data"]
    index = [{word: i for i, word in enumerate(sorted({r[c] for r in train}))} for c in WORDS]
    # Capital gains and losses are few and large.
    numbers = np.log1p([[float(row[c]) for c in NUMBERS] for row in train])
    mean, spread = numbers.mean(0), numbers.std(0)

    def split(rows: list[list[str]]) -> Split:
        values = np.log1p([[float(row[c]) for c in NUMBERS] for row in rows])
        words = [[at.get(row[c], 0) for at, c in zip(index, WORDS, strict=True)] for row in rows]
        labels = [[row[INCOME][0] == ">", row[MARRIAGE] == "Never-married"] for row in rows]
        scaled = torch.tensor((values - mean) / spread, dtype=torch.float32)
        return scaled, torch.tensor(words), torch.tensor(labels, dtype=torch.float32)

    splits = {
        "train": split([row for i, row in enumerate(train) if i % 5]),
        "validation": split(train[::5]),
        "test": split(rows["adult.test"]),
    }
    return splits, [len(at) for at in index]


class Bottom(nn.Module):
    """Embeds the words, and passes all through a hidden layer."""

    def __init__(self, sizes: Sequence[int], width: int = 64) -> None:
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(size, 4) for size in sizes)
        self.hidden = nn.Linear(len(NUMBERS) + 4 * len(sizes), width)
        self.last = nn.Linear(width, width)

    def forward(self, numbers: Tensor, words: Tensor) -> Tensor:
        embedded = [each(words[:, i]) for i, each in enumerate(self.words)]
        hidden: Tensor = self.hidden(torch.cat([numbers, *embedded], 1)).relu()
        output: Tensor = self.last(hidden).relu()
        return output


class Network(nn.Module):
    """A shared bottom, and a tower per task."""

    def __init__(self, sizes: Sequence[int], tasks: Sequence[str]) -> None:
        super().__init__()
        self.shared = Bottom(sizes)
        self.towers = nn.ModuleDict({task: nn.Linear(64, 1) for task in tasks})
        self.last = self.shared.last

    def forward(self, tasks: Sequence[str], numbers: Tensor, words: Tensor) -> dict[str, Tensor]:
        z = self.shared(numbers, words)
        return {task: self.towers[task](z)[:, 0] for task in tasks}


class Problem:
    """One epoch of batches of 256 is 101 steps."""

    tasks = ("income", "unmarried")
    steps = 100
    doublings = 2
    network: Callable[..., Any] = Network
    labelled = (1.0, 1.0)

    def __init__(self, seed: int) -> None:
        self.splits, sizes = load()
        self.model = self.network(sizes, self.tasks)
        self.features = self.model.shared
        self.shared = list(self.model.last.parameters())
        self.draw = torch.Generator().manual_seed(seed)
        count = len(self.splits["train"][0])
        self.known = torch.rand(count, 2, generator=self.draw) < torch.tensor(self.labelled)

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        data = (*self.splits["train"], self.known)
        while True:
            for rows in torch.randperm(len(self.known), generator=self.draw).split(256)[:-1]:
                yield tuple(part[rows] for part in data)

    def losses(
        self, tasks: Sequence[str], numbers: Tensor, words: Tensor, labels: Tensor, known: Tensor
    ) -> dict[str, tuple[Tensor, int]]:
        outputs = self.model(tasks, numbers, words)
        columns = {task: self.tasks.index(task) for task in tasks}
        return {
            task: (
                cross_entropy(outputs[task][known[:, k]], labels[known[:, k], k]),
                int(known[:, k].sum()),
            )
            for task, k in columns.items()
            if known[:, k].any()
        }

    def metrics(self, split: str) -> dict[str, float]:
        numbers, words, labels = self.splits[split]
        outputs = self.model(self.tasks, numbers, words)
        return {
            task: float(roc_auc_score(labels[:, k], outputs[task]))
            for k, task in enumerate(self.tasks)
        }
