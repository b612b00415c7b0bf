"""Reading images and masks in every supported form, and writing the files of a decomposition."""

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from profiles import LINEAR_SRGB, SRGB, SWAPPED, SWAPPED_LINEAR

from layerdecomp.errors import InputError
from layerdecomp.imaging.layers import FORMATS, Layers, read_image, read_mask

SIZE = (6, 9)  # height, width


def _rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def _alpha() -> np.ndarray:
    alpha = np.zeros(SIZE, np.uint8)
    alpha[2:4, 3:7] = 255
    alpha[4, 3:7] = 100
    return alpha


def _rgba() -> Image.Image:
    picture = Image.fromarray(_rgb())
    picture.putalpha(Image.fromarray(_alpha()))
    return picture


def _saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def _over_white() -> np.ndarray:
    alpha = _alpha()[..., None] / 255
    return _rgb() * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = (_rgba() if mode in ("LA", "RGBA") else Image.fromarray(_rgb())).convert(mode)
    path = _saved(picture, tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = read_image(path)
    assert pixels.shape == (*SIZE, 3) and pixels.dtype == np.uint8
    if mode == "RGB":
        np.testing.assert_array_equal(pixels, _rgb())
    elif mode == "RGBA":
        np.testing.assert_allclose(pixels, _over_white(), atol=1)
    elif mode == "CMYK":
        np.testing.assert_allclose(pixels, _rgb(), atol=1)
    elif mode == "LA":
        assert (pixels[0] == 255).all() and (pixels[2, 3:7] == np.asarray(picture)[2, 3:7, :1]).all()
    else:
        np.testing.assert_array_equal(pixels, np.asarray(picture.convert("RGB")))


def test_a_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    pixels = read_image(_saved(palette, tmp_path / "a.png", transparency=1))
    assert pixels.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [70, 80, 90]]]


def test_16_bit_images_are_scaled_to_8_bits(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(SIZE)
    pixels = read_image(_saved(Image.fromarray(levels), tmp_path / "a.png"))
    np.testing.assert_allclose(pixels, np.repeat(levels[..., None] / 257, 3, axis=-1), atol=0.5)


@pytest.mark.parametrize("peak", [1, 1.05])  # some resizing overshoots
def test_float_images_up_to_one_are_scaled(tmp_path: Path, peak: float) -> None:
    levels = np.linspace(0, peak, 54, dtype=np.float32).reshape(SIZE)
    expected = (levels * 255).clip(max=255)
    for picture in (Image.fromarray(levels), Image.fromarray(expected)):
        np.testing.assert_allclose(read_image(_saved(picture, tmp_path / "a.tif"))[..., 0], expected, atol=0.501)


@pytest.mark.parametrize("peak", [255.6, 280])
def test_float_levels_may_overshoot(peak: float) -> None:
    levels = np.linspace(-5, peak, 54, dtype=np.float32).reshape(SIZE)
    np.testing.assert_allclose(read_image(Image.fromarray(levels))[..., 0], levels.clip(0, 255), atol=1)


def test_12_bit_levels_in_a_16_bit_file_log_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_image(_saved(Image.fromarray(np.full(SIZE, 65535, np.uint16)), tmp_path / "a.png"))
    read_image(np.zeros(SIZE, np.uint8))  # an image may be black
    assert not caplog.messages
    read_image(_saved(Image.fromarray(np.full(SIZE, 4095, np.uint16)), tmp_path / "a.png"))
    assert "a.png is nearly black: its brightest level is 16 of 255" in caplog.text


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(tmp_path: Path, mode: str) -> None:
    picture = _rgba() if mode == "RGBA" else Image.fromarray(_rgb()).convert(mode)
    plain = read_image(_saved(picture, tmp_path / "plain.png"))
    pixels = read_image(_saved(picture, tmp_path / "a.png", icc_profile=SWAPPED))
    np.testing.assert_allclose(pixels.astype(int), plain[..., ::-1], atol=2)


@pytest.mark.parametrize("profile", [SRGB, SRGB.replace(b"\0s\0R\0G\0B", b"\0m\0i\0n\0e")], ids=["sRGB", "mine"])
def test_an_srgb_profile_of_any_name_changes_nothing(tmp_path: Path, profile: bytes) -> None:
    np.testing.assert_array_equal(
        read_image(_saved(Image.fromarray(_rgb()), tmp_path / "a.png", icc_profile=profile)), _rgb()
    )


def test_linear_light_is_converted_though_its_profile_is_named_srgb(tmp_path: Path) -> None:
    linear = np.linspace(1, 255, 54).round().astype(np.uint8).reshape(SIZE)
    picture = Image.fromarray(np.repeat(linear[..., None], 3, axis=-1))
    pixels = read_image(_saved(picture, tmp_path / "a.png", icc_profile=LINEAR_SRGB))
    expected = 255 * (1.055 * (linear / 255) ** (1 / 2.4) - 0.055)
    assert "sRGB".encode("utf-16-be") in LINEAR_SRGB
    np.testing.assert_allclose(pixels[..., 0], expected, atol=2)


@pytest.mark.parametrize("profile", [b"no profile", SWAPPED[:200], SWAPPED.replace(b"RGB ", b"CMYK")])
def test_unusable_colour_profiles_log_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, profile: bytes
) -> None:
    path = _saved(Image.fromarray(_rgb()), tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read_image(path), _rgb())
    assert "colour profile cannot be used" in caplog.text


def test_colour_profiles_do_not_apply_to_masks(tmp_path: Path) -> None:
    for mode in ("L", "LA"):
        grey = _saved(Image.fromarray(_alpha()).convert(mode), tmp_path / "m.png", icc_profile=SWAPPED_LINEAR)
        np.testing.assert_array_equal(read_mask(grey), OBJECT)
        np.testing.assert_array_equal(read_image(grey)[..., 0], _alpha())


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned on its side
    path = _saved(Image.fromarray(_rgb()), tmp_path / "a.png", exif=exif)
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(read_image(source), np.rot90(_rgb(), -1))


def test_arrays_and_pil_images_need_no_file() -> None:
    np.testing.assert_array_equal(read_image(_rgb()), _rgb())
    np.testing.assert_array_equal(read_image(Image.fromarray(_rgb())), _rgb())


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), bool)]
)
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(InputError, match=r"expected uint8 or bool"):
        read_image(array)


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_truncated_files_are_refused(tmp_path: Path, format: str) -> None:
    big = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = _saved(Image.fromarray(big), tmp_path / f"whole.{format}").read_bytes()
    path = tmp_path / f"a.{format}"
    for length in {0, 1, 10, 20, 40, len(content) // 4, len(content) // 2}:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"a\.{format} cannot be read as an image .*expected PNG"):
            read_image(path)


@pytest.mark.parametrize(("name", "found"), [("absent.png", "does not exist"), (".", "is a folder")])
def test_missing_files_and_folders_are_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(InputError, match=f"{found}; expected an image file"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("source", [None, [[0, 255]]])
def test_what_is_no_picture(source: Any) -> None:
    with pytest.raises(InputError, match=f"an image is a {type(source).__name__}; expected a path"):
        read_mask(source)


OBJECT = _alpha() >= 128


def _painted() -> Image.Image:
    """A red brush on a transparent layer."""
    picture = Image.new("RGBA", SIZE[::-1], (255, 0, 0, 0))
    picture.putalpha(Image.fromarray(_alpha()))
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(_alpha()),
        Image.fromarray(OBJECT),
        Image.fromarray(_alpha()).convert("P"),
        Image.fromarray(_alpha()).convert("RGB"),
        Image.merge("RGB", [Image.fromarray(_alpha().clip(low, 255)) for low in (0, 0, 8)]),
        Image.fromarray(_alpha()).convert("RGBA"),
        Image.fromarray(_alpha().astype(np.uint16) * 257),
        Image.fromarray(_alpha().astype(np.float32) / 255),
        _painted(),
    ],
    ids=["L", "1", "P", "RGB", "RGB tinted by JPEG", "opaque RGBA", "I;16", "F", "painted RGBA"],
)
def test_every_kind_of_mask_is_read(tmp_path: Path, picture: Image.Image) -> None:
    mask = read_mask(_saved(picture, tmp_path / ("m.tif" if picture.mode == "F" else "m.png")), SIZE)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, OBJECT)


def test_a_grey_mask_whose_black_is_transparent_keeps_its_threshold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _saved(Image.fromarray(_alpha()), tmp_path / "m.png", transparency=0)
    assert Image.open(path).has_transparency_data
    np.testing.assert_array_equal(read_mask(path), OBJECT)
    assert not caplog.messages
    brush = np.where(OBJECT, 7, 255).astype(np.uint8)  # dark on a transparent layer, whose pixels have an unused level
    np.testing.assert_array_equal(read_mask(_saved(Image.fromarray(brush), path, transparency=255)), OBJECT)


def test_a_mask_painted_on_a_transparent_layer_logs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_mask(Image.fromarray(_alpha()).convert("RGBA"))
        assert not caplog.messages
        read_mask(_painted())
    assert "alpha channel" in caplog.text


@pytest.mark.parametrize("mask", [OBJECT, OBJECT[..., None], _alpha()[..., None]])
def test_masks_are_read_from_arrays(mask: Any) -> None:
    np.testing.assert_array_equal(read_mask(mask), OBJECT)


def _labels() -> Image.Image:
    """Labels as in VOC and DAVIS: label 1 is dark red."""
    picture = Image.fromarray(OBJECT.astype(np.uint8), mode="P")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    return picture


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.fromarray(_rgb()), "m.png is in colour; expected grey"),
        (Image.new("RGB", SIZE[::-1], (140, 149, 140)), "m.png is in colour; expected grey"),
        (_labels(), "m.png is a palette .* image: save one label as white; expected grey"),
        (Image.new("L", SIZE[::-1], 0), "m.png is empty: no pixel is 128 or brighter; expected white"),
        (
            Image.new("L", SIZE[::-1], 1),
            r"is 128 or brighter \(the brightest is 1: multiply it by 255\); expected white",
        ),
        (Image.new("L", SIZE[::-1], 128), "m.png is full: it marks every pixel; expected white"),
        (Image.new("RGBA", SIZE[::-1], (0, 0, 0, 0)), "m.png is empty"),
        (Image.fromarray(_alpha()[:-1]), r"m.png is 9 x 5 pixels, the image 9 x 6; expected equal sizes"),
    ],
    ids=["colour", "pale colour", "labels", "empty", "ones", "full", "transparent", "size"],
)
def test_unusable_masks_are_refused(tmp_path: Path, picture: Image.Image, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_mask(_saved(picture, tmp_path / "m.png"), SIZE)


def _layers() -> Layers:
    return Layers(_rgb(), OBJECT, _rgb()[::-1].copy(), np.asarray(_rgba()))


def test_three_files_are_written(tmp_path: Path) -> None:
    layers = _layers()
    folder = layers.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["background.png", "foreground.png", "preview.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "background.png")), layers.background)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "foreground.png")), layers.foreground)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "preview.png")), layers.preview())
    assert [path.name for path in layers.save(tmp_path / "one", "ora").iterdir()] == ["layers.ora"]


def test_the_preview_shows_input_background_foreground_and_both() -> None:
    layers = _layers()
    height, width = SIZE
    preview = layers.preview(gap=2)
    assert preview.shape == (height, 4 * width + 3 * 2, 3) and preview.dtype == np.uint8
    panels = [preview[:, start : start + width] for start in range(0, 4 * (width + 2), width + 2)]
    np.testing.assert_array_equal(panels[0][~OBJECT], layers.image[~OBJECT])
    assert (panels[0][OBJECT] != layers.image[OBJECT]).any()
    np.testing.assert_array_equal(panels[1], layers.background)
    opaque = layers.foreground[..., 3] == 255
    for panel in panels[2:]:
        np.testing.assert_array_equal(panel[opaque], layers.foreground[opaque, :3])
    alpha = layers.foreground[..., 3:] / 255
    exact = layers.foreground[..., :3] * alpha + layers.background * (1 - alpha)
    np.testing.assert_allclose(panels[3], exact, atol=0.5 + 1e-9)
    np.testing.assert_array_equal(panels[3][layers.foreground[..., 3] == 0], layers.background[_alpha() == 0])


def test_large_images_are_shrunk_for_the_preview() -> None:
    height, width = (side // 3 for side in SIZE)
    preview = _layers().preview(gap=2, longest=width)
    assert preview.shape == (height, 4 * width + 3 * 2, 3)
    small = np.asarray(Image.fromarray(_layers().background).resize((width, height), Image.Resampling.BOX))
    np.testing.assert_array_equal(preview[:, width + 2 : 2 * width + 2], small)


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(InputError, match="could not be written .*choose another place"):
            _layers().save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    _layers().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, save = [], Image.Image.save

    def full_disk(self: Image.Image, path: Path, *args: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) < failing:
            return save(self, path, *args, **options)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    other = Layers(_rgb(), OBJECT, _rgb(), np.asarray(_rgba()))
    with pytest.raises(InputError, match="No space left on device"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_unknown_or_uninstalled_formats_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="format=xcf: expected some of png, ora, psd"):
        _layers().save(tmp_path, ["png", "xcf"])
    monkeypatch.setitem(sys.modules, "psd_tools", None)
    with pytest.raises(InputError, match=r"format=psd needs the extra psd .*\[psd\]"):
        _layers().save(tmp_path, ["png", "psd"])
    assert not list(tmp_path.iterdir())


def test_all_formats_are_written_at_once(tmp_path: Path) -> None:
    _layers().save(tmp_path, list(FORMATS))
    names = {"background.png", "foreground.png", "preview.png", "layers.ora", "layers.psd"}
    assert {path.name for path in tmp_path.iterdir()} == names
