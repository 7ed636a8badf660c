"""Speed, memory and quality of the room superres: `python -m benchmarks.superres [--quick]`.

Speed: all networks take turns in one process on two threads, so that a busy machine slows all alike; a ratio is formed
within each turn. Memory: each picture in a process of its own. Quality: Set5, where TENFOLD_DATA names the data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks._official_style import OfficialStyle, largest_difference
from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.superres import onnx_file, tiling
from tenfold.superres.checkpoint import load_model
from tenfold.superres.config import HiTConfig
from tenfold.superres.model import HiT

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "superres.json"
THREADS = 2
REFERENCE = "SwinIR-light (spandrel)"
# (width, height, variant, scale) of the pictures whose memory is measured.
PICTURES = ((320, 180, "srf", 4), (1280, 720, "srf", 2), (1280, 720, "srf", 4), (1920, 1080, "srf", 2))

Run = Callable[[Tensor], Tensor]


def random_network(variant: str, scale: int) -> HiT:
    """A release-size network whose every weight is random, so that no branch is nearly zero."""
    torch.manual_seed(0)
    model = HiT(HiTConfig(variant=variant, scale=scale)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def swinir_light(scale: int) -> nn.Module:
    """The published SwinIR-light, built for 64 x 64: at other sizes it makes its masks anew, as its users do."""
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    network = SwinIR(
        img_size=64,
        embed_dim=60,
        depths=[6, 6, 6, 6],
        num_heads=[6, 6, 6, 6],
        window_size=8,
        mlp_ratio=2.0,
        upscale=scale,
        upsampler="pixelshuffledirect",
    )
    return network.eval()


def as_used(model: HiT) -> Run:
    """The way that `Upscaler` and the verb `upscale` run a network."""
    return lambda image: tiling.upscale_tensor(model, image)[0]


def in_other_runtimes(name: str, model: HiT, folder: Path) -> dict[str, Run]:
    """The same network in ONNX Runtime and in OpenVINO, from one file for any size."""
    import onnxruntime
    import openvino

    path = folder / f"{name}.onnx"
    onnx_file.write(model, path, sizes=((64, 64),))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting would count as processor time
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Precision is named because OpenVINO takes bfloat16 unasked where the processor has it.
    settings = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return {
        f"{name} in ONNX Runtime": lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]),
        f"{name} in OpenVINO": lambda image: torch.from_numpy(compiled({"image": image.numpy()})[0]),
    }


@torch.no_grad()
def take_turns(runs: dict[str, Run], image: Tensor, repeats: int, label: str) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each run in each of `repeats` turns, after one turn on a corner of the picture."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    with console.progress(label, (repeats + 1) * len(runs)) as bar:
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                wall, processor = time.perf_counter(), time.process_time()
                run(image if repeat else image[:, :, :72, :72])
                if repeat:
                    seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
                bar.advance(note=name)
    return seconds


def spread(values: list[float], form: str) -> str:
    """`median (least-most)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratios(name: str, caption: str, seconds: dict[str, list[tuple[float, float]]], reference: str) -> Table:
    """A table of times, and of times as multiples of `reference`'s in the same turn."""
    rows = []
    for network, times in seconds.items():
        pairs = list(zip(times, seconds[reference], strict=True))
        rows.append(
            (
                network,
                *(f"{statistics.median(turn[clock] for turn in times):.2f}" for clock in (0, 1)),
                *(spread([ours[clock] / theirs[clock] for ours, theirs in pairs], ".2f") for clock in (0, 1)),
            )
        )
    caption = (
        f"{caption}; {THREADS} threads, one process, networks in {len(seconds[reference])} turns: median seconds, and "
        f"time as a multiple of {reference}'s in the same turn, median (least-most)"
    )
    return Table(name, caption, ("network", "wall s", "processor s", "wall ratio", "processor ratio"), rows)


# In a process of its own; prints the bytes above those in use after the imports, and the method.
MEMORY_PROGRAM = """
import re, sys
from pathlib import Path
import torch
from benchmarks.superres import THREADS, random_network
from tenfold.superres import tiling

def kilobytes(entry):
    return int(re.search(entry + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

width, height, scale, variant, way = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
torch.set_num_threads(THREADS)
before = kilobytes("VmRSS")
with torch.no_grad():
    _, method = tiling.upscale_tensor(random_network(variant, scale), torch.rand(1, 3, height, width), tile=way)
print(1024 * (kilobytes("VmHWM") - before), method)
"""


def memory(pictures: tuple[tuple[int, int, str, int], ...]) -> Table:
    """The table `memory`; Linux only, since it reads the kernel's own account of the peak."""
    rows = []
    with console.progress("memory", len(pictures)) as bar:
        for width, height, variant, scale in pictures:
            start = time.perf_counter()
            arguments = [str(width), str(height), str(scale), variant, "auto"]
            done = subprocess.run(
                [sys.executable, "-c", MEMORY_PROGRAM, *arguments],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
            )
            peak, method = done.stdout.split(maxsplit=1)
            seconds = time.perf_counter() - start
            rows.append(
                (
                    f"HiT-{variant.upper()} x{scale}",
                    f"{width} x {height}",
                    f"{int(peak) / 1e6:.0f}",
                    method.strip(),
                    f"{seconds:.0f}",
                )
            )
            bar.advance(note=f"{width} x {height}: {rows[-1][2]} MB")
    return Table(
        "memory",
        "Peak memory of a process above what it has after its imports; network, input and output are in it",
        ("network", "input", "peak MB", "how it was run", "wall s"),
        rows,
    )


def quality(set5: Path) -> Table:
    """The table `quality`: Set5 by the published protocol."""
    from tenfold.superres import evaluation
    from tenfold.superres.predictor import Upscaler

    rows = []
    for scale in (2, 4):
        bicubic = evaluation.evaluate_pairs(evaluation.bicubic(scale), set5 / "HR", set5 / "LR_bicubic", scale=scale)
        ours = evaluation.evaluate_pairs(
            Upscaler.from_pretrained(f"tenfold-x{scale}", device="cpu"), set5 / "HR", set5 / "LR_bicubic", scale=scale
        )
        gains = [network.psnr_y - plain.psnr_y for network, plain in zip(ours.images, bicubic.images, strict=True)]
        for name, result, least in (("bicubic", bicubic, None), (f"tenfold-x{scale}", ours, f"{min(gains):+.2f}")):
            rows.append(
                (
                    f"{name} (x{scale})" if name == "bicubic" else name,
                    f"{result.mean.psnr_y:.2f}",
                    f"{result.mean.ssim_y:.4f}",
                    f"{result.mean.psnr_y - bicubic.mean.psnr_y:+.2f}",
                    least,
                )
            )
    return Table(
        "quality",
        "Set5, MATLAB bicubic low resolution, luma, border of the scale cropped",
        ("network", "PSNR dB", "SSIM", "over bicubic dB", "least gain of an image dB"),
        rows,
    )


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn, small pictures: to see that it runs")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of all networks at 320 x 180")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="result file")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    size, turns = ((160, 90), 1) if options.quick else ((320, 180), options.turns)
    pictures = PICTURES[:1] if options.quick else PICTURES
    data = os.environ.get("TENFOLD_DATA")
    tables: list[Table] = []
    samples: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def keep(table: Table) -> None:  # after each part, so that an hour of measuring is not lost with the last one
        console.table(table.columns, table.rows, title=table.caption)
        tables.append(table)
        write_results(
            options.output,
            room="superres",
            kind="benchmark",
            seconds=time.perf_counter() - started,
            tables=tables,
            config={"threads": THREADS, "size": size, "turns": turns, "pictures": pictures, "quick": options.quick},
            seeds=[0, 1],
            packages=["onnxruntime", "onnx", "openvino", "spandrel"],
            samples=samples,
        )

    def time_turns(name: str, runs: dict[str, Run], size: tuple[int, int], turns: int, reference: str) -> None:
        image = torch.rand(1, 3, size[1], size[0], generator=torch.Generator().manual_seed(1))
        caption = f"Enlarging {size[0]} x {size[1]} 4 times in float32"
        samples[name] = take_turns(runs, image, turns, name)
        keep(ratios(name, caption, samples[name], reference))

    networks = {f"HiT-{variant.upper()}": random_network(variant, 4) for variant in ("sir", "srf", "sng")}
    ours = {name: as_used(network) for name, network in networks.items()}
    peer: dict[str, Run] = {REFERENCE: swinir_light(4)}
    time_turns("speed", peer | ours | {"tenfold-x4": as_used(load_model("tenfold-x4"))}, size, turns, REFERENCE)
    if data:
        keep(quality(Path(data) / "superres" / "Set5"))

    pair = {name: networks[name] for name in ("HiT-SIR", "HiT-SRF")}
    for name, network in pair.items():
        difference = largest_difference(network, 72, 100)
        if difference > 1e-4:  # the outputs of these random networks reach 10 and more
            raise SystemExit(f"the official style of {name} computes something else (by {difference:.1e})")
    official: dict[str, Run] = {f"{name}, official style": OfficialStyle(network) for name, network in pair.items()}
    pair_as_used = {name: ours[name] for name in pair}
    time_turns("official", peer | pair_as_used | official, (160, 90), 1 if options.quick else 2, REFERENCE)

    keep(memory(pictures))

    with tempfile.TemporaryDirectory() as folder:
        exported: dict[str, Run] = {}
        for name, network in pair.items():
            exported |= in_other_runtimes(name, network, Path(folder))
        time_turns("runtimes", pair_as_used | exported, size, turns, "HiT-SIR")


if __name__ == "__main__":
    main()
