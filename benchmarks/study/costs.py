"""What a step of each method costs: CPU time, forward and backward passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.study.methods import make_optimizer, variants
from benchmarks.study.problem import Defaults, load, make


def measure_costs(name: str, methods: Sequence[str], repetitions: int) -> list[dict[str, Any]]:
    """Measures what a step of each method costs with its published constants.

    Seconds are the mean CPU time of this process, which other programs on the machine do not count
    in; the methods take turns, so that what slows the machine slows them alike. A method that the
    problem is not for has its error instead of a time.
    """
    torch.set_num_threads(1)
    problem_class = load(name)
    started: dict[str, tuple[Defaults, Any, Iterator[Any]]] = {}
    failed: dict[str, str] = {}
    for method in methods:
        problem = make(problem_class, 0)
        try:
            default = variants(problem_class, method)[0]
            optimizer = make_optimizer(problem, method, 1e-3, default)
            batches = problem.batches()
            optimizer.step(problem.losses, *next(batches))
        except Exception as error:
            failed[method] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        started[method] = (problem, optimizer, batches)
    cases = {
        method: lambda parts=parts: partial(parts[1].step, parts[0].losses, *next(parts[2]))
        for method, parts in started.items()
    }
    # Not the median: some methods do more in every tenth step.
    times = timing.seconds(cases, repetitions, "cpu", 2, time.process_time)
    measured: list[dict[str, Any]] = [
        {"method": method, "seconds": statistics.fmean(times[method])} | count_passes(*parts)
        for method, parts in started.items()
    ]
    return measured + [{"method": method, "error": error} for method, error in failed.items()]


def count_passes(problem: Defaults, optimizer: Any, batches: Iterator[Any]) -> dict[str, int]:
    """Counts the forward and backward passes of one step."""
    forward = mock.Mock(side_effect=problem.losses)
    backward = mock.Mock(side_effect=torch.autograd.backward)
    grad = mock.Mock(side_effect=torch.autograd.grad)
    with (
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(torch.autograd, "grad", grad),
    ):
        # What a loss differentiates itself (a residual of a differential equation) is no pass.
        inside: list[int] = []

        def losses(*arguments: Any) -> Any:
            before = grad.call_count
            values = forward(*arguments)
            inside.append(grad.call_count - before)
            return values

        optimizer.step(losses, *next(batches))
    passes = backward.call_count + grad.call_count - sum(inside)
    return {"forward": forward.call_count, "backward": passes}
