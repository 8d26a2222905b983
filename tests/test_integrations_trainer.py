"""mtlopt.transformers: each switch of the trainer does what a plain loop would do by hand."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import goods
import mtlopt
import reference
from frameworks import (
    METHODS,
    assert_same,
    forget_processes,
    load,
    run,
    train_plainly,
    train_trainer,
)
from goods import TASKS

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning: another folder here
]


def test_trainers_decay_groups_and_learning_rate_reach_every_task(tmp_path: Path) -> None:
    """Weights decay and biases do not, as in the reference with T optimizers."""
    switches: dict[str, Any] = {"weight_decay": 0.1, "learning_rate": 0.02, "max_grad_norm": 0.0}
    _, trained = train_trainer("independent", tmp_path, optim="adamw_torch", **switches)
    torch.manual_seed(0)
    goods.make_data(512)
    network = goods.Network()
    named = dict(network.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
    ]
    optimizers = {
        task: torch.optim.AdamW([dict(group) for group in groups], lr=0.02) for task in TASKS
    }
    for step, batch in enumerate(trained.batches):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 6)  # Trainer's default schedule, "linear"
        reference.independent(optimizers, partial(goods.evaluate, network), TASKS, batch)
    for name, value in trained.weights.items():
        torch.testing.assert_close(value, named[name].detach(), rtol=0, atol=1e-7)


def test_trainer_logs_the_mean_of_every_tasks_loss_and_a_norm(tmp_path: Path) -> None:
    trainer, trained = train_trainer("joint", tmp_path, logging_steps=3, learning_rate=0.0)
    logged = trainer.state.log_history
    assert [entry["step"] for entry in logged] == [3, 6, 6]
    network = trained.network
    for entry, first in zip(logged, (0, 3), strict=False):
        found = [goods.evaluate(network, TASKS, b) for b in trained.batches[first : first + 3]]
        means = {task: sum(f[task].item() for f in found) / 3 for task in TASKS}
        for task in TASKS:
            assert entry[f"loss_{task}"] == pytest.approx(means[task], rel=1e-5)
        assert entry["loss"] == pytest.approx(sum(means.values()), rel=1e-5)
        network.zero_grad()
        torch.stack(list(found[-1].values())).sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
        assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_trainer_evaluates_the_sum_of_the_losses(tmp_path: Path) -> None:
    switches: dict[str, Any] = {"per_device_eval_batch_size": 512, "label_names": list(TASKS)}
    trainer, trained = train_trainer("pcgrad", tmp_path, **switches)
    data = torch.utils.data.default_collate(trainer.eval_dataset)
    losses = goods.evaluate(trained.network, TASKS, data)
    expected = torch.stack(list(losses.values())).sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_trainer_evaluates_outputs_labels_and_every_tasks_loss(named: bool, tmp_path: Path) -> None:
    """Also where `label_names` does not list the targets, which are called as the tasks are."""
    given: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        given.append(prediction)
        return {"days": float(prediction.predictions[1].mean())}

    def prepare(trainer: Any) -> None:
        trainer.compute_metrics = measure

    switches: dict[str, Any] = {"label_names": list(TASKS)} if named else {}
    trainer, trained = train_trainer(
        "independent", tmp_path, prepare, per_device_eval_batch_size=64, **switches
    )
    metrics = trainer.evaluate()
    data = torch.utils.data.default_collate(trainer.eval_dataset)
    outputs = trained.network(data["inputs"], TASKS)
    losses = goods.evaluate(trained.network, TASKS, data)
    for task, output, label in zip(TASKS, given[0].predictions, given[0].label_ids, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), outputs[task].detach())
        assert torch.equal(torch.from_numpy(label), data[task])
        assert metrics[f"eval_loss_{task}"] == pytest.approx(losses[task].item(), rel=1e-5)
    assert metrics["eval_days"] == pytest.approx(outputs["days"].mean().item(), rel=1e-5)
    total = torch.stack(list(losses.values())).sum()
    assert metrics["eval_loss"] == pytest.approx(total.item(), rel=1e-5)
    predicted = trainer.predict(trainer.eval_dataset)
    assert [len(output) for output in predicted.predictions] == [512] * 3
    assert predicted.metrics["test_loss_sold"] == pytest.approx(metrics["eval_loss_sold"])


def test_trainer_averages_the_evaluated_losses_by_their_counts(tmp_path: Path) -> None:
    """Half of the batches lack labels of one task, and none has any of another."""

    def losses(model: Any, tasks: Any, inputs: Any) -> Any:
        found: dict[str, Any] = goods.evaluate(model, tasks, inputs)
        few = inputs["price"] > inputs["price"].median()
        count = int(few.sum()) if inputs["inputs"][0, 0] > 0 else 0
        labelled = (model(inputs["inputs"], ["price"])["price"] - inputs["price"])[few]
        counts.append((labelled.detach().square().mean().item(), count))
        return found | {"price": (labelled.square().mean(), count), "sold": None}

    counts: list[tuple[float, int]] = []
    trainer, _ = train_trainer("pcgrad", tmp_path, per_device_eval_batch_size=64)
    trainer.losses = losses
    metrics = trainer.evaluate()
    assert {count for _, count in counts} == {0, 32}
    expected = sum(value * count for value, count in counts) / sum(count for _, count in counts)
    assert metrics["eval_loss_price"] == pytest.approx(expected, rel=1e-5)
    assert "eval_loss_sold" not in metrics
    total = metrics["eval_loss_price"] + metrics["eval_loss_days"]
    assert metrics["eval_loss"] == pytest.approx(total)


def test_trainer_takes_an_optimizer_that_was_made_before(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    forget_processes()
    program: Any = load("trainer")
    network = goods.Network()
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, remove_unused_columns=False, use_cpu=True
    )
    optimizer = mtlopt.PCGrad(torch.optim.SGD(network.parameters(), lr=0.01), TASKS)
    trainer = program.GoodsTrainer(
        network, settings, train_dataset=goods.make_data(64), optimizers=(optimizer, None)
    )
    trainer.train()
    trainer.train()  # Once more: the optimizer comes back in Accelerate's wrapper.
    assert "conflict_fraction" in optimizer.diagnostics()


@pytest.mark.parametrize("method", METHODS)
def test_trainers_scaler_serves_float16(method: str, tmp_path: Path) -> None:
    """Trainer allows `fp16` on a GPU alone, so what Accelerate makes of it is set by hand."""

    def scale(trainer: Any) -> None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"

    switches: dict[str, Any] = {"learning_rate": 0.01, "lr_scheduler_type": "cosine"}
    trainer, trained = train_trainer(method, tmp_path, scale, max_steps=16, **switches)
    plain = train_plainly(trained.batches, "trainer", method, dtype=torch.float16)
    assert_same(trained.weights, plain.state_dict())
    assert trainer.accelerator.scaler.get_scale() < 65536  # The first gradients overflow.


@pytest.mark.parametrize("method", METHODS)
def test_trainers_checkpoint_loads_in_the_plain_optimizer(method: str, tmp_path: Path) -> None:
    trained = run("trainer", tmp_path, "--method", method)
    state = torch.load(tmp_path / "checkpoint-160" / "optimizer.pt", weights_only=True)
    from transformers import Trainer

    plain = Trainer(trained.network, args=trained.returned.args)
    goods.wrap(method, trained.network, plain.create_optimizer()).load_state_dict(state)
