from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tenfold.core.console import UserError
from tenfold.core.files import atomic_write, disk_error, make_folder, read_json, write_bytes, write_json


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    write_bytes(path, b"first")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(path) as temporary:
        temporary.write_bytes(b"new, but only half")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "picture.tiff") as temporary:
        assert temporary.suffix == ".tiff"
        assert temporary.parent == tmp_path


def test_a_new_file_has_the_permissions_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_in_place_of_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_bytes(p, b""), lambda p: make_folder(p)):
        with pytest.raises(UserError, match="cannot write") as raised:
            write(tmp_path / "file" / "a.bin")
        assert "\n" not in str(raised.value)


def test_a_folder_in_place_of_the_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "a.bin", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]


def test_a_full_disk_is_said_plainly_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    # A limit on the size of files acts like a full disk, by an OSError in the middle of the write, and needs no mount.
    script = (
        "import resource, signal, sys\n"
        "from tenfold.core.console import UserError\n"
        "from tenfold.core.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_bytes(sys.argv[1], b'x' * 100_000)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_written_for_dataclass_like_values_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"p": tmp_path, "x": np.float32(0.5), "y": np.arange(2), "z": float("nan"), "t": (1, "é")})
    assert json.loads(path.read_text()) == {"p": str(tmp_path), "x": 0.5, "y": [0, 1], "z": None, "t": [1, "é"]}
    assert "é" in path.read_text()


@pytest.mark.parametrize(("content", "word"), [(b"{", "readable"), (b"[1]", "found list"), (b"\xff", "readable")])
def test_a_broken_json_file_is_one_line(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=word) as raised:
        read_json(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_json_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is denied"),
    ],
)
def test_what_the_disk_refuses_is_said_in_plain_words(number: int, words: str) -> None:
    assert str(disk_error(Path("a.png"), OSError(number, "?"))) == f"cannot write a.png: {words}"
