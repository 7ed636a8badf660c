"""Frames with depth: what a frame is, the files that depth comes in, plain folders and manifests, training samples.

Depth is z in metres wherever it is read; 0 means that nothing was measured there.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.files import read_json
from tenfold.core.training import Shuffled
from tenfold.depth.camera_input import Camera

CameraParameters = tuple[str, tuple[float, ...]]
"""Name of a camera model and its parameters, as in camera files: `("pinhole", (fx, fy, cx, cy))`."""
DEPTH_SUFFIXES = (".png", ".npy", ".npz", ".exr", ".pfm", ".tif", ".tiff")


@dataclass(frozen=True)
class Frame:
    """A picture with depth.

    Args:
        name: what reports call it.
        image: H x W x 3, uint8 RGB.
        depth_m: h x w, float32, z in metres, 0 where there is none; usually as large as the picture.
        camera: model and parameters in pixels of the picture, pixel centres at +0.5; None where it is not known.
    """

    name: str
    image: np.ndarray
    depth_m: np.ndarray
    camera: CameraParameters | None

    @property
    def intrinsics(self) -> np.ndarray | None:
        """3 x 3 of a pinhole camera; None for others and for unknown ones."""
        return None if self.camera is None else Camera(*self.camera).intrinsics


@dataclass(frozen=True)
class Entry:
    """A frame that has not been read yet; `read` raises UserError for a damaged file."""

    name: str
    read: Callable[[], Frame]


def pinhole(fx: float, fy: float, cx: float, cy: float) -> CameraParameters:
    """A pinhole camera."""
    return "pinhole", (float(fx), float(fy), float(cx), float(cy))


def pinhole_of(matrix: np.ndarray) -> CameraParameters:
    """A pinhole camera from a 3 x 3 (or larger) matrix."""
    return pinhole(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])


def read_rgb(path: Path) -> np.ndarray:
    """H x W x 3 uint8."""
    return images.to_rgb8(images.read(path))


def read_depth(path: Path, scale: float = 1000.0) -> np.ndarray:
    """A depth file in metres, float32: PNG and TIFF hold metres x `scale`, the others metres.

    Raises:
        UserError: missing, damaged, not a single plane, or of another kind.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such depth file")
    try:
        if suffix == ".npy":
            depth = np.load(path, allow_pickle=False)
        elif suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                depth = archive["depth" if "depth" in archive.files else archive.files[0]]
        elif suffix in (".exr", ".pfm"):
            depth = _read_float_image(path)
        elif suffix in DEPTH_SUFFIXES:
            depth = read_integers(path) / np.float32(scale)
        else:
            raise UserError(f"{path}: depth is read from {', '.join(DEPTH_SUFFIXES)} files")
    except (ValueError, OSError, EOFError, IndexError) as error:
        raise UserError(f"{path}: not a readable depth file ({' '.join(str(error).split())[:100]})") from error
    return cleaned(np.squeeze(depth), path)


def cleaned(depth: np.ndarray, path: Path) -> np.ndarray:
    """Depth as float32 with 0 where it is not finite or not positive."""
    if depth.ndim != 2:
        raise UserError(f"{path}: depth must be one plane, this has the shape {depth.shape}")
    depth = depth.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def read_integers(path: Path) -> np.ndarray:
    """The whole numbers of a one-plane picture, as they are stored."""
    if not path.is_file():
        raise UserError(f"{path}: no such depth file")
    pixels = images.read(path).pixels
    if pixels.ndim != 2:
        raise UserError(f"{path}: a depth picture has one plane, this has {pixels.shape[2]}")
    return pixels


def _read_float_image(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".pfm":
        return _read_pfm(path)
    import os

    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"{path}: not a readable EXR file")
    return pixels if pixels.ndim == 2 else pixels[..., -1]


def _read_pfm(path: Path) -> np.ndarray:
    """Portable float map: rows from the bottom up; a negative scale means little-endian."""
    with path.open("rb") as file:
        kind, size, scale = (file.readline().decode("latin-1").split() for _ in range(3))
        width, height = map(int, size)
        planes = {"Pf": 1, "PF": 3}[kind[0]] if kind and kind[0] in ("Pf", "PF") else 0
        if not planes:
            raise UserError(f"{path}: not a PFM file")
        values = np.frombuffer(file.read(), ("<" if float(scale[0]) < 0 else ">") + "f4")
    return values.reshape(height, width, planes)[::-1, :, 0]


# ---------------------------------------------------------------- plain folders


def read_folder(root: Path) -> list[Entry]:
    """A folder of frames: `frames.json`, `frames.csv`, or folders `rgb` and `depth` with files of equal stems.

    The manifest lists, for each frame, `rgb`, `depth` and, if known, `depth_scale` (1000), `intrinsics`
    ([fx, fy, cx, cy]) or `camera` ({"name", "params"}); in a CSV file fx, fy, cx and cy are columns. Without a
    manifest `intrinsics.json` or `intrinsics.npy` (3 x 3, or fx fy cx cy) holds for all frames.

    Raises:
        UserError: nothing of this kind is there, a file is missing, or the manifest is not as described.
    """
    if (root / "frames.json").is_file():
        frames = read_json(root / "frames.json").get("frames")
        if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
            raise UserError(f'{root / "frames.json"}: expected {{"frames": [{{"rgb": ..., "depth": ...}}, ...]}}')
        return [_listed(root, frame, root / "frames.json") for frame in frames]
    if (root / "frames.csv").is_file():
        with (root / "frames.csv").open(newline="", encoding="utf-8") as file:
            rows = [_from_csv(row) for row in csv.DictReader(file)]
        return [_listed(root, row, root / "frames.csv") for row in rows]
    pictures = files_in(root / "rgb", images.READABLE_SUFFIXES)
    depths = {path.stem: path for path in files_in(root / "depth", DEPTH_SUFFIXES)}
    camera = _folder_camera(root)
    entries = []
    for path in pictures:
        if path.stem not in depths:
            raise UserError(f"{root / 'depth'}: no depth for {path.name} (looked for {path.stem} with any suffix)")
        entries.append(Entry(path.stem, partial(read_pair, path.stem, path, depths[path.stem], 1000.0, camera)))
    return entries


def _from_csv(row: dict[str, Any]) -> dict[str, Any]:
    frame: dict[str, Any] = {key: value for key, value in row.items() if value not in (None, "")}
    four = [frame.pop(key, None) for key in ("fx", "fy", "cx", "cy")]
    if None not in four:
        frame["intrinsics"] = four
    return frame


def _listed(root: Path, frame: dict[str, Any], manifest: Path) -> Entry:
    for key in ("rgb", "depth"):
        if key not in frame:
            raise UserError(f"{manifest}: a frame has no {key!r}: {json.dumps(frame)[:100]}")
    try:
        camera = None
        if frame.get("camera"):
            camera = (str(frame["camera"]["name"]).lower(), tuple(float(p) for p in frame["camera"]["params"]))
        elif frame.get("intrinsics") is not None:
            camera = pinhole(*map(float, frame["intrinsics"]))
        scale = float(frame.get("depth_scale", 1000.0))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{manifest}: {frame['rgb']}: camera or scale cannot be understood ({error})") from error
    name = str(frame.get("id", Path(frame["rgb"]).stem))
    rotated = "rotated" in Path(frame["depth"]).stem
    read = read_rotated_pair if rotated else read_pair
    return Entry(name, partial(read, name, root / frame["rgb"], root / frame["depth"], scale, camera))


def _folder_camera(root: Path) -> CameraParameters | None:
    for name in ("intrinsics.npy", "intrinsics.json"):
        if (root / name).is_file():
            found = Camera.from_file(root / name)
            return found.model, found.params
    return None


def read_pair(name: str, rgb: Path, depth: Path, scale: float, camera: CameraParameters | None) -> Frame:
    """A frame from a picture and a depth file."""
    return Frame(name, read_rgb(rgb), read_depth(depth, scale), camera)


def read_rotated_pair(name: str, rgb: Path, depth: Path, scale: float, camera: CameraParameters | None) -> Frame:
    """A frame whose depth is stored as SUN RGB-D does: 16 bits, rotated to the left by three."""
    return Frame(name, read_rgb(rgb), unrotated(read_integers(depth)) / np.float32(scale), camera)


def unrotated(stored: np.ndarray) -> np.ndarray:
    """The numbers behind SUN RGB-D's depth pictures: (v >> 3) | (v << 13) in 16 bits, as float32."""
    values = stored.astype(np.uint16)
    return ((values >> np.uint16(3)) | (values << np.uint16(13))).astype(np.float32)


def files_in(folder: Path, suffixes: Sequence[str] | frozenset[str]) -> list[Path]:
    """Files with one of these suffixes, sorted.

    Raises:
        UserError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not found:
        raise UserError(f"{folder}: no files that end in {', '.join(sorted(suffixes))}")
    return found


# ---------------------------------------------------------------- training samples


class FrameViews:
    """Pairs of augmented views of real or stored frames, of one size; a pure function of the sample's number.

    Each view is zoomed by 2^U[-zoom, zoom] around what fills the size, shifted sideways by up to a tenth (V1 section
    4.1) and recoloured. Depth is taken from the nearest measured pixel, never interpolated. Images 2i and 2i + 1 are
    the two views of one frame.

    Args:
        entries: frames with pinhole cameras.
        size: height and width of the views, pixels.
        zoom: largest zoom, as a power of two.
        seed: of order and augmentation.
    """

    def __init__(self, entries: Sequence[Entry], size: tuple[int, int], zoom: float = 0.5, seed: int = 0) -> None:
        if not entries:
            raise UserError("training needs at least one frame")
        self.entries = list(entries)
        self.size, self.zoom, self.seed = size, zoom, seed
        self._order = Shuffled(len(self.entries), seed)

    def sample(self, index: int) -> dict[str, Tensor]:
        """`image` 3 x H x W in [0, 1], `depth` 1 x H x W (0 invalid), `intrinsics` 3 x 3, `flip`, `given`."""
        frame = self.entries[self._order(index // 2)].read()
        if frame.intrinsics is None:
            raise UserError(f"{frame.name}: training needs a pinhole camera for every frame, this has none")
        random = np.random.default_rng((self.seed, index))
        height, width = self.size
        scale = max(height / frame.image.shape[0], width / frame.image.shape[1])
        scale *= 2 ** float(random.uniform(-self.zoom, self.zoom))
        shift = (float(random.uniform(-0.1, 0.1)) * width, 0.0)
        image, depth, intrinsics = cut_view(frame, scale, shift, self.size)
        image = recoloured(image, random)
        flip = bool(random.integers(2))
        if flip:
            image, depth = image.flip(-1), depth.flip(-1)
            intrinsics[0, 2] = width - intrinsics[0, 2]
        return {
            "image": image,
            "depth": depth,
            "intrinsics": intrinsics,
            "flip": torch.tensor(flip),
            "given": torch.tensor(index // 2 % 2 == 0),
        }


def cut_view(
    frame: Frame, scale: float, shift: tuple[float, float], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A view of `size` around the frame's middle, enlarged by `scale` and shifted by pixels of the view.

    Returns:
        Picture 3 x H x W in [0, 1], depth 1 x H x W, intrinsics 3 x 3.
    """
    height, width = size
    h, w = frame.image.shape[:2]
    affine = np.array(
        [[scale, 0, width / 2 - scale * w / 2 + shift[0]], [0, scale, height / 2 - scale * h / 2 + shift[1]]]
    )
    # OpenCV's pixel centres lie on whole numbers, ours on halves.
    centred = affine.copy()
    centred[:, 2] += 0.5 * scale - 0.5
    source = frame.image
    if scale < 0.5:  # warping samples points: shrink first, by a whole number, to keep what lies between
        step = int(1 / scale)
        source = cv2.resize(source, (w // step, h // step), interpolation=cv2.INTER_AREA)
        ratio = np.array([w / (w // step), h / (h // step)])
        centred = np.stack([affine[0] * [ratio[0], 1, 1], affine[1] * [1, ratio[1], 1]])
        centred[:, 2] += [0.5 * scale * ratio[0] - 0.5, 0.5 * scale * ratio[1] - 0.5]
    picture = cv2.warpAffine(source, centred, (width, height), flags=cv2.INTER_LINEAR)
    rows = np.floor((np.arange(height) + 0.5 - affine[1, 2]) / scale * frame.depth_m.shape[0] / h).astype(int)
    columns = np.floor((np.arange(width) + 0.5 - affine[0, 2]) / scale * frame.depth_m.shape[1] / w).astype(int)
    inside = ((rows >= 0) & (rows < frame.depth_m.shape[0]))[:, None] & (
        (columns >= 0) & (columns < frame.depth_m.shape[1])
    )
    depth = frame.depth_m[rows.clip(0, frame.depth_m.shape[0] - 1)][:, columns.clip(0, frame.depth_m.shape[1] - 1)]
    k = frame.intrinsics
    assert k is not None
    k = np.array([[scale, 0, affine[0, 2]], [0, scale, affine[1, 2]], [0, 0, 1]]) @ k
    return (
        torch.from_numpy(picture).permute(2, 0, 1).float().div(255),
        torch.from_numpy(np.where(inside, depth, np.float32(0)))[None],
        torch.from_numpy(k).float(),
    )


def recoloured(image: Tensor, random: np.random.Generator) -> Tensor:
    """Brightness, gamma, saturation and sometimes grey (V1 section 4.1): 3 x H x W in [0, 1]."""
    image = image * float(random.uniform(0.6, 1.4))
    grey = image.mean(0, keepdim=True)
    saturation = 0.0 if random.random() < 0.2 else float(random.uniform(0.6, 1.4))
    image = (grey + saturation * (image - grey)).clamp(0, 1)
    return image ** float(math.exp(random.uniform(-0.2, 0.2)))
