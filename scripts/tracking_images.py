"""Cut the openly licensed pictures of `superres_images.py` into tiles for the appearance network of the room tracking.

    python scripts/superres_images.py PICTURES
    python scripts/tracking_images.py PICTURES OUTPUT_FOLDER
    tenfold tracking masks OUTPUT_FOLDER/train -o OUTPUT_FOLDER/train.json

A segment of a whole picture is large; in tiles, segments have the size of things in a video. Tiles of even colour are
left out. OUTPUT_FOLDER/train and OUTPUT_FOLDER/validation come from the pictures' own two parts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

TILE = (480, 360)
LEAST_DEVIATION = 12.0  # of grey levels within a tile: below it there is nothing to be seen


def tiles(pixels: np.ndarray) -> list[np.ndarray]:
    """Tiles of (480, 360) pixels on an even grid that covers the picture."""
    height, width = pixels.shape[:2]
    if width < TILE[0] or height < TILE[1]:
        return []
    columns = np.linspace(0, width - TILE[0], max(1, round(width / TILE[0]))).astype(int)
    rows = np.linspace(0, height - TILE[1], max(1, round(height / TILE[1]))).astype(int)
    cut = [pixels[top : top + TILE[1], left : left + TILE[0]] for top in rows for left in columns]
    return [tile for tile in cut if tile.mean(2).std() >= LEAST_DEVIATION]


def main() -> None:
    """Cut all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    for part in ("train", "validation"):
        target = arguments.output / part
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((arguments.pictures / part).glob("*.png")):
            pixels = np.array(Image.open(path).convert("RGB"))
            for number, tile in enumerate(tiles(pixels)):
                Image.fromarray(tile).save(target / f"{path.stem}_{number:02d}.jpg", quality=95)


if __name__ == "__main__":
    main()
