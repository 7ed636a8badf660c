"""A decoder as one ONNX file for rows of any number and length, checked against PyTorch before it is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold.core import export as onnx
from tenfold.core.console import UserError, to_jsonable
from tenfold.llm.model import Decoder

# Of a logit, relative to the largest: float32 sums in another order.
TOLERANCE = 1e-4

# Rows and tokens of the check: several, one, and more than the example that the graph was traced with.
CHECKED_SIZES = ((2, 7), (1, 1), (3, 2), (1, 33))


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how far it is from PyTorch.

    Attributes:
        path: the file.
        bytes: size of the file.
        max_abs_difference: the largest difference of a logit.
        largest_logit: the largest |logit| of the check, which the difference is to be seen against.
        checked: (rows, tokens, difference) for each size that was compared.
        versions: of the packages that took part.
    """

    path: str
    bytes: int
    max_abs_difference: float
    largest_logit: float
    checked: tuple[tuple[int, int, float], ...]
    versions: dict[str, str]


class _Logits(nn.Module):
    """The decoder with one input."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (B, T) to logits (B, T, V)."""
        return self.model(tokens)


def write(
    model: Decoder, path: str | Path, metadata: dict[str, str] | None = None, sizes: tuple = CHECKED_SIZES
) -> Exported:
    """Write `tokens` (B x T, int64) -> `logits` (B x T x V, float32); B and T are free, and there is no cache.

    Args:
        model: the decoder, float32 on the CPU.
        path: the .onnx file; it is there only if the check passed. One file, so at most 2 GB of weights.
        metadata: further text entries for the file; the configuration is always among them.
        sizes: (rows, tokens) of the random ids on which ONNX Runtime and PyTorch are compared.

    Raises:
        UserError: too large for one file, a package is missing, the disk refuses, or the two differ by more than
            `TOLERANCE` of the largest logit.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size >= 2**31:
        raise UserError(f"{path}: {size / 1e9:.1f} GB of weights do not fit into one ONNX file (2 GB at most)")
    module, dynamic = _Logits(model), torch.export.Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocabulary
    inputs = [(torch.randint(vocabulary, shape, generator=generator),) for shape in sizes]
    entries = {"config": json.dumps(to_jsonable(model.config)), "room": "llm", **(metadata or {})}
    result = onnx.export_checked(
        module,
        (torch.randint(vocabulary, (2, 16), generator=generator),),
        path,
        ["tokens"],
        ["logits"],
        inputs,
        TOLERANCE,
        lambda found: found.max_abs_difference / max(_largest(found), 1.0),
        dynamic_shapes=({0: dynamic, 1: dynamic},),
        metadata=entries,
    )
    return Exported(
        path=str(path),
        bytes=result.bytes,
        max_abs_difference=result.max_abs_difference,
        largest_logit=_largest(result),
        checked=tuple((*shape, check.max_abs_difference) for shape, check in zip(sizes, result.inputs, strict=True)),
        versions=result.versions,
    )


def _largest(result: onnx.CheckResult) -> float:
    return max(check.largest for check in result.inputs)
