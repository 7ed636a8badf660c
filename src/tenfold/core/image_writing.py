"""Still pictures out: PNG, JPEG, WebP and TIFF, with profile and EXIF, complete or not at all. Imports no torch.

Pillow encodes 8-bit PNG, JPEG and WebP. It cannot hold 16-bit colour: such PNGs are encoded by OpenCV and the metadata
chunks put in after; TIFF strips of every depth are laid out here around Pillow's tag directory.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from tenfold.core.console import UserError, warn
from tenfold.core.files import write_bytes
from tenfold.core.picture import Picture, convert_depth

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
"""Names of the formats that can be written, and the suffix of each."""

DEFAULT_QUALITY = 95
_FORMAT_OF_SUFFIX = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tiff", ".tiff": "tiff"}
_LARGEST_SIDE = {"jpg": 65_500, "webp": 16_383}
_PIXEL_SIZE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
_TIFF_STRIP_BYTES = 1 << 20


def write(path: Path | str, picture: Picture, quality: int = DEFAULT_QUALITY) -> None:
    """Write a picture in the format that the suffix names; the file is replaced in one step or left as it was.

    JPEG has no alpha (composed over white) and, like WebP, 8 bits; PNG has no floats (made 16-bit). Each such loss is
    said in a warning.

    Args:
        path: ends in .png, .jpg, .jpeg, .webp, .tif or .tiff.
        picture: uint8, uint16 or float32.
        quality: 1..100 for JPEG and WebP; WebP at 100 is lossless.

    Raises:
        UserError: unknown suffix, a picture too large for the format, or a disk that refuses.
    """
    path = Path(path)
    write_bytes(path, encode(picture, format_of(path), quality, str(path)))


def format_of(path: Path) -> str:
    """The format's name in `FORMATS` for a file name. Raises UserError for another suffix."""
    if path.suffix.lower() not in _FORMAT_OF_SUFFIX:
        raise UserError(f"{path}: cannot write {path.suffix or 'a name without suffix'}; use {', '.join(FORMATS)}")
    return _FORMAT_OF_SUFFIX[path.suffix.lower()]


def encode(picture: Picture, file_format: str, quality: int = DEFAULT_QUALITY, name: str = "output") -> bytes:
    """The bytes of a file; arguments and errors as `write`, `name` stands in messages."""
    if not 1 <= quality <= 100:
        raise UserError(f"quality must be between 1 and 100, not {quality}")
    limit = _LARGEST_SIDE.get(file_format)
    if limit is not None and max(picture.width, picture.height) > limit:
        raise UserError(
            f"{name}: {file_format} holds at most {limit} pixels a side, not {picture.width}x{picture.height}; use png"
        )
    picture = _fit_to_format(picture, file_format, name)
    exif = _exif_for(picture)
    if file_format == "tiff":
        return _encode_tiff(picture, exif)
    if picture.pixels.dtype == np.uint16:
        return _encode_deep_png(picture, exif)
    return _encode_with_pillow(picture, exif, file_format, quality, name)


def to_pil(picture: Picture) -> Image.Image:
    """A Pillow image: L, LA, RGB or RGBA for 8 bits, I;16 or F for deeper grey; profile and EXIF in `info`.

    Raises:
        UserError: 16-bit or float colour, which Pillow has no mode for.
    """
    if picture.pixels.ndim == 3 and picture.pixels.dtype != np.uint8:
        raise UserError(f"Pillow cannot hold {picture.pixels.dtype} colour; ask for an array")
    image = Image.fromarray(picture.pixels)
    if picture.icc:
        image.info["icc_profile"] = picture.icc
    exif = _exif_for(picture)
    if exif:
        image.info["exif"] = exif
    return image


def _fit_to_format(picture: Picture, file_format: str, name: str) -> Picture:
    """Give up what the format cannot hold, and say so."""
    pixels = picture.pixels
    if file_format == "jpg" and picture.has_alpha:
        if convert_depth(pixels[..., -1], np.uint8).min() < 255:
            warn(f"{name}: JPEG has no transparency; composed over white")
        pixels = _over_white(picture)
    if file_format in ("jpg", "webp") and pixels.dtype != np.uint8:
        warn(f"{name}: {file_format} has 8 bits a sample; reduced from {pixels.dtype}")
        pixels = convert_depth(pixels, np.uint8)
    if file_format == "png" and pixels.dtype == np.float32:
        warn(f"{name}: PNG has no float samples; reduced to 16-bit")
        pixels = convert_depth(pixels, np.uint16)
    if pixels.ndim == 3 and pixels.shape[2] == 2 and (file_format == "webp" or pixels.dtype != np.uint8):
        pixels = pixels[..., [0, 0, 0, 1]]  # neither WebP nor OpenCV has grey + alpha
    if pixels.ndim == 2 and file_format == "webp":
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    icc = picture.icc
    if icc and icc[16:20] != (b"GRAY" if pixels.ndim == 2 or pixels.shape[2] == 2 else b"RGB "):
        warn(f"{name}: its colour profile is for another kind of pixels than {file_format} gets, and is dropped")
        icc = None
    return Picture(np.ascontiguousarray(pixels), icc, picture.exif)


def _over_white(picture: Picture) -> np.ndarray:
    color, alpha = convert_depth(picture.color, np.float32), convert_depth(picture.pixels[..., -1], np.float32)
    alpha = alpha if color.ndim == 2 else alpha[..., None]
    return convert_depth(color * alpha + (1 - alpha), picture.pixels.dtype)


def _exif_for(picture: Picture) -> bytes | None:
    """The EXIF block with its pixel size, where it has one, set to the picture's."""
    if picture.exif is None:
        return None
    exif = Image.Exif()
    exif.load(picture.exif)
    details = exif.get_ifd(ExifTags.IFD.Exif)
    for tag, length in zip(_PIXEL_SIZE_TAGS, (picture.width, picture.height), strict=True):
        if tag in details:
            details[tag] = length
    return exif.tobytes()


def _encode_with_pillow(picture: Picture, exif: bytes | None, file_format: str, quality: int, name: str) -> bytes:
    options: dict[str, object] = {}
    if file_format == "jpg":
        options = {"quality": quality, "subsampling": "4:4:4" if quality >= 90 else "4:2:0"}
        if exif and len(exif) > 65_533:
            warn(f"{name}: its EXIF block is too large for JPEG and is dropped")
            exif = None
    elif file_format == "webp":
        options = {"quality": quality, "lossless": quality == 100, "exact": True}
    if exif:
        options["exif"] = exif
    if picture.icc:
        options["icc_profile"] = picture.icc
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(file_format, file_format.upper())
    Image.fromarray(picture.pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_deep_png(picture: Picture, exif: bytes | None) -> bytes:
    import cv2

    pixels = picture.pixels
    if pixels.ndim == 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    done, encoded = cv2.imencode(".png", pixels)
    if not done:
        raise UserError("this picture cannot be encoded as a 16-bit PNG")
    content = encoded.tobytes()
    after_header = 8 + 25  # signature, then the IHDR chunk
    chunks = _png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)) if picture.icc else b""
    chunks += _png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) if exif else b""
    return content[:after_header] + chunks + content[after_header:]


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_tiff(picture: Picture, exif: bytes | None) -> bytes:
    """A little-endian TIFF 6.0 file: deflated strips of about 1 MB, horizontal differencing for integers."""
    pixels = picture.pixels.reshape(picture.height, picture.width, -1)
    if pixels.nbytes >= 1 << 32:
        raise UserError("TIFF holds at most 4 GB; use png")
    channels, sample = pixels.shape[2], pixels.dtype.itemsize
    is_float = pixels.dtype == np.float32
    rows_per_strip = max(1, _TIFF_STRIP_BYTES // (picture.width * channels * sample))
    strips = []
    for top in range(0, picture.height, rows_per_strip):
        strip = pixels[top : top + rows_per_strip].astype(pixels.dtype.newbyteorder("<"))
        if not is_float:
            strip[:, 1:] -= strip[:, :-1].copy()
        strips.append(zlib.compress(strip.tobytes()))

    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    directory[256], directory[257] = picture.width, picture.height
    directory[258] = (8 * sample,) * channels
    directory[259] = 8  # deflate
    directory[262] = 2 if channels >= 3 else 1
    directory[277], directory[278], directory[284] = channels, rows_per_strip, 1
    directory[279] = tuple(len(strip) for strip in strips)
    # Pillow's directory adds its own length to these offsets when it is written.
    directory[273] = tuple(np.cumsum([0, *directory[279][:-1]]).tolist())
    directory[317] = 1 if is_float else 2
    directory[339] = (3 if is_float else 1,) * channels
    if picture.has_alpha:
        directory[338] = 2  # not premultiplied
    if picture.icc:
        directory.tagtype[34675] = 7
        directory[34675] = picture.icc
    if exif:
        _add_exif(directory, exif)
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + b"".join(strips)


def _add_exif(directory: TiffImagePlugin.ImageFileDirectory_v2, block: bytes) -> None:
    """TIFF has no EXIF block: its entries stand in the file's own directory, EXIF and GPS in sub-directories."""
    exif = Image.Exif()
    exif.load(block)
    for tag, value in exif.items():
        if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            directory[tag] = dict(exif.get_ifd(tag))
        elif tag not in directory:
            directory[tag] = value
