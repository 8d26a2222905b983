"""AlternatingOptimizer: a step per task with one common state (eq. 2)."""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from mtlopt._base import Common
from mtlopt._losses import LossesFunction, ReadyLosses, Task, refuse_keywords
from mtlopt._sequential import Order, Record, SequentialOptimizer, refuse_closure
from mtlopt._wrapper import WrappedOptimizer


class _Turn:
    """The optimizer in one task's turn: a scaler takes one step per object and update."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self, *args: Any) -> Any:
        return self.optimizer.step(*args)


class AlternatingOptimizer(WrappedOptimizer, SequentialOptimizer):
    r"""Steps through the tasks in turn, all with one optimizer and its one state.

    For :math:`k = 1, \dots, T`:

    .. math:: w \leftarrow w - \eta \, g^{(k)}(w)

    Each gradient is taken at the weights that the previous task's step left. The optimizer's
    moments mix the gradients of all tasks; :class:`IndependentOptimizer` keeps them apart.

    Args:
        optimizer: Optimizer that takes every task's step; it owns the parameters.
        tasks: Names of the tasks; a tuple of names is a group, one objective with one step.
        order: "fixed" keeps the order of `tasks`, "shuffled" draws it anew each step from
            ``self.generator`` (seed 0; saved in the state dict).
        per_step: How many of the T tasks a step visits, so that it costs as many passes: all of
            them if None. They come from a shuffled cycle, each equally often; one that is absent
            from its batch has had its turn.
        record: "updates" has :meth:`diagnostics` say what each task's step moves; while a step
            lasts it costs T copies of the parameters that several tasks reach.
        scaler: Gradient scaler for float16; a task whose gradient overflows skips its own step.
        check_finite: Whether a loss that is not finite raises; it costs a synchronisation.
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
        check_finite: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._wrap(optimizer)
        common = Common(scaler, check_finite, process_group)
        super().__init__(tasks, self.base, order, per_step, record, common)
        self._turn = {task: cast(Optimizer, _Turn(self.base)) for task in self.tasks}

    def step(  # type: ignore[override]  # torch's closure is the keyword `closure` here
        self,
        losses: LossesFunction | ReadyLosses | None = None,
        *batch: Any,
        micro_batches: Iterable[Any] | None = None,
        closure: Any = None,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """Takes a step for every task that the batch has labels for, or `per_step` of them.

        Args:
            losses: Function ``losses(tasks, *batch)`` that returns a mapping from task to a scalar
                loss, (loss, count) or None; it is called once per task.
            *batch: Passed on to `losses`.
            micro_batches: Several batches to average over, in place of `batch`.
            closure: Not taken; here for torch's signature.
            **keywords: None: a batch goes by position.

        Returns:
            The present tasks' losses, detached scalars.

        Raises:
            TypeError: Without a function.
            ValueError: If a loss is not a scalar with a graph, or was not asked for. The earlier
                tasks have stepped then.
        """
        refuse_keywords(keywords)
        refuse_closure(closure)
        # Before any check: a line that is left over has no losses, and is no error.
        if losses is None and self._is_repeated():
            return {}
        self._check_function(losses)
        batches = self._batches(losses, batch, micro_batches)
        question = self._question(losses)
        values: dict[str, Tensor] = {}
        try:
            for task in self._turns():
                # Eq. 2: this task's gradient is taken where the previous task's step ended.
                gradient = partial(self._backward, question, task, batches)
                if present := gradient():
                    self._update(self._turn[task], task, present, gradient)
                values |= present
        finally:
            self._update_scaler()
        self._finish(values)
        return values
