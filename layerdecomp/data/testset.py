"""Test sets: reading and exporting folders of triplets on which any method can be run and scored.

A test set is a triplet folder (docs/data.md): image/ mask/ foreground/ background/ with equal stems. foreground/ is
omitted if the true foregrounds are unknown; occluder/ and a folder per cue map are optional.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from layerdecomp.data.datamodule import DrawnSamples
from layerdecomp.data.folders import PARTS, RoremFolder, by_stem, read_rgba, triplet_id
from layerdecomp.data.index import Index, Item, check_name
from layerdecomp.data.loading import (
    Crop,
    layer_paths,
    layer_tensor,
    load_layers,
    load_maps,
    map_path,
    random_crop,
    read_map,
)
from layerdecomp.data.sample import build_cues, build_sample
from layerdecomp.data.triplets import TripletConfig, bounds, object_area, scene_around
from layerdecomp.errors import InputError
from layerdecomp.imaging.compositing import with_pixel_alpha, with_unit_alpha
from layerdecomp.imaging.cues import CUES, REGISTRY
from layerdecomp.imaging.geometry import fitted_size, resize, to_pixels, to_tensor
from layerdecomp.imaging.layers import Pixels, read_image, read_mask, write_picture

OBJECTS = ("drawn", "one", "all")
NEEDED = ("image", "mask", "background")
EXPORTED = (*PARTS, "occluder")


def name_of(position: int) -> str:
    """The name of a sample that has no file."""
    return f"{position:05d}"


def seed_of(name: str) -> int:
    """The random seed of a sample, from its name alone, so it does not depend on the other samples."""
    if name.isdecimal() and len(name) < 18:  # must fit in int64
        return int(name)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


class TestFolder(Dataset[dict[str, Any]]):
    """A test set: every triplet once, unmodified, at its own size.

    A sample has image, mask, foreground (if the folder has any), background and occluder (zeros unless there are files)
    as `build_sample` describes them, cues and cues_present (maps from the folder, or computed), and index, a number
    that depends only on its name. Cues have the size of the image shrunk to `max_side`, as a model sees it: computed at
    the full size and shrunk, they would be others than it was trained with.

    Raises:
        InputError: a folder or a part of a triplet is missing, or a name is not UTF-8; from `[]`, a file is damaged or
            differs in size.
    """

    __test__ = False  # keeps pytest from collecting it

    def __init__(self, root: str | Path, with_cues: bool = True, max_side: int | None = None) -> None:
        self.root, self.with_cues, self.max_side = Path(root), with_cues, max_side
        if not self.root.is_dir():
            raise InputError(f"data={root} is not a folder; expected one with {'/, '.join(PARTS)}/ (docs/data.md)")
        self._files = self._rorem() if (self.root / "meta.json").is_file() else self._triplets()
        self.names = list(self._files)
        for name in self.names:
            check_name(name)

    def _rorem(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for files in map(json.loads, RoremFolder(self.root).candidates()):
            if not (name := triplet_id(files)) or name in found:
                raise InputError(
                    f"{self.root}/meta.json: {files} and {found.get(name)} share the name {name!r}; expected paths "
                    "that differ below their first folder, and not only in their extensions"
                )
            found[name] = files
        return found

    def _triplets(self) -> dict[str, dict[str, str]]:
        parts = {part: by_stem(self.root / part) for part in EXPORTED if part in NEEDED or (self.root / part).is_dir()}
        stems = sorted(set().union(*parts.values()))
        for stem in stems:
            if lacking := [part for part, files in parts.items() if stem not in files]:
                raise InputError(f"{self.root}: {stem} has no {lacking[0]}; expected a file of that stem in each part")
        return {stem: {part: f"{part}/{files[stem]}" for part, files in parts.items()} for stem in stems}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> dict[str, Any]:
        name = self.names[position]
        paths = {part: self.root / file for part, file in self._files[name].items()}
        image = read_image(paths["image"])
        mask = read_mask(paths["mask"], (image.shape[0], image.shape[1]))
        sample = {
            "image": to_tensor(image)[0],
            "mask": torch.from_numpy(mask).float()[None],
            "background": to_tensor(_of_size(read_image(paths["background"]), image, paths["background"]))[0],
            "occluder": torch.zeros(1, *mask.shape),
        }
        if "foreground" in paths:
            rgba = _of_size(read_rgba(paths["foreground"]), image, paths["foreground"])
            sample["foreground"] = with_unit_alpha(to_tensor(rgba)[0])
        if "occluder" in paths:
            levels = _of_size(read_image(paths["occluder"]), image, paths["occluder"])[..., :1]
            sample["occluder"] = (to_tensor(levels)[0] + 1) / 2
        return {**sample, **self._cues(name, sample["image"]), "index": seed_of(name)}

    def _cues(self, name: str, image: Tensor) -> dict[str, Tensor]:
        full = (image.shape[-2], image.shape[-1])
        size = full if self.max_side is None else fitted_size(full, self.max_side)
        maps = self._maps(name, full, size) if self.with_cues else {}
        rng = np.random.default_rng(0)  # required, but unused: no cue is dropped
        return build_cues(resize(image, size), rng, dropout=0, enabled=self.with_cues, maps=maps)

    def digest(self) -> str:
        """A sha256 over names and contents: equal for copies of the folder, different if any file or map differs."""
        found = hashlib.sha256()
        for name, files in self._files.items():
            paths = {part: self.root / file for part, file in files.items()}
            for part, path in [*paths.items(), *self._map_paths(name).items()]:
                with path.open("rb") as content:
                    found.update(f"{name} {part} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()

    def _map_paths(self, name: str) -> dict[str, Path]:
        paths = {cue: map_path(self.root, Item(name, "", 0, 0), cue) for cue in REGISTRY}
        return {cue: path for cue, path in paths.items() if path.is_file()}

    def _maps(self, name: str, full: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
        """The maps in files of an image of size `full`, at another `size`; both are (height, width)."""
        item = Item(name, "", full[1], full[0])
        found = {cue: read_map(self.root, item, cue) for cue in REGISTRY}
        return {
            cue: to_tensor(np.asarray(REGISTRY[cue].resize(picture, size, None)))[0]
            for cue, picture in found.items()
            if picture is not None
        }


def _of_size(pixels: Pixels, image: Pixels, path: Path) -> Pixels:
    if pixels.shape[:2] != image.shape[:2]:
        found, expected = (f"{x.shape[1]} x {x.shape[0]}" for x in (pixels, image))
        raise InputError(f"{path} is {found} pixels, its image {expected}; expected parts of one size")
    return pixels


def drawn_samples(data: DrawnSamples) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """(name, sample) pairs, in order."""
    return ((name_of(position), data[position]) for position in range(len(data)))


def test_objects(config: TripletConfig, objects: str, stretch: bool) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Objects of the layered pictures of the test split, unaugmented, and their cues; named "<picture>-<layer>".

    Args:
        config: its `layered` indexes, `size`, first of `aspects`, `masks`, and `min_area` and `max_area` are used.
        objects: "one" per picture, chosen by a hash of its id, or "all".
        stretch: resize the whole picture, instead of a crop that contains the object.
    """
    if not config.layered:
        raise InputError("data.triplets.layered names no index; expected files that tools/prepare_data.py wrote")
    indexes = [Index(path) for path in config.layered]
    for index in indexes:
        if index.kind != "layered":
            raise InputError(f"{index.path} is an index of {index.kind}; expected an index of layered pictures")
    every = (_objects_of(index, index[int(row)], config, stretch) for index in indexes for row in index.rows("test"))
    return chain.from_iterable(islice(found, 1) if objects == "one" else found for found in every)


test_objects.__test__ = False  # type: ignore[attr-defined]


def _objects_of(
    index: Index, item: Item, config: TripletConfig, stretch: bool
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The objects of one picture whose area is within the limits, in an order that depends only on its id."""
    pictures, paths = load_layers(index, item), list(layer_paths(index.root, item))
    rng = np.random.default_rng(seed_of(item.id))
    source, size = (item.width, item.height), config.buckets()[0]
    for chosen in rng.permutation(np.arange(1, len(pictures))).tolist():
        box = (0.0, 0.0, float(item.width), float(item.height))
        crop = Crop(source, box, size) if stretch else random_crop(source, size, rng, bounds(pictures[chosen]))
        layers = [layer_tensor(crop.apply(picture, path)) for picture, path in zip(pictures, paths, strict=True)]
        scene = scene_around(layers, chosen)
        if config.allows(object_area(scene.visible)):
            sample, unused = build_sample(scene, masks=config.masks, rng=rng), np.random.default_rng(0)
            cues = build_cues(sample["image"], unused, dropout=0, maps=load_maps(index, item, crop))
            yield f"{item.id}-{chosen}", {**sample, **cues}


def export_samples(samples: Iterator[tuple[str, Mapping[str, Tensor]]], root: Path) -> int:
    """Writes samples and their cue maps as a test set and returns their number; existing files are kept."""
    count = 0
    for name, sample in tqdm(samples, desc=f"export to {root}", unit="image"):
        count += 1
        cues = zip(CUES, sample["cues"], sample["cues_present"], strict=True)
        maps = {cue: values for cue, values, present in cues if present}
        for part, values in ({part: sample[part] for part in EXPORTED} | maps).items():
            path = root / part / f"{name}.png"
            if not path.is_file():
                write_picture(path, _levels(values, part))
    return count


def _levels(values: Tensor, part: str) -> Pixels:
    """A part or cue map of a sample as 8-bit pixels."""
    if part in ("mask", "occluder"):
        return to_pixels(2 * values - 1)[..., 0]
    return to_pixels(with_pixel_alpha(values))
