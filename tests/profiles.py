"""Colour profiles: that of sRGB, and others made from it."""

import struct

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _swapped() -> bytes:
    profile = SRGB
    for old, new in ((b"rXYZ", b"____"), (b"bXYZ", b"rXYZ"), (b"____", b"bXYZ")):
        profile = profile.replace(old, new)
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


SWAPPED = _swapped()  # its red is sRGB's blue, and the other way round
SWAPPED_LINEAR = SWAPPED.replace(b"\0\x02\x66\x66", b"\0\x01\0\0")  # a gamma of 1 for 2.4


def _linear() -> bytes:
    """sRGB's primaries with levels proportional to light; the name says sRGB, as "GIMP built-in Linear sRGB" does."""
    start = SRGB.index(b"para\0\0\0\0\0\x03\0\0") + 12  # (a x + b)^g, or c x below d
    return SRGB.replace(SRGB[start : start + 20], struct.pack(">5i", *(round(x * 65536) for x in (1, 1, 0, 1, 0))))


LINEAR_SRGB = _linear()
