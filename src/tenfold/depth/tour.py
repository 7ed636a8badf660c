"""The room's station on the tour: one photograph to depth, its camera, and a cloud of points that can be turned."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from tenfold.core import images, report
from tenfold.core.report import Figure, Station, Tile
from tenfold.depth.outputs import colormap, fov_x_deg
from tenfold.depth.predictor import Depth, DepthEstimator
from tenfold.depth.view import cloud_panel

PHOTOGRAPH = "office.jpg"
MODEL = "tenfold-depth-tiny"
# The camera of the photograph by the benchmark's own tools, pixels: fx, fy, cx, cy.
INTRINSICS = (525.0, 525.0, 319.5, 239.5)

NOTES = (
    "Photograph: a frame of the TUM RGB-D benchmark (Sturm et al., IROS 2012), CC BY 4.0.",
    "tenfold-depth-tiny is a small UniDepthV2 that this project trained on rendered rooms only. It shows how the "
    "system works and is not for measuring. The authors' networks load by name, for instance --model "
    "unidepth-v2-vits14; their weights may not be used commercially (CC BY-NC 4.0).",
    "Given camera: the focal length that the benchmark's tools state. Predicted camera: what the network makes of "
    "the picture alone. Distances follow the camera, which is the system's point.",
)


def tour(workdir: Path) -> Station:
    """Run the station; this one needs no files, so `workdir` stays empty."""
    picture = photograph()
    estimator = DepthEstimator.from_pretrained(MODEL)
    start = time.perf_counter()
    alone = estimator.predict(picture)
    seconds = time.perf_counter() - start
    told = estimator.predict(picture, intrinsics=np.array(INTRINSICS))
    true_fov = fov_x_deg(told)
    return Station(
        room="depth",
        title="UniDepth: metric depth, points and the camera from one picture",
        paper="Piccinelli et al.: UniDepth, CVPR 2024 (arXiv 2403.18913); UniDepthV2, TPAMI 2026 (arXiv 2502.20110)",
        claim="A network that first guesses the camera and then looks along its rays predicts depth in metres, for "
        "cameras that it has not seen, and uses the true camera where that is known.",
        command="tenfold depth predict photo.jpg -o out/ --format png16 ply json",
        figures=[
            Figure("Field of view seen", f"{fov_x_deg(alone):.1f}", "degrees", f"true: {true_fov:.1f}"),
            Figure("Median depth, camera predicted", f"{np.median(alone.depth_m):.2f}", "m", _given(told)),
            Figure("Time", f"{seconds:.2g}", "s", f"{picture.shape[1]} x {picture.shape[0]}, {_threads()}"),
        ],
        panels=[
            report.slider_panel(
                picture,
                colormap(told.depth_m),
                "Picture",
                "Depth",
                alt="A desk with monitors, and its predicted depth",
                caption="Red is near, blue is far. Drag the divider, or move it with the arrow keys.",
            ),
            cloud_panel(told, "Each pixel as a point in space, with the given camera. Drag to turn it."),
            _tiles(told),
            _cameras(alone, told),
        ],
        notes=NOTES,
    )


def photograph() -> np.ndarray:
    """The built-in photograph, H x W x 3 uint8."""
    with resources.as_file(resources.files("tenfold.depth") / "assets" / PHOTOGRAPH) as path:
        return images.to_rgb8(images.read(path))


def _given(told: Depth) -> str:
    return f"camera given: {np.median(told.depth_m):.2f} m"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _tiles(told: Depth) -> report.Panel:
    tiles = [
        Tile(told.image[::2, ::2], "Picture", "", "A desk with monitors"),
        Tile(colormap(told.depth_m)[::2, ::2], "Depth", "logarithmic", "Depth in colours"),
    ]
    if told.uncertainty is not None:
        shown = colormap(1 / np.maximum(told.uncertainty / told.depth_m, 1e-6))[::2, ::2]
        tiles.append(Tile(shown, "Expected error", "red is large", "Expected relative error in colours"))
    return report.tiles_panel(tiles, "What the network says of each pixel, with the given camera.")


def _cameras(alone: Depth, told: Depth) -> report.Panel:
    rows = []
    for name, k in (("predicted", alone.predicted_intrinsics), ("given", np.asarray(told.intrinsics))):
        rows.append([name, *(f"{value:.1f}" for value in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))])
    return report.table_panel(("camera", "fx", "fy", "cx", "cy"), rows, "Intrinsics in pixels.")
