"""Masks through time: a few points become a mask of every object in every frame.

    points at an anchor ------ segment ------> masks there        anchors: every k-th frame, where the model was asked

    anchor a                                               anchor b
       mask ==== propagate ====>  left    left    left      (mask)
      (mask)     right   right    right  <== propagate ==== mask
         |         |       |        |                         |
       its own   fused   fused    fused                    its own

Between two anchors each object has two masks: one carried forward from the left, one carried back from the right. If they
agree, their intersection counts; if not, their union; if one is empty, the other. (VideoMolmo, temporal mask fusion. There the
objects of an anchor have no names; here they keep them from anchor to anchor, because the carried masks say who is who,
and every object is fused on its own.)

    segment, Growing   a point, or points through time -> masks, by colour and motion, without weights
    Sam2               the same by SAM 2
    through_time       anchors, both directions, fusion, identities
    annotate           the way back: masks -> points

    python masks.py annotate FILE.jsonl     # writes FILE.points.jsonl, with a point for every mask

n objects, H x W pixels.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from math import isqrt
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

import command
from preprocess import ViewConfig, frame_times, frames_of
from records import Line, Lines, dump

Points = Mapping[int, tuple[float, float]]  # id -> x, y in pixels
Masks = dict[int, np.ndarray]               # id -> (H, W) bool


class Propagator(Protocol):
    """Carries objects from one frame to another. Every call begins with a fresh memory."""

    def __call__(self, frames: Sequence[np.ndarray], start: int, points: Points, stop: int) -> Iterator[Masks]:
        """frames (H, W, 3) uint8, points in frame `start` -> the masks in frames start, start ± 1, ..., stop."""
        ...


# ---------------------------------------------------------------------------------------------------------------------
# 1. Tools on masks


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union; of two empty masks 1."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def shifted(mask: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The mask moved by whole pixels; what leaves the frame is gone."""
    height, width = mask.shape
    moved = np.zeros_like(mask)
    if abs(dx) < width and abs(dy) < height:
        moved[max(dy, 0):height + min(dy, 0), max(dx, 0):width + min(dx, 0)] = \
            mask[max(-dy, 0):height + min(-dy, 0), max(-dx, 0):width + min(-dx, 0)]
    return moved


def box(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the smallest box around a mask that is not empty, and a margin as far as the picture reaches."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return tuple(slice(max(found[0] - margin, 0), found[-1] + 1 + margin) for found in (rows, columns))


def squared_distance(mask: np.ndarray) -> np.ndarray:
    """(H, W) float: the squared distance of every pixel of the mask to the nearest pixel outside of it; all that is beyond
    the picture is outside. Exact: first along the columns, then along the rows as far as the mask is deep."""
    distance = np.zeros(mask.shape)
    if mask.any():
        inside = np.pad(mask[box(mask)], 1)
        place = np.arange(len(inside), dtype=float)[:, None]
        above = np.maximum.accumulate(np.where(inside, -np.inf, place), axis=0)
        below = np.minimum.accumulate(np.where(inside, np.inf, place)[::-1], axis=0)[::-1]
        column = np.minimum(place - above, below - place) ** 2
        found = column.copy()
        for step in range(1, inside.shape[1]):
            if step**2 >= found.max():
                break
            np.minimum(found[:, step:], column[:, :-step] + step**2, out=found[:, step:])
            np.minimum(found[:, :-step], column[:, step:] + step**2, out=found[:, :-step])
        distance[box(mask)] = found[1:-1, 1:-1]
    return distance


def depths(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a mask that is not empty, its pixels (of a large one some, on a grid): rows, columns and distance to the edge."""
    stride = max(1, *(-(-(span.stop - span.start) // 256) for span in box(mask)))
    distance = squared_distance(mask[stride // 2::stride, stride // 2::stride])
    if not distance.any():  # too thin for the grid
        stride, distance = 1, squared_distance(mask)
    rows, columns = np.nonzero(distance)
    return rows * stride + stride // 2, columns * stride + stride // 2, np.sqrt(distance[rows, columns]) * stride


def deepest(mask: np.ndarray) -> tuple[float, float]:
    """x, y of the middle of the pixel farthest from the edge of a mask that is not empty."""
    rows, columns, depth = depths(mask)
    return float(columns[depth.argmax()] + 0.5), float(rows[depth.argmax()] + 0.5)


def wider(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask and all that is within `radius` pixels of it along its rows."""
    sums = np.cumsum(np.pad(mask.astype(np.int32), ((0, 0), (radius + 1, radius))), axis=1)
    return sums[:, 2 * radius + 1:] > sums[:, :mask.shape[1]]


def grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask and all that is within `radius` pixels of it along rows and columns: a square."""
    return wider(wider(mask, radius).T, radius).T


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask and all that is within `radius` pixels of it: a disc."""
    result = np.zeros_like(mask)
    for down in range(-radius, radius + 1):
        result |= shifted(wider(mask, isqrt(radius**2 - down**2)), 0, down)
    return result


def flood(seeds: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """The allowed pixels that are connected (4 neighbours) to allowed seeds.

    Runs of allowed pixels in a row, then in a column, are filled at once, so that it takes as many rounds as a path has
    bends, not pixels.
    """
    result = np.zeros_like(allowed)
    if not (seeds & allowed).any():
        return result
    window = box(allowed)
    allowed = allowed[window]
    reached = seeds[window] & allowed
    while True:
        before = np.count_nonzero(reached)
        for axis in (1, 0):
            a, r = (x if axis else x.T for x in (allowed, reached))
            ids = np.cumsum(np.diff(a.astype(np.int8), axis=1, prepend=np.int8(0)) == 1, axis=1, dtype=np.int64)
            ids += np.arange(len(a))[:, None] * (a.shape[1] + 1)  # the number of the run, in all rows
            hit = np.zeros(a.shape[0] * (a.shape[1] + 1) + 1, bool)
            hit[ids[r]] = True
            r = a & hit[ids]
            reached = r if axis else r.T
        if np.count_nonzero(reached) == before:
            result[window] = reached
            return result


def smooth(frame: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> float32 0..1, the mean of 3 x 3 pixels."""
    x = np.pad(frame.astype(np.float32) / 255, ((1, 1), (1, 1), (0, 0)), mode="edge")
    x = x[:-2] + x[1:-1] + x[2:]
    return (x[:, :-2] + x[:, 1:-1] + x[:, 2:]) / 9


# ---------------------------------------------------------------------------------------------------------------------
# 2. From a point to a mask, and from frame to frame, without weights

TOLERANCES = (0.03, 0.06, 0.1, 0.15, 0.2)  # largest difference of a channel of `hue` to the point's
HOLE = 0.15      # of the region: enclosed spots smaller than this belong to it
LARGEST = 0.5    # of the picture: what is larger is not an object


def hue(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) 0..1 -> (H, W, 4): red, green and blue in relation to each other, so that the lit and the shaded side of a
    thing are much alike, and a little of its brightness."""
    light = picture.sum(-1, keepdims=True)
    return np.concatenate([picture / (light + 0.3), light / 30], axis=-1)


def segment(frame: np.ndarray, x: float, y: float) -> np.ndarray:
    """The object at a point: the connected region of the hue there. Of several tolerances that one counts whose region
    stands out most from what is right beside it."""
    picture, (height, width) = hue(smooth(frame)), frame.shape[:2]
    row, column = min(max(int(y), 0), height - 1), min(max(int(x), 0), width - 1)
    seed = np.zeros((height, width), bool)
    seed[row, column] = True
    off = np.abs(picture - picture[row, column]).max(-1)
    best, contrast, sharp = seed, -1.0, np.abs(hue(frame.astype(np.float32) / 255) - picture[row, column]).max(-1)
    for tolerance in TOLERANCES:
        region = flood(seed, off <= tolerance)
        beside = grown(region, 2) & ~region
        if np.count_nonzero(region) > LARGEST * region.size or not beside.any():
            break
        stands_out = off[beside].mean() - off[region].mean()
        if stands_out > contrast:
            rim = grown(region, 1) & grown(~region, 1)  # pixels that `smooth` mixes with what is beside them
            best, contrast = np.where(rim, sharp <= tolerance, region), stands_out
    return filled(best | seed)


def filled(region: np.ndarray) -> np.ndarray:
    """With its small holes."""
    window = box(region)
    outside = np.pad(~region[window], 1, constant_values=True)
    rim = np.zeros_like(outside)
    rim[0] = True
    holes = ~region[window] & ~flood(rim, outside)[1:-1, 1:-1]
    most, left, kept = HOLE * np.count_nonzero(region), holes.copy(), np.zeros_like(holes)
    while np.count_nonzero(left) >= most:  # one of them may be too large: look where most of them lies
        row, start = left.sum(1).argmax(), np.zeros_like(left)
        start[row, left[row].argmax()] = True
        hole = flood(start, left)
        left &= ~hole
        if np.count_nonzero(hole) >= most:
            kept |= hole
    result = region.copy()
    result[window] |= holes & ~kept
    return result


LONGEST_SIDE = 400  # pixels; larger frames are shrunk by a whole number
BINS = 12        # of a colour histogram, per channel
REACH = 0.25     # of the shorter side: the farthest an object goes from one frame to the next
LOST = 0.05      # of its area: an object that shows less is not there
FAITH = 0.2      # in the velocity: the cost, as a share of the object, of a displacement that is off by the whole reach


@dataclass
class Look:
    """What is remembered of one object: its colours against those around it, and where all of it was last."""

    odds: np.ndarray      # (BINS ** 3,) log of how much more often the object has a colour than what is not the object
    shape: np.ndarray     # (H, W) bool, hidden parts as well
    velocity: np.ndarray  # (2,) pixels a frame: dx, dy
    area: int


def colors(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H, W) number of the bin."""
    bins = np.minimum((picture * BINS).astype(np.int64), BINS - 1)
    return (bins[..., 0] * BINS + bins[..., 1]) * BINS + bins[..., 2]


def odds(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Log odds of the colours, each counted for its neighbours too."""
    number, sides = colors(picture), []
    for part in (mask, ~mask):
        table = np.bincount(number[part], minlength=BINS ** 3).reshape(BINS, BINS, BINS).astype(np.float64)
        for axis in range(3):
            padded = np.pad(table, [(1, 1) if a == axis else (0, 0) for a in range(3)])
            table = sum(w * np.take(padded, np.arange(BINS) + i, axis) for i, w in enumerate((0.25, 1.0, 0.25)))
        sides.append(table.ravel() / max(table.sum(), 1) + 1e-5)
    return np.log(sides[0] / sides[1])


def motion(likely: np.ndarray, shape: np.ndarray, expected: np.ndarray, reach: int) -> tuple[int, int]:
    """dx, dy by which the shape covers most of the likely pixels and leaves out those right beside it, less a little for
    the way from where it was expected: what is hidden counts neither for nor against. All displacements at once, by
    Fourier transforms, in a window."""
    room = reach + 2  # around the shape, so that nothing comes back in on the other side
    inside, there = np.pad(shape, room), np.pad(likely, room)
    window = box(inside, room)
    inside, there = inside[window], there[window]
    wanted = inside - 0.5 * (grown(inside, 2) & ~inside)
    score = np.fft.irfft2(np.conj(np.fft.rfft2(wanted)) * np.fft.rfft2(there), inside.shape) / np.count_nonzero(inside)
    dy, dx = (np.fft.fftfreq(n, 1 / n).round().astype(int) for n in inside.shape)
    score -= FAITH * (np.hypot(dx[None] - expected[0], dy[:, None] - expected[1]) / reach) ** 2
    score[np.abs(dy) > reach] = score[:, np.abs(dx) > reach] = -np.inf
    row, column = np.unravel_index(score.argmax(), score.shape)
    return int(dx[column]), int(dy[row])


class Growing:
    """The propagator without weights. In every frame the object is first moved as a whole to where it fits best, and its
    region then grows anew there among the pixels that have its colours rather than those around it."""

    def __call__(self, frames: Sequence[np.ndarray], start: int, points: Points, stop: int) -> Iterator[Masks]:
        step, (height, width) = 1 if stop >= start else -1, frames[start].shape[:2]
        factor = -(-max(height, width) // LONGEST_SIDE)
        small = lambda frame: np.asarray(Image.fromarray(frame).reduce(factor)) if factor > 1 else frame
        large = lambda mask: mask.repeat(factor, 0).repeat(factor, 1)[:height, :width]
        frame = small(frames[start])
        picture, looks = smooth(frame), {}
        for identity, (x, y) in points.items():
            mask = segment(frame, x / factor, y / factor)
            looks[identity] = Look(odds(picture, mask), mask, np.zeros(2), np.count_nonzero(mask))
        yield {identity: large(look.shape) for identity, look in looks.items()}
        for number in range(start + step, stop + step, step):
            frame = small(frames[number])
            bins, sharp = colors(smooth(frame)), colors(frame.astype(np.float32) / 255)
            yield {identity: large(self.follow(look, bins, sharp)) for identity, look in looks.items()}

    @staticmethod
    def follow(look: Look, bins: np.ndarray, sharp: np.ndarray) -> np.ndarray:
        """The object's mask in the next picture, given by its colours, smooth and sharp; what is remembered of it moves along."""
        if not look.shape.any():
            return look.shape
        reach = max(2, round(REACH * min(look.shape.shape)))
        likely = look.odds[bins] > 0
        moved = motion(likely, look.shape, look.velocity, reach)
        shape = shifted(look.shape, *moved)
        mask = flood(shape & likely, likely & grown(shape, 3))
        mask |= grown(mask, 1) & (look.odds[sharp] > 0)  # the rim
        shown = np.count_nonzero(mask)
        if shown < LOST * look.area:  # hidden: it goes on as before
            look.shape = shifted(look.shape, *np.rint(look.velocity).astype(int))
            return np.zeros_like(mask)
        look.velocity = 0.5 * look.velocity + 0.5 * np.array(moved)
        look.shape = filled(mask) if shown > 0.8 * np.count_nonzero(shape) else shape
        return filled(mask)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The same with SAM 2

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Sam2:
    """SAM 2 from the `transformers` package, with weights from a folder of yours; each call is a session of its own, so
    that neither anchors nor directions know of each other. (Ravi et al., arXiv 2408.00714.) ValueError if the package or
    the weights, any of them, are missing."""

    def __init__(self, folder: str | os.PathLike, device: str = "cpu"):
        try:
            from transformers import Sam2VideoModel
            from transformers.utils.logging import disable_progress_bar
        except ImportError as error:
            if find_spec("transformers") is None:
                raise ValueError("SAM 2 needs one more package: pip install -r requirements-sam2.txt") from None
            raise ValueError(f"transformers cannot be loaded ({str(error).splitlines()[0]}): a torchvision that was built for "
                             "another torch is one cause; SAM 2 needs none, remove it") from None
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"{folder}: no folder with a SAM 2 model (config.json, model.safetensors)")
        disable_progress_bar()
        try:
            model, found = Sam2VideoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="float32",
                                                          output_loading_info=True)
        except Exception as error:  # a damaged file
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder}: cannot be read as a SAM 2 model ({reason})") from None
        if missing := sorted(found["missing_keys"]):  # the library would make them up
            raise ValueError(f"{folder}: no SAM 2 for videos, {len(missing)} tensors are missing, {missing[0]} for one")
        self.model, self.device = model.to(device).eval(), device

    def prepared(self, frames: Sequence[np.ndarray]):
        """Frames (H, W, 3) uint8 -> (T, 3, side, side), normalised."""
        import torch
        from torch.nn.functional import interpolate
        side = self.model.config.image_size
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = [torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() for frame in frames]
        pixels = [(interpolate(one, (side, side), mode="bilinear", antialias=True) / 255 - mean) / std for one in pixels]
        return torch.cat(pixels).to(self.model.dtype)

    def __call__(self, frames: Sequence[np.ndarray], start: int, points: Points, stop: int) -> Iterator[Masks]:
        import torch
        from torch.nn.functional import interpolate
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
        step, (height, width), side = 1 if stop >= start else -1, frames[start].shape[:2], self.model.config.image_size
        if not points:
            yield from ({} for _ in range(start, stop + step, step))
            return
        session = Sam2VideoInferenceSession(self.prepared(frames), height, width, inference_device=self.device,
                                            dtype=self.model.dtype)
        for identity, (x, y) in points.items():
            place = torch.tensor([[[[x * side / width, y * side / height]]]], dtype=self.model.dtype)
            session.add_point_inputs(session.obj_id_to_idx(identity), start,
                                     {"point_coords": place, "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)})
        session.obj_with_new_inputs = list(points)  # before anything is carried, the points' own frame must be run with them
        for number in range(start, stop + step, step):
            with torch.inference_mode():
                found = self.model(session, frame_idx=number, reverse=step < 0)
                masks = interpolate(found.pred_masks.float(), (height, width), mode="bilinear")[:, 0] > 0
            yield dict(zip(found.object_ids, masks.cpu().numpy()))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Fusion


AGREED = 0.7  # intersection over union of two masks that agree
SAME = 0.5    # of two masks of one object


FUSIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "fused": lambda left, right: left & right if iou(left, right) >= AGREED else left | right,  # (one is empty: the union is the other)
    "left": lambda left, right: left,
    "right": lambda left, right: right,
    "intersection": np.logical_and,
    "union": np.logical_or,
    "larger": lambda left, right: left if np.count_nonzero(left) >= np.count_nonzero(right) else right,
    "smaller": lambda left, right: left if np.count_nonzero(left) <= np.count_nonzero(right) else right,
}
PATIENCE = 3     # an object that anchors do not show is still followed through this many of them


def same_objects(left: Sequence[Masks], right: Sequence[Masks]) -> dict[int, int]:
    """Objects of the right anchor -> those of the left one that they are. `left` and `right` hold the masks carried from
    either anchor, both from the left anchor's frame to the right one's; pairs are taken by the better of their two
    agreements (at the left anchor, at the right one), best first."""
    both = lambda a, b, end: left[end][a].any() and right[end][b].any()
    agreement = {(a, b): max((iou(left[end][a], right[end][b]) for end in (0, -1) if both(a, b, end)), default=0.0)
                 for a in left[0] for b in right[0]}
    found: dict[int, int] = {}
    for (a, b), score in sorted(agreement.items(), key=lambda pair: (-pair[1], pair[0])):
        if score > SAME and b not in found and a not in found.values():
            found[b] = a
    return found


def through_time(frames: Iterable[np.ndarray], ask: Callable[[int, Sequence[np.ndarray]], Points], anchors: Container[int],
                 propagate: Propagator, how: str = "fused", named: bool = False,
                 history: int = 4, tell: Callable[[int, Points], None] = lambda *_: None) -> Iterator[Masks]:
    """Frames (H, W, 3) -> the masks in each of them, in order, keyed by object.

    `ask(i, [.., frame i])` gives the points in frame i, for the first frame and those of `anchors` (range(0, 100, 5), say);
    it also gets up to `history` frames before it. With `named`, an id means the same object at every anchor. Otherwise the ids
    of each anchor are arbitrary, and objects are recognised by their masks: an object keeps its first id, even if up to
    PATIENCE anchors in a row do not show it. At such an anchor it has no mask. `tell(i, points)` says who is who in the end.
    No more frames are held than lie between two anchors (and the history).
    ValueError if a frame has another size.
    """
    recent, fresh = deque(maxlen=history + 1), count(1)
    window: list[np.ndarray] = []   # the frames from the last anchor on
    points: Points = {}             # at the last anchor
    lost: Points = {}               # objects that the last anchor did not show, followed for their ids
    since: dict[int, int] = {}      # for how many anchors each of those has been lost
    for index, frame in enumerate(frames):
        if window and frame.shape != window[0].shape:
            raise ValueError(f"frame {index} is {frame.shape[1]}x{frame.shape[0]}, those before are "
                             f"{window[0].shape[1]}x{window[0].shape[0]}")
        recent.append(frame)
        window.append(frame)
        if index and index not in anchors:
            continue
        asked = ask(index, list(recent))
        if len(window) == 1:  # the first anchor
            points = asked if named else {next(fresh): place for place in asked.values()}
            tell(index, points)
            continue
        left = list(propagate(window, 0, {**lost, **points}, len(window) - 1))  # a list of masks a frame, from the last anchor on,
        right = list(propagate(window, len(window) - 1, asked, 0))[::-1]        # and back from this one, whose ids are its own:
        names = {b: b for b in asked} if named else same_objects(left, right)   # which object each of them is
        names = {b: names[b] if b in names else next(fresh) for b in asked}
        since = {i: since.get(i, 0) + 1 for i in left[-1] if i not in names.values()}
        yield from fused_between(left, right, points, names, FUSIONS[how])
        points, window = {names[b]: place for b, place in asked.items()}, [frame]
        lost = {} if named else still_followed(left[-1], right[-1], since)
        tell(index, points)
    if window:
        yield from propagate(window, 0, points, len(window) - 1)


def fused_between(left: list[Masks], right: list[Masks], shown: Container[int], names: dict[int, int], fusion: Callable) -> Iterator[Masks]:
    """The masks from one anchor up to the next, without that one: its own at the anchor, then what both sides make of each frame.
    Of the left side only objects that the anchor has `shown`: those that are lost are followed, not shown."""
    yield {i: mask for i, mask in left[0].items() if i in shown}
    for from_left, from_right in zip(left[1:-1], right[1:-1]):
        from_left = {i: mask for i, mask in from_left.items() if i in shown}
        from_right = {names[b]: mask for b, mask in from_right.items()}
        either = from_left | from_right
        empty = np.zeros_like(next(iter(either.values()))) if either else None
        yield {i: fusion(from_left.get(i, empty), from_right.get(i, empty)) for i in sorted(either)}


def still_followed(left: Masks, right: Masks, since: dict[int, int]) -> Points:
    """Of the objects that this anchor does not show, a point in each that is in view, has not been lost for too long, and is
    not covered by one that the anchor does show."""
    return {i: deepest(left[i]) for i, times in since.items() if times <= PATIENCE and left[i].any()
            and all(iou(left[i], mask) <= SAME for mask in right.values())}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The way back: from a mask to a point

CANDIDATES = 10


def annotate(frame: np.ndarray, mask: np.ndarray, rng: np.random.Generator,
             segmenter: Callable[[np.ndarray, float, float], np.ndarray] = segment) -> tuple[tuple[float, float], float]:
    """x, y of the point whose own mask is most like the one given, and how like it is (IoU): candidates are drawn the more often the
    farther they lie from the mask's edge. ValueError if the mask is empty. (VideoMolmo, semi-automatic annotation.)"""
    if not mask.any():
        raise ValueError("an empty mask has no point")
    if mask.shape != frame.shape[:2]:
        raise ValueError(f"a mask of {mask.shape[1]}x{mask.shape[0]} on a picture of {frame.shape[1]}x{frame.shape[0]}")
    rows, columns, depth = depths(mask)
    drawn = rng.choice(len(depth), min(CANDIDATES, len(depth)), replace=False, p=depth / depth.sum())
    places = [(float(columns[i] + 0.5), float(rows[i] + 0.5)) for i in drawn]
    return max(((place, iou(segmenter(frame, *place), mask)) for place in places), key=lambda tried: tried[1])


def annotate_line(line: Line, rng: np.random.Generator, segmenter: Callable[[np.ndarray, float, float], np.ndarray]) -> list[float]:
    """Every mask gives a point to its object; -> how well their own masks fit. Of a video one frame is in memory at a time. ValueError if
    something does not fit its picture or an object has none but empty masks."""
    record, fits = line.record, []
    if line.video:
        record.times, pictures = frame_times(line.video), (picture for _, picture in frames_of(line.video))
    else:
        pictures = line.load(ViewConfig()).pictures
    places = record.by_picture()
    for number, picture in enumerate(pictures):
        for identity, moment in places.get(number, ()):
            record.check_place(identity, moment, picture.shape[:2])
            thing = record.objects[identity]
            if moment in thing.masks and (mask := thing.masks[moment].mask()).any():
                thing.points[moment], fit = annotate(picture, mask, rng, segmenter)
                fits.append(fit)
    if not all(thing.points for thing in record.objects.values()):
        raise ValueError("an object has empty masks only")
    return fits


def annotate_file(path: str, out: Path, segmenter: Callable[[np.ndarray, float, float], np.ndarray], seed: int) -> None:
    """`annotate_line` for a JSONL file (records.py); the file `out` holds the lines with the points. A line whose masks do not fit its
    pictures is named and left out. ValueError, which begins with file and line, if another is wrong, or nothing is left."""
    lines, fits, bad = Lines(path), [], 0
    for index in range(lines.size):
        lines.line(index, pointless=True)  # a bad line is found before the first point
    with command.atomic_write(out) as part, open(part, "w", encoding="utf-8") as file:
        for index in tqdm(range(lines.size), desc="annotate", leave=False, disable=None):
            line = lines.line(index, pointless=True)
            try:
                fits += annotate_line(line, np.random.default_rng([seed, index]), segmenter)
            except ValueError as error:
                bad += 1
                if bad == lines.size:
                    raise ValueError(f"{lines.where(index)}: {error}") from None
                warnings.warn(f"left out: {lines.where(index)}: {error}")
                continue
            near = lambda media: os.path.relpath(media.parent.resolve() / media.name, out.parent.resolve())
            before = None if line.before is None else list(map(near, line.before))
            file.write(dump(line.record, list(map(near, line.images)), line.video and near(line.video), before) + "\n")
    print(f"wrote {out}: {lines.size - bad} lines{f' ({bad} left out)' if bad else ''}, {len(fits)} points; "
          f"their own masks fit the given ones with an IoU of {np.mean(fits or [0]):.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line("masks.py"):
        parser = command.Parser(prog="masks.py", description="Turns masks into points.")
        words = parser.add_subparsers(required=True, metavar="annotate", parser_class=command.Parser).add_parser("annotate")
        words.add_argument("file", metavar="FILE.jsonl", help="objects with masks, with or without points")
        words.add_argument("--out", type=Path, help="default: FILE.points.jsonl, in the same folder")
        words.add_argument("--sam2", metavar="FOLDER", help="segment by SAM 2 with these weights (default: by colour)")
        words.add_argument("--seed", type=command.number(int, 0, 2**32), default=0, help="of the places of points (default: %(default)s)")
        args = parser.parse_args(argv)
        out = args.out or Path(args.file).with_suffix(".points.jsonl")
        if not out.absolute().parent.is_dir() or out.is_dir():
            raise ValueError(f"--out {out}: {'a folder' if out.is_dir() else 'its folder does not exist'}: give a file")
        if out.resolve() == Path(args.file).resolve():
            raise ValueError(f"--out {out}: the file itself: give another")
        if out.exists() and not args.out:
            raise ValueError(f"{out} is there already: give --out")
        sam2 = Sam2(args.sam2) if args.sam2 else None
        by_sam2 = lambda frame, x, y: next(sam2([frame], 0, {1: (x, y)}, 0))[1]
        annotate_file(args.file, out, by_sam2 if sam2 else segment, args.seed)


if __name__ == "__main__":
    main()
