"""Imperfect masks, such as a user's brush or a segmentation network produces, made from an object's true matte."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from scipy.spatial import ConvexHull, QhullError
from skimage.measure import approximate_polygon, find_contours

from layerdecomp.errors import InputError, check_at_least

Mask = NDArray[np.bool_]  # (H, W), True = object

# Distances below are fractions of the object's extent (the square root of its area): errors scale with the object.


@dataclass
class MaskConfig:
    """Relative weight of each kind of mask; at least one must be above 0."""

    exact: float = 1.0
    dilated: float = 2.0
    eroded: float = 2.0
    polygon: float = 2.0  # a coarse polygon clicked around the object; holes are filled
    hull: float = 1.0  # the convex hull
    low_resolution: float = 2.0  # blocks, as from a coarse attention map
    shifted: float = 1.5
    holes: float = 1.5  # parts of the object are missing
    spill: float = 1.5  # parts of the surroundings are included
    box: float = 1.0  # the bounding box with some error, as if drawn by hand
    brush: float = 1.0  # a few strokes of a round brush over the object

    def __post_init__(self) -> None:
        check_at_least(0, self, "masks.", *vars(self))
        if not 0 < sum(vars(self).values()) < math.inf:
            raise InputError(f"masks: the weights are {vars(self)}; expected at least one above 0")


def imperfect_mask(alpha: NDArray[np.floating], rng: np.random.Generator, config: MaskConfig | None = None) -> Mask:
    """Make a random imperfect mask (H, W) of an object from its visible matte `alpha` (H, W) in [0, 1].

    The exact mask is where alpha exceeds half of its maximum, so that a semi-transparent object has one too. The result
    is never empty or full: if the chosen kind yields either, or needs more pixels than the object has, the exact mask
    is returned. The exact mask must be neither empty nor full.
    """
    exact = alpha > 0.5 * alpha.max()
    assert exact.any() and not exact.all(), "the matte is empty or full"
    config = config or MaskConfig()
    kinds = [field.name for field in fields(config)]
    weights = np.array([getattr(config, kind) for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    mask = _KINDS[kind](exact, rng)
    return mask if mask.any() and not mask.all() else exact


def _exact(mask: Mask, rng: np.random.Generator) -> Mask:
    return mask


def _dilated(mask: Mask, rng: np.random.Generator) -> Mask:
    return np.asarray(_distance_inside(~mask) <= rng.uniform(0.03, 0.18) * _extent(mask))


def _eroded(mask: Mask, rng: np.random.Generator) -> Mask:
    depth = _distance_inside(mask)
    threshold = rng.uniform(0.1, 0.4) * depth.max()  # relative to the depth, so that thin objects survive
    return np.asarray(depth > threshold)


def _polygon(mask: Mask, rng: np.random.Generator) -> Mask:
    # The padding closes contours that touch the border.
    contours = find_contours(np.pad(mask, 1).astype(np.float32), 0.5)
    tolerance = rng.uniform(0.08, 0.2) * _extent(mask)
    outlines = [approximate_polygon(contour, tolerance) - 1 for contour in contours]
    return _filled(mask, [outline for outline in outlines if len(outline) > 3])


def _hull(mask: Mask, rng: np.random.Generator) -> Mask:
    points = np.argwhere(mask)
    try:
        return _filled(mask, [points[ConvexHull(points).vertices]])
    except QhullError:  # the points are collinear
        return mask


def _low_resolution(mask: Mask, rng: np.random.Generator) -> Mask:
    height, width = mask.shape
    cell = max(2.0, rng.uniform(0.1, 0.35) * _extent(mask))
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    blocks = image.resize((max(1, round(width / cell)), max(1, round(height / cell))), Image.Resampling.BOX)
    return np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST)) > 100


def _shifted(mask: Mask, rng: np.random.Generator) -> Mask:
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.2) * _extent(mask)
    rows, columns = round(distance * np.sin(angle)), round(distance * np.cos(angle))
    margin = max(abs(rows), abs(columns))
    rolled = np.roll(np.pad(mask, margin), (rows, columns), axis=(0, 1))
    return rolled[margin : margin + mask.shape[0], margin : margin + mask.shape[1]]


def _holes(mask: Mask, rng: np.random.Generator) -> Mask:
    return mask & ~_discs(mask, rng, _extent(mask))


def _spill(mask: Mask, rng: np.random.Generator) -> Mask:
    rim = (_distance_inside(mask) < 2) & mask
    return mask | _discs(rim, rng, _extent(mask))


def _box(mask: Mask, rng: np.random.Generator) -> Mask:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    sides = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1])
    top, left, bottom, right = (sides + rng.uniform(-0.06, 0.06, 4) * _extent(mask)).round().clip(0).astype(int)
    box = np.zeros_like(mask)
    box[top:bottom, left:right] = True
    return box


def _brush(mask: Mask, rng: np.random.Generator) -> Mask:
    image = Image.new("L", mask.shape[::-1])
    draw = ImageDraw.Draw(image)
    candidates = np.argwhere(mask)[:, ::-1]  # x, y
    radius = max(1.0, rng.uniform(0.1, 0.18) * _extent(mask))
    for _ in range(rng.integers(3, 6)):
        stroke = rng.choice(candidates, rng.integers(2, 5))
        draw.line([(x, y) for x, y in stroke.tolist()], fill=255, width=round(2 * radius), joint="curve")
        for x, y in stroke[[0, -1]].tolist():  # round ends
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image) > 0


def _extent(mask: Mask) -> float:
    return float(np.sqrt(mask.sum()))


def _distance_inside(mask: Mask) -> NDArray[np.float64]:
    """Distance (H, W) of every True pixel to the nearest False one; 0 for False pixels."""
    return np.asarray(distance_transform_edt(mask))


def _discs(centres: Mask, rng: np.random.Generator, extent: float) -> Mask:
    """Draw one to four ellipses whose centres are True pixels of `centres`."""
    image = Image.new("L", centres.shape[::-1])
    draw = ImageDraw.Draw(image)
    candidates = np.argwhere(centres)
    for row, column in rng.choice(candidates, rng.integers(1, 5)):
        width, height = rng.uniform(0.08, 0.28, 2) * extent
        draw.ellipse((column - width, row - height, column + width, row + height), fill=255)
    return np.asarray(image) > 0


def _filled(like: Mask, outlines: list[NDArray[np.floating]]) -> Mask:
    """Fill closed outlines of (row, column) points, holes included, in a mask of the shape of `like`."""
    image = Image.new("L", like.shape[::-1])
    draw = ImageDraw.Draw(image)
    for outline in outlines:
        draw.polygon([(column, row) for row, column in outline.tolist()], fill=255)
    return np.asarray(image) > 0


_KINDS: dict[str, Callable[[Mask, np.random.Generator], Mask]] = {
    "exact": _exact,
    "dilated": _dilated,
    "eroded": _eroded,
    "polygon": _polygon,
    "hull": _hull,
    "low_resolution": _low_resolution,
    "shifted": _shifted,
    "holes": _holes,
    "spill": _spill,
    "box": _box,
    "brush": _brush,
}
