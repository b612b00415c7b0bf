"""OpenImages: which pictures are backgrounds, how they are rotated, and the supported forms of its tables."""

import csv
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerdecomp.data.index import Item, Reader
from layerdecomp.data.openimages import UNWANTED, OpenImages, covered_area
from layerdecomp.errors import InputError

WIDTH, HEIGHT = 15, 10
CLASSES = {"/m/01g317": "Person", "/m/0jbk": "Animal", "/m/07yv9": "Vehicle", "/m/0bt9lr": "Dog", "/m/0h9mv": "Tire"}
CLASSES |= {"/m/07j7r": "Tree", "/m/0d4v4": "Window", "/m/0kmg4": "Teddy bear"}
MIDS = {name: mid for mid, name in CLASSES.items()}
LABEL_COLUMNS = ["ImageID", "Source", "LabelName", "Confidence"]
BOX_COLUMNS = ["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsOccluded"]

Rows = list[list[Any]]


def _id(number: int) -> str:
    return f"{number:016x}"


def _save(path: Path, seed: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def _table(path: Path, header: list[str], rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path


def _label(number: int, name: str, confidence: Any = 1) -> list[Any]:
    return [_id(number), "verification", MIDS[name], confidence]


def _box(number: int, name: str, *corners: float) -> list[Any]:
    return [_id(number), "xclick", MIDS[name], 1, *corners, 0]


LABELS = [
    _label(1, "Tree"),
    _label(1, "Person", 0),  # verified to be absent
    _label(2, "Tree"),
    _label(2, "Dog", "1.0"),
    _label(3, "Window"),
    _label(4, "Teddy bear"),
    _label(5, "Person", 0),
    _label(6, "Tree"),
    _label(99, "Tree"),  # not downloaded
]
BOXES = [
    _box(1, "Tree", 0.0, 0.4, 0.0, 0.4),
    _box(3, "Window", 0.0, 0.5, 0.0, 0.5),
    _box(4, "Teddy bear", 0.1, 0.4, 0.1, 0.4),
    _box(3, "Window", 0.5, 1.0, 0.5, 1.0),
    _box(4, "Teddy bear", 0.1, 0.4, 0.1, 0.4),
    _box(6, "Tire", 0.1, 0.2, 0.1, 0.2),
    _box(7, "Tree", 0.1, 0.2, 0.1, 0.2),
]
NAMES = {
    "labels": "{split}-annotations-human-imagelabels-boxable.csv",
    "boxes": "{split}-annotations-bbox.csv",
    "classes": "class-descriptions-boxable.csv",
    "rotations": "{split}-images-with-rotation.csv",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures 1 to 7 of the validation split, with their tables.

    1 has only a small tree, 2 shows a dog, 3 has boxes over half of it, 4 the same small box twice, 5 no boxes,
    6 a box of a tire, and 7 has no verified labels.
    """
    for number in range(1, 8):
        _save(tmp_path / "validation" / f"{_id(number)}.jpg", number)
    _save(tmp_path / "train" / f"{_id(8)}.jpg")
    _write_tables(tmp_path, {name: pattern.format(split="validation") for name, pattern in NAMES.items()})
    return tmp_path


def _write_tables(root: Path, names: dict[str, str]) -> None:
    _table(root / names["labels"], LABEL_COLUMNS, LABELS)
    _table(root / names["boxes"], BOX_COLUMNS, BOXES)
    _table(root / names["classes"], [], [[mid, name] for mid, name in CLASSES.items()])
    rows = [[_id(number), "validation", turn] for number, turn in enumerate(["", "0.0", 270, "nan", "180"], 1)]
    _table(root / names["rotations"], ["ImageID", "Subset", "Rotation"], rows)


def _numbers(reader: OpenImages) -> list[int]:
    return [int(Path(candidate.partition("@")[0]).stem, 16) for candidate in reader.candidates()]


def _validation(root: Path, **settings: Any) -> OpenImages:
    return OpenImages(root, split="validation", **settings)


def test_backgrounds_are_chosen_by_labels_and_boxes(root: Path) -> None:
    assert _numbers(_validation(root)) == [1, 4, 5]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0, [5]), (0.1, [4, 5]), (0.15, [4, 5]), (0.17, [1, 4, 5]), (0.5, [1, 3, 4, 5])]
)
def test_the_threshold_is_on_the_union_of_boxes(root: Path, threshold: float, expected: list[int]) -> None:
    assert _numbers(_validation(root, max_box_area=threshold)) == expected  # twice the box of 4 would be 0.18


FIFTYONE = {"labels": "labels/classifications.csv", "boxes": "labels/detections.csv"}
FIFTYONE |= {"classes": "metadata/classes.csv", "rotations": "metadata/image_ids.csv"}


@pytest.mark.parametrize("folder", ["metadata", "labels", "validation", "validation/labels"])
def test_tables_are_found_in_every_usual_folder(root: Path, folder: str) -> None:
    (root / folder).mkdir(exist_ok=True)
    for path in root.glob("*.csv"):
        path.rename(root / folder / path.name)
    assert _numbers(_validation(root)) == [1, 4, 5]


def test_the_layout_of_fiftyone_is_read(root: Path) -> None:
    for path in root.glob("*.csv"):
        path.unlink()
    (root / "validation").rename(root / "data")
    (root / "validation").mkdir()
    (root / "data").rename(root / "validation" / "data")
    _write_tables(root / "validation", FIFTYONE)
    reader = _validation(root, max_box_area=0.5)
    assert reader.candidates() == [
        f"validation/data/{_id(n)}.jpg" + ("@270" * (n == 3)) + ("@180" * (n == 5)) for n in (1, 3, 4, 5)
    ]
    assert reader.read(f"validation/data/{_id(1)}.jpg") == Item(_id(1), f"validation/data/{_id(1)}.jpg", WIDTH, HEIGHT)


def test_the_file_names_of_the_training_split_are_read(root: Path) -> None:
    _save(root / "train" / f"{_id(9)}.jpg")
    names = ["train-annotations-human-imagelabels-boxable.csv", "oidv6-train-annotations-bbox.csv"]
    _table(root / names[0], LABEL_COLUMNS, [_label(8, "Tree"), _label(9, "Tree")])
    _table(root / names[1], BOX_COLUMNS, [_box(8, "Tree", 0, 1, 0, 1)])
    _table(root / "train-images-boxable-with-rotation.csv", ["ImageID", "Rotation"], [[_id(9), "90.0"]])
    assert OpenImages(root).candidates() == [f"train/{_id(9)}.jpg@90"]


def test_a_header_of_class_names_and_a_byte_order_mark_are_accepted(root: Path) -> None:
    path = root / "class-descriptions-boxable.csv"
    path.write_text("\ufeffLabelName,DisplayName\n" + path.read_text())
    labels = root / "validation-annotations-human-imagelabels-boxable.csv"
    labels.write_text("\ufeff" + labels.read_text())
    assert _numbers(_validation(root)) == [1, 4, 5]


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_is_stored_counter_clockwise_and_not_yet_applied(root: Path, turn: int) -> None:
    _table(root / "validation-images-with-rotation.csv", ["ImageID", "Rotation"], [[_id(5), turn], [_id(1), 90]])
    reader: Reader = _validation(root, max_box_area=0)
    (candidate,) = reader.candidates()
    item = reader.read(candidate)
    assert item is not None and (item.id, item.path, item.rotation) == (_id(5), f"validation/{_id(5)}.jpg", turn)
    with Image.open(root / item.path) as picture:
        assert picture.rotate(item.rotation, expand=True).size == (item.width, item.height)


def test_a_picture_with_exif_orientation_is_not_rotated_twice(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(root / "validation" / f"{_id(3)}.jpg", exif=exif)
    item = _validation(root).read(f"validation/{_id(3)}.jpg@270")
    assert (item.width, item.height, item.rotation) == (HEIGHT, WIDTH, 0)


def test_a_missing_table_of_rotations_logs_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "validation-images-with-rotation.csv").unlink()
    with caplog.at_level(logging.WARNING):
        assert "@" not in "".join(_validation(root, max_box_area=1).candidates())
    assert "no validation-images-boxable-with-rotation.csv, so all pictures are assumed to be upright" in caplog.text


def _id_list(root: Path, *lines: str) -> Path:
    path = root / "ids.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_of_ids_overrides_the_filter(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = _id_list(root, _id(7), "", f"  validation/{_id(2)} ", f"train/{_id(1)}", f"validation/{_id(3)}", _id(7))
    for path in root.glob("*annotations*.csv"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert _numbers(_validation(root, ids=ids)) == [2, 3, 7]
        assert _validation(root, ids=ids).candidates()[1].endswith("@270")
        assert not caplog.messages
        assert _numbers(_validation(root, ids=_id_list(root, _id(7), _id(98), _id(99)))) == [7]
    assert "ids.txt: 2 of 3 ids have no picture" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0123", r"ids\.txt, line 2: '0123'; expected 16 hex digits"),
        (f"valid/{_id(1)}", "line 2: .*after <split>/ or alone"),
        (_id(1) + ".jpg", "line 2"),
        (_id(99), "none of its 1 ids of validation has a picture in"),
    ],
)
def test_invalid_id_lists_are_refused(root: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _validation(root, ids=_id_list(root, f"train/{_id(8)}", line)).candidates()


def test_a_missing_id_list_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt cannot be read .*one id per line"):
        _validation(root, ids=root / "none.txt").candidates()


@pytest.mark.parametrize("table", ["labels", "boxes", "classes"])
def test_a_missing_table_is_named(root: Path, table: str) -> None:
    (root / NAMES[table].format(split="validation")).unlink()
    name = NAMES[table].format(split=r"(oidv6-)?validation")
    with pytest.raises(InputError, match=rf"lacks {name}; put it there or into metadata/, .*ids=.*source=backgrounds"):
        _validation(root).candidates()


def test_all_missing_tables_are_named(root: Path) -> None:
    for path in root.glob("*.csv"):
        path.unlink()
    expected = "lacks validation-annotations-human-imagelabels-boxable.csv, .*bbox.csv, class-descriptions-boxable.csv;"
    with pytest.raises(InputError, match=expected):
        _validation(root).candidates()


Damage = Callable[[str], str]


@pytest.mark.parametrize(
    ("table", "damage", "message"),
    [
        ("labels", lambda text: text.replace("LabelName", "Label"), "has no column LabelName"),
        ("labels", lambda text: text.replace("1.0", "yes"), "holds yes; expected numbers"),
        ("labels", lambda text: text[: text.rindex(",")], r"line 10: 3 columns, expected 4; download it again"),
        ("labels", lambda text: "", "has no column ImageID"),
        ("boxes", lambda text: text.replace("YMax", "Y"), "has no column YMax"),
        ("boxes", lambda text: text.replace("0.4", "O.4"), r"holds 0\.0, O\.4, 0\.0, O\.4; expected numbers"),
        ("classes", lambda text: text.replace("Person", "Persona"), "has no class Person; expected rows such as"),
        ("classes", lambda text: "/m/01g317,Person\n", "has no class Animal"),
        ("rotations", lambda text: text.replace("Rotation", "Turn"), "has no column Rotation"),
        ("rotations", lambda text: text.replace("180", "45"), "holds the rotation 45; expected 0, 90, 180 or 270"),
    ],
)
def test_damaged_tables_are_refused(root: Path, table: str, damage: Damage, message: str) -> None:
    path = root / NAMES[table].format(split="validation")
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(InputError, match=rf"{path.name}.* {message}"):
        _validation(root).candidates()


def test_binary_tables_are_refused(root: Path) -> None:
    for table in ("boxes", "labels", "classes"):
        path = root / NAMES[table].format(split="validation")
        path.write_bytes(b"\x1f\x8b\x08\xff\xfe" * 9)
        with pytest.raises(InputError, match=rf"{path.name} cannot be read .*download it again"):
            _validation(root).candidates()


def test_a_picture_in_both_layouts_is_refused(root: Path) -> None:
    _save(root / "validation" / "data" / f"{_id(3)}.jpg")
    expected = f"validation/{_id(3)}.jpg and validation/data/{_id(3)}.jpg are the same picture"
    with pytest.raises(InputError, match=expected):
        _validation(root).candidates()


def test_other_files_are_ignored(root: Path) -> None:
    for name in (f".{_id(5)}.jpg", f"{_id(0xFE)}.jpg.part", f"{_id(0xFE)}.png", f"{_id(0xFE)[1:]}.jpg", "cover.jpg"):
        (root / "validation" / name).write_bytes(b"never opened")
    assert _numbers(_validation(root, max_box_area=1)) == [1, 3, 4, 5]


def test_a_truncated_picture_is_refused(root: Path) -> None:
    path = root / "validation" / f"{_id(5)}.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    (candidate,) = _validation(root, max_box_area=0).candidates()
    with pytest.raises(InputError, match=rf"{_id(5)}\.jpg cannot be read as an image"):
        _validation(root).read(candidate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "val"}, "split is 'val'; expected train, validation, test"),
        ({"max_box_area": 20}, "max_box_area is 20; expected a fraction"),
        ({"split": "test"}, r"holds no pictures of OpenImages; expected test/<16 hex digits>\.jpg"),
    ],
)
def test_invalid_settings_are_refused(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OpenImages(root, **settings).candidates()


def test_a_reader_can_be_pickled_for_workers(root: Path) -> None:
    reader = _validation(root, max_box_area=0.5)
    candidates = reader.candidates()
    assert pickle.loads(pickle.dumps(reader)) == reader
    assert [pickle.loads(pickle.dumps(reader)).read(name) for name in candidates] == [
        reader.read(name) for name in candidates
    ]
    assert (reader.source, reader.kind) == ("openimages", "backgrounds") and "CC BY 2.0" in reader.licence


def test_unwanted_classes_are_people_animals_and_vehicles() -> None:
    assert len(UNWANTED) == 19 + 110 + 36  # people, animals and vehicles in the published hierarchy
    assert {"Person", "Human hand", "Bee", "Sea turtle", "Rays and skates", "Bicycle wheel", "Seat belt"} <= UNWANTED
    assert not {"Tree", "Teddy bear", "House", "Clothing", ""} & UNWANTED


def _raster_area(boxes: np.ndarray, cells: int) -> float:
    """Area of a union of boxes with corners on a grid of `cells`, by rasterising it."""
    grid = np.zeros((cells, cells), bool)
    for left, right, top, bottom in (boxes * cells).round().astype(int).clip(0, cells):
        grid[top:bottom, left:right] = True
    return float(grid.mean())


@pytest.mark.parametrize("count", [1, 2, 5, 40, 300])
def test_covered_area_equals_the_rasterised_union(count: int) -> None:
    rng = np.random.default_rng(count)
    for cells in (4, 16, 64):
        low = rng.integers(0, cells, (2, count))
        size = rng.integers(0, max(2, cells // 3), (2, count))
        (left, top), (right, bottom) = low, low + size  # some reach outside, some are empty
        boxes = np.stack([left, right, top, bottom], axis=1) / cells
        assert covered_area(boxes) == pytest.approx(_raster_area(boxes, cells), abs=1e-9)


def test_covered_area_is_exact_off_the_grid() -> None:
    thirds = np.array([[0.1, 0.1 + 1 / 3, 0.2, 0.2 + 1 / 7], [0.1 + 1 / 6, 0.6, 0.2, 0.9], [-1, 0.05, -1, 2]])
    expected = 1 / 21 + (0.5 - 1 / 6) * 0.7 - 1 / 6 / 7 + 0.05
    assert covered_area(thirds) == pytest.approx(expected, abs=1e-12)
