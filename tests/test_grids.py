"""Comparison grids of layers, and error maps."""

import numpy as np
import torch
from squares import SIZE, collate, do_nothing, noisy_truth
from torch import Tensor

from layerdecomp.grids import ERROR_GAIN, GAP, GUTTER, HEADER, MAX_TILE, comparison_grid, error_map, image_rows


def tile(image: np.ndarray, row: int, column: int, side: int = SIZE, left: int = GUTTER) -> np.ndarray:
    step = side + GAP
    top, left = HEADER + row * step, left + column * step
    return image[top : top + side, left : left + side]


def to_levels(image: Tensor) -> np.ndarray:
    return ((image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)


def test_comparison_grid_shows_input_mask_predictions_and_truth_in_order():
    batch = collate(1, 3)
    predictions = {"adapted": noisy_truth(batch), "base": do_nothing(batch)}
    image = comparison_grid(batch, predictions, labels=["good", "worst"])
    assert image.dtype == np.uint8
    step = SIZE + GAP
    assert image.shape == (HEADER + 2 * step, GUTTER + 8 * step, 3)
    for row in range(2):
        shown = {0: batch["image"], 2: predictions["adapted"][0], 4: batch["image"], 6: batch["background"]}
        for column, images in shown.items():
            assert np.array_equal(tile(image, row, column), to_levels(images[row]))
        inside = batch["mask"][row, 0].numpy() > 0
        outlined = tile(image, row, 1)
        magenta = (outlined == (255, 0, 255)).all(axis=-1)
        height = 12 + (1, 3)[row]
        assert magenta.sum() == 2 * (height + 2) + 2 * 16
        assert np.array_equal(outlined[inside], tile(image, row, 0)[inside])
        for column in (3, 5, 7):  # the object over a grey and white checkerboard
            foreground = tile(image, row, column)
            assert np.array_equal(foreground[inside], to_levels(batch["foreground"][row, :3])[inside])
            assert len(np.unique(foreground[~inside])) == 2
    header, gutter = image[:HEADER], image[HEADER:, :GUTTER]
    for column in range(8):  # every column has a name, every row a label
        assert (header[:, GUTTER + column * step :][:, :SIZE] < 128).sum() > 10
    assert (gutter[:SIZE] < 128).any()
    assert (gutter[step:] < 128).any()


def test_comparison_grid_reduces_large_samples():
    batch = {key: value.repeat_interleave(16, -1).repeat_interleave(16, -2) for key, value in
             collate(1).items() if key != "index"}  # fmt: skip
    image = comparison_grid(batch, {})
    assert image.shape[:2] == (
        HEADER + MAX_TILE + GAP,
        GAP + 4 * (MAX_TILE + GAP),
    )
    reduced = tile(image, 0, 0, MAX_TILE, GAP)
    assert np.array_equal(reduced[::8, ::8], to_levels(collate(1)["image"][0]))


def test_comparison_grid_leaves_out_missing_layers():
    batch = {key: value for key, value in collate(1, 3).items() if key != "foreground"}
    matte = {"matting": (None, do_nothing(collate(1, 3))[1])}
    assert comparison_grid(batch, matte).shape[1] == GAP + 4 * (SIZE + GAP)  # input, mask, one layer, true background


def test_error_map_goes_from_black_to_white():
    target = torch.zeros(1, 3, 1, 4)
    prediction = target.clone()
    prediction[..., 1], prediction[..., 2], prediction[..., 3] = 2 / ERROR_GAIN / 3, -2 / ERROR_GAIN, 2
    shown = error_map(prediction, target, scale=2)
    expected = torch.tensor([[-1.0, 1, 1, 1], [-1, -1, 1, 1], [-1, -1, 1, 1]])
    torch.testing.assert_close(shown[0, :, 0], expected)
    assert torch.equal(error_map(prediction[:, :1] / 2, target[:, :1], scale=1), shown)


def test_image_rows_show_the_first_eight_of_each_row() -> None:
    first, second = (torch.linspace(low, 1, 10).view(10, 1, 1, 1).expand(10, 3, 2, 4) for low in (-1, 0))
    grid = image_rows(first, second.bfloat16())
    assert grid.shape == (4, 32, 3) and grid.dtype == np.uint8
    assert grid[0, ::4, 0].tolist() == ((first[:8, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert grid[2, 0, 0] == 128 and (grid[2:, 4:] > 128).all()
    assert image_rows(first[:2]).shape == (2, 8, 3)
