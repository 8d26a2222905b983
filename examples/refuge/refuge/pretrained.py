"""Loads ImageNet weights into the encoder, from torchvision or from a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision  # type: ignore[import-untyped]  # not typed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from refuge.errors import InputError
from refuge.files import load_checkpoint
from refuge.network import MultiTaskUNet

WIDTH = 64  # channels of VGG's first stage


def load_pretrained(network: MultiTaskUNet, source: str, encoder: str) -> None:
    """Loads ImageNet weights into the encoder and sets the matching input normalisation.

    Batch-norm weights are loaded if the network has batch norm; running statistics only if it
    tracks them.

    Args:
        network: A network of width 64.
        source: "imagenet", which torchvision downloads (with batch normalisation), or a file: a
            state dict of torchvision's VGG, by `torch.save` or as safetensors.
        encoder: "vgg13" or "vgg16".

    Raises:
        InputError: The weights are not available, or not those of such an encoder.
    """
    weights = torchvision.models.get_model_weights(f"{encoder}_bn").DEFAULT
    state = _download(weights) if source == "imagenet" else _read(Path(source))
    name = weights.url if source == "imagenet" else source
    convolutions = _layers(state, dimensions=4)
    norms = _layers(state, dimensions=1)
    own = network.encoder_convolutions()
    own_norms = [m for m in network.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    if len(convolutions) != len(own) or len(norms) not in (0, len(own)):
        raise InputError(
            f"{name}: must hold the {len(own)} convolutions of {encoder} under "
            f"`features.N.weight`, got {len(convolutions)}."
        )
    layers: list[tuple[nn.Module, dict[str, Tensor]]] = [*zip(own, convolutions, strict=True)]
    if norms and own_norms:
        layers += zip(own_norms, norms, strict=True)
    for layer, values in layers:
        kept = {key: value for key, value in values.items() if key in layer.state_dict()}
        try:
            layer.load_state_dict(kept)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(f"{name}: not the weights of {encoder} ({reason}).") from error
    published = weights.transforms()
    network.mean.copy_(torch.tensor(published.mean).view(3, 1, 1))
    network.std.copy_(torch.tensor(published.std).view(3, 1, 1))


def _download(weights: torchvision.models.WeightsEnum) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"`--pretrained imagenet`: {weights.url} could not be downloaded ({error}). Fetch it "
            "where there is a network, and give the file: `--pretrained FILE`."
        ) from error
    return state


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return load_checkpoint(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable as safetensors ({error}).") from error


def _layers(state: dict[str, Tensor], dimensions: int) -> list[dict[str, Tensor]]:
    """Returns the tensors of each layer of `features` whose weight has this many dimensions."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if part == "features" and number.isdecimal() and isinstance(value, Tensor):
            layers.setdefault(int(number), {})[name] = value
    ordered = [layers[number] for number in sorted(layers)]
    return [each for each in ordered if "weight" in each and each["weight"].dim() == dimensions]
