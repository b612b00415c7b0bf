"""Textures for the scenes: crops of the photographs bundled with scikit-image, and procedural textures.

The photographs are part of the installed wheel, so nothing is downloaded (scikit-image's other data sets, which it
fetches on demand, are not used). Training uses astronaut, chelsea (the cat), motorcycle_left, retina,
hubble_deep_field and ihc (immunohistochemistry), and, in random colours, the greyscale camera, brick, grass, gravel
and moon. Testing uses coffee and rocket, which training never sees.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from layerdecomp.errors import InputError

Texture = NDArray[np.float32]  # (H, W, 3) in [0, 1]
Field = NDArray[np.float32]  # (H, W) in [0, 1]

DISTINCT = 0.35  # preferred minimum mean RGB distance between an object and its surroundings (at most sqrt(3))

# Relative weights: higher for rich photographs, lower for the mostly black sky and the near-uniform textures.
PHOTOGRAPHS: dict[str, dict[str, float]] = {
    "train": {
        "astronaut.png": 5,
        "chelsea.png": 5,
        "motorcycle_left.png": 5,
        "ihc.png": 3,
        "retina.jpg": 1.5,
        "hubble_deep_field.jpg": 1,
        "camera.png": 1.5,
        "brick.png": 1,
        "grass.png": 0.5,
        "gravel.png": 0.5,
        "moon.png": 0.5,
    },
    "test": {"coffee.png": 1, "rocket.jpg": 1},
}


@cache
def photograph(name: str) -> tuple[Image.Image, ...]:
    """Load a bundled photograph, once per process, as an image pyramid: full size, half size and so on.

    Raises InputError if the installed scikit-image does not bundle the file.
    """
    path = Path(skimage.data.data_dir) / name
    if not path.is_file():
        raise InputError(f"{path}: not found; the built-in scenes need the photographs of scikit-image 0.26's wheel")
    with Image.open(path) as file:
        levels = [file.convert("L" if file.mode == "L" else "RGB")]
    while min(levels[-1].size) >= 256:
        levels.append(levels[-1].reduce(2))
    return tuple(levels)


def photograph_crop(rng: np.random.Generator, size: int, split: str) -> Texture:
    """Crop a square at a random position and scale from a photograph of the split, with flip and colour jitter."""
    weights = np.array(list(PHOTOGRAPHS[split].values()))
    levels = photograph(str(rng.choice(list(PHOTOGRAPHS[split]), p=weights / weights.sum())))
    width, height = levels[0].size
    longest = min(width, height)
    side = longest * rng.uniform(min(0.75 * size / longest, 1), 1)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    # The smallest level that still has a pixel for every pixel of the crop.
    level = max((index for index in range(len(levels)) if side / 2**index >= size), default=0)
    # Rounding may make a level a fraction of a pixel too small.
    right, bottom = np.minimum(np.array([left + side, top + side]) / 2**level, levels[level].size)
    box = (left / 2**level, top / 2**level, float(right), float(bottom))
    crop = np.asarray(levels[level].resize((size, size), Image.Resampling.BILINEAR, box), np.float32) / np.float32(255)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return _coloured(crop, _palette(rng, 2)) if crop.ndim == 2 else _jittered(crop, rng)


def procedural(rng: np.random.Generator, size: int, split: str) -> Texture:
    """Make a texture (size, size, 3): a random scalar field of the split in a random palette of two to four colours."""
    return _coloured(_field(rng, size, split), _palette(rng, int(rng.integers(2, 5))))


def material(rng: np.random.Generator, size: int, split: str, surroundings: NDArray[np.float32]) -> Texture:
    """Make the texture of an object (size, size, 3): shades of one colour that stands out from its surroundings.

    Real objects, too, usually stand out from their background. The pattern of the shades is a procedural field or the
    brightness of a photograph.

    Args:
        surroundings: colours (N, 3) in [0, 1] around the object.
    """
    if rng.random() < 0.5:
        pattern = _normalized(photograph_crop(rng, size, split).mean(axis=-1))
    else:
        pattern = _field(rng, size, split)
    colours = rng.random((12, 3))
    grey = colours.mean(axis=1, keepdims=True)
    colours = grey + rng.uniform(0.2, 1) * (colours - grey)
    distances = np.linalg.norm(colours[:, None] - surroundings, axis=-1).mean(axis=1)
    distinct = distances > DISTINCT
    colour = colours[distinct.argmax() if distinct.any() else distances.argmax()]
    shades = rng.uniform(0.03, 0.35) * (pattern - pattern.mean())
    return np.asarray(np.clip(colour + shades[..., None], 0, 1), np.float32)


def many_coloured(rng: np.random.Generator, size: int, split: str, surroundings: NDArray[np.float32]) -> Texture:
    """Make the texture of a many-coloured object (size, size, 3): a crop of a photograph with shuffled channels.

    It is the one of four crops that differs most from the surroundings, colours (N, 3) in [0, 1].
    """
    crops = [photograph_crop(rng, size, split)[..., rng.permutation(3)] for _ in range(4)]
    distances = [np.linalg.norm(crop.mean((0, 1)) - surroundings, axis=-1).mean() for crop in crops]
    return crops[int(np.argmax(distances))]


def _field(rng: np.random.Generator, size: int, split: str) -> Field:
    fields = _FIELDS[split]
    return fields[rng.integers(len(fields))](rng, size)


def noise(rng: np.random.Generator, size: int, cells: int = 3, persistence: float = 0.5) -> Field:
    """Make multi-octave noise, from `cells` bumps across the image down to single pixels (Perlin, 1985)."""
    total, weight = np.zeros((size, size), np.float32), 1.0
    while cells < size:
        octave = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(octave.resize((size, size), Image.Resampling.BICUBIC))
        cells, weight = 2 * cells, weight * persistence
    return _normalized(total)


def _noise_field(rng: np.random.Generator, size: int) -> Field:
    return noise(rng, size, int(rng.integers(2, 7)), rng.uniform(0.3, 0.7))


def _gradient(rng: np.random.Generator, size: int) -> Field:
    x, y = _rotated_grid(rng, size)
    if rng.random() < 0.5:
        return _normalized(x)
    return _normalized(np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)))


def _stripes(rng: np.random.Generator, size: int) -> Field:
    x, _ = _rotated_grid(rng, size)
    x = x + rng.uniform(0, 0.3) * noise(rng, size)
    return _wave(x, frequency=rng.uniform(2, 12), sharpness=rng.uniform(0.5, 6))


def _checks(rng: np.random.Generator, size: int) -> Field:
    x, y = _rotated_grid(rng, size)
    frequency, sharpness = rng.uniform(1.5, 8), rng.uniform(2, 8)
    columns, rows = (_wave(axis, frequency, sharpness) * 2 - 1 for axis in (x, y))
    return 0.5 + 0.5 * columns * rows


def _wood(rng: np.random.Generator, size: int) -> Field:
    x, y = _rotated_grid(rng, size)
    # Wobbly growth rings, strongly stretched along the grain.
    radius = np.hypot(x - rng.uniform(-2, 2), 0.15 * (y - rng.uniform(-2, 2))) + 0.25 * noise(rng, size, 2, 0.3)
    frequency = rng.uniform(4, 12)
    ring = (radius * frequency) % 1
    # Darkens slowly across a ring, then resets within about two pixels.
    ring = np.minimum(ring**2, (1 - ring) * size / (4 * frequency))
    return _normalized(ring + 0.3 * noise(rng, size, 16, 0.8))


def _cells(rng: np.random.Generator, size: int) -> Field:
    """Irregular paving: every pixel takes the value of its nearest stone (Worley, SIGGRAPH 1996), darker at joints."""
    x, y = _grid(size)
    stones = int(rng.integers(6, 24))
    wobble = 0.15 * noise(rng, size, 6)
    distances = np.stack(
        [
            (x + wobble - centre_x) ** 2 + (y + wobble - centre_y) ** 2
            for centre_x, centre_y in rng.uniform(-1.2, 1.2, (stones, 2)).astype(np.float32)
        ]
    )  # (stones, H, W)
    nearest, second = np.sqrt(np.partition(distances, 1, axis=0)[:2])
    stone = rng.random(stones, dtype=np.float32)[distances.argmin(axis=0)]
    return np.asarray(stone * np.clip((second - nearest) * size / 6, 0, 1))  # joints are about six pixels wide


def _chevrons(rng: np.random.Generator, size: int) -> Field:
    x, y = _rotated_grid(rng, size)
    fold = np.abs((y * rng.uniform(1, 3)) % 1 - 0.5)
    return _wave(x + rng.uniform(0.3, 1) * fold, frequency=rng.uniform(2, 6), sharpness=rng.uniform(1, 6))


def _dots(rng: np.random.Generator, size: int) -> Field:
    x, y = _rotated_grid(rng, size)
    frequency = rng.uniform(1.5, 5)
    height = np.cos(2 * np.pi * frequency * x) + np.cos(2 * np.pi * frequency * y) - rng.uniform(0, 1.2)
    sharpness = min(rng.uniform(1, 6), size / (4 * np.pi * frequency))
    return np.asarray(0.5 + 0.5 * np.clip(sharpness * height, -1, 1))


_SEEN = (_noise_field, _gradient, _stripes, _checks, _wood, _cells)
# Half of the textures drawn in the test split are chevrons and dots, which training never sees.
_FIELDS: dict[str, tuple[Callable[[np.random.Generator, int], Field], ...]] = {
    "train": _SEEN,
    "test": (*_SEEN, *(_chevrons, _dots) * 3),
}


@cache
def _grid(size: int) -> tuple[Field, Field]:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _rotated_grid(rng: np.random.Generator, size: int) -> tuple[Field, Field]:
    x, y = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * x + sine * y, cosine * y - sine * x


def _wave(position: Field, frequency: float, sharpness: float) -> Field:
    """Make `frequency` bands per grid unit: a sine at low sharpness, hard but anti-aliased edges at high sharpness."""
    sharpness = min(sharpness, len(position) / (4 * np.pi * frequency))  # an edge takes at least two pixels
    return np.asarray(0.5 + 0.5 * np.clip(sharpness * np.sin(2 * np.pi * frequency * position), -1, 1))


def _normalized(values: Field) -> Field:
    low, high = values.min(), values.max()
    return np.asarray((values - low) / max(high - low, 1e-6))


def _palette(rng: np.random.Generator, colours: int) -> NDArray[np.float32]:
    """Draw related colours (colours, 3), vivid or greyish, that differ in brightness."""
    family = rng.random(3) + rng.normal(0, 0.18, (colours, 3))
    grey = family.mean(axis=1, keepdims=True)
    family = grey + rng.uniform(0.2, 1) * (family - grey)
    brightness = rng.permutation(np.linspace(rng.uniform(0.1, 0.5), rng.uniform(0.7, 1.2), colours))
    return np.asarray(np.clip((0.25 + 0.75 * family) * brightness[:, None], 0, 1), np.float32)


def _coloured(field: Field, palette: NDArray[np.float32]) -> Texture:
    """Map a field (H, W) to colours by a palette (N, 3) spread evenly over [0, 1]."""
    stops = np.linspace(0, 1, len(palette))
    return np.stack([np.interp(field, stops, channel) for channel in palette.T], axis=-1).astype(np.float32)


def _jittered(crop: Texture, rng: np.random.Generator) -> Texture:
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.08, 0.08)
    tint = rng.uniform(0.92, 1.08, 3).astype(np.float32)
    return np.asarray(np.clip((crop - 0.5) * np.float32(contrast) * tint + np.float32(0.5 + brightness), 0, 1))
