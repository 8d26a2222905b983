"""Photographs of one's own: a CSV file, and a check that lists everything at once."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import check
import train
from refuge.errors import InputError
from refuge.photographs.checks import find_warnings
from refuge.photographs.data import find_records, load_splits
from tiny_photographs import SIZE, TINY, entry, paint, write_split, write_table


def write_imported(folder: Path, rows: list[dict[str, str]]) -> None:
    """Writes painted photographs with white masks, and the table that lists them."""
    folder.mkdir()
    for seed, row in enumerate(rows):
        picture, mask = paint(seed)
        values = np.asarray(mask)
        picture.save(folder / row["picture"])
        for task, inside in (("disc", values < 255), ("cup", values == 0)):
            if row.get(task):
                Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(folder / row[task])
    with (folder / "photographs.csv").open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0])
        table.writeheader()
        table.writerows(rows)


def make_rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "picture": f"p{n}.jpg",
            "patient": str(n // 2),
            "eye": "left",
            "glaucoma": str(n % 2),
            "disc": f"d{n}.png",
            "cup": f"c{n}.png" if n else "",
            "fovea_x": "30",
            "fovea_y": "20",
        }
        for n in range(count)
    ]


def test_a_table_with_separate_masks_is_a_data_set(tmp_path: Path) -> None:
    """The masks become REFUGE's; both eyes of a patient stay together; a run trains on it."""
    data = tmp_path / "data"
    write_imported(data, make_rows(20))
    splits = load_splits(str(data), SIZE, seed=0)
    assert {split: len(each) for split, each in splits.items()} == {
        "train": 12,
        "val": 4,
        "test": 4,
    }
    assert splits["test"].names == ["p0.jpg", "p1.jpg", "p10.jpg", "p11.jpg"]
    assert splits["test"].labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(splits["test"].masks[1], torch.from_numpy(np.asarray(paint(1)[1]).copy()))
    assert splits["test"].known["cup"].tolist() == [False, True, True, True]
    assert splits["test"].points.tolist() == [[30, 20]] * 4
    arguments = ["--data", data, *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert train.main([*map(str, arguments)]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": "none.jpg"}, r"line 3: `picture` none\.jpg: no such file"),
        ({"picture": ""}, r"line 3: names no picture"),
        ({"disc": ""}, r"line 3: a cup needs the mask of its disc"),
        ({"glaucoma": "yes"}, r"line 3: `glaucoma` must be 0 or 1, got yes"),
        ({"fovea_y": ""}, r"line 3: `fovea_x` and `fovea_y` must be two numbers"),
        ({"eye": "both"}, r"line 3: `eye` must be left or right, got both"),
        ({"picture": "p0.jpg"}, r"line 3: p0\.jpg is in a line before it"),
        ({"fovea_x": "99"}, r"p1\.jpg: the fovea must lie in the picture"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    rows = make_rows(10)
    write_imported(tmp_path / "data", rows)
    rows[1] = rows[1] | change
    with (tmp_path / "data/photographs.csv").open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0])
        table.writeheader()
        table.writerows(rows)
    with pytest.raises(InputError, match=message):
        load_splits(str(tmp_path / "data"), SIZE, seed=0)


def test_a_check_lists_every_fault_at_once(
    repacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the index and of the files, and says what is left."""
    (repacked / "train/images/a00.jpg").write_bytes(b"no picture")
    (repacked / "train/images/a01.jpg").unlink()
    Image.new("L", (40, 40), 7).save(repacked / "train/seg/a02.bmp")
    index = json.loads((repacked / "test/index.json").read_text())
    index["3"]["Label"] = 5
    (repacked / "test/index.json").write_text(json.dumps(index))
    assert check.main([str(repacked)]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if line.startswith("fault: ")]
    assert len(faults) == 4
    for part in ("a00.jpg: not a readable", "a01.jpg: no such file", "a02.bmp: a mask must hold"):
        assert sum(part in line for line in faults) == 1
    assert any('entry "3": `Label` must be 0 or 1, got 5' in line for line in faults)
    assert "train: 9 photographs (disc 9, cup 9, fovea 9, glaucoma 9; 5 with glaucoma)" in lines
    assert "val: no photographs" in lines
    assert lines[-1] == f"{repacked}: 4 faults"
    assert check.main([str(repacked / "nowhere")]) == 2


def expect_faults(folder: Path, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Checks a data set, which must have these faults in this order and no others."""
    assert check.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if line.startswith("fault: ")]
    assert len(faults) == len(expected), "\n".join(faults)
    for line, part in zip(faults, expected, strict=True):
        assert part in line
    assert lines[-1] == f"{folder}: {len(faults)} faults"


def test_a_check_of_refuges_own_layout_lists_every_fault(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split whose table is missing hides nothing of the others, nor one fault another."""
    next(released.rglob("V0001.bmp")).unlink()
    next(released.rglob("V0001.jpg")).write_bytes(b"no picture")
    Image.new("L", (30, 40), 255).save(next(released.rglob("V0002.bmp")))
    next(released.rglob("Fovea_location.xlsx")).unlink()
    rows = [(1, "T0001.jpg", 2, "x", 24), (2, "T0002.jpg", 0, 99, 25), (3, "T9.jpg", 0, 1, 1)]
    header = ("ID", "ImgName", "Label(Glaucoma=1)", "Fovea_X", "Fovea_Y")
    write_table(next(released.rglob("Glaucoma_label_and_Fovea_location.xlsx")), header, rows)
    expected = [
        "needs Annotation-Training400/Fovea_location.xlsx",
        "V0001.bmp is missing in",
        "V0001.jpg: not a readable picture",
        "names T9.jpg, which is no picture in",
        "the label of T0001.jpg must be 0 or 1, got 2",
        "the fovea of T0001.jpg must be numbers, got ['x', 24]",
        "V0002.bmp: a mask must be of its picture's size (40 x 40), got 30 x 40",
        "T0002.jpg: the fovea must lie in the picture (40 x 40), got (99.0, 25.0)",
    ]
    expect_faults(released, expected, capsys)


def test_a_check_lists_every_fault_of_one_photograph(
    repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An entry of an index and a row of a table, each with all that can be wrong with it."""
    index = json.loads((repacked / "train/index.json").read_text())
    index["0"] |= {"Colour": 1, "Label": 2, "Fovea_X": "x", "Fovea_Y": None, "Eye": "up"}
    index["0"] |= {"Size_X": 41}
    del index["1"]["Label"], index["1"]["Size_X"]
    index["1"] |= {"ImgName": "a/b.jpg", "Annotations": ["eye"]}
    index["2"]["ImgName"] = "none.jpg"
    index["3"] |= {"Fovea_X": 99, "Size_Y": 41}
    (repacked / "train/index.json").write_text(json.dumps(index))
    (repacked / "train/images/a04.jpg").write_bytes(b"no picture")
    for name in ("a00", "a03", "a04"):
        Image.new("L", (SIZE, SIZE), 7).save(repacked / f"train/seg/{name}.bmp")
    (repacked / "test/index.json").write_text("[")
    zero, one = (f'entry "{number}": ' for number in (0, 1))
    expected = [
        *(f"{zero}unknown column 'Colour'", f"{zero}`Label` must be 0 or 1, got 2"),
        *(f"{zero}`Fovea_X` must be a number", f"{zero}`Fovea_Y` must be a number"),
        *(f"{zero}`Eye` must be left or right", "a00.jpg: must be of the size its index states"),
        *("a00.bmp: a mask must hold", f"{one}column 'Label' is missing"),
        *(f"{one}`Annotations` must be among", f"{one}`ImgName` must be a file name"),
        *(f"{one}column 'Size_X' is missing", "none.jpg: no such file", "none.bmp: no such file"),
        *("test/index.json: not readable as JSON", "a03.jpg: must be of the size its index"),
        *("a03.jpg: the fovea must lie in the picture", "a03.bmp: a mask must hold"),
        *("a04.jpg: not a readable picture", "a04.bmp: a mask must hold"),
    ]
    expect_faults(repacked, expected, capsys)

    rows = make_rows(10)
    write_imported(tmp_path / "own", rows)
    rows[1] |= {"eye": "up", "glaucoma": "2", "fovea_x": "", "cup": "none.png", "split": "all"}
    rows[2] |= {"picture": "none.jpg"}
    rows = [{"split": "train"} | row | {"side": "1"} for row in rows]
    with (tmp_path / "own/photographs.csv").open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0])
        table.writeheader()
        table.writerows(rows)
    for name in ("p1.jpg", "d1.png", "d2.png", "p3.jpg", "c3.png"):
        (tmp_path / "own" / name).write_bytes(b"no picture")
    expected = [
        *("unknown column 'side'", "line 3: `cup` none.png: no such file"),
        *("line 3: `glaucoma` must be 0 or 1", "line 3: `fovea_x` and `fovea_y` must be two"),
        *("line 3: `eye` must be left", "line 3: `split` must be in"),
        *("p1.jpg: not a readable", "d1.png: not a readable"),
        *("line 4: `picture` none.jpg: no such file", "d2.png: not a readable"),
        *("p3.jpg: not a readable", "c3.png: not a readable"),
    ]
    expect_faults(tmp_path / "own", expected, capsys)


def test_what_is_probably_wrong_is_warned_of(tmp_path: Path) -> None:
    """Inverted masks, test pictures that were trained on, one side only, a mirrored eye."""
    rows = [entry(f"a{i:02}.jpg", i % 2, Eye="left") for i in range(20)]
    rows[3] = entry("a03.jpg", 1, Eye="right")
    write_split(tmp_path / "train", rows)
    write_split(tmp_path / "test", [entry(f"a{i:02}.jpg", i % 2) for i in range(2)])
    for file in sorted((tmp_path / "train/seg").iterdir())[:2]:
        with Image.open(file) as mask:
            inverted = Image.fromarray(np.where(np.asarray(mask) == 255, 128, 255).astype(np.uint8))
        inverted.save(file)
    splits = load_splits(str(tmp_path), 32, seed=0, wanted=("train", "test"))
    found = "\n".join(find_warnings(splits, mirror=True))
    assert "covers more than 30% of" in found
    assert "are their masks inverted?" in found
    assert "2 test pictures are also among the training pictures" in found
    assert "the stated eye of 1 train pictures (a03.jpg) contradicts" in found


@pytest.mark.parametrize("mirror", [True, False])
def test_photographs_of_one_side_are_warned_of(tmp_path: Path, mirror: bool) -> None:
    """Where 24 of 25 foveas are right of the disc, but not where half of them are."""
    rows = [entry(f"a{i:02}.jpg", i % 2) for i in range(26)]
    rows[4] = entry("a04.jpg", 0, Fovea_X=5.0)
    write_split(tmp_path / "one/train", rows)
    write_split(
        tmp_path / "both/train", [r | {"Fovea_X": 5.0 + i % 2 * 30} for i, r in enumerate(rows)]
    )
    one, both = (
        load_splits(str(tmp_path / name), 32, seed=0, wanted=["train"]) for name in ("one", "both")
    )
    (line,) = find_warnings(one, mirror)
    assert "the fovea is right of the disc on " in line
    assert ("mirrored pictures alone" in line) == mirror
    assert ("will not be understood" in line) != mirror
    assert find_warnings(both, mirror) == []


def test_sizes_need_not_be_stated_and_an_eye_may_be(tmp_path: Path) -> None:
    row = entry("a.jpg", 1, Eye="right")
    del row["Size_X"], row["Size_Y"]
    write_split(tmp_path / "test", [row])
    (record,) = find_records(tmp_path)["test"]
    assert record.eye == "right"
    assert record.read()[0].size == (SIZE, SIZE)
    assert ImageOps.mirror(record.read()[0]).size == (SIZE, SIZE)
    write_split(tmp_path / "val", [row | {"Size_X": 40}])
    with pytest.raises(InputError, match="column 'Size_Y' is missing"):
        find_records(tmp_path)
