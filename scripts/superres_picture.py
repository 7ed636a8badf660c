"""Make the picture of the super-resolution room's README from the tour's photograph.

python scripts/superres_picture.py docs/images/superres.png
"""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
from PIL import Image

from tenfold.superres import Upscaler, imresize_matlab
from tenfold.superres.tour import photograph

SIDE = 192  # of each view, in pixels


def main(path: str) -> None:
    """Low-res pixels, bicubic, tenfold-x4 and the truth, side by side."""
    truth = photograph()
    truth = truth[: truth.shape[0] // 4 * 4, : truth.shape[1] // 4 * 4]
    low = imresize_matlab(truth, Fraction(1, 4))
    ours = Upscaler.from_pretrained("tenfold-x4", device="cpu").upscale(low).image
    top, left = (truth.shape[0] - SIDE) // 2 // 4 * 4, (truth.shape[1] - SIDE) // 2 // 4 * 4
    views = (low.repeat(4, 0).repeat(4, 1), imresize_matlab(low, 4), ours, truth)
    strip = np.concatenate([view[top : top + SIDE, left : left + SIDE] for view in views], axis=1)
    Image.fromarray(strip).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
