"""The program as a user meets it: a run folder, one line per mistake, and runs that go on."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._functorch import config as functorch_config

import evaluate
import mtlopt
import train
from refuge.best import load_best, parts, save_best
from refuge.errors import InputError
from refuge.files import lock_folder
from refuge.measurement import figures
from refuge.measurement.evaluation import Trained
from refuge.methods import build_network, build_optimizer
from refuge.network import TASKS, MultiTaskUNet
from refuge.photographs.data import load_splits
from refuge.processes import ONE_PROCESS
from refuge.run import VALIDATE_EVERY, build_state
from refuge.settings import METHODS, Settings, claim_folder, parse
from refuge.state import TrainingState
from tiny_photographs import ENVIRONMENT, TINY, TRAIN_PY, Run, entry, write_split

ROOT = Path(__file__).parents[2]
METRICS = {
    "glaucoma_auc",
    "glaucoma_auc_fc",
    "glaucoma_auc_vcdr",
    "disc_dice",
    "cup_dice",
    "fovea_error",
    "vcdr_error",
    "parameters",
    "seconds_per_iteration",
}


def run_here(*arguments: object) -> int:
    """Runs the program in this process, which spares the imports."""
    return train.main([*map(str, arguments)])


def read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    assert isinstance(content, dict)
    return content


def copy(run: Path, out: Path) -> Path:
    shutil.copytree(run, out)
    return out


def weights(out: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    loaded = torch.load(out / name, weights_only=True)["model"]
    assert isinstance(loaded, dict)
    return loaded


def test_a_run_leaves_everything_in_its_folder(repacked: Path, tmp_path: Path, drawn: None) -> None:
    """Names and columns that the documentation promises."""
    out = tmp_path / "run"
    assert run_here("--data", repacked, "--epochs", 6, *TINY, "--out", out) == 0
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "metrics.json", "operating_point.json", "quality.json", "history.csv"),
        *("predictions-test.csv", "best.pt", "last.pt", "figures"),
    }
    assert {file.name for file in (out / "figures").iterdir()} == {
        *("pictures.png", "overlays.png", "learning_curves.png", "roc.png")
    }
    for file in (out / "figures").iterdir():
        with Image.open(file) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    with (out / "history.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(float(row[f"loss_{task}"]) > 0 for row in rows for task in TASKS)
    # Validation every 5 epochs and after the last.
    assert [row["score"] != "" for row in rows] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("method", [*METHODS, "torchjd:MGDA"])
def test_every_method_states_what_it_is_and_measures_everything(
    finished: dict[str, Path], method: str
) -> None:
    metrics, config = (read(finished[method] / name) for name in ("metrics.json", "config.json"))
    assert metrics.keys() >= METRICS
    assert all(metrics[key] is not None for key in METRICS - {"vcdr_error", "glaucoma_auc_vcdr"})
    for key in METRICS - {"parameters", "seconds_per_iteration"}:
        assert (metrics["intervals"][key] is None) == (metrics[key] is None)
    assert config["method"] == method
    assert config["parameters"] == metrics["parameters"]


def test_the_methods_are_different_updates(finished: dict[str, Path]) -> None:
    """From one seed they start alike and must not end alike."""
    shared = [out for method, out in finished.items() if method != "single"]
    ends = [weights(out)["encoder.0.0.weight"] for out in shared]
    for one, other in combinations(ends, 2):
        assert not torch.equal(one, other)


def test_an_aggregator_that_needs_every_task_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the first batch that lacks one."""
    rows = [entry(f"a{i}.jpg", i % 2) for i in range(6)]
    rows += [entry("b.jpg", Fovea_X=None, Annotations=["glaucoma", "disc", "cup"])]
    for split in ("train", "val", "test"):
        write_split(tmp_path / "data" / split, rows)
    arguments = ("--data", tmp_path / "data", *TINY, "--out", tmp_path / "run")
    assert run_here(*arguments, "--method", "torchjd:GradVac") == 2
    assert (
        "`--method torchjd:GradVac` keeps state for every task and needs all of them on every "
        "training picture; fovea is not annotated on 1 of 7.\n"
    ) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_are_those_of_the_joint_loss(repacked: Path) -> None:
    """The hand-tuned weighted sum is what other methods must beat."""
    settings = Settings(method="joint", weights="fovea=30,cup=0.5", width=2)
    optimizer = build_optimizer(settings, build_network(settings), None)
    assert isinstance(optimizer, mtlopt.JointOptimizer)
    assert optimizer.weights == {"disc": 1, "cup": 0.5, "fovea": 30, "glaucoma": 1}


def test_single_task_learning_is_four_plain_trainings(repacked: Path, tmp_path: Path) -> None:
    """Each network and its Adam never hear of the others; each keeps its own best epoch."""
    from refuge.losses import LOSSES
    from refuge.network import SingleTaskNetworks
    from refuge.photographs.data import load_splits

    out = tmp_path / "run"
    arguments = ("--data", repacked, "--method", "single", "--epochs", 1, *TINY, "--dropout", 0)
    assert run_here(*arguments, "--mirror", "off", "--out", out) == 0
    pictures = load_splits(str(repacked), 32, seed=0)["train"]
    torch.manual_seed(0)
    networks = SingleTaskNetworks(width=2, dropout=0).networks
    for task in TASKS:
        network = networks[task]
        adam = torch.optim.Adam(network.parameters(), lr=1e-3)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
        for rows in (order[:4], order[4:8]):
            batch = pictures[rows]
            adam.zero_grad()
            LOSSES[task](network(batch.images)[task], batch.targets[task]).backward()
            adam.step()
    ended = weights(out)
    for name, value in networks.state_dict().items():
        assert torch.equal(ended[f"networks.{name}"], value), name


def test_a_score_that_is_none_replaces_no_better_one() -> None:
    """A network that diverged cannot be measured; the weights from before stay."""
    settings = Settings(width=2)
    state = build_state(settings, ONE_PROCESS, None)
    assert state.improved({"": None}) == [""]
    assert state.improved({"": 0.5}) == [""]
    assert state.improved({"": None}) == []
    assert state.improved({"": 0.4}) == []
    assert state.best == {"": 0.5}


def test_learning_curves_have_what_validation_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which begins with the fifth epoch."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, _: drawn.append(figure))
    row: dict[str, float] = {"epoch": 1, "loss_disc": 0.5}
    history = [row, {"epoch": 2, "loss_disc": 0.4, "score": 0.6, "val_disc_dice": 0.7}]
    figures.draw_learning_curves(tmp_path / "curves.png", history, "data")
    assert [len(ax.lines) for ax in drawn[0].axes] == [1, 2]


def test_each_part_of_a_network_keeps_its_own_best(tmp_path: Path) -> None:
    """Of four networks one may be best early and another late; their weights are not mixed up."""
    settings = Settings(method="single", width=2)
    network = build_network(settings)
    prefixes = list(parts(settings))
    for epoch, improved in ((5, prefixes), (10, prefixes[1:2]), (15, prefixes[:1])):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(epoch)
        save_best(tmp_path, epoch, improved, Trained(network, TASKS, None), settings)
    trained, epochs = load_best(tmp_path, network, settings)
    assert epochs == dict(zip(prefixes, (15, 10, 5, 5), strict=True))
    for prefix, epoch in epochs.items():
        values = [p for name, p in trained.network.named_parameters() if name.startswith(prefix)]
        assert all((value == epoch).all() for value in values)


def test_training_equals_a_plain_loop(finished: dict[str, Path]) -> None:
    """Eq. 3 by hand: per task a fresh forward pass and an Adam of its own."""
    from refuge.losses import LOSSES
    from refuge.network import MultiTaskUNet
    from refuge.photographs.data import load_splits

    out = finished["independent"]
    pictures = load_splits(str(out.parent / "data"), 32, seed=0)["train"]
    torch.manual_seed(0)
    model = MultiTaskUNet(width=2)
    adams = {task: torch.optim.Adam(model.parameters(), lr=1e-3) for task in TASKS}
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(2):
        order = torch.randperm(11, generator=shuffle)
        for rows in (order[:4], order[4:8]):
            batch = pictures[rows]
            for task in TASKS:
                model.zero_grad()
                logits = model(batch.images, (task,))[task]
                LOSSES[task](logits, batch.targets[task]).backward()
                adams[task].step()
    ended = weights(out)
    for name, value in model.state_dict().items():
        assert torch.equal(ended[name], value), name


def test_without_cup_masks_cup_metrics_are_null(tmp_path: Path, repacked: Path) -> None:
    """An untrained cup head must invent neither a cup nor a vCDR nor a diagnosis."""
    folder, out = tmp_path / "partial", tmp_path / "run"
    known = ["disc", "fovea", "glaucoma"]
    nowhere = {"Fovea_X": None, "Fovea_Y": None}
    rows = [entry(f"a{i}.jpg", i % 2, Annotations=known) for i in range(6)]
    rows += [entry(f"b{i}.jpg", None, Annotations=["disc"], **nowhere) for i in range(6)]
    write_split(folder / "train", rows)
    write_split(folder / "test", rows)
    assert run_here("--data", folder, "--epochs", 2, *TINY, "--out", out) == 0
    text = (out / "metrics.json").read_text()
    assert '"cup_dice": null' in text
    metrics = json.loads(text)
    for key in ("cup_dice", "vcdr_error", "glaucoma_auc_vcdr"):
        assert metrics[key] is None
    assert metrics["disc_dice"] is not None
    assert metrics["fovea_error"] is not None
    assert metrics["glaucoma_auc"] == metrics["glaucoma_auc_fc"] is not None
    assert metrics["notes"] == [
        "no training picture is annotated for cup.",
        "no vCDR classifier: no training picture has disc, cup and glaucoma annotated.",
        "11 test pictures are also among the training pictures (a0.jpg): their numbers are too "
        "good.",
        "no decision threshold: validation has 0 pictures without glaucoma, and needs 10.",
    ]
    with (out / "history.csv").open(newline="") as opened:
        assert {row["loss_cup"] for row in csv.DictReader(opened)} == {""}


def test_groups_are_drawn_once_and_stated(repacked: Path, tmp_path: Path) -> None:
    """Random task grouping: two objectives of two tasks, the same after a resume."""
    out = tmp_path / "run"
    arguments = ("--data", repacked, *TINY, "--out", out)
    assert run_here(*arguments, "--group-size", 2, "--epochs", 1) == 0
    groups = read(out / "config.json")["objectives"]
    assert sorted(task for group in groups for task in group) == sorted(TASKS)
    assert [len(group) for group in groups] == [2, 2]
    assert run_here("--resume", "--out", out, "--epochs", 2) == 0
    assert read(out / "config.json")["objectives"] == groups


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(repacked: Path, tmp_path: Path, amp: str) -> None:
    """The loss scale is part of what a resumed run needs."""
    out = tmp_path / "run"
    assert run_here("--data", repacked, "--amp", amp, "--epochs", 1, *TINY, "--out", out) == 0
    assert run_here("--resume", "--out", out, "--epochs", 2) == 0
    saved = torch.load(out / "last.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert (saved["scaler"] is not None) == (amp == "fp16")


@pytest.mark.slow
def test_a_compiled_network_trains_as_it_does_uncompiled(
    repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the method that takes most backward passes of one forward pass.

    The code is traced and differentiated as for any backend; that of Inductor takes a minute.
    """
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
    one, other = tmp_path / "plain", tmp_path / "compiled"
    arguments = [*("--data", repacked, "--method", "gradnorm", "--epochs", 1, "--dropout", 0)]
    arguments += [*TINY, "--norm", "group"]
    assert run_here(*arguments, "--out", one) == 0
    # The program sets it for its own process, which here is everybody's.
    with functorch_config.patch(donated_buffer=True):
        assert run_here(*arguments, "--compile", "--out", other) == 0
    plain, found = read(one / "metrics.json"), read(other / "metrics.json")
    for key in ("fovea_error", "glaucoma_brier"):
        assert found[key] == pytest.approx(plain[key], rel=1e-3)


def test_photographs_are_normalised_as_published_and_phantoms_as_their_size_wants() -> None:
    assert parse([]).settings.norm == "running"
    assert parse(["--data", "photographs"]).settings.norm == "batch"
    assert parse(["--data", "photographs", "--norm", "group"]).settings.norm == "group"


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_every_norm_trains(repacked: Path, tmp_path: Path, norm: str) -> None:
    out = tmp_path / "run"
    assert run_here("--data", repacked, "--norm", norm, "--epochs", 1, *TINY, "--out", out) == 0
    assert "encoder.0.1.running_mean" not in weights(out)


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    """Weights, optimizer, order and dropout go on bit for bit, on a CPU."""
    half, whole = copy(finished["independent"], tmp_path / "half"), tmp_path / "whole"
    data = finished["independent"].parent / "data"
    torch.manual_seed(99)
    assert run_here("--resume", "--out", half, "--epochs", 4) == 0
    # The half validated where it ended.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VALIDATE_EVERY", 2)
        arguments = ("--data", data, "--epochs", 4, *TINY, "--mirror", "off")
        assert run_here(*arguments, "--out", whole) == 0
    assert_same_end(whole, half)


def assert_same_end(first: Path, second: Path) -> None:
    for name in ("last.pt", "best.pt"):
        one, other = weights(first, name), weights(second, name)
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), (name, key)


KILLED = """
import os, random, signal, sys, time
from matplotlib.figure import Figure

import train  # Imported once: each life is a fork, which starts at once.

Figure.savefig = lambda _, opened, **__: opened.write(b"figure")
arguments, out, kills = sys.argv[1:-2], sys.argv[-2], int(sys.argv[-1])
random.seed(0)
for life in range(kills + 1):
    if (child := os.fork()) == 0:
        again = ["--resume"] if os.path.exists(f"{out}/config.json") else arguments
        os._exit(train.main([*again, "--out", out]))
    if life < kills:
        time.sleep(random.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kills"), [("independent", 4), ("gradnorm", 3)])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(
    repacked: Path, tmp_path: Path, method: str, kills: int
) -> None:
    """SIGKILL leaves no time to tidy up: what is on disk must do, whenever it comes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--data", repacked, "--epochs", 12 * kills, *TINY, "--method", method)
    arguments = [*map(str, flags)]
    assert run_here(*arguments, "--out", whole) == 0
    command = [sys.executable, "-c", KILLED, *arguments, str(killed), str(kills)]
    folders = (ENVIRONMENT["PYTHONPATH"], str(Path(train.__file__).parent))
    done = subprocess.run(
        command,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdecimal()]
    killed_first = codes.index("0")  # A fast machine ends before the last of them.
    assert codes[:killed_first] == ["-9"] * killed_first, done.stderr
    assert killed_first >= 2
    assert set(codes[killed_first:]) == {"0"}, done.stderr
    assert_same_end(whole, killed)
    assert not list(killed.rglob("*.part"))


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{file} did not appear"
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(repacked: Path, tmp_path: Path) -> None:
    """No traceback, exit code 130, nothing half-written, and the advice works."""
    out = tmp_path / "run"
    command = [*TRAIN_PY, "--data", repacked, "--epochs", 500, *TINY, "--out", out]
    with subprocess.Popen(
        [*map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for(out / "last.pt", process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last == f"train.py: interrupted; continue with: train.py --resume --out {out}"
    assert not list(out.rglob("*.part"))
    torch.load(out / "last.pt", weights_only=True)


def test_ctrl_c_before_anything_is_saved_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While pictures are read there is nothing to go on with, and no folder is left."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refuge.run.load_photographs", interrupt)
    assert run_here("--out", tmp_path / "run") == 130
    assert capsys.readouterr().err == "train.py: interrupted; nothing was written\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", "0"), "`--epochs` must be at least 1, got 0."),
        (("--lr", "-1"), "`--lr` must be positive, got -1.0."),
        (("--lr", "nan"), "`--lr` must be positive, got nan."),
        (("--size", "100"), "`--size` must be a multiple of 16, at least 32, got 100."),
        (("--width", "0"), "`--width` must be at least 1, got 0."),
        (("--batch-size", "0"), "`--batch-size` must be at least 1, got 0."),
        (("--group-size", "5"), "`--group-size` must be between 1 and 4, got 5."),
        (("--seed", "-1"), "`--seed` must be between 0 and 2^63 - 1, got -1."),
        (("--dropout", "1"), "`--dropout` must be at least 0 and less than 1, got 1.0."),
        (
            ("--method", "pcgrad2"),
            "`--method` must be independent, alternating, joint, balanced, pcgrad, gradnorm, "
            "single or torchjd:NAME, got pcgrad2.",
        ),
        (
            ("--method", "single", "--group-size", "2"),
            "`--group-size` must be 1 when each task has its own network, got 2.",
        ),
        *(
            (
                ("--weights", weights, "--method", method),
                "`--weights` must be like fovea=30,cup=2, positive, and with `--method joint`, "
                f"got {weights}.",
            )
            for weights, method in (
                *(("fovea=30", "independent"), ("eye=1", "joint"), ("cup", "joint")),
                *(("cup=-1", "joint"), ("cup=1,cup=2", "joint"), ("cup=nan", "joint")),
            )
        ),
        (
            ("--pretrained", "imagenet"),
            "`--width` must be 64 as the pretrained encoders have, got 16.",
        ),
        (("--patience", "-1"), "`--patience` must be at least 0, got -1."),
        *(
            (
                ("--fold", fold),
                f"`--fold` must be like 1/5: which fold tests, of at least 3, got {fold}.",
            )
            for fold in ("0/5", "6/5", "1/2", "1", "a/b", "1/5/2", "1/99999")
        ),
        (("--resume",), "`--resume` needs `--out`, the folder of the run to continue."),
    ],
)
def test_a_bad_setting_is_one_line_with_its_rule(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(*arguments) == 2
    assert capsys.readouterr().err == f"train.py: error: {message}\n"


@pytest.mark.parametrize(
    "arguments", [("--norm", "layer"), ("--epochs", "many"), ("--nonsense",), ("--ep", "3")]
)
def test_what_no_flag_takes_is_one_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Choices and flags that there are none of."""
    assert run_here(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert error.count("\n") == 1
    assert arguments[0] in error


def test_bad_data_leaves_no_folder(
    repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pictures are read before anything is written."""
    out = tmp_path / "run"
    (repacked / "train/images/a03.jpg").write_bytes(b"\xff\xd8 cut short")
    assert run_here("--data", repacked, *TINY, "--out", out) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train.py: error: {repacked}/train/images/a03.jpg: not a readable")
    assert not out.exists()


def test_too_large_a_batch_is_refused(
    repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last incomplete batch is dropped, so there would be none."""
    out = tmp_path / "run"
    assert run_here("--data", repacked, "--batch-size", 12, "--out", out) == 2
    assert (
        "`--batch-size` must be at most 11 (the training pictures of a process)"
        in capsys.readouterr().err
    )
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    assert run_here("--out", out) == 2
    assert (
        capsys.readouterr().err == f"train.py: error: {out}: cannot be created (Not a directory).\n"
    )


def test_a_run_is_neither_overwritten_nor_resumed_as_another(tmp_path: Path) -> None:
    """A resumed run keeps its settings, but for its length and its device."""
    (tmp_path / "config.json").write_text(json.dumps(vars(Settings(lr=0.5, epochs=3))))
    with pytest.raises(InputError, match="contains a run; give `--resume` to continue it"):
        claim_folder(parse(["--out", str(tmp_path)]))
    again = ["--resume", "--out", str(tmp_path)]
    assert parse(again).settings == Settings(lr=0.5, epochs=3)
    assert parse([*again, "--epochs", "9"]).settings == Settings(lr=0.5, epochs=9)
    with pytest.raises(InputError, match=r"`--lr` must be 0\.5 as in .*config\.json, got 0\.1"):
        parse([*again, "--lr", "0.1"])
    (tmp_path / "config.json").write_text(json.dumps(vars(Settings()) | {"epochs": "3"}))
    with pytest.raises(InputError, match=r"config\.json: `epochs` must be like 7, got '3'"):
        parse(again)
    with pytest.raises(InputError, match=r"config\.json: not readable"):
        parse(["--resume", "--out", str(tmp_path / "nowhere")])


def test_a_checkpoint_of_another_network_is_refused(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy(finished["independent"], tmp_path / "run")
    (out / "last.pt").write_bytes((out / "best.pt").read_bytes())
    assert run_here("--resume", "--out", out) == 2
    assert (
        f"train.py: error: {out}/last.pt: not a checkpoint of this run" in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["last.pt", "history.csv", "best.pt"])
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """The draft leads to a device that is always full."""
    monkeypatch.setattr(TrainingState, "improved", lambda _, scores: list(scores))
    out = copy(finished["independent"], tmp_path / "run")
    before = {file: (out / file).read_bytes() for file in ("last.pt", "best.pt", "history.csv")}
    (out / f"{name}.part").symlink_to("/dev/full")
    capsys.readouterr()
    assert run_here("--resume", "--out", out, "--epochs", 3) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"train.py: error: {out / name}: cannot be written (No space left on device)."
    assert (out / name).read_bytes() == before[name]
    assert not (out / f"{name}.part").is_symlink()
    assert run_here("--resume", "--out", out, "--epochs", 3) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["independent", "gradnorm"])
def test_two_processes_are_one_with_the_doubled_batch(
    repacked: Path, tmp_path: Path, method: str
) -> None:
    """Started by torchrun, with a norm that knows no batch, and without dropout.

    In single precision the order of a sum shows, and Adam makes whole steps of a gradient that is
    nothing but rounding: that of a bias before a norm of each channel, and of a few other weights.
    """
    common = ("--data", repacked, "--size", 32, "--width", 2, "--method", method, "--epochs", 2)
    plain = ("--norm", "group", "--dropout", 0, "--mirror", "off")
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_here(*common, *plain, "--batch-size", 4, "--out", one) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port()), TRAIN_PY[1], "--batch-size", "2"]
    done = subprocess.run(
        [*torchrun, *map(str, common + plain), "--out", str(two)],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 of 2") == 1
    differing, total = 0, 0
    ended = weights(two)
    for name, value in weights(one).items():
        if not re.search(r"coder\.\d\.\d\.bias", name) or name.split(".")[2] in "14":
            differing += int(((ended[name] - value).abs() > 1e-4).sum())
            total += value.numel()
    assert differing < 0.01 * total
    first, second = (read(out / "metrics.json") for out in (one, two))
    for key in METRICS - {"seconds_per_iteration"}:
        if first[key] is None:
            assert second[key] is None
            continue
        assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-3), key


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        port = bound.getsockname()[1]
        assert isinstance(port, int)
        return port


def test_runs_without_a_name_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run must not cost the first."""
    monkeypatch.chdir(tmp_path)
    assert claim_folder(parse([])) == Path("runs/phantom-independent")
    assert claim_folder(parse([])) == Path("runs/phantom-independent-2")
    assert claim_folder(parse(["--method", "joint"])) == Path("runs/phantom-joint")


def test_the_published_configuration_is_reachable_and_stated() -> None:
    """Width 64, size 256, learning rate 1e-4, 300 epochs, batch statistics; no more is added."""
    flags = ["--width", "64", "--size", "256", "--lr", "1e-4", "--epochs", "300", "--norm", "batch"]
    flags += ["--mirror", "off", "--crop", "off"]
    settings = parse([*flags, "--out", "nowhere"]).settings
    expected = Settings(width=64, size=256, lr=1e-4, epochs=300, norm="batch")
    assert settings == replace(expected, mirror="off", crop="off")
    assert (settings.batch_size, settings.amp, settings.patience) == (8, "off", 0)
    assert (settings.augment, settings.second_pass, settings.fold) == (False, False, "")
    assert (settings.dropout, VALIDATE_EVERY) == (0.8, 5)


@pytest.mark.slow
def test_the_default_run_learns_all_four_tasks(train_py: Run, tmp_path: Path) -> None:
    """On unseen phantoms, from the fixed seed, with the thresholds that were promised."""
    finished = train_py("--out", tmp_path / "run", timeout=1500)
    assert finished.returncode == 0, finished.stderr
    metrics = read(tmp_path / "run/metrics.json")
    size = read(tmp_path / "run/config.json")["size"]
    assert metrics["disc_dice"] >= 0.85
    assert metrics["cup_dice"] >= 0.70
    assert metrics["fovea_error"] <= 0.05 * size
    assert metrics["glaucoma_auc"] >= 0.88
    assert metrics["glaucoma_auc_fc"] >= 0.75
    assert metrics["glaucoma_reference_sensitivity"] >= 0.75
    assert metrics["decisions"].keys() == {"specificity", "youden"}
    assert "synthetic phantoms" in finished.stdout

    # The example's README shows this picture. Another number of threads moves its mean grey by 0.2
    # of 255, other phantoms by more than 10.
    drawn, shown = (
        np.asarray(Image.open(file).convert("L"), dtype=float)
        for file in (tmp_path / "run/figures/overlays.png", ROOT / "docs/_static/demo.png")
    )
    assert np.abs(drawn - shown).mean() < 2


def test_two_runs_into_one_folder_are_kept_apart(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second says so before it reads a photograph."""
    out = copy(finished["joint"], tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    with lock_folder(out):
        assert run_here("--resume", "--out", out, "--epochs", 3) == 2
    assert capsys.readouterr().err == (
        f"train.py: error: {out}: another process is writing into this folder.\n"
    )
    assert (out / "last.pt").read_bytes() == before
    assert not (out / ".lock").exists()
    assert run_here("--resume", "--out", out, "--epochs", 3) == 0
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_an_edited_config_is_noticed(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The settings belong to the weights; this one would fit their shapes."""
    out = copy(finished["joint"], tmp_path / "run")
    config = read(out / "config.json")
    (out / "config.json").write_text(json.dumps(config | {"mirror": "on"}))
    capsys.readouterr()
    program = train.main if name == "last.pt" else evaluate.main
    arguments = (
        ["--resume", "--out", str(out), "--epochs", "3"] if name == "last.pt" else [str(out)]
    )
    assert program(arguments) == 2
    error = capsys.readouterr().err
    assert f"{out / name}: not " in error
    assert "`mirror` was off, `config.json` says on" in error


def test_an_unknown_aggregator_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("refuge.run.load_photographs", pytest.fail)
    assert run_here("--method", "torchjd:Nope", "--out", tmp_path / "run") == 2
    assert "must name an aggregator of TorchJD, got Nope" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["balanced", "pcgrad", "gradnorm", "torchjd:Mean"])
def test_gradients_are_combined_where_the_heads_begin(
    repacked: Path, tmp_path: Path, method: str
) -> None:
    """At the outputs of encoder and decoder, in one forward pass; a run resumes as any other."""
    settings = Settings(method=method, features=True, width=2)
    network = build_network(settings)
    optimizer: Any = build_optimizer(settings, network, None)
    pictures = load_splits(str(repacked), 32, seed=0)["train"]
    seen: list[object] = []
    assert isinstance(network, MultiTaskUNet)
    for module in (network.encoder[-1], network.decoder[-1]):
        module.register_forward_hook(lambda _, __, output: seen.append(output))
    losses = train.make_losses(settings, network)
    assert optimizer.step(losses, pictures[[0, 1, 2, 3]]).keys() == set(TASKS)
    assert len(seen) == 2
    if method != "pcgrad":
        return
    one, other = tmp_path / "one", tmp_path / "other"
    arguments = ("--data", repacked, *TINY, "--method", method, "--features")
    assert run_here(*arguments, "--epochs", 2, "--out", one) == 0
    assert run_here(*arguments, "--epochs", 1, "--out", other) == 0
    assert run_here("--resume", "--epochs", 2, "--out", other) == 0
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


def test_the_cut_needs_a_method_that_combines_gradients(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_here("--features") == 2
    expected = "`--features` must be for balanced, pcgrad, gradnorm or torchjd:NAME, got True.\n"
    assert capsys.readouterr().err.endswith(expected)
