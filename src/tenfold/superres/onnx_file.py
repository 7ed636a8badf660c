"""A network as one ONNX file for pictures of any size and number, checked against PyTorch before it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tenfold.core import export as onnx
from tenfold.superres.model import HiT

TOLERANCE = 1e-4  # of a sample in [0, 1]: a fortieth of an 8-bit step

# Height and width of the pictures of the check: multiples of all windows, of some, of none, and smaller than any.
CHECKED_SIZES = ((192, 192), (192, 384), (96, 64), (61, 131), (17, 33), (1, 1))


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how far it is from PyTorch.

    Attributes:
        path: the file.
        scale: upscaling factor.
        bytes: size of the file.
        max_abs_difference: the largest difference of a sample between ONNX Runtime and PyTorch.
        checked: (height, width, difference) for each size of picture that was compared.
        versions: of the packages that took part.
    """

    path: str
    scale: int
    bytes: int
    max_abs_difference: float
    checked: tuple[tuple[int, int, float], ...]
    versions: dict[str, str]


def write(
    model: HiT,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    sizes: tuple[tuple[int, int], ...] = CHECKED_SIZES,
) -> Exported:
    """Write `image` (B x channels x H x W, float32, in [0, 1]) -> `upscaled` (B x channels x sH x sW, not clamped).

    B, H and W are free. The position biases are computed in the graph, since 24 of them as constants are 50 MB.

    Args:
        model: any HiT network, on the CPU.
        path: the .onnx file; it is there only if the check passed.
        metadata: text entries for the file.
        sizes: height and width of the pictures, random ones, on which ONNX Runtime and PyTorch are compared.

    Raises:
        UserError: a package is missing, the disk refuses, or the two differ by more than `TOLERANCE`.
    """
    channels = model.config.channels
    dynamic = torch.export.Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    pictures = [(torch.rand(1, channels, *size, generator=generator),) for size in sizes]
    result = onnx.export_checked(
        model,
        (torch.rand(2, channels, 40, 72, generator=generator),),
        path,
        ["image"],
        ["upscaled"],
        pictures,
        TOLERANCE,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        metadata=metadata,
        extra="superres",
    )
    return Exported(
        path=str(path),
        scale=model.config.scale,
        bytes=result.bytes,
        max_abs_difference=result.max_abs_difference,
        checked=tuple(
            (*checked, check.max_abs_difference) for checked, check in zip(sizes, result.inputs, strict=True)
        ),
        versions=result.versions,
    )
