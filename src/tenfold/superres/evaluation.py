"""The protocol of the light super-resolution papers: PSNR and SSIM on Y, border cropped, averaged over images.

RCAN's released Set5 outputs score what its paper prints under this code, so it is the published protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np

from tenfold.core import console, images
from tenfold.core.console import UserError
from tenfold.superres.resize import Border, imresize_matlab

Upscale = Callable[[np.ndarray], np.ndarray]
"""Low-res HxWx3 uint8 RGB in, s*H x s*W x 3 uint8 RGB out."""
Distance = Callable[[np.ndarray, np.ndarray], float]
"""A distance between two HxWx3 uint8 RGB images."""


def rgb_to_y(image: np.ndarray) -> np.ndarray:
    """BT.601 studio-range luma of an HxWx3 RGB image with values 0..255: HxW float64, 16..235, not rounded."""
    return image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255.0 + 16.0


def psnr(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB at a peak of 255, over all pixels and channels; infinite for equal images.

    Args:
        image: HxW or HxWxC, values 0..255.
        reference: the same shape.
        border: pixels dropped on each side.
    """
    image, reference = _cropped_pair(image, reference, border)
    mean_squared_error = np.mean((image - reference) ** 2)
    return float("inf") if mean_squared_error == 0 else float(10 * np.log10(255.0**2 / mean_squared_error))


def ssim(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian of sigma 1.5, valid region, K1 .01, K2 .03, peak 255.

    Args:
        image: HxW or HxWxC, values 0..255; channels are scored one by one and averaged.
        reference: the same shape.
        border: pixels dropped on each side first.

    Raises:
        UserError: fewer than 11 pixels are left along a side.
    """
    image, reference = _cropped_pair(image, reference, border)
    if min(image.shape[:2]) < 11:
        raise UserError(
            f"SSIM needs at least 11x11 pixels after the border crop, found {image.shape[1]}x{image.shape[0]}"
        )
    if image.ndim == 3:
        return fmean(ssim(image[..., channel], reference[..., channel]) for channel in range(image.shape[2]))
    window = cv2.getGaussianKernel(11, 1.5)

    def local_mean(values: np.ndarray) -> np.ndarray:
        return cv2.sepFilter2D(values, -1, window, window)[5:-5, 5:-5]

    mean_a, mean_b = local_mean(image), local_mean(reference)
    variance_a = local_mean(image**2) - mean_a**2
    variance_b = local_mean(reference**2) - mean_b**2
    covariance = local_mean(image * reference) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(score.mean())


def psnr_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """PSNR in dB of the Y channels of two HxWx3 uint8 RGB images; `border` pixels (the scale) are cropped all round."""
    return psnr(rgb_to_y(image), rgb_to_y(reference), border)


def ssim_y(image: np.ndarray, reference: np.ndarray, border: int = 0) -> float:
    """SSIM of the Y channels of two HxWx3 uint8 RGB images; `border` (usually the scale) is cropped on each side."""
    return ssim(rgb_to_y(image), rgb_to_y(reference), border)


def _cropped_pair(image: np.ndarray, reference: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if image.shape != reference.shape:
        raise UserError(f"cannot compare images of shape {image.shape} and {reference.shape}: sizes must be equal")
    height, width = image.shape[:2]
    if min(height, width) <= 2 * border:
        raise UserError(f"a {width}x{height} image has nothing left after cropping {border} px on each side")
    crop = np.s_[border : height - border, border : width - border]
    return image[crop].astype(np.float64), reference[crop].astype(np.float64)


@dataclass(frozen=True)
class ImageScore:
    """Scores of one image. PSNR in dB; SSIM 0..1; LPIPS (AlexNet, lower is better) only when it was asked for."""

    name: str
    psnr_y: float
    ssim_y: float
    psnr_rgb: float
    ssim_rgb: float
    lpips: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a set: one row per image, and the mean of the rows under the name `mean`."""

    scale: int
    low_res: str
    images: tuple[ImageScore, ...]
    mean: ImageScore


@dataclass(frozen=True)
class Pair:
    """One ground-truth image and the file that belongs to it: low-res or super-resolved; None when LR is to be made."""

    name: str
    high_res: Path
    other: Path | None


def score_image(name: str, output: np.ndarray, reference: np.ndarray, border: int) -> ImageScore:
    """All figures of one image; both HxWx3 uint8 RGB of equal size."""
    return ImageScore(
        name=name,
        psnr_y=psnr_y(output, reference, border),
        ssim_y=ssim_y(output, reference, border),
        psnr_rgb=psnr(output, reference, border),
        ssim_rgb=ssim(output, reference, border),
    )


def bicubic(scale: int) -> Upscale:
    """The baseline of every table: MATLAB bicubic, uint8 after each axis, mirrored border."""
    return lambda image: imresize_matlab(image, scale)


def find_pairs(high_res: Path | str, other: Path | str | None, scale: int) -> list[Pair]:
    """Match ground-truth files with low-res (or super-resolved) files.

    Args:
        high_res: folder of ground-truth images `name.png`, or its parent when it is called `HR`.
        other: folder with `namex2.png`, `name_LRBI_x2.png` (Manga109), `name_x2.png` or `name.png`, directly or under
            `X2/` or `x2/` (for scale 2); or None.
        scale: the upscaling factor.

    Raises:
        UserError: a folder is missing or has no images; images without a partner, or with two.
    """
    high_res = Path(high_res)
    if (high_res / "HR").is_dir():
        high_res = high_res / "HR"
    references = _images_by_stem(high_res)
    if other is None:
        return [Pair(stem, path, None) for stem, path in references.items()]
    other = next((Path(other) / sub for sub in (f"X{scale}", f"x{scale}") if (Path(other) / sub).is_dir()), Path(other))
    candidates = _images_by_stem(other)
    pairs, missing = [], []
    for stem, path in references.items():
        name = stem.removesuffix(f"_HR_x{scale}")
        wanted = (f"{name}x{scale}", f"{name}_LRBI_x{scale}", f"{name}_x{scale}", stem, name)
        partner = next((candidates[candidate] for candidate in wanted if candidate in candidates), None)
        if partner is None:
            missing.append(stem)
        else:
            pairs.append(Pair(name, path, partner))
    if missing:
        raise UserError(
            f"{other}: no partner for {len(missing)} of {len(references)} images of {high_res} "
            f"(first: {missing[0]}; expected {missing[0]}x{scale}.png or {missing[0]}.png)"
        )
    return pairs


def _images_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in images.READABLE_SUFFIXES and not path.name.startswith(".") and not path.is_dir():
            if path.stem in found:
                raise UserError(
                    f"{folder}: {found[path.stem].name} and {path.name} are two images of one name; keep one"
                )
            found[path.stem] = path
    if not found:
        raise UserError(f"{folder}: no images here (looked for {', '.join(sorted(images.READABLE_SUFFIXES))})")
    return found


def make_low_res(reference: np.ndarray, scale: int, border: Border = "mirror") -> np.ndarray:
    """The benchmark's low-res image of an HxWx3 uint8 ground truth, first cropped to a multiple of the scale."""
    height, width = reference.shape[:2]
    if height < scale or width < scale:
        raise UserError(f"a {width}x{height} image is too small to shrink {scale} times")
    return imresize_matlab(reference[: height - height % scale, : width - width % scale], Fraction(1, scale), border)


def evaluate_pairs(
    upscale: Upscale | None,
    high_res: Path | str,
    low_res: Path | str | None = None,
    *,
    scale: int,
    super_res: Path | str | None = None,
    border: Border = "mirror",
    perceptual: Distance | None = None,
) -> EvaluationResult:
    """Score an upscaler, or a folder of finished outputs, against ground truth.

    Args:
        upscale: low-res uint8 HxWx3 to super-resolved uint8; None when `super_res` has the outputs.
        high_res: folder of ground truth (see `find_pairs` for the layouts).
        low_res: folder of low-res images; None makes them from the ground truth by `imresize_matlab`.
        scale: upscaling factor; also the width in pixels of the border that is not scored.
        super_res: folder of finished outputs to score instead of running `upscale`.
        border: border convention of low-res images that are made here.
        perceptual: a further distance, given as `lpips` (see `load_lpips`); over the whole picture, border included.

    Returns:
        Scores per image and their mean. Ground truth is cropped top-left to low-res size x scale.

    Raises:
        UserError: files without partner, or sizes that do not fit by the factor `scale`.
    """
    if (upscale is None) == (super_res is None):
        raise UserError("give either an upscaler or a folder of finished outputs")
    pairs = find_pairs(high_res, super_res if super_res is not None else low_res, scale)
    rows = []
    with console.progress("evaluate", total=len(pairs)) as bar:
        for pair in pairs:
            try:
                rows.append(_score_pair(pair, upscale, scale, border, perceptual))
            except UserError as error:  # of pixels, whose file is known only here; readers name it themselves
                named = pair.high_res.name in str(error) or (pair.other and pair.other.name in str(error))
                raise error if named else UserError(f"{pair.high_res}: {error}") from None
            bar.advance(note=f"{pair.name} {rows[-1].psnr_y:.2f} dB")
    origin = str(super_res or low_res or f"made by imresize_matlab, {border} border")
    return EvaluationResult(scale=scale, low_res=origin, images=tuple(rows), mean=_mean(rows))


def _score_pair(
    pair: Pair, upscale: Upscale | None, scale: int, border: Border, perceptual: Distance | None
) -> ImageScore:
    """One row of `evaluate_pairs`, whose arguments these are."""
    reference = _read_rgb8(pair.high_res)
    if upscale is None:
        assert pair.other is not None
        output = _read_rgb8(pair.other)
    else:
        source = make_low_res(reference, scale, border) if pair.other is None else _read_rgb8(pair.other)
        _check_fit(pair, reference, (source.shape[0] * scale, source.shape[1] * scale), scale)
        output = upscale(source)
    _check_fit(pair, reference, output.shape[:2], scale)
    reference = reference[: output.shape[0], : output.shape[1]]
    score = score_image(pair.name, output, reference, scale)
    return replace(score, lpips=perceptual(output, reference)) if perceptual else score


def load_lpips(device: str = "cpu") -> Distance:
    """LPIPS (Zhang et al. 2018) with AlexNet, from the `lpips` package, which is no part of the base install.

    Raises:
        UserError: the package is missing, or its AlexNet weights are neither in torch's cache nor to be downloaded.
    """
    import torch

    from tenfold.core.devices import resolve_device

    try:
        import lpips
    except ModuleNotFoundError:
        raise UserError("--lpips: the package is not installed; pip install lpips") from None
    target = resolve_device(device)
    try:
        network = lpips.LPIPS(net="alex", verbose=False).to(target).eval()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download is a RuntimeError
        raise UserError(
            "--lpips: cannot get the AlexNet weights (torchvision's alexnet-owt-7be5be79.pth, 244 MB); with a network "
            f"they are downloaded once into {torch.hub.get_dir()}/checkpoints ({error})"
        ) from None

    @torch.no_grad()
    def distance(image: np.ndarray, reference: np.ndarray) -> float:
        pair = (torch.from_numpy(array).permute(2, 0, 1)[None].to(target) / 127.5 - 1 for array in (image, reference))
        return float(network(*pair))

    return distance


def _read_rgb8(path: Path) -> np.ndarray:
    return images.to_rgb8(images.read(path))


def _check_fit(pair: Pair, reference: np.ndarray, size: tuple[int, ...], scale: int) -> None:
    """The ground truth may be up to scale-1 pixels larger than the output, no more and never smaller."""
    excess = [actual - wanted for actual, wanted in zip(reference.shape[:2], size, strict=True)]
    if not all(0 <= pixels < scale for pixels in excess):
        partner = pair.other.name if pair.other else "its upscaled image"
        raise UserError(
            f"{pair.high_res.name} ({reference.shape[1]}x{reference.shape[0]}) and {partner} do not fit: "
            f"at scale {scale} the upscaled size is {size[1]}x{size[0]}; check --scale and the folders"
        )


def _mean(rows: list[ImageScore]) -> ImageScore:
    lpips = [row.lpips for row in rows if row.lpips is not None]
    return ImageScore(
        name="mean",
        psnr_y=fmean(row.psnr_y for row in rows),
        ssim_y=fmean(row.ssim_y for row in rows),
        psnr_rgb=fmean(row.psnr_rgb for row in rows),
        ssim_rgb=fmean(row.ssim_rgb for row in rows),
        lpips=fmean(lpips) if lpips else None,
    )
