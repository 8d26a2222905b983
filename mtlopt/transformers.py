"""MultiTaskTrainer: a Hugging Face Trainer whose optimizer is any of this package's.

It needs ``pip install transformers accelerate``.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt._frameworks import check_optimizer, connect, sum_losses
from mtlopt._gradients.losses import names_of

try:
    from accelerate.utils import DistributedType
    from transformers import Trainer
except ModuleNotFoundError as error:
    remedy = "pip install transformers accelerate"
    raise ModuleNotFoundError(f"{error}: {remedy}", name=error.name) from None

__all__ = ["MultiTaskTrainer"]


class MultiTaskTrainer(Trainer):
    """A Trainer that trains several tasks with an optimizer of this package.

    Write :meth:`losses` and :meth:`make_optimizer`, which wraps the optimizer that Trainer would
    have used. The ``TrainingArguments`` mean what they always do. ``gradient_accumulation_steps``
    averages each task's gradient over the batches that have its labels, and ``max_grad_norm`` clips
    before each update. The mean of each task's loss is logged as ``loss_<task>``; ``grad_norm`` is
    the largest of the last batch's updates.

    Set ``remove_unused_columns=False`` where the model's ``forward`` does not name the targets.
    ``evaluate()`` returns each task's loss as ``eval_loss_<task>`` and their sum as ``eval_loss``.
    ``compute_metrics`` and ``predict()`` get what the model returned while :meth:`losses` called
    it, and as labels the entries of the batch that ``label_names`` lists, or else those that are
    named after tasks. On several devices it runs under DDP, as Trainer does.

    Example:
        >>> import torch, mtlopt
        >>> from mtlopt.transformers import MultiTaskTrainer
        >>> class MyTrainer(MultiTaskTrainer):
        ...     def make_optimizer(self, optimizer):
        ...         return mtlopt.PCGrad(optimizer, ("left", "right"))
        ...     def losses(self, model, tasks, inputs):
        ...         left, right = model(inputs["x"]).square().mean(0)
        ...         return {"left": left, "right": right}
    """

    def losses(
        self, model: nn.Module, tasks: Sequence[str], inputs: Any
    ) -> Mapping[str, Tensor | tuple[Tensor, int] | None]:
        """Returns the losses of the tasks that are wanted now; to be written by the user.

        Args:
            model: The model to call, which may be a wrapper of yours.
            tasks: Names of the tasks.
            inputs: One batch of the collator, on the model's device.

        Returns:
            Mapping from task to a scalar loss, (loss, count) or None, as for the optimizer's
            ``step``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define losses(self, model, tasks, inputs), which returns "
            "{task: loss for task in tasks}."
        )

    def make_optimizer(self, optimizer: Optimizer) -> MultiTaskOptimizer:
        """Wraps the optimizer that Trainer made; to be written by the user.

        Not called where ``Trainer(optimizers=...)`` brings one of this package.

        Args:
            optimizer: Plain optimizer with the groups and options of the ``TrainingArguments``.

        Returns:
            One of this package's optimizers.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define make_optimizer(self, optimizer), such as "
            "`return mtlopt.PCGrad(optimizer, tasks)`."
        )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Returns what :meth:`make_optimizer` makes of Trainer's optimizer, ready for training."""
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(
                f"MultiTaskTrainer must run on one device or under DDP, got {kind.value}."
            )
        self._micro_batches: list[tuple[Any]] = []
        self._values: list[Mapping[str, Tensor]] = []
        self._norms: list[Tensor] = []
        made = inner_of(super().create_optimizer(model))
        if isinstance(made, MultiTaskOptimizer):
            own = made
        else:
            own = check_optimizer(self.make_optimizer(made), "make_optimizer")
            self.optimizer = own
        if own is not getattr(self, "_own", None):
            self._own = own
            connect(own, self.accelerator.scaler, self._before_update, self.args.world_size)
        return own

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Steps on the last batch of an accumulation, and returns the sum of the losses.

        `num_items_in_batch` is not used: :meth:`losses` returns ``(loss, count)`` where it matters.
        """
        model.train()
        self._micro_batches.append((self._prepare_inputs(inputs),))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self._own.train()  # for classes with modes (schedule-free)
        if not self._own._model_is_wrapped:
            model = self.accelerator.unwrap_model(model)
        self._norms = []
        values = self._own.step(partial(self._ask, model), micro_batches=self._micro_batches)
        self._micro_batches = []
        self._values.append(values)
        # The step has been taken: nothing is left to clip, and Accelerate's wrapper passes over
        # the `step()` that follows, as over one in the middle of an accumulation.
        self._own.zero_grad()
        self.accelerator.sync_gradients = False
        return sum_losses(values, self.args.device)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluates as Trainer does; the metrics gain each task's loss, averaged by count."""
        if not hasattr(self, "_own"):  # before any training
            self.create_optimizer()
        self._evaluated: dict[str, list[Tensor]] = {}
        keys = (prediction_loss_only, ignore_keys, metric_key_prefix)
        output: Any = super().evaluation_loop(dataloader, description, *keys)
        found = {}
        for task in names_of(*self._own.tasks):
            own = sum(self._evaluated.get(task, []), torch.zeros(2, device=self.args.device))
            total, count = self.accelerator.reduce(own).tolist()
            if count:
                found[task] = total / count
        prefix = f"{metric_key_prefix}_loss"
        metrics: Any = output.metrics
        metrics[prefix] = sum(found.values())
        metrics.update({f"{prefix}_{task}": value for task, value in found.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Returns the sum of the losses on a batch, the model's outputs and the labels."""
        inputs, tasks = self._prepare_inputs(inputs), names_of(*self._own.tasks)
        returned: list[Any] = []
        hook = model.register_forward_hook(lambda module, given, output: returned.append(output))
        try:
            with torch.no_grad():
                found = self._ask(model, tasks, inputs)
        finally:
            hook.remove()
        values = {}
        for task, loss in found.items():
            value, count = loss if isinstance(loss, tuple) else (loss, 1)
            if value is not None and count:
                values[task] = value
                pair = torch.stack([value.float() * count, torch.full_like(value.float(), count)])
                self._evaluated.setdefault(task, []).append(pair)
        total = sum_losses(values, self.args.device)
        if prediction_loss_only:
            return total, None, None
        ignored = {"loss", *(ignore_keys or ())}
        outputs: list[Any] = []
        for output in returned:
            if isinstance(output, Mapping):
                outputs += [value for key, value in output.items() if key not in ignored]
            else:
                outputs += output if isinstance(output, (tuple, list)) else [output]
        names = self.label_names or tasks
        labels = [inputs[name] for name in names if inputs.get(name) is not None]
        return total, _single(outputs), _single(labels)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the mean of each task's loss since the last call too."""
        if "loss" in logs:
            if self._norms:
                logs["grad_norm"] = torch.stack(self._norms).max().item()
            for task in dict.fromkeys(task for values in self._values for task in values):
                own = [values[task] for values in self._values if task in values]
                logs[f"loss_{task}"] = torch.stack(own).mean().item()
            self._values = []
        super().log(logs, *args, **kwargs)

    def _ask(self, model: nn.Module, tasks: Sequence[str], inputs: Any) -> Any:
        with self.compute_loss_context_manager():
            return self.losses(model, tasks, inputs)

    def _before_update(self, updating: Optimizer, args: Any, kwargs: Any) -> None:
        model: Any = self.model
        given = [p for p in model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in given if p.grad is not None])
        if self.args.max_grad_norm:
            clip_grads_with_norm_(given, self.args.max_grad_norm, norm)
        self._norms.append(norm)


def inner_of(optimizer: Any) -> Any:
    """Returns the optimizer behind Accelerate's wrapper, if there is one."""
    while not isinstance(optimizer, MultiTaskOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _single(found: Sequence[Any]) -> Any:
    """Returns what Trainer collects: one thing, a tuple of several, or None."""
    return (found[0] if len(found) == 1 else tuple(found)) if found else None
