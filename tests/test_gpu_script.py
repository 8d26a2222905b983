"""The script for a machine with a GPU, on a processor: it measures, stops, and goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("timeout") is None, reason="needs bash and coreutils"),
]


def call(*options: object, python: str = sys.executable) -> tuple[int, str]:
    command = ["bash", SCRIPT, "--device", "cpu", "--toy", *options]
    done = subprocess.run(
        [*map(str, command)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHON": python},
    )
    return done.returncode, done.stdout


def test_a_call_does_what_its_time_allows_and_the_next_goes_on(tmp_path: Path) -> None:
    only = ["--out", tmp_path, "--wheels", tmp_path, "--only"]
    left, said = call(*only, "overhead", "--seconds", "0")
    assert (left, [*tmp_path.glob("*.md")]) == (75, []), said
    assert "overhead: left for another call" in said

    done, said = call(*only, "overhead")
    assert done == 0, said
    (file,) = tmp_path.glob("overhead_*.md")
    text = file.read_text(encoding="utf-8")
    assert "| independent |" in text
    assert "--device cpu" in text

    again, said = call(*only, "overhead")
    assert (again, "overhead: done before" in said) == (0, True), said
    assert file.read_text(encoding="utf-8") == text


def test_a_part_that_fails_leaves_its_log_and_the_others_go_on(tmp_path: Path) -> None:
    """Replaces Python by a program that knows no device, but writes what it is asked for."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$2" in *transfers) echo no such device; exit 3;; esac\n'
        f"echo measured > {tmp_path}/overhead_here.md\n"
    )
    python.chmod(0o755)
    only = ["--out", tmp_path, "--wheels", tmp_path, "--only", "transfers overhead steps"]
    status, said = call(*only, python=str(python))
    assert status == 1, said
    assert (tmp_path / "transfers.log").read_text(encoding="utf-8") == "no such device\n"
    assert "overhead: done at" in said
    assert not [*tmp_path.glob("overhead.log")]
    assert "combination" not in said
