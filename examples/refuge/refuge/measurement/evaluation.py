"""Evaluates a network on a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from refuge.measurement.diagnosis import RatioClassifier, combine
from refuge.measurement.intervals import Bootstrap, Interval
from refuge.measurement.operating import SPECIFICITY
from refuge.metrics import (
    auc,
    centre_of_mass,
    dice,
    largest_component,
    mean,
    reference_sensitivity,
    vertical_cup_to_disc_ratio,
)
from refuge.photographs.crops import Box, crop_box
from refuge.photographs.data import Photographs, shrink
from refuge.photographs.frames import Frame

Array = NDArray[np.float64]
Metrics = dict[str, float | None]
CPU = torch.device("cpu")
DIAGNOSES = {"both": "", "fc": "_fc", "vcdr": "_vcdr"}  # suffix of their metrics' names


@dataclass(frozen=True)
class Predictions:
    """The network's predictions for a split; None for a task it did not learn.

    Attributes:
        masks: For disc and cup (n, size, size), after post-processing.
        points: Foveas (n, 2), x and y in input pixels.
        probabilities: Probability of glaucoma (n,), by the network's own head.
        ratios: vCDR (n,), NaN where no disc was found.
        certainty: Mean probability in the disc, and highest of the fovea's map, each (n,).
    """

    masks: dict[str, NDArray[np.bool_]]
    points: Array | None
    probabilities: Array | None
    ratios: Array
    certainty: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a split, the classifiers' probabilities, and the metrics of both.

    Attributes:
        predictions: The network's predictions.
        diagnoses: Probabilities of glaucoma by classifier.
        metrics: The metrics of both.
        reasons: Why a photograph cannot be graded, "" if it can; empty if that was not asked.
    """

    predictions: Predictions
    diagnoses: dict[str, Array]
    metrics: Metrics
    reasons: Sequence[str] = ()

    @property
    def ungradable(self) -> NDArray[np.bool_]:
        """Which photographs cannot be graded (n,)."""
        reasons = self.reasons or [""] * len(self.predictions.ratios)
        return np.array([bool(reason) for reason in reasons])


@dataclass(frozen=True)
class Trained:
    """A trained network with the settings for its evaluation.

    Attributes:
        network: The network.
        tasks: The tasks it has learned; no others are evaluated.
        classifier: Maps vCDR to a probability; None if there is none.
        autocast: Returns the context of a forward pass.
        device: The network's device.
        second_pass: Whether the cup is segmented in the enlarged disc.
        crop: Whether photographs are cut to their field of view.
    """

    network: nn.Module
    tasks: Sequence[str]
    classifier: RatioClassifier | None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    device: torch.device = CPU
    second_pass: bool = False
    crop: bool = False

    @torch.no_grad()
    def ask(self, images: Tensor) -> dict[str, Array]:
        """Computes the probability maps of one photograph.

        One at a time: with batch statistics, the photographs of a batch would influence each other.

        Args:
            images: (1, 3, size, size).

        Returns:
            A map (size, size) for each task, a number for glaucoma.
        """
        self.network.eval()
        with self.autocast():
            logits = self.network(images.to(self.device), self.tasks)
        # In single precision, very negative logits would vanish from the fovea's centre of mass.
        return {task: each[0].double().sigmoid().cpu().numpy() for task, each in logits.items()}


def evaluate(trained: Trained, photographs: Photographs) -> Evaluation:
    """Predicts and diagnoses a split, and computes the metrics."""
    predictions = predict(trained, photographs)
    diagnoses = diagnose(predictions, trained.classifier)
    return Evaluation(predictions, diagnoses, measure(predictions, photographs, diagnoses))


def predict(trained: Trained, photographs: Photographs) -> Predictions:
    """Predicts the tasks that the network has learned, one photograph at a time."""
    rows = range(len(photographs))
    predictions = summarise([trained.ask(photographs[row].images) for row in rows])
    if trained.second_pass and len(predictions.masks) == 2:
        for row in rows:
            picture = photographs.records[row].read()[0]
            frame = photographs.frame(row)
            seen = look_again(trained, picture, predictions.masks["disc"][row], frame)
            if seen:
                predictions.masks["cup"][row] = seen.place(photographs.size, frame)
                predictions.ratios[row] = seen.ratio
    return predictions


@dataclass(frozen=True)
class SecondLook:
    """Predictions for the enlarged disc.

    Attributes:
        box: The crop, in pixels of the photograph.
        disc: Probabilities, (size, size).
        cup: Probabilities, (size, size).
    """

    box: Box
    disc: Array
    cup: Array

    @property
    def ratio(self) -> float:
        """The vertical cup-to-disc ratio."""
        disc, cup = (largest_component(each > 0.5) for each in (self.disc, self.cup))
        return vertical_cup_to_disc_ratio(disc, cup)

    def place(self, size: int, frame: Frame) -> NDArray[np.bool_]:
        """Returns the cup within the network's input, (size, size), of a part of the photograph."""
        cup, side = largest_component(self.cup > 0.5), self.box[2] - self.box[0]
        columns, rows = (
            np.floor(
                ((np.arange(size) + 0.5) * frame[axis + 2] / size + frame[axis] - self.box[axis])
                * (len(cup) / side)
            ).astype(int)
            for axis in (0, 1)
        )
        inside = (rows >= 0) & (rows < len(cup)), (columns >= 0) & (columns < len(cup))
        placed = np.zeros((size, size), bool)
        placed[np.ix_(*inside)] = cup[np.ix_(rows[inside[0]], columns[inside[1]])]
        return placed


def look_again(
    trained: Trained, picture: Image.Image, disc: NDArray[np.bool_], frame: Frame
) -> SecondLook | None:
    """Applies the network to the disc that it found, enlarged; None if it found none.

    Args:
        trained: The network.
        picture: The photograph, at its own size.
        disc: The disc, at the network's size.
        frame: The part of the photograph that the network saw.
    """
    mask = Image.fromarray(np.where(disc, 0, 255).astype(np.uint8))
    box = crop_box(mask.resize((frame.width, frame.height), Image.Resampling.NEAREST))
    if box is None:
        return None
    x, y = frame.left, frame.top
    box = (box[0] + x, box[1] + y, box[2] + x, box[3] + y)
    images = torch.from_numpy(shrink(picture.crop(box), len(disc)).copy())[None].float() / 255
    answer = replace(trained, tasks=("disc", "cup")).ask(images)
    return SecondLook(box, answer["disc"], answer["cup"])


def summarise(answers: Sequence[Mapping[str, Array]]) -> Predictions:
    """Turns the probability maps of some photographs into masks, points and ratios."""
    learned = answers[0].keys()
    masks: dict[str, NDArray[np.bool_]] = {
        task: np.stack([largest_component(each[task] > 0.5) for each in answers])
        for task in ("disc", "cup")
        if task in learned
    }
    ratios = np.full(len(answers), np.nan)
    if len(masks) == 2:
        pairs = zip(masks["disc"], masks["cup"], strict=True)
        ratios = np.array([vertical_cup_to_disc_ratio(disc, cup) for disc, cup in pairs])
    certainty = {}
    if "disc" in masks:
        pairs = zip(answers, masks["disc"], strict=True)
        inside = [each["disc"][disc].mean() if disc.any() else np.nan for each, disc in pairs]
        certainty["disc certainty"] = np.array(inside)
    points = probabilities = None
    if "fovea" in learned:
        points = np.concatenate([centre_of_mass(each["fovea"][None]) for each in answers])
        certainty["fovea certainty"] = np.array([each["fovea"].max() for each in answers])
    if "glaucoma" in learned:
        probabilities = np.array([float(each["glaucoma"]) for each in answers])
    return Predictions(masks, points, probabilities, ratios, certainty)


def diagnose(predictions: Predictions, classifier: RatioClassifier | None) -> dict[str, Array]:
    """Returns each classifier's probabilities: "fc", "vcdr", and "both", their average.

    NaN stands for a classifier that does not exist or cannot judge a photograph.
    """
    silent = np.full(len(predictions.ratios), np.nan)
    fc = silent if predictions.probabilities is None else predictions.probabilities
    vcdr = silent if classifier is None else classifier.probabilities(predictions.ratios)
    return {"fc": fc, "vcdr": vcdr, "both": combine(fc, vcdr)}


def measure(
    predictions: Predictions, photographs: Photographs, diagnoses: dict[str, Array]
) -> Metrics:
    """Computes the metrics over the photographs with ground truth; None if there are none.

    Returns:
        AUC of the average of both classifiers and of each, the average's sensitivity and
        specificity at 0.5, its sensitivity at the challenge's specificity and its Brier score, Dice
        of disc and cup, distance of the foveas in input and in original pixels, and absolute error
        of vCDR.
    """
    labels = photographs.labels.numpy()
    metrics: Metrics = {}
    for name, key in DIAGNOSES.items():
        usable = (labels >= 0) & ~np.isnan(diagnoses[name])
        metrics[f"glaucoma_auc{key}"] = auc(labels[usable], diagnoses[name][usable])
    usable = (labels >= 0) & ~np.isnan(diagnoses["both"])
    metrics["glaucoma_reference_sensitivity"] = reference_sensitivity(
        labels[usable], diagnoses["both"][usable], SPECIFICITY
    )
    columns = score_pictures(predictions, photographs, diagnoses)
    return metrics | {name: mean(values) for name, values in columns.items()}


def measure_intervals(
    evaluation: Evaluation, photographs: Photographs
) -> dict[str, Interval | None]:
    """Returns each metric's 95 % interval, None if the metric is undefined."""
    labels, diagnoses = photographs.labels.numpy(), evaluation.diagnoses
    intervals: dict[str, Interval | None] = {}
    for name, key in DIAGNOSES.items():
        usable = (labels >= 0) & ~np.isnan(diagnoses[name])
        drawn = Bootstrap(int(usable.sum()))
        intervals[f"glaucoma_auc{key}"] = drawn.auc(labels[usable], diagnoses[name][usable])
        if name == "both":
            intervals["glaucoma_reference_sensitivity"] = drawn.sensitivity(
                labels[usable], diagnoses[name][usable], SPECIFICITY
            )
    columns = score_pictures(evaluation.predictions, photographs, diagnoses)
    drawn = Bootstrap(len(photographs))
    return intervals | {name: drawn.mean(values) for name, values in columns.items()}


def score_pictures(
    predictions: Predictions, photographs: Photographs, diagnoses: dict[str, Array]
) -> dict[str, Array]:
    """Returns the values per photograph of each metric that is a mean; NaN where unknown."""
    labels = photographs.labels.numpy()
    columns: dict[str, Array] = {}
    right = np.where(np.isnan(diagnoses["both"]), np.nan, (diagnoses["both"] >= 0.5) == labels)
    columns["glaucoma_sensitivity"] = np.where(labels == 1, right, np.nan)
    columns["glaucoma_specificity"] = np.where(labels == 0, right, np.nan)
    for name, key in (("both", ""), ("fc", "_fc")):
        errors = (diagnoses[name] - labels) ** 2
        columns[f"glaucoma_brier{key}"] = np.where(labels >= 0, errors, np.nan)

    masks, nowhere = photographs.masks.numpy(), np.full(len(photographs), np.nan)
    for task, true in (("disc", masks < 255), ("cup", masks == 0)):
        columns[f"{task}_dice"] = nowhere.copy()
        for row in np.flatnonzero(photographs.known[task].numpy() & (task in predictions.masks)):
            columns[f"{task}_dice"][row] = dice(predictions.masks[task][row], true[row])

    columns["fovea_error"] = columns["fovea_error_original"] = nowhere
    if predictions.points is not None:
        offset = predictions.points - photographs.input_points().numpy()
        scale = photographs.frames[:, 2:].numpy() / photographs.size
        columns["fovea_error"] = np.hypot(*offset.T)
        columns["fovea_error_original"] = np.hypot(*(offset * scale).T)
    columns["vcdr_error"] = np.abs(predictions.ratios - photographs.ratios.numpy())
    return columns


def score(metrics: Metrics, size: int, tasks: Sequence[str]) -> float | None:
    """Averages those that are defined of both Dice, 1 - Brier score and 1 - fovea error / side.

    The Brier score, not the AUC: a small validation split has too few positives to rank. A network
    that does not segment is judged by its own head alone.
    """
    own = "" if {"disc", "cup"} <= set(tasks) else "_fc"
    error, brier = metrics["fovea_error"], metrics[f"glaucoma_brier{own}"]
    parts = {
        "disc": metrics["disc_dice"],
        "cup": metrics["cup_dice"],
        "fovea": None if error is None else 1 - error / size,
        "glaucoma": None if brier is None else 1 - brier,
    }
    return mean(np.array([part for task in tasks if (part := parts[task]) is not None]))
