"""mtlopt.lightning, mtlopt.transformers and Accelerate: each trains as a plain loop does."""

import doctest
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import goods
import mtlopt
from goods import TASKS
from spawned import start

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning: another folder here
]

FOLDER = Path(__file__).parents[1] / "examples" / "integrations"
METHODS = ["independent", "pcgrad", "gradnorm"]
EPOCHS, STEPS = 20, 160  # The programs save a checkpoint half way.
LENGTH = {
    "lightning": ["--epochs", str(EPOCHS)],
    "accelerate": ["--epochs", str(EPOCHS)],
    "trainer": ["--steps", str(STEPS)],
}
HALF = {"lightning": "epoch=9-step=80.ckpt", "accelerate": "10", "trainer": "checkpoint-80"}


@dataclass
class Run:
    """What one run of a program left behind."""

    returned: Any
    folder: Path
    batches: list[dict[str, Tensor]]

    @property
    def network(self) -> Any:
        """The trained network: a program returns it, or the trainer that holds it."""
        module = getattr(self.returned, "lightning_module", self.returned)
        return getattr(module, "network", getattr(module, "model", module))

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())


def load(framework: str) -> ModuleType:
    path = FOLDER / f"with_{framework}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module  # type: ignore[no-any-return]  # a module


def recording(batches: list[dict[str, Tensor]]) -> Any:
    """Returns `goods.evaluate`, which now keeps the batches that it is given, in their order."""

    def evaluate(model: Any, tasks: Any, batch: Any) -> Any:
        if not any(batch is seen for seen in batches[-4:]):
            batches.append(batch)
        return goods.evaluate(model, tasks, batch)

    return evaluate


def forget_processes() -> None:
    """Accelerate keeps one state for each process, as a rule; here there is one for each run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def run(framework: str, folder: Path, *arguments: str) -> Run:
    """Runs a program and records the batches that it trained on."""
    if framework != "lightning":
        forget_processes()
    program: Any = load(framework)
    batches: list[dict[str, Tensor]] = []
    program.evaluate = recording(batches)
    returned = program.main([*LENGTH[framework], "--folder", str(folder), *arguments])
    return Run(returned, folder, batches)


def train_plainly(
    batches: list[dict[str, Tensor]],
    framework: str,
    method: str,
    *,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    clip: float = 0.0,
) -> Any:
    """The same batches in a loop without the framework."""
    torch.manual_seed(0)
    goods.make_data(512)
    network = goods.Network()
    options: dict[str, Any] = {}
    if dtype == torch.float16:
        options["scaler"] = torch.amp.GradScaler("cpu")
    parameters = list(network.parameters())
    steps = len(batches) // accumulate
    if framework == "trainer":
        from transformers import get_scheduler

        # The defaults of TrainingArguments, but for the learning rate.
        base: Any = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, fused=True)
        optimizer = goods.wrap(method, network, base, **options)
        scheduler: Any = get_scheduler("cosine", optimizer, 0, steps)
        clip = 1.0
    else:
        base = torch.optim.Adam(parameters, lr=0.01)
        optimizer = goods.wrap(method, network, base, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    if clip:

        def bound(*_: Any) -> None:
            clip_grad_norm_(parameters, clip)

        optimizer.register_step_pre_hook(bound)

    def losses(tasks: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return goods.evaluate(network, tasks, batch)

    for i in range(0, len(batches), accumulate):
        optimizer.step(losses, micro_batches=batches[i : i + accumulate])
        scheduler.step()
    return network


def assert_same(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module", params=list(LENGTH))
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(framework: str, method: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(framework, tmp_path_factory.mktemp(framework), "--method", method)


# Each program.


def test_every_tasks_loss_falls(trained: Run) -> None:
    torch.manual_seed(0)
    data = torch.utils.data.default_collate(goods.make_data(512))
    before = goods.evaluate(goods.Network(), TASKS, data)
    after = goods.evaluate(trained.network, TASKS, data)
    for task in TASKS:
        assert after[task] < 0.9 * before[task], task


def test_each_epoch_sees_every_row_once(trained: Run) -> None:
    """The next test trains a plain loop on the batches that were recorded here."""
    assert len(trained.batches) == STEPS
    for first in range(0, STEPS, 8):
        rows = torch.cat([batch["inputs"] for batch in trained.batches[first : first + 8]])
        assert len(rows.unique(dim=0)) == 512


def test_the_weights_are_those_of_a_plain_loop(trained: Run, framework: str, method: str) -> None:
    """With Trainer's defaults: `max_grad_norm` is 1, around each task's update."""
    plain = train_plainly(trained.batches, framework, method)
    assert_same(trained.weights, plain.state_dict())


def test_a_resumed_run_equals_the_uninterrupted_one(
    trained: Run, framework: str, method: str, tmp_path: Path
) -> None:
    checkpoint = str(trained.folder / HALF[framework])
    resumed = run(framework, tmp_path, "--method", method, "--resume", checkpoint)
    assert len(resumed.batches) == STEPS // 2
    assert_same(trained.weights, resumed.weights)


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
@pytest.mark.parametrize("framework", list(LENGTH))
def test_micro_batches_are_averaged_before_the_step(
    framework: str, method: str, tmp_path: Path
) -> None:
    trained = run(framework, tmp_path, "--method", method, "--accumulate", "2")
    assert len(trained.batches) == 2 * STEPS
    plain = train_plainly(trained.batches, framework, method, accumulate=2)
    assert_same(trained.weights, plain.state_dict())


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
@pytest.mark.parametrize(
    ("framework", "precision"),
    [("lightning", "bf16-mixed"), ("accelerate", "bf16"), ("trainer", "bf16")],
)
def test_mixed_precision_is_that_of_a_plain_loop(
    framework: str, precision: str, method: str, tmp_path: Path
) -> None:
    """A cast of the weights must not outlive a task's step, nor reach the combination."""
    trained = run(framework, tmp_path, "--method", method, "--precision", precision)
    plain = train_plainly(trained.batches, framework, method, dtype=torch.bfloat16)
    assert_same(trained.weights, plain.state_dict())
    full = train_plainly(trained.batches, framework, method).state_dict()
    assert any(not torch.equal(value, full[name]) for name, value in trained.weights.items())


# Lightning's switches.


def fit(
    method: str,
    *,
    size: int = 64,
    optimizer: Any = None,
    module: Any = None,
    plugins: Any = None,
    callbacks: Any = (),
    resume: Path | None = None,
    **switches: Any,
) -> Run:
    """Trains the program's module with a trainer of the test's own."""
    import lightning
    from torch.utils.data import DataLoader

    program: Any = load("lightning")
    batches: list[dict[str, Tensor]] = []
    program.evaluate = recording(batches)
    torch.manual_seed(0)
    data = goods.make_data(512)
    module = program.Module(method) if module is None else module()
    if optimizer is not None:
        module.configure_optimizers = lambda: optimizer(module.parameters())
    switches = {"logger": False, "enable_checkpointing": False, "max_epochs": 2} | switches
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
        callbacks=list(callbacks),
        **switches,
    )
    trainer.fit(module, DataLoader(data, batch_size=size), ckpt_path=resume)
    return Run(trainer, Path(), batches)


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
def test_lightning_counts_a_step_for_each_batch(method: str, tmp_path: Path) -> None:
    """However many tasks step in it: names of checkpoints and `max_steps` go by this count."""
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
    """8 batches in threes: 3, 3 and 2, and the next epoch begins anew."""
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
    assert set(metrics) == {f"loss_{task}" for task in TASKS}
    (group,) = trained.returned.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.01 * 0.997**16)


@pytest.mark.parametrize("method", METHODS)
def test_lightnings_scaler_serves_float16(method: str) -> None:
    """The trainer turns 16-mixed on a CPU into bfloat16, so the plugin is made by hand."""
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


# Trainer's switches.


def train_trainer(
    method: str, folder: Path, prepare: Callable[[Any], None] | None = None, **switches: Any
) -> tuple[Any, Run]:
    from transformers import TrainingArguments

    forget_processes()
    program: Any = load("trainer")
    batches: list[dict[str, Tensor]] = []
    program.evaluate = recording(batches)
    torch.manual_seed(0)
    data = goods.make_data(512)
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
    }
    switches = defaults | switches
    settings = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **switches,
    )
    trainer = program.GoodsTrainer(goods.Network(), settings, train_dataset=data, eval_dataset=data)
    trainer.method = method
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer, Run(trainer, folder, batches)


def test_trainers_decay_groups_and_learning_rate_reach_every_task(tmp_path: Path) -> None:
    """Weights decay and biases do not, in T optimizers written out."""
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
        for task, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 6)  # Trainer's default schedule, "linear"
            network.zero_grad()
            goods.evaluate(network, (task,), batch)[task].backward()
            optimizer.step()
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


# What is missing is named.


def test_what_the_user_has_to_write_is_named(tmp_path: Path) -> None:
    from mtlopt.lightning import MultiTaskModule
    from mtlopt.transformers import MultiTaskTrainer

    class Module(MultiTaskModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Module must define losses\(self, tasks, batch"):
        Module().losses(TASKS, None)
    with pytest.raises(TypeError, match=r"`configure_optimizers` must return .*mtlopt\.PCGrad\("):
        fit("pcgrad", optimizer=torch.optim.Adam)
    forget_processes()
    trainer: Any = MultiTaskTrainer(goods.Network(), train_dataset=goods.make_data(8))
    with pytest.raises(NotImplementedError, match=r"must define make_optimizer\(self, optimizer"):
        trainer.train()
    with pytest.raises(NotImplementedError, match=r"must define losses\(self, model, tasks"):
        trainer.losses(None, TASKS, None)
    trainer.make_optimizer = lambda optimizer: optimizer
    with pytest.raises(TypeError, match="`make_optimizer` must return an optimizer of mtlopt"):
        trainer.train()


def test_what_an_interrupted_run_has_kept_is_dropped_by_the_next() -> None:
    program: Any = load("lightning")
    module = program.Module("pcgrad")
    module._trainer = SimpleNamespace(accumulate_grad_batches=3)
    for batch, number in (("left", 0), ("over", 1), ("new", 0)):
        module.training_step(batch, number)
    assert module._micro_batches == [("new",)]


def test_what_has_not_been_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    from mtlopt.transformers import MultiTaskTrainer

    program: Any = load("lightning")
    module = program.Module("pcgrad")
    module._trainer = SimpleNamespace(world_size=2, scaler=None, strategy=object())
    with pytest.raises(ValueError, match=r'under Trainer\(strategy="ddp"\), got object'):
        module._prepare(module.configure_optimizers()[0][0])
    forget_processes()
    trainer: Any = MultiTaskTrainer(goods.Network(), train_dataset=goods.make_data(8))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="on one device or under DDP, got FSDP"):
        trainer.create_optimizer()


@pytest.mark.parametrize("name", ["mtlopt.lightning", "mtlopt.transformers"])
def test_the_docstrings_example_runs(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


# Two processes.


def work(rank: int, folder: str) -> None:
    """Trains with each framework on one of two processes, which torchrun would have started."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    for method in METHODS:
        trained = fit(method, size=32, devices=2, strategy="ddp")
        found["lightning", method] = trained.batches, trained.weights
        torch.manual_seed(rank)  # On purpose: the ranks must come to agree.
        options: Any = {"max_grad_norm": 1.0, "learning_rate": 0.01, "lr_scheduler_type": "cosine"}
        _, trained = train_trainer(method, Path(folder), max_steps=16, **options)
        found["trainer", method] = trained.batches, trained.weights
        forget_processes()
        program: Any = load("accelerate")
        batches: list[dict[str, Tensor]] = []
        program.evaluate = recording(batches)
        network = program.main(["--method", method, "--epochs", "2", "--accumulate", "2"])
        found["accelerate", method] = batches, dict(network.state_dict())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank found, in one go: starting processes takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    start(work, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("framework", list(LENGTH))
def test_two_processes_are_one_with_the_joined_batch(
    framework: str, method: str, ranks: list[dict[Any, Any]]
) -> None:
    (first, weights), (second, others) = (rank[framework, method] for rank in ranks)
    assert_same(weights, others)
    joined = [
        {name: torch.cat([own[name], other[name]]) for name in own}
        for own, other in zip(first, second, strict=True)
    ]
    assert len(joined) == 16
    torch.set_default_dtype(torch.float64)
    accumulate = 2 if framework == "accelerate" else 1
    plain = train_plainly(joined, framework, method, accumulate=accumulate).state_dict()
    start = goods.Network().state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-8)
        assert not torch.equal(weight, start[name])
