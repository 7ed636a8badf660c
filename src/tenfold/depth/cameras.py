"""Cameras as pure functions: where a pixel looks, and where a point lands.

A camera is the name of its model and a vector of parameters. Axes are OpenCV's (x right, y down, z forward), and the
centre of the first pixel is at (0.5, 0.5). Formulas are those of the published models; parameter orders are those of
the official release, so that its calibration files can be used. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 40  # of the solvers, at most; they converge quadratically: after a step of 1e-9 the error is rounding
_TINY = 1e-12


@dataclass(frozen=True)
class CameraModel:
    """One camera model.

    Args:
        unproject: (parameters B x P, pixels B x N x 2) -> rays B x N x 3, of unit length.
        project: (parameters B x P, points B x N x 3) -> pixels B x N x 2; NaN for points that no pixel sees.
        names: of the parameters, in order.
    """

    unproject: Callable[[Tensor, Tensor], Tensor]
    project: Callable[[Tensor, Tensor], Tensor]
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return len(self.names)


# --- what all share --------------------------------------------------------------------------------------------------


def pixel_centres(height: int, width: int) -> Tensor:
    """HW x 2, float64: x and y of every pixel, row by row."""
    v, u = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5, torch.arange(width, dtype=torch.float64) + 0.5, indexing="ij"
    )
    return torch.stack([u, v], dim=-1).flatten(0, 1)


def rays(model: str, params: Tensor, height: int, width: int) -> Tensor:
    """Unit rays through the centres of all pixels.

    Args:
        model: a key of `CAMERAS`.
        params: B x P or P.
        height: of the image in pixels.
        width: likewise.

    Returns:
        B x 3 x H x W, float32.
    """
    params = params.reshape(-1, params.shape[-1]).double()
    pixels = pixel_centres(height, width).to(params.device).expand(params.shape[0], -1, -1)
    found = CAMERAS[model].unproject(params, pixels)
    return found.transpose(1, 2).reshape(-1, 3, height, width).float()


def pinhole_rays(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Unit rays of pinhole cameras, differentiable in the intrinsics and in their precision.

    Args:
        intrinsics: B x 3 x 3, without skew.
        height: of the image in pixels.
        width: likewise.

    Returns:
        B x 3 x H x W.
    """
    k = intrinsics[:, :, :, None, None]
    u = torch.arange(width, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5
    v = torch.arange(height, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5
    x = ((u[None, None, :] - k[:, 0, 2]) / k[:, 0, 0]).expand(-1, height, -1)
    y = ((v[None, :, None] - k[:, 1, 2]) / k[:, 1, 1]).expand(-1, -1, width)
    z = (x * x + y * y + 1).rsqrt()
    return torch.stack([x * z, y * z, z], dim=1)


def crop(model: str, params: Tensor, left: float, top: float, right: float = 0.0, bottom: float = 0.0) -> Tensor:
    """The camera of an image after so many pixels were cut off; negative numbers pad.

    A spherical camera has no principal point: it keeps its middle, and its fields of view follow the size.
    """
    params = params.clone()
    params[..., 2] -= left
    params[..., 3] -= top
    if model == "spherical":
        for size, angle, cut in ((4, 6, left + right), (5, 7, top + bottom)):
            before = params[..., size].clone()
            params[..., size] = before - cut
            params[..., angle] *= params[..., size] / before
    return params


def resize(model: str, params: Tensor, factor_x: float, factor_y: float) -> Tensor:
    """The camera of an image that was scaled by a factor for each axis."""
    params = params.clone()
    columns = (0, 2, 4) if model == "spherical" else (0, 2)
    for column in columns:
        params[..., column] *= factor_x
        params[..., column + 1] *= factor_y
    return params


def intrinsics_of(params: Tensor) -> Tensor:
    """fx, fy, cx, cy at the head of B x P parameters, as matrices: B x 3 x 3."""
    k = torch.zeros(*params.shape[:-1], 3, 3, dtype=params.dtype, device=params.device)
    k[..., 0, 0], k[..., 1, 1] = params[..., 0], params[..., 1]
    k[..., 0, 2], k[..., 1, 2] = params[..., 2], params[..., 3]
    k[..., 2, 2] = 1.0
    return k


def _columns(params: Tensor, start: int, stop: int) -> list[Tensor]:
    """Parameters `start` to `stop` - 1, each B x 1."""
    return [params[:, index : index + 1] for index in range(start, stop)]


def _normalised(params: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    fx, fy, cx, cy = _columns(params, 0, 4)
    return (pixels[..., 0] - cx) / fx, (pixels[..., 1] - cy) / fy


def _to_pixels(params: Tensor, x: Tensor, y: Tensor) -> Tensor:
    fx, fy, cx, cy = _columns(params, 0, 4)
    return torch.stack([x * fx + cx, y * fy + cy], dim=-1)


def _unit(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.normalize(torch.stack([x, y, z], dim=-1), dim=-1)


def _in_front(pixels: Tensor, z: Tensor) -> Tensor:
    return torch.where((z > _TINY)[..., None], pixels, torch.nan)


# --- pinhole ---------------------------------------------------------------------------------------------------------


def _unproject_pinhole(params: Tensor, pixels: Tensor) -> Tensor:
    x, y = _normalised(params, pixels)
    return _unit(x, y, torch.ones_like(x))


def _project_pinhole(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    depth = z.clamp_min(_TINY)
    return _in_front(_to_pixels(params, x / depth, y / depth), z)


# --- EUCM (Khomutenko et al., RA-L 2016): a projection from an ellipsoid ---------------------------------------------


def _unproject_eucm(params: Tensor, pixels: Tensor) -> Tensor:
    x, y = _normalised(params, pixels)
    alpha, beta = _columns(params, 4, 6)
    square = x * x + y * y
    root = (1 - (2 * alpha - 1) * beta * square).clamp_min(0).sqrt()
    return _unit(x, y, (1 - beta * alpha * alpha * square) / (alpha * root + (1 - alpha)))


def _project_eucm(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    alpha, beta = _columns(params, 4, 6)
    distance = (beta * (x * x + y * y) + z * z).sqrt()
    below = alpha * distance + (1 - alpha) * z
    return _in_front(_to_pixels(params, x / below, y / below), below)


# --- Fisheye624 and OPENCV: a radial profile, then tangential and thin-prism terms -----------------------------------


def _bend(params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tangential and prism terms on radially distorted coordinates, and their Jacobian (xx, xy, yx, yy)."""
    p0, p1, s0, s1, s2, s3 = _columns(params, 10, 16)
    square = x * x + y * y
    moved_x = x + (2 * x * x + square) * p0 + 2 * x * y * p1 + s0 * square + s1 * square * square
    moved_y = y + (2 * y * y + square) * p1 + 2 * x * y * p0 + s2 * square + s3 * square * square
    prism_x, prism_y = 2 * s0 + 4 * s1 * square, 2 * s2 + 4 * s3 * square
    jacobian = (
        1 + 6 * x * p0 + 2 * y * p1 + prism_x * x,
        2 * y * p0 + 2 * x * p1 + prism_x * y,
        2 * x * p1 + 2 * y * p0 + prism_y * x,
        1 + 6 * y * p1 + 2 * x * p0 + prism_y * y,
    )
    return moved_x, moved_y, jacobian


def _unbend(params: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_bend`, by Newton's method."""
    target_x, target_y = x, y
    for _ in range(_STEPS):
        found_x, found_y, (xx, xy, yx, yy) = _bend(params, x, y)
        left_x, left_y = target_x - found_x, target_y - found_y
        determinant = xx * yy - xy * yx
        determinant = torch.where(determinant.abs() < _TINY, torch.full_like(determinant, _TINY), determinant)
        step_x, step_y = (yy * left_x - xy * left_y) / determinant, (xx * left_y - yx * left_x) / determinant
        # No step is longer than 1, so that pixels beyond the image circle do not run away.
        length = (step_x * step_x + step_y * step_y).sqrt().clamp_min(1.0)
        x, y = x + step_x / length, y + step_y / length
        if max(float(step_x.abs().max()), float(step_y.abs().max())) < 1e-9:
            break
    return x, y


def _invert_radial(
    profile: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], target: Tensor, end: float
) -> Tensor:
    """r in [0, end] with profile(r) = target, within the first range in which the profile grows.

    Newton's method between two bounds that close in, which falls back to halving: it finds the root wherever there is
    one. A target beyond the profile's largest value gives the place of that value.
    """
    samples = torch.linspace(0, end, 2048, dtype=target.dtype, device=target.device)[None].expand(target.shape[0], -1)
    grows = torch.cumprod((slope(samples) > 0).to(target.dtype), dim=1).sum(dim=1, keepdim=True)
    high = (grows.clamp(1, 2047) * end / 2047).expand_as(target).clone()
    low = torch.zeros_like(target)
    target = torch.minimum(target, profile(high))
    r = torch.minimum(target, high)
    for _ in range(_STEPS):
        value = profile(r) - target
        high, low = torch.where(value > 0, r, high), torch.where(value > 0, low, r)
        step = r - value / slope(r).clamp_min(_TINY)
        following = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        change = float((following - r).abs().max())
        r = following
        if change < 1e-9:
            break
    return r


def _odd_polynomial(params: Tensor, count: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """r -> r + k1 r^3 + k2 r^5 + ..., and its derivative."""
    factors = _columns(params, 4, 4 + count)

    def profile(r: Tensor) -> Tensor:
        square, total = r * r, torch.zeros_like(r)
        for factor in reversed(factors):
            total = (total + factor) * square
        return r * (1 + total)

    def slope(r: Tensor) -> Tensor:
        square, total = r * r, torch.zeros_like(r)
        for power, factor in reversed(list(enumerate(factors, start=1))):
            total = (total + (2 * power + 1) * factor) * square
        return 1 + total

    return profile, slope


def _unproject_fisheye624(params: Tensor, pixels: Tensor) -> Tensor:
    x, y = _unbend(params, *_normalised(params, pixels))
    radius = (x * x + y * y).sqrt()
    angle = _invert_radial(*_odd_polynomial(params, 6), radius, math.pi)
    sine = torch.where(radius > _TINY, angle.sin() / radius.clamp_min(_TINY), torch.ones_like(radius))
    return _unit(sine * x, sine * y, angle.cos())


def _project_fisheye624(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    across = (x * x + y * y).sqrt()
    bent = _odd_polynomial(params, 6)[0](torch.atan2(across, z))
    factor = torch.where(across > _TINY, bent / across.clamp_min(_TINY), 1 / z.clamp_min(_TINY))
    moved_x, moved_y, _ = _bend(params, factor * x, factor * y)
    return _to_pixels(params, moved_x, moved_y)


def _unproject_opencv(params: Tensor, pixels: Tensor) -> Tensor:
    x, y = _unbend(params, *_normalised(params, pixels))
    radius = (x * x + y * y).sqrt()
    flat = _invert_radial(*_odd_polynomial(params, 3), radius, 20.0)
    factor = torch.where(radius > _TINY, flat / radius.clamp_min(_TINY), torch.ones_like(radius))
    return _unit(factor * x, factor * y, torch.ones_like(x))


def _project_opencv(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = points.unbind(-1)
    depth = z.clamp_min(_TINY)
    x, y = x / depth, y / depth
    radius = (x * x + y * y).sqrt()
    bent = _odd_polynomial(params, 3)[0](radius)
    factor = torch.where(radius > _TINY, bent / radius.clamp_min(_TINY), torch.ones_like(radius))
    moved_x, moved_y, _ = _bend(params, factor * x, factor * y)
    return _in_front(_to_pixels(params, moved_x, moved_y), z)


# --- MEI (Mei and Rives, ICRA 2007): a unit sphere seen from a shifted centre, then radial and tangential terms ------
# As in the release, the tangential terms act on radially distorted coordinates, and p0 belongs to x.


def _mei_bending(params: Tensor) -> Tensor:
    """Parameters as `_bend` wants them; there is no prism."""
    return F.pad(params[:, 6:8], (10, 4))


def _unproject_mei(params: Tensor, pixels: Tensor) -> Tensor:
    x, y = _unbend(_mei_bending(params), *_normalised(params, pixels))
    radius = (x * x + y * y).sqrt()
    flat = _invert_radial(*_odd_polynomial(params, 2), radius, 20.0)
    factor = torch.where(radius > _TINY, flat / radius.clamp_min(_TINY), torch.ones_like(radius))
    x, y = factor * x, factor * y
    (shift,) = _columns(params, 8, 9)
    square = x * x + y * y
    factor = (shift + (1 + (1 - shift * shift) * square).clamp_min(0).sqrt()) / (1 + square)
    return _unit(factor * x, factor * y, factor - shift)


def _project_mei(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = F.normalize(points, dim=-1).unbind(-1)
    (shift,) = _columns(params, 8, 9)
    below = z + shift
    x, y = x / below, y / below
    radius = (x * x + y * y).sqrt()
    bent = _odd_polynomial(params, 2)[0](radius)
    factor = torch.where(radius > _TINY, bent / radius.clamp_min(_TINY), torch.ones_like(radius))
    moved_x, moved_y, _ = _bend(_mei_bending(params), factor * x, factor * y)
    return _in_front(_to_pixels(params, moved_x, moved_y), below)


# --- spherical (equirectangular) -------------------------------------------------------------------------------------


def _unproject_spherical(params: Tensor, pixels: Tensor) -> Tensor:
    width, height, half_x, half_y = _columns(params, 4, 8)
    longitude = (pixels[..., 0] / (width - 1) - 0.5) * 2 * half_x
    latitude = (pixels[..., 1] / (height - 1) - 0.5) * 2 * half_y
    return _unit(latitude.cos() * longitude.sin(), latitude.sin(), latitude.cos() * longitude.cos())


def _project_spherical(params: Tensor, points: Tensor) -> Tensor:
    x, y, z = F.normalize(points, dim=-1).unbind(-1)
    width, height, half_x, half_y = _columns(params, 4, 8)
    longitude, latitude = torch.atan2(x, z), torch.asin(y.clamp(-1, 1))
    return torch.stack(
        [(longitude / (2 * half_x) + 0.5) * (width - 1), (latitude / (2 * half_y) + 0.5) * (height - 1)], dim=-1
    )


_CENTRE = ("fx", "fy", "cx", "cy")
_LENS = (*_CENTRE, "k1", "k2", "k3", "k4", "k5", "k6", "p0", "p1", "s0", "s1", "s2", "s3")
CAMERAS: Mapping[str, CameraModel] = {
    "pinhole": CameraModel(_unproject_pinhole, _project_pinhole, _CENTRE),
    "fisheye624": CameraModel(_unproject_fisheye624, _project_fisheye624, _LENS),
    "opencv": CameraModel(_unproject_opencv, _project_opencv, _LENS),
    "eucm": CameraModel(_unproject_eucm, _project_eucm, (*_CENTRE, "alpha", "beta")),
    "mei": CameraModel(_unproject_mei, _project_mei, (*_CENTRE, "k1", "k2", "p0", "p1", "xi")),
    "spherical": CameraModel(
        _unproject_spherical,
        _project_spherical,
        ("unused", "unused", "unused", "unused", "width", "height", "half_hfov", "half_vfov"),
    ),
}
