"""OpenImages V7 as a source of backgrounds: pictures with small boxes and without people, animals or vehicles.

A picture without boxes is not necessarily empty: most of the nine million were never annotated. Only pictures with
verified labels of the boxable classes were, so only these are considered.
"""

import csv
import logging
import re
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from layerdecomp.data.folders import open_picture, orientation, upright_size
from layerdecomp.data.index import Item
from layerdecomp.errors import InputError

logger = logging.getLogger(__name__)
SPLITS = ("train", "validation", "test")
ID = re.compile(r"[0-9a-f]{16}")

# Each table's published file names; the last is FiftyOne's name, relative to the split's folder.
TABLES = {
    "labels": ("{split}-annotations-human-imagelabels-boxable.csv", "labels/classifications.csv"),
    "boxes": ("oidv6-{split}-annotations-bbox.csv", "{split}-annotations-bbox.csv", "labels/detections.csv"),
    "classes": (
        "class-descriptions-boxable.csv",
        "oidv6-class-descriptions-boxable.csv",
        "oidv7-class-descriptions-boxable.csv",
        "metadata/classes.csv",
    ),
    "rotations": (
        "{split}-images-boxable-with-rotation.csv",
        "{split}-images-with-rotation.csv",
        "oidv6-{split}-images-with-labels-with-rotation.csv",
        "metadata/image_ids.csv",
    ),
}
FOLDERS = ("", "metadata", "labels", "annotations", "{split}", "{split}/metadata", "{split}/labels")

# Display names of classes that a background must not show: the subtrees of Person, Animal and Vehicle in the published
# hierarchy of the 600 boxable classes, including parts ("Wheel" is a part of "Land vehicle"), except "Teddy bear".
PEOPLE = """Person, Man, Woman, Boy, Girl, Human body, Human head, Human face, Human eye, Human ear, Human nose,
Human mouth, Human hair, Human beard, Human arm, Human hand, Human leg, Human foot, Skull"""
ANIMALS = """Animal, Bird, Magpie, Woodpecker, Blue jay, Ostrich, Penguin, Raven, Chicken, Eagle, Owl, Duck, Canary,
Goose, Swan, Falcon, Parrot, Sparrow, Turkey, Invertebrate, Tick, Centipede, Marine invertebrates, Starfish, Isopod,
Squid, Lobster, Jellyfish, Shrimp, Crab, Insect, Bee, Beetle, Ladybug, Ant, Moths and butterflies, Caterpillar,
Butterfly, Dragonfly, Scorpion, Worm, Spider, Oyster, Snail, Shellfish, Mammal, Bat, Carnivore, Bear, Brown bear, Panda,
Polar bear, Cat, Fox, Jaguar, Lynx, Red panda, Tiger, Lion, Dog, Leopard, Cheetah, Otter, Raccoon, Camel, Cattle,
Giraffe, Rhinoceros, Goat, Horse, Hamster, Kangaroo, Koala, Mouse, Pig, Rabbit, Squirrel, Sheep, Zebra, Monkey,
Hippopotamus, Deer, Elephant, Porcupine, Hedgehog, Bull, Antelope, Mule, Marine mammal, Dolphin, Whale, Sea lion,
Harbor seal, Skunk, Alpaca, Armadillo, Reptile, Dinosaur, Lizard, Snake, Turtle, Tortoise, Sea turtle, Crocodile, Frog,
Fish, Goldfish, Shark, Rays and skates, Seahorse"""
VEHICLES = """Vehicle, Land vehicle, Ambulance, Cart, Bicycle, Bus, Snowmobile, Golf cart, Motorcycle, Segway, Tank,
Train, Truck, Unicycle, Car, Limousine, Van, Taxi, Wheelchair, Watercraft, Boat, Barge, Gondola, Canoe, Jet ski,
Submarine, Aircraft, Helicopter, Airplane, Rocket, Auto part, Vehicle registration plate, Wheel, Bicycle wheel,
Seat belt, Tire"""
UNWANTED = frozenset(name for names in (PEOPLE, ANIMALS, VEHICLES) for name in re.split(r",\s+", names))


@dataclass(frozen=True)
class OpenImages:
    """One split of OpenImages: `<split>/<id>.jpg`, or `<split>/data/<id>.jpg` as FiftyOne downloads it.

    Without `ids`, pictures are selected from three published tables (`TABLES`, searched for in `FOLDERS`): those with
    verified labels, none in `UNWANTED`, and with boxes that cover at most `max_box_area` of the picture. If the table
    of rotations is found, it is applied.
    """

    root: Path
    split: str = "train"
    ids: Path | None = None  # a file of ids to use instead, one per line, "<id>" or "<split>/<id>"
    max_box_area: float = 0.2  # as a fraction of the picture
    source: ClassVar[str] = "openimages"
    kind: ClassVar[str] = "backgrounds"
    licence: ClassVar[str] = "CC BY 2.0 (images), CC BY 4.0 (annotations)"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"split is {self.split!r}; expected {', '.join(SPLITS)}")
        if not 0 <= self.max_box_area <= 1:
            raise InputError(f"max_box_area is {self.max_box_area}; expected a fraction of the picture, 0 to 1")

    def candidates(self) -> list[str]:
        """Paths relative to the root; for pictures that must be rotated, followed by "@" and the degrees."""
        files = self._files()
        kept = self._listed(files) if self.ids else self._empty_scenes(files)
        rotations = self._rotations(kept)
        return sorted(files[image] + (f"@{rotations[image]}" if image in rotations else "") for image in kept)

    def read(self, candidate: str) -> Item:
        path, _, turn = candidate.partition("@")
        picture = open_picture(self.root / path)
        width, height = upright_size(picture)
        # the table repeats the EXIF orientation: apply it only if the file no longer has its own
        rotation = int(turn or 0) if orientation(picture) == 1 else 0
        if rotation % 180:
            width, height = height, width
        return Item(Path(path).stem, path, width, height, rotation=rotation)

    def _files(self) -> dict[str, str]:
        """Id -> path relative to the root."""
        files: dict[str, str] = {}
        for folder in (self.split, f"{self.split}/data"):
            for name in _names(self.root / folder):
                image, _, extension = name.partition(".")
                if extension != "jpg" or not ID.fullmatch(image):
                    continue
                if image in files:
                    raise InputError(f"{self.root}: {files[image]} and {folder}/{name} are the same picture; keep one")
                files[image] = f"{folder}/{name}"
        if not files:
            places = f"{self.split}/<16 hex digits>.jpg or {self.split}/data/<16 hex digits>.jpg"
            raise InputError(f"{self.root} holds no pictures of OpenImages; expected {places}")
        return files

    def _listed(self, files: Collection[str]) -> set[str]:
        """The ids in the user's list that exist on disk."""
        assert self.ids is not None
        listed = set(_read_ids(self.ids, self.split))
        kept = listed.intersection(files)
        if not kept:
            raise InputError(f"{self.ids}: none of its {len(listed)} ids of {self.split} has a picture in {self.root}")
        if len(kept) < len(listed):
            logger.warning("%s: %d of %d ids have no picture", self.ids, len(listed) - len(kept), len(listed))
        return kept

    def _empty_scenes(self, files: Collection[str]) -> set[str]:
        """The ids among `files` that are mostly background, according to the tables."""
        tables = {name: self._find(name) for name in ("labels", "boxes", "classes")}
        missing = [TABLES[name][0].format(split=self.split) for name, path in tables.items() if path is None]
        if missing:
            raise InputError(
                f"{self.root} lacks {', '.join(missing)}; put it there or into metadata/, or list the pictures to use "
                "in a file (ids=...), or use all pictures in the folder (source=backgrounds)"
            )
        labels, boxes, classes = (path for path in tables.values() if path is not None)
        unwanted = _unwanted_classes(classes)
        return _uncovered(boxes, _without(labels, files, unwanted), unwanted, self.max_box_area)

    def _rotations(self, kept: Collection[str]) -> dict[str, int]:
        """Id -> degrees, for pictures that are not upright."""
        path = self._find("rotations")
        if path is None:
            name = TABLES["rotations"][0].format(split=self.split)
            logger.warning("%s: no %s, so all pictures are assumed to be upright", self.root, name)
            return {}
        rows = ((image, _degrees(path, turn)) for image, turn in _rows(path, "ImageID", "Rotation") if image in kept)
        return {image: turn for image, turn in rows if turn}

    def _find(self, table: str) -> Path | None:
        *published, fiftyone = TABLES[table]
        names = [f"{folder}/{name}" for folder in FOLDERS for name in published] + ["{split}/" + fiftyone]
        paths = (self.root / name.format(split=self.split).lstrip("/") for name in names)
        return next((path for path in paths if path.is_file()), None)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}); change its permissions") from error


def _read_ids(path: Path, split: str) -> Iterator[str]:
    """The ids of a split in a user's list; empty lines and other splits are skipped."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected a text file of one id per line") from error
    for number, line in enumerate(lines, 1):
        where, _, image = line.strip().rpartition("/")
        if line.strip() and (not ID.fullmatch(image) or where not in ("", *SPLITS)):
            raise InputError(f"{path}, line {number}: {line!r}; expected 16 hex digits, after <split>/ or alone")
        if image and where in ("", split):
            yield image


def _rows(path: Path, *columns: str) -> Iterator[list[str]]:
    """The named columns of a table, streamed row by row: the tables may not fit in memory."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if missing := [name for name in columns if name not in header]:
                raise InputError(f"{path} has no column {missing[0]}; expected OpenImages' own file: download it again")
            places = [header.index(name) for name in columns]
            for row in rows:
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {rows.line_num}: {len(row)} columns, expected {len(header)}; download it again"
                    )
                yield [row[place] for place in places]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); download it again") from error


def _numbers(path: Path, values: list[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError as error:
        raise InputError(f"{path} holds {', '.join(values)}; expected numbers: download it again") from error


def _degrees(path: Path, turn: str) -> int:
    """A rotation in degrees; 0 if it is unknown (empty or nan)."""
    (degrees,) = _numbers(path, [turn or "nan"])
    if not isnan(degrees) and degrees not in (0, 90, 180, 270):
        raise InputError(f"{path} holds the rotation {turn}; expected 0, 90, 180 or 270")
    return 0 if isnan(degrees) else int(degrees)


def _unwanted_classes(path: Path) -> frozenset[str]:
    """The MIDs of the classes in `UNWANTED`, from a table of MIDs and display names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); download it again") from error
    if missing := {"Person", "Animal", "Vehicle"}.difference(names.values()):
        raise InputError(f"{path} has no class {min(missing)}; expected rows such as /m/01g317,Person")
    return frozenset(mid for mid, name in names.items() if name in UNWANTED)


def _without(labels: Path, files: Collection[str], unwanted: Collection[str]) -> set[str]:
    """The ids among `files` that have verified labels, none of them confirming an `unwanted` class."""
    seen, refused = set(), set()
    for image, label, confidence in _rows(labels, "ImageID", "LabelName", "Confidence"):
        if image in files:
            seen.add(image)
            if label in unwanted and _numbers(labels, [confidence])[0] > 0:
                refused.add(image)
    return seen - refused


def _uncovered(table: Path, images: set[str], unwanted: Collection[str], max_area: float) -> set[str]:
    """The `images` without a box of an `unwanted` class, whose boxes cover at most a fraction `max_area`."""
    kept = set(images)
    boxes: dict[str, array[float]] = {}
    for image, label, *corners in _rows(table, "ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax"):
        if image not in kept:
            continue
        if label in unwanted:
            kept.discard(image)
        else:
            boxes.setdefault(image, array("d")).extend(_numbers(table, corners))
    covered = {image for image, corners in boxes.items() if covered_area(np.reshape(corners, (-1, 4))) > max_area}
    return kept - covered


def covered_area(boxes: NDArray[np.float64]) -> float:
    """The exact area of the union of boxes inside the unit square, on the grid formed by all their edges.

    Args:
        boxes: (N, 4), each XMin, XMax, YMin, YMax.
    """
    left, right, top, bottom = boxes.clip(0, 1).T
    xs, ys = (np.unique(np.concatenate(edges)) for edges in ((left, right), (top, bottom)))
    depth = np.zeros((len(ys), len(xs)), np.int32)  # its cumulative sum is the number of boxes over each cell
    for rows, row_sign in ((top, 1), (bottom, -1)):
        for columns, column_sign in ((left, 1), (right, -1)):
            np.add.at(depth, (np.searchsorted(ys, rows), np.searchsorted(xs, columns)), row_sign * column_sign)
    covered = depth.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return float(np.diff(ys) @ covered @ np.diff(xs))
