"""Three sources, one dataset; and one clear line for whatever is wrong with them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

from refuge.errors import InputError
from refuge.photographs.data import Batch, load_splits
from tiny_photographs import SIZE, entry, paint, write_split, write_table

TRAINING = "Training400/Training400"
VALIDATION = "REFUGE-Validation400-GT"
TEST_TABLE = "Glaucoma_label_and_Fovea_location.xlsx"


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the first training entry."""
    file = folder / "train/index.json"
    index = json.loads(file.read_text())
    change(index["0"])
    file.write_text(json.dumps(index))


def copy(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy(file, target)


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


def set_mask(folder: Path, mask: Image.Image, kind: str = "BMP") -> None:
    mask.save(folder / "train/seg/a00.bmp", kind)


def keep_one(folder: Path) -> None:
    file = folder / "train/index.json"
    file.write_text(json.dumps({"0": json.loads(file.read_text())["0"]}))


def write_validation(folder: Path, *rows: tuple[object, ...]) -> None:
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma Label", "Fovea_X", "Fovea_Y"),
        rows,
    )


def drop_column(folder: Path) -> None:
    write_table(
        folder / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        ("ID", "ImgName", "Glaucoma", "Fovea_X", "Fovea_Y"),
        [(1, "V0001.jpg", 1, 12, 22), (2, "V0002.jpg", 0, 13, 23)],
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
        (
            lambda d: change_index(d, lambda e: e.update(Label=True)),
            r"`Label` must be 0 or 1, got True",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Fovea_X=float("nan"))),
            r"`Fovea_X` must be a number, got nan",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Fovea_X=10**400)),
            r"`Fovea_X` must be a number, got 1000",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(Size_X=None)),
            r"`Size_X` must be a number, got None",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(ImgName="../../test/images/t00.jpg")),
            r"`ImgName` must be a file name, got '\.\./",
        ),
        (
            lambda d: change_index(d, lambda e: e.update(ImgName="a\nb.jpg")),
            r'index\.json: entry "0": a b\.jpg: no such file',
        ),
        (
            lambda d: change_index(d, lambda e: e.update(ImgName="A01.JPG")),
            r'index\.json: entry "1": a01\.jpg is in an entry before it',
        ),
        (
            lambda d: set_mask(d, Image.new("RGB", (40, 40), "red")),
            r"a00\.bmp: a mask must be grey",
        ),
        (
            lambda d: set_mask(d, Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG"),
            r"a00\.bmp: a mask must be opaque",
        ),
        (
            lambda d: set_mask(d, Image.new("I;16", (40, 40), 32896), "TIFF"),
            r"a00\.bmp: a mask must hold .* got 32896",
        ),
        (
            lambda d: Image.new("I;16", (40, 40)).save(d / "train/images/a00.jpg", "PNG"),
            r"a00\.jpg: a picture must have 8 bits a channel, got mode I;16",
        ),
        (
            lambda d: Image.new("1", (10000, 9000)).save(d / "train/images/a00.jpg", "PNG"),
            r"a00\.jpg: not a readable picture \(Image size \(90000000 pixels\) exceeds limit",
        ),
        (
            lambda d: (
                (d / "train/images/a00.jpg").rename(d / "train/images/A00.JPG")
                and shutil.copy(d / "train/images/a01.jpg", d / "train/images/a00.Jpg")
            ),
            r"a00\.Jpg: differs from .*A00\.JPG",
        ),
        (
            lambda d: copy(d / "train/images/a01.jpg", d / "train/seg/a00.PNG"),
            r"a00\.bmp: differs from .*a00\.PNG",
        ),
        (lambda d: (d / "train/gts").mkdir(), r"train: needs one folder named .*, got gts and seg"),
        (lambda d: (d / "val").mkdir(), r"val/index\.json: not readable as JSON"),
        (
            lambda d: (d / "train/index.json").write_text('{"0": {"Label": 0, "Label": 1}}'),
            r"index\.json: not readable as JSON \('Label' is there twice\)",
        ),
        (lambda d: (d / "train/index.json").write_text("[" * 10**5), r"index\.json: not readable"),
        (lambda d: (d / "train/index.json").write_bytes(b"\xff"), r"index\.json: not readable"),
        (keep_one, r"has no pictures for the val split"),
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
        (drop_column, r"Fovea_locations\.xlsx: must have one column 'Glaucoma Label', got 0 in"),
        (
            lambda d: write_validation(d, *((i, f"V000{i}.jpg", 0, 12, 22) for i in (1, 2, 3))),
            r"Fovea_locations\.xlsx: names V0003\.jpg, which is no picture in",
        ),
        (
            lambda d: write_validation(d, (1, "V0001.jpg", 1, 12, 22)),
            r"Fovea_locations\.xlsx: has no row for V0002\.jpg",
        ),
        (
            lambda d: write_validation(
                d, *((i, f"V000{i}.jpg", 1, 12, 22) for i in (1, 2)), (3, "V0001.jpg", 0, 12, 22)
            ),
            r"Fovea_locations\.xlsx: has two rows for V0001\.jpg that differ",
        ),
        (
            lambda d: write_validation(d, (1, None, 1, 12, 22)),
            r"Fovea_locations\.xlsx: a row lacks its ImgName",
        ),
        (
            lambda d: write_validation(d, *((i, f"V000{i}.jpg", True, 12, 22) for i in (1, 2))),
            r"Fovea_locations\.xlsx: the label of V0001\.jpg must be 0 or 1, got True",
        ),
        (
            lambda d: write_validation(d, *((i, f"V000{i}.jpg", 1, "1,5", 22) for i in (1, 2))),
            r"Fovea_locations\.xlsx: the fovea of V0001\.jpg must be numbers, got \['1,5', 22\]",
        ),
        (
            lambda d: openpyxl.Workbook().save(d / "REFUGE-Test-GT" / TEST_TABLE),
            r"Fovea_location\.xlsx: must have one column 'ImgName', got 0 in \[\]",
        ),
        (
            lambda d: shutil.copy(
                d / TRAINING / "Glaucoma/g0001.jpg", d / TRAINING / "Non-Glaucoma"
            ),
            r"Non-Glaucoma/g0001\.jpg: its folder contradicts .*Glaucoma/g0001\.jpg: which label",
        ),
        (
            lambda d: (d / TRAINING / "Glaucoma/g0001.jpg").rename(
                d / TRAINING / "Non-Glaucoma/g0001.jpg"
            ),
            r"Glaucoma/g0001\.bmp: its folder contradicts .*Non-Glaucoma/g0001\.jpg",
        ),
        (
            lambda d: write_table(
                d / "REFUGE-Test-GT" / TEST_TABLE,
                ("ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y"),
                [(1, "T0001.jpg", 0, 14, 24), (2, "T0002.jpg", 0, 15, 25)],
            ),
            r"G/T0001\.bmp: its folder contradicts .*Fovea_location\.xlsx: which label is right",
        ),
        (
            lambda d: copy(d / "zip/Test400/T0001.jpg", d / "zip/Test400/more/T0002.jpg"),
            r"more/T0002\.jpg: differs from .*Test400/T0002\.jpg",
        ),
        (
            lambda d: copy(
                d / "REFUGE-Test-GT" / TEST_TABLE, d / VALIDATION / "old/Fovea_locations.xlsx"
            ),
            r"old/Fovea_locations\.xlsx: differs from .*Fovea_locations\.xlsx",
        ),
        (
            lambda d: shutil.rmtree(d / "REFUGE-Validation400"),
            r"released: has REFUGE-Validation400-GT but no REFUGE-Validation400/\*\.jpg",
        ),
        (
            lambda d: shutil.rmtree(d / "REFUGE-Test-GT"),
            r"released: needs REFUGE-Test-GT/Glaucoma_label_and_Fovea_location\.xlsx",
        ),
        (
            lambda d: shutil.move(d / "Training400", d / "__MACOSX/Training400"),
            r"released: not a data set",
        ),
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


def save_turned(picture: Image.Image, file: Path) -> None:
    """Saves as a camera does that was held upright: viewers turn the picture clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, exif=exif)


def write_pair(folder: Path, **sizes: Any) -> None:
    write_split(folder / "train", [entry("a.png", **sizes), entry("b.png")])
    write_split(folder / "test", [entry("t.png")])


def first_picture(folder: Path, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the picture and the mask of `a.png`, wherever the split put it."""
    for split in load_splits(str(folder), size, seed=0).values():
        if "a.png" in split.names:
            row = split.names.index("a.png")
            return split.pictures[row], split.masks[row]
    raise AssertionError


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "L", "LA", "P", "1"])
def test_pictures_of_every_mode_of_8_bits_are_read(tmp_path: Path, mode: str) -> None:
    """Brightness survives: a black half stays black, a white half white."""
    write_pair(tmp_path)
    picture = Image.new("RGB", (SIZE, SIZE))
    picture.paste("white", (0, 0, SIZE, SIZE // 2))
    file = tmp_path / "train/images/a.png"
    picture.convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    read = first_picture(tmp_path)[0]
    assert torch.equal(read, torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_transparent_pixels_are_black_as_around_the_field_of_view(tmp_path: Path) -> None:
    write_pair(tmp_path)
    Image.new("RGBA", (SIZE, SIZE), (200, 100, 50, 0)).save(tmp_path / "train/images/a.png")
    assert not first_picture(tmp_path)[0].any()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16", "I"])
def test_masks_of_every_mode_keep_their_values(tmp_path: Path, mode: str) -> None:
    """Equal channels, palettes of greys and 16 bits hold the same three values."""
    write_pair(tmp_path)
    mask = paint(0)[1]
    file = tmp_path / "train/seg/a.png"
    (tmp_path / "train/seg/a.bmp").unlink()
    if mode in ("I;16", "I"):
        kind = {"I;16": np.uint16, "I": np.int32}[mode]
        Image.fromarray(np.asarray(mask).astype(kind)).save(file, "TIFF")
    elif mode == "P":
        coded = Image.fromarray((np.asarray(mask) // 127).astype(np.uint8), "P")
        coded.putpalette([0, 0, 0, 128, 128, 128, 255, 255, 255])
        coded.save(file)
    else:
        mask.convert(mode).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
    assert np.array_equal(first_picture(tmp_path)[1].numpy(), np.asarray(mask))


def test_a_turned_picture_is_read_as_viewers_show_it(tmp_path: Path) -> None:
    """Its mask, its point and the size in its index are those of the picture shown."""
    write_pair(tmp_path, Size_X=20)
    picture, mask = (image.crop((0, 0, 20, SIZE)) for image in paint(0))
    save_turned(picture.transpose(Image.Transpose.ROTATE_90), tmp_path / "train/images/a.png")
    mask.save(tmp_path / "train/seg/a.bmp")
    change_index(tmp_path, lambda e: e.update(Fovea_X=15, Fovea_Y=35))
    expected = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    read = first_picture(tmp_path)[0].permute(1, 2, 0)
    assert np.array_equal(read.numpy(), np.asarray(expected))

    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "train/seg/a.bmp")
    with pytest.raises(InputError, match=r"a\.bmp: a mask must be of its picture's size \(20 x 40"):
        first_picture(tmp_path)


def test_endings_may_be_upper_case(repacked: Path, released: Path) -> None:
    """Cameras write `.JPG`; the index and the tables may say otherwise."""
    for folder in (repacked, released):
        for file in [*folder.rglob("*.jpg"), *folder.rglob("*.bmp"), *folder.rglob("*.xlsx")]:
            file.rename(file.with_suffix(file.suffix.upper()))
    assert load_splits(str(repacked), 32, seed=0)["test"].names[0] == "t00.JPG"
    assert load_splits(str(released), 32, seed=0)["val"].names == ["V0001.JPG", "V0002.JPG"]


def test_hidden_files_and_longer_names_are_not_the_masks_of_a_picture(repacked: Path) -> None:
    """`t00.*` finds `t00.old.bmp` too, and `t00.png` if it is a folder."""
    folder = repacked / "test/seg"
    for name in ("._t00.bmp", ".t00.bmp", "t00.old.bmp", "t00.txt"):
        (folder / name).write_bytes(b"")
    (folder / "t00.png").mkdir()
    assert len(load_splits(str(repacked), 32, seed=0)["test"]) == 4


def test_copies_of_a_file_are_one(released: Path) -> None:
    """An archive unpacked twice gives `Test400/Test400`."""
    for name in ("zip/Test400", "REFUGE-Test-GT", "Training400"):
        shutil.copytree(released / name, released / "again" / Path(name).name)
    expected = load_splits(str(released), 32, seed=0)
    assert [len(each) for each in expected.values()] == [2, 2, 2]
    assert expected["train"].labels.tolist() == [1, 0]


def test_tables_are_read_with_empty_rows_and_numbers_as_text(released: Path) -> None:
    """As they come out of Excel after somebody has edited them."""
    write_table(
        released / "REFUGE-Validation400-GT/Fovea_locations.xlsx",
        (None, None, None, None, None, None),
        [
            ("ID", " ImgName ", "Glaucoma Label", "Fovea_X", "Fovea_Y ", None, None),
            (1, "V0001.jpg ", "1", "12.25", " 22 "),
            (" ", None, "", None, None),
            (2, "v0002.JPG", 0.0, 13, 23, None, " "),
            (2, "V0002.jpg", 0, 13, 23),
            (3, None, None, None, None),
        ],
    )
    pictures = load_splits(str(released), 32, seed=0)["val"]
    assert pictures.labels.tolist() == [1, 0]
    assert pictures.points.tolist() == [[12.25, 22], [13, 23]]


def test_an_index_may_start_with_a_mark_and_hold_numbers_as_text(repacked: Path) -> None:
    change_index(repacked, lambda e: e.update(Label="1", Fovea_X="30.5", Size_X=40.0))
    file = repacked / "train/index.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    splits = load_splits(str(repacked), 32, seed=0)
    labels = {
        n: y for s in splits.values() for n, y in zip(s.names, s.labels.tolist(), strict=True)
    }
    assert labels["a00.jpg"] == 1


def test_a_cache_never_keeps_labels_or_swapped_masks(repacked: Path, tmp_path: Path) -> None:
    """Labels are read again; masks of one size and one time swap their names."""
    one, other = (repacked / f"test/seg/t0{i}.bmp" for i in (0, 1))
    Image.new("L", (SIZE, SIZE), 255).save(one)
    for file in (one, other):
        os.utime(file, ns=(0, 0))
    before = load_splits(str(repacked), 32, seed=0, cache=tmp_path)["test"]
    file = repacked / "test/index.json"
    file.write_text(file.read_text().replace('"Label": 1', '"Label": 0'))
    one.rename(tmp_path / "kept.bmp")
    other.rename(one)
    (tmp_path / "kept.bmp").rename(other)
    after = load_splits(str(repacked), 32, seed=0, cache=tmp_path)["test"]
    assert after.labels.tolist() == [0, 0, 0, 0]
    assert torch.equal(after.masks[[1, 0]], before.masks[:2])


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"not a data set; expected train/index\.json or Training400"
    ):
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
