"""ONNX files: same numbers as the module at every size, self-contained, atomic, quiet."""

import importlib.util
import resource

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tenfold.core import export
from tenfold.core.console import UserError


class PadThenDouble(nn.Module):
    """Pads to a multiple of 4 and crops back, like a windowed network: the size arithmetic must survive the export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
        return nn.functional.pixel_shuffle(self.dropout(self.conv(padded)), 2)[..., : 2 * height, : 2 * width]


SIZES = [(1, 1), (1, 40), (8, 8), (17, 9)]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return PadThenDouble().train()


@pytest.fixture(scope="module")
def exported(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    sides = {2: torch.export.Dim("height", max=4096), 3: torch.export.Dim("width", max=4096)}
    export.export_onnx(module, (torch.rand(1, 3, 24, 32),), path, ["image"], ["upscaled"], (sides,), {"scale": "2"})
    return path


def inputs_of(sizes):
    return [(torch.rand(1, 3, *size),) for size in sizes]


def test_the_file_computes_what_the_module_does_at_every_size(exported, module):
    result = export.check_onnx(exported, module, inputs_of(SIZES))
    assert [check.shapes for check in result.inputs] == [((1, 3, *size),) for size in SIZES]
    assert result.max_abs_difference == max(check.max_abs_difference for check in result.inputs)
    assert result.max_abs_difference < 1e-5
    assert {"torch", "onnx", "onnxruntime"} <= result.versions.keys()


def test_a_changed_weight_is_seen_by_the_check(exported, module):
    other = PadThenDouble()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        other.conv.bias[0] += 0.25
    assert export.check_onnx(exported, other, inputs_of([(5, 5)])).max_abs_difference == pytest.approx(0.25, abs=1e-5)


def test_the_module_is_left_in_the_mode_it_was_in(exported, module):
    module.dropout.eval()
    export.check_onnx(exported, module, inputs_of([(4, 4)]))
    assert module.training
    assert not module.dropout.training
    module.dropout.train()


def test_the_file_is_self_contained_and_says_what_it_is(exported):
    model = onnx.load(exported, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"scale": "2"}
    assert [node.name for node in model.graph.input] == ["image"]
    assert [node.name for node in model.graph.output] == ["upscaled"]
    sides = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == [1, 3, "height", "width"]
    assert not any(node.metadata_props for node in model.graph.node), "notes on the author's source would be shipped"
    assert [path.name for path in exported.parent.iterdir()] == ["net.onnx"]


def test_export_prints_nothing_and_a_failed_write_keeps_the_old_file(tmp_path, capfd):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(UserError, match="cannot write"):
            export.export_onnx(nn.Linear(40, 40), (torch.rand(2, 40),), path, ["x"], ["y"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx and onnxscript: run pip install 'tenfold\[superres\]'"):
        export.export_onnx(nn.Identity(), (torch.rand(1),), tmp_path / "x.onnx", ["x"], ["y"], extra="superres")
    with pytest.raises(UserError, match="onnxruntime"):
        export.check_onnx(tmp_path / "x.onnx", nn.Identity(), [], extra="superres")


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_file_that_is_no_model_is_one_line(tmp_path, content):
    path = tmp_path / "x.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.onnx") as error:
        export.check_onnx(path, nn.Identity(), [])
    assert "\n" not in str(error.value)


def test_an_input_that_the_file_refuses_is_one_line(exported, module):
    with pytest.raises(UserError, match="refuses an input of shape") as error:
        export.check_onnx(exported, module, [(torch.rand(1, 4, 8, 8),)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan, 1.0], [np.nan, 2.0], 1.0),
        ([np.nan], [1.0], np.inf),
        ([np.inf], [1.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_the_difference_of_special_values(found, expected, difference):
    assert export._difference(np.array(found, np.float32), np.array(expected, np.float32)) == difference
