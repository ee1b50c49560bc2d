"""Measures: matching against brute force, hits on scenes made by hand, and the table."""

from itertools import permutations

import numpy as np
import pytest

import evaluate
from evaluate import Asked, hits, hungarian, precision_recall_f1, summarize
from pointing import Point
from synthetic import Query, Scene, Thing


def cheapest(cost: np.ndarray) -> float:
    """By trying all one-to-one pairs."""
    cost = cost if cost.shape[0] <= cost.shape[1] else cost.T
    rows = range(cost.shape[0])
    return min(sum(cost[row, column] for row, column in zip(rows, columns)) for columns in permutations(range(cost.shape[1]), len(rows)))


@pytest.mark.parametrize("kind", ["real", "ties", "far", "negative"])
def test_hungarian_equals_brute_force(kind):
    """The pairs are one to one, as many as fit, and no other choice of pairs is cheaper; with ties and huge costs too."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        shape = rng.integers(1, 6, 2)
        cost = {"real": rng.random(shape), "ties": rng.integers(0, 3, shape).astype(float), "negative": rng.normal(size=shape),
                "far": np.where(rng.random(shape) < 0.5, evaluate.FAR, rng.random(shape))}[kind]
        pairs = hungarian(cost)
        assert len(pairs) == len({row for row, _ in pairs}) == len({column for _, column in pairs}) == shape.min()
        assert all(0 <= row < shape[0] and 0 <= column < shape[1] for row, column in pairs)
        assert sum(cost[pair] for pair in pairs) == pytest.approx(cheapest(cost), rel=1e-9, abs=1e-9)


def test_hungarian_of_nothing():
    """Without rows or columns there are no pairs."""
    assert hungarian(np.zeros((0, 3))) == hungarian(np.zeros((3, 0))) == hungarian(np.zeros((0, 0))) == []


@pytest.mark.parametrize("counts, expected", [
    ((0, 0, 0), (1, 1, 1)), ((0, 2, 0), (0, 0, 0)), ((0, 0, 3), (0, 0, 0)), ((0, 2, 3), (0, 0, 0)),
    ((3, 3, 3), (1, 1, 1)), ((1, 2, 4), (1 / 2, 1 / 4, 1 / 3)), ((2, 4, 2), (1 / 2, 1, 2 / 3)),
])
def test_precision_recall_f1(counts, expected):
    """hits / predicted, hits / true and their harmonic mean; nothing true is right only if nothing was predicted."""
    assert precision_recall_f1(*counts) == pytest.approx(expected)


@pytest.fixture
def scene() -> Scene:
    """Two frames of 20 x 10 pixels: thing 0 stands on the left, thing 1 in the middle of frame 0 only, thing 2 on the right."""
    masks = np.zeros((2, 3, 10, 20), bool)
    masks[:, 0, 2:8, 0:4] = masks[:1, 1, 2:8, 8:12] = masks[:, 2, 0:10, 16:20] = True
    points = np.array([[[2, 5], [10, 5], [18, 5]]] * 2, np.float32)
    points[1, 1] = np.nan
    return Scene(np.zeros((2, 10, 20, 3), np.uint8), np.array([0, 0.5]), [Thing("cup", "red", 4)] * 3, masks, points, "plain", True)


def test_hits_by_hand(scene):
    """A point counts if it lies in the mask of the object it is matched to, in its own frame; an object counts once."""
    at = lambda *places: [Point(i, *place) for i, place in enumerate(places, start=1)]
    assert hits(at((0, 2, 5), (0, 10, 5), (0, 18, 5)), scene, [0, 1, 2]) == 3
    assert hits(at((0, 18, 5), (0, 2, 5)), scene, [0, 2]) == 2, "the order does not matter"
    assert hits(at((0, 2, 5), (0, 3, 6)), scene, [0, 2]) == 1, "two points in one object count once"
    assert hits(at((0, 2, 5), (0, 3, 6)), scene, [0]) == 1
    assert hits(at((0, 10, 5)), scene, [0, 2]) == 0, "in the mask of a thing that was not asked for"
    assert hits(at((0, 6, 5)), scene, [0]) == 0, "beside the mask"
    assert hits(at((1, 10, 5)), scene, [1]) == 0, "in a frame that does not show the thing"
    assert hits(at((1, 2, 5), (0, 10, 5)), scene, [0, 1]) == 2, "each in a frame of its own"
    assert hits(at((0, 20, 10)), scene, [2]) == 1, "the far border belongs to the last pixel"
    assert hits([], scene, [0]) == hits(at((0, 2, 5)), scene, []) == 0


def test_the_matching_is_by_total_distance(scene):
    """A point between two objects is left to the one that has no nearer point."""
    points = [Point(1, 0, 3.5, 5), Point(2, 0, 7, 5)]
    assert hits(points, scene, [0, 1]) == 1
    assert hits([Point(1, 0, 3.5, 5), Point(2, 0, 8, 5)], scene, [0, 1]) == 2


def test_the_table(scene):
    """Means over questions: pointing where there is something, silence where there is nothing, counts by ids, exact texts."""
    query = lambda task, targets, answer="": Query(task, "?", "cups", targets, answer, "all")
    asked = [
        Asked(scene, query("point", [0, 2]), None, "", [Point(1, 0, 2, 5)]),
        Asked(scene, query("count", [0, 2]), None, "", [Point(1, 0, 2, 5), Point(2, 1, 18, 5)]),
        Asked(scene, query("count", [0]), None, "", []),
        Asked(scene, query("point", []), None, "There are none.", []),
        Asked(scene, query("count", []), None, "", [Point(1, 0, 2, 5)]),
        Asked(scene, query("caption", [], "Two cups."), None, "Two cups.", []),
        Asked(scene, query("qa", [], "Yes."), None, "No.", []),
    ]
    assert summarize(asked) == pytest.approx({
        "precision": 2 / 3, "recall": 1.5 / 3, "f1": (2 / 3 + 1) / 3, "none recognised": 0.5, "count exact": 0.5, "text exact": 0.5,
        "questions": 7})
    assert evaluate.by_kind_of_question(asked)["count/all"] == pytest.approx(0.5)


@pytest.mark.parametrize("videos", [False, True])
def test_a_model_is_asked_end_to_end(tiny, videos):
    """Fresh scenes go through the model in batches: every question gets an answer, the same for every size of batch."""
    model, tokenizer = tiny
    figures, asked = evaluate.evaluate(model, tokenizer, videos, scenes=1, batch=8, quiet=True)
    again, one_by_one = evaluate.evaluate(model, tokenizer, videos, scenes=1, batch=1, quiet=True)
    assert figures["questions"] == len(asked) > 0 and figures == again
    assert [(a.query, a.text, a.points) for a in asked] == [(a.query, a.text, a.points) for a in one_by_one]
