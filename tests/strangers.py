"""Pictures of things that the tiny model has never seen, as somebody's own data: clocks, keys, leaves and mushrooms.

    python tests/strangers.py runs/strangers    # train.jsonl with 200 pictures, test.jsonl with 60 others, and their PNGs

Shares no drawing code with the synthetic worlds.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("clocks", "keys", "leaves", "mushrooms")
PICTURES = {"train": 200, "test": 60}
BIG = 4  # drawn so many times too large


def clock(pen: ImageDraw.ImageDraw, r: float, rng: np.random.Generator, shade) -> None:
    pen.ellipse((-r, -r, r, r), fill=shade(235), outline=shade(60), width=max(1, int(r / 7)))
    for hour in range(12):
        c, s = math.cos(hour * math.pi / 6), math.sin(hour * math.pi / 6)
        pen.line((0.72 * r * c, 0.72 * r * s, 0.84 * r * c, 0.84 * r * s), fill=shade(60), width=max(1, int(r / 14)))
    for length, width in ((0.45, 7), (0.68, 11)):
        angle = rng.uniform(0, 2 * math.pi)
        pen.line((0, 0, length * r * math.cos(angle), length * r * math.sin(angle)), fill=shade(30), width=max(1, int(r / width)))


def key(pen: ImageDraw.ImageDraw, r: float, rng: np.random.Generator, shade) -> None:
    color = [(205, 170, 60), (170, 175, 180), (150, 110, 70)][rng.integers(3)]
    pen.rectangle((-0.2 * r, -0.14 * r, 0.98 * r, 0.14 * r), fill=color)
    for x in (0.55, 0.8):
        pen.rectangle((x * r, 0, (x + 0.14) * r, rng.uniform(0.3, 0.5) * r), fill=color)
    pen.ellipse((-0.98 * r, -0.5 * r, 0.02 * r, 0.5 * r), fill=color, outline=shade(70), width=max(1, int(r / 12)))
    pen.ellipse((-0.72 * r, -0.22 * r, -0.28 * r, 0.22 * r), fill=shade(90))


def leaf(pen: ImageDraw.ImageDraw, r: float, rng: np.random.Generator, shade) -> None:
    color = [(70, 130, 50), (160, 120, 40), (180, 80, 40)][rng.integers(3)]
    t = np.linspace(0, math.pi, 24)
    edge = [(float(-0.95 * r * math.cos(a)), float(0.55 * r * math.sin(a) ** 1.5)) for a in t]
    pen.polygon(edge + [(x, -y) for x, y in reversed(edge)], fill=color, outline=shade(50))
    pen.line((-0.95 * r, 0, 0.98 * r, 0), fill=shade(60), width=max(1, int(r / 14)))
    for x in (-0.5, -0.15, 0.2, 0.5):
        for side in (-1, 1):
            pen.line((x * r, 0, (x - 0.22) * r, side * 0.34 * r), fill=shade(60), width=max(1, int(r / 20)))


def mushroom(pen: ImageDraw.ImageDraw, r: float, rng: np.random.Generator, shade) -> None:
    cap = [(190, 60, 50), (150, 100, 60), (220, 190, 150)][rng.integers(3)]
    pen.rounded_rectangle((-0.26 * r, -0.1 * r, 0.26 * r, 0.95 * r), radius=0.15 * r, fill=shade(225), outline=shade(120))
    pen.pieslice((-0.95 * r, -0.9 * r, 0.95 * r, 0.9 * r), 180, 360, fill=cap, outline=shade(60))
    for x, y in ((-0.5, -0.3), (0.05, -0.6), (0.5, -0.28)):
        pen.ellipse(((x - 0.13) * r, (y - 0.13) * r, (x + 0.13) * r, (y + 0.13) * r), fill=shade(240))


PENS = dict(zip(KINDS, (clock, key, leaf, mushroom)))


class Shifted:
    """An ImageDraw whose origin is the middle of the tile."""

    def __init__(self, tile: Image.Image):
        self.pen, self.middle = ImageDraw.Draw(tile), tile.width / 2

    def __getattr__(self, name: str):
        def draw(shape, *args, **options):
            flat = np.array(shape, float) + self.middle
            return getattr(self.pen, name)(flat.ravel().tolist(), *args, **options)
        return draw


def thing(kind: str, radius: float, rng: np.random.Generator) -> Image.Image:
    tile = Image.new("RGBA", (int(2.2 * radius * BIG),) * 2)
    tint = rng.uniform(-15, 15, 3)
    shade = lambda value: tuple(int(v) for v in np.clip(value + tint, 0, 255))
    PENS[kind](Shifted(tile), radius * BIG, rng, shade)
    turn = rng.uniform(-30, 30) if kind in ("clocks", "mushrooms") else rng.uniform(0, 360)
    return tile.rotate(turn, Image.Resampling.BICUBIC).reduce(BIG)


def ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Blurred noise in a soft colour, as of cloth or stone."""
    noise = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    soft = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(3))
    return Image.blend(Image.new("RGB", (width, height), tuple(rng.integers(80, 200, 3).tolist())), soft, 0.25)


def runs(mask: np.ndarray) -> dict:
    flat = mask.ravel("F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist() + [len(flat)]
    return {"size": list(mask.shape), "counts": np.diff([0, *edges]).tolist()}


def record(rng: np.random.Generator, path: Path) -> dict:
    width, height = (int(rng.integers(110, 225)) for _ in range(2))
    image, owner, names = ground(rng, width, height), np.full((height, width), -1), []
    for kind in rng.choice(KINDS, rng.integers(3, 8)):
        radius = rng.uniform(17, 26)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        tile = thing(kind, radius, rng)
        corner = (round(x - tile.width / 2), round(y - tile.height / 2))
        stamp = Image.new("L", image.size)
        stamp.paste(tile.getchannel("A"), corner)
        solid = np.asarray(stamp) > 127
        if solid.sum() == 0 or (owner[solid] >= 0).mean() > 0.1:
            continue  # no room here
        image.paste(tile, corner, tile)
        owner[solid] = len(names)
        names.append(kind)
    image.save(path)
    objects = []
    for i in range(len(names)):
        mask = owner == i
        rows, columns = mask.nonzero()
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        objects.append({"id": i + 1, "points": [{"x": float(columns[nearest] + 0.5), "y": float(rows[nearest] + 0.5)}], "masks": [runs(mask)]})
    annotations = [{"task": task, "label": kind, "objects": [i + 1 for i, name in enumerate(names) if name == kind]}
                   for task in ("point", "point_count") for kind in KINDS]
    return {"id": path.stem, "images": [path.name], "objects": objects, "annotations": annotations}


def main() -> None:
    try:
        (folder,) = sys.argv[1:]
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        reason = error if isinstance(error, OSError) else "give one folder to write to"
        print(f"strangers.py: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    for seed, (name, count) in enumerate(PICTURES.items()):
        rng = np.random.default_rng(seed)
        lines = [json.dumps(record(rng, out / f"{name}-{i}.png")) for i in range(count)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
