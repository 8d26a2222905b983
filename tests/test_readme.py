"""What the README and the documentation show runs, and says what they say it prints."""

import copy
import doctest
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchjd.aggregation
import torchjd.scalarization

import mtlopt
from spawned import destroy_group

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# What the glaucoma study and the figures write are tables that a page includes.
OTHERS = (DOCS / "_build", DOCS / "figures", DOCS / "study")
PAGES = [
    README,
    *sorted(page for page in DOCS.rglob("*.md") if not set(OTHERS) & set(page.parents)),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def blocks(page: Path, language: str) -> list[str]:
    """Returns the fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return [block for name, block in FENCE.findall(text) if name == language]


def variant(diff: str, sign: str) -> str:
    """Returns the program before (`-`) or after (`+`) a diff."""
    return "".join(
        line[1:] if line.strip() else line
        for line in diff.splitlines(keepends=True)
        if line[:1] in {sign, " ", "\n"}
    )


class Model(torch.nn.Module):
    """Stands in for the reader's network: a trunk and a head per task."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.trunk = torch.nn.Linear(3, 4)
        self.heads = torch.nn.ModuleDict({task: torch.nn.Linear(4, 1) for task in tasks})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(images).relu()
        return {task: head(features) for task, head in self.heads.items()}


def surroundings() -> dict[str, Any]:
    """Returns what the diff takes as given."""
    tasks = ("disc", "cup")
    images = torch.randn(5, 8, 3)
    return {
        "tasks": tasks,
        "model": Model(tasks),
        "criterion": dict.fromkeys(tasks, torch.nn.functional.mse_loss),
        "loader": [
            (batch, {task: batch.sum(1, keepdim=True) for task in tasks}) for batch in images
        ],
    }


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # Lightning on a newer torch
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And prints what stands in the block of output behind it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy_group)
    names: dict[str, Any] = {"__name__": page.stem}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    printed = ""
    for number, (language, block) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
        if language == "output":
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", block)
            # Other processors and other releases of torch round differently, and training goes on.
            found, shown = ([float(n) for n in NUMBER.findall(text)] for text in (printed, block))
            assert found == pytest.approx(shown, rel=1e-2, abs=0.011)
        if language != "python":
            continue
        if block.lstrip().startswith(">>>"):
            # Names that differ, or doctest takes an earlier block's lines for this one's.
            name = f"{page.name} {number}"
            test = doctest.DocTestParser().get_doctest(block, names, name, str(page), 0)
            test.globs = names  # not a copy: a function of an earlier block sees later names
            assert runner.run(test, clear_globs=False).failed == 0
        else:
            capsys.readouterr()
            exec(compile(block, str(page), "exec"), names)
            printed = capsys.readouterr().out


@pytest.mark.parametrize("diff", blocks(README, "diff"), ids=["ready", "function"])
@pytest.mark.parametrize("sign", ["-", "+"])
def test_the_loop_trains_before_and_after_the_diff(diff: str, sign: str) -> None:
    names = surroundings()
    before = [parameter.clone() for parameter in names["model"].parameters()]
    exec(compile(variant(diff, sign), str(README), "exec"), names)
    after = list(names["model"].parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert isinstance(names["optimizer"], torch.optim.Optimizer)
    assert isinstance(names["optimizer"], mtlopt.MultiTaskOptimizer) == (sign == "+")


def test_the_first_page_shows_the_readmes_first_diff_abridged() -> None:
    (short,) = blocks(DOCS / "index.md", "diff")
    whole = blocks(README, "diff")[0].splitlines()
    assert set(short.splitlines()) - {""} <= set(whole)


def test_both_sides_of_the_diff_minimise_the_same_sum() -> None:
    """The reader changes the method and nothing else."""
    _, diff = blocks(README, "diff")
    before = surroundings()
    before["loader"] = before["loader"][:1]
    after = dict(before, model=copy.deepcopy(before["model"]), loader=[])
    exec(compile(variant(diff, "-"), str(README), "exec"), before)
    exec(compile(variant(diff, "+"), str(README), "exec"), after)
    values = after["losses"](before["tasks"], *before["loader"][0])
    assert torch.equal(sum(values.values()), before["loss"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bmtlopt\.([A-Za-z]\w*)", text))
    modules = {file.stem for file in (ROOT / "mtlopt").glob("[a-z]*.py")}
    assert all(hasattr(mtlopt, name) or name in modules for name in names), names


def test_the_readme_links_only_to_files_that_exist() -> None:
    """The build of the documentation checks the other pages."""
    links = LINK.findall(FENCE.sub("", README.read_text(encoding="utf-8")))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_a_page_names_only_tests_that_exist() -> None:
    named = [
        match
        for text in (page.read_text(encoding="utf-8") for page in PAGES)
        for match in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", text)
    ]
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def test_the_benchmarks_page_has_every_file_of_results() -> None:
    """The tables are the files, so none is typed or forgotten."""
    included = re.findall(
        r"benchmarks/results/(\S+\.md)", (ROOT / "docs/benchmarks.md").read_text()
    )
    assert sorted(included) == sorted(f.name for f in (ROOT / "benchmarks/results").glob("*.md"))


def test_measurements_are_quoted_as_the_results_have_them() -> None:
    results = "".join(file.read_text() for file in (ROOT / "benchmarks/results").rglob("*.md"))
    measured = set(re.findall(r"[\d.]*\d", results))
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    quoted = set(re.findall(r"([\d.]*\d) (?:ms|MB|µs)\b", pages))
    assert len(quoted) > 8
    assert quoted <= measured


CONSTRUCTORS = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README.read_text("utf-8"), re.MULTILINE)


def test_the_table_lists_every_method() -> None:
    methods = {
        name
        for name in mtlopt.__all__
        if isinstance(getattr(mtlopt, name), type)
        and issubclass(getattr(mtlopt, name), mtlopt.MultiTaskOptimizer)
    }
    assert {name for name, _ in CONSTRUCTORS} == methods - {"MultiTaskOptimizer"}


@pytest.mark.parametrize(("name", "constructor"), CONSTRUCTORS)
def test_a_constructor_in_the_table_trains(name: str, constructor: str) -> None:
    names = surroundings()
    given = names | {"mtlopt": mtlopt, "torch": torch, "torchjd": torchjd}
    given["adam"] = torch.optim.Adam(names["model"].parameters(), lr=1e-3)
    optimizer = eval(constructor, given)
    assert type(optimizer).__name__ == name
    model, criterion = names["model"], names["criterion"]

    def losses(tasks: Sequence[str], images: Any, targets: Any) -> dict[str, torch.Tensor]:
        outputs = model(images)
        return {task: criterion[task](outputs[task], targets[task]) for task in tasks}

    before = copy.deepcopy(model.heads)
    optimizer.step(losses, *names["loader"][0])
    for old, new in zip(before.parameters(), model.heads.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_pages_that_the_readme_links_to_read_without_a_build() -> None:
    """GitHub shows roles and directives as they are written, and has no ignored pictures."""
    links = LINK.findall(FENCE.sub("", README.read_text(encoding="utf-8")))
    pages = [ROOT / link for link in links if link.startswith("docs/")]
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        built = r"^```\{|\{\w+:\w+\}`|^\{\.|figures/\w+\.png"
        assert not re.search(built, text, re.MULTILINE), page


def commands(*, with_make: bool) -> Iterator[str]:
    """Yields the command lines of the section on the demo and the tests."""
    section = README.read_text(encoding="utf-8").split("## Demo and tests")[1].split("\n## ")[0]
    for name, block in FENCE.findall(section):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            if name == "bash" and command and command.startswith("make ") == with_make:
                yield command


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_the_commands_shown_beside_it(tmp_path: Path) -> None:
    """As on a fresh machine: in a copy, where no environment is marked as complete.

    `make test VENV=...` hands its variables down to this test, which asks for the defaults.
    """
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHON", "VENV"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    run: list[str] = []
    for command in commands(with_make=True):
        printed = subprocess.run(
            [*command.split(), "--dry-run", "--no-print-directory"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        run += [line for line in printed.splitlines() if not line.startswith("touch ")]
    assert set(run) == set(commands(with_make=False))
