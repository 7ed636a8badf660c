"""Counts of parameters and FLOPs, against the shared table and published TFLOP/s."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.planner.config import Model
from tenfold.planner.data import load_model, model_from_hf, model_names, model_preset, read_rows
from tenfold.planner.shapes import flops_per_token, parameters, shape_vector, stacked


def test_parameters_of_all_models_agree_with_the_table(planner_data: Path) -> None:
    table = json.loads((planner_data / "models.json").read_text())
    assert len(table) == 40
    assert set(table) == set(model_names())
    for name, row in table.items():
        model = model_preset(name)
        pairs = [(parameters(model), row["params_b"]), (parameters(model, active=True), row["active_params_b"])]
        if "params_with_mtp_b" in row:
            pairs.append((parameters(model, mtp=True), row["params_with_mtp_b"]))
        for ours, listed in pairs:
            # The table has three decimals of a billion: half a unit of its last digit is not an error.
            assert abs(ours / 1e9 - listed) <= max(1e-3 * listed, 5e-4), name


def test_flops_of_all_models_agree_with_the_table(planner_data: Path) -> None:
    table = json.loads((planner_data / "models.json").read_text())
    for name, row in table.items():
        model = model_preset(name)
        for seq, conventions in row["gflops_per_token_fwd_bwd"].items():
            for convention, listed in conventions.items():
                ours = flops_per_token(model, int(seq), convention) / 1e9
                assert ours == pytest.approx(listed, rel=5e-3, abs=5e-4), (name, seq, convention)


def test_megatron_bridge_tflops_are_reproduced(planner_data: Path) -> None:
    errors = []
    for row in read_rows(planner_data / "validation_public.csv"):
        if not row.identity.startswith("mbridge") or not row.tflops or not row.tokens_per_s:
            continue
        if row.model.name == "gpt-oss-120b" and row.plan.stack < "megatron-bridge-26.06":
            continue  # these releases counted by another convention
        errors.append(abs(row.tokens_per_s * flops_per_token(row.model, row.plan.seq) / 1e12 / row.tflops - 1))
    assert len(errors) > 35
    assert np.median(errors) <= 0.003
    assert max(errors) <= 0.025


def test_full_recompute_adds_one_forward_of_the_layers() -> None:
    model = model_preset("gpt-1.7b")
    plain, again = flops_per_token(model, 2048), flops_per_token(model, 2048, recompute=True)
    head = 2 * model.vocab * model.hidden
    assert again - plain == pytest.approx((plain - 3 * head) / 3)


DEEPSEEK_CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
}
LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(("config", "preset"), [(DEEPSEEK_CONFIG, "deepseek-v3"), (LLAMA_CONFIG, "llama3-8b")])
def test_a_hugging_face_config_gives_the_preset(config: dict, preset: str) -> None:
    imported, known = model_from_hf(config), model_preset(preset)
    assert parameters(imported, mtp=True) == parameters(known, mtp=True)
    assert flops_per_token(imported, 4096) == flops_per_token(known, 4096)


def test_a_config_without_a_needed_key_names_it() -> None:
    with pytest.raises(UserError, match="num_hidden_layers is None"):
        model_from_hf({k: v for k, v in LLAMA_CONFIG.items() if k != "num_hidden_layers"})


def test_an_unknown_model_gives_the_nearest_names() -> None:
    with pytest.raises(UserError, match="pangu-ultra-moe"):
        load_model("pangu-ultra-mo")


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(1, 100), experts=st.integers(1, 64), topk=st.integers(1, 64))
def test_active_parameters_never_exceed_all(layers: int, experts: int, topk: int) -> None:
    model = Model("m", layers, 256, 0, 4, 4, 64, 1000, experts=experts, topk=min(topk, experts), moe_ffn=128)
    assert parameters(model, active=True) <= parameters(model)


def test_stacking_shapes_keeps_each_row() -> None:
    vectors = [shape_vector(model_preset(name)) for name in ("deepseek-v3", "llama3-8b")]
    joined = stacked(vectors)
    assert joined.hidden.tolist() == [7168.0, 4096.0]
    assert joined.gemm_out[0].tolist() == [vectors[0].gemm_out[0], vectors[1].gemm_out[0]]
