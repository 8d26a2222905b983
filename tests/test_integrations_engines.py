"""Loops that others own: ignite, MONAI, Fabric and Accelerate take the optimizers as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch

import all_methods
import goods
import mtlopt
from frameworks import assert_same, forget_processes
from goods import TASKS
from problems import TASKS as LETTERS
from problems import Network, assert_equal, make_losses, snapshot, twins
from problems import batches as draw

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore::DeprecationWarning:monai"),
    pytest.mark.filterwarnings("ignore::FutureWarning:monai"),
]
SEQUENTIAL = ["independent", "pcgrad"]


def prepare(method: str) -> tuple[Any, Any, list[Any]]:
    """Returns the goods' network, its optimizer and its batches, the same at every call."""
    torch.manual_seed(0)
    data = goods.make_data(256)
    network = goods.Network()
    optimizer = goods.wrap(method, network, torch.optim.Adam(network.parameters(), lr=0.01))
    loader: Any = torch.utils.data.DataLoader(data, batch_size=32)
    return network, optimizer, list(loader)


def train_plainly(method: str) -> Any:
    """Trains for two epochs, with a schedule and without an engine."""
    network, optimizer, batches = prepare(method)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    for batch in 2 * batches:
        optimizer.step(lambda tasks, batch: goods.evaluate(network, tasks, batch), batch)
        schedule.step()
    return network


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_ignite_trains_saves_and_resumes_as_the_plain_loop(method: str, tmp_path: Path) -> None:
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    def run(epochs: int, resume: Path | None = None) -> Any:
        network, optimizer, batches = prepare(method)

        def update(engine: Engine, batch: Any) -> Any:
            return optimizer.step(lambda tasks, b: goods.evaluate(network, tasks, b), batch)

        trainer = Engine(update)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)

        @trainer.on(Events.ITERATION_COMPLETED)
        def follow() -> None:  # `schedule.step` itself would be given the engine
            schedule.step()

        parts: Any = {"network": network, "optimizer": optimizer, "schedule": schedule}
        parts["trainer"] = trainer
        saver = Checkpoint(parts, DiskSaver(str(tmp_path), require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, saver)
        if resume is not None:
            Checkpoint.load_objects(parts, torch.load(resume, weights_only=True))
        trainer.run(batches, max_epochs=epochs)
        return network

    expected = train_plainly(method).state_dict()
    assert_same(run(2).state_dict(), expected)
    first = tmp_path / "checkpoint_8.pt"
    assert_same(run(2, first).state_dict(), expected)


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_monais_trainer_takes_the_step_as_its_iteration(method: str) -> None:
    from ignite.engine import Events
    from monai.engines import SupervisedTrainer
    from monai.handlers import LrScheduleHandler

    network, optimizer, batches = prepare(method)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)

    def update(engine: Any, batch: Any) -> dict[str, Any]:
        # MONAI wants `loss` in what an iteration returns.
        values = engine.optimizer.step(lambda t, b: goods.evaluate(engine.network, t, b), batch)
        return {"loss": sum(values.values()).item(), **values}

    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=2,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=lambda *_: None,  # not called
        iteration_update=update,
        decollate=False,
    )
    assert trainer.optimizer is optimizer
    handler = LrScheduleHandler(schedule, print_lr=False, epoch_level=False)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.run()
    assert_same(network.state_dict(), train_plainly(method).state_dict())


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_fabric_prepares_the_model_and_the_loader(method: str, tmp_path: Path) -> None:
    """And saves and loads the optimizer with them."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    network, optimizer, batches = prepare(method)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    model = fabric.setup(network)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for epoch in range(3):
        if epoch == 1:
            fabric.save(tmp_path / "run.ckpt", state)
        if epoch == 2:  # the second epoch once more
            fabric.load(tmp_path / "run.ckpt", state)
        for batch in batches:
            optimizer.step(lambda tasks, batch: goods.evaluate(model, tasks, batch), batch)
            schedule.step()
    assert_same(network.state_dict(), train_plainly(method).state_dict())


@pytest.mark.parametrize("method", all_methods.ONE_STEP)
def test_fabrics_wrapper_serves_the_imperative_form(method: str) -> None:
    """It has the optimizer's class but not its attributes, which it looks up in the optimizer."""
    from lightning.fabric import Fabric

    model, twin = twins()
    own, other = all_methods.make_for(model, method), all_methods.make_for(twin, method)
    wrapped = Fabric(accelerator="cpu", devices=1).setup_optimizers(own)
    for x, y in draw(3):
        for network, optimizer in ((model, wrapped), (twin, other)):
            optimizer.zero_grad()
            optimizer.backward(make_losses(network)(LETTERS, x, y))
            optimizer.step()
    assert_equal(snapshot(model), snapshot(twin))


@all_methods.every_method
def test_a_class_hides_no_attribute_of_its_optimizers(method: str) -> None:
    """A wrapper that borrows the class would find the class's value first."""
    optimizer = all_methods.make_for(Network(), method)
    options = {"schedule", "_forwards", "_model_is_wrapped"}  # read in `step`, which is not wrapped
    hidden = {name for name in vars(optimizer) for c in type(optimizer).__mro__ if name in vars(c)}
    assert hidden <= (options if method in all_methods.INDEPENDENT else set())


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_helpers_that_rebuild_mappings_leave_an_optimizer_alone(method: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import send_to_device
    from ignite.utils import apply_to_type
    from lightning.fabric import Fabric
    from lightning_utilities.core.apply_func import apply_to_collection
    from monai.utils import convert_to_tensor

    network, optimizer, _ = prepare(method)
    assert send_to_device(optimizer, "cpu") is optimizer
    assert apply_to_collection([optimizer], torch.Tensor, lambda x: x + 1)[0] is optimizer
    assert convert_to_tensor(optimizer) is optimizer
    kind: Any = mtlopt.MultiTaskOptimizer
    assert apply_to_type(optimizer, kind, lambda found: found) is optimizer
    assert Fabric(accelerator="cpu", devices=1).setup(network, optimizer)[1].optimizer is optimizer
    forget_processes()
    prepared: Any = Accelerator(cpu=True).prepare(optimizer)
    assert prepared.optimizer is optimizer
    assert optimizer.tasks == TASKS
