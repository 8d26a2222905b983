"""The field of view is found, and everything goes into its square and back exactly."""

import numpy as np
import pytest
import torch
from PIL import Image

from refuge.photographs.augmentation import mirror
from refuge.photographs.data import Batch, Photographs
from refuge.photographs.frames import Frame, choose_frame, find_field
from refuge.photographs.records import Record


def camera(width: int, height: int, x: float, y: float, radius: float) -> Image.Image:
    """Paints a reddish field of view around (x, y) on black, with a camera's noise and a label."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    inside = np.hypot(columns - x, rows - y) <= radius
    pixels = rng.integers(0, 6, (height, width, 3)).astype(np.float64)
    pixels[inside] += (150, 70, 30)
    pixels[2:8, 2:14] = 255  # lettering in the corner
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "circle"),
    [
        ((320, 240), (170.0, 120.0, 110.0)),  # wide, not in the middle
        ((240, 320), (120.0, 150.0, 100.0)),  # portrait
        ((300, 200), (150.0, 100.0, 130.0)),  # cut above and below
        ((200, 200), (100.0, 100.0, 98.0)),
    ],
)
def test_the_field_of_view_is_what_the_network_sees(
    size: tuple[int, int], circle: tuple[float, float, float]
) -> None:
    """A square around it, within two pixels, whatever else is in the picture."""
    picture = camera(*size, *circle)
    frame, features = choose_frame(picture, crop=True)
    x, y, radius = circle
    left, right = max(0, x - radius), min(size[0], x + radius)
    top, bottom = max(0, y - radius), min(size[1], y + radius)
    side = max(right - left, bottom - top)
    assert frame.width == frame.height == pytest.approx(side, abs=3)
    assert frame.left + frame.width / 2 == pytest.approx((left + right) / 2, abs=2)
    assert frame.top + frame.height / 2 == pytest.approx((top + bottom) / 2, abs=2)
    assert np.isfinite(features).all()
    assert choose_frame(picture, crop=False)[0] == (0, 0, *size)


def test_a_picture_without_a_field_of_view_is_padded_whole() -> None:
    black = Image.new("RGB", (40, 60))
    assert find_field(black) is None
    frame, features = choose_frame(black, crop=True)
    assert frame == (-10, 0, 60, 60)
    assert np.isnan(features).all()


@pytest.mark.parametrize(
    "frame", [Frame(-10, 0, 60, 60), Frame(3, 5, 24, 24), Frame(0, -7, 40, 74)]
)
def test_masks_and_points_come_back_where_they_were(frame: Frame) -> None:
    """At the frame's own size nothing is resampled; outside of it there is nothing."""
    rng = np.random.default_rng(1)
    values = rng.integers(1, 255, (60, 40), dtype=np.uint8)
    part = np.asarray(frame.cut(Image.fromarray(values)))
    assert part.shape == (frame.height, frame.width)
    back = frame.place(part, (40, 60))
    rows, columns = np.indices(values.shape)
    inside = (rows >= frame.top) & (rows < frame.top + frame.height)
    inside &= (columns >= frame.left) & (columns < frame.left + frame.width)
    assert np.array_equal(back, np.where(inside, values, 0))
    padded = np.asarray(frame.cut(Image.fromarray(values), outside=255))
    assert (padded == 255).sum() - (values[inside] == 255).sum() == part.size - inside.sum()


@pytest.mark.parametrize("size", [(120, 80), (80, 120)])
def test_a_cropped_photograph_keeps_its_truth(size: tuple[int, int]) -> None:
    """The bright point that is the fovea is where its input point says, and goes back to itself."""
    width, height = size
    picture = np.array(camera(width, height, width / 2, height / 2, 39))
    fovea = (width / 2 + 13, height / 2 - 9)
    picture[int(fovea[1]), int(fovea[0])] = 255
    mask = np.full((height, width), 255, np.uint8)
    mask[height // 2 - 6 : height // 2 + 6, width // 2 - 20 : width // 2 - 8] = 128
    mask[height // 2 - 2 : height // 2 + 2, width // 2 - 16 : width // 2 - 12] = 0

    def read() -> tuple[Image.Image, Image.Image]:
        return Image.fromarray(picture), Image.fromarray(mask)

    record = Record("a.png", frozenset({"disc", "cup", "fovea"}), None, fovea, read)
    side = choose_frame(read()[0], crop=True)[0].width
    photographs = Photographs([record], side, crop=True)
    point = photographs.input_points().numpy()[0]
    brightest = photographs.pictures[0].sum(0).argmax().item()
    assert (brightest % side, brightest // side) == pytest.approx(tuple(point), abs=1e-4)
    assert photographs.frame(0).to_original(point[None], side)[0] == pytest.approx(fovea, abs=1e-4)
    drawn = photographs.frame(0).place(255 - photographs.masks[0].numpy(), size)
    assert np.array_equal(255 - drawn, mask)
    assert photographs.ratios[0] == pytest.approx(4 / 12)


def test_mirroring_takes_masks_and_fovea_along_and_leaves_labels() -> None:
    """Half of the pictures, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 8, 8, generator=generator)
    disc = torch.rand(64, 8, 8, generator=generator) < 0.5
    points = torch.rand(64, 2, generator=generator) * 7
    labels = torch.arange(64)
    known = dict.fromkeys(("disc", "cup", "fovea", "glaucoma"), torch.ones(64, dtype=torch.bool))
    targets = {"disc": disc, "cup": ~disc, "fovea": points, "glaucoma": labels}
    after = mirror(Batch(images, targets, known))
    flipped = (after.images != images).flatten(1).any(1)
    assert 20 < flipped.sum() < 44
    for row, turned in enumerate(flipped.tolist()):
        picture = images[row].flip(-1) if turned else images[row]
        assert torch.equal(after.images[row], picture)
        assert torch.equal(after.targets["disc"][row], disc[row].flip(-1) if turned else disc[row])
        assert torch.equal(after.targets["cup"][row], ~after.targets["disc"][row])
        x = 7 - points[row, 0] if turned else points[row, 0]
        assert torch.equal(after.targets["fovea"][row], torch.stack((x, points[row, 1])))
    assert torch.equal(after.targets["glaucoma"], labels)
