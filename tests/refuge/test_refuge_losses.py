"""Losses against numbers worked by hand."""

import math

import pytest
import torch

from refuge.losses import fovea_loss, glaucoma_loss, saliency_maps, segmentation_loss, task_losses
from refuge.photographs.data import Batch


def test_segmentation_loss_is_the_mean_cross_entropy_of_pixels() -> None:
    """Logit log 3 is probability 3/4: the pixels cost -log 3/4, -log 1/4 and twice log 2."""
    logits = torch.tensor([[[math.log(3), math.log(3)], [0.0, 0.0]]], dtype=torch.float64)
    masks = torch.tensor([[[True, False], [True, False]]])
    expected = (math.log(4 / 3) + math.log(4) + 2 * math.log(2)) / 4
    # The loss takes the mask as float32 does; the numbers are exact in it.
    assert segmentation_loss(logits.float(), masks).item() == pytest.approx(expected, rel=1e-6)


def test_glaucoma_loss_is_focal_with_gamma_2_and_without_alpha() -> None:
    """Probabilities 3/4 for a positive, 3/4 for a negative: (1/4)^2 log 4/3 and (3/4)^2 log 4."""
    logits = torch.full((2,), math.log(3))
    expected = (math.log(4 / 3) / 16 + 9 * math.log(4) / 16) / 2
    assert glaucoma_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(expected, rel=1e-6)


def test_saliency_is_one_at_the_point_and_follows_the_published_variance() -> None:
    """At 256 pixels the variance is 50: ten pixels away the map is exp(-100/100)."""
    map_ = saliency_maps(torch.tensor([[100.0, 60.0]], dtype=torch.float64), 256)[0]
    assert map_[60, 100] == 1
    assert map_[60, 110].item() == pytest.approx(math.exp(-1), rel=1e-12)
    assert map_[70, 100].item() == pytest.approx(math.exp(-1), rel=1e-12)
    assert map_[66, 108].item() == pytest.approx(math.exp(-1), rel=1e-12)


def test_saliency_shrinks_with_the_picture() -> None:
    """At 128 pixels the variance is 50 / 4: five pixels away stand for ten."""
    map_ = saliency_maps(torch.tensor([[50.0, 30.0]], dtype=torch.float64), 128)[0]
    assert map_[30, 55].item() == pytest.approx(math.exp(-1), rel=1e-12)


def test_fovea_loss_is_the_mean_distance_to_the_saliency_map() -> None:
    """With all logits 0 the map is 1/2 everywhere, whose distances are known."""
    point = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = sum(
        abs(0.5 - math.exp(-((x - 3) ** 2 + (y - 4) ** 2) / (2 * 50 * (8 / 256) ** 2)))
        for x in range(8)
        for y in range(8)
    )
    logits = torch.zeros(1, 8, 8, dtype=torch.float64)
    assert fovea_loss(logits, point).item() == pytest.approx(expected / 64, rel=1e-12)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_losses_stay_finite_at_extreme_logits(logit: float) -> None:
    """What a loss on probabilities would turn into log 0."""
    dense = torch.full((1, 4, 4), logit, requires_grad=True)
    single = torch.full((1,), logit, requires_grad=True)
    total = (
        segmentation_loss(dense, torch.tensor([[[True, False]]]).expand(1, 4, 2).repeat(1, 1, 2))
        + fovea_loss(dense, torch.tensor([[1.0, 1.0]]))
        + glaucoma_loss(single, torch.tensor([1]))
        + glaucoma_loss(single, torch.tensor([0]))
    )
    total.backward()
    assert total.isfinite()
    assert dense.grad is not None
    assert dense.grad.isfinite().all()
    assert single.grad is not None
    assert single.grad.isfinite().all()


def some_batch(known: dict[str, list[bool]]) -> Batch:
    count = len(next(iter(known.values())))
    targets = {
        "disc": torch.rand(count, 4, 4) > 0.5,
        "fovea": torch.full((count, 2), float("nan")),
        "glaucoma": torch.tensor([1, -1, 0])[:count],
    }
    return Batch(
        torch.rand(count, 3, 4, 4), targets, {t: torch.tensor(k) for t, k in known.items()}
    )


def test_a_loss_is_the_mean_over_the_labelled_pictures_with_their_count() -> None:
    """The unlabelled picture must not dilute the loss, whatever its placeholder is."""
    batch = some_batch({"glaucoma": [True, False, True]})
    loss = task_losses({"glaucoma": torch.tensor([0.3, 99.0, -0.4])}, batch)["glaucoma"]
    expected = glaucoma_loss(torch.tensor([0.3, -0.4]), torch.tensor([1, 0]))
    assert torch.equal(loss[0], expected)
    assert loss[1] == 2


def test_a_task_without_labels_in_the_batch_counts_nothing() -> None:
    """The optimizer takes a count of 0 as absent; the graph is for other processes' sake."""
    batch = some_batch({"fovea": [False, False], "disc": [True, True]})
    logits = torch.ones(2, 4, 4, requires_grad=True)
    losses = task_losses({"fovea": logits, "disc": torch.zeros(2, 4, 4)}, batch)
    loss, count = losses["fovea"]
    assert (loss.item(), count) == (0, 0)
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert losses["disc"][1] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_single_precision(dtype: torch.dtype) -> None:
    """A nearly solved task's loss, here about 1e-9, is zero in half precision."""
    batch = some_batch({"glaucoma": [True]})
    loss = task_losses({"glaucoma": torch.tensor([7.0], dtype=dtype)}, batch)["glaucoma"]
    assert loss[0].dtype == torch.float32
    p = 1 / (1 + math.exp(-7))
    # Single precision knows 1 - p, about 1e-3, to four digits.
    assert loss[0].item() == pytest.approx(-((1 - p) ** 2) * math.log(p), rel=1e-3)


def test_a_certain_batch_has_a_positive_loss() -> None:
    """In single precision the focal loss is zero beyond a logit of 17; GradNorm divides by it."""
    loss = glaucoma_loss(torch.tensor([40.0]), torch.tensor([1]))
    assert 0 < loss.item() < 1e-37
