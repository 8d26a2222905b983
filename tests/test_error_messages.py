"""Errors and warnings for mistakes that are made when a training loop is ported."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

import mtlopt
from all_methods import ONE_STEP, WRAPPERS, every_method, make_for, wrapper
from problems import TASKS, Network, assert_equal, batches, leaf, make_losses, snapshot

METHODS: dict[str, Callable[..., Any]] = {
    "pcgrad": lambda m, **k: mtlopt.PCGrad(SGD(m.parameters(), lr=0.1), TASKS, **k),
    "gradnorm": lambda m, **k: mtlopt.GradNorm(
        SGD(m.parameters(), lr=0.1), TASKS, [m.trunk[2].weight], **k
    ),
    "weighted": lambda m, **k: mtlopt.JointOptimizer(
        SGD(m.parameters(), lr=0.1), TASKS, {"a": 2.0}, **k
    ),
}
combining = pytest.mark.parametrize("method", METHODS)


def plain_backward(model: Network, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    x, y = batches(1)[0]
    total = torch.stack(list(make_losses(model)(TASKS, x, y).values())).sum()
    (total if scaler is None else scaler.scale(total)).backward()
    return total


@combining
@pytest.mark.parametrize("form", ["step", "scaler", "closure"])
def test_a_gradient_that_was_not_combined_warns_once(method: str, form: str) -> None:
    """Otherwise PCGrad would train on the plain sum, as with Lightning's automatic optimization."""
    model = Network()
    optimizer = METHODS[method](model)
    scaler = torch.amp.GradScaler("cpu")

    def step() -> None:
        optimizer.zero_grad()
        if form == "closure":
            optimizer.step(closure=lambda: plain_backward(model))
            return
        if form == "scaler":
            plain_backward(model, scaler)
            scaler.step(optimizer)
            scaler.update()
        else:
            plain_backward(model)
            optimizer.step()

    with pytest.warns(UserWarning, match=r"`optimizer\.backward\(losses\)`"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


@combining
@pytest.mark.parametrize("before", ["cleared", "stepped", "stepped on losses"])
def test_a_plain_gradient_after_a_combined_one_warns(method: str, before: str) -> None:
    model = Network()
    optimizer = METHODS[method](model)
    x, y = batches(1)[0]
    if before == "stepped on losses":
        optimizer.step(make_losses(model), x, y)
        optimizer.zero_grad()
    else:
        optimizer.backward(make_losses(model)(TASKS, x, y))
    if before == "stepped":
        optimizer.step()
        model.zero_grad()
    else:
        optimizer.zero_grad()
    plain_backward(model)
    with pytest.warns(UserWarning, match="did not make"):
        optimizer.step()


@combining
def test_a_combined_gradient_that_was_replaced_does_not_warn(method: str) -> None:
    """As by gradient centralisation, or a loop that averages gradients over processes."""
    model = Network()
    optimizer = METHODS[method](model)
    for x, y in batches(2):
        optimizer.zero_grad()
        optimizer.backward(make_losses(model)(TASKS, x, y))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad - parameter.grad.mean()
        optimizer.step()
        model.zero_grad()
    if method != "gradnorm":  # It goes on watching one of `shared`.
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    plain_backward(model)
    with pytest.warns(UserWarning, match="did not make"):
        optimizer.step()


@combining
def test_gradients_of_zero_do_not_warn(method: str) -> None:
    """Torch steps on zeros to create the state that a distributed checkpoint is loaded into."""
    model = Network()
    optimizer = METHODS[method](model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@combining
def test_gradients_of_backward_do_not_warn(method: str) -> None:
    model = Network()
    optimizer = METHODS[method](model)
    for x, y in batches(2):
        optimizer.step(make_losses(model), x, y)
        optimizer.zero_grad()
        optimizer.step()  # Trainer's: there is nothing to apply.
        optimizer.zero_grad()
        optimizer.backward(make_losses(model)(TASKS, x, y))
        optimizer.step()

    def closure() -> None:
        optimizer.zero_grad()
        optimizer.backward(make_losses(model)(TASKS, x, y))

    optimizer.step(closure=closure)


def test_the_unweighted_sum_may_come_from_a_plain_backward() -> None:
    model = Network()
    optimizer = mtlopt.JointOptimizer(SGD(model.parameters(), lr=0.1), TASKS)
    plain_backward(model)
    optimizer.step()


def test_a_plain_state_of_another_torch_release_loads() -> None:
    """It lacks a newer option, and a scheduler has left `initial_lr` in it."""
    model = Network()
    state = Adam(model.parameters(), lr=0.2).state_dict()
    del state["param_groups"][0]["fused"]
    state["param_groups"][0]["initial_lr"] = 0.3
    optimizer = mtlopt.PCGrad(Adam(model.parameters(), lr=0.1), TASKS)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("method", ["independent", "pcgrad"])
@pytest.mark.parametrize("other", [SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_plain_state_of_another_class_is_refused(method: str, other: Any) -> None:
    """Torch would load it, and fail in the next step for lack of hyper-parameters."""
    model = Network()
    if method == "independent":
        optimizer: Any = mtlopt.IndependentOptimizer(Adam, model.parameters(), TASKS, lr=0.1)
    else:
        optimizer = mtlopt.PCGrad(Adam(model.parameters(), lr=0.1), TASKS)
    with pytest.raises(ValueError, match=r"same class of optimizer, Adam, .*'betas'"):
        optimizer.load_state_dict(other(model.parameters(), lr=0.2).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step(make_losses(model), *batches(1)[0])


def test_a_state_of_another_method_is_refused() -> None:
    model = Network()
    state = METHODS["weighted"](model).state_dict()
    with pytest.raises(ValueError, match="same method: PCGrad, got JointOptimizer"):
        METHODS["pcgrad"](model).load_state_dict(state)


def test_a_forward_pass_outside_losses_is_an_error_that_says_where_it_belongs() -> None:
    model = Network()
    optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
    x, y = batches(1)[0]
    outputs = model(x, TASKS)
    with pytest.raises(RuntimeError, match="Run the forward pass inside `losses"):
        optimizer.step(lambda tasks: {t: ((outputs[t] - y[t]) ** 2).mean() for t in tasks})


def of(make: Callable[[Any], Any]) -> Callable[[], Any]:
    return lambda: make(Network())


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "an instance for a class": (
        of(lambda m: mtlopt.IndependentOptimizer(Adam(m.parameters()), m.parameters(), TASKS)),  # type: ignore[call-overload]  # on purpose
        TypeError,
        "has its parameters and options already: IndependentOptimizer(optimizer, tasks)",
    ),
    "the number of tasks": (
        of(lambda m: mtlopt.PCGrad(SGD(m.parameters()), 3)),  # type: ignore[arg-type]  # on purpose
        TypeError,
        "`tasks` must be an iterable of names, got 3: tasks=",
    ),
    "parameters for tasks": (
        of(lambda m: mtlopt.IndependentOptimizer(Adam, m.parameters(), m.parameters())),
        TypeError,
        "`tasks` must hold names or non-empty tuples of names (a group), got a Parameter.",
    ),
    "a flag for the scaler": (
        of(lambda m: METHODS["pcgrad"](m, scaler=True)),
        TypeError,
        "`scaler` must be a torch.amp.GradScaler, got True: ",
    ),
    "a list of weights": (
        of(lambda m: mtlopt.JointOptimizer(SGD(m.parameters()), TASKS, [1.0, 0.5])),  # type: ignore[arg-type]  # on purpose
        TypeError,
        "`weights` must be a mapping from task to number, got [1.0, 0.5]: ",
    ),
    "no number for a weight": (
        of(lambda m: mtlopt.JointOptimizer(SGD(m.parameters()), TASKS, {"a": None})),  # type: ignore[dict-item]  # on purpose
        TypeError,
        "`weights` must be a mapping from task to number, got None for task 'a'.",
    ),
    "a layer for its parameters": (
        of(lambda m: mtlopt.GradNorm(SGD(m.parameters()), TASKS, m.trunk[2])),
        TypeError,
        "`shared` must be an iterable of parameters, such as `layer.parameters()`, got a Linear.",
    ),
    "a parameter for parameters": (
        of(lambda m: mtlopt.GradNorm(SGD(m.parameters()), TASKS, m.trunk[2].weight)),
        TypeError,
        "`shared` must be an iterable of parameters, such as `layer.parameters()`, "
        "got a Parameter.",
    ),
    "layers for their parameters": (
        of(lambda m: mtlopt.GradNorm(SGD(m.parameters()), TASKS, m.trunk)),
        TypeError,
        "`shared` must be an iterable of parameters, such as `layer.parameters()`, "
        "got a Sequential.",
    ),
    "a model for its parameters": (
        of(lambda m: mtlopt.conflicts({}, m, TASKS)),
        TypeError,
        "`params` must be an iterable of parameters, such as `layer.parameters()`, got a Network.",
    ),
    "an optimizer for its parameters": (
        of(lambda m: mtlopt.conflicts({}, METHODS["pcgrad"](m), TASKS)),
        TypeError,
        "`params` must be an iterable of parameters, such as `layer.parameters()`, got a PCGrad.",
    ),
    "a batch before the function": (
        of(
            lambda m: mtlopt.IndependentOptimizer(SGD, m.parameters(), TASKS).step(
                *batches(1)[0],  # type: ignore[arg-type]  # on purpose
                make_losses(m),
            )
        ),
        TypeError,
        "`losses` must be a function losses(tasks, *batch), before the batch, got Tensor: ",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_argument_is_an_error_that_names_it(mistake: str) -> None:
    call, kind, message = WRONG[mistake]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_frameworks_closure_is_an_error_that_asks_for_manual_optimization() -> None:
    model = Network()
    optimizer = mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)
    before = snapshot(model)
    with pytest.raises(TypeError, match="manual optimization"):
        optimizer.step(closure=lambda: plain_backward(model))
    assert_equal(snapshot(model), before)


def pcgrad(model: Network) -> Any:
    return METHODS["pcgrad"](model)


def independent(model: Network) -> Any:
    return mtlopt.IndependentOptimizer(SGD, model.parameters(), TASKS, lr=0.1)


def stepping(make: Callable[[Any], Any], change: Callable[[Any], Any]) -> Callable[[], Any]:
    """A step whose `losses` returns what `change` makes of the losses."""

    def run() -> None:
        model = Network()
        losses = make_losses(model)
        make(model).step(lambda tasks, x, y: change(losses(tasks, x, y)), *batches(1)[0])

    return run


def each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda found: {task: change(loss) for task, loss in found.items()}


def step_on_a_sum(model: Network) -> None:
    plain_backward(model)
    pcgrad(model).step()


def step_twice(model: Network) -> None:
    optimizer = pcgrad(model)
    optimizer.step(make_losses(model), *batches(1)[0])
    optimizer.step()


def step_on_features_from_outside(model: Network) -> None:
    x, y = batches(1)[0]
    outputs = model(x, TASKS)
    independent(model).step(lambda tasks: {t: ((outputs[t] - y[t]) ** 2).mean() for t in tasks})


Wrong: Any = mtlopt  # Without its types: every call below is a mistake.
TYPICAL: list[Callable[[], Any]] = [  # in the order of the documentation's table
    of(lambda m: Wrong.IndependentOptimizer(Adam, TASKS)),
    of(lambda m: Wrong.IndependentOptimizer(Adam, m, TASKS)),
    of(lambda m: Wrong.PCGrad(m.parameters(), TASKS)),
    of(lambda m: Wrong.PCGrad(Adam, TASKS)),
    of(lambda m: Wrong.PCGrad(SGD(m.parameters()), 2)),
    of(lambda m: METHODS["pcgrad"](m, scaler=True)),
    of(lambda m: Wrong.JointOptimizer(SGD(m.parameters()), TASKS, [1.0, 0.5])),
    of(lambda m: Wrong.GradNorm(SGD(m.parameters()), TASKS, shared=m.trunk)),
    of(lambda m: pcgrad(m).step(*batches(1)[0], make_losses(m))),
    of(lambda m: independent(m).step(make_losses(m)(TASKS, *batches(1)[0]))),
    of(lambda m: independent(m).backward(make_losses(m)(TASKS, *batches(1)[0]))),
    of(lambda m: (plain_backward(m), independent(m).step())),
    of(step_on_features_from_outside),
    stepping(pcgrad, lambda found: sum(found.values())),
    stepping(pcgrad, lambda found: list(found.values())),
    stepping(pcgrad, each(lambda loss: loss.item())),
    stepping(pcgrad, each(lambda loss: loss.expand(4))),
    stepping(pcgrad, each(lambda loss: loss.detach())),
    stepping(pcgrad, each(lambda loss: (loss, 0.5))),
    of(lambda m: pcgrad(m).step(lambda x: make_losses(m)(TASKS, x, {}), *batches(1)[0])),
    of(step_on_a_sum),
    of(step_twice),
    of(lambda m: independent(m).zero_grad(set_to_none=False)),
    of(lambda m: independent(m).step(closure=lambda: plain_backward(m))),
    stepping(METHODS["gradnorm"], each(lambda loss: -loss)),
]
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "errors.md"
ROWS = re.findall(r"^\| .*`.* \| `(.*)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_each_row_of_the_page_has_its_mistake() -> None:
    assert len(ROWS) == len(TYPICAL) >= 20


@pytest.mark.parametrize(("mistake", "line"), list(zip(TYPICAL, ROWS, strict=False)), ids=ROWS)
def test_a_typical_mistake_ends_in_the_line_to_write(mistake: Callable[[], Any], line: str) -> None:
    """Errors and warnings alike: here, warnings are errors."""
    kinds = (AttributeError, RuntimeError, TypeError, UserWarning, ValueError)
    with pytest.raises(kinds, match=re.escape(line)):
        mistake()


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}])
@pytest.mark.parametrize("method", WRAPPERS)
def test_a_class_for_an_instance_is_an_error_that_asks_for_an_instance(
    method: str, options: dict[str, Any]
) -> None:
    """IndependentOptimizer takes a class, so swapping methods in one line leads here."""
    model = Network()
    classes: dict[str, Any] = {
        "balanced": mtlopt.Balanced,
        "gradnorm": mtlopt.GradNorm,
        "aggregated": mtlopt.Aggregated,
    }
    call = classes.get(method) or wrapper(method)
    with pytest.raises(TypeError, match=r"(?i)pass an instance") as caught:
        call(Adam, model.parameters(), TASKS, **options)
    assert "Adam" in str(caught.value)


def test_weights_for_independent_optimizers_are_refused() -> None:
    """A class that divides by the gradient's size, such as Adam, would ignore them."""
    with pytest.raises(TypeError, match="`weights`"):
        mtlopt.IndependentOptimizer(Adam, [leaf(1.0)], ["a", "b"], lr=0.1, weights={"a": 2.0})


@pytest.mark.parametrize("kind", [list, tuple])
@every_method
def test_a_list_of_losses_is_an_error_that_shows_the_mapping(method: str, kind: Any) -> None:
    model = Network()
    optimizer = make_for(model, method)
    losses, (x, y) = make_losses(model), batches(1)[0]
    before = snapshot(model)
    told = pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))"))
    with told:
        optimizer.step(lambda tasks: kind(losses(tasks, x, y).values()))
    if method in (*ONE_STEP, "simultaneous"):
        with pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))")):
            optimizer.step(kind(losses(TASKS, x, y).values()))
    if method in ONE_STEP:
        with pytest.raises(TypeError, match=re.escape("dict(zip(tasks, losses))")):
            optimizer.backward(kind(losses(TASKS, x, y).values()))
    assert_equal(snapshot(model), before)


@every_method
def test_a_batch_by_keyword_is_an_error_that_asks_for_positions(method: str) -> None:
    model = Network()
    optimizer = make_for(model, method)
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=r"position|losses\(tasks, \*batch\)"):
        optimizer.step(make_losses(model), x=x, y=y)


@every_method
def test_nesting_methods_is_a_short_error(method: str) -> None:
    """The optimizer's repr, which lists all its groups, would fill the screen."""
    model = Network()
    inner = make_for(model, method)
    for outer in WRAPPERS:
        call = wrapper(outer, model.trunk[2].weight)
        with pytest.raises(TypeError, match=type(inner).__name__) as caught:
            call(inner, TASKS)
        assert len(str(caught.value)) < 300
        assert "Parameter Group" not in str(caught.value)


@every_method
def test_an_unknown_task_is_an_error_that_lists_both_sets(method: str) -> None:
    model = Network()
    optimizer = make_for(model, method)
    losses, (x, y) = make_losses(model), batches(1)[0]
    before = snapshot(model)

    def misspelt(tasks: Sequence[str]) -> dict[str, Tensor]:
        return {{"a": "disk"}.get(t, t): v for t, v in losses(TASKS, x, y).items()}

    with pytest.raises(ValueError, match="'disk'") as caught:
        optimizer.step(misspelt)
    for name in TASKS:
        assert repr(name) in str(caught.value)
    assert_equal(snapshot(model), before)


def test_the_refusal_of_ready_losses_names_the_schedule_that_takes_them() -> None:
    w = leaf(1.0)
    optimizer = mtlopt.IndependentOptimizer(SGD, [w], ["a", "b"], lr=0.1)
    with pytest.raises(TypeError, match=r"schedule=.simultaneous"):
        optimizer.step({"a": w.sum(), "b": w.sum()})
