"""The combination of PCGrad alone: T gradients of the glaucoma network's 80 tensors, to one.

python -m benchmarks.combination

The floor is the time of reading the T gradients twice and writing one. Each repetition has fresh
gradients; the peers, from PyPI, are left out where they are not installed.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from mtlopt._gradients.arithmetic import combine, gram
from mtlopt.methods.pcgrad import project_conflicts

sys.path.append(str(Path(__file__).parents[1] / "examples" / "refuge"))
from refuge.network import MultiTaskUNet

COUNTS = (2, 4, 8, 16, 40)
PEERS = {
    "torchjd": "TorchJD",
    "torchjd per tensor": "TorchJD, Gramian by tensor",
    "torchjd stacked": "TorchJD, stacked before",
    "pytorch_optimizer": "pytorch_optimizer",
}
SLOW = 4  # Above it the algorithm with projections in vector space takes minutes.


@dataclass
class Gradients:
    """T gradients to combine; every repetition gets fresh copies."""

    count: int
    device: str

    def __post_init__(self) -> None:
        shapes = [parameter.shape for parameter in MultiTaskUNet(width=64).parameters()]
        device = self.device
        self.parameters = [torch.zeros(s, device=device, requires_grad=True) for s in shapes]
        self.source = [[torch.randn(s, device=device) for s in shapes] for _ in range(self.count)]

    def fresh(self) -> list[list[Tensor]]:
        return [[part.clone() for part in gradient] for gradient in self.source]

    def case(self, combine_all: Callable[[Any], object]) -> timing.Case:
        """Returns a case that combines fresh gradients."""
        return lambda: partial(combine_all, self.fresh())


def read_and_write(gradients: Any) -> None:
    """Reads the T gradients twice and writes one: the floor."""
    for _ in range(2):
        for gradient in gradients:
            for part in gradient:
                part.sum()
    torch._foreach_zero_(gradients[0])


def project(gradients: Any) -> None:
    """Combines as `mtlopt.PCGrad` does."""
    count = len(gradients)
    inner = gram(gradients).tolist()
    drawn = [torch.randperm(count).tolist() for _ in range(count)]
    orders = [[j for j in order if j != i] for i, order in enumerate(drawn)]
    combine(gradients, project_conflicts(inner, orders))


def matrix_product(device: str) -> timing.Case:
    """Returns a case that multiplies two large matrices, for the rate of the device."""
    matrix = torch.randn(2048, 2048, device=device)
    return lambda: lambda: matrix @ matrix


def torchjd_cases(gradients: Gradients) -> dict[str, timing.Case]:
    """Returns the cases of TorchJD, which stacks the gradients first."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    parameters = gradients.parameters

    def stack(rows: Any) -> None:
        # What its `mtl_backward` does with one gradient per task.
        for parameter, column in zip(parameters, zip(*rows, strict=True), strict=True):
            parameter.grad = None
            parameter.jac = torch.stack(column)  # type: ignore[attr-defined]  # theirs

    def aggregate(optimize: bool) -> None:
        jac_to_grad(parameters, PCGrad(), optimize_gramian_computation=optimize)

    def stack_and_aggregate(rows: Any, optimize: bool) -> None:
        stack(rows)
        aggregate(optimize)

    def stacked() -> Callable[[], object]:
        stack(gradients.source)
        return lambda: aggregate(True)

    return {
        "torchjd": gradients.case(partial(stack_and_aggregate, optimize=False)),
        "torchjd per tensor": gradients.case(partial(stack_and_aggregate, optimize=True)),
        "torchjd stacked": stacked,
    }


def vector_space_case(gradients: Gradients) -> timing.Case:
    """Returns the case of pytorch_optimizer: its `pack_grad` and `pc_backward`, but no passes."""
    from pytorch_optimizer import PCGrad
    from pytorch_optimizer.optimizer import pcgrad

    method = PCGrad(torch.optim.SGD(gradients.parameters, lr=0.1), reduction="sum")
    shapes = [parameter.shape for parameter in gradients.parameters]
    sizes: list[int] = shapes  # type: ignore[assignment]  # what it is called with

    def run(rows: Any) -> None:
        flat = [pcgrad.flatten_grad(gradient) for gradient in rows]
        masks = [pcgrad.flatten_grad([torch.ones_like(part) for part in g]) for g in rows]
        combined = method.project_conflicting(flat, masks)
        method.set_grad(
            pcgrad.un_flatten_grad(combined, sizes),
            pcgrad.un_flatten_grad(torch.stack(masks).sum(dim=0), sizes),
        )

    return gradients.case(run)


def make_cases(count: int, device: str) -> dict[str, timing.Case]:
    gradients = Gradients(count, device)
    cases = {
        "floor": gradients.case(read_and_write),
        "mtlopt": gradients.case(project),
        "gram": gradients.case(gram),
        "matrix": matrix_product(device),
    }
    if importlib.util.find_spec("torchjd"):
        cases |= torchjd_cases(gradients)
    if importlib.util.find_spec("pytorch_optimizer") and count <= SLOW:
        cases["pytorch_optimizer"] = vector_space_case(gradients)
    return cases


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=COUNTS, help="the values of T")
    options = parser.parse_args()
    if options.child:
        count = int(options.child)
        cases = make_cases(count, options.device)
        if count > SLOW:
            options.repetitions = max(options.repetitions // 2, 1)
        print(json.dumps(timing.seconds(cases, options.repetitions, options.device)))
        return

    values = sum(parameter.numel() for parameter in MultiTaskUNet(width=64).parameters())
    rows, rates = [], []
    for count in options.tasks:
        results = timing.in_processes(options, [str(count)] * options.processes)
        found = timing.medians(results)
        row: list[object] = [count, f"{1e3 * found['floor']:.1f}", f"{1e3 * found['mtlopt']:.1f}"]
        row.append(timing.ratio(results, "mtlopt", "floor"))
        for peer in PEERS:
            there = peer in found
            row.append(f"{1e3 * found[peer]:.1f}" if there else "")
            row.append(timing.ratio(results, peer, "mtlopt") if there else "")
        rows.append(row)
        rate = 2 * count**2 * values / found["gram"] / 1e9
        rates.append([count, f"{rate:.0f}", f"{2 * 2048**3 / found['matrix'] / 1e9:.0f}"])
    text = (
        f"Combination of T gradients, {values:,} float32 numbers in 80 tensors, to one. Medians of "
        f"{options.processes} processes' medians, in milliseconds; ratios of one process's medians "
        "with their range over the processes.\n\n"
    )
    columns = ["T", "floor", "mtlopt", "x floor"]
    for peer in PEERS.values():
        columns += [peer, "x mtlopt"]
    text += timing.write_table(columns, rows)
    text += (
        "\nAll start from T gradients apart, as backward passes leave them, and TorchJD stacks "
        "them, as its `mtl_backward` does. Gramian by tensor is its `optimize_gramian_computation`;"
        " with the stacking done before and left out of the time it is the column after. The Gram "
        "matrix takes 2 T² P operations; GFLOP/s beside those of a product of 2048 x 2048 "
        "matrices:\n\n"
    )
    text += timing.write_table(["T", "Gram matrix", "matrix product"], rates)
    timing.write_results(options, "combination", text)


if __name__ == "__main__":
    main()
