"""Tiny data sets in every layout, drawn into a temporary folder."""

import subprocess
from pathlib import Path

import pytest

from refuge.tiny_data import ENVIRONMENT, TRAIN_PY, Run, entry, paint, write_split, write_table


@pytest.fixture
def repacked(tmp_path: Path) -> Path:
    """Twelve training and four test pictures, alternately with and without glaucoma."""
    folder = tmp_path / "repacked"
    write_split(folder / "train", [entry(f"a{i:02}.jpg", i % 2) for i in range(12)])
    write_split(folder / "test", [entry(f"t{i:02}.jpg", i % 2) for i in range(4)])
    return folder


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """REFUGE's own layout, two pictures a split, with a folder between as zips leave them."""
    folder = tmp_path / "released"
    pictures = {
        "g0001": "Training400/Training400/Glaucoma",
        "n0001": "Training400/Training400/Non-Glaucoma",
        "V0001": "REFUGE-Validation400",
        "V0002": "REFUGE-Validation400",
        "T0001": "zip/Test400",
        "T0002": "zip/Test400",
    }
    masks = {
        "g0001": "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Glaucoma",
        "n0001": "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma",
        "V0001": "REFUGE-Validation400-GT/Disc_Cup_Masks",
        "V0002": "REFUGE-Validation400-GT/Disc_Cup_Masks",
        "T0001": "REFUGE-Test-GT/Disc_Cup_Masks/G",
        "T0002": "REFUGE-Test-GT/Disc_Cup_Masks/N",
    }
    for seed, stem in enumerate(pictures):
        picture, mask = paint(seed)
        for image, place in (
            (picture, f"{pictures[stem]}/{stem}.jpg"),
            (mask, f"{masks[stem]}/{stem}.bmp"),
        ):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / place)
    write_table(
        folder / "Annotation-Training400/Annotation-Training400/Fovea_location.xlsx",
        ("ID", "ImgName", "Fovea_X", "Fovea_Y"),
        [(1, "g0001.jpg", 10.5, 20), (2, "n0001.jpg", 11, 21)],
    )
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma Label", "Fovea_X", "Fovea_Y"),
        [(1, "V0001.jpg", 1, 12, 22), (2, "V0002.jpg", 0, 13, 23)],
    )
    write_table(
        folder / "REFUGE-Test-GT/Glaucoma_label_and_Fovea_location.xlsx",
        ("ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y"),
        [(1, "T0001.jpg", 1, 14, 24), (2, "T0002.jpg", 0, 15, 25)],
    )
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
