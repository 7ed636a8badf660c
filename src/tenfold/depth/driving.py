"""nuScenes and DDAD: depth of a camera's picture from the lidar's points of the same moment, projected here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core.console import UserError
from tenfold.depth.data import Entry, Frame, pinhole_of, read_rgb


def rotation_of(w: float, x: float, y: float, z: float) -> np.ndarray:
    """3 x 3 rotation of a unit quaternion."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def projected(points: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sparse depth of points in the camera's axes: H x W, m; of several points in a pixel the nearest counts.

    Args:
        points: N x 3, x right, y down, z forward, m.
        intrinsics: 3 x 3.
        size: height and width.
    """
    height, width = size
    points = points[points[:, 2] > 0.05]
    columns = np.floor(intrinsics[0, 0] * points[:, 0] / points[:, 2] + intrinsics[0, 2]).astype(np.int64)
    rows = np.floor(intrinsics[1, 1] * points[:, 1] / points[:, 2] + intrinsics[1, 2]).astype(np.int64)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    depth = np.full(height * width, np.inf, np.float32)
    np.minimum.at(depth, rows[inside] * width + columns[inside], points[inside, 2].astype(np.float32))
    return np.where(np.isfinite(depth), depth, np.float32(0)).reshape(height, width)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError:
        raise UserError(f"{path}: no such file") from None
    except ValueError:
        raise UserError(f"{path}: not a JSON file") from None


# ---------------------------------------------------------------- nuScenes


def read_nuscenes(root: Path) -> list[Entry]:
    """nuScenes' keyframes of CAM_FRONT with LIDAR_TOP's points, from the tables of `v1.0-*`.

    The point cloud is carried through the vehicle's poses at both times, as the dataset's own tools do.
    """
    tables = sorted(root.glob("v1.0-*/sample_data.json"))
    if not tables:
        raise UserError(f"{root}: no tables of nuScenes (v1.0-*/sample_data.json)")
    folder = tables[0].parent
    sensors = {row["token"]: row["channel"] for row in _load(folder / "sensor.json")}
    calibrated = {row["token"]: row for row in _load(folder / "calibrated_sensor.json")}
    poses = {row["token"]: row for row in _load(folder / "ego_pose.json")}
    samples: dict[str, dict[str, dict]] = {}
    for row in _load(tables[0]):
        if row["is_key_frame"]:
            channel = sensors[calibrated[row["calibrated_sensor_token"]]["sensor_token"]]
            samples.setdefault(row["sample_token"], {})[channel] = row
    entries = []
    for token, rows in samples.items():
        if {"CAM_FRONT", "LIDAR_TOP"} <= rows.keys():
            entries.append(Entry(token, partial(_read_nuscenes, root, token, rows, calibrated, poses)))
    if not entries:
        raise UserError(f"{folder}: no keyframe has both CAM_FRONT and LIDAR_TOP")
    return entries


def _read_nuscenes(root: Path, name: str, rows: dict[str, dict], calibrated: dict, poses: dict) -> Frame:
    camera, lidar = rows["CAM_FRONT"], rows["LIDAR_TOP"]
    path = root / lidar["filename"]
    try:
        points = np.fromfile(path, np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
    except (OSError, ValueError):
        raise UserError(f"{path}: not a readable nuScenes sweep (rows of 5 float32)") from None
    for table, token in ((calibrated, "calibrated_sensor_token"), (poses, "ego_pose_token")):
        row = table[lidar[token]]
        points = points @ rotation_of(*row["rotation"]).T + np.array(row["translation"])
    for table, token in ((poses, "ego_pose_token"), (calibrated, "calibrated_sensor_token")):
        row = table[camera[token]]
        points = (points - np.array(row["translation"])) @ rotation_of(*row["rotation"])
    image = read_rgb(root / camera["filename"])
    intrinsics = np.array(calibrated[camera["calibrated_sensor_token"]]["camera_intrinsic"], np.float64)
    return Frame(name, image, projected(points, intrinsics, image.shape[:2]), pinhole_of(intrinsics))


# ---------------------------------------------------------------- DDAD


def read_ddad(root: Path, camera: str = "CAMERA_01") -> list[Entry]:
    """DDAD's front camera with the LIDAR's points, from the scene files of TRI's dataset format.

    `SCENE/scene_*.json` lists samples and data; a datum of a picture and one of a point cloud (`data` of an npz, N x 4)
    each have a pose in the world; `SCENE/calibration/KEY.json` has the intrinsics.
    """
    entries = []
    for path in sorted(root.rglob("scene_*.json")):
        scene = _load(path)
        data = {row["key"]: row for row in scene["data"]}
        for sample in scene["samples"]:
            rows = {data[key]["id"]["name"]: data[key]["datum"] for key in sample["datum_keys"] if key in data}
            if camera in rows and "LIDAR" in rows:
                calibration = path.parent / "calibration" / f"{sample['calibration_key']}.json"
                picture, cloud = rows[camera]["image"], rows["LIDAR"]["point_cloud"]
                name = f"{path.parent.name}/{Path(picture['filename']).stem}"
                read = partial(_read_ddad, path.parent, name, picture, cloud, calibration, camera)
                entries.append(Entry(name, read))
    if not entries:
        raise UserError(f"{root}: no scene_*.json with samples of {camera} and LIDAR")
    return entries


def _read_ddad(folder: Path, name: str, picture: dict, cloud: dict, calibration: Path, camera: str) -> Frame:
    table = _load(calibration)
    k = table["intrinsics"][table["names"].index(camera)]
    intrinsics = np.array([[k["fx"], 0, k["cx"]], [0, k["fy"], k["cy"]], [0, 0, 1]], np.float64)
    path = folder / cloud["filename"]
    try:
        with np.load(path, allow_pickle=False) as archive:
            points = archive["data"][:, :3].astype(np.float64)
    except (OSError, ValueError, KeyError):
        raise UserError(f"{path}: not a readable point cloud (npz with `data`)") from None
    rotation, translation = _pose(cloud["pose"])
    points = points @ rotation.T + translation
    rotation, translation = _pose(picture["pose"])
    points = (points - translation) @ rotation
    image = read_rgb(folder / picture["filename"])
    return Frame(name, image, projected(points, intrinsics, image.shape[:2]), pinhole_of(intrinsics))


def _pose(pose: dict) -> tuple[np.ndarray, np.ndarray]:
    q, t = pose["rotation"], pose["translation"]
    return rotation_of(q["qw"], q["qx"], q["qy"], q["qz"]), np.array([t["x"], t["y"], t["z"]])
