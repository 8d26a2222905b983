"""Cross-validation: every photograph of a small set tests once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from refuge.photographs.records import Record


def deal(
    splits: Mapping[str, Sequence[Record]], fold: int, folds: int, seed: int
) -> dict[str, list[Record]]:
    """Deals the photographs of all splits anew: a fold tests, the next validates, others train.

    Classes, and photographs with the same annotations, are spread evenly over the folds.

    Args:
        splits: The photographs; which split each was in does not matter.
        fold: Which one tests, from 1.
        folds: How many there are.
        seed: Draws the order in which they are dealt; the same for all folds.
    """
    records = [record for split in splits.values() for record in split]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    # A sort keeps the drawn order within each kind.
    alike = sorted(order, key=lambda i: (records[i].label or 0, sorted(records[i].annotated)))
    parts: list[list[int]] = [sorted(alike[start::folds]) for start in range(folds)]
    test, val = fold - 1, fold % folds
    others = sorted(i for k, part in enumerate(parts) if k not in (test, val) for i in part)
    return {
        "train": [records[i] for i in others],
        "val": [records[i] for i in parts[val]],
        "test": [records[i] for i in parts[test]],
    }
