"""Sphinx configuration: `make docs` builds with warnings as errors and without the network."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import mtlopt

project = "mtlopt"
author = "The mtlopt authors"
project_copyright = "2026, The mtlopt authors"
version = release = mtlopt.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # equations without a network
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "figures"]

html_theme = "furo"
html_title = f"mtlopt {release}"
pygments_dark_style = "monokai"  # the theme's own underlines what is imported
html_static_path = ["_static"]
html_css_files = ["site.css"]

copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath", "attrs_block", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # notebooks are kept without outputs; an error in one fails the build
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell
nb_merge_streams = True

autodoc_inherit_docstrings = False  # torch's refer to names that torch's own pages define
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names would need their inventories, and so the network.
    ("py:.*", r"(torch|torchjd|lightning|transformers|matplotlib|collections|typing)\..*"),
]


ROOT = Path(__file__).parents[1]
FIGURES = {  # A script, one of the files that it writes, what it reads besides the package
    "gradient_norms.py": ("gradient_norms.md", "examples/refuge/**/*.py"),
    "gradnorm_toy.py": ("gradnorm_toy.png", "tests/gradnorm_toy.py"),
    "tour.py": ("tour.png", "docs/getting-started.md"),
    "trajectories.py": ("balanced-light.png", "docs/figures/trajectories.py"),
}


def draw_figures(app: Any) -> None:
    """Draws each figure that is missing, or older than the code that it shows."""
    for name, (product, sources) in FIGURES.items():
        script, drawn = ROOT / "docs/figures" / name, ROOT / "docs/figures" / product
        read = [script, *ROOT.glob("mtlopt/**/*.py"), *ROOT.glob(sources)]
        newest = max(file.stat().st_mtime for file in read)
        if not drawn.exists() or drawn.stat().st_mtime < newest:
            print(f"running {name}")
            subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)


def require_every_public_name(app: Any, env: Any) -> None:
    """Fails the build where a public class or function is missing from the reference.

    Autodoc leaves out what has no docstring without a word.
    """
    documented = env.get_domain("py").objects
    for name in mtlopt.__all__:
        value = getattr(mtlopt, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if f"mtlopt.{name}" not in documented:
            raise RuntimeError(f"mtlopt.{name} is missing from the reference")


def show_public_bases(app: Any, name: str, obj: type, options: Any, bases: list[type]) -> None:
    """Replaces a private base by the nearest one that a reader can look up."""
    public = {value for value in vars(mtlopt).values() if inspect.isclass(value)}

    def is_public(base: type) -> bool:
        return base in public or not base.__module__.startswith("mtlopt")

    bases[:] = dict.fromkeys(next(filter(is_public, base.__mro__)) for base in bases)


def hide_abstract_signature(
    app: Any, what: str, name: str, obj: object, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Leaves out the arguments of the base class, which nobody calls."""
    return ("", "") if obj is mtlopt.MultiTaskOptimizer else None


def setup(app: Any) -> None:
    """Registers the functions above."""
    app.connect("builder-inited", draw_figures)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("autodoc-process-signature", hide_abstract_signature)
    app.connect("env-check-consistency", require_every_public_name)
