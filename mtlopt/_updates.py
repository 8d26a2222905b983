"""Updates: what each task's step moves of the parameters that several tasks reach."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtlopt._gradients import Gradients, cosines, gram

DECAY = 0.99
"""Of the averages that shares are taken of, per step."""


class Updates:
    """Copies the shared parameters around each task's step.

    Args:
        count: How many tasks there are.
    """

    def __init__(self, count: int) -> None:
        self.squares = torch.zeros(count, dtype=torch.float64)
        """Decaying averages of the tasks' squared updates."""
        self._count = count
        self._stepped: set[int] = set()
        self._reached: dict[int, set[int]] = {}
        self._rows: dict[int, dict[int, Tensor]] = {}
        self._last: tuple[list[int], Tensor] = [], torch.zeros(0, 0, dtype=torch.float64)

    def begin(self) -> None:
        """Forgets the last step."""
        self._rows, self._last = {}, ([], torch.zeros(0, 0, dtype=torch.float64))

    @contextmanager
    def of(self, task: int, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Notes what moves meanwhile of the parameters that have a gradient."""
        self._stepped.add(task)
        complete = len(self._stepped) == self._count
        before = {}
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            self._reached.setdefault(i, set()).add(task)
            # Whether others reach it is known once each has had a turn.
            if self._is_shared(i) or not complete:
                before[i] = parameter.detach().clone()
        yield
        self._rows[task] = {i: parameters[i].detach() - start for i, start in before.items()}

    def finish(self) -> None:
        """Sums up the step, in one copy from the device, and lets go of the updates."""
        present = list(self._rows)
        places = [i for i in self._reached if self._is_shared(i)]
        rows: list[Gradients] = [[row.get(i) for i in places] for row in self._rows.values()]
        self._last = present, gram(rows, shared=False)
        moved = torch.zeros_like(self.squares)
        moved[present] = self._last[1].diagonal()
        self.squares = DECAY * self.squares + (1 - DECAY) * moved
        self._rows = {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the figures of the last step, NaN for a task that took none."""
        present, products = self._last
        norms = torch.full_like(self.squares, float("nan"))
        angles = torch.full((self._count, self._count), float("nan"), dtype=torch.float64)
        index = torch.tensor(present, dtype=torch.long)
        norms[index] = products.diagonal().sqrt()
        angles[index[:, None], index] = cosines(products)
        shares = self.squares / self.squares.sum()
        return {"update_norms": norms, "update_cosines": angles, "update_shares": shares}

    def _is_shared(self, place: int) -> bool:
        return len(self._reached[place]) >= min(2, self._count)
