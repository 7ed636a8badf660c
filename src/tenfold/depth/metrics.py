"""Depth, point-cloud and camera metrics of the UniDepth papers: pure functions from arrays of one image to numbers.

Every function takes the valid pixels of one image; a set's figure is the mean over its images, never over its pixels.
Definitions are those of the official evaluation code, whose peculiarities are kept and named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

THRESHOLDS = 100  # of every area under a curve
CLOUD_POINTS = 240 * 320  # a cloud is thinned to about as many before neighbours are sought


def depth_metrics(prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All depth metrics over the valid pixels of one image.

    Args:
        prediction: N, m, positive.
        truth: N, m, positive.

    Returns:
        `d05`, `d1`, `d2`, `d3`: share of pixels with max(p/g, g/p) below 1.25 to the power 0.5, 1, 2, 3; `d_auc`: mean
        of that share over exponents 0.01 to 5; `tau`: the share below 1.03; `arel`, `sqrel`, `rmse` (m), `rmselog`,
        `log10`, `silog` (100 x standard deviation of the log ratio, unbiased), `medianlog` (100 x absolute value
        of its median); with `_si` after scaling the prediction to the truth's median, with `_ssi` after the
        least-squares scale and shift.
    """
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    ratio = _ratio(p, g)
    logarithm = np.log(p) - np.log(g)
    exponents = np.linspace(0.01, 5.0, THRESHOLDS)
    shares = [float(np.mean(ratio < 1.25**exponent)) for exponent in exponents]
    metrics = {
        "d05": float(np.mean(ratio < 1.25**0.5)),
        "d1": float(np.mean(ratio < 1.25)),
        "d2": float(np.mean(ratio < 1.25**2)),
        "d3": float(np.mean(ratio < 1.25**3)),
        "d_auc": float(np.trapezoid(shares, exponents) / 5.0),
        "tau": float(np.mean(ratio < 1.03)),
        "arel": _arel(p, g),
        "sqrel": float(np.mean((g - p) ** 2 / g)),
        "rmse": float(np.sqrt(np.mean((g - p) ** 2))),
        "rmselog": float(np.sqrt(np.mean(logarithm**2))),
        "log10": float(np.mean(np.abs(logarithm)) / math.log(10)),
        "silog": 100 * float(np.std(logarithm, ddof=1)) if len(p) > 1 else 0.0,
        "medianlog": 100 * abs(_lower_median(logarithm)),
    }
    for name, aligned in (("si", scaled_to_median(p, g)), ("ssi", scaled_and_shifted(p, g))):
        ratio = _ratio(aligned, g)
        metrics[f"d1_{name}"] = float(np.mean(ratio < 1.25))
        metrics[f"tau_{name}"] = float(np.mean(ratio < 1.03))
        metrics[f"arel_{name}"] = _arel(aligned, g)
    return metrics


def _ratio(p: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.maximum(p / g, g / np.where(p == 0, 1e-12, p))


def _arel(p: np.ndarray, g: np.ndarray) -> float:
    return float(np.mean(np.abs(g - p) / g))


def scaled_to_median(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The prediction times median(truth) / median(prediction)."""
    return prediction * (_lower_median(truth) / _lower_median(prediction))


def _lower_median(values: np.ndarray) -> float:
    """Of an even number of values the smaller middle one, as torch takes it."""
    return float(np.partition(values, (len(values) - 1) // 2)[(len(values) - 1) // 2])


def scaled_and_shifted(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The prediction after the scale and shift that bring it closest to the truth in least squares."""
    design = np.stack([prediction, np.ones_like(prediction)], axis=1)
    solution, *_ = np.linalg.lstsq(design, truth, rcond=None)
    return design @ solution


def thinned(points: np.ndarray, valid: np.ndarray, target: int = CLOUD_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A map of points and its mask, nearest-exact subsampled until about `target` valid points are left.

    Args:
        points: H x W x 3.
        valid: H x W.
        target: number of points.
    """
    count = int(valid.sum())
    if count <= target:
        return points, valid
    factor = math.sqrt(target / count)
    size = (int(valid.shape[0] * factor), int(valid.shape[1] * factor))
    grid = torch.from_numpy(np.ascontiguousarray(points)).permute(2, 0, 1)[None]
    small = F.interpolate(grid, size=size, mode="nearest-exact")[0].permute(1, 2, 0).numpy()
    mask = torch.from_numpy(valid.astype(np.float32))[None, None]
    return small, F.interpolate(mask, size=size, mode="nearest-exact")[0, 0].numpy() > 0.5


def cloud_metrics(
    prediction: np.ndarray, truth: np.ndarray, min_depth_m: float, max_depth_m: float
) -> dict[str, float]:
    """Metrics between two clouds whose points correspond, pixel by pixel.

    Args:
        prediction: N x 3, m.
        truth: N x 3, m.
        min_depth_m: smallest threshold of the F-score.
        max_depth_m: its largest threshold is a twentieth of this.

    Returns:
        `mse_3d`: mean distance of corresponding points, m; `chamfer`: mean over points of the two distances to the
        other cloud, halved, m; `f_a`: area under the F-score over 100 log-spaced thresholds, where the thresholds are
        compared with squared distances, as the official code does; `f_a_metric`: the same with distances.
    """
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    to_truth = cKDTree(g).query(p)[0]
    to_prediction = cKDTree(p).query(g)[0]
    thresholds = np.geomspace(min_depth_m, max_depth_m / 20, THRESHOLDS)
    return {
        "mse_3d": float(np.linalg.norm(p - g, axis=1).mean()),
        "chamfer": float(0.5 * (to_truth.mean() + to_prediction.mean())),
        "f_a": _f_area(to_truth**2, to_prediction**2, thresholds),
        "f_a_metric": _f_area(to_truth, to_prediction, thresholds),
    }


def _f_area(to_truth: np.ndarray, to_prediction: np.ndarray, thresholds: np.ndarray) -> float:
    """Trapezoid over unit spacing, over the number of thresholds: its largest value is 0.99."""
    precision = np.array([np.mean(to_truth < threshold) for threshold in thresholds])
    recall = np.array([np.mean(to_prediction < threshold) for threshold in thresholds])
    total = precision + recall
    score = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
    return float(np.trapezoid(score) / len(thresholds))


def ray_errors_deg(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Angle between unit rays in degrees: ... x 3 twice to ...; exact for small angles too."""
    cross = np.linalg.norm(np.cross(prediction, truth), axis=-1)
    return np.degrees(np.arctan2(cross, (prediction * truth).sum(-1)))


def camera_metrics(
    prediction: np.ndarray,
    truth: np.ndarray,
    predicted_intrinsics: np.ndarray | None = None,
    true_intrinsics: np.ndarray | None = None,
) -> dict[str, float]:
    """How good the predicted rays are.

    Args:
        prediction: N x 3 unit rays.
        truth: N x 3 unit rays.
        predicted_intrinsics: 3 x 3.
        true_intrinsics: 3 x 3.

    Returns:
        `rho_a`: area under the share of rays whose error is within 100 thresholds from 0.5 degrees to T, over T - 0.5;
        T is 15 degrees, 20 or 30 for cameras that see 100 or 190 degrees from their axis; `ray_error_deg`: the mean
        error; `arel_c`: mean relative error of fx, fy, cx, cy where both intrinsics are given.
    """
    errors = ray_errors_deg(prediction, truth)
    widest = float(np.degrees(np.arccos(np.clip(truth[..., 2], -1, 1))).max())
    limit = 15.0 if widest < 100 else 20.0 if widest < 190 else 30.0
    thresholds = np.linspace(0.5, limit, THRESHOLDS)
    shares = [float(np.mean(errors <= threshold)) for threshold in thresholds]
    metrics = {
        "rho_a": float(np.trapezoid(shares, thresholds) / (limit - 0.5)),
        "ray_error_deg": float(errors.mean()),
    }
    if predicted_intrinsics is not None and true_intrinsics is not None:
        four = np.array([[0, 0], [1, 1], [0, 2], [1, 2]]).T
        p, g = predicted_intrinsics[tuple(four)], true_intrinsics[tuple(four)]
        metrics["arel_c"] = float(np.mean(np.abs(p - g) / np.abs(g)))
    return metrics


def uncertainty_metrics(uncertainty: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Whether pixels that are said to be uncertain are wrong (V2 section IV-A).

    Args:
        uncertainty: N, larger is worse.
        prediction: N, m.
        truth: N, m.

    Returns:
        `ause`: area between the error (1 - d1) that is left when the most uncertain pixels are removed in 50 steps and
        the one that is left when the worst are; `nause`: over the same area of a random order; `spearman`: rank
        correlation with the absolute error.
    """
    p, g = prediction.astype(np.float64), truth.astype(np.float64)
    wrong = (_ratio(p, g) >= 1.25).astype(np.float64)
    oracle = _sparsification(wrong, np.argsort(-_ratio(p, g), kind="stable"))
    own = _sparsification(wrong, np.argsort(-uncertainty, kind="stable"))
    gap, chance = np.trapezoid(own - oracle) / len(own), np.trapezoid(wrong.mean() - oracle) / len(own)
    return {
        "ause": float(gap),
        "nause": float(gap / chance) if chance > 0 else 0.0,
        "spearman": _correlation(_ranks(uncertainty), _ranks(np.abs(p - g))),
    }


def _sparsification(wrong: np.ndarray, order: np.ndarray, steps: int = 50) -> np.ndarray:
    """Mean of `wrong` over what is left after the first k/steps of `order` are removed, k = 0 ... steps - 1."""
    left = wrong[order]
    return np.array([left[len(left) * step // steps :].mean() for step in range(steps)])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - 0.5 * (counts + 1))[inverse]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def mean_metrics(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the images that have it."""
    names = dict.fromkeys(name for metrics in images for name in metrics)
    return {name: float(np.mean([metrics[name] for metrics in images if name in metrics])) for name in names}
