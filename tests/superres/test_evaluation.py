import json

import numpy as np
import pytest
from PIL import Image

from tenfold.core.console import UserError
from tenfold.superres.evaluation import (
    bicubic,
    evaluate_pairs,
    find_pairs,
    make_low_res,
    psnr,
    psnr_y,
    rgb_to_y,
    ssim,
    ssim_y,
)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def small_set(tmp_path):
    """Two ground-truth images, one of them no multiple of the scale, with low-res files in the DIV2K layout."""
    for name, shape in (("a", (40, 52)), ("b", (41, 47))):
        high_res = noise(*shape, seed=len(name))
        save(tmp_path / "HR" / f"{name}.png", high_res)
        save(tmp_path / "LR" / "X2" / f"{name}x2.png", make_low_res(high_res, 2))
    return tmp_path


@pytest.mark.parametrize("source", ["bicubic_from_LR_bicubic", "bicubic_from_LR_bicubic_clamp", "published_RCAN"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_scores_equal_those_of_the_official_metric_code(data_root, source, scale):
    root = data_root / "superres" / "Set5"
    expected = json.loads((root / "expected_metrics.json").read_text())[source][f"x{scale}"]
    if source == "published_RCAN":
        result = evaluate_pairs(None, root, scale=scale, super_res=root / source)
    else:
        result = evaluate_pairs(bicubic(scale), root, root / source.removeprefix("bicubic_from_"), scale=scale)
    assert len(result.images) == 5
    for score in (*result.images, result.mean):
        wanted = expected["mean"] if score.name == "mean" else expected["images"][score.name]
        assert score.psnr_y == pytest.approx(wanted[0], abs=1e-3)
        assert score.ssim_y == pytest.approx(wanted[1], abs=1e-5)
        assert score.psnr_rgb == pytest.approx(wanted[2], abs=1e-3)
        assert score.ssim_rgb == pytest.approx(wanted[3], abs=1e-5)


@pytest.mark.parametrize(("scale", "paper"), [(2, (38.27, 0.9614)), (3, (34.74, 0.9299)), (4, (32.63, 0.9002))])
def test_the_rcan_outputs_score_what_the_rcan_paper_prints(data_root, scale, paper):
    root = data_root / "superres" / "Set5"
    mean = evaluate_pairs(None, root, scale=scale, super_res=root / "published_RCAN").mean
    assert (round(mean.psnr_y, 2), round(mean.ssim_y, 4)) == paper


def test_low_res_made_from_ground_truth_scores_as_the_published_files_do(data_root):
    root = data_root / "superres" / "Set5"
    assert (
        evaluate_pairs(bicubic(3), root, scale=3).images
        == evaluate_pairs(bicubic(3), root, root / "LR_bicubic", scale=3).images
    )


def test_luma_is_studio_range():
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(rgb_to_y(corners), [[16, 235, 16 + 65.481]])


def test_psnr_of_a_known_error():
    reference = np.full((8, 8), 100, np.uint8)
    assert psnr(reference + np.uint8(5), reference) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(reference, reference) == float("inf")


def test_the_border_is_not_scored():
    reference = noise(40, 40)
    spoilt = reference.copy()
    spoilt[:3], spoilt[-3:], spoilt[:, :3], spoilt[:, -3:] = 0, 0, 0, 0
    assert psnr_y(spoilt, reference, 3) == float("inf")
    assert ssim_y(spoilt, reference, 3) == pytest.approx(1)
    assert psnr_y(spoilt, reference, 2) < 60


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    reference = noise(40, 50)
    image = (reference * 0.7 + 20).astype(np.uint8)
    _, full = metrics.structural_similarity(
        rgb_to_y(image),
        rgb_to_y(reference),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    assert ssim_y(image, reference) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_ssim_of_equal_images_is_one_and_of_too_small_ones_an_error():
    assert ssim(noise(11, 11), noise(11, 11)) == pytest.approx(1)
    with pytest.raises(UserError, match="11x11"):
        ssim(noise(10, 30), noise(10, 30))


def test_ground_truth_is_cropped_at_bottom_and_right(small_set):
    from_files = evaluate_pairs(bicubic(2), small_set, small_set / "LR", scale=2)
    made_here = evaluate_pairs(bicubic(2), small_set / "HR", scale=2)
    assert [score.name for score in from_files.images] == ["a", "b"]
    assert from_files.images == made_here.images


def test_mean_is_the_mean_of_the_image_scores(small_set):
    result = evaluate_pairs(bicubic(2), small_set, scale=2)
    assert result.mean.psnr_y == pytest.approx(np.mean([score.psnr_y for score in result.images]))


@pytest.mark.parametrize(
    ("hr_name", "lr_name"),
    [
        ("x", "X2/xx2"),
        ("x", "xx2"),
        ("x", "x_LRBI_x2"),
        ("x_HR_x2", "x2/x_LRBI_x2"),
        ("x", "x"),
    ],
)
def test_the_layouts_of_the_field_are_found(tmp_path, hr_name, lr_name):
    save(tmp_path / "HR" / f"{hr_name}.png", noise(24, 24))
    save(tmp_path / "LR" / f"{lr_name}.png", noise(12, 12))
    (pair,) = find_pairs(tmp_path, tmp_path / "LR", 2)
    assert pair.name == "x"
    assert pair.other == tmp_path / "LR" / f"{lr_name}.png"


def test_a_grey_ground_truth_is_replicated(tmp_path):
    grey = noise(40, 40, channels=1)[..., 0]
    save(tmp_path / "grey" / "a.png", grey)
    save(tmp_path / "colour" / "a.png", np.stack([grey] * 3, axis=-1))
    grey_score = evaluate_pairs(bicubic(2), tmp_path / "grey", scale=2).images
    assert grey_score == evaluate_pairs(bicubic(2), tmp_path / "colour", scale=2).images


def test_sizes_that_do_not_fit_are_named(small_set):
    for name in "ab":
        save(small_set / "wrong" / f"{name}.png", noise(20, 26))
    with pytest.raises(UserError, match=r"a\.png \(52x40\) and a\.png do not fit: at scale 3"):
        evaluate_pairs(bicubic(3), small_set, small_set / "wrong", scale=3)


@pytest.mark.parametrize("damage", ["missing_partner", "no_folder", "empty_folder", "text_image"])
def test_bad_folders_are_refused_in_one_line(small_set, damage):
    low_res = small_set / "LR"
    if damage == "missing_partner":
        (low_res / "X2" / "bx2.png").unlink()
    elif damage == "no_folder":
        low_res = small_set / "nowhere"
    elif damage == "empty_folder":
        low_res = small_set / "empty"
        low_res.mkdir()
    else:
        (low_res / "X2" / "bx2.png").write_text("not an image")
    with pytest.raises(UserError) as error:
        evaluate_pairs(bicubic(2), small_set, low_res, scale=2)
    assert "\n" not in str(error.value)
