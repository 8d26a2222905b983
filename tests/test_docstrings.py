"""Every public name says what it takes, what goes wrong, where it is from, and shows itself."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mtlopt

BASE = mtlopt.MultiTaskOptimizer  # not to be instantiated
NAMES = {name: getattr(mtlopt, name) for name in mtlopt.__all__}


def methods() -> Iterator[tuple[str, Any]]:
    """Yields the public methods that this package defines, each once."""
    seen = set()
    for name, owner in NAMES.items():
        for attribute, value in inspect.getmembers(owner, inspect.isfunction):
            own = value.__module__.startswith("mtlopt") and not attribute.startswith("_")
            if own and value not in seen:
                seen.add(value)
                yield f"{name}.{attribute}", value


METHODS = dict(methods())


def described(text: str) -> set[str]:
    """Returns the names that the sections Args and Attributes describe."""
    section, names = "", set()
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            section = line.strip()
        elif section in ("Args:", "Attributes:") and indent == 4 and ":" in line:
            names.add(line.split(":")[0].strip().lstrip("*"))
    return names


def taken(value: Any) -> set[str]:
    if dataclasses.is_dataclass(value):
        return {field.name for field in dataclasses.fields(value)}
    return set(inspect.signature(value).parameters) - {"self"}


@pytest.mark.parametrize("name", [*NAMES, *METHODS])
def test_every_argument_is_described(name: str) -> None:
    value = (NAMES | METHODS)[name]
    documented = inspect.getdoc(value) or ""
    assert documented
    assert described(documented) == (set() if value is BASE else taken(value))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_shows_an_example_and_names_its_source(name: str) -> None:
    """The examples are run as doctests, with everything else."""
    documented = inspect.getdoc(NAMES[name]) or ""
    assert "Example:\n    >>> " in documented
    assert "References:\n    " in documented
    if NAMES[name] not in (BASE, mtlopt.ConflictReport):
        assert "Raises:\n    " in documented


CLASSES = [
    value
    for value in NAMES.values()
    if isinstance(value, type) and issubclass(value, BASE) and value is not BASE
]


@pytest.mark.parametrize("method", CLASSES)
def test_the_signature_is_the_constructors_with_its_defaults_and_types(method: Any) -> None:
    """Help and the reference would show `(*args, **options)`, which `__new__` takes."""
    shown = inspect.signature(method).parameters
    own = inspect.signature(method.__init__).parameters
    assert list(shown) == [*own][1:]
    for name, parameter in shown.items():
        assert parameter.default == own[name].default
        if parameter.kind != parameter.VAR_KEYWORD:
            assert parameter.annotation not in (Any, inspect.Parameter.empty), name


def test_the_reference_has_inherited_members_once() -> None:
    """`backward` and `base`, which several methods share, under the first of these."""
    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text(encoding="utf-8")
    assert ":inherited-members:" not in page
    assert re.findall(r"^   \.\. auto\w+:: (\w+)$", page, re.MULTILINE) == [
        "diagnostics",
        "diagnostics",
        "backward",
        "base",
    ]
