"""The losses: the official values and gradients, and what each of them must not change by."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tenfold.depth import losses


@pytest.fixture(scope="module")
def fixture(data_root):
    return load_file(data_root / "depth" / "fixtures" / "losses.safetensors")


# The fixture's own random patches, read off the pixels at which its gradient is not the whole image's.
PATCHES = (
    ((0, 28), (14, 14), (14, 70), (28, 14), (28, 56)),
    ((0, 0), (14, 28), (42, 14)),
    ((14, 14), (14, 28), (42, 42)),
    ((14, 28), (28, 56), (28, 70)),
)


def official(name: str, fixture: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of its mean of one of our losses, on the fixture's inputs."""
    mask = fixture["in.mask"]
    small = fixture["in.K"].clone()
    small[:, :2] /= 14
    coarse = torch.nn.functional.interpolate(mask, (6, 8), mode="nearest")
    side = losses.patch_side(56, training=False)
    cells = [torch.tensor(patch) for patch in PATCHES]
    truth, flips = fixture["in.gt"], fixture["in.flips"]
    call, inputs = {
        "silog": (lambda x: losses.silog(x, truth, mask, fixture["in.si"], mixed=True), "in.pred"),
        "camera_regression": (lambda x: losses.ray_regression(x, fixture["in.rays_gt"]), "in.rays_pred"),
        "confidence": (lambda x: losses.uncertainty(x, fixture["in.pred"], truth, mask), "in.logconf"),
        "invariance_v2_depth": (lambda x: losses.invariance(x, fixture["in.K"], mask, flips, mixed=True), "in.pred"),
        "invariance_v1_features_ds14": (
            lambda x: losses.invariance(x, small, coarse, flips, mixed=True),
            "in.features",
        ),
        "edge_ssi_eval": (lambda x: losses.local_ssi(x, truth, mask, cells, side), "in.pred"),
    }[name]
    x = fixture[inputs].clone().requires_grad_()
    value = call(x)
    (gradient,) = torch.autograd.grad(value.mean(), x)
    return value.detach(), gradient


@pytest.mark.parametrize(
    "name",
    [
        "silog",
        "camera_regression",
        "confidence",
        "invariance_v2_depth",
        "invariance_v1_features_ds14",
        "edge_ssi_eval",
    ],
)
def test_values_and_gradients_are_the_official_ones(fixture, name):
    value, gradient = official(name, fixture)
    torch.testing.assert_close(value.flatten(), fixture[f"{name}.value"].flatten(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, fixture[f"{name}.grad_of_mean"], rtol=1e-5, atol=1e-6)


def test_by_default_images_are_not_mixed(fixture):
    mask = fixture["in.mask"]
    value = losses.silog(fixture["in.pred"], fixture["in.gt"], mask, fixture["in.si"])
    torch.testing.assert_close(value, fixture["silog.intended_value"], rtol=1e-5, atol=1e-6)
    pairs = losses.invariance(fixture["in.pred"], fixture["in.K"], mask, fixture["in.flips"])
    for number in range(2):
        intended = fixture[f"invariance_v2_depth.intended_pair{number}"]
        torch.testing.assert_close(pairs[number], intended, rtol=1e-5, atol=1e-6)


def test_the_edge_map_is_the_official_one(fixture):
    edges = losses.edge_strength(fixture["in.image"], fixture["in.validity"])
    torch.testing.assert_close(edges, fixture["edge_ssi.edges"], rtol=1e-5, atol=1e-6)


def test_patches_lie_on_the_strongest_cells_and_are_as_many_for_each_image(fixture):
    cells = losses.edge_cells(fixture["in.image"], fixture["in.validity"], 0.9, torch.Generator().manual_seed(0))
    assert len({len(found) for found in cells}) == 1
    small = torch.nn.functional.interpolate(
        fixture["edge_ssi.edges"], scale_factor=1 / 14, mode="bilinear", align_corners=False
    )[:, 0]
    for edges, found in zip(small, cells, strict=True):
        strongest = {tuple(place) for place in (edges > edges.quantile(0.9)).nonzero().tolist()}
        assert strongest & {(row // 14, column // 14) for row, column in found.tolist()}


@pytest.fixture
def depths():
    generator = torch.Generator().manual_seed(0)
    truth = 1 + 3 * torch.rand(2, 1, 28, 42, generator=generator)
    guess = truth * (0.8 + 0.4 * torch.rand(2, 1, 28, 42, generator=generator))
    mask = torch.rand(2, 1, 28, 42, generator=generator) > 0.2
    return guess, truth, mask


def test_what_is_masked_does_not_matter(depths):
    guess, truth, mask = depths
    other = torch.where(mask, guess, 7 + 0 * guess)
    cells = [torch.tensor([[14, 14], [14, 28]])] * 2
    for loss in (
        lambda p: losses.silog(p, truth, mask),
        lambda p: losses.lambda_mse(p.log() - truth.log(), mask, (0.15,)),
        lambda p: losses.uncertainty(p.log(), p, truth, mask),
        lambda p: losses.uncertainty(p.log(), p, truth, mask, "paper"),
        lambda p: losses.local_ssi(p, truth, mask, cells, 5),
        lambda p: losses.local_ssi(p, truth, mask, cells, 5, "paper"),
    ):
        torch.testing.assert_close(loss(guess), loss(other))


def test_a_scale_costs_015_of_its_squared_logarithm(depths):
    _, truth, mask = depths
    error = (2 * truth).log() - truth.log()
    expected = torch.full((2,), 0.15 * torch.tensor(2.0).log().item() ** 2)
    torch.testing.assert_close(losses.lambda_mse(error, mask, (0.15,)), expected, rtol=1e-4, atol=1e-6)


def test_the_local_loss_does_not_see_scale_and_shift_of_inverse_depth(depths):
    _, truth, mask = depths
    moved = 1 / (0.5 / truth + 0.1)
    cells = [torch.tensor([[14, 14], [14, 28]])] * 2
    assert losses.local_ssi(moved, truth, mask, cells, 7, "paper").max() < 0.02
    assert losses.local_ssi(truth.flip(-1), truth, mask, cells, 7, "paper").min() > 0.5


def test_two_views_that_say_the_same_cost_nothing():
    """A ramp seen at twice the focal length around another centre is the ramp's middle."""
    depth = torch.arange(64.0).expand(1, 1, 48, 64) / 10 + 1
    near = torch.nn.functional.interpolate(depth, scale_factor=2, mode="bilinear")[..., 24:72, 32:96]
    k = torch.tensor([[40.0, 0, 32], [0, 40, 24], [0, 0, 1]])
    k2 = torch.tensor([[80.0, 0, 32], [0, 80, 24], [0, 0, 1]])
    both, intrinsics = torch.cat([depth, near]), torch.stack([k, k2])
    assert losses.invariance(both, intrinsics, torch.ones(2, 1, 48, 64), recipe="paper").max() < 0.03
    wrong = torch.cat([depth, depth])
    assert losses.invariance(wrong, intrinsics, torch.ones(2, 1, 48, 64), recipe="paper").min() > 0.3


def test_each_view_learns_from_the_other_and_not_from_itself():
    values = torch.rand(2, 1, 8, 8, requires_grad=True)
    k = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
    first, second = losses.invariance(values, k, torch.ones(2, 1, 8, 8))[0]
    (gradient,) = torch.autograd.grad(first, values, retain_graph=True)
    assert gradient[0].abs().sum() > 0 and gradient[1].abs().sum() == 0
    (gradient,) = torch.autograd.grad(second, values)
    assert gradient[0].abs().sum() == 0 and gradient[1].abs().sum() > 0


def test_the_uncertainty_that_is_asked_for_is_the_error(depths):
    guess, truth, mask = depths
    made = (guess.log() - truth.log()).abs().clamp_min(1e-9).log()
    assert losses.uncertainty(made, guess, truth, mask, "paper").max() < 1e-6
    assert losses.uncertainty(made + 1, guess, truth, mask, "paper").min() > 1e-3


def test_an_image_without_depth_costs_nothing_and_gives_finite_gradients(depths):
    guess, truth, _ = depths
    nothing = torch.zeros_like(truth)
    x = guess.clone().requires_grad_()
    cells = [torch.tensor([[14, 14]])] * 2
    total = losses.silog(x, truth, nothing).sum() + losses.local_ssi(x, truth, nothing, cells, 5).sum()
    total = total + losses.uncertainty(x.log(), x, truth, nothing).sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_angles_of_rays():
    rays = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])[:, :, None, None]
    angles = losses.ray_angles(rays)[:, :, 0, 0]
    expected = torch.tensor([[0, torch.pi / 2], [torch.pi / 2, torch.pi / 2], [0, 0]])
    torch.testing.assert_close(angles, expected, atol=2e-3, rtol=0)
