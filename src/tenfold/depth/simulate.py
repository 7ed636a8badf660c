"""Furnished rooms with exact depth, ray-cast: any camera costs the same, because a camera is only a map of rays.

A scene is an empty room, furniture made of boxes, a few balls, textures and lamps; all are drawn from `(seed, number)`
alone, so that scene i of a run is the same everywhere. World axes are those of a level camera that looks along z: x
right, y down, z forward, in metres; the floor is y = 0.

Furniture has the sizes of real furniture and, with `texture="ruled"`, floor tiles are 0.4 m and wall courses 0.3 m:
without things of known size no network could tell metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.depth.config import SceneConfig

# A piece is boxes: (x, height, z) of the box's centre and its width, height, depth, all in metres, before turning.
Box = tuple[float, float, float, float, float, float]
FURNITURE: dict[str, tuple[Box, ...]] = {
    "chair": ((0, 0.45, 0, 0.45, 0.06, 0.45), (0, 0.72, 0.2, 0.45, 0.48, 0.05), (0, 0.21, 0, 0.36, 0.42, 0.36)),
    "table": ((0, 0.73, 0, 1.2, 0.05, 0.8), (-0.55, 0.35, 0, 0.06, 0.7, 0.7), (0.55, 0.35, 0, 0.06, 0.7, 0.7)),
    "sideboard": ((0, 0.375, 0, 1.2, 0.75, 0.45),),
    "wardrobe": ((0, 1.0, 0, 1.0, 2.0, 0.6),),
    "cube": ((0, 0.2, 0, 0.4, 0.4, 0.4),),
    "bed": ((0, 0.25, 0, 0.9, 0.5, 2.0), (0, 0.45, 0.98, 0.9, 0.9, 0.06)),
}
ON_WALLS = ("door", "picture")
BOXES_OF_A_PIECE = max(map(len, FURNITURE.values()))
PATTERNS = ("plain", "checks", "courses", "planks", "clouds")


@dataclass(frozen=True)
class Scenes:
    """B scenes of equal capacity; a box of no size is not there.

    Args:
        room_m: B x 3, width, height and depth.
        box_center, box_half: B x N x 3, the middle and half the size.
        box_yaw: B x N, turn about the vertical, rad.
        ball_center, ball_radius: B x M x 3.
        colour: B x S x 2 x 3, two colours of each surface; surfaces are 6 sides of the room (x-, x+, ceiling, floor,
            z-, z+), then boxes, then balls.
        pattern: B x S, index into `PATTERNS`.
        period_m: B x S, size of the pattern.
        lamps: B x L x 3, where the lamps are.
        lamp_power: B x L.
        ambient: B.
        position: B x 3, of the camera.
        rotation: B x 3 x 3, from camera to world axes.
    """

    room_m: Tensor
    box_center: Tensor
    box_half: Tensor
    box_yaw: Tensor
    ball_center: Tensor
    ball_radius: Tensor
    colour: Tensor
    pattern: Tensor
    period_m: Tensor
    lamps: Tensor
    lamp_power: Tensor
    ambient: Tensor
    position: Tensor
    rotation: Tensor


@dataclass(frozen=True)
class Rendering:
    """Pictures with exact geometry.

    Args:
        image: B x 3 x H x W, float32 in [0, 1], without noise.
        radius_m: B x 1 x H x W, distance along the ray.
        points_m: B x 3 x H x W, in the camera's axes; depth is its z.
        surface: B x H x W, number of the surface that is seen.
    """

    image: Tensor
    radius_m: Tensor
    points_m: Tensor
    surface: Tensor


def random_scenes(config: SceneConfig, seed: int, indices: Sequence[int]) -> Scenes:
    """Scenes number `indices` of the stream `seed`; each is a pure function of both numbers and `config`."""
    drawn = [_draw(config, np.random.default_rng((seed, index, 0))) for index in indices]
    fields = {}
    for name in Scenes.__dataclass_fields__:
        stacked = torch.from_numpy(np.stack([scene[name] for scene in drawn]))
        fields[name] = stacked if name == "pattern" else stacked.float()
    return Scenes(**fields)


def _draw(config: SceneConfig, random: np.random.Generator) -> dict[str, np.ndarray]:
    room = np.array([random.uniform(3, 8), 2.5 if config.texture == "ruled" else random.uniform(2.3, 3.0), 0.0])
    room[2] = random.uniform(3, 8)
    position = np.array([0.0, -random.uniform(*config.height_m), 0.0])
    position[[0, 2]] = [random.uniform(0.5, room[axis] - 0.5) for axis in (0, 2)]
    boxes = config.pieces * BOXES_OF_A_PIECE + config.wall_pieces
    center, half, yaw = np.full((boxes, 3), -100.0), np.zeros((boxes, 3)), np.zeros(boxes)
    of_piece = np.arange(boxes)  # boxes of one piece look alike
    for piece in range(config.pieces):
        first = piece * BOXES_OF_A_PIECE
        of_piece[first : first + BOXES_OF_A_PIECE] = first
        parts = np.array(FURNITURE[list(FURNITURE)[random.integers(len(FURNITURE))]])
        place, turn = _place(random, room, float(np.abs(parts[:, [0, 2]]).max() + parts[:, [3, 5]].max() / 2))
        if np.hypot(*(place - position[[0, 2]])) < np.hypot(parts[:, 3].max(), parts[:, 5].max()) / 2 + 0.35:
            continue
        for number, part in enumerate(parts):
            sine, cosine = math.sin(turn), math.cos(turn)
            x, z = part[0], part[2]
            center[first + number] = [place[0] + cosine * x + sine * z, -part[1], place[1] - sine * x + cosine * z]
            half[first + number] = part[3:6] / 2
            yaw[first + number] = turn
    for number in range(config.pieces * BOXES_OF_A_PIECE, boxes):
        center[number], half[number], yaw[number] = _on_wall(random, room)
    balls = config.balls
    radius = random.uniform(0.1, 0.3, (balls, 1)) * random.uniform(0.7, 1.3, (balls, 3))
    ball = random.uniform(0.4, room - 0.4, (balls, 3)) if balls else np.zeros((0, 3))
    ball[:, 1] = -radius[:, 1]
    if balls:
        near = np.hypot(*(ball - position)[:, [0, 2]].T) < 0.7
        ball[near] = -100.0
    lamps = np.stack([random.uniform(0.2, 0.8, 2) * room[[0, 2]] for _ in range(2)])
    pitch, roll = np.deg2rad([random.uniform(*config.pitch_deg), random.uniform(-1, 1) * config.roll_deg])
    return {
        "room_m": room,
        "box_center": center,
        "box_half": half,
        "box_yaw": yaw,
        "ball_center": ball,
        "ball_radius": radius,
        "lamps": np.stack([lamps[:, 0], np.array([-room[1] + 0.25] * 2), lamps[:, 1]], axis=1),
        "lamp_power": random.uniform([0.5, 0.0], [1.1, 0.7]),
        "ambient": np.array(random.uniform(0.25, 0.5)),
        "position": position,
        "rotation": camera_rotation(_look(random, room, position), pitch, roll),
        **_draw_textures(config, random, of_piece, balls),
    }


def _place(random: np.random.Generator, room: np.ndarray, reach: float) -> tuple[np.ndarray, float]:
    """Where on the floor a piece of this half-length stands, and how it is turned: half of them along a wall."""
    quarter = int(random.integers(4))
    turn = quarter * math.pi / 2 if random.random() < 0.5 else float(random.uniform(0, 2 * math.pi))
    low, high = np.full(2, min(reach, 1.2)), room[[0, 2]] - min(reach, 1.2)
    return random.uniform(low, np.maximum(high, low + 0.01)), turn


def _look(random: np.random.Generator, room: np.ndarray, position: np.ndarray) -> float:
    """Yaw towards a random place of the floor, of five the first that is 1.5 m away: walls seldom fill the picture."""
    for _ in range(5):
        x, z = random.uniform(0.2, 0.8, 2) * room[[0, 2]] - position[[0, 2]]
        if math.hypot(x, z) > 1.5:
            break
    return math.atan2(x, z)


def _on_wall(random: np.random.Generator, room: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """A door (0.9 x 2.0 m) or a picture on one of the walls: centre, half size and turn."""
    door = random.random() < 0.6
    width, height, middle = (0.9, 2.0, 1.0) if door else (random.uniform(0.4, 1.4), random.uniform(0.4, 1.0), 1.5)
    axis, side = (0, 2)[random.integers(2)], random.integers(2)
    place = np.array([0.0, -middle, 0.0])
    place[2 - axis] = random.uniform(0.6, room[2 - axis] - 0.6)
    place[axis] = side * room[axis]
    return place, np.array([width, height, 0.06]) / 2, math.pi / 2 if axis == 0 else 0.0


def _draw_textures(
    config: SceneConfig, random: np.random.Generator, of_piece: np.ndarray, balls: int
) -> dict[str, np.ndarray]:
    surfaces = 6 + len(of_piece) + balls
    hue = random.uniform(0, 1, (surfaces, 3))
    grey = random.uniform(0.15, 0.95, (surfaces, 1))
    base = np.clip(grey + random.uniform(0.0, 0.35, (surfaces, 1)) * (hue - 0.5) * 2, 0.03, 1)
    other = np.clip(base * random.uniform(0.45, 0.9, (surfaces, 1)) + random.uniform(-0.08, 0.08, (surfaces, 3)), 0, 1)
    colour = np.stack([base, other], axis=1)
    if config.texture == "ruled":
        pattern = random.choice([0, 4], surfaces)
        period = np.full(surfaces, 0.5)
        pattern[[0, 1, 4, 5]], period[[0, 1, 4, 5]] = PATTERNS.index("courses"), 0.3
        pattern[2] = PATTERNS.index("plain")
        pattern[3], period[3] = PATTERNS.index("checks"), 0.4
    else:
        pattern = random.integers(len(PATTERNS), size=surfaces)
        period = 10 ** random.uniform(-1.1, 0.1, surfaces)
    if random.random() < 0.8:  # mostly the four walls are alike
        for table in (colour, pattern, period):
            table[[1, 4, 5]] = table[0]
    for table in (colour, pattern, period):
        table[6 : 6 + len(of_piece)] = table[6 + of_piece]
    return {"colour": colour, "pattern": pattern, "period_m": period}


def camera_rotation(yaw: float, pitch: float, roll: float = 0.0) -> np.ndarray:
    """3 x 3 rotation from camera to world axes: roll about the view, then pitch (up is positive), then yaw; rad."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return turn @ nod @ lean


@torch.no_grad()
def render(scenes: Scenes, rays: Tensor, shadows: bool = False) -> Rendering:
    """Look at the scenes along `rays`.

    Args:
        scenes: B scenes.
        rays: B x 3 x H x W (or 1 x 3 x H x W), unit vectors in the camera's axes, whatever the camera.
        shadows: of the first lamp.
    """
    batch = scenes.room_m.shape[0]
    _, _, height, width = rays.shape
    flat = rays.expand(batch, -1, -1, -1).reshape(batch, 3, -1)
    direction = scenes.rotation @ flat  # B x 3 x P
    origin = scenes.position[:, :, None].expand_as(direction)
    distance, surface, axis = cast(scenes, origin, direction)
    hit = origin + direction * distance[:, None]
    normal, local = _normals(scenes, hit, direction, surface, axis)
    shade = _shade(scenes, hit, normal, shadows)
    image = (_paint(scenes, local, surface, axis) * shade[:, None]).clamp(0, 1)
    return Rendering(
        image=image.reshape(batch, 3, height, width),
        radius_m=distance.reshape(batch, 1, height, width),
        points_m=(flat * distance[:, None]).reshape(batch, 3, height, width),
        surface=surface.reshape(batch, height, width),
    )


def cast(scenes: Scenes, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first surface along each ray.

    Args:
        scenes: B scenes.
        origin: B x 3 x P, inside the room and outside the furniture.
        direction: B x 3 x P, of any length.

    Returns:
        Distance in lengths of `direction`, number of the surface, and the axis of its normal in the surface's own
        frame (3 for balls): B x P each.
    """
    direction = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    inverse = 1 / direction
    upper = scenes.room_m * torch.tensor([1.0, 0.0, 1.0])  # the corner with the largest coordinates
    lower = scenes.room_m * torch.tensor([0.0, -1.0, 0.0])
    wall = torch.where(direction > 0, upper[:, :, None], lower[:, :, None])
    distance, axis = ((wall - origin) * inverse).min(dim=1)
    surface = 2 * axis + (direction.gather(1, axis[:, None])[:, 0] > 0)
    cosine, sine = scenes.box_yaw.cos(), scenes.box_yaw.sin()
    for number in range(scenes.box_half.shape[1]):
        half = scenes.box_half[:, number, :, None]
        if not bool(half.any()):
            continue
        c, s = cosine[:, number, None], sine[:, number, None]
        x, y, z = (origin - scenes.box_center[:, number, :, None]).unbind(1)
        dx, dy, dz = direction.unbind(1)
        near, far, face = _slabs(
            (c * x - s * z, y, s * x + c * z), (c * dx - s * dz, dy, s * dx + c * dz), half, inverse[:, 1]
        )
        hit = (near < far) & (near > 1e-4) & (near < distance)
        distance = torch.where(hit, near, distance)
        surface = torch.where(hit, 6 + number, surface)
        axis = torch.where(hit, face, axis)
    for number in range(scenes.ball_radius.shape[1]):
        radius = scenes.ball_radius[:, number, :, None]
        start, step = (origin - scenes.ball_center[:, number, :, None]) / radius, direction / radius
        a, b = (step * step).sum(1), (start * step).sum(1)
        root = b * b - a * ((start * start).sum(1) - 1)
        near = (-b - root.clamp_min(0).sqrt()) / a
        hit = (root > 0) & (near > 1e-4) & (near < distance)
        distance = torch.where(hit, near, distance)
        surface = torch.where(hit, 6 + scenes.box_half.shape[1] + number, surface)
        axis = torch.where(hit, 3, axis)
    return distance, surface, axis


def _slabs(
    origin: tuple[Tensor, ...], direction: tuple[Tensor, ...], half: Tensor, inverse_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Entry and exit of rays through a box around zero, and the axis of the entry."""
    near, far, face = None, None, None
    for axis in range(3):
        if axis == 1:
            inverse = inverse_y
        else:
            d = direction[axis]
            inverse = 1 / torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
        reach = half[:, axis] * inverse.abs()
        middle = -origin[axis] * inverse
        enter, leave = middle - reach, middle + reach
        if near is None or far is None or face is None:
            near, far, face = enter, leave, torch.zeros_like(enter, dtype=torch.long)
        else:
            later = enter > near
            near = torch.where(later, enter, near)
            face = torch.where(later, axis, face)
            far = torch.minimum(far, leave)
    assert near is not None and far is not None and face is not None
    return near, far, face


def _normals(scenes: Scenes, hit: Tensor, direction: Tensor, surface: Tensor, axis: Tensor) -> tuple[Tensor, Tensor]:
    """Unit normals towards the viewer in world axes, and the hit in its surface's own frame; B x 3 x P both."""
    boxes = scenes.box_half.shape[1]
    zero = torch.zeros_like(scenes.room_m[:, None])
    center = torch.cat([zero.expand(-1, 6, -1), scenes.box_center, scenes.ball_center], dim=1)
    radius = torch.cat([zero.expand(-1, 6 + boxes, -1) + 1, scenes.ball_radius], dim=1)
    yaw = torch.zeros(center.shape[:2])
    yaw[:, 6 : 6 + boxes] = scenes.box_yaw

    def of_surface(values: Tensor) -> Tensor:  # B x S x 3 -> B x 3 x P
        return values.transpose(1, 2).gather(2, surface[:, None].expand(-1, 3, -1))

    x, y, z = (hit - of_surface(center)).unbind(1)
    angle = yaw.gather(1, surface)
    c, s = angle.cos(), angle.sin()
    local = torch.stack([c * x - s * z, y, s * x + c * z], dim=1)
    flat = torch.nn.functional.one_hot(axis.clamp_max(2), 3).transpose(1, 2).to(hit.dtype)
    nx, ny, nz = flat.unbind(1)
    turned = torch.stack([c * nx + s * nz, ny, -s * nx + c * nz], dim=1)
    round_ = torch.nn.functional.normalize(local / of_surface(radius) ** 2, dim=1)
    normal = torch.where((axis == 3)[:, None], round_, turned)
    away = (normal * direction).sum(1, keepdim=True) > 0
    return torch.where(away, -normal, normal), local


def _paint(scenes: Scenes, local: Tensor, surface: Tensor, axis: Tensor) -> Tensor:
    """Colour of each hit without light, B x 3 x P."""
    colours = scenes.colour.flatten(2).transpose(1, 2)  # B x 6 x S
    both = colours.gather(2, surface[:, None].expand(-1, 6, -1))
    pattern, period = scenes.pattern.gather(1, surface), scenes.period_m.gather(1, surface)
    u = torch.where(axis == 0, local[:, 2], local[:, 0]) / period
    v = torch.where(axis == 1, local[:, 2], local[:, 1]) / period
    row = v.floor()
    checks = (u.floor() + row) % 2
    grout = torch.minimum((v - row), 1 - (v - row)) < 0.08
    joint = ((u / 2 + 0.5 * (row % 2)) % 1) < 0.05
    courses = (grout | joint).to(u.dtype)
    planks = ((u.floor() * 0.37) % 1) * ((u % 1) > 0.06)
    clouds = (
        0.5
        + 0.25 * torch.sin(6.3 * u + 2.1 * torch.sin(4.7 * v))
        + 0.25 * torch.sin(5.1 * v + 1.7 * torch.sin(7.9 * u))
    )
    amount = torch.zeros_like(u)
    for index, values in enumerate((None, checks, courses, planks, clouds)):
        if values is not None:
            amount = torch.where(pattern == index, values, amount)
    return both[:, :3] + amount[:, None] * (both[:, 3:] - both[:, :3])


def _shade(scenes: Scenes, hit: Tensor, normal: Tensor, shadows: bool) -> Tensor:
    """Light at each hit, B x P: ambient, and Lambert's law with each lamp's fall-off."""
    light = scenes.ambient[:, None] * (1 - 0.25 * normal[:, 1])
    for number in range(scenes.lamps.shape[1]):
        towards = scenes.lamps[:, number, :, None] - hit
        squared = (towards * towards).sum(1)
        amount = (normal * towards).sum(1).clamp_min(0) * squared.rsqrt()
        amount = amount * scenes.lamp_power[:, number, None] * 6 / (4 + squared)
        if shadows and number == 0:
            distance, _, _ = cast(scenes, hit + 2e-3 * normal, towards)
            amount = amount * (0.25 + 0.75 * (distance > 0.98))
        light = light + amount
    return light


def add_noise(image: Tensor, sigma: float, seed: int, indices: Sequence[int]) -> Tensor:
    """Exposure, gamma, tint and sensor noise as a pure function of `(seed, index)`; B x 3 x H x W in [0, 1]."""
    out = torch.empty_like(image)
    for number, index in enumerate(indices):
        random = np.random.default_rng((seed, index, 1))
        gain = torch.from_numpy(random.uniform(0.75, 1.25) * random.uniform(0.92, 1.08, 3)).float()[:, None, None]
        picture = (image[number] * gain).clamp(0, 1) ** float(random.uniform(0.8, 1.25))
        grain = random.standard_normal(picture.shape, dtype=np.float32) * (sigma * random.uniform(0.3, 1.5))
        out[number] = (picture + torch.from_numpy(grain)).clamp(0, 1)
    return out
