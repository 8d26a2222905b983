"""Damages data sets at random: each is read right or refused by one line, never with a traceback.

What a damaged set says is read again here, by other means: no label and no point may differ.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest
from numpy.typing import NDArray
from PIL import Image

from refuge.errors import InputError
from refuge.photographs.data import Photographs, load_splits
from tiny_photographs import SIZE, write_released, write_repacked

CASES = 200
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 0.5, 1.0, 12.5, 10**400, float("nan"), float("inf")),
    *("", " ", "0", "1", "12.5", "left", "1,5", "\ud800.jpg", "../a00.jpg", "a01.jpg", "A00.JPG"),
    *("V0001.jpg", "v0002.JPG", "T0002", [], ["disc"], {}, [[]]),
)
TABLES = {
    "train": ("Annotation-Training400", "Fovea_location.xlsx", None),
    "val": ("REFUGE-Validation400-GT", "Fovea_locations.xlsx", "Glaucoma Label"),
    "test": ("REFUGE-Test-GT", "Glaucoma_label_and_Fovea_location.xlsx", "Label(Glaucoma=1)"),
}
Random = np.random.Generator
Answer = tuple[str, float, float, float]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound sets, in which no two masks and no two points are the same."""
    folder = tmp_path_factory.mktemp("sound")
    write_repacked(folder / "repacked")
    write_released(folder / "released")
    for shift, file in enumerate(sorted(folder.rglob("*.bmp"))):
        with Image.open(file) as mask:
            values = np.roll(np.asarray(mask), shift, axis=1)
        Image.fromarray(values).save(file)
    for file in folder.rglob("index.json"):
        index = json.loads(file.read_text())
        for shift, entry in enumerate(index.values()):
            entry["Fovea_X"] += shift / 2
        file.write_text(json.dumps(index))
    return folder


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def pick(rng: Random, folder: Path, *endings: str) -> Path:
    """Draws a file; indexes and tables half the time, since each holds many pictures' truth."""
    files = files_in(folder)
    endings = endings or ((".json", ".xlsx") if rng.random() < 0.5 else ())
    chosen = [file for file in files if file.suffix in endings] or files
    return chosen[rng.integers(len(chosen))]


def flip_bytes(rng: Random, folder: Path) -> None:
    file = pick(rng, folder)
    content = bytearray(file.read_bytes())
    for place in rng.integers(len(content), size=rng.integers(1, 9)) if content else ():
        content[place] ^= 1 << rng.integers(8)
    file.write_bytes(content)


def change_digit(rng: Random, folder: Path) -> None:
    """As `flip_bytes`, but an index stays one."""
    file = pick(rng, folder, ".json")
    content = bytearray(file.read_bytes())
    digits = [i for i, byte in enumerate(content) if byte in b"0123456789"]
    if digits:
        content[digits[rng.integers(len(digits))]] = ord(str(rng.integers(10)))
        file.write_bytes(content)


def truncate(rng: Random, folder: Path) -> None:
    file = pick(rng, folder)
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(2) * rng.integers(len(content) + 1)])


def delete(rng: Random, folder: Path) -> None:
    pick(rng, folder).unlink()


def elsewhere(rng: Random, folder: Path, file: Path) -> Path:
    """Draws a folder of files of the same kind: the other label's, or the other split's."""
    alike = {f.parent for f in files_in(folder) if f.suffix == file.suffix}
    others = sorted(alike - {file.parent}) or [folder]
    return others[rng.integers(len(others))]


def duplicate(rng: Random, folder: Path) -> None:
    file = pick(rng, folder, ".jpg", ".bmp")
    shutil.copy(file, elsewhere(rng, folder, file) / file.name)


def duplicate_wrongly(rng: Random, folder: Path) -> None:
    """As an older version of a mask or a table would lie beside it."""
    file = pick(rng, folder, ".bmp", ".xlsx")
    content = pick(rng, folder, file.suffix).read_bytes()
    file.with_suffix(file.suffix.swapcase()).write_bytes(content)


def move(rng: Random, folder: Path) -> None:
    file = pick(rng, folder, ".jpg", ".bmp")
    file.rename(elsewhere(rng, folder, file) / file.name)


def change_case(rng: Random, folder: Path) -> None:
    file = pick(rng, folder)
    change = [str.upper, str.lower, str.swapcase][rng.integers(3)]
    file.rename(file.with_name(change(file.name)))


def swap(rng: Random, folder: Path) -> None:
    one, other = pick(rng, folder), pick(rng, folder)
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


def change_type(rng: Random, folder: Path) -> None:
    file = pick(rng, folder, ".jpg", ".bmp")
    mode = ["RGB", "RGBA", "CMYK", "L", "1", "P", "I;16", "F"][rng.integers(8)]
    kind = {"CMYK": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    Image.new(mode, (SIZE, SIZE)).save(file, kind)


def randomize(rng: Random, folder: Path) -> None:
    pick(rng, folder).write_bytes(rng.bytes(int(rng.integers(1000))))


def append(rng: Random, folder: Path) -> None:
    with pick(rng, folder).open("ab") as opened:
        opened.write(rng.bytes(int(rng.integers(1, 100))))


def make_folder(rng: Random, folder: Path) -> None:
    file = pick(rng, folder)
    file.unlink()
    file.mkdir()


def save_book(book: openpyxl.Workbook, file: Path) -> None:
    content = io.BytesIO()
    book.save(content)  # may fail, and then leaves the file as it is
    file.write_bytes(content.getvalue())


def change_value(rng: Random, folder: Path) -> None:
    """Writes some value into an entry of an index, or into a cell of a table."""
    file = pick(rng, folder, ".json", ".xlsx")
    value = VALUES[rng.integers(len(VALUES))]
    # An earlier damage may have left nothing to change, and Excel has not every value.
    with suppress(Exception):
        if file.suffix == ".json":
            index = json.loads(file.read_text())
            entry = index[str(rng.integers(4))]
            entry[[*entry, "Annotations"][rng.integers(len(entry) + 1)]] = value
            file.write_text(json.dumps(index))
        else:
            book = openpyxl.load_workbook(file)
            book.active.cell(int(rng.integers(1, 5)), int(rng.integers(1, 7))).value = value
            save_book(book, file)


def repeat(rng: Random, folder: Path) -> None:
    """Adds an entry or a row that says of the same picture something else."""
    file = pick(rng, folder, ".json", ".xlsx")
    with suppress(Exception):  # as above
        if file.suffix == ".json":
            index = json.loads(file.read_text())
            key = list(index)[rng.integers(len(index))]
            other = json.dumps(index[key] | {"Label": 1 - index[key]["Label"]})
            key = key if rng.random() < 0.5 else "new"
            file.write_text(file.read_text()[:-1] + f', "{key}": {other}}}')
        else:
            book = openpyxl.load_workbook(file)
            rows = list(book.active.values)
            row = list(rows[rng.integers(1, len(rows))])
            row[rng.integers(2, len(row))] = int(rng.integers(2))
            book.active.append(row)
            save_book(book, file)


DAMAGES: tuple[Callable[[Random, Path], None], ...] = (
    *(flip_bytes, change_digit, truncate, delete, change_case, swap),
    *(duplicate, duplicate, duplicate_wrongly, duplicate_wrongly, move, move, repeat, repeat),
    *(change_type, randomize, append, make_folder, change_value, change_value, change_value),
)


def single(value: Any) -> float:
    return float(np.float32(value))  # as points are kept


def read_index(file: Path) -> list[Answer]:
    """Reads an index with its repeated keys, of which `json` keeps the last alone."""
    pairs = json.loads(file.read_text(), object_pairs_hook=list)
    entries = [dict(pairs) for _, pairs in pairs]
    assert sum(len(pairs) for _, pairs in pairs) == sum(map(len, entries))
    nan = float("nan")
    answers = []
    for entry in entries:
        known = entry.get("Annotations", ["glaucoma", "fovea"])
        assert not isinstance(entry["Label"], bool)
        label = float(entry["Label"]) if "glaucoma" in known else -1.0
        points = [single(entry[f"Fovea_{a}"]) if "fovea" in known else nan for a in "XY"]
        answers.append((Path(entry["ImgName"]).stem.lower(), label, points[0], points[1]))
    return answers


def read_table(folder: Path, name: str, label: str | None) -> list[Answer]:
    """Reads a table cell by cell; in the training pictures' names g is for glaucoma."""
    (content,) = {f.read_bytes() for f in files_in(folder) if f.name.lower() == name.lower()}
    sheet = openpyxl.load_workbook(io.BytesIO(content)).active
    columns = {str(cell.value).strip(): cell.column for cell in sheet[1]}
    answers = []
    for row in range(2, sheet.max_row + 1):
        values = {key: sheet.cell(row, column).value for key, column in columns.items()}
        if values["ImgName"] is not None:
            stem = Path(values["ImgName"]).stem.lower()
            truth = float(values[label] if label else stem.startswith("g"))
            assert not isinstance(values.get(label or ""), bool)
            answers.append((stem, truth, single(values["Fovea_X"]), single(values["Fovea_Y"])))
    return sorted(set(answers))


def read_truth(folder: Path) -> dict[str, list[Answer]]:
    if folder.name == "repacked":
        return {split: read_index(folder / split / "index.json") for split in ("train", "test")}
    return {
        split: read_table(folder / place, name, label)
        for split, (place, name, label) in TABLES.items()
    }


def given(pictures: Photographs) -> list[Answer]:
    stems = [Path(name).stem.lower() for name in pictures.names]
    rows = zip(stems, pictures.labels.tolist(), pictures.points.tolist(), strict=True)
    return [(stem, float(label), point[0], point[1]) for stem, label, point in rows]


def check_masks(folder: Path, pictures: Photographs, known: dict[bytes, NDArray[Any]]) -> None:
    """Compares masks with every file of that name in a folder, where those are sound ones."""
    # REFUGE's own masks are BMP files; the re-packed form leaves the ending open.
    files = [f for f in files_in(folder) if folder.name == "seg" or f.suffix.lower() == ".bmp"]
    for row, name in enumerate(pictures.names):
        named = [f for f in files if f.stem.lower() == Path(name).stem.lower()]
        contents = {file.read_bytes() for file in named}
        if pictures.known["disc"][row] and contents <= known.keys():
            (content,) = contents
            assert np.array_equal(pictures.masks[row].numpy(), known[content]), name


def read_or_refuse(folder: Path) -> dict[str, Photographs] | str:
    try:
        return load_splits(str(folder), SIZE, seed=0)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_damaged_set_is_read_right_or_refused_by_a_line(
    sound: Path, tmp_path: Path, seed: int
) -> None:
    """Every file may be cut, renamed, doubled or full of noise."""
    rng = np.random.default_rng(seed)
    form = ("repacked", "released")[seed % 2]
    folder = tmp_path / form
    shutil.copytree(sound / form, folder)
    known = {f.read_bytes(): np.asarray(Image.open(f)) for f in folder.rglob("*.bmp")}
    for _ in range(rng.integers(1, 4)):
        DAMAGES[rng.integers(len(DAMAGES))](rng, folder)
    splits = read_or_refuse(folder)
    if isinstance(splits, str):
        assert str(folder) in splits
        assert len(splits.splitlines()) == 1
        return
    answers = {split: given(pictures) for split, pictures in splits.items()}
    if form == "repacked":  # whose `val` is held out
        answers["train"] += answers.pop("val")
    for split, truth in read_truth(folder).items():
        np.testing.assert_equal(sorted(answers[split]), sorted(truth))
    for split, pictures in splits.items():
        part = f"{split.replace('val', 'train')}/seg" if form == "repacked" else TABLES[split][0]
        check_masks(folder / part, pictures, known)
