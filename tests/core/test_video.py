import resource
from fractions import Fraction

import av
import numpy as np
import pytest

from tenfold.core.console import UserError
from tenfold.core.video import CODECS, VideoReader, VideoWriter

SIZE = (64, 48)


def frame(index, size=SIZE):
    """A gradient that changes with time: every frame of a film is told apart."""
    y, x = np.mgrid[: size[1], : size[0]]
    return np.stack([x * 200 // size[0], y * 200 // size[1], np.full_like(x, 20 * index % 256)], -1).astype(np.uint8)


def film(path, count=10, size=SIZE, **options):
    with VideoWriter(path, 25, size, **options) as writer:
        for index in range(count):
            writer.write(frame(index, size))
    return path


def with_sound(path, codec="aac", seconds=0.4, pictures=True):
    """A film with a tone, written by PyAV directly."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"}) if pictures else None
        if video is not None:
            video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        audio = container.add_stream(codec, rate=48000)
        audio.layout = "mono"
        for index in range(int(seconds * 25) if video is not None else 0):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame(index), format="rgb24")))
        if video is not None:
            container.mux(video.encode(None))
        samples = np.sin(np.arange(int(48000 * seconds)) * 0.05).astype(np.float32)
        sample_format = audio.codec_context.format.name
        chunk = audio.codec_context.frame_size or 1024
        for start in range(0, len(samples) - chunk + 1, chunk):
            part = samples[None, start : start + chunk]
            if sample_format.startswith("s"):
                kind = np.int16 if sample_format.startswith("s16") else np.int32
                part = (part * np.iinfo(kind).max / 2).astype(kind)
            sound = av.AudioFrame.from_ndarray(part, format=sample_format, layout="mono")
            sound.sample_rate, sound.pts = 48000, start
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    return path


def sound_packets(path):
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.audio[0])
        return [(bytes(packet), packet.pts * packet.time_base) for packet in packets if packet.dts is not None]


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("h264", ".mkv"), ("hevc", ".mov"), ("vp9", ".webm")])
def test_a_film_survives_the_round_trip(tmp_path, codec, suffix):
    reader = VideoReader(film(tmp_path / f"x{suffix}", codec=codec))
    assert reader.size == SIZE
    assert reader.fps == 25
    assert reader.frame_count in (10, None)  # Matroska has no count
    assert reader.duration_s == pytest.approx(0.4, abs=0.05)
    frames = list(reader)
    assert len(frames) == 10
    for index, decoded in enumerate(frames):
        assert np.abs(decoded.astype(int) - frame(index)).mean() < 4
    assert len(list(reader)) == 10, "a reader can be iterated again"


@pytest.mark.parametrize("size", [(64, 48), (1280, 720)])
def test_colours_are_kept_in_standard_and_high_definition(tmp_path, size):
    colours = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128))
    with VideoWriter(tmp_path / "x.mp4", 25, size) as writer:
        for colour in colours:
            writer.write(np.full((size[1], size[0], 3), colour, np.uint8))
    for colour, decoded in zip(colours, VideoReader(tmp_path / "x.mp4"), strict=True):
        assert np.abs(decoded.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("size", [(63, 47), (64, 47), (1, 1)])
def test_odd_sizes_are_padded_with_the_edge(tmp_path, size):
    reader = VideoReader(film(tmp_path / "x.mp4", size=size))
    assert reader.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    decoded = next(iter(reader)).astype(int)
    assert np.abs(decoded[: size[1], : size[0]] - frame(0, size)).max() < 12
    assert np.abs(decoded[-1] - decoded[-1 - size[1] % 2]).max() < 12


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_films_come_out_upright(tmp_path, degrees):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(0), format="rgb24")))
        container.mux(stream.encode(None))
    reader = VideoReader(tmp_path / "x.mp4")
    assert reader.size == (SIZE if degrees % 180 == 0 else SIZE[::-1])
    decoded = next(iter(reader)).astype(int)
    assert np.abs(decoded - np.rot90(frame(0), degrees // 90)).mean() < 5


def test_uneven_timestamps_are_kept(tmp_path):
    times = [Fraction(n, 90000) for n in (0, 3000, 9000, 9100, 30000)]
    with VideoWriter(tmp_path / "x.mp4", 25, SIZE, time_base=Fraction(1, 90000)) as writer:
        for index, time in enumerate(times):
            writer.write(frame(index), time)
    reader = VideoReader(tmp_path / "x.mp4")
    assert [time for _, time in reader.timed_frames()] == times


def test_equal_timestamps_do_not_stop_the_writer(tmp_path):
    with VideoWriter(tmp_path / "x.mp4", 25, SIZE) as writer:
        for index in range(4):
            writer.write(frame(index), 0)
    assert len(list(VideoReader(tmp_path / "x.mp4"))) == 4


@pytest.mark.parametrize(("codec", "suffix"), [("aac", ".mp4"), ("libmp3lame", ".mp4"), ("libopus", ".webm")])
def test_sound_is_copied_packet_by_packet(tmp_path, codec, suffix):
    source = with_sound(tmp_path / f"source{'.mkv' if codec != 'aac' else '.mp4'}", codec)
    target = tmp_path / f"x{suffix}"
    film(target, audio_from=source, codec="vp9" if suffix == ".webm" else "h264")
    before, after = sound_packets(source), sound_packets(target)
    assert [content for content, _ in after] == [content for content, _ in before]
    assert [float(time) for _, time in after] == pytest.approx([float(time) for _, time in before], abs=2e-3)
    assert VideoReader(target).audio_streams == 1


def test_sound_and_picture_are_interleaved(tmp_path):
    source = with_sound(tmp_path / "source.mp4", seconds=4)
    film(tmp_path / "x.mkv", count=100, audio_from=source)
    with av.open(str(tmp_path / "x.mkv")) as container:
        kinds = [packet.stream.type for packet in container.demux() if packet.dts is not None]
    middle = kinds[len(kinds) // 3 : 2 * len(kinds) // 3]
    assert {"audio", "video"} == set(middle)


def test_a_film_without_sound_has_none_to_copy(tmp_path):
    source = film(tmp_path / "source.mp4")
    assert VideoReader(film(tmp_path / "x.mp4", audio_from=source)).audio_streams == 0


def test_a_container_that_cannot_hold_the_sound_is_named_at_once(tmp_path):
    source = with_sound(tmp_path / "source.mp4")
    with pytest.raises(UserError, match=r"cannot hold the sound \(aac\); use \.mkv"):
        film(tmp_path / "x.webm", audio_from=source, codec="vp9")
    assert not (tmp_path / "x.webm").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "sound_only", "no_index"])
def test_what_is_no_video_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "x.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no film at all " * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "sound_only":
        with_sound(path, pictures=False)
    elif kind == "no_index":
        film(path)
        path.write_bytes(path.read_bytes()[:-900])  # cuts into the index, which is at the end
    with pytest.raises(UserError) as error:
        VideoReader(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_film_cut_short_after_its_index_is_reported(tmp_path):
    source = film(tmp_path / "source.mp4", count=60)
    path = tmp_path / "x.mp4"
    with av.open(str(source)) as container, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.6)])
    with pytest.raises(UserError, match="truncated"):
        list(VideoReader(path))


def test_frames_above_the_size_limit_are_refused(tmp_path, monkeypatch):
    film(tmp_path / "x.mp4")
    monkeypatch.setenv("TENFOLD_MAX_MEGAPIXELS", "0.003")
    with pytest.raises(UserError, match="size limit"):
        VideoReader(tmp_path / "x.mp4")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_film_leaves_what_was_there(tmp_path, failure):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"the earlier film")
    with pytest.raises(failure), VideoWriter(path, 25, SIZE) as writer:
        writer.write(frame(0))
        raise failure
    assert path.read_bytes() == b"the earlier film"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.mp4"]


def test_a_film_without_frames_is_no_film(tmp_path):
    with pytest.raises(UserError, match="no frame"):
        film(tmp_path / "x.mp4", count=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "codec"), [("x.mp4", "mpeg17"), ("x.txt", "h264"), ("x.webm", "h264")])
def test_impossible_outputs_are_refused_and_leave_no_file(tmp_path, name, codec):
    with pytest.raises(UserError) as error:
        film(tmp_path / name, codec=codec)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_frame_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="uint8"), VideoWriter(tmp_path / "x.mp4", 25, SIZE) as writer:
        writer.write(np.zeros((48, 64, 3), np.float32))


def test_a_full_disk_is_reported_and_leaves_no_file(tmp_path):
    # A limit on the size of files acts like a full disk, by an OSError in the middle of the write, and needs no mount.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (12, 192, 256, 3), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, hard))
    try:
        with pytest.raises(UserError, match="cannot write"), VideoWriter(tmp_path / "x.mp4", 25, (256, 192)) as writer:
            for picture in noise:
                writer.write(picture)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_all_codecs_are_in_this_build():
    for encoder, _ in CODECS.values():
        assert encoder in av.codecs_available


def test_a_film_without_an_index_that_was_cut_short_gets_a_warning(tmp_path, capsys):
    path = tmp_path / "film.mkv"
    with VideoWriter(path, 10, (64, 48)) as writer:
        for seed in range(40):
            writer.write(np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    assert len(list(VideoReader(path))) == 40
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 0 < len(list(VideoReader(path))) < 30
    assert "may be truncated" in capsys.readouterr().err
