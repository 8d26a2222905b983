"""examples/integrations: each framework trains as a plain loop does, and resumes exactly."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning: another folder here
]

FOLDER = Path(__file__).parents[1] / "examples" / "integrations"
METHODS = ["independent", "joint", "pcgrad", "gradnorm"]
TASKS = ("price", "days", "sold")
EPOCHS, STEPS = 20, 160  # The programs save a checkpoint half way.
LENGTH = {
    "lightning": ["--epochs", str(EPOCHS)],
    "accelerate": ["--epochs", str(EPOCHS)],
    "trainer": ["--steps", str(STEPS)],
}
HALF = {
    "lightning": "epoch=9-step=80.ckpt",
    "accelerate": "10",
    "trainer": "checkpoint-80",
}


@dataclass
class Run:
    """What one run of a program left behind."""

    program: ModuleType
    returned: Any
    folder: Path
    batches: list[dict[str, Tensor]]

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(network_of(self.returned).state_dict())


def network_of(returned: Any) -> Any:
    """Returns the trained network: a program returns it, or the trainer that holds it."""
    module = getattr(returned, "lightning_module", returned)
    return getattr(module, "network", module)


def load(framework: str) -> ModuleType:
    path = FOLDER / f"with_{framework}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(framework: str, folder: Path, *arguments: str) -> Run:
    """Runs a program and records the batches that it trained on, in their order."""
    if framework != "lightning":
        from accelerate.state import AcceleratorState

        # One for each process, as a rule; here one for each run.
        AcceleratorState._reset_state(reset_partial_state=True)
    program = load(framework)
    evaluate = program.evaluate
    batches: list[dict[str, Tensor]] = []

    def recording(model: Any, tasks: Any, batch: Any) -> Any:
        if len(batch["inputs"]) < 512 and not any(batch is seen for seen in batches[-4:]):
            batches.append(batch)
        return evaluate(model, tasks, batch)

    program.evaluate = recording  # type: ignore[attr-defined]  # the program's own function
    returned = program.main([*LENGTH[framework], "--folder", str(folder), *arguments])
    program.evaluate = evaluate  # type: ignore[attr-defined]  # as above
    return Run(program, returned, folder, batches)


def train_plainly(
    trained: Run,
    framework: str,
    method: str,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The same data in a loop without the framework."""
    program = trained.program
    torch.manual_seed(0)
    program.make_data(512)
    network = program.Network()
    scaler = [torch.amp.GradScaler("cpu")] if dtype == torch.float16 else []
    optimizer = program.make_optimizer(method, network, *scaler)
    scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.997)
    if framework == "trainer":
        from transformers import get_scheduler

        scheduler = get_scheduler("cosine", optimizer, 0, STEPS)

    def losses(tasks: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return program.evaluate(network, tasks, batch)

    for i in range(0, len(trained.batches), accumulate):
        optimizer.step(losses, micro_batches=trained.batches[i : i + accumulate])
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


def test_every_tasks_loss_falls(trained: Run, method: str) -> None:
    program = trained.program
    torch.manual_seed(0)
    data = torch.utils.data.default_collate(program.make_data(512))
    before = program.evaluate(program.Network(), program.TASKS, data)
    after = program.evaluate(network_of(trained.returned), program.TASKS, data)
    assert list(after) == ["price", "days", "sold"]
    for task in after:
        assert after[task] < 0.8 * before[task], task


def test_each_epoch_sees_every_row_once(trained: Run) -> None:
    """The next test trains a plain loop on the batches that were recorded here."""
    assert len(trained.batches) == STEPS
    for start in range(0, STEPS, 8):
        rows = torch.cat([batch["inputs"] for batch in trained.batches[start : start + 8]])
        assert len(rows.unique(dim=0)) == 512


def test_the_weights_are_those_of_a_plain_loop(trained: Run, framework: str, method: str) -> None:
    plain = train_plainly(trained, framework, method)
    assert_same(trained.weights, plain.state_dict())


def test_a_resumed_run_equals_the_uninterrupted_one(
    trained: Run, framework: str, method: str, tmp_path: Path
) -> None:
    checkpoint = str(trained.folder / HALF[framework])
    resumed = run(framework, tmp_path, "--method", method, "--resume", checkpoint)
    assert len(resumed.batches) == STEPS // 2
    assert_same(trained.weights, resumed.weights)


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
@pytest.mark.parametrize("framework", ["accelerate", "trainer"])
def test_micro_batches_are_averaged_before_the_step(
    framework: str, method: str, tmp_path: Path
) -> None:
    trained = run(framework, tmp_path, "--method", method, "--accumulate", "2")
    assert len(trained.batches) == 2 * STEPS
    plain = train_plainly(trained, framework, method, accumulate=2)
    assert_same(trained.weights, plain.state_dict())


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
@pytest.mark.parametrize(
    ("framework", "precision"), [("lightning", "bf16-mixed"), ("accelerate", "bf16")]
)
def test_mixed_precision_is_that_of_a_plain_loop(
    framework: str, precision: str, method: str, tmp_path: Path
) -> None:
    """A cast of the weights must not outlive a task's step, nor reach the combination."""
    trained = run(framework, tmp_path, "--method", method, "--precision", precision)
    plain = train_plainly(trained, framework, method, dtype=torch.bfloat16)
    assert_same(trained.weights, plain.state_dict())
    full = train_plainly(trained, framework, method).state_dict()
    assert any(not torch.equal(value, full[name]) for name, value in trained.weights.items())


@pytest.mark.parametrize("method", METHODS)
def test_lightning_counts_a_step_for_each_batch(method: str, tmp_path: Path) -> None:
    """However many tasks step in it: names of checkpoints and `max_steps` go by this count."""
    trained = run("lightning", tmp_path, "--method", method)
    assert trained.returned.global_step == STEPS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch=19-step=160.ckpt",
        "epoch=9-step=80.ckpt",
    ]


def training_step(self: Any, batch: Any, batch_idx: int) -> None:
    optimizer = self.optimizers()  # Lightning's wrapper, which counts
    optimizer.zero_grad()
    optimizer.backward(self.losses(TASKS, batch))
    optimizer.step()
    self.lr_schedulers().step()


def fit_lightning(method: str, step: Any = None, **options: Any) -> tuple[ModuleType, Any]:
    """Trains the program's module with a trainer of the test's own."""
    import lightning

    program = load("lightning")
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(program.make_data(512), batch_size=64)
    if step is not None:
        program.Module.training_step = step
    module = program.Module(method)
    trainer = lightning.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, loader)
    return program, module


def test_lightning_stops_at_max_steps() -> None:
    _, module = fit_lightning("independent", max_steps=3)
    assert module.trainer.global_step == 3
    first = module.network.trunk[0].weight
    for own in module.optimizers(use_pl_optimizer=False).values():
        assert own.state[first]["step"] == 3


@pytest.mark.parametrize("method", ["joint", "pcgrad", "gradnorm"])
def test_lightnings_wrapper_serves_the_methods_that_combine(method: str) -> None:
    """The form of the documentation's page: no counter of Lightning's is touched."""
    program, module = fit_lightning(method, training_step, max_epochs=2)
    assert module.trainer.global_step == 16
    seen = module.optimizers(use_pl_optimizer=False).diagnostics()
    assert bool(seen) == (method != "joint")
    torch.manual_seed(0)
    batches = list(torch.utils.data.DataLoader(program.make_data(512), batch_size=64))
    plain = train_plainly(Run(program, module, Path(), 2 * batches), "lightning", method)
    assert_same(dict(module.network.state_dict()), plain.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_lightnings_scaler_serves_float16(method: str) -> None:
    """The trainer turns 16-mixed on a CPU into bfloat16, so the plugin is made by hand."""
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu")
    program, module = fit_lightning(method, max_epochs=2, plugins=plugin)
    torch.manual_seed(0)
    batches = list(torch.utils.data.DataLoader(program.make_data(512), batch_size=64))
    trained = Run(program, module, Path(), 2 * batches)
    plain = train_plainly(trained, "lightning", method, dtype=torch.float16)
    assert_same(trained.weights, plain.state_dict())
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() < 65536  # The first gradients overflow.


def test_trainer_logs_every_tasks_loss(tmp_path: Path) -> None:
    logged = run("trainer", tmp_path).returned.state.log_history
    assert [entry["step"] for entry in logged] == [80, 160, 160]
    for entry in logged:
        assert entry.keys() >= {"loss_price", "loss_days", "loss_sold"}


@pytest.mark.parametrize("method", METHODS)
def test_trainers_checkpoint_loads_in_the_plain_optimizer(method: str, tmp_path: Path) -> None:
    trained = run("trainer", tmp_path, "--method", method)
    state = torch.load(tmp_path / "checkpoint-160" / "optimizer.pt", weights_only=True)
    program = load("accelerate")
    program.make_optimizer(method, network_of(trained.returned)).load_state_dict(state)
