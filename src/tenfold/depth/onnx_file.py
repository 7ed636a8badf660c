"""A network as an ONNX file, checked against PyTorch at sizes that the export did not see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.core import export as onnx
from tenfold.core.console import UserError
from tenfold.depth import cameras
from tenfold.depth.checkpoint import Network
from tenfold.depth.config import PATCH, UniDepthV1Config
from tenfold.depth.model import Prediction, UniDepthV2

TOLERANCE = 1e-4  # of the largest value of an output


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how far it is from PyTorch.

    Attributes:
        path: the file.
        bytes: its size.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        max_relative_difference: the largest difference, relative to the largest value of the output it is in.
        checked: (height, width, difference) for each size that was compared.
        versions: of the packages that took part.
    """

    path: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_relative_difference: float
    checked: tuple[tuple[int, int, float], ...]
    versions: dict[str, str]


class Graph(nn.Module):
    """What is exported: image (and rays) -> radius or depth, intrinsics, rays (and error)."""

    def __init__(self, network: Network, error: bool) -> None:
        super().__init__()
        self.network, self.error = network, error

    def forward(self, image: Tensor, rays: Tensor | None = None) -> tuple[Tensor, ...]:
        """Outputs in the order of `names`."""
        if not isinstance(self.network, UniDepthV2):
            seen_v1 = self.network(image, rays)
            return seen_v1.depth, seen_v1.intrinsics, seen_v1.rays
        seen: Prediction = self.network(image, rays, self.error)
        outputs = (seen.radius, seen.intrinsics, seen.rays * 1.0)
        return outputs if seen.error is None else (*outputs, seen.error)


def write(
    network: Network,
    path: str | Path,
    sizes: tuple[tuple[int, int], ...] | None = None,
    given_rays: bool = False,
    error: bool = True,
    dynamic: bool = True,
    metadata: dict[str, str] | None = None,
) -> Exported:
    """Write a network as ONNX.

    Args:
        network: V1 or V2, on the CPU.
        path: the .onnx file; it is there only if the check passed.
        sizes: height and width that are compared; the first is exported, and the only one if it is not dynamic. V2:
            multiples of 14. V1 has one size.
        given_rays: a second input `rays` (B x 3 x H x W, unit), for a known camera.
        error: V2: whether there is an output `error_m`.
        dynamic: V2: batch, height and width are free at run time.
        metadata: text entries for the file.

    Raises:
        UserError: a package is missing, the disk refuses, or the two differ by more than `TOLERANCE`.
    """
    v1 = isinstance(network.config, UniDepthV1Config)
    if isinstance(network.config, UniDepthV1Config):
        sizes, dynamic = (network.config.image_shape,), False
    sizes = sizes or ((266, 364), (392, 280), (210, 434))
    sizes = sizes if dynamic else sizes[:1]
    for height, width in sizes:
        if not v1 and (height % PATCH or width % PATCH or min(height, width) < 2 * PATCH):
            raise UserError(f"{width}x{height} is not a size of UniDepthV2: both sides are multiples of 14, from 28 on")
    graph = Graph(network, error).eval()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for index, (height, width) in enumerate(sizes):
        image = torch.randn(2 if dynamic and index == 0 else 1, 3, height, width, generator=generator)
        # Off the middle: a ray straight ahead has no azimuth, and rounding would decide which one it gets.
        k = torch.tensor([[0.8 * width, 0.8 * width, 0.47 * width, 0.47 * height]]).expand(image.shape[0], -1)
        examples.append((image, cameras.rays("pinhole", k, height, width)) if given_rays else (image,))
    inputs = ("image", "rays") if given_rays else ("image",)
    names = ("depth_m" if v1 else "radius_m", "intrinsics", "rays_out", *(() if v1 or not error else ("error_m",)))
    # Heights and widths are multiples of the patch: the exporter is told so, and needs no guard for it.
    rows, columns = (torch.export.Dim(name, min=2, max=400) for name in ("rows", "columns"))
    axes = {0: torch.export.Dim("batch"), 2: PATCH * rows, 3: PATCH * columns} if dynamic else None
    result = onnx.export_checked(
        graph,
        examples[0],
        path,
        inputs,
        names,
        examples,
        TOLERANCE,
        lambda result: max(check.max_relative_difference for check in result.inputs),
        dynamic_shapes=(axes,) * len(inputs) if dynamic else None,
        metadata=metadata,
        extra="depth",
    )
    differences = [check.max_relative_difference for check in result.inputs]
    checked = tuple((*each, difference) for each, difference in zip(sizes, differences, strict=True))
    return Exported(str(path), result.bytes, inputs, names, max(differences), checked, result.versions)
