"""examples/quickstart.py: a table of every method, and each alone, with plots, on two ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import load_script

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart.py"
LEFT_OUT = "Left out: upgrad, uw, which need TorchJD: pip install '.[torchjd]'"
METHODS = ["joint", "balanced", "alternating", "independent", "pcgrad", "gradnorm", "upgrad", "uw"]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    return load_script(QUICKSTART)  # type: ignore[no-any-return]  # a module


def read(printed: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """Returns the heading, and each task's loss before and after."""
    heading, _, *rows = printed.strip().splitlines()
    cells = [row.split() for row in rows]
    return heading, {task: (float(before), float(after)) for task, before, after in cells}


@pytest.mark.parametrize("method", METHODS)
def test_every_tasks_loss_falls(
    quickstart: ModuleType, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main(["--method", method])
    heading, losses = read(capsys.readouterr().out)
    assert heading == f"{method}, 300 steps"
    assert list(losses) == ["price", "days", "sold"]
    for before, after in losses.values():
        assert after < 0.7 * before, losses


def test_the_methods_offered_are_those_tested(quickstart: ModuleType) -> None:
    assert list(quickstart.METHODS) == METHODS


@pytest.mark.parametrize("torchjd", [True, False])
def test_without_a_method_all_are_compared(
    quickstart: ModuleType,
    torchjd: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table with a row each and for a sum with tuned weights, then one sentence of it."""
    if not torchjd:
        monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    quickstart.main(["--steps", "30", "--seeds", "2"])
    _, table, sentence = capsys.readouterr().out.strip().split("\n\n")
    lines = table.splitlines()[1:]
    missing = [] if torchjd else lines[-1:]
    assert missing == ([] if torchjd else [LEFT_OUT])
    rows = {line[:11].strip(): line[11:].split() for line in lines if line not in missing}
    offered = METHODS if torchjd else METHODS[:-2]
    assert list(rows) == ["joint", "tuned sum", *offered[1:]]
    scores = {}
    for name, (price, days, sold, mean, _, error, cost, _) in rows.items():
        assert float(mean) == pytest.approx(
            (float(price) + float(days) + float(sold)) / 3, abs=0.11
        )
        assert float(error) > 0
        assert float(cost) > 0
        scores[name] = float(mean)
    assert rows["joint"][-2] == "1.0"
    tuned = scores.pop("tuned sum")
    said = re.search(r"Without a search (\w+) does best, with (\d+) %.* reaches (\d+) %", sentence)
    assert said is not None
    assert scores[said[1]] == pytest.approx(min(scores.values()), abs=0.11)
    assert float(said[2]) == pytest.approx(scores[said[1]], abs=0.6)
    assert float(said[3]) == pytest.approx(tuned, abs=0.6)


def test_one_seed_has_no_standard_error(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quickstart.main(["--seeds", "1"])
    assert "--seeds must be at least 2, got 1" in capsys.readouterr().err


def test_the_comparison_is_repeatable_and_fair(quickstart: ModuleType) -> None:
    """The same seed has the same data, weights and batches for every method."""
    equal = dict.fromkeys(quickstart.TASKS, 1.0)
    plain, again, weighted = (
        quickstart.train("joint", 1, 20, weights)[0] for weights in (None, None, equal)
    )
    assert plain.tolist() == again.tolist() == weighted.tolist()
    start, end = (quickstart.train("joint", 1, steps)[0].mean() for steps in (1, 300))
    assert end < 0.6 * start


def test_the_tasks_conflict_at_the_start(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the example shows nothing."""
    reports = []
    monkeypatch.setattr(
        quickstart.Plots, "add_conflicts", lambda plots, step, report: reports.append(report)
    )
    quickstart.main(["--steps", "1", "--plot", str(tmp_path)])
    assert reports[0].conflict_fraction > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tags"),
    [
        ("joint", {"trunk_norms/sold"}),
        ("independent", {"gradient_norms/sold", "update_shares/sold"}),
        ("balanced", {"weights/sold", "norms/sold", "shares/sold"}),
        ("pcgrad", {"conflict_fraction", "coefficients/sold"}),
        ("gradnorm", {"weights/sold", "norms/sold"}),
    ],
)
def test_plot_writes_pictures_and_what_the_method_saw(
    quickstart: ModuleType, method: str, tags: set[str], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]  # no stubs
        event_accumulator,
    )

    quickstart.main(["--method", method, "--steps", "110", "--plot", str(tmp_path)])
    for name in ("conflicts.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    written = event_accumulator.EventAccumulator(str(tmp_path))
    written.Reload()
    assert tags | {"losses/price"} <= set(written.Tags()["scalars"])
    assert [event.step for event in written.Scalars("losses/price")] == list(range(110))
    assert [event.step for event in written.Images("conflicts")] == [0, 100]


def test_a_package_that_plot_needs_is_named(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="for --plot: pip install matplotlib tensorboard"):
        quickstart.main(["--plot", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["independent", "pcgrad"])
def test_two_ranks_train_together_and_one_prints(method: str) -> None:
    # The package is found beside the example where it is not installed.
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(QUICKSTART), "--method", method],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    heading, losses = read(done.stdout)
    assert heading == f"{method}, 300 steps"
    for before, after in losses.values():
        assert after < 0.7 * before, losses
