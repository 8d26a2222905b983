"""Cross-validation: every photograph of a small set is tested once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from refuge.photographs.records import Record


def deal(
    splits: Mapping[str, Sequence[Record]], fold: int, folds: int, seed: int
) -> dict[str, list[Record]]:
    """Splits all photographs into folds: one is tested, the next validated, the others train.

    Classes, and photographs with the same annotations, are spread evenly over the folds.

    Args:
        splits: The photographs; their own splits are ignored.
        fold: The fold to test, from 1.
        folds: Number of folds.
        seed: Seed of the order, which is the same for all folds.
    """
    records = [record for split in splits.values() for record in split]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    # The sort is stable: within a kind the order stays random.
    alike = sorted(order, key=lambda i: (records[i].label or 0, sorted(records[i].annotated)))
    parts: list[list[int]] = [sorted(alike[start::folds]) for start in range(folds)]
    test, val = fold - 1, fold % folds
    others = sorted(i for k, part in enumerate(parts) if k not in (test, val) for i in part)
    return {
        "train": [records[i] for i in others],
        "val": [records[i] for i in parts[val]],
        "test": [records[i] for i in parts[test]],
    }
