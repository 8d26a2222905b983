"""What is measured of a split, against numbers worked by hand."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from refuge.measurement.diagnosis import RatioClassifier
from refuge.measurement.evaluation import (
    Evaluation,
    Predictions,
    Trained,
    diagnose,
    evaluate,
    measure,
    score,
)
from refuge.measurement.report import format_table, missing_ratios
from refuge.photographs.data import Photographs, load_splits
from refuge.photographs.records import Record
from tiny_photographs import SIZE, entry, write_split

TASKS = ("disc", "cup", "fovea", "glaucoma")
METRICS = {
    "glaucoma_auc",
    "glaucoma_auc_fc",
    "glaucoma_auc_vcdr",
    "glaucoma_sensitivity",
    "glaucoma_specificity",
    "glaucoma_brier",
    "glaucoma_brier_fc",
    "glaucoma_reference_sensitivity",
    "disc_dice",
    "cup_dice",
    "fovea_error",
    "fovea_error_original",
    "vcdr_error",
}


class Oracle(nn.Module):
    """Answers with fixed logits and refuses tasks it was not made for."""

    def __init__(self, **logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.sizes: list[int] = []

    def forward(self, images: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        self.sizes.append(len(images))
        return {task: self.logits[task][None] for task in tasks}


def load_test_split(folder: Path) -> Photographs:
    return load_splits(str(folder), 32, seed=0)["test"]


def judge(model: nn.Module, pictures: Photographs, tasks: Sequence[str]) -> Evaluation:
    return evaluate(Trained(model, tasks, RatioClassifier(10, -5)), pictures)


def test_a_network_that_knows_the_masks_scores_full_marks(repacked: Path) -> None:
    """The painted pictures share one mask; the fovea's map is one hot pixel."""
    pictures = load_test_split(repacked)
    everything = pictures[torch.arange(len(pictures))]
    disc = everything.targets["disc"][0].float() * 40 - 20
    cup = everything.targets["cup"][0].float() * 40 - 20
    fovea = torch.full((32, 32), -60.0)
    fovea[16, 24] = 60.0
    model = Oracle(disc=disc, cup=cup, fovea=fovea, glaucoma=torch.tensor(0.0))
    metrics = judge(model, pictures, TASKS).metrics
    assert set(metrics) == METRICS
    assert metrics["disc_dice"] == metrics["cup_dice"] == 1
    # True point: (30.5 * 32 / 40 - 0.5, 20.5 * 32 / 40 - 0.5) = (23.9, 15.9).
    assert metrics["fovea_error"] == pytest.approx(np.hypot(0.1, 0.1), rel=1e-4)
    assert metrics["fovea_error_original"] == pytest.approx(np.hypot(0.125, 0.125), rel=1e-4)
    assert metrics["glaucoma_brier"] is not None
    assert metrics["glaucoma_auc_fc"] == 0.5
    assert model.sizes == [1] * 4


def test_original_pixels_undo_each_sides_own_scale() -> None:
    """A wide photograph is squeezed: 3 and 4 input pixels are 6 and 4 of its own."""
    pictures = wide_pictures(64, 32)
    points = pictures.input_points().numpy() + np.array((3, 4))
    predictions = Predictions({}, points, None, np.full(len(pictures), np.nan))
    metrics = measure(predictions, pictures, diagnose(predictions, None))
    assert metrics["fovea_error"] == pytest.approx(5, rel=1e-5)
    assert metrics["fovea_error_original"] == pytest.approx(np.hypot(6, 4), rel=1e-5)


def wide_pictures(width: int, height: int) -> Photographs:

    def read() -> tuple[Image.Image, None]:
        return Image.new("RGB", (width, height)), None

    return Photographs([Record("a.jpg", frozenset({"fovea"}), None, (20.0, 10.0), read)], 32)


def test_a_task_that_was_not_learned_is_null_and_not_asked(repacked: Path) -> None:
    """An untrained cup head would invent a cup, a vCDR and a diagnosis."""
    disc = torch.full((32, 32), 9.0)
    evaluation = judge(Oracle(disc=disc), load_test_split(repacked), ("disc",))
    assert evaluation.metrics["disc_dice"] is not None
    assert {key for key, value in evaluation.metrics.items() if value is None} == METRICS - {
        "disc_dice"
    }
    assert "cup Dice      -\n" in format_table(evaluation.metrics, 32)


def test_an_empty_disc_silences_the_ratio_classifier_alone(repacked: Path) -> None:
    """The network's own head still decides, and the report says why."""
    empty = torch.full((32, 32), -9.0)
    model = Oracle(disc=empty, cup=empty, glaucoma=torch.tensor(1.0))
    evaluation = judge(model, load_test_split(repacked), ("disc", "cup", "glaucoma"))
    assert evaluation.metrics["disc_dice"] == 0
    assert evaluation.metrics["vcdr_error"] is None
    assert evaluation.metrics["glaucoma_auc_vcdr"] is None
    assert evaluation.metrics["glaucoma_auc"] == 0.5
    assert missing_ratios(evaluation) == ["no disc, so no vCDR, was found on 4 of 4 pictures."]


def test_the_diagnosis_is_the_average_of_both_classifiers(repacked: Path) -> None:
    """FC says 3/4; vCDR 0.6 at slope 10 and intercept -5 says 1 / (1 + exp(-1))."""
    predictions = Predictions({}, None, np.array([0.75]), np.array([0.6]))
    found = diagnose(predictions, RatioClassifier(10, -5))
    assert found["both"][0] == pytest.approx((0.75 + 1 / (1 + np.exp(-1))) / 2, rel=1e-12)


def test_the_score_averages_what_was_measured() -> None:
    """Best weights are chosen by it: Dice, Dice, 1 - Brier, 1 - fovea error / side."""
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    assert score(metrics, 100, TASKS) is None
    metrics |= {"disc_dice": 0.9, "fovea_error": 10.0, "glaucoma_brier": 0.2}
    assert score(metrics, 100, TASKS) == pytest.approx((0.9 + 0.9 + 0.8) / 3, rel=1e-12)
    metrics["cup_dice"] = 0.5
    assert score(metrics, 100, TASKS) == pytest.approx((0.9 + 0.9 + 0.8 + 0.5) / 4, rel=1e-12)
    assert score(metrics, 100, ("fovea",)) == pytest.approx(0.9, rel=1e-12)
    assert score(metrics, 100, ("glaucoma",)) is None  # The vCDR is other networks' opinion.
    metrics["glaucoma_brier_fc"] = 0.3
    assert score(metrics, 100, ("glaucoma",)) == pytest.approx(0.7, rel=1e-12)


def test_unlabelled_pictures_count_in_no_metric(tmp_path: Path) -> None:
    """Partly annotated test splits are measured on what is annotated."""
    folder = tmp_path / "partial"
    rows = [
        entry("a.jpg", 1),
        entry("b.jpg", None, Fovea_X=None, Fovea_Y=None, Annotations=["disc"]),
    ]
    write_split(folder / "train", rows)
    write_split(folder / "test", rows)
    pictures = load_splits(str(folder), SIZE, seed=0)["test"]
    points = pictures.input_points().numpy()[:1] + np.array((3, 4))
    points = np.concatenate((points, points + 50))
    predictions = Predictions({}, points, np.array([0.5, 0.9]), np.full(2, np.nan))
    metrics = measure(predictions, pictures, diagnose(predictions, None))
    assert metrics["fovea_error"] == pytest.approx(5, rel=1e-5)
    assert metrics["glaucoma_brier"] == 0.25
    assert metrics["glaucoma_auc"] is None
