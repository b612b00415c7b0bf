"""Folders of predicted layers: matching by name, validation, and resizing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from layerdecomp.errors import InputError
from layerdecomp.predictions import PredictionFolder, describe, is_written, write_prediction

NAMES = ["a", "b", "deep/c"]


def layers(count: int, height: int = 16, width: int = 24) -> tuple[Tensor, Tensor]:
    """Backgrounds and foregrounds that are exact in 8 bits."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (count, 7, height, width), generator=generator).float()
    return levels[:, :3] / 127.5 - 1, torch.cat([levels[:, 3:6] / 127.5 - 1, levels[:, 6:] / 255], dim=1)


def test_written_predictions_are_read_back(tmp_path: Path) -> None:
    background, foreground = layers(3)
    write_prediction(tmp_path, NAMES, (background, foreground))
    folder = PredictionFolder(tmp_path, NAMES)
    for place, name in enumerate(NAMES):
        assert is_written(tmp_path, name, ("background", "foreground"))
        for found, expected in zip(folder.read(name, background[:1]), (background, foreground), strict=True):
            assert found is not None
            torch.testing.assert_close(found[0], expected[place], rtol=0, atol=1e-6)
    assert describe(folder) == {} and (tmp_path / "background" / "deep" / "c.png").is_file()


def test_a_method_may_predict_one_kind_of_layer(tmp_path: Path) -> None:
    background, foreground = layers(3)
    write_prediction(tmp_path / "remover", NAMES, (background, None))
    write_prediction(tmp_path / "matting", NAMES, (None, foreground))
    found = PredictionFolder(tmp_path / "remover", NAMES).read("a", background[:1])
    assert found[0] is not None and found[1] is None
    found = PredictionFolder(tmp_path / "matting", NAMES).read("a", background[:1])
    assert found[0] is None and found[1] is not None
    assert is_written(tmp_path / "matting", "a", ("foreground",)) and not is_written(
        tmp_path / "matting", "a", ("background",)
    )


def test_missing_and_extra_files_are_listed(tmp_path: Path) -> None:
    background, foreground = layers(3)
    write_prediction(tmp_path, ["a", "x"], (background[:2], None))
    write_prediction(tmp_path, NAMES, (None, foreground))
    folder = PredictionFolder(tmp_path, NAMES)
    assert describe(folder) == {"missing_backgrounds": ["b", "deep/c"], "extra_backgrounds": ["x"]}
    assert folder.read("b", background[:1])[0] is None and folder.read("b", background[:1])[1] is not None


def test_a_folder_without_any_matching_name_is_an_error(tmp_path: Path) -> None:
    write_prediction(tmp_path, ["a_result"], (layers(1)[0], None))
    with pytest.raises(InputError, match=r"no file is named like a sample; found a_result.png, expected a.png"):
        PredictionFolder(tmp_path, NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has neither background/ nor foreground/"):
        PredictionFolder(tmp_path / "empty", NAMES)


def test_predictions_of_another_size_are_resized_and_reported(tmp_path: Path) -> None:
    background, foreground = layers(1, 32, 48)
    foreground[:, 3:] = 0
    foreground[:, 3, :16] = 1
    foreground[:, :3, 16:] = 1  # white under alpha 0 must not bleed
    foreground[:, :3, :16] = -1
    write_prediction(tmp_path, ["a"], (background, foreground))
    folder, image = PredictionFolder(tmp_path, NAMES), torch.zeros(1, 3, 16, 24)
    found = folder.read("a", image)
    assert found[0] is not None and found[1] is not None
    small = torch.nn.functional.interpolate(background, (16, 24), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(found[0], small, rtol=0, atol=1e-5)
    assert found[1].shape == (1, 4, 16, 24) and (found[1][:, :3][:, :, :8] < -0.9).all()
    assert describe(folder)["resized"] == ["a"]
    for height, width in ((24, 24), (12, 24)):
        with pytest.raises(InputError, match=rf"a.png is 48 x 32 pixels, its image {width} x {height}"):
            folder.read("a", torch.zeros(1, 3, height, width))


def test_a_grey_matte_gets_the_colours_of_its_image(tmp_path: Path) -> None:
    image, alpha = layers(1)
    (tmp_path / "foreground").mkdir()
    matte = (alpha[0, 3].numpy() * 255).round().astype(np.uint8)
    Image.fromarray(matte).save(tmp_path / "foreground" / "a.png")
    found = PredictionFolder(tmp_path, NAMES).read("a", image)[1]
    assert found is not None
    torch.testing.assert_close(found, torch.cat([image, alpha[:, 3:]], dim=1), rtol=0, atol=1e-6)
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(tmp_path / "foreground" / "b.png")
    with pytest.raises(InputError, match=r"b.png has no alpha channel"):
        PredictionFolder(tmp_path, NAMES).read("b", image)


def test_diverged_layers_are_not_written(tmp_path: Path) -> None:
    background, foreground = layers(1)
    background[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="diverged"):
        write_prediction(tmp_path / "row", ["a"], (background, foreground))
    assert not (tmp_path / "row").exists()
