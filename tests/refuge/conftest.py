"""Tiny data sets in every layout, drawn into a temporary folder."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import train
from refuge.settings import METHODS
from tiny_photographs import ENVIRONMENT, TINY, TRAIN_PY, Run, write_released, write_repacked

SAVEFIG = Figure.savefig


@contextmanager
def unrendered() -> Iterator[None]:
    """Makes figures without rendering them, which takes longer than a tiny run's training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, opened, **__: opened.write(b"figure"))
        yield


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[None]:
    """In these tests alone: a worker may take one of another folder between two of them."""
    with unrendered():
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders figures all the same."""
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two epochs by every method, from one seed, on the same photographs.

    They lie in folders of their own beside `data`; whoever changes one works on a copy.
    """
    home = tmp_path_factory.mktemp("finished")
    write_repacked(home / "data")
    runs = {}
    for method in (*METHODS, "torchjd:MGDA"):
        runs[method] = home / method.replace(":", "-")
        arguments = ["--data", home / "data", *TINY, "--method", method, "--epochs", 2]
        arguments += ["--mirror", "off"]  # as in the plain loops they are compared with
        with unrendered():
            assert train.main([*map(str, arguments), "--out", str(runs[method])]) == 0
    return runs


@pytest.fixture
def repacked(tmp_path: Path) -> Path:
    """Twelve training and four test pictures, alternately with and without glaucoma."""
    folder = tmp_path / "repacked"
    write_repacked(folder)
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """REFUGE's own layout, two pictures a split, with a folder between as zips leave them."""
    folder = tmp_path / "released"
    write_released(folder)
    return folder


@pytest.fixture
def train_py(tmp_path: Path) -> Run:
    """Runs `train.py` as a user does, in an empty folder."""

    def run(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*TRAIN_PY, *map(str, arguments)],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
