"""The combination of PCGrad alone: T gradients of the glaucoma network's 80 tensors, to one.

python benchmarks/combination.py

The floor is the time of reading the T gradients twice and writing one. Each repetition has fresh
gradients; the peers, from PyPI, are left out where they are not installed.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import measured
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


def make_cases(count: int, device: str) -> dict[str, measured.Case]:
    shapes = [parameter.shape for parameter in MultiTaskUNet(width=64).parameters()]
    source = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(count)]
    parameters = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]

    def fresh() -> list[Any]:
        return [[part.clone() for part in gradient] for gradient in source]

    def floor() -> Callable[[], object]:
        gradients = fresh()

        def run() -> None:
            for _ in range(2):
                for gradient in gradients:
                    for part in gradient:
                        part.sum()
            torch._foreach_zero_(gradients[0])

        return run

    def ours() -> Callable[[], object]:
        gradients = fresh()

        def run() -> None:
            inner = gram(gradients).tolist()
            drawn = [torch.randperm(count).tolist() for _ in range(count)]
            orders = [[j for j in order if j != i] for i, order in enumerate(drawn)]
            combine(gradients, project_conflicts(inner, orders))

        return run

    def ours_gram() -> Callable[[], object]:
        gradients = fresh()
        return lambda: gram(gradients)

    def matrix_rate() -> Callable[[], object]:
        matrix = torch.randn(2048, 2048, device=device)
        return lambda: matrix @ matrix

    cases = {"floor": floor, "mtlopt": ours, "gram": ours_gram, "matrix": matrix_rate}

    if importlib.util.find_spec("torchjd"):
        from torchjd.aggregation import PCGrad as Aggregator
        from torchjd.autojac import jac_to_grad

        def stack(gradients: list[list[Tensor]]) -> None:
            # What its `mtl_backward` does with one gradient per task.
            for parameter, column in zip(parameters, zip(*gradients, strict=True), strict=True):
                parameter.grad = None
                parameter.jac = torch.stack(column)  # type: ignore[attr-defined]  # theirs

        def aggregate(optimize: bool) -> None:
            jac_to_grad(parameters, Aggregator(), optimize_gramian_computation=optimize)

        def torchjd(optimize: bool) -> measured.Case:
            def prepare() -> Callable[[], object]:
                gradients = fresh()

                def run() -> None:
                    stack(gradients)
                    aggregate(optimize)

                return run

            return prepare

        def stacked() -> Callable[[], object]:
            stack(source)
            return lambda: aggregate(True)

        cases |= {"torchjd": torchjd(False), "torchjd per tensor": torchjd(True)}
        cases["torchjd stacked"] = stacked

    if importlib.util.find_spec("pytorch_optimizer") and count <= SLOW:
        from pytorch_optimizer import PCGrad
        from pytorch_optimizer.optimizer import pcgrad

        method = PCGrad(torch.optim.SGD(parameters, lr=0.1), reduction="sum")

        def vector_space() -> Callable[[], object]:
            gradients = fresh()

            # What its `pack_grad` and `pc_backward` do, but for the backward passes.
            def run() -> None:
                flat = [pcgrad.flatten_grad(gradient) for gradient in gradients]
                masks = [
                    pcgrad.flatten_grad([torch.ones_like(part) for part in gradient])
                    for gradient in gradients
                ]
                combined = method.project_conflicting(flat, masks)
                sizes: list[int] = shapes  # type: ignore[assignment]  # what it is called with
                method.set_grad(
                    pcgrad.un_flatten_grad(combined, sizes),
                    pcgrad.un_flatten_grad(torch.stack(masks).sum(dim=0), sizes),
                )

            return run

        cases["pytorch_optimizer"] = vector_space
    return cases


def main() -> None:
    parser = measured.make_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=COUNTS, help="the values of T")
    options = parser.parse_args()
    if options.child:
        count = int(options.child)
        cases = make_cases(count, options.device)
        if count > SLOW:
            options.repetitions = max(options.repetitions // 2, 1)
        print(json.dumps(measured.seconds(cases, options.repetitions, options.device)))
        return

    values = sum(parameter.numel() for parameter in MultiTaskUNet(width=64).parameters())
    rows, rates = [], []
    for count in options.tasks:
        results = measured.in_processes(options, [str(count)] * options.processes)
        found = measured.medians(results)
        row: list[object] = [count, f"{1e3 * found['floor']:.1f}", f"{1e3 * found['mtlopt']:.1f}"]
        row.append(measured.ratio(results, "mtlopt", "floor"))
        for peer in PEERS:
            there = peer in found
            row.append(f"{1e3 * found[peer]:.1f}" if there else "")
            row.append(measured.ratio(results, peer, "mtlopt") if there else "")
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
    text += measured.write_table(columns, rows)
    text += (
        "\nAll start from T gradients apart, as backward passes leave them, and TorchJD stacks "
        "them, as its `mtl_backward` does. Gramian by tensor is its `optimize_gramian_computation`;"
        " with the stacking done before and left out of the time it is the column after. The Gram "
        "matrix takes 2 T² P operations; GFLOP/s beside those of a product of 2048 x 2048 "
        "matrices:\n\n"
    )
    text += measured.write_table(["T", "Gram matrix", "matrix product"], rates)
    measured.write_results(options, "combination", text)


if __name__ == "__main__":
    main()
