"""A data set per task, in each framework, on two ranks, after a restart: as a plain loop does."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset, default_collate

import data_set_per_task as programs
import mtlopt
from frameworks import forget_processes
from problems import assert_equal, snapshot
from scripts import load_script
from spawned import start

pytestmark = [
    pytest.mark.slow,  # for the frameworks' imports
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning on a newer torch
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata on a newer torch
    pytest.mark.filterwarnings("ignore:find_unused_parameters"),  # DDP's hint, not ours
]
ROOT = Path(__file__).parents[1]
TASKS = ("kind", "size")
ROWS = {"kind": 20, "size": 7}
Batches = Mapping[str, Any]


class Network(nn.Module):
    """Takes inputs of two widths: an adapter per task, a trunk that both share, a head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"kind": nn.Linear(3, 5), "size": nn.Linear(4, 5)})
        self.trunk = nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.heads = nn.ModuleDict({"kind": nn.Linear(5, 3), "size": nn.Linear(5, 1)})
        self.double()

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {t: self.heads[t](self.trunk(self.adapters[t](x))) for t, x in inputs.items()}


def make() -> tuple[Network, dict[str, Any]]:
    """Returns a network and two data sets of unequal sizes, the same at every call."""
    torch.manual_seed(0)
    network = Network()
    kinds = torch.randn(ROWS["kind"], 3).double(), torch.randint(3, (ROWS["kind"],))
    sizes = torch.randn(ROWS["size"], 4).double(), torch.randn(ROWS["size"], 1).double()
    return network, {"kind": TensorDataset(*kinds), "size": TensorDataset(*sizes)}


def task_losses(model: Any, tasks: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """Returns the losses of the tasks that have a batch."""
    here = {task: batches[task] for task in tasks if batches.get(task) is not None}
    outputs = model({task: x for task, (x, _) in here.items()})
    criteria: dict[str, Any] = {"kind": cross_entropy, "size": mse_loss}
    return {task: criteria[task](outputs[task], y) for task, (_, y) in here.items()}


def train_plainly(seen: Sequence[Batches]) -> dict[str, Tensor]:
    """Trains with an Adam per task, by hand, on the batches that were seen."""
    network, _ = make()
    own = {task: Adam(network.parameters(), lr=0.01) for task in TASKS}
    for batches in seen:
        for task, optimizer in own.items():
            if batches.get(task) is not None:
                optimizer.zero_grad()
                task_losses(network, [task], batches)[task].backward()
                optimizer.step()
    return snapshot(network)


def recording(seen: list[Batches]) -> Callable[..., Any]:
    def losses(model: Any, tasks: Sequence[str], batches: Batches) -> dict[str, Tensor]:
        if not seen or seen[-1] is not batches:
            seen.append(batches)
        return task_losses(model, tasks, batches)

    return losses


@pytest.mark.parametrize(
    ("mode", "kinds", "sizes"),
    [("max_size_cycle", 5, 5), ("min_size", 2, 2), ("max_size", 5, 2)],
)
def test_lightnings_combined_loader_brings_a_batch_per_task(
    mode: Any, kinds: int, sizes: int
) -> None:
    """The smaller data set starts again, ends the epoch, or is absent from the rest of it."""
    import lightning
    from lightning.pytorch.utilities import CombinedLoader

    from mtlopt.lightning import MultiTaskModule

    network, data = make()
    seen: list[Batches] = []
    record = recording(seen)

    class Module(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def configure_optimizers(self) -> Any:
            return mtlopt.IndependentOptimizer(Adam, self.parameters(), TASKS, lr=0.01)

        def losses(self, tasks: Any, batch: Any) -> Any:
            return record(self.network, tasks, batch)

    loaders = {task: DataLoader(own, batch_size=4, shuffle=True) for task, own in data.items()}
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: Any = dict.fromkeys(switches, False)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    trainer.fit(Module(), CombinedLoader(loaders, mode))
    count = {t: sum(batches.get(t) is not None for batches in seen) for t in TASKS}
    assert count == {"kind": 2 * kinds, "size": 2 * sizes}
    assert_equal(snapshot(network), train_plainly(seen))


def test_trainer_takes_a_stack_of_the_data_sets(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from mtlopt.transformers import MultiTaskTrainer

    forget_processes()
    network, data = make()
    seen: list[Batches] = []
    record = recording(seen)

    class Losses(MultiTaskTrainer):
        def make_optimizer(self, optimizer: Any) -> Any:
            return mtlopt.IndependentOptimizer(Adam, network.parameters(), TASKS, lr=0.01)

        def losses(self, model: Any, tasks: Any, inputs: Any) -> Any:
            return record(model, tasks, inputs)

    longest = max(ROWS.values())
    cycled = {t: Subset(own, [i % len(own) for i in range(longest)]) for t, own in data.items()}
    settings = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4,
        max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    stack: Any = StackDataset(**cycled)
    Losses(network, settings, data_collator=default_collate, train_dataset=stack).train()
    assert len(seen) == 10
    assert_equal(snapshot(network), train_plainly(seen))


def test_accelerate_prepares_a_loader_per_task() -> None:
    from accelerate import Accelerator

    forget_processes()
    network, data = make()
    accelerator = Accelerator(cpu=True)
    optimizer = mtlopt.IndependentOptimizer(Adam, network.parameters(), TASKS, lr=0.01)
    made = [DataLoader(own, batch_size=4, shuffle=True) for own in data.values()]
    model, _, *prepared = accelerator.prepare(network, optimizer, *made)
    longer, shorter = prepared
    seen: list[Batches] = []
    record = recording(seen)
    for _ in range(2):
        for pair in zip(longer, cycle(shorter), strict=False):
            batches = dict(zip(TASKS, pair, strict=True))
            optimizer.step(lambda tasks, b: record(model, tasks, b), batches)
    assert len(seen) == 10
    assert_equal(snapshot(network), train_plainly(seen))


@pytest.mark.parametrize("framework", ["lightning", "trainer", "accelerate"])
def test_the_programs_of_the_page_take_a_step_per_batch_of_the_larger_set(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forget_processes()
    assert programs.PROGRAMS[framework]() == 2 * 20


def test_states_are_as_large_as_the_page_says() -> None:
    page = (ROOT / "docs/how-to/a-data-set-per-task.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert [int(count) for count, *_ in rows] == [1, 2, 4, 8]
    for count, trained, frozen in rows:
        assert state_bytes(int(count), frozen=False) == int(trained.replace(",", ""))
        assert state_bytes(int(count), frozen=True) == int(frozen.replace(",", ""))


def state_bytes(count: int, *, frozen: bool) -> int:
    tasks = [f"task {k}" for k in range(count)]
    trunk = nn.Linear(512, 512).requires_grad_(not frozen)
    adapters = nn.ModuleDict(
        {t: nn.Sequential(nn.Linear(512, 4), nn.Linear(4, 512)) for t in tasks}
    )
    optimizer = mtlopt.IndependentOptimizer(
        Adam, [*trunk.parameters(), *adapters.parameters()], tasks
    )
    x = torch.randn(8, 512)
    optimizer.step(lambda asked: {t: (trunk(x) + adapters[t](x)).square().mean() for t in asked})
    states = [state for own in optimizer.values() for state in own.state.values()]
    return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


# Restarts in the middle of an epoch.


def stateful_loader(data: Any) -> Any:
    """Returns a loader that saves its place; a generator given to itself would not be restored."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import RandomSampler

    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(0))
    return StatefulDataLoader(data, batch_size=3, sampler=sampler)


def stateful(data: Mapping[str, Any], saved: Batches) -> tuple[Iterator[Batches], Any]:
    """Yields a batch per task without end, and what saves the loaders' places."""
    loaders = {task: stateful_loader(own) for task, own in data.items()}
    for task, place in saved.items():
        loaders[task].load_state_dict(place)

    def forever(loader: Any) -> Iterator[Any]:
        while True:
            yield from loader

    sources = {task: forever(loader) for task, loader in loaders.items()}
    return ({t: next(source) for t, source in sources.items()} for _ in cycle([0])), loaders


def drawn_by_weight(data: Mapping[str, Any], saved: Batches) -> tuple[Iterator[Batches], Any]:
    """Yields one task's batch at a time, drawn by the data sets' sizes at temperature 2."""
    from torchdata.nodes import IterableWrapper, Loader, Mapper, MultiNodeWeightedSampler

    nodes = {
        task: Mapper(IterableWrapper(stateful_loader(own)), partial(named, task))
        for task, own in data.items()
    }
    weights = {task: len(own) ** 0.5 for task, own in data.items()}
    sampler = MultiNodeWeightedSampler(nodes, weights, stop_criteria="CYCLE_FOREVER", seed=1)
    loader = Loader(sampler)
    if saved:
        loader.load_state_dict(saved["all"])
    return iter(loader), {"all": loader}


def named(task: str, batch: Any) -> Batches:
    return {task: batch}


@pytest.mark.parametrize("source", [stateful, drawn_by_weight])
@pytest.mark.parametrize("method", ["independent", "pcgrad"])
def test_a_run_resumes_in_the_middle_of_an_epoch(method: str, source: Any) -> None:
    """Bit for bit: the loaders' places are saved beside the optimizer."""

    def prepare(saved: Mapping[str, Any]) -> tuple[Any, ...]:
        network, data = make()
        base = Adam(network.parameters(), lr=0.01)
        kind: Any = mtlopt.PCGrad if method == "pcgrad" else mtlopt.IndependentOptimizer
        return network, kind(base, TASKS), *source(data, saved)

    def train(network: Any, optimizer: Any, batches: Any, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda tasks, b: task_losses(network, tasks, b), next(batches))

    network, optimizer, batches, loaders = prepare({})
    train(network, optimizer, batches, 5)  # the smaller data set is in its second epoch
    saved = {name: loader.state_dict() for name, loader in loaders.items()}
    weights, state = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    train(network, optimizer, batches, 6)
    again, other, rest, _ = prepare(saved)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    train(again, other, rest, 6)
    assert_equal(snapshot(network), snapshot(again))


# Ranks.

METHODS = ("independent", "joint", "pcgrad")
PLANS: dict[str, list[tuple[tuple[str, ...], ...]]] = {
    "a task per rank": [(("kind",), ("size",))] * 3,
    "mixed": [(("kind",), ("size",)), (("kind",), ("kind", "size")), (("size",), ("size",))],
}


def rank_batches(plan: str, step: int, rank: int) -> Batches:
    _, data = make()
    rows = {t: range(3 * rank, 3 * rank + 3) for t in PLANS[plan][step][rank]}
    return {t: data[t][list(own)] for t, own in rows.items()}


def optimizer_of(method: str, network: Network, group: Any) -> Any:
    if method == "independent":
        return mtlopt.IndependentOptimizer(Adam, network.parameters(), TASKS, lr=0.01)
    kind: Any = mtlopt.PCGrad if method == "pcgrad" else mtlopt.JointOptimizer
    return kind(SGD(network.parameters(), lr=0.1), TASKS, process_group=group)


def counted(model: Any, tasks: Sequence[str], batches: Batches, dummies: bool) -> dict[str, Any]:
    """Returns losses with counts; in DDP a task without a batch goes forward all the same."""
    found: dict[str, Any] = {}
    for task in tasks:
        if task in batches:
            loss = task_losses(model, [task], batches)[task]
            found[task] = loss, len(batches[task][0])
        elif dummies:
            row = torch.zeros(1, 3 if task == "kind" else 4, dtype=torch.float64)
            found[task] = model({task: row})[task].sum() * 0, 0
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for method in METHODS:
        for plan in PLANS:
            network, _ = make()
            wrapped = method == "independent"
            model: Any = network
            if wrapped:
                model = DistributedDataParallel(network, find_unused_parameters=True)
            optimizer = optimizer_of(method, network, None if wrapped else dist.group.WORLD)
            for step in range(3):
                batches = rank_batches(plan, step, rank)
                optimizer.step(lambda tasks, b: counted(model, tasks, b, wrapped), batches)
            found[method, plan] = snapshot(network)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start(work, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("method", METHODS)
def test_ranks_with_different_tasks_are_one_process(
    method: str, plan: str, ranks: list[dict[Any, Any]]
) -> None:
    network, _ = make()
    optimizer = optimizer_of(method, network, None)
    for step in range(3):
        parts = [rank_batches(plan, step, rank) for rank in range(2)]
        names = [task for task in TASKS if any(task in part for part in parts)]
        joined = {}
        for task in names:
            own = [part[task] for part in parts if task in part]
            joined[task] = tuple(torch.cat(column) for column in zip(*own, strict=True))
        optimizer.step(lambda tasks, b: counted(network, tasks, b, False), joined)
    for rank in ranks:
        for name, weight in snapshot(network).items():
            torch.testing.assert_close(rank[method, plan][name], weight, rtol=0, atol=1e-10)


# Adapters.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*adapter.*:UserWarning")
def test_peft_adapters_take_the_step_of_a_plain_loop() -> None:
    """A frozen trunk with an adapter per task: an optimizer has states of its own adapter alone."""
    from peft import LoraConfig, get_peft_model

    def adapt() -> tuple[Any, dict[str, list[Any]]]:
        torch.manual_seed(0)
        base: Any = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = get_peft_model(base, config, adapter_name=TASKS[0])
        model.add_adapter(TASKS[1], config)
        for name, parameter in model.named_parameters():  # `set_adapter` freezes the other one
            parameter.requires_grad_("lora" in name)
        own = {t: [p for n, p in model.named_parameters() if f".{t}." in n] for t in TASKS}
        return model, own

    def loss_of(model: Any, task: str, x: Tensor) -> Tensor:
        model.set_adapter(task)
        loss: Tensor = (model(x) - TASKS.index(task)).square().mean()
        return loss

    x = torch.randn(6, 3)
    for forwards in (None, "per-task"):
        (model, own), (twin, plain) = adapt(), adapt()
        parameters = [p for part in own.values() for p in part]
        if forwards is None:
            independent = mtlopt.IndependentOptimizer(Adam, parameters, TASKS, lr=0.01)
            optimizer: Any = independent
        else:
            optimizer = mtlopt.PCGrad(Adam(parameters, lr=0.01), TASKS, forwards="per-task")
        adams = {t: Adam(part, lr=0.01) for t, part in plain.items()}
        for _ in range(3):
            optimizer.step(lambda tasks, x: {t: loss_of(model, t, x) for t in tasks}, x)
            for task, adam in adams.items():
                adam.zero_grad()
                loss_of(twin, task, x).backward()
                adam.step()
        for part, expected in zip(own.values(), plain.values(), strict=True):
            assert len(part) == 4
            for p, q in zip(part, expected, strict=True):
                assert torch.equal(p, q)
        if forwards is None:
            for task in TASKS:
                held = {id(p) for p in independent[task].state}
                assert held == {id(p) for p in own[task]}


def test_the_example_ends_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    program = load_script(ROOT / "examples/data_sets.py")
    table = program.main(["--steps", "150", "--seeds", "1"])
    assert list(table) == ["two single networks", "joint", "balanced", "independent"]
    for name, row in table.items():
        assert 0 < row["digit"] < 40, name  # chance has 90 % wrong
        assert 0 < row["middle"] < 90, name  # the mean has 100 % of the variance
    assert len(capsys.readouterr().out.splitlines()) == 5
