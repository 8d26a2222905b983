"""OnePassOptimizer: the methods whose gradient is that of one scalar made of the losses."""

from collections.abc import Callable, Mapping

from torch import Tensor

from mtlopt._combining import CombiningOptimizer
from mtlopt._distributed import ALONE, Ranks
from mtlopt._gradients import Gradients
from mtlopt._passes import backward, differentiate, leaves
from mtlopt._shards import is_sharded


class OnePassOptimizer(CombiningOptimizer):
    """One backward pass of a weighted sum of the losses."""

    def _pass(
        self,
        total: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        ranks: Ranks,
        present: bool,
    ) -> None:
        """Takes the one backward pass; ranks that sum gradients do so apart from earlier ones.

        `total` may be missing on a rank where a task is `present` on another.
        """
        parameters = self._parameters
        losses = [] if total is None else [total if scale is None else scale(total)]
        if ranks.at_the_end is ALONE or not present:
            # Straight into `.grad`, as the loop by hand: no second gradient is held meanwhile.
            for loss in losses:
                backward(loss, parameters)
            return
        nothing: Gradients = [None] * len(parameters)
        own = next(iter([*differentiate(losses, parameters)]), nothing)
        self._add(ranks.at_the_end.sum(own, parameters))

    def _note_reach(self, terms: Mapping[str, Tensor]) -> None:
        """Looks, once a task, whether its loss reaches a parameter; the sum's pass cannot tell."""
        for name in terms.keys() - self._watch.looked:
            self._watch.looked.add(name)
            found = None if is_sharded(self._parameters) else leaves([terms[name]])
            own = {id(parameter) for parameter in self._parameters}
            if found is not None and not any(id(leaf) in own for leaf in found):
                self._watch.unreached(name)
