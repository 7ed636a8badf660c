"""Large pictures: strips equal the whole picture, tiles nearly do, and the memory decides which."""

from __future__ import annotations

import pytest
import torch

from tenfold.core.console import UserError
from tenfold.superres import strips, tiling
from tenfold.superres.config import HiTConfig, Variant
from tenfold.superres.model import HiT

VARIANTS: tuple[Variant, ...] = ("sir", "srf", "sng")


def network(variant: Variant = "srf", scale: int = 2, ratios: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)) -> HiT:
    torch.manual_seed(0)
    config = HiTConfig(
        variant=variant, scale=scale, width=12, depths=(len(ratios), 1), heads=(2, 2), window_ratios=ratios
    )
    model = HiT(config).eval()
    for parameter in model.parameters():  # normalisations too, so that a mistake shows
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (64, 64), (97, 131), (200, 33)])
def test_strips_equal_the_whole_picture(
    variant: Variant, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "PIXELS", 256)  # many strips on a small picture
    model, image = network(variant), torch.rand(1, 3, *size)
    whole, how = tiling.upscale_tensor(model, image, "none")
    stripped, how_stripped = tiling.upscale_tensor(model, image, "strips")
    assert (how, how_stripped) == ("whole", "strips")
    assert stripped.shape == (1, 3, 2 * size[0], 2 * size[1])
    # These random networks give values far outside of 0..1.
    torch.testing.assert_close(stripped, whole, atol=1e-5 * max(1.0, float(whole.abs().max())), rtol=0)


def test_a_tile_that_holds_the_picture_gives_the_whole_picture() -> None:
    model, image = network(), torch.rand(1, 3, 90, 70)
    tiled, how = tiling.upscale_tensor(model, image, 96)
    assert how == "tiles of 96 px"
    torch.testing.assert_close(tiled, tiling.upscale_tensor(model, image, "none")[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [64, 96])
def test_tiles_differ_little_and_show_no_seam(side: int) -> None:
    model, image = network(), torch.rand(1, 3, 230, 150)
    whole = tiling.upscale_tensor(model, image, "strips")[0]
    tiled = tiling.upscale_tensor(model, image, side)[0]
    error = (tiled - whole).abs()
    spread = whole.std()
    assert error.max() < 0.05 * spread
    seam = error[:, :, 2 * side - 2 : 2 * side + 2].mean()
    assert seam <= 3 * error.mean() + 1e-6


def test_tile_weights_of_all_tiles_add_up_to_one() -> None:
    for length, side in ((300, 64), (130, 128), (65, 64), (500, 192)):
        total = torch.zeros(2 * length)
        for start in range(0, length, side):
            rows = tiling._span(start, side, length, tiling.FEATHER)
            total[tiling._scaled(rows, 2)] += tiling._ramp(rows, start, start + side, length, 2)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_lie_on_the_grid_of_the_windows() -> None:
    assert tiling.grid(HiTConfig()) == 192
    assert tiling.grid(network().config) == 32
    _, how = tiling.upscale_tensor(network(), torch.rand(1, 3, 40, 40), 70)
    assert how == "tiles of 96 px"


def test_memory_decides_between_strips_tiles_and_refusal() -> None:
    model, image = network(), torch.rand(1, 3, 300, 200)
    enough = tiling.strips_bytes(model.config, 300, 200)
    assert tiling.upscale_tensor(model, image, memory_budget=enough)[1] == "strips"
    assert tiling.upscale_tensor(model, image, memory_budget=enough - 1)[1].startswith("tiles of ")
    with pytest.raises(UserError, match="--memory"):
        tiling.upscale_tensor(model, image, memory_budget=1000)


def test_more_memory_makes_larger_tiles() -> None:
    config = HiTConfig()
    sides = [tiling.largest_tile(config, 5000, 5000, budget * 2**30) for budget in (6, 8, 12)]
    assert sides == sorted(sides) and sides[0] < sides[-1]
    assert all(side % 192 == 0 for side in sides)


def test_progress_rises_to_one() -> None:
    for tile in ("strips", 64):
        seen: list[float] = []
        tiling.upscale_tensor(network(), torch.rand(1, 3, 100, 80), tile, progress=seen.append)
        assert seen == sorted(seen) and seen[-1] == 1.0
