"""Picture files of every kind that the room takes: those of `core.images`, and HEIC. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.picture import Picture

_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".avif"})
PICTURE_SUFFIXES = images.READABLE_SUFFIXES | _HEIC_SUFFIXES


def read_picture(path: str | Path, max_pixels: int | None = None) -> Picture:
    """`core.images.read` with its arguments and errors, and HEIC where pillow-heif is installed."""
    if Path(path).suffix.lower() not in _HEIC_SUFFIXES:
        return images.read(path, max_pixels)
    try:
        import pillow_heif
    except ImportError:
        raise UserError(f"{path}: HEIC needs pillow-heif: run pip install 'tenfold[depth]'") from None
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    limit = images.max_pixels_allowed() if max_pixels is None else max_pixels
    try:
        found = pillow_heif.open_heif(path)
        if found.size[0] * found.size[1] > limit:
            raise UserError(f"{path}: {found.size[0]}x{found.size[1]} pixels are above the size limit")
        return images.from_pil(found.to_pillow())  # its pixels are upright already, and its EXIF says so
    except (ValueError, RuntimeError, OSError, EOFError, SyntaxError) as error:
        raise UserError(f"{path}: damaged or truncated picture ({' '.join(str(error).split())})") from None
