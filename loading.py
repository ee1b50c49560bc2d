"""Sets of records, their mixture, and a loader that can resume where it stopped.

    sets --Mixture--> numbered examples --worker processes--> a pool of them --Packer--> packs --collate--> batches --prefetch--> device

What comes next is a function of a seed and a few numbers (the next example's, and those that wait in the pool), so a run that goes on
from them repeats the batches that the uninterrupted run would have had. Drawing and reading is done by worker processes, packing
by a thread, while the device is busy with the batch before. `PatchSet`, at the end, feeds the ViT where it learns alone.

N crops, S patches per crop, P patch side.
"""

import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import questions
import screens
import synthetic
from data import CATEGORIES, HISTORY, draw, example, trim_to_fit, scene_record, views_of
from model import Batch, MolmoConfig
from packing import Example, Packer, collate
from preprocess import ViewConfig
from records import Lines, Record
from synthetic import Scene
from tokenizer import Tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Sets and their mixture

NOMINAL = 100_000  # the size that an endless set is given, to weigh it against finite ones of its category


@dataclass
class SyntheticSet:
    """Records drawn by code, without end: record i is a function of the fields and i. (`data.draw`)"""

    name: str      # one of data.SETS
    seed: int
    branches: int  # questions about a record
    more: dict[str, float] = field(default_factory=dict)  # ways of asking that are more or less frequent: `train.Stage.more`
    size: None = None  # endless; sets from files have a number here

    def record(self, index: int, config: ViewConfig) -> Record:
        return draw(self.name, self.seed, index, self.branches, more=self.more).limited(config)


@dataclass
class Moments:
    """The videos of a file as single frames, each asked about on its own with the frames before it."""

    lines: Lines
    seed: int

    FRAMES = 8    # of every video, drawn from those in which something is pointed at
    RATE = 8.0    # frames a second, if `max_frames` allows

    @property
    def size(self) -> int:
        return self.lines.size * self.FRAMES

    def record(self, index: int, config: ViewConfig) -> Record:
        """As `Lines.record`, but of a video one frame; an image that has frames before it stays as it is. What is said of an object that
        has a single moment is left out: that marks it, and does not say in which other frames it is out of view. ValueError also if
        the record is neither of these, or if nothing is pointed at."""
        record = self.lines.record(index // self.FRAMES, replace(config, fps=self.RATE))
        if record.before is not None:
            return record
        followed = {identity for identity, thing in record.objects.items() if len({*thing.points, *thing.masks}) > 1}
        record.annotations = [one for one in record.annotations if all(followed.issuperset(part.objects) for part in one.parts)]
        frames = sorted({frame for identity in followed for frame in record.seen(record.objects[identity].points)})
        if record.times is None or not frames:
            raise ValueError(f"{self.lines.where(index // self.FRAMES)}: no video with points at several moments, and no image with 'before': "
                             "nothing to ask frame by frame")
        return record.moment(int(np.random.default_rng([self.seed, index, 13]).choice(frames)), HISTORY)


def synthetic_sets(names: Iterable[str], seed: int, branches: int, more: dict[str, float] = {}) -> dict[str, list[SyntheticSet]]:
    """Category (or the name of one set) -> sets. ValueError if `more` names a way of asking that there is not."""
    ways = questions.WAYS | {*screens.ABOUT, *screens.READING}
    if unknown := set(more) - ways:
        raise ValueError(f"no question is asked in the way {', '.join(sorted(unknown))}: {', '.join(sorted(filter(None, ways)))}")
    return {name: [SyntheticSet(one, seed, branches, more) for one in CATEGORIES.get(name, (name,))] for name in names}


def apportioned(rates: Sequence[float], total: int, least: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the rates as nearly as they can be, none below its `least`."""
    exact, least = np.array(rates) / np.sum(rates) * total, np.array(least)
    counts = np.maximum(np.floor(exact).astype(int), least)
    while counts.sum() < total:
        counts[(exact - counts).argmax()] += 1
    while counts.sum() > total:
        counts[np.where(counts > least, exact - counts, np.inf).argmin()] -= 1
    return counts.tolist()


@dataclass
class Mixture(Dataset):
    """Examples from sets by rates: item n is a pure function of n, and so is how often each set was drawn before it.

    Numbers come in blocks of 1000 (more, if there are more than 50 sets). In a block, in shuffled order, each category has its
    exact share and each set at least one place; inside a category the shares go by the square roots of the sets' sizes. A finite
    set is gone through epoch by epoch, each in an order of its own. What cannot be read, or does not fit into `max_tokens`,
    comes as a text that says why.
    """

    sets: dict[str, list[SyntheticSet | Lines | Moments]]   # by category
    rates: dict[str, float]
    seed: int
    tokenizer: Tokenizer
    config: MolmoConfig
    max_tokens: int

    def __post_init__(self):
        if missing := sorted(name for name in self.rates if not self.sets.get(name)):
            raise ValueError(f"there is no set for {missing[0]!r}")
        self.all = [one for name in self.rates for one in self.sets[name]]
        self.block = max(1000, 20 * len(self.all))
        of_categories = apportioned(list(self.rates.values()), self.block, [len(self.sets[name]) for name in self.rates])
        self.counts = [count for name, places in zip(self.rates, of_categories) for count in
                       apportioned(np.sqrt([one.size or NOMINAL for one in self.sets[name]]), places, [1] * len(self.sets[name]))]
        self._orders = {}

    def _order(self, *key: int) -> np.ndarray:
        """A permutation: of the sets over block key = (b,), or of set s in epoch e, key = (s, e)."""
        if key not in self._orders:
            if len(self._orders) > 64:
                self._orders.clear()
            rng = np.random.default_rng([self.seed, *key, 15, len(key)])
            self._orders[key] = rng.permutation(np.repeat(np.arange(len(self.all)), self.counts) if len(key) == 1
                                                else self.all[key[0]].size)
        return self._orders[key]

    def place(self, number: int) -> tuple[int, int]:
        """Which set item `number` comes from, and its index there."""
        block, at = divmod(number, self.block)
        order = self._order(block)
        chosen = int(order[at])
        drawn = block * self.counts[chosen] + int((order[:at] == chosen).sum())  # every block before has it as often
        if (size := self.all[chosen].size) is None:
            return chosen, drawn
        epoch, at = divmod(drawn, size)
        return chosen, int(self._order(chosen, epoch)[at])

    def source(self, number: int) -> tuple[int, int]:
        """Which set item `number` comes from, and which line of it."""
        chosen, index = self.place(number)
        return chosen, index // Moments.FRAMES if isinstance(self.all[chosen], Moments) else index

    def __getitem__(self, number: int) -> tuple[int, Example | str]:
        chosen, index = self.place(number)
        try:
            record = self.all[chosen].record(index, self.config.views)
            rng = np.random.default_rng([self.seed, number, 16])
            record.annotations = [record.annotations[i] for i in rng.permutation(len(record.annotations))]
            return number, trim_to_fit(example(record, self.tokenizer, self.config, rng), self.max_tokens)
        except ValueError as error:
            lines = getattr(self.all[chosen], "lines", self.all[chosen])
            where = f"{lines.where(self.source(number)[1])}: " if isinstance(lines, Lines) else ""
            return number, str(error) if str(error).startswith(where) else where + str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The loader


@dataclass
class Loader:
    """Batches without end: items in the order of their numbers, packed, `rows` packs a batch.

    `state` (the next number, and the numbers that wait in the packer) is all that decides what comes next: a loader made
    with it goes on where that state was; it also says what was left out so far. Of `world` loaders number `rank` takes every
    world-th item. A bad item is named in a warning, once; ValueError after more than MOST_SKIPPED different ones, or as many in
    a row.
    """

    examples: Mixture
    packer: Packer
    rows: int
    weights: str
    workers: int = 0
    state: dict[str, list] | None = None
    rank: int = 0
    world: int = 1
    multiple: int = 1          # to which rows are padded
    pin: bool = False          # batches go to a GPU
    # what the loader says about itself
    names: Sequence[str] = field(default=(), init=False)  # of the examples in the last batch
    left_out: set[tuple[int, int]] = field(default_factory=set, init=False)  # set, and line there, of examples that cannot be used

    MOST_SKIPPED = 100

    def __iter__(self) -> Iterator[Batch]:
        state = self.state or {"next": [self.rank], "pool": []}
        numbers = chain(state["pool"], count(state["next"][0], self.world))  # those that waited, then all others
        self.left_out = {(one, index) for one, index in state.get("left out", [])}
        items = DataLoader(self.examples, batch_size=None, sampler=numbers, **in_workers(self.workers))
        # iter(items) gets no name here: it holds the worker processes, which end only when the last reference to it is gone
        for batch, names, after in prefetch(self.batches(iter(items), state["pool"], state["next"][0])):
            self.names, self.state = names, after
            yield batch

    def batches(self, items: Iterator[tuple[int, Example | str]], first: list[int], start: int) -> Iterator[tuple[Batch, list[str], dict]]:
        """Batches, each with the names of its examples and the state after it. `first`: the numbers that come before `start`;
        if the number of processes has changed, there may be more of them than the packer holds."""
        self.packer.pool, after, in_a_row, packs, drawn = {}, start, 0, [], 0
        most = max(self.MOST_SKIPPED, len(self.left_out))  # after a change of processes every loader knows the lines of all
        for number, item in items:
            if number >= start:
                after = number + self.world
            else:
                drawn += 1  # of `first`
            try:
                if isinstance(item, str):
                    raise ValueError(item)
                self.packer.add(number, item)
                in_a_row = 0
            except ValueError as error:
                source, in_a_row = self.examples.source(number), in_a_row + 1
                new = source not in self.left_out  # the text may be another in every epoch: the wording is drawn anew
                if new:
                    warnings.warn(f"left out: {error}")
                    self.left_out.add(source)
                if new and len(self.left_out) > most or in_a_row > self.MOST_SKIPPED:
                    one_after_the_other = " in a row" if len(self.left_out) <= most else ""
                    raise ValueError(f"more than {self.MOST_SKIPPED} examples{one_after_the_other} cannot be used; "
                                     f"the last: {error}") from None
                continue
            if self.packer.full:
                packs.append(self.packer.take())
            if len(packs) == self.rows:
                names = [tree.name for pack in packs for tree in pack]
                batch = collate(packs, self.weights, self.multiple)
                state = {"next": [after], "pool": self.packer.numbers + first[drawn:], "left out": sorted(self.left_out)}
                yield batch.pinned() if self.pin else batch, names, state
                packs = []


def prefetch(items: Iterator, most: int = 2) -> Iterator:
    """The same items, up to `most` of them made ahead by a thread while the last one is in use; what goes wrong there is raised
    here, when its turn comes. At the end it waits for the item that is being made."""
    thread = ThreadPoolExecutor(1)
    try:
        coming = deque(thread.submit(next, items) for _ in range(most))
        while True:
            try:
                item = coming.popleft().result()
            except StopIteration:
                return
            except Exception as error:  # without the frames of the thread: they hold worker processes, which end when nobody does
                error.__context__ = error.__cause__ = None
                raise error.with_traceback(None)
            coming.append(thread.submit(next, items))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def reshard_state(states: Sequence[dict[str, list]], rank: int, world: int) -> dict[str, list]:
    """The state of loader `rank` of `world`, from those of all loaders of a run that may have had another number of them: what
    none of them has taken comes once, and all know what any of them left out."""
    if len(states) == world:
        return states[rank]
    start = max(state["next"][0] for state in states)
    waiting = [n for state in states for n in (*state["pool"], *range(state["next"][0], start, len(states)))]
    left_out = {tuple(place) for state in states for place in state.get("left out", [])}
    return {"next": [start + rank], "pool": sorted(waiting)[rank::world], "left out": sorted(left_out)}


def in_workers(workers: int) -> dict:
    """What DataLoaders here have in common: a generator of their own, for the global one, from which dropout draws, stays as it is; and
    workers that are copies of this program where that is safe (else a server would start them, which signals would end)."""
    return {"num_workers": workers, "worker_init_fn": ignore_signals, "generator": torch.Generator(),
            "multiprocessing_context": "fork" if workers and sys.platform == "linux" else None}


def ignore_signals(worker: int):
    """Worker processes ignore Ctrl-C and SIGTERM, which may reach the whole group: the main program handles them and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Labels for every patch


ELEMENTS = [(sort, word) for sort, words in screens.USES.items() for word in words]  # of screens: "the Save button"
PATCH_CLASSES = (1 + len(synthetic.KINDS), 1 + len(synthetic.COLORS), 1 + len(synthetic.KINDS), 1 + len(ELEMENTS), len(synthetic.BACKGROUNDS))
KIND, COLOR, POINT, ELEMENT, BACKGROUND = range(5)  # what the labels of a patch are, as in PATCH_CLASSES
UNKNOWN = -100  # what cross entropy leaves out
FILMED = {"clips": synthetic.world, "tracks": synthetic.crowd}


@dataclass
class PatchSet(Dataset):
    """Crops with a label for every patch, to train a ViT alone, before a language model reads it. Item i -> crops
    (N, S, 3P²) and labels (N, S, 5) in PATCH_CLASSES: kind and colour of the thing at the middle of the patch, the kind of the
    thing whose point lies in it, the element of a screen at its middle (0 = none), and the background. Item by item `scenes`
    in turn: "stills", "screens", or a frame of "clips" or "tracks"."""

    seed: int
    config: MolmoConfig
    scenes: Sequence[str]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        name = self.scenes[index % len(self.scenes)]
        if name in FILMED:
            world = FILMED[name](self.seed, index)
            scene = world.film(np.random.default_rng([self.seed, index, 14]).uniform(0, world.seconds, 1))
        else:
            scene = (screens.screen if name == "screens" else synthetic.still)(self.seed, index)
        views = views_of(scene_record(scene, []), self.config.views)
        labels = patch_labels(scene, views.patch_boxes).reshape(*views.crops.shape[:2], -1)
        skipped = 0 if scene.is_video else 1  # the global crop of an image: the others show the same, larger
        return torch.from_numpy(views.crops[skipped:]), torch.from_numpy(labels[skipped:])


def collate_patches(items: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    crops, labels = zip(*items)
    return torch.cat(crops), torch.cat(labels)


def patch_labels(scene: Scene, boxes: np.ndarray) -> np.ndarray:
    """The labels of `PatchSet` for the patch boxes (N*S, 5) of a scene with one picture: (N*S, 5)."""
    _, left, top, width, height = boxes.T
    rows, columns = (top + height / 2).astype(int), (left + width / 2).astype(int)
    labels = np.zeros((len(boxes), 5), int)
    labels[:, BACKGROUND] = synthetic.BACKGROUNDS.index(scene.background) if scene.background in synthetic.BACKGROUNDS else UNKNOWN
    for thing, mask, (x, y) in zip(scene.things, scene.masks[0], scene.points[0]):
        here = mask[rows, columns]
        if isinstance(thing, screens.Element):  # what has no point is half hidden, or its word is
            labels[here, ELEMENT] = 1 + ELEMENTS.index((thing.sort, thing.word)) if np.isfinite(x) else UNKNOWN
            continue
        kind = 1 + synthetic.KINDS.index(thing.kind)
        labels[here, KIND], labels[here, COLOR] = kind, 1 + list(synthetic.COLORS).index(thing.color)
        labels[(left <= x) & (x < left + width) & (top <= y) & (y < top + height), POINT] = kind
    return labels
