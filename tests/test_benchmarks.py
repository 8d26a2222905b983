"""The benchmarks run, on little, and write their tables."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SMALL = ["--width", "4", "--size", "32", "--batch-size", "2", "--original", "64"]
SMALL += ["--methods", "joint", "--ways", "decoded", "fast"]
ROOT = Path(__file__).parents[1]
BALANCED = ("--methods", "balanced, features", "--times-only")


@pytest.mark.parametrize(
    ("program", "options", "rows"),
    [
        ("combination", ["--tasks", "2"], 2),
        ("steps", ["--width", "8", "--size", "32", "--memory", "joint"], 12),
        ("overhead", [], 3),
        ("data_sets", ["--tasks", "2"], 1),
        ("features", ["--tasks", "2", "--size", "32", "--width", "4", *BALANCED], 4),
        ("refuge_step", [*SMALL, "--eager"], 1 + 2),  # Its header has numbers too.
    ],
)
def test_a_benchmark_writes_a_table_of_numbers(
    program: str, options: list[str], rows: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", f"benchmarks.{program}", *options, "--device", "cpu"]
    command += ["--processes", "1", "--repetitions", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.md")
    text = file.read_text(encoding="utf-8")
    table = [
        line for line in text.splitlines() if line.startswith("|") and any(map(str.isdigit, line))
    ]
    assert len(table) == rows
    assert "torch" in text
    assert f"python -m benchmarks.{program} " in text
