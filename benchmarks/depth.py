"""Speed and memory of the room depth: `python -m benchmarks.depth [--quick]`.

Networks have the released sizes and random weights; outputs of all ways through a network are compared first. Ways take
turns in one process, so that a busy machine slows all alike, and time is processor time of the process. The reference
is a plain eager path: every block's output normed, maps in PyTorch's usual layout, heads unmerged, and the release's
steps before and after. Memory: each way in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.core import console
from tenfold.core.results import Table, write_results
from tenfold.depth import onnx_file
from tenfold.depth.blocks import ray_angles_embedding
from tenfold.depth.cameras import pinhole_rays
from tenfold.depth.checkpoint import Network, create
from tenfold.depth.config import PRESETS
from tenfold.depth.model import UniDepthV2, run_heads
from tenfold.depth.model_v1 import UniDepthV1
from tenfold.depth.predictor import DepthEstimator
from tenfold.depth.preprocessing import DEVIATION, MEAN, fit_v1, fit_v2
from tenfold.depth.tour import photograph

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "depth.json"
THREADS = 1
V2, V2_B, V1 = "unidepth-v2-vits14", "unidepth-v2-vitb14", "unidepth-v1-vitl14"

Way = Callable[[], dict[str, np.ndarray]]


def random_network(name: str) -> Network:
    """A network of a released size, every weight random, so that no branch is nearly zero."""
    torch.manual_seed(0)
    network = create(PRESETS[name]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network


# --- the reference ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_v2(network: UniDepthV2, image: np.ndarray) -> dict[str, np.ndarray]:
    """The release's steps, one after the other: float image at full size, network, points and error interpolated."""
    fit = fit_v2(*image.shape[:2], network.config.sizes)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    x = F.interpolate(x, fit.scaled, mode="bilinear", align_corners=False)
    height, width = fit.scaled
    grid = (height // 14, width // 14)
    normed = [network.encoder.norm(output) for output in network.encoder(x)]
    chosen = [normed[end - 1] for end in network.config.encoder.ends]
    maps = [adapter(tokens[:, 1:].contiguous()) for adapter, tokens in zip(network.adapters, chosen, strict=True)]
    rays = pinhole_rays(network.look(chosen, height, width), height, width)
    told = ray_angles_embedding(rays, *grid, network.config.hidden)
    conditioned = [block(each, context=told) for block, each in zip(network.prompts, maps, strict=True)]
    latents = _as_map(network.to_latents(conditioned[0]), grid)
    for lateral, up, tokens in zip(network.laterals, network.ups, conditioned[1:], strict=True):
        latents = up(latents + lateral(_as_map(tokens, grid)))
    radius = (network.depth_head(latents, fit.scaled).clamp(-8, 8) + 2).exp()
    error = network.error_head(latents, fit.scaled).clamp(-8, 8).exp()
    points = F.interpolate(rays * radius, fit.padded, mode="bilinear", align_corners=False)
    rays = F.normalize(F.interpolate(rays, fit.padded, mode="bilinear", align_corners=False), dim=1)
    error = F.interpolate(error, fit.padded, mode="bilinear", align_corners=False)
    return {"points": points[0].permute(1, 2, 0).numpy(), "error": error[0, 0].numpy(), "rays": rays.numpy()}


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid).contiguous()


@torch.no_grad()
def plain_v1(network: UniDepthV1, image: np.ndarray) -> dict[str, np.ndarray]:
    """As `plain_v2`: normalised at full size, resized with antialiasing, padded; the final norm on every block."""
    fit = fit_v1(*image.shape[:2], network.config.image_shape)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous().float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    x = F.interpolate(x, fit.scaled, mode="bilinear", align_corners=False, antialias=True)
    x = F.pad(x, (fit.inner.left, fit.inner.right, fit.inner.top, fit.inner.bottom))
    seen = network(x)
    depth = fit.map_out(seen.depth, antialias=True)
    k = fit.camera_out(seen.intrinsics.double(), exact=False)
    rays = pinhole_rays(k, *fit.size).float()
    points = rays / rays[:, 2:] * depth
    return {"points": points[0].permute(1, 2, 0).numpy()}


# --- ways ------------------------------------------------------------------------------------------------------------


def ours(network: Network, image: np.ndarray, uncertainty: bool = True, level: float | None = None) -> Way:
    """`DepthEstimator.predict`, in the release's geometry so that outputs can be compared."""
    estimator = DepthEstimator(network)

    def run() -> dict[str, np.ndarray]:
        found = estimator.predict(image, uncertainty=uncertainty, resolution_level=level, exact_intrinsics=False)
        return {"points": found.points_m} | ({} if found.uncertainty is None else {"error": found.uncertainty})

    return run


def exported(network: UniDepthV2, image: np.ndarray, folder: Path, runtime: str, error: bool) -> Way:
    """The ONNX file in ONNX Runtime or OpenVINO, with our steps before and after."""
    fit = fit_v2(*image.shape[:2], network.config.sizes)
    path = folder / f"{'error' if error else 'plain'}.onnx"
    if not path.exists():
        onnx_file.write(network, path, (fit.scaled,), error=error, dynamic=False)
    if runtime == "openvino":
        import openvino

        model = openvino.Core().compile_model(
            str(path), "CPU", {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
        )

        def infer(x: np.ndarray) -> list[np.ndarray]:
            return list(model([x]).values())
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def infer(x: np.ndarray) -> list[np.ndarray]:
            return session.run(None, {"image": x})

    @torch.inference_mode()
    def run() -> dict[str, np.ndarray]:
        x = fit.image_in(torch.from_numpy(image).permute(2, 0, 1)[None], antialias=False)
        found = [torch.from_numpy(np.asarray(part)) for part in infer(x.numpy())]
        points = fit.map_out(found[2] * found[0], antialias=False)[0].permute(1, 2, 0).numpy()
        return {"points": points} | ({"error": fit.map_out(found[3], antialias=False)[0, 0].numpy()} if error else {})

    return run


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest |a - b| / |b| over what both have."""
    worst = 0.0
    for name in found.keys() & expected.keys():
        a, b = (part[name].astype(np.float64) for part in (found, expected))
        a, b = (part if part.ndim == 3 else part[..., None] for part in (a, b))
        worst = max(worst, float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max()))
    return worst


def compare(ways: dict[str, Way], turns: int) -> list[tuple[str, float, float, float]]:
    """Name, processor seconds, share of the first way's time, difference to it; medians over turns."""
    expected = next(iter(ways.values()))()
    differences = {name: difference(way(), expected) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    first = seconds[next(iter(ways))]
    return [
        (
            name,
            statistics.median(times),
            statistics.median(a / b for a, b in zip(times, first, strict=True)),
            differences[name],
        )
        for name, times in seconds.items()
    ]


def stages(network: UniDepthV2, image: np.ndarray, turns: int) -> list[tuple[str, float]]:
    """Processor seconds of each part of a prediction."""
    fit = fit_v2(*image.shape[:2], network.config.sizes)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    grid = (fit.scaled[0] // 14, fit.scaled[1] // 14)
    found: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], object]) -> object:
        start = time.process_time()
        result = run()
        found.setdefault(name, []).append(time.process_time() - start)
        return result

    with torch.inference_mode():
        for _ in range(turns):
            x = timed("image to the network's size", lambda: fit.image_in(planes, antialias=False))
            chosen = timed("encoder", lambda x=x: network.encode(x))
            k = timed("camera head", lambda c=chosen: network.look(c, *fit.scaled))
            rays = pinhole_rays(k, *fit.scaled)
            maps = [adapter(tokens[:, 1:]) for adapter, tokens in zip(network.adapters, chosen, strict=True)]
            _, fine = timed("decoder: prompts and upsampling", lambda m=maps, r=rays: network.decode(m, r, grid))
            timed("head of depth", lambda f=fine: run_heads([network.depth_head], f, fit.scaled))
            both = [network.depth_head, network.error_head]
            raw = timed("both heads", lambda f=fine, b=both: run_heads(b, f, fit.scaled))
            timed("back to the image's size", lambda r=raw: fit.map_out(r[0].exp(), antialias=False))
    return [(name, statistics.median(times)) for name, times in found.items()]


def peak_memory_mb(way: str) -> float:
    """Peak resident memory of a process that runs one way on the photograph."""
    script = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "from benchmarks import depth as b\n"
        "image = b.photograph()\n"
        f"{way}\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split("PEAK")[-1])


def main() -> None:
    """Run it and write results/benchmarks/depth.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, no ViT-B, no V1")
    quick = parser.parse_args().quick
    start = time.perf_counter()
    torch.set_num_threads(THREADS)
    image, turns = photograph(), 3 if quick else 9
    network = random_network(V2)
    assert isinstance(network, UniDepthV2)
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Way] = {
            "plain eager": lambda: plain_v2(network, image),
            "predict": ours(network, image),
            "predict, no uncertainty": ours(network, image, uncertainty=False),
        }
        for runtime in ("onnxruntime", "openvino"):
            if importlib.util.find_spec(runtime):
                ways[runtime] = exported(network, image, Path(folder), runtime, error=True)
                ways[f"{runtime}, no uncertainty"] = exported(network, image, Path(folder), runtime, error=False)
        speed = compare(ways, turns)
    levels = [
        (f"{level}", "yes" if error else "no", time_of(ours(network, image, error, level), turns))
        for level in (0, 3, 6, 9)
        for error in (True, False)
    ]
    parts = stages(network, image, turns)
    memory = [
        ("ViT-S, plain eager", peak_memory_mb(f"b.plain_v2(b.random_network({V2!r}), image)")),
        ("ViT-S, predict", peak_memory_mb(f"b.ours(b.random_network({V2!r}), image)()")),
    ]
    larger: list[tuple[str, float, float, float]] = []
    if not quick:
        for name in (V2_B, V1):
            other = random_network(name)
            plain = plain_v1 if isinstance(other, UniDepthV1) else plain_v2
            pair = {
                f"{name}, plain eager": lambda o=other, p=plain: p(o, image),
                f"{name}, predict": ours(other, image),
            }
            larger += compare(pair, 3)
            del other, pair
        memory += [
            ("V1 ViT-L, plain eager", peak_memory_mb(f"b.plain_v1(b.random_network({V1!r}), image)")),
            ("V1 ViT-L, predict", peak_memory_mb(f"b.ours(b.random_network({V1!r}), image)()")),
        ]
    columns = ("way", "processor time, s", "share of plain eager", "largest relative difference")
    size = f"{image.shape[1]} x {image.shape[0]}, {THREADS} thread"
    tables = [
        Table("speed", f"UniDepthV2 ViT-S, {size}, random weights; medians of {turns} turns", columns, speed),
        Table("stages", f"where the time of ViT-S goes, {size}", ("stage", "processor time, s"), parts),
        Table(
            "levels",
            f"ViT-S by resolution level, {size}",
            ("resolution level", "uncertainty", "processor time, s"),
            levels,
        ),
        Table("memory", "peak resident memory of a whole process", ("way", "MB"), memory),
    ]
    if larger:
        tables.append(Table("larger", f"larger networks, {size}", columns, larger))
    for table in tables:
        console.table(table.columns, table.rows, title=table.caption)
    packages = ("onnxruntime", "openvino")
    elapsed = time.perf_counter() - start
    write_results(OUTPUT, room="depth", kind="benchmark", seconds=elapsed, tables=tables, seeds=(0,), packages=packages)


def time_of(way: Way, turns: int) -> float:
    """Median processor seconds."""
    way()
    times = []
    for _ in range(turns):
        start = time.process_time()
        way()
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
