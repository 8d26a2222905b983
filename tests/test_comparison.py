"""What the page that compares packages says of TorchJD and pytorch_optimizer, as installed."""

import inspect
import pkgutil
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import pytorch_optimizer
import torchjd
from torchjd import aggregation, autojac, scalarization

SOURCES = [file.read_text(encoding="utf-8") for file in Path(torchjd.__path__[0]).rglob("*.py")]


def test_torchjd_has_twenty_aggregators_and_twelve_scalarizers() -> None:
    bases = {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator"}
    aggregators = [
        name
        for name in set(aggregation.__all__) - bases
        if issubclass(getattr(aggregation, name), aggregation.Aggregator)
    ]
    scalarizers = set(scalarization.__all__) - {"Scalarizer"}
    assert len(aggregators) >= 20
    assert len(scalarizers) >= 12


@pytest.mark.parametrize("code", [r"torch\.distributed", "GradNorm", r"class \w+\(.*Optimizer"])
def test_torchjd_has_no_code_for_processes_no_gradnorm_and_no_optimizer_class(code: str) -> None:
    assert len(SOURCES) > 20
    assert not re.search(code, "".join(SOURCES))


def test_torchjds_pcgrad_draws_from_torchs_global_generator() -> None:
    assert "torch.randperm(dimension)" in inspect.getsource(aggregation.PCGradWeighting)


def test_torchjd_has_no_architectures_and_hosts_its_documentation() -> None:
    public = {m.name for m in pkgutil.iter_modules(torchjd.__path__) if not m.name.startswith("_")}
    assert public == {"aggregation", "autogram", "autojac", "linalg", "scalarization"}
    assert "Documentation, https://torchjd.org/" in metadata("torchjd").get_all("Project-URL", [])


def test_torchjds_docstring_has_a_figure_of_a_gpu() -> None:
    text = inspect.getdoc(autojac.jac_to_grad) or ""
    assert "on CUDA" in text
    assert "optimize_gramian_computation" in text


def test_pytorch_optimizer_has_a_hundred_classes_and_pcgrad_but_no_gradnorm() -> None:
    assert len(pytorch_optimizer.get_supported_optimizers()) > 100
    assert hasattr(pytorch_optimizer, "PCGrad")
    assert hasattr(pytorch_optimizer, "RotoGrad")
    assert not hasattr(pytorch_optimizer, "GradNorm")


def test_pytorch_optimizers_pcgrad_shuffles_with_pythons_random_and_reduces_nothing() -> None:
    source = inspect.getsource(pytorch_optimizer.PCGrad)
    assert "random.shuffle" in source
    assert "all_reduce" not in source
