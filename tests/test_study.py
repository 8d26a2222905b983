"""The study's protocol and problems, on a problem of seconds, and the landmarks of its toy."""

import functools
import importlib
import inspect
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import mtlopt
from benchmarks import toy
from benchmarks.study.comparison import compare, differences, holm
from benchmarks.study.costs import measure_costs
from benchmarks.study.figures import STYLES, draw
from benchmarks.study.findings import Findings, View, compare_all
from benchmarks.study.methods import (
    BY_LOSSES,
    METHODS,
    SUM,
    TUNED,
    UNTUNED,
    constants,
    family,
    make_optimizer,
    names,
)
from benchmarks.study.plan import (
    FIRST_FINAL_SEED,
    GRID,
    Candidate,
    Choice,
    Config,
    Entry,
    equal_steps,
    find_plateau,
    plan,
    rate,
    search,
)
from benchmarks.study.problem import load, make
from benchmarks.study.problems import burgers, qm9
from benchmarks.study.problems.heads import LinearHeads
from benchmarks.study.report import number, sentence, write_state
from benchmarks.study.results import COSTS, RUNS, append_rows, load_rows, read_metrics, read_scores
from benchmarks.study.rules import NormalisedSTCH
from benchmarks.study.study import Study
from benchmarks.study.training import run, score, train
from benchmarks.study.weightings import COUNT, EQUAL, LAST, weighting_names, weights

ROOT = Path(__file__).parents[1]
FRESH = FIRST_FINAL_SEED
TINY = """
import torch

class Problem:
    tasks = ("a", "b")
    steps, evaluations, doublings = 8, 4, 0

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
    """Reads what was run, sorted and without the time that it took."""
    found = load_rows(out / "tiny" / "runs.csv")
    return sorted(({**row, "seconds": ""} for row in found), key=str)


def final(method: str, lr: float = 0.1, variant: str = "", steps: int = 8) -> Config:
    """Returns a run of the judgement."""
    return Config(method, lr, EQUAL if method == SUM else variant, FRESH, steps)


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_the_same_rows(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    methods = ["--methods", SUM, TUNED]
    subprocess.run(command(tiny, whole, *methods), cwd=ROOT, check=True, capture_output=True)
    (killed / "tiny").mkdir(parents=True)
    # What a step costs is measured, and measured once.
    costs = (whole / "tiny" / "costs.csv").read_bytes()
    (killed / "tiny" / "costs.csv").write_bytes(costs)
    process = subprocess.Popen(
        command(tiny, killed, *methods),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    runs = killed / "tiny" / "runs.csv"
    while len(load_rows(runs)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with open(runs, "a") as file:
        file.write("sum,0.1")  # a line that the kill cut short
    before = load_rows(runs)
    assert len(before) < len(rows(whole))
    subprocess.run(command(tiny, killed, *methods), cwd=ROOT, check=True, capture_output=True)
    assert load_rows(runs)[: len(before)] == before
    assert rows(killed) == rows(whole)
    count = len(rows(whole))
    tables = [(out / "tiny" / "equal-compute.md").read_text() for out in (whole, killed)]
    assert tables[0] == tables[1]
    assert (killed / "tiny" / "equal-compute.png").exists()
    again = command(tiny, whole, "--again", "--methods", SUM)
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True)
    added = load_rows(whole / "tiny" / "runs.csv")[count:]
    assert {(row["seed"], row["steps"]) for row in added} == {("102", "8"), ("103", "8")}
    said = (whole / "tiny" / "sentence.md").read_text()
    assert re.search(r" With 2 further seeds: sum, \S+ % \[\S+, \S+\], \w+\.$", said.strip())
    assert (whole / "tiny" / "equal-compute.md").read_text() == tables[0]
    assert re.search(
        r"\| tiny \| 2 of \d+ \| 8 \| complete \|\n", (killed / "state.md").read_text()
    )


def test_a_run_that_fails_is_one_line(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(TINY.replace("y = self.model(x)", "y = self.model(x) * float('inf')"))
    row = run(str(path), final(SUM))
    assert row["error"] == "FloatingPointError: a loss is not finite at step 1"
    path = tmp_path / "raising.py"
    path.write_text(TINY.replace("y = self.model(x)", "raise ValueError('first\\nsecond')"))
    row = run(str(path), final(SUM))
    assert row["error"] == "ValueError: first"
    append_rows(tmp_path / "runs.csv", RUNS, [row])
    (read,) = load_rows(tmp_path / "runs.csv")
    assert read_scores([read]) == {final(SUM): float("-inf")}


def entry(*variants: str) -> Entry:
    return Entry("m", variants or ("",), 1.0)


def search_all(
    each: Entry,
    first: Mapping[Candidate, float],
    later: Mapping[Candidate, float],
    finished: Mapping[Config, float] = MappingProxyType({}),
) -> tuple[dict[Config, float], Choice | None]:
    """Searches to the end: `first` are the scores with the first seed, `later` with the others."""
    scores = dict(finished)
    k_of = {rate(k): k for k in range(-14, 3)}
    for _ in range(50):
        missing, choice, _ = search(each, scores, 10)
        if not missing:
            return scores, choice
        for config in missing:
            candidate = Candidate(k_of[config.lr], config.variant)
            table = first if config.seed == 0 else later
            scores[config] = table.get(candidate, -9.0)
    raise AssertionError("the search does not end")


def test_a_learning_rate_that_fails_is_not_chosen_and_the_rest_goes_on() -> None:
    first = {Candidate(k, ""): -abs(k + 5.0) for k in GRID} | {Candidate(-5, ""): -math.inf}
    _, choice = search_all(entry(), first, {Candidate(-4, ""): -1.0})
    assert choice == Choice("m", rate(-4), "")
    _, choice = search_all(entry(), dict.fromkeys(first, -math.inf), {})
    assert choice is None
    peak = {Candidate(k, ""): -abs(k + 5.0) for k in GRID}
    _, choice = search_all(entry(), peak, dict.fromkeys(peak, -math.inf))
    assert choice is None


def test_the_three_best_of_one_seed_are_judged_by_three() -> None:
    """One seed alone chooses by chance; the winner's neighbours must have been tried as well."""
    values = {-7: 0.1, -6: 0.2, -5: 0.9, -4: 0.8, -3: 0.7}
    first = {Candidate(k, ""): value for k, value in values.items()}
    later = {Candidate(-5, ""): 0.1, Candidate(-4, ""): 0.2, Candidate(-3, ""): 0.8}
    scores, choice = search_all(entry(), first, later)
    assert choice == Choice("m", rate(-3), "")
    assert Config("m", rate(-2), "", 0, 10) in scores  # its neighbour, beyond the grid
    assert {config.seed for config in scores} == {0, 1, 2}


def test_the_best_of_three_seeds_is_kept_when_its_neighbours_begin_better() -> None:
    """What a neighbour does with the first seed doesn't discard three seeds of another."""
    values = {-7: -1.0, -6: -0.9, -5: 0.7, -4: 0.8, -3: 0.6}
    first = {Candidate(k, ""): value for k, value in values.items()} | {Candidate(-2, ""): 0.9}
    later = {Candidate(-5, ""): 0.1, Candidate(-4, ""): 0.2, Candidate(-3, ""): 0.8}
    scores, choice = search_all(entry(), first, later)
    assert {Config("m", rate(-2), "", seed, 10) for seed in range(3)} <= set(scores)
    assert choice == Choice("m", rate(-3), "")


@pytest.mark.parametrize("variant", ["a", "b"])
def test_what_ran_with_three_seeds_for_another_purpose_counts(variant: str) -> None:
    """For the plateau, or under an alias: a better mean can't be passed over for its first seed."""
    first = {Candidate(k, "a"): -abs(k + 5.0) for k in GRID} | {Candidate(-2, "b"): -2.5}
    scores = {0: first.get(Candidate(-2, variant), -2.5), 1: 3.0, 2: 3.0}
    finished = {Config("m", rate(-2), variant, seed, 10): score for seed, score in scores.items()}
    _, choice = search_all(entry("a", "b"), first, {}, finished)
    assert choice == Choice("m", rate(-2), variant)
    other = {run._replace(steps=9): score for run, score in finished.items()}
    _, choice = search_all(entry("a", "b"), first, {Candidate(-5, "a"): 0.0}, other)
    assert choice == Choice("m", rate(-5), "a")


def test_the_default_decay_shares_the_runs_of_the_searched_one(tmp_path: Path) -> None:
    study = Study("adult", tmp_path)
    columns = [{"method": name, "seconds": 1.0} for name in (SUM, BY_LOSSES)]
    append_rows(tmp_path / "adult" / "costs.csv", COSTS, columns)
    entries = study.entries()
    assert set(entries) == {SUM, TUNED, BY_LOSSES, UNTUNED}
    assert entries[UNTUNED] == Entry(BY_LOSSES, ["decay=0.9"], 1.0)
    assert entries[BY_LOSSES].variants[0] == "decay=0.9"
    assert inspect.signature(mtlopt.Balanced).parameters["decay"].default == 0.9


def test_the_state_counts_the_runs_that_are_left(tmp_path: Path) -> None:
    """First those of the plateau: two sets of weights, three rates and three seeds."""
    append_rows(tmp_path / "many" / "costs.csv", COSTS, [{"method": SUM, "seconds": 1.0}])
    study = Study("many", tmp_path)
    assert re.search(
        r"\| many \| 2 of \d+ \| \? \| begun, 18 runs or more left \|", write_state([study])
    )
    done = [{**config._asdict(), "score": 0.0} for config in study.plan().missing[:5]]
    append_rows(tmp_path / "many" / "runs.csv", RUNS, done)
    assert "begun, 13 runs or more left" in write_state([study])


def test_the_best_learning_rate_is_never_at_the_edge_of_the_grid() -> None:
    """The grid grows until the best has been tried on both sides."""
    first = {Candidate(k, ""): -abs(k + 1.0) for k in range(-14, 3)}
    scores, choice = search_all(entry(), first, first)
    tried = sorted({config.lr for config in scores})
    assert choice == Choice("m", rate(-1), "")
    assert (tried[0], tried[-1]) == (rate(-7), rate(0))


def test_every_constant_is_tried_at_the_best_rate_and_chosen_like_one() -> None:
    variants = ("published", "a", "b")
    first = {Candidate(k, "published"): -abs(k + 5.0) for k in GRID}
    first |= {Candidate(-5, "a"): 1.0, Candidate(-5, "b"): -0.5}
    scores, choice = search_all(entry(*variants), first, first)
    assert choice == Choice("m", rate(-5), "a")
    assert {(c.lr, c.variant) for c in scores if c.variant != "published"} == {
        *((rate(-5), "a"), (rate(-5), "b")),
        *((rate(-6), "a"), (rate(-4), "a")),  # the neighbours of the choice
    }


def test_every_constant_gets_as_many_runs_as_weights_of_the_sum_that_need_no_training() -> None:
    for tasks in (("a", "b"), ("a", "b", "c"), tuple("abcd"), tuple(map(str, range(40)))):
        problem = type("Problem", (), {"tasks": tasks, "weightings": None})
        assert len(set(weighting_names(problem)) - {LAST}) == 1 + COUNT
    assert {len(constants(method)) for method in METHODS} == {1, 1 + COUNT}


def test_the_sum_of_burgers_losses_may_weigh_each_of_them_up_and_down() -> None:
    problem = load("burgers")
    found = {name: weights(problem, name) for name in weighting_names(problem) if name != LAST}
    for task in burgers.Problem.tasks:
        others = {found[f"{task} × 5"][other] for other in burgers.Problem.tasks if other != task}
        assert len(others) == 1
        assert found[f"{task} × 5"][task] == pytest.approx(5 * others.pop())
        assert found[f"{task} / 5"][task] == pytest.approx(min(found[f"{task} / 5"].values()))


def test_the_steps_double_until_the_sum_stops_gaining() -> None:
    """With the better of two sets of weights: equal ones may be stuck in one unit."""
    gains = {10: 0.0, 20: 0.1, 40: 0.11, 80: 0.1105}
    both = Entry(SUM, [EQUAL, "1 / losses", "1 / norms"], 1.0)

    def scored(doublings: int) -> tuple[int | None, float]:
        scores: dict[Config, float] = {}
        for _ in range(9):
            missing, steps, gain = find_plateau(both, scores, 10, doublings)
            if not missing:
                return steps, gain
            scores |= {
                config: gains[config.steps] if config.variant == "1 / norms" else -0.1
                for config in missing
            }
        raise AssertionError("the doubling does not end")

    assert scored(3) == (40, 0.0)
    steps, gain = scored(1)  # The limit, and what the last doubling gained.
    assert (steps, round(gain, 9)) == (20, 0.1)


def test_at_equal_compute_a_dear_method_takes_fewer_steps_and_a_cheap_one_more() -> None:
    assert [equal_steps(300, ratio) for ratio in (0.5, 0.96, 1.0, 1.04, 1.2, 2.0, 1000)] == [
        *(600, 300, 300, 300, 250, 150, 1),
    ]


def test_the_judgement_has_fresh_seeds_and_both_budgets() -> None:
    entries = {
        SUM: Entry(SUM, [EQUAL], 1.0),
        TUNED: Entry(SUM, [EQUAL, "w"], 1.0),
        "m": Entry("m", [""], 4.0),
    }
    scores: dict[Config, float] = {}
    limits = {"tuned": TUNED, "first": 12, "doublings": 0, "seeds": 15}
    while (found := plan(entries, scores, **limits)).missing:  # type: ignore[arg-type]
        best = {SUM: rate(-4), "m": rate(-5)}
        scores |= {
            config: -abs(math.log(config.lr / best[config.method])) + (config.variant == "w")
            for config in found.missing
        }
    assert found.choices[SUM] == Choice(SUM, rate(-4), EQUAL)
    assert found.choices[TUNED] == Choice(SUM, rate(-4), "w")
    for view, steps in ((found.at_equal_compute, 3), (found.at_plateau, 12)):
        assert [run.seed for run in view["m"]] == list(range(FRESH, FRESH + 15))
        assert {run.steps for run in view["m"]} == {steps}
        assert {run.steps for run in view[TUNED]} == {12}
    assert found.again["m"] == found.choices["m"].runs(range(FRESH + 15, FRESH + 30), 3)
    assert not {run for own in found.again.values() for run in own} & set(scores)
    # The tuned sum, given the compute of the dearest method.
    assert {run.steps for run in found.at_plateau[f"{TUNED}, 4.0 × the steps"]} == {48}


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_selection_never_sees_the_test_split(tiny: Path, tmp_path: Path, lr: float) -> None:
    """A test split that says the opposite changes no choice; a run of the search never asks it."""
    liar = tmp_path / "liar.py"
    sign = "(self.asked.append(split), -1 if split == 'test' else 1)[1]"
    liar.write_text(TINY.replace("1 / (1 +", f"{sign} / (1 +"))
    asked: list[str] = []
    problem = load(str(liar))
    problem.asked = asked  # type: ignore[attr-defined]
    config = final(SUM, lr)
    honest = run(str(tiny), config)
    made = make(problem, config.seed)
    lying = train(made, make_optimizer(made, SUM, lr, EQUAL), config)
    for key in ("score", "step", "validation"):
        assert honest[key] == lying[key]
    assert lying["test"] == {task: -value for task, value in honest["test"].items()}
    assert asked[-2:] == ["test"] * 2
    assert asked.count("test") == len(problem.tasks)
    asked.clear()
    assert "test" not in run(str(liar), config._replace(seed=2))
    assert set(asked) == {"validation"}


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # cvxpy, on Nash-MTL
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_learns(method: str, tiny: Path) -> None:
    problem = load(str(tiny))
    if method not in names(problem):
        pytest.skip("not for two tasks")
    before = make(problem, 0).metrics("validation")
    for variant in [EQUAL] if method == SUM else constants(method):
        row = run(str(tiny), final(method, 0.03, variant, steps=20)._replace(seed=0))
        if "rate=" in variant or "weight_lr=" in variant or "mu=" in variant:
            assert "error" not in row or "not finite" in row["error"], row
        else:
            assert "error" not in row, row
            assert row["score"] > score(before, ())


def test_a_constant_that_is_searched_changes_the_method(tiny: Path) -> None:
    for method in METHODS:
        found = {
            str(run(str(tiny), final(method, 0.03, variant, steps=20)._replace(seed=0)))
            for variant in list(constants(method))[:3]
            if method != SUM
        }
        assert method == SUM or len(found) == min(3, len(constants(method))), method


def test_the_weights_that_are_searched_are_the_same_for_every_seed(tiny: Path) -> None:
    """Equal weights first; by losses all losses begin alike, by norms all gradients."""
    problem = load(str(tiny))
    before = torch.random.get_rng_state()
    found = {name: weights(problem, name) for name in weighting_names(problem)}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert next(iter(found)) == EQUAL
    assert found[EQUAL] == {"a": 1, "b": 1}
    first = make(problem, 0)
    losses = first.losses(first.tasks, *next(first.batches()))
    a, b = losses["a"].item(), losses["b"].item()
    by_losses = found["1 / losses"]
    assert by_losses["a"] * a == pytest.approx(by_losses["b"] * b)
    norms = {}
    for task in first.tasks:
        gradients = torch.autograd.grad(losses[task], first.shared or (), retain_graph=True)
        norms[task] = torch.cat([g.flatten() for g in gradients]).norm().item()
    by_norms = found["1 / norms"]
    assert by_norms["a"] * norms["a"] == pytest.approx(by_norms["b"] * norms["b"])
    assert len({each["a"] / each["b"] for each in found.values()}) == 1 + COUNT + 1


def test_the_sum_may_be_weighted_by_the_losses_with_which_a_plain_sum_ended(tiny: Path) -> None:
    """Against a plain loop: the last tenth of 40 steps, Adam at 0.01 with a cosine schedule."""
    tiny.write_text(TINY.replace("doublings = 8, 4, 0", "doublings = 10, 4, 2"))
    problem = load(str(tiny))
    found = weights(problem, LAST)
    trained = make(problem, 0)
    adam = torch.optim.Adam(trained.model.parameters(), lr=0.01)
    ends = {"a": 0.0, "b": 0.0}
    batches = trained.batches()
    for step in range(40):
        for group in adam.param_groups:
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 40)) / 2
        losses = trained.losses(trained.tasks, *next(batches))
        adam.zero_grad()
        sum(losses.values()).backward()
        adam.step()
        if step >= 36:
            ends = {task: ends[task] + losses[task].item() / 4 for task in ends}
    assert found["a"] * ends["a"] == pytest.approx(found["b"] * ends["b"], rel=1e-4)
    assert found["a"] + found["b"] == pytest.approx(2)


def test_the_passes_of_a_step_are_counted(tiny: Path) -> None:
    costs = measure_costs(str(tiny), [SUM, "independent", "PCGrad", "GradNorm"], 1)
    assert [(row["forward"], row["backward"]) for row in costs] == [(1, 1), (2, 2), (1, 2), (1, 3)]


def test_a_method_that_a_problem_is_not_for_is_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(TINY.replace("self.model = self.features =", "self.model ="))
    _, row = measure_costs(str(path), [SUM, "PCGrad, features"], 1)
    assert row == {
        "method": "PCGrad, features",
        "error": "LookupError: the problem defines no `features`",
    }


def test_the_problem_of_the_how_to_page_is_short_and_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/own-problem.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    assert sum(bool(line.strip()) for line in block.split("class Problem")[1].splitlines()) <= 30
    (tmp_path / "digits.py").write_text(block)
    row = run(str(tmp_path / "digits.py"), final("independent", 0.01, steps=20))
    assert "error" not in row, row
    assert row["test"].keys() == {"digit", "rest"}


def test_the_pages_on_the_results_have_every_file_of_them() -> None:
    pages = [ROOT / "docs/does-it-help.md", *(ROOT / "docs/study").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for file in (ROOT / "benchmarks/results/study").rglob("*"):
        if file.suffix in (".md", ".png") and "own-problem" not in str(file):
            assert str(file.relative_to(ROOT)) in text, file


def test_the_rows_that_the_page_on_choosing_quotes_are_those_of_the_summary() -> None:
    page = (ROOT / "docs/how-to/choose-a-method.md").read_text(encoding="utf-8")
    summary = (ROOT / "benchmarks/results/study/headline.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in summary.splitlines()}
    quoted = re.findall(r"\*([^*|]+)\* ([−+][\d.]+ [▲▼])", page)
    assert len(quoted) >= 6
    for method, value in quoted:
        assert f" {value} |" in rows[method], (method, value)


def test_whatever_was_better_was_better_again_with_further_seeds() -> None:
    found = 0
    for file in (ROOT / "benchmarks/results/study").rglob("equal-compute.md"):
        names_ = re.findall(r"^\| ([^|]+) \|.*▲ better", file.read_text(encoding="utf-8"), re.M)
        said = (file.parent / "sentence.md").read_text(encoding="utf-8").partition("further seeds:")
        for name in names_:
            assert re.search(rf"[ ;]{re.escape(name)}, \+[^;]*, better[;.]", said[2]), (file, name)
            found += 1
    assert found >= 6


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ((BY_LOSSES, "decay=0.9", "2979"), "its gain is"),
        (("sum of logarithms", "", "2696"), "that of the sum of logarithms"),
    ],
)
def test_the_gain_on_qm9_with_its_three_energies_counted_once(
    choice: tuple[str, str, str], words: str
) -> None:
    page = (ROOT / "docs/does-it-help.md").read_text(encoding="utf-8")
    rows = load_rows(ROOT / "benchmarks/results/study/qm9_normalised/runs.csv")

    def tests(method: str, variant: str, steps: str) -> dict[str, dict[str, float]]:
        return {
            row["seed"]: read_metrics(row["test"])
            for row in rows
            if (row["method"], row["variant"], row["steps"]) == (method, variant, steps)
            and FRESH <= int(row["seed"]) < FRESH + 15
        }

    rival = tests(SUM, "1 / last losses", "3200")
    own = tests(*choice)
    usual = {
        name: np.mean([each[name] for each in rival.values()])
        for name in set(next(iter(rival.values()))) - {"H", "G"}
    }
    gains = [
        100 * np.mean([(rival[seed][name] - own[seed][name]) / usual[name] for name in usual])
        for seed in rival
    ]
    half = 2.145 * np.std(gains, ddof=1) / len(gains) ** 0.5  # Student's t, 14 degrees of freedom
    assert len(gains) == 15
    low, mean, high = (f"{np.mean(gains) + each:.1f}" for each in (-half, 0.0, half))
    assert f"{words} {mean} % [{low}, {high}]" in page


def test_a_difference_is_the_mean_relative_change_against_the_rival_seed_by_seed() -> None:
    rival = {0: {"error": 2.0, "auc": 0.5}, 1: {"error": 4.0, "auc": 0.5}}
    own = {0: {"error": 1.0, "auc": 0.6}, 1: {"error": 6.0, "auc": 0.5}, 2: {"error": 0.0}}
    # Of the rival's means, 3 and 0.5: an error one lower and an AUC 0.1 higher, then two higher.
    expected = [100 * (1 / 3 + 0.2) / 2, 100 * (-2 / 3) / 2]
    assert differences(own, rival, ("error",)) == pytest.approx(expected)


def test_holm_corrects_by_the_number_of_comparisons_that_are_left() -> None:
    """The smallest of four times four, the next times three, and never less than one before."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_a_method_is_better_only_behind_the_corrected_test() -> None:
    noise = [1.0, -1.0, 0.5, -0.5, 0.2, -0.2, 0.0]
    found = compare(
        {
            "good": [5 + each for each in noise],
            "bad": [-5 + each for each in noise],
            "unclear": [0.7 + each for each in noise],
            "same": [0.0] * 7,
        }
    )
    words = {name: each.word for name, each in found.items()}
    assert words == {"good": "better", "bad": "worse", "unclear": "undecided", "same": "undecided"}
    # Alone it would pass: the interval is not corrected, the word is.
    alone = compare({"unclear": [0.7 + each for each in noise]})["unclear"]
    assert alone.low > 0
    assert (alone.word, found["unclear"].low) == ("better", alone.low)


def test_where_all_methods_are_the_same_few_problems_find_a_word() -> None:
    """At most 5 % of problems, with the shared rival that makes mistakes come together."""
    draw = np.random.default_rng(0)
    problems, methods, seeds = 1000, 20, 15
    wrong = 0
    for _ in range(problems):
        rival = draw.normal(size=seeds)
        found = compare({str(m): list(draw.normal(size=seeds) - rival) for m in range(methods)})
        wrong += any(each.word != "undecided" for each in found.values())
    assert 0 < wrong <= 0.05 * problems


def view_of(**means: float) -> View:
    """Returns a view in which every method is that much better, with a little noise."""
    noise = [1.0, -1.0, 0.5, -0.5, 0.2, -0.2, 0.0]
    runs = {name: [final(name)._replace(seed=seed) for seed in range(7)] for name in means}
    tests = {
        run: {"auc": 1 + means[name] / 100 + noise[run.seed] * (0.0001 if name != TUNED else 0)}
        for name, own in runs.items()
        for run in own
    }
    found = compare_all(runs, list(means), tests, ())
    assert found is not None
    return found


def test_the_methods_are_compared_with_the_tuned_sum_at_the_same_seeds() -> None:
    found = view_of(**{TUNED: 0.0, "PCGrad": 1.0, "DWA": -2.0, "MGDA": 0.0})
    assert found.best_first[0] == "PCGrad"
    assert found.best_first[-1] == "DWA"
    assert [found.comparisons[m].word for m in ("PCGrad", "DWA", "MGDA")] == [
        *("better", "worse", "undecided"),
    ]
    assert found.comparisons["PCGrad"].mean == pytest.approx(1.0)


def test_a_method_whose_runs_failed_or_are_missing_is_named_and_not_compared() -> None:
    runs = {name: [final(name)._replace(seed=seed) for seed in (1, 2)] for name in "abc"}
    runs[TUNED] = runs.pop("a")
    tests: dict[Config, Mapping[str, float] | None] = {
        each: {"auc": 0.5} for own in runs.values() for each in own
    }
    tests[runs["b"][0]] = None
    del tests[runs["c"][1]]
    found = compare_all(runs, [TUNED, "b", "c", "d"], tests, ())
    assert found is not None
    assert (list(found.tests), found.failed, found.running) == ([TUNED], {"b": 1}, ["d", "c"])
    del tests[runs[TUNED][0]]
    assert compare_all(runs, [TUNED], tests, ()) is None


def test_single_task_networks_are_one_method_once_all_have_finished() -> None:
    names_ = ["single:x", "single:y", TUNED]
    runs = {name: [final(name)._replace(seed=seed) for seed in (1, 2)] for name in names_}
    tests: dict[Config, Mapping[str, float] | None] = {
        each: {"x": 0.5, "y": 0.25} if name == TUNED else {name[-1]: 0.5}
        for name, own in runs.items()
        for each in own
    }
    found = compare_all(runs, names_, tests, ())
    assert found is not None
    assert found.comparisons["single"].mean == pytest.approx(100 * (0 + 1) / 2)
    del tests[runs["single:y"][1]]
    found = compare_all(runs, names_, tests, ())
    assert found is not None
    assert (list(found.tests), found.running) == ([TUNED], ["single"])


def test_the_figure_has_a_row_per_method_and_a_colour_and_shape_per_family() -> None:
    found = view_of(**{TUNED: 0.0, "PCGrad": 1.0, "DWA": -2.0, "MGDA": -300.0})
    (axes,) = draw(found).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["MGDA", "DWA", TUNED, "PCGrad"]
    assert [text.get_text() for text in axes.texts] == ["◂ −300"]  # too far to the left
    low, high = axes.get_xlim()
    assert high - 1 > 0.02 * (high - low)  # the foremost mark is not cut by the edge
    assert {family(method) for method in METHODS} < STYLES.keys()
    assert len(set(STYLES.values())) == len({colour for colour, _ in STYLES.values()})
    assert len({marker for _, marker in STYLES.values()}) == len(STYLES)


def test_the_sentence_says_what_the_rows_say() -> None:
    def say(**means: float) -> str:
        longer = view_of(**{TUNED: 0.0, f"{TUNED}, 2.0 × the steps": 3.0})
        equal, again = view_of(**means), view_of(**{TUNED: 0.0, "PCGrad": 3.0})
        found = SimpleNamespace(equal=equal, plateau=longer, again=again if SUM in means else None)
        return sentence(cast(Findings, found))

    ahead = say(**{TUNED: 0.0, SUM: -1.0, "PCGrad": 1.0, "DWA": -2.0, "MGDA": 0.0})
    assert "1 of 4 rivals were better than the tuned sum, 2 worse and 1 undecided" in ahead
    assert "over 7 fresh seeds" in ahead
    assert "At equal compute the best mean is that of PCGrad, +1.00 % [" in ahead
    assert "The tuned sum, 2.0 × the steps, gains +3.00 % on itself [" in ahead
    assert "], better. With 7 further seeds: PCGrad, +3.00 % [" in ahead
    assert ahead.endswith("], better.\n")
    behind = say(**{TUNED: 0.0, "DWA": -2.0})
    assert "0 of 1 rivals were better than the tuned sum, 1 worse and 0 undecided" in behind
    assert behind.endswith("no mean is ahead of it.\n")


def test_numbers_are_written_without_a_signed_zero() -> None:
    assert [number(v) for v in (-0.001, 0.126, -12.34, 123.4)] == ["0.00", "+0.13", "−12.3", "+123"]


def test_normalised_stch_is_a_smooth_maximum_after_its_warm_up() -> None:
    rule = NormalisedSTCH(2, mu=0.5)
    warm = torch.tensor([2.0, 8.0])
    assert rule(warm).item() == pytest.approx(math.log(16))
    rule(torch.tensor([4.0, 8.0]))
    rule.step()
    values = torch.tensor([6.0, 4.0])  # Twice and half the means of the warm-up, 3 and 8.
    expected = 2 * 0.5 * math.log(2 ** (1 / 0.5) + 0.5 ** (1 / 0.5))
    assert rule(values).item() == pytest.approx(expected, rel=1e-5)
    rule.step()  # Later epochs change nothing.
    assert rule(values).item() == pytest.approx(expected, rel=1e-5)


def test_linear_heads_are_those_of_torch() -> None:
    heads = LinearHeads(3, ("a", "b", "c"))
    z = torch.randn(5, 3)
    for k, task in enumerate(("c", "a")):
        expected = torch.nn.functional.linear(z, heads.heads[task][None, :3], heads.heads[task][3:])
        assert torch.allclose(heads(z, ("c", "a"))[:, k], expected[:, 0])


def test_the_coulomb_spectrum_of_hydrogen() -> None:
    """Two charges of 1 at one Bohr: diagonal 0.5, off-diagonal 1, eigenvalues 1.5 and -0.5."""
    found = qm9.spectrum(["H", "H"], [[0.0, 0, 0], [0.529177, 0, 0]])
    assert found[:3].tolist() == pytest.approx([1.5, -0.5, 0.0], abs=1e-5)
    assert found.shape == (qm9.ATOMS,)


@pytest.mark.parametrize("name", ["tox21", "adult"])
def test_data_that_are_missing_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run_study", "--problem", name, "--out", str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"MTLOPT_DATA": str(tmp_path)},
    )
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert str(tmp_path) in line


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
        phantoms = importlib.import_module("refuge.photographs.phantoms")
        few = functools.partial(phantoms.phantom_records, counts=counts)
        monkeypatch.setattr("refuge.photographs.data.phantom_records", few)
    monkeypatch.setattr(problem, "evaluations", 1)
    row = run(name, final(SUM, 1e-3, steps=2))
    assert "error" not in row
    assert row["validation"].keys() == row["test"].keys()
    if problem.single:
        assert row["test"].keys() == set(problem.tasks)


def test_the_derivatives_of_the_burgers_network_are_those_of_autograd() -> None:
    network = burgers.Network().double()
    points = torch.rand(7, 2).double().requires_grad_()
    u = network(points)[:, 0]
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), points)
    expected = torch.stack([u, first[:, 0], first[:, 1], second[:, 1]])
    assert torch.allclose(network.derivatives(points.detach()), expected, rtol=1e-12, atol=1e-14)


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
