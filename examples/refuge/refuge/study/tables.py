"""Tables of a study: runs averaged over seeds, with the published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refuge.files import read_json, write_csv, write_text
from refuge.settings import Settings

NAMES = {
    "single": "STL (four networks)",
    "independent": "MTL-IO (independent)",
    "alternating": "alternating",
    "joint": "joint",
    "balanced": "balanced",
    "gradnorm": "GradNorm",
    "pcgrad": "PCGrad",
}
COLUMNS = {
    "glaucoma_auc": "glaucoma AUC (%)",
    "disc_dice": "OD Dice (%)",
    "cup_dice": "OC Dice (%)",
    "fovea_error": "fovea error (px of 256)",
}
# Pascal et al. (2022), test split of REFUGE, mean and standard deviation of three seeds: millions
# of parameters, seconds of an iteration on a Titan Xp, then the columns above.
PUBLISHED = {
    "table1": {
        "single": ("61.2", "0.686", "87.37 ± 1.51", "93.87 ± 0.74", "80.62 ± 1.25", "5.96 ± 0.17"),
        "independent": (
            *("17.2", "0.557"),
            *("92.61 ± 0.38", "91.61 ± 0.64", "81.21 ± 0.99", "5.71 ± 0.24"),
        ),
        "gradnorm": (
            *("17.2", "0.260"),
            *("86.31 ± 1.35", "80.32 ± 1.10", "68.93 ± 4.78", "28.48 ± 0.65"),
        ),
        "pcgrad": (
            *("17.2", "0.556"),
            *("85.51 ± 1.71", "85.23 ± 1.52", "71.08 ± 7.40", "34.45 ± 0.33"),
        ),
    },
    "table2": {
        "single": ("", "", "94.30 ± 1.68", "95.29 ± 0.01", "85.86 ± 0.21", "5.42 ± 0.06"),
        "independent": ("", "", "96.15 ± 0.14", "94.24 ± 0.38", "83.95 ± 0.90", "5.22 ± 0.18"),
    },
}


@dataclass(frozen=True)
class FinishedRun:
    """A run that has been tested."""

    settings: Settings
    folder: Path
    metrics: Mapping[str, Any]

    def value(self, column: str) -> float | None:
        """Returns a metric in the tables' unit: percent, or pixels of a side of 256."""
        value = self.metrics[column]
        if value is None:
            return None
        return float(value) * (256 / self.settings.size if column == "fovea_error" else 100)


def read_run(settings: Settings, folder: Path) -> FinishedRun:
    """Reads the metrics of a run folder."""
    return FinishedRun(settings, folder, read_json(folder / "metrics.json"))


def choose_rates(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Returns for each method the learning rate whose run validated best."""
    best: dict[str, FinishedRun] = {}
    for run in runs:
        method = run.settings.method
        score = run.metrics["validation_score"]
        if method not in best or (score or 0) > (best[method].metrics["validation_score"] or 0):
            best[method] = run
    return {method: run.settings.lr for method, run in best.items()}


def write_table(file: Path, name: str, title: str, runs: Sequence[FinishedRun]) -> None:
    """Writes mean ± standard deviation over seeds or folds, and the published numbers, as Markdown.

    Args:
        file: The file to write.
        name: "table1" or "table2".
        title: Description of the runs.
        runs: All runs, with one learning rate for each method.
    """
    methods = list(dict.fromkeys(run.settings.method for run in runs))
    header = ["model", "parameters (1e6)", "s per iteration", *COLUMNS.values()]
    rows = []
    for method in methods:
        own = [run for run in runs if run.settings.method == method]
        seconds = np.median([run.metrics["seconds_per_iteration"] for run in own])
        rows.append(
            [
                NAMES.get(method, method),
                f"{own[0].metrics['parameters'] / 1e6:.1f}",
                f"{seconds:.3f}",
                *(_mean_and_deviation([run.value(column) for run in own]) for column in COLUMNS),
                f"{own[0].settings.lr:g}",
                str(len(own)),
            ]
        )
    published = [[NAMES[method], *cells] for method, cells in PUBLISHED[name].items()]
    write_text(
        file,
        f"{title}\n\n{write_markdown([*header, 'learning rate', 'runs'], rows)}\n\n"
        "As published, on REFUGE's photographs, with width 64 and 256 px:\n\n"
        f"{write_markdown(header, published)}\n",
    )


def write_runs(file: Path, runs: Sequence[FinishedRun]) -> None:
    """Writes a row per run, with all metrics, as CSV."""
    keys = [
        key for key in runs[0].metrics if key not in ("data", "notes", "intervals", "decisions")
    ]
    rows = [
        [
            *(run.settings.method, run.settings.lr, run.settings.seed, run.settings.fold),
            *(run.metrics[key] for key in keys),
        ]
        for run in runs
    ]
    write_csv(file, ["method", "lr", "seed", "fold", *keys], rows)


def write_rates(file: Path, title: str, runs: Sequence[FinishedRun]) -> None:
    """Writes the results of each learning rate as Markdown, the chosen ones in bold."""
    chosen = choose_rates(runs)
    rows = []
    for run in runs:
        method, lr, score = run.settings.method, run.settings.lr, run.metrics["validation_score"]
        shown = "-" if score is None else f"{score:.4f}"
        rows.append(
            [
                NAMES.get(method, method),
                f"**{lr:g}**" if lr == chosen[method] else f"{lr:g}",
                shown,
                *(_mean_and_deviation([run.value(column)]) for column in COLUMNS),
            ]
        )
    header = ["model", "learning rate", "validation score", *COLUMNS.values()]
    write_text(file, f"{title}\n\n{write_markdown(header, rows)}\n")


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    text = f"{np.mean(numbers):.2f}"
    if len(numbers) > 1:
        text += f" ± {np.std(numbers, ddof=1):.2f}"
    return text if len(numbers) == len(values) else f"{text} ({len(numbers)} of {len(values)})"


def write_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
