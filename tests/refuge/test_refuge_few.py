"""What helps where pictures are few: changed pictures, a second look, folds, stopping in time."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2  # type: ignore[import-untyped]  # not typed

import predict
import train
from refuge.errors import InputError
from refuge.measurement.diagnosis import RatioClassifier
from refuge.measurement.evaluation import Trained, look_again
from refuge.measurement.evaluation import predict as ask
from refuge.photographs.augmentation import augment, mirror
from refuge.photographs.crops import crop_box, crop_records
from refuge.photographs.data import Batch, Photographs, load_splits
from refuge.photographs.folds import deal
from refuge.photographs.frames import Frame
from refuge.photographs.phantoms import phantom_records
from refuge.photographs.records import Record
from refuge.screening.drawing import original_mask
from refuge.screening.examining import Decision, examine
from refuge.screening.reading import read_photograph
from refuge.state import TrainingState
from tiny_photographs import TINY, entry, write_split


def spot_batch(count: int, size: int = 48) -> Batch:
    """A bright square in each picture, which is its disc, its cup, and around its fovea."""
    rng = np.random.default_rng(0)
    images, masks = torch.zeros(count, 3, size, size), torch.zeros(count, size, size).bool()
    points = torch.from_numpy(rng.integers(16, 32, (count, 2)))
    for row, (x, y) in enumerate(points.tolist()):
        masks[row, y - 3 : y + 4, x - 3 : x + 4] = True
        images[row, :, masks[row]] = 0.8
    targets = {"disc": masks, "cup": masks.clone(), "fovea": points.float()}
    known = torch.ones(count, dtype=torch.bool)
    return Batch(
        images,
        targets | {"glaucoma": torch.arange(count)},
        dict.fromkeys(("disc", "cup", "fovea", "glaucoma"), known),
    )


def centre(mask: Tensor) -> Tensor:
    return mask.nonzero().float().mean(0).flip(0)


def test_a_changed_picture_takes_its_masks_and_its_fovea_along() -> None:
    """Found again in the picture itself; no two pictures change alike."""
    before = spot_batch(12)
    after = mirror(augment(before))
    for row in range(12):
        bright = after.images[row].mean(0) > 0.4
        for task in ("disc", "cup"):
            # Nearest for masks, bilinear for pictures: the spots' edges differ by a pixel.
            overlap = (bright & after.targets[task][row]).sum() / bright.sum()
            assert overlap > 0.75
        assert torch.allclose(centre(bright), after.targets["fovea"][row], atol=0.7)
    shifts = after.targets["fovea"] - before.targets["fovea"]
    assert len({tuple(shift) for shift in shifts.round().tolist()}) > 8
    mirrored = (after.targets["fovea"][:, 0] - before.targets["fovea"][:, 0]).abs()
    assert mirrored.max() > 3
    assert torch.equal(after.targets["glaucoma"], before.targets["glaucoma"])
    assert after.known is before.known
    assert (after.images.shape, after.images.dtype) == (before.images.shape, torch.float32)


def test_a_mirrored_point_is_where_its_pixel_went() -> None:
    """Of 48 pixels the first, number 0, becomes the last, number 47; colours and labels stay."""
    before = spot_batch(3)
    after = augment(before, v2.RandomHorizontalFlip(p=1.0))
    expected = before.targets["fovea"].clone()
    expected[:, 0] = 47 - expected[:, 0]
    torch.testing.assert_close(after.targets["fovea"], expected)
    assert torch.equal(after.images, before.images.flip(-1))
    assert torch.equal(after.targets["cup"], before.targets["cup"].flip(-1))


def make_records(count: int) -> list[Record]:
    def read() -> tuple[Image.Image, None]:
        return Image.new("RGB", (32, 32)), None

    tasks = (frozenset({"glaucoma"}), frozenset({"disc"}))
    return [
        Record(f"{i}.png", tasks[i % 3 == 0], None if i % 3 == 0 else i % 2, None, read)
        for i in range(count)
    ]


def test_every_photograph_tests_once_and_kinds_are_spread_evenly() -> None:
    """Whichever split it was in; what is trained on neither validates nor tests."""
    records = make_records(31)
    splits = {"train": records[:20], "test": records[20:]}
    tested = []
    for fold in range(1, 6):
        dealt = deal(splits, fold, 5, seed=3)
        assert deal(splits, fold, 5, seed=3) == dealt
        assert sorted(r.name for part in dealt.values() for r in part) == sorted(
            r.name for r in records
        )
        assert dealt["val"] == deal(splits, fold % 5 + 1, 5, seed=3)["test"]
        kinds = Counter(r.label for r in dealt["test"])
        assert all(
            abs(kinds[label] - count / 5) < 1
            for label, count in Counter(r.label for r in records).items()
        )
        tested += dealt["test"]
    assert sorted(r.name for r in tested) == sorted(r.name for r in records)
    assert deal(splits, 1, 5, seed=4) != deal(splits, 1, 5, seed=3)


def test_folds_of_a_set_are_loaded_and_cached_apart(repacked: Path, tmp_path: Path) -> None:
    """Sixteen pictures in four folds; a cache of one fold must not pass for another."""
    names = []
    for fold in (1, 2, 1):
        splits = load_splits(str(repacked), 32, 0, tmp_path / "cache", fold=(fold, 4))
        assert {split: len(each) for split, each in splits.items()} == {
            "train": 8,
            "val": 4,
            "test": 4,
        }
        names.append(splits["test"].names)
    assert names[0] == names[2] != names[1]
    assert len(list((tmp_path / "cache").iterdir())) == 6
    with pytest.raises(
        InputError, match=r"`--fold` must be of at most 16 \(the pictures\), got 17"
    ):
        load_splits(str(repacked), 32, 0, fold=(1, 17))


def test_a_crop_is_the_disc_and_as_much_around_it() -> None:
    """2.5 disc heights a side: a disc of 9 x 8 pixels from (3, 4) gives 20 around (7.5, 8)."""
    mask = np.full((20, 30), 255, np.uint8)
    mask[4:12, 3:12] = 128
    assert crop_box(Image.fromarray(mask)) == (-2, -2, 18, 18)
    assert crop_box(Image.fromarray(mask), (0.25, -0.25)) == (0, -4, 20, 16)
    assert crop_box(Image.new("L", (20, 20), 255)) is None


def test_discs_are_trained_on_as_pictures_that_know_disc_and_cup_alone() -> None:
    """A phantom's crop shows what the phantom shows there, its mask too."""
    (record,) = phantom_records(256, {"train": 1})["train"]
    (crop,) = crop_records([record])
    assert crop.annotated == {"disc", "cup"}
    assert (crop.label, crop.fovea) == (None, None)
    picture, mask = crop.read()
    assert mask is not None
    assert picture.size == mask.size
    values = np.asarray(mask)
    # Nearly centred, and the only dimension is the disc's height.
    rows, columns = np.nonzero(values < 255)
    assert np.ptp(rows) + 1 == pytest.approx(mask.height / 2.5, abs=1)
    offset = np.array((columns.mean(), rows.mean())) / mask.height - 0.5
    assert np.abs(offset).max() < 0.15 / 2.5 + 0.03
    whole, whole_mask = record.read()
    assert whole_mask is not None
    assert (values == 0).sum() == (np.asarray(whole_mask) == 0).sum()
    assert np.asarray(picture).mean() == pytest.approx(
        np.asarray(whole)[np.asarray(whole_mask) < 255].mean(), rel=0.5
    )
    assert crop_records([Record("a.png", frozenset({"fovea"}), None, (1, 1), record.read)]) == []


class Painter(nn.Module):
    """Takes what is bright for the disc, and what is brighter for the cup."""

    def forward(self, images: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        grey = images.mean(1)
        found = {"disc": grey > 0.3, "cup": grey > 0.7, "fovea": grey > 0.1}
        logits = {task: each.float() * 40 - 20 for task, each in found.items()}
        return {task: logits[task] for task in tasks if task in logits}


def painted(size: int = 320) -> tuple[Image.Image, Image.Image]:
    """A disc of radius 40 and a cup of radius 21, which at 32 pixels nobody can measure."""
    y, x = np.mgrid[:size, :size]
    reach = np.hypot(x - 200, y - 120)
    grey = np.where(reach < 21, 230, np.where(reach < 40, 130, 40)).astype(np.uint8)
    mask = np.where(reach < 21, 0, np.where(reach < 40, 128, 255)).astype(np.uint8)
    return Image.fromarray(np.stack([grey] * 3, -1)), Image.fromarray(mask)


def test_a_second_look_measures_the_cup_finer() -> None:
    """True ratio 41 / 79; the cup lands where it is in the whole picture."""
    record = Record("a.png", frozenset({"disc", "cup"}), 1, None, painted)
    pictures = Photographs([record], 32)
    trained = Trained(Painter(), ("disc", "cup", "fovea"), RatioClassifier(1, 0))
    true = 41 / 79
    once = ask(trained, pictures)
    twice = ask(Trained(Painter(), trained.tasks, None, second_pass=True), pictures)
    # A disc of 8 pixels, and of 13.
    assert abs(twice.ratios[0] - true) < 0.05
    assert abs(twice.ratios[0] - true) <= abs(once.ratios[0] - true)
    expected = pictures.masks[0].numpy() == 0
    overlap = twice.masks["cup"][0] & expected
    assert overlap.sum() / (twice.masks["cup"][0] | expected).sum() > 0.7
    assert np.array_equal(twice.masks["disc"], once.masks["disc"])
    whole = Frame(0, 0, 320, 320)
    assert look_again(trained, painted()[0], np.zeros((32, 32), bool), whole) is None


def test_a_second_look_is_drawn_at_the_photographs_own_size(tmp_path: Path) -> None:
    """The cup in its place, to a pixel of the crop."""
    picture, mask = painted()
    picture.save(tmp_path / "a.png")
    trained = Trained(Painter(), ("disc", "cup"), RatioClassifier(1, 0), second_pass=True)
    prepared = read_photograph(tmp_path / "a.png", 32, crop=False)
    found = examine(trained, tmp_path / "a.png", prepared, Decision(None, "", {}))
    drawn = original_mask(dict(found.maps), found.seen, prepared.frame, prepared.size)
    assert drawn is not None
    cup, true = drawn == 0, np.asarray(mask) == 0
    assert (cup & true).sum() / (cup | true).sum() > 0.85
    assert found.ratio == pytest.approx(41 / 79, abs=0.05)


def test_a_run_with_every_option_trains_resumes_and_predicts(tmp_path: Path) -> None:
    """All of them together; a resumed run ends with the same weights."""
    for split in ("train", "test"):
        write_split(tmp_path / "data" / split, [entry(f"{split}{i}.jpg", i % 2) for i in range(8)])
    data = tmp_path / "data"
    flags = ["--data", data, *TINY, "--augment", "--second-pass", "--fold", "2/4"]
    flags += ["--patience", "9"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VALIDATE_EVERY", 1)
        for out, epochs in ((whole, 2), (half, 1)):
            arguments = [*flags, "--epochs", epochs, "--out", out]
            assert train.main([*map(str, arguments)]) == 0
        torch.manual_seed(5)
        assert train.main(["--resume", "--out", str(half), "--epochs", "2"]) == 0
    one, other = (torch.load(out / "last.pt", weights_only=True)["model"] for out in (whole, half))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    config = json.loads((whole / "config.json").read_text())
    # Eight pictures and their eight discs.
    assert config["pictures"] == {"train": 16, "val": 4, "test": 4}
    picture = next((data / "test/images").iterdir())
    assert predict.main([str(whole), str(picture), "--out", str(tmp_path / "found")]) == 0


def test_patience_ends_a_run_that_gets_no_better(
    repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two validations without a better score, also where it was stopped in between."""
    better = iter([True, False, True, False, False, True])
    notes: list[bool] = []

    def improved(state: TrainingState, scores: dict[str, float | None]) -> list[str]:
        notes.append(next(better))
        state.stale = 0 if notes[-1] else state.stale + 1
        return list(scores) if notes[-1] else []

    monkeypatch.setattr(TrainingState, "improved", improved)
    monkeypatch.setattr(train, "VALIDATE_EVERY", 1)
    out = tmp_path / "run"
    flags = ["--data", repacked, *TINY, "--patience", "2", "--epochs"]
    assert train.main([*map(str, flags), "4", "--out", str(out)]) == 0
    assert train.main(["--resume", "--out", str(out), "--epochs", "9"]) == 0
    assert notes == [True, False, True, False, False]
    with (out / "history.csv").open(newline="") as opened:
        assert len(list(csv.DictReader(opened))) == 5
    assert json.loads((out / "metrics.json").read_text())["best_epoch"] == 3


def test_validations_without_a_better_score_are_counted() -> None:
    """A part of the network that got better is enough."""
    state = TrainingState.__new__(TrainingState)
    state.best, state.stale = {}, 0
    stale = []
    for scores in ((0.5, 0.5), (0.4, 0.4), (None, 0.5), (0.4, 0.6), (0.4, 0.6)):
        state.improved(dict(zip("ab", scores, strict=True)))
        stale.append(state.stale)
    assert stale == [0, 1, 2, 0, 1]
