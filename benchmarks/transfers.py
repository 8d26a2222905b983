"""What passes between host and device in a step of the glaucoma network, by the profiler.

python -m benchmarks.transfers

Three tasks share the decoder and four the encoder. A copy to the host makes it wait for all that
the device has to do; so does a copy of ordinary memory to the device. On a processor nothing is
copied: tests/test_synchronisation.py counts what would be.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

import mtlopt
from benchmarks import timing
from benchmarks.steps import Problem, make_step

sys.path.append(str(Path(__file__).parents[1] / "examples" / "refuge"))
from refuge.network import TASKS

SEEN = {
    "copies to the host": "Memcpy DtoH",
    "copies to the device": "Memcpy HtoD",
    "waits": "cudaStreamSynchronize",
}
HERE = ("joint, by hand", "independent, by hand", "joint", "independent", "pcgrad", "gradnorm")


def make_steps(problem: Callable[[], Problem]) -> dict[str, Callable[[], object]]:
    """Lists the steps that are profiled."""
    steps = {name: make_step(name, problem()) for name in HERE}

    def add(name: str, make: Callable[[Problem], mtlopt.MultiTaskOptimizer]) -> None:
        own = problem()
        optimizer = make(own)
        steps[name] = lambda: optimizer.step(own.losses, own.batch)

    def features(own: Problem) -> dict[str, Any]:
        return {"features": list(own.model.encoder)}

    add("alternating", lambda p: mtlopt.AlternatingOptimizer(p.adam(), TASKS))
    add(
        "simultaneous",
        lambda p: mtlopt.IndependentOptimizer(p.adam(), TASKS, schedule="simultaneous"),
    )
    add("pcgrad, features", lambda p: mtlopt.PCGrad(p.adam(), TASKS, **features(p)))
    add("gradnorm, features", lambda p: mtlopt.GradNorm(p.adam(), TASKS, **features(p)))
    try:
        from torchjd.aggregation import UPGrad
    except ImportError:
        return steps
    add("UPGrad", lambda p: mtlopt.Aggregated(p.adam(), TASKS, UPGrad()))
    add("UPGrad, features", lambda p: mtlopt.Aggregated(p.adam(), TASKS, UPGrad(), **features(p)))
    return steps


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.set_defaults(repetitions=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=2)
    options = parser.parse_args()
    activities = [ProfilerActivity.CPU]
    if options.device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    rows = []
    for name, step in make_steps(lambda: Problem(options)).items():
        step()
        step()
        timing.synchronize(options.device)
        with profile(activities=activities) as found:
            for _ in range(options.repetitions):
                step()
        events = found.events() or []
        counts = [sum(part in event.name for event in events) for part in SEEN.values()]
        rows.append([name, *(f"{count / options.repetitions:g}" for count in counts)])
    text = (
        f"Width {options.width}, {options.size} x {options.size} pixels, batch of "
        f"{options.batch_size}, Adam; the mean of {options.repetitions} steps. The batch lies on "
        "the device.\n\n"
    )
    timing.write_results(options, "transfers", text + timing.write_table(["step", *SEEN], rows))


if __name__ == "__main__":
    main()
