"""mtlopt: multi-task optimizers for PyTorch, one object in the place of `torch.optim.Adam(...)`."""

from mtlopt._aggregated import Aggregated
from mtlopt._alternating import AlternatingOptimizer
from mtlopt._base import MultiTaskOptimizer
from mtlopt._conflicts import ConflictReport, conflicts
from mtlopt._gradnorm import GradNorm
from mtlopt._independent import IndependentOptimizer, random_groups
from mtlopt._joint import JointOptimizer
from mtlopt._pcgrad import PCGrad
from mtlopt._scalarized import Scalarized

__version__ = "0.1.0"

__all__ = [
    "Aggregated",
    "AlternatingOptimizer",
    "ConflictReport",
    "GradNorm",
    "IndependentOptimizer",
    "JointOptimizer",
    "MultiTaskOptimizer",
    "PCGrad",
    "Scalarized",
    "conflicts",
    "random_groups",
]
