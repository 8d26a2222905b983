"""The study's harness on a problem of seconds, and the landmarks of its toy."""

import functools
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import toy
from benchmarks.study.costs import measure_costs
from benchmarks.study.methods import METHODS, SUM, TUNED, make_optimizer, names
from benchmarks.study.plan import GRID, WEIGHTINGS, Config, finished, plan, rate
from benchmarks.study.problem import load, make
from benchmarks.study.problems import burgers
from benchmarks.study.report import Results, interval, verdict
from benchmarks.study.results import RUNS, append_rows, load_rows
from benchmarks.study.training import run, score, train

ROOT = Path(__file__).parents[1]
TINY = """
import torch

class Problem:
    tasks = ("a", "b")
    steps, evaluations = 8, 4

    def __init__(self, seed):
        self.draw = torch.Generator().manual_seed(seed)
        self.model = self.features = torch.nn.Linear(3, 2)
        self.shared = list(self.model.parameters())

    def batches(self):
        while True:
            yield (torch.randn(16, 3, generator=self.draw),)

    def losses(self, tasks, x):
        y = self.model(x)
        errors = dict(zip(self.tasks, (y - x[:, :2]).square().mean(0)))
        return {task: errors[task] for task in tasks}

    def metrics(self, split):
        errors = (self.model.weight - torch.eye(2, 3)).square().sum(1)
        return {task: 1 / (1 + error.item()) for task, error in zip(self.tasks, errors)}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def command(problem: Path, out: Path, *options: str) -> list[str]:
    common = ["--problem", str(problem), "--out", str(out), "--processes", "1", "--seeds", "2"]
    return [sys.executable, "-m", "benchmarks.run_study", *common, "--repetitions", "1", *options]


def rows(out: Path) -> list[dict[str, str]]:
    """What was run, in an order of its own and without the time that it took."""
    found = load_rows(out / "runs.csv")
    return sorted(({**row, "seconds": ""} for row in found), key=str)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    methods = ["--methods", "single:a", "single:b", SUM, TUNED]
    subprocess.run(command(tiny, whole, *methods), cwd=ROOT, check=True, capture_output=True)
    killed.mkdir()
    # What a step costs is measured, and measured once.
    (killed / "costs.csv").write_bytes((whole / "costs.csv").read_bytes())
    process = subprocess.Popen(
        command(tiny, killed, *methods),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while len(load_rows(killed / "runs.csv")) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with open(killed / "runs.csv", "a") as file:
        file.write("tiny,sum,0.1")  # a line that the kill cut short
    before = load_rows(killed / "runs.csv")
    assert len(before) < len(rows(whole))
    subprocess.run(command(tiny, killed, *methods), cwd=ROOT, check=True, capture_output=True)
    assert load_rows(killed / "runs.csv")[: len(before)] == before
    assert rows(killed) == rows(whole)
    assert (killed / "tiny.md").read_text() == (whole / "tiny.md").read_text()
    assert (killed / "tiny.png").exists()


def test_a_run_that_fails_is_one_line(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(TINY.replace("y = self.model(x)", "y = self.model(x) * float('inf')"))
    row = run(str(path), Config(SUM, 0.1, 0, 0), 8)
    assert row["error"] == "FloatingPointError: a loss is not finite at step 1"
    path = tmp_path / "raising.py"
    path.write_text(TINY.replace("y = self.model(x)", "raise ValueError('first\\nsecond')"))
    row = run(str(path), Config(SUM, 0.1, 0, 0), 8)
    assert row["error"] == "ValueError: first"
    append_rows(tmp_path / "runs.csv", RUNS, [{"problem": "failing"} | row])
    (read,) = load_rows(tmp_path / "runs.csv")
    assert finished([read]) == {Config(SUM, 0.1, 0, 0): float("-inf")}


def test_a_learning_rate_that_fails_is_not_chosen_and_the_rest_goes_on() -> None:
    scores = {Config(SUM, rate(k), 0, 0): -abs(k + 5.0) for k in GRID}
    scores[Config(SUM, rate(-5), 0, 0)] = float("-inf")
    lacking, choice = plan(SUM, scores, 3, None)
    finalists = {rate(-6), rate(-4)}
    assert {(config.lr, config.seed) for config in lacking} == {
        (lr, seed) for lr in finalists for seed in (1, 2)
    }
    assert choice is None
    scores |= dict.fromkeys(lacking, -1.0)
    scores[Config(SUM, rate(-6), 0, 2)] = float("-inf")
    assert plan(SUM, scores, 3, None) == ([], Config(SUM, rate(-4), 0, 0))


def test_the_two_best_of_one_seed_are_judged_by_all() -> None:
    """One seed alone chooses by chance; the winner's neighbours must have been tried as well."""
    first = {-7: 0.1, -6: 0.2, -5: 0.9, -4: 0.8, -3: 0.7}
    scores = {Config(SUM, rate(k), 0, 0): value for k, value in first.items()}
    later = {rate(-5): 0.1, rate(-4): 0.5}
    lacking, choice = plan(SUM, scores, 3, None)
    assert choice is None
    assert len(lacking) == 4
    scores |= {config: later[config.lr] for config in lacking}
    assert plan(SUM, scores, 3, None) == ([], Config(SUM, rate(-4), 0, 0))
    del scores[Config(SUM, rate(-3), 0, 0)]
    lacking, choice = plan(SUM, scores, 3, None)
    assert (lacking, choice) == ([Config(SUM, rate(-3), 0, 0)], None)


def test_the_best_learning_rate_is_never_at_the_edge_of_the_grid() -> None:
    """The grid grows until the best has been tried on both sides."""
    scores: dict[Config, float] = {}
    for _ in range(20):
        lacking, choice = plan(SUM, scores, 1, None)
        if not lacking:
            break
        scores |= {config: -abs(config.lr - 0.32) for config in lacking}
    tried = sorted(config.lr for config in scores)
    assert choice is not None
    assert choice.lr == pytest.approx(0.32)
    assert tried[0] == pytest.approx(3.2e-4)
    assert tried[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_selection_never_sees_the_test_split(tiny: Path, tmp_path: Path, lr: float) -> None:
    """A test split that says the opposite of validation changes no choice, and is asked twice."""
    liar = tmp_path / "liar.py"
    sign = "(self.asked.append(split), -1 if split == 'test' else 1)[1]"
    liar.write_text(TINY.replace("1 / (1 +", f"{sign} / (1 +"))
    asked: list[str] = []
    problem = load(str(liar))
    problem.asked = asked  # type: ignore[attr-defined]
    honest = run(str(tiny), Config(SUM, lr, 0, 0), 4)
    made = make(problem, 0)
    lying = train(made, make_optimizer(made, SUM, lr, 0), 4, SUM)
    chosen = {k for k in lying if k.startswith(("score", "step", "validation"))}
    assert len(chosen) == 6
    assert {k: honest[k] for k in chosen} == {k: lying[k] for k in chosen}
    assert lying["test"] == {task: -value for task, value in honest["test"].items()}
    assert len([split for split in asked if split == "test"]) == 2 * len(problem.tasks)
    assert asked[-4:] == ["test"] * 4  # both choices have been made


def test_at_equal_time_a_run_keeps_what_it_had_by_then(tiny: Path) -> None:
    whole = run(str(tiny), Config(SUM, 0.1, 0, 0), 8)
    half = run(str(tiny), Config(SUM, 0.1, 0, 0), 3)
    assert (whole["step"], whole["step_at_time"]) == (8, 8)
    assert (half["step"], half["step_at_time"]) == (8, 3)
    assert half["test"] == whole["test"] == whole["test_at_time"]
    assert half["score_at_time"] < half["score"]


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy, on Nash-MTL
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_learns(method: str, tiny: Path) -> None:
    problem = load(str(tiny))
    if method not in names(problem):
        pytest.skip("not for two tasks")
    row = run(str(tiny), Config(method, 0.1, 0, 0), 8)
    assert "error" not in row, row
    before = make(problem, 0).metrics("validation")
    assert row["score"] > score(before, ())


def test_the_weights_that_are_searched_are_the_same_for_every_seed(tiny: Path) -> None:
    """The plain sum's first, then such that all losses begin alike, then around that."""
    problem = load(str(tiny))
    made = make(problem, 3)
    before = torch.random.get_rng_state()
    found = made.weightings()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found == make(problem, 0).weightings()
    assert found[0] == {"a": 1, "b": 1}
    first = make(problem, 0)
    losses = first.losses(first.tasks, *next(first.batches()))
    a, b = losses["a"].item(), losses["b"].item()
    assert found[1]["a"] * a == pytest.approx(found[1]["b"] * b)
    assert len({weights["a"] / weights["b"] for weights in found}) == len(WEIGHTINGS) + 1


def test_the_passes_of_a_step_are_counted(tiny: Path) -> None:
    costs = measure_costs(str(tiny), [SUM, "independent", "PCGrad", "GradNorm"], 1)
    assert [(row["forward"], row["backward"]) for row in costs] == [(1, 1), (2, 2), (1, 2), (1, 3)]


def test_the_problem_of_the_how_to_page_is_short_and_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/own-problem.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    assert sum(bool(line.strip()) for line in block.split("class Problem")[1].splitlines()) <= 30
    (tmp_path / "digits.py").write_text(block.replace("steps = 300", "steps = 20"))
    row = run(str(tmp_path / "digits.py"), Config("independent", 0.01, 0, 0), 20)
    assert "error" not in row, row
    assert row["test"].keys() == {"digit", "rest"}


def test_the_page_on_the_results_has_every_file_of_them() -> None:
    page = (ROOT / "docs/does-it-help.md").read_text(encoding="utf-8")
    for file in (ROOT / "benchmarks/results/study").iterdir():
        if file.suffix in (".md", ".png"):
            assert f"benchmarks/results/study/{file.name}" in page, file.name


def results(**methods: list[float]) -> Results:
    """One task whose metric is an error."""
    tests = {m: {s: {"error": v} for s, v in enumerate(each)} for m, each in methods.items()}
    return Results("made up", tests, {}, ("error",))


def test_delta_m_is_the_mean_relative_change_against_single_task_networks() -> None:
    found = results(single=[2.0, 4.0], sum=[1.5, 6.0])
    assert found.delta("sum") == pytest.approx({0: 50.0, 1: -100.0})
    found.lower_is_better = ()
    assert found.delta("sum") == pytest.approx({0: -50.0, 1: 100.0})


def test_a_method_is_better_only_where_the_whole_interval_is() -> None:
    found = results(single=[2.0] * 3, sum=[1.0] * 3, good=[0.9, 0.8, 0.7], mixed=[0.1, 0.1, 1.1])
    assert verdict(found.against("good")) == "better"
    assert verdict(found.against("mixed")) == "undecided"
    assert verdict(found.against("single")) == "worse"
    assert verdict(found.against("good")[:2]) == "too few seeds"
    # All three draws the same happens once in 27 to each side: the interval is the range.
    assert interval([1.0, 2.0, 4.0]) == (1.0, 4.0)
    assert found.ranks()["good"] == [2.0, 2.0, 1.0]


def test_independent_optimizers_end_alike_whatever_the_scale_and_the_sum_does_not() -> None:
    """The toy's landmarks, at ten times the learning rate of the study to be done in seconds."""
    independent, joint = (toy.paths(m, 500, 1e-2)[:, :, -1] for m in ("independent", SUM))
    moving = [0, 2, 3, 4]  # both gradients vanish at (0, 0)
    assert torch.equal(independent[:, 1], torch.zeros(3, 2))
    independent, joint = independent[:, moving], joint[:, moving]
    assert (independent - independent[1]).norm(dim=-1).max() < 0.1
    assert (joint - joint[1]).norm(dim=-1).max() > 3
    # At the ends of the front, not in its middle.
    assert independent[..., 0].abs().min() > 6
    assert independent[..., 0].sign().tolist() == [[-1, 1, -1, 1]] * 3


def test_the_toy_is_that_of_the_paper() -> None:
    """The losses at the ends of the front, worked by hand: one bowl's bottom, the other's side."""
    first, second = toy.values(torch.tensor([(7.0, -8.0), (-7.0, -8.0)]))
    level = math.tanh(4)
    assert first.tolist() == pytest.approx([-20 * level, (19.6 - 20) * level], rel=1e-5)
    assert second.tolist() == pytest.approx([(19.6 - 20) * level, -20 * level], rel=1e-5)
    first, second = toy.values(torch.tensor([0.0, 8.0]))
    # |(-0 - 7) / 2 - tanh(-8)| and |(-0 + 3) / 2 + tanh(-8) + 2|, where tanh(-8) is -1.
    assert float(first) == pytest.approx(level * (math.log(2.5) + 6), rel=1e-5)
    assert float(second) == pytest.approx(level * (math.log(2.5) + 6), rel=1e-5)


@pytest.mark.parametrize("name", ["glaucoma", "many", "burgers"])
def test_a_problem_that_is_drawn_trains_and_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = load(name)
    if name == "glaucoma":
        counts = {"train": 16, "val": 8, "test": 8}
        phantoms = importlib.import_module("photographs.phantoms")
        few = functools.partial(phantoms.phantom_records, counts=counts)
        monkeypatch.setattr("photographs.data.phantom_records", few)
    monkeypatch.setattr(problem, "steps", 2)
    monkeypatch.setattr(problem, "evaluations", 1)
    row = run(name, Config(SUM, 1e-3, 0, 0), 1)
    assert "error" not in row
    assert row["validation"].keys() == row["test"].keys()
    if problem.single:
        assert row["test"].keys() == set(problem.tasks)


def test_the_reference_of_burgers_solves_the_equation() -> None:
    """Its residual by finite differences, where the solution is smooth; and the start."""
    t, x = torch.full((5,), 0.2).double(), torch.linspace(-0.9, -0.3, 5).double()
    h = 1e-3

    def u(dt: float, dx: float) -> torch.Tensor:
        return burgers.solution(t + dt, x + dx).double()

    ut, ux = (u(h, 0) - u(-h, 0)) / (2 * h), (u(0, h) - u(0, -h)) / (2 * h)
    uxx = (u(0, 10 * h) - 2 * u(0, 0) + u(0, -10 * h)) / (10 * h) ** 2
    assert (ut + u(0, 0) * ux - burgers.NU * uxx).abs().max() < 2e-3
    start = burgers.solution(torch.full((5,), 1e-6), x)
    assert torch.allclose(start.double(), -torch.sin(torch.pi * x), atol=1e-3)
