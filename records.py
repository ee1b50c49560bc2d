"""Records: one schema for all data. A record is pictures and all that is said about them.

One line of a JSONL file is one record, paths are relative to the file:

    {"images": ["desk.jpg"],                      or "video": "street.mp4", or neither for text alone
     "before": ["frame3.jpg", "frame4.jpg"],      of one image that is a frame of a video: the frames before it, oldest first
     "subtitles": "0.0 hello",                    plain text that follows the pictures
     "objects": [{"id": 1,
                  "points": [{"x": 212, "y": 80.5}],                         pixels; + "image": from 1, or "time": seconds
                  "masks": [{"size": [480, 640], "counts": [9, 3, ...]}],    run lengths down the columns, zeros first, or
                                                                             COCO's text; + "image" or "time"
                  "shown": 0.5}],                                            when a video's `point` marks it (else: first seen)
     "id": "desk-1",                              a name for messages (default: file and line)
     "annotations": [{"task": "point", "label": "cups", "objects": [1]},
                     {"task": "point", "label": "pens", "points": [{"x": 9, "y": 8}]},           objects without a name
                     {"task": "count", "label": "ants", "count": 12},                            of what has no objects
                     {"task": "track", "label": "dogs", "objects": [1], "fps": 1},
                     {"task": "track_from", "label": "the dog", "objects": [1], "start": 1.5,    seconds: where it is given; the answer comes after
                      "about": "pets"},                          a kind of question, which evaluate.py lists on its own
                     {"task": "choice", "question": "Which?", "choices": ["a", "b"], "answer": "b"},
                     {"task": "chat", "messages": [{"role": "user", "content": "Hi. What is this?"},
                                                   {"role": "assistant", "content": "My desk."},
                                                   {"role": "user", "content": "Where are the cups?"},
                                                   {"role": "assistant", "task": "point", "label": "cups", "objects": [1]}, ...]}]}

An object that has no point at some moment is out of view then; in a video, if it has points at several moments. Annotations whose
points fall between the sampled frames (far apart in a long video) are left out. `TASKS` names all tasks and what they need.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

import questions
from preprocess import ViewConfig, check_file, read_image, read_video, sample_frames

T = TypeVar("T")
AT_A_FRAME = 0.25  # seconds: what is said about a moment holds for the nearest frame, if it is this close
ROUNDING = 0.005   # seconds: in many files moments have two decimals


# ---------------------------------------------------------------------------------------------------------------------
# 1. Tasks: what each needs, how it is asked for, how it is answered


class Task(NamedTuple):
    needs: str                  # fields that it cannot do without
    wordings: tuple[str, ...]   # of its prompts; with a question of its own an annotation needs none
    answer: str = ""            # around the list of points {}, with their number {n}
    style: str = ""             # put in front of its prompts, if the style is not that of a chat


OPTIONS = ("{question}\n{options}\nAnswer with the letter.", "{question}\n{options}\nWhich option is right?",
           "{question} Choose one:\n{options}")
TASKS = {
    "point": Task("label objects", questions.POINT, "{}"),
    "point_count": Task("label objects", questions.COUNT, "Counting the {} shows a total of {n}."),
    "count_point": Task("label objects", ("How many {label} are there? Point to them.",
                                          "Count the {label}, then point to them."), "There are {n} {}."),
    "count": Task("label", ("How many {label} are there?", "Count the {label}."), "{n}", "only_count"),
    "track": Task("label objects", ("Track the {label}.", "Follow the {label}.", "Track the {label} at {fps} fps.",
                                    "Where {do} the {label} go? Answer at {fps} fps."), "{}"),
    "track_ends": Task("label objects", ("Where {do} the {label} first and last appear?",
                                         "Show the first and the last place of the {label}."), "{}",
                       "video_point_ground_start_end"),
    "track_from": Task("label objects", ("Track {given} at {fps} fps.", "Follow {given} at {fps} fps."), "{}",
                       "video_single_point_track_per_frame"),
    "caption": Task("answer", questions.CAPTION),
    "transcript": Task("answer", ("Describe this {medium} as if you were talking to somebody.",
                                  "What would somebody say who looks at this {medium}?")),
    "qa": Task("question answer", ("{question}",)),
    "short_answer": Task("question answer", ("{question}",), style="short_answer"),
    "choice": Task("question choices answer", OPTIONS),
    "chat": Task("messages", ("{question}",)),
}
TRACKS = ("track", "track_ends", "track_from")
DEFAULT_FPS = 2.0  # of tracks: all frames that are seen


# ---------------------------------------------------------------------------------------------------------------------
# 2. Records: pictures, and who is in them, and what is said


class Runs(NamedTuple):
    """A mask (height, width) as run lengths down its columns, zeros first (COCO's uncompressed form)."""

    size: tuple[int, int]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, mask: np.ndarray) -> "Runs":
        flat = mask.ravel("F").astype(np.int8)
        changes = np.flatnonzero(np.diff(flat, prepend=np.int8(0), append=np.int8(2)))
        return cls(mask.shape, tuple(np.diff(changes, prepend=0).tolist()))

    def mask(self) -> np.ndarray:
        values = np.arange(len(self.counts)) % 2 == 1
        return np.repeat(values, self.counts).reshape(self.size, order="F")

    def holds(self, x: float, y: float) -> bool:
        """Is the pixel at x, y in the mask? Places on the right and lower rim count as the last column and row."""
        height, width = self.size
        pixel = min(int(x), width - 1) * height + min(int(y), height - 1)  # down the columns
        return int(np.searchsorted(np.cumsum(self.counts), pixel, side="right")) % 2 == 1


def compress(counts: Sequence[int]) -> str:
    """COCO's compressed run lengths: numbers in base 32, lowest digits first, a character from "0" on for each, with 32
    added if more follow; from the fourth number on only the difference to the last but one is written."""
    text = ""
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)  # the fifth bit of the last digit is the sign
            text += chr((digit | 32 if more else digit) + 48)
    return text


def decompress(text: str) -> list[int]:
    """The inverse of `compress`; of other texts nonsense."""
    counts, value, shift = [], 0, 0
    for digit in (ord(character) - 48 for character in text):
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            value -= (digit & 16) << (shift - 4)  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


@dataclass
class Object:
    """Somebody or something. Keys are moments: the number of an image from 0, or seconds of a video."""

    points: dict[float, tuple[float, float]]                # x, y in pixels; out of view at moments that are missing
    masks: dict[float, Runs] = field(default_factory=dict)
    shown: float | None = None                              # when a video's `point` marks it; None: its first moment


@dataclass
class Annotation:
    """Something said about the pictures. Which fields count depends on the task, a row of TASKS."""

    task: str
    label: str = ""                                         # what the objects are called in prompt and answer
    objects: list[int] = field(default_factory=list)        # ids; [] if there is none of what is asked for
    count: int | None = None                                # how many, where no object is known
    question: str = ""                                      # in place of the task's own wordings
    answer: str = ""
    choices: list[str] = field(default_factory=list)
    messages: "list[tuple[str, str | Annotation]]" = field(default_factory=list)  # turns of user and assistant, who may point
    fps: float = DEFAULT_FPS                                # of tracks
    start: float | None = None                              # track_from: the moment of the given point; None: the first
    about: str = ""                                         # a word by which evaluation groups its figures; "motion": the label is singular

    @property
    def parts(self) -> "list[Annotation]":
        """Itself, or the turns of its chat that point or count."""
        return [turn for _, turn in self.messages if isinstance(turn, Annotation)] if self.messages else [self]

    @property
    def points_or_counts(self) -> bool:
        """Is the answer points or a number, which follow from the objects? Else it is words."""
        return bool(TASKS[self.task].answer)

    @property
    def by_frame(self) -> bool:
        """What was asked about a video can be asked about each of its frames."""
        return self.points_or_counts and self.count is None and self.task != "track_from"


@dataclass
class Record:
    name: str
    pictures: list[np.ndarray]                              # (H, W, 3) uint8
    times: list[float] | None                               # seconds, if they are the frames of a video
    objects: dict[int, Object]
    annotations: list[Annotation]
    subtitles: str = ""
    before: list[np.ndarray] | None = None                  # of an image that is a frame of a video: the frames before it

    @property
    def medium(self) -> str:
        return "video" if self.times is not None else "image"

    def picture(self, moment: float) -> int:
        """Which picture shows a moment: the nearest frame."""
        return int(moment) if self.times is None else int(np.abs(np.array(self.times) - moment).argmin())

    def by_picture(self) -> dict[int, list[tuple[int, float]]]:
        """Picture -> the objects that have a point or a mask there, each with its moment. ValueError if one comes after the video's end."""
        found: dict[int, list[tuple[int, float]]] = {}
        for identity, thing in self.objects.items():
            for moment in dict.fromkeys((*thing.points, *thing.masks)):
                if self.times and len(self.times) > 1 and moment > self.times[-1] + AT_A_FRAME:  # (of a single frame the end is not known)
                    raise ValueError(f"object {identity}: a {'point' if moment in thing.points else 'mask'} at {moment:g} s, the video ends at "
                                     f"{self.times[-1]:g} s")
                found.setdefault(self.picture(moment), []).append((identity, moment))
        return found

    def check_place(self, identity: int, moment: float, size: tuple[int, int]) -> None:
        """ValueError if an object's point or mask at a moment does not fit a picture of `size` (h, w)."""
        thing, (height, width) = self.objects[identity], size
        if moment in thing.points:
            x, y = thing.points[moment]
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"object {identity}: the point {x:g}, {y:g} is outside the {width} x {height} picture")
        if moment in thing.masks and thing.masks[moment].size != size:
            raise ValueError(f"object {identity}: a mask of size {list(thing.masks[moment].size)} on a picture of {list(size)}")

    def check_moments(self) -> None:
        """ValueError if an object is to be marked, or a track to start, at a moment that the video has not."""
        named = [(f"object {identity}: 'shown'", thing.shown) for identity, thing in self.objects.items()]
        named += [(f"{part.task}: 'start'", part.start) for said in self.annotations for part in said.parts]
        for what, moment in named:
            if self.times and len(self.times) > 1 and moment is not None and not 0 <= moment <= self.times[-1] + AT_A_FRAME:
                raise ValueError(f"{what} is {moment:g}, the video is from 0 to {self.times[-1]:g} s")

    def seen(self, values: dict[float, T]) -> dict[int, T]:
        """Values by moment -> by picture, in order. What lies between the frames is left out, and of several moments at
        one frame the nearest counts. A value holds for the nearest frame, if that is no farther than AT_A_FRAME and than halfway to
        the object's next moment: where a dense track has no moment, its object is out of view."""
        if self.times is None:
            return {int(moment): values[moment] for moment in sorted(values)}
        moments, times = np.array(sorted(values)), np.array(self.times)
        gaps = np.diff(moments, prepend=-np.inf, append=np.inf)
        holds = np.minimum(np.minimum(gaps[1:], gaps[:-1]) / 2 + ROUNDING, AT_A_FRAME)
        nearest = np.searchsorted((times[1:] + times[:-1]) / 2, moments)
        off = np.abs(times[nearest] - moments)
        found = {int(nearest[i]): values[moments[i]] for i in np.argsort(-off, kind="stable") if off[i] <= holds[i]}
        return dict(sorted(found.items()))  # of equal keys the last stayed

    def answerable(self) -> list[Annotation]:
        """Those annotations all of whose objects are in view in some picture."""
        seen = {identity for identity, thing in self.objects.items() if self.seen(thing.points or thing.masks)}
        return [said for said in self.annotations if all(seen.issuperset(part.objects) for part in (said, *said.parts))]

    def moment(self, frame: int, history: int) -> "Record":
        """One frame of a video as an image that has frames before it. What was asked about the video is asked about this
        frame: tracks become points, and what is not in view is not there. Answers in words are left out, and so is
        `track_from`: it means one thing, by a given point, and its label may fit others."""
        here = {}
        for identity, thing in self.objects.items():
            points, masks = self.seen(thing.points), self.seen(thing.masks)
            if frame in points:
                here[identity] = Object({0: points[frame]}, {0: masks[frame]} if frame in masks else {})
        said = [replace(one, objects=[i for i in one.objects if i in here], task="point" if one.task in TRACKS else one.task,
                        question="" if one.task in TRACKS else one.question.replace("this video", "this image"))
                for one in self.annotations if one.by_frame]
        return Record(f"{self.name}, frame {frame}", [self.pictures[frame]], None, here, said,
                      before=self.pictures[max(frame - history, 0):frame])

    def limited(self, config: ViewConfig) -> "Record":
        """With no more frames than the model looks at, and without what is said of things that these do not show. Changes the record."""
        if self.times is not None and len(self.times) > config.max_frames:
            kept = sample_frames(self.times, config.fps, config.max_frames)
            self.pictures, self.times = [self.pictures[i] for i in kept], [self.times[i] for i in kept]
            self.annotations = self.answerable()
        return self


# ---------------------------------------------------------------------------------------------------------------------
# 3. JSONL

REQUIRED = object()
LARGEST = 10**9  # any number is smaller
NAMES = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object in braces"}


def take(values: dict, key: str, kind: type, default=REQUIRED):
    """values[key], which must be of this kind. ValueError says what it is instead."""
    value = values.get(key, default)
    if value is REQUIRED:
        raise ValueError(f"{key!r} is missing")
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if value is not default and (not fits or value != value):
        raise ValueError(f"{key!r} is {str(value)[:40]!r}, not {NAMES[kind]}")
    if isinstance(value, (int, float)) and not abs(value) < LARGEST:
        raise ValueError(f"{key!r} is {str(value)[:40]!r}: numbers are below {LARGEST:,}")
    return value


def each(values: dict, key: str, kind: type, default=REQUIRED) -> list:
    """values[key], a list all of whose members are of this kind."""
    return [take({key: one}, key, kind) for one in take(values, key, list, default)]


def only(values: dict, *keys: str) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{str(values)[:40]!r} is not an object in braces")
    if unknown := sorted(set(values) - set(keys)):
        raise ValueError(f"unknown key {unknown[0]!r}: known are {', '.join(keys)}")
    return values


@dataclass
class Line:
    """A line of a file, its pictures not yet read."""

    record: Record
    images: list[Path]
    video: Path | None
    before: list[Path] | None = None

    def check_files(self) -> None:
        """MediaError if one of the files is not there or empty."""
        for path in (*self.images, *(self.before or ()), *filter(None, [self.video])):
            check_file(path)

    def load(self, config: ViewConfig) -> Record:
        """Reads the pictures. MediaError or ValueError if they cannot be read or do not fit what is said about them."""
        record = self.record
        if self.video:
            record.pictures, record.times = read_video(self.video, config.fps, config.max_frames)
        else:
            record.pictures = [read_image(path) for path in self.images]
            record.before = None if self.before is None else [read_image(path) for path in self.before]
            for path, picture in zip(self.before or [], record.before or []):
                if picture.shape != record.pictures[0].shape:
                    raise ValueError(f"{path}: {picture.shape[1]}x{picture.shape[0]}, the frame after it is "
                                     f"{record.pictures[0].shape[1]}x{record.pictures[0].shape[0]}")
        for number, here in record.by_picture().items():
            for identity, moment in here:
                record.check_place(identity, moment, record.pictures[number].shape[:2])
        record.check_moments()
        record.annotations = record.answerable()
        if not record.annotations:
            raise ValueError(f"none of the {len(record.pictures)} frames looked at is within {AT_A_FRAME} s of the points: give more "
                             "of them, or a shorter video")
        return record


def parse(text: str, name: str, folder: Path, pointless: bool = False) -> Line:
    """A line of JSON -> a record. ValueError says what is wrong with it. `pointless`: masks will do in place of points."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("brackets in brackets in brackets") from None
    values = only(values, "id", "images", "video", "before", "subtitles", "objects", "annotations")
    if "images" in values and "video" in values:
        raise ValueError("'images' and 'video': give one of them")
    images = [folder / path for path in each(values, "images", str, [])]
    video = folder / take(values, "video", str) if "video" in values else None
    before = [folder / path for path in each(values, "before", str)] if "before" in values else None
    if before is not None and len(images) != 1:
        raise ValueError(f"'before' goes with one image, not with {len(images) or 'none'}")
    moment = lambda place: _moment(place, len(images), video is not None)
    objects: dict[int, Object] = {}
    for listed in take(values, "objects", list, []):
        identity = take(only(listed, "id", "points", "masks", "shown"), "id", int)
        if identity in objects:
            raise ValueError(f"two objects have the id {identity}")
        objects[identity] = _object(listed, moment, video is not None, pointless)
    named = frozenset(objects)
    annotations = [_annotation(said, objects, named, moment, video is not None) for said in take(values, "annotations", list)]
    if not annotations:
        raise ValueError("'annotations' is empty")
    record = Record(str(values.get("id", name)), [], None, objects, annotations, take(values, "subtitles", str, ""))
    return Line(record, images, video, before)


def _object(listed: dict, moment: Callable[[dict], float], video: bool, pointless: bool) -> Object:
    """One of the record's objects. ValueError if it cannot be found, or is twice at one moment."""
    name = f"object {listed['id']}"
    places = take(listed, "points", list, [] if pointless and listed.get("masks") else REQUIRED)
    points = {moment(place): _xy(place) for place in places}
    if len(points) < len(places) or not video and len(points) > 1:
        raise ValueError(f"{name} has two points {'at one moment' if video else 'in images'}: give each thing an id of its own")
    pieces = take(listed, "masks", list, [])
    masks = {moment(place): runs_of(place) for place in pieces}
    if len(masks) < len(pieces):
        raise ValueError(f"{name} has two masks at one moment: join them")
    if pointless and not video and len(masks) > 1:
        raise ValueError(f"{name} has masks in two images: give each thing an id of its own")
    if not points and not (pointless and masks):
        raise ValueError(f"{name} has no points")
    return Object(points, masks, take(listed, "shown", float, None))


def _moment(place: dict, images: int, video: bool) -> float:
    only(place, "x", "y", "size", "counts", "time" if video else "image")
    if video:
        if take(place, "time", float) < 0:
            raise ValueError(f"'time' is {place['time']}, before the video")
        return float(place["time"])
    number = take(place, "image", int, 1 if images == 1 else REQUIRED)
    if not 1 <= number <= images:
        raise ValueError(f"'image' is {number} of {images}")
    return number - 1


def _xy(place: dict) -> tuple[float, float]:
    return float(take(place, "x", float)), float(take(place, "y", float))


def runs_of(place: dict) -> Runs:
    """Run lengths as JSON has them, compressed or not. ValueError if they do not fit the size."""
    size, counts = each(place, "size", int), place.get("counts")
    numbers = each(place | {"counts": decompress(counts)} if isinstance(counts, str) else place, "counts", int)
    if len(size) != 2 or min(numbers, default=0) < 0 or sum(numbers) != size[0] * size[1]:
        raise ValueError(f"a mask's 'counts' add up to {sum(numbers)}, its 'size' is {size}")
    return Runs(tuple(size), tuple(numbers))


def _annotation(said: dict, objects: dict[int, Object], named: frozenset[int], moment: Callable[[dict], float],
                video: bool) -> Annotation:
    """One annotation. It may name the objects `named`; each of its own `points` becomes a new one in `objects`."""
    only(said, "task", "label", "objects", "points", "count", "question", "answer", "choices", "messages", "fps", "start",
         "about")
    if (task := take(said, "task", str)) not in TASKS:
        raise ValueError(f"'task' is {task!r}: known are {', '.join(TASKS)}")
    made = Annotation(task, label=take(said, "label", str, ""), objects=each(said, "objects", int, []), count=take(said, "count", int, None),
                      question=take(said, "question", str, ""), answer=take(said, "answer", str, ""), choices=each(said, "choices", str, []),
                      fps=take(said, "fps", float, DEFAULT_FPS), start=take(said, "start", float, None), about=take(said, "about", str, ""))
    if unknown := [one for one in made.objects if one not in named]:
        raise ValueError(f"{task}: there is no object with id {unknown[0]}")
    if len(set(made.objects)) < len(made.objects):
        raise ValueError(f"{task}: an object is named twice")
    places = take(said, "points", list, [])
    if places and task in TRACKS:
        raise ValueError(f"{task}: each of 'points' would be another object: give 'objects' by id, each with its points through time")
    for place in places:
        identity = max(objects, default=0) + 1
        objects[identity] = Object({moment(place): _xy(place)})
        made.objects.append(identity)
    made.messages = _messages(said, lambda turn: _annotation(turn, objects, named, moment, video))
    _check(made, "objects" in said or "points" in said, video)
    return made


def _messages(said: dict, annotation: Callable[[dict], Annotation]) -> list[tuple[str, str | Annotation]]:
    """The turns of a chat in pairs: what the user says, and what the assistant answers."""
    turns = [(take(m if isinstance(m, dict) else only(m), "role", str), _turn(m, annotation)) for m in take(said, "messages", list, [])]
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("'messages' must go from user to assistant and end with the assistant")
    return [(asked, answered) for (_, asked), (_, answered) in zip(turns[::2], turns[1::2])]


def _check(made: Annotation, lists_objects: bool, video: bool) -> None:
    """ValueError if the task lacks a field that it needs, or has one that it cannot have."""
    task, needs = made.task, TASKS[made.task].needs.split()
    if made.count is not None and (task != "count" or made.count < 0 or made.objects):
        raise ValueError(f"'count' {made.count}: only the task count has one, of 0 or more, where no objects are given")
    if made.messages and task != "chat":
        raise ValueError(f"{task}: 'messages' are for the task chat")
    for need in needs:
        value = getattr(made, need)
        if not (value.strip() if isinstance(value, str) else value) and not (need == "objects" and lists_objects):  # [] says that there are none
            raise ValueError(f"{task} needs {need!r}")
    if task == "count" and made.count is None and not lists_objects:
        raise ValueError("count needs 'count', or 'objects'")
    if made.choices and "choices" not in needs:
        raise ValueError(f"{task}: 'choices' go with the task choice")
    if len(set(made.choices)) < len(made.choices) or len(made.choices) > 26:
        raise ValueError("the choices must differ, and be 26 at most")
    if made.choices and made.answer not in made.choices:
        raise ValueError(f"the answer {made.answer!r} is none of the choices")
    if re.search("[<>]", made.label):
        raise ValueError(f"the label {made.label!r} holds < or >, which end a list of points")
    if task in TRACKS and not video:
        raise ValueError(f"{task} needs a video")
    if task == "track_from" and len(made.objects) != 1:
        raise ValueError("track_from needs one object to start from")
    if made.start is not None and task != "track_from":
        raise ValueError(f"{task}: 'start' goes with track_from")
    if made.fps != DEFAULT_FPS and task not in ("track", "track_from"):
        raise ValueError(f"{task}: 'fps' goes with track and track_from")
    if not 0.01 <= made.fps <= 60:
        raise ValueError(f"'fps' is {made.fps:g}, not from 0.01 to 60")


def _turn(message: dict, annotation: Callable[[dict], Annotation]) -> str | Annotation:
    """What one side of a chat says: words, or what the assistant points at or counts."""
    if "task" not in message:
        return take(only(message, "role", "content"), "content", str)
    task = take(message, "task", str)
    if message["role"] != "assistant" or task in TASKS and not TASKS[task].answer:
        raise ValueError(f"a turn of a chat with the task {task}: words are 'content', and only the assistant points or counts")
    only(message, "role", "task", "label", "objects", "points", "count", "fps", "start")
    return annotation({key: value for key, value in message.items() if key != "role"})


def _written(said: Annotation) -> dict:
    written = {key: value for key, value in vars(said).items() if value not in ("", [], None) or key == "objects"}
    if not said.points_or_counts and not said.objects:
        written.pop("objects")  # (what is answered in words may have some, too)
    if said.task not in TRACKS:
        written.pop("fps")
    if said.messages:
        side = lambda role, turn: {"role": role} | (_written(turn) if isinstance(turn, Annotation) else {"content": turn})
        written["messages"] = [side(role, turn) for turns in said.messages for role, turn in zip(("user", "assistant"), turns)]
    return written


def dump(record: Record, images: Sequence[str] = (), video: str | None = None, before: Sequence[str] | None = None) -> str:
    """A record as a line of JSON, with the names of its files: the inverse of `parse`."""
    place = (lambda moment: {"time": moment}) if video else lambda moment: {"image": int(moment) + 1}
    objects = []
    for identity, thing in record.objects.items():
        points = [place(moment) | {"x": round(x, 2), "y": round(y, 2)} for moment, (x, y) in thing.points.items()]
        masks = [place(moment) | {"size": list(runs.size), "counts": list(runs.counts)} for moment, runs in thing.masks.items()]
        objects.append({"id": identity, "points": points} | ({"masks": masks} if masks else {})
                       | ({} if thing.shown is None else {"shown": thing.shown}))
    media = {"video": video} if video else {"images": list(images)} if images else {}
    extra = ({} if before is None else {"before": list(before)}) | ({"subtitles": record.subtitles} if record.subtitles else {})
    seen = {"objects": objects} if objects else {}
    return json.dumps({"id": record.name} | media | extra | seen | {"annotations": [_written(said) for said in record.annotations]})


class Lines:
    """A JSONL file. Lines are found by their place in it and parsed when they are asked for. ValueError, with the file's
    name, if there are none."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.at = Path(path), []
        try:
            with open(path, "rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self.at.append((number, start, len(line)))
                    start += len(line)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if not self.at:
            raise ValueError(f"{path}: holds no lines")
        self.size = len(self.at)

    def where(self, index: int) -> str:
        """File and line, for messages."""
        return f"{self.path}:{self.at[index][0]}"

    def line(self, index: int, config: ViewConfig | None = None, pointless: bool = False) -> Line:
        """The line; with a config its pictures are read. ValueError that begins with file and line."""
        number, start, length = self.at[index]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                text = file.read(length)
            line = parse(text.decode("utf-8-sig"), f"{self.path.stem}-{number}", self.path.parent, pointless)
            line.load(config) if config else line.check_files()
            return line
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.where(index)}: {error}") from None

    def record(self, index: int, config: ViewConfig) -> Record:
        return self.line(index, config).record
