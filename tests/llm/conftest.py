"""Fixtures of this room: the parity fixtures, and tiny models of transformers' own classes with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data" / "llm"

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# What makes each family itself; sliding windows are shorter than the tests' texts.
PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"head_dim": 6},
    "qwen3": {},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "gemma2": {"query_pre_attn_scalar": 12, "sliding_window": 5},
    "gemma3_text": {"query_pre_attn_scalar": 12, "sliding_window": 5, "sliding_window_pattern": 2},
    "afmoe": {
        "num_dense_layers": 3,
        "sliding_window": 5,
        "mup_enabled": True,
        "global_attn_every_n_layers": 2,
    },
}


@pytest.fixture(scope="session")
def foreign() -> Callable[..., Any]:
    """`foreign("glm4", num_hidden_layers=2)`: a tiny model of that `model_type` with random weights, eager, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
        settings = SIZES | PECULIAR[model_type] | changes
        if model_type == "afmoe":
            settings["num_dense_layers"] = settings["num_hidden_layers"]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0, 0.2)
                if "norm" in name and "gemma" not in model_type:
                    parameter.add_(1.0)
        return model

    return build


@pytest.fixture(scope="session")
def parity() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """`parity("dssn_small")`: the tensors of a parity fixture and its description."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return load_file(DATA / f"{name}.safetensors"), json.loads((DATA / f"{name}.json").read_text())

    return read


@pytest.fixture
def pangu_folder(tmp_path: Path, parity: Callable) -> Callable[..., Path]:
    """`pangu_folder("dssn_small", sandwich_norm=False)`: a Hugging Face folder of a fixture, config.json as told."""
    from safetensors.torch import save_file

    def write(name: str, **changes: Any) -> Path:
        tensors, described = parity(name)
        folder = tmp_path / name
        folder.mkdir()
        weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "model_type": "PanguEmbedded",
            "sandwich_norm": name == "dssn_small",
            **described["config"],
            **changes,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write
