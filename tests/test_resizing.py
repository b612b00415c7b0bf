"""Images of any size: resizing to the model's size and back, and keeping pixels."""

import pytest
import torch

from layerdecomp.imaging.cues import CUES
from layerdecomp.resizing import at_original_size, keep_pixels, missed_object_mask, to_model_size, to_original_size
from layerdecomp.sampling import SampleConfig


@pytest.mark.parametrize(
    ("size", "shrunk", "padded"), [((30, 50), (30, 50), (32, 64)), ((200, 100), (64, 32), (64, 32))]
)
def test_a_model_gets_sides_that_are_multiples_of_sixteen(
    size: tuple[int, int], shrunk: tuple[int, int], padded: tuple[int, int]
) -> None:
    sample = SampleConfig(max_side=64)
    batch = {
        "image": torch.rand(2, 3, *size) * 2 - 1,
        "mask": torch.ones(2, 1, *size),
        "cues": torch.rand(2, len(CUES), 3, *size),
    }
    resized = to_model_size(batch, sample)
    assert {name: tuple(value.shape[-2:]) for name, value in resized.items()} == dict.fromkeys(batch, padded)
    background, foreground = torch.zeros(2, 3, *padded), torch.zeros(2, 4, *padded)
    background[..., : shrunk[0], : shrunk[1]] = 1  # the padding must not come back
    back, front = to_original_size(background, foreground, batch, sample)
    assert back.shape == (2, 3, *size) and front.shape == (2, 4, *size)
    assert back.min() > 0.999


def test_a_model_gets_cues_as_if_computed_at_its_size() -> None:
    cues = torch.full((2, len(CUES), 3, 200, 100), -1.0)
    cues[0, ..., 77] = cues[1, ..., 40, :] = 1  # a line of one pixel
    batch = {"image": torch.zeros(2, 3, 200, 100), "mask": torch.zeros(2, 1, 200, 100), "cues": cues}
    seen = dict(zip(CUES, to_model_size(batch, SampleConfig(max_side=64))["cues"].unbind(1), strict=True))
    assert all(set(seen[cue].unique().tolist()) <= {-1, 1} for cue in ("edge", "segmentation"))
    assert (seen["edge"][0, ..., 24] == 1).all() and (seen["edge"][1, :, 12] == 1).all()
    assert -1 < seen["depth"][0, ..., 24].max() < 1
    assert all(values[0, ..., :20].eq(-1).all() for values in seen.values())


def test_layers_are_unchanged_if_the_image_needs_no_resizing() -> None:
    image, mask = torch.rand(1, 3, 48, 32) * 2 - 1, torch.zeros(1, 1, 48, 32)
    mask[..., 8:20, 8:20] = 1
    layers = torch.rand(1, 3, 48, 32), torch.rand(1, 4, 48, 32)
    background, foreground = at_original_size(
        lambda _: layers, {"image": image, "mask": mask}, SampleConfig(keep_pixels=False)
    )
    torch.testing.assert_close(background, layers[0])
    torch.testing.assert_close(foreground, layers[1])


def test_colours_under_alpha_zero_do_not_bleed_into_edges() -> None:
    foreground = torch.zeros(1, 4, 32, 32)  # mid-grey, as the decoder leaves invisible pixels
    foreground[:, :3, :, 16:], foreground[:, 3, :, 16:] = 1.0, 1.0
    batch = {"image": torch.zeros(1, 3, 128, 128), "mask": torch.ones(1, 1, 128, 128)}
    background, large = to_original_size(foreground[:, :3], foreground, batch, SampleConfig(max_side=32))
    assert background.max() == 1, "bicubic overshoot"
    edge = (large[:, 3:] > 0.3) & (large[:, 3:] < 0.95)
    assert edge.any() and large[:, :3][edge.expand(-1, 3, -1, -1)].min() > 0.95


def test_parts_that_the_mask_misses_are_painted_and_occluders_are_kept() -> None:
    image, mask = torch.zeros(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)
    image[..., 8:56, 8:40] = 1  # the object, half of which the mask covers
    mask[..., 8:56, 8:24] = 1
    image[..., 8:56, 60:90] = -1  # an occluder; the foreground completes the object behind it
    foreground = torch.cat([torch.ones(1, 3, 64, 96), torch.zeros(1, 1, 64, 96)], dim=1)
    foreground[:, 3, 8:56, 8:90] = 1
    painted = torch.where(image == 1, 0.25, image)
    assert missed_object_mask(image, painted, foreground)[0, 0].nonzero().amax(0).tolist() == [55, 39]
    assert not missed_object_mask(image, painted, foreground * torch.tensor([1, 1, 1, 0.5]).view(4, 1, 1)).any(), (
        "only opaque pixels count"
    )
    background, _ = to_original_size(painted, foreground, {"image": image, "mask": mask}, SampleConfig())
    assert (background[..., 8:56, 8:40] == 0.25).all(), "part of the object is left"
    assert background[..., 60:].equal(image[..., 60:])


def test_pixels_are_painted_only_in_the_grown_mask() -> None:
    image, painted, mask = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 20:30, 20:30] = 1
    result = keep_pixels(image, mask, painted, SampleConfig())
    assert (result[..., 20:30, 20:30] == 1).all() and (result[..., :15, :] == 0).all()
    assert result[..., 18, 25].min() > 0  # grown
    assert keep_pixels(image, mask, painted, SampleConfig(keep_pixels=False)) is painted
