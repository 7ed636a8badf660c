"""Still pictures in: every kind that people have becomes a `Picture`. Imports no torch.

Pillow does the work. It reads 16-bit colour as 8-bit, so files with more than 8 bits a sample go through OpenCV.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

from tenfold.core.console import UserError, warn
from tenfold.core.picture import Picture

DEFAULT_MAX_PIXELS = 100_000_000
MAX_PIXELS_VARIABLE = "TENFOLD_MAX_MEGAPIXELS"
READABLE_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})

# Named, so that no decoder that runs other programs (EPS) is ever tried on a stranger's file.
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF")
_pillow_limit_lock = threading.RLock()

# EXIF orientation (2..8) -> what the array needs: transpose the axes first, then flip rows, then flip columns.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
# Tags of a TIFF directory that say how its pixels are stored; they are no metadata of the picture.
_STRUCTURAL_TAGS = frozenset(
    {
        254,
        255,
        256,
        257,
        258,
        259,
        262,
        263,
        264,
        265,
        266,
        273,
        277,
        278,
        279,
        280,
        281,
        284,
        288,
        289,
        290,
        291,
        292,
        293,
    }
    | {
        297,
        301,
        317,
        318,
        319,
        320,
        321,
        322,
        323,
        324,
        325,
        330,
        332,
        333,
        334,
        336,
        337,
        338,
        339,
        340,
        341,
        342,
        347,
    }
    | set(range(512, 533))
    | {700, 33723, 34377, 34675}  # XMP (it may repeat the orientation), IPTC, Photoshop, ICC
)
_SUB_DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


def max_pixels_allowed() -> int:
    """The limit on the size of a picture that is read: TENFOLD_MAX_MEGAPIXELS, else 100 million pixels."""
    text = os.environ.get(MAX_PIXELS_VARIABLE)
    if not text:
        return DEFAULT_MAX_PIXELS
    try:
        return int(float(text) * 1e6)
    except (ValueError, OverflowError):
        raise UserError(f"{MAX_PIXELS_VARIABLE}={text!r} is not a number of megapixels") from None


def read(path: Path | str, max_pixels: int | None = None) -> Picture:
    """Read a picture file: PNG, JPEG, WebP, TIFF, BMP or GIF.

    Orientation is applied, palettes and 1-bit are expanded, CMYK and Lab become sRGB (through the embedded profile if
    there is one). Of an animation or a multi-page file the first picture is read, with a warning.

    Args:
        path: the file.
        max_pixels: refuse larger pictures, by the header and before anything is decoded; None: `max_pixels_allowed()`.

    Raises:
        UserError: no such file, a folder, not a picture, damaged, too large, NaN, or pixels of an unsupported type.
    """
    path = Path(path)
    limit = max_pixels_allowed() if max_pixels is None else max_pixels
    _check_is_file(path)
    try:
        with _pillow_limit_lifted(), path.open("rb") as file:
            picture = _read(file, path, limit)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: there is not enough memory to decode it") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read (PNG, JPEG, WebP, TIFF, BMP, GIF)") from None
    except PermissionError:
        raise UserError(f"{path}: permission to read it is denied") from None
    except Exception as error:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: damaged or truncated picture ({reason})") from error
    if picture.pixels.dtype == np.float32 and not np.isfinite(picture.pixels).all():
        raise UserError(f"{path}: has NaN or infinite pixels; replace them first")
    return picture


def from_pil(image: Image.Image) -> Picture:
    """A Pillow image as a `Picture`, orientation applied; every mode that `read` handles."""
    exif, orientation = _split_exif(image.getexif(), str(getattr(image, "filename", "") or "image"))
    pixels, icc = _plain_array(image)
    return Picture(_turn_upright(pixels, orientation), icc, exif)


def _check_is_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a picture")
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if not path.is_file():
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{str(path)!r}: not a possible file name") from None


@contextmanager
def _pillow_limit_lifted() -> Iterator[None]:
    """Pillow's own bomb check is fixed at 179 MP and global; ours is made first, so its is put aside meanwhile."""
    with _pillow_limit_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and TIFF tags, which are of no use to the user
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(file: io.BufferedReader, path: Path, limit: int) -> Picture:
    start = file.read(32)
    file.seek(0)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        directory = _tiff_directory(file)
        _check_size(path, int(directory[256]), int(directory[257]), limit)
        if _tiff_is_deep(directory, path):
            return _read_deep_tiff(file, directory, path)
    image = Image.open(file, formats=_PILLOW_FORMATS)
    _check_size(path, *image.size, limit)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # the further pictures of an MPO are previews
        kind = "pages" if image.format == "TIFF" else "frames"
        warn(f"{path}: only the first of {frames} {kind} is read")
    # Asked before the pixels: Pillow turns a TIFF upright as it loads it, and deletes its orientation.
    exif, orientation = _split_exif(image.getexif(), str(path))
    if image.format == "PNG" and start[24] == 16:
        pixels, icc = _decode_deep(file, path), image.info.get("icc_profile")
        if start[25] in (0, 4) and pixels.ndim == 3:
            pixels = pixels[..., [0, 3]] if start[25] == 4 else pixels[..., 0]  # OpenCV spreads grey + alpha to RGBA
    else:
        pixels, icc = _plain_array(image)
        if image.format == "TIFF":
            orientation = 1
    return Picture(_turn_upright(pixels, orientation), icc, exif)


def _check_size(path: Path, width: int, height: int, limit: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{path}: damaged picture (its header says {width}x{height} pixels)")
    if width * height > limit:
        # A caller's own, lower limit is not the variable's to raise.
        advice = f"set {MAX_PIXELS_VARIABLE} to allow more" if limit == max_pixels_allowed() else "shrink it first"
        raise UserError(
            f"{path}: {width}x{height} = {width * height / 1e6:g} megapixels is above the limit of "
            f"{limit / 1e6:g} megapixels; {advice}"
        )


def _plain_array(image: Image.Image) -> tuple[np.ndarray, bytes | None]:
    """Pixels as grey / grey+alpha / RGB / RGBA, and the profile that they are meant in."""
    icc = image.info.get("icc_profile")
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16), icc
    if mode == "F":
        return np.array(image, dtype=np.float32), icc
    if mode == "I":
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise UserError("32-bit integer pixels beyond 0..65535 are not supported; convert the picture to 16-bit")
        return values.astype(np.uint16), icc
    if mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        return np.array(_to_srgb(image, icc)), None
    if mode in ("1", "L"):
        plain = image.convert("LA" if "transparency" in image.info else "L")
    elif mode in ("LA", "La"):
        plain = image.convert("LA")
    else:
        has_alpha = mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info
        plain = image.convert("RGBA" if has_alpha else "RGB")
    return np.array(plain), icc


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """CMYK by its embedded profile (Pillow's plain formula without one), Lab by its definition, the rest by formula."""
    if image.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif icc and image.mode == "CMYK":
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        except (ImageCms.PyCMSError, OSError):
            return image.convert("RGB")
    else:
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:  # a profile for another colour space than the pixels have
        converted = image.convert("RGB")
    assert converted is not None
    return converted


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    transpose, flip_rows, flip_columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    if flip_rows:
        pixels = pixels[::-1]
    if flip_columns:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _split_exif(exif: Image.Exif, name: str) -> tuple[bytes | None, int]:
    """The block to keep (orientation upright, no storage tags), and the orientation that the pixels have now."""
    try:
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        kept = Image.Exif()  # a copy: the image owns the one that was passed
        for tag, value in exif.items():
            if tag not in _STRUCTURAL_TAGS and tag not in _SUB_DIRECTORIES:
                kept[tag] = value
        for tag in _SUB_DIRECTORIES:
            entries = {key: value for key, value in exif.get_ifd(tag).items() if key != ExifTags.IFD.Interop}
            if entries:
                kept.get_ifd(tag).update(entries)
        if ExifTags.Base.Orientation in kept:
            kept[ExifTags.Base.Orientation] = 1
        block = kept.tobytes() if len(kept) or kept.get_ifd(ExifTags.IFD.Exif) else None
        return block, orientation if isinstance(orientation, int) else 1
    except Exception:  # like decoders, Pillow's EXIF code raises anything on damaged blocks; the picture is still good
        warn(f"{name}: its damaged EXIF block is dropped")
        return None, 1


def _decode_deep(file: io.BufferedReader, path: Path) -> np.ndarray:
    """Decode a file of more than 8 bits a sample with OpenCV: HxW, HxWx3 RGB or HxWx4 RGBA."""
    import cv2

    file.seek(0)
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if pixels is None:
        raise UserError(f"{path}: damaged or truncated picture")
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return pixels


def _tiff_directory(file: io.BufferedReader) -> TiffImagePlugin.ImageFileDirectory_v2:
    header = file.read(8)
    if 43 in header[2:4]:  # BigTIFF
        header += file.read(8)
    directory = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(directory.next)
    directory.load(file)
    file.seek(0)
    return directory


def _tiff_is_deep(directory: TiffImagePlugin.ImageFileDirectory_v2, path: Path) -> bool:
    """Whether samples have more than 8 bits; refuses kinds that no decoder here reads right."""
    bits = max(directory.get(258, (1,)))
    if bits <= 8:
        return False
    if set(directory.get(339, (1,))) - {1, 3}:
        raise UserError(f"{path}: signed or complex TIFF samples are not supported; convert to 16-bit or float32")
    is_float = 3 in directory.get(339, (1,))
    if bits not in ((32, 64) if is_float else (16,)):
        kind = "float" if is_float else "integer"
        raise UserError(f"{path}: {bits}-bit {kind} TIFF samples are not supported; convert to 16-bit or float32")
    if directory.get(262) == 5:
        warn(f"{path}: CMYK is read with 8 bits a sample")
        return False
    if directory.get(262) not in (0, 1, 2):
        raise UserError(f"{path}: deep TIFF with this colour model is not supported; convert to RGB or grey")
    if directory.get(284, 1) != 1 and directory.get(277, 1) > 1:
        raise UserError(
            f"{path}: deep TIFF with separate colour planes is not supported; save it with interleaved planes"
        )
    return True


def _read_deep_tiff(file: io.BufferedReader, directory: TiffImagePlugin.ImageFileDirectory_v2, path: Path) -> Picture:
    pixels = _decode_deep(file, path)  # OpenCV applies a TIFF's orientation itself
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if directory.get(262) == 0:  # white is zero
        pixels = (np.iinfo(pixels.dtype).max if pixels.dtype == np.uint16 else np.float32(1)) - pixels
    if pixels.ndim == 2 and directory.get(277, 1) > 1:
        warn(f"{path}: the alpha of a deep grey TIFF cannot be read and is dropped")
    if pixels.ndim == 3 and pixels.shape[2] == 4 and 1 in directory.get(338, ()):
        pixels = _unmultiply(pixels)
    if directory.next:
        warn(f"{path}: only the first page is read")
    exif = Image.Exif()
    file.seek(0)
    exif.load_from_fp(file)
    return Picture(np.ascontiguousarray(pixels), directory.get(34675), _split_exif(exif, str(path))[0])


def _unmultiply(pixels: np.ndarray) -> np.ndarray:
    """Undo associated alpha (TIFF ExtraSamples 1): colour divided by coverage."""
    top = np.iinfo(pixels.dtype).max if pixels.dtype == np.uint16 else 1.0
    alpha = np.maximum(pixels[..., 3:].astype(np.float64), 1e-12)
    color = (pixels[..., :3] / alpha * top).clip(0, top)
    color = np.rint(color) if pixels.dtype == np.uint16 else color
    return np.concatenate([color.astype(pixels.dtype), pixels[..., 3:]], axis=2)
