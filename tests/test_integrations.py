"""mtlopt.lightning, mtlopt.transformers and Accelerate: each trains as a plain loop does."""

import doctest
import importlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import goods
from frameworks import (
    HALF,
    LENGTH,
    METHODS,
    STEPS,
    Run,
    assert_same,
    fit,
    forget_processes,
    load,
    recording,
    run,
    train_plainly,
    train_trainer,
)
from goods import TASKS
from spawned import start

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # Lightning: another folder here
]


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
