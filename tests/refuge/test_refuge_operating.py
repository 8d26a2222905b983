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
    OperatingPoint,
    calibrate,
    choose_point,
    describe_transfer,
    measure_calibration,
    measure_point,
    read_point,
    write_point,
)
from refuge.measurement.report import write_report
from refuge.metrics import reference_sensitivity
from refuge.photographs.data import load_splits
from refuge.screening.page import Card, Summary, write_pages
from refuge.study.folds import cross_validate

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


def test_youdens_threshold_is_the_best_of_all_that_validation_offers() -> None:
    """By trying every one; and the calibrated risks have the validation's own mean."""
    point, reason = choose_point(np.append(LABELS, (-1, 1)), np.append(AVERAGE, (0.9, np.nan)))
    assert point is not None
    assert reason == ""
    assert point.calibration is not None
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
    assert point.validation["youden"] == pytest.approx(
        dict(zip(("sensitivity", "specificity"), found[point.thresholds["youden"]], strict=True))
    )


def test_decisions_are_measured_on_other_photographs() -> None:
    """Sensitivity over the positives, specificity over the negatives, unknown ones left out."""
    point, _ = choose_point(LABELS, AVERAGE)
    assert point is not None
    assert point.calibration is not None
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
        (LABELS[:29], AVERAGE[:29], "validation has 9 pictures without glaucoma, and needs 10"),
        (LABELS[:20], AVERAGE[:20], "0 pictures without glaucoma, and needs 10"),
        (LABELS, np.full(60, np.nan), "0 pictures without glaucoma"),
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
        Card("b.jpg", "overlays/b.png", "no sign", {"vCDR": "0.40"}),
        Card("<a> & #1.jpg", "overlays/<a> & #1.png", "refer", {"vCDR": "-"}),
    ]
    write_pages(tmp_path, cards, Summary({"network": "trained on phantoms"}, "refer at 0.3."))
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
    assert point.calibration is not None
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


def test_the_threshold_for_a_specificity_is_a_quantile_of_the_healthy() -> None:
    """Of 60 healthy scores the 51.85-th, by hand; positives have no say, and need not be there."""
    healthy = np.sort(RNG.uniform(0.01, 0.5, 60))
    expected = healthy[50] + 0.85 * (healthy[51] - healthy[50])
    point, _ = choose_point(np.zeros(60, dtype=int), healthy)
    assert point is not None
    assert point.calibration is None
    assert point.thresholds == {"specificity": pytest.approx(expected, rel=1e-12)}
    assert point.validation["specificity"] == {"sensitivity": None, "specificity": 0.85}
    few = np.append(healthy, (0.4, 0.6))
    again, _ = choose_point(np.append(np.zeros(60, dtype=int), (1, 1)), few)
    assert again is not None
    assert again.thresholds == point.thresholds
    assert again.risks(few).tolist() == pytest.approx([np.nan] * 62, nan_ok=True)


def test_redrawn_validation_gives_the_specificity_that_was_asked_for() -> None:
    """And with eight positives among eighty more sensitivity than the highest allowed point had.

    That rule, the published one's nearest, took the first threshold of the ROC curve whose
    specificity suffices and whose sensitivity is highest; with few positives that is far too high.
    """
    rng = np.random.default_rng(3)
    labels = np.repeat((1, 0), (8, 72))
    eyes = expit(rng.normal(-1, 1, 20_000)), expit(rng.normal(1.3, 1, 20_000))
    specificities, sensitivities, before = [], [], []
    for _ in range(200):
        scores = np.concatenate((rng.choice(eyes[1], 8), rng.choice(eyes[0], 72)))
        point, _ = choose_point(labels, scores)
        assert point is not None
        threshold = point.thresholds["specificity"]
        specificities.append(np.mean(eyes[0] < threshold))
        sensitivities.append(np.mean(eyes[1] >= threshold))
        false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
        allowed = np.where(1 - false >= 0.85, true - 1e-6 * false, -1)
        before.append(np.mean(eyes[1] >= thresholds[allowed.argmax()]))
    assert np.mean(specificities) == pytest.approx(0.85, abs=0.01)
    assert np.mean(sensitivities) > np.mean(before) + 0.02


def test_platts_targets_shrink_the_risks_of_few_photographs() -> None:
    """Perfectly separated scores of twelve and twelve would otherwise become 0 and 1."""
    labels, scores = np.repeat((1, 0), 12), np.repeat((0.9, 0.1), 12)
    risks = calibrate(labels, scores).probabilities(scores)
    assert risks[0] == pytest.approx(13 / 14, abs=0.01)
    assert risks[-1] == pytest.approx(1 / 14, abs=0.01)


def test_calibration_is_measured_by_hand() -> None:
    """Two bins: said 0.2 and 0.6, happened 1/4 and 3/4; slope and intercept by the likelihood."""
    labels = np.array([0, 0, 0, 1, 0, 1, 1, 1, -1])
    risks = np.array([0.2] * 4 + [0.6] * 4 + [0.9])
    found = measure_calibration(labels, risks, bins=2)
    assert found is not None
    assert found["error"] == pytest.approx((0.05 + 0.15) / 2)
    assert found["brier"] == pytest.approx((3 * 0.04 + 0.64 + 0.36 + 3 * 0.16) / 8)
    slope = (logit(0.75) - logit(0.25)) / (logit(0.6) - logit(0.2))
    assert found["slope"] == pytest.approx(slope, rel=1e-3)
    assert found["intercept"] == pytest.approx(logit(0.75) - slope * logit(0.6), abs=1e-3)
    assert measure_calibration(np.ones(3, dtype=int), risks[:3]) is None


@pytest.mark.parametrize(
    ("specificity", "sensitivity", "sentence"),
    [
        ((0.36, [0.30, 0.42]), (0.98, [0.9, 1.0]), "does not carry over (specificity 0.36 [0.30, "),
        ((0.86, [0.80, 0.91]), (0.80, [0.7, 0.9]), "carries over (specificity 0.86 [0.80, 0.91] "),
        ((0.86, [0.80, 0.91]), (0.40, [0.3, 0.5]), "does not carry over: sensitivity 0.40 [0.30, "),
        ((0.86, [0.80, 0.91]), (None, None), "carries over (specificity 0.86"),
        ((None, None), (0.9, [0.8, 1.0]), "is unknown: no healthy photograph here"),
    ],
)
def test_one_sentence_says_whether_a_threshold_carries_over(
    specificity: tuple[float | None, list[float] | None],
    sensitivity: tuple[float | None, list[float] | None],
    sentence: str,
) -> None:
    test = {"specificity": {"sensitivity": 0.85}}
    point = OperatingPoint(None, {"specificity": 0.3}, {}, test)
    found = {
        "specificity": specificity[0],
        "specificity_interval": specificity[1],
        "sensitivity": sensitivity[0],
        "sensitivity_interval": sensitivity[1],
    }
    assert sentence in describe_transfer(point, found)


def test_each_fold_is_decided_by_a_threshold_of_the_others() -> None:
    """By hand for three folds of 15 healthy and 3 sick photographs, too few to calibrate on."""
    rng = np.random.default_rng(4)
    right: dict[int, list[bool]] = {0: [], 1: []}
    folds = []
    for _ in range(3):
        labels = np.repeat((1, 0), (3, 15))
        folds.append((labels, np.round(rng.uniform(0, 0.6, 18) + 0.3 * labels, 3), labels == 9))
    for number, (labels, scores, _) in enumerate(folds):
        others = np.sort(
            np.concatenate([s[3:] for n, (_, s, _) in enumerate(folds) if n != number])
        )
        # Of 30 healthy scores the 26.35-th.
        threshold = others[25] + 0.35 * (others[26] - others[25])
        for label in (0, 1):
            right[label] += ((scores >= threshold) == label)[labels == label].tolist()
    said = cross_validate(folds)
    assert said.startswith(f"sensitivity {np.mean(right[1]):.2f} [")
    assert f", specificity {np.mean(right[0]):.2f} [" in said
    folds[0][2][:2] = True
    assert cross_validate(folds).endswith("; 2 ungradable")
    few = [(labels[:6], scores[:6], lost[:6]) for labels, scores, lost in folds]
    assert "the other folds has 6 pictures without glaucoma" in cross_validate(few)
