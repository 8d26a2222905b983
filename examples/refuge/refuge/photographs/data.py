"""Data sets of photographs, decoded once and held as tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from refuge.errors import InputError
from refuge.files import read_tensors, write_tensors
from refuge.metrics import vertical_cup_to_disc_ratio
from refuge.network import TASKS
from refuge.photographs.crops import crop_records
from refuge.photographs.folds import deal
from refuge.photographs.frames import Frame, choose_frame
from refuge.photographs.imported import imported_records, is_imported
from refuge.photographs.phantoms import phantom_records
from refuge.photographs.records import Record
from refuge.photographs.released import is_released, released_records
from refuge.photographs.repacked import SPLITS, is_repacked, repacked_records

PHANTOM = 256  # side of a phantom, which is resized for the network as a photograph is
HELD_OUT = 0.05  # validation share if there is no such split; small sets need the rest to train


@dataclass(frozen=True)
class Batch:
    """Photographs and their ground truth.

    Attributes:
        images: (n, 3, size, size) in [0, 1].
        targets: disc and cup (n, size, size), fovea (n, 2) in input pixels, glaucoma (n,);
            meaningless where a picture is not annotated.
        known: For each task (n,), whether the truth is known; on the CPU, to avoid waiting for a
            device.
    """

    images: Tensor
    targets: dict[str, Tensor]
    known: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """Copies pictures and truth to a device asynchronously."""
        targets = {task: t.to(device, non_blocking=True) for task, t in self.targets.items()}
        return Batch(self.images.to(device, non_blocking=True), targets, self.known)

    def labelled(self, task: str) -> Tensor:
        """Returns the rows whose truth is known."""
        return self.known[task].nonzero().squeeze(1)

    def only(self, tasks: Sequence[str]) -> Batch:
        """Returns the pictures annotated for at least one of the tasks."""
        known = torch.stack([self.known[task] for task in tasks]).any(0)
        if known.all():
            return self
        rows = known.nonzero().squeeze(1).to(self.images.device, non_blocking=True)
        targets = {task: target[rows] for task, target in self.targets.items()}
        return Batch(self.images[rows], targets, {t: k[known] for t, k in self.known.items()})


class Photographs(Dataset[Batch]):
    """A split: resized photographs and masks in memory, points in original pixels.

    Args:
        records: The photographs to decode.
        size: Side of the network's input in pixels.
        title: Title of the progress bar.
        cache: File for the decoded tensors; None to cache nothing.
        crop: Whether to cut photographs to their field of view, padded to a square.
    """

    def __init__(
        self,
        records: Sequence[Record],
        size: int,
        title: str = "",
        cache: Path | None = None,
        crop: bool = False,
    ) -> None:
        self.size = size
        self.records = records
        self.names = [record.name for record in records]
        self.known = {
            task: torch.tensor([task in record.annotated for record in records], dtype=torch.bool)
            for task in TASKS
        }
        labels = [-1 if record.label is None else record.label for record in records]
        self.labels = torch.tensor(labels)
        nowhere = (float("nan"), float("nan"))
        self.points = torch.tensor([record.fovea or nowhere for record in records])
        key = _fingerprint(records, size, crop) if cache else ""
        tensors = read_tensors(cache, key) if cache else None
        if tensors is None:
            tensors = _decode(records, size, title, crop)
            if cache:
                write_tensors(cache, tensors, key)
        self.pictures, self.masks = tensors["pictures"], tensors["masks"]
        self.sizes, self.ratios = tensors["sizes"], tensors["ratios"]
        # The part of each photograph that the network sees, and what its field of view is like.
        self.frames, self.fields = tensors["frames"], tensors["fields"]
        # The tensors of a batch; `keep_on` may move these to a device.
        self._kept = [self.pictures, self.masks, self.input_points(), self.labels]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: int | Sequence[int] | Tensor) -> Batch:
        """Returns the photographs of some rows as a batch, on the pictures' device."""
        rows = torch.as_tensor(rows).reshape(-1)
        known = {task: known[rows] for task, known in self.known.items()}
        rows = rows.to(self._kept[0].device, non_blocking=True)
        pictures, masks, points, labels = (each[rows] for each in self._kept)
        targets = {"disc": masks < 255, "cup": masks == 0, "fovea": points, "glaucoma": labels}
        return Batch(pictures.float() / 255, targets, known)

    def input_points(self) -> Tensor:
        """Returns the foveas in pixels of the network's input."""
        # Whole coordinates are the centres of pixels, not their corners.
        corners, sides = self.frames[:, :2], self.frames[:, 2:]
        return (self.points + 0.5 - corners) * self.size / sides - 0.5

    def frame(self, row: int) -> Frame:
        """Returns the part of a photograph that the network sees."""
        return Frame(*self.frames[row].tolist())

    def keep_on(self, device: torch.device) -> None:
        """Moves pictures and masks to a GPU with enough memory, to save later copies."""
        if device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(device)
        if self.pictures.nbytes + self.masks.nbytes < free / 4:
            self._kept = [each.to(device) for each in self._kept]

    def tasks(self) -> tuple[str, ...]:
        """Returns the tasks that at least one picture is annotated for."""
        return tuple(task for task in TASKS if self.known[task].any())


def describe(data: str) -> str:
    """Returns the name of the photographs behind `--data`, for figures and tables."""
    return "synthetic phantoms" if data == "phantom" else Path(data).name


def shrink(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resizes a photograph to the network's input, (3, size, size)."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def load_splits(
    data: str,
    size: int,
    seed: int,
    cache: Path | None = None,
    wanted: Sequence[str] = SPLITS,
    *,
    fold: tuple[int, int] | None = None,
    second_pass: bool = False,
    crop: bool = False,
) -> dict[str, Photographs]:
    """Detects the kind of data and decodes it.

    Args:
        data: "phantom", or a folder with REFUGE as released or in re-packed form.
        size: Side of the network's input in pixels.
        seed: Seed for the pictures held out if there is no validation split.
        cache: Folder for decoded tensors; phantoms need none.
        wanted: Subset of "train", "val" and "test".
        fold: The fold to test and the number of folds; None to use the data's own splits.
        second_pass: Whether to add crops of the discs to the training pictures.
        crop: Whether to cut photographs to their field of view, padded to a square.

    Raises:
        InputError: The folder is not a data set, or a file in it cannot be used.
    """
    folder = Path(data)
    try:
        splits = phantom_records(max(size, PHANTOM)) if data == "phantom" else find_records(folder)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    if fold:
        if (count := sum(map(len, splits.values()))) < fold[1]:
            raise InputError(f"`--fold` must be of at most {count} (the pictures), got {fold[1]}.")
        splits = deal(splits, *fold, seed)
    elif not splits.get("val") and len(splits.get("train", ())) > 1:
        splits |= _hold_out(splits["train"], seed)
    for split in wanted:
        if not splits.get(split):
            raise InputError(f"{folder}: has no pictures for the {split} split.")
    if second_pass and "train" in wanted:
        splits["train"] = splits["train"] + crop_records(splits["train"])
    decoded = {}
    for split in wanted:
        file = None
        if cache and data != "phantom":
            parts = [folder.resolve().name, split, str(size)]
            parts += [f"fold{fold[0]}of{fold[1]}"] if fold else []
            parts += ["discs"] if second_pass and split == "train" else []
            parts += ["field"] if crop else []
            file = cache / f"{'-'.join(parts)}.pt"
        decoded[split] = Photographs(splits[split], size, f"reading {split}", file, crop)
    return decoded


def load_all(data: str, size: int, crop: bool, cache: Path | None = None) -> Photographs:
    """Decodes the photographs of all splits of a data set as one."""
    folder = Path(data)
    splits = phantom_records(max(size, PHANTOM)) if data == "phantom" else find_records(folder)
    records = [record for split in splits.values() for record in split]
    if not records:
        raise InputError(f"{folder}: has no pictures.")
    parts = [folder.resolve().name, "all", str(size), *(["field"] if crop else [])]
    file = cache / f"{'-'.join(parts)}.pt" if cache and data != "phantom" else None
    return Photographs(records, size, "reading", file, crop)


def find_repeats(first: Photographs, second: Photographs) -> list[tuple[str, str]]:
    """Returns the names of photographs that are in both, by what the network sees of them."""
    names = {
        picture.numpy().tobytes(): n for picture, n in zip(first.pictures, first.names, strict=True)
    }
    found = []
    for picture, name in zip(second.pictures, second.names, strict=True):
        if (same := names.get(picture.numpy().tobytes())) is not None:
            found.append((same, name))
    return found


def raise_fault(error: InputError) -> None:
    """Raises the first fault of a data set."""
    raise error


def find_records(
    folder: Path, report: Callable[[InputError], None] = raise_fault
) -> dict[str, list[Record]]:
    """Detects the form of a data set and reads what is known about its photographs.

    Args:
        folder: The data set.
        report: Takes each fault of a photograph, which is left out if it does not raise.

    Raises:
        InputError: The folder is not a data set.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: `--data` must be a folder or the word phantom.")
    if is_repacked(folder):
        return repacked_records(folder, report)
    if is_imported(folder):
        return imported_records(folder, report)
    if is_released(folder):
        return released_records(folder, report)
    raise InputError(
        f"{folder}: not a data set; expected train/index.json or Training400 in this folder, "
        "or photographs.csv."
    )


def _hold_out(records: list[Record], seed: int) -> dict[str, list[Record]]:
    count = max(1, round(HELD_OUT * len(records)))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        "train": [records[i] for i in sorted(order[count:])],
        "val": [records[i] for i in sorted(order[:count])],
    }


def _fingerprint(records: Sequence[Record], size: int, crop: bool) -> str:
    """Returns a key that changes with the size, the annotations and the files."""
    lines = [f"{size} {crop}"]
    for record in records:
        lines += [f"{record.name} {sorted(record.annotated)} {record.fovea}"]
        for file in record.files:
            try:
                status = file.stat()
            except OSError as error:
                raise InputError(f"{file}: not readable ({error.strerror}).") from error
            # Masks all have one size and may have one mtime; only ctime reveals a renamed file.
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            lines += [f"{file} {status.st_size} {times}"]
    return "\n".join(lines)


def _decode(records: Sequence[Record], size: int, title: str, crop: bool) -> dict[str, Tensor]:
    def decode(
        record: Record,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Tensor, float, Tensor, Tensor]:
        picture, mask = record.read()
        frame, field = choose_frame(picture, crop and not record.whole)
        ratio = float("nan")
        if mask is not None and {"disc", "cup"} <= record.annotated:
            values = np.asarray(mask)
            ratio = vertical_cup_to_disc_ratio(values < 255, values == 0)
        mask = frame.cut(mask or Image.new("L", picture.size, 255), outside=255)
        small_mask = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))
        return (
            shrink(frame.cut(picture), size),
            small_mask,
            torch.tensor(picture.size),
            ratio,
            torch.tensor(frame),
            torch.from_numpy(field),
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(decode, records), title, len(records), unit="picture", disable=None)
        pictures, masks, sizes, ratios, frames, fields = zip(*bar, strict=True)
    return {
        "pictures": torch.from_numpy(np.stack(pictures)),
        "masks": torch.from_numpy(np.stack(masks)),
        "sizes": torch.stack(sizes),
        "ratios": torch.tensor(ratios, dtype=torch.float64),
        "frames": torch.stack(frames),
        "fields": torch.stack(fields),
    }
