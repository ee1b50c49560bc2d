"""Five worlds that no training set is drawn from, for evaluation alone: a small VPoS.

    cells      glowing cells under a microscope, drifting and pulsing          "green balls"
    desk       a desk seen from the head, which moves                          "white cups", "red boxes"
    road       a road with cars ahead and trees at its side                    "blue cars", "green trees"
    recording  a screen on which a cursor drags icons about                    "red hearts", "yellow stars"
    arm        a robot arm that lifts one of several things                    "orange boxes", "blue balls"

VideoMolmo's benchmark VPoS has five such domains (cells, egocentric video, driving, interfaces, robots). What is asked for
bears the names that the tiny model knows; how it looks, moves and is drawn is new: no line of drawing code is shared with
`synthetic.py`. Shapes are signed distances here, painted where they are negative.

H x W pixels, n things.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from masks import box, deepest
from records import Annotation, Object, Record, Runs

HEIGHT, WIDTH, FPS = 144, 192, 6.0
PAINT = {"red": (196, 44, 52), "green": (52, 150, 74), "blue": (52, 92, 204), "yellow": (232, 205, 62), "orange": (236, 132, 40),
         "purple": (128, 60, 162), "white": (240, 240, 236), "black": (28, 28, 32)}
SMALLEST = 20  # pixels that a thing must show in a frame to have a point there
Color = tuple[float, float, float]


# ---------------------------------------------------------------------------------------------------------------------
# 1. Shapes: signed distances in pixels, negative inside

ROWS, COLUMNS = (axis + 0.5 for axis in np.mgrid[:HEIGHT, :WIDTH].astype(float))


def disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.hypot(COLUMNS - x, ROWS - y) - radius


def _turned(x: float, y: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
    across, down = COLUMNS - x, ROWS - y
    return across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)


def block(x: float, y: float, width: float, height: float, angle: float = 0.0, soft: float = 0.0) -> np.ndarray:
    """A rectangle with corners rounded by `soft`."""
    u, v = _turned(x, y, angle)
    u, v = abs(u) - width / 2 + soft, abs(v) - height / 2 + soft
    return np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - soft


def bar(x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
    """A line with round ends."""
    across, down = x1 - x0, y1 - y0
    t = np.clip(((COLUMNS - x0) * across + (ROWS - y0) * down) / max(across**2 + down**2, 1e-9), 0, 1)
    return np.hypot(COLUMNS - x0 - t * across, ROWS - y0 - t * down) - radius


def star(x: float, y: float, inner: float, outer: float, points: int = 5) -> np.ndarray:
    """Upright: folded into one half of one point, where its edge is a straight line from the tip to the corner."""
    half = np.pi / points
    turn = abs((np.arctan2(ROWS - y, COLUMNS - x) + np.pi / 2 + half) % (2 * half) - half)
    away = np.hypot(COLUMNS - x, ROWS - y)
    along, down = inner * np.cos(half) - outer, inner * np.sin(half)
    return -(along * away * np.sin(turn) - down * (away * np.cos(turn) - outer)) / np.hypot(along, down)


def heart(x: float, y: float, size: float) -> np.ndarray:
    """Two discs and a square on its corner."""
    quarter = size / 4
    lobes = np.minimum(disc(x - quarter, y - quarter / 2, quarter * 1.1), disc(x + quarter, y - quarter / 2, quarter * 1.1))
    return np.minimum(lobes, block(x, y + quarter / 3, size * 0.53, size * 0.53, np.pi / 4))


def wedge(x: float, top: float, bottom: float, half: float) -> np.ndarray:
    """A triangle that stands on its base."""
    share = (ROWS - top) / (bottom - top)
    return np.maximum(abs(COLUMNS - x) - half * share, np.maximum(top - ROWS, ROWS - bottom))


# ---------------------------------------------------------------------------------------------------------------------
# 2. A frame being painted


@dataclass
class Canvas:
    picture: np.ndarray  # (H, W, 3) float, 0..255
    owner: np.ndarray = field(default_factory=lambda: np.full((HEIGHT, WIDTH), -1))

    def lay(self, distance: np.ndarray, color: Color | np.ndarray, thing: int = -1):
        """Paints a shape over what is there; it belongs to a thing, or hides what it covers."""
        shown, color = distance < 0.5, np.broadcast_to(np.asarray(color, float), self.picture.shape)
        if not shown.any():
            return
        window = box(shown)  # elsewhere nothing changes
        cover = np.clip(0.5 - distance[window], 0, 1)[..., None]
        self.picture[window] = self.picture[window] * (1 - cover) + color[window] * cover
        self.owner[distance < 0] = thing


@dataclass
class World:
    things: list[tuple[str, str]]    # color, kind
    paint: Callable[[float], Canvas]  # at a moment in seconds
    seconds: float


def _names(rng: np.random.Generator, kinds: tuple[str, ...], colors: tuple[str, ...], n: int) -> list[tuple[str, str]]:
    """n things of two or three looks (sometimes twice the same), so that most have company and something that is nearly like them."""
    looks = [(str(rng.choice(colors)), str(rng.choice(kinds))) for _ in range(rng.integers(2, 4))]
    return [looks[i % len(looks)] for i in range(n)]


def _apart(rng: np.random.Generator, n: int, margin: float, gap: float) -> np.ndarray:
    """n places (x, y), none nearer to another than `gap` if fifty tries find such."""
    places = np.empty((0, 2))
    for _ in range(n):
        tries = rng.uniform((margin, margin), (WIDTH - margin, HEIGHT - margin), (50, 2))
        room = np.linalg.norm(tries[:, None] - places, axis=2).min(1) if len(places) else np.full(50, np.inf)
        places = np.vstack([places, tries[np.argmax(room > gap) if (room > gap).any() else room.argmax()]])
    return places


# ---------------------------------------------------------------------------------------------------------------------
# 3. The worlds


def cells(rng: np.random.Generator) -> World:
    n = int(rng.integers(3, 7))
    things, places = _names(rng, ("ball",), ("green", "purple", "red", "blue"), n), _apart(rng, n, 22, 36)
    drift, radius, phase = rng.normal(0, 4, (n, 2)), rng.uniform(13, 19, n), rng.uniform(0, 6, (n, 3))
    grain = rng.normal(0, 5, (HEIGHT, WIDTH, 1))

    def paint(t: float) -> Canvas:
        canvas = Canvas(np.full((HEIGHT, WIDTH, 3), (12.0, 16.0, 24.0)) + grain)
        for i, (color, _) in enumerate(things):
            x, y = places[i] + drift[i] * t + 3 * np.sin(t + phase[i, :2])
            angle = np.arctan2(ROWS - y, COLUMNS - x)
            r = radius[i] * (1 + 0.1 * np.sin(3 * angle + phase[i, 2] + t) + 0.05 * np.sin(2 * t + phase[i, 0]))
            distance = np.hypot(COLUMNS - x, ROWS - y) - r
            glow = np.clip(1.25 + 0.5 * distance / radius[i], 0.55, 1.25)[..., None]
            canvas.lay(distance, np.clip(np.array(PAINT[color]) * glow, 0, 255), i)
            canvas.lay(disc(x + 2, y - 1, radius[i] * 0.3), np.array(PAINT[color]) * 0.45, i)
        return canvas

    return World(things, paint, float(rng.uniform(3, 6)))


def desk(rng: np.random.Generator) -> World:
    n = int(rng.integers(3, 6))
    things = _names(rng, ("cup", "box"), ("red", "blue", "white", "green", "black"), n)
    places, turn, size = _apart(rng, n, 26, 46), rng.uniform(0, 6.3, n), rng.uniform(34, 44, n)
    sway, speed, wood = rng.uniform(4, 12, 2), rng.uniform(0.6, 1.4, 2), rng.uniform(0.25, 0.5)

    def paint(t: float) -> Canvas:
        gaze = sway * np.sin(speed * t)
        rings = np.sin((ROWS - gaze[1]) * wood + 2 * np.sin((COLUMNS - gaze[0]) * 0.03))[..., None]
        canvas = Canvas(np.array((168.0, 124.0, 82.0)) + 9 * rings)
        for i, (color, kind) in enumerate(things):
            (x, y), s, tone = places[i] - gaze, size[i], np.array(PAINT[color])
            if kind == "cup":
                canvas.lay(bar(x, y, x + 0.62 * s * np.cos(turn[i]), y + 0.62 * s * np.sin(turn[i]), s * 0.09), tone * 0.85, i)
                canvas.lay(disc(x, y, s * 0.42), tone, i)
                canvas.lay(disc(x, y, s * 0.32), tone * 0.7, i)
            else:
                canvas.lay(block(x, y, s * 0.95, s * 0.7, turn[i], 2), tone, i)
                canvas.lay(block(x, y, s * 0.95, 3, turn[i]), np.clip(tone * 1.2 + 20, 0, 255), i)
        return canvas

    return World(things, paint, float(rng.uniform(3, 6)))


def road(rng: np.random.Generator) -> World:
    n_cars, n_trees = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    cars = _names(rng, ("car",), ("red", "blue", "white", "black", "yellow"), n_cars)
    lane, near, speed = rng.permutation([-1.0, 0.0, 1.0])[:n_cars], rng.uniform(0.35, 0.75, n_cars), rng.uniform(-0.08, 0.1, n_cars)
    side, start, ride = rng.choice([-1, 1], n_trees), rng.permutation(np.linspace(0.15, 0.7, n_trees)), rng.uniform(0.05, 0.15)
    horizon, seconds = 52.0, float(rng.uniform(3, 6))
    things = cars + [("green", "tree")] * n_trees * (1 + int((start.max() + ride * seconds) // 0.9))  # who has passed does not return

    def paint(t: float) -> Canvas:
        sky = np.clip((ROWS - horizon) / -horizon, 0, 1)[..., None]
        land = np.where(ROWS[..., None] < horizon, np.array((198.0, 214.0, 232.0)) - 40 * sky, (126.0, 140.0, 96.0))
        canvas, depth = Canvas(land), np.clip((ROWS - horizon) / (HEIGHT - horizon), 0, 1)
        canvas.lay(np.maximum(abs(COLUMNS - WIDTH / 2) - 8 - 92 * depth, horizon - ROWS), (92, 94, 100))
        dashes = np.where((1 / (depth + 0.15) - 3 * t) % 1.2 < 0.5, 0.0, 1e3)
        canvas.lay(np.maximum(abs(COLUMNS - WIDTH / 2) - 0.5 - 2 * depth, horizon - ROWS) + dashes, (222, 220, 210))
        shown = [(near[i] + speed[i] * t, i) for i in range(n_cars)]
        for j in range(n_trees):
            passed, d = divmod(start[j] + ride * t, 0.9)
            shown.append((d, n_cars + int(passed) * n_trees + j))
        for d, i in sorted(shown):  # what is near stands in front
            y, scale = horizon + d * (HEIGHT - horizon), 12 + 50 * max(d, 0)
            if i < n_cars:
                x, tone = WIDTH / 2 + lane[i] * (14 + 58 * d), np.array(PAINT[cars[i][0]])
                for wheel in (-0.34, 0.34):
                    canvas.lay(block(x + wheel * scale, y, scale * 0.18, scale * 0.2, 0, 1), (24, 24, 26), i)
                canvas.lay(block(x, y - scale * 0.22, scale, scale * 0.36, 0, scale * 0.08), tone, i)
                canvas.lay(block(x, y - scale * 0.46, scale * 0.72, scale * 0.34, 0, scale * 0.1), tone * 0.9, i)
                canvas.lay(block(x, y - scale * 0.47, scale * 0.56, scale * 0.2, 0, scale * 0.05), (150, 172, 188), i)
                for light in (-0.4, 0.4):
                    canvas.lay(disc(x + light * scale, y - scale * 0.22, scale * 0.06), (236, 90, 70), i)
            else:
                x = WIDTH / 2 + side[(i - n_cars) % n_trees] * (30 + 96 * d)
                canvas.lay(block(x, y - scale * 0.1, scale * 0.16, scale * 0.4), (104, 72, 48), i)
                for level in (0.0, 0.35):
                    canvas.lay(wedge(x, y - scale * (1.25 + level * 0.6), y - scale * (0.2 + level), scale * (0.5 - level * 0.3)), (48, 118, 62), i)
        return canvas

    return World(things, paint, seconds)


def recording(rng: np.random.Generator) -> World:
    n = int(rng.integers(3, 7))
    things = _names(rng, ("heart", "star"), ("red", "yellow", "blue", "purple", "orange"), n)
    places, size, seconds = _apart(rng, n, 24, 40), rng.uniform(32, 42, n), float(rng.uniform(3, 6))
    dragged, goal = int(rng.integers(n)), rng.uniform((30, 36), (WIDTH - 30, HEIGHT - 30))
    panel = rng.uniform(0.3, 0.6)

    def paint(t: float) -> Canvas:
        canvas = Canvas(np.full((HEIGHT, WIDTH, 3), (226.0, 229.0, 234.0)))
        canvas.lay(block(WIDTH * panel / 2, HEIGHT / 2, WIDTH * panel - 8, HEIGHT - 24, 0, 4), (247, 248, 250))
        canvas.lay(block(WIDTH * (1 + panel) / 2, HEIGHT / 2, WIDTH * (1 - panel) - 8, HEIGHT - 24, 0, 4), (238, 241, 246))
        canvas.lay(block(WIDTH / 2, 5, WIDTH, 10), (64, 72, 92))
        for dot in range(3):
            canvas.lay(disc(6 + 8 * dot, 5, 2.2), ((236, 96, 88), (240, 190, 80), (98, 196, 96))[dot])
        share = np.clip((t / seconds - 0.2) / 0.6, 0, 1)
        hand = places[dragged] + (goal - places[dragged]) * share
        for i in sorted(range(n), key=lambda i: i == dragged):  # it lies on top
            (x, y), (color, kind) = hand if i == dragged else places[i], things[i]
            canvas.lay(heart(x, y, size[i]) if kind == "heart" else star(x, y, size[i] * 0.24, size[i] * 0.56), PAINT[color], i)
        x, y = hand + (3, 4)
        canvas.lay(np.maximum(block(x + 4, y + 7, 9, 14, -0.5), (COLUMNS - x) * 0.8 - (ROWS - y)), (20, 20, 20))
        return canvas

    return World(things, paint, seconds)


def arm(rng: np.random.Generator) -> World:
    n, seconds = int(rng.integers(3, 6)), float(rng.uniform(3, 6))
    things = _names(rng, ("box", "ball"), ("orange", "blue", "green", "red", "yellow"), n)
    column, size = np.linspace(30, WIDTH - 30, n) + rng.uniform(-5, 5, n), rng.uniform(24, 31, n)
    lifted, base, table = int(rng.integers(n)), float(rng.uniform(70, WIDTH - 70)), 118.0

    def paint(t: float) -> Canvas:
        canvas = Canvas(np.full((HEIGHT, WIDTH, 3), (206.0, 208.0, 204.0)))
        canvas.lay(table - 14 - ROWS, (120, 122, 128))
        share = np.sin(np.clip(t / seconds, 0, 1) * np.pi)
        hand = np.array([column[lifted] + 12 * share, table - size[lifted] * 0.9 - 46 * share])
        shoulder = np.array([base, -6.0])
        for i, (color, kind) in enumerate(things):
            x, y = (hand[0], hand[1] + size[i] * 0.45) if i == lifted else (column[i], table - size[i] / 2)
            tone = np.array(PAINT[color])
            if kind == "ball":
                canvas.lay(disc(x, y, size[i] * 0.52), tone, i)
                canvas.lay(disc(x - size[i] * 0.15, y - size[i] * 0.17, size[i] * 0.12), np.clip(tone + 70, 0, 255), i)
            else:
                canvas.lay(block(x, y, size[i], size[i]), tone, i)
                canvas.lay(block(x, y - size[i] * 0.36, size[i], size[i] * 0.28), np.clip(tone + 40, 0, 255), i)
        reach = hand - shoulder
        far = np.linalg.norm(reach)
        elbow = shoulder + reach / 2 + np.array([reach[1], -reach[0]]) / max(far, 1) * np.sqrt(max(70.0**2 - (far / 2)**2, 0))
        canvas.lay(bar(*shoulder, *elbow, 6), (74, 80, 96))
        canvas.lay(bar(*elbow, *hand, 5), (92, 100, 118))
        canvas.lay(disc(*elbow, 7), (50, 54, 64))
        for finger in (-5, 5):
            canvas.lay(bar(hand[0], hand[1], hand[0] + finger, hand[1] + 8, 1.6), (40, 42, 50))
        return canvas

    return World(things, paint, seconds)


def posts(rng: np.random.Generator) -> World:
    """Not one of the five: things of different hues that pass behind posts and behind each other, to see what hiding, and
    little else, does to masks."""
    n, seconds = int(rng.integers(3, 6)), float(rng.uniform(4, 6))
    things = [(str(color), str(rng.choice(["ball", "box", "heart"]))) for color in rng.permutation(list(PAINT)[:6])[:n]]
    size, height = rng.uniform(24, 36, n), rng.uniform(24, HEIGHT - 24, n)
    start, speed = rng.uniform(0, 1, n), rng.choice([-1, 1], n) * rng.uniform(18, 40, n)
    stand, width = np.linspace(50, WIDTH - 50, 2) + rng.uniform(-14, 14, 2), rng.uniform(16, 30, 2)
    grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1))

    def paint(t: float) -> Canvas:
        canvas = Canvas(np.full((HEIGHT, WIDTH, 3), (126.0, 130.0, 134.0)) + grain)
        for i, (color, kind) in enumerate(things):
            room = WIDTH - size[i]
            x = size[i] / 2 + room - abs((start[i] * 2 * room + speed[i] * t) % (2 * room) - room)  # turns at the rim
            y, s = height[i] + 4 * np.sin(2 * t + i), size[i]
            shape = {"ball": lambda: disc(x, y, s / 2), "box": lambda: block(x, y, s, s * 0.8, 0.2 * np.sin(t + i)), "heart": lambda: heart(x, y, s)}
            canvas.lay(shape[kind](), PAINT[color], i)
        for x, wide in zip(stand, width):
            canvas.lay(block(x, HEIGHT / 2, wide, HEIGHT + 8), (70, 60, 50))
        return canvas

    return World(things, paint, seconds)


WORLDS = {"cells": cells, "desk": desk, "road": road, "recording": recording, "arm": arm}


# ---------------------------------------------------------------------------------------------------------------------
# 4. Filmed and asked about


def film(name: str, seed: int, index: int, fps: float = FPS) -> tuple[World, np.ndarray, np.ndarray, np.ndarray]:
    """-> the world, times (T,), frames (T, H, W, 3) uint8, masks (T, n, H, W) bool; a pure function of its arguments."""
    worlds = WORLDS | {"posts": posts}
    world = worlds[name](np.random.default_rng([seed, index, 11, list(worlds).index(name)]))
    times = np.arange(int(world.seconds * fps) + 1) / fps
    shown = [world.paint(t) for t in times]
    frames = np.stack([np.clip(canvas.picture, 0, 255).round().astype(np.uint8) for canvas in shown])
    masks = np.stack([canvas.owner == np.arange(len(world.things))[:, None, None] for canvas in shown])
    return world, times, frames, masks


def _objects(times: np.ndarray, masks: np.ndarray) -> dict[int, Object]:
    objects = {}
    for i in range(masks.shape[1]):
        shown = {t: mask for t, mask in zip(times.tolist(), masks[:, i]) if mask.any()}
        points = {t: deepest(mask) for t, mask in shown.items() if mask.sum() >= SMALLEST}
        if points:
            objects[i] = Object(points, {t: Runs.of(mask) for t, mask in shown.items()})
    return objects


def occlusions(seed: int, index: int) -> Record:
    """Record `index` of the posts; each thing is asked for on its own."""
    world, times, frames, masks = film("posts", seed, index)
    objects = _objects(times, masks)
    annotations = [Annotation("point", " ".join(world.things[i]), [i]) for i in objects]
    return Record(f"occlusions-{index}", list(frames), times.tolist(), objects, annotations)


def record(seed: int, index: int) -> Record:
    """Record `index`: the worlds take turns. Every look and every kind of thing is asked for, and something that is not
    there."""
    name = list(WORLDS)[index % len(WORLDS)]
    world, times, frames, masks = film(name, seed, index // len(WORLDS))
    objects, plural = _objects(times, masks), {kind: "boxes" if kind == "box" else f"{kind}s" for _, kind in world.things}
    asked: dict[str, list[int]] = {}
    for i in objects:
        color, kind = world.things[i]
        for label in (f"{color} {plural[kind]}", plural[kind]):
            asked.setdefault(label, []).append(i)
    nearly = (f"{color} {kinds}" for color in PAINT for kinds in plural.values())
    missing = next(label for label in nearly if label not in asked)
    annotations = [Annotation("point_count", label, targets, about=name) for label, targets in asked.items()]
    annotations.append(Annotation("point_count", missing, [], about="none"))
    return Record(f"vpos-{name}-{index}", list(frames), times.tolist(), objects, annotations)
