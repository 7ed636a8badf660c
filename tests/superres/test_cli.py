"""The verbs as a user calls them: what they print, leave behind and return."""

import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import types
import zlib
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tenfold import cli as front_door
from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.images import Picture
from tenfold.core.video import VideoReader, VideoWriter
from tenfold.superres import predictor
from tenfold.superres.cli import parse_bytes, parse_size, parse_tile
from tenfold.superres.evaluation import make_low_res

PARITY = Path(__file__).parents[1] / "data" / "superres" / "parity"
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
X2 = str(PARITY / "tiny_srf_x2.state.safetensors")
X3 = str(PARITY / "tiny_sir_x3.state.safetensors")


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `tenfold superres ...`: exit status, standard output, standard error."""
    monkeypatch.setenv("TENFOLD_THREADS", "1")  # the networks here are too small for more

    def call(*arguments):
        status = front_door.main(["superres", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def picture(height=8, width=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three small pictures."""
    for seed, name in enumerate("abc"):
        path = tmp_path / "in" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(seed=seed)).save(path)
    return tmp_path / "in"


def tree(path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file())


# ---------------------------------------------------------------- upscale: what works


def test_a_picture_is_enlarged_into_the_output_folder(run, folder, tmp_path):
    status, out, err = run("upscale", folder / "a.png", "-o", tmp_path / "out", "--model", X2)
    assert (status, err) == (0, "")
    assert "24x16" in out
    expected = predictor.Upscaler.from_pretrained(X2).upscale(picture()).image
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out" / "a.png")), expected)


def follows_schema(text, name):
    """The object that a verb printed, checked against the schema that the documents promise."""
    found = json.loads(text)
    jsonschema.validate(found, json.loads((SCHEMAS / f"{name}.json").read_text()))
    return found


def test_json_has_one_entry_for_each_file(run, folder, tmp_path):
    (folder / "d.png").write_bytes(b"no picture")
    status, out, _ = run("upscale", folder, "-o", tmp_path / "out", "--model", X2, "--json")
    assert status == 1
    found = follows_schema(out, "superres-batch")
    assert [(item["status"], item["error"] is None) for item in found["files"]] == [("done", True)] * 3 + [
        ("failed", False)
    ]
    assert [(item["outcome"]["width"], item["outcome"]["height"]) for item in found["files"][:3]] == [(24, 16)] * 3
    assert (found["done"], found["skipped"], found["failed"]) == (3, 0, 1)


def test_the_json_of_every_quick_verb_follows_its_schema(run, folder, tmp_path):
    for arguments, schema in (
        (("downscale", folder, "-o", tmp_path / "low", "--scale", "2", "4"), "superres-batch"),
        (("evaluate", large(tmp_path), "--model", X2), "superres-evaluate"),
        (("evaluate", large(tmp_path), "--super-res", large(tmp_path), "--scale", "2"), "superres-evaluate"),
        (("inspect", X2), "superres-inspect"),
    ):
        status, out, err = run(*arguments, "--json")
        assert status == 0, err
        follows_schema(out, schema)


def large(tmp_path):
    """A folder with a picture that is large enough to be scored."""
    (tmp_path / "large").mkdir(exist_ok=True)
    Image.fromarray(picture(32, 32)).save(tmp_path / "large" / "a.png")
    return tmp_path / "large"


def save_palette(path):
    Image.fromarray(picture()).convert("P").save(path)


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(path, exif=exif)


def save_animation(path):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "save", "size", "mode"),
    [
        ("one.png", lambda path: Image.new("RGB", (1, 1), "red").save(path), (2, 2), "RGB"),
        ("thin.png", lambda path: Image.new("RGB", (1, 40), "red").save(path), (2, 80), "RGB"),
        ("bits.png", lambda path: Image.new("1", (12, 8)).save(path), (24, 16), "L"),
        ("grey.png", lambda path: Image.new("L", (12, 8)).save(path), (24, 16), "L"),
        ("grey_alpha.png", lambda path: Image.new("LA", (12, 8)).save(path), (24, 16), "LA"),
        ("alpha.png", lambda path: Image.new("RGBA", (12, 8)).save(path), (24, 16), "RGBA"),
        ("palette.png", save_palette, (24, 16), "RGB"),
        ("cmyk.jpg", lambda path: Image.new("CMYK", (12, 8)).save(path), (24, 16), "RGB"),
        ("animated.gif", save_animation, (24, 16), "RGB"),
        ("rotated.jpg", save_rotated, (16, 24), "RGB"),
        ("bitmap.bmp", lambda path: Image.new("RGB", (12, 8)).save(path), (24, 16), "RGB"),
        ("web.webp", lambda path: Image.new("RGBA", (12, 8), (1, 2, 3, 4)).save(path), (24, 16), "RGBA"),
        ("deep_grey.png", lambda path: Image.new("I;16", (12, 8), 999).save(path), (24, 16), "I;16"),
    ],
)
def test_every_kind_of_picture_comes_out_right(run, tmp_path, name, save, size, mode):
    save(tmp_path / name)
    status, _, _ = run("upscale", tmp_path / name, "-o", tmp_path / "out", "--model", X2)
    assert status == 0
    with Image.open(tmp_path / "out" / Path(name).with_suffix(".png")) as result:
        assert (result.size, result.mode) == (size, mode)
        assert result.getexif().get(0x0112, 1) == 1


def test_sixteen_bit_colour_stays_sixteen_bit(run, tmp_path):
    pixels = np.linspace(0, 65535, 12 * 8 * 3).astype(np.uint16).reshape(8, 12, 3)
    images.write(tmp_path / "a.png", Picture(pixels))
    images.write(tmp_path / "b.tif", Picture(pixels))
    assert run("upscale", tmp_path, "-o", tmp_path / "out", "--model", X2)[0] == 0
    assert tree(tmp_path / "out") == ["a.png", "b.tiff"]
    for name in ("a.png", "b.tiff"):
        assert images.read(tmp_path / "out" / name).pixels.dtype == np.uint16


@pytest.mark.parametrize("file_format", ["png", "jpg", "webp", "tiff"])
def test_the_format_can_be_chosen(run, folder, tmp_path, file_format):
    assert run("upscale", folder, "-o", tmp_path / "out", "--model", X2, "--format", file_format)[0] == 0
    assert tree(tmp_path / "out") == [f"{name}.{file_format}" for name in "abc"]
    assert Image.open(tmp_path / "out" / f"a.{file_format}").size == (24, 16)


def test_quality_tells(run, folder, tmp_path):
    for quality in (10, 95):
        target = tmp_path / f"{quality}.jpg"
        assert run("upscale", folder / "a.png", "-o", target, "--model", X2, "--quality", quality)[0] == 0
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize(
    ("to", "size"), [("20x20", (20, 13)), ("1000x16", (24, 16)), ("48x48", (48, 32)), ("6x6", (6, 4))]
)
def test_to_fits_into_a_size_and_keeps_the_proportions(run, folder, tmp_path, to, size):
    assert run("upscale", folder / "a.png", "-o", tmp_path / "out", "--model", X2, "--to", to)[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").size == size


@pytest.mark.parametrize(
    ("options", "size"), [([], (24, 16)), (["--scale", "4"], (48, 32)), (["--to", "40x40"], (40, 27))]
)
def test_without_a_model_the_built_in_one_of_the_scale_is_used(run, folder, tmp_path, options, size):
    assert run("upscale", folder / "a.png", "-o", tmp_path / "out", *options)[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").size == size


def test_self_ensemble_changes_the_result(run, folder, tmp_path):
    run("upscale", folder / "a.png", "-o", tmp_path / "one", "--model", X2)
    assert run("upscale", folder / "a.png", "-o", tmp_path / "eight", "--model", X2, "--self-ensemble")[0] == 0
    assert (tmp_path / "one" / "a.png").read_bytes() != (tmp_path / "eight" / "a.png").read_bytes()


def test_a_film_is_enlarged_with_its_times(run, tmp_path):
    times = [Fraction(0), Fraction(1, 25), Fraction(1, 5)]
    with VideoWriter(tmp_path / "film.mp4", 25, (16, 12), time_base=Fraction(1, 100)) as writer:
        for index, time in enumerate(times):
            writer.write(picture(12, 16, index) // 4 + 64, time)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    status, out, _ = run("upscale", tmp_path, "-o", tmp_path / "out", "--model", X2)
    assert status == 0
    assert "h264" in out
    assert tree(tmp_path / "out") == ["a.png", "film.mp4"]
    reader = VideoReader(tmp_path / "out" / "film.mp4")
    assert reader.size == (32, 24)
    assert [time for _, time in reader.timed_frames()] == times


def test_films_keep_their_container_where_the_codec_allows(run, tmp_path):
    for suffix in (".mkv", ".mov", ".avi"):
        with VideoWriter(tmp_path / f"x{suffix}", 25, (16, 12)) as writer:
            writer.write(picture(12, 16))
    assert run("upscale", tmp_path, "-o", tmp_path / "out", "--model", X2, "--to", "20x20")[0] == 0
    assert tree(tmp_path / "out") == ["x.mkv", "x.mov", "x_avi.mkv"] or tree(tmp_path / "out") == [
        "x.mov",
        "x_avi.mkv",
        "x_mkv.mkv",
    ]
    assert VideoReader(tmp_path / "out" / "x.mov").size == (20, 16)  # 15 rows, padded to an even number


# ---------------------------------------------------------------- upscale: nothing is lost


def test_an_input_is_never_overwritten(run, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run("upscale", folder, "-o", folder, "--model", X2)[0] == 0
    assert tree(folder) == ["a-x2.png", "a.png", "b-x2.png", "b.png", "c-x2.png", "c.png"]
    status, _, err = run("upscale", folder / "a.png", "-o", folder / "b.png", folder / "b.png", "--model", X2)
    assert (status, err.count("\n")) == (2, 1)
    status, _, err = run("upscale", folder / "a.png", "-o", folder / "a.png", "--model", X2)
    assert status == 2
    assert "overwritten" in err
    assert run("upscale", folder, "-o", folder, "--model", X2)[0] == 0, "results are no inputs of the next run"
    assert len(tree(folder)) == 6
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_corrupt_file_is_reported_and_the_rest_is_done(run, folder, tmp_path):
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    status, out, err = run("upscale", folder, "-o", tmp_path / "out", "--model", X2, "--json")
    assert status == 1
    assert "b.png" in err
    assert "Traceback" not in err
    assert tree(tmp_path / "out") == ["a.png", "c.png"]
    report = json.loads(out)
    assert [item["status"] for item in report["files"]] == ["done", "failed", "done"]
    assert (report["done"], report["failed"]) == (2, 1)


def test_ctrl_c_leaves_no_partial_file_and_a_rerun_resumes(run, folder, tmp_path, monkeypatch):
    upscale_planes, calls = predictor.Upscaler._upscale_planes, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return upscale_planes(self, *arguments)

    monkeypatch.setattr(predictor.Upscaler, "_upscale_planes", interrupted)
    status, _, err = run("upscale", folder, "-o", tmp_path / "out", "--model", X2)
    assert (status, err) == (130, "error: interrupted\n")
    assert tree(tmp_path / "out") == ["a.png"]
    first = (tmp_path / "out" / "a.png").stat().st_mtime_ns

    status, out, _ = run("upscale", folder, "-o", tmp_path / "out", "--model", X2, "--skip-existing")
    assert status == 0
    assert "done already" in out
    assert tree(tmp_path / "out") == ["a.png", "b.png", "c.png"]
    assert len(calls) == 4
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == first


def test_ctrl_c_in_a_film_leaves_nothing(run, tmp_path, monkeypatch):
    with VideoWriter(tmp_path / "film.mp4", 25, (16, 12)) as writer:
        for index in range(3):
            writer.write(picture(12, 16, index))

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor.Upscaler, "_upscale_planes", interrupted)
    assert run("upscale", tmp_path / "film.mp4", "-o", tmp_path / "out", "--model", X2)[0] == 130
    assert tree(tmp_path / "out") == []


def test_shards_together_do_all(run, folder, tmp_path):
    for shard in ("1/2", "2/2"):
        assert run("upscale", folder, "-o", tmp_path / shard[0], "--model", X2, "--shard", shard)[0] == 0
    assert (tree(tmp_path / "1"), tree(tmp_path / "2")) == (["a.png", "c.png"], ["b.png"])


def test_a_full_disk_is_one_line_and_what_was_there_stays(run, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"an earlier result")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        status, _, err = run("upscale", folder, "-o", tmp_path / "out", "--model", X2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert re.fullmatch(r"error: cannot write .*a\.png: .*\n", err)
    assert tree(tmp_path / "out") == ["a.png"]
    assert (tmp_path / "out" / "a.png").read_bytes() == b"an earlier result"


def test_an_output_that_cannot_be_a_folder_is_one_line(run, folder, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("upscale", folder, "-o", tmp_path / "file", "--model", X2)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot write" in err


def test_an_output_that_is_a_circle_of_links_is_one_line(run, folder, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    for output in ("circle", "circle/a.png"):
        status, _, err = run("upscale", folder / "a.png", "-o", tmp_path / output, "--model", X2)
        assert (status, err.count("\n")) == (2, 1)
        assert "cannot write" in err


def test_a_complaint_about_pixels_names_their_file(run, folder, tmp_path):
    for seed, name in enumerate(("x.tif", "y.tif")):
        (folder / name).write_bytes(images.encode(Picture(np.full((8, 12), 7.0 + seed, np.float32)), "tiff"))
    status, _, err = run("upscale", folder, "-o", tmp_path / "out", "--model", X2)
    assert status == 1
    assert f"warning: {folder / 'x.tif'}: float pixels must lie in [0, 1]" in err
    assert f"warning: {folder / 'y.tif'}: float pixels must lie in [0, 1]" in err
    status, _, err = run("evaluate", folder, "--model", "bicubic")
    assert status == 2
    assert f"{folder / 'a.png'}: SSIM needs at least 11x11 pixels" in err


def test_a_read_only_place_is_one_line(run, folder):
    # /proc takes no new folders from anyone, root included.
    status, _, err = run("upscale", folder, "-o", "/proc/tenfold", "--model", X2)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot write /proc/tenfold" in err


# ---------------------------------------------------------------- upscale: what is refused


def header_bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def truncated_png():
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 40)).save(buffer, "PNG")
    return buffer.getvalue()[:2000]


def nan_tiff():
    pixels = np.zeros((8, 12), np.float32)
    pixels[3, 3] = np.nan
    return images.encode(Picture(pixels), "tiff")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bomb.png", header_bomb(), "20000x20000 = 400 megapixels is above the limit"),
        ("cut.png", truncated_png(), "truncated"),
        ("text.png", b"no picture at all", "not a picture"),
        ("empty.png", b"", "empty"),
        ("nan.tif", nan_tiff(), "NaN"),
        ("hdr.tif", images.encode(Picture(np.full((8, 12), 3000, np.float32)), "tiff"), r"\[0, 1\]"),
        ("text.mp4", b"no film at all", "not a video"),
        ("missing.png", None, "no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(run, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, out, err = run("upscale", tmp_path / name, "-o", tmp_path / "out", "--model", X2)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{words}[^\n]*\n", err), err
    assert not (tmp_path / "out").exists() or tree(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", X2, "--scale", "3"], "enlarges x2, not x3"),
        (["--model", "hit-srf-x4", "--scale", "2"], "hit-srf-x2 does"),
        (["--scale", "3"], "hit-srf-x3"),
        (["--model", X2, "--scale", "2", "--to", "20x20"], "not both"),
        (["--model", X2, "--to", "20"], "WIDTHxHEIGHT"),
        (["--model", X2, "--tile", "huge"], "auto, none, strips"),
        (["--model", X2, "--memory", "lots"], "4GB"),
        (["--model", X2, "--shard", "3/2"], "i/n"),
        (["--model", X2, "--quality", "0"], "quality must be between 1 and 100"),
        (["--model", ""], "no weights"),
        (["--model", X2, "--scale", "5"], "--scale'. Expected one of 2, 3, 4 ("),
        (["--model", X2, "--memory", "1KB"], "result takes 0.005 MB and 0.001 MB are allowed"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", X2, "--format", "gif"], "gif"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(run, folder, tmp_path, options, words):
    status, _, err = run("upscale", folder / "a.png", "-o", tmp_path / "out", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert words in err


def test_a_checkpoint_with_wrong_keys_or_code_in_it_is_one_line(run, folder, tmp_path):
    save_file({"conv_first.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "wrong.safetensors")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"params": Evil()}, tmp_path / "evil.pth")
    for name in ("wrong.safetensors", "evil.pth"):
        status, _, err = run("upscale", folder / "a.png", "-o", tmp_path / "out", "--model", tmp_path / name)
        assert (status, err.count("\n")) == (2, 1)
        assert name in err
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- the other verbs


def test_downscale_writes_the_benchmarks_layout(run, folder, tmp_path):
    status, _, _ = run("downscale", folder, "-o", tmp_path / "lr", "--scale", 2, 3)
    assert status == 0
    assert tree(tmp_path / "lr") == [f"X{s}/{name}x{s}.png" for s in (2, 3) for name in "abc"]
    for scale in (2, 3):
        made = np.array(Image.open(tmp_path / "lr" / f"X{scale}" / f"ax{scale}.png"))
        np.testing.assert_array_equal(made, make_low_res(picture(), scale))


def test_downscale_equals_the_published_files(run, data_root, tmp_path):
    root = data_root / "superres" / "Set5"
    assert run("downscale", root / "HR", "-o", tmp_path, "--scale", 4, "--border", "clamp")[0] == 0
    for path in sorted((root / "LR_bicubic_clamp" / "X4").glob("*.png")):
        made = np.array(Image.open(tmp_path / "X4" / path.name))
        np.testing.assert_array_equal(made, np.array(Image.open(path)))


def test_downscale_refuses_what_is_too_small(run, folder, tmp_path):
    status, _, err = run("downscale", folder / "a.png", "-o", tmp_path / "lr", "--scale", 9)
    assert (status, err.count("\n")) == (2, 1)
    assert run("downscale", folder / "a.png", "-o", tmp_path / "lr", "--scale", 0)[0] == 2


def larger(folder):
    for seed, name in enumerate("abc"):
        Image.fromarray(picture(40, 44, seed)).save(folder / f"{name}.png")


def test_evaluate_scores_a_network_and_finished_outputs_alike(run, folder, tmp_path):
    larger(folder)
    run("downscale", folder, "-o", tmp_path / "lr", "--scale", 2)
    run("upscale", tmp_path / "lr" / "X2", "-o", tmp_path / "sr", "--model", X2)
    scores = []
    for source in (["--low-res", tmp_path / "lr", "--model", X2], ["--super-res", tmp_path / "sr", "--scale", 2]):
        status, out, _ = run("evaluate", folder, *source, "--json")
        assert status == 0
        report = json.loads(out)
        assert [image["name"] for image in report["images"]] == ["a", "b", "c"]
        assert set(report["mean"]) == {"name", "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips"}
        scores.append([image["psnr_y"] for image in report["images"]])
    assert scores[0] == scores[1]


def test_evaluate_gives_the_published_bicubic_figures(run, data_root):
    root = data_root / "superres" / "Set5"
    status, out, _ = run("evaluate", root, "--low-res", root / "LR_bicubic", "--model", "bicubic", "--scale", 4)
    assert status == 0
    assert "28.429" in out
    assert "0.81114" in out


def test_evaluate_says_what_does_not_fit(run, folder, tmp_path):
    larger(folder)
    run("downscale", folder, "-o", tmp_path / "lr", "--scale", 2)
    for options in (
        ["--low-res", tmp_path / "lr" / "X2", "--model", X3],
        ["--super-res", tmp_path / "lr"],
        ["--super-res", tmp_path / "lr", "--scale", 2],
        ["--low-res", tmp_path / "nowhere", "--model", X2],
    ):
        status, _, err = run("evaluate", folder, *options)
        assert (status, err.count("\n")) == (2, 1)


class FakeLpips(types.ModuleType):
    """Stands for the lpips package, whose weights the tests cannot have."""

    def LPIPS(self, net, verbose):
        if self.weights_missing:
            raise OSError("no route to host")
        return MeanDistance()


class MeanDistance(torch.nn.Module):
    def forward(self, image, reference):
        assert image.min() >= -1
        assert image.max() <= 1
        return (image - reference).abs().mean()[None, None, None, None]


@pytest.mark.parametrize("state", ["works", "weights_missing", "not_installed"])
def test_lpips_is_given_or_it_is_said_what_is_missing(run, folder, monkeypatch, state):
    larger(folder)
    package = FakeLpips("lpips")
    package.weights_missing = state == "weights_missing"
    monkeypatch.setitem(sys.modules, "lpips", None if state == "not_installed" else package)
    status, out, err = run("evaluate", folder, "--model", "bicubic", "--lpips", "--json")
    if state == "works":
        assert status == 0
        assert 0 < json.loads(out)["mean"]["lpips"] < 1
    else:
        assert (status, err.count("\n")) == (2, 1)
        assert "pip install lpips" in err if state == "not_installed" else "alexnet" in err


def test_inspect_tells_what_a_checkpoint_is(run):
    status, out, _ = run("inspect", PARITY / "full_sng_x3.state.safetensors", "--json")
    assert status == 0
    found = json.loads(out)
    assert (found["architecture"], found["scale"], found["parameters"]) == ("HiT-SNG", 3, 1_020_699)
    assert found["windows"] == [[side, side] for side in (4, 8, 16, 32, 48, 64)]
    assert "1,020,699" in run("inspect", PARITY / "full_sng_x3.state.safetensors")[1]
    assert run("inspect", "nothing.pth")[0] == 2


# ---------------------------------------------------------------- arguments and start-up


def test_sizes_amounts_and_tiles_are_parsed():
    assert parse_size("1920x1080") == (1920, 1080)
    assert [parse_bytes(text) for text in ("4GB", "800 MB", "1.5GiB", "512", "2k", "1TB")] == [
        4_000_000_000,
        800_000_000,
        1_610_612_736,
        512,
        2000,
        1_000_000_000_000,
    ]
    assert [parse_tile(text) for text in ("auto", "none", "strips", "192")] == ["auto", "none", "strips", 192]
    for parse, texts in (
        (parse_size, ("0x4", "4", "4x", "x")),
        (parse_bytes, ("", "0", "GB", "-1GB")),
        (parse_tile, ("0", "-4", "²")),
    ):
        for text in texts:
            with pytest.raises(UserError):
                parse(text)


def test_help_has_an_example_and_needs_no_torch(tmp_path):
    code = (
        "import sys; from tenfold import cli\n"
        "for verb in ('upscale', 'downscale', 'evaluate', 'inspect'):\n"
        "    try: cli.main(['superres', verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Example:") == 4


def test_a_small_picture_takes_less_than_four_seconds_cold(tmp_path):
    Image.fromarray(picture(64, 64)).save(tmp_path / "a.png")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tenfold", "superres", "upscale", "a.png", "-o", "out", "--model", X2]
    # One thread: on a busy machine, threads that wait for each other burn processor time.
    environment = {**os.environ, "TENFOLD_THREADS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: the clock would also measure what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4
