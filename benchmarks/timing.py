"""What every benchmark shares: interleaved timing, several processes, and a file of results."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("torchvision", "torchjd", "pytorch_optimizer", "gradnorm-pytorch")

Case = Callable[[], Callable[[], object]]
"""Makes fresh inputs and returns what is to be timed on them."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a separate process measures
    return parser


def seconds(
    cases: Mapping[str, Case],
    repetitions: int,
    device: str,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times the cases in turn, so that what slows the machine slows them alike.

    Not by torch.utils.benchmark, whose Timer runs a statement twice before it measures: the first
    run would use up the fresh inputs.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm_up + repetitions):
        for name, case in cases.items():
            run = case()
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if turn >= warm_up:
                times[name].append(clock() - start)
            del run
    return times


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(device: str) -> int:
    """Returns the most memory that this process held so far, in bytes."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def program() -> str:
    """Returns the name of the program that is running."""
    return Path(sys.argv[0]).stem


def in_processes(
    options: argparse.Namespace, children: Sequence[str], arguments: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Runs this program in a separate process per child; returns what each printed."""
    results = []
    for child in children:
        command = [sys.executable, "-m", f"benchmarks.{program()}", "--child", child]
        command += ["--device", options.device, "--repetitions", str(options.repetitions)]
        command += arguments
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"measured {child}", file=sys.stderr)
    return results


def medians(results: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Returns each case's median over the processes of the median over the repetitions."""
    return {
        name: statistics.median(statistics.median(result[name]) for result in results)
        for name in results[0]
    }


def ratio(results: Sequence[Mapping[str, Sequence[float]]], name: str, other: str) -> str:
    """Returns the median over processes of how many times `other` the case takes, and the range."""
    ratios = sorted(
        statistics.median(result[name]) / statistics.median(result[other]) for result in results
    )
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def write_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write_results(options: argparse.Namespace, what: str, text: str) -> None:
    """Writes a file of results, with where, when and how they were measured."""
    today = datetime.date.today().isoformat()
    hardware = describe_hardware(options.device)
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    command = shlex.join(["python", "-m", f"benchmarks.{program()}", *sys.argv[1:]])
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{name} {version}" for name in PEERS if (version := _version(name))]
    head = f"# {what.replace('_', ' ').capitalize()}\n\n"
    head += f"{hardware}, {today}, {', '.join(versions)}.\n\n```\n{command}\n```\n\n"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{what}_{slug}_{today}.md"
    path.write_text(head + text, encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    print(f"written to {path}", file=sys.stderr)


def describe_hardware(device: str) -> str:
    """Names the device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8"))
        name = found[1] if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
