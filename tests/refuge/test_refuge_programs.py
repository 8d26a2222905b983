"""What is done with a trained network: measured, asked, and put into tables beside the paper."""

import csv
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import predict
import reproduce
import train
from refuge.best import open_run
from refuge.errors import InputError
from refuge.measurement.operating import Calibration, OperatingPoint
from refuge.metrics import largest_component
from refuge.screening.drawing import original_mask
from refuge.screening.examining import Decision, examine, judge
from refuge.screening.reading import read_photograph
from tiny_photographs import entry, write_split

TINY = ("--size", "32", "--width", "2", "--batch-size", "4", "--epochs", "2", "--lr", "0.01")


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tiny photographs in `data`, and a run on them in `run`."""
    home = tmp_path_factory.mktemp("programs")
    write_split(home / "data/train", [entry(f"a{i:02}.jpg", i % 2) for i in range(12)])
    write_split(home / "data/test", [entry(f"T{i:04}.jpg", i % 2) for i in range(4)])
    arguments = ["--data", str(home / "data"), *TINY, "--epochs", "40", "--width", "4"]
    assert train.main([*arguments, "--out", str(home / "run")]) == 0
    metrics = json.loads((home / "run/metrics.json").read_text())
    assert metrics["disc_dice"] > 0.5  # What follows shall not be about empty masks.
    assert metrics["glaucoma_auc_vcdr"] is not None
    return home


def test_evaluate_measures_what_training_ended_with(home: Path, tmp_path: Path) -> None:
    """The same weights, the same pictures, the same numbers; other splits have others."""
    run = str(home / "run")
    assert evaluate.main([run, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "metrics-test.json").read_text())
    expected = json.loads((home / "run/metrics.json").read_text())
    measured = found.keys() - {"data", "split", "photographs", "notes"}
    assert "intervals" in measured
    assert {key: found[key] for key in measured} == {key: expected[key] for key in measured}
    assert "glaucoma_sensitivity" in measured
    assert read_table(tmp_path / "predictions-test.csv") == read_table(
        home / "run/predictions-test.csv"
    )
    assert evaluate.main([run, "--out", str(tmp_path), "--split", "train"]) == 0
    other = json.loads((tmp_path / "metrics-train.json").read_text())
    assert other["photographs"] == 11
    assert other["disc_dice"] != found["disc_dice"]


def test_evaluate_takes_other_photographs(home: Path, repacked: Path, tmp_path: Path) -> None:
    """How a network does on another camera's pictures."""
    arguments = [str(home / "run"), "--data", str(repacked), "--out", str(tmp_path)]
    shutil.rmtree(repacked / "train")  # Of no use here.
    assert evaluate.main(arguments) == 0
    found = json.loads((tmp_path / "metrics-test.json").read_text())
    assert found["data"] == "repacked"
    assert [row["photograph"] for row in read_table(tmp_path / "predictions-test.csv")] == [
        f"t{i:02}.jpg" for i in range(4)
    ]


def test_predictions_are_those_of_the_evaluation(home: Path, tmp_path: Path, drawn: None) -> None:
    """A photograph by its file is judged as in its split; masks and points at its own size."""
    pictures = sorted((home / "data/test/images").iterdir())
    assert predict.main([str(home / "run"), *map(str, pictures), "--out", str(tmp_path)]) == 0
    expected = read_table(home / "run/predictions-test.csv")
    found = read_table(tmp_path / "predictions.csv")
    assert [row["photograph"] for row in found] == [file.name for file in pictures]
    for one, other in zip(found, expected, strict=True):
        for column in ("probability", "probability_fc", "probability_vcdr", "vcdr"):
            assert float(one[column]) == pytest.approx(float(other[column]), abs=2e-6), column
        for axis in ("x", "y"):  # 40 pixels became 32.
            own = (float(other[f"fovea_{axis}"]) + 0.5) * 40 / 32 - 0.5
            assert float(one[f"fovea_{axis}"]) == pytest.approx(own, abs=1e-4)
    for file in pictures:
        with Image.open(tmp_path / "masks" / f"{file.stem}.png") as mask:
            assert (mask.mode, mask.size) == ("L", (40, 40))
        with Image.open(tmp_path / "overlays" / f"{file.stem}.jpg") as overlay:
            assert len(np.unique(np.asarray(overlay.convert("L")))) > 50


def test_a_mask_at_the_original_size_is_the_enlarged_map(home: Path, tmp_path: Path) -> None:
    """Thresholded after enlarging, the largest component kept, the cup within the disc."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    trained, settings = open_run(home / "run")
    prepared = read_photograph(tmp_path / "wide.png", settings.size, crop=False)
    finding = examine(trained, tmp_path / "wide.png", prepared, Decision(None, "", {}))
    mask = original_mask(dict(finding.maps), None, prepared.frame, prepared.size)
    assert mask is not None
    assert mask.shape == (50, 70)
    picture = Image.open(tmp_path / "wide.png").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture).transpose(2, 0, 1)[None].astype(np.float32) / 255
    answer = trained.ask(torch.from_numpy(pixels))
    enlarged = {
        task: np.asarray(
            Image.fromarray(answer[task].astype(np.float32)).resize(
                (70, 50), Image.Resampling.BILINEAR
            )
        )
        for task in ("disc", "cup")
    }
    disc = largest_component(enlarged["disc"] > 0.5)
    cup = largest_component(enlarged["cup"] > 0.5) & disc
    expected = np.where(cup, 0, np.where(disc, 128, 255))
    assert (mask == expected).mean() > 0.995  # Pillow rounds another way.


def test_a_submission_is_what_refuge_reads(home: Path, tmp_path: Path) -> None:
    """Its names, headers and mask values; the pictures' names keep ending and case."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("T0001.jpg", "T0002.JPG"):
        shutil.copy(home / "data/test/images/T0001.jpg", folder / name)
    files = [str(file) for file in sorted(folder.iterdir())]
    out = tmp_path / "submission"
    assert predict.main([str(home / "run"), *files, "--out", str(out), "--submission"]) == 0
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == [
        "classification_results.csv",
        "fovea_localization_results.csv",
        "segmentation/T0001.bmp",
        "segmentation/T0002.bmp",
    ]
    lines = (out / "classification_results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "Filename,Glaucoma Risk"
    assert [line.split(",")[0] for line in lines[1:]] == ["T0001.jpg", "T0002.JPG"]
    assert all(0 <= float(line.split(",")[1]) <= 1 for line in lines[1:])
    lines = (out / "fovea_localization_results.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "ImageName,Fovea_X,Fovea_Y"
    assert all(0 <= float(number) < 40 for line in lines[1:] for number in line.split(",")[1:])
    with Image.open(out / "segmentation/T0001.bmp") as mask:
        assert (mask.mode, mask.size, mask.format) == ("L", (40, 40), "BMP")
        assert set(np.unique(np.asarray(mask))) <= {0, 128, 255}


def test_a_network_says_nothing_of_what_it_never_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without cups there is no vCDR and no submission, but the rest is predicted."""
    known = ["disc", "fovea", "glaucoma"]
    rows = [entry(f"a{i}.jpg", i % 2, Annotations=known) for i in range(6)]
    for split in ("train", "test"):
        write_split(tmp_path / "data" / split, rows)
    run = tmp_path / "run"
    assert train.main(["--data", str(tmp_path / "data"), *TINY, "--out", str(run)]) == 0
    capsys.readouterr()
    arguments = [str(run), str(tmp_path / "data/test/images/a1.jpg"), "--out"]
    assert predict.main([*arguments, str(tmp_path / "found")]) == 0
    (row,) = read_table(tmp_path / "found/predictions.csv")
    assert (row["vcdr"], row["probability_vcdr"]) == ("", "")
    assert row["probability"] == row["probability_fc"] != ""
    with Image.open(tmp_path / "found/masks/a1.png") as mask:
        assert set(np.unique(np.asarray(mask))) <= {128, 255}
    assert predict.main([*arguments, str(tmp_path / "sent"), "--submission"]) == 2
    assert "a submission needs all tasks, but ['cup']" in capsys.readouterr().err
    assert not (tmp_path / "sent").exists()


def test_best_weights_of_another_network_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"width": 2}))
    with pytest.raises(InputError, match=r"best\.pt: not the weights of this run"):
        open_run(tmp_path / "run")
    (tmp_path / "run/best.pt").unlink()
    with pytest.raises(InputError, match=r"run: has no best\.pt yet"):
        open_run(tmp_path / "run")


class Counter:
    """Counts the trainings that a command starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[str] = []
        self.train = train.train
        monkeypatch.setattr(reproduce, "train", self)

    def __call__(self, settings: Any, folder: Path, resume: bool) -> None:
        self.folders.append(folder.name)
        self.train(settings, folder, resume)


def test_a_table_is_made_of_runs_that_are_kept(
    repacked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of two learning rates the better one on validation; what exists is never trained again."""
    counter = Counter(monkeypatch)
    home = tmp_path / "study"
    out = home / "table1"
    command = ["table1", "--data", str(repacked), *TINY[:-2], "--lr", "0.01", "0.001"]
    command += ["--methods", "single,independent", "--seeds", "2", "--out", str(home)]
    assert reproduce.main(command) == 0
    chosen = {}
    for method in ("single", "independent"):
        scores = {}
        for lr in ("0.01", "0.001"):
            run = home / f"runs/{method}-lr{lr}-seed0"
            scores[lr] = json.loads((run / "metrics.json").read_text())["validation_score"]
        chosen[method] = max(scores, key=lambda lr: scores[lr])
    assert counter.folders[:4] == [
        f"{method}-lr{lr}-seed0" for method in chosen for lr in ("0.01", "0.001")
    ]
    assert counter.folders[4:] == [f"{method}-lr{lr}-seed1" for method, lr in chosen.items()]

    text = (out / "table1.md").read_text(encoding="utf-8")
    assert text.startswith(
        "Test split of repacked, 2 epochs, width 2, 32 px, batch size 4, norm batch, mirror off, "
        "crop off.\n"
    )
    for method, lr in chosen.items():
        runs = [home / f"runs/{method}-lr{lr}-seed{seed}/metrics.json" for seed in (0, 1)]
        values = [100 * json.loads(run.read_text())["disc_dice"] for run in runs]
        cell = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        name = {"single": "STL (four networks)", "independent": "MTL-IO (independent)"}[method]
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        assert f" {cell} " in row
    assert "| MTL-IO (independent) | 17.2 | 0.557 | 92.61 ± 0.38 |" in text
    for name in (
        *("lr-sweep.md", "lr-sweep.csv", "table1.csv", "figure1_roc.png", "figure2_metrics.png"),
        *("figure3_loss.png", "figure4_predictions.png", "figure6_saliency.png"),
    ):
        assert (out / name).stat().st_size > 0, name
    assert len(read_table(out / "table1.csv")) == 4
    assert "MTL-IO" in capsys.readouterr().out

    before = (out / "table1.md").read_bytes()
    again = counter.folders.copy()
    assert reproduce.main(command) == 0
    assert counter.folders == again
    (home / f"runs/single-lr{chosen['single']}-seed1/metrics.json").unlink()
    assert reproduce.main(command) == 0
    assert counter.folders == [*again, f"single-lr{chosen['single']}-seed1"]
    assert (out / "table1.md").read_bytes() == before

    command[command.index("--epochs") + 1] = "3"
    assert reproduce.main(command) == 2
    assert "holds a run of `epochs` 2, not 3; take another `--out`" in capsys.readouterr().err


def test_a_table_of_folds_averages_over_them(home: Path, tmp_path: Path) -> None:
    """Each picture of the set tests once; one run of each fold where no seeds are asked for."""
    command = ["table1", "--data", str(home / "data"), *TINY[:-4], "--epochs", "1", "--lr", "0.01"]
    command += ["--methods", "joint", "--folds", "4", "--out", str(tmp_path)]
    assert reproduce.main(command) == 0
    rows = read_table(tmp_path / "table1/table1.csv")
    assert [row["fold"] for row in rows] == ["1/4", "2/4", "3/4", "4/4"]
    text = (tmp_path / "table1/table1.md").read_text(encoding="utf-8")
    assert text.startswith("Mean over 4 folds of data, 1 epochs, ")
    text_of_all = (tmp_path / "table1/decisions.md").read_text(encoding="utf-8")
    assert "| joint | " in text_of_all
    assert text_of_all.rstrip().endswith("| 16 |")
    dice = [100 * float(row["disc_dice"]) for row in rows]
    assert f" {statistics.mean(dice):.2f} ± {statistics.stdev(dice):.2f} " in text
    tested = [
        row["photograph"]
        for run in sorted((tmp_path / "runs").glob("joint-*of4"))
        for row in read_table(run / "predictions-test.csv")
    ]
    assert len(tested) == len(set(tested)) == 16
    assert reproduce.main([*command[:-4], "--folds", "2"]) == 2


def test_a_sweep_shows_every_rate(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "lr-sweep"
    command = ["lr-sweep", "--data", str(home / "data"), *TINY[:-4], "--epochs", "1"]
    command += ["--lr", "0.1", "0.01", "--methods", "joint,torchjd:Mean", "--out", str(out.parent)]
    assert reproduce.main(command) == 0
    rows = read_table(out / "lr-sweep.csv")
    assert [(row["method"], row["lr"]) for row in rows] == [
        *(("joint", "0.1"), ("joint", "0.01"), ("torchjd:Mean", "0.1"), ("torchjd:Mean", "0.01"))
    ]
    assert (out / "lr-sweep.md").read_text(encoding="utf-8").count("**") == 4
    assert not (out / "table1.md").exists()


def test_a_table_of_other_methods_than_the_papers(repacked: Path, tmp_path: Path) -> None:
    """Every figure is drawn; the weights are for the method that has them."""
    command = ["table1", "--data", str(repacked), *TINY, "--seeds", "1", "--out", str(tmp_path)]
    assert reproduce.main([*command, "--methods", "joint,pcgrad", "--weights", "fovea=9"]) == 0
    assert (tmp_path / "table1/figure4_predictions.png").exists()
    runs = {method: tmp_path / f"runs/{method}-lr0.01-seed0" for method in ("joint", "pcgrad")}
    weights = {
        method: json.loads((run / "config.json").read_text())["weights"]
        for method, run in runs.items()
    }
    assert weights == {"joint": "fovea=9", "pcgrad": ""}


def test_a_verdict_compares_the_calibrated_average_with_the_threshold(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two pictures' risks; the page, the table and the closing line agree."""
    shutil.copytree(home / "run", tmp_path / "run")
    pictures = sorted((home / "data/test/images").iterdir())
    arguments = [str(tmp_path / "run"), *map(str, pictures), "--out", str(tmp_path / "out")]
    assert predict.main(arguments) == 0
    # The run's own validation is one picture.
    assert "no decision threshold: validation has" in capsys.readouterr().out
    before = read_table(tmp_path / "out/predictions.csv")
    assert {(row["risk"], row["verdict"]) for row in before} == {("", "")}

    averages = sorted(float(row["probability"]) for row in before)
    middle = (averages[1] + averages[2]) / 2
    threshold = 1 / (1 + np.exp(-(2 * np.log(middle / (1 - middle)) + 1)))
    rates = {"sensitivity": 0.75, "specificity": 0.5}
    intervals = {"sensitivity_interval": [0.5, 1.0], "specificity_interval": None}
    content = {
        "calibration": {"slope": 2, "intercept": 1},
        "thresholds": {"specificity": threshold, "youden": 0.0},
        "validation": {"specificity": rates, "youden": rates},
        "test": {"specificity": rates | intervals},
    }
    (tmp_path / "run/operating_point.json").write_text(json.dumps(content))
    assert predict.main(arguments) == 0
    said = capsys.readouterr().out
    assert "on the test split of data sensitivity 0.75 [0.50, 1.00], specificity 0.50." in said
    rows = read_table(tmp_path / "out/predictions.csv")
    for row in rows:
        expected = "refer" if float(row["probability"]) >= middle else "no sign"
        assert row["verdict"] == expected
    assert {row["verdict"] for row in rows} == {"refer", "no sign"}
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for row in rows:
        assert f"{row['photograph']}: {row['verdict']}" in page
    assert predict.main([*arguments, "--rule", "youden"]) == 0
    said = capsys.readouterr().out
    assert "on the validation photographs of data sensitivity 0.75, specificity 0.50." in said
    assert {row["verdict"] for row in read_table(tmp_path / "out/predictions.csv")} == {"refer"}


def test_a_picture_that_cannot_be_graded_is_not_decided_on() -> None:
    """The threshold was chosen on pictures that both classifiers had judged."""
    point = OperatingPoint(Calibration(1, 0), {"specificity": 0.3}, {}, {})
    assert judge(0.9, "no optic disc found", point, "specificity")[1] == "ungradable"
    assert judge(0.9, "", point, "specificity")[1] == "refer"
    assert judge(0.2, "", point, "specificity")[1] == "no sign"
    assert judge(0.9, "", None, "specificity")[1] == ""
    assert judge(0.9, "too dark", None, "specificity")[1] == "ungradable"
