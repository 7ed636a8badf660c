from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from depth_fixtures import PHOTOGRAPH, RECORDED, recorded_network, relative, tiny_network
from PIL import Image
from safetensors.torch import load_file

from tenfold.core.console import UserError
from tenfold.depth import cameras
from tenfold.depth.camera_input import Camera, exif_camera
from tenfold.depth.config import SizePolicy
from tenfold.depth.predictor import DepthEstimator, camera_rays, read_picture
from tenfold.depth.preprocessing import fit_v1, fit_v2

CASES = [
    *(
        ("v2_a", case)
        for case in ("rgb_small", "rgb_big", "K", "wide_padded", "tall_padded", "batch2", "level0", "level9", "mei")
    ),
    *((name, case) for name in RECORDED[1:] for case in ("rgb", "tall", "K", "K_skip_camera")),
]


@pytest.fixture(scope="module")
def estimator() -> DepthEstimator:
    return DepthEstimator(tiny_network())


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.asarray(Image.open(PHOTOGRAPH).resize((96, 72)))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_whole_predictions_are_those_of_the_official_code(data_root, name: str, case: str) -> None:
    recorded = load_file(data_root / f"depth/fixtures/{name}.{case}.safetensors")
    options = {}
    if "in.K" in recorded:
        options["intrinsics"] = recorded["in.K"].numpy()
    if "in.camera_params" in recorded:
        options["camera"] = Camera(case, tuple(recorded["in.camera_params"][0].tolist()))
    if case.startswith("level"):
        options["resolution_level"] = int(case[-1])
    image = recorded["in.rgb"]
    found = DepthEstimator(recorded_network(data_root, name)).predict(
        image if image.dim() == 4 else image[None], exact_intrinsics=False, **options
    )
    assert len(found) == (2 if case == "batch2" else 1)
    for index, result in enumerate(found):
        points = recorded["out.points"][index].permute(1, 2, 0).numpy()
        assert relative(result.points_m, points) < 2e-4
        assert relative(result.depth_m[..., None], points[..., 2:]) < 2e-4
        if "out.confidence" in recorded:
            error = recorded["out.confidence"][index].permute(1, 2, 0).numpy()
            assert relative(result.uncertainty[..., None], error) < 2e-4
        if case != "K_skip_camera":
            k = recorded["out.intrinsics"][index].numpy()
            assert np.abs(result.predicted_intrinsics - k).max() < 2e-4 * np.abs(k).max()


def test_given_intrinsics_are_used_returned_and_left_alone(estimator, picture) -> None:
    k = np.array([[80.0, 0, 47], [0, 82, 35], [0, 0, 1]])
    before = k.copy()
    first, second = (estimator.predict(picture, intrinsics=k) for _ in range(2))
    assert np.array_equal(k, before)
    assert np.array_equal(first.depth_m, second.depth_m)
    assert np.array_equal(first.intrinsics, k)
    assert first.camera_source == "given"
    assert not np.allclose(first.predicted_intrinsics, k)


@pytest.mark.parametrize("given", [None, "pinhole", "fisheye624", "eucm", "mei", "opencv"])
def test_points_land_on_their_pixels(estimator, picture, given: str | None) -> None:
    camera = None
    if given:
        params = {
            "pinhole": [80, 82, 47, 35],
            "eucm": [60, 60, 48, 36, 0.6, 1.1],
            "mei": [90, 90, 48, 36, -0.1, 0.05, 0, 0, 0.9],
        }
        lens = [70, 70, 48, 36, 0.02, -0.01, *[0] * 4, 0.001, -0.001, *[0] * 4]
        camera = Camera(given, tuple(map(float, params.get(given, lens))))
    result = estimator.predict(picture, camera=camera)
    model = cameras.CAMERAS[result.camera.model]
    points = torch.from_numpy(result.points_m).double().flatten(0, 1)[None]
    pixels = model.project(torch.tensor([result.camera.params], dtype=torch.float64), points)[0]
    assert (pixels - cameras.pixel_centres(72, 96)).norm(dim=-1).max() < 0.01
    assert np.array_equal(result.points_m[..., 2], result.depth_m)


def test_every_kind_of_picture_gives_the_same(estimator, picture) -> None:
    expected = estimator.predict(picture).depth_m
    kinds = [
        Image.fromarray(picture),
        torch.from_numpy(picture.copy()).permute(2, 0, 1),
        picture.astype(np.uint16) * 257,
        picture.astype(np.float32) / 255,
        np.dstack([picture, np.full((72, 96), 7, np.uint8)]),
    ]
    for kind in kinds:
        np.testing.assert_allclose(estimator.predict(kind).depth_m, expected, rtol=1e-4)
    several = estimator.predict([picture, picture[:, ::-1].copy(), picture[:50]])
    np.testing.assert_allclose(several[0].depth_m, expected, rtol=1e-4)
    assert several[2].depth_m.shape == (50, 96)


def encoded(image: Image.Image, name: str, tmp_path, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_files_of_every_kind_are_read(estimator, picture, tmp_path) -> None:
    image = Image.fromarray(picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [
        encoded(image.convert("CMYK"), "cmyk.jpg", tmp_path),
        encoded(image.convert("P"), "palette.png", tmp_path),
        encoded(image.convert("RGBA"), "rgba.png", tmp_path),
        encoded(image.convert("L"), "grey.png", tmp_path),
        encoded(image.rotate(90, expand=True), "turned.jpg", tmp_path, exif=exif, quality=95),
    ]
    for path in paths:
        assert estimator.predict(path).depth_m.shape == (72, 96), path.name
    assert estimator.predict(image.resize((14, 14))).depth_m.shape == (14, 14)


def test_heic_is_read_upright(tmp_path, picture) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "photo.heic", quality=90)
    found = read_picture(tmp_path / "photo.heic")
    assert found.pixels.shape == (72, 96, 3)
    assert np.abs(found.pixels.astype(int) - picture).mean() < 8
    (tmp_path / "bad.heic").write_bytes(b"no heic at all")
    with pytest.raises(UserError, match="damaged"):
        read_picture(tmp_path / "bad.heic")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda image: np.zeros((40, 1, 3), np.uint8), "too few"),
        (lambda image: np.zeros((200, 8000, 3), np.uint8), "more than 20 times"),
        (lambda image: np.full((20, 20, 3), np.nan, np.float32), "NaN"),
        (lambda image: np.full((20, 20, 3), 7.0, np.float32), r"float pixels are in \[0, 1\]"),
        (lambda image: np.zeros((20, 20, 5), np.uint8), "no picture"),
        (lambda image: "missing.png", "no such file"),
        (lambda image: object(), "no picture"),
    ],
)
def test_what_is_no_usable_picture_is_refused_in_one_line(estimator, picture, make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        estimator.predict(make(picture))
    assert "\n" not in str(caught.value)


def test_a_truncated_and_an_empty_file_are_refused(estimator, tmp_path) -> None:
    (tmp_path / "cut.jpg").write_bytes(PHOTOGRAPH.read_bytes()[:5000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.jpg", "empty.png", "text.png"):
        with pytest.raises(UserError, match=name):
            estimator.predict(tmp_path / name)


def test_exif_gives_the_focal_length_by_the_diagonal(estimator, picture, tmp_path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 26
    path = encoded(Image.fromarray(picture), "phone.jpg", tmp_path, exif=exif)
    camera = exif_camera(read_picture(path))
    assert camera.params[0] == pytest.approx(26 * np.hypot(96, 72) / np.hypot(36, 24))
    result = estimator.predict(path, camera="exif")
    assert (result.camera_source, result.camera) == ("exif", camera)
    plain = encoded(Image.fromarray(picture), "plain.jpg", tmp_path)
    assert estimator.predict(plain, camera="auto").camera_source == "predicted"
    with pytest.raises(UserError, match="no focal length"):
        estimator.predict(plain, camera="exif")


def test_damaged_exif_is_no_reason_to_fail(estimator, picture, tmp_path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    (tmp_path / "odd.jpg").write_bytes(buffer.getvalue())
    assert estimator.predict(tmp_path / "odd.jpg", camera="auto").camera_source == "predicted"


def test_only_one_camera_may_be_given(estimator, picture) -> None:
    with pytest.raises(UserError, match="not several"):
        estimator.predict(picture, camera="auto", fov_x_deg=60)


def test_sizes_of_v2_are_those_of_the_release() -> None:
    fit = fit_v2(480, 640, SizePolicy())
    assert (fit.scaled, fit.factor) == ((490, 644), 1.0)
    assert fit_v2(3000, 4000, SizePolicy()).scaled[0] % 14 == 0
    assert fit_v2(3000, 4000, SizePolicy()).scaled[0] * fit_v2(3000, 4000, SizePolicy()).scaled[1] < 640_000
    wide = fit_v2(50, 160, SizePolicy(pixels_min=12_000, pixels_max=24_000))
    assert (wide.padded, wide.outer.top, wide.outer.bottom) == ((64, 160), 7, 7)


@pytest.mark.parametrize("size", [(480, 640), (97, 131), (1200, 500), (3000, 4000)])
def test_a_camera_comes_back_through_both_ways(size: tuple[int, int]) -> None:
    params = torch.tensor([[500.0, 510.0, 300.0, 200.0]], dtype=torch.float64)
    for fit in (fit_v2(*size, SizePolicy()), fit_v1(*size, (462, 616))):
        for exact in (True, False):
            inside = fit.camera_in("pinhole", params, exact)
            back = fit.camera_out(cameras.intrinsics_of(inside), exact)
            torch.testing.assert_close(back[:, (0, 1, 0, 1), (0, 1, 2, 2)], params, rtol=1e-12, atol=1e-9)


def test_rays_of_a_large_image_are_computed_in_parts_alike() -> None:
    camera = Camera("eucm", (60.0, 60.0, 48.0, 36.0, 0.6, 1.1))
    params = torch.tensor([camera.params], dtype=torch.float64)
    expected = cameras.rays("eucm", params, 40, 1100)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(camera_rays(camera, 40, 1100), expected, atol=1e-7)
    tall = camera_rays(camera, 3000, 400)
    np.testing.assert_allclose(tall[2999, 7], cameras.rays("eucm", params, 3000, 400)[0, :, 2999, 7].numpy(), atol=1e-7)
