"""The exported file computes what the network computes, at every size, and is no larger than the weights need."""

import json
from pathlib import Path

import jsonschema
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from tenfold import cli as front_door
from tenfold.core.console import UserError
from tenfold.superres import onnx_file
from tenfold.superres.checkpoint import load_model
from tenfold.superres.config import HiTConfig
from tenfold.superres.model import HiT

SCHEMA = Path(__file__).parents[2] / "docs" / "schemas" / "superres-export.json"
PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"


def export_fixture(name, folder, sizes):
    description = json.loads((PARITY / f"{name}.json").read_text())
    model = load_model(str(PARITY / f"{name}.state.safetensors"), config=description["config"])
    return model, onnx_file.write(model, folder / f"{name}.onnx", sizes=sizes)


def run(path, image):
    return torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, {"image": image.numpy()})[0])


@pytest.mark.parametrize("name", ["tiny_sir_x3", "tiny_srf_x3", "tiny_sng_x3"])
def test_one_file_serves_every_size_and_number_of_pictures(name, tmp_path):
    """Compared with an output of the official code; then at sizes that no trace has seen, and with a batch."""
    sizes = ((192, 192), (192, 384), (17, 65), (2, 3), (1, 1), (1, 40))
    model, exported = export_fixture(name, tmp_path, sizes)
    assert [size[:2] for size in exported.checked] == list(sizes)
    assert exported.max_abs_difference < 2e-5
    stored = load_file(PARITY / f"{name}.io.safetensors")
    assert (run(exported.path, stored["in0"]) - stored["out0"]).abs().max() <= 2e-5
    batch = torch.rand(3, 3, 20, 28)
    assert torch.allclose(run(exported.path, batch), torch.cat([model(image[None]) for image in batch]), atol=2e-5)


def test_no_position_bias_is_kept_in_the_file(tmp_path):
    """That of one layer with windows of 64 pixels would be 6 x 64 x 4096 numbers, 6.3 MB; S-Linear's sixth of it is."""
    torch.manual_seed(0)
    model = HiT(HiTConfig("sir", 2, depths=(2,), heads=(6,), window_ratios=(1.0, 8.0))).eval()
    exported = onnx_file.write(model, tmp_path / "model.onnx", sizes=((64, 128),))
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    summing = 4 * 64 * 4096
    assert exported.bytes < weights + summing + 250_000
    assert exported.max_abs_difference < 2e-5


def test_the_verb_writes_and_checks_a_built_in_network(tmp_path, capsys):
    target = tmp_path / "tenfold-x2.onnx"
    assert front_door.main(["superres", "export", "tenfold-x2", "-o", str(target), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    jsonschema.validate(result, json.loads(SCHEMA.read_text()))
    assert result["max_abs_difference"] < 1e-4
    assert result["bytes"] == target.stat().st_size
    assert len(result["checked"]) == len(onnx_file.CHECKED_SIZES)
    metadata = onnxruntime.InferenceSession(str(target)).get_modelmeta().custom_metadata_map
    assert metadata["architecture"] == "HiT-SRF"
    assert metadata["scale"] == "2"
    assert "Apache-2.0" in metadata["licence"]


def test_a_name_without_onnx_is_refused_before_the_network_is_loaded(tmp_path, capsys):
    assert front_door.main(["superres", "export", "no-such-model", "-o", str(tmp_path / "x.pt")]) == 2
    assert "ends in .onnx" in capsys.readouterr().err


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "TOLERANCE", -1.0)
    model = HiT(HiTConfig("sir", 2, width=16, depths=(1,), heads=(2,))).eval()
    with pytest.raises(UserError, match="not written, since ONNX Runtime differs"):
        onnx_file.write(model, tmp_path / "model.onnx", sizes=((8, 8),))
    assert list(tmp_path.iterdir()) == []
