"""The verbs, from the command line: videos of any length in constant memory, errors in one line with status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from tenfold import cli
from tenfold.core.video import VideoReader, VideoWriter
from tenfold.tracking.data import motchallenge
from tenfold.tracking.data.synthetic import Clip, ClipConfig
from tenfold.tracking.masks import decode_mask

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
CONFIG = ClipConfig(frames=8, size=(128, 96), figures=3, speed=4, miss=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated clip with its boxes and its truth."""
    path = tmp_path_factory.mktemp("clip")
    clip = Clip(CONFIG)
    with VideoWriter(path / "clip.mp4", 10, CONFIG.size) as writer:
        for frame in clip.frames():
            writer.write(frame)
    motchallenge.write(path / "det.txt", clip.detections())
    motchallenge.write(path / "gt.txt", clip.truth())
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict, str]:
    status = cli.main(["tracking", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out.strip().startswith("{") else {}, err


def check(name: str, content: dict) -> None:
    jsonschema.validate(content, json.loads((SCHEMAS / f"tracking-{name}.json").read_text()))


def test_track_writes_video_text_and_json_lines(folder: Path, capsys, tmp_path: Path) -> None:
    outputs = {name: tmp_path / file for name, file in (("save", "t.mp4"), ("mot", "t.txt"), ("jsonl", "t.jsonl"))}
    options = [part for name, path in outputs.items() for part in (f"--{name}", path)]
    status, result, _ = run(capsys, "track", folder / "clip.mp4", "--boxes", folder / "det.txt", *options)
    assert status == 0
    check("track", result)
    assert result["frames"] == 8 and result["tracks"] >= 3
    table = motchallenge.read(outputs["mot"])
    assert len(table) == result["boxes"] > 0
    lines = [json.loads(line) for line in outputs["jsonl"].read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(8))
    assert sum(len(line["objects"]) for line in lines) == result["boxes"]
    drawn = VideoReader(outputs["save"])
    assert (drawn.size, drawn.frame_count) == ((128, 96), 8)


def test_tracks_can_be_scored(folder: Path, capsys, tmp_path: Path) -> None:
    pytest.importorskip("trackeval")
    mot = tmp_path / "t.txt"
    assert run(capsys, "track", folder / "clip.mp4", "--boxes", folder / "det.txt", "--mot", mot)[0] == 0
    status, result, _ = run(capsys, "evaluate", folder / "gt.txt", "--results", mot)
    assert status == 0
    check("evaluate", result)
    assert result["combined"]["hota"] > 0.7


def test_embeddings_are_written_for_every_box(folder: Path, capsys, tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    status, result, _ = run(capsys, "embed", folder / "clip.mp4", "--boxes", folder / "det.txt", "-o", path)
    assert status == 0
    content = np.load(path)
    assert content["embeddings"].shape == (result["boxes"], 128)
    assert np.isfinite(content["embeddings"]).all()


def test_masks_of_tracked_boxes_and_segments_as_boxes(folder: Path, capsys, tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    given = ("--boxes", folder / "det.txt", "--masks", "grabcut", "--jsonl", lines)
    assert run(capsys, "track", folder / "clip.mp4", *given)[0] == 0
    first = json.loads(lines.read_text().splitlines()[0])["objects"][0]
    assert first["mask"]["size"] == [96, 128]
    status, result, _ = run(capsys, "track", folder / "clip.mp4", "--segments", "regions", "--min-score", "0")
    assert status == 0 and result["boxes"] > 0


def test_a_picture_that_cannot_be_read_is_a_gap(capsys, tmp_path: Path) -> None:
    for number, frame in enumerate(Clip(CONFIG).frames()):
        Image.fromarray(frame).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "004.png").write_bytes(b"no picture")
    (tmp_path / "det.csv").write_text("1,-1,10,10,20,40,1\n3,-1,nan,10,20,40,1\n6,-1,12,10,0,40,1\n")
    status, result, err = run(capsys, "track", tmp_path, "--boxes", tmp_path / "det.csv")
    assert status == 0
    assert (result["frames"], result["gaps"], result["boxes"]) == (8, 1, 1)
    assert "a gap in the sequence" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["track", "nothing.mp4"], "no such file"),
        (["track", "CLIP", "--boxes", "DET", "--detector", "nanodet"], "one place only"),
        (["track", "CLIP", "--boxes", "DET", "--text", "dog"], "needs a detector"),
        (["track", "CLIP", "--text", "dragon"], "no class 'dragon'"),
        (["track", "CLIP", "--boxes", "missing.txt"], "no such file"),
        (["track", "CLIP", "--boxes", "DET", "--model", "masa-tine"], "did you mean masa-tiny"),
        (["track", "CLIP", "--boxes", "DET", "--model", "nanodet"], "nanodet"),
        (["track", "CLIP", "--detector", "proposals"], "no head that proposes boxes"),
        (["track", "CLIP", "--boxes", "DET", "--min-score", "2"], "from 0 to 1"),
        (["track", "BROKEN", "--boxes", "DET", "--save", "out.mp4"], "BROKEN"),
        (["evaluate", "DET", "DET", "--results", "DET"], "give one for each"),
        (["train", "PICTURES", "--masks", "MASKS", "-o", "run"], "no list `images`"),
        (["masks", "PICTURES", "-o", "masks.txt"], "ends in .json"),
        (["export", "masa-tiny", "-o", "x.bin"], "ends in .onnx"),
        (["inspect", "DET"], "det.txt"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content = (folder / "clip.mp4").read_bytes()
    (tmp_path / "BROKEN.mp4").write_bytes(content[: len(content) // 3])
    (tmp_path / "masks.json").write_text('{"annotations": []}')
    (tmp_path / "pictures").mkdir()
    words = {
        "CLIP": str(folder / "clip.mp4"),
        "DET": str(folder / "det.txt"),
        "BROKEN": "BROKEN.mp4",
        "MASKS": "masks.json",
        "PICTURES": "pictures",
    }
    status = cli.main(["tracking", *[words.get(word, word) for word in arguments]])
    err = capsys.readouterr().err
    assert status == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "out.mp4").exists()


MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
import numpy as np, torch
from tenfold.tracking.config import MATCHERS
from tenfold.tracking.association import Associator

def peak():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

rng = np.random.default_rng(0)
tracker = Associator(MATCHERS["video"])
marks = []
for frame in range(10_000):
    corner = rng.uniform(0, 600, (6, 2))
    boxes = np.concatenate((corner, corner + 40), 1)
    tracker.update(boxes, rng.uniform(0.5, 1, 6), np.zeros(6), rng.normal(0, 4, (6, 128)))
    if frame in (2000, 9999):
        marks.append(peak())
print(marks[1] - marks[0], tracker.next_id)
"""


def test_memory_of_the_tracker_does_not_grow_with_the_video() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, identities = map(int, done.stdout.split())
    assert identities > 10_000  # nearly every box begins a track, which is the worst case
    assert grown < 2000, f"{grown} kB more after 8000 further frames"


def test_segments_of_a_folder_are_shared_and_a_broken_picture_is_left_out(tmp_path: Path, capsys) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.fromarray(Clip(CONFIG).frame(number)).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no")
    output = tmp_path / "masks.json"
    status, first, _ = run(capsys, "masks", pictures, "-o", output, "--share", "0", "2", "--rle")
    assert status == 0 and not output.exists() and first["instances"] == 0
    status, second, _ = run(capsys, "masks", pictures, "-o", output, "--share", "1", "2", "--rle")
    assert status == 0 and second["pictures"] == 3
    assert [Path(path).name for path in second["unreadable"]] == ["broken.png"]
    content = json.loads(output.read_text())
    assert len(content["images"]) == 3 and len(content["annotations"]) == second["instances"] > 0
    assert decode_mask(content["annotations"][0]["segmentation"]).sum() == content["annotations"][0]["area"]
    assert not output.with_suffix(".parts").exists()
