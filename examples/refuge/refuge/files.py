"""Atomic writing of files, and reading of checkpoints without running code."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from refuge.errors import InputError


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a temporary file and renames it, so that a kill leaves the old file or the new one.

    Args:
        file: The file to write; its folder must exist.
        write: Writes the content to an open binary file.

    Raises:
        InputError: The file cannot be written.
    """
    draft = file.with_name(f"{file.name}.part")
    try:
        try:
            with draft.open("wb") as opened:
                write(opened)
                opened.flush()
                os.fsync(opened.fileno())
            draft.replace(file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}).") from error


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, unless they exist.

    Raises:
        InputError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}).") from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes that lock the same folder out of it.

    Raises:
        InputError: Another process has locked it.
    """
    file = folder / ".lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{folder}: another process is writing into this folder.") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be locked ({error.strerror}).") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        lock.release()


def write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_whole(file, lambda opened: opened.write(text.encode()))


def write_csv(file: Path, header: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table as CSV atomically; None becomes an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(header), *rows])
    write_text(file, text.getvalue())


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically; NaN and infinity are errors."""
    write_text(file, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: The file is missing or does not contain an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: must contain a JSON object.")
    return content


def save_checkpoint(file: Path, state: Mapping[str, Any]) -> None:
    """Saves tensors and plain containers atomically."""
    content = io.BytesIO()  # On a full disk torch.save itself does not raise an OSError.
    torch.save(dict(state), content)
    write_whole(file, lambda opened: opened.write(content.getbuffer()))


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Loads a checkpoint to the CPU without running code from it.

    Raises:
        InputError: The file is missing or not a checkpoint.
    """
    try:
        with warnings.catch_warnings():
            # torch warns before it refuses another program's file.
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            # torch's own message advises to run whatever code is in the file.
            reason = "it is damaged, or contains more than tensors and plain containers"
        raise InputError(f"{file}: not a readable checkpoint ({reason}).") from error
    if not isinstance(state, dict):
        raise InputError(f"{file}: not a checkpoint of this program.")
    return state


def write_tensors(file: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Saves tensors together with a key that says what they were made from."""
    make_folder(file.parent)
    # Several runs may write the same file at the same time.
    draft = file.with_name(f"{file.stem}-{os.getpid()}.pt")
    save_checkpoint(draft, {"key": key, **tensors})
    draft.replace(file)


def read_tensors(file: Path, key: str) -> dict[str, Tensor] | None:
    """Loads saved tensors; None if there are none or their key differs."""
    try:
        tensors = load_checkpoint(file)
    except InputError:
        return None
    return tensors if tensors.pop("key", None) == key else None
