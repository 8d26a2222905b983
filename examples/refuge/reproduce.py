"""Reproduces the paper's tables and figures; reuses finished runs and resumes stopped ones.

reproduce.py table1    Table 1 and Figures 1, 4, 6: the methods, trained from scratch
reproduce.py table2    Table 2: the encoder starts from ImageNet
reproduce.py lr-sweep  Figures 2, 3: metrics and final loss against the learning rate
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from refuge.best import load_photographs, open_run
from refuge.errors import InputError, report_errors
from refuge.files import lock_folder, make_folder
from refuge.methods import check_method
from refuge.photographs.data import describe
from refuge.settings import RUNS, Parser, Settings, add_flags, complete, read_settings
from refuge.study.figures import draw_by_rate, draw_comparison, draw_roc_curves, draw_saliency
from refuge.study.folds import write_decisions
from refuge.study.tables import (
    FinishedRun,
    choose_rates,
    read_run,
    write_rates,
    write_runs,
    write_table,
)
from train import train

METHODS = {
    "table1": ("single", "independent", "gradnorm", "pcgrad"),
    "table2": ("single", "independent"),
    "lr-sweep": ("single", "independent", "gradnorm", "pcgrad"),
}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # a sweep's default


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit code."""
    return report_errors("reproduce.py", lambda: reproduce(_parser().parse_args(arguments)))


def reproduce(options: argparse.Namespace) -> None:
    """Trains the missing runs, then writes tables and figures."""
    given = vars(options)
    what, home, folds = given.pop("what"), given.pop("out"), given.pop("folds")
    seeds = given.pop("seeds", 1 if folds else 3)
    methods = given.pop("methods") or METHODS[what]
    rates = given.pop("lr", None) or (RATES if what == "lr-sweep" else (Settings().lr,))
    if what == "table2":
        given = {"pretrained": "imagenet", "width": 64} | given
    given = {"norm": "batch", "mirror": "off", "crop": "off"} | given  # as published
    if seeds < 1:
        raise InputError(f"`--seeds` must be at least 1, got {seeds}.")
    if folds and folds < 3:
        raise InputError(f"`--folds` must be at least 3, got {folds}.")
    given["fold"] = f"1/{folds}" if folds else ""
    base = Settings(**complete(given))
    plans = [plan(base, method, lr) for method in methods for lr in rates]
    out, title = home / what, describe_runs(base)

    swept = []
    if what == "lr-sweep" or len(rates) > 1:
        swept = [finish(each, home) for each in plans]
        make_folder(out)
        write_rates(out / "lr-sweep.md", f"Test split of {title}, seed {base.seed}.", swept)
        write_runs(out / "lr-sweep.csv", swept)
        draw_by_rate(out, swept, title)
        print((out / "lr-sweep.md").read_text(encoding="utf-8"))
    if what == "lr-sweep":
        return

    chosen = choose_rates(swept) if swept else dict.fromkeys(methods, rates[0])
    runs = [
        finish(replace(plan(base, method, lr), seed=base.seed + seed, fold=fold), home)
        for method, lr in chosen.items()
        for seed in range(seeds)
        for fold in ([f"{k}/{folds}" for k in range(1, folds + 1)] if folds else [""])
    ]
    make_folder(out)
    over = f"Mean over {folds} folds" if folds else "Test split"
    write_table(out / f"{what}.md", what, f"{over} of {title}.", runs)
    write_runs(out / f"{what}.csv", runs)
    draw_figures(out, runs, title)
    if folds:
        first = [run for run in runs if run.settings.seed == base.seed]
        text = f"Every photograph of {title}, tested once, seed {base.seed}."
        write_decisions(out / "decisions.md", text, first)
        print((out / "decisions.md").read_text(encoding="utf-8"))
    print((out / f"{what}.md").read_text(encoding="utf-8"))


def plan(base: Settings, method: str, lr: float) -> Settings:
    """Returns the settings of a run, checked before the first run has trained for hours.

    Raises:
        InputError: A setting breaks its rule, or an aggregator is not available.
    """
    weights = base.weights if method == "joint" else ""
    settings = replace(base, method=method, lr=lr, weights=weights)
    settings.check()
    check_method(settings)
    return settings


def describe_runs(base: Settings) -> str:
    """Describes the runs: their data, and every setting that is not the default."""
    usual = asdict(Settings())
    stated = (
        "data",
        "fold",
        "epochs",
        "width",
        "size",
        "method",
        "lr",
        "seed",
        "device",
        "pretrained",
    )
    others = {k: v for k, v in asdict(base).items() if k not in stated and v != usual[k]}
    if base.pretrained != "none":
        others["encoder from"] = Path(base.pretrained).name
    text = f"{describe(base.data)}, {base.epochs} epochs, width {base.width}, {base.size} px"
    return ", ".join([text, *(f"{key.replace('_', ' ')} {v}" for key, v in others.items())])


def finish(settings: Settings, home: Path) -> FinishedRun:
    """Trains a run to its end, unless its folder says that it has been trained.

    Raises:
        InputError: The folder holds a run of other settings.
    """
    pretrained = "" if settings.pretrained == "none" else "-pretrained"
    method = settings.method.replace(":", "-")
    fold = f"-fold{settings.fold.replace('/', 'of')}" if settings.fold else ""
    name = f"{method}{pretrained}-lr{settings.lr:g}-seed{settings.seed}{fold}"
    folder = home / "runs" / name
    if (folder / "config.json").exists():
        found = asdict(replace(read_settings(folder), device=settings.device))
        for name, value in asdict(settings).items():
            if found[name] != value:
                raise InputError(
                    f"{folder}: holds a run of `{name}` {found[name]}, not {value}; take another "
                    "`--out`."
                )
    if not (folder / "metrics.json").exists():
        print(folder, flush=True)
        make_folder(folder)
        with lock_folder(folder):
            train(settings, folder, resume=True)
    return read_run(settings, folder)


def draw_figures(out: Path, runs: Sequence[FinishedRun], title: str) -> None:
    """Draws Figures 1, 4 and 6 from the first seed's runs."""
    first = {run.settings.method: run for run in reversed(runs)}
    draw_roc_curves(out / "figure1_roc.png", list(first.values())[::-1], title)
    settings = runs[0].settings
    cache = runs[0].folder.parent / ".cache"
    test = load_photographs(settings, cache, ["test"])["test"]
    shown = [run for method in ("independent", "single") if (run := first.get(method))]
    trained = {
        run.settings.method: open_run(run.folder, run.settings.device)[0]
        for run in shown or runs[:1]
    }
    draw_comparison(out / "figure4_predictions.png", test, trained, title)
    draw_saliency(out / "figure6_saliency.png", test, next(iter(trained.values())), title)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def methods(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("what", choices=tuple(METHODS))
    parser.set_defaults(folds=0)
    seeds = "runs of each (3; 1 where there are folds)"
    parser.add_argument("--seeds", type=int, metavar="N", help=seeds)
    folds = "cross-validate: each of N folds of all pictures tests once"
    parser.add_argument("--folds", type=int, metavar="N", help=folds)
    parser.add_argument(
        "--methods", type=methods, default=(), metavar="A,B", help="others than the paper's"
    )
    parser.add_argument(
        *("--lr", "-l"),
        type=float,
        nargs="+",
        metavar="X",
        help="learning rate; of several, each method gets the one that validates best",
    )
    parser.add_argument("--out", type=Path, default=RUNS / "study", metavar="DIR")
    add_flags(parser, without=("method", "lr", "fold"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
