"""Training pairs: folders of images, alone or with their low-res partners, cut into aligned and augmented patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tenfold.core import images as image_files
from tenfold.core.console import UserError, warn
from tenfold.core.training import Shuffled
from tenfold.superres.evaluation import Pair, find_pairs, make_low_res

CACHE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Images:
    """One training image, uint8 RGB."""

    low: np.ndarray  # H x W x 3
    high: np.ndarray  # sH x sW x 3


class PatchPairs:
    """An endless stream of low-res / high-res patch pairs, a pure function of the sample's number.

    Low-res images are the given files, or whole images shrunk as MATLAB does; a crop falls on the low-res grid; flips
    and the transpose come with probability 1/2 each (official recipe).

    Args:
        high_res: folder of images, or several (DF2K is two); those with a side below `patch * scale` are left out.
        low_res: folder of their low-res partners (`0001x2.png` to `0001.png`); None makes them.
        scale: upscaling factor.
        patch: side of the low-res patch in pixels.
        seed: of order, crops and augmentation.
        cache_bytes: decoded images that may be kept in memory; beyond it files are read again.

    Raises:
        UserError: no image that is large enough, a partner that is missing or does not fit.
    """

    def __init__(
        self,
        high_res: Path | str | Sequence[Path | str],
        low_res: Path | str | None = None,
        *,
        scale: int,
        patch: int = 64,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if patch < 1:
            raise UserError(f"patch: {patch} pixels a side are no patch")
        folders = [high_res] if isinstance(high_res, str | Path) else high_res
        pairs = [pair for folder in folders for pair in find_pairs(folder, low_res, scale)]
        self.pairs = [pair for pair in pairs if _short_side(pair.high_res) >= patch * scale]
        if not self.pairs:
            where = " or ".join(map(str, folders))
            raise UserError(f"no image in {where} has {patch * scale} pixels a side, which patches of {patch} need")
        if len(self.pairs) < len(pairs):
            warn(f"{len(pairs) - len(self.pairs)} of {len(pairs)} images are smaller than a patch and left out")
        self.scale = scale
        self.patch = patch
        self.seed = seed
        self._order = Shuffled(len(self.pairs), seed)
        self._images: Callable[[int], Images] = self._cached_reader(cache_bytes)

    def _cached_reader(self, cache_bytes: int) -> Callable[[int], Images]:
        first = self._read(0)
        kept = cache_bytes // max(1, first.low.nbytes + first.high.nbytes)
        return lru_cache(maxsize=min(kept, len(self.pairs)))(self._read)

    def _read(self, index: int) -> Images:
        return read_pair(self.pairs[index], self.scale)

    def sample(self, index: int) -> dict[str, Tensor]:
        """Sample number `index`: `low` 3 x p x p and `high` 3 x sp x sp, float32 in [0, 1]."""
        images = self._images(self._order(index))
        random = np.random.default_rng((self.seed, index))
        top = int(random.integers(images.low.shape[0] - self.patch + 1))
        left = int(random.integers(images.low.shape[1] - self.patch + 1))
        flip_x, flip_y, transpose = (bool(random.integers(2)) for _ in range(3))
        pair = {}
        for name, image, factor in (("low", images.low, 1), ("high", images.high, self.scale)):
            size = self.patch * factor
            crop = image[top * factor : top * factor + size, left * factor : left * factor + size]
            crop = augment(crop, flip_x, flip_y, transpose)
            pair[name] = torch.from_numpy(crop.transpose(2, 0, 1).copy()).float().div_(255)
        return pair


def _short_side(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return min(image.size)
    except Image.DecompressionBombError:
        return min(image_files.read(path).pixels.shape[:2])  # it says whether so large an image is allowed
    except Exception:  # Pillow raises anything on damaged headers
        raise UserError(f"{path}: not a readable image") from None


def read_pair(pair: Pair, scale: int) -> Images:
    """Read one image and its low-res partner (made here where there is no file), cut to sizes that fit exactly."""
    high = image_files.to_rgb8(image_files.read(pair.high_res))
    low = image_files.to_rgb8(image_files.read(pair.other)) if pair.other else make_low_res(high, scale)
    height, width = low.shape[0] * scale, low.shape[1] * scale
    if not (0 <= high.shape[0] - height < scale and 0 <= high.shape[1] - width < scale):
        raise UserError(
            f"{pair.high_res} ({high.shape[1]}x{high.shape[0]}) and {pair.other} ({low.shape[1]}x{low.shape[0]}) "
            f"do not fit at scale {scale}; check the scale and the folders"
        )
    return Images(low=low, high=high[:height, :width])


def augment(image: np.ndarray, flip_x: bool, flip_y: bool, transpose: bool) -> np.ndarray:
    """One of the eight symmetries of the square, on an H x W x C image."""
    image = image[:, ::-1] if flip_x else image
    image = image[::-1] if flip_y else image
    return image.transpose(1, 0, 2) if transpose else image
