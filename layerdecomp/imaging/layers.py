"""Input and output of a decomposition: reads images and masks from files, writes the two layers to files."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, ImageOps

from layerdecomp.errors import InputError
from layerdecomp.files import atomic_path
from layerdecomp.imaging.layered import Raster, check_psd, write_ora, write_psd

logger = logging.getLogger(__name__)
Pixels = NDArray[np.uint8]
READABLE = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # others, such as EPS, would run external programs
ImageSource = str | Path | Image.Image | Pixels | NDArray[np.bool_]
CHANNELS = ((), (1,), (3,), (4,))  # allowed trailing dimensions of an image array
SRGB = ImageCms.createProfile("sRGB")


def read_image(source: ImageSource) -> Pixels:
    """An image as (H, W, 3) uint8 in sRGB, EXIF orientation applied, transparency composited over white.

    Of an animation, the first frame. `InputError` if it cannot be read, or has more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    stored = _open(source)
    picture = to_srgb(_eight_bits(stored))
    converted = picture.mode == "L" and stored.mode != "L"
    if converted and (peak := np.asarray(picture).max()) <= 16:
        fault = "%s is nearly black: its brightest level is %d of 255; scale it up if it has fewer bits than its file"
        logger.warning(fault, _name(source, "an image"), peak)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def read_pair(image: ImageSource, mask: ImageSource) -> tuple[Pixels, NDArray[np.bool_]]:
    """An image (H, W, 3) and its mask (H, W); see `read_image` and `read_mask`."""
    pixels = read_image(image)
    return pixels, read_mask(mask, pixels.shape[:2])


def to_srgb(picture: Image.Image) -> Image.Image:
    """Converts a picture to sRGB if it has another colour profile, such as Display P3 or CMYK.

    Grey pictures stay as they are, since masks, mattes and maps are data, not colours. So do pictures with an invalid
    profile.
    """
    embedded = picture.info.get("icc_profile")
    if not embedded or picture.mode in ("1", "L", "LA"):
        return picture
    mode = "RGBA" if picture.has_transparency_data else "RGB"
    try:
        if picture.mode != "CMYK" and _is_srgb(embedded):
            return picture
        profile = ImageCms.ImageCmsProfile(BytesIO(embedded))
        coloured = picture if picture.mode == "CMYK" else picture.convert(mode)
        return ImageCms.buildTransform(profile, SRGB, coloured.mode, mode).apply(coloured)
    except (ImageCms.PyCMSError, OSError) as error:
        logger.warning("an image's colour profile cannot be used (%s); its colours are assumed to be sRGB", error)
        return picture


@lru_cache(maxsize=16)
def _is_srgb(embedded: bytes) -> bool:
    """Whether a profile leaves all colours as they are, but for rounding; names mislead: "Linear sRGB" changes them."""
    colours = Image.fromarray(np.indices((6, 6, 6), dtype=np.uint8).reshape(3, 36, 6).transpose(1, 2, 0) * 51)
    profile = ImageCms.ImageCmsProfile(BytesIO(embedded))
    converted = ImageCms.buildTransform(profile, SRGB, "RGB", "RGB").apply(colours)
    return np.asarray(ImageChops.difference(converted, colours)).max() <= 2


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Converts a grey picture of floats or more than 8 bits to 8 bits.

    Floats up to 1 are scaled by 255; 16-bit levels are scaled down, unless they are at most 255. Floats may overshoot
    both limits, as they do after bicubic resizing.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    deep = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    peak = deep.max(initial=0)
    overshoot = 2 if picture.mode == "F" else 1
    if picture.mode == "F" and peak < overshoot:
        scale: float = 255
    elif peak <= 255 * overshoot:
        scale = 1
    else:
        scale = 1 / 257
    return Image.fromarray((deep * scale).round().clip(0, 255).astype(np.uint8))


def read_mask(source: ImageSource, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    """A mask as (H, W) bool, True where the object is.

    Grey levels of 128 and above are the object. If there is an alpha channel that is not constant, the mask is read
    from it, with a warning: a mask painted on a transparent layer works, whatever its colour. The mark of some grey PNG
    files that black is transparent is no such channel.

    Args:
        size: required (height, width).

    Raises:
        InputError: the file cannot be read, is in colour, has another size, or marks nothing or everything.
    """
    name = _name(source, "mask")
    levels = _mask_levels(_eight_bits(_open(source)), name)
    mask = levels >= 128
    if size is not None and mask.shape != size:
        raise InputError(
            f"{name} is {mask.shape[1]} x {mask.shape[0]} pixels, the image {size[1]} x {size[0]}; "
            "expected equal sizes: scale the mask to the image"
        )
    if mask.all() or not mask.any():
        state = "full: it marks every pixel" if mask.all() else f"empty: {_why_empty(levels)}"
        raise InputError(f"{name} is {state}; expected white (or opaque) on the object and black elsewhere")
    return mask


def _why_empty(levels: Pixels) -> str:
    """Says why a mask is empty; many masks have the levels 0 and 1."""
    advice = f" (the brightest is {levels.max()}: multiply it by {255 // levels.max()})" if levels.any() else ""
    return f"no pixel is 128 or brighter{advice}"


def _mask_levels(picture: Image.Image, name: str) -> Pixels:
    black_is_transparent = picture.mode in ("1", "L") and picture.info.get("transparency") == 0  # adds nothing to grey
    if picture.has_transparency_data and not black_is_transparent:
        alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
        if alpha.min() != alpha.max():
            logger.warning("%s has an alpha channel; opaque pixels are read as the object", name)
            return alpha
    if picture.mode in ("1", "L", "LA"):
        return np.asarray(picture.convert("L"))
    rgb = np.asarray(picture.convert("RGB")).astype(np.int16)
    if (rgb.max(axis=-1) - rgb.min(axis=-1)).max() > 8:  # JPEG may tint grey slightly
        found = "a palette (label) image: save one label as white" if picture.mode == "P" else "in colour"
        raise InputError(f"{name} is {found}; expected grey levels, white = object, or a painted alpha channel")
    return rgb[..., 1].astype(np.uint8)


def _name(source: ImageSource, otherwise: str) -> str:
    return str(source) if isinstance(source, str | Path) else otherwise


def _open(source: ImageSource) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if not isinstance(source, str | PathLike):
        raise InputError(f"an image is a {type(source).__name__}; expected a path, a PIL image or a NumPy array")
    return open_picture(Path(source), upright=True)


def open_picture(path: Path, upright: bool = False) -> Image.Image:
    """The picture in a file, completely decoded, as it is stored, or with the EXIF orientation applied.

    Raises:
        InputError: the file is missing, truncated, not an image, or larger than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {found}; expected an image file")
    try:
        with Image.open(path, formats=READABLE) as picture:
            check_pixels(path, picture)  # before decoding
            picture.load()
            picture.getexif()  # parse it here, so that damaged EXIF raises here
            return ImageOps.exif_transpose(picture) if upright else picture
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        fault = f"{path} cannot be read as an image ({error}); expected PNG, JPEG, WebP or TIFF"
        raise InputError(f"{fault}: copy or download it again") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    channels = array.shape[2:]
    if array.dtype not in (np.bool_, np.uint8) or not array.size or array.ndim < 2 or channels not in CHANNELS:
        raise InputError(
            f"an array of {array.dtype} and shape {array.shape}; expected uint8 or bool (H, W[, 1, 3 or 4])"
        )
    pixels = array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array
    return Image.fromarray(pixels[..., 0] if channels == (1,) else pixels)


def write_picture(path: Path, pixels: Pixels) -> None:
    """Writes an image atomically; `InputError` if it cannot be written."""
    with atomic_path(path) as partial:
        Image.fromarray(pixels).save(partial)


def check_pixels(source: str | Path, picture: Image.Image) -> None:
    """Raises `InputError` above `PIL.Image.MAX_IMAGE_PIXELS`; Pillow itself raises only above twice as many."""
    if Image.MAX_IMAGE_PIXELS is not None and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise InputError(
            f"{source} has {size} pixels; expected at most {Image.MAX_IMAGE_PIXELS:,} in all: scale it down"
        )


@dataclass(frozen=True)
class Layers:
    """The two layers of an image, uint8, at the image's own size."""

    image: Pixels  # (H, W, 3), the decomposed image
    mask: NDArray[np.bool_]  # (H, W)
    background: Pixels  # (H, W, 3)
    foreground: Pixels  # (H, W, 4), straight alpha

    def save(self, folder: str | Path, formats: str | Sequence[str] = ("png",)) -> Path:
        """Writes files into `folder`: all of them, or none if there is an error.

        Args:
            formats: one or some of `FORMATS`. png: background.png, foreground.png and preview.png; ora: layers.ora,
                for Krita and GIMP; psd: layers.psd, for Photoshop.
        """
        folder = Path(folder)
        formats = [formats] if isinstance(formats, str) else formats
        check_formats(formats)
        with ExitStack() as files:  # write all files before renaming any
            for format in formats:
                for name, write in FORMATS[format].items():
                    write(self, files.enter_context(atomic_path(folder / name)))
        return folder

    def recomposed(self) -> Pixels:
        """(H, W, 3): the foreground over the background."""
        alpha = self.foreground[..., 3:] / 255
        return (self.foreground[..., :3] * alpha + self.background * (1 - alpha)).round().astype(np.uint8)

    def rasters(self) -> list[Raster]:
        """The layers for a layered file, bottom to top."""
        return [Raster("background", self.background), Raster("foreground", self.foreground).cropped()]

    def shrunk(self, longest: int) -> "Layers":
        """A copy, downscaled to at most `longest` pixels on the longer side."""
        height, width = self.mask.shape
        if max(height, width) <= longest:
            return self
        size = tuple(max(1, round(side * longest / max(height, width))) for side in (width, height))
        layers = (self.image, self.mask, self.background, self.foreground)
        return Layers(*(np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BOX)) for x in layers))

    def preview(self, gap: int = 8, longest: int = 1024) -> Pixels:
        """(H, 4 W + gaps, 3): the image with the mask tinted, background, foreground, recomposition, side by side.

        Each is downscaled to at most `longest` pixels on its longer side.
        """
        return self.shrunk(longest)._side_by_side(gap)

    def _side_by_side(self, gap: int) -> Pixels:
        tint = np.array([255, 64, 64])
        marked = np.where(self.mask[..., None], self.image * 0.5 + tint * 0.5, self.image)
        alpha = self.foreground[..., 3:] / 255
        rgb = self.foreground[..., :3].astype(float)
        height, width = self.mask.shape
        cell = max(4, min(height, width) // 16)
        rows, columns = np.indices((height, width)) // cell
        board = np.where((rows + columns) % 2, 200.0, 255.0)[..., None]
        panels = [
            marked,
            self.background,
            rgb * alpha + board * (1 - alpha),
            self.recomposed(),
        ]
        white = np.full((height, gap, 3), 255.0)
        strips = [part for panel in panels for part in (panel, white)][:-1]
        return np.concatenate(strips, axis=1).round().astype(np.uint8)


Writers = Mapping[str, Callable[[Layers, Path], None]]  # file name -> writer
FORMATS: dict[str, Writers] = {
    "png": {
        "background.png": lambda layers, path: Image.fromarray(layers.background).save(path),
        "foreground.png": lambda layers, path: Image.fromarray(layers.foreground).save(path),
        "preview.png": lambda layers, path: Image.fromarray(layers.preview()).save(path),
    },
    "ora": {"layers.ora": lambda layers, path: write_ora(path, layers.rasters(), layers.recomposed())},
    "psd": {"layers.psd": lambda layers, path: write_psd(path, layers.rasters(), layers.recomposed())},
}


def check_formats(formats: Sequence[str]) -> None:
    """Raises `InputError` for a format that is unknown or cannot be written."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"format={unknown[0]}: expected some of {', '.join(FORMATS)}")
    if "psd" in formats:
        check_psd()
