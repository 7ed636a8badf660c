"""The camera that a user gives: intrinsics, a field of view, a calibration file, or a photograph's EXIF. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core.config import near
from tenfold.core.console import UserError, warn
from tenfold.core.picture import Picture

COUNTS = {"pinhole": 4, "fisheye624": 16, "opencv": 16, "eucm": 6, "mei": 9, "spherical": 8}
_FILM_DIAGONAL_MM = math.hypot(36, 24)
_EXIF_FOCAL_35MM = 0xA405  # FocalLengthIn35mmFilm


@dataclass(frozen=True)
class Camera:
    """A camera model and its parameters, in pixels of the image that it belongs to.

    Args:
        model: pinhole, fisheye624, opencv, eucm, mei or spherical.
        params: see `tenfold.depth.cameras.CAMERAS` for their names and order.
        size: width and height of that image, where they are known.

    Raises:
        UserError: an unknown model, another number of parameters, NaN, a focal length that is not positive.

    Example:
        >>> Camera.from_fov(90, 640, 480).params
        (320.0, 320.0, 320.0, 240.0)
    """

    model: str
    params: tuple[float, ...]
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.model not in COUNTS:
            raise UserError(f"unknown camera model {self.model!r}; {near(self.model, list(COUNTS))}")
        if len(self.params) != COUNTS[self.model]:
            raise UserError(f"a {self.model} camera has {COUNTS[self.model]} parameters, these are {len(self.params)}")
        if not all(math.isfinite(value) for value in self.params):
            raise UserError(f"the {self.model} camera has NaN or infinite parameters")
        if self.model == "spherical":
            if min(self.params[4:6]) < 2 or not (0 < self.params[6] <= math.pi + 1e-3 and 0 < self.params[7] <= 1.58):
                raise UserError("a spherical camera needs width, height and half fields of view in radians at 4 to 7")
        elif min(self.params[:2]) <= 0:
            raise UserError(f"the focal lengths {self.params[0]:g}, {self.params[1]:g} are not both positive")
        if self.model == "opencv" and any(self.params[7:10]):
            raise UserError("the opencv camera's k4 to k6 must be 0: its rational model is not supported")

    @classmethod
    def pinhole(cls, fx: float, fy: float, cx: float, cy: float) -> Camera:
        """A pinhole camera; the centre of the first pixel is (0.5, 0.5)."""
        return cls("pinhole", (float(fx), float(fy), float(cx), float(cy)))

    @classmethod
    def fisheye624(cls, params: Sequence[float]) -> Camera:
        """fx, fy, cx, cy, k1 .. k6, p0, p1, s0 .. s3 (Project Aria's model)."""
        return cls("fisheye624", _floats(params))

    @classmethod
    def from_intrinsics(cls, intrinsics: Any) -> Camera:
        """A 3 x 3 matrix without skew, or fx, fy, cx, cy. Raises UserError for anything else."""
        try:
            values = np.array(intrinsics, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError("the intrinsics are not numbers") from None
        if values.shape == (4,):
            return cls("pinhole", tuple(float(value) for value in values))
        if values.shape != (3, 3):
            raise UserError(f"intrinsics are a 3 x 3 matrix or fx, fy, cx, cy; these have the shape {values.shape}")
        if not np.isfinite(values).all():
            raise UserError("the intrinsics have NaN or infinite values")
        if values[2, 2] == 0 or np.abs(values[[1, 2, 2], [0, 0, 1]]).max() > 1e-6 * abs(values[2, 2]):
            raise UserError(
                "the intrinsics are not upper triangular with 0, 0, 1 in the last row (is it a projection?)"
            )
        values = values / values[2, 2]
        if abs(values[0, 1]) > 1e-3 * abs(values[0, 0]):
            raise UserError(f"the intrinsics have a skew of {values[0, 1]:g} pixels, which is not supported")
        return cls.pinhole(values[0, 0], values[1, 1], values[0, 2], values[1, 2])

    @classmethod
    def from_fov(cls, fov_x_deg: float, width: int, height: int) -> Camera:
        """A centred pinhole camera with square pixels and this horizontal field of view."""
        if not (math.isfinite(fov_x_deg) and 0 < fov_x_deg < 180):
            raise UserError(f"a horizontal field of view of {fov_x_deg:g} degrees is not between 0 and 180")
        focal = width / 2 / math.tan(math.radians(fov_x_deg) / 2)
        return cls("pinhole", (focal, focal, width / 2, height / 2), (width, height))

    @classmethod
    def from_file(cls, path: str | Path) -> Camera:
        """A camera from a .json file (see docs/depth.md) or intrinsics from a .npy file.

        Raises:
            UserError: no such file, or none that holds a camera.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            if path.suffix.lower() == ".npy":
                return cls.from_intrinsics(np.load(path, allow_pickle=False))
            return cls._from_json(json.loads(path.read_text(encoding="utf-8")))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (OSError, ValueError, EOFError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: neither a camera in JSON nor intrinsics in .npy ({reason})") from None

    @classmethod
    def _from_json(cls, content: Any) -> Camera:
        if not isinstance(content, Mapping):
            return cls.from_intrinsics(content)
        size = content.get("size") or ([content["width"], content["height"]] if "height" in content else None)
        if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
            raise UserError(f"size {size} is not width and height")
        size = (size[0], size[1]) if size is not None else None
        if "params" in content:
            params = _floats(content["params"])
            return cls(str(content.get("name", content.get("model", "pinhole"))).lower(), params, size)
        if "intrinsics" in content:
            found = cls.from_intrinsics(content["intrinsics"])
        elif {"fx", "fy", "cx", "cy"} <= set(content):
            found = cls.from_intrinsics([content[name] for name in ("fx", "fy", "cx", "cy")])
        else:
            raise UserError("it has neither `params` nor `intrinsics` nor fx, fy, cx, cy")
        return cls(found.model, found.params, size)

    @property
    def intrinsics(self) -> np.ndarray | None:
        """3 x 3 float64, for a pinhole camera."""
        if self.model != "pinhole":
            return None
        fx, fy, cx, cy = self.params
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)

    def check_fits(self, width: int, height: int) -> None:
        """See that the camera belongs to an image of this size. Raises UserError; warns where it is only odd."""
        size = self.size
        if self.model == "spherical":
            size = (round(self.params[4]), round(self.params[5]))
        if size is not None and size != (width, height):
            raise UserError(
                f"the camera is for images of {size[0]}x{size[1]} pixels, this one has {width}x{height}: "
                "give the camera of this image, or resize the image"
            )
        if self.model == "spherical":
            return
        cx, cy = self.params[2:4]
        if not (-0.25 * width <= cx <= 1.25 * width and -0.25 * height <= cy <= 1.25 * height):
            raise UserError(
                f"the principal point ({cx:g}, {cy:g}) is far outside of the image of {width}x{height} pixels: "
                f"the intrinsics seem to be for another resolution, about {round(2 * cx)}x{round(2 * cy)}"
            )
        ratios = 2 * cx / width, 2 * cy / height
        if max(ratios) < 0.7 or min(ratios) > 1.4:
            warn(
                f"the principal point ({cx:g}, {cy:g}) is far from the middle of {width}x{height} pixels: "
                "are the intrinsics for another resolution?"
            )

    def to_json(self) -> dict[str, Any]:
        """What `from_file` reads."""
        return {
            "name": self.model,
            "params": list(self.params),
            **({"size": list(self.size)} if self.size else {}),
        }


def _floats(values: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError("the camera's params are not a list of numbers") from None


def exif_camera(picture: Picture) -> Camera | None:
    """A centred pinhole camera from EXIF's focal length in 35 mm terms, by the diagonals; None where there is none.

    Damaged EXIF counts as none; core.images has warned of it.
    """
    focal_mm = _focal_35mm(picture.exif)
    if not focal_mm:
        return None
    focal = focal_mm * math.hypot(picture.width, picture.height) / _FILM_DIAGONAL_MM
    return Camera("pinhole", (focal, focal, picture.width / 2, picture.height / 2), (picture.width, picture.height))


def _focal_35mm(exif: bytes | None) -> float | None:
    from PIL import ExifTags, Image

    if exif is None:
        return None
    try:
        block = Image.Exif()
        block.load(exif)
        value = float(block.get_ifd(ExifTags.IFD.Exif).get(_EXIF_FOCAL_35MM, 0))
    except Exception:  # Pillow's EXIF code raises anything on damaged blocks
        return None
    return value if math.isfinite(value) and 1 <= value <= 2000 else None
