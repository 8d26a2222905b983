"""Validates a run during training and tests it at the end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from refuge.best import load_best, parts, save_best
from refuge.measurement.evaluation import evaluate, score
from refuge.measurement.operating import choose_point, write_point
from refuge.measurement.quality import grade, measure_limits, measure_quality, write_limits
from refuge.measurement.report import decide, missing_ratios, write_report
from refuge.metrics import mean
from refuge.network import TASKS, count_parameters
from refuge.run import Run


def validate(run: Run) -> None:
    """Evaluates the weights on the validation photographs; saves them if they are the best yet."""
    state, size = run.state, run.settings.size
    # All processes must agree on when to stop.
    metrics = run.processes.from_first(lambda: evaluate(run.trained, run.splits["val"]).metrics)
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
        save_best(run.out, state.epoch, improved, run.trained, run.settings)


def finish(run: Run) -> None:
    """Chooses the operating point of the best weights, tests them and writes the report.

    Calibration and thresholds come from the validation photographs, which no weight was fitted to.
    """
    state, val, test = run.state, run.splits["val"], run.splits["test"]
    trained, epochs = load_best(run.out, state.network, run.settings)
    validated = evaluate(trained, val)
    limits = measure_limits(measure_quality(val, validated.predictions))
    write_limits(run.out, limits)
    validated = grade(val, validated, limits)
    labels = np.where(validated.ungradable, -1, val.labels.numpy())
    point, reason = choose_point(labels, validated.diagnoses["both"])
    evaluation = grade(test, evaluate(trained, test), limits)
    if point:
        point = replace(point, test=decide(point, test, evaluation))
    write_point(run.out, point, reason)
    facts = {
        "parameters": count_parameters(state.network),
        "seconds_per_iteration": state.seconds / (state.epoch * run.iterations),
        "validation_score": mean(np.array([b for b in state.best.values() if b is not None])),
        "best_epoch": epochs[""] if "" in epochs else list(epochs.values()),
        "notes": [*run.notes, *([reason] if reason else []), *missing_ratios(evaluation)],
    }
    write_report(run.out, run.source, test, evaluation, state.history, point, facts)
