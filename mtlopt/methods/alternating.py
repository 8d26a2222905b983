"""AlternatingOptimizer: an update per task, all with one common state (eq. 2)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from mtlopt._core.options import Options
from mtlopt._core.sequential import Order, Record, SequentialOptimizer
from mtlopt._core.single import Single
from mtlopt._gradients.losses import CheckFinite, Task


class AlternatingOptimizer(SequentialOptimizer):
    r"""Steps through the tasks in turn, all with one optimizer and its one state.

    For :math:`k = 1, \dots, T`:

    .. math:: w \leftarrow w - \eta \, g^{(k)}(w)

    Each gradient is taken at the weights that the previous task's update left. The optimizer's
    moments mix the gradients of all tasks; :class:`IndependentOptimizer` separates them.

    Args:
        optimizer: Optimizer that takes every task's step; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one step.
        order: "fixed" keeps the order of `tasks`, "shuffled" draws it at every step from
            ``self.generator`` (seed 0; saved in the state dict).
        per_step: How many of the T tasks a step visits, so that it costs as many passes: all of
            them if None. They come from a shuffled cycle, each equally often; one that is absent
            from its batch has had its turn.
        record: "updates" has :meth:`diagnostics` say what each task's step moves; while a step
            lasts it costs T copies of the shared parameters.
        scaler: Gradient scaler for float16; a task whose gradient overflows skips its own step.
        check_finite: Whether a loss that is not finite raises; "skip" leaves its task out.
        process_group: Ranks that agree on the tasks' counts, with a model wrapped in DDP.

    Raises:
        TypeError: If `optimizer` is not an instance of a plain optimizer.
        ValueError: If `tasks` is empty or repeats a name, or `per_step` is out of its range.

    Example:
        >>> import torch, mtlopt
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> base = torch.optim.SGD([w], lr=0.5)
        >>> optimizer = mtlopt.AlternatingOptimizer(base, ["a", "b"])
        >>> def losses(tasks):
        ...     return {task: (w**2).sum() / 2 for task in tasks}
        >>> optimizer.step(losses)  # 1 -> 0.5 -> 0.25
        {'a': tensor(0.5000), 'b': tensor(0.1250)}
        >>> w
        tensor([0.2500], requires_grad=True)

    References:
        Maninis et al., 2019 (arXiv 1904.08918); Bragman et al., 2019 (arXiv 1908.09597).
    """

    _updater: Single

    _without_losses = (
        "`step` of AlternatingOptimizer needs `losses`. In a loop that owns the backward pass "
        "call the wrapped optimizer: optimizer.zero_grad(); loss.backward(); optimizer.base.step()."
    )
    _with_ready_losses = 'IndependentOptimizer with schedule="simultaneous" takes ready losses.'

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Iterable[Task],
        *,
        order: Order = "fixed",
        per_step: int | None = None,
        record: Record | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_finite: CheckFinite = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        single = Single(optimizer, type(self).__name__)
        options = Options(scaler, check_finite, process_group)
        super().__init__(single, tasks, "sequential", order, per_step, record, options)

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer, which updates the parameters."""
        return self._updater.base
