"""Methods x learning rates x seeds on a problem, under one protocol.

    python -m benchmarks.run_study --problem adult            # one that lies in study/problems/
    python -m benchmarks.run_study --problem my_problem.py    # one of your own
    python -m benchmarks.run_study --report                   # tables and pictures of what was run

A second call goes on where the first one stopped. The protocol:

1. Every method trains with Adam at the same five learning rates, half a decade apart, with seed 0.
   The best on validation must have tried neighbours on both sides: else the grid grows there.
2. The weighted sum may also search its weights: six more, and the learning rate for the best anew.
3. The two best train with all seeds, and the better mean on validation is the method's choice. The
   step of a run is chosen on validation as well; the test split is touched once for each run, after
   that.
4. For quality at equal time each run also keeps its best step among those that take no longer than
   the whole run of the plain sum does.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.study import results
from benchmarks.study.costs import measure_costs
from benchmarks.study.methods import SUM, TUNED, names
from benchmarks.study.plan import Config, plan_all
from benchmarks.study.problem import load
from benchmarks.study.training import run

RESULTS = Path(__file__).parent / "results" / "study"


def study(name: str, options: argparse.Namespace) -> None:
    """Runs what a problem lacks."""
    runs, costs = options.out / "runs.csv", options.out / "costs.csv"
    label = Path(name).stem
    problem = load(name)
    methods = [m for m in names(problem) if not options.methods or m in options.methods]
    known = {row["method"] for row in results.load_rows(costs, label)}
    if missing := [m for m in dict.fromkeys([*methods, SUM]) if m not in known]:
        # The plain sum is measured anew beside those that are: its ratio to them is what counts.
        measured = measure_costs(name, list(dict.fromkeys([SUM, *missing])), options.repetitions)
        if SUM in known:
            old = next(r for r in results.load_rows(costs, label) if r["method"] == SUM)
            ratio = float(old["seconds"]) / measured[0]["seconds"]
            measured = [m | {"seconds": m["seconds"] * ratio} for m in measured[1:]]
        results.append_rows(costs, results.COSTS, [{"problem": label} | m for m in measured])
    seconds = {r["method"]: float(r["seconds"]) for r in results.load_rows(costs, label)}

    def until(method: str) -> int:
        if method == TUNED:  # its step is the plain sum's
            return problem.steps
        steps = problem.steps * seconds[SUM] / seconds.get(method, seconds[SUM])
        return max(1, min(problem.steps, int(steps)))

    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(options.processes, context) as pool, tqdm(desc=label) as bar:
        going: dict[Future[dict[str, Any]], Config] = {}
        while True:
            done = results.load_rows(runs, label)
            for config in plan_all(methods, done, options.seeds)[0]:
                if config not in going.values():
                    going[pool.submit(run, name, config, until(config.method))] = config
            bar.total = len(done) + len(going)
            bar.n = len(done)
            bar.refresh()
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                del going[future]
                results.append_rows(runs, results.RUNS, [{"problem": label} | future.result()])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", nargs="+", default=[], help="names, or files that end in .py")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=30, help="of a step whose cost is taken")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes: one core each
    for name in [] if options.report else options.problem:
        study(name, options)
    from benchmarks.study.report import write_report  # not in every process: it takes seconds

    write_report(options.out, options.problem)


if __name__ == "__main__":
    main()
