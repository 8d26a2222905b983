"""Files are written whole or not at all, and read without running code."""

import pickle
from pathlib import Path

import pytest
import torch

from refuge.errors import InputError
from refuge.files import load_checkpoint, read_json, save_checkpoint, write_json, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A kill in the middle must not cost the previous checkpoint."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"epoch": 1})

    def fail(opened: object) -> None:
        opened.write(b"half")  # type: ignore[attr-defined]  # a binary file
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, fail)
    assert load_checkpoint(file) == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    state = {"weights": torch.randn(3), "history": [{"epoch": 1, "loss": None}], "best": (1.5, 2)}
    save_checkpoint(tmp_path / "a.pt", state)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))  # type: ignore[arg-type]  # mixed values
    assert loaded == state


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("ran",))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps(Trap())])
def test_what_is_no_checkpoint_is_refused_by_name(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pickle's code must not run either."""
    file = tmp_path / "last.pt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"last\.pt: not a readable checkpoint") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_json_holds_no_nan(tmp_path: Path) -> None:
    """`NaN` is not JSON; a metric that could not be measured is null."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"cup_dice": float("nan")})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "metrics.json", {"cup_dice": None})
    assert read_json(tmp_path / "metrics.json") == {"cup_dice": None}


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/a\.json: cannot be written \(Not a directory\)"):
        write_json(tmp_path / "file" / "a.json", {})
