"""Points: as text, as grounding tokens, and back to pixels.

A point as **text** (Molmo2) is eight or so tokens of digits. A point as **grounding tokens** (MolmoPoint) is three tokens,
each a choice among things the model already has in front of it, from coarse to fine:

    <|token_index|>  which visual token?       hidden state x  .  hidden states of all visual tokens  (+ "no more points")
    <|vit_index|>    which patch of its window (its slot)?  x  .  the K ViT features of the chosen window
    <|vit_loc|>      which ninth of that patch?             x  -> Linear(9)

    <points coords="  T V L 1  T V L 2  T ">cups</points>       (T, V, L: these three; the last T chose "no more points")

Every choice is made one position earlier: the hidden state that predicts <|token_index|> is the query for the visual token.
The choice is then fed back: <|token_index|> carries the chosen token's connector output, <|vit_index|> the chosen patch.

    PatchMap          pixels <-> (visual token, slot, location); in MolmoPoint: patch, sub-patch, location
    PointPredictor    the three heads and their losses
    PointDecoder      the rules that hold while an answer is being written
    write_text ...    the same points as text, and the strict reader

B sequences, T tokens, d LLM width, M visual tokens, K slots of a pool window, v ViT feature width, w width of the pointing queries
and keys, G <|token_index|> tokens (points and stops), P of them points, N crops, S patches per crop, V rows of the base vocabulary.
"""

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import RMSNorm, apply_rope, rope_cos_sin, rope_frequencies

TOKEN_INDEX, VIT_INDEX, VIT_LOC = "<|token_index|>", "<|vit_index|>", "<|vit_loc|>"
CLOSE_LIST = '">'  # must follow when "no more points" was chosen


class Point(NamedTuple):
    """One point of an answer: its id, the image or frame it is in (from 0), x and y in pixels of the displayed picture."""

    id: int
    picture: int
    x: float
    y: float


# ---------------------------------------------------------------------------------------------------------------------
# Pixels <-> grounding targets


class PatchMap:
    """Where the patch in every slot of every visual token lies, for going from pixels to targets and back.

    patch_boxes (N*S, 5): picture, x, y, width, height of each patch's box in pixels; pooling (M, K) into them, -1 = empty;
    indexable (M,) bool: the visual tokens that may be pointed at.
    """

    def __init__(self, patch_boxes: np.ndarray, pooling: np.ndarray, indexable: np.ndarray):
        self.patch_boxes, self.pooling = patch_boxes, pooling
        # every patch that may be pointed at: its visual token, its slot there, its box
        self.tokens, self.slots = np.nonzero((pooling >= 0) & indexable[:, None])
        self.boxes = patch_boxes[pooling[self.tokens, self.slots]]

    def target(self, picture: int, x: float, y: float) -> tuple[int, int, int]:
        """Pixel -> (visual token, slot, location 3 * column + row); the nearest patch if the point lies outside. ValueError if no patch of
        the picture can be pointed at."""
        here = self.boxes[:, 0] == picture
        if not here.any():
            raise ValueError(f"picture {picture} has no patch that can be pointed at")
        left, top, width, height = self.boxes[:, 1:].T
        column, row = (x - left) / width, (y - top) / height  # of every patch: 0..1 inside its box
        distance = np.maximum(abs(column - 0.5), abs(row - 0.5))  # at most 0.5 inside
        i = np.where(here, distance, np.inf).argmin()
        third = lambda position: min(max(int(3 * position), 0), 2)
        return int(self.tokens[i]), int(self.slots[i]), 3 * third(column[i]) + third(row[i])

    def pixel(self, token: int, slot: int, location: int) -> tuple[int, float, float]:
        """(visual token, slot, location) -> (picture, x, y), the middle of that ninth of the patch."""
        picture, left, top, width, height = self.patch_boxes[self.pooling[token, slot]]
        column, row = divmod(location, 3)
        return int(picture), float(left + (column + 0.5) / 3 * width), float(top + (row + 0.5) / 3 * height)


def grounding_targets(points: Sequence[Point], patch_map: PatchMap, tracks: bool = False):
    """Points -> (P, 3) targets sorted by (token, slot), without the stop that ends the list, and the id written after each.

    Two points in one slot are merged: a slot can be chosen once. Ids of a `points` list count 1, 2, 3, ...;
    in `tracks` an id names an object and is renumbered by first appearance.
    """
    found = {}
    for point in points:
        token, slot, location = patch_map.target(point.picture, point.x, point.y)
        key = (token, slot)
        found[key] = min(found.get(key, (location, point.id)), (location, point.id))
    triples, ids, names = [], [], {}
    for (token, slot), (location, identity) in sorted(found.items()):
        triples.append((token, slot, location))
        ids.append(names.setdefault(identity, len(names) + 1) if tracks else len(triples))
    return np.array(triples, dtype=np.int64).reshape(-1, 3), ids


def grounded_pieces(ids: Sequence[int], label: str, tracks: bool = False) -> list[str]:
    """The answer around given point ids as pieces: special tokens one by one, text in between."""
    tag = "tracks" if tracks else "points"
    pieces = [f'<{tag} coords="']
    for identity in ids:
        pieces += [TOKEN_INDEX, VIT_INDEX, VIT_LOC, str(identity)]
    return pieces + [TOKEN_INDEX, f"{CLOSE_LIST}{label}</{tag}>"]


def grounded_points(triples: Sequence[Sequence[int]], written: Sequence[str], patch_map: PatchMap) -> list[Point]:
    """The triples of a `PointDecoder` and the text that follows each finished one -> points in pixels. The id is the
    number at the start of that text; a triple without one takes its place in the answer."""
    finished = [triple for triple in triples if min(triple) >= 0]
    numbers = [re.match("[0-9]{0,9}", text)[0] for text in written]
    return [Point(int(number or order), *patch_map.pixel(*triple))
            for order, (number, triple) in enumerate(zip(numbers, finished), start=1)]


# ---------------------------------------------------------------------------------------------------------------------
# The heads


@dataclass(frozen=True)
class PointConfig:
    width: int = 512          # w, of queries and keys
    rope_theta: float = 50_000.0
    locations: int = 9        # thirds of a patch: 3 * column + row
    norm_eps: float = 1e-6
    released_inference: bool = False  # as the released inference code computes, where that differs from ours


class VisualTokens(NamedTuple):
    """What the model sees: one row per visual token of the batch."""

    windows: Tensor    # (M, K, v) ViT features of the pool window, zeros in empty slots
    valid: Tensor      # (M, K) bool, the slots that hold a patch
    embeddings: Tensor  # (M, d) connector outputs
    at: Tensor         # (M,) flat position of the token among the B * T
    owner: Tensor      # (M,) which example of the batch it belongs to
    indexable: Tensor  # (M,) bool: may be pointed at
    index: Tensor      # (M,) number among the indexable tokens of its example: the RoPE position of its key

    @classmethod
    def of(cls, windows: Tensor, valid: Tensor, embeddings: Tensor, at: Tensor, owner: Tensor, indexable: Tensor):
        """Counts `index` per example; the tokens of an example are neighbours in the batch."""
        before = indexable.cumsum(0) - indexable.long()
        _, sizes = owner.unique_consecutive(return_counts=True)
        starts = sizes.cumsum(0) - sizes
        return cls(windows, valid, embeddings, at, owner, indexable, before - before[starts].repeat_interleave(sizes))

    def only(self, rows: Tensor) -> "VisualTokens":
        """The visual tokens of one example, `rows` (M,) bool."""
        return VisualTokens(*(field[rows] for field in self))


def wide(x: Tensor) -> Tensor:
    """In float32 at least: among tens of thousands of patches scores are closer to each other than bfloat16 can tell."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PointPredictor(nn.Module):
    """MolmoPoint's three heads on x = norm(h), h the hidden state after the last block and before the final norm."""

    def __init__(self, c: PointConfig, d: int, feature_width: int):
        super().__init__()
        self.config = c
        self.x_norm = RMSNorm(d, c.norm_eps)
        self.patch_q = nn.Linear(d, c.width)
        self.patch_k = nn.Linear(d, c.width)
        self.no_more_points = nn.Parameter(torch.zeros(c.width))
        self.subpatch_q = nn.Linear(d, c.width)
        self.subpatch_k = nn.Linear(feature_width, c.width)
        self.subpatch_loc_k = nn.Linear(d, c.locations)
        self.build_vit_embedding = nn.Linear(feature_width, d)  # <|vit_index|> carries the chosen patch

    def rotated(self, x: Tensor, index: Tensor) -> Tensor:
        """x (..., w), turned by RoPE according to its place (...,) among the indexable tokens."""
        return apply_rope(x, rope_cos_sin(index, rope_frequencies(self.config.width, self.config.rope_theta, x.device), dtype=x.dtype))

    def patch_keys(self, x: Tensor, index: Tensor) -> Tensor:
        """x (M, d) of the visual tokens, index (M,) among the indexable ones -> (M, w), float32 or wider."""
        return wide(self.rotated(self.patch_k(x), index))

    def patch_scores(self, x: Tensor, index: Tensor, keys: Tensor) -> Tensor:
        """x (G, d), index (G,) of the previously chosen token (0 if none), keys (M, w) -> (G, M + 1), stop class last.

        The stop class is a learned key at position 0. Scores are divided by sqrt(w). (The released code divides by
        sqrt(number of keys): the same choice, but another temperature in training.)
        """
        keys = torch.cat([keys, self.no_more_points[None].to(keys.dtype)])
        q = wide(self.rotated(self.patch_q(x), index))
        scale = len(keys) if self.config.released_inference else self.config.width
        with torch.autocast(x.device.type, enabled=False):
            return q @ keys.T / scale**0.5

    def slot_scores(self, x: Tensor, windows: Tensor, valid: Tensor) -> Tensor:
        """x (P, d), windows (P, K, v) of the chosen tokens, valid (P, K) -> (P, K), -inf in empty slots."""
        q, k = wide(self.subpatch_q(x)), wide(self.subpatch_k(windows))
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("gw,gkw->gk", q, k) / self.config.width**0.5
        return scores.masked_fill(~valid, float("-inf"))

    def location_scores(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., 9). (The released inference code forgets the norm.)"""
        return self.subpatch_loc_k(h if self.config.released_inference else self.x_norm(h))

    def losses(self, h, targets, weights, owner, branch, points, visual: VisualTokens, ids: dict[str, int]) -> dict[str, Tensor]:
        """`patch`, `slot`, `location`: weighted sums of the three cross-entropies. `choices`: how many <|token_index|> there
        are; `right`: in how many of them (stops included) the right choice scores highest.

        h (B*T, d); targets, weights, owner (example) and branch (B*T,); points (G, 3): visual token, slot and location
        of every <|token_index|>, in order; visual token -1 is the "no more points" choice.
        """
        def loss(scores, target, at):
            return (F.cross_entropy(wide(scores), target, reduction="none") * weights[at]).sum()

        # the places (in B*T) that predict the three tokens, and the truth there
        at_token, at_slot, at_location = ((targets == ids[name]).nonzero()[:, 0] for name in (TOKEN_INDEX, VIT_INDEX, VIT_LOC))
        chosen = points[:, 0]                            # (G,), -1 = stop
        token, slot, location = points[chosen >= 0].T    # each (P,)

        # 1. Which visual token? One of the same example, not before the last choice in the same list; or the stop class.
        previous = previous_choices(chosen, owner[at_token], branch[at_token])  # (G,), -1 where a list begins
        keys = self.patch_keys(self.x_norm(h[visual.at]), visual.index)         # (M, w)
        index = F.pad(visual.index, (0, 1))[previous]                           # RoPE position; -1 reads the 0 at the end
        scores = self.patch_scores(self.x_norm(h[at_token]), index, keys)       # (G, M + 1)
        number = torch.arange(len(keys), device=h.device)
        allowed = (visual.owner == owner[at_token, None]) & visual.indexable & (number >= previous[:, None])  # (G, M)
        scores = scores.masked_fill(~F.pad(allowed, (0, 1), value=True), float("-inf"))
        target = torch.where(chosen < 0, len(keys), chosen)                     # the stop class is last

        # 2. Which patch of its window?  3. Which ninth of that patch?
        slots = self.slot_scores(self.x_norm(h[at_slot]), visual.windows[token], visual.valid[token])  # (P, K)
        locations = self.location_scores(h[at_location])                                               # (P, 9)

        return {
            "patch": loss(scores, target, at_token),
            "slot": loss(slots, slot, at_slot),
            "location": loss(locations, location, at_location),
            "right": (scores.argmax(-1) == target).sum(),
            "choices": torch.tensor(len(at_token), device=h.device),
        }


def previous_choices(chosen: Tensor, owner: Tensor, branch: Tensor) -> Tensor:
    """(G,) visual tokens as written, one after the other (-1: stop), and whose they are -> (G,) the choice before each in its own
    list, -1 where a list begins."""
    begins = (owner != owner.roll(1)) | (branch != branch.roll(1))
    begins[:1] = True
    return chosen.roll(1).masked_fill(begins, -1)  # a stop ends its list: the next one in the branch begins after a -1


# ---------------------------------------------------------------------------------------------------------------------
# The rules of decoding


class PointDecoder:
    """Writes one answer: free text is sampled, grounding tokens follow the rules.

    After <|token_index|> come <|vit_index|> and <|vit_loc|>; a list never goes back to an earlier visual token and never
    takes a slot twice (inside a token, slots ascend); "no more points" is not a list's first choice; when it wins, `">` follows.
    `triples` collects [visual token, slot, location] of every <|token_index|>: visual token -1 is "no more points", slot and
    location are -1 until they are chosen.
    """

    def __init__(self, predictor: PointPredictor, h: Tensor, visual: VisualTokens, ids: dict[str, int], close: Sequence[int]):
        """h (M, d) hidden states of the example's visual tokens, `close` the token ids of `">`."""
        self.predictor, self.visual, self.ids, self.close = predictor, visual, ids, list(close)
        self.keys = predictor.patch_keys(predictor.x_norm(h), visual.index)
        banned = (VIT_INDEX, VIT_LOC) if visual.indexable.any() else (VIT_INDEX, VIT_LOC, TOKEN_INDEX)
        self.banned = torch.tensor([ids[name] for name in banned], device=h.device)  # where text is free
        self.begin_answer()

    def another(self) -> "PointDecoder":
        """For another answer about the same example: the keys are shared."""
        fresh = copy(self)
        fresh.begin_answer()
        return fresh

    def begin_answer(self):
        self.triples: list[list[int]] = []
        self.expects: str | None = None  # a grounding token that must come next
        self.forced: list[int] = []      # the rest of `">`
        self.begin_list()

    def begin_list(self):
        self.visual_token, self.slot = -1, -1  # the last choice of the list at hand

    def step(self, logits: Tensor, h: Tensor, sample: Callable[[Tensor], int]) -> tuple[int, Tensor | None]:
        """logits (V + RESERVED,), h (d,) at the last position -> the next token and what is added to its word embedding."""
        if self.forced:
            return self.forced.pop(0), None
        if self.expects == VIT_INDEX:
            self.triples[-1][1] = self.slot = self.choose_slot(self.predictor.x_norm(h)[None])
            self.expects = VIT_LOC
            return self.ids[VIT_INDEX], self.predictor.build_vit_embedding(self.visual.windows[self.visual_token, self.slot])
        if self.expects == VIT_LOC:
            self.triples[-1][2] = int(self.predictor.location_scores(h).argmax())
            self.expects = None
            return self.ids[VIT_LOC], None
        token = sample(logits.index_fill(0, self.banned, float("-inf")))
        if token == self.close[0]:
            self.begin_list()            # the list was closed without asking for a stop
        if token != self.ids[TOKEN_INDEX]:
            return token, None
        return token, self.choose_visual_token(self.predictor.x_norm(h)[None])

    def choose_visual_token(self, x: Tensor) -> Tensor | None:
        """x (1, d): choose a visual token (its embedding is fed back) or "no more points" (nothing is, and `">` is forced)."""
        index = F.pad(self.visual.index, (0, 1))[self.visual_token]  # 0 where a list begins, at -1
        scores = self.predictor.patch_scores(x, index[None], self.keys)[0]
        allowed = F.pad(self.visual.indexable, (0, 1), value=self.visual_token >= 0)  # the stop class is last
        allowed[:max(self.visual_token, 0)] = False
        if self.visual_token >= 0 and not self.visual.valid[self.visual_token, self.slot + 1:].any():
            allowed[self.visual_token] = False  # no slot left in it
        choice = int(scores.masked_fill(~allowed, float("-inf")).argmax())
        if choice == len(self.keys):
            self.triples.append([-1, -1, -1])
            self.forced = list(self.close)
            self.begin_list()
            return None
        if choice != self.visual_token:
            self.visual_token, self.slot = choice, -1
        self.triples.append([choice, -1, -1])
        self.expects = VIT_INDEX
        return self.visual.embeddings[choice]

    def choose_slot(self, x: Tensor) -> int:
        scores = self.predictor.slot_scores(x, self.visual.windows[self.visual_token, None], self.visual.valid[self.visual_token, None])[0]
        return self.slot + 1 + int(scores[self.slot + 1:].argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Points as text


def write_text(points: Sequence[Point], places: Sequence[str], sizes, label: str, tracks: bool = False) -> str:
    """Points -> `<points coords="1 1 123 456 2 130 460;2 3 ...">label</points>` on a 0-1000 scale.

    `places` names each picture: image numbers "1", "2", ... or seconds "0.5"; `sizes` its (width, height) in pixels.
    Sorted by picture, x, y after rounding; ids count 1, 2, 3, ... In tracks an id names an object, numbered by first
    appearance, and a picture's points are sorted by id.
    """
    scale = lambda value, side: min(max(round(1000 * value / side), 0), 1000)
    place = list(places).index  # two frames less than 0.1 s apart may share a name: it means the first
    rows = sorted((place(places[p.picture]), scale(p.x, sizes[p.picture][0]), scale(p.y, sizes[p.picture][1]), p.id)
                  for p in points)
    names, groups = {}, {}
    for order, (picture, x, y, identity) in enumerate(rows, start=1):
        number = names.setdefault(identity, len(names) + 1) if tracks else order
        groups.setdefault(picture, {}).setdefault(number, (x, y))
    listed = (f"{places[picture]} " + " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in sorted(group.items()))
              for picture, group in groups.items())
    tag = "tracks" if tracks else "points"
    return f'<{tag} coords="{";".join(listed)}">{label}</{tag}>'


def write_tags(points: Sequence[Point], size: tuple[int, int], label: str) -> str:
    """Points of one picture (width, height) as Molmo-1 and VideoMolmo write them, in percent with one decimal:
    `<point x="12.5" y="3.0" alt="cup">cup</point>`, or of several `<points x1=.. y1=.. x2=.. y2=.. alt=..>`."""
    percent = lambda value, side: min(max(round(100 * value / side, 1), 0.0), 100.0)
    places = sorted((percent(p.x, size[0]), percent(p.y, size[1])) for p in points)
    numbers = [""] if len(places) == 1 else range(1, len(places) + 1)
    written = " ".join(f'x{n}="{x:.1f}" y{n}="{y:.1f}"' for n, (x, y) in zip(numbers, places))
    tag, alt = "point" if len(places) == 1 else "points", label.replace('"', "'")
    return f'<{tag} {written} alt="{alt}">{label}</{tag}>'


_LABEL = r"(?:(?!</?(?:points?|tracks)\b).)*"  # "a < b" is one, too
_TAG = re.compile(rf'<(?P<kind>points|tracks)(?: alt="[^"]*")? coords="(?P<coords>[^"<>]*)"(?: alt="[^"]*")?>{_LABEL}</(?:(?P=kind)|point)>'
                  rf'|<points?(?P<old>(?: [xy]\d*="[^"<>]*")+)(?: alt="[^"]*")?>{_LABEL}</points?>', re.ASCII | re.DOTALL)
_GROUP = re.compile(r"(\d{1,6}(?:\.\d)?)((?: \d{1,6} (?:\d{3}|1000) (?:\d{3}|1000))+)", re.ASCII)


def read_text(text: str, places: Sequence[str], sizes) -> list[Point]:
    """Strict reader of the text form and of Molmo-1's older one; never raises, never guesses.

    A tag that breaks any rule (unknown place, a coordinate off the scale, ids of `points` that do not count 1, 2, 3, ...,
    an object twice in one picture) gives no points at all. The attribute names tell the scales apart: `coords` is
    0-1000, Molmo-1's `x`/`y` are percent and belong to the first picture.
    """
    points = []
    for tag in _TAG.finditer(text):
        if tag["old"]:
            points += _read_old(tag["old"], sizes) or []
        else:
            points += _read_list(tag["kind"], tag["coords"], places, sizes) or []
    return points


def _read_list(kind: str, coords: str, places: Sequence[str], sizes) -> list[Point] | None:
    points = []
    for group in coords.split(";"):
        match = _GROUP.fullmatch(group)
        if not match or match[1] not in places:
            return None
        picture, numbers = list(places).index(match[1]), [int(n) for n in match[2].split()]
        width, height = sizes[picture]
        for identity, x, y in zip(numbers[::3], numbers[1::3], numbers[2::3]):
            points.append(Point(identity, picture, x * width / 1000, y * height / 1000))
    ids = [p.id for p in points]
    counted = ids == list(range(1, len(ids) + 1))
    once = len({(p.id, p.picture) for p in points}) == len(points)
    return points if (once if kind == "tracks" else counted) else None


def _read_old(attributes: str, sizes) -> list[Point] | None:
    written = re.findall(r'([xy]\d*)="([^"]*)"', attributes)
    found, percent = dict(written), re.compile(r"\d{1,3}(\.\d+)?", re.ASCII)
    names = [""] if "x" in found else [str(i) for i in range(1, len(written) // 2 + 1)]
    whole = len(written) == 2 * len(names) and found.keys() == {axis + n for axis in "xy" for n in names}
    if not (sizes and whole and all(percent.fullmatch(value) and float(value) <= 100 for value in found.values())):
        return None
    width, height = sizes[0]
    return [Point(i, 0, float(found["x" + n]) * width / 100, float(found["y" + n]) * height / 100) for i, n in enumerate(names, start=1)]
