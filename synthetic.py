"""Worlds drawn by code: pictures and clips whose truth is exact, because we drew them.

    things (kind, colour, size)  +  where each one is at time t  ->  frames, masks, points

Everything is a pure function of (seed, index): any process can draw example 12345 without drawing the ones before.
A thing is a *sprite*: a few polygons around the origin, painted four times too large and averaged down, which also
gives its soft edge. A frame is the background with the sprites laid on it in list order, so later things hide
earlier ones:

      owner of each pixel        a thing's mask = the pixels it owns
      . . 0 0 0 . .              a thing's point = the anchor of its kind (the body of a cup, the top of a ring),
      . . 0 1 1 1 .                                or, where that is hidden, the deepest pixel still in view
      . . . 1 1 1 .

Points are in pixels, continuous: the centre of the pixel in row r and column c is (c + 0.5, r + 0.5).
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import command

# ---------------------------------------------------------------------------------------------------------------------
# 1. Words: kinds, colours, backgrounds
# ---------------------------------------------------------------------------------------------------------------------

COLORS = {
    "red": (215, 35, 40), "green": (35, 165, 60), "blue": (35, 80, 225), "yellow": (245, 220, 40),
    "orange": (250, 135, 20), "purple": (140, 45, 175), "white": (247, 247, 247), "black": (22, 22, 22),
}
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "noisy", "gradient")


def _oval(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> np.ndarray:
    """Points (32, 2) along an ellipse around (x, y); angles in degrees, clockwise on the screen from the right."""
    angle = np.radians(np.linspace(start, stop, 32))
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1)


def _rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _star() -> np.ndarray:
    angle, radius = np.radians(np.arange(10) * 36 - 90), np.where(np.arange(10) % 2, 0.45, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48)
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2.5) / 15.5], 1)


# Kind -> (anchor, parts painted in order). Local coordinates: the thing fills the circle of radius 1, y points down.
# A part is (paint, corners); "body" is the thing's colour, "light", "dark" and "ink" are made from it, "hole" cuts.
SHAPES = {
    "cup": ((-0.15, 0.2), [("body", _oval(0.45, 0.0, 0.5, 0.48)), ("hole", _oval(0.45, 0.0, 0.26, 0.25)),
                           ("body", np.array([(-0.8, -0.7), (0.5, -0.7), (0.32, 0.85), (-0.62, 0.85)])),
                           ("ink", _oval(-0.15, -0.7, 0.65, 0.18))]),
    "ball": ((0.0, 0.1), [("body", _oval(0, 0, 0.97, 0.97)), ("light", _oval(-0.35, -0.4, 0.25, 0.2))]),
    "box": ((-0.2, 0.3), [("body", _rectangle(-0.85, -0.35, 0.45, 0.85)),
                          ("light", np.array([(-0.85, -0.35), (-0.45, -0.8), (0.85, -0.8), (0.45, -0.35)])),
                          ("dark", np.array([(0.45, -0.35), (0.85, -0.8), (0.85, 0.4), (0.45, 0.85)]))]),
    "star": ((0.0, 0.05), [("body", _star())]),
    "ring": ((0.0, -0.72), [("body", _oval(0, 0, 0.97, 0.97)), ("hole", _oval(0, 0, 0.48, 0.48))]),
    "cross": ((0.0, 0.0), [("body", np.array([
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
        (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)]))]),
    "heart": ((0.0, -0.1), [("body", _heart())]),
    "moon": ((-0.62, 0.0), [("body", np.concatenate([_oval(0, 0, 0.97, 0.97, 50, 310),
                                                     _oval(0.45, 0, 0.76, 0.76, 282, 78)]))]),
    "tree": ((0.0, 0.2), [("ink", _rectangle(-0.17, 0.3, 0.17, 0.95)),
                          ("body", np.array([(0, -0.4), (0.8, 0.55), (-0.8, 0.55)])),
                          ("body", np.array([(0, -0.98), (0.58, 0.0), (-0.58, 0.0)]))]),
    "house": ((0.0, 0.15), [("body", _rectangle(-0.68, -0.15, 0.68, 0.8)),
                            ("dark", np.array([(0, -0.95), (0.92, -0.1), (-0.92, -0.1)])),
                            ("ink", _rectangle(0.1, 0.28, 0.42, 0.8)), ("light", _rectangle(-0.5, 0.15, -0.1, 0.5))]),
    "car": ((0.0, 0.12), [("body", np.array([(-0.55, -0.05), (-0.35, -0.55), (0.3, -0.55), (0.55, -0.05)])),
                          ("light", np.array([(-0.36, -0.05), (-0.24, -0.4), (0.2, -0.4), (0.36, -0.05)])),
                          ("body", _rectangle(-0.97, -0.08, 0.97, 0.35)),
                          ("ink", _oval(-0.52, 0.36, 0.24, 0.24)), ("ink", _oval(0.52, 0.36, 0.24, 0.24))]),
    "fish": ((-0.25, 0.0), [("dark", np.array([(0.35, 0), (0.97, -0.55), (0.97, 0.55)])),
                            ("body", _oval(-0.2, 0, 0.78, 0.52)), ("ink", _oval(-0.6, -0.14, 0.1, 0.1))]),
}
KINDS = tuple(SHAPES)
PLURALS = {kind: kind + "s" for kind in KINDS} | {"box": "boxes", "cross": "crosses", "fish": "fish"}


@dataclass
class Thing:
    kind: str
    color: str
    size: float  # diameter in pixels of the picture

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


# ---------------------------------------------------------------------------------------------------------------------
# 2. Sprites and backgrounds
# ---------------------------------------------------------------------------------------------------------------------

OVERSAMPLING = 4


@dataclass
class Sprite:
    """A thing on a square tile of its own, ready to be laid on frames: new = paint + keep * old."""
    paint: np.ndarray    # (S, S, 3) float32, colour * opacity, plus 0.5 so that the cast to uint8 rounds
    keep: np.ndarray     # (S, S, 1) float32, 1 - opacity
    solid: np.ndarray    # (S, S) bool, opacity >= 1/2: the pixels that count as the thing
    area: int            # of solid
    anchor: tuple[float, float]  # x, y in the tile


def _paints(color: np.ndarray) -> dict[str, tuple[int, ...]]:
    """The RGBA paints of one thing. Shades of black go up, all others down, so that every part stays visible."""
    shaded = (lambda share: color + (110 - color) * share) if color.mean() < 60 else (lambda share: color * (1 - share))
    rgb = {"body": color, "light": color + (255 - color) * 0.5, "dark": shaded(0.3), "ink": shaded(0.6)}
    paints = {name: (*np.clip(value, 0, 255).astype(int).tolist(), 255) for name, value in rgb.items()}
    return paints | {"hole": (*paints["ink"][:3], 0)}


def _sprite(rng: np.random.Generator, thing: Thing) -> Sprite:
    """Draws a thing with a tilt, tint and outline of its own. A ring is not tilted: its anchor stays at the top."""
    tilt = 0.0 if thing.kind == "ring" else np.radians(rng.uniform(-15, 15))
    paints = _paints(COLORS[thing.color] + rng.uniform(-12, 12, 3))
    outline = round(rng.uniform(0.0, 0.05) * thing.size * OVERSAMPLING)
    side = int(np.ceil(thing.size)) + 4  # room for the outline
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))]) * thing.size / 2  # row vectors
    anchor, parts = SHAPES[thing.kind]

    tile = Image.new("RGBA", (side * OVERSAMPLING, side * OVERSAMPLING), paints["hole"])
    pen = ImageDraw.Draw(tile)
    for paint, corners in parts:
        path = ((corners @ turn + side / 2) * OVERSAMPLING).ravel().tolist()
        pen.polygon(path, fill=paints[paint])
        if outline:
            pen.line(path + path[:4], fill=paints["ink"], width=outline)
    pixels = np.asarray(tile.reduce(OVERSAMPLING), np.float32)
    opacity = pixels[..., 3:] / 255
    solid = opacity[..., 0] >= 0.5
    x, y = np.array(anchor) @ turn + side / 2
    return Sprite(pixels[..., :3] * opacity + 0.5, 1 - opacity, solid, int(solid.sum()), (float(x), float(y)))


def _background(rng: np.random.Generator, style: str, width: int, height: int) -> np.ndarray:
    """A muted (H, W, 3) uint8 pattern of two near greys: lighter than black things, darker than white ones."""
    y, x = np.ogrid[:height, :width]
    period, angle = rng.uniform(14, 40), rng.uniform(0, np.pi / 2)
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = {
        "plain": lambda: np.zeros((height, width)),
        "striped": lambda: along / period % 1 < 0.5,
        "checkered": lambda: (x // period + y // period) % 2,
        "dotted": lambda: (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < (0.3 * period) ** 2,
        "noisy": lambda: rng.random((height, width)),
        "gradient": lambda: along / along.max(),
    }[style]()
    one = rng.uniform(110, 175) + rng.uniform(-12, 12, 3)
    other = one + rng.uniform(25, 40) * (1 if one.mean() < 143 else -1)
    return (one + (other - one) * wave[..., None].astype(np.float32)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Scenes: frames, and who owns each pixel
# ---------------------------------------------------------------------------------------------------------------------

STILL_VISIBLE = 0.60   # of its area: what every thing of a still keeps in view
POINT_VISIBLE = 0.20   # of its area: what a thing must show in a frame to have a point there,
POINT_PIXELS = 12      # and at least so many pixels
CLEARLY_VISIBLE = 0.60  # what a thing must show at some moment of a clip
FIRST_VISIBLE = 0.35   # of the most that any frame shows of a thing: what its first frame must show


@dataclass
class Scene:
    """F frames (1 for a still) of n things, with the truth about them. A thing's identity is its index in `things`."""
    frames: np.ndarray   # (F, H, W, 3) uint8
    times: np.ndarray    # (F,) seconds from 0
    things: list[Thing]  # on a screen: of screens.Element
    masks: np.ndarray    # (F, n, H, W) bool, the pixels of each thing that are in view; no pixel has two owners
    points: np.ndarray   # (F, n, 2) float32 x, y in pixels, inside the mask; NaN where too little is in view
    background: str      # one of BACKGROUNDS, or "screen"
    is_video: bool
    centers: np.ndarray | None = None  # (F, n, 2) of clips: where the things are, whatever hides them


def _window(sprite: Sprite, place: np.ndarray, shape: tuple[int, int]) -> tuple[tuple[slice, slice], ...]:
    """Slices (rows, columns) of the picture and of the tile that meet when the tile's centre lies at `place` (x, y)."""
    side = len(sprite.solid)
    picture, tile = [], []
    for centre, limit in zip(reversed(place), shape):
        first = round(centre - side / 2)
        start, stop = min(max(first, 0), limit), min(max(first + side, 0), limit)
        picture.append(slice(start, stop))
        tile.append(slice(start - first, stop - first))
    return tuple(picture), tuple(tile)


def _owners(sprites: list[Sprite], places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int8: which thing each pixel shows, -1 for the background. Later things lie on top."""
    owner = np.full(shape, -1, np.int8)
    for i, (sprite, place) in enumerate(zip(sprites, places)):
        picture, tile = _window(sprite, place, shape)
        owner[picture][sprite.solid[tile]] = i
    return owner


def _visible(sprites: list[Sprite], places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(n,) the share of its area that each thing shows."""
    owner = _owners(sprites, places, shape)
    seen = np.bincount(owner.ravel() + 1, minlength=len(sprites) + 1)[1:]
    return seen / np.array([sprite.area for sprite in sprites])


def inner(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the pixel of a mask that is nearest to its middle."""
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return float(columns[nearest] + 0.5), float(rows[nearest] + 0.5)


def _deepest(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the pixel of a (h, w) mask that is farthest from its edge: peel layers off until nothing is left."""
    layer = np.pad(mask, 1)
    while layer.any():
        core, layer = layer, layer.copy()
        layer[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
    x, y = inner(core)  # the innermost may be a ridge
    return x - 1, y - 1  # the padding


def _point(mask: np.ndarray, x: float, y: float) -> tuple[float, float]:
    """The anchor (x, y) if the (h, w) mask shows it with a margin, else the deepest pixel of the mask."""
    row, column, margin = int(np.floor(y)), int(np.floor(x)), max(1, max(mask.shape) // 30)
    if min(row, column) >= margin:
        around = mask[row - margin:row + margin + 1, column - margin:column + margin + 1]
        if around.size == (2 * margin + 1) ** 2 and around.all():
            return x, y
    return _deepest(mask)


def _compose(background: np.ndarray, sprites: list[Sprite],
             places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame (H, W, 3), its masks (n, H, W) and points (n, 2), with the centres of the things at `places` (n, 2)."""
    frame, shape = background.copy(), background.shape[:2]
    masks = np.zeros((len(sprites), *shape), bool)
    points = np.full((len(sprites), 2), np.nan, np.float32)
    owner = _owners(sprites, places, shape)
    for i, (sprite, place) in enumerate(zip(sprites, places)):
        picture, tile = _window(sprite, place, shape)
        frame[picture] = sprite.paint[tile] + sprite.keep[tile] * frame[picture]
        mask = masks[i][picture] = owner[picture] == i
        if mask.sum() >= max(POINT_VISIBLE * sprite.area, POINT_PIXELS):
            x, y = _point(mask, sprite.anchor[0] - tile[1].start, sprite.anchor[1] - tile[0].start)
            points[i] = x + picture[1].start, y + picture[0].start
    return frame, masks, points


def first_seen(scene: Scene, thing: int) -> int:
    """The first frame that shows enough of `thing` to tell what it is: a point, and at least 35% of the most that any
    frame shows of it."""
    area = scene.masks[:, thing].sum((1, 2))
    return int(np.argmax((area >= FIRST_VISIBLE * area.max()) & np.isfinite(scene.points[:, thing, 0])))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Stills
# ---------------------------------------------------------------------------------------------------------------------

def _cast(rng: np.random.Generator, n: int, smallest: float, largest: float) -> list[Thing]:
    """n things of up to five types (kind, colour). A new type often shares its kind or its colour with an old one: so most
    questions meet things that are nearly but not quite what is asked for, and many have several targets."""
    types = [(str(rng.choice(KINDS)), str(rng.choice(list(COLORS))))]
    for _ in range(rng.integers(2, 5)):
        kind, color = types[rng.integers(len(types))]
        shared = rng.random()
        kind = kind if shared < 0.2 else str(rng.choice(KINDS))
        color = color if shared > 0.7 else str(rng.choice(list(COLORS)))
        if (kind, color) not in types:
            types.append((kind, color))
    picks = (list(range(len(types))) + rng.integers(len(types), size=n).tolist())[:n]
    return [Thing(*types[pick], float(rng.uniform(smallest, largest))) for pick in rng.permutation(picks)]


# Each use of random numbers has its own stream, named by the number after seed and index: 0 stills, 1 clips, 4 crowds,
# 5 screens, 6 questions (data.draw), 7 lengths of long clips, 8 wordings in evaluation, 9 arrivals, 11 vpos, 13 moments of files,
# 14 frames for the ViT alone, 15 the order of a mixture, 16 wordings in training. (NumPy takes [seed, index] for [seed, index, 0]: the
# corpus, [seed, 9], and masks.annotate_file share the numbers of stills. That does no harm, and changing it would change what is drawn.)
def _generator(seed: int, index: int, salt: int) -> np.random.Generator:
    if min(seed, index) < 0:
        raise ValueError(f"seed and index must be 0 or more, not {seed} and {index}")
    return np.random.default_rng([seed, index, salt])


def _settle(rng: np.random.Generator, sprites: list[Sprite], shape: tuple[int, int]) -> dict[int, np.ndarray]:
    """Finds places one sprite after the other, all inside the picture; one that would hide too much is left out."""
    height, width = shape
    wanted = rng.uniform(STILL_VISIBLE, 0.95)  # some pictures are crowded, some are tidy
    settled: dict[int, np.ndarray] = {}
    for i, sprite in enumerate(sprites):
        half = len(sprite.solid) / 2
        for patience in np.linspace(1, 0, 12):
            place = np.array([rng.uniform(half, width - half), rng.uniform(half, height - half)])
            visible = _visible([sprites[j] for j in settled] + [sprite], [*settled.values(), place], shape)
            if visible.min() >= STILL_VISIBLE + (wanted - STILL_VISIBLE) * patience:
                settled[i] = place
                break
    return settled


def still(seed: int, index: int) -> Scene:
    """One picture of 2 to 11 things, each of which shows at least 60% of itself. It is one or two squares wide and high
    (a square has 100 to 126 pixels a side, two overlap to 224), things have 28% to 44% of a square's side, and larger
    pictures hold more of them. A pure function of (seed, index), both >= 0."""
    rng = _generator(seed, index, 0)
    rows, columns = [(1, 1), (1, 2), (2, 1), (2, 2)][rng.choice(4, p=[0.5, 0.2, 0.2, 0.1])]
    scale = rng.uniform(0.85, 1.0)
    height, width = (round((28 + 98 * n) * scale * rng.uniform(0.93, 1.0)) for n in (rows, columns))
    style = str(rng.choice(BACKGROUNDS))
    background = _background(rng, style, width, height)
    settled = {}
    while len(settled) < 2:
        n = rng.integers(3, 6) + rng.integers(2 * rows * columns - 1)
        things = _cast(rng, n, 0.28 * 126 * scale, 0.44 * 126 * scale)
        sprites = [_sprite(rng, thing) for thing in things]
        settled = _settle(rng, sprites, (height, width))
    frame, masks, points = _compose(background, [sprites[i] for i in settled], np.array([*settled.values()]))
    return Scene(frame[None], np.zeros(1), [things[i] for i in settled], masks[None], points[None], style, False)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Clips
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Motion:
    """Where a thing's centre is at time t: a straight line that is mirrored at two bounds, plus a swing.
    All fields are (2,) arrays for x and y, in pixels and seconds."""
    start: np.ndarray
    velocity: np.ndarray
    low: np.ndarray      # bounds of the straight part
    high: np.ndarray
    swing: np.ndarray = field(default_factory=lambda: np.zeros(2))  # amplitude
    period: np.ndarray = field(default_factory=lambda: np.ones(2))  # of the swing

    def __call__(self, time: float | np.ndarray) -> np.ndarray:
        """The centre (2,) at a time; for times (m, 1) the centres (m, 2)."""
        span = self.high - self.low
        folded = span - np.abs((self.start - self.low + self.velocity * time) % (2 * span) - span)
        return self.low + folded + self.swing * np.sin(2 * np.pi * time / self.period)


def _velocity(rng: np.random.Generator, slowest: float, fastest: float, shape: tuple[int, int]) -> np.ndarray:
    """In any direction, its speed between two shares of the shorter side a second."""
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(slowest, fastest) * min(shape)
    return speed * np.array([np.cos(angle), np.sin(angle)])


def _motion(rng: np.random.Generator, size: float, shape: tuple[int, int], seconds: float,
            others: list[Motion]) -> Motion:
    """A thing that rests, swings, bounces off the frame, or leaves the frame and comes back (its bounds lie outside).
    Half of the travellers are sent across the path of another thing, so that one passes behind the other."""
    sides = np.array(shape[::-1], float)
    rests, swings, leaves, meets = rng.random() < 0.25, rng.random() < 0.35, rng.random() < 0.35, rng.random() < 0.5
    margin = size * (-0.6 if leaves else 0.5)
    low, high = np.full(2, margin), sides - margin
    start = rng.uniform(np.full(2, size / 2), sides - size / 2)
    velocity = _velocity(rng, 0.1, 0.35, shape)
    swing, period = rng.uniform(0.05, 0.2, 2) * sides, rng.uniform(2, 5, 2)
    if rests or swings:
        velocity = np.zeros(2)
    elif meets and others:
        moment = rng.uniform(0.2, 0.8) * seconds
        start = others[-1](moment) - velocity * moment
    return Motion(start, velocity, low, high, swing * (swings and not rests), period)


@dataclass
class World:
    """A clip before it is filmed: the same at any frame rate."""
    background: np.ndarray  # (H, W, 3) uint8
    style: str
    seconds: float          # until the last moment
    things: list[Thing]
    sprites: list[Sprite]
    motions: list[Motion]

    def places(self, time: float) -> np.ndarray:
        """(n, 2) centres of all things at `time`."""
        return np.array([motion(time) for motion in self.motions])

    def visible(self, time: float) -> np.ndarray:
        """(n,) share of its area that each thing shows at `time`."""
        return _visible(self.sprites, self.places(time), self.background.shape[:2])

    def film(self, times: np.ndarray) -> Scene:
        """One frame for each of `times`, in seconds."""
        centers = np.stack([self.places(time) for time in times])
        shots = [_compose(self.background, self.sprites, places) for places in centers]
        frames, masks, points = (np.stack(part) for part in zip(*shots))
        return Scene(frames, times, self.things, masks, points, self.style, True, centers)

    def without_hidden(self) -> "World":
        """Leaves out what is never clearly in view on the 2 fps grid (the grid of the truth, whatever is filmed)."""
        best = np.max([self.visible(time) for time in filming_times(2.0, self.seconds)], 0)
        stay = np.flatnonzero(best >= CLEARLY_VISIBLE)
        things, sprites, motions = ([part[i] for i in stay] for part in (self.things, self.sprites, self.motions))
        return replace(self, things=things, sprites=sprites, motions=motions)


def filming_times(fps: float, seconds: float) -> np.ndarray:
    """0, 1/fps, 2/fps, ... and always the last moment, `seconds`, itself."""
    if not (fps > 0 and seconds > 0):
        raise ValueError(f"a clip needs fps > 0 and seconds > 0, not {fps} and {seconds}")
    return np.append(np.arange(np.ceil(seconds * fps - 1e-9)) / fps, seconds)


def world(seed: int, index: int, seconds: float | None = None) -> World:
    """2 to 6 things of 26% to 42% of the shorter side, on a frame of 128 to 288 pixels a side, for `seconds` (1.5 to 5 in
    halves unless given). A pure function of its arguments; ValueError if one is negative."""
    rng = _generator(seed, index, 1)
    drawn = float(rng.integers(3, 11) / 2)
    seconds = drawn if seconds is None else float(seconds)
    aspect = rng.uniform(0.8, 1.4)
    short = rng.uniform(128, 288 / max(aspect, 1 / aspect))
    width, height = round(short * max(aspect, 1)), round(short * max(1 / aspect, 1))
    style = str(rng.choice(BACKGROUNDS))
    made = World(_background(rng, style, width, height), style, seconds, [], [], [])
    while len(made.things) < 2:
        things = _cast(rng, int(rng.integers(2, 7)), 0.26 * min(width, height), 0.42 * min(width, height))
        motions: list[Motion] = []
        for thing in things:
            motions.append(_motion(rng, thing.size, (height, width), seconds, motions))
        order = rng.permutation(len(things))  # which of two things that meet is in front is a matter of chance
        things, motions = [things[i] for i in order], [motions[i] for i in order]
        made = replace(made, things=things, sprites=[_sprite(rng, thing) for thing in things], motions=motions)
        made = made.without_hidden()
    return made


def clip(seed: int, index: int, fps: float = 2.0, seconds: float | None = None) -> Scene:
    """Films world (seed, index) at `fps`: another rate shows the same motion at other moments. The last frame is always
    at `seconds`. ValueError for a negative seed or index and for fps or seconds <= 0."""
    made = world(seed, index, seconds)
    return made.film(filming_times(fps, made.seconds))


def _arrival(rng: np.random.Generator, size: float, shape: tuple[int, int], seconds: float) -> Motion:
    """Out of view at first: comes in across one of the four sides, straight on, and bounces off the others."""
    sides, axis = np.array(shape[::-1], float), rng.integers(2)
    low, high, velocity = np.full(2, size / 2), sides - size / 2, rng.uniform(-0.2, 0.2, 2) * min(shape)
    start, inside = rng.uniform(low, high), rng.uniform(low, high)
    outside, moment = size * rng.uniform(0.5, 1.5), rng.uniform(0.15, 0.85) * seconds
    first = -outside if rng.random() < 0.5 else sides[axis] + outside
    start[axis], velocity[axis] = first, (inside[axis] - first) / moment  # is `inside` at that moment
    low[axis], high[axis] = min(low[axis], first), max(high[axis], first)
    return Motion(start, velocity, low, high)


def _emergence(rng: np.random.Generator, size: float, shape: tuple[int, int], front: Motion) -> Motion:
    """Behind another thing at first: moves out from there, straight on, and bounces off the frame."""
    sides, velocity = np.array(shape[::-1], float), _velocity(rng, 0.1, 0.35, shape)
    start = np.clip(front(0) + rng.normal(0, 0.1 * size, 2), size / 2, sides - size / 2)
    return Motion(start, velocity, np.full(2, size / 2), sides - size / 2)


def arrivals(seed: int, index: int) -> Scene:
    """As `clip`, but about half of the things come into view one after the other, from outside or from behind another:
    where each is seen first has to be looked for. At least two things; a pure function of its arguments."""
    made, rng = world(seed, index), _generator(seed, index, 9)
    shape, came = made.background.shape[:2], made
    while came is made or len(came.things) < 2:
        motions: list[Motion] = []
        for thing, motion in zip(reversed(made.things), reversed(made.motions)):  # the nearest first
            way = rng.choice(["stays", "comes in", "comes out"], p=[0.5, 0.25, 0.25])
            if way == "comes out" and motions:
                motion = _emergence(rng, thing.size, shape, motions[rng.integers(len(motions))])
            elif way != "stays":
                motion = _arrival(rng, thing.size, shape, made.seconds)
            motions.append(motion)
        came = replace(made, motions=motions[::-1]).without_hidden()
    return came.film(filming_times(2.0, came.seconds))


def _journey(rng: np.random.Generator, size: float, shape: tuple[int, int], seconds: float, others: list[Motion]) -> Motion:
    """Never at rest: bounces off the frame or, a quarter of the things, turns outside of it; mostly sent across the path of another."""
    sides = np.array(shape[::-1], float)
    margin = np.full(2, size * (-0.7 if rng.random() < 0.25 else 0.5))
    velocity, start = _velocity(rng, 0.15, 0.4, shape), rng.uniform(size / 2, sides - size / 2)
    if others and rng.random() < 0.7:
        moment = rng.uniform(0.2, 0.8) * seconds
        start = others[rng.integers(len(others))](moment) - velocity * moment
    return Motion(start, velocity, margin, sides - margin)


def _away(way: np.ndarray, shape: tuple[int, int], standing: list[Thing], still_at: list[np.ndarray]) -> np.ndarray:
    """At which moments of a way (moments, 2) the middle of a thing is outside of the picture or behind something large."""
    outside = ((way < 0) | (way > shape[::-1])).any(1)
    return outside | np.any([(np.abs(way - place) < 0.4 * thing.size).all(1) for thing, place in zip(standing, still_at)], axis=0)


def crowd(seed: int, index: int, seconds: float | None = None) -> World:
    """A clip for tracking, 3 to 6 seconds unless given: three to six moving things of a few types, so that many look alike, whose
    ways cross, and one or two large ones that stand still in front of them; less those that are never clearly in view (three of all
    are left at least). Of those that look the same only one at a time is outside or behind a large one, if twenty tries find such
    ways: then it is known which of them comes back. (Not so where they hide behind each other: `questions.mixed_up`.) A pure
    function of its arguments."""
    rng = _generator(seed, index, 4)
    drawn = float(rng.integers(6, 13) / 2)
    seconds = drawn if seconds is None else seconds
    shape = height, width = tuple(2 * int(rng.integers(75, 130)) for _ in range(2))
    side, style, moments = min(shape), str(rng.choice(BACKGROUNDS)), np.arange(0, seconds, 0.25)[:, None]
    made = World(_background(rng, style, width, height), style, seconds, [], [], [])
    while len(made.things) < 3:
        types = _cast(rng, int(rng.integers(2, 4)), 0.22 * side, 0.32 * side)
        movers = [replace(types[rng.integers(len(types))], size=float(rng.uniform(0.22, 0.32) * side))
                  for _ in range(rng.integers(3, 7))]
        standing = [Thing(str(rng.choice(["house", "box", "tree"])), str(rng.choice(list(COLORS))),
                          float(rng.uniform(0.4, 0.5) * side)) for _ in range(rng.integers(1, 3))]
        still_at = [rng.uniform(0.25, 0.75, 2) * (width, height) for _ in standing]
        paths: list[Motion] = []
        away: list[np.ndarray] = []
        for mover in movers:
            for _ in range(20):
                path = _journey(rng, mover.size, shape, seconds, paths)
                gone = _away(path(moments), shape, standing, still_at)
                if not any(other.name == mover.name and (gone & out).any() for other, out in zip(movers, away)):
                    break
            paths.append(path)
            away.append(gone)
        paths += [Motion(place, np.zeros(2), np.zeros(2), np.array([width, height], float)) for place in still_at]
        things = movers + standing
        made = replace(made, things=things, sprites=[_sprite(rng, thing) for thing in things], motions=paths).without_hidden()
    return made


def tracks(seed: int, index: int, fps: float = 2.0, seconds: float | None = None) -> Scene:
    """Films crowd (seed, index) at `fps`."""
    made = crowd(seed, index, seconds)
    return made.film(filming_times(fps, made.seconds))


def _long(seed: int, index: int) -> float:
    return float(_generator(seed, index, 7).integers(12, 31) / 2)


def long_clip(seed: int, index: int) -> Scene:
    """A clip of 6 to 15 seconds."""
    return clip(seed, index, seconds=_long(seed, index))


def long_tracks(seed: int, index: int) -> Scene:
    """As `tracks`, of 6 to 15 seconds."""
    return tracks(seed, index, seconds=_long(seed, index))


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command line: film the sample clip
# ---------------------------------------------------------------------------------------------------------------------

def cups_world() -> World:
    """The sample clip's world, 320 x 240: a red cup passes behind a house, a yellow one leaves and comes back."""
    script = [  # kind, colour, diameter, start, velocity, low, high, swing, period; later lines are nearer
        ("star", "purple", 66, (268, 196), (0, 0), (0, 0), (320, 240), (0, 14), (1, 2.5)),
        ("cup", "red", 64, (36, 150), (50, 0), (30, 0), (290, 240), (0, 0), (1, 1)),
        ("cup", "yellow", 68, (60, 52), (-38, 0), (-40, 0), (320, 240), (0, 5), (1, 2)),
        ("cup", "blue", 70, (232, 62), (0, 0), (0, 0), (320, 240), (34, 16), (4, 2)),
        ("house", "green", 98, (160, 146), (0, 0), (0, 0), (320, 240), (0, 0), (1, 1)),
        ("ball", "orange", 64, (60, 210), (70, -16), (23, 160), (297, 217), (0, 0), (1, 1)),
    ]
    rng = np.random.default_rng(10)  # a draw in which the house stands nearly upright
    things = [Thing(kind, color, float(size)) for kind, color, size, *_ in script]
    motions = [Motion(*(np.array(values, float) for values in line[3:])) for line in script]
    background = _background(rng, "checkered", 320, 240)
    return World(background, "checkered", 5.0, things, [_sprite(rng, thing) for thing in things], motions)


def _track(made: World, truth: Scene, thing: int) -> list[dict]:
    """Where a thing is in each frame of `truth`; x and y are None where too little of it is in view."""
    moments = []
    for time, (x, y) in zip(truth.times, truth.points[:, thing].astype(float)):
        where = {"x": round(x, 2), "y": round(y, 2)} if np.isfinite(x) else {"x": None, "y": None}
        moments.append({"time": float(time), **where, "visible": round(float(made.visible(time)[thing]), 3)})
    return moments


def _cups(folder: Path) -> None:
    from preprocess import write_video  # here only: drawing needs no video library

    made, fps = cups_world(), 24
    folder.mkdir(parents=True, exist_ok=True)
    frames = (made.film(np.array([time])).frames[0] for time in filming_times(fps, made.seconds))
    write_video(folder / "cups.mp4", frames, fps)

    truth = made.film(filming_times(2.0, made.seconds))
    height, width = truth.frames.shape[1:3]
    things = [{"id": i, "kind": thing.kind, "color": thing.color, "track": _track(made, truth, i)}
              for i, thing in enumerate(made.things)]
    with command.atomic_write(folder / "cups.json") as part:
        part.write_text(json.dumps({"size": [width, height], "fps": fps, "seconds": made.seconds, "things": things}))


def main() -> None:
    with command.one_line("synthetic.py"):
        parser = command.Parser(prog="synthetic.py", description="Worlds drawn by code, with their exact truth.")
        commands = parser.add_subparsers(required=True, metavar="cups", parser_class=command.Parser)
        cups = commands.add_parser("cups", help="write the sample clip cups.mp4 and its truth cups.json")
        cups.add_argument("out", help="the folder to write to")
        _cups(Path(parser.parse_args().out))


if __name__ == "__main__":
    main()
