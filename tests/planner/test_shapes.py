"""Counts of parameters and FLOPs, against the shared table and published TFLOP/s."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.planner import simulate
from tenfold.planner.config import Cluster, Model, Plan
from tenfold.planner.data import load_model, model_from_hf, model_names, model_preset, read_rows
from tenfold.planner.export import launch_flags
from tenfold.planner.shapes import attention_weights, flops_per_token, parameters, shape_vector, stacked
from tenfold.planner.validity import check_plan


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


# Families whose config.json leaves out what its class knows: parameters of the released checkpoints without biases and
# learned positions.
FAMILIES = [
    (
        {
            **DEEPSEEK_CONFIG,
            **{"model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27},
            **{"moe_intermediate_size": 1408, "num_attention_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2},
            **{"num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "vocab_size": 102400},
            "num_nextn_predict_layers": 0,
        },
        15_706_484_224,  # DeepSeek-V2-Lite: queries without a latent
    ),
    (
        {
            **{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000},
        },
        2_614_341_888,
    ),
    (
        {
            **{"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
            **{"vocab_size": 65024, "multi_query": True, "new_decoder_architecture": False},
        },
        6_921_720_704,
    ),
    ({"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}, 6_050_882_784),
    (
        {
            **{"model_type": "starcoder2", "hidden_size": 4608, "intermediate_size": 18432, "num_hidden_layers": 32},
            **{"num_attention_heads": 36, "num_key_value_heads": 4, "vocab_size": 49152},
        },
        7_173_923_840,
    ),
    (
        {
            **{"model_type": "dbrx", "d_model": 6144, "n_layers": 40, "n_heads": 48, "vocab_size": 100352},
            "attn_config": {"kv_n_heads": 8},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        131_596_523_520,
    ),
    (
        {
            "model_type": "llama4",
            "text_config": {
                **{"model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "vocab_size": 202048},
                **{"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128},
                **{"num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
                "intermediate_size_mlp": 16384,
            },
        },
        400_710_000_000,  # Maverick: every second layer is MoE
    ),
]


@pytest.mark.parametrize(("config", "released"), FAMILIES)
def test_families_that_leave_things_unsaid_have_their_released_size(config: dict, released: int) -> None:
    imported = model_from_hf(config)
    assert parameters(imported) == pytest.approx(released, rel=1e-3)
    check_plan(imported, Cluster.preset("h100", 8), Plan(gbs=8))


def test_queries_without_a_latent_are_one_matrix() -> None:
    model = model_from_hf(FAMILIES[0][0])
    query = 2048 * 16 * 192
    rest = 2048 * (512 + 64) + 512 * 16 * (128 + 128) + 16 * 128 * 2048
    assert attention_weights(model) == query + rest
    assert "--q-lora-rank 0" not in launch_flags("megatron", model, Cluster.preset("h100", 8), Plan(gbs=8))
    plain = simulate(model, Cluster.preset("h100", 8), Plan(gbs=8, ep=8))
    latent = simulate(dataclasses.replace(model, q_lora=8), Cluster.preset("h100", 8), Plan(gbs=8, ep=8))
    assert plain.step_seconds > latent.step_seconds


def test_a_list_of_moe_layers_is_counted() -> None:
    config = {**DEEPSEEK_CONFIG, "moe_layer_freq": [0] * 5 + [1] * 56, "first_k_dense_replace": None}
    assert model_from_hf(config).moe_layers == 56


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", "many"), ("head_dim", 0.5), ("n_routed_experts", -1)])
def test_a_config_with_a_value_of_another_kind_names_it(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key} is .*expected a whole number"):
        model_from_hf({**LLAMA_CONFIG, key: value})


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
