"""What a reader must hold in mind: how far a step runs, how deep classes go, who imports whom."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import mtlopt

PACKAGE = Path(mtlopt.__file__).parent
# A folder may import from those before it, and from itself.
FOLDERS = ("_gradients", "_core", "methods")
TASKS = ("a", "b")
# Imported by name alone, with their packages: `import mtlopt.lightning`.
FRAMEWORKS = {"lightning": {"lightning"}, "transformers": {"accelerate", "transformers"}}
OPTIONAL = {"matplotlib", "torchjd"}  # may be imported where they are used, not with the package


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields the dotted names that a module imports, and whether that happens with the module.

    A name is that of a module where `from . import name` allows no telling from an attribute.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"mtlopt.{node.module}" if node.module else "mtlopt"
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in deferred


MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def folder_of(module: str) -> str:
    return module.split("/", maxsplit=1)[0] if "/" in module else ""


@pytest.mark.parametrize("module", [module for module in MODULES if folder_of(module)])
def test_folders_import_one_way(module: str) -> None:
    allowed = FOLDERS[: FOLDERS.index(folder_of(module)) + 1]
    parts = [name.split(".") for name, _ in imports(PACKAGE / module)]
    assert {part[1] for part in parts if part[0] == "mtlopt" and len(part) > 1} <= {*allowed}


def test_modules_import_no_circle() -> None:
    """Imports for the type checker alone are not counted: they run at no time."""
    graph = {}
    for module in MODULES:
        found = {name for name, at_once in imports(PACKAGE / module) if at_once}
        graph[module] = {
            other
            for other in MODULES
            if any(
                f"{name}.".startswith(f"mtlopt.{other.removesuffix('.py').replace('/', '.')}.")
                for name in found
            )
        } - {module}
    while graph:
        leaves = {module for module, needed in graph.items() if not needed & graph.keys()}
        assert leaves, graph
        for module in leaves:
            del graph[module]


def test_the_package_is_three_folders_and_a_few_modules() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == {
        *FOLDERS
    }
    outside = [module for module in MODULES if not folder_of(module)]
    assert outside == ["__init__.py", "_frameworks.py", "lightning.py", "transformers.py"]
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str) -> None:
    source = (PACKAGE / module).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            signature = node.body[0].lineno - node.lineno
            assert (node.end_lineno or 0) - first.lineno + 1 + signature <= 45, node.name


def test_the_package_is_small() -> None:
    """A bound to be lowered, not raised."""
    assert sum(len((PACKAGE / m).read_text().splitlines()) for m in MODULES) <= 6486


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


# What makes an optimizer of a model with a trunk, and how many files and functions a step may run
# through.
STEPS: dict[str, tuple[Callable[[nn.Module], mtlopt.MultiTaskOptimizer], int, int]] = {
    "joint": (lambda m: mtlopt.JointOptimizer(adam(m), TASKS), 8, 35),
    "balanced": (lambda m: mtlopt.Balanced(adam(m), TASKS), 9, 45),
    "alternating": (lambda m: mtlopt.AlternatingOptimizer(adam(m), TASKS), 8, 35),
    "independent": (lambda m: mtlopt.IndependentOptimizer(adam(m), TASKS), 8, 35),
    "gradnorm": (
        lambda m: mtlopt.GradNorm(adam(m), TASKS, shared=m.get_submodule("trunk").parameters()),
        8,
        55,
    ),
    "pcgrad": (lambda m: mtlopt.PCGrad(adam(m), TASKS), 9, 55),
    "pcgrad, features": (
        lambda m: mtlopt.PCGrad(adam(m), TASKS, features=m.get_submodule("trunk")),
        9,
        70,
    ),
}


@pytest.mark.parametrize("method", STEPS)
def test_a_step_runs_through_few_files_and_functions(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced at the second step, since the first one also looks for mistakes."""
    if (dynamo := sys.modules.get("torch._dynamo.utils")) is not None:
        # A test in this process may have compiled, after which graphs are searched.
        monkeypatch.setitem(dynamo.counters, "aot_autograd", Counter())
    make, most_files, most_functions = STEPS[method]
    model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
    optimizer, x = make(model), torch.randn(5, 4)

    def losses(tasks: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
        z = model["trunk"](x)
        return {task: model[task](z).square().mean() for task in tasks}

    optimizer.step(losses, x)
    called = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            called.add((code.co_filename, code.co_firstlineno, code.co_name))

    sys.setprofile(trace)
    try:
        optimizer.step(losses, x)
    finally:
        sys.setprofile(None)
    functions = {call for call in called if not call[2].startswith("<")}
    assert len({file for file, _, _ in called}) <= most_files, called
    assert len(functions) <= most_functions, sorted(functions)


@pytest.mark.parametrize("name", mtlopt.__all__)
def test_classes_are_three_deep(name: str) -> None:
    member = getattr(mtlopt, name)
    if isinstance(member, type):
        assert sum(kind.__module__.startswith("mtlopt") for kind in member.__mro__) <= 3


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_torch_and_the_standard_library_alone(module: str) -> None:
    for name, at_once in imports(PACKAGE / module):
        root = name.split(".")[0]
        needed = {"mtlopt", "torch"} | FRAMEWORKS.get(module.removesuffix(".py"), set())
        inside = root in needed or root in sys.stdlib_module_names
        assert inside or (not at_once and root in OPTIONAL), name


def test_importing_the_package_loads_no_optional_package() -> None:
    """A clean process: here the tests have loaded them already."""
    program = "import sys, mtlopt; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not (OPTIONAL | set().union(*FRAMEWORKS.values())) & set(loaded)


def test_the_package_exports_names_from_its_modules_alone() -> None:
    """`__init__` holds names only, and every public one is in `__all__`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    assert all(isinstance(node, kinds) for node in tree.body)
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in imported if not name.startswith("_")} <= set(mtlopt.__all__)
    assert all(hasattr(mtlopt, name) for name in mtlopt.__all__)
    assert len(mtlopt.__all__) == len(set(mtlopt.__all__))
