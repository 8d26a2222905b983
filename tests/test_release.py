"""`make release`: what is uploaded has one version, and says what has changed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mtlopt
from scripts import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load_script(ROOT / ".ci/check_release.py")  # type: ignore[no-any-return]  # a module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy as it is to be uploaded: a heading below `Unreleased` names the version and a day."""
    (tmp_path / "mtlopt").mkdir()
    for file in ("mtlopt/__init__.py", "CITATION.cff"):
        shutil.copy(ROOT / file, tmp_path / file)
    entry = f"## [Unreleased]\n\n## [{mtlopt.__version__}] - 2030-01-31\n\n- All of it.\n"
    (tmp_path / "CHANGELOG.md").write_text(entry, encoding="utf-8")
    return tmp_path


def edit(file: Path, pattern: str, text: str) -> None:
    old = file.read_text(encoding="utf-8")
    new = re.sub(pattern, text, old, count=1)
    assert new != old
    file.write_text(new, encoding="utf-8")


def test_a_release_is_ready_when_all_name_it(check: ModuleType, copy: Path) -> None:
    assert check.disagreements(copy) == []


@pytest.mark.parametrize(("day", "status"), [("2030-01-31", 0), ("soon", 1)])
def test_the_program_fails_where_something_is_left_to_write(
    copy: Path, day: str, status: int
) -> None:
    (copy / ".ci").mkdir()
    program = shutil.copy(ROOT / ".ci/check_release.py", copy / ".ci")
    log = copy / "CHANGELOG.md"
    log.write_text(log.read_text(encoding="utf-8").replace("2030-01-31", day), encoding="utf-8")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert (done.returncode, bool(done.stderr)) == (status, bool(status))


@pytest.mark.parametrize(
    ("file", "pattern", "text", "said"),
    [
        ("mtlopt/__init__.py", r'__version__ = ".*"', '__version__ = "9.9"', "write `## [9.9] - "),
        ("CHANGELOG.md", r"- 2030-01-31", "- soon", "write `## ["),
        ("CHANGELOG.md", r"\[Unreleased\]\n", "[Unreleased]\n\n- Late.\n", "'- Late.' is still"),
        ("CITATION.cff", r"version: 0.*", "version: 0.0.0", "CITATION.cff: write `version: "),
    ],
)
def test_what_is_left_to_write_is_named(
    check: ModuleType, copy: Path, file: str, pattern: str, text: str, said: str
) -> None:
    edit(copy / file, pattern, text)
    assert said in "\n".join(check.disagreements(copy))


def test_the_first_release_has_one_entry_and_changes_nothing_that_was_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = text[text.index("## [0.1.0]") :]
    assert re.findall(r"^##+ .*", first, re.MULTILINE)[1:] == ["### Added"]


@pytest.mark.parametrize("extra", ["torchjd", "test"])
def test_torchjd_is_bounded(extra: str) -> None:
    """It is below 1.0: a minor release may rename what this package calls."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split(f"\n{extra} = [")[1].split("\n]")[0]
    assert re.search(r'"torchjd\[\w+\]>=0\.18,<0\.19"', section)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_release_checks_builds_and_checks_what_was_built(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    printed = subprocess.run(
        ["make", "release", "--dry-run", "--no-print-directory"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    steps = [line.split("python ")[-1] for line in printed.splitlines()][-4:]
    assert steps == [
        ".ci/check_release.py",
        "rm -rf dist",
        "-m build",
        "-m twine check --strict dist/*",
    ]
