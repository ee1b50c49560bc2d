"""Ask a model about an image, several images or one video, and see where it points.

    python infer.py street.jpg "Point to the cups."
    python infer.py before.png after.png "How many cups are there?"
    python infer.py clip.mp4 "Point to the red cup."
    python infer.py clip.mp4 "Point to the red cup." --ask "How many cups are there?"   # several questions, the clip read once
    python infer.py clip.mp4 "Point to the red cup." --per-frame    # each sampled frame is asked about on its own
    python infer.py clip.mp4 "segment the red cup" --masks          # and what is pointed at is followed through all frames

    files --read_media--> views --ask--> answer --read_answer--> text, points --annotate--> out/clip.points.mp4 (or .png)
                                                              '---------------------> out/clip.points.json
                                             with --masks: points --through_time--> out/clip.masks.mp4, out/clip.masks/*.png

A point of a video belongs to one moment, the frame in which the model points: its marker appears with that frame, stays
for half a second and fades out in another half. All frames are written, at their average rate, without the sound.
Frame by frame, a video may have 200,000 frames: only what lies between two questions is in memory (VideoMolmo).

Bad input ends in one line on stderr and exit status 2 (MOLMO_TRACEBACK=1 in the environment shows the traceback).
"""

import argparse
import json
import os
import re
import tempfile
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import command
import data
import weights
from attention import MOST_DENSE, compilations, set_cuda_numerics
from masks import Growing, Masks, Points, Propagator, Sam2, shifted, through_time
from generate import Answer, Speed, bandwidth, generate, sampler, to_int8
from model import Molmo
from packing import collate
from pointing import TOKEN_INDEX, VIT_INDEX, VIT_LOC, Point
from preprocess import (
    FASTEST,
    MAX_CLIP_PIXELS,
    SLOWEST,
    ViewConfig,
    Views,
    displayed_at,
    frame_times,
    frames_of,
    image_views,
    is_video,
    read_image,
    read_video_and_times,
    sample_frames,
    video_views,
    write_video,
)
from records import Runs, compress
from tokenizer import Tokenizer

SHOWN, FADING = 1.0, 0.5  # seconds: how long a point of a video has a marker, and how much of that it fades
MOST_ROWS = 40            # of points on the terminal; the JSON has all
LONGEST_SIDE = 16_384     # of a clip, in pixels: the encoder's limit
LONGEST_NAME = 220        # bytes of a file's name that its results begin with; most file systems end at 255
SAM2_PIXELS = 8 << 20     # a frame of any size takes as much memory in SAM 2 as a frame of so many pixels itself


# ---- 1. what is asked ------------------------------------------------------------------------------------------------

def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError if what it asks for makes no sense."""
    parser = command.Parser(prog="infer.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("media", nargs="+", metavar="MEDIA", help="an image, several images or one video")
    parser.add_argument("prompt", metavar="PROMPT", help='for example "Point to the cups."')
    parser.add_argument("--checkpoint", default=command.HOME / "assets/tiny", help="a folder written by train.py, or of released weights (default: assets/tiny)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: %(default)s)")
    parser.add_argument("--json", choices=["-"], help="print the result as JSON and nothing else (the files are written all the same)")
    parser.add_argument("--ask", action="append", default=[], metavar="PROMPT", help="another question; may be given again")
    parser.add_argument("--per-frame", action="store_true", help="ask about every sampled frame of a video on its own")
    parser.add_argument("--masks", action="store_true", help="the same, and a mask of every object in every frame of the video")
    parser.add_argument("--sam2", metavar="FOLDER", help="for masks: SAM 2 with these weights (default: colour and motion)")
    parser.add_argument("--image-crops", type=command.number(int, 1, 10_000), help="high-resolution crops per image, at most (default: the checkpoint's); of several images never more than 8")
    parser.add_argument("--max-frames", type=command.number(int, 1, 10_000), help="frames sampled from a video, at most (default: the checkpoint's; with --per-frame and --masks no limit)")
    parser.add_argument("--fps", type=command.number(float, 0.001, 1000), help="frames sampled per second of video (default: the checkpoint's, 2)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights; bfloat16 takes half the memory, and on a CPU without "
                        "instructions for it several times as long (default: as in the checkpoint)")
    parser.add_argument("--int8", action="store_true", help="the language model's weights in eight bits")
    parser.add_argument("--released-inference", action="store_true",
                        help="compute as MolmoPoint's released inference code does, which differs from how the model was trained")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step first, which takes up to a minute; on a GPU it becomes a CUDA graph")
    parser.add_argument("--device", type=command.device, default="usual",
                        help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--seed", type=command.number(int, 0, 2**32), default=0, help="of the sampling, for temperatures above 0 (default: %(default)s)")
    parser.add_argument("--temperature", type=command.number(float, 0, 100), default=0, help="of the sampling; 0, the default, takes the likeliest token")
    parser.add_argument("--top-p", type=command.number(float, 0.001, 1), default=0.95,
                        help="sample among the likeliest tokens whose probabilities add up to this (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=command.number(int, 1, 10_000), default=256,
                        help="of an answer; a point takes 4 or 5, written as text about 8 (default: %(default)s)")
    args = parser.parse_intermixed_args(argv)
    if not all(map(str.strip, (args.prompt, *args.ask))):
        raise ValueError("the prompt is empty: ask something")
    if len(args.media) > 1 and any(map(is_video, args.media)):
        raise ValueError("a video must come alone: give one video, or images only")
    args.per_frame |= args.masks
    if args.ask and args.per_frame:
        raise ValueError(f"--ask is not for --{'masks' if args.masks else 'per-frame'}: frame by frame one question is asked")
    if args.sam2 and not args.masks:
        raise ValueError("--sam2 is for --masks")
    if args.per_frame and not is_video(args.media[0]):
        raise ValueError(f"{args.media[0]}: --{'masks' if args.masks else 'per-frame'} is for videos")
    nearest = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--out {args.out}: {nearest} is no folder that can be written to: give another")
    own = set(map(os.path.realpath, args.media))
    for name in result_names(args.media):
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise ValueError(f"{name[:40]}...: too long a name for files of results: link to it by a shorter one")
        for path in (args.out / f"{name}.{end}" for end in ("points.json", "points.png", "points.mp4", "masks.mp4")):
            if path.is_dir():
                raise ValueError(f"{path}: a folder, where a result would go: move it away, or give another --out")
            if os.path.realpath(path) in own:
                raise ValueError(f"{path}: a result would go there and replace what is asked about: give another --out")
    before = args.out / f"{Path(args.media[0]).stem}.masks"
    inside = os.listdir(before) if before.is_dir() else []
    ours = all(re.fullmatch(r"[0-9]{5,}\.png", name) for name in inside) and (before.with_suffix(".masks.mp4").is_file() or not inside) and before.is_dir()
    if args.masks and before.exists() and not ours:
        raise ValueError(f"{before}: holds other things than masks of an earlier run: move it away, or give another --out")
    return args


# ---- 2. files -> views -> answer -------------------------------------------------------------------------------------

def result_names(paths: Sequence[str]) -> list[str]:
    """For the files of results: file names without ending, told apart by a number if need be."""
    names = []
    for stem in (Path(path).stem for path in paths):
        candidates = (stem, *(f"{stem}-{n}" for n in range(2, len(paths) + 2)))
        taken = [name.casefold() for name in names]  # to some file systems "Cup" and "cup" are one
        names.append(next(name for name in candidates if name.casefold() not in taken))
    return names


@dataclass
class Media:
    """What was given. For a video `images` is empty; for images `frame_times` (seconds of all frames) and `times` (seconds of
    the frames that the model sees) are empty."""
    paths: list[str]
    images: list[np.ndarray]
    frame_times: list[float]
    times: list[float]

    @property
    def names(self) -> list[str]:
        return result_names(self.paths)

    @property
    def rate(self) -> float:
        """Frames a second, on average, as far as they can be written."""
        rate = (len(self.frame_times) - 1) / self.frame_times[-1] if self.frame_times[-1] else 1.0
        return min(max(rate, SLOWEST), FASTEST)


def check_sides(path: str, frame: np.ndarray) -> None:
    """ValueError if no clip with such frames could be written."""
    if max(frame.shape) > LONGEST_SIDE:
        raise ValueError(f"{path}: {frame.shape[1]}x{frame.shape[0]}: an annotated clip has sides of {LONGEST_SIDE} pixels at most: shrink the video")


def read_media(paths: list[str], config: ViewConfig) -> tuple[Media, Views]:
    """Read one or several images, or one video. Raises MediaError, and ValueError of `check_sides`."""
    if is_video(paths[0]):
        frames, times, of_all = read_video_and_times(paths[0], config.fps, config.max_frames)
        check_sides(paths[0], frames[0])
        return Media(paths, [], of_all, times), video_views(frames, times, config)
    images = [read_image(path) for path in paths]
    return Media(paths, images, [], []), image_views(images, config)


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


@dataclass
class ParsedAnswer:
    """An answer, in readable words, and its points."""

    answer: Answer
    text: str
    points: list[Point]

    def result(self) -> dict:
        """A part of the report."""
        number = re.fullmatch(r"([0-9]{1,9}|[0-9]{1,3}(?:,[0-9]{3}){1,2})(?:\.0*)?", self.text.strip())
        count = int(number[1].replace(",", "")) if number else len({point.id for point in self.points})
        return {"text": self.text, "count": count, "finish_reason": self.answer.finish_reason}


def ask(model: Molmo, tokenizer: Tokenizer, views: Views, args: argparse.Namespace, speed: Speed) -> list[ParsedAnswer]:
    """Answers every question; the pictures are encoded once."""
    batch = collate([data.prompts(tokenizer, views, [args.prompt, *args.ask])]).to(args.device)
    write = partial(generate, model, batch, data.control_tokens(tokenizer), mode="compiled" if args.compile else "views",
                    samplers=partial(sampler, args.temperature, args.top_p, args.seed))
    if not speed.prompt and (args.compile or batch.tokens.is_cuda and batch.tokens.shape[1] > MOST_DENSE):
        write(max_new_tokens=args.max_new_tokens if args.compile else 1)  # the first time is for the compiler
    found = []
    for answer in write(max_new_tokens=args.max_new_tokens, speed=speed):
        text, points = data.read_answer(answer, tokenizer, views)
        found.append(ParsedAnswer(answer, readable(text, points, views) if answer.triples else text, points))
    return found


class FrameByFrame:
    """A video asked about frame by frame, each sampled frame on its own with the frames right before it; with `--masks`,
    what is pointed at is followed through all frames. (VideoMolmo.) Streams: no more of the file is in memory than lies between two questions."""

    def __init__(self, model: Molmo, tokenizer: Tokenizer, config: ViewConfig, args: argparse.Namespace, speed: Speed):
        self.model, self.tokenizer, self.config, self.args, self.speed = model, tokenizer, config, args, speed
        self.memory = model.config.temporal.memory
        times = frame_times(args.media[0])
        most = args.max_frames or int(times[-1] * config.fps) + 2
        sampled = sample_frames(times, config.fps, most)
        self.picture = {number: picture for picture, number in enumerate(sampled)}  # frame of the file -> of the sampled ones
        self.media = Media(args.media, [], times, [times[number] for number in sampled])
        first = next(frames_of(args.media[0]))[1]
        check_sides(args.media[0], first)
        height, width, _ = first.shape
        gap = max(after - before for before, after in zip(sampled, [*sampled[1:], len(times)]))
        pixels = max(height * width, SAM2_PIXELS if args.sam2 else 0)
        if args.masks and gap * pixels > MAX_CLIP_PIXELS:
            raise ValueError(f"{args.media[0]}: {gap} frames of {width}x{height} between two questions do not fit in memory: "
                             "ask more often (--fps, --max-frames), or shrink the video")
        self.answers: list[Answer] = []
        self.counts: list[int] = []           # what each of them counts
        self.frame_answers: list[dict] = []   # what was said about each sampled frame
        self.points: list[Point] = []
        self.masks: list[dict] = []

    def ask(self, number: int, recent: Sequence[np.ndarray]) -> dict[int, tuple[float, float]]:
        """Ask about the last of some frames, number `number` of the file; -> the places of its points."""
        views = image_views([recent[-1]], self.config, recent[:-1])
        parsed, = ask(self.model, self.tokenizer, views, self.args, self.speed)
        self.answers.append(parsed.answer)
        self.counts.append(parsed.result()["count"])
        self.frame_answers.append({"frame": number, "time": round(self.media.frame_times[number], 3), "text": parsed.text})
        return {order: (point.x, point.y) for order, point in enumerate(parsed.points, start=1)}

    def tell(self, number: int, points: Points) -> None:
        self.points += [Point(identity, self.picture[number], x, y) for identity, (x, y) in sorted(points.items())]

    def frames(self) -> Iterator[np.ndarray]:
        frames = frames_of(self.media.paths[0])
        return tqdm((frame for _, frame in frames), total=len(self.media.frame_times), desc="frames", leave=False, disable=None)

    def point(self) -> None:
        recent = deque(maxlen=self.memory + 1)
        for number, frame in enumerate(self.frames()):
            recent.append(frame)
            if number in self.picture:
                self.tell(number, self.ask(number, list(recent)))

    def follow(self, propagate: Propagator, folder: Path) -> None:
        """Write NAME.masks.mp4 and, into NAME.masks, a PNG of object numbers for every frame."""
        shown, name = deque(), self.media.names[0]
        (folder / f"{name}.masks").mkdir()

        def kept() -> Iterator[np.ndarray]:
            for frame in self.frames():
                shown.append(frame)  # until its masks are known
                yield frame

        def painted() -> Iterator[np.ndarray]:
            for number, masks in enumerate(through_time(kept(), self.ask, self.picture, propagate, history=self.memory, tell=self.tell)):
                covered = {identity: Runs.of(mask) for identity, mask in masks.items() if mask.any()}
                self.masks.append({"frame": number, "time": round(self.media.frame_times[number], 3), "objects": [
                    {"id": identity, "size": runs.size, "counts": compress(runs.counts)} for identity, runs in covered.items()]})
                frame = shown.popleft()
                numbered(masks, frame.shape[:2]).save(folder / f"{name}.masks/{number:05}.png")
                yield paint(frame, masks)

        write_video(folder / f"{name}.masks.mp4", painted(), self.media.rate)

    def result(self) -> dict:
        """A part of the report. Without masks nobody says who is who: the count is the largest of a frame."""
        count = len({point.id for point in self.points}) if self.args.masks and self.points else max(self.counts, default=0)
        return {"text": "\n".join(f"{one['time']:7.1f} s  {one['text']}" for one in self.frame_answers), "count": count,
                "finish_reason": "length" if any(a.finish_reason == "length" for a in self.answers) else "stop",
                "frames": self.frame_answers} | ({"masks": self.masks} if self.args.masks else {})


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
    by_picture = {picture: list(group) for picture, group in groupby(sorted(points, key=lambda p: p.picture), key=lambda p: p.picture)}
    for seconds, frame in frames_of(media.paths[0]):
        shown = range(bisect_right(media.times, seconds - SHOWN), bisect_right(media.times, seconds))
        marks = [(point, fade(seconds - media.times[picture])) for picture in shown for point in by_picture.get(picture, ())]
        yield draw(frame, [mark for mark in marks if mark[1] > 0])


def annotate(media: Media, points: Sequence[Point], folder: Path) -> None:
    """Write the clip or the pictures with their markers to `folder`."""
    if media.frame_times:
        write_video(folder / f"{media.names[0]}.points.mp4", annotated_frames(media, points), media.rate)
    for picture, image in enumerate(media.images):
        marks = [(point, 1.0) for point in points if point.picture == picture]
        Image.fromarray(draw(image, marks)).save(folder / f"{media.names[picture]}.points.png")


GOLDEN = 0.381966  # the golden angle as a part of the circle


def color(identity: int) -> tuple[int, int, int]:
    """Of an object: neighbouring numbers are far apart on the colour wheel."""
    return tuple(round(255 * part) for part in hsv_to_rgb(identity * GOLDEN % 1, 0.85, 1.0)) if identity else (0, 0, 0)


PALETTE = [part for identity in range(256) for part in color(identity)]


def numbered(masks: Masks, shape: tuple[int, int]) -> Image.Image:
    """Masks as a picture of object numbers, 0 = none; where two overlap the higher number stands. ValueError above 65535."""
    if (most := max(masks, default=0)) > 65535:
        raise ValueError("more than 65535 objects: their numbers do not fit into a picture")
    numbers = np.zeros(shape, np.uint8 if most < 256 else np.uint16)
    for identity, mask in sorted(masks.items()):
        numbers[mask] = identity
    image = Image.fromarray(numbers)
    if numbers.dtype == np.uint8:
        image.putpalette(PALETTE)
    return image


def paint(frame: np.ndarray, masks: Masks) -> np.ndarray:
    """A frame (H, W, 3) uint8 with every object in its colour, half transparent, and a light edge."""
    painted = frame.copy()
    for identity, mask in sorted(masks.items()):
        painted[mask] = (painted[mask].astype(np.uint16) + color(identity)) // 2
        inside = mask & shifted(mask, 1, 0) & shifted(mask, -1, 0) & shifted(mask, 0, 1) & shifted(mask, 0, -1)
        painted[mask & ~inside] = 255
    return painted


# ---- 4. the report ---------------------------------------------------------------------------------------------------

def describe(points: Sequence[Point], media: Media) -> list[dict]:
    """Points as they are reported: images count from 1, frames of the file from 0."""
    frames = displayed_at(media.frame_times, media.times) if media.frame_times else []
    where = lambda picture: {"image": None, "time": round(media.times[picture], 3), "frame": frames[picture]} if frames else {
        "image": picture + 1, "time": None, "frame": None}
    return [{"id": p.id, **where(p.picture), "x": round(p.x, 1), "y": round(p.y, 1)} for p in points]


def table(answer: dict) -> list[str]:
    """An answer and its points, in lines."""
    lines = [answer["text"], ""]
    if answer["points"]:
        place = "image" if answer["points"][0]["time"] is None else "time"
        lines.append(f"{'id':>4} {place:>8} {'x':>8} {'y':>8}")
        lines += [f"{p['id']:4} {p[place]:8} {p['x']:8.1f} {p['y']:8.1f}" for p in answer["points"][:MOST_ROWS]]
        lines += [f"... and {len(answer['points']) - MOST_ROWS} more"] * (len(answer["points"]) > MOST_ROWS) + [""]
    return [*lines, f"count: {answer['count']}", f"finish reason: {answer['finish_reason']}"]


def report(result: dict) -> list[str]:
    """For the terminal; of several answers each after its question."""
    timing, answers = result["timing"], result.get("answers")
    lines = [line for a in answers for line in (f"> {a['prompt']}", *table(a), "")] if answers else table(result)
    share = f", {timing['bandwidth_share']:.0%} of what the memory's bandwidth allows" if "bandwidth_share" in timing else ""
    graphs = f"; {timing['graphs_compiled']} graphs compiled" if "graphs_compiled" in timing else ""
    return [*lines, f"prefill {timing['prompt_tokens']} tokens, {timing['prefill_tokens_per_second']} tokens/s; "
                    f"decode {timing['tokens']} tokens, {timing['decode_tokens_per_second']} tokens/s{share}{graphs}"]


def rates(speed: Speed, device: torch.device) -> dict:
    """Of reading and of writing; on a GPU also what share of the bandwidth limit writing reached."""
    per_second = lambda tokens, seconds: round(tokens / seconds, 1) if seconds else 0.0
    share = {"bandwidth_share": round(speed.read / speed.decode / bandwidth(device), 3)} if device.type == "cuda" and speed.decode else {}
    return {"prompt_tokens": speed.prompt, "prefill": round(speed.prefill, 3), "decode": round(speed.decode, 3),
            "prefill_tokens_per_second": per_second(speed.prompt, speed.prefill),
            "decode_tokens_per_second": per_second(speed.written, speed.decode), **share}


def has_bfloat16_on_cpu() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line("infer.py"):
        # 1. What is asked
        args, timing, clock, speed = arguments(argv), {}, Speed(), Speed()
        device = torch.device(args.device)
        lap = lambda: round(clock.lap(device), 3)
        lap()

        # 2. The model
        set_cuda_numerics()
        model, tokenizer = weights.load(args.checkpoint, args.device, args.dtype and getattr(torch, args.dtype), args.released_inference)
        if device.type == "cpu" and next(model.parameters()).dtype == torch.bfloat16 and not has_bfloat16_on_cpu():
            warnings.warn("this processor multiplies bfloat16 several times slower than float32: --dtype float32 is faster, with --int8 if memory is short")
        model = to_int8(model) if args.int8 else model
        propagate = Sam2(args.sam2, args.device) if args.sam2 else Growing()
        given = {"max_crops": args.image_crops, "max_frames": args.max_frames, "fps": args.fps}
        config = replace(model.config.views, **{name: value for name, value in given.items() if value is not None})
        timing["load"] = lap()

        # 3. What it sees; a video frame by frame is seen as it is asked about
        if args.per_frame:
            per_frame = FrameByFrame(model, tokenizer, config, args, speed)
            media = per_frame.media
        else:
            media, views = read_media(args.media, config)
        timing["preprocess"] = lap()

        # 4. What it answers
        args.out.mkdir(parents=True, exist_ok=True)
        with command.told_to_end(), tempfile.TemporaryDirectory(prefix=".infer-", dir=args.out) as fresh:
            folder = Path(fresh)
            if args.per_frame:
                per_frame.follow(propagate, folder) if args.masks else per_frame.point()
                points, answers, summary = per_frame.points, per_frame.answers, per_frame.result()
            else:
                parsed = ask(model, tokenizer, views, args, speed)
                points, answers, summary = parsed[0].points, [one.answer for one in parsed], parsed[0].result()
                if args.ask:
                    summary["answers"] = [{"prompt": prompt, "text": one.text, "points": describe(one.points, media), **one.result()}
                                          for prompt, one in zip([args.prompt, *args.ask], parsed)]
            timing["generate"] = lap()
            timing |= {"tokens": sum(len(answer.tokens) for answer in answers), **rates(speed, device),
                       **({"graphs_compiled": compilations()} if args.compile or device.type == "cuda" else {})}

            # 5. The report: before points are drawn and files written, which may fail
            result = {"media": args.media, "prompt": args.prompt, "text": summary.pop("text"),
                      "points": describe(points, media), **summary, "timing": timing}
            unread = None
            try:
                print(json.dumps(result) if args.json else "\n".join(report(result)), flush=True)
            except OSError as error:  # who asked goes away, the files come all the same
                unread = error

            # 6. The results: all of them, or none
            annotate(media, points, folder)
            (folder / f"{media.names[0]}.points.json").write_text(json.dumps(result, indent=None if args.masks else 1) + "\n")
            written = [os.path.join(args.out, name) for name in sorted(os.listdir(fresh))]
            for path in written:
                if path.endswith(".masks") and os.path.isdir(path):  # of an earlier run
                    os.replace(path, folder / ".before")
                os.replace(folder / os.path.basename(path), path)

        if unread:
            raise unread
        if not args.json:
            print("\n".join(f"wrote {path}" for path in written))


if __name__ == "__main__":
    main()
