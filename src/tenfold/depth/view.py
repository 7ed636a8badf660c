"""Results to look at: a turnable point cloud inside a page, a page for one picture, and viser's viewer."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from tenfold.core import console, report
from tenfold.core.console import UserError
from tenfold.core.report import Figure, Panel, Station
from tenfold.depth.outputs import colormap, describe, thinning

if TYPE_CHECKING:
    import viser

    from tenfold.depth.predictor import Depth

POINTS_IN_PAGE = 40_000
POINTS_IN_VIEWER = 500_000

# A canvas that draws points from far to near. Drag turns, the wheel or + and - come closer, the arrow keys turn.
_VIEWER = """<!doctype html><meta charset="utf-8"><title>Point cloud</title>
<style>html,body{margin:0;height:100%;background:#14181c}canvas{width:100%;height:100%;display:block;cursor:grab}
canvas:focus{outline:2px solid #6cc3b8;outline-offset:-2px}
p{position:absolute;left:10px;bottom:6px;margin:0;font:12px system-ui,sans-serif;color:#b8c4cc;pointer-events:none}
</style><canvas tabindex="0" role="img" aria-label="Point cloud; drag or use the arrow keys to turn it"></canvas>
<p>Drag or arrow keys: turn. Wheel, + and -: closer or farther.</p>
<script>
const data = __DATA__;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
const place = new Int16Array(bytes(data.points)), colour = new Uint8Array(bytes(data.colors));
const count = place.length / 3, canvas = document.querySelector("canvas"), context = canvas.getContext("2d");
let yaw = 0.35, pitch = 0.12, near = 1, dragged = false, still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const depth = new Float32Array(count), across = new Float32Array(count), down = new Float32Array(count);
const buckets = 512, heads = new Int32Array(buckets), next = new Int32Array(count);
function draw() {
  const w = canvas.width = canvas.clientWidth, h = canvas.height = canvas.clientHeight;
  if (!w || !h) return;
  const image = context.createImageData(w, h), pixels = new Uint32Array(image.data.buffer);
  pixels.fill(0xff1c1814);
  const cy = Math.cos(yaw), sy = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
  const unit = data.radius / 32767, focal = 0.9 * Math.min(w, h) * data.focal, away = data.distance / near;
  heads.fill(-1);
  for (let i = 0; i < count; i++) {
    const x = place[3 * i] * unit, y = place[3 * i + 1] * unit, z = place[3 * i + 2] * unit;
    const x1 = cy * x + sy * z, z1 = cy * z - sy * x, y1 = cp * y - sp * z1, z2 = cp * z1 + sp * y + away;
    depth[i] = z2; across[i] = x1; down[i] = y1;
    const bucket = Math.max(0, Math.min(buckets - 1, Math.floor((z2 / (away + data.radius)) * buckets)));
    next[i] = heads[bucket]; heads[bucket] = i;
  }
  for (let b = buckets - 1; b >= 0; b--) for (let i = heads[b]; i >= 0; i = next[i]) {
    if (depth[i] < 0.02 * data.radius) continue;
    const size = Math.max(1, Math.min(5, Math.round(data.size * focal / depth[i])));
    const u = Math.round(w / 2 + focal * across[i] / depth[i]), v = Math.round(h / 2 + focal * down[i] / depth[i]);
    const value = 0xff000000 | colour[3 * i + 2] << 16 | colour[3 * i + 1] << 8 | colour[3 * i];
    for (let dv = 0; dv < size; dv++) for (let du = 0; du < size; du++) {
      const a = u + du, c = v + dv;
      if (a >= 0 && a < w && c >= 0 && c < h) pixels[c * w + a] = value;
    }
  }
  context.putImageData(image, 0, 0);
}
function spin(start) {
  const step = time => {
    if (dragged || still || time - start > 9000) return;
    yaw = 0.4 * Math.sin((time - start) / 1400 + 0.9); draw(); requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}
canvas.onpointerdown = event => { dragged = true; canvas.setPointerCapture(event.pointerId); };
canvas.onpointermove = event => {
  if (!event.buttons) return;
  yaw -= event.movementX * 0.008; pitch = Math.max(-1.5, Math.min(1.5, pitch + event.movementY * 0.008)); draw();
};
const closer = factor => { dragged = true; near = Math.max(0.3, Math.min(8, near * factor)); draw(); };
canvas.onwheel = event => { event.preventDefault(); closer(event.deltaY < 0 ? 1.1 : 1 / 1.1); };
canvas.onkeydown = event => {
  const turn = { ArrowLeft: [-0.08, 0], ArrowRight: [0.08, 0], ArrowUp: [0, -0.06], ArrowDown: [0, 0.06] }[event.key];
  if (turn) { dragged = true; yaw += turn[0]; pitch = Math.max(-1.5, Math.min(1.5, pitch + turn[1])); draw(); }
  else if (event.key === "+") closer(1.1); else if (event.key === "-") closer(1 / 1.1); else return;
  event.preventDefault();
};
new ResizeObserver(draw).observe(canvas); draw(); spin(performance.now());
</script>"""


def cloud_panel(result: Depth, caption: str = "", max_points: int = POINTS_IN_PAGE) -> Panel:
    """The point cloud as a turnable panel of a page; nothing is loaded from anywhere.

    Points are stored with 16 bits an axis, relative to the middle of the cloud; the farthest percent is left out.
    """
    step = thinning(result, max_points)
    points = result.points_m[::step, ::step].reshape(-1, 3)
    colors = result.image[::step, ::step].reshape(-1, 3)
    distance = np.linalg.norm(points, axis=1)
    kept = np.isfinite(distance) & (distance <= np.nanpercentile(distance, 99))
    points, colors = points[kept], colors[kept]
    middle = np.array([0, 0, np.median(points[:, 2])])
    points = points - middle
    radius = float(max(np.abs(points).max(), 1e-6))
    row = result.rays[result.rays.shape[0] // 2]
    half = float(np.arccos(np.clip(row[0] @ row[-1], -1, 1)) / 2)
    data = {
        "points": base64.b64encode(np.rint(points / radius * 32767).astype("<i2").tobytes()).decode(),
        "colors": base64.b64encode(np.ascontiguousarray(colors).tobytes()).decode(),
        "radius": radius,
        "distance": float(middle[2]),
        "focal": 0.6 / float(np.tan(np.clip(half, 0.1, 1.2))),
        # A point is as large as the distance to its neighbour where it lies.
        "size": float(middle[2]) * 2.2 * float(np.tan(np.clip(half, 0.1, 1.2))) * step / result.depth_m.shape[1],
    }
    return report.interactive_panel(
        _VIEWER.replace("__DATA__", json.dumps(data)), "Point cloud that can be turned", caption, height_px=460
    )


def page(result: Depth, title: str) -> str:
    """One self-contained page: picture and depth side by side, the point cloud, the camera."""
    facts = describe(result)
    size = min(1.0, 1280 / max(result.image.shape[:2]))
    shown = _shrunk(result.image, size), _shrunk(colormap(result.depth_m), size)
    depth = facts["depth_m"]
    station = Station(
        room="depth",
        title=title,
        paper="UniDepth: Piccinelli et al., CVPR 2024 (arXiv 2403.18913) and TPAMI 2026 (arXiv 2502.20110)",
        claim="Metric depth, 3D points and the camera from one picture.",
        command="tenfold depth predict photo.jpg -o out/ --format html",
        figures=[
            Figure("Depth, median", f"{depth['median']:.2f}", "m", f"1 % nearer than {depth['p01']:.2f} m"),
            Figure("Field of view", f"{facts['fov_x_deg']:.1f}", "degrees", f"camera {result.camera_source}"),
        ],
        panels=[
            report.slider_panel(
                *shown, "Picture", "Depth", alt=f"{title} and its depth", caption="Red is near, blue is far."
            ),
            cloud_panel(result, "The pixels as points in space, seen from near the camera."),
        ],
    )
    return report.render_page(title, [station])


def _shrunk(image: np.ndarray, size: float) -> np.ndarray:
    import cv2

    if size >= 1:
        return image
    return cv2.resize(image, None, fx=size, fy=size, interpolation=cv2.INTER_AREA)


def serve(results: Sequence[tuple[str, Depth]]) -> None:
    """Show point clouds in `viewer`, until Ctrl-C. Raises UserError where viser is missing."""
    with viewer(results) as server:
        console.say(f"point clouds at http://127.0.0.1:{server.get_port()} (Ctrl-C ends)")
        while True:
            time.sleep(0.2)


@contextmanager
def viewer(results: Sequence[tuple[str, Depth]]) -> Iterator[viser.ViserServer]:
    """Point clouds and their cameras in viser's viewer on this machine, at port 8080 or the next that is free.

    Args:
        results: names and results; each is a switch in the viewer.

    Raises:
        UserError: viser is missing.
    """
    try:
        import viser
    except ImportError:
        raise UserError("--view needs viser: run pip install 'tenfold[depth]'") from None
    server = viser.ViserServer(host="127.0.0.1", verbose=False)
    try:
        server.scene.set_up_direction("-y")
        for name, result in results:
            step = thinning(result, POINTS_IN_VIEWER)
            points = result.points_m[::step, ::step].reshape(-1, 3)
            colors = result.image[::step, ::step].reshape(-1, 3)
            kept = np.isfinite(points).all(1)
            size = float(np.median(points[kept, 2])) * 1.5 / result.depth_m.shape[1] * step
            server.scene.add_point_cloud(f"/{name}/points", points[kept], colors[kept], point_size=size)
            height, width = result.depth_m.shape
            if result.intrinsics is not None:
                fov_y = 2 * float(np.arctan(height / 2 / result.intrinsics[1, 1]))
                server.scene.add_camera_frustum(f"/{name}/camera", fov_y, width / height, scale=0.15)
        yield server
    finally:
        server.stop()
