"""Report: signs of likely mistakes, found while gradients are taken."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from mtlopt._gradients.arithmetic import is_sharded
from mtlopt._gradients.autograd import leaves

Kind: TypeAlias = Literal["unreached", "others", "uncut", "unshared"]


class Mistake(NamedTuple):
    """A kind of mistake, and the task that it concerns."""

    kind: Kind
    task: object = None


class Report:
    """Collects signs of mistakes, for the optimizer to warn of after the step."""

    def __init__(self) -> None:
        self.searched: set[str] = set()
        """Tasks whose graphs have been searched for the optimizer's parameters."""
        self.mistakes: list[Mistake] = []

    def search(self, terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
        """Searches each task's graph once for a parameter, where one pass serves all tasks."""
        for name in terms.keys() - self.searched:
            self.searched.add(name)
            found = None if is_sharded(parameters) else leaves([terms[name]])
            own = set(map(id, parameters))
            if found is not None and not any(id(leaf) in own for leaf in found):
                self.mistakes.append(Mistake("unreached", name))

    def search_for_others(self, terms: Iterable[Tensor], parameters: Sequence[Tensor]) -> None:
        """Searches graphs for other parameters, whose gradients no correction reaches."""
        own = set(map(id, parameters))
        if is_sharded(parameters):
            return  # FSDP2's graphs hold the whole parameters, gathered from the shards.
        if any(id(leaf) not in own for leaf in leaves(terms) or ()):
            self.mistakes.append(Mistake("others"))
