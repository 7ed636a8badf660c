from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from depth_fixtures import LOCAL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tenfold.core.console import UserError
from tenfold.depth import cameras
from tenfold.depth.blocks import fourier, sine_positions, spherical_harmonics
from tenfold.depth.camera_input import COUNTS, Camera

RECORDED = load_file(LOCAL / "cameras.safetensors")
TOLERANCE = {"pinhole": 1e-5, "eucm": 1e-5, "spherical": 1e-5, "mei": 1e-5, "fisheye624": 1e-3, "opencv": 1e-3}


@pytest.mark.parametrize("model", cameras.CAMERAS)
def test_rays_are_those_of_the_official_code(model: str) -> None:
    found = cameras.rays(model, RECORDED[f"{model}.params"], 60, 80)
    assert (found - RECORDED[f"{model}.rays"]).abs().max() < TOLERANCE[model]


@pytest.mark.parametrize("model", cameras.CAMERAS)
def test_a_padded_and_enlarged_camera_is_that_of_the_official_code(model: str) -> None:
    params = RECORDED[f"{model}.params"]
    before = params.clone()
    found = cameras.resize(model, cameras.crop(model, params, -7, -3, -7, -4), 1.5, 1.5)
    assert torch.equal(params, before)
    torch.testing.assert_close(found, RECORDED[f"{model}.cropresize_params"], rtol=1e-6, atol=1e-6)
    rays, expected = cameras.rays(model, found, 100, 141), RECORDED[f"{model}.cropresize_rays"]
    # The official fisheye looks backwards through the lens beyond 90 degrees: its ray there is ours, negated.
    back = rays[:, 2:] < (1e-3 if model == "fisheye624" else -2)
    error, opposite = (rays - expected).abs(), (rays + expected).abs()
    assert torch.where(back, torch.minimum(error.amax(1, True), opposite.amax(1, True)), error).max() < TOLERANCE[model]


@pytest.mark.parametrize("model", cameras.CAMERAS)
def test_projection_undoes_unprojection(model: str) -> None:
    params, pixels = RECORDED[f"{model}.params"].reshape(1, -1).double(), cameras.pixel_centres(60, 80)[None]
    back = cameras.CAMERAS[model].project(params, cameras.CAMERAS[model].unproject(params, pixels))
    assert (back - pixels).norm(dim=-1).nan_to_num(nan=math.inf).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "size"),
    [("kitti360", (940, 955)), ("scannet", (1168, 1752)), ("dl3dv", (540, 960)), ("equirectangular", (277, 612))],
)
def test_real_calibrations_round_trip_over_their_field_of_view(data_root, name: str, size: tuple[int, int]) -> None:
    content = json.loads((data_root / f"depth/cameras_real/{name}.json").read_text())
    camera = Camera.from_file(data_root / f"depth/cameras_real/{name}.json")
    params = torch.tensor([camera.params], dtype=torch.float64)
    pixels = cameras.pixel_centres(*size)[::97][None]
    if name == "kitti360":  # its lens draws a circle; beyond it no ray arrives
        middle = torch.tensor(camera.params[2:4], dtype=torch.float64)
        pixels = pixels[:, (pixels[0] - middle).norm(dim=-1) < 490]
    model = cameras.CAMERAS[content["name"].lower()]
    error = (model.project(params, model.unproject(params, pixels)) - pixels).abs()
    if name == "equirectangular":  # the last column looks where the first does
        error[..., 0] = torch.minimum(error[..., 0], (error[..., 0] - (size[1] - 1)).abs())
    assert error.max() < (1e-3 if name == "equirectangular" else 1e-5)  # its file has pi with five decimals


@settings(deadline=None, max_examples=20)
@given(
    st.floats(-20, 20),
    st.floats(-20, 20),
    st.floats(0.4, 2.5),
    st.sampled_from(["pinhole", "fisheye624", "opencv", "eucm", "mei"]),
)
def test_cropping_and_scaling_an_image_or_its_camera_is_the_same(
    left: float, top: float, factor: float, model: str
) -> None:
    params = RECORDED[f"{model}.params"].double()
    pixels = cameras.pixel_centres(12, 16)[None] + 20
    changed = cameras.resize(model, cameras.crop(model, params, left, top), factor, factor)
    moved = (pixels - torch.tensor([left, top], dtype=torch.float64)) * factor
    expected, found = (cameras.CAMERAS[model].unproject(*each) for each in ((params, pixels), (changed, moved)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_models_that_users_name_are_those_that_there_are() -> None:
    assert {name: model.count for name, model in cameras.CAMERAS.items()} == COUNTS


def test_rays_of_a_matrix_are_those_of_its_parameters() -> None:
    params = RECORDED["pinhole.params"]
    found = cameras.pinhole_rays(cameras.intrinsics_of(params), 60, 80)
    torch.testing.assert_close(found, cameras.rays("pinhole", params, 60, 80), rtol=1e-6, atol=1e-6)


def test_encodings_are_those_of_the_official_code() -> None:
    recorded = load_file(LOCAL / "encodings.safetensors")
    torch.testing.assert_close(spherical_harmonics(recorded["sh.dirs"]), recorded["sh.out"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sine_positions(7, 9, 64)[None], recorded["sine_pos.32_7x9"], rtol=1e-5, atol=1e-5)
    values = recorded["fourier.in"]
    for bands, highest in ((32, 16), (64, 5)):
        found = torch.cat([fourier(values[:, i], bands // 2, highest) for i in (0, 1)], dim=-1)
        torch.testing.assert_close(found, recorded[f"fourier.dim{bands}_maxfreq{highest}"], rtol=1e-4, atol=1e-4)


def test_spherical_harmonics_are_orthonormal() -> None:
    u, v = torch.meshgrid((torch.arange(60) + 0.5) / 60, torch.arange(60) / 60, indexing="ij")
    z, angle = 2 * u.double() - 1, 2 * math.pi * v.double()
    ring = (1 - z * z).sqrt()
    found = spherical_harmonics(torch.stack([ring * angle.cos(), ring * angle.sin(), z], -1).flatten(0, 1), 4)
    product = found.T @ found * 4 * math.pi / 3600
    torch.testing.assert_close(product, torch.eye(25, dtype=torch.float64), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "fisheye", "params": [1] * 16}, "unknown camera model 'fisheye'; did you mean fisheye624"),
        ({"name": "EUCM", "params": [1, 1, 1]}, "a eucm camera has 6 parameters, these are 3"),
        ({"intrinsics": [500, -500, 320, 240]}, "not both positive"),
        ({"intrinsics": [float("nan"), 500, 320, 240]}, "NaN"),
        ({"intrinsics": [[500, 0, 320], [0, 500, 240], [1, 0, 1]]}, "not upper triangular"),
        ({"intrinsics": [1, 2]}, "3 x 3 matrix or fx, fy, cx, cy"),
        ({"name": "OPENCV", "params": [500, 500, 320, 240, 0, 0, 0, 0.1, *[0] * 8]}, "k4 to k6 must be 0"),
        ({"fov": 3}, "neither `params` nor `intrinsics`"),
    ],
)
def test_a_camera_file_that_is_wrong_is_refused_in_one_line(tmp_path, content: dict, message: str) -> None:
    path = tmp_path / "camera.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        Camera.from_file(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_intrinsics_come_from_npy_and_json_alike(tmp_path) -> None:
    k = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
    np.save(tmp_path / "k.npy", k)
    (tmp_path / "k.json").write_text(json.dumps({"intrinsics": k.tolist(), "width": 640, "height": 480}))
    assert Camera.from_file(tmp_path / "k.npy").params == (500, 510, 320, 240)
    camera = Camera.from_file(tmp_path / "k.json")
    assert (camera.params, camera.size) == ((500, 510, 320, 240), (640, 480))
    with pytest.raises(UserError, match="for images of 640x480 pixels, this one has 320x240"):
        camera.check_fits(320, 240)


def test_intrinsics_of_a_larger_image_are_refused_with_the_size_that_they_seem_to_be_for() -> None:
    with pytest.raises(UserError, match="about 1920x1080"):
        Camera.pinhole(1400, 1400, 960, 540).check_fits(640, 480)
