"""Trains one network for four tasks on fundus photographs; README.md beside it says how."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # The imports below take seconds, and Ctrl-C shall end in one line then too.
    early = b"train.py: interrupted; nothing was written\n"
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, early), os._exit(130)))

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import write_csv, write_json
from data import Batch, Photographs, describe, load_splits
from diagnosis import fit_ratio_classifier
from errors import InputError
from evaluation import Trained, evaluate, score
from figures import draw_pictures
from losses import task_losses
from methods import build_network, build_optimizer, compile_network, draw_objectives
from metrics import mean
from network import TASKS, count_parameters
from processes import Processes, start_processes
from report import missing_ratios, write_report
from runs import autocast, load_best, parts, save_best
from settings import Settings, claim_folder, parse
from state import TrainingState

VALIDATE_EVERY = 5
ALONE = Processes()


def build_state(settings: Settings, processes: Processes, file: Path | None) -> TrainingState:
    """Makes network and optimizer as they are before the first step, or as a checkpoint says."""
    device = settings.torch_device()
    network = build_network(settings, pretrained=file is None).to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    if settings.compile:
        compile_network(network, settings)
    scaler = torch.amp.GradScaler(device.type) if settings.amp == "fp16" else None
    fused = device.type == "cuda"
    optimizer = build_optimizer(settings, network, scaler, processes.group, fused)
    if not processes.first:
        torch.manual_seed(settings.seed + processes.rank)  # Dropout of its own.
    shuffle = torch.Generator().manual_seed(settings.seed)
    state = TrainingState(network, optimizer, scaler, shuffle)
    if file:
        state.load(file, processes)
    return state


def train(settings: Settings, out: Path, resume: bool, processes: Processes = ALONE) -> None:
    """Trains a network, then tests the weights that validated best.

    Args:
        settings: What the final weights depend on.
        out: The run folder; it exists.
        resume: Go on from `last.pt` where there is one.
        processes: Those that train together; each takes its part of every batch.
    """
    source, cache = describe(settings.data), out.parent / ".cache"
    splits = processes.from_first(
        lambda: load_splits(settings.data, settings.size, settings.seed, cache)
    )
    pictures = splits["train"]
    iterations = len(pictures) // (settings.batch_size * processes.count)
    if iterations == 0:
        raise InputError(
            f"`--batch-size` must be at most {len(pictures) // processes.count} (the training "
            f"pictures of a process), got {settings.batch_size}."
        )
    learned = pictures.tasks()
    classifier, reason = fit_ratio_classifier(pictures.ratios.numpy(), pictures.labels.numpy())
    notes = [f"no training picture is annotated for {t}." for t in TASKS if t not in learned]
    notes += [reason] if reason else []

    file = out / "last.pt"
    state = build_state(settings, processes, file if resume and file.exists() else None)
    facts = {
        "source": source,
        "pictures": {split: len(each) for split, each in splits.items()},
        "objectives": list(draw_objectives(settings)),
        "parameters": count_parameters(state.network),
        "validate_every": VALIDATE_EVERY,
        "torch": torch.__version__,
    }
    if processes.first:
        if state.epoch < settings.epochs:
            (out / "metrics.json").unlink(missing_ok=True)  # Of fewer epochs.
        write_json(out / "config.json", asdict(settings) | facts)
        (out / "figures").mkdir(exist_ok=True)
        draw_pictures(out / "figures" / "pictures.png", pictures)
    device = settings.torch_device()
    for split in splits.values():
        split.keep_on(device)

    trained = Trained(state.network, learned, classifier, partial(autocast, settings), device)
    model = wrap(settings, state.network, processes)
    total, done = settings.epochs * iterations, state.epoch * iterations
    quiet = None if processes.first else True
    with tqdm(total=total, initial=done, desc="training", unit="it", disable=quiet) as bar:
        while state.epoch < settings.epochs:
            row = run_epoch(settings, state, model, pictures, iterations, processes, bar)
            if state.epoch % VALIDATE_EVERY == 0 or state.epoch == settings.epochs:
                metrics = evaluate(trained, splits["val"]).metrics
                row["score"] = score(metrics, settings.size, TASKS)
                row |= {f"val_{key}": value for key, value in metrics.items()}
                scores = {k: score(metrics, settings.size, v) for k, v in parts(settings).items()}
                improved = state.improved(scores)
                if processes.first:
                    shown = "-" if row["score"] is None else f"{row['score']:.3f}"
                    tqdm.write(f"epoch {state.epoch} of {settings.epochs}: score {shown}")
                    if improved:
                        save_best(out, state.network, state.epoch, improved, learned, classifier)
            state.save(file, processes)
            if processes.first:
                columns = list(dict.fromkeys(c for row in state.history for c in row))
                rows = [[row.get(column) for column in columns] for row in state.history]
                write_csv(out / "history.csv", columns, rows)

    if not processes.first:
        return
    trained, epochs = load_best(out, state.network, settings)
    evaluation = evaluate(trained, splits["test"])
    facts = {
        "parameters": count_parameters(state.network),
        "seconds_per_iteration": state.seconds / (state.epoch * iterations),
        "validation_score": mean(np.array([b for b in state.best.values() if b is not None])),
        "best_epoch": epochs[""] if "" in epochs else list(epochs.values()),
        "notes": notes + missing_ratios(evaluation),
    }
    write_report(out, source, splits["test"], evaluation, state.history, facts)


def wrap(settings: Settings, network: nn.Module, processes: Processes) -> nn.Module:
    """Lets DDP average the gradients of the methods that step once per task.

    The others average each task's gradient themselves before they combine them.
    """
    if processes.count == 1 or settings.method not in ("independent", "alternating", "single"):
        return network
    return DistributedDataParallel(network, find_unused_parameters=True)


def make_losses(
    settings: Settings, model: nn.Module, processes: Processes = ALONE
) -> Callable[[Sequence[str], Batch], Mapping[str, tuple[Tensor, int]]]:
    """Makes what the optimizer asks for the losses of tasks on a batch."""

    def losses(tasks: Sequence[str], batch: Batch) -> Mapping[str, tuple[Tensor, int]]:
        # Batch norm must see the pictures that the losses are of: others shift its statistics.
        part = batch.only(tasks)
        if len(part.images) == 0:
            if processes.count == 1:
                return {}
            part = batch  # The other processes wait for a backward pass.
        with autocast(settings):
            logits = model(part.images, tasks)
        return task_losses(logits, part)

    return losses


def run_epoch(
    settings: Settings,
    state: TrainingState,
    model: nn.Module,
    pictures: Photographs,
    iterations: int,
    processes: Processes,
    bar: tqdm[Any],
) -> dict[str, Any]:
    """Passes once over the training pictures; returns the row of the history."""
    device = settings.torch_device()
    losses = make_losses(settings, model, processes)
    model.train()
    start = time.perf_counter()
    values = []
    order = torch.randperm(len(pictures), generator=state.shuffle)
    size = settings.batch_size
    for rows in order[: iterations * processes.count * size].view(iterations, -1, size):
        batch = pictures[rows[processes.rank]].to(device)
        try:
            values.append(state.optimizer.step(losses, batch))
        except ValueError as error:  # An aggregator that needs every task in every batch.
            raise InputError(f"`--method {settings.method}`: {error}") from error
        bar.update()
    state.epoch += 1
    row = {"epoch": state.epoch, **_mean_losses(values)}
    state.seconds += time.perf_counter() - start
    state.history.append(row)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = None
    try:
        request = parse(arguments)
        with start_processes(request.settings.torch_device()) as processes:
            # One process chooses, or each would find another name free.
            out = processes.from_first(lambda: claim_folder(request))
            try:
                train(request.settings, out, request.resume, processes)
            finally:
                with suppress(OSError):
                    out.rmdir()  # Where nothing was written.
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        advice = "try a smaller `--batch-size`, `--size` or `--width`"
        print(f"train.py: error: the device has too little memory; {advice}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = out and (out / "config.json").exists()
        advice = f"go on with: train.py --resume --out {out}" if saved else "nothing was written"
        print(f"train.py: interrupted; {advice}", file=sys.stderr)
        return 130
    return 0


def _mean_losses(values: Sequence[Mapping[str, Tensor]]) -> dict[str, float | None]:
    """Averages an epoch's losses; None for a task that was absent throughout."""
    means: dict[str, float | None] = {}
    for task in TASKS:
        seen = [each[task] for each in values if task in each]
        means[f"loss_{task}"] = torch.stack(seen).mean().item() if seen else None
    return means


if __name__ == "__main__":
    sys.exit(main())
