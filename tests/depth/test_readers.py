"""Each dataset's reader, on a small tree in that dataset's own on-disk format."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.core.console import UserError
from tenfold.depth import data, driving, readers
from tenfold.depth.data import Frame, read_depth

H, W = 12, 16
DEPTH = np.linspace(0.5, 6, H * W, dtype=np.float32).reshape(H, W)
DEPTH[0, :4] = 0  # not measured
RGB = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def write_rgb(path: Path, image: np.ndarray = RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def write_u16(path: Path, depth: np.ndarray, scale: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.round(depth * scale).astype(np.uint16))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


K = "100.5 0 8.25\n0 101.5 6.75\n0 0 1\n"
CAMERA = ("pinhole", (100.5, 101.5, 8.25, 6.75))


def nyu(root):
    write_rgb(root / "bathroom" / "rgb_00045.png")
    write_u16(root / "bathroom" / "sync_depth_00045.png", DEPTH, 1000)
    return readers.NYU_CAMERA, 1 / 1000


def kitti(root):
    drive = "2011_09_26_drive_0002_sync"
    write_rgb(root / "2011_09_26" / drive / "image_02" / "data" / "0000000005.png")
    write_u16(root / "val" / drive / "proj_depth" / "groundtruth" / "image_02" / "0000000005.png", DEPTH, 256)
    write_text(
        root / "2011_09_26" / "calib_cam_to_cam.txt",
        "calib_time: 09-Jan-2012 13:57:47\nP_rect_02: 100.5 0 8.25 44.8 0 101.5 6.75 0.2 0 0 1 0.003\n",
    )
    return CAMERA, 1 / 256


def sunrgbd(root):
    scene = root / "kv1" / "b3dodata" / "img_0063"
    write_rgb(scene / "image" / "img_0063.png")
    stored = np.round(DEPTH * 1000).astype(np.uint16)
    (scene / "depth").mkdir()
    cv2.imwrite(str(scene / "depth" / "img_0063_abs.png"), (stored << np.uint16(3)) | (stored >> np.uint16(13)))
    write_text(scene / "intrinsics.txt", K)
    other = root / "kv1" / "NYUdata" / "NYU0001"
    write_rgb(other / "image" / "a.png")
    write_text(other / "intrinsics.txt", K)
    return CAMERA, 1 / 1000


def ibims(root):
    write_rgb(root / "rgb" / "corridor_01.png")
    write_u16(root / "depth" / "corridor_01.png", DEPTH, 65535 / 50)
    write_u16(root / "mask_invalid" / "corridor_01.png", np.ones((H, W)), 1)
    write_u16(root / "mask_transp" / "corridor_01.png", np.ones((H, W)), 1)
    write_text(root / "calib" / "corridor_01.txt", "100.5 0 0\n0 101.5 0\n8.25 6.75 1\n")
    return CAMERA, 50 / 65535


def void(root):
    for name in ("0001.png", "0002.png"):
        write_rgb(root / "data" / "birthplace_0" / "image" / name)
        write_u16(root / "data" / "birthplace_0" / "ground_truth" / name, DEPTH, 256)
    write_text(root / "data" / "birthplace_0" / "K.txt", K)
    write_text(root / "test_image.txt", "void_release/void_1500/data/birthplace_0/image/0002.png\n")
    return CAMERA, 1 / 256


def hammer(root):
    sensor = root / "scene2_traj1_2" / "polarization"
    write_rgb(sensor / "rgb" / "000000.png")
    write_u16(sensor / "_gt" / "000000.png", DEPTH, 1000)
    write_text(sensor / "intrinsics.txt", K)
    return CAMERA, 1 / 1000


def tum(root):
    sequence = root / "rgbd_dataset_freiburg2_desk"
    write_rgb(sequence / "rgb" / "1311868164.36.png")
    write_rgb(sequence / "rgb" / "1311868164.60.png")
    write_u16(sequence / "depth" / "1311868164.37.png", DEPTH, 5000)
    write_text(
        sequence / "rgb.txt",
        "# color images\n1311868164.36 rgb/1311868164.36.png\n1311868164.60 rgb/1311868164.60.png\n",
    )
    write_text(sequence / "depth.txt", "# depth\n1311868164.37 depth/1311868164.37.png\n")
    return readers.TUM_CAMERAS["freiburg2"], 1 / 5000


def eth3d(root):
    scene = root / "courtyard"
    write_rgb(scene / "images" / "dslr_images" / "DSC_0286.png")
    path = scene / "ground_truth_depth" / "dslr_images" / "DSC_0286.png"
    path.parent.mkdir(parents=True)
    np.where(DEPTH > 0, DEPTH, np.inf).astype("<f4").tofile(path)
    folder = scene / "dslr_calibration_jpg"
    write_text(
        folder / "cameras.txt", f"# Camera list\n0 THIN_PRISM_FISHEYE {W} {H} 100.5 101.5 8.25 6.75 0 0 0 0 0 0 0 0\n"
    )
    pose = "0 1 0 0 0 0 0 0 0 dslr_images/DSC_0286.png\n1.5 2.5 -1 3 4 7\n"
    write_text(folder / "images.txt", f"# Image list\n{pose}")
    return CAMERA, 1e-6


def folder(root):
    write_rgb(root / "rgb" / "a.png")
    (root / "depth").mkdir()
    np.save(root / "depth" / "a.npy", DEPTH)
    np.save(root / "intrinsics.npy", np.array([[100.5, 0, 8.25], [0, 101.5, 6.75], [0, 0, 1]]))
    return CAMERA, 1e-6


TREES = {f.__name__: f for f in (nyu, kitti, sunrgbd, ibims, void, hammer, tum, eth3d, folder)}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_in_the_datasets_own_format_is_read(name, tmp_path):
    camera, step = TREES[name](tmp_path)
    entries = readers.READERS[name](tmp_path)
    assert len(entries) == 1
    frame = entries[0].read()
    np.testing.assert_array_equal(frame.image, RGB)
    assert frame.camera[0] == "pinhole" and frame.camera[1] == pytest.approx(camera[1])
    assert frame.depth_m.dtype == np.float32
    np.testing.assert_allclose(frame.depth_m, DEPTH, atol=step)
    assert (frame.depth_m[0, :4] == 0).all(), "what was not measured is 0"


@pytest.mark.parametrize("name", [*readers.READERS])
def test_an_empty_folder_and_a_missing_one_are_told(name, tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(tmp_path)):
            readers.READERS[name](root)


def test_diode_reads_its_mask_and_cleans_boundaries(tmp_path):
    """A box before a wall: both keep their insides, the edge between them goes."""
    depth = np.full((48, 64, 1), 4.0, np.float32) + 0.01 * np.random.default_rng(0).random((48, 64, 1), np.float32)
    depth[12:36, 20:44] -= 2
    mask = np.ones((48, 64), np.float32)
    mask[:, :5] = 0
    scan = tmp_path / "scene_00019" / "scan_00183"
    write_rgb(scan / "00019_00183_indoors_000_010.png", np.zeros((48, 64, 3), np.uint8))
    np.save(scan / "00019_00183_indoors_000_010_depth.npy", depth)
    np.save(scan / "00019_00183_indoors_000_010_depth_mask.npy", mask)
    frame = readers.read_diode(tmp_path)[0].read()
    assert frame.camera == readers.DIODE_CAMERA
    assert (frame.depth_m[:, :5] == 0).all()
    kept = frame.depth_m > 0
    assert kept[20:28, 28:36].mean() > 0.5 and kept[:8, 8:].mean() > 0.5
    assert kept[12:36, 19:21].mean() < 0.1
    np.testing.assert_array_equal(frame.depth_m[kept], depth[..., 0][kept])


def test_ibims_leaves_out_what_its_masks_mark(tmp_path):
    ibims(tmp_path)
    mask = np.ones((H, W))
    mask[5] = 0
    write_u16(tmp_path / "mask_transp" / "corridor_01.png", mask, 1)
    frame = readers.read_ibims(tmp_path)[0].read()
    assert (frame.depth_m[5] == 0).all() and (frame.depth_m[6] > 0).all()


# ---------------------------------------------------------------- lidar


def quaternion(axis, angle):
    return [math.cos(angle / 2), *(math.sin(angle / 2) * np.array(axis))]


def test_quaternions_become_rotations():
    turn = driving.rotation_of(*quaternion((0, 0, 1), math.pi / 2))
    np.testing.assert_allclose(turn @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_of_several_points_in_a_pixel_the_nearest_counts():
    k = np.array([[10.0, 0, 8], [0, 10, 6], [0, 0, 1]])
    points = np.array([[0, 0, 5.0], [0, 0, 3.0], [0, 0, -2.0], [100, 0, 1.0], [0.5, 0, 5.0]])
    depth = driving.projected(points, k, (12, 16))
    assert depth[6, 8] == 3 and depth[6, 9] == 5 and (depth > 0).sum() == 2


def test_nuscenes_carries_the_lidar_through_the_vehicles_poses(tmp_path):
    """The car drives 1 m ahead between sweep and picture: a point 5 m before the lidar is 4 m before the camera."""
    tables = tmp_path / "v1.0-mini"
    tables.mkdir()
    camera_rotation = quaternion((1 / math.sqrt(3), -1 / math.sqrt(3), 1 / math.sqrt(3)), -2 * math.pi / 3)
    turn = driving.rotation_of(*camera_rotation)
    assert (turn @ [0, 0, 1] == pytest.approx([1, 0, 0])) and (turn @ [1, 0, 0] == pytest.approx([0, -1, 0]))
    rows = {
        "sensor": [{"token": "s1", "channel": "CAM_FRONT"}, {"token": "s2", "channel": "LIDAR_TOP"}],
        "calibrated_sensor": [
            {
                "token": "c1",
                "sensor_token": "s1",
                "translation": [0, 0, 1],
                "rotation": camera_rotation,
                "camera_intrinsic": [[20, 0, 8], [0, 20, 6], [0, 0, 1]],
            },
            {
                "token": "c2",
                "sensor_token": "s2",
                "translation": [0, 0, 1],
                "rotation": [1, 0, 0, 0],
                "camera_intrinsic": [],
            },
        ],
        "ego_pose": [
            {"token": "e1", "translation": [11, 3, 0], "rotation": [1, 0, 0, 0]},
            {"token": "e2", "translation": [10, 3, 0], "rotation": [1, 0, 0, 0]},
        ],
        "sample_data": [
            {
                "sample_token": "t",
                "is_key_frame": True,
                "calibrated_sensor_token": sensor,
                "ego_pose_token": pose,
                "filename": file,
            }
            for sensor, pose, file in (("c1", "e1", "cam/a.png"), ("c2", "e2", "lidar/a.pcd.bin"))
        ],
    }
    for name, content in rows.items():
        write_text(tables / f"{name}.json", json.dumps(content))
    write_rgb(tmp_path / "cam" / "a.png")
    (tmp_path / "lidar").mkdir()
    np.array([[5, 0, 0, 0.5, 3], [5, -1, 0, 0.5, 3]], np.float32).tofile(tmp_path / "lidar" / "a.pcd.bin")
    frame = readers.READERS["nuscenes"](tmp_path)[0].read()
    assert frame.depth_m[6, 8] == pytest.approx(4)
    assert frame.depth_m[6, 13] == pytest.approx(4), "a metre to the right at 4 m is 5 pixels"
    assert frame.camera[1] == (20, 20, 8, 6)


def test_ddad_projects_its_lidar(tmp_path):
    scene = tmp_path / "000150"
    identity = {"translation": {"x": 0, "y": 0, "z": 0}, "rotation": {"qw": 1, "qx": 0, "qy": 0, "qz": 0}}
    ahead = {**identity, "translation": {"x": 0, "y": 0, "z": 2}}
    content = {
        "samples": [{"calibration_key": "cal", "datum_keys": ["k1", "k2"]}],
        "data": [
            {
                "key": "k1",
                "id": {"name": "CAMERA_01"},
                "datum": {"image": {"filename": "rgb/CAMERA_01/1.png", "pose": ahead}},
            },
            {
                "key": "k2",
                "id": {"name": "LIDAR"},
                "datum": {"point_cloud": {"filename": "point_cloud/LIDAR/1.npz", "pose": identity}},
            },
        ],
    }
    write_text(scene / "scene_abc.json", json.dumps(content))
    intrinsics = {"names": ["LIDAR", "CAMERA_01"], "intrinsics": [{}, {"fx": 20, "fy": 20, "cx": 8, "cy": 6}]}
    write_text(scene / "calibration" / "cal.json", json.dumps(intrinsics))
    write_rgb(scene / "rgb" / "CAMERA_01" / "1.png")
    (scene / "point_cloud" / "LIDAR").mkdir(parents=True)
    np.savez(scene / "point_cloud" / "LIDAR" / "1.npz", data=np.array([[0, 0, 9.0, 0.3]], np.float32))
    frame = readers.READERS["ddad"](tmp_path)[0].read()
    assert frame.depth_m[6, 8] == pytest.approx(7) and (frame.depth_m > 0).sum() == 1


# ---------------------------------------------------------------- plain folders and files


def test_a_manifest_names_scale_and_camera(tmp_path):
    write_rgb(tmp_path / "a.png")
    write_u16(tmp_path / "a_depth.png", DEPTH, 5000)
    frames = [
        {
            "id": "one",
            "rgb": "a.png",
            "depth": "a_depth.png",
            "depth_scale": 5000,
            "intrinsics": [100.5, 101.5, 8.25, 6.75],
        },
        {"rgb": "a.png", "depth": "a_depth.png", "depth_scale": 5000, "intrinsics": None},
        {
            "rgb": "a.png",
            "depth": "a_depth.png",
            "depth_scale": 5000,
            "camera": {"name": "EUCM", "params": [60, 60, 8, 6, 0.5, 1]},
        },
    ]
    write_text(tmp_path / "frames.json", json.dumps({"frames": frames}))
    read = [entry.read() for entry in data.read_folder(tmp_path)]
    assert read[0].name == "one" and read[0].camera == CAMERA
    assert read[1].camera is None and read[1].intrinsics is None
    assert read[2].camera == ("eucm", (60, 60, 8, 6, 0.5, 1)) and read[2].intrinsics is None
    np.testing.assert_allclose(read[0].depth_m, DEPTH, atol=1 / 5000)


def test_a_csv_manifest_says_the_same(tmp_path):
    write_rgb(tmp_path / "a.png")
    write_u16(tmp_path / "a_depth.png", DEPTH, 256)
    write_text(
        tmp_path / "frames.csv", "rgb,depth,depth_scale,fx,fy,cx,cy\na.png,a_depth.png,256,100.5,101.5,8.25,6.75\n"
    )
    frame = data.read_folder(tmp_path)[0].read()
    assert frame.camera == CAMERA
    np.testing.assert_allclose(frame.depth_m, DEPTH, atol=1 / 256)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([{"rgb": "a.png"}], "no 'depth'"),
        ([{"rgb": "a.png", "depth": "b.png", "intrinsics": [1, 2]}], "cannot be understood"),
        ("none", "expected"),
    ],
)
def test_a_wrong_manifest_is_told(frames, words, tmp_path):
    write_text(tmp_path / "frames.json", json.dumps({"frames": frames}))
    with pytest.raises(UserError, match=words):
        data.read_folder(tmp_path)


def test_a_picture_without_depth_is_named(tmp_path):
    folder(tmp_path)
    write_rgb(tmp_path / "rgb" / "b.png")
    with pytest.raises(UserError, match=r"no depth for b\.png"):
        data.read_folder(tmp_path)


def test_depth_is_the_same_from_every_kind_of_file(tmp_path):
    np.save(tmp_path / "a.npy", DEPTH)
    np.savez(tmp_path / "a.npz", depth=DEPTH)
    write_u16(tmp_path / "a.png", DEPTH, 1000)
    (tmp_path / "a.pfm").write_bytes(b"Pf\n16 12\n-1.0\n" + DEPTH[::-1].astype("<f4").tobytes())
    for suffix in ("npy", "npz", "png", "pfm"):
        np.testing.assert_allclose(read_depth(tmp_path / f"a.{suffix}"), DEPTH, atol=5e-4, err_msg=suffix)


def test_what_is_not_a_depth_is_zero(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, np.nan], [-2.0, np.inf]]))
    np.testing.assert_array_equal(read_depth(tmp_path / "a.npy"), [[1, 0], [0, 0]])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.npy", b"not numpy"), ("a.png", b"not png"), ("a.pfm", b"P6\n1 1\n255\nabc"), ("a.jpg", b""), ("b.npz", b"PK")],
)
def test_a_damaged_depth_file_is_told(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_depth(tmp_path / name)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=20))
def test_the_rotation_of_sun_rgbd_is_undone(numbers):
    stored = np.array(numbers, np.uint16)
    turned = (stored << np.uint16(3)) | (stored >> np.uint16(13))
    np.testing.assert_array_equal(data.unrotated(turned), stored.astype(np.float32))


# ---------------------------------------------------------------- views to train on


def ramp() -> Frame:
    """A picture whose red is its column and whose depth is its column plus 1."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 0] = 4 * np.arange(60)
    depth = np.tile(np.arange(1, 61, dtype=np.float32), (40, 1))
    depth[:, 30] = 0
    return Frame("ramp", image, depth, ("pinhole", (50.0, 50.0, 30.0, 20.0)))


@pytest.mark.parametrize("scale", [0.4, 0.7, 1.0, 2.0])
def test_a_view_keeps_picture_depth_and_camera_together(scale):
    """Where the camera says that a column of the frame lies, picture and depth have that column's values."""
    image, depth, k = data.cut_view(ramp(), scale, (3.0, 0.0), (20, 30))
    columns = (np.arange(30) + 0.5 - float(k[0, 2])) / float(k[0, 0]) * 50 + 30  # where each pixel looks in the frame
    inside = (columns > 2) & (columns < 58)
    red = image[0, 10].numpy() * 255 / 4 + 0.5
    np.testing.assert_allclose(red[inside], columns[inside], atol=0.8)
    found = depth[0, 10].numpy()
    measured = inside & (found > 0)
    np.testing.assert_allclose(found[measured] - 0.5, columns[measured], atol=0.51)
    assert set(found[found > 0].tolist()) <= set(range(1, 61)), "depth is never interpolated"
    assert (found[(columns < 0) | (columns > 60)] == 0).all()


def test_views_are_a_pure_function_of_their_number():
    entries = [data.Entry("ramp", ramp)]
    one, other = (data.FrameViews(entries, (20, 30), seed=3) for _ in range(2))
    a, b = one.sample(5), other.sample(5)
    assert all((a[name] == b[name]).all() for name in a)
    assert (one.sample(4)["image"] != a["image"]).any()
    assert a["image"].shape == (3, 20, 30) and a["depth"].shape == (1, 20, 30)


def test_training_without_a_camera_is_told():
    frame = Frame("x", RGB, DEPTH, None)
    with pytest.raises(UserError, match="x: training needs a pinhole camera"):
        data.FrameViews([data.Entry("x", lambda: frame)], (8, 8)).sample(0)


def test_the_real_frames_are_read(data_root):
    entries = data.read_folder(data_root / "depth" / "rgbd")
    assert len(entries) == 9
    for entry in entries:
        frame = entry.read()
        share = float((frame.depth_m > 0).mean())
        deepest = 85 if "kitti" in entry.name else 11
        assert share > 0.1 and 1 < frame.depth_m.max() < deepest, entry.name
        assert frame.image.shape[:2] == frame.depth_m.shape
