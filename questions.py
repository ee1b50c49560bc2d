"""What can be asked about a drawn scene, with answers that are true because the scene's truth is exact.

    scene --_query, a mixture of ways to ask--> Query: the question, and the things it means or an answer in words

A label is a noun phrase ("red cups", "leftmost star"); the things it means are found in the scene's list and masks, never in the
picture. Some of the questions are about what is not there. Everything is a pure function of a scene and a generator.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from synthetic import COLORS, KINDS, PLURALS, Scene

# {is} agrees with the label. Labels are plural, except those that name one thing ("largest cup", "leftmost star").
POINT = ("Point to the {label}.", "point to the {label}", "Where {is} the {label}?", "Show me the {label}.",
         "Find the {label}.", "Mark the {label}.", "Can you point at the {label}?")
COUNT = ("How many {label} are there?", "Count the {label}.", "how many {label}",
         "How many {label} are in this {medium}?", "What is the number of {label}?")
CAPTION = ("Describe this {medium}.", "What is in this {medium}?", "Write a caption for this {medium}.")
LARGEST, SMALLEST = ("largest", "biggest"), ("smallest",)
SIDES = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}  # axis, sign: least first
NONE = "There are none."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass
class Query:
    task: str           # "point", "point_count", "count", "count_point", "track", "track_ends", "track_from": the points are
    #                     the answer; "caption", "transcript", "qa", "choice": words are
    question: str       # what the user says; "" leaves the wording to whoever asks
    label: str          # where points are asked for: the noun phrase, "red cups"; else ""
    targets: list[int]  # indices of the things meant; [] if there is none ("There are none.")
    answer: str         # in words; "" where points are the answer
    about: str          # how the targets were picked: "kind", "color", "color+kind", "all", "size", "position", "motion",
    #                     "moving", "direction", "given", "none"; on screens "name", "use", "place", "sort", "none"; for words:
    #                     "caption", "color-of", "kind-of", "exists", "colors", "subtitle", "words"; on screens "read", "exists", "beside"
    choices: list[str] = field(default_factory=list)  # "choice": what to choose from


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _medium(scene: Scene) -> str:
    return "video" if scene.is_video else "image"


def _phrases(scene: Scene) -> list[str]:
    """A phrase for every thing, in the order of names, those that look alike one after the other. (Not "blue balls": whether
    there is more than one would have to be known before the first word.)"""
    return [_article(name) for name in sorted(thing.name for thing in scene.things)]


def _listed(parts: list[str]) -> str:
    """"A, b and c"."""
    *parts, last = parts
    listed = " and ".join(filter(None, (", ".join(parts), last)))
    return listed[0].upper() + listed[1:]


def describe(scene: Scene) -> str:
    """The caption: "A blue ball, a blue ball, a green star and a red cup on a striped background." """
    return f"{_listed(_phrases(scene))} on {_article(scene.background)} background."


def talk(scene: Scene, rng: np.random.Generator) -> str:
    """What somebody might say who looks at the scene: the caption's facts, spoken."""
    said = [str(rng.choice(["So", "Okay, so", "Well,"])) + f" this {_medium(scene)} has {_article(scene.background)} background."]
    said += [str(rng.choice(["I see", "There we have, uh,", "And then", "Um, I can see"])) + f" {phrase}." for phrase in _phrases(scene)]
    return " ".join([*said, str(rng.choice(["And that's it.", "That is all I see."]))])


def _match(scene: Scene, kind: str = "", color: str = "") -> list[int]:
    """Things of this kind and colour; "" matches all."""
    return [i for i, thing in enumerate(scene.things) if kind in ("", thing.kind) and color in ("", thing.color)]


def _plural(kind: str, color: str) -> str:
    return f"{color} {PLURALS.get(kind, 'things')}".strip()


def _absent(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A (kind, colour) that is not in the scene, but nearly: mostly the right kind in a wrong colour. The colour may
    be "": a kind that is not there at all."""
    thing, near = scene.things[rng.integers(len(scene.things))], rng.random()
    missing = [kind for kind in KINDS if not _match(scene, kind)]
    if near < 0.55 or not missing:
        others = [(thing.kind, color) for color in COLORS if not _match(scene, thing.kind, color)]
    elif near < 0.8:
        others = [(kind, thing.color) for kind in KINDS if not _match(scene, kind, thing.color)]
    else:
        others = [(kind, "") for kind in missing]
    return others[rng.integers(len(others))]


def _pick(scene: Scene, rng: np.random.Generator, about: str) -> tuple[str, list[int]]:
    """Label and targets by kind, colour or both of a random thing of the scene, or of all or of none."""
    thing = scene.things[rng.integers(len(scene.things))]
    kind, color = _absent(scene, rng) if about == "none" else {
        "kind": (thing.kind, ""), "color": ("", thing.color), "color+kind": (thing.kind, thing.color), "all": ("", "")}[about]
    return _plural(kind, color), _match(scene, kind, color)


def _ask(scene: Scene, rng: np.random.Generator, task: str, about: str, label: str, targets: list[int]) -> Query:
    if task not in ("point", "point_count"):
        return Query(task, "", label, targets, "", about)
    template = str(rng.choice(POINT if task == "point" else COUNT))
    verb = "is" if about in ("size", "position") else "are"
    question = template.format(label=label, medium=_medium(scene), **{"is": verb})
    return Query(task, question, label, targets, "", about)


def _outermost(scene: Scene, group: list[int], side: str) -> int | None:
    """The thing of the group that lies farthest to a side by the middle of what shows of it, if at every moment it leads all others in
    view by 12% of the picture, and each of them is in view with it at some moment; else None. (Not by its point, which for one kind is
    at the top and for another at the bottom.)"""
    if len(group) < 2:
        return None
    axis, sign = SIDES[side]
    shown = scene.masks[:, group].any(2 + axis)  # (F, n, columns for x or rows for y)
    middle = (shown.argmax(-1) + shown.shape[-1] - 1 - shown[..., ::-1].argmax(-1)) / 2
    place = np.where(np.isfinite(scene.points[:, group, 0]), sign * middle, np.nan)
    lead = place[:, None] - place[:, :, None]  # (F, n, n): of each over each
    far = (~(lead < 0.12 * shown.shape[-1])).all(0) & np.isfinite(lead).any(0)
    return next((i for i, ahead in zip(group, far | np.eye(len(group), dtype=bool)) if ahead.all()), None)


def _extreme(scene: Scene, group: list[int], word: str) -> int | None:
    """The largest or smallest thing of the group, if its size differs from the next one's by a factor of 1.35 and the area that
    shows of it (in a clip, when most of it shows) is the largest or smallest, too; else None."""
    order = sorted(group, key=lambda i: scene.things[i].size, reverse=word in LARGEST)
    sizes, areas = [scene.things[i].size for i in order[:2]], {i: scene.masks[:, i].sum((1, 2)).max() for i in group}
    if len(order) < 2 or max(sizes) < 1.35 * min(sizes):
        return None
    foremost = max if word in LARGEST else min  # a star has less area than a ball of its size
    return order[0] if foremost(order, key=areas.get) == order[0] else None


def choose(rng: np.random.Generator, options: Sequence):
    """One of the options, or None if there is none."""
    return options[rng.integers(len(options))] if options else None


def _ask_one(scene: Scene, rng: np.random.Generator, task: str, about: str) -> Query | None:
    """A query for one thing by its size or its position among its kind or among all; None if all are unclear."""
    words, find = (LARGEST + SMALLEST, _extreme) if about == "size" else (tuple(SIDES), _outermost)
    kinds = [""] + sorted({thing.kind for thing in scene.things})
    found = [(f"{word} {kind or 'thing'}", find(scene, _match(scene, kind), word)) for kind in kinds for word in words]
    chosen = choose(rng, [(label, target) for label, target in found if target is not None])
    return chosen and _ask(scene, rng, task, about, chosen[0], [chosen[1]])


def _ask_qa(scene: Scene, rng: np.random.Generator) -> Query | None:
    """A short question with an answer in words; None if the scene has no unique answer of the drawn sort."""
    about = str(rng.choice(["color-of", "kind-of", "exists"]))
    things = scene.things
    if about == "exists":
        thing = things[rng.integers(len(things))]
        kind, color = (thing.kind, thing.color) if rng.random() < 0.5 else _absent(scene, rng)
        targets, name = _match(scene, kind, color), f"{color} {kind}".strip()
        return Query("qa", f"Is there {_article(name)}?", "", targets, "Yes." if targets else "No.", about)
    if about == "color-of":
        found = [(f"What color is the {thing.kind}?", i, thing.color) for i, thing in enumerate(things)
                 if _match(scene, thing.kind) == [i]]
    else:
        found = [(f"What is the {thing.color} thing?", i, thing.name) for i, thing in enumerate(things)
                 if _match(scene, color=thing.color) == [i]]
        outermost = {side: _outermost(scene, _match(scene), side) for side in SIDES}
        found += [(f"What is the {side} thing?", i, things[i].name) for side, i in outermost.items() if i is not None]
    chosen = choose(rng, found)
    return chosen and Query("qa", chosen[0], "", [chosen[1]], chosen[2], about)


def _ask_colors(scene: Scene) -> Query:
    """A longer answer: all colours of things, in the order of captions."""
    answer = _listed(sorted({thing.color for thing in scene.things}))
    return Query("qa", "Which colors do the things have?", "", _match(scene), f"{answer}.", "colors")


def _ask_choice(scene: Scene, rng: np.random.Generator) -> Query | None:
    """A question about a colour or a kind, with three wrong answers that are words of the same sort."""
    asked = _ask_qa(scene, rng)
    if asked is None or asked.about == "exists":
        return None
    if asked.about == "color-of":
        wrong = [color for color in COLORS if color != asked.answer]
    else:
        color = asked.answer.split()[0]
        wrong = [f"{color} {kind}" for kind in KINDS if f"{color} {kind}" != asked.answer]
    choices = [asked.answer, *map(str, rng.choice(wrong, 3, replace=False))]
    return replace(asked, task="choice", choices=[choices[i] for i in rng.permutation(4)])


DIRECTIONS = {"moves left": (0, -1), "moves right": (0, 1), "moves up": (1, -1), "moves down": (1, 1)}  # axis, sign
MOTIONS = ("rests", *DIRECTIONS)
DEEDS = [("moving", "rest", ("rests",)), ("moving", "move", tuple(DIRECTIONS)),
         *(("direction", word.replace("moves", "move"), (word,)) for word in DIRECTIONS)]  # of several things, and the motions that they mean


def _ways(scene: Scene) -> list[np.ndarray]:
    """Where each thing of a clip is at the moments at which it is in view: (moments, 2)."""
    seen = np.isfinite(scene.points)  # the point of a thing at rest moves, too, when something passes before it
    places = scene.points if scene.centers is None else np.where(seen, scene.centers, np.nan)
    return [way[np.isfinite(way[:, 0])] for way in places.transpose(1, 0, 2)]


def _far(scene: Scene) -> float:
    """How far a thing must get, in pixels, for its motion to be clear: a quarter of the shorter side; in a scene shorter than 1.5
    seconds, a sixth of that side per second."""
    return min(0.25, (scene.times[-1] - scene.times[0]) / 6) * min(scene.frames.shape[1:3])


def _reach(way: np.ndarray, word: str) -> float:
    """The longest way that a thing goes in a direction from any moment to a later one."""
    axis, sign = DIRECTIONS[word]
    along = sign * way[:, axis]
    return (along - np.minimum.accumulate(along)).max(initial=0)


def motions(scene: Scene) -> list[tuple[str, ...]]:
    """What each thing of a clip may be said to do from its first to its last moment in view, of MOTIONS: one word if that is
    clear, several if each of them could be meant, none if it is never in view."""
    far = _far(scene)
    return [_motion_words(way, far, len(scene.times)) for way in _ways(scene)]


def _motion_words(way: np.ndarray, far: float, frames: int) -> tuple[str, ...]:
    """The same of one thing, from its places in view (moments, 2). What moves gets `far`; what rests stays within a fifth of it."""
    if not len(way):
        return ()
    dx, dy = way[-1] - way[0]
    along = {"moves right" if dx > 0 else "moves left": abs(dx), "moves down" if dy > 0 else "moves up": abs(dy)}
    main, least = max(along, key=along.get), min(along.values())
    if np.abs(way - way[0]).max() < far / 5 and len(way) > 0.6 * frames:
        return ("rests",)
    if along[main] > max(far, 1.5 * least):
        return (main,)
    may = [word for word, reach in along.items() if reach > far / 5] + (["rests"] if along[main] < far else [])
    return tuple(may) if len(may) > 1 else MOTIONS


def _ask_motion(scene: Scene, rng: np.random.Generator, task: str) -> Query | None:
    """A query that tells one thing from the others of its kind by how it moves: "cup that moves left". It must be clear what each
    of the others does; none of them goes far in that direction, not even for a while; and the thing itself does not go far back."""
    may, ways, far, found = motions(scene), _ways(scene), _far(scene), []
    for kind in ("", *sorted({thing.kind for thing in scene.things})):
        group = _match(scene, kind)
        for word in MOTIONS:
            meant = [i for i in group if may[i] == (word,)]
            others = [i for i in group if i not in meant]
            clear = len(meant) == 1 and others and all(len(may[i]) == 1 for i in others)
            if clear and word in DIRECTIONS:
                clear = _reach(-ways[meant[0]], word) < far and all(_reach(ways[i], word) < far for i in others)
            if clear:
                found.append((f"{kind or 'thing'} that {word}", meant))
    chosen = choose(rng, sorted(found))
    return chosen and _ask(scene, rng, task, "motion", *chosen)


def deeds(scene: Scene, rng: np.random.Generator, n: int) -> list[Query]:
    """Up to n queries, each for those of a kind that clearly do something which the others of it clearly do not: "things that rest",
    "cups that move left"."""
    may, found = motions(scene), []
    for kind in ("", *sorted({thing.kind for thing in scene.things})):
        group = [i for i in _match(scene, kind) if may[i]]  # without what is never in view
        for about, deed, words in DEEDS:
            meant = [i for i in group if set(may[i]) <= set(words)]
            if meant and len(meant) < len(group) and all(set(may[i]).isdisjoint(words) for i in group if i not in meant):
                found.append((about, f"{_plural(kind, '')} that {deed}", meant))
    return [_ask(scene, rng, "point", *found[i]) for i in rng.permutation(len(found))[:n]]


def mixed_up(scene: Scene, targets: list[int]) -> bool:
    """Whether the frames leave open which is which of one of the targets and something that looks just like it: both have been seen, are
    both out of view in a frame, and one of them is seen again; or one is seen for the first time while the other is out of view."""
    seen = np.isfinite(scene.points[..., 0])
    before, after = np.logical_or.accumulate(seen), np.logical_or.accumulate(seen[::-1])[::-1]
    gone, first = before & ~seen, seen & (np.cumsum(seen, axis=0) == 1)
    unclear = lambda i, j: (gone[:, i] & gone[:, j] & (after[:, i] | after[:, j]) | first[:, i] & gone[:, j] | gone[:, i] & first[:, j]).any()
    names = [thing.name for thing in scene.things]
    return any(name == names[i] and j != i and unclear(i, j) for i in targets for j, name in enumerate(names))


def subtitles(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Query]]:
    """Somebody names a thing now and then: a text of lines "seconds words", and questions that only it answers."""
    moments = rng.choice(len(scene.times), min(3, len(scene.times)), replace=False)
    said = {f"{scene.times[frame]:.1f}": f"I like the {scene.things[rng.integers(len(scene.things))].name}."
            for frame in sorted(moments)}
    asked = [Query("qa", f"What is said at {time}?", "", [], words, "subtitle") for time, words in said.items()]
    return "".join(f"\n{time} {words}" for time, words in said.items()), asked


def words(rng: np.random.Generator) -> Query:
    """A question that needs no picture."""
    n, kind, color = int(rng.integers(1, 10)), str(rng.choice(KINDS)), str(rng.choice(list(COLORS)))
    question, answer = [
        (f"What comes after {NUMBERS[n]}?", f"{NUMBERS[n + 1].capitalize()}."),
        (f"What comes before {NUMBERS[n]}?", f"{NUMBERS[n - 1].capitalize()}."),
        (f"What is the plural of {kind}?", f"{PLURALS[kind].capitalize()}."),
        (f"Is {color} a color?", "Yes."), (f"Is {kind} a color?", "No."),
    ][rng.integers(5)]
    return Query("qa", question, "", [], answer, "words")


# What is asked, and how often.
MIXTURE = {("point", "kind"): 20, ("point", "color+kind"): 20, ("point", "color"): 8, ("point", "all"): 3,
           ("point", "size"): 4, ("point", "position"): 6, ("point", "none"): 16,
           ("point_count", "kind"): 5, ("point_count", "color+kind"): 5, ("point_count", "color"): 4, ("point_count", "none"): 6,
           ("caption", ""): 3, ("qa", ""): 8}
CAPTIONS = {("caption", ""): 3, ("transcript", ""): 2, ("qa", "colors"): 2}
ANSWERS = {("qa", ""): 6, ("choice", ""): 4, ("count", "kind"): 1, ("count", "color+kind"): 1, ("count", "none"): 0.5}
POINTING = {key: share for key, share in MIXTURE.items() if key[0].startswith("point")} | {
    ("count_point", "kind"): 3, ("count_point", "color+kind"): 3, ("count_point", "none"): 1}
# For several pictures, and for one moment of a clip: there "the largest" and "the leftmost" could mean another one in each.
EVERYWHERE = {key: share for key, share in POINTING.items() if key[1] not in ("size", "position")}
FREE = {("point", "kind"): 10, ("point", "color+kind"): 10, ("point", "color"): 4, ("point", "all"): 3, ("point", "size"): 5,
        ("point", "position"): 6, ("point", "both"): 7, ("point", "none"): 7, ("point", "strange"): 8,
        ("point_count", "kind"): 4, ("point_count", "color+kind"): 4, ("point_count", "all"): 1, ("point_count", "both"): 2, ("point_count", "none"): 3,
        ("point_count", "strange"): 2, ("count", "kind"): 1, ("count", "color+kind"): 1, ("count", "none"): 1, ("count", "strange"): 1,
        ("caption", ""): 6, ("qa", ""): 7, ("qa", "strange"): 3}
FREE_TRACKING = {("track", "kind"): 9, ("track", "color+kind"): 11, ("track", "size"): 1, ("track", "position"): 1, ("track", "none"): 3,
                 ("track", "strange"): 3}
TRACKING = {("track", "kind"): 6, ("track", "color+kind"): 6, ("track", "all"): 1, ("track", "motion"): 5, ("track", "none"): 2,
            ("track_ends", "kind"): 2, ("track_ends", "color+kind"): 2, ("track_ends", "motion"): 1, ("track_from", "given"): 3}

WAYS = {about for mixture in (MIXTURE, CAPTIONS, ANSWERS, POINTING, TRACKING, FREE) for _, about in mixture}


def _query(scene: Scene, rng: np.random.Generator, more: dict[str, float], mixture: dict[tuple[str, str], float]) -> Query | None:
    """One query drawn from a mixture; None if this scene has no clear answer to it."""
    weights = np.array([share * more.get(about, 1) for (_, about), share in mixture.items()])
    task, about = list(mixture)[rng.choice(len(mixture), p=weights / weights.sum())]
    if about == "strange":
        return _ask_strange(scene, rng, task)
    if about == "both":
        return _ask_both(scene, rng, task)
    if task == "caption":
        question = str(rng.choice(CAPTION)).format(medium=_medium(scene))
        return Query("caption", question, "", _match(scene), describe(scene), "caption")
    if task == "transcript":
        return Query("transcript", "", "", _match(scene), talk(scene, rng), "caption")
    if task == "qa":
        return _ask_colors(scene) if about == "colors" else _ask_qa(scene, rng)
    if task == "choice":
        return _ask_choice(scene, rng)
    if task == "track_from":
        thing = int(rng.integers(len(scene.things)))
        return Query(task, "", scene.things[thing].name, [thing], "", "given")
    if about == "motion":
        return _ask_motion(scene, rng, task)
    if about in ("size", "position"):
        return _ask_one(scene, rng, task, about)
    return _ask(scene, rng, task, about, *_pick(scene, rng, about))


def queries(scene: Scene, rng: np.random.Generator, n: int, more: dict[str, float] = {},
            mixture: dict[tuple[str, str], float] = MIXTURE) -> list[Query]:
    """n queries about one scene, nothing asked twice (fewer if the scene has no more: a hundred draws find none new).
    `more` multiplies the shares of some ways of asking: {"none": 0.5} asks half as often about what is not there."""
    found: dict[tuple[str, str], Query] = {}
    misses = 0
    while len(found) < n and misses < 100:
        query = _query(scene, rng, more, mixture)
        key = query and (query.task, query.label or query.question)
        if query is None or key in found or query.task.startswith("track") and mixed_up(scene, query.targets):
            misses += 1
        else:
            found[key], misses = query, 0
    return list(found.values())


# ---------------------------------------------------------------------------------------------------------------------
# In other words: as people ask who have not read the list above

# {x} is a noun phrase, one or several, with which {is} and {do} agree; {name} "a red cup", {names} "red cups", {this} "the picture".
# What ends in a full stop is a command, before which POLITE may stand.
FREE_WORDS = {
    "point": ("point to {x}.", "point at {x}.", "point out {x}.", "find {x}.", "locate {x}.", "show me {x}.", "show {x}.", "mark {x}.", "label {x}.",
              "tag {x}.", "highlight {x}.", "select {x}.", "pick {x}.", "click on {x}.", "touch {x}.", "segment {x}.", "identify {x}.", "detect {x}.",
              "indicate {x}.", "look for {x}.", "put a dot on {x}.", "tell me where {x} {is}.", "give me the position of {x}.", "where {is} {x}?",
              "where can I find {x}?", "where do you see {x}?", "do you know where {x} {is}?", "I am looking for {x}!", "I need {x}!", "{x}!", "{names}!"),
    "count": ("count {names}.", "count the {names}.", "count all {names}.", "tell me how many {names} there are.", "give me the number of {names}.",
              "how many {names} are there?", "how many {names}?", "how many {names} do you see?", "how many {names} can you see?",
              "how many {names} are visible?", "how many {names} does it show?", "what is the number of {names}?", "number of {names}!"),
    "click": ("click on {x}.", "click {x}.", "tap {x}.", "tap on {x}.", "press {x}.", "hit {x}.", "select {x}.", "choose {x}.", "go to {x}.", "use {x}.",
              "point to {x}.", "find {x}.", "show me {x}.", "where is {x}?", "I need {x}!", "{x}!"),
    "track": ("track {x}.", "follow {x}.", "trace {x}.", "keep an eye on {x}.", "watch {x}.", "show me the way of {x}.", "track the way of {x}.",
              "where {do} {x} go?", "how {do} {x} move?"),
    "exists": ("is there {name}?", "do you see {name}?", "can you see {name}?", "does it show {name}?", "is {name} visible?", "can you find {name}?",
               "are there any {names}?", "are there {names}?", "do you see any {names}?", "any {names}?", "I wonder if there is {name}."),
    "color-of": ("what color is the {name}?", "what colour is the {name}?", "which color is the {name}?", "what is the color of the {name}?",
                 "what color does the {name} have?", "color of the {name}?", "tell me the color of the {name}.", "name the colour of the {name}.",
                 "the {name} has which color?"),
    "kind-of": ("what is the {name}?", "what's the {name}?", "tell me what the {name} is.", "what kind of thing is the {name}?", "name the {name}."),
    "caption": ("describe {this}.", "describe {this} in detail.", "caption {this}.", "tell me about {this}.", "tell me what you see.", "describe what you see.",
                "list what you see.", "what do you see?", "what is in {this}?", "what's in {this}?", "what does {this} show?", "what is shown?",
                "what can you see in {this}?", "what is this?", "what is going on?"),
}
POLITE = ("please", "can you", "could you", "would you", "I want you to", "now", "go ahead and")
MEDIA = {"image": ("the image", "this image", "the picture", "this picture"), "video": ("the video", "this video", "the clip", "this clip"),
         "screen": ("the screen", "this screen")}
BESIDE = {"leftmost": ("on the left", "farthest to the left"), "rightmost": ("on the right", "farthest to the right"),
          "topmost": ("at the top", "highest up"), "bottommost": ("at the bottom", "lowest down")}
SINGULARS = {plural: kind for kind, plural in PLURALS.items()}
STRANGE = ("dog cat horse cow pig duck bird eagle owl elephant lion tiger bear rabbit frog snake spider monkey whale dragon boy girl king queen "
           "doctor robot hat shirt shoe sock glove coat belt phone laptop keyboard camera lamp table chair bed bottle "
           "plate fork spoon bowl pan book pen pencil bag flower apple banana lemon carrot pizza cake egg boat ship plane train truck "
           "bicycle road river mountain cloud bridge tower guitar piano drum computer helmet umbrella towel pillow mirror coin arrow flag ladder "
           "hammer rope candle basket bell kite tent barrel anchor crown sword stone bone feather letter number word sign").split()


def _ask_strange(scene: Scene, rng: np.random.Generator, task: str) -> Query:
    """A query about something that no scene ever has."""
    name = f"{choose(rng, [*COLORS, *[''] * (2 * len(COLORS))])} {choose(rng, STRANGE)}".strip()
    if task == "qa":
        return Query("qa", f"Is there {_article(name)}?", "", [], "No.", "exists")
    return _ask(scene, rng, task, "strange", f"{name}s", [])


def _ask_both(scene: Scene, rng: np.random.Generator, task: str) -> Query | None:
    """A query about things of two sorts, "red cups and stars"; None if they overlap."""
    (one, these), (other, those) = (_pick(scene, rng, choose(rng, ("kind", "color+kind"))) for _ in range(2))
    return None if set(these) & set(those) else _ask(scene, rng, task, "both", f"{one} and {other}", sorted(these + those))


def _meant(query: Query, rng: np.random.Generator) -> tuple[str, bool]:
    """A noun phrase for what a query with a label means, and whether it is singular. "The red cup" may be one or none, and does not say
    which; "every red cup" may be any number."""
    label, (first, *rest) = query.label, query.label.split()
    if query.about == "position":
        return choose(rng, (f"the {label}", *(f"the {' '.join(rest)} {where}" for where in BESIDE[first]))), True
    if query.about == "size":
        return f"the {label}", True
    if first == "the":  # an element of a screen
        return label, True
    if query.about == "both":
        return choose(rng, (label, f"the {label}", f"all {label}", f"the {label.replace(' and ', ' and the ')}")), False
    if query.about == "all":
        return choose(rng, (("everything", True), ("every object", True), ("all things", False), ("all objects", False), ("all the things", False)))
    *look, noun = label.split()
    one = " ".join([*look, SINGULARS.get(noun, noun.removesuffix("s"))])
    if rng.random() < 0.4:
        return choose(rng, [f"every {one}", f"each {one}", *[f"the {one}"] * (2 * (len(query.targets) < 2))]), True
    return choose(rng, (f"the {label}", f"all {label}", f"all the {label}", label)), False


def freely(query: Query, medium: str, rng: np.random.Generator) -> Query:
    """The same query in other words: now and then politely, half of the time with a capital letter, and with a mark at the end."""
    way = "count" if query.task == "point_count" else query.task if query.task in FREE_WORDS else query.about
    if query.label.startswith("the "):
        way = query.about if query.about == "use" else "click"
    x, singular = _meant(query, rng) if query.label else ("", False)
    name = re.sub(r"^(Is there|What color is the|What is the) |\?$", "", query.question)  # of questions that are answered in words
    *look, noun = (query.label or name.removeprefix("a ").removeprefix("an ")).split() or [""]
    names = query.label or " ".join([*look, PLURALS.get(noun, f"{noun}s")])
    words = choose(rng, FREE_WORDS.get(way, (query.question,))).format(
        x=x, name=name, names=names, this=choose(rng, MEDIA[medium]), **{"is": "is" if singular else "are", "do": "does" if singular else "do"})
    words, end = words.rstrip(".?!"), words[-1]
    if end == "." and way != "use" and rng.random() < 0.3:
        words = f"{choose(rng, POLITE)} {words}"
    if way != "caption" and rng.random() < 0.15:
        words = f"{words} {choose(rng, ('here', f'in {choose(rng, MEDIA[medium])}', 'please'))}"
    words = (words[0].upper() if rng.random() < 0.5 else words[0].lower()) + words[1:]
    return replace(query, question=words + end.replace("!", ".") * (rng.random() < 0.5))
