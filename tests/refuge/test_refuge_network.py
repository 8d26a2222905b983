"""The network is the published one, and computes only what is asked."""

import pytest
import torch
from torch import nn

from refuge.network import TASKS, MultiTaskUNet, count_parameters


def test_four_tasks_have_the_published_number_of_parameters() -> None:
    """17.2 million in the paper's table."""
    assert count_parameters(MultiTaskUNet()) == 17_268_036


def test_four_single_task_networks_have_the_published_number_of_parameters() -> None:
    """61.2 million in the paper's table, so the glaucoma network is an encoder alone."""
    assert sum(count_parameters(MultiTaskUNet([task])) for task in TASKS) == 61_213_572


@pytest.mark.parametrize("tasks", [("glaucoma",), ("cup", "glaucoma"), ("fovea", "disc")])
def test_logits_come_for_the_asked_tasks_alone_in_their_order(tasks: tuple[str, ...]) -> None:
    """A sequential method asks for one task at a time and pays for one."""
    logits = MultiTaskUNet(width=2)(torch.rand(3, 3, 32, 32), tasks)
    assert tuple(logits) == tasks
    for task in tasks:
        assert logits[task].shape == ((3,) if task == "glaucoma" else (3, 32, 32))


def test_a_glaucoma_step_does_not_run_the_decoder() -> None:
    """It branches off after the encoder: 29 instead of 80 GFLOP."""
    model = MultiTaskUNet(width=2)

    def refuse(*_: object) -> None:
        raise AssertionError("the decoder ran")

    for stage in model.decoder:
        stage.register_forward_hook(refuse)
    model(torch.rand(2, 3, 32, 32), ("glaucoma",))
    with pytest.raises(AssertionError, match="decoder ran"):
        model(torch.rand(2, 3, 32, 32), ("disc",))


def test_the_encoder_is_shared_by_four_tasks_and_the_decoder_by_three() -> None:
    """Which parameters a task's gradient reaches is what multi-task methods work on."""
    model = MultiTaskUNet(width=2)
    reached = {}
    for task in TASKS:
        model.zero_grad()
        model(torch.rand(2, 3, 32, 32), (task,))[task].sum().backward()
        reached[task] = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached["glaucoma"] == {"encoder", "heads"}
    assert all(reached[task] == {"encoder", "decoder", "heads"} for task in TASKS[:3])


def test_the_decoder_narrows_as_published() -> None:
    """Middle width is half the concatenated input: (512+512 -> 512 -> 256) and so on."""
    shapes = [
        [(layer.in_channels, layer.out_channels) for layer in stage if isinstance(layer, nn.Conv2d)]
        for stage in MultiTaskUNet().decoder
        if isinstance(stage, nn.Sequential)
    ]
    assert shapes == [
        [(1024, 512), (512, 256)],
        [(512, 256), (256, 128)],
        [(256, 128), (128, 64)],
        [(128, 64), (64, 64)],
    ]


def test_batch_norm_uses_the_picture_at_hand_in_evaluation_too() -> None:
    """As published: no running statistics, so nothing but weights and normalisation is saved."""
    model = MultiTaskUNet(width=2)
    weights = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == weights | {"mean", "std"}
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    together, alone = model(images, ("disc",))["disc"][:1], model(images[:1], ("disc",))["disc"]
    assert not torch.allclose(together, alone)


@pytest.mark.parametrize("norm", ["group", "running"])
def test_other_norms_judge_a_picture_the_same_alone_or_in_a_batch(norm: str) -> None:
    """What group norm and running statistics are offered for."""
    model = MultiTaskUNet(width=2, norm=norm).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    together, alone = model(images, ("disc",))["disc"][:1], model(images[:1], ("disc",))["disc"]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_dense_heads_start_from_a_mostly_empty_picture() -> None:
    """A prior of one in a hundred; glaucoma starts undecided."""
    heads = MultiTaskUNet(width=2).heads
    for task in TASKS[:3]:
        bias = heads[task].bias
        assert isinstance(bias, torch.Tensor)
        torch.testing.assert_close(bias.sigmoid(), torch.tensor([0.01]))


def test_bad_tasks_and_norms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tasks` must be a non-empty subset .* got \('rim',\)"):
        MultiTaskUNet(["rim"])
    with pytest.raises(ValueError, match=r"`norm` must be one of .* got 'layer'"):
        MultiTaskUNet(norm="layer")
