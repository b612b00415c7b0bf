"""Sizes, padding, grown and feathered masks, and pixel round trips."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, maximum_filter, uniform_filter

from layerdecomp.imaging.geometry import (
    Box,
    dilate,
    fitted_size,
    grow_and_feather,
    pad_to_multiple,
    resize,
    resize_picture,
    shrink_mask,
    to_pixels,
    to_tensor,
)


@pytest.mark.parametrize("size", [(32, 48), (37, 53), (5, 17), (1, 20), (5, 1), (16, 2)])
def test_padding_reflects_as_numpy_does(size: tuple[int, int]) -> None:
    picture = torch.rand(2, 3, *size)
    padded = pad_to_multiple(picture, 16)
    rows, columns = (-side % 16 for side in size)
    expected = np.pad(picture.numpy(), ((0, 0), (0, 0), (0, rows), (0, columns)), mode="reflect")
    np.testing.assert_array_equal(padded.numpy(), expected)


def test_pixels_survive_a_round_trip_exactly() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tensor = to_tensor(pixels)
    assert tensor.shape == (1, 3, 16, 16) and tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_array_equal(to_pixels(tensor[0]), pixels)
    np.testing.assert_array_equal(to_pixels(tensor), pixels[None])


def test_pixels_are_rounded_and_clipped() -> None:
    levels = torch.tensor([-3.0, -1 + 0.6 / 127.5, 1 - 0.4 / 127.5, 7.0]).view(1, 1, 4)
    assert to_pixels(levels).ravel().tolist() == [0, 1, 255, 255]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 200), (32, 64)),
        ((200, 100), (64, 32)),
        ((64, 64), (64, 64)),
        ((10, 20), (10, 20)),
        ((1, 640), (1, 64)),
        ((300, 199), (64, 42)),
        ((100, 70), (64, 45)),  # 44.8
        ((70, 100), (45, 64)),
    ],
)
def test_fitted_size_keeps_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted_size(size, 64) == expected


def test_resize_keeps_leading_axes_constants_and_images_of_that_size() -> None:
    pictures = torch.linspace(-1, 1, 6).view(1, 2, 3, 1, 1).expand(1, 2, 3, 40, 60)
    assert resize(pictures, (40, 60)) is pictures
    resized = resize(pictures, (10, 24))
    torch.testing.assert_close(resized, pictures[..., :10, :24])


def test_resize_is_antialiased() -> None:
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    assert resize(stripes, (20, 20))[..., 2:-2].abs().max() < 0.05  # whole ratios would hit the stripes' mean anyway


@pytest.mark.parametrize("size", [(20, 20), (150, 170)])
def test_resized_images_stay_in_range(size: tuple[int, int]) -> None:
    photograph = torch.ones(1, 3, 64, 64)
    photograph[..., 21:40, 23:] = -1  # bicubic resizing overshoots beside the edges
    resized = resize(photograph, size)
    assert resized.min() == -1 and resized.max() == 1


@pytest.mark.parametrize(("size", "box"), [((24, 40), None), ((50, 31), (3.5, 2.0, 40.25, 60.0)), ((150, 170), None)])
def test_a_resized_object_keeps_its_colour_at_every_alpha(size: tuple[int, int], box: Box | None) -> None:
    colour, alpha = (200, 40, 60), np.zeros((64, 64))
    alpha[20:40, 16:44] = 255
    rgba = np.dstack([*(np.full((64, 64), level) for level in colour), gaussian_filter(alpha, 6)]).astype(np.uint8)
    picture = Image.fromarray(rgba)
    resized = np.asarray(resize_picture(picture, size, box))
    expected = picture.getchannel("A").resize(size[::-1], Image.Resampling.BICUBIC, box)
    np.testing.assert_allclose(resized[..., 3].astype(int), np.asarray(expected), atol=1)
    assert 0 < resized[resized[..., 3] > 0][:, 3].min() < 5 and resized[..., 3].max() > 150
    assert (resized[resized[..., 3] > 0][:, :3] == colour).all()


@pytest.mark.parametrize("size", [(24, 40), (200, 310)])
@pytest.mark.parametrize("box", [(150.3, 20.7, 390.2, 180.1), (0.0, 0.0, 31.0, 300.0), None])
def test_a_crop_of_a_large_transparent_picture_is_resized_like_the_whole(
    size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> None:
    alpha = gaussian_filter(np.random.default_rng(0).integers(0, 256, (300, 400)).astype(np.float32), 2)
    levels = ((alpha - alpha.min()) * 255 / np.ptp(alpha)).astype(np.uint8)
    picture = Image.fromarray(np.dstack([np.full_like(levels, 90)] * 3 + [levels]))
    resized = np.asarray(resize_picture(picture, size, box))
    expected = picture.getchannel("A").resize(size[::-1], Image.Resampling.BICUBIC, box, reducing_gap=3)
    np.testing.assert_allclose(resized[..., 3].astype(int), np.asarray(expected), atol=2)
    assert resized[..., 3].std() > 5 and (resized[resized[..., 3] > 0][:, :3] == 90).all()


def test_an_unchanged_picture_keeps_the_colours_under_alpha_0() -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    rgba[:10, :, 3] = 0
    for box in (None, (0.0, 0.0, 30.0, 20.0)):
        np.testing.assert_array_equal(np.asarray(resize_picture(Image.fromarray(rgba), (20, 30), box)), rgba)


def test_shrink_mask_loses_no_part_of_a_mask() -> None:
    mask = torch.zeros(1, 1, 90, 70)
    for index in range(70):
        mask[..., index, index] = 1
    assert shrink_mask(mask, (90, 70)).equal(mask)
    small = shrink_mask(mask, (23, 18))[0, 0]
    assert small.unique().tolist() == [0, 1] and small[:18].any(dim=0).all() and not small[19:].any()


def _disc(size: tuple[int, int], radius: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side) - side // 2 for side in size), indexing="ij")
    return (torch.hypot(rows.float(), columns.float()) <= radius).float()[None, None]


def test_dilation_and_feathering_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    for height, width, radius in ((1, 1, 3), (1, 40, 2), (9, 7, 12), (61, 90, 0), (80, 53, 6), (300, 2000, 41)):
        masks = rng.random((2, 1, height, width)) < 1.5 / (2 * radius + 1) ** 2  # a square has about one pixel
        square = (1, 1, 2 * radius + 1, 2 * radius + 1)
        wide = maximum_filter(masks, square)
        np.testing.assert_array_equal(dilate(torch.from_numpy(masks), radius).numpy(), wide)
        faded = uniform_filter(wide.astype(float), square, mode="nearest")
        share = grow_and_feather(torch.from_numpy(masks).float(), 0, radius / max(height, width))
        np.testing.assert_allclose(share.numpy(), np.where(masks, 1, faded), rtol=0, atol=1e-6)


def test_grow_and_feather_grows_the_mask_then_fades() -> None:
    mask = _disc((200, 160), 20)
    share = grow_and_feather(mask, grow=0.02, feather=0.025)[0, 0]  # 4 and 5 pixels
    profile = share[100, 80:]
    assert (profile[:25] == 1).all() and 0 < profile[27] < 1
    assert (profile.diff() <= 1e-6).all()
    assert (profile[20 + 4 + 2 * 5 + 1 :] == 0).all()
    assert share[0, 0] == 0 and share.max() <= 1
    assert grow_and_feather(mask, grow=0.0, feather=0.0).equal(mask)


def test_grow_and_feather_does_not_fade_along_the_border() -> None:
    mask = torch.zeros(1, 1, 60, 80)
    mask[..., :20] = 1
    share = grow_and_feather(mask, grow=0.05, feather=0.05)  # 4 pixels each
    assert 0 < share[..., 28].min() < 1
    torch.testing.assert_close(share, share[..., 30:31, :].expand_as(share))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (2, 200), (3, 90), (7, 300), (16, 16)])
def test_grow_and_feather_handles_small_and_narrow_images(size: tuple[int, int]) -> None:
    mask = torch.zeros(1, 1, *size)
    mask[..., size[0] // 2, size[1] // 2] = 1
    share = grow_and_feather(mask, grow=0.015, feather=0.01)
    assert share.shape == mask.shape and torch.isfinite(share).all()
    assert share[mask > 0].item() == 1 and share.min() >= 0 and share.max() <= 1
    if size[1] > 50:
        assert (share[..., 0] == 0).all()
