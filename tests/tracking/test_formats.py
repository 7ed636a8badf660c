"""Five formats are read as they are written down, written so that they can be read again, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tenfold.core.console import UserError
from tenfold.tracking.data import coco_video, kitti, motchallenge, reading, scalabel
from tenfold.tracking.data.table import BoxTable


def tracks() -> BoxTable:
    return BoxTable.of(
        [0, 0, 2],
        [0, 1, 0],
        [[10, 20, 30, 60], [100.5, 50, 140.25, 90], [12, 21, 32, 61]],
        [0.9, 0.5, 0.8],
        [0, 1, 0],
        ("pedestrian", "car"),
    )


def same(found: BoxTable, expected: BoxTable) -> None:
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=0.01)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    # Numbers of identities may change; who is who may not.
    pairs = set(zip(found.ids.tolist(), expected.ids.tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_motchallenge_counts_from_one_and_reads_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    motchallenge.write(path, tracks())
    assert path.read_text().splitlines()[0] == "1,1,11.000,21.000,20.000,40.000,0.9000,-1,-1,-1"
    same(motchallenge.read(path), tracks())


def test_motchallenge_truth_has_classes_and_rows_to_ignore(tmp_path: Path) -> None:
    path = tmp_path / "gt.txt"
    path.write_text("1,1,10,10,20,20,1,1,0.5\n2,1,10,10,20,20,0,1,1\n2,5,50,10,20,20,1,8,1\n")
    found = motchallenge.read(path, truth=True)
    assert [found.class_names[label] for label in found.labels] == ["pedestrian", "pedestrian", "distractor"]
    assert found.ignored is not None and found.ignored.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,1,10,10\n", "line 1: 4 fields"),
        ("1,1,10,ten,20,20,1\n", "line 1: 'ten' is not a number"),
        ("0,1,10,10,20,20,1\n", "frames are counted from 1"),
    ],
)
def test_motchallenge_says_which_line_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "det.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        motchallenge.read(path)


def test_sequences_of_motchallenge_and_dancetrack(tmp_path: Path) -> None:
    info = "[Sequence]\nname=X\nimDir=img1\nframeRate=20\nseqLength=2\nimWidth=64\nimHeight=48\nimExt=.jpg\n"
    (tmp_path / "seqinfo.ini").write_text(info)
    (tmp_path / "img1").mkdir()
    with pytest.raises(UserError, match="says 2 frames"):
        motchallenge.read_sequence(tmp_path)
    for number in (1, 2):
        (tmp_path / "img1" / f"{number:08d}.jpg").write_bytes(b"")
    found = motchallenge.read_sequence(tmp_path)
    assert (found.name, found.fps, found.size, len(found.frames)) == ("X", 20, (64, 48), 2)


def test_kitti_reads_what_it_writes_and_ignores_regions(tmp_path: Path) -> None:
    path = tmp_path / "0000.txt"
    kitti.write(path, tracks())
    same(kitti.read(path), tracks())
    path.write_text("0 -1 DontCare -1 -1 -10 0 0 50 50 -1 -1 -1 -1000 -1000 -1000 -10\n")
    found = kitti.read(path)
    assert found.ignored is not None and found.ignored.all()
    path.write_text(path.read_text().replace("DontCare", "Unicorn"))
    with pytest.raises(UserError, match="unknown type 'Unicorn'"):
        kitti.read(path)


def test_bdd100k_reads_what_it_writes_and_knows_empty_frames(tmp_path: Path) -> None:
    path = tmp_path / "video.json"
    scalabel.write(path, {"a": tracks()}, {"a": 5})
    found = scalabel.read(path)["a"]
    same(found, tracks())
    assert found.annotated_frames == frozenset(range(5))
    content = json.loads(path.read_text())
    content[0]["labels"][0]["attributes"] = {"crowd": True}
    path.write_text(json.dumps(content))
    again = scalabel.read(path)["a"]
    assert again.ignored is not None and again.ignored.tolist() == [True, False, False]


def test_coco_video_reads_what_it_writes_and_keeps_sparse_annotation(tmp_path: Path) -> None:
    path = tmp_path / "tao.json"
    coco_video.write(path, {"a": tracks(), "b": tracks()}, {"a": 4})
    found = coco_video.read(path)
    same(found["a"], tracks())
    assert found["a"].annotated_frames == frozenset(range(4))
    numbers = [row["track_id"] for row in json.loads(path.read_text())["annotations"]]
    assert set(numbers[:3]).isdisjoint(numbers[3:])


@pytest.mark.parametrize("reader", [scalabel.read, coco_video.read])
@pytest.mark.parametrize("content", ["[1, 2]", "{}", '{"images": [{}], "annotations": [], "categories": []}', "{"])
def test_foreign_json_is_refused_in_one_line(tmp_path: Path, reader, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        reader(path)
    assert "\n" not in str(error.value)


def test_formats_are_told_apart_by_their_content(tmp_path: Path) -> None:
    for name, write in (("mot.txt", motchallenge.write), ("kitti.txt", kitti.write)):
        write(tmp_path / name, tracks())
        same(reading.read(tmp_path / name), tracks())
    for name, write_videos in (("bdd.json", scalabel.write), ("coco.json", coco_video.write)):
        write_videos(tmp_path / name, {"a": tracks()}, {})
        same(reading.read(tmp_path / name), tracks())
    write_videos(tmp_path / "two.json", {"a": tracks(), "b": tracks()}, {})
    with pytest.raises(UserError, match="holds 2 videos"):
        reading.read(tmp_path / "two.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe[1]")
    with pytest.raises(UserError, match="not readable as json"):
        reading.read(tmp_path / "x.json")
