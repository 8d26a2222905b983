"""Three sources, one dataset; and one clear line for whatever is wrong with them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import Batch, load_splits
from errors import InputError
from refuge.tiny_data import SIZE, entry, paint, write_split, write_table


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the first training entry."""
    file = folder / "train/index.json"
    index = json.loads(file.read_text())
    change(index["0"])
    file.write_text(json.dumps(index))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_repacked_form_is_read(repacked: Path) -> None:
    """A twentieth of the training pictures, at least one, is held out where there is no `val`."""
    splits = load_splits(str(repacked), 32, seed=0)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [11, 1, 4]
    names = [*splits["train"].names, *splits["val"].names]
    assert sorted(names) == [f"a{i:02}.jpg" for i in range(12)]
    assert splits["test"].labels.tolist() == [0, 1, 0, 1]


def test_the_held_out_share_follows_the_seed(repacked: Path) -> None:
    held_out = [load_splits(str(repacked), 32, seed=seed)["val"].names for seed in (0, 0, 1, 2, 3)]
    assert held_out[0] == held_out[1]
    assert len({*map(tuple, held_out)}) > 1


@pytest.mark.parametrize(("pictures", "masks"), [("images", "gts"), ("Images", "Masks")])
def test_folders_of_the_repacked_form_have_several_names(
    tmp_path: Path, pictures: str, masks: str
) -> None:
    for split in ("train", "val", "test"):
        write_split(tmp_path / split, [entry("a.jpg")], masks=masks)
        (tmp_path / split / "images").rename(tmp_path / split / "renamed")
        (tmp_path / split / "renamed").rename(tmp_path / split / pictures)
    splits = load_splits(str(tmp_path), 32, seed=0)
    assert {split: len(each) for split, each in splits.items()} == {"train": 1, "val": 1, "test": 1}


def test_the_released_form_is_read_with_folders_between(released: Path) -> None:
    """Labels come from the folder in training, from the table's own column elsewhere."""
    splits = load_splits(str(released), SIZE, seed=0)
    assert {split: each.names for split, each in splits.items()} == {
        "train": ["g0001.jpg", "n0001.jpg"],
        "val": ["V0001.jpg", "V0002.jpg"],
        "test": ["T0001.jpg", "T0002.jpg"],
    }
    for split in splits.values():
        assert split.labels.tolist() == [1, 0]
        assert split.tasks() == ("disc", "cup", "fovea", "glaucoma")
    assert splits["train"].points.tolist() == [[10.5, 20], [11, 21]]
    assert splits["val"].points.tolist() == [[12, 22], [13, 23]]
    assert splits["test"].points.tolist() == [[14, 24], [15, 25]]


def test_shadow_files_of_macos_are_no_pictures(released: Path) -> None:
    """Zips packed on a Mac hold `__MACOSX/._g0001.jpg` beside `g0001.jpg`."""
    shadow = released / "__MACOSX/Training400/Glaucoma"
    shadow.mkdir(parents=True)
    (shadow / "._g0001.jpg").write_bytes(b"")
    (shadow / "g0009.jpg").write_bytes(b"")
    assert len(load_splits(str(released), 32, seed=0)["train"]) == 2


def test_the_test_pictures_may_lie_under_their_other_name(released: Path) -> None:
    shutil.move(released / "zip/Test400", released / "REFUGE-Test400")
    assert len(load_splits(str(released), 32, seed=0)["test"]) == 2


def test_masks_keep_refuges_values_and_pictures_their_colours(repacked: Path) -> None:
    """At the original size nothing is resampled: disc is value < 255, cup is value 0."""
    pictures = load_splits(str(repacked), SIZE, seed=0)["test"]
    batch = pictures[[1]]
    values = np.asarray(paint(1)[1])
    assert np.array_equal(batch.targets["disc"][0].numpy(), values < 255)
    assert np.array_equal(batch.targets["cup"][0].numpy(), values == 0)
    with Image.open(repacked / "test/images/t01.jpg") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(batch.images[0], expected)
    assert batch.images.dtype == torch.float32


def test_masks_are_resized_without_new_values(repacked: Path) -> None:
    """Interpolation would invent a rim between cup and background."""
    masks = load_splits(str(repacked), 32, seed=0)["test"].masks
    assert set(masks.unique().tolist()) == {0, 128, 255}


def test_points_follow_the_picture_into_input_pixels(repacked: Path) -> None:
    """Pixel centres: x = 30 of 40 becomes 30.5 * 32 / 40 - 0.5 = 23.9."""
    points = load_splits(str(repacked), 32, seed=0)["test"].input_points()
    torch.testing.assert_close(points[0], torch.tensor([23.9, 15.9]))


def test_the_true_ratio_is_measured_at_the_original_size(repacked: Path) -> None:
    """The painted cup is 8 pixels high, the disc 16."""
    pictures = load_splits(str(repacked), 32, seed=0)["test"]
    assert pictures.ratios.tolist() == [0.5] * 4


def test_what_is_not_annotated_is_not_known(tmp_path: Path) -> None:
    """Without `Annotations` everything is; with it what it lists, and no mask is needed."""
    rows = [
        entry("a.jpg", 1),
        entry("b.jpg", None, Fovea_X=None, Fovea_Y=None, Annotations=["disc"]),
        entry("c.jpg", 0, Annotations=["glaucoma", "fovea"]),
    ]
    write_split(tmp_path / "train", rows)
    write_split(tmp_path / "test", rows)
    (tmp_path / "test/seg/c.bmp").unlink()
    pictures = load_splits(str(tmp_path), 32, seed=0)["test"]
    known = {task: rows.tolist() for task, rows in pictures.known.items()}
    assert known == {
        "disc": [True, True, False],
        "cup": [True, False, False],
        "fovea": [True, False, True],
        "glaucoma": [True, False, True],
    }
    assert pictures[[0, 1, 2]].labelled("fovea").tolist() == [0, 2]
    assert pictures.ratios.isnan().tolist() == [False, True, True]


def test_a_cache_saves_decoding_until_a_file_changes(repacked: Path, tmp_path: Path) -> None:
    """It is checked against size and time of every file, and never trusted blindly."""
    cache = tmp_path / "cache"
    first = load_splits(str(repacked), 32, seed=0, cache=cache)["test"]
    file = cache / "repacked-test-32.pt"
    stored = torch.load(file, weights_only=True)
    stored["pictures"] = torch.zeros_like(stored["pictures"])
    torch.save(stored, file)
    assert not load_splits(str(repacked), 32, seed=0, cache=cache)["test"].pictures.any()

    picture = repacked / "test/images/t00.jpg"
    os.utime(picture, ns=(0, 0))
    again = load_splits(str(repacked), 32, seed=0, cache=cache)["test"]
    assert torch.equal(again.pictures, first.pictures)
    truncate(file)
    again = load_splits(str(repacked), 32, seed=0, cache=cache)["test"]
    assert torch.equal(again.pictures, first.pictures)


def drop_column(folder: Path) -> None:
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma", "Fovea_X", "Fovea_Y"),
        [(1, "V0001.jpg", 1, 12, 22), (2, "V0002.jpg", 0, 13, 23)],
    )


def add_stranger(folder: Path) -> None:
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma Label", "Fovea_X", "Fovea_Y"),
        [(i, f"V000{i}.jpg", 0, 12, 22) for i in (1, 2, 3)],
    )


def forget_row(folder: Path) -> None:
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma Label", "Fovea_X", "Fovea_Y"),
        [(1, "V0001.jpg", 1, 12, 22)],
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "train/images/a00.jpg").unlink(), r"a00\.jpg: no such file"),
        (lambda d: (d / "train/seg/a00.bmp").unlink(), r"a00\.bmp: no such file"),
        (lambda d: truncate(d / "train/images/a00.jpg"), r"a00\.jpg: not a readable picture"),
        (lambda d: truncate(d / "train/seg/a00.bmp"), r"a00\.bmp: not a readable picture"),
        (
            lambda d: Image.new("L", (30, 40)).save(d / "train/seg/a00.bmp"),
            r"a00\.bmp: a mask must be of its picture's size \(40 x 40\), got 30 x 40",
        ),
        (
            lambda d: Image.new("L", (40, 40), 7).save(d / "train/seg/a00.bmp"),
            r"a00\.bmp: a mask must hold 0 \(cup\), 128 \(rim\) and 255 .* got 7",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(ImgName="z.jpg")),
            r"z\.jpg: no such file",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Annotation=["disc"])),
            r'index\.json: entry "0": unknown column \'Annotation\'',
        ),
        (
            lambda d: change_index(d, lambda e: e.pop("Label")),
            r"index\.json: entry \"0\": column 'Label' is missing",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Annotations=["rim"])),
            r"`Annotations` must be among .* got \['rim'\]",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Label=2)),
            r"`Label` must be 0 or 1, got 2",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Fovea_X="left")),
            r"`Fovea_X` must be a number, got 'left'",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Fovea_X=99)),
            r"a00\.jpg: the fovea must lie in the picture \(40 x 40\)",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Size_X=99)),
            r"a00\.jpg: must be of the size its index states \(99 x 40\), got 40 x 40",
        ),
        (lambda d: (d / "train/index.json").write_text("{"), r"index\.json: not readable as JSON"),
        (lambda d: (d / "train/index.json").write_text("[1]"), r"index\.json: must map numbers"),
        (lambda d: shutil.rmtree(d / "train/seg"), r"train: needs a folder named seg or gts"),
        (lambda d: shutil.rmtree(d / "test"), r"has no pictures for the test split"),
    ],
)
def test_what_is_wrong_with_a_repacked_set_is_named(
    repacked: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """One line with the file, since a set has thousands."""
    spoil(repacked)
    with pytest.raises(InputError, match=message) as caught:
        load_splits(str(repacked), 32, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_column, r"Fovea_locations\.xlsx: column 'Glaucoma Label' is missing among"),
        (add_stranger, r"Fovea_locations\.xlsx: names V0003, which is no picture in"),
        (forget_row, r"Fovea_locations\.xlsx: has no row for V0002\.jpg"),
        (
            lambda d: (d / "REFUGE-Validation400-GT/Disc_Cup_Masks/V0002.bmp").unlink(),
            r"V0002\.jpg: V0002\.bmp is missing in REFUGE-Validation400-GT",
        ),
        (
            lambda d: truncate(d / "REFUGE-Validation400-GT/Fovea_locations.xlsx"),
            r"Fovea_locations\.xlsx: not a readable Excel file",
        ),
        (
            lambda d: (d / "REFUGE-Validation400-GT/Fovea_locations.xlsx").unlink(),
            r"needs REFUGE-Validation400-GT/Fovea_locations\.xlsx",
        ),
        (lambda d: truncate(d / "zip/Test400/T0001.jpg"), r"T0001\.jpg: not a readable picture"),
    ],
)
def test_what_is_wrong_with_a_released_set_is_named(
    released: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """The same for REFUGE's own files."""
    spoil(released)
    with pytest.raises(InputError, match=message) as caught:
        load_splits(str(released), 32, seed=0)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data set; expected train/index\.json or Training400"):
        load_splits(str(tmp_path), 32, seed=0)
    with pytest.raises(InputError, match="`--data` must be a folder or the word phantom"):
        load_splits(str(tmp_path / "nowhere"), 32, seed=0)


def test_a_batch_is_cut_to_the_pictures_that_its_tasks_are_annotated_on() -> None:
    """Other pictures would shift the statistics of batch norm: the fovea was never learned so."""
    known = {"disc": [True, True, False, False], "fovea": [False, True, True, False]}
    batch = Batch(
        torch.arange(4.0),
        {task: torch.arange(4.0) * 10 for task in known},
        {task: torch.tensor(flags) for task, flags in known.items()},
    )
    cut = batch.only(("fovea",))
    assert cut.images.tolist() == [1.0, 2.0]
    assert cut.targets["disc"].tolist() == [10.0, 20.0]
    assert cut.labelled("disc").tolist() == [0]
    assert batch.only(("disc", "fovea")).images.tolist() == [0.0, 1.0, 2.0]
    assert cut.only(("fovea",)) is cut
