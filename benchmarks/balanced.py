"""Where, how often and over how many measurements `Balanced` should take norms, on validation.

    python -m benchmarks.balanced

Trains on problems of the study with every combination of place, `every` and `decay`, at the
learning rate that the study chose for each place, with its three search seeds and its steps. Looks
at the validation split alone. A second call continues where the first one stopped.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtlopt
from benchmarks.run_study import RESULTS
from benchmarks.study.methods import BY_LOSSES, adam
from benchmarks.study.plan import SEARCH_SEEDS, Config
from benchmarks.study.problem import load, make
from benchmarks.study.results import RUNS, append_rows, load_rows, read_scores
from benchmarks.study.training import train

OUT = Path(__file__).parent / "results" / "balanced"
PROBLEMS = ("adult", "qm9", "two_sets", "burgers")
EVERY, DECAY = (1, 10, 30), (0.0, 0.5, 0.9, 0.99)
PLACES = {"Balanced": "parameters", "Balanced, features": "features"}


def chosen(problem: str, method: str) -> tuple[float, int] | None:
    """Returns a method's learning rate and steps in the study's judgement, if it was judged."""
    rows = load_rows(RESULTS / problem / "runs.csv")
    final = [row for row in rows if int(row["seed"]) not in SEARCH_SEEDS]
    steps = max((int(row["steps"]) for row in final if row["method"] == "Balanced"), default=0)
    rates = [float(row["lr"]) for row in final if row["method"] == method]
    return (rates[0], steps) if rates and steps else None


def configs(problem: str) -> Iterator[Config]:
    """Yields the runs of a problem."""
    for method in (*PLACES, BY_LOSSES):
        found = chosen(problem, method)
        if found is None:
            continue
        counts: Sequence[int | None] = (None,) if method == BY_LOSSES else EVERY
        for every, decay in itertools.product(counts, DECAY):
            variant = f"decay={decay:g}" + ("" if every is None else f" every={every}")
            for seed in SEARCH_SEEDS:
                yield Config(method, found[0], variant, seed, found[1])


def run(name: str, config: Config) -> dict[str, Any]:
    """Trains once; the constants need not be among those of the study's search."""
    torch.set_num_threads(1)
    problem = make(load(name), config.seed)
    constants = dict(pair.split("=") for pair in config.variant.split())
    options: dict[str, Any] = {"decay": float(constants["decay"])}
    if "every" in constants:
        options["every"] = int(constants["every"])
    if config.method == BY_LOSSES:
        options["by"] = "losses"
    elif PLACES[config.method] == "features":
        options["features"] = problem.features
    optimizer = mtlopt.Balanced(adam(problem, config.lr), type(problem).tasks, **options)
    return {**config._asdict(), **train(problem, optimizer, config)}


def main() -> None:
    """Trains what is missing, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per process
    for problem in PROBLEMS:
        path = OUT / f"{problem}.csv"
        known = read_scores(load_rows(path))
        missing = [config for config in configs(problem) if config not in known]
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            rows = pool.map(run, itertools.repeat(problem), missing)
            for row in tqdm(rows, problem, len(missing)):
                append_rows(path, RUNS, [row])
    (OUT / "defaults.md").write_text(table(), encoding="utf-8")


def table() -> str:
    """Returns each combination's mean score, as the difference to the default's in percent."""
    scores = {p: read_scores(load_rows(OUT / f"{p}.csv")) for p in PROBLEMS}
    lines = [
        "| measured over | every | decay | " + " | ".join(PROBLEMS) + " |",
        "| --- | --- | --- |" + " --- |" * len(PROBLEMS),
    ]
    found_in = {(c.method, c.variant) for own in scores.values() for c in own}
    places = [*PLACES, BY_LOSSES]

    def order(key: tuple[str, str]) -> tuple[int, float, float]:
        options = dict(pair.split("=") for pair in key[1].split())
        return places.index(key[0]), float(options.get("every", 0)), float(options["decay"])

    for method, variant in sorted(found_in, key=order):
        options = dict(pair.split("=") for pair in variant.split())
        cells = [PLACES.get(method, "losses"), options.get("every", ""), options["decay"]]
        for problem in PROBLEMS:
            own = {
                (c.method, c.variant): statistics.fmean(
                    scores[problem][c._replace(seed=seed)] for seed in SEARCH_SEEDS
                )
                for c in scores[problem]
            }
            default = own["Balanced", "decay=0.9 every=10"]
            found = own.get((method, variant))
            cells.append("" if found is None else f"{100 * (found - default):+.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
