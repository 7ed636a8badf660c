import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from tenfold.core import images
from tenfold.core.console import UserError
from tenfold.core.images import Picture, convert_depth

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DTYPES = (np.uint8, np.uint16, np.float32)


def random_pixels(shape, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random(shape)
    return values.astype(np.float32) if dtype == np.float32 else (values * np.iinfo(dtype).max).astype(dtype)


def exif_block(orientation=1):
    exif = Image.Exif()
    exif[0x010F] = "A maker"
    exif[0x0112] = orientation
    details = exif.get_ifd(0x8769)
    details[0x9003] = "2024:05:06 07:08:09"
    details[0xA002], details[0xA003] = 7, 5
    exif.get_ifd(0x8825)[2] = (46.0, 31.0, 2.5)
    return exif.tobytes()


def parsed_exif(block):
    exif = Image.Exif()
    exif.load(block)
    return exif


def png_header(width, height, depth=8, colour=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# ---------------------------------------------------------------- what comes in


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("1", (5, 7)),
        ("L", (5, 7)),
        ("LA", (5, 7, 2)),
        ("P", (5, 7, 3)),
        ("RGB", (5, 7, 3)),
        ("RGBA", (5, 7, 4)),
    ],
)
def test_png_modes_become_plain_arrays_with_the_values_that_pillow_sees(tmp_path, mode, shape):
    image = Image.fromarray(random_pixels((5, 7, 4))).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    image.save(tmp_path / "x.png")
    picture = images.read(tmp_path / "x.png")
    assert picture.pixels.shape == shape
    assert picture.pixels.dtype == np.uint8
    expected = image.convert({"1": "L", "P": "RGB"}.get(mode, mode))
    np.testing.assert_array_equal(picture.pixels, np.array(expected))


def test_a_transparent_palette_entry_becomes_alpha(tmp_path):
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    picture = images.read(tmp_path / "x.png")
    assert picture.pixels[0, 0].tolist() == [255, 0, 0, 0]
    assert picture.pixels[1, 1].tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_sixteen_bits_are_read_whole(tmp_path, suffix, shape):
    pixels = random_pixels(shape, np.uint16)
    images.write(tmp_path / f"x.{suffix}", Picture(pixels))
    np.testing.assert_array_equal(images.read(tmp_path / f"x.{suffix}").pixels, pixels)


def test_our_deep_tiffs_are_read_alike_by_an_independent_reader(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for dtype in DTYPES:
        for shape in ((5, 7), (900, 800, 3), (5, 7, 4)):
            pixels = random_pixels(shape, dtype)
            images.write(tmp_path / "x.tiff", Picture(pixels, SRGB, exif_block()))
            with tifffile.TiffFile(tmp_path / "x.tiff") as file:
                decoded = file.pages[0].tags
                assert decoded["ImageWidth"].value == shape[1]
                assert decoded["Make"].value == "A maker"
            if dtype == np.float32:  # tifffile undoes horizontal differencing only with a further package
                np.testing.assert_array_equal(tifffile.imread(tmp_path / "x.tiff"), pixels)


@pytest.mark.parametrize("kind", ["zero_is_white", "associated_alpha", "float64"])
def test_odd_deep_tiffs_are_normalised(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "x.tif"
    if kind == "zero_is_white":
        pixels = random_pixels((5, 7), np.uint16)
        tifffile.imwrite(path, pixels, photometric="miniswhite")
        np.testing.assert_array_equal(images.read(path).pixels, 65535 - pixels)
    elif kind == "associated_alpha":
        premultiplied = np.full((2, 2, 4), 20000, np.uint16)
        premultiplied[..., 3] = 40000
        tifffile.imwrite(path, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
        assert images.read(path).pixels[0, 0].tolist() == [32768, 32768, 32768, 40000]
    else:
        pixels = random_pixels((5, 7, 3), np.float32)
        tifffile.imwrite(path, pixels.astype(np.float64), photometric="rgb")
        np.testing.assert_array_equal(images.read(path).pixels, pixels)


@pytest.mark.parametrize("kind", ["int16", "uint32", "float16", "planes"])
def test_deep_tiffs_that_would_be_misread_are_refused(tmp_path, kind):
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "x.tif"
    if kind == "planes":
        tifffile.imwrite(path, random_pixels((3, 5, 7), np.uint16), photometric="rgb", planarconfig="separate")
    else:
        tifffile.imwrite(path, np.ones((5, 7), kind))
    with pytest.raises(UserError, match="not supported"):
        images.read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", "uint8"), ("tiff", "uint8"), ("png", "uint16"), ("tiff", "uint16")]
)
def test_orientation_is_applied_and_then_reset(tmp_path, orientation, suffix, dtype):
    tifffile = pytest.importorskip("tifffile")
    stored = random_pixels((5, 7, 3), dtype)
    path = tmp_path / f"x.{suffix}"
    if suffix == "tiff":
        tags = [(274, "H", 1, orientation, True), (271, "s", 0, "A maker", True)]
        tifffile.imwrite(path, stored, photometric="rgb", extratags=tags)
    else:
        path.write_bytes(images.encode(Picture(stored, None, exif_block(orientation)), "png"))
    # Pillow turns the picture channel by channel: it has no 16-bit colour.
    channels = [Image.fromarray(stored[..., channel].astype(np.int32)) for channel in range(3)]
    for channel in channels:
        channel.getexif()[0x0112] = orientation
    expected = np.stack([np.array(ImageOps.exif_transpose(channel)) for channel in channels], axis=-1)
    picture = images.read(path)
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.exif is not None
    kept = parsed_exif(picture.exif)
    assert kept.get(0x0112, 1) == 1
    assert kept[0x010F] == "A maker"


def test_jpeg_orientation_is_applied(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.jpg", exif=exif_block(6))
    picture = images.read(tmp_path / "x.jpg")
    assert (picture.width, picture.height) == (20, 30)


def tiny_cmyk_profile():
    """An ICC profile for a press whose inks all print as light: no ink is black, any full ink is mid-grey."""
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    lut += b"".join(struct.pack(">i", value << 16) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut += bytes(range(256)) * 4
    lut += bytes([0, 128, 128]) + bytes([128, 128, 128]) * 15
    lut += bytes(range(256)) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I", 2) + b"A2B0" + struct.pack(">II", start, len(lut))
    tags += b"wtpt" + struct.pack(">II", start + len(lut), len(white))
    size = start + len(lut) + len(white)
    header = struct.pack(">I4sI", size, bytes(4), 0x02100000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + tags + lut + white


def test_cmyk_goes_through_its_embedded_profile(tmp_path):
    image = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "managed.tif", icc_profile=tiny_cmyk_profile())
    plain, managed = images.read(tmp_path / "plain.tif"), images.read(tmp_path / "managed.tif")
    assert (plain.pixels == 255).all()
    assert managed.pixels.shape == (4, 4, 3)
    assert (managed.pixels < 10).all()
    assert managed.icc is None


def test_a_profile_that_does_not_fit_cmyk_does_no_harm(tmp_path):
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "x.jpg", icc_profile=SRGB, quality=100)
    assert (images.read(tmp_path / "x.jpg").pixels >= 254).all()


def test_lab_tiff_is_converted(tmp_path):
    Image.merge("LAB", [Image.new("L", (3, 3), value) for value in (255, 128, 128)]).save(tmp_path / "x.tif")
    assert (images.read(tmp_path / "x.tif").pixels >= 250).all()


@pytest.mark.parametrize(
    ("suffix", "kind"), [("gif", "frames"), ("webp", "frames"), ("png", "frames"), ("tif", "pages")]
)
def test_of_an_animation_the_first_picture_is_read_with_a_warning(tmp_path, capsys, suffix, kind):
    first, second = Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 255))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second], **options)
    picture = images.read(tmp_path / f"x.{suffix}")
    assert picture.color[0, 0].tolist() == [255, 0, 0]
    assert f"only the first of 2 {kind}" in capsys.readouterr().err


def test_pil_images_of_every_mode_are_taken():
    for mode, shape in [("I;16", (5, 7)), ("F", (5, 7)), ("CMYK", (5, 7, 3)), ("PA", (5, 7, 4)), ("1", (5, 7))]:
        assert images.from_pil(Image.new(mode, (7, 5))).pixels.shape == shape


# ---------------------------------------------------------------- what is refused


def assert_refused(path, *words, **options):
    with pytest.raises(UserError) as error:
        images.read(path, **options)
    message = str(error.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def test_a_header_that_promises_400_megapixels_is_refused_before_decoding(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    assert_refused(tmp_path / "bomb.png", "20000x20000", "limit of 100", "TENFOLD_MAX_MEGAPIXELS")
    bomb = images.encode(Picture(np.zeros((8, 8), np.uint8)), "tiff")
    for tag in (256, 257):
        side = struct.pack("<HHI", tag, 4, 1)
        bomb = bomb.replace(side + struct.pack("<I", 8), side + struct.pack("<I", 60_000))
    (tmp_path / "bomb.tif").write_bytes(bomb)
    assert_refused(tmp_path / "bomb.tif", "60000x60000")


def test_the_limit_can_be_moved_both_ways(tmp_path, monkeypatch):
    Image.new("L", (20, 10)).save(tmp_path / "x.png")
    assert_refused(tmp_path / "x.png", "20x10", max_pixels=199)
    assert images.read(tmp_path / "x.png", max_pixels=200).width == 20
    monkeypatch.setenv("TENFOLD_MAX_MEGAPIXELS", "0.0001")
    assert_refused(tmp_path / "x.png", "20x10")
    monkeypatch.setenv("TENFOLD_MAX_MEGAPIXELS", "many")
    with pytest.raises(UserError, match="not a number"):
        images.read(tmp_path / "x.png")


def test_a_raised_limit_is_above_pillows_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (20, 10)).save(tmp_path / "x.png")
    assert images.read(tmp_path / "x.png").width == 20
    assert Image.MAX_IMAGE_PIXELS == 10


def test_missing_empty_folder_and_text_are_refused(tmp_path):
    assert_refused(tmp_path / "none.png", "no such file")
    assert_refused(tmp_path, "folder")
    (tmp_path / "empty.png").touch()
    assert_refused(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("dear reader, this is no picture at all")
    assert_refused(tmp_path / "text.png", "not a picture")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert_refused(tmp_path / "x.eps", "not a picture")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0.4, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, dtype, part):
    content = images.encode(Picture(random_pixels((64, 80, 3), dtype)), suffix)
    (tmp_path / f"x.{suffix}").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError) as error:
        images.read(tmp_path / f"x.{suffix}")
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), file_format=st.sampled_from(list(images.FORMATS)), dtype=st.sampled_from(DTYPES))
def test_damaged_bytes_give_a_picture_or_a_user_error_never_a_crash(tmp_path_factory, data, file_format, dtype):
    content = bytearray(images.encode(Picture(random_pixels((6, 5, 3), dtype), SRGB, exif_block()), file_format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{file_format}"
    path.write_bytes(content)
    try:
        picture = images.read(path, max_pixels=10_000)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert picture.pixels.dtype in DTYPES


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tiff_with_nan_or_infinity_is_refused(tmp_path, value):
    pixels = random_pixels((5, 7), np.float32)
    pixels[2, 3] = value
    images.write(tmp_path / "x.tif", Picture(pixels))
    assert_refused(tmp_path / "x.tif", "NaN")


# ---------------------------------------------------------------- what goes out


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (5, 7, 2), (5, 7, 3), (5, 7, 4)])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_eight_bits_survive_a_lossless_round_trip_with_their_metadata(tmp_path, shape, suffix):
    pixels = random_pixels(shape)
    icc = SRGB if len(shape) == 3 and shape[2] > 2 else None
    path = tmp_path / f"x.{suffix}"
    images.write(path, Picture(pixels, icc, exif_block()), quality=100)
    picture = images.read(path)
    if suffix == "webp" and (pixels.ndim == 2 or pixels.shape[2] == 2):
        pixels = np.concatenate(
            [np.repeat(pixels[..., None][:, :, :1] if pixels.ndim == 2 else pixels[..., :1], 3, 2)], 2
        )
        np.testing.assert_array_equal(picture.pixels[..., :3], pixels)
    else:
        np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.icc == icc
    assert picture.exif is not None
    exif = parsed_exif(picture.exif)
    assert exif[0x010F] == "A maker"
    assert exif.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
    assert tuple(exif.get_ifd(0x8825)[2]) == (46.0, 31.0, 2.5)
    # The recorded pixel size follows the picture.
    assert (exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003]) == (shape[1], shape[0])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_files_keep_profile_and_exif(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    images.write(path, Picture(random_pixels((5, 7, 3), np.uint16), SRGB, exif_block()))
    picture = images.read(path)
    assert picture.icc == SRGB
    assert parsed_exif(picture.exif).get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"


def test_jpeg_composes_alpha_over_white_and_says_so(tmp_path, capsys):
    pixels = np.zeros((16, 16, 4), np.uint8)
    images.write(tmp_path / "x.jpg", Picture(pixels))
    assert (images.read(tmp_path / "x.jpg").pixels == 255).all()
    assert "over white" in capsys.readouterr().err


def test_what_a_format_cannot_hold_is_reduced_with_a_warning(tmp_path, capsys):
    deep = Picture(np.full((4, 4, 3), 0.5, np.float32))
    images.write(tmp_path / "x.png", deep)
    assert images.read(tmp_path / "x.png").pixels.dtype == np.uint16
    assert "16-bit" in capsys.readouterr().err
    images.write(tmp_path / "x.webp", Picture(np.full((4, 4, 3), 40_000, np.uint16)))
    assert abs(int(images.read(tmp_path / "x.webp").pixels[0, 0, 0]) - 156) <= 1
    assert "8 bits" in capsys.readouterr().err


def test_a_grey_profile_is_not_put_on_colour_pixels(tmp_path, capsys):
    grey_profile = bytearray(SRGB)
    grey_profile[16:20] = b"GRAY"
    images.write(tmp_path / "x.webp", Picture(random_pixels((4, 4)), bytes(grey_profile)))
    assert images.read(tmp_path / "x.webp").icc is None
    assert "profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape", "quality", "words"),
    [
        ("x.gif", (4, 4), 90, "cannot write .gif"),
        ("x", (4, 4), 90, "without suffix"),
        ("x.webp", (1, 17_000), 90, "16383"),
        ("x.jpg", (4, 4), 0, "quality"),
    ],
)
def test_impossible_outputs_are_refused_and_leave_no_file(tmp_path, name, shape, quality, words):
    with pytest.raises(UserError, match=words):
        images.write(tmp_path / name, Picture(np.zeros(shape, np.uint8)), quality)
    assert list(tmp_path.iterdir()) == []


def test_pil_round_trip():
    pixels = random_pixels((5, 7, 4))
    image = images.to_pil(Picture(pixels, SRGB, exif_block()))
    again = images.from_pil(image)
    np.testing.assert_array_equal(again.pixels, pixels)
    assert again.icc == SRGB
    with pytest.raises(UserError, match="array"):
        images.to_pil(Picture(random_pixels((5, 7, 3), np.uint16)))


# ---------------------------------------------------------------- sample types


def test_depth_conversions_are_inverse_where_they_can_be():
    every = np.arange(256, dtype=np.uint8)
    for dtype in (np.uint16, np.float32):
        np.testing.assert_array_equal(convert_depth(convert_depth(every, dtype), np.uint8), every)
    deep = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(convert_depth(convert_depth(deep, np.float32), np.uint16), deep)


def test_floats_are_clipped_and_rounded_half_to_even():
    values = np.array([-1, 0.5 / 255, 1.5 / 255, 2.5 / 255, 2], np.float32)
    assert convert_depth(values, np.uint8).tolist() == [0, 0, 2, 2, 255]


def test_rgb8_replicates_grey_and_drops_alpha():
    grey = random_pixels((5, 7, 2))
    rgb = images.to_rgb8(Picture(grey))
    np.testing.assert_array_equal(rgb, np.stack([grey[..., 0]] * 3, axis=-1))
