"""Tiny data sets in every layout, drawn into a temporary folder."""

import subprocess
from pathlib import Path

import pytest

from refuge.tiny_data import ENVIRONMENT, TRAIN_PY, Run, write_released, write_repacked


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
