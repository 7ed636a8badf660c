"""Still pictures: the door to `core.picture`, `core.image_reading` and `core.image_writing`. Imports no torch.

picture = images.read("cat.jpg")            # upright pixels, colour profile and EXIF
images.write("cat.png", picture.with_pixels(upscaled))
"""

from tenfold.core.image_reading import READABLE_SUFFIXES, from_pil, max_pixels_allowed, read
from tenfold.core.image_writing import DEFAULT_QUALITY, FORMATS, encode, format_of, to_pil, write
from tenfold.core.picture import Picture, convert_depth, to_rgb8

__all__ = [
    "DEFAULT_QUALITY",
    "FORMATS",
    "READABLE_SUFFIXES",
    "Picture",
    "convert_depth",
    "encode",
    "format_of",
    "from_pil",
    "max_pixels_allowed",
    "read",
    "to_pil",
    "to_rgb8",
    "write",
]
