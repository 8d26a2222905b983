"""Finds what is probably wrong with a data set though it can be read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from refuge.photographs.data import Photographs, find_repeats

ONE_SIDED = 0.95  # share of the photographs with the fovea on one side
ENOUGH = 20  # photographs, of which a share is worth a warning
LARGEST = 0.3  # share of a photograph that a disc fills at most


def find_warnings(splits: Mapping[str, Photographs], mirror: bool) -> list[str]:
    """Returns a line for each thing that is probably wrong with the photographs of a run.

    Args:
        splits: The photographs for training, validation and test.
        mirror: Whether training pictures are mirrored at random.
    """
    warnings = find_inverted_masks(splits) + find_wrong_eyes(splits)
    for other in ("val", "test"):
        if other in splits and "train" in splits:
            repeats = find_repeats(splits["train"], splits[other])
            if repeats:
                first = " is ".join(dict.fromkeys(repeats[0]))
                warnings.append(
                    f"{len(repeats)} {other} pictures are also among the training pictures "
                    f"({first}): their numbers are too good."
                )
    if "train" in splits and (sides := describe_sides(splits["train"])):
        remedy = (
            "the other eye is learned from mirrored pictures alone"
            if mirror
            else "with `--mirror off` photographs of the other eye will not be understood"
        )
        warnings.append(f"{sides}; {remedy}.")
    return warnings


def describe_sides(photographs: Photographs) -> str:
    """Says that nearly all photographs are of one side; "" if they are of both."""
    offsets = find_offsets(photographs)
    offsets = offsets[~np.isnan(offsets)]
    right = int((offsets > 0).sum())
    if len(offsets) < ENOUGH or max(right, len(offsets) - right) < ONE_SIDED * len(offsets):
        return ""
    side, count = ("right", right) if right > len(offsets) / 2 else ("left", len(offsets) - right)
    return f"the fovea is {side} of the disc on {count} of {len(offsets)} training pictures"


def find_inverted_masks(splits: Mapping[str, Photographs]) -> list[str]:
    """Returns a line on masks whose disc is most of the photograph."""
    lines = []
    for split, photographs in splits.items():
        shares = (photographs.masks < 255).float().mean(dim=(1, 2)).numpy()
        known = photographs.known["disc"].numpy()
        whole = np.array([record.whole for record in photographs.records])
        if len(rows := np.flatnonzero(known & ~whole & (shares > LARGEST))):
            lines.append(
                f"the disc covers more than {LARGEST:.0%} of {len(rows)} {split} pictures "
                f"({photographs.names[rows[0]]}): are their masks inverted?"
            )
    return lines


def find_wrong_eyes(splits: Mapping[str, Photographs]) -> list[str]:
    """Returns a line on photographs whose stated eye contradicts where their fovea lies."""
    lines = []
    for split, photographs in splits.items():
        offsets = find_offsets(photographs)
        eyes = np.array([{"left": 1, "right": -1}.get(r.eye, 0) for r in photographs.records])
        if len(rows := np.flatnonzero(eyes * np.nan_to_num(offsets) < 0)):
            lines.append(
                f"the stated eye of {len(rows)} {split} pictures ({photographs.names[rows[0]]}) "
                "contradicts the side of their fovea: are they mirrored?"
            )
    return lines


def find_offsets(photographs: Photographs) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns how far the fovea lies right of the disc, or of the middle without a disc (n,)."""
    size = photographs.size
    columns = (photographs.masks < 255).double().sum(dim=1)
    places = np.arange(size)
    with np.errstate(invalid="ignore"):
        centres = (columns.numpy() @ places) / columns.sum(dim=1).numpy()
    known = photographs.known["disc"].numpy() & ~np.isnan(centres)
    centres = np.where(known, centres, (size - 1) / 2)
    return np.asarray(photographs.input_points()[:, 0].double().numpy() - centres)
