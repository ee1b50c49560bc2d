"""From a scene and its questions to what the model eats, and from what it writes back to points.

    scene --queries--> question, targets --answer_pieces--> text and grounding tokens --branch--> tokens, loss mask
      |                                                                                              |
      +--image_views / video_views--> crops, pooling, layout ----------- trunk ----------------- Example (a message tree)

Synthetic sets are endless: example number i is a pure function of (seed, i), so a set is never stored and any range of
numbers can be held out for evaluation.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

import synthetic
from model import Answer, MolmoConfig, Spelling
from packing import Branch, Example
from pointing import (
    CLOSE_LIST,
    VIT_LOC,
    PatchMap,
    Point,
    grounded_pieces,
    grounded_points,
    grounding_targets,
    read_text,
    write_text,
)
from preprocess import Views, image_views, video_views
from synthetic import Query, Scene
from tokenizer import Tokenizer

NONE = "There are none."


def spelling(tokenizer: Tokenizer) -> Spelling:
    return Spelling(tokenizer.eos_id, tokenizer.encode(CLOSE_LIST), tokenizer.stop_ids)


def places(views: Views) -> list[str]:
    """What the text form calls each picture: image numbers from 1, or seconds."""
    return [f"{t:.1f}" for t in views.times] if views.times is not None else [str(i + 1) for i in range(len(views.sizes))]


def patch_map(views: Views) -> PatchMap:
    return PatchMap(views.patches, views.pooling, views.indexable)


def scene_views(scene: Scene, config: MolmoConfig) -> Views:
    if scene.is_video:
        return video_views(list(scene.frames), scene.times, config.views)
    return image_views(list(scene.frames), config.views)


def truth(scene: Scene, query: Query) -> list[Point]:
    """One point per target, in a video where the target is first clearly seen."""
    frames = [synthetic.first_seen(scene, thing) if scene.is_video else 0 for thing in query.targets]
    return [Point(thing, frame, *map(float, scene.points[frame, thing]))
            for thing, frame in zip(query.targets, frames)]


def answer_pieces(query: Query, points: Sequence[Point], views: Views, map_: PatchMap, config: MolmoConfig):
    """-> the answer as pieces for `Tokenizer.encode_layout`, and the rows (G, 3) of its grounding tokens.

    point: the list alone; count: `Counting the {list} shows a total of {n}.`; nothing there: `There are none.`
    """
    if query.task not in ("point", "count"):
        return [query.answer], np.zeros((0, 3), int)
    if not points:
        return [NONE], np.zeros((0, 3), int)
    if config.points_as == "text":
        pieces, count = [write_text(points, places(views), views.sizes, query.label)], len(points)
        rows = np.zeros((0, 3), int)
    else:
        rows, ids = grounding_targets(points, map_)
        pieces, count = grounded_pieces(ids, query.label), len(ids)
        rows = np.append(rows, [[-1, -1, -1]], axis=0)
    if query.task == "count":
        pieces = ["Counting the " + pieces[0], *pieces[1:]]
        pieces[-1] += f" shows a total of {count}."
    return pieces, rows


def branch(tokenizer: Tokenizer, question: str, pieces: Sequence[str], rows: np.ndarray, category: str = "other") -> Branch:
    """A question and its answer; loss on the answer and on the end-of-turn token after it."""
    asked, answered = tokenizer.chat_prompt(question), tokenizer.encode_layout(pieces) + [tokenizer.eos_id]
    return Branch(np.array(asked + answered), np.arange(len(asked) + len(answered)) >= len(asked), rows, category)


def category(scene: Scene, query: Query) -> str:
    """What the loss weight of an answer goes by."""
    if query.task in ("point", "count"):
        return "pointing"
    return "video caption" if query.task == "caption" and scene.is_video else "other"


def trunk(tokenizer: Tokenizer, views: Views) -> np.ndarray:
    return np.array([tokenizer.bos_id] + tokenizer.encode_layout(views.layout))


def prompt(tokenizer: Tokenizer, views: Views, question: str) -> Example:
    """A question that waits for its answer. (The last token of a branch is never an input, hence the end token.)"""
    asked = tokenizer.chat_prompt(question) + [tokenizer.eos_id]
    waiting = Branch(np.array(asked), np.zeros(len(asked), bool), np.zeros((0, 3), int))
    return Example(trunk(tokenizer, views), views.crops, views.pooling, [waiting])


def read_answer(answer: Answer, tokenizer: Tokenizer, views: Views) -> tuple[str, list[Point]]:
    """What the model wrote -> the text, with special tokens spelled out, and its points in pixels. The two forms of
    points never mix in one answer: grounding tokens, if there are any, are the points."""
    text = tokenizer.decode(answer.tokens)
    if answer.rows:
        after = (i + 1 for i, token in enumerate(answer.tokens) if token == tokenizer.special[VIT_LOC])
        written = [tokenizer.decode(answer.tokens[i:i + 9]) for i in after]
        return text, grounded_points(answer.rows, written, patch_map(views))
    return text, read_text(text, places(views), views.sizes)


@dataclass
class SyntheticSet(Dataset):
    """Scenes drawn on demand: item i -> a message tree of `branches` questions. A share `videos` of them are clips;
    `absent` as in `synthetic.queries`."""

    seed: int
    tokenizer: Tokenizer
    config: MolmoConfig
    branches: int = 6
    videos: float = 0.0
    absent: float = 1.0

    def __len__(self) -> int:
        return 1 << 40  # endless

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene, and a random stream for its questions."""
        rng = np.random.default_rng([self.seed, index, 1])
        make = synthetic.clip if rng.random() < self.videos else synthetic.still
        return make(self.seed, index), rng

    def __getitem__(self, index: int) -> Example:
        scene, rng = self.scene(index)
        views = scene_views(scene, self.config)
        map_, branches = patch_map(views), []
        for query in synthetic.queries(scene, rng, self.branches, self.absent):
            pieces, rows = answer_pieces(query, truth(scene, query), views, map_, self.config)
            branches.append(branch(self.tokenizer, query.question, pieces, rows, category(scene, query)))
        return Example(trunk(self.tokenizer, views), views.crops, views.pooling, branches)


PATCH_CLASSES = (1 + len(synthetic.KINDS), 1 + len(synthetic.COLORS), 1 + len(synthetic.KINDS))


@dataclass
class PatchSet(Dataset):
    """Crops with a label for every patch, to teach a ViT to see before it has anyone to tell. Item i -> crops
    (N, S, 3P²) and labels (N, S, 3) in PATCH_CLASSES: kind and colour of the thing at the middle of the patch, and the
    kind of the thing whose point lies in it; 0 = none. A third of the items is a frame of a clip."""

    seed: int
    config: MolmoConfig

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index % 3 == 2:
            world = synthetic.world(self.seed, index)
            scene = world.film(np.random.default_rng([self.seed, index, 1]).uniform(0, world.seconds, 1))
        else:
            scene = synthetic.still(self.seed, index)
        views = scene_views(scene, self.config)
        labels = patch_labels(scene, views.patches).reshape(*views.crops.shape[:2], 3)
        skipped = 0 if scene.is_video else 1  # the global crop of a still: the others show the same, larger
        return torch.from_numpy(views.crops[skipped:]), torch.from_numpy(labels[skipped:])


def collate_patches(items: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    crops, labels = zip(*items)
    return torch.cat(crops), torch.cat(labels)


def patch_labels(scene: Scene, patches: np.ndarray) -> np.ndarray:
    """The labels of `PatchSet` for patches (N*S, 5) of a scene with one picture: (N*S, 3)."""
    _, left, top, width, height = patches.T
    rows, columns = (top + height / 2).astype(int), (left + width / 2).astype(int)
    names = [(1 + synthetic.KINDS.index(thing.kind), 1 + list(synthetic.COLORS).index(thing.color))
             for thing in scene.things]
    labels = np.zeros((len(patches), 3), int)
    for name, mask, (x, y) in zip(names, scene.masks[0], scene.points[0]):
        labels[mask[rows, columns], :2] = name
        labels[(left <= x) & (x < left + width) & (top <= y) & (y < top + height), 2] = name[0]
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The manners of every command: bad input ends in one line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # argparse itself would print its usage as well


def number(kind: type, low: float, high: float):
    """An argparse type: a number from `low` to `high`."""
    def read(text: str):
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number "
                                         f"from {low:g} to {high:g}")
    return read


def device(name: str) -> str:
    """An argparse type: a device that this machine has."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name}: not available on this machine: try cpu") from None
    return name


@contextmanager
def one_line(program: str):
    """Around a command: bad input ends in one line on stderr and exit status 2, warnings are one line each.
    MOLMO_TRACEBACK=1 in the environment shows the traceback."""
    def say(*words: object) -> None:
        print(f"{program}:", *" ".join(map(str, words)).split(), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)  # "default": once, however often the file is decoded
        warnings.showwarning = lambda message, *_, **__: say("warning:", message)
        try:
            yield
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            if os.environ.get("MOLMO_TRACEBACK") == "1":
                raise
            say(error if str(error) else type(error).__name__)
            raise SystemExit(2) from None
