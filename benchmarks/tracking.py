"""Speed of the room tracking beside its peers: `python -m benchmarks.tracking [--quick]`.

Everything takes turns in one process on one thread, so that a busy machine slows all alike; times are the processor's,
and ratios are formed within each turn. Association: boxes and 256-d embeddings are given; the official style and ours
must find the same identities. Adapter: the official structure with torchvision's kernel against ours, at equal outputs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks._official_tracking import BddTracker, TaoTracker, plain_deform_conv
from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.tracking.association import Associator
from tenfold.tracking.config import MATCHERS, MasaConfig
from tenfold.tracking.model import Masa, fusion

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "tracking.json"
COUNTS = (20, 100, 500)
LENGTH = 256

Frame = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def walk(count: int, frames: int, seed: int = 0) -> list[Frame]:
    """A random walk of `count` objects in 1920 x 1080, 5 % missed: boxes, scores, labels, embeddings of each frame."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0, 1, (count, 2)) * (1920, 1080)
    size = rng.uniform(20, 80, (count, 2))
    own = rng.normal(0, 1, (count, LENGTH)).astype(np.float32)
    result = []
    for _ in range(frames):
        centre += rng.normal(0, 3, centre.shape)
        seen = rng.random(count) > 0.05
        boxes = np.concatenate((centre - size / 2, centre + size / 2), axis=1)[seen].astype(np.float32)
        embeds = own[seen] + rng.normal(0, 0.3, (int(seen.sum()), LENGTH)).astype(np.float32)
        scores = rng.uniform(0.55, 1, len(boxes)).astype(np.float32)
        result.append((boxes, scores, np.zeros(len(boxes), np.int64), embeds))
    return result


Step = Callable[[int, Frame], list[int] | None]


def official(tracker: TaoTracker | BddTracker) -> Step:
    """A tracker in the official style as a function of frame number and frame."""

    def step(number: int, frame: Frame) -> list[int]:
        boxes, scores, labels, embeds = (torch.from_numpy(part) for part in frame)
        return tracker.update(boxes, labels, scores, embeds, number).tolist()

    return step


def ours(name: str) -> Step:
    """Our association under a named set of rules."""
    tracker = Associator(MATCHERS[name])
    return lambda number, frame: tracker.update(*frame, number).ids.tolist()


def peers() -> dict[str, Callable[[], Step]]:
    """Motion-only trackers of other packages, on the same boxes."""
    import supervision
    from motpy import Detection, MultiObjectTracker
    from norfair import Detection as NorfairDetection
    from norfair import Tracker as NorfairTracker
    from trackers import ByteTrackTracker, OCSORTTracker, SORTTracker

    def detections(frame: Frame) -> supervision.Detections:
        return supervision.Detections(xyxy=frame[0], confidence=frame[1], class_id=frame[2])

    def of_trackers(kind: type) -> Callable[[], Step]:
        def make() -> Step:
            tracker = kind()

            def step(number: int, frame: Frame) -> None:
                tracker.update(detections(frame))

            return step

        return make

    def norfair() -> Step:
        tracker = NorfairTracker(distance_function="iou", distance_threshold=0.7)

        def step(number: int, frame: Frame) -> None:
            tracker.update(
                [NorfairDetection(box.reshape(2, 2), np.full(2, s)) for box, s in zip(*frame[:2], strict=True)]
            )

        return step

    def motpy() -> Step:
        tracker = MultiObjectTracker(dt=0.1)

        def step(number: int, frame: Frame) -> None:
            tracker.step([Detection(box=box, score=float(s)) for box, s in zip(*frame[:2], strict=True)])

        return step

    return {
        "trackers SORT": of_trackers(SORTTracker),
        "trackers ByteTrack": of_trackers(ByteTrackTracker),
        "trackers OC-SORT": of_trackers(OCSORTTracker),
        "norfair": norfair,
        "motpy": motpy,
    }


def association(count: int, frames: int, turns: int) -> dict[str, list[float]]:
    """Processor milliseconds a frame of each way in each turn; the official style's identities must be ours."""
    scene = walk(count, frames)
    ways: dict[str, Callable[[], Step]] = {
        "official style, tao": lambda: official(TaoTracker(1e-4, 1e-4, 0.5)),
        "official style, bdd": lambda: official(BddTracker()),
        "ours, tao": lambda: ours("tao"),
        "ours, bdd": lambda: ours("bdd"),
        "ours, video (Hungarian, Kalman)": lambda: ours("video"),
        **peers(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        found: dict[str, list] = {}
        for name, make in ways.items():
            step = make()
            with contextlib.redirect_stdout(io.StringIO()):
                start = time.process_time()
                found[name] = [step(number, frame) for number, frame in enumerate(scene)]
                times[name].append(1000 * (time.process_time() - start) / frames)
        for rules in ("tao", "bdd"):
            if found[f"official style, {rules}"] != found[f"ours, {rules}"]:
                raise SystemExit(f"identities of {rules} differ at {count} objects")
    return times


@torch.inference_mode()
def adapter(size: tuple[int, int], turns: int) -> tuple[dict[str, list[float]], float]:
    """Processor seconds of MASA-R50's adapter by torchvision's kernel and by ours, and the largest difference.

    Args:
        size: (width, height) of the frame.
        turns: repetitions, after one of each on a small frame.
    """
    torch.manual_seed(0)
    model = Masa(MasaConfig(rcnn_layers=0)).eval()
    for block in model.fusion.blocks:
        assert isinstance(block, fusion.FusionBlock)
        torch.nn.init.normal_(block.offset.weight, 0, 0.02)
    kernels = {"torchvision's kernel": plain_deform_conv, "ours": fusion.modulated_deform_conv}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    difference = 0.0
    for turn in range(turns + 1):
        width, height = size if turn else (128, 64)
        maps = [
            torch.randn(1, channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(model.config.in_channels, model.config.strides, strict=True)
        ]
        outputs = []
        for name, kernel in kernels.items():
            fusion.modulated_deform_conv = kernel
            start = time.process_time()
            outputs.append(model.features(maps))
            if turn:
                seconds[name].append(time.process_time() - start)
        fusion.modulated_deform_conv = kernels["ours"]
        difference = max(difference, *(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True)))
    return seconds, difference


def spread(values: list[float], form: str) -> str:
    """`median (least-most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def main() -> None:
    """Measure and write results/benchmarks/tracking.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer frames and a smaller picture")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    turns = 2 if arguments.quick else 3
    times = {count: association(count, 12 if arguments.quick else 40, turns) for count in COUNTS}
    rows = [(name, *(f"{statistics.median(times[count][name]):.2f}" for count in COUNTS)) for name in times[COUNTS[0]]]
    against = []
    for rules, count in ((rules, count) for rules in ("tao", "bdd") for count in COUNTS):
        mine = times[count][f"ours, {rules}"]
        pairs = {
            other: [b / a for a, b in zip(mine, times[count][other], strict=True)]
            for other in (f"official style, {rules}", "trackers ByteTrack")
        }
        against.append((f"{rules}, {count} objects", *(spread(values, ".1f") for values in pairs.values())))
    size = (512, 288) if arguments.quick else (1024, 576)
    seconds, difference = adapter(size, 1 if arguments.quick else 2)
    ratio = [b / a for a, b in zip(seconds["ours"], seconds["torchvision's kernel"], strict=True)]
    tables = [
        Table(
            "association",
            f"Association of given boxes, processor ms a frame, one thread, median of {turns} turns; ours and the "
            f"official style with {LENGTH}-d embeddings and equal identities, the others by motion alone",
            ("way", *(f"{count} objects" for count in COUNTS)),
            rows,
        ),
        Table(
            "ratios",
            "How many times as long the others take as ours, in the same turn, median (least-most)",
            ("rules", "official style", "trackers ByteTrack"),
            against,
        ),
        Table(
            "adapter",
            f"MASA-R50's adapter (FPN, three fusion blocks, 256 channels) on maps of a frame of {size[0]} x {size[1]}, "
            f"one thread; outputs differ by {difference:.1e} at most",
            ("kernel", "processor s", "times as fast"),
            [
                ("torchvision's kernel", spread(seconds["torchvision's kernel"], ".2f"), "1"),
                ("ours", spread(seconds["ours"], ".2f"), spread(ratio, ".2f")),
            ],
        ),
    ]
    for table in tables:
        console.table(table.columns, table.rows, title=table.caption)
    write_results(
        arguments.output,
        room="tracking",
        kind="benchmark",
        seconds=time.perf_counter() - begin,
        tables=tables,
        config={"quick": arguments.quick},
        packages=("torch", "torchvision", "numpy", "scipy", "supervision", "trackers", "norfair", "motpy"),
        milliseconds=times,
        adapter_seconds=seconds,
        adapter_difference=difference,
    )


if __name__ == "__main__":
    main()
