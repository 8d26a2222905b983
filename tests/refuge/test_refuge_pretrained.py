"""The encoder takes torchvision's ImageNet weights, and refuses what is something else."""

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision  # type: ignore[import-untyped]  # not typed
from safetensors.torch import save_file

import reproduce
import train
from refuge.errors import InputError
from refuge.files import read_json
from refuge.network import ENCODERS, MultiTaskUNet
from refuge.pretrained import load_pretrained
from tiny_photographs import ROOT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REAL = ROOT.parent / "shared/weights/vgg16_imagenet_features_fp16.safetensors"


def save_vgg(file: Path, depth: str) -> torch.nn.Sequential:
    """Saves the features of one of torchvision's networks, with statistics of their own."""
    vgg = torchvision.models.vgg
    features = vgg.make_layers(
        vgg.cfgs[{"vgg13": "B", "vgg16": "D"}[depth]], batch_norm=True
    ).eval()
    for layer in features:
        if isinstance(layer, torch.nn.BatchNorm2d):
            for name, smallest in (("weight", 0), ("running_mean", 0), ("running_var", 0.5)):
                layer.state_dict()[name].uniform_(smallest, 1)
    torch.save(features.state_dict(prefix="features."), file)
    assert isinstance(features, torch.nn.Sequential)
    return features


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_becomes_torchvisions_to_the_last_layer(encoder: str, tmp_path: Path) -> None:
    """With running statistics both are one function of a picture, which is normalised first."""
    vgg = save_vgg(tmp_path / "vgg.pth", encoder)
    network = MultiTaskUNet(encoder=encoder, norm="running").eval()
    load_pretrained(network, str(tmp_path / "vgg.pth"), encoder)
    pictures = torch.rand(2, 3, 32, 32)
    features = (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    inner: list[torch.Tensor] = []
    network.encoder[-1].register_forward_hook(lambda _, __, output: inner.append(output))
    with torch.no_grad():
        network(pictures, ("glaucoma",))
        expected = vgg[:-1](features)
    torch.testing.assert_close(inner[0], expected)


def test_batch_statistics_take_over_scale_and_shift_alone(tmp_path: Path) -> None:
    vgg = save_vgg(tmp_path / "vgg.pth", "vgg13")
    network = MultiTaskUNet()
    load_pretrained(network, str(tmp_path / "vgg.pth"), "vgg13")
    assert torch.equal(network.state_dict()["encoder.0.1.weight"], vgg.state_dict()["1.weight"])
    assert network.mean.flatten().tolist() == pytest.approx(MEAN)
    assert network.std.flatten().tolist() == pytest.approx(STD)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_weights_without_normalisation_and_in_half_precision(norm: str, tmp_path: Path) -> None:
    """As the plain VGG-16 is published; its convolutions alone are taken over, as float32."""
    vgg = torchvision.models.vgg
    features = vgg.make_layers(vgg.cfgs["D"]).half()
    save_file(features.state_dict(prefix="features."), tmp_path / "vgg16.safetensors")
    network = MultiTaskUNet(encoder="vgg16", norm=norm)
    before = network.state_dict()["encoder.0.1.weight"].clone()
    load_pretrained(network, str(tmp_path / "vgg16.safetensors"), "vgg16")
    convolutions = [layer for layer in features if isinstance(layer, torch.nn.Conv2d)]
    for own, theirs in zip(network.encoder_convolutions(), convolutions, strict=True):
        assert torch.equal(own.weight, theirs.weight.float())
        assert torch.equal(own.state_dict()["bias"], theirs.state_dict()["bias"].float())
    assert torch.equal(network.state_dict()["encoder.0.1.weight"], before)


@pytest.mark.skipif(not REAL.exists(), reason="ImageNet's weights are not beside the project")
def test_real_imagenet_weights_load() -> None:
    network = MultiTaskUNet(encoder="vgg16")
    load_pretrained(network, str(REAL), "vgg16")
    first = network.encoder_convolutions()[0].weight
    assert 0.1 < first.std() < 0.3  # Edge detectors, where the initialisation has 0.11 at most.
    assert first.abs().max() > 0.5


def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(InputError, match=r"vgg13_bn.*\.pth could not be downloaded .*--pretrained"):
        load_pretrained(MultiTaskUNet(), "imagenet", "vgg13")


def test_a_download_is_loaded_as_a_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library's own address and check; only the transport is replaced here."""
    vgg = save_vgg(tmp_path / "vgg.pth", "vgg13")
    urls = []

    def fetch(url: str, *_: object, check_hash: bool, **__: object) -> dict[str, torch.Tensor]:
        assert check_hash
        urls.append(url)
        return dict(vgg.state_dict(prefix="features."))

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    network = MultiTaskUNet()
    load_pretrained(network, "imagenet", "vgg13")
    assert urls == [torchvision.models.VGG13_BN_Weights.DEFAULT.url]
    assert torch.equal(network.encoder_convolutions()[0].weight, vgg.state_dict()["0.weight"])


def test_what_is_no_such_encoder_is_refused(tmp_path: Path) -> None:
    """Another depth, another width, a pickle, a damaged file: each in one line with its name."""
    save_vgg(tmp_path / "vgg16.pth", "vgg16")
    narrow = MultiTaskUNet(width=2)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(print))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    for name, network, rule in (
        ("vgg16.pth", MultiTaskUNet(), "must hold the 10 convolutions of vgg13 .* got 13"),
        ("pickle.pth", narrow, "not a readable checkpoint"),
        ("cut.safetensors", narrow, "not readable as safetensors"),
        ("none.safetensors", narrow, "not readable as safetensors"),
        ("none.pth", narrow, "not a readable checkpoint"),
    ):
        with pytest.raises(InputError, match=f"{name}: {rule}") as caught:
            load_pretrained(network, str(tmp_path / name), "vgg13")
        assert "\n" not in str(caught.value)
    save_vgg(tmp_path / "vgg13.pth", "vgg13")
    with pytest.raises(InputError, match=r"vgg13\.pth: not the weights of vgg13 \(size mismatch"):
        load_pretrained(narrow, str(tmp_path / "vgg13.pth"), "vgg13")


@pytest.mark.slow
def test_a_run_starts_from_a_file_and_resumes_without_it(
    repacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was loaded is in the checkpoint."""
    file, out = tmp_path / "vgg.pth", tmp_path / "run"
    save_vgg(file, "vgg13")
    flags = ["--data", repacked, "--size", "32", "--width", "64", "--epochs", "1", "--out", out]
    assert train.main([*map(str, flags), "--pretrained", str(file)]) == 0
    assert read_json(out / "config.json")["pretrained"] == str(file)
    state = torch.load(out / "last.pt", weights_only=True)["model"]
    assert state["mean"].flatten().tolist() == pytest.approx(MEAN)
    file.unlink()
    assert train.main(["--resume", "--out", str(out), "--epochs", "2"]) == 0
    flags[-1] = tmp_path / "other"
    capsys.readouterr()
    assert train.main([*map(str, flags), "--pretrained", str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train.py: error: {file}: not a")


@pytest.mark.slow
def test_table_2_is_of_networks_that_start_from_such_weights(
    repacked: Path, tmp_path: Path
) -> None:
    """Width 64 by itself; the published numbers beside are Table 2's."""
    save_vgg(tmp_path / "vgg.pth", "vgg13")
    command = ["table2", "--data", str(repacked), "--pretrained", str(tmp_path / "vgg.pth")]
    command += ["--size", "32", "--epochs", "1", "--seeds", "1", "--methods", "independent"]
    assert reproduce.main([*command, "--out", str(tmp_path)]) == 0
    config = read_json(tmp_path / "runs/independent-pretrained-lr0.001-seed0/config.json")
    assert (config["pretrained"], config["width"]) == (str(tmp_path / "vgg.pth"), 64)
    text = (tmp_path / "table2/table2.md").read_text(encoding="utf-8")
    assert "encoder from vgg.pth" in text
    assert "96.15 ± 0.14" in text
    assert "92.61 ± 0.38" not in text
