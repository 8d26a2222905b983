"""mtlopt: multi-task optimizers for PyTorch, one object in the place of `torch.optim.Adam(...)`."""

from mtlopt._alternating import AlternatingOptimizer
from mtlopt._base import MultiTaskOptimizer
from mtlopt._independent import IndependentOptimizer, random_groups
from mtlopt._joint import JointOptimizer

__version__ = "0.1.0"

__all__ = [
    "AlternatingOptimizer",
    "IndependentOptimizer",
    "JointOptimizer",
    "MultiTaskOptimizer",
    "random_groups",
]
