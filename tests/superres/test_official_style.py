"""The benchmark's peer computes the same as our network, so that their times may be compared."""

from pathlib import Path

import pytest
import torch

from tenfold.superres.checkpoint import load_model
from tenfold.superres.config import HiTConfig
from tenfold.superres.model import PositionBias

PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"
RATIOS = {"hier_win_ratios": [0.5, 1, 2]}


@pytest.mark.parametrize("name", ["tiny_sir_x2", "tiny_srf_x2", "tiny_sng_x2"])
def test_the_official_style_equals_our_network(name, repository, monkeypatch):
    monkeypatch.syspath_prepend(repository)
    from benchmarks._official_style import largest_difference

    model = load_model(str(PARITY / f"{name}.state.safetensors"), config=RATIOS)
    assert largest_difference(model, 37, 45) <= 1e-5


def test_the_gathered_position_bias_equals_the_pooled_one_for_oblong_windows(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository)
    from benchmarks._official_style import position_bias

    torch.manual_seed(0)
    config = HiTConfig(base_window=(4, 8), window_ratios=(3.0,), depths=(1,), heads=(6,))
    bias = PositionBias(3, 6, config.windows[0], (3, 3))
    with torch.no_grad():
        assert torch.allclose(position_bias(bias, (4, 8)).transpose(1, 2), bias(), atol=1e-6)
