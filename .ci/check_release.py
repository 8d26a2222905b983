"""Checks that the version, the changelog and the citation speak of one release."""

import re
import sys
from pathlib import Path


def disagreements(root: Path) -> list[str]:
    """Returns what has to be written before a release, if anything."""

    def find(file: str, pattern: str) -> str | None:
        found = re.search(pattern, (root / file).read_text(encoding="utf-8"), re.MULTILINE)
        return found and found[1]

    version = find("mtlopt/__init__.py", r'^__version__ = "(.+)"$')
    released = find("CHANGELOG.md", r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$")
    cited = find("CITATION.cff", r"^version: (.+)$")
    unreleased = find("CHANGELOG.md", r"^## \[Unreleased\]\n+(?!## )(\S.*)$")
    said = []
    if released != version:
        said.append(
            f"CHANGELOG.md: its newest release is {released}, `__version__` is {version}: "
            f"write `## [{version}] - YYYY-MM-DD` below `## [Unreleased]`."
        )
    elif unreleased:
        said.append(f"CHANGELOG.md: {unreleased!r} is still under Unreleased: move it below.")
    if cited != version:
        said.append(f"CITATION.cff: write `version: {version}`, got {cited}.")
    return said


if __name__ == "__main__":
    sys.exit("\n".join(disagreements(Path(__file__).parents[1])) or 0)  # "" would be an error
