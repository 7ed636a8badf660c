"""The benchmarks of the field as they lie on the disk: image files with depth pictures.

Each reader takes the dataset's root folder and gives the entries of its test set in a fixed order. What depth a file
holds, which pixels are masked and where the camera stands written is said at each reader; the driving datasets whose
depth is projected from a lidar are in `driving.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.depth import driving
from tenfold.depth.data import (
    Entry,
    Frame,
    cleaned,
    files_in,
    pinhole,
    pinhole_of,
    read_folder,
    read_integers,
    read_pair,
    read_rgb,
    read_rotated_pair,
)

NYU_CAMERA = pinhole(518.8579, 519.46961, 325.58245, 253.73617)  # Kinect of NYU Depth V2, colour, undistorted
DIODE_CAMERA = pinhole(886.81, 927.06, 512.0, 384.0)  # the dataset's own intrinsics.txt
TUM_CAMERAS = {  # per camera of the benchmark (its file-formats page), and its default
    "freiburg1": pinhole(517.3, 516.5, 318.6, 255.3),
    "freiburg2": pinhole(520.9, 521.0, 325.1, 249.7),
    "freiburg3": pinhole(535.4, 539.2, 320.1, 247.6),
    "": pinhole(525.0, 525.0, 319.5, 239.5),
}


def _some(entries: list[Entry], root: Path, expected: str) -> list[Entry]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if not entries:
        raise UserError(f"{root}: no frames found; expected {expected}")
    return entries


def _numbers(path: Path) -> np.ndarray:
    """All numbers of a text file, flat."""
    try:
        return np.array(path.read_text().replace(",", " ").split(), np.float64)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a file of numbers ({' '.join(str(error).split())[:80]})") from error


def read_nyu(root: Path) -> list[Entry]:
    """NYU Depth V2's test set as folders of scenes: `SCENE/rgb_00045.jpg` with `SCENE/sync_depth_00045.png`, mm."""
    entries = []
    for rgb in sorted(root.rglob("rgb_*.*")):
        depth = rgb.with_name("sync_depth_" + rgb.stem.removeprefix("rgb_") + ".png")
        if not depth.is_file():
            depth = rgb.with_name("depth_" + rgb.stem.removeprefix("rgb_") + ".png")
        name = f"{rgb.parent.name}/{rgb.stem}" if rgb.parent != root else rgb.stem
        entries.append(Entry(name, partial(read_pair, name, rgb, depth, 1000.0, NYU_CAMERA)))
    return _some(entries, root, "SCENE/rgb_00045.jpg beside SCENE/sync_depth_00045.png")


def read_kitti(root: Path) -> list[Entry]:
    """KITTI with its corrected depth: every `DRIVE/proj_depth/groundtruth/image_02/FRAME.png` below the root, 1/256 m.

    The picture is `DATE/DRIVE/image_02/data/FRAME.png` and the camera P_rect_02 of `DATE/calib_cam_to_cam.txt`.
    """
    entries = []
    for depth in sorted(root.rglob("proj_depth/groundtruth/image_02/*.png")):
        drive = depth.parents[3].name
        date = drive[:10]
        rgb = root / date / drive / "image_02" / "data" / depth.name
        name = f"{drive}/{depth.stem}"
        entries.append(Entry(name, partial(_read_kitti, name, rgb, depth, root / date / "calib_cam_to_cam.txt")))
    return _some(entries, root, "DRIVE/proj_depth/groundtruth/image_02/*.png and DATE/DRIVE/image_02/data/*.png")


def _read_kitti(name: str, rgb: Path, depth: Path, calibration: Path) -> Frame:
    lines = dict(line.split(":", 1) for line in _text(calibration).splitlines() if ":" in line)
    if "P_rect_02" not in lines:
        raise UserError(f"{calibration}: no line P_rect_02")
    camera = pinhole_of(np.array(lines["P_rect_02"].split(), np.float64).reshape(3, 4))
    return read_pair(name, rgb, depth, 256.0, camera)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        raise UserError(f"{path}: no such file") from None


def read_sunrgbd(root: Path) -> list[Entry]:
    """SUN RGB-D: every folder with `image/*.jpg`, `depth/*.png` (bits rotated, mm) and `intrinsics.txt`, without NYU's.

    NYU's pictures (below `NYUdata`) are left out, for they are training or test pictures of another benchmark.
    """
    entries = []
    for calibration in sorted(root.rglob("intrinsics.txt")):
        scene = calibration.parent
        if "NYUdata" in scene.parts:
            continue
        rgb, depth = files_in(scene / "image", (".jpg", ".png"))[0], files_in(scene / "depth", (".png",))[0]
        camera = pinhole_of(_numbers(calibration)[:9].reshape(3, 3))
        name = str(scene.relative_to(root))
        entries.append(Entry(name, partial(read_rotated_pair, name, rgb, depth, 1000.0, camera)))
    return _some(entries, root, "SENSOR/.../SCENE with image/, depth/ and intrinsics.txt")


def read_diode(root: Path) -> list[Entry]:
    """DIODE: `SCENE/SCAN/NAME.png` with `NAME_depth.npy` (m) and `NAME_depth_mask.npy`; boundaries are cleaned."""
    entries = []
    for depth in sorted(root.rglob("*_depth.npy")):
        rgb = depth.with_name(depth.name.removesuffix("_depth.npy") + ".png")
        name = f"{depth.parent.name}/{rgb.stem}"
        entries.append(Entry(name, partial(_read_diode, name, rgb, depth)))
    return _some(entries, root, "SCENE/SCAN/NAME.png beside NAME_depth.npy and NAME_depth_mask.npy")


def _read_diode(name: str, rgb: Path, path: Path) -> Frame:
    mask_path = path.with_name(path.name.removesuffix(".npy") + "_mask.npy")
    try:
        depth, mask = (np.squeeze(np.load(p, allow_pickle=False)) for p in (path, mask_path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: depth or mask cannot be read ({' '.join(str(error).split())[:80]})") from error
    return Frame(name, read_rgb(rgb), without_boundaries(cleaned(np.where(mask > 0, depth, 0), path)), DIODE_CAMERA)


def without_boundaries(depth_m: np.ndarray) -> np.ndarray:
    """DIODE's depth without the flying points at edges (V1 supplement, algorithm 1).

    The Laplacian (5 x 5) of the logarithm tells edges: pixels between its 10th and 90th percentile are kept, after an
    opening and a median filter of 3 pixels.
    """
    valid = depth_m > 0
    if not valid.any():
        return depth_m
    curvature = cv2.Laplacian(np.log(np.where(valid, depth_m, 1.0)).astype(np.float32), cv2.CV_32F, ksize=5)
    low, high = np.percentile(curvature[valid], (10, 90))
    kept = (valid & (curvature >= low) & (curvature <= high)).astype(np.uint8)
    kept = cv2.medianBlur(cv2.morphologyEx(kept, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), 3)
    return np.where(kept > 0, depth_m, np.float32(0)) * valid


def read_ibims(root: Path) -> list[Entry]:
    """iBims-1 (core, raw): `rgb/`, `depth/` (16 bits for 50 m), `calib/NAME.txt`, `mask_invalid/`, `mask_transp/`."""
    entries = []
    for rgb in files_in(root / "rgb", images.READABLE_SUFFIXES):
        entries.append(Entry(rgb.stem, partial(_read_ibims, root, rgb)))
    return entries


def _read_ibims(root: Path, rgb: Path) -> Frame:
    depth = cleaned(read_integers(root / "depth" / f"{rgb.stem}.png") * np.float32(50 / 65535), rgb)
    for mask in ("mask_invalid", "mask_transp"):  # 0 where the pixel must not be used
        path = root / mask / f"{rgb.stem}.png"
        if path.is_file():
            depth = np.where(read_integers(path) > 0, depth, np.float32(0))
    matrix = _numbers(root / "calib" / f"{rgb.stem}.txt")[:9].reshape(3, 3)
    camera = pinhole_of(matrix.T if matrix[2, 0] else matrix)  # the files hold the transpose
    return Frame(rgb.stem, read_rgb(rgb), depth, camera)


def read_void(root: Path) -> list[Entry]:
    """VOID: `SEQUENCE/image/NAME.png` with `SEQUENCE/ground_truth/NAME.png` (1/256 m) and `SEQUENCE/K.txt`.

    Where the root has `test_image.txt`, only the pictures that it lists, by the ends of their paths.
    """
    pictures = sorted(root.rglob("image/*.png"))
    if (root / "test_image.txt").is_file():
        listed = {"/".join(Path(line).parts[-3:]) for line in _text(root / "test_image.txt").split()}
        pictures = [path for path in pictures if "/".join(path.parts[-3:]) in listed]
    entries = []
    for rgb in pictures:
        sequence = rgb.parent.parent
        camera = pinhole_of(_numbers(sequence / "K.txt")[:9].reshape(3, 3))
        name = f"{sequence.name}/{rgb.stem}"
        depth = sequence / "ground_truth" / rgb.name
        entries.append(Entry(name, partial(read_pair, name, rgb, depth, 256.0, camera)))
    return _some(entries, root, "SEQUENCE/image/*.png, SEQUENCE/ground_truth/*.png and SEQUENCE/K.txt")


def read_hammer(root: Path) -> list[Entry]:
    """HAMMER: `SCENE/SENSOR/rgb/*.png` with `SCENE/SENSOR/_gt/*.png` (mm) and `SCENE/SENSOR/intrinsics.txt`."""
    entries = []
    for rgb in sorted(root.rglob("rgb/*.png")):
        sensor = rgb.parent.parent
        depth = sensor / "_gt" / rgb.name
        if not depth.is_file():
            continue
        camera = pinhole_of(_numbers(sensor / "intrinsics.txt")[:9].reshape(3, 3))
        name = f"{sensor.parent.name}/{sensor.name}/{rgb.stem}"
        entries.append(Entry(name, partial(read_pair, name, rgb, depth, 1000.0, camera)))
    return _some(entries, root, "SCENE/SENSOR/rgb/*.png, SCENE/SENSOR/_gt/*.png and SCENE/SENSOR/intrinsics.txt")


def read_tum(root: Path) -> list[Entry]:
    """A TUM RGB-D sequence (or a folder of them): `rgb.txt` and `depth.txt`, matched within 20 ms, depth x 5000."""
    entries = []
    for listing in sorted(root.rglob("rgb.txt")):
        sequence = listing.parent
        key = next((name for name in TUM_CAMERAS if name and name in sequence.name), "")
        depths = _timed(sequence / "depth.txt")
        times = np.array([time for time, _ in depths])
        for time, file in _timed(listing):
            if not len(times):
                break
            closest = int(np.abs(times - time).argmin())
            if abs(times[closest] - time) > 0.02:
                continue
            name = f"{sequence.name}/{Path(file).stem}"
            depth = sequence / depths[closest][1]
            entries.append(Entry(name, partial(read_pair, name, sequence / file, depth, 5000.0, TUM_CAMERAS[key])))
    return _some(entries, root, "rgb.txt and depth.txt, with pictures less than 20 ms apart")


def _timed(path: Path) -> list[tuple[float, str]]:
    try:
        return [(float(row[0]), row[1]) for row in _rows(path)]
    except (ValueError, IndexError):
        raise UserError(f"{path}: expected lines of a time and a file name") from None


def read_eth3d(root: Path) -> list[Entry]:
    """ETH3D high-res: `SCENE/images/dslr_images/*.JPG`, depth by the same name in `SCENE/ground_truth_depth`, float32.

    Cameras are COLMAP's `cameras.txt` and `images.txt` of `SCENE/dslr_calibration_jpg`; of its distorted cameras the
    focal lengths and the centre are taken, as the benchmarks of metric depth do.
    """
    entries = []
    for calibration in sorted(root.glob("*/dslr_calibration_*/cameras.txt")):
        scene = calibration.parents[1]
        cameras = {row[0]: row for row in _rows(calibration)}
        for row in _rows(calibration.with_name("images.txt")):
            if len(row) != 10 or row[8] not in cameras:  # every second line holds points
                continue
            camera = cameras[row[8]]
            depth = scene / "ground_truth_depth" / row[9]
            name = f"{scene.name}/{Path(row[9]).stem}"
            if depth.is_file():
                entries.append(Entry(name, partial(_read_eth3d, name, scene / "images" / row[9], depth, camera)))
    return _some(entries, root, "SCENE/images, SCENE/ground_truth_depth and SCENE/dslr_calibration_jpg")


def _rows(path: Path) -> list[list[str]]:
    return [line.split() for line in _text(path).splitlines() if line.strip() and not line.startswith("#")]


def _read_eth3d(name: str, rgb: Path, path: Path, camera: list[str]) -> Frame:
    width, height = int(camera[2]), int(camera[3])
    values = np.fromfile(path, "<f4")
    if values.size != width * height:
        raise UserError(f"{path}: expected {width} x {height} float32 values, found {values.size}")
    parameters = [float(value) for value in camera[4:]]
    if camera[1] == "SIMPLE_PINHOLE":
        parameters = [parameters[0], *parameters]
    return Frame(name, read_rgb(rgb), cleaned(values.reshape(height, width), path), pinhole(*parameters[:4]))


READERS: Mapping[str, Callable[[Path], list[Entry]]] = {
    "folder": read_folder,
    "nyu": read_nyu,
    "kitti": read_kitti,
    "sunrgbd": read_sunrgbd,
    "diode": read_diode,
    "eth3d": read_eth3d,
    "ibims": read_ibims,
    "void": read_void,
    "hammer": read_hammer,
    "nuscenes": driving.read_nuscenes,
    "ddad": driving.read_ddad,
    "tum": read_tum,
}
