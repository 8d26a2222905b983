"""From probabilities to a decision, and how sure the numbers beside it are."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score, roc_curve

from refuge.errors import InputError
from refuge.measurement.evaluation import Evaluation, Predictions, measure
from refuge.measurement.intervals import Bootstrap
from refuge.measurement.operating import (
    MINIMUM_PER_CLASS,
    choose_point,
    measure_point,
    read_point,
    write_point,
)
from refuge.measurement.page import Card, write_page
from refuge.measurement.report import write_report
from refuge.metrics import reference_sensitivity
from refuge.photographs.data import load_splits

RNG = np.random.default_rng(0)
LABELS = np.repeat((1, 0), (20, 40))
# Badly calibrated: nobody reaches 0.5.
AVERAGE = expit(RNG.normal(-2, 0.5, 60) + 0.6 * LABELS)


def test_the_reference_sensitivity_is_read_between_two_points_of_the_curve() -> None:
    """False alarms 0, 1/4, 2/4 at sensitivities 1/2, 1/2, 1: halfway up between at 3/8."""
    labels = np.array([1, 0, 0, 1, 0, 0])
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.2, 0.1])
    assert reference_sensitivity(labels, scores, 1 - 3 / 8) == pytest.approx(0.75)
    assert reference_sensitivity(labels, scores, 0.85) == 0.5
    assert reference_sensitivity(np.ones(2, dtype=int), scores[:2], 0.85) is None


def test_an_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    """For many values the bootstrap is the normal approximation; unknown values do not count."""
    values = np.append(np.random.default_rng(1).normal(3, 2, 400), np.full(50, np.nan))
    interval = Bootstrap(450).mean(values)
    assert interval is not None
    known = values[:400]
    half = 1.96 * known.std() / 20
    # A quantile of 1000 draws is good to a tenth of the half width.
    assert interval == pytest.approx((known.mean() - half, known.mean() + half), abs=0.1 * half)
    assert Bootstrap(3).mean(np.full(3, np.nan)) is None
    assert Bootstrap(0).mean(np.array([])) is None


def test_auc_and_sensitivity_are_those_of_the_drawn_photographs() -> None:
    """scikit-learn computes each draw from the photographs themselves; ties count half."""
    scores = AVERAGE.round(2)
    drawn = Bootstrap(60, draws=20)
    areas, sensitivities = [], []
    for counts in drawn.weights.astype(int):
        labels, repeated = np.repeat(LABELS, counts), np.repeat(scores, counts)
        areas.append(roc_auc_score(labels, repeated))
        false, true, _ = roc_curve(labels, repeated)
        sensitivities.append(np.interp(0.15, false, true))
    for interval, values in (
        (drawn.auc(LABELS, scores), areas),
        (drawn.sensitivity(LABELS, scores, 0.85), sensitivities),
    ):
        assert interval == pytest.approx(np.quantile(values, (0.025, 0.975)), rel=1e-12)
    assert drawn.auc(np.ones(60, dtype=int), scores) is None
    assert drawn.sensitivity(np.ones(60, dtype=int), scores, 0.85) is None


def test_thresholds_are_the_best_of_all_that_validation_offers() -> None:
    """By trying every one; and the calibrated probabilities have the validation's own mean."""
    point, reason = choose_point(np.append(LABELS, (-1, 1)), np.append(AVERAGE, (0.9, np.nan)))
    assert point is not None
    assert reason == ""
    risks = point.calibration.probabilities(AVERAGE)
    assert risks.mean() == pytest.approx(LABELS.mean(), abs=1e-3)
    assert np.all(np.diff(risks[np.argsort(AVERAGE)]) >= 0)
    found = {}
    for threshold in risks:
        said = risks >= threshold
        found[threshold] = (said[LABELS == 1].mean(), 1 - said[LABELS == 0].mean())
    assert max(map(sum, found.values())) == pytest.approx(
        sum(found[point.thresholds["youden"]]), rel=1e-12
    )
    allowed = {s for s, specificity in found.values() if specificity >= 0.85}
    sensitivity, specificity = found[point.thresholds["specificity"]]
    assert (sensitivity, specificity >= 0.85) == (max(allowed), True)
    assert point.validation["specificity"] == pytest.approx(
        {"sensitivity": sensitivity, "specificity": specificity}
    )
    assert specificity == max(c for s, c in found.values() if s == sensitivity)


def test_decisions_are_measured_on_other_photographs() -> None:
    """Sensitivity over the positives, specificity over the negatives, unknown ones left out."""
    point, _ = choose_point(LABELS, AVERAGE)
    assert point is not None
    threshold = point.thresholds["youden"]
    raw = expit((logit(threshold) - point.calibration.intercept) / point.calibration.slope)
    labels = np.array([1, 1, 0, 0, 0, -1, 1])
    average = np.array([raw + 0.1, raw - 0.01, raw - 0.01, raw - 0.02, raw + 0.1, 0.9, np.nan])
    found = measure_point(point, labels, average)["youden"]
    assert found["sensitivity"] == 1 / 2
    assert found["specificity"] == pytest.approx(2 / 3)
    low, high = found["specificity_interval"]
    assert 0 <= low < 2 / 3 < high <= 1


@pytest.mark.parametrize(
    ("labels", "average", "reason"),
    [
        (LABELS[-49:], AVERAGE[-49:], "validation has 9 pictures with glaucoma and 40 without"),
        (LABELS[:20], AVERAGE[:20], "20 pictures with glaucoma and 0 without, and needs 10"),
        (LABELS, np.full(60, np.nan), "0 pictures with glaucoma and 0 without"),
        (1 - LABELS, AVERAGE, "on validation the diagnosis is no better than chance"),
    ],
)
def test_too_little_validation_gives_no_threshold(
    labels: NDArray[np.int64], average: NDArray[np.float64], reason: str, tmp_path: Path
) -> None:
    """And the run folder says why."""
    assert MINIMUM_PER_CLASS == 10
    point, said = choose_point(labels, average)
    assert point is None
    assert said.startswith("no decision threshold: ")
    assert reason in said
    write_point(tmp_path, point, said)
    assert read_point(tmp_path) == (None, said)


def test_an_operating_point_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert "has no operating_point.json" in read_point(tmp_path)[1]
    point, reason = choose_point(LABELS, AVERAGE)
    write_point(tmp_path, point, reason)
    assert read_point(tmp_path) == (point, "")
    file = tmp_path / "operating_point.json"
    content = json.loads(file.read_text())
    damages: list[dict[str, object]] = [
        {"calibration": {"slope": 1}},
        {"thresholds": {"guess": 0.5}},
        {"validation": {}},
    ]
    for damage in damages:
        file.write_text(json.dumps(content | damage))
        with pytest.raises(InputError, match=r"operating_point\.json: not an operating point"):
            read_point(tmp_path)


def test_a_page_shows_first_whom_to_look_at_and_takes_any_name(tmp_path: Path) -> None:
    """A file's name may hold what HTML or an address means something by."""
    cards = [
        Card("b.jpg", "overlays/b.png", "no sign", {"vCDR": 0.4}),
        Card("<a> & #1.jpg", "overlays/<a> & #1.png", "refer", {"vCDR": float("nan")}),
    ]
    write_page(tmp_path / "report.html", cards, "phantoms", "refer at 0.3.")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.index("&lt;a&gt; &amp; #1.jpg: refer") < text.index("b.jpg: no sign")
    assert "src='overlays/%3Ca%3E%20%26%20%231.png'" in text
    assert "<dt>vCDR</dt><dd>-</dd>" in text
    assert "Refer at 0.3." in text


def test_a_report_has_decisions_and_what_probabilities_are_worth(
    repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: None
) -> None:
    """Two pictures of each class, three of them on the right side of the threshold."""
    point, _ = choose_point(LABELS, AVERAGE)
    assert point is not None
    threshold = point.thresholds["youden"]
    raw = expit((logit(threshold) - point.calibration.intercept) / point.calibration.slope)
    pictures = load_splits(str(repacked), 32, seed=0)["test"]
    average = np.array([raw - 0.02, raw + 0.02, raw - 0.01, raw - 0.01])
    nothing = np.full(4, np.nan)
    predictions = Predictions({}, None, average, nothing)
    diagnoses = {"fc": average, "vcdr": nothing, "both": average}
    evaluation = Evaluation(predictions, diagnoses, measure(predictions, pictures, diagnoses))
    (tmp_path / "figures").mkdir()
    facts = {"parameters": 1, "notes": []}
    write_report(tmp_path, "data", pictures, evaluation, [{"epoch": 1}], point, facts)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["decisions"]["youden"]["sensitivity"] == 0.5
    assert metrics["decisions"]["youden"]["specificity"] == 1
    said = capsys.readouterr().out
    assert f"at {threshold:.3f}" in said
    assert "sensitivity 0.00 [0.00, 0.00], specificity 1.00 [1.00, 1.00] (the published" in said
    rows = (tmp_path / "predictions-test.csv").read_text().splitlines()
    risk = [float(row.split(",")[5]) for row in rows[1:]]
    assert [value >= threshold for value in risk] == [False, True, False, False]
    assert (tmp_path / "figures/reliability.png").stat().st_size > 5000
