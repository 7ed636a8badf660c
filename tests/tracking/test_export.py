"""The exported network computes what PyTorch does, and the parts that only export uses are the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tenfold.core.console import UserError
from tenfold.tracking import checkpoint, onnx_file
from tenfold.tracking.config import MasaConfig
from tenfold.tracking.model import Masa
from tenfold.tracking.model.deform import _by_grid_sample, modulated_deform_conv


@pytest.mark.parametrize("stride", [1, 2])
def test_the_exported_convolution_is_the_same_function(stride: int) -> None:
    torch.manual_seed(0)
    x, offset = torch.randn(1, 4, 9, 11), 2 * torch.randn(1, 18, -(-9 // stride), -(-11 // stride))
    mask, weight = torch.rand(1, 9, *offset.shape[2:]), torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(
        _by_grid_sample(x, offset, mask, weight, stride),
        modulated_deform_conv(x, offset, mask, weight, stride),
        atol=1e-4,
        rtol=1e-4,
    )


def test_the_small_network_is_the_same_in_onnx_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "tiny.onnx"
    result = onnx_file.write(checkpoint.load("masa-tiny").model, path, (128, 160))
    assert result.max_abs_difference < onnx_file.TOLERANCE
    assert path.stat().st_size == result.bytes < 8_000_000


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no multiple of 32"):
        onnx_file.write(checkpoint.load("masa-tiny").model, tmp_path / "x.onnx", (100, 160))
    config = MasaConfig(
        backbone="sam", pyramid="simple", in_channels=(32,) * 4, width=32, fusion_blocks=1, rcnn_layers=0
    )
    with pytest.raises(UserError, match="foundation model"):
        onnx_file.write(Masa(config), tmp_path / "x.onnx", (128, 160))
