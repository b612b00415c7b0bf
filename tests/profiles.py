"""Colour profiles other than sRGB's."""

from PIL import ImageCms


def _swapped() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"____"), (b"bXYZ", b"rXYZ"), (b"____", b"bXYZ")):
        profile = profile.replace(old, new)
    return profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


SWAPPED = _swapped()  # its red is sRGB's blue, and the other way round
SWAPPED_LINEAR = SWAPPED.replace(b"\0\x02\x66\x66", b"\0\x01\0\0")  # a gamma of 1 for 2.4
