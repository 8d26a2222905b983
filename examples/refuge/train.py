"""Trains one network for four tasks on fundus photographs; README.md beside it says how."""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # The imports below take seconds, and Ctrl-C shall end in one line then too.
    early = b"train.py: interrupted; nothing was written\n"
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, early), os._exit(130)))

import csv
import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mtlopt
from checkpoint import load_checkpoint, save_checkpoint, write_json, write_text
from data import Batch, load_splits
from diagnosis import fit_ratio_classifier
from errors import InputError
from evaluation import evaluate, score
from figures import draw_pictures
from losses import task_losses
from network import TASKS, MultiTaskUNet, count_parameters
from report import missing_ratios, write_report
from settings import Settings, parse
from state import TrainingState

VALIDATE_EVERY = 5
DROPOUT = 0.8
PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Objective = str | tuple[str, ...]


def build_optimizer(
    settings: Settings,
    model: MultiTaskUNet,
    objectives: Sequence[Objective],
    scaler: torch.amp.GradScaler | None,
) -> mtlopt.MultiTaskOptimizer:
    """Makes the optimizer that a method's name stands for, around Adam."""
    parameters = model.parameters()
    if settings.method == "independent":
        return mtlopt.IndependentOptimizer(
            torch.optim.Adam, parameters, objectives, lr=settings.lr, scaler=scaler
        )
    adam = torch.optim.Adam(parameters, lr=settings.lr)
    if settings.method == "alternating":
        return mtlopt.AlternatingOptimizer(adam, objectives, scaler=scaler)
    return mtlopt.JointOptimizer(adam, objectives, scaler=scaler)


def draw_objectives(settings: Settings) -> Sequence[Objective]:
    """Groups the tasks at random, once for the whole run."""
    if settings.group_size == 1:
        return TASKS
    generator = torch.Generator().manual_seed(settings.seed)
    return list(mtlopt.random_groups(TASKS, settings.group_size, generator=generator))


def build_state(
    settings: Settings, objectives: Sequence[Objective], device: torch.device
) -> TrainingState:
    """Makes network and optimizer as they are before the first step."""
    torch.manual_seed(settings.seed)
    model = MultiTaskUNet(width=settings.width, norm=settings.norm, dropout=DROPOUT).to(device)
    if settings.compile:
        model.compile()
    scaler = torch.amp.GradScaler(device.type) if settings.amp == "fp16" else None
    optimizer = build_optimizer(settings, model, objectives, scaler)
    shuffle = torch.Generator().manual_seed(settings.seed)
    return TrainingState(model, optimizer, scaler, shuffle)


def train(settings: Settings, out: Path, resume: bool) -> None:
    """Trains a network, then tests the weights that validated best.

    Args:
        settings: What the final weights depend on.
        out: The run folder; it exists.
        resume: Go on from `last.pt` where there is one.
    """
    splits = load_splits(settings.data, settings.size, settings.seed, out.parent / ".cache")
    source = "synthetic phantoms" if settings.data == "phantom" else Path(settings.data).name
    pictures = splits["train"]
    iterations = len(pictures) // settings.batch_size
    if iterations == 0:
        raise InputError(
            f"`--batch-size` must be at most {len(pictures)} (the training pictures), "
            f"got {settings.batch_size}."
        )
    learned = pictures.tasks()
    classifier, reason = fit_ratio_classifier(pictures.ratios.numpy(), pictures.labels.numpy())
    notes = [f"no training picture is annotated for {t}." for t in TASKS if t not in learned]
    notes += [reason] if reason else []

    device = settings.torch_device()
    objectives = draw_objectives(settings)
    state = build_state(settings, objectives, device)
    model, optimizer = state.model, state.optimizer
    if resume and (out / "last.pt").exists():
        state.load(out / "last.pt")

    facts = {
        "source": source,
        "pictures": {split: len(each) for split, each in splits.items()},
        "objectives": list(objectives),
        "parameters": count_parameters(model),
        "dropout": DROPOUT,
        "validate_every": VALIDATE_EVERY,
        "torch": torch.__version__,
    }
    write_json(out / "config.json", asdict(settings) | facts)
    (out / "figures").mkdir(exist_ok=True)
    draw_pictures(out / "figures" / "pictures.png", pictures)
    for split in splits.values():
        split.keep_on(device)

    dtype = PRECISIONS[settings.amp]
    autocast = partial(torch.autocast, device.type, dtype, enabled=settings.amp != "off")
    judge = partial(
        evaluate, tasks=learned, classifier=classifier, device=device, autocast=autocast
    )

    def losses(tasks: Sequence[str], batch: Batch) -> Mapping[str, Any]:
        # Batch norm must see the pictures that the losses are of: others shift its statistics.
        batch = batch.only(tasks)
        if len(batch.images) == 0:
            return {}
        with autocast():
            logits = model(batch.images, tasks)
        return task_losses(logits, batch)

    total, done = settings.epochs * iterations, state.epoch * iterations
    with tqdm(total=total, initial=done, desc="training", unit="it", disable=None) as bar:
        while state.epoch < settings.epochs:
            model.train()
            start = time.perf_counter()
            values = []
            order = torch.randperm(len(pictures), generator=state.shuffle)
            for rows in order[: iterations * settings.batch_size].view(iterations, -1):
                values.append(optimizer.step(losses, pictures[rows].to(device)))
                bar.update()
            row = {"epoch": state.epoch + 1, **_mean_losses(values)}
            state.seconds += time.perf_counter() - start
            state.epoch += 1
            state.history.append(row)

            if state.epoch % VALIDATE_EVERY == 0 or state.epoch == settings.epochs:
                metrics = judge(model, splits["val"]).metrics
                row["score"] = score(metrics, settings.size)
                row |= {f"val_{key}": value for key, value in metrics.items()}
                shown = "-" if row["score"] is None else f"{row['score']:.3f}"
                tqdm.write(f"epoch {state.epoch} of {settings.epochs}: score {shown}")
                if state.is_best(row["score"]):
                    save_checkpoint(
                        out / "best.pt",
                        {
                            "model": model.state_dict(),
                            "epoch": state.epoch,
                            "tasks": learned,
                            "classifier": classifier and tuple(classifier),
                        },
                    )
            state.save(out / "last.pt")
            write_text(out / "history.csv", _to_csv(state.history))

    best = load_checkpoint(out / "best.pt")
    model.load_state_dict(best["model"])
    evaluation = judge(model, splits["test"])
    notes += missing_ratios(evaluation)
    facts = {
        "parameters": count_parameters(model),
        "seconds_per_iteration": state.seconds / (state.epoch * iterations),
        "best_epoch": best["epoch"],
        "notes": notes,
    }
    write_report(out, source, splits["test"], evaluation, state.history, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = None
    try:
        settings, out, resume = parse(arguments)
        made = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{out}: cannot be made ({error.strerror}).") from error
        try:
            train(settings, out, resume)
        finally:
            if made and not any(out.iterdir()):
                out.rmdir()
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
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


def _to_csv(history: Sequence[Mapping[str, Any]]) -> str:
    columns = {column: None for row in history for column in row}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
