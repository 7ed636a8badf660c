"""Video, a frame at a time: readers and writers that hold a few frames, however long the film is. Imports no torch.

FFmpeg does the work, through PyAV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from tenfold.core.console import UserError, warn
from tenfold.core.files import atomic_write, disk_error
from tenfold.core.images import max_pixels_allowed

READABLE_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp"}
)

# FFmpeg's encoder, and settings at which the difference to the frames is hard to see. Constant quality, not bit rate.
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"crf": "18", "preset": "medium"}),
    "hevc": ("libx265", {"crf": "20", "preset": "medium", "x265-params": "log-level=error"}),
    "vp9": ("libvpx-vp9", {"crf": "24", "b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "2"}),
}
# Players take untagged video of this height and more for BT.709, below for BT.601.
_HIGH_DEFINITION_HEIGHT = 720
# Pictures that end earlier than the file's stated length by more than this are worth a warning.
_DURATION_MARGIN_S = 1
_BT709, _SMPTE170M, _UNSPECIFIED, _LIMITED_RANGE = 1, 6, 2, 1  # codes of ITU-T H.273


class VideoReader:
    """A video file as an iterable of frames, upright, HxWx3 uint8 RGB. Each iteration starts at the beginning.

    Args:
        path: a file in any container that FFmpeg knows.

    Attributes:
        fps: average frames a second.
        size: (width, height) in pixels, after rotation.
        frame_count: number of frames by the container's index, or None where it has none.
        duration_s: length in seconds, or None.
        time_base: unit of the file's own timestamps, in seconds.
        pixel_aspect: width of a pixel over its height, after rotation.
        audio_streams: number of sound tracks.

    Raises:
        UserError: no such file, not a video, no picture in it, damaged, or frames above the size limit.

    Example:
        >>> for frame in VideoReader("film.mp4"):  # doctest: +SKIP
        ...     print(frame.shape)
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(f"{path}: is a folder, not a video")
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        with self._open() as container:
            stream = self._picture_stream(container)
            if stream.width * stream.height > max_pixels_allowed():
                raise UserError(f"{path}: frames of {stream.width}x{stream.height} pixels are above the size limit")
            first = next(self._decode(container, stream), None)
            if first is None:
                raise UserError(f"{path}: damaged video (not one frame can be decoded)")
            self._turns = _quarter_turns(first)
            self._stored_size = (first.width, first.height)
            sideways = self._turns % 2 == 1
            self.size = (first.height, first.width) if sideways else (first.width, first.height)
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.frame_count = stream.frames or None
            self.time_base = Fraction(stream.time_base or 1 / self.fps)
            self.duration_s = _duration_s(container, stream)
            aspect = Fraction(stream.sample_aspect_ratio or 1)
            self.pixel_aspect = 1 / aspect if sideways else aspect
            self.audio_streams = len(container.streams.audio)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (frame for frame, _ in self.timed_frames())

    def timed_frames(self) -> Iterator[tuple[np.ndarray, Fraction]]:
        """Frames with the time in seconds at which each is shown.

        Raises:
            UserError: on the way, where the file is damaged or ends before its index says.
        """
        time = -1 / self.fps
        with self._open() as container:
            for frame in self._decode(container, self._picture_stream(container)):
                time = frame.pts * Fraction(frame.time_base) if frame.pts is not None else time + 1 / self.fps
                if (frame.width, frame.height) != self._stored_size:
                    raise UserError(f"{self.path}: the frame size changes at {float(time):.2f} s; split it there first")
                rgb = frame.to_ndarray(format="rgb24", src_colorspace=_colour_matrix(frame.colorspace, frame.height))
                yield np.ascontiguousarray(np.rot90(rgb, self._turns)), time

    def _open(self) -> Any:
        try:
            return av.open(str(self.path), metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a video that can be read ({_reason(error)})") from None

    def _picture_stream(self, container: Any) -> Any:
        """The first video stream that is no cover picture of a sound file."""
        for stream in container.streams.video:
            if not stream.disposition & av.stream.Disposition.attached_pic:
                if stream.codec_context is None:
                    raise UserError(f"{self.path}: no decoder for its codec here")
                stream.thread_type = "AUTO"
                return stream
        raise UserError(f"{self.path}: has no video stream")

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        packets, end = 0, Fraction(0)
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.pts is not None:
                    end = max(end, (packet.pts + (packet.duration or 0)) * Fraction(packet.time_base))
                yield from packet.decode()
        except (av.FFmpegError, ValueError) as error:
            raise UserError(f"{self.path}: damaged or truncated video ({_reason(error)})") from None
        if packets < stream.frames:
            raise UserError(f"{self.path}: truncated video (it ends after {packets} of {stream.frames} frames)")
        # Without an index of frames only the stated length tells; the sound may rightly be a little longer.
        expected = _duration_s(container, stream)
        if not stream.frames and expected and end + _DURATION_MARGIN_S < expected:
            warn(f"{self.path}: may be truncated (its pictures end at {float(end):.2f} of {expected:.2f} s)")


def _duration_s(container: Any, stream: Any) -> float | None:
    """Length in seconds by the header of the stream, else of the file; None where neither says."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return float((container.duration or 0) / av.time_base) or None


class VideoWriter:
    """Encode frames into a file that appears when it is complete, and not at all after an error or Ctrl-C.

    Args:
        path: the suffix names the container (.mp4, .mov, .mkv, .webm).
        fps: frames a second.
        size: (width, height) of the frames. Odd sides are padded by one repeated row or column, as encoders need.
        audio_from: copy the sound tracks of this file, unchanged.
        codec: a key of `CODECS`.
        time_base: unit of the timestamps that are given to `write`; None: one frame.
        pixel_aspect: width of a pixel over its height.

    Raises:
        UserError: unknown codec, a container that cannot hold codec or sound, or a disk that refuses.

    Example:
        >>> with VideoWriter("out.mp4", 25, (640, 480)) as writer:  # doctest: +SKIP
        ...     writer.write(np.zeros((480, 640, 3), np.uint8))
    """

    def __init__(
        self,
        path: Path | str,
        fps: Fraction | float,
        size: tuple[int, int],
        audio_from: Path | str | None = None,
        codec: str = "h264",
        time_base: Fraction | None = None,
        pixel_aspect: Fraction = Fraction(1),
    ) -> None:
        if codec not in CODECS:
            raise UserError(f"unknown video codec {codec!r}: choose one of {', '.join(CODECS)}")
        self.path = Path(path)
        self.size = size
        self.fps = Fraction(fps).limit_denominator(1001 * 1000)
        self._codec = codec
        self._audio_from = audio_from
        self._time_base = time_base or 1 / self.fps
        self._pixel_aspect = pixel_aspect
        self._last_timestamp: int | None = None
        self._frames = 0
        self._stack = ExitStack()

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_write(self.path))
            self._container = self._attempt(lambda: av.open(str(temporary), "w"))
            stack.callback(self._close_quietly)
            self._stream = self._attempt(self._add_picture_stream)
            self._sound = self._attempt(lambda: self._add_sound(stack))
            self._attempt(self._container.start_encoding)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The stack must see an error that happens in here as well, or it would put a broken file in place.
        with self._stack:
            if error is not None:
                raise error
            if not self._frames:
                raise UserError(f"{self.path}: no frame was written")
            self._attempt(lambda: self._container.mux(self._stream.encode(None)))
            self._copy_sound(None)
            self._attempt(self._container.close)

    def write(self, frame: np.ndarray, time_s: Fraction | float | None = None) -> None:
        """Add a frame.

        Args:
            frame: HxWx3 uint8 RGB of the writer's size.
            time_s: when it is shown, in seconds; None: right after the frame before.
        """
        width, height = self.size
        if frame.shape != (height, width, 3) or frame.dtype != np.uint8:
            raise ValueError(f"expected {height}x{width}x3 uint8, found shape {frame.shape}, {frame.dtype}")
        if width % 2 or height % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        matrix = _colour_matrix(_UNSPECIFIED, frame.shape[0])
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=_LIMITED_RANGE)
        time = Fraction(time_s) if time_s is not None else self._frames / self.fps
        timestamp = round(time / self._time_base)
        if self._last_timestamp is not None:
            timestamp = max(timestamp, self._last_timestamp + 1)
        picture.pts, picture.time_base = timestamp, self._time_base
        self._last_timestamp = timestamp
        self._frames += 1
        self._attempt(lambda: self._container.mux(self._stream.encode(picture)))
        self._copy_sound(timestamp * self._time_base)

    def _add_picture_stream(self) -> Any:
        encoder, options = CODECS[self._codec]
        try:
            stream = self._container.add_stream(encoder, rate=self.fps, options=options)
        except av.error.LookupError:
            raise UserError(f"this build of FFmpeg has no {encoder}; choose another codec") from None
        stream.width, stream.height = (side + side % 2 for side in self.size)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = self._time_base
        high = stream.height >= _HIGH_DEFINITION_HEIGHT
        context.colorspace = context.color_primaries = context.color_trc = _BT709 if high else _SMPTE170M
        context.color_range = _LIMITED_RANGE
        if self._pixel_aspect != 1:
            context.sample_aspect_ratio = self._pixel_aspect
        if self._codec == "hevc" and self.path.suffix.lower() in (".mp4", ".mov"):
            context.codec_tag = "hvc1"  # what Apple's players look for
        return stream

    def _add_sound(self, stack: ExitStack) -> Iterator[Any]:
        """Packets of the copied sound tracks, in order, each already assigned to its new track."""
        if self._audio_from is None:
            return iter(())
        source = stack.enter_context(av.open(str(self._audio_from), metadata_errors="replace"))
        tracks = {}
        for stream in source.streams.audio:
            try:
                tracks[stream.index] = self._container.add_stream_from_template(stream)
            except ValueError:
                name = stream.codec_context.name if stream.codec_context else "unknown"
                raise UserError(f"{self.path}: this container cannot hold the sound ({name}); use .mkv") from None
        return self._sound_packets(source, tracks) if tracks else iter(())

    @staticmethod
    def _sound_packets(source: Any, tracks: dict[int, Any]) -> Iterator[Any]:
        for packet in source.demux(*source.streams.audio):
            if packet.dts is not None:
                track = tracks[packet.stream.index]
                packet.stream = track
                yield packet

    def _copy_sound(self, until: Fraction | None) -> None:
        """Mux the sound up to a time in seconds, or all that is left: interleaved, so that little is held back."""
        for packet in self._sound:
            time = packet.dts * Fraction(packet.time_base)
            self._attempt(partial(self._container.mux, packet))
            if until is not None and time > until:
                return

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Run FFmpeg code; its errors become ours."""
        try:
            return action()
        except OSError as error:
            raise disk_error(self.path, error) from error
        except (av.FFmpegError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be encoded ({_reason(error)})") from error

    def _close_quietly(self) -> None:
        with suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that make a frame upright."""
    return round(frame.rotation / 90) % 4


def _colour_matrix(colorspace: int, height: int) -> int:
    """The YCbCr matrix of a frame: as tagged, else by its height."""
    if colorspace != _UNSPECIFIED:
        return colorspace
    return _BT709 if height >= _HIGH_DEFINITION_HEIGHT else _SMPTE170M


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())
