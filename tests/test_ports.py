"""Ten kinds of training scripts, ported: lines to write, the same weights, and they train.

Each file of `ports/` is the script and its two ports in one, by the mark at the head of a line:
blank in all three, `-` in the script alone, `f` in the function form, `r` in the ready form, `p` in
both ports, `o` in the script and the ready form.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import mtlopt

SCRIPTS = {
    path.stem: path.read_text(encoding="utf-8")
    for path in Path(__file__).parent.glob("ports/*.txt")
}
SCRIPT, FUNCTION, READY = " -o", " fp", " rpo"
METHODS: dict[str, Any] = {
    "independent": mtlopt.IndependentOptimizer,
    "alternating": mtlopt.AlternatingOptimizer,
    "pcgrad": mtlopt.PCGrad,
    # The first parameter of each script is one that all tasks share.
    "gradnorm": lambda base, tasks, **options: mtlopt.GradNorm(
        base, tasks, base.param_groups[0]["params"][:1], **options
    ),
}
# Micro-batches are averaged task by task, so that sums round otherwise than in the script.
ACCUMULATING = {"jointbert", "yolo"}
NEGATIVE = {"ppo"}  # A policy loss may be, and GradNorm wants positive ones.


def source(name: str, marks: str) -> str:
    return "\n".join(line[2:] for line in SCRIPTS[name].splitlines() if (line or " ")[0] in marks)


def written(name: str, marks: str) -> list[str]:
    """Returns the lines to write: those that the script does not have, however indented.

    Imports do not count.
    """
    old = Counter(line.strip() for line in source(name, SCRIPT).splitlines())
    new = Counter(line.strip() for line in source(name, marks).splitlines())
    lines = list((new - old).elements())
    return [line for line in lines if line and not line.startswith(("import ", "from "))]


def run(name: str, marks: str, method: Any = mtlopt.JointOptimizer) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": name, "method": method}
    code = source(name, marks).replace("mtlopt.JointOptimizer(", "method(")
    exec(compile(code, name, "exec"), names)
    return names


def scripts() -> list[Any]:
    old = pytest.mark.skipif(torch.__version__ < "2.7", reason="Trainer wants a newer torch")
    marks = {"trainer": [pytest.mark.slow, old]}  # slow for its import
    return [pytest.param(name, marks=marks.get(name, ())) for name in sorted(SCRIPTS)]


def forms(name: str) -> list[str]:
    return [FUNCTION] if name == "trainer" else [FUNCTION, READY]


@pytest.mark.parametrize("name", scripts())
def test_a_port_under_the_joint_optimizer_is_the_script_bit_for_bit(name: str) -> None:
    tolerances = dict.fromkeys(forms(name), 0.0)
    if name in ACCUMULATING:
        torch.set_default_dtype(torch.float64)
        tolerances[FUNCTION] = 1e-9
    old = run(name, SCRIPT)
    assert old["after"] < 0.9 * old["before"]
    for form, tolerance in tolerances.items():
        new = run(name, form)
        for own, other in zip(new["model"].parameters(), old["model"].parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=tolerance, msg=form)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", scripts())
def test_a_port_trains_with_the_other_methods(name: str, method: str) -> None:
    if method == "gradnorm" and name in NEGATIVE:
        pytest.skip("GradNorm wants positive losses")
    for form in forms(name):
        if form == READY and method in ("independent", "alternating"):
            continue
        trained = run(name, form, METHODS[method])
        assert trained["after"] < 0.9 * trained["before"], form


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_few_lines_have_to_be_written(name: str) -> None:
    for form in forms(name):
        lines = written(name, form)
        print(len(lines), *lines, sep="\n    ")
        assert len(lines) <= (6 if form == FUNCTION else 2), lines


def test_there_are_ten() -> None:
    assert len(SCRIPTS) == 10


@pytest.mark.parametrize("seed", range(3))
def test_an_entropy_bonus_belongs_to_the_policy(seed: int) -> None:
    """As a task Adam brings it to full size, and the policy stays at a throw of the dice."""
    code = source("ppo", FUNCTION)
    bonus = " - ent_coef * policy.entropy().mean()"
    assert bonus in code
    code = code.replace(bonus, ', "entropy": -ent_coef * policy.entropy().mean()')

    def entropy(tasks: str) -> Any:
        own = code.replace(
            'mtlopt.JointOptimizer(optimizer, ("policy", "value"))', f"make({tasks})"
        )
        assert own != code
        torch.manual_seed(seed)
        names: dict[str, Any] = {}
        names["make"] = lambda *tasks: METHODS["independent"](names["optimizer"], tasks)
        exec(compile(own, "ppo", "exec"), names)
        return names["agent"](names["contexts"])[0].entropy().mean()

    uniform = torch.tensor(4.0).log()
    assert entropy('"policy", "entropy", "value"') > 0.95 * uniform
    assert entropy('("policy", "entropy"), "value"') < 0.5 * uniform
