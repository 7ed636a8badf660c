"""One file of a batch: read it, choose the network, enlarge, fit to a size, write; pictures and films."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.sources import Job
from tenfold.core.video import VideoReader, VideoWriter
from tenfold.superres.batch import Outcome, Report
from tenfold.superres.config import MODELS, RECIPES
from tenfold.superres.predictor import Precision, Tile, Upscaler
from tenfold.superres.resize import resize_to

EMBEDDED_SCALES = tuple(sorted(recipe.model.scale for recipe in RECIPES.values()))


@dataclass(frozen=True)
class Settings:
    """How a batch is upscaled.

    Attributes:
        model: name or file of the network; None: the embedded one of the scale.
        scale: upscaling factor; None: that of the network.
        fit: (width, height) that results are to fit into; None: s times the input.
        tile: see `Upscaler.upscale`.
        memory_budget: bytes, or None.
        self_ensemble: see `Upscaler.upscale`.
        precision: see `Upscaler`.
        quality: of JPEG and WebP.
        codec: of films, see `core.video.CODECS`.
        device: where to compute.
    """

    model: str | None = None
    scale: int | None = None
    fit: tuple[int, int] | None = None
    tile: Tile = "auto"
    memory_budget: int | None = None
    self_ensemble: bool = False
    precision: Precision = "fp32"
    quality: int = images.DEFAULT_QUALITY
    codec: str = "h264"
    device: str = "auto"


class UpscaleWork:
    """The work of `batch.run`: makes a job's target. Networks are loaded when the first file needs them."""

    def __init__(self, settings: Settings) -> None:
        if not 1 <= settings.quality <= 100:  # now, and not after the first picture was computed
            raise UserError(f"quality must be between 1 and 100, not {settings.quality}")
        self.settings = settings
        self._upscalers: dict[str, Upscaler] = {}

    def __call__(self, job: Job, report: Report) -> Outcome:
        """Upscale one file. Raises UserError for a bad one."""
        return self._film(job, report) if job.source.is_video else self._picture(job, report)

    @property
    def tag(self) -> str:
        """What is added to the name of a result that lies beside its source, such as `-x2`."""
        if self.settings.fit:
            return "-{}x{}".format(*self.settings.fit)
        return f"-x{self.upscaler((1, 1)).scale}"

    def upscaler(self, size: tuple[int, int]) -> Upscaler:
        """The network for a picture of a size (width, height).

        Raises:
            UserError: no network of the wanted scale.
        """
        settings = self.settings
        name = settings.model
        if name is None:
            name = f"tenfold-x{settings.scale or self._embedded_scale(size)}"
        if settings.scale and settings.model is None and settings.scale not in EMBEDDED_SCALES:
            offered = ", ".join(f"x{scale}" for scale in EMBEDDED_SCALES)
            raise UserError(f"no built-in network for x{settings.scale} (there is {offered}): give --model hit-srf-x3")
        names = {entry.name for entry in MODELS}
        if settings.scale and f"{name}-x{settings.scale}" in names:  # a family of models, such as hit-srf
            name = f"{name}-x{settings.scale}"
        if name in names:
            _check_scale(name, int(name[-1]), settings.scale)  # before anything is downloaded
        if name not in self._upscalers:
            self._upscalers[name] = Upscaler.from_pretrained(name, settings.device, settings.precision)
        _check_scale(name, self._upscalers[name].scale, settings.scale)
        return self._upscalers[name]

    def _embedded_scale(self, size: tuple[int, int]) -> int:
        """The smallest embedded factor that reaches the size to fit into, else the largest."""
        if self.settings.fit is None:
            return EMBEDDED_SCALES[0]
        factor = _factor(size, self.settings.fit)
        return next((scale for scale in EMBEDDED_SCALES if scale >= factor), EMBEDDED_SCALES[-1])

    def _picture(self, job: Job, report: Report) -> Outcome:
        start = time.perf_counter()
        picture = images.read(job.source.path)
        pixels, method = self._enlarge(picture.pixels, report)
        images.write(job.target, picture.with_pixels(pixels), self.settings.quality)
        return Outcome(pixels.shape[1], pixels.shape[0], time.perf_counter() - start, method)

    def _film(self, job: Job, report: Report) -> Outcome:
        start = time.perf_counter()
        reader = VideoReader(job.source.path)
        size = self._target_size(reader.size)
        options: dict[str, Any] = {"audio_from": job.source.path, "codec": self.settings.codec}
        options |= {"time_base": reader.time_base, "pixel_aspect": reader.pixel_aspect}
        expected = reader.frame_count or (reader.duration_s or 0) * reader.fps
        method = ""
        with VideoWriter(job.target, reader.fps, size, **options) as writer:
            for number, (frame, time_s) in enumerate(reader.timed_frames(), start=1):
                enlarged, method = self._enlarge(frame, lambda fraction: None)
                writer.write(enlarged, time_s)
                report(min(1.0, float(number / expected)) if expected else 0.0)
        return Outcome(*size, time.perf_counter() - start, f"{method}, {self.settings.codec}")

    def _target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the result for that of the source."""
        fit = self.settings.fit
        if fit is None:
            scale = self.upscaler(size).scale
            return size[0] * scale, size[1] * scale
        factor = _factor(size, fit)
        return min(fit[0], max(1, round(size[0] * factor))), min(fit[1], max(1, round(size[1] * factor)))

    def _enlarge(self, pixels: np.ndarray, report: Report) -> tuple[np.ndarray, str]:
        """Pixels of the target size, and how they were made."""
        settings = self.settings
        size = (pixels.shape[1], pixels.shape[0])
        width, height = self._target_size(size)
        method = "shrunk by bicubic"
        if width > size[0] or height > size[1]:
            result = self.upscaler(size).upscale(
                pixels, settings.tile, settings.self_ensemble, settings.memory_budget, report
            )
            pixels, method = result.image, result.method
        if pixels.shape[:2] != (height, width):
            pixels = resize_to(pixels, (height, width))
        return pixels, method


def _check_scale(name: str, scale: int, wanted: int | None) -> None:
    if wanted is not None and wanted != scale:
        other = re.sub(r"\d$", str(wanted), name)
        hint = f"; {other} does" if other in {entry.name for entry in MODELS} else ""
        raise UserError(f"{name} enlarges x{scale}, not x{wanted}{hint}")


def _factor(size: tuple[int, int], fit: tuple[int, int]) -> float:
    """How much larger than `size` the largest picture is that fits."""
    return min(fit[0] / size[0], fit[1] / size[1])


def target_suffix(path: Path, is_video: bool, picture_format: str | None, codec: str) -> str:
    """Suffix of the result of a file: lossless formats unless another is asked for; the container a film came in."""
    suffix = path.suffix.lower()
    if not is_video:
        return images.FORMATS[picture_format or ("tiff" if suffix in (".tif", ".tiff") else "png")]
    if suffix in (".mp4", ".m4v", ".3gp"):
        return ".mp4"
    keeps = {"vp9": (".webm", ".mkv"), "h264": (".mov", ".mkv"), "hevc": (".mov", ".mkv")}[codec]
    return suffix if suffix in keeps else ".mkv"
