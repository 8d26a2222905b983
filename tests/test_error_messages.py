"""Errors and warnings for mistakes that are made when a training loop is ported."""

import re
import sys
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
from mtlopt._gradients.autograd import explain
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
METHOD_CLASSES = [
    name
    for name in mtlopt.__all__
    if isinstance(getattr(mtlopt, name), type)
    and issubclass(getattr(mtlopt, name), mtlopt.MultiTaskOptimizer)
    and name != "MultiTaskOptimizer"
]
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


def step_on_computed_losses(model: Network) -> None:
    independent(model).step(make_losses(model)(TASKS, *batches(1)[0]))


def combine_behind_ddp(model: Network) -> None:
    """Torch's own message stands for the second pass through a wrapped model."""
    explain(RuntimeError("Expected to have a parameter marked ready only once."))


def load_a_state_of_another_method(model: Network) -> None:
    pcgrad(model).load_state_dict(METHODS["weighted"](model).state_dict())


def train_without_labels(model: Network) -> None:
    optimizer = pcgrad(model)
    for _ in range(100):
        optimizer.step(lambda tasks: {})


def cut_at_a_module_that_is_not_called(model: Network) -> None:
    optimizer = mtlopt.PCGrad(SGD(model.parameters()), TASKS, features=torch.nn.Tanh())
    optimizer.step(make_losses(model), *batches(1)[0])


def cut_once_per_task(model: Network) -> None:
    optimizer = mtlopt.PCGrad(SGD(model.parameters()), TASKS, features=model.trunk)
    x, y = batches(1)[0]
    optimizer.step(lambda tasks: {t: (model(x, (t,))[t] - y[t]).square().mean() for t in tasks})


def without_torchjd(model: Network) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchjd.aggregation", None)
        mtlopt.Aggregated(SGD(model.parameters()), TASKS, torch.nn.Identity())


Wrong: Any = mtlopt  # Without its types: every call below is a mistake.
TYPICAL: list[Callable[[], Any]] = [  # in the order of the page
    of(lambda m: Wrong.PCGrad(Adam, TASKS)),
    of(lambda m: Wrong.PCGrad(m.parameters(), TASKS)),
    of(lambda m: Wrong.PCGrad(SGD(m.parameters()), TASKS, lr=0.1)),
    of(lambda m: Wrong.IndependentOptimizer(SGD(m.parameters()), TASKS, lr=0.1)),
    of(lambda m: Wrong.Aggregated(SGD(m.parameters()), TASKS)),
    of(lambda m: Wrong.Scalarized(SGD(m.parameters()), TASKS)),
    of(lambda m: Wrong.Aggregated(SGD(m.parameters()), TASKS, aggregator="UPGrad")),
    of(without_torchjd),
    of(lambda m: Wrong.GradNorm(SGD(m.parameters()), TASKS)),
    of(lambda m: Wrong.GradNorm(SGD(m.parameters()), TASKS, shared=m.trunk)),
    of(lambda m: Wrong.IndependentOptimizer(Adam, TASKS)),
    of(lambda m: Wrong.IndependentOptimizer(Adam, m, TASKS)),
    of(lambda m: Wrong.PCGrad(SGD(m.parameters()), 2)),
    of(lambda m: Wrong.JointOptimizer(SGD(m.parameters()), TASKS, [1.0, 0.5])),
    of(lambda m: METHODS["pcgrad"](m, scaler=True)),
    of(lambda m: pcgrad(m).step(*batches(1)[0], make_losses(m))),
    of(step_on_computed_losses),
    of(lambda m: independent(m).backward(make_losses(m)(TASKS, *batches(1)[0]))),
    of(lambda m: (plain_backward(m), independent(m).step())),
    of(step_on_a_sum),
    of(step_twice),
    of(lambda m: independent(m).zero_grad(set_to_none=False)),
    of(lambda m: independent(m).step(closure=lambda: plain_backward(m))),
    of(step_on_features_from_outside),
    of(combine_behind_ddp),
    of(load_a_state_of_another_method),
    of(lambda m: pcgrad(m).step(lambda x: make_losses(m)(TASKS, x, {}), *batches(1)[0])),
    stepping(pcgrad, lambda found: sum(found.values())),
    stepping(pcgrad, lambda found: list(found.values())),
    stepping(pcgrad, each(lambda loss: loss.item())),
    stepping(pcgrad, each(lambda loss: loss.expand(4))),
    stepping(pcgrad, each(lambda loss: loss.detach())),
    stepping(pcgrad, each(lambda loss: (loss, 0.5))),
    stepping(METHODS["gradnorm"], each(lambda loss: -loss)),
    stepping(pcgrad, each(lambda loss: torch.ones((), requires_grad=True) * 2)),
    of(train_without_labels),
    of(cut_at_a_module_that_is_not_called),
    of(cut_once_per_task),
]
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "errors.md"
# A message in code, then its remedy, which may end in a line to write.
ROWS = re.findall(
    r"^(`+) ?(.+?) ?\1\\\n(.+(?:\n.+)*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
)


def test_each_message_of_the_page_has_its_mistake() -> None:
    assert len(ROWS) == len(TYPICAL) >= 20
    assert len(PAGE.read_text(encoding="utf-8").split()) <= 700


@pytest.mark.parametrize(
    ("mistake", "message", "remedy"),
    [(mistake, *row[1:]) for mistake, row in zip(TYPICAL, ROWS, strict=False)],
    ids=[row[1] for row in ROWS],
)
def test_a_typical_mistake_says_what_the_page_has_and_ends_in_the_line_to_write(
    mistake: Callable[[], Any], message: str, remedy: str
) -> None:
    """Errors and warnings alike: here, warnings are errors."""
    kinds = (AttributeError, ImportError, RuntimeError, TypeError, UserWarning, ValueError)
    with pytest.raises(kinds) as caught:
        mistake()
    said = str(caught.value)
    assert said.startswith(message.replace("'left'", "'a'"))
    if line := re.search(r"`([^`]+)`$", remedy):
        assert line[1] in said


RULES = {"Aggregated": ("aggregator", "UPGrad"), "Scalarized": ("scalarizer", "UW")}


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("form", ["missing", "name", "class"])
def test_a_rule_that_is_missing_or_no_object_is_an_error_that_shows_one(
    method: str, form: str
) -> None:
    """And the line that the error ends in runs."""
    argument, rule = RULES[method]
    import torchjd.aggregation
    import torchjd.scalarization

    optimizer = SGD(Network().parameters())
    kind = {"UPGrad": torchjd.aggregation.UPGrad, "UW": torchjd.scalarization.UW}[rule]
    given: dict[str, dict[str, Any]] = {
        "missing": {},
        "name": {argument: rule},
        "class": {argument: kind},
    }
    with pytest.raises(TypeError, match=argument) as caught:
        getattr(mtlopt, method)(optimizer, TASKS, **given[form])
    (line,) = re.findall(rf": ({method}\(.*\))\.$", str(caught.value))
    line = line.replace("Adam(params, lr=...)", "optimizer")
    names = {"torchjd": torchjd, "tasks": TASKS, "optimizer": optimizer}
    assert type(getattr(eval(f"mtlopt.{line}", {"mtlopt": mtlopt}, names), argument)) is kind


@pytest.mark.parametrize("form", ["instance", "class", "parameters"])
@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_a_learning_rate_in_the_wrong_place_is_an_error_that_shows_the_right_one(
    name: str, form: str
) -> None:
    parameters = list(Network().parameters())
    first = {"instance": SGD(parameters), "class": Adam, "parameters": parameters}[form]
    with pytest.raises(TypeError) as caught:
        getattr(mtlopt, name)(first, TASKS, lr=0.1)
    line = f"{name}(Adam(params, lr=...), tasks"
    if name == "IndependentOptimizer":
        of_class = "(torch.optim.Adam, model.parameters(), tasks, lr=1e-3)."
        line = f"{name}(optimizer, tasks)." if form == "instance" else f"{name}{of_class}"
    assert line in str(caught.value)


def test_advice_to_install_names_packages_of_an_index() -> None:
    """This one is on none yet, so its extras are for a checkout alone."""
    advice = {
        line
        for file in Path(mtlopt.__file__).parent.rglob("*.py")
        for line in re.findall("pip install .*", file.read_text(encoding="utf-8"))
    }
    assert len(advice) >= 5
    assert not [line for line in advice if "mtlopt" in line]


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
