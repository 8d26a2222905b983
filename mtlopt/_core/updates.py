"""Updates: records what each task's update changes in the shared parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtlopt._gradients.arithmetic import Gradients, cosines, gram, with_gaps

DECAY = 0.99
"""Decay per step of the averages behind the shares."""


class Updates:
    """Compares the shared parameters before and after each task's update."""

    def __init__(self, count: int) -> None:
        self.squares = torch.zeros(count, dtype=torch.float64, device="cpu")
        """Decaying averages of the tasks' squared updates."""
        self._count = count
        self._stepped: set[int] = set()
        self._tasks_of: dict[int, set[int]] = {}
        self.begin()

    def begin(self) -> None:
        """Forgets the last step."""
        self._rows: dict[int, dict[int, Tensor]] = {}
        self._last: tuple[list[int], Tensor] = [], self.squares.new_zeros(0, 0)

    @contextmanager
    def of(self, task: int, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Records how the parameters with a gradient change meanwhile."""
        self._stepped.add(task)
        complete = len(self._stepped) == self._count
        before = {}
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            self._tasks_of.setdefault(i, set()).add(task)
            # Which parameters are shared is known once each task has had a turn.
            if self._is_shared(i) or not complete:
                before[i] = parameter.detach().clone()
        yield
        self._rows[task] = {i: parameters[i].detach() - start for i, start in before.items()}

    def finish(self) -> None:
        """Summarises the step, by one copy from the device, and frees the updates."""
        present = list(self._rows)
        places = [i for i in self._tasks_of if self._is_shared(i)]
        rows: list[Gradients] = [[row.get(i) for i in places] for row in self._rows.values()]
        self._last = present, gram(rows, shared=False)
        moved = torch.zeros_like(self.squares)
        moved[present] = self._last[1].diagonal()
        self.squares = DECAY * self.squares + (1 - DECAY) * moved
        self._rows = {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the last step's figures, NaN for a task without an update."""
        present, products = self._last
        return {
            "update_norms": with_gaps(products.diagonal().sqrt(), present, self._count),
            "update_cosines": with_gaps(cosines(products), present, self._count),
            "update_shares": self.squares / self.squares.sum(),
        }

    def _is_shared(self, place: int) -> bool:
        return len(self._tasks_of[place]) >= min(2, self._count)
