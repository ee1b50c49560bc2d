"""Measures: matching against brute force, hits and HOTA on records made by hand, the table and the command."""

import json
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import evaluate
import loading
import masks
import vpos
from generate import Answer
from evaluate import Asked, hota, hungarian, matched, precision_recall_f1, scores, summarize, words_f1
from model import PRESETS, Molmo
from pointing import Point
from records import Annotation, Object, Record, Runs


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
def record() -> Record:
    """Two frames of 20 x 10 pixels: thing 0 stands on the left, thing 1 in the middle of frame 0 only, thing 2 on the right."""
    def thing(left, right, top, bottom, moments):
        mask = np.zeros((10, 20), bool)
        mask[top:bottom, left:right] = True
        return Object({t: ((left + right) / 2, 5.0) for t in moments}, {t: Runs.of(mask) for t in moments})
    things = {0: thing(0, 4, 2, 8, (0, 0.5)), 1: thing(8, 12, 2, 8, (0,)), 2: thing(16, 20, 0, 10, (0, 0.5))}
    return Record("by hand", [np.zeros((10, 20, 3), np.uint8)] * 2, [0.0, 0.5], things, [])


def at(*places) -> list[Point]:
    return [Point(i, *place) for i, place in enumerate(places, start=1)]


def test_hits_by_hand(record):
    """A point counts if it lies in the mask of the object it is matched to, in its own frame; an object counts once."""
    hits = lambda points, objects: len(matched(points, record, objects))
    assert hits(at((0, 2, 5), (0, 10, 5), (0, 18, 5)), [0, 1, 2]) == 3
    assert hits(at((0, 18, 5), (0, 2, 5)), [0, 2]) == 2, "the order does not matter"
    assert hits(at((0, 2, 5), (0, 3, 6)), [0, 2]) == 1, "two points in one object count once"
    assert hits(at((0, 2, 5), (0, 3, 6)), [0]) == 1
    assert hits(at((0, 10, 5)), [0, 2]) == 0, "in the mask of a thing that was not asked for"
    assert hits(at((0, 6, 5)), [0]) == 0, "beside the mask"
    assert hits(at((1, 10, 5)), [1]) == 0, "in a frame that does not show the thing"
    assert hits(at((1, 2, 5), (0, 10, 5)), [0, 1]) == 2, "each in a frame of its own"
    assert hits(at((0, 20, 10)), [2]) == 1, "the far border belongs to the last pixel"
    assert hits([], [0]) == hits(at((0, 2, 5)), []) == 0


def test_without_masks_near_is_a_hit(record):
    """Where no mask is known, a twentieth of the longer side (here one pixel) around the point counts."""
    for thing in record.objects.values():
        thing.masks = {}
    hits = lambda *places: len(matched(at(*places), record, [0, 1, 2]))
    assert hits((0, 2.9, 5)) == 1 and hits((0, 3.1, 5)) == 0 and hits((1, 10, 5)) == 0


def test_the_matching_is_by_total_distance(record):
    """A point between two objects is left to the one that has no nearer point."""
    assert len(matched(at((0, 3.5, 5), (0, 7, 5)), record, [0, 1])) == 1
    assert len(matched(at((0, 3.5, 5), (0, 8, 5)), record, [0, 1])) == 2


def clip(frames: int, things: int = 2) -> Record:
    """Things stand in columns of ten pixels, in every frame."""
    masks = [np.zeros((10, 10 * things), bool) for _ in range(things)]
    for i, mask in enumerate(masks):
        mask[:, 10 * i:10 * i + 10] = True
    moments = [n / 2 for n in range(frames)]
    objects = {i: Object({t: (10 * i + 5.0, 5.0) for t in moments}, {t: Runs.of(mask) for t in moments}) for i, mask in enumerate(masks)}
    return Record("clip", [np.zeros((10, 10 * things, 3), np.uint8)] * frames, moments, objects, [])


def on(thing: int, identity: int, *frames: int) -> list[Point]:
    return [Point(identity, frame, 10 * thing + 5.0, 5.0) for frame in frames]


@pytest.mark.parametrize("predicted, value", [
    (on(0, 1, 0, 1, 2, 3) + on(1, 2, 0, 1, 2, 3), 1.0),                     # all right
    (on(0, 7, 0, 1, 2, 3) + on(1, 5, 0, 1, 2, 3), 1.0),                     # ids are only names
    (on(0, 1, 0, 1, 2, 3), (1 / 2) ** 0.5),                                 # one thing missing: DetA 4/8, AssA 1
    (on(0, 1, 0, 1) + on(0, 2, 2, 3) + on(1, 3, 0, 1, 2, 3), (6 / 8) ** 0.5),  # one track in two: AssA (4 * 1/2 + 4 * 1) / 8
    (on(0, 1, 0, 1) + on(1, 1, 2, 3) + on(1, 2, 0, 1) + on(0, 2, 2, 3), (1 / 3) ** 0.5),  # swapped: 2 of 4 + 4 - 2 each
    (on(0, 1, 0, 1, 2, 3) + on(1, 2, 0, 1, 2, 3) + on(1, 3, 0), (8 / 9) ** 0.5),  # one too many
    ([Point(1, 0, 99.0, 5.0)], 0.0),
    ([], 0.0),
])
def test_hota_by_hand(predicted, value):
    """sqrt(TP / (TP + FN + FP) * mean over TP of TPA / (TPA + FNA + FPA)), on cases worked out by hand."""
    record = clip(4)
    record.pictures = [np.zeros((10, 100, 3), np.uint8)] * 4
    for thing in record.objects.values():
        thing.masks = {t: Runs.of(np.pad(runs.mask(), ((0, 0), (0, 80)))) for t, runs in thing.masks.items()}
    true = data.points_of(record, Annotation("track", "things", [0, 1]))
    assert hota(predicted, record, true) == pytest.approx(value)


def test_hota_of_nothing():
    """Nothing there and nothing said is right; one of the two is wrong."""
    record = clip(2)
    assert hota([], record, []) == 1 and hota(on(0, 1, 0), record, []) == 0


def trackeval(predicted: list[Point], record: Record, true: list[Point]) -> float:
    """HOTA at one threshold, array by array as the reference code of its authors computes it."""
    ids = [sorted({p.id for p in points}) for points in (true, predicted)]
    potential, counts = np.zeros((len(ids[0]), len(ids[1]))), [np.zeros((len(ids[0]), 1)), np.zeros((1, len(ids[1])))]
    frames = []
    for frame in sorted({p.picture for p in (*true, *predicted)}):
        t, p = ([q for q in points if q.picture == frame] for points in (true, predicted))
        similarity = np.array([[float(evaluate.inside(q, record, o.id)) for q in p] for o in t]).reshape(len(t), len(p))
        rows, columns = np.array([ids[0].index(o.id) for o in t], int), np.array([ids[1].index(q.id) for q in p], int)
        denominator = similarity.sum(0)[None] + similarity.sum(1)[:, None] - similarity
        shared = np.divide(similarity, denominator, out=np.zeros_like(similarity), where=denominator > 1e-9)
        potential[rows[:, None], columns[None]] += shared
        counts[0][rows], counts[1][:, columns] = counts[0][rows] + 1, counts[1][:, columns] + 1
        frames.append((rows, columns, similarity))
    alignment = potential / (counts[0] + counts[1] - potential)
    matches, hits = np.zeros_like(potential), 0
    for rows, columns, similarity in frames:
        score = alignment[rows[:, None], columns[None]] * similarity
        for r, c in hungarian(-score):
            if similarity[r, c] > 0.5:
                matches[rows[r], columns[c]], hits = matches[rows[r], columns[c]] + 1, hits + 1
    association = (matches * matches / np.maximum(1, counts[0] + counts[1] - matches)).sum() / max(1, hits)
    return float(np.sqrt(association * hits / max(1, len(true) + len(predicted) - hits)))


def test_hota_equals_the_reference():
    """On random tracks with swaps, gaps, doubles and false points, the number of TrackEval's formulas."""
    rng, record = np.random.default_rng(0), clip(5, 3)
    true = data.points_of(record, Annotation("track", "x", [0, 1, 2]))
    for _ in range(150):
        predicted = list({(i, f): Point(i, f, float(rng.integers(0, 30)), 5.0) for f in range(5) for i in range(rng.integers(0, 5))}.values())
        assert hota(predicted, record, true) == pytest.approx(trackeval(predicted, record, true) if predicted else 0, abs=1e-9)


def test_hota_keeps_ids_together():
    """Where two predictions are equally good in a frame, the one that follows the object elsewhere is its own."""
    record, true = clip(3, 1), data.points_of(clip(3, 1), Annotation("track", "x", [0]))
    predicted = on(0, 1, 0, 1, 2) + on(0, 2, 1)
    assert hota(predicted, record, true) == pytest.approx((3 / 4) ** 0.5)


def test_an_id_twice_in_a_frame_counts_against_in_any_order():
    """The right point and a false one under the same id: HOTA is the same whichever comes first, and lower than without."""
    record, true = clip(3, 1), data.points_of(clip(3, 1), Annotation("track", "x", [0]))
    right, wrong = on(0, 1, 0, 1, 2), Point(1, 1, 29.0, 29.0)
    values = [hota(points, record, true) for points in ([*right, wrong], [wrong, *right])]
    assert values[0] == pytest.approx(values[1]) and 0 < values[0] < hota(right, record, true) == 1


@pytest.mark.parametrize("text, wanted, value", [("A red cup.", "a red cup", 1), ("a cup", "a red cup", 0.8), ("", "a", 0), ("", "", 1),
                                                 ("a a a", "a", 0.5)])
def test_words_f1(text, wanted, value):
    """The F1 of the words in common, whatever their case; a word counts as often as both have it."""
    assert words_f1(text, wanted) == pytest.approx(value)


def asked(record: Record, said: Annotation, text: str = "", points=()) -> Asked:
    a = Asked(record, said, None, "", text, list(points))
    return replace(a, figures=scores(a))


@pytest.mark.parametrize("text, cut, recognised", [("There are none.", False, True), ("0", False, True), ("There are none", True, False),
                                                   ("There are three.", False, False), ("There is no doubt: two.", False, False), ("There are 10.", False, False), ("", False, False)])
def test_nothing_is_recognised_in_words(record, text, cut, recognised):
    """That nothing is there has to be said, and to the end; to write no point is not enough."""
    a = Asked(record, Annotation("point", "cups", []), None, "", text, [], {"answers cut": cut})
    assert scores(a)["none recognised"] == recognised
    counted = scores(replace(a, annotation=Annotation("count", "cups", [])))
    assert counted["count exact"] == (text in ("There are none.", "0", "There are none"))


def test_the_table(record):
    """Means over questions: pointing where there is something, silence where there is nothing, counts by ids, words."""
    said = lambda task, objects=(), **more: Annotation(task, "cups", list(objects), **more)
    answers = [
        asked(record, said("point", [0, 2]), "", at((0, 2, 5))),
        asked(record, said("point_count", [0, 2]), "shows a total of 3.", at((0, 2, 5), (1, 18, 5))),
        asked(record, said("point_count", [0]), "There are none.", []),
        asked(record, said("count", [0, 1, 2]), "3"),
        asked(record, said("point"), "There are none.", []),
        asked(record, said("point_count"), "", at((0, 2, 5))),
        asked(record, said("caption", answer="Two cups."), "Two cups."),
        asked(record, said("qa", answer="Yes."), "No."),
        asked(record, said("transcript", answer="So, a cup."), "a cup."),
        asked(record, said("choice", answer="b", choices=["a", "b"]), "B"),
    ]
    assert summarize(answers) == pytest.approx({
        "precision": 3 / 5, "recall": 2.5 / 5, "f1": (2 / 3 + 1 + 1) / 5, "f1 present": (2 / 3 + 1) / 3, "none recognised": 0.5,
        "count exact": 2 / 4, "count close": 1, "count error": 2 / 4, "number differs": 2 / 3, "text exact": 2 / 3, "words f1": (1 + 0 + 0.8 + 1) / 4, "questions": 10})
    table = evaluate.by_kind_of_question(answers)
    assert table["point_count"] == pytest.approx(1 / 3) and table["choice"] == 1


@pytest.mark.parametrize("text, differs", [
    ('There are 1 <point x="12.5" y="3.0" alt="cup">cup</point>.', False), ('There are 2 <points coords="1 1 500 500">cups</point>.', True),
    ('There are 2 <points x1="1.0" y1="2.0" x2="3.0" y2="4.0" alt="cups">cups</points>.', True), ('<points coords="1 1 500 500">cups</points> One.', True)])
def test_the_number_said_is_read_beside_the_tags(record, text, differs):
    """In all forms of points what stands in the tag is not taken for the number that is said about them."""
    said = Annotation("count_point", "cups", [0])
    assert asked(record, said, text, at((0, 2, 5))).figures["number differs"] == differs


def test_a_number_without_end_is_a_wrong_count(record):
    """A model that repeats one digit until it is cut off leaves the other figures as they are; zeros before a number do not count."""
    said = Annotation("count", "cups", [0, 1])
    figures = summarize([asked(record, said, "1" * 480), asked(record, said, "0" * 480 + "2")])
    assert figures["count exact"] == 0.5 and figures["count error"] < 1e9


@pytest.mark.parametrize("text, exact", [("2.0", True), ("There are 2 cups.", True), ("1,002", False), ("2.7", False), ("20", False)])
def test_numbers_are_read_as_they_are_written(record, text, exact):
    """With a decimal point, and with commas between thousands."""
    assert asked(record, Annotation("count", "cups", [0, 1]), text).figures["count exact"] == exact
    assert asked(record, Annotation("count", "cups", count=1002), "1,002").figures["count exact"]


def test_tracks_are_scored_at_whole_seconds():
    """P, R, F1 look at the frames of whole seconds only, HOTA at all that was asked for."""
    record = clip(5)
    half_right = on(0, 1, 0, 2, 4) + on(1, 2, 0, 1, 3)
    figures = scores(Asked(record, Annotation("track", "x", [0, 1]), None, "", "", half_right))
    assert (figures["track precision"], figures["track recall"]) == (1, pytest.approx(4 / 6))
    assert figures["hota"] == pytest.approx((6 / 10 * (3 / 5)) ** 0.5)


@pytest.mark.parametrize("name", ["stills", "clips", "tracks", "text"])
def test_a_model_is_asked_end_to_end(tiny, name, monkeypatch):
    """Fresh records go through the model in batches: every question gets an answer, the same for every size of batch."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 24, True: 24})
    model, tokenizer = tiny
    make = lambda: evaluate.fresh(name, 1, model.config.views)
    figures, answers = evaluate.evaluate(model, tokenizer, make(), batch=8)
    again, one_by_one = evaluate.evaluate(model, tokenizer, make(), batch=1)
    assert figures["questions"] == len(answers) > 0 and figures == again
    assert [(a.annotation, a.question, a.text, a.points) for a in answers] == [
        (a.annotation, a.question, a.text, a.points) for a in one_by_one]


@pytest.mark.parametrize("text, right", [("B", True), ("B.", True), ("B. a red cup", True), ("A", False), ("A. B", False), ("a red cup", False)])
def test_a_choice_is_answered_by_its_letter(text, right, tiny, monkeypatch):
    """The letter counts, alone or in front of the option; the option alone, or another letter, is no answer."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 2, True: 2})
    record = data.draw("stills", 0, 0, 1)
    record.annotations = [Annotation("choice", question="Which?", answer="a red cup", choices=["a box", "a red cup"])]
    _, (asked,) = evaluate.evaluate(*tiny, iter([record]))
    asked.text = text
    assert scores(asked)["text exact"] == right


def test_an_evaluation_in_the_middle_of_training_leaves_the_model_as_it_was(tiny, monkeypatch):
    """Dropout is off while the model answers and on again when training goes on."""
    model, modes = Molmo(tiny[0].config).train(), []
    monkeypatch.setattr(evaluate, "generate", lambda m, batch, *_: modes.append({part.training for part in m.modules()}) or [Answer([], [], "stop")])
    evaluate.evaluate(model, tiny[1], iter([data.draw("stills", 0, 0, 1)]))
    assert modes == [{False}] and all(part.training for part in model.modules())


def test_long_clips_are_seen_as_the_model_sees_them():
    """Of a clip with more frames than the model looks at, evaluation and training get as many as it looks at; answers about tracks
    may be longer where it sees more, and coordinates as text twice as long."""
    views, frames = PRESETS["tiny"].views, lambda records: [len(record.times) for record in records]
    assert min(frames(data.draw("long tracks", evaluate.EVALUATION_SEED, i, 3) for i in range(3))) > views.max_frames
    assert frames(evaluate.fresh("long tracks", 3, views)) == [views.max_frames] * 3
    assert frames(loading.SyntheticSet("long tracks", 0, 3).record(i, views) for i in range(3)) == [views.max_frames] * 3
    for preset, lengths in (("tiny", [480, 1024]), ("molmo2-8b", [960, 8192])):
        assert [evaluate.longest(SimpleNamespace(config=PRESETS[preset]), tracks) for tracks in (False, True)] == lengths


def test_every_turn_of_a_chat_is_asked(tiny, monkeypatch):
    """A chat of two turns is two questions, the second after the true first answer, each compared with its own."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 2, True: 2})
    record = data.draw("stills", 0, 0, 1)
    record.annotations = [Annotation("chat", messages=[("What is this?", "A cup."), ("Which color?", "Red.")])]
    _, asked = evaluate.evaluate(*tiny, iter([record]))
    assert [(a.question, a.turn) for a in asked] == [("What is this?", 0), ("Which color?", 1)]
    for a, text in zip(asked, ("A cup.", "Red.")):
        a.text = text
        assert scores(a)["text exact"]


def asked_with(monkeypatch, model, tokenizer, record: Record) -> list[str]:
    """What the model is given about a record: the texts of trunk and branches."""
    batches = []
    monkeypatch.setattr(evaluate, "generate", lambda _, batch, *__: batches.append(batch) or [Answer([], [], "stop")] * int(batch.branch_ids.max()))
    evaluate.evaluate(model, tokenizer, iter([record]))
    (batch,) = batches
    return [tokenizer.decode(batch.tokens[0][batch.branch_ids[0] == branch].tolist()) for branch in range(int(batch.branch_ids.max()) + 1)]


def test_subtitles_and_earlier_turns_are_in_the_prompt(tiny, monkeypatch):
    """The model reads the subtitles in the trunk, and before a second turn the first one with its true answer."""
    record = data.draw("stills", 0, 0, 1)
    record.subtitles = "\n0.0 hello"
    record.annotations = [Annotation("chat", messages=[("What is this?", "A cup."), ("Which color?", "Red.")])]
    trunk, first, second = asked_with(monkeypatch, *tiny, record)
    assert trunk.endswith("subtitle\n0.0 hello") and first.endswith("What is this?<|im_end|>\n<|im_start|>assistant\n")
    assert second.endswith("What is this?<|im_end|>\n<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>user\nWhich color?<|im_end|>\n"
                           "<|im_start|>assistant\n")


@pytest.mark.parametrize("number, said, close", [(20, "18", True), (20, "17", False), (19, "17", False), (1, "2", True), (1, "some", False)])
def test_a_count_is_close_within_one_and_a_twentieth(number, said, close):
    """One and a twentieth of the true number, rounded down, may be missing or too much; an answer without a number is not close."""
    record = Record("r", [np.zeros((8, 8, 3), np.uint8)], None, {}, [])
    figures = scores(Asked(record, Annotation("count", "ants", count=number), None, "", said, []))
    assert figures["count close"] == close and not figures["count exact"]


def test_a_chat_that_points_is_asked_turn_by_turn(tiny, monkeypatch):
    """Behind a first answer that points the second turn is asked; each has the figures of what it is."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 8, True: 8})
    record = data.draw("stills", 0, 0, 1)
    everything = list(record.objects)
    record.annotations = [Annotation("chat", messages=[("Where?", Annotation("point", "things", everything)), ("So?", "Yes.")])]
    _, asked = evaluate.evaluate(*tiny, iter([record]))
    assert [a.turn for a in asked] == [0, 1] and "f1" in asked[0].figures and "text exact" in asked[1].figures


def test_questions_between_the_frames_are_counted(tiny, tmp_path, capsys, monkeypatch):
    """What points to a moment that is not looked at is not asked, and the figures say how many such there were."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 8, True: 8})
    model, tokenizer = tiny
    monkeypatch.setattr(model, "config", replace(model.config, views=replace(model.config.views, max_frames=2)))
    monkeypatch.setattr(evaluate.weights, "load", lambda *where: (model, tokenizer))
    data.write_video(tmp_path / "v.mp4", [np.full((40, 60, 3), n, np.uint8) for n in range(21)], 10)
    said = [{"task": "point", "label": "dots", "points": [{"x": 30, "y": 30, "time": t}]} for t in (0.7, 2)]
    (tmp_path / "v.jsonl").write_text(json.dumps({"video": "v.mp4", "annotations": said}))
    evaluate.main(["--data", str(tmp_path / "v.jsonl"), "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out
    assert ", 1 questions" in out and "left out: 1 about what no frame that is looked at, or asked for, shows" in out
    assert json.loads((tmp_path / "figures.json").read_text())["figures"][str(tmp_path / "v.jsonl")]["left out"] == 1


def test_lines_that_cannot_be_used_are_named_and_counted(tmp_path, capsys, monkeypatch):
    """A picture that is broken, and tracks at a rate at which nothing shows, cost their own questions and no others; a file with nothing
    else ends the command."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 8, True: 8})
    Image.new("RGB", (60, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    data.write_video(tmp_path / "v.mp4", [np.full((40, 60, 3), n, np.uint8) for n in range(21)], 10)
    still = lambda name: {"images": [name], "annotations": [{"task": "point", "label": "dots", "points": [{"x": 30, "y": 30}]}]}
    clip = {"video": "v.mp4", "objects": [{"id": 1, "points": [{"x": 30, "y": 30, "time": 0.5}]}],
            "annotations": [{"task": "track", "label": "dots", "objects": [1], "fps": fps} for fps in (1, 2)]}
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, (still("good.png"), still("bad.png"), clip))))
    evaluate.main(["--data", str(path), "--json", str(tmp_path / "figures.json")])
    out, err = capsys.readouterr()
    assert ", 2 questions" in out and "left out: 1 of 3 records" in out and "left out: 1 about" in out and f"{path}:2: " in err
    assert json.loads((tmp_path / "figures.json").read_text())["figures"][str(path)]["bad lines"] == 1
    path.write_text(json.dumps(still("bad.png")))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--data", str(path)])
    assert end.value.code == 2 and f"{path}:1: " in capsys.readouterr().err


def test_the_command_writes_its_settings(tmp_path, capsys, monkeypatch):
    """Figures of a JSONL file and every setting are printed, the figures as a table, and go to the JSON; a bad line is named and ends
    the command."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 8, True: 8})
    path = data.write_set("screens", tmp_path, 2, 0, 2)
    evaluate.main(["--data", str(path), "--json", str(tmp_path / "figures.json"), "--image-crops", "3"])
    said, made = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "figures.json").read_text())
    assert {"checkpoint", "sets", "seed", "records", "questions a record", "decoding", "prompts", "points read from", "crops", "frames", "fps",
            "batch", "longest answer", "dtype", "device"} <= set(made["settings"])
    assert made["settings"]["crops"] == 3
    assert said[0] == ", ".join(f"{name} {value}" for name, value in made["settings"].items())
    figures = made["figures"][str(path)]["all"]
    columns = [name for name in evaluate.COLUMNS if name in figures]
    assert said[-3] == f"| set | {' | '.join(columns)} |" and len(columns) >= 2
    assert said[-1].startswith(f"| {path} | {figures['questions']} | {figures[columns[1]]:.3f} |")
    assert set(made["figures"]) == {str(path)} and made["figures"][str(path)]["all"]["questions"] >= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "screens-0-1.png", "screens-1-1.png", "screens.jsonl"]
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--data", str(path)])
    assert end.value.code == 2 and f"{path}:3: " in capsys.readouterr().err
    (tmp_path / "screens-1-1.png").rename(tmp_path / "moved.png")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--data", str(path)])
    said = capsys.readouterr()
    assert end.value.code == 2 and f"{path}:2: " in said.err and "no such file" in said.err and said.out == ""  # before any question
    (tmp_path / "astray.json").symlink_to(tmp_path / "none" / "figures.json")
    for place, word in ((tmp_path, "a folder, not a file"), (tmp_path / "none" / "figures.json", "no such folder"), (tmp_path / "astray.json", "no such folder")):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--json", str(place)])
        assert end.value.code == 2 and word in capsys.readouterr().err


# ---- masks -----------------------------------------------------------------------------------------------------------------


def slow_contour(predicted: np.ndarray, true: np.ndarray) -> float:
    """DAVIS's F from its definition, pixel by pixel: an edge pixel differs from its right, lower or lower right neighbour; it
    is matched if the other mask has an edge pixel within 0.8% of the diagonal, rounded up."""
    height, width = true.shape

    def edge(mask):
        at = lambda y, x: mask[min(y, height - 1), min(x, width - 1)]
        return np.array([(y, x) for y in range(height) for x in range(width) if len({at(y, x), at(y, x + 1), at(y + 1, x), at(y + 1, x + 1)}) > 1])

    one, two, near = edge(predicted), edge(true), np.ceil(0.008 * np.hypot(height, width))
    if not len(one) or not len(two):
        return float(len(one) == len(two))
    close = lambda some, others: np.mean([((others - place) ** 2).sum(-1).min() <= near**2 for place in some])
    precision, recall = close(one, two), close(two, one)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shape", [(24, 31), (90, 140)])
def test_region_and_contour_equal_their_definitions(shape):
    """On blobs that agree, overlap, miss each other, touch the rim, are empty or full."""
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    disc = lambda x, y, r: (columns - x * shape[1]) ** 2 + (rows - y * shape[0]) ** 2 < (r * shape[0]) ** 2
    nothing, ragged = np.zeros(shape, bool), np.random.default_rng(0).random(shape) < 0.5
    masks = [disc(0.4, 0.5, 0.3), disc(0.42, 0.5, 0.3), disc(0.6, 0.5, 0.25), disc(0.02, 0.1, 0.3), nothing, ~nothing, disc(0.5, 0.5, 0.3) & ragged]
    for one in masks:
        for two in masks:
            j, f = evaluate.region_and_contour(one, two)
            assert j == ((one & two).sum() / (one | two).sum() if (one | two).any() else 1)
            assert f == pytest.approx(slow_contour(one, two), abs=1e-12)


def test_j_and_f_are_means_over_frames():
    """And J&F is the mean of both; frames without the object count 1 if none was found."""
    square = np.zeros((30, 30), bool)
    square[5:15, 5:15] = True
    found = evaluate.j_and_f([square, ~square & False, square], [square, ~square & False, ~square & False])
    assert found == pytest.approx({"J": 2 / 3, "F": 2 / 3, "J&F": 2 / 3})


def between(**changes) -> evaluate.Between:
    return replace(evaluate.Between(masks.Growing(), 6, ["fused"]), **changes)


def test_frames_are_asked_about_one_by_one(tiny, monkeypatch):
    """Every sixth frame with the four before it, each question there; figures are those of the frames together, also in
    those where nothing is left to be found; the same for every size of batch."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 24, True: 24})
    model, tokenizer = tiny
    record, seen = vpos.record(3, 1), []
    real = evaluate.ask
    monkeypatch.setattr(evaluate, "ask", lambda model, tokenizer, some: [seen.append(a.record) for a in some] and real(model, tokenizer, some))
    answers = evaluate.frame_by_frame(model, tokenizer, record, between(), (0,))
    anchors = range(0, len(record.pictures), 6)
    assert len(answers) == len(record.annotations) and len(seen) == len(answers) * len(anchors)
    for moment, anchor in zip(seen[::len(answers)], anchors):
        assert np.array_equal(moment.pictures[0], record.pictures[anchor]) and len(moment.before) == min(anchor, 4)
        assert all(np.array_equal(a, b) for a, b in zip(moment.before[::-1], record.pictures[anchor - 1::-1]))
    one = Annotation("track_from", "ball", [next(iter(record.objects))])  # cannot be asked about a frame: its label may fit others
    record.annotations.insert(0, one)
    again = evaluate.frame_by_frame(model, tokenizer, record, between(), (0,), batch=1)
    assert [a.figures for a in answers] == [a.figures for a in again]
    assert all(("J&F" in a.figures) == bool(a.annotation.objects) for a in answers)


def test_every_clip_has_wordings_of_its_own(tiny):
    """The number of a clip is part of the seed of its wordings."""
    record = vpos.record(3, 1)
    first, again, second = ([a.question for a in evaluate.frame_by_frame(*tiny, record, between(oracle=True), seed)] for seed in ((0, 0), (0, 0), (0, 1)))
    assert first == again != second


def test_true_points_score_full_marks_and_their_masks_well(tiny):
    """With the true points P, R, F1 and counts are perfect, and nothing is found where nothing is; a question about some
    objects is measured on all of them together. (Of every record the question about most things and the one about none.)"""
    for index in range(0, 5, 2):
        record = vpos.record(3, index)
        record.annotations = [max(record.annotations, key=lambda said: len(said.objects)), record.annotations[-1]]
        assert [len(said.objects) for said in record.annotations] == [3, 0]
        answers = evaluate.frame_by_frame(*tiny, record, between(oracle=True), (0,))
        for a in answers:
            wanted = {"precision", "recall", "f1", "f1 present", "count exact"} if a.annotation.objects else {"none recognised"}
            assert all(a.figures[name] == 1 for name in wanted & a.figures.keys()) and wanted & a.figures.keys()
        assert np.mean([a.figures["J&F"] for a in answers if "J&F" in a.figures]) > 0.5


def test_occlusions_ask_for_each_thing_alone():
    """With its mask in every frame in which it is seen; most of them are hidden at some moment."""
    records = [vpos.occlusions(3, index) for index in range(4)]
    for record in records:
        assert [said.objects for said in record.annotations] == [[i] for i in record.objects] and len(record.objects) >= 3
        assert all(thing.masks[t].mask()[int(y), int(x)] for thing in record.objects.values() for t, (x, y) in thing.points.items())
    shares = [len(thing.masks) / len(record.times) for record in records for thing in record.objects.values()]
    sizes = [[sum(runs.counts[1::2]) for runs in thing.masks.values()] for record in records for thing in record.objects.values()]
    assert np.mean([share < 1 or min(size) < 0.5 * max(size) for share, size in zip(shares, sizes)]) > 0.7


def test_fusing_both_directions_beats_the_rest(tiny):
    """Behind posts and each other, with the true points at every twelfth frame: the table's order at its ends. (A thing of each of four
    records: ahead by 0.015 and 0.024.)"""
    ways, records = ["fused", "left", "right", "intersection"], [vpos.occlusions(3, index) for index in range(4)]
    how = between(oracle=True, fusions=ways, every=12)
    for record in records:
        record.annotations = record.annotations[1:2]
    figures = summarize([a for record in records for a in evaluate.frame_by_frame(*tiny, record, how, (0,))])
    scores = {way: figures["J&F" if way == "fused" else f"J&F {way}"] for way in ways}
    assert min(scores, key=scores.get) == "intersection" and max(scores, key=scores.get) == "fused", scores


def test_a_track_without_whole_seconds_has_no_f1_there(record):
    """What is true at half a second only says nothing about whole seconds; HOTA does. With something true there, both count."""
    record.objects[1] = Object({0.5: (10.0, 5.0)}, {})
    half, whole = (evaluate.scores(asked(record, Annotation("track", "cups", [i]))) for i in (1, 0))
    assert half == {"hota": 0.0} and whole["track f1"] == whole["hota"] == 0.0


def test_figures_are_written_after_every_set(tmp_path, monkeypatch):
    """What ends in the second set leaves the figures of the first."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 8, True: 8})
    drawn = data.draw
    monkeypatch.setattr(data, "draw", lambda name, *words, **more: drawn(name, *words, **more) if name == "screens" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.main(["--set", "screens", "stills", "--records", "2", "--json", str(tmp_path / "f.json")])
    assert list(json.loads((tmp_path / "f.json").read_text())["figures"]) == ["screens"]


def test_masks_from_the_command(capsys, monkeypatch):
    """`--set vpos-synthetic` prints how the masks came about and the figures of every world."""
    monkeypatch.setattr(evaluate, "LONGEST", {False: 16, True: 16})
    evaluate.main(["--set", "vpos-synthetic", "--records", "5", "--every", "18"])
    out = capsys.readouterr().out
    assert "asked every 18 frames, each with 0 before it" in out and "temporal module none" in out and "J&F" in out and all(f"/{world} " in out for world in vpos.WORLDS)
    for words, said in ((["--sam2", "nowhere"], "SAM 2"), (["--data", "a", "--davis", "b"], "give one of them"),
                        (["--set", "stills", "--oracle"], "are for masks"), (["--set", "stills", "--every", "5"], "are for masks"),
                        (["--data", "a"], "--set goes with synthetic sets"), (["--expressions", "a"], "--expressions goes with --davis")):
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--set", "vpos-synthetic", *words])
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_points_of_one_id_are_all_followed(tiny, monkeypatch):
    """A model may write an id twice: both points count, for the points and for the masks."""
    record = vpos.record(3, 3)
    said = next(one for one in record.annotations if len(one.objects) > 1)
    record.annotations = [said]

    def ask(model, tokenizer, asked):
        for a in asked:
            a.points = [p._replace(id=1) for p in data.points_of(a.record, a.annotation)]

    monkeypatch.setattr(evaluate, "ask", ask)
    got = evaluate.frame_by_frame(*tiny, record, between(), (0,))[0].figures
    wanted = evaluate.frame_by_frame(*tiny, record, between(oracle=True), (0,))[0].figures
    assert got["f1"] == 1 and got["J&F"] == pytest.approx(wanted["J&F"], abs=0.03)
