"""Runs the examples with Lightning, Accelerate and Trainer, and the same training without them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import goods
from scripts import load_script

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
    return load_script(FOLDER / f"with_{framework}.py")  # type: ignore[no-any-return]  # a module


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
