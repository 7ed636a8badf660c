"""Counts of parameters, FLOPs and memory: against the model itself, and against figures of the paper."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tenfold.core.console import UserError
from tenfold.llm import scale
from tenfold.llm.cli import inspect
from tenfold.llm.config import PANGU_ULTRA_LAYOUT, PRESETS, Layout, ModelConfig
from tenfold.llm.model import Decoder

SMALL = ModelConfig(vocabulary=96, width=32, layers=3, heads=4, kv_heads=2, ffn=48)
VARIANTS = {
    "dssn": SMALL,
    "pre": replace(SMALL, norm="pre"),
    "post": replace(SMALL, norm="post"),
    "tied": replace(SMALL, tied=True),
    "biases": replace(SMALL, attention_bias=True, output_bias=True, mlp_bias=True),
    "afmoe": replace(SMALL, qk_norm=True, attention_gate=True, head_dim=16),
}


def on_meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("config", [*PRESETS.values(), *VARIANTS.values()], ids=[*PRESETS, *VARIANTS])
def test_parameters_are_those_of_the_module(config: ModelConfig) -> None:
    assert scale.parameters(config) == sum(parameter.numel() for parameter in on_meta(config).parameters())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_multiplying_parameters_are_the_weights_of_all_linear_modules(config: ModelConfig) -> None:
    linear = [module for module in on_meta(config).modules() if isinstance(module, nn.Linear)]
    assert scale.multiplying_parameters(config) == sum(module.weight.numel() for module in linear)


def test_pangu_ultra_has_the_papers_size() -> None:
    config = PRESETS["pangu-ultra-135b"]
    assert round(scale.parameters(config) / 1e9, 1) == 133.9
    assert round(scale.parameters(replace(config, tied=True)) / 1e9, 1) == 132.0
    assert round(scale.block_share(config).total / 1e9, 3) == 1.384


@pytest.mark.parametrize("window", [0, 1, 5, 40])
def test_visible_keys_are_the_mean_of_a_masks_rows(window: int) -> None:
    mask = torch.ones(17, 17).tril()
    if window:
        mask = mask.triu(1 - window)
    assert scale.visible_keys(17, window) == pytest.approx(mask.sum(1).mean().item())


def test_flops_are_those_that_a_counter_of_matrix_products_sees() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    length, rows = 24, 2
    model = Decoder(replace(SMALL, norm="pre"))
    tokens = torch.randint(96, (rows, length))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    expected = rows * length * scale.flops_per_token(model.config, length, causal=False)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_causal_attention_counts_about_half_of_the_square() -> None:
    whole, visible = (scale.attention_flops_per_token(SMALL, 1000, causal) for causal in (False, True))
    assert visible == pytest.approx(whole * 1001 / 2000)
    assert whole == 12 * SMALL.layers * SMALL.heads * SMALL.head_dim * 1000


def test_sliding_layers_count_their_window() -> None:
    mixed = replace(SMALL, layer_kinds=("full", "sliding", "sliding"), sliding_window=10)
    assert scale.attention_flops_per_token(mixed, 1000, causal=False) == 12 * 4 * 8 * (1000 + 2 * 10)


def test_mfu_is_the_models_work_over_the_peak() -> None:
    flops = scale.flops_per_token(SMALL, 128)
    assert scale.mfu(SMALL, 128, tokens_per_second=1000, peak_flops=flops * 500, devices=4) == pytest.approx(0.5)


def kept_bytes(config: ModelConfig, tokens: torch.Tensor) -> int:
    """Bytes of all tensors that a training step's graph keeps, weights left out, shared storage once."""
    model = Decoder(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.hidden(tokens)
    assert output.requires_grad
    return sum(kept.values())


WIDE = replace(SMALL, width=64, head_dim=16, ffn=160)
KEPT = {
    **{norm: replace(WIDE, norm=norm) for norm in ("pre", "sandwich", "dssn", "post")},
    "tied": replace(WIDE, tied=True),
    "biases": replace(WIDE, attention_bias=True, output_bias=True, mlp_bias=True),
    "one key head": replace(WIDE, kv_heads=1),
    "as many key heads": replace(WIDE, kv_heads=4),
    "wide heads": replace(WIDE, head_dim=24, ffn=40),
    "norms of heads": replace(WIDE, qk_norm=True),
    "gate": replace(WIDE, attention_gate=True),
    "afmoe": replace(WIDE, qk_norm=True, attention_gate=True, norm="sandwich"),
}


@pytest.mark.parametrize(("rows", "length"), [(1, 32), (2, 64), (4, 48)])
@pytest.mark.parametrize("config", KEPT.values(), ids=KEPT)
def test_activations_are_exactly_what_autograd_keeps(config: ModelConfig, rows: int, length: int) -> None:
    tokens = torch.randint(96, (rows, length))
    deep, shallow = (kept_bytes(replace(config, layers=layers), tokens) for layers in (3, 2))
    # The estimate is for the fused kernels of accelerators. Beside it the CPU keeps the scale that every norm divides
    # by, one number for each vector, and for queries and for keys the cosines and sines of the positions, of all
    # channels that turn; these the rows of a batch share.
    scales = (4 if config.has_post_norms else 2) + (config.heads + config.kv_heads if config.qk_norm else 0)
    tables = 2 * 2 * config.rotary_channels * length
    expected = (scale.activation_bytes_per_token(config, bytes_each=4) + 4 * scales) * tokens.numel() + 4 * tables
    assert deep - shallow == expected


def test_the_papers_pipeline_waits_as_long_as_the_paper_says() -> None:
    assert scale.bubble(Layout(pp=8), 16) == pytest.approx(0.3045, abs=1e-3)
    assert scale.bubble(PANGU_ULTRA_LAYOUT, 16) == pytest.approx(0.068, abs=1e-3)


@pytest.mark.parametrize(("layers", "count"), [(94, 48), (94, 8), (5, 5), (7, 3), (48, 1)])
def test_pieces_cover_all_layers_evenly_and_spare_the_ends(layers: int, count: int) -> None:
    cuts = scale.pieces(layers, count)
    assert [layer for piece in cuts for layer in piece] == list(range(layers))
    sizes = [len(piece) for piece in cuts]
    assert max(sizes) - min(sizes) <= 1 and sizes[0] == min(sizes)


def test_first_stage_keeps_as_many_forward_passes_as_the_pipeline_is_deep() -> None:
    assert [scale.pieces_in_flight(Layout(pp=4), stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert scale.pieces_in_flight(Layout(pp=4), 0, 2) == 2


def test_pangu_ultra_fits_its_64_gb_devices_on_the_papers_layout_and_not_on_one() -> None:
    config = PRESETS["pangu-ultra-135b"]
    spread = scale.report(config, PANGU_ULTRA_LAYOUT, micro_batches=16)
    assert spread.devices == 8192
    assert 25e9 < max(memory.total for memory in spread.memory) < 60e9
    held = sum(memory.parameters for memory in spread.memory) * 8
    assert held == pytest.approx(spread.parameters, rel=1e-3)
    (alone,) = scale.report(config).memory
    assert alone.parameters == spread.parameters and alone.total > 18 * spread.parameters


def test_sharding_divides_state_and_leaves_two_blocks_to_compute_with() -> None:
    (whole,), (sharded,) = (
        scale.memory_per_rank(PRESETS["openpangu-embedded-7b"], Layout(fsdp=fsdp), 4096) for fsdp in (1, 16)
    )
    assert sharded.optimizer == pytest.approx(whole.optimizer / 16, rel=1e-6)
    assert sharded.gradients == pytest.approx(whole.gradients / 16, rel=1e-6)
    assert sharded.weights < whole.weights / 5
    assert sharded.activations == whole.activations


def test_the_small_pangu_has_a_billion_parameters_beside_its_vocabulary() -> None:
    """openPangu-Embedded-1B's model card counts without the embeddings."""
    config = PRESETS["openpangu-embedded-1b"]
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Decoder(config).parameters())
    assert 0.9e9 < count - 2 * config.vocabulary * config.width < 1.05e9


@pytest.mark.parametrize(
    ("layout", "config", "says"),
    [
        ({"tp": 4}, SMALL, "tp: 2 kv_heads"),
        ({"pp": 4}, SMALL, "pp: 3 layers"),
        ({"pp": 2}, replace(SMALL, tied=True), "pp: tied"),
    ],
)
def test_a_layout_that_a_model_does_not_fit_is_refused(layout: dict[str, int], config: ModelConfig, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Layout(**layout).check(config)


@pytest.mark.parametrize("layout", [{"tp": 0}, {"chunks": 2}])
def test_an_impossible_layout_is_refused(layout: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(layout))):
        Layout(**layout)


def test_inspect_of_a_named_size_counts_it_on_the_papers_layout_or_on_another(capsys: pytest.CaptureFixture) -> None:
    pangu = inspect("pangu-ultra-135b")
    assert pangu == scale.report(PRESETS["pangu-ultra-135b"], PANGU_ULTRA_LAYOUT, micro_batches=16)
    assert "133.9 B parameters" in capsys.readouterr().out
    other = inspect("openpangu-embedded-7b", layout=Layout(fsdp=8, tp=2), length=8192)
    assert other == scale.report(PRESETS["openpangu-embedded-7b"], Layout(fsdp=8, tp=2), 8192)
    with pytest.raises(UserError, match="tp: 32 heads"):
        inspect("openpangu-embedded-7b", layout=Layout(tp=3))


def test_counting_imports_no_torch() -> None:
    program = (
        "import sys; from tenfold.llm import scale; from tenfold.llm.config import PRESETS; "
        "scale.show(scale.report(PRESETS['pangu-ultra-135b'])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "133.9 B parameters" in done.stdout


@pytest.mark.parametrize("number", [{"length": 0}, {"micro_batches": 0}])
def test_inspect_refuses_sizes_that_are_none(number: dict[str, int]) -> None:
    with pytest.raises(UserError, match="give numbers from 1 on"):
        inspect("pangu-ultra-135b", **number)
