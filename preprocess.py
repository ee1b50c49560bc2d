"""Pictures in, crops and the tokens that stand for them out.

An image is seen twice: once whole, squeezed into one square crop, and once sharp, as a tiling of overlapping crops.
A video is seen as one whole crop per sampled frame.

       whole picture          the tiling (2 x 3 here), crops overlap by both margins
      +-------------+         +-----+--+-----+--+-----+
      |             |         |  0  |01|  1  |12|  2  |      every place of the picture is covered by one or more
      |  1 crop     |         +-----+--+-----+--+-----+      crops but read from one only: a crop gives away the
      |             |         |  3  |34|  4  |45|  5  |      margin it shares with a neighbour, so what is read
      +-------------+         +-----+--+-----+--+-----+      had its surroundings in the ViT's view

Each crop is a grid of patches; a window of patches (2x2 for images, 3x3 for frames) becomes one visual token.
`Views.pooling` says which patches a token pools, `Views.patch_boxes` where each patch lies in the displayed picture:
these two tables lead from a token the model points at back to pixels. (Molmo2, on its image and video inputs.)

A sampled frame carries its real time, counted from the first frame, and never index / fps: clips with a variable
frame rate, a late start or a cut-off end are common.
"""

import os
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

import command

IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]  # no others: .eps, for one, would run Ghostscript
# no playlists among them: these open other files
VIDEO_FORMATS = "mov,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,asf,ogg,h264,hevc"
ENCODER = "libx264"
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".apng", ".ts", ".mts", ".m2ts", ".mpg",
                  ".mpeg", ".3gp", ".flv", ".wmv", ".ogv", ".h264", ".hevc"}
MAX_PIXELS = 64_000_000        # of an image or a frame
CROPS_OF_SEVERAL = 8           # of the tiling of each of several images, at most
MAX_CLIP_PIXELS = 1 << 30      # of all the sampled frames together, 3 GB
MAX_DECODED_FRAMES = 200_000   # nearly two hours at 30 fps
SLOWEST, FASTEST = 0.001, 1000  # frames a second of a clip that is written
MAX_MISSING = 0.25             # seconds; a video that ends earlier than its header says by more than this is cut off
MIN_LEAP = 30                  # frames; a seek costs as much as decoding a dozen, and what is leapt over goes unchecked
TIME_EPS = 1e-6                # seconds; timestamps are rounded to the container's clock


class MediaError(ValueError):
    """A picture or a video that cannot be used: one line with the file, what was wrong, what to do."""


@dataclass(frozen=True)
class ViewConfig:
    """How pictures are cut. The defaults are the released models'; every count below follows from them."""
    crop_size: int = 378            # px, side of a crop
    patch_size: int = 14            # px, side of a patch
    margins: tuple[int, int] = (4, 4)  # patches given away to the neighbour on the left/top, right/bottom
    image_pool: int = 2             # side of an image's pool window, in patches
    video_pool: int = 3             # the same for a frame
    max_crops: int = 24             # of the tiling of an image
    max_frames: int = 128           # sampled from a video
    fps: float = 2.0                # sampled frames per second, if max_frames allows
    low_res_pointing: bool = False  # may tokens of the whole-picture crop be pointed at? Molmo2 yes, MolmoPoint no

    def __post_init__(self) -> None:
        counts = (self.crop_size, self.patch_size, self.image_pool, self.video_pool, self.max_crops, self.max_frames)
        if any(type(n) is not int or n < 1 for n in counts) or type(self.fps) not in (int, float) or not 0 < self.fps < float("inf"):
            raise ValueError(f"sizes, pools, crops, frames and fps must be above 0: {self}")
        if not isinstance(self.margins, tuple) or len(self.margins) != 2 or any(type(n) is not int or n < 0 for n in self.margins):
            raise ValueError(f"the margins must be two numbers of patches, not {self.margins!r}")
        if self.crop_size % self.patch_size or self.stride < 1:
            raise ValueError(f"crops of {self.crop_size} px need whole patches of {self.patch_size} px "
                             f"and more of them than the margins {self.margins} give away")

    @property
    def grid(self) -> int:
        """Patches along the side of a crop."""
        return self.crop_size // self.patch_size

    @property
    def stride(self) -> int:
        """Patches from one crop of a tiling to the next: what a crop adds to its neighbours."""
        return self.grid - sum(self.margins)


@dataclass
class Views:
    """What the model gets to see of one medium. N crops, S patches per crop, M visual tokens, K patches per token."""
    crops: np.ndarray             # (N, S, 3*P*P) uint8, patches flattened (row, column, channel)
    patch_boxes: np.ndarray       # (N*S, 5) float64: picture number, then x, y, width, height in displayed pixels
    pooling: np.ndarray           # (M, K) int64 into the N*S patches, -1 = empty slot, in the order of the tokens
    indexable: np.ndarray         # (M,) bool: tokens that can be pointed at
    layout: list[str]             # special-token spellings one by one, and pieces of plain text
    sizes: list[tuple[int, int]]  # (width, height) per picture, px
    times: list[float] | None     # seconds per frame; None for images
    n_past: np.ndarray            # (N,) how many crops right before this one show the same place earlier; images 0


# ---- 1. pictures -> views --------------------------------------------------------------------------------------------

def image_views(images: list[np.ndarray], config: ViewConfig, before: Sequence[np.ndarray] | None = None) -> Views:
    """Views of one or several images, each (H, W, 3) uint8; several have 8 high-resolution crops each at most. Raises MediaError on
    any other array, or none.

    With `before`, the one image is a frame of a video and these are the frames before it, oldest first, none at the
    start. They have crops but no tokens: only a temporal module sees them. (VideoMolmo asks about frames in this way.)
    """
    if len(images) > 1:
        config = replace(config, max_crops=min(config.max_crops, CROPS_OF_SEVERAL))
    views = _Collector(images, config.image_pool, config, before)
    low = "<im_patch>" if config.low_res_pointing else "<im_low>"
    for number, image in enumerate(images):
        if len(images) > 1:
            views.layout.append(f"Image {number + 1}")
        rows, cols = views.add(number, (1, 1))
        views.layout += ["<low_res_im_start>"] + [low] * (rows * cols) + ["<im_end>"]
        rows, cols = views.add(number, select_tiling(*image.shape[:2], config))
        views.layout += ["<im_start>"] + (["<im_patch>"] * cols + ["<im_col>"]) * rows + ["<im_end>"]
    return views.finish(times=None)


def video_views(frames: list[np.ndarray], times: Sequence[float], config: ViewConfig) -> Views:
    """Views of sampled frames, each (H, W, 3) uint8, shown at `times` seconds. Raises MediaError on other arrays,
    or none, or not one time per frame."""
    if len(frames) != len(times):
        raise MediaError(f"{len(frames)} frames came with {len(times)} times: give one time per frame")
    views = _Collector(frames, config.video_pool, config)
    for number, seconds in enumerate(times):
        rows, cols = views.add(number, (1, 1))
        views.layout.append(f"{' ' if number else ''}{seconds:.1f} ")
        views.layout += ["<frame_start>"] + ["<im_patch>"] * (rows * cols) + ["<frame_end>"]
    return views.finish([float(seconds) for seconds in times])


def no_views(config: ViewConfig) -> Views:
    """Views of nothing, for text alone."""
    return Views(crops=np.zeros((0, config.grid ** 2, 3 * config.patch_size ** 2), np.uint8), patch_boxes=np.zeros((0, 5)),
                 pooling=np.zeros((0, config.image_pool ** 2), np.int64), indexable=np.zeros(0, bool), layout=[], sizes=[],
                 times=None, n_past=np.zeros(0, int))


class _Collector:
    """The arrays of a Views, growing tiling by tiling; patch ids go on where the last tiling ended."""

    def __init__(self, pictures: list[np.ndarray], pool: int, config: ViewConfig,
                 before: Sequence[np.ndarray] | None = None) -> None:
        if not pictures:
            raise MediaError("no picture was given: give at least one")
        for number, picture in enumerate((*pictures, *(before or ()))):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                raise MediaError(f"picture {number} is {picture.dtype} of shape {picture.shape}: "
                                 "give (height, width, 3) uint8 with no side of 0")
        if before is not None and (len(pictures) > 1 or any(picture.shape != pictures[0].shape for picture in before)):
            raise MediaError("frames before an image must be of its size, and the image alone")
        self.pictures, self.pool, self.config, self.before = pictures, pool, config, before
        self.crops, self.patch_boxes, self.pooling, self.layout, self.n_past = [], [], [], [], []
        self.patch_count = 0

    def add(self, number: int, tiling: tuple[int, int]) -> tuple[int, int]:
        """Cut picture `number` into a tiling of crops; returns the rows and columns of its visual tokens."""
        shown = [*(self.before or ()), self.pictures[number]]  # oldest first; tokens pool patches of the last alone
        n, S = len(shown), self.config.grid ** 2
        crops, boxes = zip(*(cut(picture, tiling, self.config) for picture in shown))
        crops = np.stack(crops, axis=1).reshape(-1, *crops[0].shape[1:])  # the crops of one place stand together
        boxes = np.repeat(boxes[-1].reshape(-1, S, 4), n, axis=0).reshape(-1, 4)
        crop, patch = np.divmod(patch_map(tiling, self.config), S)
        windows = pool_windows(self.patch_count + (crop * n + n - 1) * S + patch, self.pool)
        self.crops.append(crops)
        self.patch_boxes.append(np.column_stack([np.full(len(boxes), number), boxes]))
        self.pooling.append(windows.reshape(-1, self.pool ** 2))
        self.n_past.append(np.tile(np.arange(n) if self.before is not None else 0, tiling[0] * tiling[1]))
        self.patch_count += len(boxes)
        return windows.shape[:2]

    def finish(self, times: list[float] | None) -> Views:
        """All that was added, as one Views; which tokens can be pointed at follows from how they are written."""
        indexable = [piece == "<im_patch>" for piece in self.layout if piece in ("<im_patch>", "<im_low>")]
        return Views(crops=np.concatenate(self.crops), patch_boxes=np.concatenate(self.patch_boxes),
                     pooling=np.concatenate(self.pooling), indexable=np.array(indexable), layout=self.layout,
                     sizes=[(picture.shape[1], picture.shape[0]) for picture in self.pictures], times=times,
                     n_past=np.concatenate(self.n_past) if times is None else np.arange(len(self.pictures)))


# ---- 2. one picture -> crops and the map of their patches ------------------------------------------------------------

def select_tiling(height: int, width: int, config: ViewConfig) -> tuple[int, int]:
    """Rows and columns of crops for an image of height x width pixels: the smallest upscaling that `max_crops` allows, or the smallest
    downscaling if it allows none. An image with a side shorter than the margins is one crop, as in the released inference code.

    The margins around the image come on top of the rows * columns strides, so they are taken off its sides first; of
    equals the tiling with fewer crops, then with fewer rows, wins. (Molmo2, section on crops.)
    """
    stride, margin = config.stride * config.patch_size, sum(config.margins) * config.patch_size
    most = config.max_crops
    tilings = sorted(((rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)),
                     key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))

    with np.errstate(divide="ignore"):  # a side as long as the margins: they alone show it, any enlarging will do
        scales = np.array(tilings, np.float32) * stride / np.float32([height - margin, width - margin])
    scale = scales.min(axis=1)  # negative where a side is shorter than the margins: one crop is the best of such tilings
    enlarging = np.where(scale >= 1, scale, np.inf)
    return tilings[int(enlarging.argmin() if (scale >= 1).any() else scale.argmax())]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (h, w, 3) uint8 for size (h, w): bilinear between pixel centres, without antialiasing."""
    pixels = torch.from_numpy(image.astype(np.float32))[None].permute(0, 3, 1, 2)  # torch rounds twice on uint8
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=False)
    return pixels[0].permute(1, 2, 0).round_().to(torch.uint8).contiguous().numpy()  # contiguous already: channels stay last


def cut(image: np.ndarray, tiling: tuple[int, int], config: ViewConfig) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) -> crops (N, S, 3*P*P) uint8 in reading order, boxes (N*S, 4): x, y, width, height of their
    patches in pixels of the image. The tiling (1, 1) is the whole image in one crop."""
    grid, P = config.grid, config.patch_size
    R, C = (n * config.stride + sum(config.margins) for n in tiling)  # patches of the resized image
    patches = resize(image, (R * P, C * P)).reshape(R, P, C, P, 3).swapaxes(1, 2).reshape(R, C, 3 * P * P)

    first_row, first_col = (config.stride * np.arange(n) for n in tiling)
    row = (first_row[:, None] + np.arange(grid))[:, None, :, None]  # crop row, crop column, row and column in the crop
    col = (first_col[:, None] + np.arange(grid))[None, :, None, :]
    height, width = image.shape[0] / R, image.shape[1] / C          # of a patch, in pixels of the image
    boxes = np.stack(np.broadcast_arrays(col * width, row * height, width, height), axis=-1)
    return patches[row, col].reshape(-1, grid * grid, 3 * P * P), boxes.reshape(-1, 4)


def patch_map(tiling: tuple[int, int], config: ViewConfig) -> np.ndarray:
    """(R, C) int64: for every patch of the resized image, the patch to read, counted through the crops in order.

    Along each side, with the margins (4, 4) and 27 patches a crop, crop 0 is read up to its patch 22, then crop 1 from
    its patch 4, and so on: the first crop keeps its leading margin and the last its trailing one.
    """
    def owners(n: int) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(n * config.stride + sum(config.margins))
        crop = np.clip((place - config.margins[0]) // config.stride, 0, n - 1)
        return crop, place - crop * config.stride

    (crop_row, row), (crop_col, col) = map(owners, tiling)
    crop = crop_row[:, None] * tiling[1] + crop_col
    return (crop * config.grid + row[:, None]) * config.grid + col


def pool_windows(ids: np.ndarray, pool: int) -> np.ndarray:
    """Patch ids (R, C) -> (ceil(R/pool), ceil(C/pool), pool*pool), row-major in a window; -1 fills what sticks out,
    the smaller half of it before."""
    missing = [-side % pool for side in ids.shape]
    ids = np.pad(ids, [(pad // 2, pad - pad // 2) for pad in missing], constant_values=-1)
    rows, cols = ids.shape[0] // pool, ids.shape[1] // pool
    return ids.reshape(rows, pool, cols, pool).swapaxes(1, 2).reshape(rows, cols, pool * pool)


# ---- 3. which frames of a video --------------------------------------------------------------------------------------

def sample_times(duration: float, fps: float, max_frames: int) -> list[float]:
    """Seconds to look at in a video of `duration` seconds: 0, 1/fps, 2/fps, ... and the end itself; `max_frames` spread
    evenly if those were too many. (Molmo2, section on videos.) Raises ValueError on numbers that make no sense."""
    if not (0 <= duration < float("inf") and 0 < fps < float("inf") and max_frames >= 1):
        raise ValueError(f"cannot sample {duration} s at {fps} fps with at most {max_frames} frames: "
                         "give a finite duration, a positive rate and at least one frame")
    if (max_frames - 1) / fps < duration:
        return np.linspace(0, duration, max_frames).tolist()
    return [n / fps for n in range(max_frames) if n / fps < duration] + [float(duration)]


def displayed_at(times: Sequence[float], wanted: Sequence[float]) -> list[int]:
    """Index of the frame on the screen at each wanted second, given the ascending start `times` of all the frames:
    the last to have started, or the first frame if none has."""
    started = np.searchsorted(times, np.asarray(wanted) + TIME_EPS, side="right")
    return np.maximum(started - 1, 0).tolist()


def sample_frames(times: Sequence[float], fps: float, max_frames: int) -> list[int]:
    """Numbers of the frames to look at, ascending, of a video whose frames start at `times`: those on the screen at `sample_times`."""
    return sorted(set(displayed_at(times, sample_times(times[-1], fps, max_frames))))


# ---- 4. files -> pictures --------------------------------------------------------------------------------------------

def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file -> (H, W, 3) uint8 as displayed: EXIF orientation applied, transparency over white, deeper pixels
    scaled to 8 bits, the first frame of an animation. Raises MediaError."""
    check_file(path)
    try:
        # by name, Pillow 13 would map some TIFFs into memory and read turned ones in rows of the wrong length
        with open(path, "rb") as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header; a small file can hold a huge image
                raise MediaError(f"{path}: {image.width}x{image.height} pixels are more than {MAX_PIXELS}: shrink it")
            return _displayed(ImageOps.exif_transpose(image))
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise MediaError(f"{path}: cannot be read as an image ({reason}): "
                         f"give a complete file, one of {', '.join(IMAGE_FORMATS)}") from error


def _displayed(image: Image.Image) -> np.ndarray:
    """A decoded image of any mode -> (H, W, 3) uint8."""
    if image.mode == "F" or image.mode.startswith("I"):  # Pillow's own conversion clips these at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        scales = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        white = next((scale for scale in scales if values.max() <= 1.1 * scale), values.max())  # resampling overshoots
        grey = np.clip(values / white * 255, 0, 255).round().astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3) uint8 on a white ground."""
    colour, alpha = np.split(rgba.astype(np.uint16), [3], axis=2)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # 127: to the nearest


def is_video(path: str | os.PathLike) -> bool:
    """Is this the name of a video file? Goes by the ending only."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def frames_of(path: str | os.PathLike) -> Iterator[tuple[float, np.ndarray]]:
    """Stream a video: (seconds since its first frame, (H, W, 3) uint8 upright), never holding more than one frame.

    A frame of another size than the first is resized to it. A file that ends early gives the frames before that and a
    warning. Raises MediaError.
    """
    size = None
    for seconds, frame in _decode(path):
        picture = _picture(frame, size)
        size = picture.shape[:2]
        yield seconds, picture


def frame_times(path: str | os.PathLike) -> list[float]:
    """The seconds of all frames of a video since the first, all of them decoded. Raises MediaError; warns about a file that ends early."""
    return [seconds for seconds, _ in _decode(path)]


def read_video(path: str | os.PathLike, fps: float, max_frames: int) -> tuple[list[np.ndarray], list[float]]:
    """Sample a video as `sample_times` says: frames (H, W, 3) uint8 and the seconds at which they really start.

    A frame that is on the screen at two sampled times comes once. Raises MediaError, and ValueError if fps or max_frames is not
    positive; warns about a file that ends early.
    Decoding leaps to the key frame before the next wanted frame if that saves enough. A skipped part is trusted to
    hold the frames that its packets announce, if each packet has a timestamp and arrives whole; damage inside them goes
    unnoticed, and the clip continues after it. Any other damage ends the clip.
    """
    return read_video_and_times(path, fps, max_frames)[:2]


def read_video_and_times(path: str | os.PathLike, fps: float, max_frames: int) -> tuple[list[np.ndarray], list[float], list[float]]:
    """As `read_video`, and the seconds of all frames of the file."""
    frames, times, wanted = _pick(path, lambda times: sample_frames(times, fps, max_frames))
    return frames, [times[number] for number in wanted], times


Picked = tuple[list[np.ndarray], list[float], list[int]]  # frames (H, W, 3), seconds of all frames, numbers of the picked


def _pick(path: str | os.PathLike, choose: Callable[[list[float]], list[int]]) -> Picked:
    """The frames that `choose` numbers, given the seconds of all: by the list of the packets, as far as decoding bears it
    out, leaping or from the start, or else slowly. All ways give the same, but for damage in a part leapt over (`read_video`)."""
    if listed := _list_frames(path):
        wanted = choose(listed.times)
        for leap in (True, False):
            try:
                return _pick_listed(path, listed, wanted, leap), listed.times, wanted
            except (_Unsure, av.FFmpegError, IndexError):  # the list is wrong, the file damaged or not made for seeking
                pass
    return _pick_slowly(path, choose)


def _pick_slowly(path: str | os.PathLike, choose: Callable[[list[float]], list[int]]) -> Picked:
    """Decodes twice: once for the times alone, once to keep the frames wanted."""
    times, pixels, frames = [], 0, []
    for seconds, frame in _decode(path):
        times.append(seconds)
        pixels = pixels or frame.width * frame.height
    wanted = choose(times)
    if pixels * len(wanted) > MAX_CLIP_PIXELS:
        raise MediaError(f"{path}: {len(wanted)} frames of {pixels} pixels are more than fits in memory: "
                         f"sample at most {MAX_CLIP_PIXELS // pixels} frames, or shrink the video")
    count = max(wanted, default=-1) + 1
    for number, (_, frame) in enumerate(islice(_decode(path), count)):  # ends before any damage: warns once
        if number == wanted[len(frames)]:
            frames.append(_picture(frame, frames[0].shape[:2] if frames else None))
    return frames, times, wanted


class _Unsure(Exception):
    """A quick way cannot answer; the slow one will."""


class _Listed(NamedTuple):
    """The frames of a video by time, as its packets announce them; true where decoding agrees."""
    stamps: list[int]      # by the clock of the stream
    seconds: list[float]   # the same in seconds
    times: list[float]     # seconds since the first frame
    keys: list[int]        # numbers of the frames that decoding can start at, 0 among them


def _list_frames(path: str | os.PathLike) -> _Listed | None:
    """The frames there should be, without decoding any. None if the packets leave that open: one has no time or is broken,
    or there are too many. Raises MediaError."""
    is_key = {}
    with _open(path) as container:
        stream = _video_stream(path, container)
        try:
            for packet in container.demux(stream):
                if packet.is_discard or not packet.size:  # an edit list hides it; the mark of the end
                    continue
                if packet.pts is None or packet.is_corrupt or len(is_key) == MAX_DECODED_FRAMES:
                    return None
                is_key[packet.pts] = packet.is_keyframe
        except (av.FFmpegError, IndexError):
            return None
        stamps, clock = sorted(is_key), stream.time_base
    seconds = [float(stamp) * clock.numerator / clock.denominator for stamp in stamps]  # rounds as `frame.time` does
    keys = [number for number, stamp in enumerate(stamps) if is_key[stamp] or number == 0]
    return _Listed(stamps, seconds, [second - seconds[0] for second in seconds], keys) if stamps else None


def _pick_listed(path: str | os.PathLike, listed: _Listed, wanted: list[int], leap: bool) -> list[np.ndarray]:
    """Decodes the frames wanted and, for the checks, the first and the last. Raises _Unsure or FFmpeg's errors."""
    frames = []
    for number, frame in _visit(path, listed, sorted({0, *wanted, len(listed.times) - 1}), leap):
        if frame.width * frame.height * len(wanted) > MAX_CLIP_PIXELS:
            raise _Unsure
        if number in wanted[len(frames):len(frames) + 1]:
            frames.append(_picture(frame, frames[0].shape[:2] if frames else None))
        del frame  # the decoder uses its memory again, and a frame damaged unnoticed shows what was there: as in `_pick_slowly`
    return frames


def _visit(path: str | os.PathLike, listed: _Listed, numbers: list[int], leap: bool) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode up to each of the frames `numbers`, of which the last is the last of the file, and yield these.

    Each frame that decodes must be the next one listed, beginning at the first or the key frame leapt to. In the end none
    may follow, nor any be missing by the header. Raises _Unsure if it is otherwise.
    """
    with _open(path) as container:
        stream = _video_stream(path, container)
        decoded, due = container.decode(stream), 0
        for number in numbers:
            key = listed.keys[bisect_right(listed.keys, number) - 1]
            if leap and key - due >= MIN_LEAP:
                container.seek(listed.stamps[key], stream=stream)
                decoded, due = _since(listed.seconds[key], container.decode(stream)), key
            while due <= number:
                frame = next(decoded, None)
                if (frame is None or frame.time != listed.seconds[due] or frame.is_corrupt  # how damage looks is chance
                        or frame.width * frame.height > MAX_PIXELS):
                    raise _Unsure
                due += 1
            yield number, frame
        if next(decoded, None) is not None or _seconds_missing(container, stream, frame) > MAX_MISSING:
            raise _Unsure


def _since(start: float, decoded: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Without the frames before `start` seconds: after a seek some may come, and be broken for want of still earlier ones."""
    return dropwhile(lambda frame: frame.time is not None and frame.time < start, decoded)


def _decode(path: str | os.PathLike) -> Iterator[tuple[float, av.VideoFrame]]:
    """Stream decoded frames with the seconds since the first, ascending. Nothing but timestamps is believed: counts,
    rates and durations in headers are wrong or missing too often."""
    with _open(path) as container:
        stream = _video_stream(path, container)
        step = 1 / (stream.average_rate or 25)  # only for frames without a timestamp
        start = last = problem = None
        try:
            for count, frame in enumerate(container.decode(stream)):
                _check_limits(path, count, frame)
                time = frame.time
                if time is None:
                    time = 0 if last is None else last + step
                if last is not None and time <= last:  # a clock that jumps back, as in files glued together
                    continue
                start, last = time if start is None else start, time
                yield float(time - start), frame
        except (av.FFmpegError, IndexError) as error:  # IndexError: PyAV's, on a track that starts in mid-file
            problem = _reason(error)
        if last is None:
            raise _unreadable(path, problem or "no frames")
        missing = _seconds_missing(container, stream, frame) if time >= last else 0  # of a clock that jumped back nothing is known
        if problem is None and missing > MAX_MISSING:
            problem = f"its header promises {missing:.1f} s more"
        if problem:
            warnings.warn(f"{path}: ends early, after {float(last - start):.1f} s ({problem}); using the frames before")


def _check_limits(path: str | os.PathLike, before: int, frame: av.VideoFrame) -> None:
    """MediaError if a frame is too large, or too many came before it."""
    if before == MAX_DECODED_FRAMES:
        raise MediaError(f"{path}: more than {MAX_DECODED_FRAMES} frames: cut the video into pieces")
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"{path}: {frame.width}x{frame.height} pixels a frame are more than {MAX_PIXELS}: shrink the video")


def _seconds_missing(container: av.container.InputContainer, stream: av.VideoStream, last: av.VideoFrame) -> float:
    """Seconds that should have come after the last frame; many formats end in silence where a file is cut off."""
    if last.time is None:
        return 0.0
    if stream.duration:
        start = 0 if "asf" in container.format.name else stream.start_time or 0  # in asf counted from 0, wherever the track starts
        promised = (start + stream.duration) * stream.time_base
    elif clock := next(filter(None, (re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", value) for key, value in stream.metadata.items()
                                     if key.startswith("DURATION"))), None):  # mkv: of the stream, from 0
        hours, minutes, seconds = map(float, clock.groups())
        promised = 3600 * hours + 60 * minutes + seconds
    elif len(container.streams) == 1:  # else another stream may be longer
        promised = (container.duration or 0) / av.time_base
    else:
        return 0.0
    return float(promised - last.duration * last.time_base) - last.time


def _open(path: str | os.PathLike) -> av.container.InputContainer:
    """Open a video file of an allowed format. Raises MediaError."""
    check_file(path)
    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        return av.open(f"file:{os.fspath(path)}", options=options)  # file: lets a name contain a colon
    except (av.FFmpegError, ValueError) as error:
        raise _unreadable(path, _reason(error)) from error


def _video_stream(path: str | os.PathLike, container: av.container.InputContainer) -> av.VideoStream:
    """The main one (not, say, a cover picture) of those that can be decoded. Raises MediaError."""
    main = container.streams.best("video")
    stream = next((stream for stream in filter(None, (main, *container.streams.video)) if stream.codec_context), None)
    if stream is None:
        raise _unreadable(path, "no video stream")
    stream.thread_type = "SLICE"  # frame threads can hang when decoding stops early
    return stream


def _unreadable(path: str | os.PathLike, reason: str) -> MediaError:
    return MediaError(f"{path}: cannot be read as a video ({reason}): give a complete file that a player can play")


def _picture(frame: av.VideoFrame, size: tuple[int, int] | None) -> np.ndarray:
    """A decoded frame -> (H, W, 3) uint8, upright, over white, resized if it is not of `size` (h, w)."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    picture = _over_white(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_ndarray(format="rgb24")
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        (a, b), (c, d) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(float)
        picture = picture[::-1] if a * d < b * c else picture  # mirrored: upside down first, then turned
    picture = np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))  # both turn counterclockwise
    return picture if size is None or picture.shape[:2] == size else resize(picture, size)


def check_file(path: str | os.PathLike) -> None:
    """Raise MediaError unless there is a file with something in it; so nothing is ever fetched from a URL."""
    if os.path.isdir(path):
        raise MediaError(f"{path}: is a folder: give a file")
    if not os.path.isfile(path):
        raise MediaError(f"{path}: {'a pipe or device: give a file' if os.path.exists(path) else 'no such file: check the path'}")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: is an empty file: copy or download it again")


def _reason(error: Exception) -> str:
    """What went wrong, on one line; FFmpeg's own text without the path around it."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())


# ---- 5. pictures -> a file -------------------------------------------------------------------------------------------

def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames (H, W, 3) uint8, all of one size, as an H.264 .mp4 at `fps` frames per second, whatever its name.

    Odd sides grow by one pixel, a copy of the edge: the colour planes have half the resolution. Streams, so `frames`
    may be a generator. The file appears under its name only when complete. Raises MediaError.
    """
    path, frames = os.fspath(path), iter(frames)
    if not SLOWEST <= fps <= FASTEST:
        raise MediaError(f"{path}: cannot be written at {fps} frames per second: give {SLOWEST} to {FASTEST}")
    first = next(frames, None)
    if first is None:
        raise MediaError(f"{path}: no frames to write")
    try:
        with command.atomic_write(path) as part:
            _encode(part, first.shape[:2], chain([first], frames), Fraction(fps).limit_denominator(10_000))
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{path}: cannot be written ({_reason(error)})") from error


def _encode(path: Path, size: tuple[int, int], frames: Iterable[np.ndarray], rate: Fraction) -> None:
    """Encode frames of `size` (h, w). Raises MediaError on a frame that is not (h, w, 3) uint8."""
    height, width = size
    with av.open(f"file:{path}", "w", format="mp4") as container:
        try:
            stream = container.add_stream(ENCODER, rate=rate, options={"crf": "18"})  # 18: hardly visible loss
        except ValueError:  # not one of FFmpeg's errors
            raise MediaError(f"this copy of PyAV has no {ENCODER}: pip install --force-reinstall av") from None
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for number, picture in enumerate(frames):
            if picture.shape != (height, width, 3) or picture.dtype != np.uint8:
                raise MediaError(f"frame {number} is {picture.dtype} of shape {picture.shape}, "
                                 f"not uint8 of shape {(height, width, 3)}")
            padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
