"""Runs the network over a split and measures what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data import Photographs
from diagnosis import RatioClassifier, combine
from metrics import (
    auc,
    centre_of_mass,
    dice,
    largest_component,
    mean,
    vertical_cup_to_disc_ratio,
)

Array = NDArray[np.float64]
Metrics = dict[str, float | None]
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Predictions:
    """What the network says about each photograph of a split, None for a task it did not learn.

    Attributes:
        masks: For disc and cup (n, size, size), after post-processing.
        points: Foveas (n, 2), x and y in input pixels.
        probabilities: Of glaucoma (n,), by the network's own head.
        ratios: vCDR (n,), NaN where no disc was found.
    """

    masks: dict[str, NDArray[np.bool_]]
    points: Array | None
    probabilities: Array | None
    ratios: Array


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a split, the classifiers' probabilities, and what both are worth."""

    predictions: Predictions
    diagnoses: dict[str, Array]
    metrics: Metrics


def evaluate(
    model: nn.Module,
    photographs: Photographs,
    *,
    tasks: Sequence[str],
    classifier: RatioClassifier | None,
    device: torch.device,
    autocast: Autocast,
) -> Evaluation:
    """Predicts, diagnoses and measures.

    Args:
        model: The network.
        photographs: The split.
        tasks: What the network has learned; it is not asked anything else.
        classifier: Turns vCDR into a probability; None where there is none.
        device: Where the network is.
        autocast: Context of the forward passes.
    """
    predictions = predict(model, photographs, tasks, device, autocast)
    diagnoses = diagnose(predictions, classifier)
    return Evaluation(predictions, diagnoses, measure(predictions, photographs, diagnoses))


@torch.no_grad()
def predict(
    model: nn.Module,
    photographs: Photographs,
    tasks: Sequence[str],
    device: torch.device,
    autocast: Autocast,
) -> Predictions:
    """Asks the network for the tasks it has learned, one photograph at a time.

    One at a time because batch statistics would let the photographs of a batch influence each
    other.
    """
    model.eval()
    answers: dict[str, list[Array]] = {task: [] for task in tasks}
    for row in range(len(photographs)):
        images = photographs[row].images.to(device)
        with autocast():
            logits = model(images, tasks)
        for task in tasks:
            answers[task].append(_to_probabilities(logits[task]))
    maps = {task: np.concatenate(parts) for task, parts in answers.items() if parts}
    masks: dict[str, NDArray[np.bool_]] = {
        task: np.stack([largest_component(each > 0.5) for each in maps[task]])
        for task in ("disc", "cup")
        if task in maps
    }
    ratios = np.full(len(photographs), np.nan)
    if len(masks) == 2:
        pairs = zip(masks["disc"], masks["cup"], strict=True)
        ratios = np.array([vertical_cup_to_disc_ratio(disc, cup) for disc, cup in pairs])
    points = centre_of_mass(maps["fovea"]) if "fovea" in maps else None
    return Predictions(masks, points, maps.get("glaucoma"), ratios)


def diagnose(predictions: Predictions, classifier: RatioClassifier | None) -> dict[str, Array]:
    """Gives each classifier's probabilities: "fc", "vcdr", and "both", their average.

    A classifier that does not exist, or cannot judge a photograph, says NaN.
    """
    silent = np.full(len(predictions.ratios), np.nan)
    fc = silent if predictions.probabilities is None else predictions.probabilities
    vcdr = silent if classifier is None else classifier.probabilities(predictions.ratios)
    return {"fc": fc, "vcdr": vcdr, "both": combine(fc, vcdr)}


def measure(
    predictions: Predictions, photographs: Photographs, diagnoses: dict[str, Array]
) -> Metrics:
    """Measures predictions where the truth is known; None where it never is.

    Returns:
        AUC of the average of both classifiers and of each, its Brier score, Dice of disc and cup,
        distance of the foveas in input and in original pixels, and absolute error of vCDR.
    """
    labels = photographs.labels.numpy()
    metrics: Metrics = {}
    for name, key in (("both", ""), ("fc", "_fc"), ("vcdr", "_vcdr")):
        usable = (labels >= 0) & ~np.isnan(diagnoses[name])
        metrics[f"glaucoma_auc{key}"] = auc(labels[usable], diagnoses[name][usable])
    errors = np.where(labels >= 0, (diagnoses["both"] - labels) ** 2, np.nan)
    metrics["glaucoma_brier"] = mean(errors)

    rows = photographs[torch.arange(len(photographs))]
    for task in ("disc", "cup"):
        known = rows.labelled(task).tolist() if task in predictions.masks else []
        true = rows.targets[task].cpu().numpy()
        scores = [dice(predictions.masks[task][row], true[row]) for row in known]
        metrics[f"{task}_dice"] = mean(np.array(scores))

    metrics["fovea_error"] = metrics["fovea_error_original"] = None
    if predictions.points is not None:
        offset = predictions.points - photographs.input_points().numpy()
        scale = photographs.sizes.numpy() / photographs.size
        metrics["fovea_error"] = mean(np.hypot(*offset.T))
        metrics["fovea_error_original"] = mean(np.hypot(*(offset * scale).T))
    metrics["vcdr_error"] = mean(np.abs(predictions.ratios - photographs.ratios.numpy()))
    return metrics


def score(metrics: Metrics, size: int) -> float | None:
    """Averages what was measured of both Dice, 1 - Brier score and 1 - fovea error / side.

    The Brier score, not the AUC: a small validation split has too few positives to rank.
    """
    parts = [metrics["disc_dice"], metrics["cup_dice"]]
    if (brier := metrics["glaucoma_brier"]) is not None:
        parts.append(1 - brier)
    if (error := metrics["fovea_error"]) is not None:
        parts.append(1 - error / size)
    return mean(np.array([part for part in parts if part is not None]))


def _to_probabilities(logits: Tensor) -> Array:
    # In double precision a sigmoid far below zero keeps its mass, which the fovea's centre needs.
    return np.asarray(logits.double().sigmoid().cpu().numpy())
