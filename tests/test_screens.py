"""Screens: what is drawn is what is known, and every instruction means what it says."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

import screens
from screens import ICONS, SORTS, USES, screen

drawn = cache(screen)


def elements(count: int = 60):
    for index in range(count):
        scene = drawn(2, index)
        yield scene, [(i, thing) for i, thing in enumerate(scene.things) if np.isfinite(scene.points[0, i, 0])]


def test_screens_are_dense_and_varied():
    """Ten things or so on a screen, every sort and icon appears, some windows hide things, light and dark looks."""
    counts, words, hidden, light = [], set(), 0, []
    for scene, shown in elements(150):
        counts.append(len(scene.things))
        words |= {(thing.sort, thing.word) for thing in scene.things}
        hidden += len(scene.things) - len(shown)
        light.append(np.median(scene.frames) > 128)
    assert np.mean(counts) > 9 and hidden > 30 and 0.3 < np.mean(light) < 0.9
    assert words == {(sort, word) for sort, uses in USES.items() for word in uses} and len(ICONS) == 10


def test_points_are_the_middles_of_boxes_and_lie_in_masks():
    """A point is the middle of its box, on pixels that belong to the element; no pixel has two owners; nothing has one name twice."""
    for scene, shown in elements():
        height, width = scene.frames.shape[1:3]
        assert scene.masks[0].sum(0).max() <= 1 and len({thing.name for thing in scene.things}) == len(scene.things)
        for i, thing in shown:
            left, top, right, bottom = thing.box
            assert 0 <= left < right < width and 0 <= top < bottom < height
            x, y = scene.points[0, i]
            assert (x, y) == pytest.approx(((left + right + 1) / 2, (top + bottom + 1) / 2)) and scene.masks[0, i, int(y), int(x)]
            rows, columns = scene.masks[0, i].nonzero()
            assert left <= columns.min() and columns.max() <= right and top <= rows.min() and rows.max() <= bottom


def test_what_lies_behind_a_window_has_no_point(monkeypatch):
    """What a second window covers for the most part, or in its middle, or whose word it covers, has no point; all else has one."""
    boxes, reasons = [], {"box": 0, "middle": 0, "word": 0}

    class Noted(screens.Window):
        def __init__(self, pen, rng, look, box, words):
            boxes.append(box)
            super().__init__(pen, rng, look, box, words)

    monkeypatch.setattr(screens, "Window", Noted)
    for index in range(170):
        boxes.clear()
        scene, above = screen(4, index), np.zeros((999, 999), bool)
        if len(boxes) == 2:
            left, top, right, bottom = boxes[1]
            above[top:bottom + 1, left:right + 1] = True
        inside = [len(boxes) == 2 and left <= thing.box[0] and top <= thing.box[1] and thing.box[2] <= right and thing.box[3] <= bottom
                  and scene.masks[0, i].any() for i, thing in enumerate(scene.things)]  # the second window's own
        for i, thing in enumerate(scene.things):
            if inside[i]:
                assert np.isfinite(scene.points[0, i]).all()
                continue
            share = lambda box: above[box[1]:box[3] + 1, box[0]:box[2] + 1].mean()
            hides = {"box": share(thing.box) > 1 - screens.CLICK_VISIBLE, "middle": above[int(thing.middle[1] + 0.5), int(thing.middle[0] + 0.5)],
                     "word": thing.text is not None and share((*thing.text[:2], thing.text[2] - 1, thing.text[3] - 1)) > 1 - screens.CLICK_VISIBLE}
            assert np.isnan(scene.points[0, i, 0]) == any(hides.values()), (index, thing, hides)
            for reason in reasons:
                reasons[reason] += hides[reason] and sum(hides.values()) == 1
    assert min(reasons.values()) > 0, reasons


def test_what_has_its_word_behind_a_window_is_not_asked_for():
    """The word stands beside a field or a box to tick: where most of it is covered, the element has no point, and who asks
    for what stands next to one of its sort is not led past it."""
    seen, unread = 0, 0
    for index in range(300):
        scene = drawn(2, index)
        for i, thing in enumerate(scene.things):
            if thing.text is None or not np.isfinite(scene.points[0, i, 0]):
                continue
            left, top, right, bottom = thing.text
            assert thing.sort in ("field", "tick") and 0 <= left < right and right <= scene.frames.shape[2]
            patch = scene.frames[0, top:bottom, left:right].astype(int)
            assert np.ptp(patch, axis=(0, 1)).max() > 60  # something is written there
            seen += 1
        unread += sum(thing.text is not None and scene.masks[0, i].any() and np.isnan(scene.points[0, i, 0]) for i, thing in enumerate(scene.things))
        hidden = {thing.sort for i, thing in enumerate(scene.things) if scene.masks[0, i].any() and np.isnan(scene.points[0, i, 0])}
        for query in screens.queries(scene, np.random.default_rng(index), 6):
            assert query.about != "place" or scene.things[query.targets[0]].sort not in hidden
    assert seen > 100 and unread > 10


def test_elements_stand_out_from_their_surroundings():
    """Something is drawn in every box: it is not the colour of the paper throughout."""
    for scene, shown in elements(40):
        for i, thing in shown:
            left, top, right, bottom = thing.box
            assert scene.frames[0, top:bottom + 1, left:right + 1].reshape(-1, 3).std(0).max() > 3, thing


def test_resolutions_show_the_same_kind_of_screen():
    """At twice the scale everything is about twice as large."""
    one, two = (np.mean([thing.box[3] - thing.box[1] for i in range(20) for thing in screen(4, i, scale).things]) for scale in (1.0, 2.0))
    assert 1.7 < two / one < 2.3


def test_instructions_mean_what_they_say():
    """Name, use, sort, ticks and place, each checked against the list of elements by other means."""
    seen = set()
    for scene, shown in elements(120):
        by_name = {thing.name: i for i, thing in shown}
        for query in screens.queries(scene, np.random.default_rng(0), 8):
            seen.add(query.about)
            assert query.task in ("point", "point_count") and query.question and query.label
            assert all(np.isfinite(scene.points[0, i, 0]) for i in query.targets)
            if query.about == "name":
                assert [by_name[query.label]] == query.targets and query.label in query.question
            if query.about == "use":
                thing = scene.things[query.targets[0]]
                assert USES[thing.sort][thing.word] in query.question and query.label == thing.name
            if query.about == "sort":
                sort = next(sort for sort, plural in SORTS.items() if plural == query.label)
                assert query.targets == [i for i, thing in enumerate(scene.things) if scene.masks[0, i].any()
                                         and (thing.ticked if sort == "ticked" else thing.sort == sort)]
            if query.about == "none":  # nor is it half hidden
                assert query.targets == [] and query.label not in {thing.name for thing in scene.things}
            if query.about == "place":
                where, other = next((w, query.label.split(f" {w} ")[1]) for w in ("right of", "left of", "above", "below")
                                    if f" {w} " in query.label)
                (x, y), (u, v) = scene.things[query.targets[0]].middle, scene.things[by_name[other]].middle
                assert {"right of": x > u, "left of": x < u, "above": y < v, "below": y > v}[where]
                assert scene.things[query.targets[0]].sort == scene.things[by_name[other]].sort
                for i, thing in shown:  # no other one of its sort is as near on that side
                    if thing.sort == scene.things[by_name[other]].sort and i not in (by_name[other], query.targets[0]):
                        side = {"right of": "x", "left of": "x", "above": "y", "below": "y"}[where] == "x"
                        a, b, c, d = scene.things[by_name[other]].box
                        beside = thing.box[1] < d and b < thing.box[3] if side else thing.box[0] < c and a < thing.box[2]
                        way = {"right of": thing.middle[0] - u, "left of": u - thing.middle[0], "above": v - thing.middle[1],
                               "below": thing.middle[1] - v}[where]
                        assert not beside or way <= 0 or way > max(abs(x - u), abs(y - v)) - 1e-6, (query.label, thing)
    assert seen == {"name", "use", "place", "sort", "none"}


def test_nothing_is_asked_twice():
    """The questions about a screen differ by more than their wording."""
    for scene, _ in elements(20):
        for mixture in (screens.ABOUT, screens.READING):
            asked = screens.queries(scene, np.random.default_rng(1), 10, mixture=mixture)
            assert len({(query.task, query.about, query.label or query.question) for query in asked}) == len(asked) >= 5


def test_what_can_be_read_is_not_left_out():
    """A field whose box lies behind a window while its word shows beside it is neither there nor not there: nothing is asked about
    all of its sort, and an element is hidden only if nothing of it or its word shows."""
    left_over = 0
    for index in range(400):
        scene = drawn(2, index)
        halves = {thing.sort for i, thing in enumerate(scene.things) if not scene.masks[0, i].any() and not thing.hidden}
        assert halves <= {"field", "tick"}
        assert not any(thing.hidden and scene.masks[0, i].any() for i, thing in enumerate(scene.things))
        if halves:
            left_over += 1
            asked = screens.queries(scene, np.random.default_rng(1), 30, mixture={"read": 1, "sort": 1})
            said = " ".join(query.question for query in asked)
            assert asked and not any(SORTS[sort] in said for sort in halves), (index, halves, said)
    assert left_over > 5


def test_ways_of_asking_can_be_asked_more_often():
    """`more` multiplies the shares: of nothing else than what is not there, if nothing else has a share."""
    for scene, _ in elements(5):
        asked = screens.queries(scene, np.random.default_rng(1), 6, {"name": 0, "use": 0, "place": 0, "sort": 0})
        assert asked and {query.about for query in asked} == {"none"}


def test_what_is_read_stands_there_in_this_order():
    """Lists have every element of their sort and nothing else, each right of the one before it in its row or in a lower row;
    "yes" names what shows itself, "no" what the screen has nowhere; what stands beside something is the
    nearest in line on that side."""
    seen, refused = Counter(), 0
    for scene, shown in elements(150):
        there = [i for i, _ in shown]
        clear = {f"Which {plural} are there?" for sort, plural in SORTS.items()
                 if (meant := screens._all_of(scene, there, sort)) is not None and screens._in_order(scene, meant) is not None}
        assert {query.question for query in screens.queries(scene, np.random.default_rng(2), 12, mixture={"read": 1})} == clear
        refused += len(SORTS) - len(clear)
        by_name, box = {thing.name: i for i, thing in shown}, {i: thing.box for i, thing in shown}
        asked = screens.queries(scene, np.random.default_rng(0), 12, mixture=screens.READING)
        for query in asked:
            seen[query.about, query.answer in ("No.", "There are none.")] += 1
            assert query.task == "qa" and query.label == ""
            if query.about == "exists":
                name = query.question.removeprefix("Is ").removesuffix(" there?")
                assert (query.answer == "Yes.") == (name in by_name) and (query.answer == "No.") == (name not in {t.name for t in scene.things})
            if query.about == "beside":
                side, other = next((side, query.question.removesuffix("?").split(f" {side} ")[1])
                                   for side in ("right of", "left of", "below", "above") if f" {side} " in query.question)
                here, axis, sign = scene.things[by_name[other]], side in ("below", "above"), 1 if side in ("right of", "below") else -1
                ahead = [(sign * (thing.middle[axis] - here.middle[axis]), thing.word) for _, thing in shown if thing.sort == here.sort
                         and abs(thing.middle[not axis] - here.middle[not axis]) < (here.box[3] - here.box[1]) / 2]
                assert query.answer == min(pair for pair in ahead if pair[0] > 0)[1] + "."
            if query.about == "read":
                sort = next(sort for sort, plural in SORTS.items() if query.question == f"Which {plural} are there?")
                alike = [i for i, thing in enumerate(scene.things) if not thing.hidden and (thing.ticked if sort == "ticked" else thing.sort == sort)]
                words = [] if query.answer == "There are none." else query.answer.removesuffix(".").split(", ")
                assert sorted(words) == sorted(scene.things[i].word for i in alike) and set(alike) <= set(by_name.values())
                line = [box[next(i for i in alike if scene.things[i].word == word)] for word in words]
                for a, b in zip(line, line[1:]):
                    below, same_row = b[1] > a[3], a[1] == b[1] and a[3] == b[3]
                    assert below or same_row and b[0] > a[2], (query, a, b)
    assert min(seen[about, no] for about in ("read", "exists") for no in (False, True)) > 30 and seen["beside", False] > 100 and refused > 20
