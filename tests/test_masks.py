"""Masks: the tools against slow readings of their definitions, the embedded propagator on real motion, fusion by its table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import data
import masks
import preprocess
import records
from masks import FUSIONS, Growing, annotate, deepest, dilated, flood, grown, iou, same_objects, segment, shifted, squared_distance, through_time
from model import PRESETS
from records import Lines

VIEWS = PRESETS["tiny"].views


def random_mask(seed: int, share: float = 0.6, shape=(31, 43)) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < share


# ---- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.62, 0.8, 1.0])
def test_flood_equals_a_walk_from_pixel_to_pixel(share):
    """What is reached is what steps to the four neighbours reach, also through the winding paths near the threshold."""
    allowed, seeds = random_mask(1, share), random_mask(2, 0.01)
    wanted = seeds & allowed
    waiting = list(zip(*np.nonzero(wanted)))
    while waiting:
        y, x = waiting.pop()
        for row, column in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if 0 <= row < 31 and 0 <= column < 43 and allowed[row, column] and not wanted[row, column]:
                wanted[row, column] = True
                waiting.append((row, column))
    assert np.array_equal(flood(seeds, allowed), wanted)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_distances_are_those_to_the_nearest_pixel_outside(share):
    """Of all pixels of the mask, by brute force, the rim of the picture counting as outside."""
    mask = random_mask(3, share)
    rows, columns = np.nonzero(~np.pad(mask, 1))
    wanted = [[((rows - y - 1) ** 2 + (columns - x - 1) ** 2).min() if mask[y, x] else 0 for x in range(43)] for y in range(31)]
    assert np.array_equal(squared_distance(mask), wanted)


def test_the_deepest_pixel_is_farthest_from_the_edge():
    """Of a disc that the picture cuts off, it is not the middle of the disc."""
    rows, columns = np.mgrid[:20, :30]
    mask = (columns - 4) ** 2 + (rows - 10) ** 2 <= 64
    x, y = deepest(mask)
    assert y == 10.5 and 5 <= x <= 7 and squared_distance(mask)[10, int(x)] == squared_distance(mask).max()


@pytest.mark.parametrize("radius", [0, 1, 2, 5])
def test_dilated_is_the_disc_around_every_pixel(radius):
    """By shifting the mask everywhere in a disc."""
    mask = random_mask(4, 0.02)
    steps = range(-radius, radius + 1)
    wanted = np.any([shifted(mask, x, y) for x in steps for y in steps if x * x + y * y <= radius * radius], axis=0)
    assert np.array_equal(dilated(mask, radius), wanted)


@pytest.mark.parametrize("radius", [0, 1, 4])
def test_grown_is_the_square_around_every_pixel(radius):
    """By shifting the mask everywhere in a square."""
    mask = random_mask(4, 0.02)
    steps = range(-radius, radius + 1)
    assert np.array_equal(grown(mask, radius), np.any([shifted(mask, x, y) for x in steps for y in steps], axis=0))


def test_shifted_masks_leave_at_the_rim():
    """Whole pixels, nothing comes back in on the other side, and far away nothing is left."""
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[3, 4] = True
    assert np.argwhere(shifted(mask, 2, 1)).tolist() == [[2, 4]] and np.argwhere(shifted(mask, -2, -1)).tolist() == [[0, 0], [2, 2]]
    assert not shifted(mask, 5, 0).any() and not shifted(mask, 0, -9).any() and np.array_equal(shifted(mask, 0, 0), mask)


def test_iou_of_nothing_and_nothing_is_one():
    """And otherwise the intersection over the union."""
    a, b = random_mask(5), random_mask(6)
    assert iou(a & False, b & False) == 1 and iou(a, b & False) == 0
    assert iou(a, b) == pytest.approx((a & b).sum() / (a | b).sum())


# ---- without weights -----------------------------------------------------------------------------------------------------


def disc(frame: np.ndarray, x: float, y: float, radius: float, color) -> np.ndarray:
    """Drawn into the frame; -> its mask."""
    rows, columns = np.mgrid[:frame.shape[0], :frame.shape[1]]
    mask = (columns - x) ** 2 + (rows - y) ** 2 <= radius ** 2
    frame[mask] = color
    return mask


def street(frames: int = 13) -> tuple[list[np.ndarray], np.ndarray]:
    """A red disc that passes behind a grey post, and a green one that comes the other way, on noise; their masks (T, 2, H, W)."""
    rng, shown, truth = np.random.default_rng(0), [], []
    for t in range(frames):
        frame = np.clip(rng.normal((150, 160, 175), 6, (80, 120, 3)), 0, 255).astype(np.uint8)
        red, green = disc(frame, 12 + 8 * t, 30, 9, (200, 40, 30)), disc(frame, 108 - 7 * t, 60, 8, (30, 160, 60))
        frame[:, 55:67] = (70, 70, 74)
        post = np.zeros(red.shape, bool)
        post[:, 55:67] = True
        shown.append(frame)
        truth.append([red & ~post, green & ~post])
    return shown, np.array(truth)


def middle(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean() + 0.5), float(rows.mean() + 0.5)


def test_a_point_becomes_its_object():
    """The region of the colour at the point, with small holes, without what is beside it; a point outside of the picture
    means the pixel nearest to it."""
    frames, truth = street()
    for number in (0, 1):
        assert iou(segment(frames[0], *middle(truth[0, number])), truth[0, number]) > 0.9
    frame = np.full((30, 40, 3), 200, np.uint8)
    ring = disc(frame, 20, 15, 9, (20, 20, 160))
    disc(frame, 20, 15, 2, (250, 250, 250))
    assert iou(segment(frame, 20, 9), ring) > 0.95
    assert segment(frame, -5, 99)[-1, 0]


@pytest.mark.parametrize("backwards", [False, True])
def test_objects_are_followed_in_either_direction(backwards):
    """From the first frame to the last or back: through the post and out again, each frame in turn, with the right id."""
    frames, truth = street()
    start, stop = (12, 0) if backwards else (0, 12)
    points = {7: middle(truth[start, 0]), 3: middle(truth[start, 1])}
    found = list(Growing()(frames, start, points, stop))
    order = range(12, -1, -1) if backwards else range(13)
    assert len(found) == 13 and all(list(m) == [7, 3] for m in found)
    scores = [iou(m[i], truth[t, n]) for t, m in zip(order, found) for n, i in ((0, 7), (1, 3)) if truth[t, n].sum() > 60]
    assert np.mean(scores) > 0.85


def test_a_call_remembers_nothing_of_another():
    """The same backward run before and after a forward run on other frames gives the same masks."""
    frames, truth = street()
    carry, points = Growing(), {1: middle(truth[12, 0])}
    before = [m[1] for m in carry(frames, 12, points, 4)]
    list(carry([np.roll(f, 9, 0) for f in frames], 0, {1: (20, 20)}, 12))
    assert np.array_equal(before, [m[1] for m in carry(frames, 12, points, 4)])


def test_one_frame_and_no_objects():
    """start == stop is one frame; without points every frame has no mask."""
    frames, truth = street(3)
    assert len(list(Growing()(frames, 1, {1: middle(truth[1, 0])}, 1))) == 1
    assert list(Growing()(frames, 0, {}, 2)) == [{}, {}, {}]


# ---- fusion --------------------------------------------------------------------------------------------------------------


def test_fusion_by_its_table():
    """Agreeing masks: their intersection; others: their union; one empty: the other; both: nothing. And the alternatives."""
    row = lambda first, last: np.array([[first <= i < last for i in range(20)]])
    a, near, far, none = row(0, 10), row(1, 11), row(8, 14), row(0, 0)
    fuse = lambda how, one, two: FUSIONS[how](one, two)
    for one, two, wanted in ((a, near, row(1, 10)), (a, far, row(0, 14)), (a, none, a), (none, far, far), (none, none, none)):
        assert np.array_equal(fuse("fused", one, two), wanted) and np.array_equal(fuse("fused", two, one), wanted)
    assert np.array_equal(FUSIONS["fused"](row(0, 10), row(0, 7)), row(0, 7))  # exactly at the threshold they agree
    for how, wanted in (("left", a), ("right", far), ("intersection", row(8, 10)), ("union", row(0, 14)), ("larger", a), ("smaller", far)):
        assert np.array_equal(fuse(how, a, far), wanted)


class Script:
    """A propagator that says which call it was: every object keeps the pixel of its point."""

    def __call__(self, frames, start, points, stop):
        for number in range(start, stop + (1 if stop >= start else -1), 1 if stop >= start else -1):
            found = {}
            for identity, (x, y) in points.items():
                found[identity] = np.zeros(frames[0].shape[:2], bool)
                found[identity][int(y), int(x)] = True
            yield found


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 10, 11])
@pytest.mark.parametrize("every", [1, 3, 5, 20])
def test_every_frame_has_its_masks(length, every):
    """One set of masks for every frame, whatever the number of frames and the distance of the anchors, asked for with as
    much history as there is; an object that stands still keeps its id and its pixel."""
    frames, asked = [np.full((4, 4, 3), t, np.uint8) for t in range(length)], []

    def ask(index, recent):
        asked.append((index, [int(f[0, 0, 0]) for f in recent]))
        return {5: (2.5, 1.5), 9: (0.5, 0.5)}

    found = list(through_time(iter(frames), ask, range(0, 99, every), Script()))
    assert len(found) == length and all(list(m) == [1, 2] and m[1][1, 2] and m[2][0, 0] for m in found)
    assert asked == [(i, list(range(max(i - 4, 0), i + 1))) for i in range(0, length, every)]


def test_nothing_at_an_anchor():
    """An object that one anchor does not show is carried from the other one, not to the anchor itself; anchors without
    any object give frames without any."""
    frames = [np.zeros((4, 4, 3), np.uint8)] * 9
    there = lambda shown: lambda index, _: {1: (1.5, 1.5)} if index in shown else {}
    sizes = lambda shown: [sum(m.any() for m in masks.values()) for masks in through_time(frames, there(shown), range(0, 9, 4), Script(), named=True)]
    assert sizes({0, 4, 8}) == [1] * 9
    assert sizes({0}) == [1, 1, 1, 1, 0, 0, 0, 0, 0] and sizes({4}) == [0, 1, 1, 1, 1, 1, 1, 1, 0] and sizes({8}) == [0] * 5 + [1] * 4
    assert sizes(set()) == [0] * 9


def test_objects_keep_their_ids_from_anchor_to_anchor():
    """Two discs that cross: asked for in another order at every other anchor, each keeps the id under which it first came; one
    that comes later gets a new one."""
    frames, truth = street()

    def ask(index, _):
        points = [middle(truth[index, n]) for n in (0, 1) if truth[index, n].sum() > 60]
        return dict(enumerate(points[::-1] if index % 2 else points))

    found = list(through_time(frames, ask, range(0, 13, 5), Growing()))
    at = lambda t, n: max(found[t], key=lambda i: iou(found[t][i], truth[t, n]))
    assert [at(t, 0) for t in (0, 2, 10, 12)] == [1] * 4 and [at(t, 1) for t in (0, 5, 10, 12)] == [2] * 4
    assert {i for masks in found for i in masks} == {1, 2}
    late = lambda index, _: {0: middle(truth[index, 1])} | ({1: middle(truth[index, 0])} if index >= 9 else {})
    found = list(through_time(frames, late, range(0, 13, 3), Growing()))
    assert list(found[0]) == [1] and list(found[12]) == [1, 2] and at(12, 0) == 2


def test_an_object_overlooked_at_an_anchor_keeps_its_id():
    """It is followed through that anchor, where it has no mask, and known again at the next one."""
    frames, told = [np.full((4, 4, 3), t, np.uint8) for t in range(9)], {}
    ask = lambda index, _: {0: (2.5, 1.5), 1: (0.5, 0.5)} if index != 4 else {0: (0.5, 0.5)}
    found = list(through_time(frames, ask, range(0, 9, 4), Script(), tell=told.__setitem__))
    assert told == {0: {1: (2.5, 1.5), 2: (0.5, 0.5)}, 4: {2: (0.5, 0.5)}, 8: {1: (2.5, 1.5), 2: (0.5, 0.5)}}
    assert [list(masks) for masks in found] == [[1, 2]] * 4 + [[2]] + [[1, 2]] * 4


def test_the_better_of_two_agreements_counts():
    """An object that is hidden at one anchor is known by its mask at the other; each is used once, the best pair first."""
    on = lambda *cells: np.isin(np.arange(9).reshape(3, 3), cells)
    left = [{1: on(0, 1), 2: on(8)}, {1: on(), 2: on(5)}]
    right = [{7: on(0, 1), 9: on(0)}, {7: on(3), 9: on(5)}]
    assert same_objects(left, right) == {7: 1, 9: 2}
    assert same_objects([{}, {}], right) == {}


def test_frames_of_another_size_are_refused():
    """With both sizes and the number of the frame."""
    frames = [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(ValueError, match="frame 1 is 5x4, those before are 6x4"):
        list(through_time(frames, lambda *_: {}, range(0, 9, 4), Script()))


# ---- masks to points -----------------------------------------------------------------------------------------------------


def test_annotation_finds_a_point_whose_mask_fits():
    """In the larger of two discs that touch, with its own colour: the point is in the mask and its mask is the mask."""
    frame = np.full((40, 60, 3), 210, np.uint8)
    one = disc(frame, 20, 20, 12, (190, 40, 40))
    other = disc(frame, 42, 20, 8, (40, 60, 190))
    rng = np.random.default_rng(0)
    for mask in (one & ~other, other):
        (x, y), fit = annotate(frame, mask, rng)
        assert mask[int(y), int(x)] and iou(segment(frame, x, y), mask) == fit > 0.9


def test_candidates_lie_deep_in_the_mask():
    """They are drawn by their distance to the edge: of 400 points few are on the rim, and the segmenter decides among them."""
    mask = np.pad(np.ones((21, 21), bool), 3)
    frame, rng, seen = np.zeros((27, 27, 3), np.uint8), np.random.default_rng(0), []

    def segmenter(_, x, y):
        seen.append((x, y))
        return mask if len(seen) % masks.CANDIDATES == 3 else ~mask

    chosen = [annotate(frame, mask, rng, segmenter) for _ in range(40)]
    assert len(seen) == 400 and chosen == [(place, 1.0) for place in seen[2::10]]
    depth = squared_distance(mask) ** 0.5
    drawn = np.array([depth[int(y), int(x)] for x, y in seen])
    assert drawn.min() >= 1 and drawn.mean() > 1.3 * depth[mask].mean()


def test_bad_masks_have_no_point():
    """An empty one, and one of another size than its picture."""
    for mask, said in ((np.zeros((4, 4), bool), "empty"), (np.ones((4, 5), bool), "a mask of 5x4 on a picture of 4x4")):
        with pytest.raises(ValueError, match=said):
            annotate(np.zeros((4, 4, 3), np.uint8), mask, np.random.default_rng(0))


def masks_file(folder, images: bool = False) -> Path:
    """Clips (or stills) as a file whose objects have masks and no points."""
    path = data.write_set("stills" if images else "clips", folder, 2 if images else 1, 4, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for thing in line["objects"]:
            del thing["points"]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.mark.parametrize("images", [True, False])
def test_a_file_of_masks_becomes_one_of_points(tmp_path, images, capsys, monkeypatch):
    """Every mask gives its object a point inside of it, with which the file can be trained on; the masks and all that is said
    stay, paths too though the new file lies elsewhere, behind a link; the old file is not touched."""
    monkeypatch.setattr(masks, "CANDIDATES", 4)
    path = masks_file(tmp_path / "in", images)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'points' is missing"):
        Lines(path).record(0, VIEWS)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "far/away")
    masks.main(["annotate", str(path), "--out", str(tmp_path / "elsewhere/made.jsonl")])
    said = capsys.readouterr().out
    assert float(re.search(r"IoU of ([0-9.]+)", said)[1]) > 0.4 and path.read_bytes() == before
    made, old = Lines(tmp_path / "elsewhere/made.jsonl"), Lines(path)
    for index in range(old.size):
        record, was = made.record(index, VIEWS), old.line(index, VIEWS, pointless=True).record
        assert record.annotations == was.annotations and record.objects.keys() == was.objects.keys()
        for identity, thing in record.objects.items():
            assert thing.masks == was.objects[identity].masks and thing.points.keys() == thing.masks.keys()
            assert all(thing.masks[moment].mask()[int(y), int(x)] for moment, (x, y) in thing.points.items())
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["made.jsonl"]


def test_masks_of_a_video_belong_to_their_own_frames(tmp_path, capsys):
    """Thirty frames a second, something else in each: every mask is asked about in its own frame, and an annotation stays that no
    sampled frame would show. A line whose masks fit nothing is left out, or is the error if there is no other."""
    frames, places = [], [(10 + 3 * n, 20 + n) for n in range(12)]
    for x, y in places:
        frame = np.full((64, 80, 3), 30, np.uint8)
        frame[y:y + 16, x:x + 16] = 250, 220, 40
        frames.append(frame)
    preprocess.write_video(tmp_path / "v.mp4", frames, 30)
    masks_of = []
    for n, (x, y) in enumerate(places):
        mask = np.zeros((64, 80), bool)
        mask[y:y + 16, x:x + 16] = True
        masks_of.append({"time": n / 30, "size": [64, 80], "counts": records.compress(records.Runs.of(mask).counts)})
    line = {"video": "v.mp4", "objects": [{"id": 0, "masks": masks_of}], "annotations": [{"task": "point", "label": "squares", "objects": [0]}]}
    (tmp_path / "v.jsonl").write_text(json.dumps(line))
    masks.main(["annotate", str(tmp_path / "v.jsonl")])
    said = capsys.readouterr().out
    assert "1 lines, 12 points" in said and float(re.search(r"IoU of ([0-9.]+)", said)[1]) > 0.9, said
    assert len(Lines(tmp_path / "v.points.jsonl").line(0).record.objects[0].points) == 12
    late, small, outside = ({**masks_of[0], "time": 3}, {**masks_of[0], "size": [32, 160]}, [{"time": 0.1, "x": 500, "y": 3}])
    for name, objects, said in (("late", [{"id": 0, "masks": [*masks_of[1:], late]}], "a mask at 3 s, the video ends at"),
                                ("small", [{"id": 0, "masks": [small]}], "a mask of size [32, 160] on a picture of [64, 80]"),
                                ("outside", [{"id": 0, "masks": masks_of, "points": outside}], "the point 500, 3 is outside the 80 x 64 picture")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line | {"objects": objects}))
        with pytest.raises(SystemExit) as end:
            masks.main(["annotate", str(tmp_path / f"{name}.jsonl")])
        assert end.value.code == 2 and f"{tmp_path / name}.jsonl:1: object 0: {said}" in capsys.readouterr().err
    lines = [line | {"objects": objects} for objects in ([{"id": 0, "masks": [small]}], [{"id": 0, "masks": masks_of}])]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, lines)))
    masks.main(["annotate", str(tmp_path / "both.jsonl")])
    out, err = capsys.readouterr()
    assert f"warning: left out: {tmp_path / 'both'}.jsonl:1: object 0: a mask of size" in err and "1 lines (1 left out), 12 points" in out
    assert len(Lines(tmp_path / "both.points.jsonl").line(0).record.objects[0].points) == 12


def test_annotate_ends_in_one_line(tmp_path, capsys):
    """No file, a bad line, the file itself under another name, a result that is there already, no such folder: status 2,
    and nothing is left behind."""
    path = masks_file(tmp_path, True)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(path.read_text() + "{\n")
    (tmp_path / "stills.points.jsonl").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for words, said in ((["none.jsonl"], "none.jsonl: cannot be read"), ([bad], f"{bad}:3: "), ([path], "is there already"),
                        ([path, "--out", tmp_path / ".." / tmp_path.name / path.name], "the file itself"),
                        ([path, "--out", tmp_path / "no/made.jsonl"], "its folder does not exist"), ([], "FILE.jsonl")):
        with pytest.raises(SystemExit) as end:
            masks.main(["annotate", *map(str, words)])
        line = capsys.readouterr().err
        assert end.value.code == 2 and said in line and line.count("\n") == 1, line
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


def test_large_frames_are_followed_at_a_smaller_size():
    """Masks come in the frames' own size."""
    frames, truth = street(3)
    large = [frame.repeat(7, 0).repeat(7, 1)[:-3] for frame in frames]
    found = list(Growing()(large, 0, {1: tuple(7 * v for v in middle(truth[0, 0]))}, 2))
    for t, one in enumerate(found):
        assert one[1].shape == large[0].shape[:2] and iou(one[1], truth[t, 0].repeat(7, 0).repeat(7, 1)[:-3]) > 0.85


def test_flat_things_are_segmented_to_their_rim():
    """Squares of one colour on another: nothing is lost to the smoothing."""
    for color, shape in (((200, 30, 30), (15, 15)), ((30, 60, 190), (15, 20)), ((240, 240, 80), (9, 40))):
        frame, mask = np.full((60, 80, 3), 128, np.uint8), np.zeros((60, 80), bool)
        mask[20:20 + shape[0], 30:30 + shape[1]] = True
        frame[mask] = color
        assert iou(segment(frame, 35, 25), mask) > 0.97


def test_what_is_not_pointed_at_any_more_is_forgotten():
    """New points at every anchor, nothing known again: the number of objects carried stays bounded."""
    class Counting(Script):
        carried = []

        def __call__(self, frames, start, points, stop):
            self.carried.append(len(points))
            return super().__call__(frames, start, points, stop)

    carry, frames = Counting(), [np.zeros((40, 40, 3), np.uint8)] * 61
    ask = lambda index, _: {0: (index // 2 % 40 + 0.5, 0.5), 1: (0.5, index // 2 % 38 + 1.5)}
    assert len(list(through_time(frames, ask, range(0, 61, 2), carry))) == 61
    assert max(carry.carried) <= 2 * (1 + masks.PATIENCE)
