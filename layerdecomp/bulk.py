"""Splits folders of images and masks into layers, one output folder per pair; resumes where it stopped."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from layerdecomp.conditioning import TOKEN_FACTOR
from layerdecomp.data.folders import by_stem, upright_size
from layerdecomp.decomposer import SHA256_BY_SOURCE, Decomposer, Prepared
from layerdecomp.errors import InputError, RunError, check_whole_number, first_few
from layerdecomp.files import keep_settings
from layerdecomp.imaging.geometry import fitted_size
from layerdecomp.imaging.layers import FORMATS, READABLE, Layers
from layerdecomp.models.depth import DepthEstimator
from layerdecomp.sampling import Progress

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"  # in the output folder: what its layers were made with
NAMED = 5  # files that an error lists


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    stem: str  # path below the folder without extension, the same for both files
    image: Path
    mask: Path

    def is_split(self, folder: Path, names: Sequence[str]) -> bool:
        """Whether the files of these names exist and are no older than the image and mask."""
        try:
            newest = max(self.image.stat().st_mtime_ns, self.mask.stat().st_mtime_ns)
            return all((folder / name).stat().st_mtime_ns >= newest for name in names)
        except FileNotFoundError:
            return False

    def padded_size(self, max_side: int) -> tuple[int, int]:
        """The (height, width) of its layers, from the file header; (0, 0) if that cannot be read."""
        try:
            with Image.open(self.image, formats=READABLE) as picture:
                width, height = upright_size(picture)
        except Exception:  # a damaged file can raise anything; reported when it is read
            return 0, 0
        height, width = (-(-side // TOKEN_FACTOR) * TOKEN_FACTOR for side in fitted_size((height, width), max_side))
        return height, width


def pair_up(images: Path, masks: Path, out: Path) -> list[Pair]:
    """Pairs images and masks below two folders by their paths without extensions, to be split into `out`.

    Raises:
        InputError: a folder is missing or empty, a file has no partner, or `out` lies in one of the folders.
    """
    for key, path, other in (("image", images, masks), ("mask", masks, images)):
        if not path.is_dir() and other.is_dir():
            raise InputError(f"{key}={path} is not a folder, but {other} is; expected two folders, or two files")
        if out.resolve().is_relative_to(path.resolve()):
            raise InputError(f"out={out} lies in {key}={path}, whose images are read; choose another folder")
    found, marked = by_stem(images), by_stem(masks)
    lacking = [
        f"{len(stems)} of {folder} have no {partner} ({first_few(stems, NAMED)})"
        for folder, partner, stems in (
            (images, f"mask in {masks}", [name for stem, name in found.items() if stem not in marked]),
            (masks, f"image in {images}", [name for stem, name in marked.items() if stem not in found]),
        )
        if stems
    ]
    if lacking:
        raise InputError(f"{' and '.join(lacking)}; expected an image and a mask of each name")
    return [Pair(stem, images / name, masks / marked[stem]) for stem, name in found.items()]


def decompose_folder(
    decomposer: Decomposer,
    pairs: Sequence[Pair],
    out: Path,
    settings: Mapping[str, Any],
    *,
    formats: Sequence[str] = ("png",),
    seed: int = 0,
    depth: DepthEstimator | None = None,
    batch_size: int = 1,
    progress: Progress = iter,
) -> list[str]:
    """Splits every pair into ``out / stem``, unless its layers exist and are newer than the image and mask.

    Args:
        settings: identify the decomposer and depth estimator; written to `SETTINGS` with the seed, the sampling
            settings and hashes of the code, so that layers made in different ways never share a folder.
        formats: as in `Layers.save`.
        seed, depth: as in `Decomposer.decompose`, for every image.
        batch_size: images processed at once, if they have the same size.
        progress: wraps the steps of a batch; a bar of the images is shown as well.

    Returns:
        the stems of unreadable images, for which a warning is logged and nothing is written.

    Raises:
        InputError: an argument is out of range, or `out` cannot be used.
        RunError: a batch does not fit into memory.
    """
    seed, batch_size = check_whole_number("seed", seed), check_whole_number("batch_size", batch_size, 1)
    if not _holds_layers(out):  # of any pair, also of an earlier run
        (out / SETTINGS).unlink(missing_ok=True)
    keep_settings(out / SETTINGS, {**settings, "seed": seed, **asdict(decomposer.sample), **SHA256_BY_SOURCE})
    names = [name for format in formats for name in FORMATS[format]]
    left = [pair for pair in pairs if not pair.is_split(out / pair.stem, names)]
    left.sort(key=lambda pair: pair.padded_size(decomposer.sample.max_side))  # fills batches with images of one size
    failed: list[str] = []
    done = len(pairs) - len(left)
    bar = tqdm(total=len(pairs), initial=done, desc="decompose", unit="image")
    with logging_redirect_tqdm(), bar, ThreadPoolExecutor(max_workers=1) as writer:
        saving: Iterator[Path] = iter(())  # the batch that is being written while the next one is drawn
        for start in range(0, len(left), batch_size):
            chunk = left[start : start + batch_size]
            read = {pair.stem: found for pair in chunk if (found := _read(decomposer, pair, depth))}
            failed += [pair.stem for pair in chunk if pair.stem not in read]
            bar.update(len(chunk) - len(read))
            for same in _by_size(read):
                drawn = _drawn(decomposer, same, seed, progress)
                bar.update(len([*saving]))  # waits, so that no more than two batches are in memory
                saving = writer.map(lambda stem, layers: layers.save(out / stem, formats), drawn, drawn.values())
        bar.update(len([*saving]))
    return failed


def _holds_layers(out: Path) -> bool:
    names = {name for files in FORMATS.values() for name in files}
    return any(path.name in names for path in out.rglob("*"))


def _drawn(decomposer: Decomposer, same: Mapping[str, Prepared], seed: int, progress: Progress) -> dict[str, Layers]:
    try:
        drawn = decomposer.decompose_batch(list(same.values()), seed=seed, progress=progress)
    except torch.OutOfMemoryError as error:
        height, width = next(iter(same.values())).size
        raise RunError(
            f"{len(same)} images of {width} x {height} pixels do not fit into memory at once; finished layers are "
            "kept: resume with a smaller batch_size=, or start over with a smaller sample.max_side="
        ) from error
    return dict(zip(same, drawn, strict=True))


def _read(decomposer: Decomposer, pair: Pair, depth: DepthEstimator | None) -> Prepared | None:
    try:
        return decomposer.prepare(pair.image, pair.mask, depth=depth)
    except InputError as error:
        logger.warning("%s is skipped: %s", pair.stem, error)
        return None


def _by_size(read: Mapping[str, Prepared]) -> Iterator[dict[str, Prepared]]:
    for size in dict.fromkeys(image.size for image in read.values()):
        yield {stem: image for stem, image in read.items() if image.size == size}
