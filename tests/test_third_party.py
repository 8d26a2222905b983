"""Optimizers from other packages, under every kind of method, against the reference.

The classes of `test_independent.py` (Lion, Prodigy and schedule-free AdamW under
`IndependentOptimizer`) come here with schedulers, files and wrappers.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import schedulefree
import torch
from pytorch_optimizer import SAM, SOAP, Adan, Lion, Lookahead, Prodigy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

import mtlopt
import reference
from problems import TASKS, Network, assert_equal, batches, make_losses, snapshot, twins
from round_trips import by_file

STEPS, SAVED_AFTER = 10, 6
Factory = Callable[..., Optimizer]


def soap(params: Any, lr: float) -> Optimizer:
    """Shampoo's eigenbases in state and groups; often enough to change within ten steps."""
    return SOAP(params, lr=lr, precondition_frequency=3)


def safeguarded_prodigy(params: Any, lr: float) -> Optimizer:
    return Prodigy(params, lr=lr, safeguard_warmup=True)


def transformers_adafactor(params: Any, lr: float) -> Optimizer:
    module = pytest.importorskip("transformers.optimization")
    optimizer: Optimizer = module.Adafactor(params, lr=lr, relative_step=False, beta1=0.9)
    return optimizer


def relative_adafactor(params: Any, lr: float) -> Optimizer:
    """Works out its own rate in each step."""
    module = pytest.importorskip("transformers.optimization")
    optimizer: Optimizer = module.Adafactor(params, warmup_init=True)
    return optimizer


FACTORIES: dict[str, Factory] = {
    "Adan": Adan,
    "Lion": Lion,
    "Prodigy": safeguarded_prodigy,
    "SOAP": soap,
    "Adafactor": transformers_adafactor,
}
FREE: dict[str, Factory] = {
    "AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "SGDScheduleFree": schedulefree.SGDScheduleFree,
}
WRAPPERS: dict[str, Any] = {
    "joint": mtlopt.JointOptimizer,
    "alternating": mtlopt.AlternatingOptimizer,
    "pcgrad": mtlopt.PCGrad,
}
METHODS = ("independent", *WRAPPERS)


def make(method: str, factory: Factory, model: nn.Module, lr: float = 0.02) -> Any:
    if method == "independent":
        return mtlopt.IndependentOptimizer(factory, model.parameters(), TASKS, lr=lr)
    return WRAPPERS[method](factory(model.parameters(), lr=lr), TASKS)


def scheduler_of(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, gamma=0.9)


def gradient_of(optimizer: Optimizer, *_: Any) -> list[Tensor | None]:
    """A copy, since some classes write over the gradient in their step."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [grad if grad is None else grad.clone() for grad in grads]


def compare(
    method: str,
    factory: Factory,
    *,
    scheduled: bool = True,
    free: bool = False,
    network: Callable[[], Any] = Network,
) -> None:
    """Ten steps beside the plain loop; after six a fresh optimizer goes on from a file."""
    model, expected = network(), network()
    expected.load_state_dict(model.state_dict())
    optimizer = make(method, factory, model)
    count = len(TASKS) if method == "independent" else 1
    plain = [factory(expected.parameters(), lr=0.02) for _ in range(count)]
    plain_step: Any = {
        "independent": partial(reference.independent, dict(zip(TASKS, plain, strict=False))),
        "joint": partial(reference.joint, plain[0]),
        "alternating": partial(reference.alternating, plain[0]),
    }.get(method)
    schedulers = [scheduler_of(own) for own in (optimizer, *plain)] if scheduled else []
    for own in (optimizer, *plain) if free else ():
        own.train()
    for index, (x, y) in enumerate(batches(STEPS)):
        if index == SAVED_AFTER:
            state = by_file([optimizer.state_dict(), *(s.state_dict() for s in schedulers)])
            optimizer = make(method, factory, model, lr=0.3)
            schedulers[:1] = [scheduler_of(optimizer)] if scheduled else []
            optimizer.load_state_dict(state[0])
            for scheduler, saved in zip(schedulers[:1], state[1:2], strict=True):
                scheduler.load_state_dict(saved)
        seen: list[list[Tensor | None]] = []
        hook = optimizer.register_step_pre_hook(lambda *args: seen.append(gradient_of(*args)))
        optimizer.step(make_losses(model), x, y)
        hook.remove()
        if method == "pcgrad":
            # PCGrad's arithmetic has tests of its own; here the gradient is taken as it comes.
            (gradient,) = seen
            for parameter, own in zip(expected.parameters(), gradient, strict=True):
                parameter.grad = own
            plain[0].step()
        else:
            plain_step(make_losses(expected), TASKS, x, y)
        for scheduler in schedulers:
            scheduler.step()
        assert_equal(snapshot(model), snapshot(expected))
    if free:
        for own in (optimizer, *plain):
            own.eval()
        assert_equal(snapshot(model), snapshot(expected))
        for own in (optimizer, *plain):
            own.train()
        assert_equal(snapshot(model), snapshot(expected))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_class_from_elsewhere_is_its_plain_loop_with_a_scheduler_and_a_file(
    method: str, name: str
) -> None:
    compare(method, FACTORIES[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_works_out_its_own_rate_is_its_plain_loop(method: str) -> None:
    """Adafactor's `lr` is None then, which no scheduler can multiply."""
    compare(method, relative_adafactor, scheduled=False)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("method", WRAPPERS)
def test_a_wrapped_schedule_free_instance_is_its_plain_loop(method: str, name: str) -> None:
    """One optimizer has one average, over all tasks' steps: the modes pass through the wrapper."""
    compare(method, FREE[name], free=True)


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_for_one_task_goes_on_from_a_file(name: str) -> None:
    """Saved in either mode; it keeps its mode, counters and rates in its groups."""
    model, expected = twins()
    optimizer = mtlopt.IndependentOptimizer(FREE[name], model.parameters(), ["b"], lr=0.02)
    plain = FREE[name](expected.parameters(), lr=0.02)
    schedulers = [scheduler_of(optimizer), scheduler_of(plain)]
    for index, (x, y) in enumerate(batches(STEPS)):
        if index in {3, SAVED_AFTER}:
            if index == 3:
                optimizer.eval()
                plain.eval()  # type: ignore[attr-defined]  # schedule-free classes alone have modes
            state = by_file([optimizer.state_dict(), schedulers[0].state_dict()])
            optimizer = mtlopt.IndependentOptimizer(FREE[name], model.parameters(), ["b"], lr=0.3)
            schedulers[0] = scheduler_of(optimizer)
            optimizer.load_state_dict(state[0])
            schedulers[0].load_state_dict(state[1])
        optimizer.train()
        plain.train()  # type: ignore[attr-defined]  # as above
        optimizer.step(make_losses(model), x, y)
        reference.alternating(plain, make_losses(expected), ["b"], x, y)
        for scheduler in schedulers:
            scheduler.step()
        assert_equal(snapshot(model), snapshot(expected))
    optimizer.eval()
    plain.eval()  # type: ignore[attr-defined]  # as above
    assert_equal(snapshot(model), snapshot(expected))


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_for_several_tasks_is_refused_with_the_reason(name: str) -> None:
    message = rf"swap the parameters .*got {name} for 3: each task's average would be taken over"
    with pytest.raises(ValueError, match=message):
        make("independent", FREE[name], Network())


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_itself_refuses_a_step_in_evaluation_mode(name: str) -> None:
    """The wrapper passes the refusal on; nothing has moved then."""
    model = Network()
    optimizer = make("joint", FREE[name], model)
    optimizer.eval()
    start = snapshot(model)
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step(make_losses(model), *batches(1)[0])
    assert_equal(snapshot(model), start)


@pytest.mark.parametrize("method", ["independent", "joint", "alternating"])
def test_a_class_that_moves_the_weights_before_its_closure_gets_the_gradient_there(
    method: str,
) -> None:
    """Such a class asks at an extrapolated point; LBFGS asks first where it stands."""
    free = schedulefree.SGDScheduleFreeClosure
    model, expected = twins()
    if method == "independent":
        optimizer: Any = mtlopt.IndependentOptimizer(free, model.parameters(), ["b"], lr=0.1)
    else:
        optimizer = WRAPPERS[method](free(model.parameters(), lr=0.1), ["b"])
    plain = free(expected.parameters(), lr=0.1)
    for x, y in batches(4):
        optimizer.step(make_losses(model), x, y)
        reference.alternating(plain, make_losses(expected), ["b"], x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_a_wrapper_that_is_no_torch_optimizer_is_refused() -> None:
    wrapper = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(Network().parameters(), lr=0.1))
    with pytest.raises(
        TypeError, match=r"`optimizer` must be an instance of a plain .*got ScheduleFreeWrapper"
    ):
        mtlopt.JointOptimizer(wrapper, TASKS)


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_steps_twice_on_a_closure_says_so_itself(method: str) -> None:
    """SAM's `closure=None` does not tell that it needs one; nothing moves before its refusal."""
    model = Network()
    optimizer = make(method, lambda p, lr: SAM(p, torch.optim.SGD, lr=lr), model)
    start = snapshot(model)
    with pytest.raises(Exception, match="SAM requires closure"):
        optimizer.step(make_losses(model), *batches(1)[0])
    assert_equal(snapshot(model), start)


class Squares(nn.Module):
    """Matrices of one shape: large enough for 8-bit states, and compiled once."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(5)
        self.trunk = nn.Parameter(torch.randn(64, 64, generator=draw) / 8)
        self.heads = nn.ParameterDict(
            {task: torch.randn(64, 64, generator=draw) / 8 for task in TASKS}
        )

    def forward(self, x: Tensor, tasks: Any) -> dict[str, Tensor]:
        features = (x @ x.new_ones(4, 64)).float() @ self.trunk
        return {task: (features @ self.heads[task])[:, :1] for task in tasks}


def adamw_8bit(params: Any, lr: float) -> Optimizer:
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(params, lr=lr)
    return optimizer


def skip_without_compiler() -> None:
    try:
        importlib.import_module("torchao.optim")
    except AttributeError as error:
        pytest.skip(f"torchao wants a newer torch: {error!r}")
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = adamw_8bit([parameter], 0.1)
    parameter.grad = torch.ones(64, 64)
    try:
        optimizer.step()
    except RuntimeError as error:
        pytest.skip(f"torchao compiles its step, which failed here: {error!r:.200}")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_8_bit_states_are_their_plain_loop_with_a_scheduler_and_a_file(method: str) -> None:
    """Its rate is a tensor that the scheduler writes to; its states are a subclass of tensors."""
    skip_without_compiler()
    compare(method, adamw_8bit, network=Squares)


def lookahead(params: Any, lr: float) -> Optimizer:
    return Lookahead(torch.optim.Adam(params, lr=lr), k=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_dict_of_another_form_is_saved_and_loaded(method: str) -> None:
    """Lookahead's has neither `state` nor `param_groups`."""
    compare(method, lookahead, scheduled=False)


def test_an_instance_of_a_class_that_torch_cannot_copy_serves_as_a_pattern() -> None:
    """Lookahead's pickled form lacks its defaults, so a deep copy of it fails."""
    model, expected = twins()
    optimizer = mtlopt.IndependentOptimizer(lookahead(model.parameters(), 0.02), TASKS)
    plain = make("independent", lookahead, expected)
    for x, y in batches(6):
        optimizer.step(make_losses(model), x, y)
        plain.step(make_losses(expected), x, y)
    assert_equal(snapshot(model), snapshot(expected))


def test_a_state_dict_of_another_form_and_shape_is_refused() -> None:
    model = Network()
    optimizer = make("joint", lookahead, model)
    state = optimizer.state_dict()
    other = mtlopt.JointOptimizer(lookahead(model.trunk.parameters(), 0.02), TASKS)
    before = str(other.state_dict())
    with pytest.raises(ValueError, match="`state_dict` must be of the same shapes"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="`state_dict` must have the entries"):
        other.load_state_dict({"state": {}})
    assert str(other.state_dict()) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_accelerated_optimizer_is_refused_with_the_one_to_pass(method: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(
        torch.optim.SGD(Network().parameters(), lr=0.1)
    )
    wrap = WRAPPERS.get(method, mtlopt.IndependentOptimizer)
    with pytest.raises(TypeError, match=r"got AcceleratedOptimizer.*pass `optimizer\.optimizer`"):
        wrap(wrapped, TASKS)
    wrap(wrapped.optimizer, TASKS)
