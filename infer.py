"""Ask a model about an image, several images or one video, and see where it points.

    python infer.py street.jpg "Point to the cups."
    python infer.py before.png after.png "How many cups are there?"
    python infer.py clip.mp4 "Point to the red cup."

    files --look--> views --ask--> answer --read_answer--> text, points --annotate--> out/clip.points.mp4 (or .png)
                                                              '---------------------> out/clip.points.json

A point of a video belongs to one moment, the frame in which the model points: its marker appears with that frame, stays
for half a second and fades out in another half. All frames are written, at their average rate, without the sound.

Bad input ends in one line on stderr and exit status 2 (MOLMO_TRACEBACK=1 in the environment shows the traceback).
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import weights
from model import Answer, Molmo, generate, sampler
from packing import collate
from pointing import TOKEN_INDEX, VIT_INDEX, VIT_LOC, Point
from preprocess import (
    ViewConfig,
    Views,
    displayed_at,
    frame_times,
    frames_of,
    image_views,
    is_video,
    read_image,
    read_video,
    video_views,
    write_video,
)
from tokenizer import Tokenizer

HOME = Path(__file__).resolve().parent
SHOWN, FADING = 1.0, 0.5  # seconds: how long a point of a video has a marker, and how much of that it fades


# ---- 1. what is asked ------------------------------------------------------------------------------------------------

def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError if what it asks for makes no sense."""
    parser = data.Parser(prog="infer.py", description=__doc__.split("\n")[0])
    parser.add_argument("media", nargs="+", metavar="MEDIA", help="an image, several images or one video")
    parser.add_argument("prompt", metavar="PROMPT", help='for example "Point to the cups."')
    parser.add_argument("--checkpoint", default=HOME / "assets/tiny", help="a folder written by train.py")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--json", choices=["-"], help="print the result as JSON and nothing else")
    parser.add_argument("--max-frames", type=data.number(int, 1, 10_000), help="at most so many are sampled from a video")
    parser.add_argument("--fps", type=data.number(float, 0.001, 1000), help="frames sampled per second of a video")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: as in the checkpoint)")
    parser.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=data.number(int, 0, 2**32), default=0, help="of the sampling")
    parser.add_argument("--temperature", type=data.number(float, 0, 100), default=0, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=data.number(float, 0.001, 1), default=0.95, help="for temperatures above 0")
    parser.add_argument("--max-new-tokens", type=data.number(int, 1, 10_000), default=256)
    args = parser.parse_intermixed_args(argv)
    if not args.prompt.strip():
        raise ValueError("the prompt is empty: ask something")
    if len(args.media) > 1 and any(map(is_video, args.media)):
        raise ValueError("a video must come alone: give one video, or images only")
    nearest = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {args.out}: {nearest} is no folder that can be written to: give another")
    return args


# ---- 2. files -> views -> answer -------------------------------------------------------------------------------------

@dataclass
class Media:
    """What was given. `images` is empty for a video, `frame_times` (seconds of all its frames) for images."""
    paths: list[str]
    views: Views
    images: list[np.ndarray]
    frame_times: list[float]

    @property
    def names(self) -> list[str]:
        """For the files of results: file names without ending, told apart by a number if need be."""
        names = []
        for stem in (Path(path).stem for path in self.paths):
            candidates = (stem, *(f"{stem}-{n}" for n in range(2, len(self.paths) + 2)))
            names.append(next(name for name in candidates if name not in names))
        return names


def look(paths: list[str], config: ViewConfig) -> Media:
    """Read one or several images, or one video. Raises MediaError."""
    if is_video(paths[0]):
        views = video_views(*read_video(paths[0], config.fps, config.max_frames), config)
        return Media(paths, views, [], frame_times(paths[0]))
    images = [read_image(path) for path in paths]
    return Media(paths, image_views(images, config), images, [])


def ask(model: Molmo, tokenizer: Tokenizer, views: Views, args: argparse.Namespace) -> Answer:
    batch = collate([data.prompt(tokenizer, views, args.prompt)]).to(args.device)
    sample = sampler(args.temperature, args.top_p, args.seed)
    return generate(model, batch, data.spelling(tokenizer), args.max_new_tokens, sample)[0]


GROUNDING_RUN = re.compile("(?:%s(?:%s(?:%s[0-9]*)?)?)+" % tuple(map(re.escape, (TOKEN_INDEX, VIT_INDEX, VIT_LOC))))


def readable(text: str, points: Sequence[Point], views: Views) -> str:
    """An answer with its grounding tokens, of which `points` were read, replaced by coordinates as Molmo2 writes them:
    `place id x y id x y;place ...` on a 0-1000 scale. Order and ids stay the model's. Other text is left alone."""
    places, unread = data.places(views.times, len(views.sizes)), iter(points)

    def written(point: Point) -> str:
        x, y = (round(1000 * value / side) for value, side in zip(point[2:], views.sizes[point.picture]))
        return f" {point.id} {x:03d} {y:03d}"

    def coordinates(run: re.Match) -> str:
        by_picture = groupby(islice(unread, run[0].count(VIT_LOC)), key=lambda point: point.picture)
        return ";".join(places[picture] + "".join(map(written, group)) for picture, group in by_picture)

    return GROUNDING_RUN.sub(coordinates, text)


# ---- 3. points -> pictures -------------------------------------------------------------------------------------------

def draw(picture: np.ndarray, marks: Sequence[tuple[Point, float]]) -> np.ndarray:
    """A picture (H, W, 3) uint8 with a marker at each point, of the opacity (0 to 1) beside it."""
    image = Image.fromarray(picture)
    radius = max(8, min(image.size) // 40)
    for point, opacity in marks:
        to_the_left = point.x > image.width - 4 * radius - radius * len(str(point.id))
        inset = 1.25 * radius  # keeps the id inside the picture
        down = min(max(point.y, inset), image.height - inset) - point.y
        tile = marker(point.id, radius, to_the_left, round(down))
        opaque = tile.getchannel("A").point(lambda alpha: round(alpha * opacity))
        image.paste(tile, (round(point.x - tile.width / 2), round(point.y - tile.height / 2)), opaque)
    return np.asarray(image)


@lru_cache(256)
def marker(number: int, radius: int, to_the_left: bool, down: int) -> Image.Image:
    """A square tile with a ring around its centre and a number beside it, light between dark: something of it stands
    out from any background. Drawn four times too large, for soft edges."""
    r, text = 4 * radius, str(number)
    font = ImageFont.load_default(1.9 * r)
    reach = -(-int(1.8 * r + font.getlength(text) + r // 2) // 4) * 4  # from the centre to the edge
    tile = Image.new("RGBA", (2 * reach, 2 * reach))
    pen = ImageDraw.Draw(tile)
    pen.circle((reach, reach), 1.25 * r, outline="black", width=round(0.65 * r))
    pen.circle((reach, reach), 1.05 * r, outline="white", width=round(0.28 * r))
    side = -1 if to_the_left else 1
    pen.text((reach + side * 1.6 * r, reach + 4 * down), text, "white", font, "rm" if to_the_left else "lm",
             stroke_width=r // 4, stroke_fill="black")
    return tile.reduce(4)


def fade(age: float) -> float:
    """The opacity of a marker `age` seconds after its moment."""
    return min((SHOWN - age) / FADING, 1.0) if 0 <= age < SHOWN else 0.0


def annotated_frames(media: Media, points: Sequence[Point]) -> Iterator[np.ndarray]:
    for seconds, frame in frames_of(media.paths[0]):
        marks = [(point, fade(seconds - media.views.times[point.picture])) for point in points]
        yield draw(frame, [mark for mark in marks if mark[1] > 0])


def annotate(media: Media, points: Sequence[Point], folder: Path) -> None:
    """Write the clip or the pictures with their markers to `folder`."""
    if media.frame_times:
        last = media.frame_times[-1]
        rate = (len(media.frame_times) - 1) / last if last else 1.0
        write_video(folder / f"{media.names[0]}.points.mp4", annotated_frames(media, points), rate)
    for picture, image in enumerate(media.images):
        marks = [(point, 1.0) for point in points if point.picture == picture]
        Image.fromarray(draw(image, marks)).save(folder / f"{media.names[picture]}.points.png")


# ---- 4. the report ---------------------------------------------------------------------------------------------------

def describe(point: Point, media: Media) -> dict:
    """A point as it is reported: images count from 1, frames of the file from 0."""
    where = {"image": point.picture + 1, "time": None, "frame": None}
    if media.frame_times:
        seconds = media.views.times[point.picture]
        where = {"image": None, "time": round(seconds, 3), "frame": displayed_at(media.frame_times, [seconds])[0]}
    return {"id": point.id, **where, "x": round(point.x, 1), "y": round(point.y, 1)}


def table(result: dict) -> str:
    timing = result["timing"]
    lines = [result["text"], ""]
    if result["points"]:
        place = "image" if result["points"][0]["time"] is None else "time"
        lines.append(f"{'id':>4} {place:>8} {'x':>8} {'y':>8}")
        lines += [f"{p['id']:4} {p[place]:8} {p['x']:8.1f} {p['y']:8.1f}" for p in result["points"]] + [""]
    return "\n".join([*lines, f"count: {result['count']}", f"finish reason: {result['finish_reason']}",
                      f"{timing['tokens']} tokens, {timing['tokens_per_second']} tokens/s"])


def stopwatch():
    """Returns a function that tells the seconds since its last call."""
    last = perf_counter()

    def lap() -> float:
        nonlocal last
        before, last = last, perf_counter()
        return round(last - before, 3)
    return lap


def main(argv: Sequence[str] | None = None) -> None:
    with data.one_line("infer.py"):
        # 1. What is asked
        args, lap, timing = arguments(argv), stopwatch(), {}

        # 2. The model
        model, tokenizer = weights.load(args.checkpoint, args.device, args.dtype and getattr(torch, args.dtype))
        given = {"max_frames": args.max_frames, "fps": args.fps}
        config = replace(model.config.views, **{name: value for name, value in given.items() if value is not None})
        timing["load"] = lap()

        # 3. What it sees
        media = look(args.media, config)
        timing["preprocess"] = lap()

        # 4. What it answers
        answer = ask(model, tokenizer, media.views, args)
        text, points = data.read_answer(answer, tokenizer, media.views)
        if answer.rows:
            text = readable(text, points, media.views)
        timing["generate"] = lap()  # the prompt included
        timing["tokens"] = len(answer.tokens)
        timing["tokens_per_second"] = round(len(answer.tokens) / max(timing["generate"], 1e-3), 1)

        # 5. The results: all of them, or none
        result = {"media": args.media, "prompt": args.prompt, "text": text,
                  "points": [describe(point, media) for point in points], "count": len({point.id for point in points}),
                  "finish_reason": answer.finish_reason, "timing": timing}
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".infer-", dir=args.out) as fresh:
            annotate(media, points, Path(fresh))
            timing["draw"] = lap()
            (Path(fresh) / f"{media.names[0]}.points.json").write_text(json.dumps(result, indent=1) + "\n")
            written = [os.path.join(args.out, name) for name in sorted(os.listdir(fresh))]
            for path in written:
                os.replace(os.path.join(fresh, os.path.basename(path)), path)

        # 6. The report
        sys.stdout.reconfigure(errors="replace")  # an answer may hold characters that the terminal has not
        print(json.dumps(result) if args.json else "\n".join([table(result), *(f"wrote {path}" for path in written)]))


if __name__ == "__main__":
    main()
