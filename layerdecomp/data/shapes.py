"""Mattes of parametric shapes.

Each family draws its shape with a hard edge at several times the final resolution; downscaling makes the edge
anti-aliased. Training and test use different sets of families and glyphs, so that a good score on the test split shows
that the model has learnt to complete shapes rather than memorised them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from layerdecomp.data.textures import photograph

Matte = NDArray[np.float32]  # (H, W) in [0, 1]
Points = NDArray[np.float64]  # (N, 2) x, y in about [-1, 1]

SUPERSAMPLING = 3  # a drawing has this many times the final side
MARGIN = 0.96  # largest size of a whole shape, as a fraction of the side


@dataclass(frozen=True)
class ShapeSet:
    """The families of a split, with relative weights, and its glyphs."""

    families: dict[str, float]
    glyphs: str


_SEEN = {"super_ellipse": 2.0, "polygon": 2.0, "blob": 2.0, "star": 1.0, "ring": 1.5, "brush": 1.5, "glyph": 2.0}

# Only the test split has crescents and silhouettes (the horse of scikit-image's wheel), digits and symbols.
SHAPES = {
    "train": ShapeSet(_SEEN, "ABCDEFGHJKLMNPQRSTUVWXYZabdefghkmnpqrsty"),
    "test": ShapeSet({**_SEEN, "crescent": 3.0, "silhouette": 3.0}, "2345678&@#%?$"),
}


def draw_shape(rng: np.random.Generator, size: int, split: str) -> Image.Image:
    """Draw a shape from a random family of the split, cropped to its bounds: an 8-bit image of 0 and 255."""
    shapes = SHAPES[split]
    weights = np.array(list(shapes.families.values()))
    family = str(rng.choice(list(shapes.families), p=weights / weights.sum()))
    side = SUPERSAMPLING * size
    drawing = _glyph(rng, side, shapes.glyphs) if family == "glyph" else _FAMILIES[family](rng, side)
    return drawing.crop(drawing.getbbox())


def scaled(drawing: Image.Image, area: float, rng: np.random.Generator, size: int) -> Image.Image:
    """Shrink a drawing so that it covers about `area` of a (size, size) image, with a random change of aspect.

    The result fits into the image, so a sparse shape may end up with a smaller area.
    """
    ink = float(np.asarray(drawing).mean()) / 255
    ratio = drawing.width / drawing.height * np.exp(rng.uniform(-0.3, 0.3))
    width = np.sqrt(area / ink * ratio) * size
    shrink = min(1.0, MARGIN * size / width, MARGIN * size / (width / ratio))
    box = max(2, round(width * shrink)), max(2, round(width / ratio * shrink))
    return drawing.resize(box, Image.Resampling.BILINEAR)


def placed(stamp: Image.Image, left: int, top: int, size: int) -> Matte:
    """Paste a scaled drawing into an empty (size, size) image; parts outside are cropped."""
    canvas = Image.new("L", (size, size))
    canvas.paste(stamp, (left, top))
    return np.asarray(canvas, dtype=np.float32) / np.float32(255)


def whole_shape(rng: np.random.Generator, size: int, split: str, area: float) -> Matte:
    """Draw a random shape (size, size) that covers about `area` of the image and lies entirely inside it."""
    stamp = scaled(draw_shape(rng, size, split), area, rng, size)
    left = int(rng.integers(0, size - stamp.width + 1))
    top = int(rng.integers(0, size - stamp.height + 1))
    return placed(stamp, left, top, size)


def inpainting_mask(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Draw a random mask (size, size) of shapes and brush strokes that covers 5 to 50 % of the image."""
    mask = np.zeros((size, size), dtype=bool)
    goal = rng.uniform(0.05, 0.4)
    while mask.mean() < goal:
        added = mask | (whole_shape(rng, size, "train", rng.uniform(0.04, 0.3)) > 0.5)
        if added.mean() <= 0.5:
            mask = added
    return mask


def _filled(side: int, *outlines: Points) -> Image.Image:
    """Fill the first outline, then cut the others out of it."""
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for index, points in enumerate(outlines):
        pixels = (0.5 + 0.49 * points / np.abs(outlines[0]).max()) * side
        draw.polygon(pixels.ravel().tolist(), fill=0 if index else 255)
    return image


def _rotated(points: Points, angle: float) -> Points:
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.asarray(points @ np.array([[cosine, sine], [-sine, cosine]]))


def _polar(radius: NDArray[np.float64], angle: NDArray[np.float64]) -> Points:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def _super_ellipse_points(rng: np.random.Generator) -> Points:
    exponent = 2 ** rng.uniform(-0.3, 2.5)  # from slightly concave (1 is a diamond) to almost a rectangle
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    unit = _polar(np.ones_like(angle), angle)
    points = np.sign(unit) * np.abs(unit) ** (2 / exponent) * [1, rng.uniform(0.35, 1)]
    return _rotated(points, rng.uniform(0, np.pi))


def _super_ellipse(rng: np.random.Generator, side: int) -> Image.Image:
    return _filled(side, _super_ellipse_points(rng))


def _ring(rng: np.random.Generator, side: int) -> Image.Image:
    outer = _super_ellipse_points(rng)
    hole = outer * rng.uniform(0.35, 0.75) + rng.uniform(-0.06, 0.06, 2)
    return _filled(side, outer, hole)


def _polygon(rng: np.random.Generator, side: int) -> Image.Image:
    corners = int(rng.integers(3, 9))
    angle = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
    return _filled(side, _rotated(_polar(rng.uniform(0.55, 1, corners), angle), rng.uniform(0, 2 * np.pi)))


def _star(rng: np.random.Generator, side: int) -> Image.Image:
    spikes = int(rng.integers(4, 10))
    angle = np.arange(2 * spikes) * np.pi / spikes
    radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.4, 0.75), 1)
    return _filled(side, _rotated(_polar(radius, angle), rng.uniform(0, 2 * np.pi)))


def _blob(rng: np.random.Generator, side: int) -> Image.Image:
    angle = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    harmonics = np.arange(1, 6)
    strength, phase = rng.normal(0, 0.25, 5) / harmonics**0.7, rng.uniform(0, 2 * np.pi, 5)
    radius = 1 + (strength[:, None] * np.cos(harmonics[:, None] * angle + phase[:, None])).sum(axis=0)
    return _filled(side, _polar(np.maximum(radius, 0.2), angle))


def _brush(rng: np.random.Generator, side: int) -> Image.Image:
    """A stroke of a round brush of varying width along a cubic Bezier curve."""
    t = np.linspace(0, 1, 60)[:, None]
    start, first, second, end = rng.uniform(-1, 1, (4, 2))
    curve = (1 - t) ** 3 * start + 3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3 * end
    radius = rng.uniform(0.14, 0.28) * (1 + 0.4 * np.sin(rng.uniform(0, 6) + rng.uniform(2, 8) * t[:, 0]))
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for (x, y), r in zip((0.5 + 0.36 * curve) * side, 0.36 * radius * side, strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return image


def _crescent(rng: np.random.Generator, side: int) -> Image.Image:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    disc = _polar(np.ones_like(angle), angle)
    bite = _polar(np.full(1, rng.uniform(0.35, 0.7)), np.full(1, rng.uniform(0, 2 * np.pi)))
    return _filled(side, disc, disc * rng.uniform(0.75, 0.95) + bite)


def _silhouette(rng: np.random.Generator, side: int) -> Image.Image:
    horse = _horse().resize((side, side * _horse().height // _horse().width))
    if rng.random() < 0.5:
        horse = horse.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return horse.rotate(rng.uniform(-25, 25), expand=True)


@cache
def _horse() -> Image.Image:
    return photograph("horse.png")[0].convert("L").point(lambda value: 255 * (value < 128))


def _glyph(rng: np.random.Generator, side: int, glyphs: str) -> Image.Image:
    """A character of Pillow's bundled font, from regular to very bold."""
    text, bold = glyphs[rng.integers(len(glyphs))], rng.uniform(0.0, 0.05)
    image = Image.new("L", (side, side))
    stroke = round(bold * side)
    ImageDraw.Draw(image).text(
        (side / 2, side / 2), text, fill=255, font=_font(side * 2 // 3), anchor="mm", stroke_width=stroke
    )
    return image.rotate(rng.uniform(-30, 30))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


_FAMILIES: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "super_ellipse": _super_ellipse,
    "polygon": _polygon,
    "blob": _blob,
    "star": _star,
    "ring": _ring,
    "brush": _brush,
    "crescent": _crescent,
    "silhouette": _silhouette,
}
