"""Rendered rooms: geometry that is exact, and pictures that are a pure function of their number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tenfold.depth import simulate
from tenfold.depth.ablation import RenderedPairs, pair_of_views, pinhole
from tenfold.depth.cameras import pinhole_rays
from tenfold.depth.config import SceneConfig
from tenfold.depth.losses import invariance
from tenfold.depth.simulate import Scenes, cast, random_scenes, render

EMPTY = SceneConfig(pieces=0, wall_pieces=0, balls=0)


def rays_of(fov_deg: float, height: int = 12, width: int = 16, batch: int = 1) -> torch.Tensor:
    return pinhole_rays(pinhole(torch.tensor([fov_deg]), height, width), height, width).expand(batch, -1, -1, -1)


def looking_along_z(scenes: Scenes, height_m: float = 1.5) -> Scenes:
    position = torch.tensor([[1.0, -height_m, 0.5]])
    return replace(scenes, position=position, rotation=torch.eye(3)[None], room_m=torch.tensor([[4.0, 2.5, 6.0]]))


def test_an_empty_room_is_where_geometry_puts_it():
    scenes = looking_along_z(random_scenes(EMPTY, 0, [0]))
    forward = torch.tensor([[[0.0], [0.0], [1.0]], [[0.0], [1.0], [0.0]], [[1.0], [0.0], [0.0]]]).permute(1, 0, 2)[None]
    found = render(scenes, forward).radius_m[0, 0, :, 0]
    torch.testing.assert_close(found, torch.tensor([5.5, 1.5, 3.0]))


def test_depth_of_the_far_wall_is_the_same_in_every_pixel():
    scenes = looking_along_z(random_scenes(EMPTY, 0, [0]))
    rendering = render(scenes, rays_of(20.0))
    torch.testing.assert_close(rendering.points_m[:, 2], torch.full((1, 12, 16), 5.5))


@pytest.mark.parametrize("seed", range(3))
def test_hits_are_the_nearest_of_all_surfaces(seed):
    """A twin that asks every surface for every ray, by marching along it in small steps."""
    scenes = random_scenes(SceneConfig(pieces=4, balls=2), seed, [3])
    direction = scenes.rotation @ rays_of(70.0, 4, 6).flatten(2)
    origin = scenes.position[:, :, None].expand_as(direction)
    distance, _, _ = cast(scenes, origin, direction)
    steps = torch.arange(0, 14, 0.004)
    points = (origin[..., None] + direction[..., None] * steps)[0].permute(1, 2, 0)  # P x T x 3
    free = torch.ones(points.shape[:2], dtype=torch.bool)
    x, y, z = points.unbind(-1)
    width, height, depth = scenes.room_m[0]
    free &= (x >= 0) & (x <= width) & (y <= 0) & (y >= -height) & (z >= 0) & (z <= depth)
    for center, half, yaw in zip(scenes.box_center[0], scenes.box_half[0], scenes.box_yaw[0], strict=True):
        dx, dy, dz = (points - center).unbind(-1)
        local = torch.stack([yaw.cos() * dx - yaw.sin() * dz, dy, yaw.sin() * dx + yaw.cos() * dz], -1)
        free &= ~((local.abs() < half).all(-1))
    for center, radius in zip(scenes.ball_center[0], scenes.ball_radius[0], strict=True):
        free &= (((points - center) / radius) ** 2).sum(-1) > 1
    first = (~free).float().argmax(1)
    marched = steps[first]
    # A ray may graze a corner between two steps; nearly all agree within one step.
    assert ((marched - distance[0]).abs() < 0.008).float().mean() > 0.9
    assert (distance[0] < marched + 0.008).all()


def test_points_lie_on_their_rays():
    rays = rays_of(90.0, batch=2)
    rendering = render(random_scenes(SceneConfig(), 0, [0, 1]), rays)
    torch.testing.assert_close(rendering.points_m, rays * rendering.radius_m)
    assert (rendering.radius_m > 0.05).all() and (rendering.radius_m < 12).all()


def test_a_scene_is_a_pure_function_of_its_number():
    together, alone = random_scenes(SceneConfig(), 7, [4, 5]), random_scenes(SceneConfig(), 7, [5])
    for name in Scenes.__dataclass_fields__:
        assert torch.equal(getattr(together, name)[1], getattr(alone, name)[0]), name
    assert not torch.equal(together.room_m[0], together.room_m[1])


def test_noise_is_a_pure_function_of_the_number():
    image = torch.full((2, 3, 4, 5), 0.5)
    both, one = simulate.add_noise(image, 0.02, 0, [8, 9]), simulate.add_noise(image[:1], 0.02, 0, [9])
    assert torch.equal(both[1], one[0]) and not torch.equal(both[0], both[1])


def test_any_camera_sees_the_same_room():
    """Directions behind the camera work as well: what a 360 degree camera sees, a turned pinhole sees too."""
    scenes = random_scenes(SceneConfig(), 3, [0])
    forward = rays_of(60.0)
    turn = torch.from_numpy(simulate.camera_rotation(np.pi, 0.0)).float()
    behind = torch.einsum("ij,bjhw->bihw", turn, forward)
    turned = replace(scenes, rotation=scenes.rotation @ turn)
    torch.testing.assert_close(render(scenes, behind).radius_m, render(turned, forward).radius_m, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(render(scenes, behind).image, render(turned, forward).image, rtol=1e-3, atol=2e-2)


def test_a_rotation_keeps_lengths_and_pitches_up():
    rotation = simulate.camera_rotation(0.3, 0.2, 0.1)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert (simulate.camera_rotation(0.0, 0.2) @ [0, 0, 1])[1] < 0, "up is negative y"


def test_shadows_only_darken():
    scenes = random_scenes(SceneConfig(pieces=5), 1, range(3))
    lit, shaded = (render(scenes, rays_of(80.0, 24, 32, 3), shadows).image for shadows in (False, True))
    assert (shaded <= lit + 1e-6).all() and (shaded < lit - 0.02).any()


def test_pictures_have_contrast_and_varied_surfaces():
    for texture in ("ruled", "varied"):
        scenes = random_scenes(SceneConfig(texture=texture), 0, range(6))
        image = render(scenes, rays_of(80.0, 24, 32, 6)).image
        assert image.flatten(1).std(1).mean() > 0.08
        assert 0.1 < image.mean() < 0.9


def test_two_views_of_a_pair_agree_where_they_overlap():
    """Depth of one view, zoomed by what the intrinsics say, is the other's: what the invariance loss relies on."""
    data = RenderedPairs(8, (24, 32), seed=0)
    batch = data.batch(range(16))
    depth, mask = batch["points"][:, 2:], torch.ones(16, 1, 24, 32)
    agree = invariance(depth, batch["intrinsics"], mask, recipe="paper")
    crossed = invariance(depth.roll(1, 0), batch["intrinsics"], mask, recipe="paper")
    assert agree.median() < 0.3 * crossed.median()


def test_batches_of_pairs_are_pure_functions_of_their_numbers():
    one, other = RenderedPairs(8, (24, 32), seed=1), RenderedPairs(8, (24, 32), seed=1)
    a, b = one.batch(range(40, 48)), other.batch(range(40, 48))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["given"].tolist() == [True, True, False, False, True, True, False, False]


def test_fields_of_view_stay_in_the_training_range():
    views = np.stack([pair_of_views(np.random.default_rng(seed)) for seed in range(200)])
    assert views.min() >= 35 - 1e-9 and views.max() <= 105 + 1e-9
    assert np.abs(views[:, 0] - views[:, 1]).mean() > 10
