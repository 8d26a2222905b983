"""Every public name says what it takes, what goes wrong, where it is from, and shows itself."""

import dataclasses
import inspect
from collections.abc import Iterator
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
