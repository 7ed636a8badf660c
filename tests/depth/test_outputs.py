from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from depth_fixtures import PHOTOGRAPH, tiny_network
from PIL import Image

from tenfold.cli import main
from tenfold.core import images
from tenfold.core.console import UserError, to_jsonable
from tenfold.core.video import VideoReader, VideoWriter
from tenfold.depth import checkpoint, onnx_file, outputs, view
from tenfold.depth.camera_input import Camera
from tenfold.depth.predictor import Depth, DepthEstimator

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


@pytest.fixture(scope="module")
def result() -> Depth:
    picture = np.asarray(Image.open(PHOTOGRAPH).resize((96, 72)))
    return DepthEstimator(tiny_network()).predict(picture, fov_x_deg=60)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(tiny_network(), str(path))
    return str(path)


def test_numbers_come_back_from_every_file(result, tmp_path) -> None:
    OpenEXR = pytest.importorskip("OpenEXR")
    files = {path.name: path for path in result.save(tmp_path / "a", ("png16", "npy", "npz", "exr", "json"), scale=500)}
    png = images.read(files["a_depth.png"]).pixels
    assert png.dtype == np.uint16
    assert np.abs(png / 500 - result.depth_m).max() <= 0.5 / 500 + 1e-6
    assert np.array_equal(np.load(files["a_depth.npy"]), result.depth_m)
    with np.load(files["a.npz"]) as stored:
        assert np.array_equal(stored["points_m"], result.points_m)
        assert np.array_equal(stored["uncertainty_m"], result.uncertainty)
        assert np.array_equal(stored["intrinsics"], result.intrinsics)
    with OpenEXR.File(str(files["a_depth.exr"])) as exr:
        channels = exr.channels()
        assert np.array_equal(channels["Z"].pixels, result.depth_m)
    described = json.loads(files["a.json"].read_text())
    assert described["camera_source"] == "given"
    assert described["fov_x_deg"] == pytest.approx(60, abs=0.1)


def test_clouds_and_meshes_open_with_the_same_points(result, tmp_path) -> None:
    trimesh = pytest.importorskip("trimesh")
    ply, glb, mesh = result.save(tmp_path / "a", ("ply", "glb", "mesh"))
    expected = result.points_m.reshape(-1, 3)
    assert np.abs(trimesh.load(ply).vertices - expected).max() < 1e-3
    for path in (glb, mesh):
        (geometry,) = trimesh.load(path).geometry.values()
        assert np.abs(geometry.vertices - expected[: len(geometry.vertices)]).max() < 1e-3
    assert np.array_equal(trimesh.load(ply).colors[:, :3], result.image.reshape(-1, 3))


def test_farther_than_the_bound_is_left_out(result, tmp_path) -> None:
    bound = float(np.median(result.depth_m))
    png, ply = result.save(tmp_path / "a", ("png16", "ply"), max_depth_m=bound)
    assert ((images.read(png).pixels == 0) == (result.depth_m > bound)).all()
    assert len(outputs.cloud(result, bound).vertices) == int((result.depth_m <= bound).sum())
    assert ply.stat().st_size < result.depth_m.size * 20
    assert len(outputs.cloud(result, max_points=500).vertices) <= 500


def test_colours_go_from_near_to_far() -> None:
    colors = outputs.colormap(np.geomspace(1, 10, 50)[None], (1, 10))[0].astype(int)
    assert colors[2, 0] > colors[2, 2]
    assert colors[-2, 2] > colors[-2, 0] - 60


def test_an_unknown_format_is_refused(result, tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean png16"):
        result.save(tmp_path / "a", ("png",))


def test_the_page_loads_nothing(result, tmp_path) -> None:
    (path,) = result.save(tmp_path / "a", ("html",))
    text = path.read_text()
    assert "srcdoc" in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", text.replace("&quot;", '"'))


def test_viser_shows_every_point_in_its_colour_and_the_camera(result) -> None:
    pytest.importorskip("viser")
    with view.viewer([("photo", result)]) as server:
        cloud = server.scene.get_handle_by_name("/photo/points")
        camera = server.scene.get_handle_by_name("/photo/camera")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.get_port()}") as page:
            assert page.status == 200
    np.testing.assert_allclose(cloud.points, result.points_m.reshape(-1, 3), rtol=2e-3, atol=2e-3)  # half precision
    assert np.array_equal(cloud.colors, result.image.reshape(-1, 3))
    assert camera.fov == pytest.approx(2 * np.arctan(72 / 2 / result.intrinsics[1, 1]))


def test_what_lies_behind_the_camera_has_no_depth_in_a_picture_of_16_bits(tmp_path) -> None:
    picture = np.asarray(Image.open(PHOTOGRAPH).resize((96, 72)))
    camera = Camera("spherical", (0, 0, 0, 0, 96, 72, np.pi, np.pi / 2))
    found = DepthEstimator(tiny_network()).predict(picture, camera=camera)
    assert (found.depth_m < 0).mean() > 0.4
    (png,) = found.save(tmp_path / "a", ("png16",))
    stored = images.read(png).pixels
    assert (stored[found.depth_m < 0] == 0).all()
    assert (stored[found.depth_m > 0.01] > 0).all()


def test_predict_writes_and_reports(weights, tmp_path, capsys) -> None:
    assert (
        main(["depth", "predict", str(PHOTOGRAPH), "-o", str(tmp_path), "--model", weights, "--fov-x", "58", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, json.loads((SCHEMAS / "depth-predict.json").read_text()))
    assert report["done"] == 1
    assert report["files"][0]["fov_x_deg"] == pytest.approx(58, abs=0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"office_depth.png", "office_color.png", "office.json"}


def test_a_bad_file_among_good_ones_is_reported(weights, tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.open(PHOTOGRAPH).resize((80, 60)).save(folder / "good.png")
    (folder / "bad.png").write_text("no picture")
    arguments = ["depth", "predict", str(folder), "-o", str(tmp_path / "out"), "--model", weights, "--format", "npy"]
    assert main(arguments) == 1
    assert "bad.png" in capsys.readouterr().err
    assert (tmp_path / "out" / "good_depth.npy").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera", "nowhere.json"], "nowhere.json: no such file"),
        (["--fov-x", "200"], "not between 0 and 180"),
        (["--max-depth", "-1"], "--max-depth"),
        (["--resolution-level", "12"], "resolution level"),
        (["--scale", "nan"], "--scale"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(weights, tmp_path, capsys, arguments, message: str) -> None:
    assert main(["depth", "predict", str(PHOTOGRAPH), "-o", str(tmp_path), "--model", weights, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error")]) == 1


def film(path, frames: int, still: bool = True) -> None:
    picture = np.asarray(Image.open(PHOTOGRAPH).resize((96, 72)))
    with VideoWriter(path, 10, (96, 72)) as writer:
        for index in range(frames):
            writer.write(picture if still else np.roll(picture, index, axis=1))


def test_a_still_film_has_still_depth_and_one_camera(tmp_path) -> None:
    film(tmp_path / "still.mp4", 4)
    frames = list(VideoReader(tmp_path / "still.mp4"))
    same = all(np.array_equal(frames[0], frame) for frame in frames)
    results = list(DepthEstimator(tiny_network()).predict_video(tmp_path / "still.mp4"))
    assert len(results) == 4
    assert all(np.array_equal(each.intrinsics, results[0].intrinsics) for each in results)
    assert {each.camera_source for each in results} == {"predicted"}
    if same:
        assert np.stack([each.depth_m for each in results]).std(axis=0).max() == 0


def test_a_film_becomes_a_film_and_its_camera(weights, tmp_path) -> None:
    film(tmp_path / "clip.mp4", 3, still=False)
    out = tmp_path / "out"
    assert (
        main(["depth", "predict", str(tmp_path / "clip.mp4"), "-o", str(out), "--model", weights, "--format", "npy"])
        == 0
    )
    assert len(list(VideoReader(out / "clip_depth.mp4"))) == 3
    assert json.loads((out / "clip.json").read_text())["frames"] == 3
    assert len(list((out / "clip").glob("*_depth.npy"))) == 3


@pytest.mark.parametrize(("rays", "error"), [(False, True), (True, False)])
def test_onnx_is_the_network_at_sizes_it_was_not_exported_at(tmp_path, rays: bool, error: bool) -> None:
    pytest.importorskip("onnxruntime")
    result = onnx_file.write(tiny_network(), tmp_path / "a.onnx", ((84, 112), (56, 98), (112, 70)), rays, error)
    jsonschema.validate(to_jsonable(result), json.loads((SCHEMAS / "depth-export.json").read_text()))
    assert result.max_relative_difference < 1e-4
    assert result.inputs == (("image", "rays") if rays else ("image",))
    assert ("error_m" in result.outputs) == error


def test_export_refuses_sizes_that_are_no_patches(tmp_path) -> None:
    with pytest.raises(UserError, match="multiples of 14"):
        onnx_file.write(tiny_network(), tmp_path / "a.onnx", ((80, 112),))
    assert torch.is_grad_enabled()
