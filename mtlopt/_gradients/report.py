"""Report: signs of likely mistakes, found while gradients are taken."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from torch import Tensor

from mtlopt._gradients.arithmetic import Gradients, is_finite, is_sharded, to_numbers
from mtlopt._gradients.autograd import leaves
from mtlopt._gradients.losses import Loss, Task, names_of

Kind: TypeAlias = Literal["unreached", "others", "uncut", "unshared"]


class Report:
    """Collects signs of mistakes, for the optimizer to warn of after the step."""

    def __init__(self) -> None:
        self.searched: set[str] = set()
        """Tasks whose graphs have been searched for the optimizer's parameters."""
        self.mistakes: list[tuple[Kind, object]] = []
        """Each with the task that it concerns, if any."""
        self.skipped: set[str] = set()
        """Names left out of the step, because a loss or a gradient was not finite."""

    def finite(self, means: Mapping[str, Loss]) -> dict[str, Loss]:
        """Returns the losses that are finite, and notes the names of the others."""
        numbers = to_numbers([mean.value for mean in means.values()]) if means else []
        self.skipped.update(n for n, x in zip(means, numbers, strict=True) if not math.isfinite(x))
        return {name: mean for name, mean in means.items() if name not in self.skipped}

    def lost(self, gradients: Mapping[Task, Gradients]) -> list[Task]:
        """Lists the tasks whose gradient is not finite, and notes their names."""
        found = to_numbers([is_finite(own) for own in gradients.values()]) if gradients else []
        lost = [task for task, finite in zip(gradients, found, strict=True) if not finite]
        self.skipped.update(names_of(*lost))
        return lost

    def drop_lost(
        self, rows: dict[Task, Gradients], others: dict[Task, Gradients], values: dict[str, Tensor]
    ) -> None:
        """Leaves out tasks whose gradient is not finite."""
        for task in self.lost(rows):
            del rows[task]
            others.pop(task, None)
            for name in names_of(task):
                values.pop(name, None)

    def search(self, terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
        """Searches each task's graph once for a parameter, where one pass serves all tasks."""
        for name in terms.keys() - self.searched:
            self.searched.add(name)
            found = None if is_sharded(parameters) else leaves([terms[name]])
            own = set(map(id, parameters))
            if found is not None and not any(id(leaf) in own for leaf in found):
                self.mistakes.append(("unreached", name))

    def search_for_others(self, terms: Iterable[Tensor], parameters: Sequence[Tensor]) -> None:
        """Searches graphs for foreign parameters, whose gradients cannot be corrected."""
        own = set(map(id, parameters))
        if is_sharded(parameters):
            return  # FSDP2's graphs hold the whole parameters, gathered from the shards.
        if any(id(leaf) not in own for leaf in leaves(terms) or ()):
            self.mistakes.append(("others", None))
