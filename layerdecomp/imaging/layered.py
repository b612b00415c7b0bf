"""Layered files for image editors: OpenRaster (Krita, GIMP, MyPaint) and Photoshop.

Both store straight alpha with full 8-bit precision. Layers are cropped to their visible part and keep their position.
"""

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.errors import needs_extra

THUMBNAIL = 256  # pixels at most, along the longer side


@dataclass(frozen=True)
class Raster:
    """One layer of a layered file."""

    name: str
    pixels: NDArray[np.uint8]  # (h, w, 3 or 4), straight alpha
    left: int = 0
    top: int = 0

    def cropped(self) -> "Raster":
        """The layer cropped to its visible part; one pixel if nothing is visible."""
        seen = self.pixels[..., 3] > 0
        rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
        top, bottom = (rows[0], rows[-1] + 1) if len(rows) else (0, 1)
        left, right = (columns[0], columns[-1] + 1) if len(columns) else (0, 1)
        return Raster(self.name, self.pixels[top:bottom, left:right], self.left + int(left), self.top + int(top))


def write_ora(path: Path, rasters: Sequence[Raster], merged: NDArray[np.uint8]) -> None:
    """Writes an OpenRaster file (https://www.openraster.org, baseline).

    Args:
        rasters: bottom to top.
        merged: their composite, (H, W, 3).
    """
    height, width = merged.shape[:2]
    image = ElementTree.Element("image", version="0.0.3", w=str(width), h=str(height))
    stack = ElementTree.SubElement(image, "stack")
    thumbnail = Image.fromarray(merged)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    pictures = {"mergedimage.png": Image.fromarray(merged), "Thumbnails/thumbnail.png": thumbnail}
    for raster in reversed(rasters):  # the first in the file is the topmost
        place = {"name": raster.name, "src": f"data/{raster.name}.png", "x": str(raster.left), "y": str(raster.top)}
        looks = {"opacity": "1.0", "visibility": "visible", "composite-op": "svg:src-over"}
        ElementTree.SubElement(stack, "layer", place | looks)
        pictures[place["src"]] = Image.fromarray(raster.pixels)
    with zipfile.ZipFile(path, "w") as file:  # uncompressed, since PNG already is; ZipInfo has a fixed date
        file.writestr(zipfile.ZipInfo("mimetype"), "image/openraster")  # must be first and uncompressed
        file.writestr(zipfile.ZipInfo("stack.xml"), ElementTree.tostring(image, "UTF-8", xml_declaration=True))
        for name, picture in pictures.items():
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            file.writestr(zipfile.ZipInfo(name), buffer.getvalue())


def write_psd(path: Path, rasters: Sequence[Raster], merged: NDArray[np.uint8]) -> None:
    """Writes a Photoshop file; arguments as in `write_ora`, but psd-tools composites the merged image.

    Raises:
        InputError: the `psd` extra is not installed.
    """
    check_psd()
    from psd_tools import PSDImage

    document = PSDImage.new("RGB", (merged.shape[1], merged.shape[0]))
    for raster in rasters:  # as arrays: the alpha of a PIL image would become a layer mask
        document.create_pixel_layer_from_array(raster.pixels, raster.name, raster.top, raster.left)
    document.save(path)


def check_psd() -> None:
    """Raises `InputError` unless psd-tools is installed."""
    with needs_extra("format=psd", "psd"):
        import psd_tools  # noqa: F401
