"""The drawn worlds must be what they say: masks, points and answers are checked against independent computations."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import synthetic
from questions import queries
from synthetic import COLORS, KINDS, Scene, Thing, clip, first_seen, still

ROOT = Path(synthetic.__file__).parent


def scenes(stills: int, clips: int) -> list[Scene]:
    return [still(5, i) for i in range(stills)] + [clip(5, i) for i in range(clips)]


def digest(*parts: Scene) -> str:
    content = hashlib.sha256()
    for scene in parts:
        for array in (scene.frames, scene.masks, scene.points, scene.times):
            content.update(array.tobytes())
        content.update(repr((scene.things, scene.background, queries(scene, np.random.default_rng(0), 6))).encode())
    return content.hexdigest()


def test_a_scene_is_a_pure_function_of_seed_and_index():
    """Another call, after other calls, in another process with another string hash: the same bytes."""
    first = digest(still(3, 7), clip(3, 7))
    assert first == digest(still(3, 7), clip(3, 7)) != digest(still(3, 8), clip(3, 8))
    code = "import test_synthetic as t; print(t.digest(t.still(3, 7), t.clip(3, 7)))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": "12", "PYTHONDONTWRITEBYTECODE": "1"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first


def test_stills_keep_to_their_ranges(monkeypatch):
    """Sides, numbers and sizes of things lie in the promised ranges, and every thing shows at least 60% of itself."""
    areas, compose = [], synthetic._compose
    monkeypatch.setattr(synthetic, "_compose", lambda background, sprites, places: (
        areas.append([sprite.solid.sum() for sprite in sprites]), compose(background, sprites, places))[1])
    for i in range(60):
        scene = still(1, i)
        _, height, width, _ = scene.frames.shape
        assert 99 <= min(height, width) and max(height, width) <= 224 and not scene.is_video
        assert 2 <= len(scene.things) <= 11
        assert all(29 <= thing.size <= 56 for thing in scene.things)
        assert (scene.masks[0].sum((1, 2)) >= 0.60 * np.array(areas[-1])).all()
        assert np.isfinite(scene.points).all()


def test_clips_keep_to_their_ranges():
    """As for stills; and every thing is clearly visible at some moment, measured against the thing drawn alone."""
    for i in range(25):
        made, scene = synthetic.world(1, i), clip(1, i)
        frames, height, width, _ = scene.frames.shape
        assert 128 <= min(height, width) and max(height, width) <= 288 and 0.79 < width / height < 1.41
        assert 2 <= len(scene.things) <= 6 and scene.is_video
        assert all(0.26 <= thing.size / min(height, width) <= 0.42 for thing in scene.things)
        assert 1.5 <= scene.times[-1] <= 5 and np.array_equal(scene.times, np.arange(frames) / 2)
        for j, sprite in enumerate(made.sprites):
            _, alone, _ = synthetic._compose(np.zeros((200, 200, 3), np.uint8), [sprite], np.array([[100, 100]]))
            assert scene.masks[:, j].sum((1, 2)).max() >= 0.6 * alone.sum()


def test_scenes_contain_distractors():
    """Nearly all scenes hold several things of a kind, or one kind in two colours, or two kinds of one colour, and each of it is in a third."""
    shared = []
    for scene in scenes(60, 0):
        pairs = {(thing.kind, thing.color) for thing in scene.things}
        shared.append((len(pairs) < len(scene.things), len({kind for kind, _ in pairs}) < len(pairs), len({color for _, color in pairs}) < len(pairs)))
    assert np.sum(shared, axis=0).min() >= 20 and np.any(shared, axis=1).sum() > 50, np.sum(shared, axis=0)


def test_masks_are_disjoint_and_points_lie_in_them():
    """No pixel has two owners; a point that is not NaN lies on a pixel of its mask; a NaN goes with a small mask."""
    for scene in scenes(25, 10):
        frames, n, height, width = scene.masks.shape
        assert scene.masks.dtype == bool and scene.points.dtype == np.float32 and scene.frames.dtype == np.uint8
        assert scene.frames.shape == (frames, height, width, 3) and scene.points.shape == (frames, n, 2)
        assert scene.masks.sum(1).max() <= 1
        for frame, thing in itertools.product(range(frames), range(n)):
            x, y = scene.points[frame, thing]
            assert np.isnan(x) == np.isnan(y)
            if np.isfinite(x):
                assert scene.masks[frame, thing, int(y), int(x)]
            else:
                assert scene.masks[frame, thing].sum() < 0.2 * np.pi / 4 * (scene.things[thing].size + 6) ** 2


def test_masks_are_what_is_drawn():
    """A frame drawn without one of its things changes on all of that thing's mask (unless a thing of its colour lies
    behind), and elsewhere only along the soft edges, where two owners meet."""
    checked = 0
    for made in (synthetic.world(2, i) for i in range(20)):
        full = made.film(np.array([1.0]))
        owner = np.pad((full.masks[0] * np.arange(1, len(made.things) + 1)[:, None, None]).sum(0), 1, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(owner, (3, 3))
        edge = around.min((2, 3)) != around.max((2, 3))
        for j, thing in enumerate(made.things):
            rest = [k for k in range(len(made.things)) if k != j]
            frame, _, _ = synthetic._compose(made.background, [made.sprites[k] for k in rest], made.places(1.0)[rest])
            changed, mask = (frame != full.frames[0]).any(-1), full.masks[0, j]
            assert (changed & ~mask & ~edge).sum() <= 3  # a sharp tip fades over more than one pixel
            if all(made.things[k].color != thing.color for k in rest):
                assert (mask & ~changed).sum() <= 0.01 * mask.sum()
                checked += 1
    assert checked > 10


def test_the_point_shows_the_colour_of_its_thing():
    """The pixel under a point is nearest to the colour that the thing is called by (a few points lie on dark parts)."""
    right = []
    for scene in scenes(60, 10):
        for frame, points in zip(scene.frames, scene.points):
            for thing, (x, y) in zip(scene.things, points):
                if np.isfinite(x):
                    away = {name: ((frame[int(y), int(x)] - np.array(rgb)) ** 2).sum() for name, rgb in COLORS.items()}
                    right.append(min(away, key=away.get) == thing.color)
    assert len(right) > 500 and np.mean(right) > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_an_unhidden_thing_is_pointed_at_its_anchor(kind):
    """At every size of the training range the anchor is well inside the shape, at the same place of the shape."""
    for size in (16, 28, 60, 100):
        rng = np.random.default_rng(size)
        sprite = synthetic._sprite(rng, Thing(kind, "red", size))
        _, masks, points = synthetic._compose(np.zeros((130, 130, 3), np.uint8), [sprite], np.array([[65.0, 65.0]]))
        corner = 65 - len(sprite.solid) / 2
        offset = (points[0] - 65) / (size / 2)
        anchor = np.array(synthetic.SHAPES[kind][0])
        assert np.abs(points[0] - (np.array(sprite.anchor) + corner)).max() <= 0.5  # up to the rounding of the place
        assert abs(np.hypot(*offset) - np.hypot(*anchor)) <= 0.75 / (size / 2)      # a tilt keeps the radius


def test_the_deepest_pixel_is_the_farthest_from_the_edge():
    """By brute force over all pairs of pixels, in steps along rows and columns."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((17, 23), bool)
        for _ in range(3):
            top, left = rng.integers(0, 12, 2)
            mask[top:top + rng.integers(2, 10), left:left + rng.integers(2, 12)] = True
        padded = np.argwhere(~np.pad(mask, 1)) - 1
        inside = np.argwhere(mask)
        depth = np.abs(inside[:, None] - padded[None]).sum(-1).min(1)
        x, y = synthetic._deepest(mask)
        assert depth[(inside == (int(y), int(x))).all(1)] == depth.max()


def test_a_half_hidden_thing_keeps_a_point_and_a_hidden_one_has_none():
    """In the sample clip the red cup passes behind the house and the yellow one leaves: no point then, but before and
    after; the point of the half hidden cup moves off its anchor into the part in view."""
    made = synthetic.cups_world()
    scene = made.film(synthetic.filming_times(2, 5))
    red, yellow = (next(i for i, t in enumerate(scene.things) if t.name == name) for name in ("red cup", "yellow cup"))
    for thing in (red, yellow):
        seen = np.isfinite(scene.points[:, thing, 0])
        assert seen[0] and seen[-1] and not seen.all() and not scene.masks[~seen, thing].sum((1, 2)).min()
    share = np.array([made.visible(time) for time in scene.times])
    assert np.array_equal(np.isfinite(scene.points[..., 0]), share >= 0.2)
    partly = np.flatnonzero((share[:, red] > 0.2) & (share[:, red] < 0.4))
    assert len(partly) and all(scene.masks[f, red, int(y), int(x)] for f in partly for x, y in [scene.points[f, red]])
    in_the_thing = scene.points[:, red] - [made.places(time)[red] for time in scene.times]
    assert np.ptp(in_the_thing[share[:, red] == 1], axis=0).max() < 1 < np.abs(in_the_thing[partly] - in_the_thing[0]).max(1).min()


@pytest.mark.parametrize("index", range(5))
def test_frame_rates_film_the_same_world(index):
    """A clip at 2 and at 8 fps agrees at the common times; `seconds` is the last frame at any rate."""
    slow, fast = clip(4, index, 2), clip(4, index, 8)
    assert slow.things == fast.things and slow.background == fast.background
    common = np.searchsorted(fast.times, slow.times)
    assert np.array_equal(fast.times[common], slow.times)
    assert np.array_equal(fast.frames[common], slow.frames) and np.array_equal(fast.masks[common], slow.masks)
    assert np.array_equal(fast.points[common], slow.points, equal_nan=True)
    assert clip(4, index, 0.7).times[-1] == slow.times[-1]


def test_filming_times():
    """0, 1/fps, ... without a frame too many by rounding, then the last moment; nonsense is refused in one line."""
    assert synthetic.filming_times(2, 2).tolist() == [0, 0.5, 1, 1.5, 2]
    assert synthetic.filming_times(0.8, 2).tolist() == [0, 1.25, 2]
    assert synthetic.filming_times(10, 0.3).tolist() == [0, 0.1, 0.2, 0.3]
    assert len(synthetic.filming_times(25, 0.56)) == 15  # 0.56 * 25 is a little more than 14
    for fps, seconds in ((0, 1), (2, 0), (-1, 1), (2, float("nan"))):
        with pytest.raises(ValueError, match="fps > 0 and seconds > 0"):
            synthetic.filming_times(fps, seconds)
    assert clip(0, 0, 2, seconds=1.25).times.tolist() == [0, 0.5, 1, 1.25]
    with pytest.raises(ValueError, match="0 or more"):
        still(-1, 0)


def test_many_things_move_and_some_rest_leave_or_hide():
    """Over forty clips all the promised behaviours occur."""
    seen = Counter()
    for i in range(40):
        scene = clip(6, i)
        area = scene.masks.sum((2, 3))
        for thing in range(len(scene.things)):
            points = scene.points[:, thing]
            finite = np.isfinite(points[:, 0])
            seen["moves"] += np.nanmax(np.ptp(points[finite], 0)) > 10
            seen["rests"] += finite.all() and np.ptp(points, 0).max() == 0
            middle = area[1:-1, thing]
            seen["hides or leaves and returns"] += bool(
                ((middle < 0.5 * area[:, thing].max())).any() and area[-1, thing] > 0.8 * area[:, thing].max())
            seen["without a point"] += not finite.all()
    assert seen["moves"] > 60 and min(seen.values()) >= 10, seen


def test_first_seen():
    """The first frame with a point and 35% of the largest visible area, not the first glimpse and not the largest."""
    masks = np.zeros((5, 1, 1, 10), bool)
    for frame, area in enumerate((0, 3, 4, 10, 1)):
        masks[frame, 0, 0, :area] = True
    scene = Scene(np.zeros((5, 1, 10, 3), np.uint8), np.arange(5.0), [Thing("cup", "red", 3)], masks,
                  np.zeros((5, 1, 2), np.float32), "plain", True)
    assert first_seen(scene, 0) == 2
    scene.points[2] = np.nan
    assert first_seen(scene, 0) == 3


def test_crowds_hide_and_cross():
    """Three to eight things of few types, a fifth and more of them out of view at some moment and back later, all seen at some time."""
    returned, alike = [], []
    for index in range(40):
        scene = synthetic.tracks(0, index)
        assert 3 <= len(scene.things) <= 8 and 7 <= len(scene.times) <= 13
        seen = np.isfinite(scene.points[..., 0])
        assert seen.any(0).all()
        returned += [bool((~track[track.argmax():len(track) - track[::-1].argmax()]).any()) for track in seen.T]
        alike.append(max(Counter(thing.name for thing in scene.things).values()))
    assert np.mean(returned) > 0.2 and np.mean(alike) > 1.8


def test_arrivals_come_in_one_after_the_other():
    """Two to six things of the ranges of `clip`, of which more than a quarter show nothing in the first frame and some more
    a little of themselves, behind another (of `clip`'s, few), and which come in at different times; whatever is never
    clearly in view is left out."""
    hidden, glimpsed = ({make: [] for make in (clip, synthetic.arrivals)} for _ in range(2))
    first = Counter()
    for index in range(40):
        for make in hidden:
            scene = make(2, index)
            assert 2 <= len(scene.things) <= 6 and scene.is_video and 1.5 <= scene.times[-1] <= 5
            assert np.isfinite(scene.points[..., 0]).any(0).all()
            dark, late = ~scene.masks[0].any((1, 2)), np.array([first_seen(scene, i) > 0 for i in range(len(scene.things))])
            hidden[make] += dark.tolist()
            glimpsed[make] += (late & ~dark).tolist()
        first.update(first_seen(scene, i) for i in range(len(scene.things)))
    assert np.mean(hidden[synthetic.arrivals]) > 0.25 and np.mean(hidden[clip]) < 0.02
    assert np.mean(glimpsed[synthetic.arrivals]) > 0.06 and np.mean(glimpsed[clip]) < 0.08
    assert first[0] < 0.7 * first.total() and min(first[n] for n in (1, 2, 3)) > 4


def test_long_clips_are_the_same_worlds_for_longer():
    """6 to 15 seconds at 2 fps, the last moment included."""
    for make in (synthetic.long_clip, synthetic.long_tracks):
        times = [make(0, index).times for index in range(6)]
        assert all(6 <= some[-1] <= 15 and np.array_equal(some, synthetic.filming_times(2, some[-1])) for some in times)
        assert len({some[-1] for some in times}) > 3


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", str(ROOT / "synthetic.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_line(tmp_path):
    """A folder that cannot be one, or no folder at all, ends in one line and status 2."""
    (tmp_path / "file").write_text("")
    for words in (("cups", str(tmp_path / "file")), ("cups",), ()):
        wrong = run(*words)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("synthetic.py: ")


def test_the_sample_clip_shows_what_its_truth_says(tmp_path):
    """cups.mp4, decoded, has the frames and at the points of cups.json the colours that cups.json promises."""
    av = pytest.importorskip("av")
    done = run("cups", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cups.json", "cups.mp4"]
    truth = json.loads((tmp_path / "cups.json").read_text())
    with av.open(str(tmp_path / "cups.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == truth["seconds"] * truth["fps"] + 1 and frames[0].shape == (*truth["size"][::-1], 3)
    assert Counter(thing["kind"] for thing in truth["things"])["cup"] == 3
    for thing in truth["things"]:
        assert [moment["time"] for moment in thing["track"]] == [half / 2 for half in range(11)]
        assert 0.26 * 240 <= synthetic.cups_world().things[thing["id"]].size <= 0.42 * 240
        for moment in thing["track"]:
            assert (moment["x"] is None) == (moment["visible"] < 0.2)
            if moment["x"] is not None and moment["visible"] > 0.9:
                pixel = frames[round(moment["time"] * truth["fps"])][int(moment["y"]), int(moment["x"])].astype(int)
                assert np.abs(pixel - COLORS[thing["color"]]).max() < 40, (thing["kind"], moment, pixel)
