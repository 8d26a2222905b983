"""Methods x learning rates x constants x seeds on a problem, under one protocol.

    python -m benchmarks.run_study --problem adult            # a module of study/problems/
    python -m benchmarks.run_study --problem my_problem.py    # your own
    python -m benchmarks.run_study --state                    # what is complete, and what is left
    python -m benchmarks.run_study --report                   # tables and figures of what was run

A second call continues where the first one stopped. The protocol:

1. The sum's steps double until that gains nothing on validation (the plateau), with equal weights
   or with those that make its gradients alike. All training is Adam with a cosine schedule; a run
   keeps the step that is best on validation.
2. The search, on three seeds and validation alone. Each method tries five learning rates or more,
   until the best has neighbours on both sides, then eight other values of its constants; the
   sum's are its weights. The best three with the first seed run with all three.
3. The judgement, on fifteen fresh seeds: the choice trains for as many steps as cost what the sum's
   plateau costs (equal compute), and for as many steps as the sum. The test split is evaluated
   once per run. The tuned sum also trains with the dearest method's compute.
4. The replication, if asked for by `--again --methods ...`: the same choices and the tuned sum at
   equal compute, on fifteen further seeds.
"""

import argparse
import os
from pathlib import Path

from benchmarks.study.problem import PROBLEMS
from benchmarks.study.study import FINAL_SEEDS, Study

RESULTS = Path(__file__).parent / "results" / "study"


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", nargs="+", default=[], help="names, or files that end in .py")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=FINAL_SEEDS, help="of the judgement")
    parser.add_argument("--again", action="store_true", help="judge with as many further seeds")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repetitions", type=int, default=50, help="of a step whose cost is taken")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--state", action="store_true", help="run nothing, say what is left")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per process
    if not (options.report or options.state):
        for name in options.problem:
            study = Study(name, options.out, options.seeds)
            study.run(options.methods, options.processes, options.repetitions, options.again)
    # The tables are of all that lies in the folder, and a problem of your own if it is named.
    begun = [path.parent.name for path in sorted(options.out.glob("*/runs.csv"))]
    names = {name: name for name in begun if (PROBLEMS / f"{name}.py").exists()}
    names |= {Path(name).stem: name for name in options.problem}
    studies = [Study(name, options.out, options.seeds) for name in names.values()]
    from benchmarks.study.report import write_report, write_state  # not in every process

    if options.state:
        print(write_state(studies))
    else:
        write_report(options.out, studies)


if __name__ == "__main__":
    main()
