"""Tables of throughput rows: their columns, the files that they name, and what is said about a broken row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenfold.core.console import UserError
from tenfold.planner import Hardware, evaluation

HEADER = "id,model,hardware,devices,tp,pp,gbs,seq,precision,stack,tokens_per_s_per_device"
ROW = "a,llama3-8b,H100,16,2,1,64,8192,bf16,megatron-core-2025,9000"


def test_columns_may_stand_in_any_order_and_optional_ones_may_lack(tmp_path: Path) -> None:
    names, values = HEADER.split(","), ROW.split(",")
    kept = [i for i, name in enumerate(names) if name not in ("id", "precision")]
    plain, turned, short = tmp_path / "plain.csv", tmp_path / "turned.csv", tmp_path / "short.csv"
    plain.write_text(f"{HEADER}\n{ROW}\n")
    turned.write_text(f"{','.join(names[::-1])}\n{','.join(values[::-1])}\n")
    short.write_text(f"{','.join(names[i] for i in kept)}\n{','.join(values[i] for i in kept)}\n")
    reports = [evaluation.validate(path)["rows"][0]["predicted"] for path in (plain, turned, short)]
    assert reports[0] == reports[1] == reports[2]


def test_rows_may_name_a_config_and_a_sheet_that_lie_beside_the_table(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sheet = Hardware.preset("H100")
    names = ("name", "architecture", "bf16", "fp8", "mem_gib", "mem_bw", "intra_gbs", "inter_gbs", "per_node")
    (tmp_path / "mine.yaml").write_text("".join(f"{name}: {getattr(sheet, name)}\n" for name in names))
    (tmp_path / "own.csv").write_text(
        f"{HEADER}\n{ROW.replace('llama3-8b', 'config.json').replace('H100', 'mine.yaml')}\n"
    )
    (tmp_path / "known.csv").write_text(f"{HEADER}\n{ROW}\n")
    own, known = (evaluation.validate(tmp_path / name)["rows"][0]["predicted"] for name in ("own.csv", "known.csv"))
    assert own == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("llama3-8b", "llama9-7b", r"rows.csv row 2: model: unknown 'llama9-7b'; nearest: llama"),
        ("H100", "H9000", r"rows.csv row 2: hardware: unknown 'H9000'; nearest: "),
        ("bf16", "int3", r"rows.csv row 2: precision is 'int3', choose one of bf16, fp16, fp8, mxfp8"),
        ("a,llama3-8b,H100,16,2", "a,llama3-8b,H100,16,1.5", r"tp is 1.5, expected a whole number"),
        (",64,", ",1e99,", r"gbs is 1e99, expected a whole number up to"),
        (",9000", ",nan", r"tokens_per_s_per_device is nan"),
    ],
)
def test_a_broken_row_is_named_with_its_field_and_value(tmp_path: Path, old: str, new: str, words: str) -> None:
    (tmp_path / "rows.csv").write_text(f"{HEADER}\n{ROW.replace(old, new)}\n")
    with pytest.raises(UserError, match=words):
        evaluation.validate(tmp_path / "rows.csv")
