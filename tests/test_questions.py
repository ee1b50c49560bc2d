"""Every question must mean what its words say: what a label means is worked out here a second time, from its words."""

import re
from collections import Counter

import numpy as np
import pytest

import data
import questions
import synthetic
from questions import queries
from synthetic import COLORS, KINDS, Scene, Thing, clip
from test_synthetic import scenes

SINGULAR = {"cups": "cup", "balls": "ball", "boxes": "box", "stars": "star", "rings": "ring", "crosses": "cross",
            "hearts": "heart", "moons": "moon", "trees": "tree", "houses": "house", "cars": "car", "fish": "fish"}


def meant(scene: Scene, label: str) -> set[int]:
    """The things a label names, from its words alone."""
    *first, noun = label.split()
    kind = SINGULAR.get(noun, noun)
    group = {i for i, thing in enumerate(scene.things) if kind in ("thing", "things", thing.kind)}
    if not first:
        return group
    if first[0] in COLORS:
        return {i for i in group if scene.things[i].color == first[0]}
    if first[0] in questions.LARGEST + questions.SMALLEST:
        sign = -1 if first[0] == "smallest" else 1
        second, best = sorted(group, key=lambda i: sign * scene.things[i].size)[-2:]
        sizes = [scene.things[i].size for i in (second, best)]
        areas = {i: sign * max(mask.sum() for mask in scene.masks[:, i]) for i in group}
        assert max(sizes) >= 1.35 * min(sizes) and max(areas, key=areas.get) == best and all(areas.values())
        return {best}
    axis, sign = {"leftmost": (1, -1), "rightmost": (1, 1), "topmost": (0, -1), "bottommost": (0, 1)}[first[0]]
    met, ahead = set(), {(i, j) for i in group for j in group if i != j}
    for frame in range(len(scene.frames)):
        seen = [i for i in group if np.isfinite(scene.points[frame, i, 0])]
        ends = {i: (where.min(), where.max()) for i in seen for where in [scene.masks[frame, i].nonzero()[axis]]}
        middle = {i: sign * sum(pair) / 2 / scene.frames.shape[1 + axis] for i, pair in ends.items()}  # of the box around what shows
        met |= {(i, j) for i in seen for j in seen}
        ahead -= {(i, j) for i in seen for j in seen if middle[i] - middle[j] < 0.12 - 1e-6}
    return {i for i in group if all((i, j) in met & ahead for j in group if j != i)}


def asked(stills: int, clips: int, n: int, mixture: dict = questions.MIXTURE) -> list[tuple[Scene, questions.Query]]:
    return [(scene, query) for i, scene in enumerate(scenes(stills, clips))
            for query in queries(scene, np.random.default_rng(i), n, mixture=mixture)]


@pytest.mark.parametrize("mixture, stills", [("MIXTURE", 80), ("POINTING", 40), ("ANSWERS", 40), ("TRACKING", 0)])
def test_targets_are_the_things_that_the_label_names(mixture, stills):
    """To be pointed at, counted or tracked: no more and no fewer than the words say, none for "none"; a question that is written out
    holds the label. (Motions are below.)"""
    seen = set()
    for scene, query in asked(stills, 25, 10, getattr(questions, mixture)):
        seen.add(query.task)
        if query.about == "given":  # one of those that bear the name: which, its point says
            assert len(query.targets) == 1 and scene.things[query.targets[0]].name == query.label
        elif query.label and query.about != "motion":
            assert set(query.targets) == meant(scene, query.label) and len(set(query.targets)) == len(query.targets)
            assert (query.about == "none") == (query.targets == [])
            assert query.label in query.question or query.question == "" and query.task not in ("point", "point_count")
            assert query.answer == "" and (query.about not in ("size", "position") or len(query.targets) == 1)
        assert query.label or query.answer
    assert seen == {task for task, _ in getattr(questions, mixture)}


def test_the_outermost_is_so_at_every_moment():
    """A place is asked about wherever every frame agrees on it, and only there; in clips, too."""
    found = Counter()
    for scene in scenes(15, 40):
        for kind in {"", *(thing.kind for thing in scene.things)}:
            group = questions._match(scene, kind)
            for side in questions.SIDES if len(group) > 1 else ():
                first = questions._outermost(scene, group, side)
                assert {first} - {None} == meant(scene, f"{side} {kind or 'thing'}")
                found[scene.is_video, first is None] += 1
    assert min(found.values()) > 20 and len(found) == 4, found


def test_answers_in_words_are_true():
    """Yes, no, colours and names, derived again from the question's words; captions count every thing once."""
    seen = Counter()
    for scene, query in asked(150, 40, 12):
        words = re.findall(r"\w+", query.question)
        seen[query.about] += query.task in ("qa", "caption")
        if query.about == "exists":
            there = meant(scene, " ".join(words[3:]))
            assert query.answer == ("Yes." if there else "No.")
        elif query.about in ("color-of", "kind-of"):
            (target,) = meant(scene, words[-1] if query.about == "color-of" else " ".join(words[3:]))
            thing = scene.things[target]
            assert query.targets == [target]
            assert query.answer == (thing.color if query.about == "color-of" else f"{thing.color} {thing.kind}")
        elif query.task == "caption":
            said, background = re.fullmatch(r"(.*) on an? (\w+) background\.", query.answer).groups()
            parts = [part.split()[1:] for part in re.split(", | and ", said.lower())]
            assert background == scene.background and Counter(map(tuple, parts)) == Counter((thing.color, thing.kind) for thing in scene.things)
    assert all(seen[about] > 20 for about in ("exists", "color-of", "kind-of", "caption")), seen


def test_the_mixture_and_its_variety():
    """Shares near the intended ones; nothing asked twice; the two fixed phrasings occur; negatives are hard ones."""
    pairs = asked(250, 0, 4)
    tasks, about = Counter(q.task for _, q in pairs), Counter(q.about for _, q in pairs if q.task == "point")
    share = {name: count / len(pairs) for name, count in (tasks + about).items()}
    intended = {"kind": 0.18, "color+kind": 0.19, "color": 0.08, "all": 0.03, "size": 0.04, "position": 0.08,
                "point_count": 0.19, "caption": 0.04, "qa": 0.09}
    assert all(abs(share[name] - part) < 0.045 for name, part in intended.items()), share
    located = [(scene, query) for scene, query in pairs if query.label]
    nowhere = [(scene, query) for scene, query in located if query.about == "none"]
    assert 0.18 < len(nowhere) / len(located) < 0.30
    near = [meant(scene, query.label.split()[-1]) != set() for scene, query in nowhere]
    assert np.mean(near) > 0.4  # the kind is there, the colour is not
    questions = {query.question for _, query in pairs}
    assert any(q.startswith("Point to the ") and q.endswith(".") for q in questions)
    assert any(q.startswith("point to the ") and not q.endswith(".") for q in questions)
    for scene in scenes(3, 1):
        found = [(query.task, query.label or query.question) for query in queries(scene, np.random.default_rng(1), 12)]
        assert len(found) == len(set(found)) == 12


def test_shares_of_ways_of_asking_can_be_changed():
    """Ways with a share of 0 are not asked; a greater share is asked more often."""
    count = lambda more: Counter(query.about for i, scene in enumerate(scenes(30, 0)) for query in queries(scene, np.random.default_rng(i), 8, more))
    usual, never, often = count({}), count({"none": 0, "kind": 0}), count({"position": 8})
    assert usual["none"] and usual["kind"] and not never["none"] and not never["kind"] and often["position"] > 2 * usual["position"] > 0


# ---- words and motions -----------------------------------------------------------------------------------------------


def test_captions_name_every_thing_in_the_order_of_names():
    """Written and spoken, every thing has its phrase, those that look alike one after the other."""
    for i, scene in enumerate([*scenes(20, 10), *(synthetic.arrivals(5, index) for index in range(20))]):
        wanted = sorted(thing.name for thing in scene.things)
        caption, said = questions.describe(scene), questions.talk(scene, np.random.default_rng(i))
        names = rf"\ban? ((?:{'|'.join(synthetic.COLORS)}) (?:{'|'.join(synthetic.KINDS)}))\b"
        assert re.findall(names, caption, re.I) == re.findall(names, said) == wanted
        assert caption.endswith(f" {scene.background} background.") and scene.background in said
        assert said.count(".") == 2 + len(wanted) and caption.count(",") == max(len(wanted) - 2, 0)
    assert len({questions.talk(scene, np.random.default_rng(i)) for i in range(20)}) > 15


def test_longer_answers_and_choices_are_true():
    """All colours are named, in the order of captions; the answer to a choice is among four different options, and is what the question asks for."""
    seen = Counter()
    for i, scene in enumerate(scenes(60, 20)):
        for query in queries(scene, np.random.default_rng(i), 6, mixture=questions.CAPTIONS | questions.ANSWERS):
            seen[query.task, query.about] += 1
            if query.about == "colors":
                assert re.findall(r"\w+", query.answer.lower().replace(" and ", ", ")) == sorted({thing.color for thing in scene.things})
            if query.task == "choice":
                assert len(set(query.choices)) == 4 and query.answer in query.choices
                words = re.findall(r"\w+", query.question)
                (target,) = meant(scene, words[-1] if query.about == "color-of" else " ".join(words[3:]))
                thing = scene.things[target]
                assert query.targets == [target] and query.answer == (thing.color if query.about == "color-of" else thing.name)
    assert all(seen[key] > 5 for key in (("qa", "colors"), ("choice", "color-of"), ("choice", "kind-of"), ("count", "kind")))


def test_as_many_things_as_a_still_can_hold():
    """Eleven of one colour, which happens once in ten thousand pictures, have a phrase each in captions; their colour is named once."""
    points = np.full((1, 11, 2), 5, np.float32)
    scene = Scene(np.zeros((1, 99, 99, 3), np.uint8), np.zeros(1), [Thing("cup", "red", 9)] * 11, np.ones((1, 11, 1, 1), bool), points, "plain", False)
    assert questions.describe(scene).lower().count("a red cup") == 11
    assert questions._ask_colors(scene).answer == "Red."
    assert questions.talk(scene, np.random.default_rng(0)).count("a red cup.") == 11


@pytest.mark.parametrize("start, end, word", [((10, 50), (80, 52), "moves right"), ((80, 50), (10, 40), "moves left"), ((50, 80), (51, 10), "moves up"),
                                              ((50, 10), (45, 70), "moves down"), ((50, 50), (51, 50), "rests"), ((10, 10), (70, 75), "moves right, moves down"),
                                              ((50, 50), (60, 50), "moves right, rests"), ((50, 50), (56, 62), "moves right, moves down, rests")])
def test_motions_by_hand(start, end, word):
    """Far and mostly along one axis has a direction, hardly anything is rest, all else may be several."""
    points = np.linspace(start, end, 6).astype(np.float32)[:, None]
    scene = Scene(np.zeros((6, 100, 100, 3), np.uint8), np.arange(6) / 2, [Thing("cup", "red", 9)], np.zeros((6, 1, 1, 1), bool), points, "plain", True)
    found = questions.motions(scene)[0]
    assert len(found) == len(set(found)) and set(found) == set(word.split(", "))


def test_what_rests_behind_a_mover_rests():
    """Where a thing is covered its point moves, and it does not: it is said to rest, or nothing."""
    covered = 0
    for index in range(60):
        made = synthetic.world(1, index)
        resting = [i for i in range(len(made.things)) if np.ptp([made.places(t)[i] for t in np.linspace(0, made.seconds, 9)], axis=0).max() == 0]
        for end in np.linspace(0.5, made.seconds, 8):
            scene = made.film(np.array([end - 0.5, end - 0.25, end]))
            for i in resting:
                assert questions.motions(scene)[i] in ((), ("rests",), questions.MOTIONS)
                covered += np.isfinite(scene.points[:, i]).all() and np.ptp(scene.points[:, i], axis=0).max() > 5
    assert covered > 10


def test_motion_tells_lookalikes_apart():
    """A label that names a motion means exactly one of several things of its kind."""
    seen = 0
    for index in range(60):
        scene = synthetic.tracks(1, index)
        does = questions.motions(scene)
        for query in queries(scene, np.random.default_rng(index), 8, mixture=questions.TRACKING):
            if query.about == "motion":
                noun, motion = query.label.split(" that ")
                group = meant(scene, noun)
                assert len(group) > 1 and [i for i in group if does[i] == (motion,)] == query.targets
                seen += 1
                if motion == "rests":
                    continue
                axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[motion.split()[1]]
                for i in group:  # nobody else goes far that way, and it does not go far back
                    way = [sign * place[axis] for place, point in zip(scene.centers[:, i], scene.points[:, i]) if np.isfinite(point[0])]
                    longest = max((b - a if i not in query.targets else a - b for n, a in enumerate(way) for b in way[n:]), default=0)
                    assert longest < 0.25 * min(scene.frames.shape[1:3])
    assert seen > 10


@pytest.mark.parametrize("first, second, lost", [
    ("11111", "1...1", False), ("1.111", "111.1", False), ("1..11", "11..1", True), ("1....", "11..1", True), ("11..1", "1....", True),
    ("1....", "11...", False), ("..111", "...11", False), ("..1.1", "....1", False), ("1..1.", "1...1", True),
    ("11...", "...11", True), ("11..1", "..1..", True), ("11...", ".1111", False)])
def test_who_comes_back_by_hand(first, second, lost):
    """Two that look alike are mixed up if both are out of view at once and one of them returns, or if one comes for the first time while
    the other is out of view; what has not been seen yet is not gone, and what looks different is no matter."""
    seen = np.array([[frame == "1" for frame in track] for track in (first, second)]).T
    places = np.where(seen, 0.0, np.nan)[..., None].repeat(2, -1)
    for color, expected in (("red", lost), ("blue", False)):
        alike = Scene(np.zeros((5, 8, 8, 3), np.uint8), np.arange(5) / 2, [Thing("cup", "red", 3), Thing("cup", color, 4)],
                      np.zeros((5, 2, 8, 8), bool), places, "plain", True)
        assert [questions.mixed_up(alike, [i]) for i in (0, 1)] == [expected] * 2 and not questions.mixed_up(alike, [])


def test_tracked_things_can_be_told_apart():
    """No question is asked about the ways of things that were out of view together with their like, and hardly one in ten things is such."""
    lost = total = 0
    for scene in (synthetic.tracks(2, index) for index in range(40)):
        seen = [{int(f) for f in np.flatnonzero(np.isfinite(scene.points[:, i, 0]))} for i in range(len(scene.things))]

        def confused(i: int, j: int) -> bool:
            both = [f for f in range(len(scene.times)) if min(seen[i]) < f > min(seen[j]) and f not in seen[i] | seen[j]]
            return scene.things[i].name == scene.things[j].name and any(f < max(seen[i] | seen[j]) for f in both)

        pairs = [(i, j) for i in range(len(seen)) for j in range(len(seen)) if i != j and confused(i, j)]
        lost, total = lost + len({i for i, _ in pairs}), total + len(seen)
        for query in queries(scene, np.random.default_rng(3), 6, mixture=questions.TRACKING):
            assert not set(query.targets) & {i for i, _ in pairs}, query
    assert 0 < lost < 0.12 * total


def test_deeds_in_a_moment():
    """Among the few frames of a moment: exactly those of a kind are meant that do what is said, no other of the kind may be said to do
    it, and there is another. "Move" means any direction."""
    seen = Counter()
    for index in range(60):
        made = synthetic.crowd(1, index)
        scene = made.film(np.linspace(0.4, 1.0, 5) * made.seconds / 2)
        may = questions.motions(scene)
        found = questions.deeds(scene, np.random.default_rng(index), 3)
        assert len(found) <= 3 and len({query.label for query in found}) == len(found)
        for query in found:
            noun, deed = query.label.split(" that ")
            words = {"rest": {"rests"}, "move": set(questions.DIRECTIONS)}.get(deed, {deed.replace("move", "moves")})
            group = [i for i in meant(scene, noun) if may[i]]
            assert query.task == "point" and query.label in query.question and query.about == ("moving" if " " not in deed else "direction")
            assert [i for i in group if words & set(may[i])] == query.targets and len(group) > len(query.targets) > 0
            assert all(set(may[i]) <= words for i in query.targets)
            assert not re.search(r"\bis\b", query.question)
            seen[deed] += 1
    assert len(seen) == 6 and min(seen.values()) > 2, seen


def test_subtitles_are_what_is_asked_for():
    """Every answer stands in the text behind its moment."""
    for index in range(10):
        scene = clip(3, index)
        text, found = questions.subtitles(scene, np.random.default_rng(index))
        lines = dict(line.split(" ", 1) for line in text.strip().split("\n"))
        assert {query.question.split(" at ")[1].rstrip("?"): query.answer for query in found} == lines
        assert all(any(thing.name in words for thing in scene.things) for words in lines.values())


def test_questions_without_a_picture_are_true():
    """Numbers, plurals and colours, worked out again from the words."""
    for i in range(200):
        query = questions.words(np.random.default_rng(i))
        word = query.question.split()[-1].rstrip("?")
        number = lambda step: questions.NUMBERS[questions.NUMBERS.index(word) + step].capitalize() + "."
        if "after" in query.question or "before" in query.question:
            assert query.answer == number(1 if "after" in query.question else -1)
        elif "plural" in query.question:
            assert SINGULAR[query.answer.rstrip(".").lower()] == word
        else:
            assert query.answer == ("Yes." if query.question.split()[1] in COLORS else "No.")


def test_where_every_kind_is_something_is_still_absent():
    """A picture with things of all twelve kinds: what is asked about that is not there is one of these in another colour."""
    scene = Scene(np.zeros((1, 9, 9, 3), np.uint8), np.zeros(1), [Thing(kind, list(COLORS)[i % 2], 9) for i, kind in enumerate(KINDS)],
                  np.zeros((1, 12, 9, 9), bool), np.zeros((1, 12, 2), np.float32), "plain", False)
    rng = np.random.default_rng(0)
    for kind, color in (questions._absent(scene, rng) for _ in range(200)):
        assert kind in KINDS and color and (kind, color) not in {(thing.kind, thing.color) for thing in scene.things}


# ---- in other words --------------------------------------------------------------------------------------------------

NOUNS = {form: kind for kind in KINDS for form in (kind, synthetic.PLURALS[kind])}
BESIDE = {"left": "leftmost", "right": "rightmost", "top": "topmost", "highest": "topmost", "bottom": "bottommost", "lowest": "bottommost"}


def named(words: str) -> tuple[Counter, Counter, Counter]:
    """The colours, kinds and places that a text names, whatever the number of the nouns."""
    said = re.findall(r"[a-z]+", words.lower())
    return (Counter(w for w in said if w in COLORS), Counter(NOUNS[w] for w in said if w in NOUNS),
            Counter(BESIDE.get(w, w) for w in said if w in BESIDE or w in questions.SIDES or w in questions.LARGEST + questions.SMALLEST))


def test_other_words_mean_the_same():
    """A query asked in other words names the same colours, kinds, sizes and places, no more and no fewer, and nothing else about it
    changes; "the cup" is said of one or none only, so that it does not tell which."""
    ways, mixture = Counter(), questions.FREE | questions.FREE_TRACKING
    for i, scene in enumerate(scenes(60, 40)):
        rng = np.random.default_rng(i)
        for query in queries(scene, rng, 12, mixture=mixture if scene.is_video else questions.FREE):
            free = questions.freely(query, "video" if scene.is_video else "image", rng)
            assert (free.task, free.label, free.targets, free.answer, free.about) == (query.task, query.label, query.targets, query.answer, query.about)
            assert named(free.question) == named(query.label or query.question if query.task != "caption" else ""), (free.question, query)
            assert not re.search(r"[{}]|\b(\w+) \1\b", free.question)
            if single := re.search(r"\bthe (?:\w+ )?(\w+)\b(?! of)", free.question) if query.about in ("kind", "color+kind", "none") and query.label else None:
                if single[1] in KINDS and single[1] != "fish":
                    assert len(query.targets) < 2
                    ways["one", bool(query.targets)] += 1
            ways[query.task, query.about] += 1
    assert set(mixture) - set(ways) <= {("caption", ""), ("qa", ""), ("qa", "strange")}
    assert ways["one", True] > 5 < ways["one", False]


def test_other_words_are_many():
    """A query has dozens of wordings: with and without a capital letter and a mark at the end, with verbs that agree."""
    query = questions.Query("point", "Point to the red cups.", "red cups", [0], "", "color+kind")
    asked = {questions.freely(query, "image", np.random.default_rng(i)).question for i in range(3000)}
    assert len(asked) > 1000 and {"where is the red cup?", "Where are the red cups", "find the red cups", "Show me red cups."} <= asked
    assert not any(re.search(r"\bare (the|every|each) red cup\b|\bis .*\bcups\b", words) for words in asked)
    several = {questions.freely(questions.replace(query, targets=[0, 1]), "image", np.random.default_rng(i)).question for i in range(600)}
    assert not any("the red cup" in re.sub("red cups", "", words) for words in several) and any("each red cup" in words for words in several)


def test_strange_things_are_nowhere():
    """What is asked for as strange is in no scene, neither as a kind nor as a part that is drawn on one, and the answer is that there is none."""
    assert not {*KINDS, *NOUNS, *COLORS, "thing", "object", "door", "window", "wheel"} & set(questions.STRANGE)
    assert len(set(questions.STRANGE)) == len(questions.STRANGE) > 80
    for i, scene in enumerate(scenes(20, 20)):
        for query in queries(scene, np.random.default_rng(i), 6, mixture={key: 1 for key in questions.FREE if key[1] == "strange"}):
            noun = re.findall(r"\w+", query.label.removesuffix("s") or query.question)[-1]
            assert noun in questions.STRANGE and not query.targets and query.answer == ("No." if query.task == "qa" else "")


def test_screens_are_asked_in_other_words():
    """The element's whole name, its use or its place stays in the words."""
    for index in range(20):
        record = data.draw("free screens", 3, index, 8)
        plain = data.draw("screens", 3, index, 8)
        for free, said in zip(record.annotations, plain.annotations, strict=True):
            assert (free.label, free.objects, free.about) == (said.label, said.objects, said.about)
            if said.about == "use":
                assert free.question.lower().startswith(said.question.lower().rstrip(".?"))
            elif said.label.startswith("the "):
                assert said.label.lower() in free.question.lower()
