"""Training pairs: which patches come, how they lie on each other, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold.core.console import UserError
from tenfold.superres.data import PatchPairs, augment
from tenfold.superres.evaluation import make_low_res


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(folder: Path, **pictures: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    """Three pictures of different sizes, none a multiple of a scale."""
    return save(tmp_path / "in", a=picture(50, 71, 1), b=picture(67, 43, 2), c=picture(61, 61, 3))


def levels(patch: torch.Tensor) -> np.ndarray:
    """3 x H x W in [0, 1] -> H x W x 3 grey levels."""
    return (patch * 255).round().permute(1, 2, 0).numpy().astype(int)


def symmetries(square: np.ndarray) -> list[np.ndarray]:
    """The eight of the square: four turns, each with and without a mirror."""
    return [np.rot90(mirrored, turns) for mirrored in (square, square[:, ::-1]) for turns in range(4)]


# ---------------------------------------------------------------- the stream


def test_a_sample_is_a_pure_function_of_its_number(folder):
    forward = PatchPairs(folder, scale=2, patch=16, seed=5)
    backward = PatchPairs(folder, scale=2, patch=16, seed=5, cache_bytes=0)
    there = [forward.sample(index) for index in range(12)]
    back = [backward.sample(index) for index in reversed(range(12))][::-1]
    for one, other in zip(there, back, strict=True):
        assert torch.equal(one["low"], other["low"]) and torch.equal(one["high"], other["high"])
    assert len({sample["high"].numpy().tobytes() for sample in there}) == 12, "crops should differ"
    other_seed = PatchPairs(folder, scale=2, patch=16, seed=6)
    assert any(not torch.equal(other_seed.sample(i)["high"], there[i]["high"]) for i in range(3))


def test_global_random_states_are_neither_used_nor_moved(folder):
    pairs = PatchPairs(folder, scale=2, patch=16)
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = pairs.sample(3)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(2)
    assert torch.equal(pairs.sample(3)["low"], first["low"])


def test_every_image_comes_once_in_a_pass(tmp_path):
    folder = save(tmp_path, **{f"p{level}": np.full((32, 32, 3), level, np.uint8) for level in range(0, 250, 50)})
    pairs = PatchPairs(folder, scale=2, patch=16)
    for first in (0, 5, 10):
        shown = sorted(int(levels(pairs.sample(index)["high"])[0, 0, 0]) for index in range(first, first + 5))
        assert shown == [0, 50, 100, 150, 200]


def test_several_folders_are_one_stream(tmp_path):
    one = save(tmp_path / "one", a=np.full((32, 32, 3), 10, np.uint8))
    two = save(tmp_path / "two", a=np.full((32, 32, 3), 20, np.uint8), b=np.full((32, 32, 3), 30, np.uint8))
    pairs = PatchPairs([one, str(two)], scale=2, patch=8)
    assert {int(levels(pairs.sample(index)["high"])[0, 0, 0]) for index in range(3)} == {10, 20, 30}
    assert len(PatchPairs(str(one), scale=2, patch=8).pairs) == 1


# ---------------------------------------------------------------- the patches


@settings(deadline=None, max_examples=25)
@given(scale=st.sampled_from((2, 3, 4)), patch=st.integers(1, 10), index=st.integers(0, 10**6))
def test_patches_have_their_sizes_and_values(tmp_path_factory, scale, patch, index):
    folder = tmp_path_factory.getbasetemp() / "sizes"
    if not folder.exists():
        save(folder, a=picture(50, 71, 1), b=picture(67, 43, 2))
    sample = PatchPairs(folder, scale=scale, patch=patch).sample(index)
    assert sample["low"].shape == (3, patch, patch) and sample["high"].shape == (3, scale * patch, scale * patch)
    for part in sample.values():
        assert part.dtype == torch.float32 and part.is_contiguous()
        assert part.min() >= 0 and part.max() <= 1
        assert torch.equal((part * 255).round() / 255, part)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_fall_on_the_low_res_grid(folder, scale):
    pairs = PatchPairs(folder, scale=scale, patch=10)
    inner = np.s_[3:-3, 3:-3]  # the widened cubic kernel reaches 2 low-res pixels
    for index in range(24):
        sample = pairs.sample(index)
        low, high = levels(sample["low"])[inner], levels(sample["high"])
        shrunk = make_low_res(high.astype(np.uint8), scale).astype(int)[inner]
        # Rounding after each axis does not commute with the transpose: a level or two. A wrong crop is 50 off.
        assert np.abs(low - shrunk).max() <= 2


def test_the_augmentations_are_the_eight_symmetries_of_the_square():
    square = picture(5, 5)
    flags = [(x, y, t) for x in (False, True) for y in (False, True) for t in (False, True)]
    found = {augment(square, *flag).tobytes() for flag in flags}
    assert found == {np.ascontiguousarray(each).tobytes() for each in symmetries(square)}
    assert len(found) == 8


def test_all_symmetries_occur_and_both_patches_share_theirs(tmp_path):
    original = picture(24, 24)  # of the size of a patch: only the symmetry is left to chance
    pairs = PatchPairs(save(tmp_path, a=original), scale=2, patch=12)
    expected = [
        (np.ascontiguousarray(high).tobytes(), np.ascontiguousarray(low).tobytes())
        for high, low in zip(symmetries(original), symmetries(make_low_res(original, 2)), strict=True)
    ]
    counts = dict.fromkeys(expected, 0)
    for index in range(160):
        sample = pairs.sample(index)
        counts[tuple(levels(sample[part]).astype(np.uint8).tobytes() for part in ("high", "low"))] += 1
    assert min(counts.values()) >= 8  # 20 expected, standard deviation 4


def test_small_images_are_left_out_with_a_warning(tmp_path, capsys):
    folder = save(tmp_path, large=picture(32, 40), narrow=picture(31, 90), flat=picture(90, 31))
    pairs = PatchPairs(folder, scale=2, patch=16)
    assert [pair.name for pair in pairs.pairs] == ["large"]
    assert "2 of 3 images are smaller than a patch and left out" in capsys.readouterr().err


def test_a_patch_without_pixels_is_refused(folder):
    with pytest.raises(UserError, match="patch: 0 pixels"):
        PatchPairs(folder, scale=2, patch=0)


def test_no_image_of_the_patch_size_is_refused(tmp_path):
    folder = save(tmp_path / "in", a=picture(20, 20))
    with pytest.raises(UserError, match=f"no image in {folder} has 32 pixels a side"):
        PatchPairs(folder, scale=2, patch=16)


# ---------------------------------------------------------------- paired folders


def test_given_low_res_files_are_used(tmp_path):
    high = save(tmp_path / "HR", a=picture(33, 33), b=picture(40, 40))
    low = save(tmp_path / "LR/X2", ax2=np.full((16, 16, 3), 7, np.uint8), bx2=np.full((20, 20, 3), 9, np.uint8))
    for place in (low, low.parent):
        pairs = PatchPairs(high, place, scale=2, patch=8)
        assert {int(levels(pairs.sample(index)["low"])[0, 0, 0]) for index in range(2)} == {7, 9}


def test_given_and_made_low_res_images_give_the_same_patches(folder, tmp_path):
    made = {path.stem: make_low_res(np.array(Image.open(path)), 3) for path in folder.iterdir()}
    low = save(tmp_path / "low", **{f"{name}x3": pixels for name, pixels in made.items()})
    paired, plain = PatchPairs(folder, low, scale=3, patch=8), PatchPairs(folder, scale=3, patch=8)
    for index in range(6):
        assert torch.equal(paired.sample(index)["low"], plain.sample(index)["low"])
        assert torch.equal(paired.sample(index)["high"], plain.sample(index)["high"])


def test_a_missing_partner_is_named(tmp_path):
    high = save(tmp_path / "HR", a=picture(32, 32), b=picture(32, 32))
    low = save(tmp_path / "LR", ax2=picture(16, 16))
    with pytest.raises(UserError, match=r"no partner for 1 of 2 images .*first: b; expected bx2\.png"):
        PatchPairs(high, low, scale=2, patch=8)


@pytest.mark.parametrize("size", [(17, 17), (8, 8), (16, 14)], ids=["too large", "of another scale", "too narrow"])
def test_a_partner_that_does_not_fit_is_refused(tmp_path, size):
    high = save(tmp_path / "HR", a=picture(33, 33))
    low = save(tmp_path / "LR", a=picture(*size))
    with pytest.raises(UserError, match=r"a\.png .*33x33.* do not fit"):
        PatchPairs(high, low, scale=2, patch=8)


# ---------------------------------------------------------------- broken files


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def write_text(path):
    path.write_text("no picture")


def write_bomb(path):
    """A PNG whose header claims 20000 x 20000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damage", [truncate, write_text, write_bomb])
def test_a_broken_file_is_named_and_refused(folder, damage):
    damage(folder / "b.png")
    with pytest.raises(UserError, match=r"b\.png"):
        pairs = PatchPairs(folder, scale=2, patch=16)
        for index in range(3):
            pairs.sample(index)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="no images here"):
        PatchPairs(tmp_path, scale=2)
    with pytest.raises(UserError, match="no such folder"):
        PatchPairs(tmp_path / "nowhere", scale=2)


def test_a_folder_that_is_named_like_an_image_is_none(tmp_path):
    (tmp_path / "b.png").mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    assert [pair.name for pair in PatchPairs(tmp_path, scale=2, patch=8).pairs] == ["a"]
