"""What the documentation's build draws and executes: its figures, and its notebook, shortened."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from scripts import load_script

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOK = DOCS / "how-to" / "digits-notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_not_committed() -> None:
    """They would grow stale; the site shows those of its own build."""
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)


def test_it_ends_in_a_table_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    mpl.use("agg")
    names: dict[str, Any] = {"__name__": "notebook"}
    program = "\n".join(CODE).replace("%matplotlib inline\n", "")
    for old, new in {"steps=400": "steps=20", "range(1, 6)": "range(1, 3)"}.items():
        assert old in program
        program = program.replace(old, new)
    exec(compile(program, str(NOTEBOOK), "exec"), names)
    table, verdict = capsys.readouterr().out.split("mean\n")[1].splitlines()[:5], names["results"]
    assert [line[:12].strip() for line in table] == list(verdict)
    assert {len(errors) for errors in verdict.values()} == {2}
    assert all(errors.min() > 0 and errors.isfinite().all() for errors in verdict.values())


@pytest.mark.parametrize("changed", ["mtlopt/methods/joint.py", "docs/figures/tour.py", None])
def test_a_figure_is_drawn_again_when_the_code_that_it_shows_has_changed(
    changed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = load_script(DOCS / "conf.py")
    for name in ("mtlopt/methods/joint.py", "docs/figures/tour.py", "docs/figures/tour.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (0, 2 if name == changed else 1))
    drawn: list[str] = []
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    monkeypatch.setattr(conf, "FIGURES", {"tour.py": ("tour.png", "docs/getting-started.md")})
    monkeypatch.setattr(subprocess, "run", lambda command, **_: drawn.append(command[-1]))
    conf.draw_figures(None)
    assert drawn == ([] if changed is None else [str(tmp_path / "docs/figures/tour.py")])
