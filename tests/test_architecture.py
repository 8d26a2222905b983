"""The modules import one another in one direction, and nothing but torch from outside."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtlopt

PACKAGE = Path(mtlopt.__file__).parent

# A module may import those of the lines before its own; a new one gets its place here.
LAYERS = (
    {"_classes", "_follower", "_losses", "_shards", "_torchjd"},
    {"_balance", "_gradients", "_watch"},
    {"_saved"},
    {"_base", "_distributed", "_passes", "_updates"},
    {"_build", "_collect", "_rows", "_wrapper"},
    {"_conflicts", "_features", "_panel", "_sequential"},
    {"_combining"},
    {"_aggregated", "_alternating", "_gradnorm", "_independent", "_one_pass", "_pcgrad"},
    {"_joint", "_scalarized"},
    {"_frameworks"},
    {"lightning", "transformers"},
)
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


def inner_imports(path: Path) -> set[str]:
    """Returns the modules of the package that a module imports, at once or later."""
    parts = [name.split(".") for name, _ in imports(path)]
    return {part[1] for part in parts if part[0] == "mtlopt" and len(part) > 1}


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_the_package_is_flat_and_its_modules_are_the_listed_ones() -> None:
    assert sorted(module for layer in LAYERS for module in layer) == MODULES
    assert [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE] == []
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_those_below_it(module: str) -> None:
    """So no cycle is possible, and no method knows another."""
    below: set[str] = set()
    for layer in LAYERS:
        if module in layer:
            break
        below |= layer
    assert inner_imports(PACKAGE / f"{module}.py") <= below


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_a_module_needs_torch_and_the_standard_library_alone(module: str) -> None:
    for name, at_once in imports(PACKAGE / f"{module}.py"):
        root = name.split(".")[0]
        needed = {"mtlopt", "torch"} | FRAMEWORKS.get(module, set())
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


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_enough_to_say_one_thing(module: str) -> None:
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
