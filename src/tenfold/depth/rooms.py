"""Rendered rooms as files: a folder of frames that `data.read_folder` reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.files import make_folder, write_json
from tenfold.core.picture import Picture
from tenfold.depth import cameras
from tenfold.depth.config import SceneConfig
from tenfold.depth.data import CameraParameters, pinhole
from tenfold.depth.simulate import add_noise, random_scenes, render

SCALE = 1000  # of 16-bit depth: millimetres


@dataclass(frozen=True)
class PinholeRange:
    """Random pinhole cameras.

    Args:
        fov_deg: range of their horizontal fields of view.
        shift: of the principal point from the middle, at most, in image sizes.
    """

    fov_deg: tuple[float, float]
    shift: float

    def draw(self, random: np.random.Generator, height: int, width: int) -> CameraParameters:
        """One of them, for images of this size."""
        focal = 0.5 * width / math.tan(math.radians(random.uniform(*self.fov_deg)) / 2)
        right, down = random.uniform(-self.shift, self.shift, 2)
        return pinhole(focal, focal, (0.5 + right) * width, (0.5 + down) * height)


def write_frames(
    folder: Path,
    count: int,
    size: tuple[int, int],
    camera: PinholeRange | CameraParameters,
    scenes: SceneConfig,
    seed: int,
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Render frames into `folder`; the manifest comes last, so that a stopped run is not taken for a whole one.

    Args:
        folder: gets `rgb/`, `depth/` and `frames.json`.
        count: number of frames.
        size: height and width.
        camera: a range to draw from, or one camera for all.
        scenes: what the rooms hold.
        seed: of everything; frame i is a pure function of seed and i.
        after_each: called after each frame.

    Raises:
        UserError: the folder holds frames already, or the camera has no rays for most of the image.
    """
    if (folder / "frames.json").exists():
        raise UserError(f"{folder} already holds frames: choose another folder")
    for name in ("rgb", "depth"):
        make_folder(folder / name)
    listed = []
    for index in range(count):
        parameters = camera
        if isinstance(camera, PinholeRange):
            parameters = camera.draw(np.random.default_rng((seed, index, 2)), *size)
        assert not isinstance(parameters, PinholeRange)
        image, depth = render_frame(index, size, parameters, scenes, seed)
        name = f"{index:06d}"
        images.write(folder / "rgb" / f"{name}.png", Picture(image))
        images.write(folder / "depth" / f"{name}.png", Picture(depth))
        listed.append(_row(name, parameters))
        after_each()
    write_json(folder / "frames.json", {"frames": listed})


def _row(name: str, camera: CameraParameters) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "rgb": f"rgb/{name}.png",
        "depth": f"depth/{name}.png",
        "depth_scale": SCALE,
    }
    if camera[0] == "pinhole":
        return row | {"intrinsics": list(camera[1])}
    return row | {"camera": {"name": camera[0], "params": list(camera[1])}}


def render_frame(
    index: int, size: tuple[int, int], camera: CameraParameters, scenes: SceneConfig, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Picture H x W x 3 uint8 and depth H x W uint16 in mm of one frame."""
    rays: Tensor = cameras.rays(camera[0], torch.tensor(camera[1]), *size)
    if float(torch.isfinite(rays).float().mean()) < 0.99:
        raise UserError(f"the {camera[0]} camera has no rays for a part of an image of {size[1]} x {size[0]} pixels")
    rendering = render(random_scenes(scenes, seed, [index]), torch.nan_to_num(rays), scenes.shadows)
    image = add_noise(rendering.image, scenes.noise, seed, [index])[0]
    z = rendering.points_m[0, 2].clamp_min(0)  # what lies beside or behind the camera has no depth
    return (
        (image.permute(1, 2, 0) * 255).round().byte().numpy(),
        (z * SCALE).round().clamp(0, 65535).numpy().astype(np.uint16),
    )
