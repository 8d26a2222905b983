"""Loads programs that lie outside the packages."""

import importlib.util
from pathlib import Path
from typing import Any


def load_script(path: Path) -> Any:
    """Runs a file and returns it as a module, of which there may be several."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
