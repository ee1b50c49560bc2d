"""From records to what the model eats, and from what it writes back to points.

    line of a JSONL file --+              +-- views ------------> crops, pooling, layout --> trunk ----+
                           +--> Record ---+                                                            +--> Example
    scene drawn by code ---+              +-- prompt, answer ---> text and grounding tokens -> branches -+ (a message tree)

    python data.py check FILE.jsonl            # names every bad line, prints statistics
    python data.py show FILE.jsonl --out DIR   # draws examples: pictures, points, crops, tokens, mask
    python data.py draw SET DIR                # writes a synthetic set as such a file
    python data.py corpus FILE.txt             # writes texts to learn a vocabulary from

Synthetic sets are endless: record number i is a pure function of (seed, i), so a set is never stored and any range of
numbers can be held out for evaluation.
"""

import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import command
import questions
import screens
import synthetic
from attention import MaskIds, may_attend
from connector import TemporalConfig
from generate import Answer, ControlTokens
from model import PICTURE_TOKENS, MolmoConfig
from packing import Branch, Example, lay_out
from pointing import (
    CLOSE_LIST,
    VIT_LOC,
    PatchMap,
    Point,
    grounded_pieces,
    grounded_points,
    grounding_targets,
    read_text,
    write_tags,
    write_text,
)
from preprocess import ViewConfig, Views, image_views, no_views, video_views, write_video
from questions import NONE, Query
from records import DEFAULT_FPS, TASKS, TRACKS, Annotation, Lines, Object, Record, Runs, dump
from synthetic import Scene
from tokenizer import Tokenizer

HISTORY = TemporalConfig.history  # frames before the one that is asked about


# ---------------------------------------------------------------------------------------------------------------------
# 1. A record -> questions and answers


def options(choices: Sequence[str]) -> str:
    return "\n".join(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))


def question_text(annotation: Annotation, record: Record, rng: np.random.Generator) -> str:
    """The user's turn: the annotation's own question or one of its task's wordings at random, after `style: ` where the style is not
    for chat."""
    task, words = TASKS[annotation.task], annotation.question
    if not words or "{question}" in task.wordings[0]:
        words = worded(annotation, record, rng)
    return f"{task.style}: {words}" if task.style else words


def worded(annotation: Annotation, record: Record, rng: np.random.Generator) -> str:
    """One of the task's wordings at random, filled in; articles and verbs agree with the label, and say nothing about the answer."""
    wordings, label, given = TASKS[annotation.task].wordings, annotation.label, ""
    if annotation.fps != DEFAULT_FPS:  # the prompt has to say so
        wordings = [w for w in wordings if "{fps}" in w] or wordings
    article = re.match("(the|an?) ", label, re.IGNORECASE)
    if article and article[1].lower() == "the":  # one or several: no verb has to agree with it
        wordings = [w for w in wordings if "{is}" not in w and "{do}" not in w]
    wording = wordings[rng.integers(len(wordings))]
    if article:
        wording = wording.replace("the {label}", "{label}").replace("many {label}", "many {bare}")
    if record.times is None and len(record.pictures) > 1:
        wording = wording.replace("this {medium}", "these {medium}s")
    if annotation.task == "track_from":
        given = write_text(given_point(record, annotation), places(record.times, len(record.pictures)), sizes(record), label)
    one = article or annotation.about == "motion"
    return wording.format(label=label, bare=label[article.end():] if article else label, medium=record.medium,
                          fps=rate_of(annotation, record), question=annotation.question, options=options(annotation.choices),
                          given=given, do="does" if one else "do", **{"is": "is" if one else "are"})


def rate_of(annotation: Annotation, record: Record) -> str:
    """Frames a second of a track as its prompt says them: what was asked for, or what the frames have if they are farther apart."""
    apart = float(np.median(np.diff(record.times))) if record.times and len(record.times) > 1 else 0.0
    return f"{annotation.fps:g}" if apart * annotation.fps < 1.5 else f"{1 / apart:.2g}"


def points_of(record: Record, annotation: Annotation) -> list[Point]:
    """What an annotation marks. In images all points of its objects, in a video one point each, where it is shown;
    in tracks a point per object and frame (at `fps`), or of these the first and last, or those after a given one."""
    points, frames = [], range(len(record.pictures))
    if annotation.fps != DEFAULT_FPS and record.times:
        frames = {record.picture(n / annotation.fps) for n in range(int(record.times[-1] * annotation.fps + 1e-6) + 1)}
    for identity in annotation.objects:
        thing = record.objects[identity]
        at = record.seen(thing.points)
        if not at:
            continue  # in none of the frames that are looked at
        if annotation.task in TRACKS:
            kept = [frame for frame in at if frame in frames]
            if annotation.task == "track_ends":
                kept = sorted({*kept[:1], *kept[-1:]})
            if annotation.task == "track_from":
                kept = [frame for frame in kept if frame > nearest(record, at, annotation.start)]
        else:
            kept = at if record.times is None else [nearest(record, at, thing.shown)]
        points += [Point(identity, frame, *at[frame]) for frame in kept]
    return points


def given_point(record: Record, annotation: Annotation) -> list[Point]:
    """Where `track_from` starts, as a list; [] if its object is in none of the frames that are looked at."""
    identity, = annotation.objects
    at = record.seen(record.objects[identity].points)
    return [Point(identity, frame := nearest(record, at, annotation.start), *at[frame])] if at else []


def nearest(record: Record, frames: Iterable[int], moment: float | None) -> int:
    """Of some frames the nearest to a moment; None: the first."""
    return min(frames) if moment is None else min(frames, key=lambda frame: abs(record.times[frame] - moment))


def in_words(annotation: Annotation) -> str:
    """The answer of a task whose answers are words."""
    return chr(ord("A") + annotation.choices.index(annotation.answer)) if annotation.task == "choice" else annotation.answer


def answer_pieces(annotation: Annotation, record: Record, views: Views, config: MolmoConfig) -> tuple[str | list[str], np.ndarray]:
    """-> the answer as a text, or as pieces for `Tokenizer.encode_layout` if it points; and the rows (G, 3) of its
    grounding tokens. A number is that of the things, though two in one patch get one point. Where there is nothing: `There are none.`
    ValueError if tags (a form for one picture) are to point in several."""
    none = np.zeros((0, 3), int)
    if not annotation.points_or_counts:
        return in_words(annotation), none
    points, tracks = points_of(record, annotation), annotation.task in TRACKS
    if annotation.task == "count":
        n = len(points) if annotation.count is None else annotation.count
        return str(n) if n else NONE, none
    if not points:
        return NONE, none
    rows, n = none, len({point.id for point in points}) if tracks else len(points)
    if config.points_as == "tags":
        if len(views.sizes) > 1:
            raise ValueError(f"{record.name}: tags mark points in one picture, not in {len(views.sizes)}: ask frame by frame")
        pieces = [write_tags(points, views.sizes[0], annotation.label)]
    elif config.points_as == "text":
        pieces = [write_text(points, places(views.times, len(views.sizes)), views.sizes, annotation.label, tracks)]
    else:
        rows, ids = grounding_targets(points, patch_map(views), tracks)
        pieces, rows = grounded_pieces(ids, annotation.label, tracks), np.append(rows, [[-1, -1, -1]], axis=0)
    before, after = (part.format(n=n) for part in TASKS[annotation.task].answer.split("{}"))
    pieces[0] = before + pieces[0]
    pieces[-1] += after
    return pieces, rows


def turns_of(annotation: Annotation, record: Record, views: Views, config: MolmoConfig, rng: np.random.Generator) -> tuple[list, np.ndarray]:
    """-> question and answer (as `answer_pieces`) of every turn, and the rows (G, 3) of the grounding tokens in all of them."""
    turns, rows = [], [np.zeros((0, 3), int)]
    for asked, said in annotation.messages or [(question_text(annotation, record, rng), annotation)]:
        answered, more = (said, rows[0]) if isinstance(said, str) else answer_pieces(said, record, views, config)
        turns.append((asked, answered))
        rows.append(more)
    return turns, np.concatenate(rows)


def category(annotation: Annotation, record: Record) -> str:
    """What the loss weight of an answer goes by."""
    if any(part.points_or_counts and part.task != "count" for part in annotation.parts):
        return "pointing"
    return "video caption" if annotation.task in ("caption", "transcript") and record.medium == "video" else "other"


# ---------------------------------------------------------------------------------------------------------------------
# 2. A record -> a message tree; an answer -> points


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    return ControlTokens(tokenizer.stop_ids, tokenizer.encode(CLOSE_LIST))


def places(times: Sequence[float] | None, pictures: int) -> list[str]:
    """What the text form calls each picture: image numbers from 1, or seconds."""
    return [f"{t:.1f}" for t in times] if times is not None else [str(i + 1) for i in range(pictures)]


def sizes(record: Record) -> list[tuple[int, int]]:
    return [(picture.shape[1], picture.shape[0]) for picture in record.pictures]


def patch_map(views: Views) -> PatchMap:
    return PatchMap(views.patch_boxes, views.pooling, views.indexable)


def views_of(record: Record, config: ViewConfig, history: int = HISTORY) -> Views:
    """What the model gets to see of a record; of the frames before an image the last `history`."""
    if record.times is not None:
        return video_views(record.pictures, record.times, config)
    before = None if record.before is None else record.before[max(len(record.before) - history, 0):]
    return image_views(record.pictures, config, before) if record.pictures else no_views(config)


def trunk(tokenizer: Tokenizer, views: Views, subtitles: str = "") -> np.ndarray:
    """What all branches share: pictures, then subtitles."""
    heard = "subtitle\n" + subtitles.lstrip("\n") if subtitles else ""
    return np.array([tokenizer.bos_id] + tokenizer.encode_layout(views.layout) + tokenizer.encode(heard))


def branch(tokenizer: Tokenizer, turns: Sequence[tuple[str, str | list[str]]], rows: np.ndarray, category: str = "other") -> Branch:
    """Turns of question and answer; loss on the answers and on the end-of-turn tokens after them. An answer in one
    text is plain text, whatever it spells."""
    tokens, loss_mask = [], []
    for number, (asked, answered) in enumerate(turns):
        prompt = (tokenizer.encode("\n") if number else []) + tokenizer.chat_prompt(asked)
        ids = tokenizer.encode(answered) if isinstance(answered, str) else tokenizer.encode_layout(answered)
        tokens += prompt + ids + [tokenizer.eos_id]
        loss_mask += [False] * len(prompt) + [True] * (len(ids) + 1)
    return Branch(np.array(tokens), np.array(loss_mask), rows, category)


def example(record: Record, tokenizer: Tokenizer, config: MolmoConfig, rng: np.random.Generator) -> Example:
    """The message tree of a record: a branch per annotation, worded by `rng`."""
    views, branches = views_of(record, config.views, config.temporal.memory), []
    for annotation in record.annotations:
        if shows_nothing(record, annotation):
            warnings.warn(f"left out: {record.name}: {annotation.task} at {annotation.fps:g} fps asks for no frame that shows {annotation.label or 'what it is about'}")
            continue
        branches.append(branch(tokenizer, *turns_of(annotation, record, views, config, rng), category(annotation, record)))
    return Example(trunk(tokenizer, views, record.subtitles), views.crops, views.pooling, branches, record.name, views.n_past)


def shows_nothing(record: Record, annotation: Annotation) -> bool:
    """Is it about things that are there, of which no frame at the asked rate shows any, itself or a turn of its chat?"""
    return any(part.objects and part.points_or_counts and not points_of(record, part) for part in annotation.parts)


def trim_to_fit(tree: Example, max_tokens: int) -> Example:
    """The tree with as many of its branches as fit; those that do not fit even alone are named in a warning. ValueError if none fits."""
    room, kept = max_tokens - len(tree.trunk), []
    for one in tree.branches:
        if len(one.tokens) - 1 <= room:
            room -= len(one.tokens) - 1
            kept.append(one)
    if not tree.branches:
        raise ValueError(f"{tree.name}: nothing is said about what is shown")
    if not kept:
        raise ValueError(f"{tree.name}: {tree.length} tokens, there is room for {max_tokens}")
    if too_long := too_long_alone(tree, max_tokens):
        warnings.warn(f"left out: {tree.name}: {too_long} of its annotations, longer than a pack of {max_tokens} tokens")
    return replace(tree, branches=kept)


def too_long_alone(tree: Example, max_tokens: int) -> int:
    """How many branches do not fit, even if they were the only ones."""
    return sum(len(one.tokens) - 1 > max_tokens - len(tree.trunk) for one in tree.branches)


def prompts(tokenizer: Tokenizer, views: Views, texts: Sequence[str], subtitles: str = "",
            before: Sequence[tuple[list, np.ndarray]] = ()) -> Example:
    """Questions about the same pictures, each in a branch that waits for its answer, after the turns of its chat `before` it (as
    `turns_of` makes them), if there are any. (The last token of a branch is never an input, hence the end token in place of an answer.)"""
    waiting = []
    for question, (turns, rows) in zip(texts, before or [([], np.zeros((0, 3), int))] * len(texts), strict=True):
        asked = branch(tokenizer, [*turns, (question, "")], rows)
        waiting.append(replace(asked, loss_mask=np.zeros_like(asked.loss_mask)))
    return Example(trunk(tokenizer, views, subtitles), views.crops, views.pooling, waiting, n_past=views.n_past)


def prompt(tokenizer: Tokenizer, views: Views, question: str, subtitles: str = "") -> Example:
    """One question that waits for its answer."""
    return prompts(tokenizer, views, [question], subtitles)


def read_answer(answer: Answer, tokenizer: Tokenizer, views: Views) -> tuple[str, list[Point]]:
    """What the model wrote -> the text, with special tokens spelled out, and its points in pixels. The two forms of
    points never mix in one answer: grounding tokens, if there are any, are the points."""
    text = tokenizer.decode(answer.tokens)
    if answer.triples:
        after = (i + 1 for i, token in enumerate(answer.tokens) if token == tokenizer.special[VIT_LOC])
        written = [tokenizer.decode(answer.tokens[i:i + 9]) for i in after]  # an id has nine digits at most
        return text, grounded_points(answer.triples, written, patch_map(views))
    return text, read_text(text, places(views.times, len(views.sizes)), views.sizes)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Scenes drawn by code, as records


def annotated(query: Query) -> Annotation:
    return Annotation(query.task, query.label, query.targets, question=query.question, answer=query.answer,
                      choices=query.choices, about=query.about)


def scene_record(scene: Scene, asked: Sequence[Query], masks: bool = False, name: str = "") -> Record:
    """A scene and its questions; a thing's id is its number in the scene."""
    moments = scene.times.tolist() if scene.is_video else [0]
    objects = {}
    for i in range(len(scene.things)):
        points = {moment: (float(x), float(y)) for moment, (x, y) in zip(moments, scene.points[:, i]) if np.isfinite(x)}
        covered = {moment: Runs.of(mask) for moment, mask in zip(moments, scene.masks[:, i]) if mask.any()} if masks else {}
        if points:  # what is hidden throughout is not there to be asked for
            objects[i] = Object(points, covered, moments[synthetic.first_seen(scene, i)] if scene.is_video else None)
    annotations = [annotated(query) for query in asked]
    return Record(name, list(scene.frames), moments if scene.is_video else None, objects, annotations)


def album(seed: int, index: int, rng: np.random.Generator, branches: int, masks: bool, more: dict[str, float]) -> Record:
    """Two or three stills; what is asked for may be in any of them."""
    scenes = [synthetic.still(seed, 4 * index + i) for i in range(rng.integers(2, 4))]
    together = replace(scenes[0], things=[thing for scene in scenes for thing in scene.things])
    asked = questions.queries(together, rng, branches, more, questions.EVERYWHERE)
    parts, objects = [scene_record(scene, [], masks) for scene in scenes], {}
    for number, part in enumerate(parts):
        for thing in part.objects.values():
            objects[len(objects)] = Object({number: thing.points[0]}, {number: runs for runs in thing.masks.values()})
    pictures = [part.pictures[0] for part in parts]
    plural = lambda query: replace(query, question=query.question.replace("this image", "these images"))
    return Record(f"multi-image points-{index}", pictures, None, objects, [annotated(plural(query)) for query in asked])


def glimpse(seed: int, index: int, rng: np.random.Generator, branches: int, masks: bool, more: dict[str, float]) -> Record:
    """A frame of a clip with up to HISTORY frames before it, a third or a quarter of a second apart (in less time things hardly
    move by a patch), asked about on its own. In three of four records something is asked that only the frames before can answer."""
    said, wanted, step = [], rng.choice(["", "direction", "moving", "moving"]), 1 / rng.choice([3.0, 4.0])
    while not said:  # in most scenes not much about motion is clear
        make = synthetic.world if rng.random() < 0.5 else synthetic.crowd
        made = make(seed, int(rng.integers(2**31)))
        times = rng.uniform(HISTORY * step if wanted else 0, made.seconds) - step * np.arange(HISTORY + 1)[::-1]
        scene = made.film(times[times >= 0])
        asked = questions.deeds(scene, rng, max(branches - 1, 1)) if wanted else []
        if wanted in ("", *(query.about for query in asked)):
            asked += questions.queries(scene, rng, min(branches - len(asked), 1) if wanted else branches, more, questions.EVERYWHERE)
            half_hidden = {i for i, mask in enumerate(scene.masks[-1]) if mask.any() and not np.isfinite(scene.points[-1, i, 0])}
            said = [query for query in asked if not half_hidden & set(query.targets)]  # neither there nor not there
    return scene_record(scene, said, masks, f"moments-{index}").moment(len(scene.times) - 1, HISTORY)


def dialogue(record: Record, rng: np.random.Generator) -> None:
    """Now and then two questions with answers in words become two turns of one chat."""
    spoken = [said for said in record.annotations if said.task == "qa"]
    if len(spoken) > 1 and rng.random() < 0.3:
        record.annotations = [said for said in record.annotations if said not in spoken[:2]]
        turns = [(said.question, said.answer) for said in spoken[:2]]
        about = sorted({i for said in spoken[:2] for i in said.objects})
        record.annotations.append(Annotation("chat", objects=about, messages=turns, about="turns"))


# Set -> how its scenes are made and what is asked about them; "stills" and "clips" are a bit of everything.
SCENES = {
    "stills": (synthetic.still, questions.MIXTURE), "clips": (synthetic.clip, questions.MIXTURE),
    "image captions": (synthetic.still, questions.CAPTIONS), "video captions": (synthetic.clip, questions.CAPTIONS),
    "image qa": (synthetic.still, questions.ANSWERS), "video qa": (synthetic.clip, questions.ANSWERS),
    "image points": (synthetic.still, questions.POINTING), "video points": (synthetic.clip, questions.POINTING),
    "arrivals": (synthetic.arrivals, questions.POINTING),
    "tracks": (synthetic.tracks, questions.TRACKING), "long points": (synthetic.long_clip, questions.POINTING),
    "long tracks": (synthetic.long_tracks, questions.TRACKING),
    "free stills": (synthetic.still, questions.FREE), "free clips": (synthetic.clip, questions.FREE | questions.FREE_TRACKING),
}
SETS = (*SCENES, "multi-image points", "screens", "screen qa", "text", "moments", "free screens")
FREE = ("free stills", "free clips", "free screens")  # asked in other words
# Those that point in more than one picture.
SEVERAL = ("multi-image points", "clips", "video points", "arrivals", "tracks", "long points", "long tracks", "free clips")

# Category -> its synthetic sets. (Molmo2, mixture of stage 2.)
CATEGORIES = {"captions": ("image captions", "video captions"), "image qa": ("image qa",), "video qa": ("video qa",),
              "image pointing": ("image points", "multi-image points", "screens"), "video pointing": ("video points",),
              "video tracking": ("tracks",), "text": ("text",)}
RATES = {"captions": 13.6, "image qa": 22.7, "video qa": 18.2, "image pointing": 9.1, "video pointing": 13.6,
         "video tracking": 13.6, "text": 9.1}


def draw(name: str, seed: int, index: int, branches: int, masks: bool = False, more: dict[str, float] = {}) -> Record:
    """Record `index` of a synthetic set, a pure function of the arguments; `more` as in `questions.queries`."""
    rng, title = np.random.default_rng([seed, index, 6]), f"{name}-{index}"
    if name == "multi-image points":
        return album(seed, index, rng, branches, masks, more)
    if name == "text":
        asked = {query.question: query for query in (questions.words(rng) for _ in range(branches))}
        return Record(title, [], None, {}, [annotated(query) for query in asked.values()])
    if name in ("screens", "screen qa", "free screens"):
        scene = screens.screen(seed, index, float(rng.choice([1.0, 1.5, 2.0], p=[0.7, 0.2, 0.1])))
        asked = screens.queries(scene, rng, branches, more, screens.READING if name == "screen qa" else screens.ABOUT)
        if name in FREE:
            asked = [questions.freely(query, "screen", rng) for query in asked]
        return scene_record(scene, asked, masks, title)
    if name == "moments":
        return glimpse(seed, index, rng, branches, masks, more)
    make, shares = SCENES[name]
    scene, text, heard = make(seed, index), "", []
    if name == "video qa" and rng.random() < 0.3:
        text, heard = questions.subtitles(scene, rng)
    asked = questions.queries(scene, rng, branches, more, shares)
    if name in FREE:
        asked = [questions.freely(query, "video" if scene.is_video else "image", rng) for query in asked]
    heard = heard[:-(-branches // 3)]  # a third of all that is asked, rounded up
    record = scene_record(scene, (heard + asked)[:branches], masks, title)
    record.subtitles = text
    for said in record.annotations:
        if said.task in ("track", "track_from") and not said.question and rng.random() < 0.4:
            said.fps = 1.0
        if said.task == "track_from":
            said.start = min(record.objects[said.objects[0]].points)
        if said.about in ("color-of", "kind-of") and said.task == "qa" and name.endswith("qa") and rng.random() < 0.4:
            said.task = "short_answer"
    if name.endswith("qa"):
        dialogue(record, rng)
    return record


# ---------------------------------------------------------------------------------------------------------------------
# 4. python data.py check, show, draw, corpus

COLORS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b")


def check(path: str, tokenizer: Tokenizer, config: MolmoConfig, max_tokens: int, max_crops: int) -> int:
    """Reads every line with its pictures and makes an example of it; prints what is wrong with the bad ones, those too
    that no pack can hold, and a table. -> how many are bad."""
    lines, bad, lengths, totals, tasks, odd = Lines(path), 0, [], Counter(), Counter(), Counter()
    for i in range(lines.size):
        try:
            record = lines.record(i, config.views)
            told, record.annotations = len(record.annotations), [said for said in record.annotations if not shows_nothing(record, said)]
            tree = example(record, tokenizer, config, np.random.default_rng(0))
            with warnings.catch_warnings(action="ignore"):  # counted below
                fitting = trim_to_fit(tree, max_tokens)
            if len(tree.crops) > max_crops:
                raise ValueError(f"{lines.where(i)}: {len(tree.crops)} crops, there is room for {max_crops}")
        except ValueError as error:
            print(error if str(error).startswith(str(lines.path)) else f"{lines.where(i)}: {error}")
            bad += 1
            continue
        grounded = [(said, one) for said, one in zip(record.annotations, tree.branches) if len(one.points)]
        odd["annotations point between the frames that are looked at"] += len(lines.line(i).record.annotations) - told
        odd["annotations ask for tracks at a rate at which nothing shows"] += told - len(record.annotations)
        too_long = too_long_alone(tree, max_tokens)
        odd["annotations are too long for a pack"] += too_long
        odd["annotations do not fit beside the others"] += len(tree.branches) - len(fitting.branches) - too_long
        odd["points lie outside of their object's mask"] += sum(
            not thing.masks[moment].holds(*place) for thing in record.objects.values() for moment, place in thing.points.items() if moment in thing.masks)
        odd["points lie in the same patch as another one and are taken for it"] += sum(
            sum(len(points_of(record, part)) for part in said.parts if part.task != "count") - int((one.points[:, 0] >= 0).sum()) for said, one in grounded)
        tasks.update(said.task for said in record.annotations)
        totals.update({record.medium if record.pictures else "text alone": 1, "objects": len(record.objects),
                       "points": sum(len(thing.points) for thing in record.objects.values()),
                       "masks": sum(len(thing.masks) for thing in record.objects.values())})
        lengths.append((tree.length, len(tree.crops)))
    print(f"{lines.size} lines, {bad} bad" + "".join(f"; {n} {what}" for what, n in odd.items() if n))
    for table in filter(None, (totals, tasks)):
        print("  " + ", ".join(f"{name} {n}" for name, n in table.most_common()))
    if lengths:
        tokens, crops = np.array(lengths).T
        print(f"  tokens {tokens.mean():.0f} on average, {tokens.max()} at most; crops {crops.mean():.1f} and {crops.max()}")
    return bad


def sheet(record: Record, tokenizer: Tokenizer, config: MolmoConfig) -> Image.Image:
    """One example as a picture: its pictures with the points of (the first eight) annotations in a colour each, what the
    ViT gets, the mask of the tree (a colour per branch), and all tokens as text."""
    tree = example(record, tokenizer, config, np.random.default_rng(0))  # warns of what it leaves out
    record.annotations = [said for said in record.annotations if not shows_nothing(record, said)]  # so that each branch has one color
    shown = []
    for number, picture in enumerate(record.pictures):
        image = Image.fromarray(picture)
        pen = ImageDraw.Draw(image)
        for nth, (color, said) in enumerate(zip(COLORS, record.annotations)):
            for point in chain.from_iterable(points_of(record, part) for part in said.parts if part.points_or_counts):
                if point.picture == number:
                    pen.circle((point.x, point.y), 4 + 2 * nth, outline=color, width=2)
        shown.append(image)
    side, P = config.views.grid, config.views.patch_size
    crops = tree.crops.reshape(-1, side, side, P, P, 3).swapaxes(2, 3).reshape(-1, side * P, side * P, 3)
    shown += [Image.fromarray(crop) for crop in crops]

    row = lay_out([tree])
    visual = np.isin(row.tokens, [tokenizer.special[name] for name in PICTURE_TOKENS])
    ids = MaskIds(*(torch.from_numpy(np.ascontiguousarray(a))[None] for a in
                (row.example_ids, row.branch_ids, np.arange(len(visual)), visual & config.bidirectional)))
    seen = may_attend(ids, ids)[0].numpy()
    paint = np.array([(120, 120, 120), *(tuple(bytes.fromhex(c[1:])) for c in COLORS)], np.uint8)
    mask = np.where(seen[..., None], paint[np.where(row.branch_ids, 1 + (row.branch_ids - 1) % len(COLORS), 0)][:, None], 255)
    shown.append(Image.fromarray(mask.astype(np.uint8)).resize((360, 360), Image.Resampling.NEAREST))

    texts = [(tokenizer.decode(tree.trunk), "black")] + [
        (tokenizer.decode(made.tokens), COLORS[b % len(COLORS)]) for b, made in enumerate(tree.branches)]
    lines = [(line, color) for text, color in texts for line in textwrap.wrap(squeeze(text), 150)]
    top = shelves(shown)
    page = Image.new("RGB", (max(960, top.width), top.height + 14 * len(lines) + 4), "white")
    page.paste(top)
    pen = ImageDraw.Draw(page)
    for number, (line, color) in enumerate(lines):
        pen.text((4, top.height + 14 * number), line, fill=color)
    return page


def shelves(images: Sequence[Image.Image], width: int = 960, gap: int = 6) -> Image.Image:
    """Images side by side, in as many rows as they need."""
    rows: list[list[Image.Image]] = [[]]
    for image in images:
        if rows[-1] and sum(other.width + gap for other in rows[-1]) + image.width > width:
            rows.append([])
        rows[-1].append(image)
    sides = [(sum(image.width + gap for image in row), max(image.height for image in row) + gap) for row in rows]
    page, top = Image.new("RGB", (max(w for w, _ in sides), sum(h for _, h in sides)), "white"), 0
    for row, (_, height) in zip(rows, sides):
        left = 0
        for image in row:
            page.paste(image, (left, top))
            left += image.width + gap
        top += height
    return page


def squeeze(text: str) -> str:
    """Runs of the same special token as one with a number."""
    return re.sub(r"(<\|?\w+\|?>)\1+", lambda run: f"{run[1]}x{len(run[0]) // len(run[1])} ", text.replace("\n", " "))


def write_set(name: str, folder: Path, n: int, seed: int, branches: int) -> Path:
    """Records 0 to n - 1 of a synthetic set as pictures and a JSONL file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, stem = [], name.replace(" ", "-")
    for index in range(n):
        record = draw(name, seed, index, branches, masks=True)
        images, video, before = [], None, None
        if record.times is not None:
            video = f"{stem}-{index}.mp4"
            grown = [(0, side % 2) for side in record.pictures[0].shape[:2]]  # as write_video grows odd sides
            for thing in record.objects.values():
                thing.masks = {moment: Runs.of(np.pad(runs.mask(), grown)) for moment, runs in thing.masks.items()}
            write_video(folder / video, iter(record.pictures), 1 / (record.times[1] - record.times[0]))
        else:
            images = [f"{stem}-{index}-{number}.png" for number in range(1, len(record.pictures) + 1)]
        if record.before is not None:
            before = [f"{stem}-{index}-before{number}.png" for number in range(len(record.before), 0, -1)]
        for file, picture in chain(zip(images, record.pictures), zip(before or (), record.before or ())):
            with command.atomic_write(folder / file) as part:
                Image.fromarray(picture).save(part)
        lines.append(dump(record, images, video, before))
    path = folder / f"{stem}.jsonl"
    with command.atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def corpus(n: int, seed: int) -> Iterator[str]:
    """n texts without line breaks to learn a vocabulary from: what is asked and answered about records of the sets in
    turn (without `moments`, `arrivals`, `screen qa` and those asked in other words), and what stands around it."""
    rng, digits = np.random.default_rng([seed, 9]), [f"{half / 2:.1f} " for half in range(61)]
    pieces = ["user", "assistant", "Image 1", "Image 2", "Image 3", '<points coords="', '<tracks coords="', CLOSE_LIST, NONE, *digits]
    records = (draw(name, seed, index, 8) for index in count() for name in SETS
               if name not in ("moments", "arrivals", "screen qa", *FREE))
    def texts(record: Record) -> Iterator[str]:
        for said in record.annotations:
            alone = (question_text(said, record, rng), "" if said.points_or_counts else in_words(said))
            for asked, answered in said.messages or [alone]:  # (no chat here points)
                yield from ("user", asked, "assistant", answered)
            if said.label and said.task != "count":
                tag = "tracks" if said.task in TRACKS else "points"
                before, after = (part.format(n=len(said.objects)) for part in TASKS[said.task].answer.split("{}"))
                numbers = map(str, range(1, len(said.objects) + 1))
                yield from (f'{before}<{tag} coords="', *numbers, f'">{said.label}</{tag}>{after}')
        yield record.subtitles
    lines = (line for text in chain(pieces, (text for record in records for text in texts(record))) for line in text.split("\n"))
    return islice(filter(None, lines), n)


def main(argv: Sequence[str] | None = None) -> int:
    with command.one_line("data.py"):
        parser = command.Parser(prog="data.py", description="Looks at training data.")
        commands = parser.add_subparsers(dest="command", required=True, parser_class=command.Parser)
        add = lambda name, text: commands.add_parser(name, help=text, description=text)
        checking = add("check", "names every bad line of a JSONL file, prints statistics")
        showing = add("show", "draws the examples of a JSONL file")
        making = add("draw", "writes a synthetic set as a JSONL file")
        texts = add("corpus", "writes texts to learn a vocabulary from, one a line")
        for reading in (checking, showing):
            reading.add_argument("file", metavar="FILE.jsonl")
            reading.add_argument("--checkpoint", default=command.HOME / "assets/tiny", help="the model whose crop settings and tokenizer are used")
            reading.add_argument("--max-frames", type=command.number(int, 1, 10**6), default=16,
                                 help="of a video that are looked at: stage 2 of the tiny preset has 16, stage 3 32")
            reading.add_argument("--image-crops", type=command.number(int, 1, 10**4),
                                 help="of an image, at most (default: the model's own; training of the released presets has 8)")
        checking.add_argument("--max-tokens", type=command.number(int, 1, 10**6), default=1024,
                              help="that a pack holds (default: %(default)s, as in stages 1 and 2 of the tiny preset)")
        checking.add_argument("--max-crops", type=command.number(int, 1, 10**6), default=20, help="that a pack holds (default: %(default)s, as there)")
        showing.add_argument("--n", type=command.number(int, 1, 10**6), default=8, help="so many of the first lines")
        showing.add_argument("--out", type=Path, default=Path("out"), help="folder (default: %(default)s)")
        making.add_argument("set", choices=SETS, metavar="SET", help=", ".join(SETS))
        making.add_argument("out", type=Path, metavar="DIR")
        making.add_argument("--n", type=command.number(int, 1, 10**6), default=8, help="records (default: %(default)s)")
        making.add_argument("--seed", type=command.number(int, 0, 2**32), default=0, help="of the records (default: %(default)s)")
        making.add_argument("--branches", type=command.number(int, 1, 100), default=6, help="annotations a record, at most (default: %(default)s)")
        texts.add_argument("out", type=Path, metavar="FILE.txt")
        texts.add_argument("--n", type=command.number(int, 1, 10**9), default=20_000, help="lines (default: %(default)s)")
        texts.add_argument("--seed", type=command.number(int, 0, 2**32), default=0, help="of the records (default: %(default)s)")
        args = parser.parse_args(argv)
        if args.command == "corpus":
            if args.out.is_dir():
                raise ValueError(f"{args.out}: a folder: give a file")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with command.atomic_write(args.out) as part:  # in bytes: the same line ends everywhere
                part.write_bytes("".join(f"{text}\n" for text in corpus(args.n, args.seed)).encode())
            print(f"wrote {args.out}")
            return 0
        if args.command == "draw":
            print(f"wrote {write_set(args.set, args.out, args.n, args.seed, args.branches)}")
            return 0
        from weights import load  # a later file
        model, tokenizer = load(args.checkpoint)
        views = model.config.views
        config = replace(model.config, views=replace(views, max_frames=args.max_frames, max_crops=args.image_crops or views.max_crops))
        if args.command == "check":
            return 2 if check(args.file, tokenizer, config, args.max_tokens, args.max_crops) else 0
        lines = Lines(args.file)
        args.out.mkdir(parents=True, exist_ok=True)
        for i in range(min(args.n, lines.size)):
            record = lines.record(i, config.views)
            path = args.out / f"{Path(args.file).stem}-{i + 1}.show.png"
            with command.atomic_write(path) as part:
                sheet(record, tokenizer, config).save(part)
            print(f"wrote {path}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
