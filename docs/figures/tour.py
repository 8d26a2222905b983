"""Draws tour.png: what the blocks of "Getting started" draw, seconds on one core."""

import os
import re
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

page = (HERE.parent / "getting-started.md").read_text(encoding="utf-8")
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    exec(compile("\n".join(BLOCK.findall(page)), "getting-started.md", "exec"), {})
    (HERE / "tour.png").write_bytes(Path("tour.png").read_bytes())
    os.chdir(HERE)
