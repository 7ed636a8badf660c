"""What a result becomes on disk: depth as numbers and as a picture, point clouds and meshes, the camera."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tenfold.core import images
from tenfold.core.config import near
from tenfold.core.console import UserError, warn
from tenfold.core.files import atomic_write, write_bytes, write_json
from tenfold.core.picture import Picture

if TYPE_CHECKING:
    import trimesh

    from tenfold.depth.predictor import Depth

MAX_POINTS = 2_000_000
# A cell of the mesh is left out where its corners' depths differ by more than this share: there something is in front.
MESH_EDGE = 0.06


def save(
    result: Depth,
    target: str | Path,
    formats: Sequence[str],
    scale: float = 1000.0,
    max_depth_m: float | None = None,
    max_points: int = MAX_POINTS,
) -> list[Path]:
    """Write a result in several formats.

    Args:
        result: what was predicted.
        target: folder and stem: `out/photo` becomes out/photo_depth.png and so on.
        formats: any of `FORMATS`.
        scale: of png16: stored value = metres times this; 0 is no depth.
        max_depth_m: farther pixels are 0 in png16 and absent from clouds and meshes.
        max_points: of a cloud or mesh; beyond, every n-th row and column is taken.

    Returns:
        The files.

    Raises:
        UserError: an unknown format, a package that is missing, or a disk that refuses.
    """
    target = Path(target)
    written: list[Path] = []
    if not (np.isfinite(scale) and scale > 0):
        raise UserError(f"a scale of {scale:g} is not above 0")
    options = {"scale": scale, "max_depth_m": max_depth_m, "max_points": max_points}
    for name in dict.fromkeys(formats):
        if name not in FORMATS:
            raise UserError(f"unknown format {name!r}; {near(name, list(FORMATS))}")
        ending, write = FORMATS[name]
        path = target.with_name(target.name + ending)
        write(result, path, options)
        written.append(path)
    return written


def _write_png16(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    depth = np.where(_visible(result, options["max_depth_m"]), result.depth_m, 0)
    # What lies beside or behind an all-round camera has no depth along its axis.
    stored = np.rint(np.maximum(depth.astype(np.float64), 0) * options["scale"])
    lost = int((stored > 65535).sum())
    if lost:
        warn(
            f"{path}: {lost} pixels are beyond {65535 / options['scale']:g} m and stored as 0; "
            "a smaller --scale reaches farther"
        )
    images.write(path, Picture(np.where(stored > 65535, 0, stored).astype(np.uint16)))


def _write_npy(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, result.depth_m)
    write_bytes(path, buffer.getvalue())


def _write_npz(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    arrays = {
        "depth_m": result.depth_m,
        "points_m": result.points_m,
        "rays": result.rays,
        "predicted_intrinsics": result.predicted_intrinsics,
    }
    if result.intrinsics is not None:
        arrays["intrinsics"] = result.intrinsics
    if result.uncertainty is not None:
        arrays["uncertainty_m"] = result.uncertainty
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _write_exr(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    OpenEXR = _package("OpenEXR", "EXR files")
    channels = {"Z": result.depth_m}
    if result.uncertainty is not None:
        channels["uncertainty"] = result.uncertainty
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with atomic_write(path) as temporary, OpenEXR.File(header, channels) as file:
        file.write(str(temporary))


def _write_colormap(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    images.write(path, Picture(colormap(result.depth_m)))


def _write_json(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    write_json(path, describe(result) | {"png16_scale": options["scale"]})


def _write_ply(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    write_bytes(path, cloud(result, options["max_depth_m"], options["max_points"]).export(file_type="ply"))


def _write_glb(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    write_bytes(path, _scene(cloud(result, options["max_depth_m"], options["max_points"])))


def _write_mesh(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    write_bytes(path, _scene(mesh(result, options["max_depth_m"], options["max_points"])))


def _write_html(result: Depth, path: Path, options: Mapping[str, Any]) -> None:
    from tenfold.depth.view import page

    write_bytes(path, page(result, path.stem).encode())


# Format -> (end of the file's name, writer).
FORMATS: Mapping[str, tuple[str, Callable[[Depth, Path, Mapping[str, Any]], None]]] = {
    "png16": ("_depth.png", _write_png16),
    "npy": ("_depth.npy", _write_npy),
    "npz": (".npz", _write_npz),
    "exr": ("_depth.exr", _write_exr),
    "colormap": ("_color.png", _write_colormap),
    "ply": (".ply", _write_ply),
    "glb": (".glb", _write_glb),
    "mesh": ("_mesh.glb", _write_mesh),
    "json": (".json", _write_json),
    "html": (".html", _write_html),
}


def describe(result: Depth) -> dict[str, Any]:
    """The camera and the depth's range, as JSON can hold them."""
    low, middle, high = (float(value) for value in np.percentile(result.depth_m, (1, 50, 99)))
    k = result.intrinsics
    return {
        "size": [result.depth_m.shape[1], result.depth_m.shape[0]],
        "camera": result.camera.to_json(),
        "camera_source": result.camera_source,
        "intrinsics": None if k is None else k.tolist(),
        "predicted_intrinsics": result.predicted_intrinsics.tolist(),
        "fov_x_deg": fov_x_deg(result),
        "depth_m": {"p01": low, "median": middle, "p99": high},
    }


def fov_x_deg(result: Depth) -> float:
    """Horizontal field of view, degrees; up to 360 for all-round cameras, for which the middle row's rays are added."""
    if result.intrinsics is not None:
        width, k = result.depth_m.shape[1], result.intrinsics
        return float(np.degrees(np.arctan((width - k[0, 2]) / k[0, 0]) + np.arctan(k[0, 2] / k[0, 0])))
    row = result.rays[result.rays.shape[0] // 2].astype(np.float64)
    steps = np.arccos(np.clip((row[1:] * row[:-1]).sum(-1), -1, 1))
    return float(np.degrees(steps.sum() * len(row) / max(1, len(row) - 1)))


def colormap(depth: np.ndarray, bounds: tuple[float, float] | None = None) -> np.ndarray:
    """Depth as colours, near is red and far is blue, even in the logarithm: H x W -> H x W x 3 uint8.

    Args:
        depth: metres.
        bounds: nearest and farthest that the colours tell apart; by default the 2nd and 98th percentile.
    """
    import cv2

    logarithm = np.log(np.clip(depth, 1e-3, 1e5))
    low, high = np.percentile(logarithm, (2, 98)) if bounds is None else np.log(bounds)
    table = cv2.applyColorMap(np.arange(255, -1, -1, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0, ::-1]
    return table[((logarithm - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)]


def _visible(result: Depth, max_depth_m: float | None) -> np.ndarray:
    """H x W: pixels that have a point, whose depth is a number and not beyond the bound."""
    return np.isfinite(result.depth_m) & result.points_m.any(axis=-1) & (result.depth_m <= (max_depth_m or np.inf))


def thinning(result: Depth, max_points: int) -> int:
    """The n of which every n-th row and column leaves no more than about so many points."""
    return max(1, int(np.ceil(np.sqrt(result.depth_m.size / max(1, max_points)))))


def _thinned(result: Depth, max_points: int) -> tuple[slice, slice]:
    every = slice(None, None, thinning(result, max_points))
    return every, every


def cloud(result: Depth, max_depth_m: float | None = None, max_points: int = MAX_POINTS) -> trimesh.PointCloud:
    """Points with their colours, in the camera's axes."""
    trimesh = _package("trimesh", "point clouds")
    where = _thinned(result, max_points)
    seen = _visible(result, max_depth_m)[where]
    return trimesh.PointCloud(result.points_m[where][seen], colors=result.image[where][seen])


def mesh(result: Depth, max_depth_m: float | None = None, max_points: int = MAX_POINTS) -> trimesh.Trimesh:
    """A surface through the points, cut where depth jumps."""
    trimesh = _package("trimesh", "meshes")
    where = _thinned(result, max_points)
    depth, points, colors = result.range_m[where], result.points_m[where], result.image[where]
    height, width = depth.shape
    index = np.arange(height * width).reshape(height, width)
    corners = [depth[:-1, :-1], depth[:-1, 1:], depth[1:, :-1], depth[1:, 1:]]
    nearest, farthest = np.minimum.reduce(corners), np.maximum.reduce(corners)
    seen = _visible(result, max_depth_m)[where]
    whole = (farthest <= nearest * (1 + MESH_EDGE)) & seen[:-1, :-1] & seen[:-1, 1:] & seen[1:, :-1] & seen[1:, 1:]
    a, b, c, d = (part[whole] for part in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    faces = np.concatenate([np.stack([a, c, b], axis=1), np.stack([b, c, d], axis=1)])
    return trimesh.Trimesh(points.reshape(-1, 3), faces, vertex_colors=colors.reshape(-1, 3), process=False)


def _scene(geometry: Any) -> bytes:
    """A GLB in which the geometry keeps the camera's axes, turned by its node into glTF's: y up, z to the viewer."""
    trimesh = _package("trimesh", "GLB files")
    scene = trimesh.Scene()
    scene.add_geometry(geometry, transform=np.diag([1.0, -1.0, -1.0, 1.0]))
    return scene.export(file_type="glb")


def _package(name: str, purpose: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{purpose} need {name}: run pip install 'tenfold[depth]'") from None
