"""Trains one network for four tasks on fundus photographs; README.md beside it says how."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from refuge.best import autocast
from refuge.errors import InputError
from refuge.losses import task_losses
from refuge.photographs.data import Batch
from refuge.processes import ALONE, Processes, start_processes
from refuge.run import VALIDATE_EVERY, prepare
from refuge.settings import Settings, claim_folder, parse
from refuge.validation import finish, validate


def train(settings: Settings, out: Path, resume: bool, processes: Processes = ALONE) -> None:
    """Trains a network, then tests the weights that validated best.

    Args:
        settings: What the final weights depend on.
        out: The run folder; it exists.
        resume: Go on from `last.pt` where there is one.
        processes: Those that train together; each takes its part of every batch.
    """
    run = prepare(settings, out, resume, processes)
    state, optimizer = run.state, run.state.optimizer
    losses = make_losses(settings, run.model, processes)
    with run.progress() as bar:
        while not state.ended(settings.epochs, settings.patience):
            run.model.train()
            state.begin_epoch()
            for batch in run.batches():
                values = optimizer.step(losses, batch)
                state.note(values)
                bar.update()
            state.end_epoch()
            if state.epoch % VALIDATE_EVERY == 0 or state.epoch == settings.epochs:
                validate(run)
            state.save(out, processes)
    if processes.first:
        finish(run)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    # A shell that starts it in the background would have it ignore Ctrl-C.
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


if __name__ == "__main__":
    sys.exit(main())
