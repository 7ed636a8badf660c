import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.core.console import UserError
from tenfold.superres.resize import axis_weights, imresize_matlab, resize_to

BORDERS = ("mirror", "clamp")


def brute_force_line(line, out_length, scale, border):
    """One line of pixels by the textbook formula, a pixel and a tap at a time."""

    def kernel(x):
        x = abs(x)
        if x <= 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

    n, shrink = len(line), min(scale, 1.0)
    result = []
    for out in range(1, out_length + 1):
        centre = out / scale + 0.5 * (1 - 1 / scale)
        total = weight_sum = 0.0
        for tap in range(math.floor(centre - 2 / shrink) - 1, math.ceil(centre + 2 / shrink) + 2):
            if border == "clamp":
                source = min(max(tap, 1), n)
            else:
                source = (tap - 1) % (2 * n) + 1
                source = source if source <= n else 2 * n + 1 - source
            weight = kernel(shrink * (centre - tap))
            total += weight * line[source - 1]
            weight_sum += weight
        result.append(total / weight_sum)
    return result


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 23),
    scale=st.sampled_from([1 / 4, 1 / 3, 1 / 2, 0.4, 1.0, 1.7, 2.0, 3.0, 4.0]),
    border=st.sampled_from(BORDERS),
    seed=st.integers(0, 999),
)
def test_axis_equals_the_textbook_sum(length, scale, border, seed):
    line = np.random.default_rng(seed).random(length)
    out_length = math.ceil(length * scale)
    indices, weights = axis_weights(length, out_length, scale, border)
    np.testing.assert_allclose(
        (weights * line[indices]).sum(1), brute_force_line(line, out_length, scale, border), atol=1e-12
    )


def test_height_is_resized_first_and_rounded_half_up_in_between():
    image = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)

    def rounded(values):
        return np.floor(np.array(values) + 0.5).clip(0, 255)

    columns = np.stack([rounded(brute_force_line(image[:, x], 6, 0.5, "mirror")) for x in range(20)], axis=1)
    expected = np.stack([rounded(brute_force_line(columns[y], 10, 0.5, "mirror")) for y in range(6)])
    np.testing.assert_array_equal(imresize_matlab(image, 0.5), expected)


def test_the_smaller_factor_goes_first():
    image = np.random.default_rng(1).integers(0, 256, (20, 20), dtype=np.uint8)
    np.testing.assert_array_equal(resize_to(image, (30, 8)), resize_to(image.T.copy(), (8, 30)).T)


@pytest.mark.parametrize(("border", "folder"), [("mirror", "LR_bicubic"), ("clamp", "LR_bicubic_clamp")])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_not_one_pixel_of_the_published_low_res_files_differs(data_root, border, folder, scale):
    root = data_root / "superres" / "Set5"
    files = sorted((root / folder / f"X{scale}").glob("*.png"))
    assert len(files) == 5
    for file in files:
        high_res = np.array(Image.open(root / "HR" / file.name.replace(f"x{scale}", "")))
        height, width = (side - side % scale for side in high_res.shape[:2])
        made = imresize_matlab(high_res[:height, :width], Fraction(1, scale), border)
        assert np.count_nonzero(made != np.array(Image.open(file))) == 0, file


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), s=st.sampled_from([2, 3, 4]), border=st.sampled_from(BORDERS)
)
def test_output_size_is_the_ceiling_and_a_flat_image_stays_flat(height, width, s, border):
    image = np.full((height, width, 3), 77, np.uint8)
    small = imresize_matlab(image, Fraction(1, s), border)
    assert small.shape == (-(-height // s), -(-width // s), 3)
    large = imresize_matlab(image, s, border)
    assert large.shape == (height * s, width * s, 3)
    assert (small == 77).all()
    assert (large == 77).all()


def test_borders_differ_only_near_the_edge():
    image = np.random.default_rng(2).integers(0, 256, (64, 64), dtype=np.uint8)
    differs = imresize_matlab(image, 0.5, "mirror") != imresize_matlab(image, 0.5, "clamp")
    assert differs.any()
    assert not differs[2:-2, 2:-2].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_dtype_is_kept_and_integers_are_clipped_but_floats_overshoot(dtype):
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1.0
    image = np.zeros((8, 8), dtype)
    image[:, 4:] = top
    large = imresize_matlab(image, 4)
    assert large.dtype == dtype
    if np.issubdtype(dtype, np.integer):
        assert (large.min(), large.max()) == (0, top)
    else:
        assert large.min() < 0
        assert large.max() > 1


def test_channels_do_not_mix():
    image = np.random.default_rng(3).integers(0, 256, (17, 23, 4), dtype=np.uint8)
    together = imresize_matlab(image, Fraction(1, 3))
    for channel in range(4):
        np.testing.assert_array_equal(together[..., channel], imresize_matlab(image[..., channel], Fraction(1, 3)))


@pytest.mark.parametrize(
    ("image", "scale", "border"),
    [
        (np.zeros((4, 4), np.int32), 2, "mirror"),
        (np.zeros((4,), np.uint8), 2, "mirror"),
        (np.zeros((0, 4), np.uint8), 2, "mirror"),
        (np.zeros((4, 4), np.uint8), 0, "mirror"),
        (np.zeros((4, 4), np.uint8), float("nan"), "mirror"),
        (np.zeros((4, 4), np.uint8), 2, "wrap"),
    ],
)
def test_bad_input_is_refused_in_one_line(image, scale, border):
    with pytest.raises(UserError) as error:
        imresize_matlab(image, scale, border)
    assert "\n" not in str(error.value)
