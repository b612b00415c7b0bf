"""Triplets of image, foreground and background, built on the fly from indexed data sets.

Three kinds are mixed by weight: layered pictures (MULAN), with one layer as the object; cut-outs (LayerDiffuse) pasted
over backgrounds (OpenImages); and existing triplets in folders. As in the built-in scenes, an occluder in front of the
object belongs to the background. The foreground includes occluded parts, as far as its source has them.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from layerdecomp.conditioning import TOKEN_FACTOR
from layerdecomp.data.blending import BlendingConfig, draw_grain, match_light, soften, through_jpeg
from layerdecomp.data.folders import PARTS, part_path
from layerdecomp.data.index import Index, Item
from layerdecomp.data.layerdiffuse import pad_colours
from layerdecomp.data.loading import (
    Crop,
    has_foreground,
    layer_paths,
    layer_tensor,
    load_background,
    load_foreground,
    load_layers,
    load_maps,
    load_parts,
    random_crop,
)
from layerdecomp.data.sample import SPLITS, Scene, build_cues, build_sample, check_split
from layerdecomp.errors import InputError, check_at_least, check_probabilities
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.geometry import Box, resize_picture, to_tensor
from layerdecomp.imaging.layers import Pixels
from layerdecomp.imaging.masks import MaskConfig

TRIES = 16  # attempts to find a usable picture before giving up


@dataclass
class TripletConfig:
    """Which index files (written by tools/prepare_data.py) to use, how to mix them and how to augment the samples."""

    layered: list[str] = field(default_factory=list)  # indexes of layered pictures
    foregrounds: list[str] = field(default_factory=list)  # indexes of cut-outs ...
    backgrounds: list[str] = field(default_factory=list)  # ... and of the backgrounds to paste them over
    folders: list[str] = field(default_factory=list)  # indexes of existing triplets
    layered_weight: float = 1.0
    pasted_weight: float = 1.0
    folders_weight: float = 1.0
    size: int = 1024  # pixels: the square root of a sample's area
    aspects: list[float] = field(default_factory=lambda: [1.0])  # width / height of the buckets; one per batch
    min_area: float = 0.01  # visible area of the object, as a fraction of the image
    max_area: float = 0.8
    flip: float = 0.5  # probability of a horizontal flip
    occluder_probability: float = 0.3  # of a second cut-out pasted in front of the first
    blending: BlendingConfig = field(default_factory=BlendingConfig)
    cue_dropout: float = 0.1  # probability that a cue is dropped; training split only
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        check_at_least(TOKEN_FACTOR, self, "data.triplets.", "size")
        check_at_least(0, self, "data.triplets.", "layered_weight", "pasted_weight", "folders_weight")
        if not self.aspects or min(self.aspects) <= 0:
            raise InputError(f"data.triplets.aspects is {self.aspects}; expected numbers above 0")
        check_probabilities(self, "data.triplets.", "flip", "occluder_probability", "cue_dropout")
        if not 0 <= self.min_area < self.max_area <= 1:
            found = f"{self.min_area} and {self.max_area}"
            raise InputError(
                f"data.triplets.min_area and max_area are {found}; expected fractions with 0 <= min < max <= 1"
            )

    @property
    def indexes(self) -> list[str]:
        """All index files."""
        return [*self.layered, *self.foregrounds, *self.backgrounds, *self.folders]

    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) for each aspect, in multiples of 16."""
        roots = [aspect**0.5 for aspect in self.aspects]
        return [(_rounded(self.size / root), _rounded(self.size * root)) for root in roots]

    def allows(self, area: float) -> bool:
        """Whether a visible area, a fraction of the image, is within the limits, and neither empty nor full."""
        return self.min_area <= area <= self.max_area and 0 < area < 1


def _rounded(length: float) -> int:
    return max(TOKEN_FACTOR, round(length / TOKEN_FACTOR) * TOKEN_FACTOR)


@dataclass(frozen=True)
class DrawnScene:
    """A drawn scene, with whatever its files provide beyond the layers."""

    scene: Scene
    image: Tensor | None = None  # (3, H, W) from a file; otherwise the scene is composited
    visible: Tensor | None = None  # (1, H, W), the object's visible mask from a file
    maps: dict[str, Tensor] = field(default_factory=dict)  # cue maps (3, H, W) by name
    items: tuple[Item, ...] = ()  # the items used; the first determines the aspect

    @property
    def area(self) -> float:
        """The fraction of the image that the object's exact mask covers."""
        return object_area(self.scene.visible if self.visible is None else self.visible)


def object_area(visible: Tensor) -> float:
    """The fraction of an image that an object's exact mask covers, given its visible alpha (1, H, W)."""
    return float((visible > 0.5 * visible.max()).float().mean())


class Triplets(Dataset[dict[str, Any]]):
    """A map-style data set of `length` samples, each a pure function of (seed, split, index), given `group`.

    A sample holds the outputs of `build_sample` and `build_cues` (zeros unless `with_cues`) and its index. All samples
    in a `group` of consecutive indices (a batch) share one size: the bucket nearest to the aspect of a random item
    drawn for the group. Without groups, all samples use the first aspect.

    Raises InputError for an unusable index file, and IndexError for an index outside [0, length).
    """

    def __init__(
        self,
        config: TripletConfig,
        split: str,
        seed: int,
        length: int,
        with_cues: bool = True,
        group: int | None = None,
    ) -> None:
        check_split(split)
        self.config, self.split, self.seed, self.length = config, split, seed, length
        self.with_cues, self.group = with_cues, group
        self.kinds = self._open()

    def _open(self) -> dict[str, float]:
        """Opens the indexes; returns the probability of each available kind."""
        config = self.config
        self.layered = Rows(config.layered, "layered", self.split)
        self.folders = Rows(config.folders, "triplets", self.split)
        self.foregrounds = Rows(config.foregrounds, "foregrounds", self.split)
        self.backgrounds = Rows(config.backgrounds, "backgrounds", self.split)
        if bool(config.foregrounds) != bool(config.backgrounds):
            raise InputError("data.triplets: foregrounds and backgrounds need each other; name indexes of both or none")
        weights = {
            "layered": config.layered_weight if config.layered else 0.0,
            "pasted": config.pasted_weight if config.foregrounds else 0.0,
            "folders": config.folders_weight if config.folders else 0.0,
        }
        if not sum(weights.values()):
            raise InputError(
                "data.triplets names no index with a weight above 0; expected files that tools/prepare_data.py wrote, "
                "in layered, in foregrounds and backgrounds, or in folders (docs/data.md)"
            )
        return {kind: weight / sum(weights.values()) for kind, weight in weights.items() if weight}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.draw(index)

    def name(self, index: int) -> str:
        """A sample's name in logs: the ids of the items in its first readable draw."""
        for attempt in range(TRIES):
            with suppress(InputError):
                items = self._draw(self._rngs(index, attempt)[0], self._size(index), self._first(index, attempt)).items
                return " + ".join(item.id for item in items)
        return f"sample {index}"

    def _rngs(self, index: int, attempt: int) -> list[np.random.Generator]:
        if not 0 <= index < self.length:
            raise IndexError(f"triplet {index} of {self.length}")
        key = [self.seed, SPLITS.index(self.split), index, *([attempt] if attempt else [])]
        return [np.random.default_rng(child) for child in np.random.SeedSequence(key).spawn(4)]

    def draw(self, index: int, attempt: int = 0) -> dict[str, Any]:
        """A sample; each attempt draws other items for the same index, at the same size."""
        scene_rng, mask_rng, cue_rng, finish_rng = self._rngs(index, attempt)
        drawn = self._draw(scene_rng, self._size(index), self._first(index, attempt))
        drawn = self._finish(drawn, finish_rng)
        sample = build_sample(
            drawn.scene, masks=self.config.masks, rng=mask_rng, image=drawn.image, visible=drawn.visible
        )
        dropout = self.config.cue_dropout if self.split == "train" else 0.0
        cues = build_cues(sample["image"], cue_rng, dropout=dropout, enabled=self.with_cues, maps=drawn.maps)
        return {**sample, **cues, "index": index}

    def _size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample, shared by its group."""
        buckets = self.config.buckets()
        if self.group is None or len(buckets) == 1:
            return buckets[0]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index // self.group, len(buckets)])
        _, item = self._rows(self._kind(rng)).draw(rng)
        return buckets[nearest_aspect(item, self.config.aspects)]

    def _kind(self, rng: np.random.Generator) -> str:
        return str(rng.choice(list(self.kinds), p=list(self.kinds.values())))

    def _rows(self, kind: str) -> "Rows":
        """The rows whose items determine the aspect of a kind."""
        return {"layered": self.layered, "pasted": self.backgrounds, "folders": self.folders}[kind]

    def _first(self, index: int, attempt: int) -> int | None:
        """The first row to try: held-out samples go through the rows in order; None draws at random."""
        return index if self.split == "test" and attempt == 0 else None

    @property
    def pictures(self) -> int:
        """Number of pictures to draw from; a held-out set larger than this repeats some."""
        return sum(len(self._rows(kind)) for kind in self.kinds)

    def _draw(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> DrawnScene:
        """Draws pictures, starting with row `first` if given, until an object's visible area is within the limits."""
        make = {"layered": self._layered, "pasted": self._pasted, "folders": self._folder}[self._kind(rng)]
        for tries in range(TRIES):
            drawn = make(rng, size, None if tries else first)
            if self.config.allows(drawn.area):
                return drawn
        raise InputError(
            f"{TRIES} pictures in a row have no object whose visible part covers {self.config.min_area} to "
            f"{self.config.max_area} of the image; check the data (tools/prepare_data.py check=...), or widen "
            "data.triplets.min_area and max_area"
        )

    def _matching(
        self, rows: "Rows", rng: np.random.Generator, size: tuple[int, int], first: int | None
    ) -> tuple[Index, Item]:
        """Row `first` if given, whatever its size; otherwise a random row whose nearest bucket is `size`.

        After `TRIES` misses it takes any row, which is then cropped.
        """
        if first is not None:
            return rows[first % len(rows)]
        for _ in range(TRIES):
            index, item = rows.draw(rng)
            if self.config.buckets()[nearest_aspect(item, self.config.aspects)] == size:
                break
        return index, item

    def _layered(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> DrawnScene:
        """A layered picture with a random layer as the object; the layers below and above form the background."""
        index, item = self._matching(self.layered, rng, size, first)
        pictures = load_layers(index, item)
        chosen = int(rng.integers(1, len(pictures)))
        crop = random_crop((item.width, item.height), size, rng, bounds(pictures[chosen]))
        paths = layer_paths(index.root, item)
        layers = [layer_tensor(crop.apply(picture, path)) for picture, path in zip(pictures, paths, strict=True)]
        return DrawnScene(scene_around(layers, chosen), maps=self._maps(index, item, crop), items=(item,))

    def _pasted(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> DrawnScene:
        """A cut-out pasted over a background, sometimes with a second one in front; there are no cue map files."""
        index, item = self._matching(self.backgrounds, rng, size, first)
        background = load_background(index, item, size, rng)
        stamp, cut_out = self._stamp(rng, size, float(np.exp(rng.uniform(np.log(0.05), np.log(0.5)))))
        left, top = (int(rng.integers(0, size[axis] - stamp.shape[axis] + 1)) for axis in (1, 0))
        foreground = pasted(stamp, left, top, size)
        items: tuple[Item, ...] = (item, cut_out)
        occluder = torch.zeros_like(foreground)
        if rng.random() < self.config.occluder_probability:
            stamp, other = self._stamp(rng, size, float(foreground[3].mean()) * rng.uniform(0.4, 1.2))
            if place := occluding_place(stamp, foreground[3].numpy(), rng):
                occluder, items = self._blended(pasted(stamp, *place, size), background, rng), (*items, other)
        return DrawnScene(Scene(background, self._blended(foreground, background, rng), occluder), items=items)

    def _stamp(self, rng: np.random.Generator, size: tuple[int, int], area: float) -> tuple[Pixels, Item]:
        """A cut-out whose bounding box (h, w, 4) covers about `area` of an image of this size, and its item."""
        index, item = self.foregrounds.draw(rng)
        picture = load_foreground(index.root / item.path)
        scale = (area * size[0] * size[1] / (picture.width * picture.height)) ** 0.5
        scale = min(scale, size[1] / picture.width, size[0] / picture.height)
        width, height = (max(1, int(scale * side)) for side in picture.size)
        return np.asarray(resize_picture(picture, (height, width))), item

    def _blended(self, foreground: Tensor, background: Tensor, rng: np.random.Generator) -> Tensor:
        config = self.config.blending
        if rng.random() < config.light:
            foreground = match_light(foreground, background, rng.uniform(0.1, 0.6))
        if rng.random() < config.blur:
            foreground = soften(foreground, rng.uniform(0.3, 1.5))
        return foreground

    def _folder(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> DrawnScene:
        """An existing triplet with its own image and mask; any occluder is unknown."""
        index, item = self._matching(self.folders, rng, size, first)
        if not has_foreground(item):
            raise InputError(f"{index.path}: {item.id} has no foreground; such a set is for evaluation, not training")
        parts = dict(zip(PARTS, load_parts(index, item, PARTS), strict=True))
        crop = random_crop((item.width, item.height), size, rng, parts["mask"].getbbox())
        crops = {part: crop.apply(picture, part_path(index.root, item, part)) for part, picture in parts.items()}
        image = to_tensor(np.asarray(crops["image"]))[0]
        background = to_tensor(np.asarray(crops["background"]))[0]
        scene = Scene(background, layer_tensor(crops["foreground"]), torch.zeros(4, *size))
        visible = torch.from_numpy(np.asarray(crops["mask"]) >= 128).float()[None]
        return DrawnScene(scene, image, visible, self._maps(index, item, crop), (item,))

    def _maps(self, index: Index, item: Item, crop: Crop) -> dict[str, Tensor]:
        return load_maps(index, item, crop) if self.with_cues else {}

    def _finish(self, drawn: DrawnScene, rng: np.random.Generator) -> DrawnScene:
        """Pads the foreground's colours, flips the scene, adds the same grain to all layers, JPEG to the image only."""
        config = self.config.blending
        flip, grain, jpeg = rng.random(3) < (self.config.flip, config.grain, config.jpeg)
        drawn = replace(drawn, scene=drawn.scene._replace(foreground=pad_colours(drawn.scene.foreground)))
        if flip:
            drawn = _flipped(drawn)
        scene, image = drawn.scene, drawn.image
        if grain:
            height, width = scene.background.shape[-2:]
            noise = draw_grain((height, width), rng.uniform(0.005, 0.04), rng)
            scene = Scene(*(_grainy(part, noise) for part in scene))
            image = None if image is None else _grainy(image, noise)
        image = scene.image if image is None else image
        if jpeg:
            image = through_jpeg(image, int(rng.integers(60, 96)))
        return replace(drawn, scene=scene, image=image)


class Rows:
    """The rows of one split, concatenated over any number of indexes."""

    def __init__(self, paths: list[str], kind: str, split: str) -> None:
        self.indexes = [Index(path) for path in paths]
        self.split = split
        for index in self.indexes:
            if index.kind != kind:
                raise InputError(f"{index.path} is an index of {index.kind}; expected an index of {kind}")
        if self.indexes and not self._ends[-1]:
            names = ", ".join(paths)
            raise InputError(
                f"{names}: no items of the {split} split ({kind}); index more items, or set another test_share="
            )

    @cached_property
    def _rows(self) -> list[NDArray[np.int32]]:
        return [index.rows(self.split) for index in self.indexes]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(rows) for rows in self._rows])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def draw(self, rng: np.random.Generator) -> tuple[Index, Item]:
        """Draws a row uniformly."""
        return self[int(rng.integers(len(self)))]

    def __getitem__(self, position: int) -> tuple[Index, Item]:
        which = int(np.searchsorted(self._ends, position, side="right"))
        row = self._rows[which][position - int(self._ends[which])]  # a negative offset, from the end of its index
        return self.indexes[which], self.indexes[which][int(row)]


def pasted(stamp: Pixels, left: int, top: int, size: tuple[int, int]) -> Tensor:
    """A cut-out (h, w, 4) as a layer (4, *size)."""
    canvas = np.zeros((*size, 4), np.uint8)
    canvas[top : top + stamp.shape[0], left : left + stamp.shape[1]] = stamp
    return layer_tensor(Image.fromarray(canvas))


def occluding_place(stamp: Pixels, alpha: NDArray[np.float32], rng: np.random.Generator) -> tuple[int, int] | None:
    """The (left, top) at which a cut-out (h, w, 4) covers 5 to 50 % of an object of alpha (H, W) in [0, 1].

    Tries places where a point of the cut-out's box lies on the object; None if none of them is suitable.
    """
    whole = float(alpha.sum())
    if whole == 0:
        return None
    cover, (rows, columns) = stamp[..., 3] / np.float32(255), stamp.shape[:2]
    for row, column in rng.choice(np.argwhere(alpha > alpha.max() / 2), TRIES):
        top = int(np.clip(row - rng.integers(rows), 0, alpha.shape[0] - rows))
        left = int(np.clip(column - rng.integers(columns), 0, alpha.shape[1] - columns))
        covered = float((alpha[top : top + rows, left : left + columns] * cover).sum()) / whole
        if 0.05 <= covered <= 0.5:
            return left, top
    return None


def nearest_aspect(item: Item, aspects: list[float]) -> int:
    """The position of the aspect (width / height) closest to an item's."""
    distances = [abs(np.log(item.width / item.height / aspect)) for aspect in aspects]
    return int(np.argmin(distances))


def _flipped(drawn: DrawnScene) -> DrawnScene:
    """The scene mirrored horizontally."""
    scene = Scene(*(part.flip(-1) for part in drawn.scene))
    image = None if drawn.image is None else drawn.image.flip(-1)
    visible = None if drawn.visible is None else drawn.visible.flip(-1)
    maps = {name: values.flip(-1) for name, values in drawn.maps.items()}
    return DrawnScene(scene, image, visible, maps, drawn.items)


def _grainy(part: Tensor, noise: Tensor) -> Tensor:
    """RGB (3, H, W) or a layer (4, H, W) with noise (3, H, W) added to its colours."""
    return torch.cat([(part[:3] + noise).clamp(-1, 1), part[3:]])


def scene_around(layers: Sequence[Tensor], chosen: int) -> Scene:
    """The scene with one of several layers (4, H, W) as the object; back to front, the first is opaque."""
    below = layers[0][:3]
    for behind in layers[1:chosen]:
        below = over(behind, below)
    above = torch.zeros_like(layers[0])
    for front in layers[chosen + 1 :]:
        above = stack(front, above)
    return Scene(below, layers[chosen], above)


def stack(front: Tensor, behind: Tensor) -> Tensor:
    """Composite one straight-alpha layer (4, H, W) over another, into a straight-alpha layer (4, H, W)."""
    alpha = front[3:] + behind[3:] * (1 - front[3:])
    rgb = front[:3] * front[3:] + behind[:3] * behind[3:] * (1 - front[3:])
    return torch.cat([torch.where(alpha > 0, rgb / alpha.clamp(min=1e-6), 0), alpha])


def bounds(picture: Image.Image) -> Box | None:
    """The bounding box of the visible part of an RGBA picture."""
    return picture.getchannel("A").getbbox()
