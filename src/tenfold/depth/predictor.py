"""The user-level object: a picture in; metric depth, points and the camera out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from tenfold.core import devices, images
from tenfold.core.console import UserError
from tenfold.core.picture import Picture
from tenfold.depth import cameras, checkpoint, preprocessing
from tenfold.depth.camera_input import Camera, exif_camera
from tenfold.depth.model import Prediction, UniDepthV2
from tenfold.depth.model_v1 import PredictionV1, UniDepthV1
from tenfold.depth.pictures import read_picture

ImageLike: TypeAlias = "str | Path | Picture | np.ndarray | Tensor | Any"
CameraLike: TypeAlias = "Camera | str | Path | None"
Source = Literal["predicted", "given", "exif"]
Precision = Literal["fp32", "bf16", "fp16"]

MIN_SIDE = preprocessing.PATCH
MAX_ASPECT = 20
SHARED_CAMERA_FRAMES = 16
_ROWS_AT_ONCE = 1 << 20  # pixels whose rays are solved for at a time
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Depth:
    """What was found in one picture; arrays have the picture's height and width.

    Attributes:
        depth_m: H x W float32, metres along the camera's axis (z).
        points_m: H x W x 3 float32, metres; x right, y down, z forward.
        rays: H x W x 3 float32, unit.
        intrinsics: 3 x 3 float64 that points and depth belong to; None if the camera is no pinhole.
        camera: the camera that they belong to.
        camera_source: whether it was predicted, given, or taken from EXIF.
        predicted_intrinsics: 3 x 3 float64, what the network made of the picture on its own.
        uncertainty: H x W float32, expected absolute error of the depth in metres, as the network sees it; larger is
            worse. None for V1, and where it was not asked for.
        image: H x W x 3 uint8, the picture.
    """

    depth_m: np.ndarray
    points_m: np.ndarray
    rays: np.ndarray
    intrinsics: np.ndarray | None
    camera: Camera
    camera_source: Source
    predicted_intrinsics: np.ndarray
    uncertainty: np.ndarray | None
    image: np.ndarray = field(repr=False)

    @property
    def range_m(self) -> np.ndarray:
        """H x W float32, metres along each pixel's ray."""
        return np.linalg.norm(self.points_m, axis=-1)

    def save(self, target: str | Path, formats: Sequence[str] = ("png16", "json"), **options: Any) -> list[Path]:
        """Write files that are named after `target`; see `tenfold.depth.outputs.save`."""
        from tenfold.depth.outputs import save

        return save(self, target, formats, **options)


class DepthEstimator:
    """A network on a device, ready to predict.

    Args:
        network: in evaluation mode, on its device.
        precision: `fp32`; `bf16` or `fp16` autocast, for GPUs (the official code uses fp16 there).

    Example:
        >>> estimator = DepthEstimator.from_pretrained("unidepth-v2-vits14")  # doctest: +SKIP
        >>> estimator.predict("photo.jpg").save("out/photo", ("png16", "ply", "json"))  # doctest: +SKIP
    """

    def __init__(self, network: checkpoint.Network, precision: Precision = "fp32") -> None:
        if precision not in get_args(Precision):
            raise UserError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
        self.network = network
        self.precision = precision
        self.device = next(network.parameters()).device

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str = "auto", precision: Precision = "fp32"
    ) -> DepthEstimator:
        """Load a network: official (`unidepth-v2-vits14`) or embedded name, hub id, folder, or weights file.

        Raises:
            UserError: an unknown name, a file that is no UniDepth checkpoint, a device that is not there.
        """
        return cls(checkpoint.load_model(str(name_or_path), devices.resolve_device(device)), precision)

    def predict(
        self,
        image: ImageLike,
        camera: CameraLike = None,
        intrinsics: Any = None,
        fov_x_deg: float | None = None,
        resolution_level: float | None = None,
        uncertainty: bool = True,
        exact_intrinsics: bool = True,
    ) -> Any:
        """Depth, points and camera of one picture, or of each in a list.

        Args:
            image: a path; a `Picture`; a Pillow image; NumPy H x W or H x W x C (uint8, uint16, or float in [0, 1]);
                torch 3 x H x W or B x 3 x H x W (uint8, or float in [0, 1]); or a list of these. Alpha is ignored.
            camera: the picture's camera: a `Camera`, a file of one, "exif" (raises where there is no focal length),
                "auto" (EXIF where there is one), or None to predict it.
            intrinsics: 3 x 3, or fx, fy, cx, cy, in place of `camera`.
            fov_x_deg: horizontal field of view, in place of `camera`.
            resolution_level: 0 (few pixels, quick) to 9 (many) of V2's budget; by default the picture's own size,
                clamped to the budget.
            uncertainty: whether V2 also predicts the error; without it, it takes less time.
            exact_intrinsics: rays and points belong to the pixels exactly. False does as the released code: one scale
                for both axes although sizes are rounded to patches, and points interpolated between pixels.

        Returns:
            A `Depth`, or a list of them for a list or a B x 3 x H x W tensor.

        Raises:
            UserError: no picture, one with sides below 14 pixels or longer than 20:1, or a camera that cannot be its.
        """
        options = (camera, intrinsics, fov_x_deg, resolution_level, uncertainty, exact_intrinsics)
        if isinstance(image, list | tuple) or (isinstance(image, Tensor) and image.dim() == 4):
            return self._predict_list([_to_picture(each) for each in image], *options)
        return self._predict_list([_to_picture(image)], *options)[0]

    def predict_video(
        self,
        path: str | Path,
        shared_camera: bool = True,
        camera: CameraLike = None,
        intrinsics: Any = None,
        fov_x_deg: float | None = None,
        resolution_level: float | None = None,
        uncertainty: bool = False,
    ) -> Iterator[Depth]:
        """Depth of each frame of a film, one at a time, in memory that does not grow with its length.

        Args:
            path: a film.
            shared_camera: one camera for the whole film: the median of what the network sees in up to 16 frames, which
                are read in a first pass. Without it every frame gets its own, and depth flickers.
            camera: as in `predict`.
            intrinsics: as in `predict`.
            fov_x_deg: as in `predict`.
            resolution_level: as in `predict`.
            uncertainty: as in `predict`.
        """
        from tenfold.core.video import VideoReader

        camera, reader = _opened(camera), VideoReader(path)
        if shared_camera and camera is None and intrinsics is None and fov_x_deg is None:
            found = self._median_intrinsics(reader, resolution_level)
            for frame in reader:
                result = self.predict(frame, None, found, None, resolution_level, uncertainty)
                yield replace(result, camera_source="predicted", predicted_intrinsics=found)
            return
        for frame in reader:
            yield self.predict(frame, camera, intrinsics, fov_x_deg, resolution_level, uncertainty)

    def predict_intrinsics(self, image: ImageLike, resolution_level: float | None = None) -> np.ndarray:
        """The pinhole camera that the network sees in a picture, 3 x 3 float64, without computing depth for V2."""
        picture = _to_picture(image)
        fit = self._fit(picture, resolution_level)
        planes = fit.image_in(_planes(picture).to(self.device), antialias=self._is_v1)
        with torch.inference_mode():
            if isinstance(self.network, UniDepthV2):
                found = self.network.predict_intrinsics(planes)
            else:
                found = self.network(planes).intrinsics
        return fit.camera_out(found.double(), exact=True)[0].cpu().numpy()

    def _median_intrinsics(self, frames: Any, level: float | None) -> np.ndarray:
        """The median camera of up to 16 frames, evenly spaced over a film."""
        count = frames.frame_count
        every = max(1, (count or SHARED_CAMERA_FRAMES) // SHARED_CAMERA_FRAMES)
        found = []
        for index, frame in enumerate(frames):
            if index % every == 0:
                found.append(self.predict_intrinsics(frame, level))
            if len(found) == SHARED_CAMERA_FRAMES:
                break
        if not found:
            raise UserError(f"{frames.path}: has no frames")
        return np.median(np.stack(found), axis=0)

    @property
    def _is_v1(self) -> bool:
        return isinstance(self.network, UniDepthV1)

    def _fit(self, picture: Picture, level: float | None) -> preprocessing.Fit:
        height, width = picture.height, picture.width
        if min(height, width) < MIN_SIDE:
            raise UserError(f"{width}x{height} pixels are too few: both sides need at least {MIN_SIDE}")
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise UserError(
                f"{width}x{height} pixels are more than {MAX_ASPECT} times as long as wide: crop the picture first"
            )
        if level is not None and not 0 <= level < preprocessing.LEVELS:
            raise UserError(f"the resolution level {level:g} is not from 0 to below {preprocessing.LEVELS}")
        if isinstance(self.network, UniDepthV2):
            return preprocessing.fit_v2(height, width, self.network.config.sizes, level)
        if level is not None:
            raise UserError("UniDepthV1 has one resolution: leave the resolution level out")
        return preprocessing.fit_v1(height, width, self.network.config.image_shape)

    def _predict_list(
        self,
        pictures: list[Picture],
        camera: CameraLike,
        intrinsics: Any,
        fov_x_deg: float | None,
        level: float | None,
        uncertainty: bool,
        exact: bool,
    ) -> list[Depth]:
        if sum(each is not None for each in (camera, intrinsics, fov_x_deg)) > 1:
            raise UserError("give one of camera, intrinsics and field of view, not several")
        camera = _opened(camera)
        results: list[Depth] = []
        chosen = [_choose_camera(picture, camera, intrinsics, fov_x_deg) for picture in pictures]
        for start, stop in _equal_runs(pictures, chosen):
            part, given = pictures[start:stop], chosen[start]
            fit = self._fit(part[0], level)
            planes = torch.cat([_planes(picture) for picture in part])
            results += self._predict_planes(planes, fit, given[0], given[1], uncertainty, exact)
        return results

    @torch.inference_mode()
    def _predict_planes(
        self,
        planes: Tensor,
        fit: preprocessing.Fit,
        camera: Camera | None,
        source: Source,
        uncertainty: bool,
        exact: bool,
    ) -> list[Depth]:
        """B x 3 x H x W, uint8 or float in [0, 1], and one camera or none for all of them -> results."""
        rays = None
        if camera is not None:
            camera.check_fits(fit.size[1], fit.size[0])
            rays = _network_rays(camera, fit, exact).to(self.device).expand(planes.shape[0], -1, -1, -1)
        network_image = fit.image_in(planes.to(self.device), antialias=self._is_v1)
        half = _HALF.get(self.precision)
        with torch.autocast(self.device.type, dtype=half) if half else contextlib.nullcontext():
            if isinstance(self.network, UniDepthV2):
                seen = self.network(network_image, rays, uncertainty)
            else:
                seen = self.network(network_image, rays)
        predicted = fit.camera_out(seen.intrinsics.double(), exact).cpu()
        own_rays = exact or isinstance(seen, PredictionV1)
        results = []
        for index in range(planes.shape[0]):
            k = predicted[index].numpy()
            used = camera or Camera.from_intrinsics(k)
            directions = None
            if own_rays:
                # A given camera's rays are those of the next frame as well; each result has its own copy.
                directions = camera_rays(used, *fit.size) if camera is None else _given_rays(used, *fit.size).copy()
            depth, points, directions, error = _arrays(seen, index, fit, directions)
            image = planes[index].permute(1, 2, 0).numpy()
            image = image if image.dtype == np.uint8 else images.convert_depth(image, np.uint8)
            results.append(Depth(depth, points, directions, used.intrinsics, used, source, k, error, image))
        return results


def _arrays(
    seen: Prediction | PredictionV1, index: int, fit: preprocessing.Fit, directions: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Depth, points, rays and error of one picture at its own size; V2's points are interpolated without directions."""

    def out(values: Tensor, antialias: bool = False) -> np.ndarray:
        """1 x C x h x w -> H x W x C."""
        return fit.map_out(values.float(), antialias)[0].permute(1, 2, 0).cpu().numpy()

    one = slice(index, index + 1)
    if isinstance(seen, PredictionV1):
        assert directions is not None
        depth = out(seen.depth[one], antialias=True)
        points = directions * (depth / directions[..., 2:])
        return np.ascontiguousarray(depth[..., 0]), points, directions, None
    error = None if seen.log_error is None else np.ascontiguousarray(out(seen.log_error[one].exp())[..., 0])
    if directions is not None:
        points = directions * out(seen.radius[one])
    else:
        points = np.ascontiguousarray(out(seen.rays[one] * seen.radius[one]))
        directions = out(seen.rays[one])
        directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True).clip(1e-5)
    return np.ascontiguousarray(points[..., 2]), points, directions, error


@functools.lru_cache(maxsize=1)
def _network_rays(camera: Camera, fit: preprocessing.Fit, exact: bool) -> Tensor:
    """A given camera as the network sees it: 1 x 3 x network size. Kept for the film's or the folder's next picture."""
    inside = fit.camera_in(camera.model, torch.tensor([camera.params], dtype=torch.float64), exact)
    return cameras.rays(camera.model, inside, *fit.network_size)


def camera_rays(camera: Camera, height: int, width: int) -> np.ndarray:
    """Unit rays through the centres of all pixels, H x W x 3 float32, some rows at a time."""
    rays = np.empty((height, width, 3), np.float32)
    step = max(1, _ROWS_AT_ONCE // width)
    params = torch.tensor([camera.params], dtype=torch.float64)
    unproject = cameras.CAMERAS[camera.model].unproject
    pixels = cameras.pixel_centres(min(step, height), width)
    for top in range(0, height, step):
        rows = min(step, height - top)
        here = pixels[: rows * width] + torch.tensor([0.0, float(top)], dtype=torch.float64)
        rays[top : top + rows] = unproject(params, here[None])[0].reshape(rows, width, 3).numpy()
    return rays


_given_rays = functools.lru_cache(maxsize=1)(camera_rays)


def _to_picture(image: ImageLike) -> Picture:
    """Any picture as a `Picture`; CHW tensors become HWC arrays. Raises UserError for what is none."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, str | Path):
        return read_picture(image)
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise UserError(f"a tensor of shape {tuple(image.shape)} is no picture: expected 3 x H x W")
        array = image.detach().cpu().permute(1, 2, 0).numpy()
        return _to_picture(array[..., 0] if array.shape[2] == 1 else np.ascontiguousarray(array))
    if not isinstance(image, np.ndarray):
        from PIL import Image

        if not isinstance(image, Image.Image):
            raise UserError(
                f"a {type(image).__name__} is no picture: give a path, an array, a tensor or a Pillow image"
            )
        return images.from_pil(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 2, 3, 4)) or 0 in image.shape:
        raise UserError(f"an array of shape {image.shape} is no picture: expected H x W or H x W x 3")
    if image.dtype not in (np.uint8, np.uint16):
        if not np.issubdtype(image.dtype, np.floating):
            raise UserError(f"pixels of type {image.dtype} are not supported: use uint8, uint16 or float in [0, 1]")
        image = image.astype(np.float32)
        if not np.isfinite(image).all():
            raise UserError("the picture has NaN or infinite pixels")
        if image.size and (image.min() < -1e-3 or image.max() > 1.001):
            raise UserError(f"float pixels are in [0, 1]; these reach {image.min():g} to {image.max():g}")
    return Picture(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _planes(picture: Picture) -> Tensor:
    """1 x 3 x H x W: uint8, or float in [0, 1] for pictures of more than 8 bits. A view where that is possible."""
    pixels = picture.color
    if pixels.dtype != np.uint8:
        pixels = images.convert_depth(pixels, np.float32)
    if pixels.ndim == 2:
        pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    pixels = pixels if pixels.flags.writeable else pixels.copy()
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def _opened(camera: CameraLike) -> Camera | Literal["exif", "auto"] | None:
    """A camera's file is read once, not for every picture."""
    if camera is None or isinstance(camera, Camera):
        return camera
    if camera == "exif" or camera == "auto":
        return "exif" if camera == "exif" else "auto"
    return Camera.from_file(camera)


def _choose_camera(
    picture: Picture, camera: Camera | Literal["exif", "auto"] | None, intrinsics: Any, fov_x_deg: float | None
) -> tuple[Camera | None, Source]:
    if intrinsics is not None:
        return Camera.from_intrinsics(intrinsics), "given"
    if fov_x_deg is not None:
        return Camera.from_fov(fov_x_deg, picture.width, picture.height), "given"
    if isinstance(camera, str):
        found = exif_camera(picture)
        if found is None and camera == "exif":
            raise UserError("there is no focal length in 35 mm terms in its EXIF: leave --camera exif out")
        return found, "exif" if found else "predicted"
    return camera, "given" if camera else "predicted"


def _equal_runs(pictures: list[Picture], chosen: list[tuple[Camera | None, Source]]) -> Iterator[tuple[int, int]]:
    """Start and stop of neighbours with one size, one sample type and one camera, which a batch can take together."""
    start = 0
    keys = [
        (each.height, each.width, each.pixels.dtype == np.uint8, *given)
        for each, given in zip(pictures, chosen, strict=True)
    ]
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] != keys[start]:
            yield start, stop
            start = stop
