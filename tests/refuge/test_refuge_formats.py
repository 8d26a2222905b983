"""What clinics have: DICOM in, ONNX out."""

import csv
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import export
import predict
from refuge.best import open_run
from refuge.errors import InputError
from refuge.photographs.data import find_records
from refuge.photographs.records import read_photograph
from refuge.screening import reading as screening
from tiny_photographs import paint


def write_dicom(file: Path, pixels: np.ndarray, **tags: str) -> None:
    """Writes pixels as an ophthalmic photograph."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.OphthalmicPhotography8BitImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    data.PatientName, data.PatientID = "Doe^Jane", "4711"
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    data.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit, data.PixelRepresentation = 8 * pixels.itemsize - 1, 0
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    data.save_as(file)


def test_dicom_is_read_as_any_other_photograph(tmp_path: Path) -> None:
    picture = paint(0)[0]
    write_dicom(tmp_path / "a.dcm", np.asarray(picture))
    assert np.array_equal(np.asarray(read_photograph(tmp_path / "a.dcm")), np.asarray(picture))
    write_dicom(tmp_path / "grey.dcm", np.asarray(picture.convert("L")))
    assert read_photograph(tmp_path / "grey.dcm").mode == "RGB"
    write_dicom(tmp_path / "deep.dcm", np.asarray(picture.convert("L")).astype(np.uint16))
    with pytest.raises(InputError, match=r"deep\.dcm: a picture must have 8 bits a channel"):
        read_photograph(tmp_path / "deep.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    for damaged in (content[:600], content[:100], b""):
        (tmp_path / "cut.dcm").write_bytes(damaged)
        with pytest.raises(InputError, match=r"cut\.dcm: not a readable picture"):
            read_photograph(tmp_path / "cut.dcm")


@pytest.mark.parametrize(
    ("tags", "eye"),
    [
        ({"ImageLaterality": "L"}, "left"),
        ({"Laterality": "R"}, "right"),
        ({"ImageLaterality": "R", "Laterality": "L"}, "right"),
        ({"ImageLaterality": "B"}, ""),
        ({}, ""),
    ],
)
def test_the_eye_that_a_dicom_file_states_is_read(
    tmp_path: Path, tags: dict[str, str], eye: str
) -> None:
    """By screening, and in data sets where the table does not state another."""
    write_dicom(tmp_path / "a.dcm", np.asarray(paint(0)[0]), **tags)
    assert screening.read_photograph(tmp_path / "a.dcm", 32, True).eye == eye
    (tmp_path / "photographs.csv").write_text("picture,eye,split\na.dcm,,test\n")
    assert [record.eye for record in find_records(tmp_path)["test"]] == [eye]
    (tmp_path / "photographs.csv").write_text("picture,eye,split\na.dcm,left,test\n")
    assert [record.eye for record in find_records(tmp_path)["test"]] == ["left"]
    (tmp_path / "a.dcm").write_bytes(b"cut")
    assert "not a readable" in screening.read_photograph(tmp_path / "a.dcm", 32, True).error


def test_an_eye_that_contradicts_the_stated_one_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    finished: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once for the call, and on the photograph's card; otherwise the card shows the stated eye."""
    monkeypatch.setattr("refuge.screening.examining.find_eye", lambda *_: "left")
    for name, tags in (("a", {"ImageLaterality": "R"}), ("b", {"Laterality": "L"}), ("c", {})):
        write_dicom(tmp_path / f"{name}.dcm", np.asarray(paint(0)[0]), **tags)
    arguments = [str(finished["independent"]), str(tmp_path), "--out", str(tmp_path / "out")]
    assert predict.main(arguments) == 0
    warning = "the stated eye of 1 photographs (a.dcm) contradicts disc and fovea"
    assert warning in capsys.readouterr().out
    with (tmp_path / "out/predictions.csv").open(newline="") as opened:
        rows = {row["photograph"]: row for row in csv.DictReader(opened)}
    stated = {name: (row["eye"], row["stated_eye"]) for name, row in rows.items()}
    assert stated == {
        "a.dcm": ("left", "right"),
        "b.dcm": ("left", "left"),
        "c.dcm": ("left", ""),
    }
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.count("right as stated, but it looks like a left eye") == 1
    assert "contradicts disc and fovea" in page


def test_no_patient_data_leave_a_dicom_file(finished: dict[str, Path], tmp_path: Path) -> None:
    """Neither in tables and pages nor in pictures."""
    write_dicom(tmp_path / "a.dcm", np.asarray(paint(0)[0]))
    out = tmp_path / "out"
    run = str(finished["independent"])
    assert predict.main([run, str(tmp_path / "a.dcm"), "--out", str(out)]) == 0
    assert (out / "masks/a.png").exists()
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        assert b"Doe" not in content
        assert b"4711" not in content


def test_an_exported_network_gives_the_runs_answers(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    """Its logits on unseen pictures, by another engine."""
    run = finished["independent"]
    assert export.main([str(run), "--out", str(tmp_path)]) == 0
    described = json.loads((tmp_path / "network.json").read_text())
    trained, settings = open_run(run)
    assert described["size"] == settings.size
    assert described["outputs"] == list(trained.tasks)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    for seed in range(3):
        pixels = np.asarray(paint(seed)[0].resize((32, 32), Image.Resampling.BILINEAR))
        images = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
        expected = trained.ask(torch.from_numpy(images))
        found = session.run(described["outputs"], {"images": images})
        for task, logits in zip(described["outputs"], found, strict=True):
            probabilities = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
            assert np.abs(probabilities - expected[task]).max() < 1e-4, task
