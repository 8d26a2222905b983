"""MultiTaskModule: a LightningModule whose optimizer is any of this package's.

It needs ``pip install lightning``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._frameworks import check_optimizer, connect, reduce_in_ddp, sum_losses

try:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: pip install lightning", name=error.name) from None

__all__ = ["MultiTaskModule"]


class MultiTaskModule(LightningModule):
    """A LightningModule that trains several tasks with an optimizer of this package.

    Write :meth:`losses` and ``configure_optimizers``; there is no ``training_step`` to write.
    Everything else is Lightning's own. ``accumulate_grad_batches`` averages each task's gradient
    over the batches that have its labels, and ``gradient_clip_val`` clips before each update. Each
    task's loss is logged as ``loss_<task>`` and their sum as ``loss``, which Lightning takes for
    the step's loss. On several devices choose ``strategy="ddp"``.

    Example:
        >>> import torch, lightning, mtlopt
        >>> from mtlopt.lightning import MultiTaskModule
        >>> class Module(MultiTaskModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(2, 2)
        ...     def configure_optimizers(self):
        ...         return mtlopt.PCGrad(torch.optim.Adam(self.parameters()), ("left", "right"))
        ...     def losses(self, tasks, batch):
        ...         left, right = self.network(batch).square().mean(0)
        ...         return {"left": left, "right": right}
    """

    def __init__(self) -> None:
        super().__init__()
        self._micro_batches: list[tuple[Any]] = []
        # Of one fit: the optimizer that was prepared, and what to call for the losses under DDP.
        # In a tuple, so that the wrapper does not become a submodule.
        self._prepared: tuple[MultiTaskOptimizer | None, nn.Module | None] = (None, None)

    def losses(
        self, tasks: Sequence[str], batch: Any
    ) -> Mapping[str, Tensor | tuple[Tensor, int] | None]:
        """Returns the losses of the tasks that the optimizer wants now; to be written by the user.

        Args:
            tasks: Names of the tasks.
            batch: One batch of the data loader, on the module's device.

        Returns:
            Mapping from task to a scalar loss, (loss, count) or None, as for the optimizer's
            ``step``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define losses(self, tasks, batch), which returns "
            "{task: loss for task in tasks}."
        )

    def log_losses(self, values: Mapping[str, Tensor]) -> None:
        """Logs what a step returned; to be overridden where other names are wanted.

        Args:
            values: The present tasks' losses, detached.
        """
        self.log_dict({f"loss_{task}": value for task, value in values.items()})
        if values:
            self.log("loss", sum_losses(values, self.device), prog_bar=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Keeps the batch; the zero that it returns becomes the sum of the losses in the step."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._micro_batches = []
        self._micro_batches.append((batch,))
        return torch.zeros((), device=self.device)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the optimizer takes the backward passes."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Steps on the batches that were kept, after the closure, which calls training_step."""
        strategy: Any = self.trainer.strategy
        # Nothing goes backward through Lightning's own wrapper.
        in_ddp = isinstance(strategy, DDPStrategy)
        with strategy.block_backward_sync() if in_ddp else nullcontext():
            reported = None if optimizer_closure is None else optimizer_closure()
        own = self._prepare(optimizer.optimizer)
        values = own.step(self._ask, micro_batches=self._micro_batches)
        self._micro_batches = []
        if reported is not None:
            # The tensor that Lightning hands on when the batch ends: only now is the loss known.
            reported.copy_(sum_losses(values, reported.device))
        self.log_losses(values)

    def _ask(self, tasks: Sequence[str], batch: Any) -> Any:
        wrapper = self._prepared[1]
        with self.trainer.precision_plugin.train_step_context():
            return self.losses(tasks, batch) if wrapper is None else wrapper(tasks, batch)

    def _prepare(self, optimizer: Optimizer) -> MultiTaskOptimizer:
        if optimizer is self._prepared[0]:
            return self._prepared[0]
        own = check_optimizer(optimizer, "configure_optimizers")
        strategy: Any = self.trainer.strategy
        ranks, wrapper = self.trainer.world_size, None
        if ranks > 1 and not isinstance(strategy, DDPStrategy):
            raise ValueError(
                'MultiTaskModule must run on one device or under Trainer(strategy="ddp"), '
                f"got {type(strategy).__name__}."
            )
        connect(own, self.trainer.scaler, self._before_update, ranks)
        if ranks > 1 and own._model_is_wrapped:
            wrapper = reduce_in_ddp(self, strategy.determine_ddp_device_ids())
        self._prepared = (own, wrapper)
        return own

    def _before_update(self, updating: Optimizer, args: Any, kwargs: Any) -> None:
        """Does before each update what Lightning does before the update of a plain optimizer."""
        trainer: Any = self.trainer
        for callback in trainer.callbacks:
            callback.on_before_optimizer_step(trainer, self, updating)
        self.on_before_optimizer_step(updating)
        self.configure_gradient_clipping(
            updating,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        )
