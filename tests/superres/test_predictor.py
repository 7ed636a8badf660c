from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.images import Picture
from tenfold.superres import Upscaler
from tenfold.superres.config import HiTConfig
from tenfold.superres.evaluation import psnr
from tenfold.superres.model import HiT
from tenfold.superres.predictor import fill_hidden_color
from tenfold.superres.training import initialise_bicubic

FIXTURES = Path(__file__).parents[1] / "data" / "superres" / "parity"


@pytest.fixture(scope="module")
def official():
    """The fixture of the official code at x2, with random weights."""
    return Upscaler.from_pretrained(FIXTURES / "tiny_srf_x2.state.safetensors", device="cpu")


@pytest.fixture(scope="module")
def upscaler():
    """A small network that starts at bicubic interpolation: its outputs look like pictures."""
    return Upscaler(small_network())


def small_network(scale=2, channels=3, variant="sir"):
    torch.manual_seed(0)
    config = HiTConfig(variant, scale, channels, 30, (2,), (3,), window_ratios=(0.5, 1.0))
    model = HiT(config)
    initialise_bicubic(model)
    with torch.no_grad():
        model.conv_after_body.weight.normal_(0, 0.003)  # or nothing but the bicubic path would reach the output
    return model.eval()


def photo(height=20, width=28, channels=3, dtype=np.uint8, seed=0):
    """A smooth picture with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.sin(y[..., None] / 5 + np.arange(channels)) * np.cos(x[..., None] / 7) * 0.4 + 0.5
    values = (waves + rng.normal(0, 0.02, waves.shape)).clip(0, 1)
    values = values if channels > 1 else values[..., 0]
    return (
        values.astype(dtype)
        if np.issubdtype(dtype, np.floating)
        else np.rint(values * np.iinfo(dtype).max).astype(dtype)
    )


# ---------------------------------------------------------------- what comes out is what the network says


def test_output_is_the_clipped_network_output_rounded_half_to_even(official):
    image = photo()
    with torch.no_grad():
        raw = official.model(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    expected = np.rint(raw[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255)
    result = official.upscale(image)
    assert result.scale == 2
    assert result.seconds > 0
    assert result.method
    assert np.abs(result.image.astype(int) - expected).max() <= 1
    assert (result.image != expected).mean() < 1e-3


@settings(deadline=None, max_examples=12)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_every_size_gives_a_picture_exactly_s_times_larger(official, height, width):
    result = official.upscale(photo(height, width))
    assert result.image.shape == (2 * height, 2 * width, 3)


def test_the_layouts_of_numpy_and_torch_give_the_same_picture(upscaler):
    image = photo(dtype=np.float32)
    from_array = upscaler.upscale(image).image
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    np.testing.assert_array_equal(upscaler.upscale(tensor).image.permute(1, 2, 0).numpy(), from_array)
    batch = upscaler.upscale(torch.stack([tensor, tensor.flip(1)])).image
    assert batch.shape == (2, 3, 40, 56)
    np.testing.assert_array_equal(batch[0].permute(1, 2, 0).numpy(), from_array)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((6, 9), np.uint8),
        ((6, 9, 1), np.uint8),
        ((6, 9, 2), np.uint16),
        ((6, 9, 3), np.float16),
        ((6, 9, 3), np.float64),
        ((6, 9, 4), np.uint8),
        ((6, 9, 4), np.float32),
    ],
)
def test_arrays_keep_their_layout_and_sample_type(upscaler, shape, dtype):
    result = upscaler.upscale(np.ones(shape, dtype))
    assert result.image.shape == (12, 18, *shape[2:])
    assert result.image.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_tensors_keep_their_sample_type(upscaler, dtype):
    result = upscaler.upscale(torch.rand(4, 6, 9).to(dtype))
    assert result.image.shape == (4, 12, 18)
    assert result.image.dtype == dtype


@pytest.mark.parametrize(
    ("mode", "out_mode"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "LA"),
        ("P", "RGB"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("CMYK", "RGB"),
        ("I;16", "I;16"),
        ("F", "F"),
    ],
)
def test_pillow_images_come_back_as_pillow_images(upscaler, mode, out_mode):
    result = upscaler.upscale(Image.new(mode, (9, 6))).image
    assert isinstance(result, Image.Image)
    assert (result.mode, result.size) == (out_mode, (18, 12))


def test_a_path_gives_a_picture_that_keeps_profile_and_exif(upscaler, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "A maker"
    Image.fromarray(photo()).save(tmp_path / "x.png", exif=exif, icc_profile=b"not looked into")
    result = upscaler.upscale(tmp_path / "x.png")
    assert isinstance(result.image, Picture)
    assert result.image.pixels.shape == (56, 40, 3)  # turned upright
    assert result.image.icc == b"not looked into"
    block = Image.Exif()
    block.load(result.image.exif)
    assert (block[0x0112], block[0x010F]) == (1, "A maker")


def test_save_writes_every_family(upscaler, tmp_path):
    for index, image in enumerate(
        [photo(), Image.fromarray(photo()), torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), photo(dtype=np.uint16)]
    ):
        upscaler.upscale(image).save(tmp_path / f"{index}.png")
        assert images.read(tmp_path / f"{index}.png").width % 2 == 0
    with pytest.raises(UserError, match="batch"):
        upscaler.upscale(torch.rand(2, 3, 8, 8)).save(tmp_path / "batch.png")


# ---------------------------------------------------------------- grey, depth, alpha


def test_grey_stays_grey_and_equals_the_mean_of_the_colour_run(upscaler):
    grey = photo(channels=1)
    colour = upscaler.upscale(np.stack([grey] * 3, axis=-1).astype(np.float32) / 255).image
    result = upscaler.upscale(grey).image
    assert result.ndim == 2
    np.testing.assert_allclose(result, colour.mean(2) * 255, atol=0.51)


def test_sixteen_bits_are_more_than_256_levels(upscaler):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (16, 1))
    result = upscaler.upscale(np.stack([ramp] * 3, axis=-1)).image
    assert result.dtype == np.uint16
    assert len(np.unique(result)) > 256


@pytest.mark.parametrize("opaque", [255, 65535, 1.0])
def test_an_opaque_alpha_changes_nothing(upscaler, opaque):
    dtype = {255: np.uint8, 65535: np.uint16, 1.0: np.float32}[opaque]
    colour = photo(dtype=dtype)
    result = upscaler.upscale(np.dstack([colour, np.full(colour.shape[:2], opaque, dtype)])).image
    np.testing.assert_array_equal(result[..., :3], upscaler.upscale(colour).image)
    assert (result[..., 3] == opaque).all()


def test_hidden_colour_does_not_leak_into_what_is_seen(upscaler):
    alpha = np.zeros((24, 24), np.uint8)
    alpha[:, 12:] = 255
    red_on = {name: np.dstack([np.full((24, 24, 3), (255, 0, 0), np.uint8), alpha]) for name in ("green", "black")}
    red_on["green"][:, :12, :3] = (0, 255, 0)
    red_on["black"][:, :12, :3] = 0
    green, black = (upscaler.upscale(image).image for image in red_on.values())
    seen = green[..., 3] > 0
    np.testing.assert_array_equal(green[seen], black[seen])
    red = upscaler.upscale(np.full((24, 24, 3), (255, 0, 0), np.uint8)).image
    np.testing.assert_array_equal(green[seen][:, :3], red[seen])


def test_alpha_is_upscaled_by_the_network_as_a_grey_picture(upscaler):
    alpha = photo(channels=1)
    image = np.dstack([photo(), alpha])
    np.testing.assert_array_equal(upscaler.upscale(image).image[..., 3], upscaler.upscale(alpha).image)


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 17), width=st.integers(1, 17), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_filling_keeps_visible_colour_and_takes_hidden_colour_from_it(height, width, seed, share):
    generator = torch.Generator().manual_seed(seed)
    alpha = (torch.rand(1, 1, height, width, generator=generator) < share).float()
    color = torch.rand(1, 3, height, width, generator=generator)
    filled = fill_hidden_color(color, alpha)
    visible = (alpha > 0).expand_as(color)
    assert torch.equal(filled[visible], color[visible])
    if visible.any():
        for channel in range(3):
            seen = color[0, channel][alpha[0, 0] > 0]
            assert filled[0, channel].min() >= seen.min() - 1e-5
            assert filled[0, channel].max() <= seen.max() + 1e-5


def test_filled_colour_is_that_of_the_neighbour():
    color = torch.zeros(1, 1, 1, 64)
    color[..., 0], color[..., 63] = 0.2, 0.9
    alpha = torch.zeros(1, 1, 1, 64)
    alpha[..., 0], alpha[..., 63] = 1, 1
    filled = fill_hidden_color(color, alpha)[0, 0, 0]
    assert filled[5] == pytest.approx(0.2)
    assert filled[60] == pytest.approx(0.9)


def test_a_grey_network_takes_colour_channel_by_channel():
    grey_network = Upscaler(small_network(channels=1))
    image = photo()
    result = grey_network.upscale(image).image
    for channel in range(3):
        np.testing.assert_array_equal(result[..., channel], grey_network.upscale(image[..., channel]).image)


# ---------------------------------------------------------------- options


def test_self_ensemble_is_the_mean_over_the_symmetries_of_the_square(official):
    image = photo(12, 17, dtype=np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    views = []
    with torch.no_grad():
        for turns in range(4):
            for mirrored in (False, True):
                seen = tensor.flip(3) if mirrored else tensor
                output = official.model(torch.rot90(seen, turns, (2, 3)).contiguous())
                output = torch.rot90(output, -turns, (2, 3))
                views.append(output.flip(3) if mirrored else output)
    expected = torch.stack(views).mean(0).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(official.upscale(image, self_ensemble=True).image, expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("variant", ["sir", "srf", "sng"])
def test_half_precision_is_finite_and_close(precision, variant, capsys):
    model = small_network(variant=variant)
    image = photo(32, 40)
    full = Upscaler(model).upscale(image).image
    half = Upscaler(model, precision).upscale(image).image
    assert "slower" in capsys.readouterr().err
    assert psnr(half, full) > 45


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_leaves_nothing_behind_in_the_network(precision):
    image = photo(32, 40, dtype=np.float32)
    before = Upscaler(small_network()).upscale(image).image
    model = small_network()
    Upscaler(model, precision).upscale(image)
    np.testing.assert_array_equal(Upscaler(model).upscale(image).image, before)


def test_sums_over_a_window_do_not_overflow_in_fp16():
    layer = HiT(HiTConfig("sir", 2, 3, 30, (1,), (3,), window_ratios=(8.0,))).eval().blocks[0].layers[0].correlation
    windows = torch.full((1, 64 * 64, 30), 30.0)  # 4096 x 30 x 30 is far above 65504, the largest fp16
    with torch.no_grad():
        expected = layer.correlate(windows)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(layer.correlate(windows.half()), expected)


def test_progress_runs_from_zero_to_one(upscaler):
    seen = []
    upscaler.upscale(np.dstack([photo(), photo(channels=1)]), self_ensemble=True, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) >= 16
    assert seen[-1] == 1


def test_the_model_is_left_as_it_was_and_no_graph_is_kept(upscaler):
    result = upscaler.upscale(torch.rand(3, 8, 8)).image
    assert not result.requires_grad
    assert not result.is_inference()
    assert all(parameter.grad is None for parameter in upscaler.model.parameters())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((8, 9, 5), np.uint8), "1 to 4 channels"),
        (np.zeros((8,), np.uint8), "1 to 4 channels"),
        (np.zeros((0, 9, 3), np.uint8), "empty"),
        (np.zeros((8, 9, 3), np.int64), "int64"),
        (np.zeros((8, 9, 3), bool), "bool"),
        (np.full((8, 9, 3), np.nan, np.float32), "NaN"),
        (np.full((8, 9, 3), 255.0, np.float32), r"\[0, 1\]"),
        (torch.zeros(8, 9, 3), "permute"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), "float tensor"),
        (torch.zeros(3, 0, 9), "empty"),
        (torch.full((3, 8, 9), torch.inf), "infinite"),
        (None, "NoneType"),
        ("no/such/file.png", "no such file"),
    ],
)
def test_bad_images_are_refused_in_one_line(upscaler, image, words):
    with pytest.raises(UserError, match=words) as error:
        upscaler.upscale(image)
    assert "\n" not in str(error.value)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        Upscaler(small_network(), "int8")  # type: ignore[arg-type]
