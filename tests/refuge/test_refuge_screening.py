"""Every photograph gets an answer: refer, no sign, or ungradable with its reason."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
import train
from not_photographs import draw_all
from refuge.errors import InputError
from refuge.files import lock_folder
from refuge.measurement.operating import Calibration, OperatingPoint, read_point
from refuge.measurement.quality import REASONS, Quality, measure_limits, read_limits, write_limits
from refuge.photographs.phantoms import draw_eye, draw_phantom
from refuge.screening.examining import Decision, examine, find_eye
from refuge.screening.inputs import find_photographs
from refuge.screening.page import Card, Summary, count, write_pages
from refuge.screening.results import make_card
from refuge.screening.table import COLUMNS
from refuge.screening.workers import Workers
from tiny_photographs import write_phantoms


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds phantoms of one side in `data`, the same test phantoms mirrored, and a run."""
    home = tmp_path_factory.mktemp("clinic")
    eyes = [eye for eye in map(draw_eye, range(500_000, 500_600)) if eye.temporal == 1]
    for split, part in (("train", eyes[:80]), ("val", eyes[80:130]), ("test", eyes[130:180])):
        write_phantoms(home / "data" / split, part)
    write_phantoms(home / "mirrored/test", eyes[130:180], flip=True)
    # With these each of four seeds finds every disc; with `independent`, two do.
    command = "--method balanced --norm running --size 48 --width 8 --epochs 12 --lr 3e-3"
    where = ["--data", str(home / "data"), "--out", str(home / "run")]
    assert train.main([*command.split(), *where]) == 0
    return home


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Forty pictures that are no fundus photographs, or no whole ones."""
    folder = tmp_path / "odd"
    folder.mkdir()
    eyes = [eye for eye in map(draw_eye, range(700_000, 700_020)) if eye.temporal == 1]
    for name, picture in draw_all([draw_phantom(eye, 160)[0] for eye in eyes[:4]]):
        picture.save(folder / f"{name}.png")
    return folder


def test_what_is_no_fundus_photograph_is_ungradable_and_what_is_one_is_not(
    clinic: Path, odd: Path, tmp_path: Path
) -> None:
    """Of unseen photographs at most one in fifty, of forty other pictures every one."""
    out = tmp_path / "out"
    pictures = [str(clinic / "data/test/images"), str(odd)]
    assert predict.main([str(clinic / "run"), *pictures, "--out", str(out)]) == 0
    rows = read_table(out)
    others = [row for row in rows if not row["photograph"].startswith("p5")]
    assert len(others) == 40
    assert {row["verdict"] for row in others} == {"ungradable"}
    assert all(row["reason"] for row in others)
    reasons = {row["photograph"]: row["reason"] for row in others}
    assert "no field of view" in reasons["ramp4.png"]
    assert "no optic disc found" in reasons["half0.png"] or "edge" in reasons["half0.png"]
    real = [row for row in rows if row["photograph"].startswith("p5")]
    assert sum(row["verdict"] == "ungradable" for row in real) <= 1
    assert {row["verdict"] for row in real} >= {"refer", "no sign"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "90 photographs: " in page
    assert f"{len(others) + sum(r['verdict'] == 'ungradable' for r in real)} ungradable" in page


def test_ungradable_photographs_count_beside_the_rates_without_them(clinic: Path) -> None:
    """Referred in the rates over all, left out of the others."""
    metrics = json.loads((clinic / "run/metrics.json").read_text())
    with (clinic / "run/predictions-test.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    point, _ = read_point(clinic / "run")
    assert point is not None
    found, threshold = metrics["decisions"]["specificity"], point.thresholds["specificity"]
    lost = [row for row in rows if row["ungradable"]]
    assert found["ungradable"] == sum(metrics["ungradable"].values()) == len(lost)
    column = "risk" if point.calibration else "probability"
    for name, label in (("sensitivity", "1"), ("specificity", "0")):
        known = [row for row in rows if row["label"] == label]
        referred = [float(row[column]) >= threshold for row in known if not row["ungradable"]]
        everyone = [bool(r["ungradable"]) or float(r[column]) >= threshold for r in known]
        share, whole = np.mean(referred), np.mean(everyone)
        assert found[name] == pytest.approx(share if label == "1" else 1 - share)
        assert found[f"{name}_all"] == pytest.approx(whole if label == "1" else 1 - whole)


def test_limits_follow_the_validation_photographs(tmp_path: Path) -> None:
    """Wide enough for all of them, narrow enough for what is four spreads away."""
    values = np.random.default_rng(0).normal(10, 1, 200)
    quality = Quality({"brightness": values}, [""] * 200)
    limits = measure_limits(quality)
    assert quality.reasons(limits) == [""] * 200
    median, below, above = limits["brightness"]
    assert (median, below, above) == pytest.approx((10, 1.64, 1.64), abs=0.35)
    odd = Quality({"brightness": np.array([10.0, 1.0, 19.0, np.nan])}, ["", "", "", "no disc"])
    assert odd.reasons(limits) == ["", "too dark", "too bright", "no disc"]
    assert odd.unusual(limits) == {"brightness": 2}
    assert measure_limits(Quality({"brightness": values[:19]}, [""] * 19)) == {}
    write_limits(tmp_path, limits)
    assert read_limits(tmp_path) == limits
    assert read_limits(tmp_path / "nowhere") == {}
    (tmp_path / "quality.json").write_text('{"colour": [1, 2, 3]}')
    with pytest.raises(InputError, match=r"quality\.json: `colour` must be a known feature"):
        read_limits(tmp_path)
    assert "brightness" in REASONS


def test_an_interrupted_call_goes_on_and_ends_with_the_same_table(
    clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row, cut short by a kill, is made again; another rule is another table."""
    arguments = [str(clinic / "run"), str(clinic / "data/test/images"), "--out"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert predict.main([*arguments, str(whole)]) == 0
    shutil.copytree(whole, half)
    expected = (whole / "predictions.csv").read_bytes()
    (half / "predictions.csv").write_bytes(expected[: len(expected) // 2])
    kept = expected[: len(expected) // 2].count(b"\n") - 1
    drawn = {row["output"] for row in read_table(whole)[:kept]}
    shutil.rmtree(half / "overlays")
    with lock_folder(half):
        assert predict.main([*arguments, str(half), "--resume"]) == 2
    assert "half: another process is writing into this folder." in capsys.readouterr().err
    assert predict.main([*arguments, str(half), "--resume"]) == 0
    assert (half / "predictions.csv").read_bytes() == expected
    again = {file.stem for file in (half / "overlays").iterdir()}
    assert again == {row["output"] for row in read_table(whole)} - drawn
    assert predict.main([*arguments, str(half), "--resume", "--rule", "youden"]) == 2
    assert "holds predictions with `rule` specificity, not youden" in capsys.readouterr().err


def test_worker_processes_change_nothing(clinic: Path, tmp_path: Path) -> None:
    """Neither rows nor their order, nor masks and drawings."""
    arguments = [str(clinic / "run"), str(clinic / "data/test/images"), "--out"]
    for name, workers in (("alone", "0"), ("two", "2")):
        assert predict.main([*arguments, str(tmp_path / name), "--workers", workers]) == 0
    files = [file for file in (tmp_path / "alone").rglob("*.*") if "report" not in file.name]
    assert len(files) == 2 * 50 + 2
    for file in files:
        other = tmp_path / "two" / file.relative_to(tmp_path / "alone")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_threads_leave_the_workers_cores_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for one another stand still while a worker has one's core."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    command = [str(tmp_path), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    for workers in ("0", "2", "20"):
        assert predict.main([*command, "--workers", workers]) == 2  # there is no run
    assert asked == [6, 1]


def test_calls_are_a_bounded_number_ahead() -> None:
    """So memory does not grow with the number of photographs."""
    taken = 0

    def endless() -> Iterator[tuple[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield (taken,)

    with closing(Workers(0)) as pool:
        results = pool.map(str, endless())
        assert [next(results) for _ in range(100)] == [str(n) for n in range(1, 101)]
        assert taken <= 100 + pool.ahead


def test_a_damaged_photograph_costs_the_others_nothing(
    clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, on the page too, and the exit code says that something was left out."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((clinic / "data/test/images").iterdir())[:2]
    for number, file in enumerate(good):
        shutil.copy(file, folder / f"{number}.png")
    (folder / "broken.png").write_bytes(good[0].read_bytes()[:500])
    out = tmp_path / "out"
    assert predict.main([str(clinic / "run"), str(folder), "--out", str(out)]) == 1
    assert [row["photograph"] for row in read_table(out)] == ["0.png", "1.png"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"predict.py: skipped: {folder}/broken.png: not a readable picture" in error
    page = (out / "report.html").read_text()
    assert "1 not readable" in page
    assert "broken.png: not a readable picture" in page


def test_photographs_are_named_as_briefly_as_tells_them_apart(tmp_path: Path) -> None:
    """Folders, patterns and tables; equal names keep the folders that differ."""
    for name in ("a/one/x.png", "a/two/x.png", "a/two/x.jpg", "a/two/y.tif", "a/two/.z.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    names = [each.name for each in find_photographs([str(tmp_path / "a/two")])]
    assert names == ["x.jpg", "x.png", "y.tif"]
    outputs = [each.output for each in find_photographs([str(tmp_path / "a/two")])]
    assert outputs == ["x.jpg", "x.png", "y"]
    pattern = str(tmp_path / "a/**/x.png")
    assert [each.name for each in find_photographs([pattern])] == ["one/x.png", "two/x.png"]
    table = tmp_path / "list.csv"
    table.write_text("picture,eye\na/one/x.png,Left\na/two/y.tif,\n", encoding="utf-8-sig")
    found = find_photographs([str(table), str(tmp_path / "a/one/x.png")])
    assert [(each.name, each.eye) for each in found] == [("x.png", "left"), ("y.tif", "")]
    for text, message in (
        ("file\nx.png\n", "needs a column `picture`"),
        ("picture,eye\nx.png,both\n", "line 2: `eye` must be left or right, got both"),
        ("picture\n \n", "line 2 names no picture"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=message):
            find_photographs([str(table)])
    with pytest.raises(InputError, match="no file matches"):
        find_photographs([str(tmp_path / "*.gif")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: has no photographs"):
        find_photographs([str(tmp_path / "empty")])


def test_pages_hold_fifty_photographs_the_most_urgent_first(tmp_path: Path) -> None:
    """An earlier call's pages go; drawings are loaded when they are looked at."""
    cards = [Card(f"{n}.png", f"overlays/{n}.jpg", "refer", {}, risk=n / 120) for n in range(118)]
    cards += [Card("lost.png", "overlays/lost.jpg", "ungradable", {}, "too dark")]
    cards += [Card("well.png", "overlays/well.jpg", "no sign", {}, risk=0.99)]
    summary = Summary({"date": "today"}, "refer at 0.1.", ["differs"], ["x.png: broken"])
    assert count(cards, summary) == (
        "121 photographs: 118 refer, 1 ungradable, 1 no sign, 1 not readable"
    )
    (tmp_path / "report-4.html").write_text("old")
    files = write_pages(tmp_path, cards, summary)
    assert [file.name for file in files] == ["report.html", "report-2.html", "report-3.html"]
    assert not (tmp_path / "report-4.html").exists()
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert [text.count("<article") for text in texts] == [50, 50, 20]
    assert texts[0].index("117.png: refer") < texts[0].index("116.png: refer")
    assert texts[2].index("lost.png: ungradable (too dark)") < texts[2].index("well.png: no sign")
    for text in texts:
        assert text.index("121 photographs") < text.index("<article")
        assert "Differs" in text
        assert "Refer at 0.1." in text
        assert text.count("loading='lazy'") == text.count("<img")
    assert "x.png: broken" in texts[0]
    assert "<rect" in texts[0]


def test_the_side_of_the_eye_is_read_from_disc_and_fovea() -> None:
    """In a right eye the fovea is left of the disc, as one sees it; unsure ones are not named."""
    disc = np.zeros((1, 48, 48), bool)
    disc[0, 20:28, 20:28] = True  # centre 23.5
    for x, certainty, eye in ((8.0, 0.9, "right"), (40.0, 0.9, "left"), (40.0, 0.1, "")):
        quality = Quality({"fovea certainty": np.array([certainty])}, [""])
        assert find_eye(quality, disc, np.array([[x, 24.0]])) == eye
    assert find_eye(quality, disc, np.array([[25.0, 24.0]])) == ""
    assert find_eye(quality, disc & False, np.array([[8.0, 24.0]])) == ""
    assert find_eye(quality, None, None) == ""


def test_what_is_stated_of_an_eye_is_shown_beside_what_is_seen(
    clinic: Path, tmp_path: Path
) -> None:
    table = tmp_path / "list.csv"
    files = sorted((clinic / "data/test/images").iterdir())[:2]
    lines = [f"{os.path.relpath(file, tmp_path)},left" for file in files]
    table.write_text("\n".join(["picture,eye", *lines]))
    out = tmp_path / "out"
    assert predict.main([str(clinic / "run"), str(table), "--out", str(out)]) == 0
    assert [row["stated_eye"] for row in read_table(out)] == ["left", "left"]
    shown = (out / "report.html").read_text(encoding="utf-8")
    assert shown.count("<dt>eye</dt><dd>left") == 2
    row = dict.fromkeys(COLUMNS, "") | {"eye": "right", "stated_eye": "left", "verdict": "refer"}
    eye = make_card(row, Decision(None, "", {})).numbers["eye"]
    assert eye == "left as stated, but it looks like a right eye: is it mirrored?"


def test_risks_stop_where_the_calibration_knows_no_more(tmp_path: Path) -> None:
    """Twelve positives vouch for 13 / 14 at most."""
    calibration = Calibration(1, 0, 12, 98)
    assert calibration.limits == (1 / 100, 13 / 14)
    assert [calibration.show(risk) for risk in (0.995, 0.5, 0.001)] == ["> 0.93", "0.50", "< 0.01"]
    decision = Decision(
        OperatingPoint(calibration, {"specificity": 0.3}, {}, {}), "specificity", {}
    )
    row = dict.fromkeys(COLUMNS, "") | {"risk": f"{13 / 14:.6f}", "verdict": "refer"}
    assert make_card(row, decision).numbers["calibrated risk"] == "> 0.93"
    row |= {"risk": "0.420000"}
    assert make_card(row, decision).numbers["calibrated risk"] == "0.42"


def test_an_external_validation_says_whether_the_threshold_carries_over(
    clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(clinic / "run"), "--data", str(clinic / "mirrored"), "--out", str(out)]
    assert evaluate.main(command) == 0
    found = json.loads((out / "metrics-test.json").read_text())
    assert found["transfer"].startswith("The run's threshold ")
    assert found["transfer"] in capsys.readouterr().out
    assert found["calibration"].keys() == {"error", "slope", "intercept", "brier"}
    assert found["threshold_from"] == "validation"


def test_local_healthy_photographs_give_a_threshold(
    clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of their own scores the 85 % quantile; every page says whose threshold it is."""
    local = tmp_path / "healthy"
    local.mkdir()
    index = json.loads((clinic / "data/val/index.json").read_text())
    healthy = [entry["ImgName"] for entry in index.values() if entry["Label"] == 0]
    lines = [f"{clinic}/data/val/images/{name},0" for name in healthy]
    (local / "photographs.csv").write_text("\n".join(["picture,glaucoma", *lines]))
    out, run = tmp_path / "out", str(clinic / "run")
    command = [run, "--out", str(out), "--recalibrate", str(local)]
    assert evaluate.main([*command, "--data", str(clinic / "mirrored")]) == 0
    said = capsys.readouterr().out
    point, _ = read_point(out)
    assert point is not None
    # Of the healthy ones a few may be ungradable.
    graded = range(len(healthy) - 2, len(healthy) + 1)
    expected = [f"local (healthy: 0 with glaucoma, {count} without)" for count in graded]
    where = next(each for each in expected if each in said)
    assert f"threshold and calibration are {where}, not the run's own." in said
    assert (point.calibration, point.where) == (None, where)
    files = [f"{clinic}/data/val/images/{name}" for name in healthy]
    assert predict.main([run, *files, "--out", str(tmp_path / "pages"), *command[3:]]) == 0
    scores = [float(row["probability"]) for row in read_table(tmp_path / "pages")]
    share = np.mean([score >= point.thresholds["specificity"] for score in scores])
    assert share == pytest.approx(0.15, abs=2 / len(scores))
    assert where in (tmp_path / "pages/report.html").read_text(encoding="utf-8")
    again = [run, "--out", str(out), "--recalibrate", str(clinic / "data")]
    assert evaluate.main(again) == 2
    assert "is also among the photographs to be measured" in capsys.readouterr().err


def test_photographs_unlike_the_runs_own_are_warned_of(clinic: Path, tmp_path: Path) -> None:
    """Green ones here: none of the run's camera is."""
    folder = tmp_path / "green"
    folder.mkdir()
    for file in sorted((clinic / "data/test/images").iterdir())[:5]:
        red, green, blue = Image.open(file).convert("RGB").split()
        Image.merge("RGB", (green, red, blue)).save(folder / file.name)
    out = tmp_path / "out"
    assert predict.main([str(clinic / "run"), str(folder), "--out", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "These photographs differ from the run&#x27;s own: " in page
    assert "red (5 of 5)" in page


def test_names_and_links_of_any_kind_are_taken(clinic: Path, tmp_path: Path) -> None:
    """Spaces, other alphabets, what HTML means something by, links; several modes of colour."""
    pictures = sorted((clinic / "data/test/images").iterdir())
    folder = tmp_path / "пациент & <b>"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "œil gauche #1.png")
    (folder / "link.png").symlink_to(pictures[1])
    with Image.open(pictures[2]) as picture:
        picture.convert("CMYK").save(folder / "print.jpg")
        picture.convert("L").save(folder / "grey.png")
        picture.convert("RGBA").save(folder / "alpha.png")
    out = tmp_path / "out"
    assert predict.main([str(clinic / "run"), str(folder), "--out", str(out)]) == 0
    rows = read_table(out)
    assert {row["photograph"] for row in rows} == {
        *("alpha.png", "grey.png", "link.png", "print.jpg", "œil gauche #1.png")
    }
    for row in rows:
        assert (out / "overlays" / f"{row['output']}.jpg").exists()
    assert "src='overlays/%C5%93il%20gauche%20%231.jpg'" in (out / "report.html").read_text("utf-8")


def test_a_full_disk_ends_worker_processes_in_one_line(
    clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The draft leads to a device that is always full."""
    picture = next((clinic / "data/test/images").iterdir())
    (tmp_path / "masks").mkdir()
    (tmp_path / f"masks/{picture.stem}.png.part").symlink_to("/dev/full")
    arguments = [str(clinic / "run"), str(picture), "--out", str(tmp_path), "--workers", "1"]
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{picture.stem}.png: cannot be written (No space left on device)" in error


def test_ctrl_c_is_one_line_and_leaves_what_was_made(
    clinic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[object] = []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 8:
            raise KeyboardInterrupt
        done.append(arguments)
        return examine(*arguments)

    monkeypatch.setattr(predict, "examine", interrupted)
    command = [str(clinic / "run"), str(clinic / "data/test/images"), "--out", str(tmp_path)]
    assert predict.main([*command, "--workers", "0"]) == 130
    assert capsys.readouterr().err == "predict.py: interrupted\n"
    kept = len(read_table(tmp_path))
    assert kept >= 6
    monkeypatch.undo()
    assert predict.main([*command, "--resume"]) == 0
    assert len(read_table(tmp_path)) == 50
