"""Iterations of the glaucoma study as published, and as fast as they can honestly go.

python -m benchmarks.refuge_step

The paper's configuration (width 64, 256 x 256 pixels, batch 8, Adam) with the paper's methods, as
`train.py` trains them, in four ways:

- decoded: each picture is read again from its JPEG, and its mask from a BMP, decoded by as many
  threads as there are cores, resized, and its vCDR measured, in every epoch; true float32;
- float32: pictures lie decoded on the device; true float32, no TF32;
- tf32: the same with TF32 where convolutions may use it, torch's default (CUDA alone);
- fast: the same with bfloat16 autocast, channels last, the compiled network and fused Adam.

Without a CUDA device the shape is a small one, unless given, and the results say so.
"""

import argparse
import atexit
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing

sys.path.append(str(Path(__file__).parents[1] / "examples" / "refuge"))
from refuge.methods import build_network, build_optimizer, compile_network
from refuge.photographs.data import Batch, Photographs
from refuge.photographs.phantoms import phantom_records
from refuge.photographs.records import Record, file_record
from refuge.settings import Settings
from refuge.study import tables
from train import make_losses

# Methods and the paper's seconds of one forward and backward pass (Titan Xp, torch 1.2).
PUBLISHED = {"joint": ""} | {method: row[1] for method, row in tables.PUBLISHED["table1"].items()}
WAYS = ("decoded", "float32", "tf32", "fast")
ITERATIONS = 15_000  # 300 epochs of 400 pictures in batches of 8
ORIGINAL = 2056  # pixels of REFUGE's training pictures in height


@dataclass(frozen=True)
class Case:
    """One method in one way."""

    method: str
    way: str
    options: argparse.Namespace

    def prepare(self) -> Callable[[], object]:
        """Makes network, optimizer and pictures; returns an iteration."""
        options, fast = self.options, self.way == "fast"
        torch.backends.cudnn.allow_tf32 = self.way in ("tf32", "fast")
        settings = Settings(
            method=self.method,
            width=options.width,
            size=options.size,
            batch_size=options.batch_size,
            device=options.device,
            amp="bf16" if fast else "off",
            compile=fast and not options.eager,
        )
        device = settings.torch_device()
        network = build_network(settings).to(device)
        if fast:
            network.to(memory_format=torch.channels_last)
        if settings.compile:
            compile_network(network, settings)
        optimizer = build_optimizer(settings, network, None, fused=fast)
        losses = make_losses(settings, network)
        network.train()
        draw = self._batches(device)
        return lambda: optimizer.step(losses, draw())

    def _batches(self, device: torch.device) -> Callable[[], Batch]:
        size, count = self.options.size, self.options.batch_size
        if self.way == "decoded":
            folder = tempfile.TemporaryDirectory()
            records = write_pictures(Path(folder.name), count, self.options.original)
            atexit.register(folder.cleanup)
            every = torch.arange(count)
            return lambda: Photographs(records, size)[every].to(device)
        pictures = Photographs(phantom_records(size, {"train": 3 * count})["train"], size)
        pictures.keep_on(device)
        return lambda: pictures[torch.randperm(len(pictures))[:count]].to(device)


def write_pictures(folder: Path, count: int, side: int) -> list[Record]:
    """Writes phantoms as REFUGE's pictures are: large JPEGs, and masks as BMP."""
    records = []
    for record in phantom_records(256, {"train": count})["train"]:
        picture, mask = record.read()
        assert mask is not None
        file = folder / f"{Path(record.name).stem}.jpg"
        picture.resize((side, side)).save(file, quality=95)
        mask.resize((side, side), 0).save(file.with_suffix(".bmp"))
        x, y = record.fovea or (0, 0)
        point = (x * side / 256, y * side / 256)
        known = record.annotated
        records.append(file_record(file, file.with_suffix(".bmp"), known, record.label, point))
    return records


def matrix_rate(way: str, device: str) -> float:
    """Measures the FLOP/s of a matrix product in the precision of a way."""
    side = 8192 if device.startswith("cuda") else 512
    dtype = torch.bfloat16 if way == "fast" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = way == "tf32"
    one = torch.randn(side, side, device=device, dtype=dtype)
    times = timing.seconds({"": lambda: lambda: one @ one}, 7, device)[""]
    return 2 * side**3 / sorted(times)[len(times) // 2]


def count_flops(method: str, options: argparse.Namespace) -> int:
    """Counts the floating-point operations of an iteration."""
    step = Case(method, "float32", options).prepare()
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def measure(case: Case) -> dict[str, float]:
    """Takes the iterations of one case, without waiting for the device between them."""
    step, device = case.prepare(), case.options.device
    for _ in range(3):  # Compilation, and cuDNN's choice of algorithms.
        step()
    timing.synchronize(device)
    times = []
    for _ in range(case.options.repetitions):
        start = time.perf_counter()
        for _ in range(case.options.iterations):
            step()
        timing.synchronize(device)
        times.append((time.perf_counter() - start) / case.options.iterations)
    return {"seconds": sorted(times)[len(times) // 2], "bytes": timing.peak_memory(device)}


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.set_defaults(processes=3)
    parser.add_argument("--width", type=int, help="default: 64; 8 without CUDA")
    parser.add_argument("--size", type=int, help="default: 256; 64 without CUDA")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--original", type=int, help="side of the JPEGs; default: as REFUGE's")
    parser.add_argument("--iterations", type=int, default=5, help="timed as one")
    parser.add_argument("--methods", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    options.width = options.width or (64 if cuda else 8)
    options.size = options.size or (256 if cuda else 64)
    options.original = options.original or ORIGINAL
    if not cuda:
        options.ways = [way for way in options.ways if way != "tf32"]
    if options.child:
        method, _, way = options.child.partition(" ")
        print(json.dumps(measure(Case(method, way, options))))
        return

    shape = ["--width", str(options.width), "--size", str(options.size), "--batch-size"]
    shape += [str(options.batch_size), "--original", str(options.original)]
    shape += ["--iterations", str(options.iterations), *(["--eager"] if options.eager else [])]
    cases = [f"{method} {way}" for way in options.ways for method in options.methods]
    turns = [timing.in_processes(options, cases, shape) for _ in range(options.processes)]
    work = {method: count_flops(method, options) for method in options.methods}
    rate = {way: matrix_rate(way, options.device) for way in options.ways}

    def median(case: str, key: str) -> float:
        found = sorted(turn[cases.index(case)][key] for turn in turns)
        return float(found[len(found) // 2])

    rows = []
    for case in cases:
        method, way = case.split()
        seconds = median(case, "seconds")
        row = [way, method, f"{seconds:.4f}", PUBLISHED[method]]
        for other in (f"joint {way}", f"{method} float32"):
            row.append(f"{seconds / median(other, 'seconds'):.2f}" if other in cases else "")
        row += [f"{median(case, 'bytes') / 1e6:.0f}", f"{work[method] / seconds / 1e9:.0f}"]
        row += [f"{work[method] / seconds / rate[way]:.2f}", f"{seconds * ITERATIONS / 60:.0f}"]
        rows.append(row)
    small = "" if cuda else " No CUDA device was at hand, so this is a small shape on the CPU."
    text = (
        f"Width {options.width}, {options.size} x {options.size} pixels, batch of "
        f"{options.batch_size}, JPEGs of {options.original} x {options.original}.{small} Medians "
        f"of {options.processes} processes' medians of {options.repetitions} times "
        f"{options.iterations} iterations; the cases take turns. `fast` is "
        f"{'not compiled' if options.eager else 'compiled'}.\n\n"
    )
    columns = ["way", "method", "s per iteration", "as published, s", "x joint", "x float32"]
    columns += ["peak memory, MB", "GFLOP/s", "of the matrix rate", "15,000 iterations, min"]
    text += timing.write_table(columns, rows) + "\nMatrix products: "
    text += ", ".join(f"{value / 1e9:.0f} GFLOP/s for {way}" for way, value in rate.items()) + ".\n"
    timing.write_results(options, "refuge_step", text)


if __name__ == "__main__":
    main()
