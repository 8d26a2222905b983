"""Takes one step with the installed wheel, where torch is the only other package."""

import importlib.metadata
import importlib.resources
import importlib.util
import sys

import torch

import mtlopt

assert "site-packages" in mtlopt.__file__, mtlopt.__file__
assert importlib.metadata.version("mtlopt") == mtlopt.__version__
assert importlib.resources.files("mtlopt").joinpath("py.typed").is_file()
for optional in ("matplotlib", "numpy", "torchjd", "torchvision"):
    assert importlib.util.find_spec(optional) is None, f"{optional} is installed: not a clean place"

weight = torch.nn.Parameter(torch.ones(2))
optimizer = mtlopt.IndependentOptimizer(torch.optim.SGD, [weight], ("a", "b"), lr=0.25)
values = optimizer.step(lambda tasks: {task: weight.square().sum() for task in tasks})

# Twice w <- w - 0.25 * 2w: 1 -> 0.5 -> 0.25; the losses are 2 and then 0.5.
assert torch.equal(weight, torch.full((2,), 0.25)), weight
assert {task: value.item() for task, value in values.items()} == {"a": 2.0, "b": 0.5}, values
print(
    f"mtlopt {mtlopt.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}: ok"
)
