"""mtlopt: multi-task optimizers for PyTorch that replace `torch.optim.Adam(...)` in your loop."""

from mtlopt._core.optimizer import MultiTaskOptimizer
from mtlopt.methods.aggregated import Aggregated
from mtlopt.methods.alternating import AlternatingOptimizer
from mtlopt.methods.balanced import Balanced
from mtlopt.methods.conflicts import ConflictReport, conflicts
from mtlopt.methods.gradnorm import GradNorm
from mtlopt.methods.independent import IndependentOptimizer, random_groups
from mtlopt.methods.joint import JointOptimizer
from mtlopt.methods.pcgrad import PCGrad
from mtlopt.methods.scalarized import Scalarized

__version__ = "0.1.0"

__all__ = [
    "Aggregated",
    "AlternatingOptimizer",
    "Balanced",
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
