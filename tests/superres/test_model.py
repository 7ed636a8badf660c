"""The network: equal to the official code, at home on every size, and exact where it is rewritten for speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tenfold.superres.checkpoint import infer_config, to_ours
from tenfold.superres.config import HiTConfig
from tenfold.superres.maps import pad_by_reflection, reflected_indices
from tenfold.superres.model import (
    HiT,
    PositionBias,
    SpatialChannelCorrelation,
    initialise,
)

PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"
FIXTURES = sorted(path.name.removesuffix(".json") for path in PARITY.glob("*.json"))
WITH_INTERMEDIATES = ["tiny_sir_x2", "tiny_sng_x2", "tiny_srf_x2"]
VARIANTS = ["sir", "srf", "sng"]


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load_fixture(name: str) -> tuple[HiT, dict[str, Tensor]]:
    official = load_file(PARITY / f"{name}.state.safetensors")
    model = HiT(infer_config(official, json.loads((PARITY / f"{name}.json").read_text())["config"]))
    model.load_state_dict(to_ours(official))
    return model.eval(), load_file(PARITY / f"{name}.io.safetensors")


def tiny(variant: str, ratios: tuple[float, ...] = (0.5, 1.0, 8.0), seed: int = 0, **changes) -> HiT:
    """A small network whose every weight matters: with the published start, correlations would be almost zero."""
    torch.manual_seed(seed)
    settings = {"scale": 2, "width": 20, "depths": (len(ratios),), "heads": (2,), "window_ratios": ratios}
    model = HiT(HiTConfig(variant=variant, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_correlation(variant: str, window: int) -> SpatialChannelCorrelation:
    return tiny(variant, (window / 8,)).blocks[0].layers[0].correlation


# ---------------------------------------------------------------- parity with the official code


def test_every_fixture_is_tested():
    assert len(FIXTURES) == 11
    assert {
        name for name in FIXTURES if any("mid0." in key for key in load_file(PARITY / f"{name}.io.safetensors"))
    } == set(WITH_INTERMEDIATES)


@pytest.mark.parametrize("name", FIXTURES)
def test_outputs_equal_those_of_the_official_code(name):
    model, tensors = load_fixture(name)
    inputs = sorted(key for key in tensors if key.startswith("in"))
    assert inputs
    for key in inputs:
        with torch.inference_mode():
            output = model(tensors[key])
        torch.testing.assert_close(output, tensors[key.replace("in", "out")], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", WITH_INTERMEDIATES)
def test_intermediate_features_equal_those_of_the_official_code(name):
    model, tensors = load_fixture(name)
    found: dict[str, Tensor] = {}

    def keep(key, flat=False):
        def hook(module, arguments, output):
            found[key] = output.flatten(1, 2) if flat else output

        return hook

    def keep_uncropped(key):
        def hook(module, arguments, output):
            if key not in found:  # the call below comes here again
                found[key] = output
                found[key] = module(pad_by_reflection(arguments[0], module.padding_multiple))

        return hook

    model.conv_first.register_forward_hook(keep("conv_first"))
    model.conv_after_body.register_forward_hook(keep("conv_after_body"))
    model.blocks[0].register_forward_hook(keep("layer0.out", flat=True))
    for index, layer in enumerate(model.blocks[0].layers):
        layer.correlation.features.register_forward_hook(keep(f"layer0.block{index}.dfe", flat=True))
        layer.correlation.register_forward_hook(keep_uncropped(f"layer0.block{index}.scc"))
        layer.register_forward_hook(keep(f"layer0.block{index}.out", flat=True))
    output = model(tensors["in0"])  # with gradients: the plain run, module by module

    torch.testing.assert_close(output, tensors["out0"], atol=2e-5, rtol=0)
    expected = {key.removeprefix("mid0."): tensor for key, tensor in tensors.items() if key.startswith("mid0.")}
    assert len(expected) >= 9 and expected.keys() <= found.keys()
    for key, tensor in expected.items():
        ours = found[key].detach()
        torch.testing.assert_close(ours, tensor, atol=5e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


# ---------------------------------------------------------------- sizes and padding


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (17, 17), (33, 33)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size_gives_a_finite_picture_of_the_right_size(variant, size):
    model = tiny(variant, scale=3)
    with torch.no_grad():
        output = model(torch.rand(2, 3, *size))
    assert output.shape == (2, 3, 3 * size[0], 3 * size[1])
    assert output.isfinite().all() and output.std() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_grey_pictures_and_oblong_base_windows_work(variant):
    model = tiny(variant, (0.5, 1.0, 2.0), channels=1, base_window=(4, 8))
    with torch.no_grad():
        image = torch.rand(1, 1, 9, 21)
        output = model(image)
    assert output.shape == (1, 1, 18, 42) and output.isfinite().all()
    assert model.mean.tolist() == [[[[0.0]]]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_a_batch_do_not_touch_each_other(variant):
    model, images = tiny(variant), torch.rand(3, 3, 11, 9)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 70), extra=st.integers(0, 200))
def test_repeated_reflection_is_a_triangle_wave(size, extra):
    position, direction, visited = 0, 1, []
    for _ in range(size + extra):  # a ball that bounces between the first and the last pixel
        visited.append(position)
        if size > 1:
            if not 0 <= position + direction < size:
                direction = -direction
            position += direction
    assert reflected_indices(size, extra, torch.device("cpu")).tolist() == visited[size:]


@settings(deadline=None, max_examples=30)
@given(height=st.integers(1, 40), width=st.integers(1, 40), multiple=st.tuples(st.integers(1, 33), st.integers(1, 33)))
def test_padding_is_the_least_that_fits_and_keeps_the_picture(height, width, multiple):
    x = torch.arange(2.0 * height * width).view(1, height, width, 2)
    padded = pad_by_reflection(x, multiple)
    assert all(
        side % factor == 0 and 0 <= side - before < factor
        for side, before, factor in zip(padded.shape[1:3], (height, width), multiple, strict=True)
    )
    assert torch.equal(padded[:, :height, :width], x)
    bottom, right = padded.shape[1] - height, padded.shape[2] - width
    if bottom < height and right < width:  # as far as torch can reflect
        expected = F.pad(x.permute(0, 3, 1, 2), (0, right, 0, bottom), mode="reflect").permute(0, 2, 3, 1)
        assert torch.equal(padded, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_map_gives_the_result_of_the_unpadded_one(variant):
    correlation = tiny_correlation(variant, 8)
    x = torch.randn(1, 13, 21, 20)
    with torch.no_grad():
        plain = correlation(x)
        padded = correlation(pad_by_reflection(x, correlation.padding_multiple))
    assert plain.shape == x.shape
    torch.testing.assert_close(padded[:, :13, :21], plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["sir", "srf"])
def test_padding_does_not_change_interior_pixels(variant):
    correlation = tiny_correlation(variant, 8)
    full = torch.randn(1, 24, 24, 20)
    with torch.no_grad():
        whole = correlation(full)
        cut = correlation(full[:, :21, :21])  # its last windows hold 3 reflected rows and columns
    # A pixel knows its window and the one pixel around it that the 3x3 convolution sees.
    torch.testing.assert_close(cut[:, :16, :16], whole[:, :16, :16], atol=1e-6, rtol=0)
    assert (cut[:, 16:, 16:] - whole[:, 16:21, 16:21]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("window", "in_phase"), [(4, True), (8, True), (16, True), (32, True), (64, True), (48, False)]
)
def test_a_crop_shifted_by_64_pixels_differs_only_where_64_is_no_multiple_of_the_window(window, in_phase):
    correlation = tiny_correlation("sir", window)
    full = torch.randn(1, window, 192, 20)
    with torch.no_grad():
        whole = correlation(full)[:, :, 64:]
        crop = correlation(full[:, :, 64:])
    # The crop's first window lost its left neighbour.
    difference = (whole - crop)[:, :, window:].abs().max() if window < 128 else None
    if in_phase:
        assert difference <= 1e-5
    else:
        assert difference > 1e-2


def test_the_result_depends_on_the_window_phase():
    model = tiny("sir", (0.5, 1.0, 2.0))
    image = torch.rand(1, 3, 16, 128)
    with torch.no_grad():
        whole = model(image)
        by_shift = {shift: (model(image[..., shift:]) - whole[..., 2 * shift :]).abs() for shift in (64, 60)}
    inner = {shift: difference[..., -32:].max() for shift, difference in by_shift.items()}  # far from the cut
    assert inner[64] < 1e-3 * inner[60]


# ---------------------------------------------------------------- position bias


WINDOWS = {  # window: cell
    (4, 4): (1, 1),
    (8, 8): (1, 1),
    (16, 16): (2, 2),
    (32, 32): (4, 4),
    (48, 48): (6, 6),
    (64, 64): (8, 8),
    (16, 8): (2, 1),
    (4, 24): (1, 3),
    (24, 64): (3, 8),
}


def random_bias(window: tuple[int, int], heads: int = 3) -> PositionBias:
    torch.manual_seed(sum(window))
    return PositionBias(3, heads, window, WINDOWS[window]).eval()


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_position_bias_is_the_mean_over_the_pixels_of_a_cell(window):
    bias = random_bias(window)
    (height, width), (cell_y, cell_x) = window, WINDOWS[window]
    offsets = torch.tensor([[dy, dx] for dy in range(1 - height, height) for dx in range(1 - width, width)]).float()
    table = bias.pos3(bias.pos2(bias.pos1(bias.pos_proj(offsets)))).double().t()
    table = table.reshape(3, 2 * height - 1, 2 * width - 1)  # by offset query - key
    expected = torch.zeros(3, height // cell_y, width // cell_x, height, width, dtype=torch.double)
    for key_y in range(height):
        for key_x in range(width):
            rows, columns = (
                slice(height - 1 - key_y, 2 * height - 1 - key_y),
                slice(width - 1 - key_x, 2 * width - 1 - key_x),
            )
            expected[:, key_y // cell_y, key_x // cell_x] += table[:, rows, columns] / (cell_y * cell_x)
    found = bias()
    assert found.shape == (3, (height // cell_y) * (width // cell_x), height * width)
    torch.testing.assert_close(found, expected.view(found.shape).float(), atol=1e-6, rtol=0)


def scale_in_place(layer):
    layer.position_bias.pos3[2].bias.mul_(2)


def scale_the_summary(layer):
    layer.spatial_linear.weight.mul_(2)


def load_other_weights(layer):
    layer.load_state_dict(tiny("sir", (2.0,), seed=99).blocks[0].layers[0].correlation.state_dict())


def optimise(layer):
    with torch.enable_grad():
        optimizer = torch.optim.Adam(layer.position_bias.parameters(), lr=0.1)
        layer.position_bias().square().sum().backward()
        optimizer.step()


def exchange_a_parameter(layer):
    layer.position_bias.pos3[2].bias = torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    "change", [scale_in_place, scale_the_summary, load_other_weights, optimise, exchange_a_parameter]
)
@torch.no_grad()
def test_what_is_kept_outside_of_training_is_renewed_when_a_weight_changes(change):
    model, image = tiny("sir", (2.0,)), torch.rand(1, 3, 16, 24)
    before = model(image)
    assert torch.equal(model(image), before)
    change(model.blocks[0].layers[0].correlation)
    after = model(image)
    assert (after - before).abs().max() > 1e-3
    with torch.enable_grad():
        renewed = model(image)  # computes everything anew
    torch.testing.assert_close(after, renewed.detach(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_is_kept_follows_the_dtype():
    model, image = tiny("sir", (2.0,)), torch.rand(1, 3, 16, 24)
    single = model(image)
    double = model.double()(image.double())
    assert double.dtype == torch.double
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- gradients, precision, initialisation


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_finite_gradient(variant):
    model = tiny(variant).train()
    model(torch.rand(2, 3, 12, 20)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    untouched = [name for name, p in model.named_parameters() if not p.grad.any() and "position_bias" not in name]
    assert not untouched


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_slopes(variant):
    model = tiny(variant, (0.5, 2.0)).double()
    image = torch.rand(1, 3, 9, 14, dtype=torch.double)
    parameters = list(model.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def loss():
        return model(image).square().mean()

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((gradient * d).sum()) for gradient, d in zip(gradients, directions, strict=True))
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):  # one step forward, then two back
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny_srf_x2", "tiny_sng_x2"])
def test_half_precision_stays_finite_and_near(name, dtype):
    model, tensors = load_fixture(name)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        output = model(tensors["in2"]).float()
    assert output.isfinite().all()
    # The fixtures' random weights give outputs with a standard deviation near 1.
    relative = (output - tensors["out2"]).std() / tensors["out2"].std()
    assert relative < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_sums_over_a_large_window_do_not_overflow_in_half_precision():
    model = tiny("sir", (8.0,))
    with torch.no_grad():
        model.blocks[0].layers[0].correlation.features.expand.bias.fill_(60)  # queries and values in the hundreds
        expected = model(torch.rand(1, 3, 64, 64))
        with torch.autocast("cpu", torch.float16):
            output = model(torch.rand(1, 3, 64, 64))
    assert expected.isfinite().all() and output.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_initialisation(variant):
    torch.manual_seed(0)
    model = HiT(HiTConfig(variant=variant, width=60, depths=(2,), heads=(6,)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    initialise(model)
    layer = model.blocks[0].layers[0]
    for linear in (layer.mlp.fc1, layer.mlp.fc2, layer.correlation.proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    for name in ("features.squeeze", "features.expand", "features.linear"):  # convolutions of the official code
        key = f"blocks.0.layers.0.correlation.{name}.weight"
        assert torch.equal(model.get_parameter(key), before[key])
    assert torch.equal(model.conv_first.weight, before["conv_first.weight"])
    assert (layer.norm1.weight == 1).all() and not layer.norm1.bias.any()
    if variant == "sng":
        table = layer.correlation.context.attention.relative_position_bias_table
        assert 0.01 < table.std().item() < 0.03
