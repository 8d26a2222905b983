"""mtlopt.lightning: each switch of the trainer does what a plain loop would do by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import goods
import mtlopt
import problems
from frameworks import METHODS, STEPS, Run, assert_same, fit, load, run, train_plainly
from goods import TASKS

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning: another folder here
]


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
def test_lightning_counts_a_step_for_each_batch(method: str, tmp_path: Path) -> None:
    """However many tasks step: checkpoints' names and `max_steps` depend on this count."""
    trained = run("lightning", tmp_path, "--method", method)
    assert trained.returned.global_step == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch=19-step=160.ckpt",
        "epoch=9-step=80.ckpt",
    ]


@pytest.mark.parametrize("method", ["independent", "gradnorm"])
def test_lightning_stops_at_max_steps_and_counts_accumulated_batches_once(method: str) -> None:
    trained = fit(method, size=16, max_steps=5, accumulate_grad_batches=3)
    assert trained.returned.global_step == 5
    assert len(trained.batches) == 15
    plain = train_plainly(trained.batches, "lightning", method, accumulate=3)
    assert_same(trained.weights, plain.state_dict())


def test_lightning_steps_on_what_is_left_at_the_end_of_an_epoch() -> None:
    """8 batches in threes: 3, 3 and 2 in every epoch."""
    trained = fit("pcgrad", accumulate_grad_batches=3)
    assert trained.returned.global_step == 6
    torch.manual_seed(0)
    goods.make_data(512)
    network = goods.Network()
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    optimizer = mtlopt.PCGrad(adam, TASKS)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    for epoch in (trained.batches[:8], trained.batches[8:]):
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
            optimizer.step(
                lambda tasks, batch: goods.evaluate(network, tasks, batch),
                micro_batches=epoch[rows],
            )
            decay.step()
    assert_same(trained.weights, network.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_lightnings_clipping_bounds_each_update(method: str) -> None:
    trained = fit(method, gradient_clip_val=0.1)
    plain = train_plainly(trained.batches, "lightning", method, clip=0.1)
    assert_same(trained.weights, plain.state_dict())
    free = train_plainly(trained.batches, "lightning", method).state_dict()
    assert any(not torch.equal(value, free[name]) for name, value in trained.weights.items())


def test_lightnings_hooks_see_each_tasks_gradient_before_it_is_clipped() -> None:
    from lightning.pytorch.callbacks import Callback

    class Notes(Callback):
        norms: list[Tensor] = []  # noqa: RUF012  # one instance

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            given = [p.grad for p in module.parameters() if p.grad is not None]
            self.norms.append(torch.nn.utils.get_total_norm(given))

    trained = fit("independent", max_steps=1, gradient_clip_val=0.01, callbacks=[Notes()])
    torch.manual_seed(0)
    goods.make_data(512)
    network = goods.Network()
    # The first update is that of the first task: its gradient is at the weights of the start.
    goods.evaluate(network, TASKS[:1], trained.batches[0])[TASKS[0]].backward()
    given = [p.grad for p in network.parameters() if p.grad is not None]
    assert torch.equal(Notes.norms[0], torch.nn.utils.get_total_norm(given))
    assert len(Notes.norms) == 3
    assert min(Notes.norms) > 0.01


def test_lightning_logs_every_tasks_loss_and_schedules_by_its_own_switch() -> None:
    trained = fit("independent", log_every_n_steps=1)
    metrics = trained.returned.callback_metrics
    assert set(metrics) == {"loss", *(f"loss_{task}" for task in TASKS)}
    total = sum(metrics[f"loss_{task}"].item() for task in TASKS)
    assert metrics["loss"].item() == pytest.approx(total, rel=1e-6)
    assert set(trained.returned.progress_bar_metrics) == {"loss"}
    (group,) = trained.returned.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.01 * 0.997**16)


@pytest.mark.parametrize("method", [*METHODS, "balanced"])
def test_lightnings_scaler_serves_float16(method: str) -> None:
    """On a CPU the trainer turns 16-mixed into bfloat16, so the plugin is built here."""
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu")
    trained = fit(method, plugins=plugin, gradient_clip_val=1.0)
    plain = train_plainly(trained.batches, "lightning", method, dtype=torch.float16, clip=1.0)
    assert_same(trained.weights, plain.state_dict())
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 65536  # The first gradients overflow.


@pytest.mark.parametrize("method", ["independent", "gradnorm"])
def test_a_run_in_float16_resumes_with_its_scaler(method: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins import MixedPrecision

    def train(**switches: Any) -> tuple[Run, Any]:
        plugin: Any = MixedPrecision("16-mixed", "cpu")
        plugin.scaler = torch.amp.GradScaler("cpu", growth_interval=5)
        return fit(method, max_epochs=2, plugins=plugin, **switches), plugin.scaler

    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, scaler = train(callbacks=[save], enable_checkpointing=True)
    again = ModelCheckpoint(tmp_path / "again")
    first = tmp_path / "epoch=0.ckpt"
    resumed, other = train(callbacks=[again], enable_checkpointing=True, resume=first)
    assert len(resumed.batches) == 8
    assert scaler.state_dict() == other.state_dict()
    assert scaler.get_scale() != 65536
    assert_same(whole.weights, resumed.weights)


def test_losses_may_log_more_than_losses() -> None:
    """As the documentation says of an accuracy."""
    import lightning

    program: Any = load("lightning")

    class Module(program.Module):  # type: ignore[misc]  # loaded from a file
        def losses(self, tasks: Any, batch: Any) -> Any:
            self.log("seen", float(len(batch["inputs"])))
            return super().losses(tasks, batch)

    trained = fit("independent", module=lambda: Module("independent"), max_steps=1)
    assert isinstance(trained.returned, lightning.Trainer)
    assert trained.returned.callback_metrics["seen"] == 64


def training_step(self: Any, batch: Any, batch_idx: int) -> None:
    optimizer = self.optimizers()  # Lightning's wrapper, which counts
    optimizer.zero_grad()
    optimizer.backward(self.losses(TASKS, batch))
    optimizer.step()
    self.lr_schedulers().step()


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm"])
def test_lightnings_wrapper_serves_the_methods_that_combine(method: str) -> None:
    """The form of the documentation's page, in a module that is Lightning's own."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.network = goods.Network()

        def configure_optimizers(self) -> Any:
            adam = torch.optim.Adam(self.network.parameters(), lr=0.01)
            optimizer = goods.wrap(method, self.network, adam)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)]

        def losses(self, tasks: Any, batch: Any) -> Any:
            batches.append(batch)
            return goods.evaluate(self.network, tasks, batch)

    batches: list[dict[str, Tensor]] = []
    Module.training_step = training_step  # type: ignore[method-assign]  # a function of the page's
    trained = fit(method, module=Module)
    assert trained.returned.global_step == 16
    assert trained.returned.optimizers[0].diagnostics()
    assert_same(trained.weights, train_plainly(batches, "lightning", method).state_dict())


def test_what_an_interrupted_run_has_kept_is_dropped_by_the_next() -> None:
    program: Any = load("lightning")
    module = program.Module("pcgrad")
    module._trainer = SimpleNamespace(accumulate_grad_batches=3)
    for batch, number in (("left", 0), ("over", 1), ("new", 0)):
        module.training_step(batch, number)
    assert module._micro_batches == [("new",)]


# What Lightning has as the loss of a step.


def make_plain_module() -> Any:
    """Returns a module without this package, on the plain sum of the losses."""
    import lightning

    class Plain(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = goods.Network()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.network.parameters(), lr=0.01)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            first, second, third = goods.evaluate(self.network, TASKS, batch).values()
            return first + second + third

    return Plain()


def make_own_module(method: str) -> Any:
    """Returns the program's module without its scheduler, which the plain one lacks too."""
    program: Any = load("lightning")

    class Module(program.Module):  # type: ignore[misc]  # loaded from a file
        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()[0]

    return Module(method)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_callback_gets_the_sum_of_the_losses(accumulate: int) -> None:
    """Of all batches of a step at its last one, as Lightning's shares of a loss add up."""
    from lightning.pytorch.callbacks import Callback

    class Notes(Callback):
        def __init__(self) -> None:
            self.sums: list[float] = []

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.sums.append(arguments[2]["loss"].item())

    notes = {"own": Notes(), "plain": Notes()}
    modules = {"own": lambda: make_own_module("joint"), "plain": make_plain_module}
    for name, module in modules.items():
        switches: Any = {"module": module, "accumulate_grad_batches": accumulate}
        fit("joint", callbacks=[notes[name]], max_epochs=1, **switches)
    own, plain = (torch.tensor(notes[name].sums).view(-1, accumulate).sum(1) for name in notes)
    assert (plain > 0.1).all()
    torch.testing.assert_close(own, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["joint", "independent", "pcgrad"])
def test_the_learning_rate_finder_suggests_what_it_does_for_a_plain_module(
    method: str, tmp_path: Path
) -> None:
    import lightning
    from lightning.pytorch.tuner.tuning import Tuner

    def suggest(make: Any) -> float:
        torch.manual_seed(0)
        # The same batch at every step, or its noise would decide.
        batch = torch.utils.data.default_collate(goods.make_data(64))
        quiet: Any = dict.fromkeys(("logger", "enable_model_summary"), False)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet
        )
        batches: Any = [batch] * 100
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
        found: Any = Tuner(trainer).lr_find(make(), loader, update_attr=False)
        return float(found.suggestion())

    own, plain = suggest(lambda: make_own_module(method)), suggest(make_plain_module)
    # Three updates a batch, each as long as Adam's one: a third of the rate.
    steps = 3 if method == "independent" else 1
    factor = 1.0001 if method == "joint" else 1.5
    assert plain / factor < own * steps < plain * factor


def test_early_stopping_finds_a_loss_that_is_not_finite() -> None:
    from lightning.pytorch.callbacks import EarlyStopping

    program: Any = load("lightning")

    class Module(program.Module):  # type: ignore[misc]  # loaded from a file
        def losses(self, tasks: Any, batch: Any) -> Any:
            values = super().losses(tasks, batch)
            factor = float("nan") if self.global_step >= 10 else 1.0
            return {task: factor * value for task, value in values.items()}

    stop = EarlyStopping("loss", patience=100, check_on_train_epoch_end=True)
    trained = fit("pcgrad", module=lambda: Module("pcgrad"), max_epochs=9, callbacks=[stop])
    assert trained.returned.global_step == 16  # at the end of the second epoch


def test_lightnings_wrapper_measures_at_every_tenth_step_as_well() -> None:
    """It copies the optimizer's attributes, so that `backward` runs on a second object."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model, twin = problems.twins()
    optimizer, other = (
        mtlopt.Balanced(torch.optim.SGD(m.parameters(), lr=0.05), problems.TASKS, every=2)
        for m in (model, twin)
    )
    wrapped: Any = LightningOptimizer(optimizer)
    for x, y in problems.batches(5):
        wrapped.zero_grad()
        wrapped.backward(problems.make_losses(model)(problems.TASKS, x, y))
        optimizer.step()
        other.step(problems.make_losses(twin), x, y)
    assert optimizer.weights == other.weights
    problems.assert_equal(problems.snapshot(model), problems.snapshot(twin))
