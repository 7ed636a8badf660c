"""The appearance network as one ONNX file, checked against PyTorch before it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tenfold.core import export as onnx
from tenfold.core.console import UserError
from tenfold.tracking.model import Masa

TOLERANCE = 1e-3  # of an embedding's entry, whose size is that of tens


@dataclass(frozen=True)
class Exported:
    """An ONNX file: path, (height, width) of its picture, bytes, largest difference of an entry, versions."""

    path: str
    height: int
    width: int
    bytes: int
    max_abs_difference: float
    versions: dict[str, str]


def write(model: Masa, path: str | Path, size: tuple[int, int], metadata: dict[str, str] | None = None) -> Exported:
    """Write `image` (1 x 3 x H x W, float32, normalised) and `rois` (N x 5) -> `embeddings` (N x E); N is free.

    Args:
        model: a network with its own backbone, on the CPU.
        path: the .onnx file; it is there only if the check passed.
        size: (height, width) of the picture, multiples of 32.
        metadata: text entries for the file.

    Raises:
        UserError: a foundation backbone, a size that does not divide, a package is missing, or the two differ.
    """
    if model.backbone is None:
        raise UserError("export: this network's backbone is a foundation model, which has its own exporters")
    height, width = size
    if height % 32 or width % 32 or min(size) < 32:
        raise UserError(f"export: {width}x{height} is no multiple of 32 pixels in both directions")
    generator = torch.Generator().manual_seed(0)

    def boxes(count: int) -> torch.Tensor:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        sides = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.4, height * 0.4])
        return torch.cat((torch.zeros(count, 1), corner, corner + sides), dim=1)

    image = torch.randn(1, 3, height, width, generator=generator)
    dynamic = torch.export.Dim.DYNAMIC
    result = onnx.export_checked(
        model,
        (image, boxes(5)),
        path,
        ["image", "rois"],
        ["embeddings"],
        [(image, boxes(5)), (image, boxes(17))],
        TOLERANCE,
        dynamic_shapes=({}, {0: dynamic}),
        metadata=metadata,
        extra="tracking",
    )
    return Exported(str(path), height, width, result.bytes, result.max_abs_difference, result.versions)
