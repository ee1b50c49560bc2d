"""The five worlds for evaluation: exact masks, drawn by other code than the training worlds, the same every time."""

import ast

import numpy as np
import pytest

import vpos
from masks import grown
from conftest import ROOT
from vpos import COLUMNS, HEIGHT, ROWS, WIDTH, WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_masks_are_exact(name, monkeypatch):
    """Painted in another colour, a thing changes its frames where its mask is, but for the soft edge and lights on it; each
    pixel belongs to one thing at most."""
    for index in range(2):
        world, times, frames, masks = vpos.film(name, 3, index, 2.0)
        color = world.things[0][0]
        with monkeypatch.context() as patch:
            patch.setitem(vpos.PAINT, color, tuple(255 - part for part in vpos.PAINT[color]))
            other = vpos.film(name, 3, index, 2.0)[2]
        alike = [i for i, (c, _) in enumerate(world.things) if c == color and not (name == "road" and world.things[i][1] == "tree")]
        for before, after, mask in zip(frames, other, masks[:, alike].any(1)):
            changed = (before != after).any(-1)
            assert not (changed & ~grown(mask, 2)).any(), "something else has changed"
            if name != "road":  # cars have windows and wheels of their own colour
                assert (changed & mask).sum() > 0.7 * mask.sum()
        assert masks.shape == (len(times), len(world.things), HEIGHT, WIDTH) and frames.shape == (len(times), HEIGHT, WIDTH, 3)
        assert masks.sum(1).max() == 1
        assert all(seen or kind == "tree" for seen, (_, kind) in zip(masks.any((0, 2, 3)), world.things))
        assert abs(np.diff(times) - 1 / 2).max() < 1e-9 and frames.dtype == np.uint8
        assert (frames[0] != frames[-1]).any(), "nothing moves"


@pytest.mark.parametrize("name", WORLDS)
def test_a_film_is_the_same_at_any_rate(name):
    """At 4 frames a second every second frame is that of 2."""
    *_, slow, masks = vpos.film(name, 5, 1, 2.0)
    *_, fast, more = vpos.film(name, 5, 1, 4.0)
    shared = min(len(slow), len(fast[::2]))
    assert np.array_equal(slow[:shared], fast[::2][:shared]) and np.array_equal(masks[:shared], more[::2][:shared])


def test_trees_that_have_passed_are_others_when_they_return():
    """On the road what stands at the side only comes nearer: no number's lowest pixel rises by more than a car can hide, and new
    numbers appear."""
    for index in range(1, 4):
        world, _, _, masks = vpos.film("road", 3, index, 2.0)
        seen = [mask.any(2) for mask, (_, kind) in zip(masks.swapaxes(0, 1), world.things) if kind == "tree"]
        lowest = [[np.flatnonzero(rows).max() for rows in tree if rows.any()] for tree in seen]
        assert all((np.diff(rows) > -15).all() for rows in lowest)
        assert any(tree.any() and not tree[0].any() for tree in seen)


def test_records_ask_for_every_look_and_for_something_missing(monkeypatch):
    """By colour and kind, by kind, and for what is not there; points lie in their masks; another seed, another record. (At two frames
    a second; usually there are six.)"""
    films, film = [], vpos.film
    assert abs(np.diff(film("desk", 7, 0)[1]) - 1 / vpos.FPS).max() < 1e-9 and vpos.FPS == 6
    monkeypatch.setattr(vpos, "film", lambda *words: films.append(film(*words, 2.0)) or films[-1])
    for index in range(10):
        record = vpos.record(7, index)
        world, *_ = films[-1]
        for said in record.annotations[:-1]:
            *color, kind = said.label.split()
            kind = {"boxes": "box"}.get(kind, kind[:-1])
            wanted = [i for i, (c, k) in enumerate(world.things) if k == kind and (not color or c == color[0])]
            assert said.objects == [i for i in wanted if i in record.objects] and said.objects and said.task == "point_count"
        assert record.annotations[-1].objects == [] and record.annotations[-1].label not in {said.label for said in record.annotations[:-1]}
        for thing in record.objects.values():
            assert thing.points.keys() == {t for t, runs in thing.masks.items() if runs.mask().sum() >= vpos.SMALLEST}
            assert all(thing.masks[t].mask()[int(y), int(x)] for t, (x, y) in thing.points.items())
        *_, masks = films[-1]
        assert all(len(thing.masks) == masks[:, i].any((1, 2)).sum() for i, thing in record.objects.items())  # slivers, too
    again, other = vpos.record(7, 9), vpos.record(8, 9)
    assert np.array_equal(again.pictures, record.pictures) and again.annotations == record.annotations
    assert not np.array_equal(other.pictures[0], record.pictures[0])


def test_shapes_are_signed_distances():
    """Negative inside, and no steeper than a pixel a pixel, by what each shape is."""
    inside = {"disc": (vpos.disc(50, 40, 12), (COLUMNS - 50) ** 2 + (ROWS - 40) ** 2 < 144),
              "block": (vpos.block(60, 50, 40, 20), (abs(COLUMNS - 60) < 20) & (abs(ROWS - 50) < 10)),
              "bar": (vpos.bar(20, 60, 90, 60, 5), ((abs(ROWS - 60) < 5) & (COLUMNS > 20) & (COLUMNS < 90))
                      | ((COLUMNS - 20) ** 2 + (ROWS - 60) ** 2 < 25) | ((COLUMNS - 90) ** 2 + (ROWS - 60) ** 2 < 25)),
              "wedge": (vpos.wedge(80, 20, 60, 15), (ROWS > 20) & (ROWS < 60) & (abs(COLUMNS - 80) < 15 * (ROWS - 20) / 40))}
    for name, (distance, wanted) in inside.items():
        assert np.array_equal(distance < 0, wanted), name
        assert abs(np.diff(distance, axis=1)).max() < 1.01 and abs(np.diff(distance, axis=0)).max() < 1.01, name
    star = vpos.star(80, 60, 10, 25) < 0
    for point in range(10):  # tips and the corners between them
        angle, radius = -np.pi / 2 + point * np.pi / 5, (10, 25)[point % 2 == 0]
        x, y = 80 + radius * np.cos(angle), 60 + radius * np.sin(angle)
        near = star[int(y) - 3:int(y) + 4, int(x) - 3:int(x) + 4]
        assert near.any() and not near.all()


def test_no_drawing_code_is_shared():
    """Neither the training worlds nor their pens are imported."""
    imported = {alias.name if isinstance(node, ast.Import) else node.module for node in ast.walk(ast.parse((ROOT / "vpos.py").read_text()))
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    assert not imported & {"synthetic", "screens", "data", "PIL"}
