"""Wrong calls of the programs: each ends in one line or in a result, never in a traceback."""

import io
import json
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import check
import evaluate
import export
import predict
import reproduce
import train
from refuge.files import lock_folder

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "check": check.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "predict": predict.main,
    "reproduce": reproduce.main,
    "train": train.main,
}
PREDICT = "predict {run} {eye} --out {out}"
RESUME = "train --resume --out {run} --epochs 3"
SEVERAL = "predict {run} {folder} --out {out}"


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


class Place:
    """A copy of a run, a data set, photographs, and a place to write to.

    Args:
        home: An empty folder.
        run: The run to copy.
        opened: Takes up what holds until the end of the test.
    """

    def __init__(self, home: Path, run: Path, opened: ExitStack) -> None:
        self.home, self.run, self.data, self.out = home, home / "run", home / "data", home / "out"
        self.folder, self.opened = home / "folder", opened
        shutil.copytree(run, self.run)
        self.folder.mkdir()
        self.eye = self.folder / "eye.jpg"
        shutil.copy(run.parent / "data/test/images/t00.jpg", self.eye)

    def write(self, file: str, content: bytes | str) -> None:
        """Writes a file, relative to the place."""
        path = self.home / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def edit(self, file: str, change: Callable[[bytearray], object]) -> None:
        """Changes the bytes of a file."""
        content = bytearray((self.home / file).read_bytes())
        change(content)
        self.write(file, bytes(content))

    def configure(self, **values: object) -> None:
        """Changes settings in `config.json`."""
        config = json.loads((self.run / "config.json").read_text())
        self.write("run/config.json", json.dumps(config | values))

    def other(self, name: str, change: Callable[[bytearray], object]) -> None:
        """Adds a damaged copy of the photograph."""
        shutil.copy(self.eye, self.folder / name)
        self.edit(f"folder/{name}", change)


class Case(NamedTuple):
    """A call, what is done before it, a part of what it says, and its exit code."""

    prepare: Callable[[Place], object]
    call: str
    says: str
    code: int = 2


def nothing(place: Place) -> None:
    """Prepares nothing: the call itself is wrong, or right."""


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def flip(content: bytearray) -> None:
    for place in range(0, 200):
        content[place] ^= 255


def flip_one(content: bytearray) -> None:
    content[len(content) // 2] ^= 16


def trap(name: str) -> Callable[[Place], None]:
    return lambda place: place.write(f"run/{name}", pickle.dumps(Trap(place.home / "ran")))


def deep(place: Place) -> None:
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(place.eye.with_name("deep.png"))


def bomb(place: Place) -> None:
    content = io.BytesIO()
    Image.new("RGB", (2, 2)).save(content, "png")
    header = b"IHDR" + struct.pack(">2I", 20_000, 20_000) + content.getvalue()[24:29]
    damaged = content.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header))
    place.write("folder/bomb.png", damaged + content.getvalue()[33:])


def swap_for_folder(place: Place) -> None:
    (place.run / "best.pt").unlink()
    (place.run / "best.pt").mkdir()


def fill_disk(place: Place) -> None:
    (place.out / "masks").mkdir(parents=True)
    (place.out / "masks/eye.png.part").symlink_to("/dev/full")


def link_run(place: Place) -> None:
    place.run.rename(place.home / "elsewhere")
    place.run.symlink_to(place.home / "elsewhere")


def link_nowhere(place: Place) -> None:
    shutil.rmtree(place.run)
    place.run.symlink_to(place.home / "none")


def lock_out(place: Place) -> None:
    place.out.mkdir()
    place.opened.enter_context(lock_folder(place.out))


def write_other_table(place: Place) -> None:
    place.write("out/predictions.csv", "a,b\n1,2\n")
    place.write("out/call.json", "{}")


CASES = {
    # Runs
    "no run": Case(lambda p: shutil.rmtree(p.run), PREDICT, "config.json: not readable as JSON"),
    "no weights": Case(lambda p: (p.run / "best.pt").unlink(), PREDICT, "has no best.pt yet"),
    "no bytes": Case(lambda p: p.write("run/best.pt", b""), PREDICT, "not a readable checkpoint"),
    "cut weights": Case(lambda p: p.edit("run/best.pt", cut), PREDICT, "not a readable checkpoint"),
    "flipped bytes": Case(lambda p: p.edit("run/best.pt", flip), PREDICT, "best.pt: not a"),
    "a flipped bit": Case(lambda p: p.edit("run/best.pt", flip_one), PREDICT, "", 0),
    "malicious weights": Case(trap("best.pt"), PREDICT, "is damaged, or contains more than"),
    "weights are a folder": Case(swap_for_folder, PREDICT, "best.pt: not a readable checkpoint"),
    "another width": Case(lambda p: p.configure(width=9), PREDICT, "`width` was 2, `config.json`"),
    "a text for a number": Case(lambda p: p.configure(size="32"), PREDICT, "`size` must be like"),
    "no such method": Case(lambda p: p.configure(method="x"), PREDICT, "`--method` must be"),
    "cut config": Case(lambda p: p.edit("run/config.json", cut), PREDICT, "not readable as JSON"),
    "config is a list": Case(lambda p: p.write("run/config.json", "[]"), PREDICT, "JSON object"),
    "empty config": Case(lambda p: p.write("run/config.json", "{}"), PREDICT, "is missing"),
    "deep config": Case(lambda p: p.write("run/config.json", "[" * 10**5), PREDICT, "not readable"),
    "bad operating point": Case(
        lambda p: p.write("run/operating_point.json", '{"thresholds": 3}'),
        *(PREDICT, "operating_point.json: not an operating point"),
    ),
    "bad quality": Case(
        lambda p: p.write("run/quality.json", '{"brightness": ["a", 1, 2]}'),
        *(PREDICT, "quality.json: `brightness` must be three numbers"),
    ),
    "run is a link": Case(link_run, PREDICT, "", 0),
    "a link to nothing": Case(
        link_nowhere,
        *(PREDICT, "config.json: not readable"),
    ),
    # Photographs
    "no photograph": Case(nothing, "predict {run} {folder}/none.jpg --out {out}", "none.jpg: not"),
    "empty photograph": Case(lambda p: p.other("a.jpg", bytearray.clear), SEVERAL, "a.jpg: not", 1),
    "cut photograph": Case(lambda p: p.other("a.jpg", cut), SEVERAL, "a.jpg: not a readable", 1),
    "flipped photograph": Case(lambda p: p.other("a.jpg", flip), SEVERAL, "a.jpg: not a", 1),
    "a flipped pixel": Case(lambda p: p.other("a.jpg", flip_one), SEVERAL, "", 0),
    "cut DICOM": Case(lambda p: p.other("a.dcm", cut), SEVERAL, "a.dcm: not a readable", 1),
    "16 bits": Case(deep, SEVERAL, "deep.png: a picture must have 8 bits a channel", 1),
    "too many pixels": Case(bomb, SEVERAL, "(400000000 pixels) exceeds limit", 1),
    "weights as photograph": Case(nothing, "predict {run} {run}/best.pt --out {out}", "best.pt: n"),
    "photograph links nowhere": Case(
        lambda p: (p.folder / "a.jpg").symlink_to("none"),
        *("predict {run} {folder}/a.jpg {eye} --out {out}", "a.jpg: not a readable", 1),
    ),
    "a folder in itself": Case(lambda p: (p.folder / "f").symlink_to(p.folder), SEVERAL, "", 0),
    "other alphabets": Case(
        lambda p: p.eye.rename(p.folder / "глаз & <b> 目 #1.jpg"), SEVERAL, "", 0
    ),
    "a line break in a name": Case(
        lambda p: p.other("a\nb.jpg", cut), SEVERAL, "a b.jpg: not a readable", 1
    ),
    "no photographs": Case(lambda p: p.eye.unlink(), SEVERAL, "has no photographs"),
    "no match": Case(nothing, "predict {run} {folder}/*.png --out {out}", "no file matches"),
    "a list without pictures": Case(
        lambda p: p.write("list.csv", "file\na\n"),
        *("predict {run} {home}/list.csv --out {out}", "needs a column `picture`"),
    ),
    "a list in another encoding": Case(
        lambda p: p.write("list.csv", "picture\nœil.jpg\n".encode("utf-16")),
        *("predict {run} {home}/list.csv --out {out}", "list.csv: not readable as CSV"),
    ),
    # Where results go
    "out is a file": Case(lambda p: p.write("out", ""), PREDICT, "out: cannot be created"),
    "a full disk": Case(fill_disk, PREDICT, "cannot be written (No space left on device)"),
    "a call beside another": Case(
        lock_out,
        *(PREDICT, "another process is writing into this folder"),
    ),
    "another program's table": Case(
        write_other_table,
        *(PREDICT + " --resume", "take another `--out`"),
    ),
    "no out": Case(nothing, "predict {run} {eye}", "required: --out"),
    "workers": Case(nothing, PREDICT + " --workers -1", "`--workers` must be at least 0"),
    "export to a file": Case(
        lambda p: p.write("out", ""), "export {run} --out {out}", "out: cannot be created"
    ),
    # Trainings
    "two resumes": Case(
        lambda p: p.opened.enter_context(lock_folder(p.run)), RESUME, "another process is writing"
    ),
    "resume from cut weights": Case(lambda p: p.edit("run/last.pt", cut), RESUME, "last.pt: not a"),
    "resume from no bytes": Case(lambda p: p.write("run/last.pt", b""), RESUME, "last.pt: not a"),
    "resume malicious weights": Case(trap("last.pt"), RESUME, "contains more than"),
    "resume nothing": Case(nothing, "train --resume --out {out}", "config.json: not readable"),
    "resume another width": Case(nothing, RESUME + " --width 5", "`--width` must be 2 as in"),
    "resume edited settings": Case(lambda p: p.configure(mirror="on"), RESUME, "`mirror` was off"),
    "train over a run": Case(nothing, "train --out {run}", "contains a run; give `--resume`"),
    "train on nothing": Case(
        nothing, "train --data {home}/none --out {out}", "must be a folder or the word phantom"
    ),
    "train on a broken index": Case(
        lambda p: p.write("data/train/index.json", "{"),
        *("train --data {data} --out {out}", "index.json: not readable as JSON"),
    ),
    # The other programs
    "evaluate without a place": Case(
        nothing, "evaluate {run} --data {data}", "`--data` needs `--out`"
    ),
    "evaluate nothing": Case(
        nothing, "evaluate {run} --data {home}/none --out {out}", "must be a folder or the word"
    ),
    "evaluate no split": Case(nothing, "evaluate {run} --split best", "invalid choice: 'best'"),
    "evaluate with a broken cache": Case(
        lambda p: p.write(".cache/data-test-32-field.pt", b"no tensors"), "evaluate {run}", "", 0
    ),
    "no such table": Case(nothing, "reproduce table3", "invalid choice: 'table3'"),
    "no seeds": Case(nothing, "reproduce table1 --seeds 0", "`--seeds` must be at least 1, got 0."),
    "reproduce no method": Case(
        nothing, "reproduce table1 --methods x --out {out}", "`--method` must be"
    ),
    "reproduce no aggregator": Case(
        nothing,
        "reproduce table1 --methods joint,torchjd:None --out {out}",
        "must name an aggregator of TorchJD, got None",
    ),
    "reproduce another width": Case(
        nothing, "reproduce table2 --width 16 --out {out}", "`--width` must be 64"
    ),
    "check nothing": Case(nothing, "check {home}/none", "must be a folder or the word phantom"),
    "check no data set": Case(nothing, "check {folder}", "not a data set"),
}


@pytest.fixture
def place(finished: dict[str, Path], tmp_path: Path) -> Iterator[Place]:
    """Everything that a call may need, in a folder that it may damage."""
    with ExitStack() as opened:
        yield Place(tmp_path, finished["independent"], opened)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_is_one_line_or_a_result(
    place: Place, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs no code from a file, advises none, and writes nothing if it has no result."""
    case = CASES[name]
    case.prepare(place)
    there = place.out.exists()
    program, *arguments = case.call.split()
    capsys.readouterr()
    code = PROGRAMS[program]([each.format(**vars(place)) for each in arguments])
    error = capsys.readouterr().err
    assert code == case.code, error
    kind = {0: "", 1: "skipped: ", 2: "error: "}[code]
    assert error.count("\n") == (code != 0), error
    assert error.startswith(f"{program}.py: {kind}" if code else "")
    assert case.says in error
    assert "weights_only" not in error
    assert "Traceback" not in error
    assert not (place.home / "ran").exists()
    assert there or place.out.exists() == (code < 2 and "{out}" in case.call)


def test_there_are_calls_of_every_program() -> None:
    assert {case.call.partition(" ")[0] for case in CASES.values()} == set(PROGRAMS)
