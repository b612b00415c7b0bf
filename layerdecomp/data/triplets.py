"""Triplets of image, foreground and background, made on the fly from the data sets that have been indexed.

Three kinds, mixed by weight: layered pictures (MULAN), of which one layer is taken out; cut-outs (LayerDiffuse) pasted
over backgrounds (OpenImages); and ready triplets in folders. What stands in front of the object stays in the
background, as in the embedded scenes, and covers part of the foreground, which is whole wherever its source is.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from layerdecomp.data.blending import BlendingConfig, draw_grain, match_light, soften, through_jpeg
from layerdecomp.data.folders import PARTS, part_path
from layerdecomp.data.index import Index, Item
from layerdecomp.data.layerdiffuse import pad_colours
from layerdecomp.data.loading import (
    Box,
    Fit,
    fit,
    has_foreground,
    layer,
    layer_paths,
    load_background,
    load_foreground,
    load_layers,
    load_maps,
    load_parts,
    resized,
)
from layerdecomp.data.sample import SPLITS, Scene, build_cues, build_sample
from layerdecomp.errors import InputError, check_at_least, check_probabilities
from layerdecomp.imaging.compositing import over
from layerdecomp.imaging.geometry import to_tensor
from layerdecomp.imaging.masks import MaskConfig

TRIES = 16  # at a picture that will do, before the data are called unfit
MULTIPLE = 16  # pixels of a token's side


@dataclass
class TripletConfig:
    """Which indexes (files that tools/prepare_data.py wrote), how they are mixed, and what is made of them."""

    layered: list[str] = field(default_factory=list)  # of layered pictures
    foregrounds: list[str] = field(default_factory=list)  # of cut-outs ...
    backgrounds: list[str] = field(default_factory=list)  # ... and of what they are pasted over
    folders: list[str] = field(default_factory=list)  # of ready triplets
    layered_weight: float = 1.0
    pasted_weight: float = 1.0
    folders_weight: float = 1.0
    size: int = 1024  # pixels: the square root of a picture's area
    aspects: list[float] = field(default_factory=lambda: [1.0])  # width / height of the buckets; a batch is of one
    min_area: float = 0.01  # of the picture, that can be seen of an object
    max_area: float = 0.8
    flip: float = 0.5  # probability
    occluder_probability: float = 0.3  # that another cut-out is pasted in front of the first
    blending: BlendingConfig = field(default_factory=BlendingConfig)
    cue_dropout: float = 0.1  # probability that a cue is absent; training split only
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        check_at_least(MULTIPLE, self, "data.triplets.", "size")
        check_at_least(0, self, "data.triplets.", "layered_weight", "pasted_weight", "folders_weight")
        if not self.aspects or min(self.aspects) <= 0:
            raise InputError(f"data.triplets.aspects is {self.aspects}; expected numbers above 0")
        check_probabilities(self, "data.triplets.", "flip", "occluder_probability", "cue_dropout")
        if not 0 <= self.min_area < self.max_area <= 1:
            found = f"{self.min_area} and {self.max_area}"
            raise InputError(f"data.triplets.min_area and max_area are {found}; expected shares with min < max")

    @property
    def indexes(self) -> list[str]:
        """All index files."""
        return [*self.layered, *self.foregrounds, *self.backgrounds, *self.folders]

    def buckets(self) -> list[tuple[int, int]]:
        """(height, width) of every aspect, multiples of 16."""
        roots = [aspect**0.5 for aspect in self.aspects]
        return [(_rounded(self.size / root), _rounded(self.size * root)) for root in roots]


def _rounded(length: float) -> int:
    return max(MULTIPLE, round(length / MULTIPLE) * MULTIPLE)


class Shot(NamedTuple):
    """A scene as it was drawn, and what files say of it that its layers do not."""

    scene: Scene
    image: Tensor | None = None  # (3, H, W), where there is a file of it; else the scene is put together
    visible: Tensor | None = None  # (1, H, W), what a file says can be seen of the object
    maps: dict[str, Tensor] = {}  # cue maps (3, H, W) by name
    items: tuple[Item, ...] = ()  # what it was made from, the one that gave the picture its size first

    @property
    def area(self) -> float:
        """The share of the picture that the exact mask of the object covers."""
        visible = self.scene.visible if self.visible is None else self.visible
        return float((visible > 0.5 * visible.max()).float().mean())


class Triplets(Dataset[dict[str, Any]]):
    """A map-style data set of `length` samples, each a pure function of (seed, split, index).

    A sample has what `build_sample` and, `with_cues`, `build_cues` give, and its index. All samples of a `group` of
    consecutive indices (a batch) are of one size, which the aspect of what the group drew first decides; without
    groups, all are of the first aspect.

    Raises InputError for an index file that cannot be used, and IndexError for an index outside [0, length).
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
        if split not in SPLITS:
            raise InputError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}; correct it")
        self.config, self.split, self.seed, self.length = config, split, seed, length
        self.with_cues, self.group = with_cues, group
        self.kinds = self._open()

    def _open(self) -> dict[str, float]:
        """Opens the indexes; the kinds that there are and how often each is drawn."""
        config = self.config
        self.layered, self.folders = (
            Rows(paths, kind, self.split) for paths, kind in ((config.layered, "layered"), (config.folders, "triplets"))
        )
        self.foregrounds = Rows(config.foregrounds, "foregrounds", self.split)
        self.backgrounds = Rows(config.backgrounds, "backgrounds", self.split)
        if bool(config.foregrounds) != bool(config.backgrounds):
            raise InputError("data.triplets: foregrounds and backgrounds need each other; name indexes of both or none")
        weights = {
            "layered": config.layered_weight * bool(config.layered),
            "pasted": config.pasted_weight * bool(config.foregrounds),
            "folders": config.folders_weight * bool(config.folders),
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
        """What a log calls a sample: the ids of the items of its first draw whose files can be read."""
        for attempt in range(TRIES):
            with suppress(InputError):
                items = self._draw(self._rngs(index, attempt)[0], self._size(index), self._first(index, attempt)).items
                return " + ".join(item.id for item in items)
        return f"sample {index}"

    def _rngs(self, index: int, attempt: int) -> list[np.random.Generator]:
        if not 0 <= index < self.length:
            raise IndexError(f"triplet {index} of {self.length}")
        place = [self.seed, SPLITS.index(self.split), index, *([attempt] if attempt else [])]
        return [np.random.default_rng(child) for child in np.random.SeedSequence(place).spawn(4)]

    def draw(self, index: int, attempt: int = 0) -> dict[str, Any]:
        """A sample; every attempt draws other items for the same place, of the same size."""
        scene_rng, mask_rng, cue_rng, finish_rng = self._rngs(index, attempt)
        drawn = self._draw(scene_rng, self._size(index), self._first(index, attempt))
        shot = self._finish(drawn, finish_rng)
        sample = build_sample(shot.scene, masks=self.config.masks, rng=mask_rng, image=shot.image, visible=shot.visible)
        dropout = self.config.cue_dropout if self.split == "train" else 0.0
        cues = build_cues(sample["image"], cue_rng, dropout=dropout, enabled=self.with_cues, maps=shot.maps)
        return {**sample, **cues, "index": index}

    def _size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample: that of its whole group."""
        buckets = self.config.buckets()
        if self.group is None or len(buckets) == 1:
            return buckets[0]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index // self.group, len(buckets)])
        _, item = self._rows(self._kind(rng)).draw(rng)
        return buckets[nearest_aspect(item, self.config.aspects)]

    def _kind(self, rng: np.random.Generator) -> str:
        return str(rng.choice(list(self.kinds), p=list(self.kinds.values())))

    def _rows(self, kind: str) -> "Rows":
        """What gives a picture of a kind its aspect."""
        return {"layered": self.layered, "pasted": self.backgrounds, "folders": self.folders}[kind]

    def _first(self, index: int, attempt: int) -> int | None:
        """Where among the pictures a sample begins to look: held-out ones come in turn, others as chance has it."""
        return index if self.split == "test" and attempt == 0 else None

    @property
    def pictures(self) -> int:
        """How many there are to draw from; held-out samples beyond that show one for a second time."""
        return sum(len(self._rows(kind)) for kind in self.kinds)

    def _draw(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> Shot:
        """Draws pictures, perhaps a certain one first, until one has an object of a size that will do."""
        make = {"layered": self._layered, "pasted": self._pasted, "folders": self._folder}[self._kind(rng)]
        for tries in range(TRIES):
            shot = make(rng, size, None if tries else first)
            if self.config.min_area <= shot.area <= self.config.max_area and 0 < shot.area < 1:
                return shot
        raise InputError(
            f"{TRIES} pictures in a row have no object whose visible part covers {self.config.min_area} to "
            f"{self.config.max_area} of them; look at the data (tools/prepare_data.py check=...), or widen these limits"
        )

    def _matching(
        self, rows: "Rows", rng: np.random.Generator, size: tuple[int, int], first: int | None
    ) -> tuple[Index, Item]:
        """Draws a row whose nearest bucket is `size`, or after some tries any row, which is then cropped.

        Of rows that come in turn it is the one whose turn it is, whatever its size.
        """
        if first is not None:
            return rows[first % len(rows)]
        for _ in range(TRIES):
            index, item = rows.draw(rng)
            if self.config.buckets()[nearest_aspect(item, self.config.aspects)] == size:
                break
        return index, item

    def _layered(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> Shot:
        """One layer of a layered picture is the object: what lies below and above it is the background."""
        index, item = self._matching(self.layered, rng, size, first)
        pictures = load_layers(index, item)
        chosen = int(rng.integers(1, len(pictures)))
        place = fit((item.width, item.height), size, rng, bounds(pictures[chosen]))
        paths = layer_paths(index.root, item)
        layers = [layer(place.apply(picture, path)) for picture, path in zip(pictures, paths, strict=True)]
        return Shot(scene_around(layers, chosen), maps=self._maps(index, item, place), items=(item,))

    def _pasted(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> Shot:
        """A cut-out somewhere over a background, and sometimes another one in front of it; nobody has maps of that."""
        index, item = self._matching(self.backgrounds, rng, size, first)
        background = load_background(index, item, size, rng)
        foreground, cut_out = self._placed(rng, size, float(np.exp(rng.uniform(np.log(0.05), np.log(0.5)))))
        items: tuple[Item, ...] = (item, cut_out)
        occluder = torch.zeros_like(foreground)
        if rng.random() < self.config.occluder_probability:
            tried, other = self._placed(rng, size, float(foreground[3].mean()) * rng.uniform(0.4, 1.2))
            covered = float((foreground[3] * tried[3]).sum() / foreground[3].sum().clamp(min=1))
            if 0.05 <= covered <= 0.5:
                occluder, items = self._blended(tried, background, rng), (*items, other)
        return Shot(Scene(background, self._blended(foreground, background, rng), occluder), items=items)

    def _placed(self, rng: np.random.Generator, size: tuple[int, int], area: float) -> tuple[Tensor, Item]:
        """A whole cut-out (4, *size), its box covering about `area` of the picture, and its item."""
        index, item = self.foregrounds.draw(rng)
        picture = load_foreground(index.root / item.path, item)
        scale = (area * size[0] * size[1] / (picture.width * picture.height)) ** 0.5
        scale = min(scale, size[1] / picture.width, size[0] / picture.height)
        width, height = (max(1, int(scale * side)) for side in picture.size)
        stamp = np.asarray(resized(picture, (height, width)))
        left, top = int(rng.integers(0, size[1] - width + 1)), int(rng.integers(0, size[0] - height + 1))
        canvas = np.zeros((*size, 4), np.uint8)
        canvas[top : top + height, left : left + width] = stamp
        return layer(Image.fromarray(canvas)), item

    def _blended(self, foreground: Tensor, background: Tensor, rng: np.random.Generator) -> Tensor:
        config = self.config.blending
        if rng.random() < config.light:
            foreground = match_light(foreground, background, rng.uniform(0.1, 0.6))
        if rng.random() < config.blur:
            foreground = soften(foreground, rng.uniform(0.3, 1.5))
        return foreground

    def _folder(self, rng: np.random.Generator, size: tuple[int, int], first: int | None) -> Shot:
        """A ready triplet, its image and its mask those of the files; what may stand in front is not known."""
        index, item = self._matching(self.folders, rng, size, first)
        if not has_foreground(item):
            raise InputError(f"{index.path}: {item.id} has no foreground; such a set is for evaluation, not training")
        parts = dict(zip(PARTS, load_parts(index, item, PARTS), strict=True))
        place = fit((item.width, item.height), size, rng, parts["mask"].getbbox())
        crops = {part: place.apply(picture, part_path(index.root, item, part)) for part, picture in parts.items()}
        image, background = (to_tensor(np.asarray(crops[part]))[0] for part in ("image", "background"))
        scene = Scene(background, layer(crops["foreground"]), torch.zeros(4, *size))
        visible = torch.from_numpy(np.asarray(crops["mask"]) >= 128).float()[None]
        return Shot(scene, image, visible, self._maps(index, item, place), (item,))

    def _maps(self, index: Index, item: Item, place: Fit) -> dict[str, Tensor]:
        return load_maps(index, item, place) if self.with_cues else {}

    def _finish(self, shot: Shot, rng: np.random.Generator) -> Shot:
        """What one camera does to all layers, and to the image alone; the object's colours padded beyond its edge."""
        config = self.config.blending
        flip, grain, jpeg = rng.random(3) < (self.config.flip, config.grain, config.jpeg)
        shot = shot._replace(scene=shot.scene._replace(foreground=pad_colours(shot.scene.foreground)))
        if flip:
            shot = _flipped(shot)
        scene, image = shot.scene, shot.image
        if grain:
            height, width = scene.background.shape[-2:]
            noise = draw_grain((height, width), rng.uniform(0.005, 0.04), rng)
            scene = Scene(*(_grainy(part, noise) for part in scene))
            image = None if image is None else _grainy(image, noise)
        image = scene.image if image is None else image
        return shot._replace(scene=scene, image=through_jpeg(image, int(rng.integers(60, 96))) if jpeg else image)


class Rows:
    """The rows of one split of any number of indexes, drawn as if they were one."""

    def __init__(self, paths: list[str], kind: str, split: str) -> None:
        self.indexes, self.split = [Index(path) for path in paths], split
        for index in self.indexes:
            if index.kind != kind:
                raise InputError(f"{index.path} is an index of {index.kind}; expected one of {kind}")
        if self.indexes and not self._ends[-1]:
            names = ", ".join(paths)
            raise InputError(
                f"{names}: no items of the {split} split ({kind}); index more of them, or with another test_share="
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
        """Draws any row, each as likely as the other."""
        return self[int(rng.integers(len(self)))]

    def __getitem__(self, place: int) -> tuple[Index, Item]:
        which = int(np.searchsorted(self._ends, place, side="right"))
        row = self._rows[which][place - int(self._ends[which])]  # counted from the end of its index
        return self.indexes[which], self.indexes[which][int(row)]


def nearest_aspect(item: Item, aspects: list[float]) -> int:
    """Which of some aspects (width / height) an item is closest to."""
    distances = [abs(np.log(item.width / item.height / aspect)) for aspect in aspects]
    return int(np.argmin(distances))


def _flipped(shot: Shot) -> Shot:
    """The mirror image of everything."""
    image, visible = (None if part is None else part.flip(-1) for part in (shot.image, shot.visible))
    maps = {name: values.flip(-1) for name, values in shot.maps.items()}
    return Shot(Scene(*(part.flip(-1) for part in shot.scene)), image, visible, maps, shot.items)


def _grainy(part: Tensor, noise: Tensor) -> Tensor:
    """Colours (3, H, W) or a layer (4, H, W) with noise (3, H, W) over its colours."""
    return torch.cat([(part[:3] + noise).clamp(-1, 1), part[3:]])


def scene_around(layers: Sequence[Tensor], chosen: int) -> Scene:
    """The scene in which one of several layers (4, H, W), back to front, the first opaque, is the object."""
    below = layers[0][:3]
    for behind in layers[1:chosen]:
        below = over(behind, below)
    above = torch.zeros_like(layers[0])
    for front in layers[chosen + 1 :]:
        above = stack(front, above)
    return Scene(below, layers[chosen], above)


def stack(front: Tensor, behind: Tensor) -> Tensor:
    """Put one straight foreground (4, H, W) over another: a straight foreground (4, H, W)."""
    alpha = front[3:] + behind[3:] * (1 - front[3:])
    rgb = front[:3] * front[3:] + behind[:3] * behind[3:] * (1 - front[3:])
    return torch.cat([torch.where(alpha > 0, rgb / alpha.clamp(min=1e-6), 0), alpha])


def bounds(picture: Image.Image) -> Box | None:
    """The box of what an RGBA picture shows."""
    return picture.getchannel("A").getbbox()
