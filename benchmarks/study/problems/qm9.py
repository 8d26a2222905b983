"""QM9: eleven properties of small molecules in their natural units; mean absolute errors.

Molecules and properties are those of Ramakrishnan et al. (2014), from the package qm9pack. Inputs
are the sorted eigenvalues of the Coulomb matrix (Rupp et al., 2012), and the network is an MLP, so
errors are not comparable with those of graph networks. Every thirteenth molecule, 10,064 of
130,831, split at random.
"""

import csv
import importlib.util
from ast import literal_eval
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.study.problems.heads import LinearHeads

COLUMNS = {
    "dipole": "Dipole_debye",
    "polarizability": "Polarizability_bohr3",
    "HOMO": "HOMO_au",
    "LUMO": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "extent": "R2_bohr2",
    "zero-point": "ZPVE_au",
    "U0": "InternalEnergy_0K_au",
    "H": "Enthalphy_298K_au",
    "G": "GibbsFreeEnergy_298K_au",
    "heat capacity": "Heatcapacity_Cv_cal_mol_K",
}
CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
ATOMS = 29
EVERY = 13
COUNTS = {"train": 8064, "validation": 1000, "test": 1000}


def spectrum(elements: Sequence[str], positions: Sequence[Sequence[float]]) -> Tensor:
    """Returns the eigenvalues (29,) of the Coulomb matrix, sorted by size, in atomic units."""
    z = torch.tensor([float(CHARGES[e]) for e in elements])
    x = torch.tensor(positions)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    matrix = z[:, None] * z / (distances / 0.529177).fill_diagonal_(1)
    matrix.diagonal().copy_(0.5 * z**2.4)
    values = torch.linalg.eigvalsh(matrix)
    found = torch.zeros(ATOMS)
    found[: len(z)] = values[values.abs().argsort(descending=True)]
    return found


def molecules(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of the package's files, which are ordered by the size of the molecules."""
    csv.field_size_limit(2**31 - 1)
    for part in (1, 2, 3):
        with open(folder / f"qm9_part{part}.csv", encoding="utf-8") as file:
            yield from csv.DictReader(file)


@lru_cache
def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Reads the subset: spectra (n, 29) and properties (n, 11)."""
    package = importlib.util.find_spec("qm9pack")
    if package is None or package.origin is None:
        raise SystemExit("QM9 needs its data: pip install qm9pack.")
    inputs, targets = [], []
    for row in islice(molecules(Path(package.origin).parent / "data"), 0, None, EVERY):
        inputs.append(spectrum(literal_eval(row["Elements"]), literal_eval(row["XYZ_Ang"])))
        targets.append([float(row[column]) for column in COLUMNS.values()])
    x, y = torch.stack(inputs), torch.tensor(targets, dtype=torch.float64).float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rows = dict(zip(COUNTS, order.split(list(COUNTS.values())), strict=True))
    mean, spread = x[rows["train"]].mean(0), x[rows["train"]].std(0).clamp(min=1e-3)
    return {name: ((x[each] - mean) / spread, y[each]) for name, each in rows.items()}


class Problem:
    """The targets keep their units, but their means over the training set are subtracted."""

    tasks = tuple(COLUMNS)
    lower_is_better = tasks
    single = False  # Eleven networks, each with its own search, would take as long as all the rest.
    normalised = False
    steps = 200
    doublings = 1

    def __init__(self, seed: int) -> None:
        self.splits = load()
        self.draw = torch.Generator().manual_seed(seed)
        y = self.splits["train"][1]
        self.mean = y.mean(0)
        self.unit = y.std(0) if self.normalised else torch.ones(len(COLUMNS))
        self.features = nn.Sequential(
            *(nn.Linear(ATOMS, 128), nn.SiLU()), *(nn.Linear(128, 128), nn.SiLU())
        )
        self.heads = LinearHeads(128, self.tasks)
        self.model = nn.ModuleList([self.features, self.heads])
        self.shared = list(self.features[2].parameters())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.splits["train"]
        y = (y - self.mean) / self.unit
        while True:
            for rows in torch.randperm(len(y), generator=self.draw).split(128)[:-1]:
                yield x[rows], y[rows]

    def losses(self, tasks: Sequence[str], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if len(tasks) < len(self.tasks):
            y = y[:, [self.tasks.index(task) for task in tasks]]
        errors = (self.heads(self.features(x), tasks) - y).square().mean(0)
        return dict(zip(tasks, errors, strict=True))

    def metrics(self, split: str) -> dict[str, float]:
        x, y = self.splits[split]
        outputs = self.heads(self.features(x), self.tasks) * self.unit + self.mean
        return dict(zip(self.tasks, (outputs - y).abs().mean(0).tolist(), strict=True))
