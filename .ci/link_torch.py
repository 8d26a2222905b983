"""Links an installed torch, and all that it requires, into another environment.

python .ci/link_torch.py SITE_PACKAGES

So that an environment with torch alone needs no second copy of its libraries, which are gigabytes.
Run by the Python of the environment that has torch.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

target = Path(sys.argv[1])
wanted = [Requirement("torch")]
linked: set[tuple[str, str]] = set()
while wanted:
    requirement = wanted.pop()
    own = distribution(requirement.name)
    for extra in {"", *requirement.extras}:
        if (own.name, extra) in linked:
            continue
        linked.add((own.name, extra))
        lines = [Requirement(line) for line in own.requires or []]
        wanted += [r for r in lines if r.marker is None or r.marker.evaluate({"extra": extra})]
    for top in {file.parts[0] for file in own.files or []} - {"..", "__pycache__"}:
        if not (target / top).exists():  # A folder of several, as `nvidia` is.
            (target / top).symlink_to(Path(str(own.locate_file(top))).resolve())
