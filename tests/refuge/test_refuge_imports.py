"""The program's modules import one another in one direction, as its README says."""

import ast
import re
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "examples/refuge"
PACKAGE = PROGRAM / "refuge"


def imported(file: Path) -> set[str]:
    """Returns the modules of the package that a file imports, as `folder.module` or `module`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refuge."):
            names.add((node.module or "").removeprefix("refuge."))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("refuge") for alias in node.names), file
    return names


def layers() -> list[list[str]]:
    """Reads the modules and folders of each line of the README's table, from top to bottom."""
    text = (PROGRAM / "README.md").read_text(encoding="utf-8").partition("## The code")[2]
    lines = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `refuge/")]
    return [
        [name.removeprefix("refuge/").removesuffix(".py") for name in re.findall("`(.+?)`", line)]
        for line in lines
    ]


def test_imports_go_down_the_readmes_table() -> None:
    """Within a line they may not form a circle either: each module imports those before it."""
    level = {name.rstrip("/"): row for row, names in enumerate(layers()) for name in names}
    files = {file.relative_to(PACKAGE): file for file in PACKAGE.rglob("*.py")}
    assert level.keys() == {path.parts[0].removesuffix(".py") for path in files} - {"__init__"}
    graph: dict[str, set[str]] = {}
    for path, file in files.items():
        name = ".".join(path.with_suffix("").parts)
        graph[name] = imported(file)
        own = level.get(name.split(".")[0], -1)
        for other in graph[name]:
            assert level[other.split(".")[0]] >= own, f"{name} imports {other}"
    done: set[str] = set()
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert done == graph.keys(), "these import one another in a circle"
