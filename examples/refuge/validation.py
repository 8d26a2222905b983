"""What a run is worth: validated while it trains, tested at its end."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from measurement.evaluation import evaluate, score
from measurement.report import missing_ratios, write_report
from metrics import mean
from network import TASKS, count_parameters
from preparation import Run
from runs import load_best, parts, save_best


def validate(run: Run) -> None:
    """Measures the weights on the validation photographs, and keeps them where none were better."""
    state, size = run.state, run.settings.size
    metrics = evaluate(run.trained, run.splits["val"]).metrics
    row = state.history[-1]
    row["score"] = score(metrics, size, TASKS)
    row |= {f"val_{key}": value for key, value in metrics.items()}
    scores = {name: score(metrics, size, tasks) for name, tasks in parts(run.settings).items()}
    improved = state.improved(scores)
    if not run.processes.first:
        return
    shown = "-" if row["score"] is None else f"{row['score']:.3f}"
    tqdm.write(f"epoch {state.epoch} of {run.settings.epochs}: score {shown}")
    if improved:
        save_best(run.out, state.epoch, improved, run.trained)


def finish(run: Run) -> None:
    """Tests the weights that validated best, and writes the report."""
    state, test = run.state, run.splits["test"]
    trained, epochs = load_best(run.out, state.network, run.settings)
    evaluation = evaluate(trained, test)
    facts = {
        "parameters": count_parameters(state.network),
        "seconds_per_iteration": state.seconds / (state.epoch * run.iterations),
        "validation_score": mean(np.array([b for b in state.best.values() if b is not None])),
        "best_epoch": epochs[""] if "" in epochs else list(epochs.values()),
        "notes": run.notes + missing_ratios(evaluation),
    }
    write_report(run.out, run.source, test, evaluation, state.history, facts)
