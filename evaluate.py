"""Measures, and the command that prints them.

    python evaluate.py --checkpoint assets/tiny                            # fresh stills and clips
    python evaluate.py --checkpoint CKPT --set screens tracks    # other synthetic sets
    python evaluate.py --checkpoint CKPT --data FILE.jsonl                 # your own
    python evaluate.py --checkpoint CKPT --set vpos-synthetic              # masks, in five worlds never trained on
    python evaluate.py --checkpoint CKPT --davis FOLDER --sam2 FOLDER      # Refer-DAVIS-17, MeViS, Ref-YouTube-VOS
    python evaluate.py --set occlusions --oracle --fusion fused left right intersection union larger smaller

Points: a predicted point is a hit if it lies inside the visible mask of the object it was matched to (where no mask is
known: within 5% of the picture's longer side of its point); predictions and objects are matched one to one by least
total distance (Hungarian). P = hits / predicted, R = hits / true, and F1; where nothing is true they are 1 if nothing was
predicted, else 0 ("f1 present" leaves these questions out). Counting: the number of distinct ids (where only a number is
asked for: that number), exact, or close: off by at most 1 + a twentieth. Tracks: P, R, F1 over the frames at whole seconds, and HOTA
over all frames, of what is there. "None" is recognised if a complete answer says so, without points. Words:
exact match, and F1 of the words. Masks (VideoMolmo: every k-th frame is asked about on its own): J, F and J&F, with the
masks of all objects that are meant joined into one.

The figures are means over questions. Synthetic records come from seeds that training never uses.
"""

import argparse
import json
import math
import os
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import command
import data
import vpos
import weights
from attention import set_cuda_numerics
from davis import Sequences
from masks import FUSIONS, Growing, Propagator, Sam2, dilated, iou, through_time
from generate import generate
from model import Molmo
from packing import collate
from pointing import Point
from preprocess import ViewConfig, Views
from records import TRACKS, Annotation, Lines, Record
from tokenizer import Tokenizer

EVALUATION_SEED = 2_000_000  # training seeds lie below
PER_RECORD = 3               # questions about a synthetic record, at most
BATCH = 24                   # questions answered at a time
FAR = 1e6                    # pixels: the distance to an object that is not in that picture
NEAR = 0.05                  # of the longer side: a hit where no mask is known
LONGEST = {False: 480, True: 1024}  # tokens of an answer: about 100 points; of one with tracks, eight things in 32 frames


# ---------------------------------------------------------------------------------------------------------------------
# 1. Matching


def hungarian(cost: np.ndarray) -> list[tuple[int, int]]:
    """Least-cost one-to-one pairs (row, column) of a cost matrix, min(rows, columns) of them.

    Rows enter one by one; each time the cheapest augmenting path is found under potentials u, v (Kuhn-Munkres, O(n^3)).
    """
    if cost.shape[0] > cost.shape[1]:
        return sorted((row, column) for column, row in hungarian(cost.T))
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)  # the row of each column; the extra column holds the row that looks for a place
    for row in range(rows):
        owner[-1], column = row, columns
        best, came_from = np.full(columns, np.inf), np.full(columns, columns)
        seen = np.zeros(columns + 1, bool)
        while owner[column] >= 0:
            seen[column] = True
            slack = cost[owner[column]] - u[owner[column]] - v[:-1]
            better = ~seen[:-1] & (slack < best)
            best[better], came_from[better] = slack[better], column
            nearest = int(np.where(seen[:-1], np.inf, best).argmin())
            step = best[nearest]
            u[owner[seen]] += step
            v[seen] -= step
            best[~seen[:-1]] -= step
            column = nearest
        while column != columns:
            owner[column], column = owner[came_from[column]], came_from[column]
        owner[-1] = -1
    return sorted((int(row), column) for column, row in enumerate(owner[:-1]) if row >= 0)


def inside(point: Point, record: Record, identity: int) -> bool:
    """Is the point on the object, in the picture that it names?"""
    thing = record.objects[identity]
    runs = record.seen(thing.masks).get(point.picture)
    if runs is not None:
        return runs.holds(point.x, point.y)
    place = record.seen(thing.points).get(point.picture)
    return place is not None and np.hypot(point.x - place[0], point.y - place[1]) <= NEAR * max(record.pictures[point.picture].shape[:2])


def matched(points: Sequence[Point], record: Record, objects: Sequence[int]) -> list[tuple[Point, int]]:
    """The points that hit the object they are matched to, each with its object."""
    distance = np.full((len(points), len(objects)), FAR)
    for column, identity in enumerate(objects):
        places = record.seen(record.objects[identity].points)
        for row, point in enumerate(points):
            if point.picture in places:
                x, y = places[point.picture]
                distance[row, column] = np.hypot(point.x - x, point.y - y)
    pairs = [(points[row], objects[column]) for row, column in hungarian(distance)]
    return [(point, identity) for point, identity in pairs if inside(point, record, identity)]


def precision_recall_f1(hit: int, predicted: int, true: int) -> tuple[float, float, float]:
    """Nothing true: 1 if nothing was predicted, else 0."""
    if true == 0:
        return (1.0, 1.0, 1.0) if predicted == 0 else (0.0, 0.0, 0.0)
    return hit / max(predicted, 1), hit / true, 2 * hit / (predicted + true)


def told_apart(points: Sequence[Point]) -> list[Point]:
    """An id that comes again in the same picture cannot be the same object: from the second on each gets an id of its own."""
    seen, free, found = set(), count(max(p.id for p in points) + 1), []
    for point in points:
        found.append(point._replace(id=next(free)) if (point.id, point.picture) in seen else point)
        seen.add((point.id, point.picture))
    return found


def hota(predicted: Sequence[Point], record: Record, true: Sequence[Point]) -> float:
    """Higher-order tracking accuracy: sqrt(detection * association), where a point is as good as its mask says: 1 or 0,
    so that one threshold is all there is. (Luiten et al., arXiv 2009.07736; matched as its reference code does: in each
    frame by similarity, of equals those whose ids go together most often in the whole clip.)"""
    if not true or not predicted:
        return float(not true and not predicted)
    predicted, frames = told_apart(predicted), sorted({p.picture for p in (*true, *predicted)})
    here = lambda points, frame: {p.id: p for p in points if p.picture == frame}
    similar = {frame: {(t, p): inside(point, record, t) for p, point in here(predicted, frame).items() for t in here(true, frame)}
               for frame in frames}
    together: Counter[tuple[int, int]] = Counter()  # how often two ids go together: a place that fits several is shared
    for pairs in similar.values():
        fitting = [pair for pair, same in pairs.items() if same]
        fits = Counter(end for t, p in fitting for end in (("true", t), ("predicted", p)))
        for t, p in fitting:
            together[t, p] += 1 / (fits["true", t] + fits["predicted", p] - 1)
    times_true, times_predicted = Counter(p.id for p in true), Counter(p.id for p in predicted)
    likely = lambda t, p: together[t, p] / (times_true[t] + times_predicted[p] - together[t, p])
    paired: Counter[tuple[int, int]] = Counter()
    for frame in frames:
        rows, columns = sorted(here(true, frame)), sorted(here(predicted, frame))
        score = np.array([[similar[frame][t, p] * (1e-9 + likely(t, p)) for p in columns] for t in rows])
        score = score.reshape(len(rows), len(columns))
        paired.update((rows[r], columns[c]) for r, c in hungarian(-score) if similar[frame][rows[r], columns[c]])
    if not paired:
        return 0.0
    hits = sum(paired.values())
    detection = hits / (len(true) + len(predicted) - hits)
    association = sum(n * n / (times_true[t] + times_predicted[p] - n) for (t, p), n in paired.items()) / hits
    return float(np.sqrt(detection * association))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Masks


BOUNDARY = 0.008  # of the diagonal: two edges so near are the same


def boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from the one to the right, below, or both: a line one pixel wide, as DAVIS draws it."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def region_and_contour(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """J, the intersection over union, and F, the F1 of the edges within 0.8% of the diagonal; J is 1 if both masks are empty, F if
    neither has an edge. (DAVIS 2016.)"""
    one, two = boundary(predicted), boundary(true)
    near = math.ceil(BOUNDARY * math.hypot(*true.shape))
    if not one.any() or not two.any():
        return iou(predicted, true), float(one.any() == two.any())
    precision, recall = dilated(two, near)[one].mean(), dilated(one, near)[two].mean()
    return iou(predicted, true), float(2 * precision * recall / max(precision + recall, 1e-9))


def j_and_f(predicted: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> dict[str, float]:
    """J, F and their mean over the frames of one object."""
    j, f = np.mean([region_and_contour(p, t) for p, t in zip(predicted, true, strict=True)], axis=0).tolist()
    return {"J": j, "F": f, "J&F": (j + f) / 2}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Asking


@dataclass
class Asked:
    """A question put to the model, and what came back."""

    record: Record
    annotation: Annotation
    views: Views
    question: str
    text: str = ""
    points: list[Point] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    turn: int = 0  # of a chat

    @property
    def said(self) -> Annotation:
        """What is to be answered: of a chat what its turn points at, if it does."""
        wanted = self.annotation.messages[self.turn][1] if self.annotation.messages else self.annotation
        return wanted if isinstance(wanted, Annotation) else self.annotation


def questions(records: Iterator[Record], model: Molmo, *seed: int) -> Iterator[Asked]:
    """All that is said about the records, as questions; of a chat every turn, after the true ones before it. `seed`: of the wordings."""
    for number, record in enumerate(records):
        rng = np.random.default_rng([*seed, number, 8])
        views = data.views_of(record, model.config.views, model.config.temporal.memory)
        for said in record.annotations:
            if data.shows_nothing(record, said):
                continue
            if not said.messages:
                yield Asked(record, said, views, data.question_text(said, record, rng))
            for turn, (asked, _) in enumerate(said.messages):
                yield Asked(record, said, views, asked, turn=turn)


def longest(model: Molmo, tracks: bool) -> int:
    """Tokens of an answer; tracks need more where more frames are seen, and coordinates as text twice as many."""
    frames = max(model.config.views.max_frames, 32) // 32 if tracks else 1
    return LONGEST[tracks] * frames * (1 + (model.config.points_as != "tokens"))


def turns_before(a: Asked, model: Molmo) -> tuple[list, np.ndarray]:
    """Of a chat, as `data.prompts` takes them."""
    if not a.turn:
        return [], np.zeros((0, 3), int)
    chat = replace(a.annotation, messages=a.annotation.messages[:a.turn])
    return data.turns_of(chat, a.record, a.views, model.config, np.random.default_rng(0))


def ask(model: Molmo, tokenizer: Tokenizer, asked: list[Asked]) -> None:
    """Answers a batch of questions in place, all of them with tracks or none; neighbours about one record as one tree."""
    device = next(model.parameters()).device
    trees = [list(group) for _, group in groupby(asked, key=lambda a: id(a.views))]
    batch = collate([data.prompts(tokenizer, tree[0].views, [a.question for a in tree], tree[0].record.subtitles,
                                  [turns_before(a, model) for a in tree]) for tree in trees]).to(device)
    answers = generate(model, batch, data.control_tokens(tokenizer), longest(model, asked[0].said.task in TRACKS))
    for a, answer in zip(asked, answers, strict=True):
        a.text, a.points = data.read_answer(answer, tokenizer, a.views)
        a.figures = {"answers cut": answer.finish_reason == "length"}


def evaluate(model: Molmo, tokenizer: Tokenizer, records: Iterator[Record], seed: int = EVALUATION_SEED,
             batch: int = BATCH) -> tuple[dict[str, float], list[Asked]]:
    """Asks about all records, read as they are needed; -> the figures and every answer (without its pictures)."""
    asked, waiting = [], {False: [], True: []}  # with tracks: much longer

    def answered(some: list[Asked]) -> None:
        ask(model, tokenizer, some)
        for a in some:
            a.figures |= scores(a)
            a.record = a.views = None
        some.clear()

    training = model.training
    model.eval()
    for a in questions(records, model, seed):
        asked.append(a)
        some = waiting[a.said.task in TRACKS]
        some.append(a)
        if len(some) == batch:
            answered(some)
    for some in filter(None, waiting.values()):
        answered(some)
    model.train(training)
    return summarize(asked), asked


def fresh(name: str, count: int, config: ViewConfig, seed: int = EVALUATION_SEED) -> Iterator[Record]:
    """Records 0 to count - 1 of a synthetic set, with masks; without what is asked of things that no frame looked at shows."""
    return (data.draw(name, seed, index, PER_RECORD, masks=True).limited(config) for index in range(count))


def usable(given: Lines | Sequences, count: int, config: ViewConfig, bad: list[int]) -> Iterator[Record]:
    """The first records of a file or folder. One whose pictures cannot be read, or do not show what is said, is named and comes into `bad`.
    ValueError if there are no others."""
    for i in range(count):
        try:
            record = given.record(i, config)
        except ValueError as error:
            bad.append(i)
            if len(bad) == count:
                raise
            warnings.warn(f"left out: {error}")
        else:
            yield record


# ---------------------------------------------------------------------------------------------------------------------
# 4. Frame by frame (VideoMolmo): points in every so-many-th frame, masks in all of them


@dataclass
class Between:
    """How masks come about."""

    propagate: Propagator
    every: int                # frames from one that is asked about to the next
    fusions: Sequence[str]    # the first one's J, F and J&F are given, of others J&F
    oracle: bool = False      # the true points instead of the model's


def frame_by_frame(model: Molmo, tokenizer: Tokenizer, record: Record, how: Between, seed: Sequence[int], batch: int = BATCH) -> list[Asked]:
    """Every question about a video, asked about single frames; figures of points and numbers are means over these
    frames, those of masks over all. The masks of all objects meant make one."""
    anchors, shape = range(0, len(record.pictures), how.every), record.pictures[0].shape[:2]
    moments, asked = questions((record.moment(anchor, model.config.temporal.history) for anchor in anchors), model, *seed), []
    while some := list(islice(moments, batch)):
        if not how.oracle:
            ask(model, tokenizer, some)
        for a in some:
            a.views = None  # crops are large
        asked += some
    meant = [said for said in record.annotations if said.by_frame]
    results = []
    for number, said in enumerate(meant):
        here = asked[number::len(meant)]
        for a in here:
            if how.oracle:
                a.points = data.points_of(a.record, a.annotation)
                a.text = "" if a.points else data.NONE
            a.figures |= scores(a)
            if how.oracle:
                a.figures.pop("number differs", None)  # nothing was said
        points = {anchor: {p.id if how.oracle else order: (p.x, p.y) for order, p in enumerate(a.points)}
                  for anchor, a in zip(anchors, here)}  # a model may write an id twice
        figures = summarize(here)
        figures.pop("questions")
        if said.objects:
            seen = [record.seen(record.objects[i].masks) for i in said.objects]
            true = [union([runs[frame].mask() for runs in seen if frame in runs], shape) for frame in range(len(record.pictures))]
            propagate = remembered(how.propagate) if len(how.fusions) > 1 else how.propagate
            for fusion in how.fusions:
                found = through_time(record.pictures, lambda i, _: points[i], anchors, propagate, fusion, named=how.oracle)
                measured = j_and_f([union(masks.values(), shape) for masks in found], true)
                figures |= measured if fusion == how.fusions[0] else {f"J&F {fusion}": measured["J&F"]}
        results.append(Asked(None, said, None, here[0].question, figures=figures))
    return results


def remembered(propagate: Propagator) -> Propagator:
    """The same, but what was asked for once, for one way of fusion, is not done again for another."""
    known: dict[tuple, list] = {}

    def carry(frames, start, points, stop):
        key = (*map(id, frames), start, *points.items(), stop)
        if key not in known:
            known[key] = list(propagate(frames, start, points, stop))
        return known[key]

    return carry


def union(masks: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    return np.any([np.zeros(shape, bool), *masks], axis=0)


MASK_SETS = {"vpos-synthetic": vpos.record, "occlusions": vpos.occlusions}


# ---------------------------------------------------------------------------------------------------------------------
# 5. Figures


def scores(a: Asked) -> dict[str, float]:
    """The figures of one question."""
    if a.said is not a.annotation:
        return scores(replace(a, annotation=a.said))
    task = a.annotation.task
    if not a.annotation.points_or_counts:
        return _words(a)
    true = data.points_of(a.record, a.annotation)
    number = a.annotation.count if a.annotation.count is not None else len({p.id for p in true})
    found = {} if number else {"none recognised": not a.points and says_none(a.text) and not a.figures.get("answers cut")}
    if task in TRACKS:
        return found | (_tracks(a, true) if number else {})
    if task != "count":
        found |= _points(a, true, number)
    if task != "point":
        found |= _count(a, number)
    return found


def _words(a: Asked) -> dict[str, float]:
    wanted = a.annotation.messages[a.turn][1] if a.annotation.messages else data.in_words(a.annotation)
    text = a.text.partition(".")[0] if a.annotation.task == "choice" else a.text  # "B. a red cup" is as good as "B"
    return {"words f1": words_f1(text, wanted)} | ({} if a.annotation.task == "transcript" else {"text exact": text == wanted})


def _tracks(a: Asked, true: Sequence[Point]) -> dict[str, float]:
    """HOTA over all frames; precision, recall and F1 over those at whole seconds, if something is there then."""
    figures, hits, predicted, wanted = {"hota": hota(a.points, a.record, true)}, 0, 0, 0
    for frame in {a.record.picture(n) for n in range(int(a.record.times[-1] + 1e-6) + 1)}:
        here, there = ([p for p in points if p.picture == frame] for points in (a.points, true))
        hits += len(matched(here, a.record, sorted({p.id for p in there})))
        predicted, wanted = predicted + len(here), wanted + len(there)
    if wanted:
        figures |= dict(zip(("track precision", "track recall", "track f1"), precision_recall_f1(hits, predicted, wanted)))
    return figures


def _points(a: Asked, true: Sequence[Point], number: int) -> dict[str, float]:
    hits = len(matched(a.points, a.record, [p.id for p in true]))
    found = dict(zip(("precision", "recall", "f1"), precision_recall_f1(hits, len(a.points), number)))
    return found | ({"f1 present": found["f1"]} if number else {})


def _count(a: Asked, number: int) -> dict[str, float]:
    """The count is the number of ids; of the task `count`, and to see whether the two differ, the last number of the text."""
    asked = a.annotation.task == "count"
    written = re.findall(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", re.sub(r"<(points?|tracks) .*?</(points?|tracks)>", "", a.text, flags=re.DOTALL))
    said = int(written[-1].replace(",", "").split(".")[0].lstrip("0")[:9] or 0) if written else 0  # one digit without end would be too large for a mean
    counted = said if asked else len({p.id for p in a.points})
    off = abs(counted - number)
    answered = not asked or bool(written) or says_none(a.text)  # words without a number are not a count of 0
    if asked and written and re.search(r"\.0*[1-9]", written[-1]):
        answered = False  # 2.7 is no count
    found = {"count exact": answered and off == 0, "count close": answered and off <= 1 + number // 20, "count error": off}
    return found if asked else found | {"number differs": bool(written or a.points) and said != counted}


def says_none(text: str) -> bool:
    """"There are none.", "0" and the like, and no number besides."""
    found = lambda words: re.search(rf"\b({words})\b", text, re.IGNORECASE)
    return bool(found("none|no|nothing|zero|0")) and not found("[0-9]*[1-9][0-9]*|one|two|three|four|five|six|seven|eight|nine|ten|several|many")


def words_f1(text: str, wanted: str) -> float:
    """F1 of the words in common, each as often as it is in both."""
    one, two = (Counter(re.findall(r"\w+", t.lower())) for t in (text, wanted))
    return precision_recall_f1((one & two).total(), one.total(), two.total())[2]


def summarize(asked: Sequence[Asked]) -> dict[str, float]:
    """Mean of every figure over the questions that have it."""
    rows = defaultdict(list)
    for a in asked:
        for name, value in a.figures.items():
            rows[name].append(float(value))
    return {name: float(np.mean(values)) for name, values in rows.items()} | {"questions": len(asked)}


def by_kind_of_question(asked: Sequence[Asked]) -> dict[str, float]:
    """F1, or what comes nearest to it, per way of asking: where does the model fail?"""
    groups = defaultdict(list)
    for a in asked:
        turn = a.said.task if a.said is not a.annotation else ""  # of a chat that points
        groups["/".join(filter(None, (a.annotation.task, turn, a.annotation.about)))].append(a)
    first = ("J&F", "f1", "hota", "count exact", "text exact", "words f1", "none recognised")
    figures = {name: summarize(group) for name, group in sorted(groups.items())}
    return {name: next(table[key] for key in first if key in table) for name, table in figures.items()}


COLUMNS = ("questions", "f1", "f1 present", "track f1", "hota", "J&F", "count exact", "none recognised", "text exact", "words f1")


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each set, in Markdown."""
    columns = [name for name in COLUMNS if any(name in figures for figures in results.values())]
    cell = lambda value: "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
    rows = [["set", *columns], ["---"] * (len(columns) + 1), *([name, *(cell(figures.get(c)) for c in columns)] for name, figures in results.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# 6. The command


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="evaluate.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", default=command.HOME / "assets/tiny", help="a folder written by train.py, or of released weights (default: assets/tiny)")
    parser.add_argument("--set", nargs="+", choices=[*data.SETS, *MASK_SETS], metavar="SET",
                        help=f"synthetic sets: {', '.join([*data.SETS, *MASK_SETS])} (default: stills clips)")
    parser.add_argument("--data", help="a JSONL file instead")
    parser.add_argument("--davis", metavar="FOLDER", help="a folder laid out as DAVIS instead (davis.py says how)")
    parser.add_argument("--expressions", metavar="FILE", help="of that folder (default: its meta_expressions.json)")
    parser.add_argument("--every", type=command.number(int, 1, 10**6), help="for masks: frames between two questions (default: 6)")
    parser.add_argument("--fusion", nargs="+", choices=list(FUSIONS), metavar="NAME",
                        help=f"for masks: {', '.join(FUSIONS)} (default: fused)")
    parser.add_argument("--oracle", action="store_true", help="for masks: from the true points, not from the model's")
    parser.add_argument("--sam2", metavar="FOLDER", help="for masks: SAM 2 with these weights (default: without weights)")
    parser.add_argument("--records", type=command.number(int, 1, 10**6),
                        help="of each set (default: 300, three questions each, with masks 50; of a file all)")
    parser.add_argument("--seed", type=command.number(int, 0, 2**32), default=EVALUATION_SEED,
                        help="of the synthetic records and of the wordings (default: %(default)s, never trained on)")
    parser.add_argument("--image-crops", type=command.number(int, 1, 10_000), help="high-resolution crops per image, at most (default: the checkpoint's); of several images never more than 8")
    parser.add_argument("--batch", type=command.number(int, 1, 10**4), default=BATCH, help="questions answered at a time (default: %(default)s)")
    parser.add_argument("--json", help="also write figures and settings to this file")
    parser.add_argument("--device", type=command.device, default="usual",
                        help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    args = parser.parse_args(argv)
    if args.data and args.davis:
        raise ValueError("--data and --davis: give one of them")
    if args.json:
        path = Path(args.json)
        special = path.exists() and not path.is_file() or path.is_relative_to("/dev")  # is written to as it is
        if not path.resolve().parent.is_dir():
            raise ValueError(f"--json {path}: there is no such folder")
        if path.is_dir():
            raise ValueError(f"--json {path}: a folder, not a file")
        if not special and not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise ValueError(f"--json {path}: its folder cannot be written to")
    if args.set and (args.data or args.davis):
        raise ValueError("--set goes with synthetic sets, not with --data and --davis")
    if args.expressions and not args.davis:
        raise ValueError("--expressions goes with --davis")
    args.set = args.set or ["stills", "clips"]
    masked = [args.davis] if args.davis else [] if args.data else [name for name in args.set if name in MASK_SETS]
    if not masked and (args.oracle or args.sam2 or args.fusion or args.every):
        raise ValueError("--oracle, --sam2, --fusion and --every are for masks: give --davis, or --set " + " or ".join(MASK_SETS))
    args.masked, args.fusion, args.every = masked, args.fusion or ["fused"], args.every or 6
    return args


def settings_of(args: argparse.Namespace, model: Molmo, most: dict[str, int]) -> dict:
    """All that the figures depend on."""
    views, temporal = model.config.views, model.config.temporal
    settings = {
        "checkpoint": str(args.checkpoint), "sets": ", ".join(most), "seed": args.seed,
        "records": most if len(set(most.values())) > 1 else max(most.values()),
        "questions a record": "all" if args.data or args.masked == list(most) else PER_RECORD, "decoding": "greedy",
        "prompts": "each task's own wordings, no system prompt",
        "points read from": {"tokens": "grounding tokens", "text": "coordinates", "tags": "tags"}[model.config.points_as],
        "crops": views.max_crops, "frames": views.max_frames, "fps": views.fps, "batch": args.batch,
        "longest answer": longest(model, False), "with tracks": longest(model, True),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "device": args.device}
    return settings if not args.masked else settings | {
        "frame by frame, all questions": ", ".join(args.masked), "temporal module": temporal.mode, "asked every": f"{args.every} frames, each with {temporal.memory} before it",
        "points": "true" if args.oracle else "the model's", "masks by": f"SAM 2 ({args.sam2})" if args.sam2 else "colour and motion",
        "fusion": args.fusion[0]}


def main(argv: Sequence[str] | None = None) -> None:
    with command.one_line("evaluate.py"):
        args = arguments(argv)
        given = Lines(args.data) if args.data else Sequences(args.davis, args.expressions) if args.davis else None
        names = [args.data or args.davis] if given else args.set
        most = {name: min(args.records or given.size, given.size) if given else args.records or (50 if name in args.masked else 300) for name in names}
        for i in range(most[args.data]) if args.data else ():
            given.line(i)  # a bad line is found before the first question
        between = Between(Sam2(args.sam2, args.device) if args.sam2 else Growing(), args.every, args.fusion, args.oracle)
        set_cuda_numerics()
        model, tokenizer = weights.load(args.checkpoint, args.device)
        if args.image_crops:
            model.config = replace(model.config, views=replace(model.config.views, max_crops=args.image_crops))
        settings, result = settings_of(args, model, most), {}
        print(", ".join(f"{name} {value}" for name, value in settings.items()))
        for name in names:
            bad: list[int] = []
            if given:
                records = usable(given, most[name], model.config.views, bad)
            elif name in args.masked:  # the others are asked about as a whole
                records = (MASK_SETS[name](args.seed, i) for i in range(most[name]))
            else:
                records = fresh(name, most[name], model.config.views, args.seed)
            bar = tqdm(records, total=most[name], desc=name, leave=False, dynamic_ncols=True, disable=None)
            if name in args.masked:
                asked = [a for number, record in enumerate(bar)
                         for a in frame_by_frame(model, tokenizer, record, between, (args.seed, number), args.batch)]
                figures = summarize(asked)
            else:
                figures, asked = evaluate(model, tokenizer, bar, args.seed, args.batch)
            result[name] = {"all": dict(figures), "by question": by_kind_of_question(asked)}
            print(f"{name}, {figures.pop('questions')} questions")
            for title, values in (("all", figures), ("by question", result[name]["by question"])):
                line = f"{title}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items())
                print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="    "))
            if bad:
                result[name]["bad lines"] = len(bad)
                print(f"  left out: {len(bad)} of {most[name]} records, each with its warning")
            told = sum(len(given.line(i).record.annotations) for i in range(most[name]) if i not in bad) if args.data else 0
            if (away := told - len({id(a.annotation) for a in asked})) > 0:
                result[name]["left out"] = away
                print(f"  left out: {away} about what no frame that is looked at, or asked for, shows")
            if args.json:  # after every set: what comes later may go wrong
                with command.atomic_write(args.json) as part:
                    part.write_text(json.dumps({"settings": settings, "figures": result}, indent=1) + "\n")
        print(table({name: figures["all"] for name, figures in result.items()}))


if __name__ == "__main__":
    main()
