"""ONNX: rows of any number and length give PyTorch's logits, and a file that differs is not kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

from tenfold.cli import main
from tenfold.core.console import UserError
from tenfold.core.export import CheckResult, InputCheck
from tenfold.llm import onnx_file
from tenfold.llm.checkpoint import save_hf
from tenfold.llm.config import ModelConfig
from tenfold.llm.model import Decoder, initialise

TINY = ModelConfig(vocabulary=61, width=24, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=40, context=64)
SLIDING = replace(
    TINY, layer_kinds=("sliding", "full"), sliding_window=4, attention_softcap=5.0, qk_norm=True, rotary_fraction=0.5
)


def test_an_exported_decoder_takes_any_rows_and_lengths(tmp_path):
    model = Decoder(SLIDING)
    initialise(model)
    result = onnx_file.write(model.eval(), tmp_path / "m.onnx")
    assert result.max_abs_difference < 1e-5
    assert len(result.checked) == len(onnx_file.CHECKED_SIZES)
    import onnx

    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(entries["config"])["layers"] == 2


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file.onnx, "export_onnx", lambda module, example, path, *names, **options: path.touch())
    apart = CheckResult(0.5, (InputCheck(((1, 3),), 0.5, 1.0, 0.5),), {"torch": "2"}, 0)
    monkeypatch.setattr(onnx_file.onnx, "check_onnx", lambda *arguments: apart)
    model = Decoder(TINY)
    initialise(model)
    with pytest.raises(UserError, match=r"not written, since ONNX Runtime differs from PyTorch by 5\.0e-01"):
        onnx_file.write(model.eval(), tmp_path / "m.onnx", sizes=((1, 3),))
    assert list(tmp_path.iterdir()) == []


def test_more_weights_than_one_file_holds_are_refused_before_the_work(tmp_path):
    with torch.device("meta"):
        model = Decoder(replace(TINY, vocabulary=20_000_000))
    with pytest.raises(UserError, match=r"GB of weights do not fit into one ONNX file"):
        onnx_file.write(model, tmp_path / "m.onnx")


def test_the_verb_says_how_far_the_file_is_from_pytorch(tmp_path, capsys):
    model = Decoder(TINY)
    initialise(model)
    save_hf(model, tmp_path / "m")
    assert main(["llm", "export", str(tmp_path / "m"), "-o", str(tmp_path / "m.txt")]) == 2
    capsys.readouterr()
    assert main(["llm", "export", str(tmp_path / "m"), "-o", str(tmp_path / "m.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_difference"] < 1e-5
