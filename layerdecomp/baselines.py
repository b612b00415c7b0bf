"""Baselines without learning: layers from an image and a mask."""

import io
import warnings
from contextlib import redirect_stdout
from types import ModuleType

import numpy as np
import torch
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

from layerdecomp.errors import InputError, needs_extra
from layerdecomp.imaging.geometry import dilate

# Width of the trimap's unknown band along the mask's outline, as a fraction of the shorter side: wide enough for
# imperfect masks (docs/results.md has others, measured on training scenes).
TRIMAP_BAND = 0.1
RIM = 1  # pixels around the mask that are also inpainted, because they hold the object's antialiased edge


def classical(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Biharmonic inpainting as the background; the masked image as the foreground.

    Runs on the CPU; a mask over a quarter of the image takes 0.1 s at 128 x 128 and 20 s at 1024 x 1024.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) in {0, 1}, 1 = object.

    Returns:
        background (B, 3, H, W) in [-1, 1], equal to the image outside the mask grown by 1 pixel, and foreground
        (B, 4, H, W); both on the image's device.

    Raises:
        InputError: a mask leaves no pixel to inpaint from.
    """
    hole = dilate(mask > 0.5, RIM)
    full = hole.flatten(1).all(dim=1)
    if full.any():
        raise InputError(
            f"mask {int(full.int().argmax())} of the batch, grown by {RIM} pixel, covers the whole image; expected "
            "some background around the object to inpaint from: use a smaller mask"
        )
    filled = [_inpaint(picture, region) for picture, region in zip(image, hole, strict=True)]
    return torch.stack(filled).to(image), base_foreground(image, mask)


def base_foreground(image: Tensor, mask: Tensor) -> Tensor:
    """The masked image with the mask as alpha: the foreground for a model that only inpaints.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) in {0, 1}, 1 = object.

    Returns:
        (B, 4, H, W), straight RGB, mid-grey 0 where alpha is 0.
    """
    return torch.cat([image * mask, mask], dim=1)


def matted_foreground(image: Tensor, mask: Tensor) -> Tensor:
    """Closed-form matting: estimates alpha and foreground colours from a mask that need not be exact.

    Levin et al., "A Closed-Form Solution to Natural Image Matting" (2006), for the alpha within the unknown band of
    ``trimap``; Germer et al., "Fast Multi-Level Foreground Estimation" (2020), for the colours; both by pymatting with
    its defaults. Runs on the CPU; 0.1 s at 128 x 128 and 10 s at 1024 x 1024. On its first import after installation,
    pymatting compiles itself, which takes a minute.

    Falls back to ``base_foreground`` if the trimap has no certain object or no certain background (the object is
    thinner than the band, the mask is empty or full) and, with a warning, if the solver fails.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        mask: (B, 1, H, W) in {0, 1}, 1 = object.

    Returns:
        (B, 4, H, W), straight RGB in [-1, 1] (where alpha is 0, extrapolated from nearby colours), alpha in [0, 1]; on
        the image's device.

    Raises:
        InputError: pymatting is not installed.
    """
    library = matting_library()
    layers = base_foreground(image, mask)
    for index, known in enumerate(trimap(mask)):
        if (known == 0).any() and (known == 1).any():
            try:
                layers[index] = _matte(library, image[index], known)
            except ValueError as error:
                warnings.warn(f"matting sample {index} of the batch failed, its mask is used: {error}", stacklevel=2)
    return layers


def matting_library() -> ModuleType:
    """pymatting, an optional extra.

    Raises:
        InputError: it is not installed.
    """
    with needs_extra("the row matting of evaluate.rows", "matting"):
        import pymatting
    return pymatting


def trimap(mask: Tensor) -> Tensor:
    """The trimap of a mask (B, 1, H, W) in {0, 1}: 1 object, 0 background, 0.5 (unknown) in a band along the outline.

    The band's width is 10 % of the shorter side, centred on the outline. The image border is not an outline.
    """
    inside = mask > 0.5
    radius = max(1, round(TRIMAP_BAND / 2 * min(mask.shape[-2:])))
    return torch.where(dilate(inside, radius) & dilate(~inside, radius), 0.5, mask)


def _matte(library: ModuleType, image: Tensor, known: Tensor) -> Tensor:
    """The foreground (4, H, W) of an image (3, H, W) with the trimap ``known`` (1, H, W)."""
    picture = np.ascontiguousarray(((image.double().cpu().numpy() + 1) / 2).transpose(1, 2, 0))
    with redirect_stdout(io.StringIO()):  # pymatting prints each retry of its preconditioner
        alpha = library.estimate_alpha_cf(picture, known[0].double().cpu().numpy())  # (H, W)
    colours = library.estimate_foreground_ml(picture, alpha)  # (H, W, 3)
    return torch.from_numpy(np.concatenate([colours.transpose(2, 0, 1) * 2 - 1, alpha[None]])).to(image)


def _inpaint(image: Tensor, hole: Tensor) -> Tensor:
    """Fill ``hole`` (1, H, W) bool of ``image`` (3, H, W) by biharmonic inpainting."""
    known = image.double().cpu().numpy()
    region = hole[0].cpu().numpy()
    filled = inpaint_biharmonic(known, region, channel_axis=0) if region.any() else known
    return torch.from_numpy(np.clip(filled, -1, 1))
