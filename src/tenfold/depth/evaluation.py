"""The official protocols: what counts as valid in each dataset, per image, then averaged over images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from tenfold.core.console import UserError, progress
from tenfold.depth import cameras
from tenfold.depth.data import Entry, Frame
from tenfold.depth.metrics import (
    camera_metrics,
    cloud_metrics,
    depth_metrics,
    mean_metrics,
    thinned,
    uncertainty_metrics,
)

if TYPE_CHECKING:
    from tenfold.depth.predictor import DepthEstimator

GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)  # rows and columns, shares of the image
EIGEN = (0.3324324, 0.91351351, 0.03594771, 0.96405229)
NYU = (45, 471, 41, 601)  # rows and columns of 480 x 640 (Eigen's crop)


@dataclass(frozen=True)
class Protocol:
    """What of a dataset's frames is scored.

    Args:
        min_depth_m: smallest threshold of the 3D F-score; depth is valid above zero.
        max_depth_m: largest valid depth; a twentieth of it is the F-score's largest threshold.
        crop: rows and columns (first and end) that are scored, in pixels, or in shares of the image when below 1.
        kitti_crop: predict on the lower middle 352 x 1216 of the picture only.
    """

    min_depth_m: float = 0.01
    max_depth_m: float = 10.0
    crop: tuple[float, float, float, float] | None = None
    kitti_crop: bool = False


PROTOCOLS: Mapping[str, Protocol] = {
    "nyu": Protocol(0.005, 10, NYU),
    "kitti": Protocol(0.05, 80, GARG, kitti_crop=True),
    "kitti-eigen-crop": Protocol(0.05, 80, EIGEN, kitti_crop=True),
    "sunrgbd": Protocol(0.005, 8),
    "diode": Protocol(0.01, 25),
    "ibims": Protocol(0.005, 25),
    "eth3d": Protocol(0.01, 50),
    "void": Protocol(0.01, 10),
    "hammer": Protocol(0.005, 10),
    "nuscenes": Protocol(0.05, 80),
    "ddad": Protocol(0.05, 120),
    "tum": Protocol(0.01, 10),
    "folder": Protocol(),
}


@dataclass(frozen=True)
class Estimate:
    """What a model says about one picture, at the picture's size or another.

    Args:
        depth_m: h x w, z.
        points_m: h x w x 3, or None where the 3D metrics are not wanted.
        rays: h x w x 3, unit, of the camera that the model predicts; None where it predicts none.
        intrinsics: 3 x 3 in pixels of the picture, predicted; None likewise.
        uncertainty: h x w, larger is worse; None where there is none.
    """

    depth_m: np.ndarray
    points_m: np.ndarray | None = None
    rays: np.ndarray | None = None
    intrinsics: np.ndarray | None = None
    uncertainty: np.ndarray | None = None


Predict = Callable[[Frame], Estimate]


@dataclass(frozen=True)
class ImageResult:
    """One image's metrics."""

    name: str
    valid_pixels: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a set: the means over its images, and each image's own."""

    protocol: Protocol
    images: tuple[ImageResult, ...]
    mean: dict[str, float]


def prepared(frame: Frame, protocol: Protocol) -> Frame:
    """The frame as the model sees it: KITTI's is cut to 352 x 1216, with its camera."""
    if not protocol.kitti_crop:
        return frame
    height, width = frame.image.shape[:2]
    if height < 352 or width < 1216:
        raise UserError(f"{frame.name}: KITTI's protocol cuts 352 x 1216, this picture is {height} x {width}")
    top, left = height - 352, int((width - 1216) / 2)
    cut = np.s_[top : top + 352, left : left + 1216]
    camera = frame.camera
    if camera is not None:
        fx, fy, cx, cy = camera[1][:4]
        camera = (camera[0], (fx, fy, cx - left, cy - top, *camera[1][4:]))
    return replace(frame, image=frame.image[cut], depth_m=frame.depth_m[cut], camera=camera)


def valid_mask(depth_m: np.ndarray, protocol: Protocol) -> np.ndarray:
    """Pixels of a ground truth that are scored: H x W."""
    valid = (depth_m > 0) & (depth_m <= protocol.max_depth_m)
    if protocol.crop is not None:
        height, width = depth_m.shape
        top, bottom, left, right = protocol.crop
        if bottom <= 1:
            top, bottom, left, right = top * height, bottom * height, left * width, right * width
        window = np.zeros_like(valid)
        window[int(top) : int(bottom), int(left) : int(right)] = True
        valid &= window
    return valid


def score(frame: Frame, estimate: Estimate, protocol: Protocol) -> ImageResult:
    """Metrics of one image; the frame is `prepared`.

    Raises:
        UserError: nothing is valid, or the estimate is not finite and positive where something is.
    """
    size = frame.depth_m.shape
    valid = valid_mask(frame.depth_m, protocol)
    if not valid.any():
        raise UserError(f"{frame.name}: no depth between 0 and {protocol.max_depth_m:g} m inside the scored window")
    depth = resized(estimate.depth_m, size)
    if not (np.isfinite(depth[valid]).all() and (depth[valid] > 0).all()):
        raise UserError(f"{frame.name}: the predicted depth is not finite and positive everywhere")
    metrics = depth_metrics(depth[valid], frame.depth_m[valid])
    rays = true_rays(frame)
    if rays is not None and estimate.points_m is not None:
        truth = rays / np.maximum(rays[..., 2:], 1e-6) * frame.depth_m[..., None]
        points = resized(estimate.points_m, size)
        p, mask = thinned(points, valid)
        g, _ = thinned(truth, valid)
        metrics |= cloud_metrics(p[mask], g[mask], protocol.min_depth_m, protocol.max_depth_m)
    if rays is not None and estimate.rays is not None:
        guess = resized(estimate.rays, size)
        guess = guess / np.linalg.norm(guess, axis=-1, keepdims=True)
        metrics |= camera_metrics(guess, rays, estimate.intrinsics, frame.intrinsics)
    if estimate.uncertainty is not None:
        uncertainty = resized(estimate.uncertainty, size)[valid]
        metrics |= uncertainty_metrics(uncertainty, depth[valid], frame.depth_m[valid])
    return ImageResult(frame.name, int(valid.sum()), metrics)


def of_estimator(
    estimator: DepthEstimator, camera: Literal["predicted", "given"], resolution_level: float | None = None
) -> Predict:
    """What a `DepthEstimator` says about frames.

    Args:
        estimator: the model.
        camera: `given` tells it the frame's camera; depth and points then belong to that. The rays that are scored are
            those of the camera that it predicts, in both cases.
        resolution_level: see `DepthEstimator.predict`.
    """
    from tenfold.depth.camera_input import Camera

    def predict(frame: Frame) -> Estimate:
        told = None
        if camera == "given":
            if frame.camera is None:
                raise UserError(f"{frame.name}: its camera is not known, so that it cannot be given")
            told = Camera(*frame.camera)
        found = estimator.predict(frame.image, camera=told, resolution_level=resolution_level)
        size = frame.image.shape[:2]
        return Estimate(
            depth_m=found.depth_m,
            points_m=found.points_m,
            rays=pinhole_rays(found.predicted_intrinsics, size, size),
            intrinsics=found.predicted_intrinsics,
            uncertainty=found.uncertainty,
        )

    return predict


def true_rays(frame: Frame) -> np.ndarray | None:
    """Unit rays of the frame's own camera at the size of its depth, H x W x 3; None where it is not known."""
    if frame.camera is None:
        return None
    height, width = frame.depth_m.shape
    k = frame.intrinsics
    if k is None:
        model, params = frame.camera
        rays = cameras.rays(model, torch.tensor(params), *frame.image.shape[:2])[0].permute(1, 2, 0).numpy()
        return resized(rays, (height, width))
    return pinhole_rays(k, frame.image.shape[:2], (height, width))


def pinhole_rays(intrinsics: np.ndarray, image: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """Unit rays, H x W x 3, of a camera of images of one size through the pixels of a map of another."""
    height, width = size
    k = intrinsics * np.array([[width / image[1]], [height / image[0]], [1]])
    return cameras.pinhole_rays(torch.from_numpy(k)[None], height, width)[0].permute(1, 2, 0).numpy()


def resized(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """H x W or H x W x C at another size, bilinear with pixel centres on halves; the same where the sizes agree."""
    if values.shape[:2] == tuple(size):
        return values
    planes = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(*values.shape[:2], -1)
    out = F.interpolate(planes.permute(2, 0, 1)[None], size=tuple(size), mode="bilinear", align_corners=False)
    return out[0].permute(1, 2, 0).reshape(*size, *values.shape[2:]).numpy()


def evaluate_entries(predict: Predict, entries: Sequence[Entry], protocol: Protocol) -> EvaluationResult:
    """Score a model on a test set.

    Args:
        predict: from a prepared frame to the estimate; it may use the frame's camera, and must not use its depth.
        entries: the test set.
        protocol: what is scored.
    """
    results = []
    with progress("evaluate", len(entries)) as bar:
        for entry in entries:
            frame = prepared(entry.read(), protocol)
            results.append(score(frame, predict(frame), protocol))
            bar.advance()
    return EvaluationResult(protocol, tuple(results), mean_metrics([result.metrics for result in results]))
