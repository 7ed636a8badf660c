"""The losses are the official ones, and bear rows without and with nothing but positives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tenfold.tracking.losses import margin_l2, multi_positive_cross_entropy, unbiased_contrast

CASES = load_file(Path(__file__).parents[1] / "data" / "tracking" / "losses.safetensors")


@pytest.mark.parametrize("case", range(3))
def test_losses_equal_the_official_ones(case: int) -> None:
    key, reference, targets = (CASES[f"{case}.{name}"] for name in ("key_embeds", "ref_embeds", "targets"))
    found = {
        "unbiased_contrast": 0.25 * unbiased_contrast(key, reference, targets),
        "unbiased_contrast_no_pos_normalize": 0.25 * unbiased_contrast(key, reference, targets, normalise=False),
        "margin_l2_aux": margin_l2(key, reference, targets),
        "qdtrack_multi_pos_ce": 0.25 * multi_positive_cross_entropy(key, reference, targets),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, CASES[f"{case}.{name}"], rtol=1e-5, atol=1e-7, msg=f"{name}: {value}")


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("loss", [unbiased_contrast, margin_l2, multi_positive_cross_entropy])
def test_gradients_are_finite_without_and_with_nothing_but_positives(loss, fill: int) -> None:
    key = torch.randn(5, 8, requires_grad=True)
    value = loss(key, torch.randn(7, 8), torch.full((5, 7), fill))
    value.backward()
    assert torch.isfinite(value)
    assert key.grad is not None and torch.isfinite(key.grad).all()
