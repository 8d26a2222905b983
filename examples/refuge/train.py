"""Trains one network for four tasks on fundus photographs; see README.md in this folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from refuge.best import autocast
from refuge.errors import InputError
from refuge.losses import task_losses
from refuge.methods import check_method
from refuge.photographs.data import Batch
from refuge.processes import ONE_PROCESS, Processes, start_processes
from refuge.run import VALIDATE_EVERY, prepare
from refuge.settings import Settings, claim_folder, parse
from refuge.validation import finish, validate


def train(settings: Settings, out: Path, resume: bool, processes: Processes = ONE_PROCESS) -> None:
    """Trains a network, then tests the weights that validated best.

    Args:
        settings: Everything the final weights depend on.
        out: The run folder, which must exist.
        resume: Whether to continue from `last.pt` if there is one.
        processes: The processes that train together; each takes its share of every batch.
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
            state.save(out, processes, settings)
    if processes.first:
        finish(run)


def make_losses(
    settings: Settings, model: nn.Module, processes: Processes = ONE_PROCESS
) -> Callable[[Sequence[str], Batch], Mapping[str, tuple[Tensor, int]]]:
    """Returns the function by which the optimizer evaluates the losses of tasks on a batch."""

    def losses(tasks: Sequence[str], batch: Batch) -> Mapping[str, tuple[Tensor, int]]:
        # Batch norm sees only the pictures that enter the loss: others would shift its statistics.
        part = batch.only(tasks)
        if len(part.images) == 0:
            if processes.count == 1:
                return {}
            part = batch  # The other processes wait for this one's backward pass.
        with autocast(settings):
            logits = model(part.images, tasks)
        return task_losses(logits, part)

    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    # Processes that a shell starts in the background ignore Ctrl-C by default.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out: Path | None = None
    try:
        request = parse(arguments)
        check_method(request.settings)
        device = request.settings.torch_device()
        with start_processes(device) as processes, ExitStack() as claimed:
            # One process chooses, or each would claim a folder of its own.
            out = processes.from_first(lambda: claim_folder(request, claimed))
            train(request.settings, out, request.resume, processes)
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        advice = "try a smaller `--batch-size`, `--size` or `--width`"
        print(f"train.py: error: the device has too little memory; {advice}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = out and (out / "config.json").exists()
        advice = f"continue with: train.py --resume --out {out}" if saved else "nothing was written"
        print(f"train.py: interrupted; {advice}", file=sys.stderr)
        return 130
    finally:
        if out is not None:
            with suppress(OSError):
                out.rmdir()  # Succeeds only if nothing was written.
    return 0


if __name__ == "__main__":
    sys.exit(main())
