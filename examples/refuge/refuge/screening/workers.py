"""Runs functions in worker processes, a bounded number ahead."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
AHEAD = 4  # calls in flight for each worker: more would only fill the memory


class Workers:
    """Worker processes, or none, with one interface.

    Args:
        count: Number of processes; with 0 the calls run in this one.
    """

    def __init__(self, count: int) -> None:
        self.ahead = max(1, AHEAD * count)
        self.pool: ProcessPoolExecutor | None = None
        if count:
            # Forked workers share the memory of the libraries, and start at once.
            method = "fork" if sys.platform == "linux" else None
            context = multiprocessing.get_context(method)
            self.pool = ProcessPoolExecutor(count, context, _ignore_interrupts)
            with warnings.catch_warnings():
                # A fork is safe here: the workers use none of torch's threads.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pool.submit(int).result()

    def close(self) -> None:
        """Ends the processes, once their present calls have ended."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def start(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Starts a call; without processes it has ended when this returns."""
        if self.pool:
            return self.pool.submit(call, *arguments)
        done: Future[T] = Future()
        done.set_result(call(*arguments))
        return done

    def map(self, call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yields the results of calls in their order, with a bounded number of them in flight."""
        pending: deque[Future[T]] = deque()
        for each in arguments:
            pending.append(self.start(call, *each))
            if len(pending) >= self.ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _ignore_interrupts() -> None:
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
