"""One schema for all data: what is written comes back, and what is wrong is said."""

import json

import numpy as np
import pytest
from PIL import Image

import data
from model import PRESETS
from preprocess import ViewConfig, write_video
from records import Annotation, Lines, Object, Record, Runs, dump, parse

VIEWS = PRESETS["tiny"].views


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_run_lengths_equal_a_walk_down_the_columns(density):
    """Zeros first, column by column; and the mask comes back."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 9, 2)) < density
        counts, value = [0], False
        for pixel in mask.T.ravel():
            if pixel != value:
                counts.append(0)
                value = pixel
            counts[-1] += 1
        runs = Runs.of(mask)
        assert list(runs.counts) == counts and runs.size == mask.shape
        assert np.array_equal(runs.mask(), mask)


@pytest.mark.parametrize("name", data.SETS)
def test_synthetic_records_survive_a_file(name, tmp_path):
    """A record as files and a line of JSON reads back as the same record: everything in it but the pictures of a video, which were
    compressed, is equal, points to a hundredth of a pixel, and so are its tokens, loss mask and grounding targets (but for one in ten in
    videos, whose odd sides grow by a pixel)."""
    from tokenizer import Tokenizer

    tokenizer = Tokenizer([(34, 62)])
    lines = Lines(data.write_set(name, tmp_path, 2, 3, 6))
    for index in range(2):
        made = data.draw(name, 3, index, 6, masks=True).limited(VIEWS)
        read = lines.record(index, VIEWS)
        assert (read.name, read.times, read.subtitles) == (made.name, made.times, made.subtitles)
        assert read.annotations == made.annotations
        one, two = (data.example(record, tokenizer, PRESETS["tiny"], np.random.default_rng(0)) for record in (made, read))
        assert np.array_equal(one.trunk, two.trunk) and np.array_equal(one.pooling, two.pooling)
        differ = 0
        for a, b in zip(one.branches, two.branches, strict=True):
            assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.loss_mask, b.loss_mask)
            assert len(a.points) == len(b.points)
            differ += (a.points[:, 0] != b.points[:, 0]).sum()
        assert differ <= 0.1 * sum(len(made.points) for made in one.branches)
        if made.times is None:
            assert np.array_equal(one.crops, two.crops)
            assert all(np.array_equal(a.points, b.points) for a, b in zip(one.branches, two.branches))
        assert made.objects.keys() == read.objects.keys()
        for i, thing in made.objects.items():
            back = read.objects[i]
            assert thing.shown == back.shown and thing.points.keys() == back.points.keys() and thing.masks.keys() == back.masks.keys()
            assert all(point == pytest.approx(back.points[moment], abs=0.01) for moment, point in thing.points.items())
            for moment, runs in thing.masks.items():
                height, width = runs.size
                assert np.array_equal(runs.mask(), back.masks[moment].mask()[:height, :width])


def test_frames_before_must_have_the_size_of_the_image(tmp_path):
    """Both sizes are said; those that fit are read, oldest first."""
    for name, size in (("a", (20, 10)), ("b", (20, 10)), ("c", (22, 10))):
        Image.new("RGB", size, (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    record = parse(json.dumps(GOOD | {"before": ["b.png", "a.png"]}), "x", tmp_path).load(VIEWS)
    assert [int(picture[0, 0, 0]) for picture in record.before] == [ord("b"), ord("a")]
    assert parse(json.dumps(GOOD | {"before": []}), "x", tmp_path).load(VIEWS).before == []
    with pytest.raises(ValueError, match="c.png: 22x10, the frame after it is 20x10"):
        parse(json.dumps(GOOD | {"before": ["c.png"]}), "x", tmp_path).load(VIEWS)


def test_compressed_run_lengths_are_masks_too(tmp_path):
    """By hand: 51 is 19 + 32 and 1, "c1"; 4 is "4"; 145 is 17 + 4 * 32, "a4"."""
    said = GOOD | {"objects": [{"id": 4, "points": [{"x": 3, "y": 2.5}], "masks": [{"size": [10, 20], "counts": "c14a4"}]}]}
    assert parse(json.dumps(said), "x", tmp_path).record.objects[4].masks == {0: Runs((10, 20), (51, 4, 145))}


GOOD = {"images": ["a.png"], "objects": [{"id": 4, "points": [{"x": 3, "y": 2.5}]}],
        "annotations": [{"task": "point", "label": "cups", "objects": [4]}]}
VIDEO = {"images": None, "video": "a.mp4", "objects": [{"id": 4, "points": [{"x": 3, "y": 2.5, "time": 0}]}]}


@pytest.mark.parametrize("change, said", [
    ({"annotations": []}, "'annotations' is empty"),
    ({"annotations": None}, "'annotations' is 'None', not a list"),
    ({"anotations": []}, "unknown key 'anotations'"),
    ({"video": "a.mp4"}, "'images' and 'video': give one of them"),
    ({"images": "a.png"}, "'images' is 'a.png', not a list"),
    ({"objects": [{"id": 4, "points": []}]}, "object 4 has no points"),
    ({"objects": [{"id": True, "points": []}]}, "'id' is 'True', not a whole number"),
    ({"objects": [{"id": 4, "points": [{"x": 3}]}]}, "'y' is missing"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1, "image": 2}]}]}, "'image' is 2 of 1"),
    (VIDEO | {"objects": [{"id": 4, "points": [{"x": 3, "y": 1, "time": "soon"}]}]}, "'time' is 'soon', not a number"),
    (VIDEO | {"objects": [{"id": 4, "points": [{"x": 3, "y": 1, "time": 1, "image": 1}]}]}, "unknown key 'image'"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1, "time": 1}]}]}, "unknown key 'time'"),
    (VIDEO | {"annotations": [{"task": "track", "label": "x", "points": [{"x": 3, "y": 1, "time": 1}]}]}, "would be another object"),
    ({"objects": [{"id": 900100259990, "points": [{"x": 3, "y": 1}]}]}, "'id' is '900100259990': numbers are below 1,000,000,000"),
    ({"objects": [{"id": 4, "points": [{"x": float("nan"), "y": 1}]}]}, "'x' is 'nan', not a number"),
    ({"objects": GOOD["objects"] * 2}, "two objects have the id 4"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}], "masks": [{"size": [2, 2], "counts": [1, 2]}]}]},
     "'counts' add up to 3, its 'size' is [2, 2]"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}], "masks": [{"size": [2, 2], "counts": "RLE"}]}]}, "'counts' add up to"),
    ({"images": ["a.png", "b.png"], "before": ["c.png"]}, "'before' goes with one image, not with 2"),
    ({"before": "c.png"}, "'before' is 'c.png', not a list"),
    ({"annotations": [{"task": "pointt"}]}, "'task' is 'pointt': known are point, "),
    ({"annotations": [{"task": "point", "objects": [4]}]}, "point needs 'label'"),
    ({"annotations": [{"task": "point", "label": "cups"}]}, "point needs 'objects'"),
    ({"annotations": [{"task": "point", "label": "cups", "objects": [5]}]}, "there is no object with id 5"),
    ({"annotations": [{"task": "count", "label": "cups"}]}, "count needs 'count', or 'objects'"),
    ({"annotations": [{"task": "caption"}]}, "caption needs 'answer'"),
    ({"annotations": [{"task": "choice", "question": "?", "choices": ["a"], "answer": "b"}]}, "'b' is none of the choices"),
    ({"annotations": [{"task": "chat", "messages": [{"role": "user", "content": "Hi"}]}]}, "must go from user to assistant"),
    ({"annotations": [{"task": "chat", "messages": [{"role": "user", "task": "point", "label": "a", "points": []}]}]}, "only the assistant points"),
    ({"annotations": [{"task": "chat", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "task": "caption", "answer": "a"}]}]},
     "words are 'content'"),
    ({"annotations": [{"task": "chat", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "task": "point", "label": "a",
                                                                                         "objects": [99]}]}]}, "no object with id 99"),
    ({"annotations": [{"task": "chat", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "task": "count", "count": 2, "label": "a",
                                                                                         "answer": "7"}]}]}, "unknown key 'answer'"),
    ({"annotations": [{"task": "chat", "messages": ["Hi"]}]}, "'Hi' is not an object in braces"),
    ({"annotations": [{"task": "point", "label": "cups", "objects": [], "messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]}, "point: 'messages' are for the task chat"),
    ({"annotations": [{"task": "track", "label": "x", "objects": [4]}]}, "track needs a video"),
    ({"annotations": [{"task": "point", "label": "x</points>", "objects": [4]}]}, "holds < or >"),
    (VIDEO | {"annotations": [{"task": "track", "label": "x", "objects": [4], "fps": 0}]}, "'fps' is 0"),
    (VIDEO | {"annotations": [{"task": "track_ends", "label": "x", "objects": [4], "fps": 1}]}, "'fps' goes with track and track_from"),
    (VIDEO | {"annotations": [{"task": "track_from", "label": "x", "objects": []}]}, "track_from needs one object"),
    (VIDEO | {"annotations": [{"task": "track", "label": "x", "objects": [4], "start": 1}]}, "track: 'start' goes with track_from"),
    ({"annotations": [{"task": "point", "label": "x", "objects": [4], "choices": ["a"], "answer": "a"}]}, "point: 'choices' go with the task choice"),
    ({"annotations": [{"task": "point", "label": " ", "objects": [4]}]}, "point needs 'label'"),
    ({"annotations": [{"task": "caption", "answer": "\n"}]}, "caption needs 'answer'"),
    (VIDEO | {"objects": [{"id": 4, "points": [{"x": 3, "y": 2}]}]}, "'time' is missing"),
    (VIDEO | {"objects": [{"id": 4, "points": [{"x": 3, "y": 2, "time": -1}]}]}, "'time' is -1, before the video"),
    ({"annotations": ["point"]}, "'point' is not an object in braces"),
    ({"annotations": [{"task": "point", "label": "x", "objects": [{"id": 4}]}]}, "'objects' is"),
    ({"annotations": [{"task": "point", "label": "x", "objects": [4, 4]}]}, "named twice"),
    ({"annotations": [{"task": "point", "label": "x", "objects": [4], "count": 1}]}, "only the task count has one"),
    ({"annotations": [{"task": "count", "label": "x", "count": -1}]}, "only the task count has one"),
    ({"annotations": [{"task": "point", "label": "x", "points": [{"x": 1, "y": 1}]}, {"task": "point", "label": "y", "objects": [5]}]},
     "no object with id 5"),
    ({"annotations": [{"task": "choice", "question": "?", "choices": ["a", "a"], "answer": "a"}]}, "choices must differ"),
    ({"annotations": [{"task": "choice", "question": "?", "choices": [1, 2], "answer": "a"}]}, "'choices' is '1', not a text"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}, {"x": 5, "y": 1}]}]}, "object 4 has two points in images"),
    (VIDEO | {"objects": [{"id": 4, "points": [{"x": 3, "y": 1, "time": 1}, {"x": 5, "y": 1, "time": 1}]}]}, "two points at one moment"),
    ({"objects": [{"id": 4, "points": [{"x": 10 ** 400, "y": 1}]}]}, "'x' is '1000"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}], "masks": [{"size": [None, 2], "counts": [4]}]}]}, "'size' is 'None'"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}], "masks": [{"size": [2.0, 2.0], "counts": [4]}]}]}, "'size' is '2.0'"),
    (VIDEO | {"annotations": [{"task": "track", "label": "x", "objects": [4], "fps": 1e8}]}, "'fps' is 1e"),
    ({"objects": [{"id": 4, "points": [{"x": 3, "y": 1}], "masks": [{"size": [2, 2], "counts": [4]}] * 2}]}, "object 4 has two masks at one moment"),
])
def test_bad_lines_say_what_is_wrong(change, said, tmp_path):
    """Every wrong line is refused with the thing that is wrong, and the good one is not."""
    parse(json.dumps(GOOD), "a", tmp_path)
    changed = {key: value for key, value in (GOOD | change).items() if key != "images" or value is not None}
    with pytest.raises(ValueError, match=".*" + said.replace("[", r"\[").replace("]", r"\]").replace("?", r"\?")):
        parse(json.dumps(changed), "a", tmp_path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{", "[]", '{"annotations": [NaN]}', '"text"', '{"images": [], "annotations": [{"task": "point"'])
def test_broken_json_is_a_value_error(text, tmp_path):
    """Nothing but ValueError comes out, whatever the line holds."""
    with pytest.raises(ValueError):
        parse(text, "a", tmp_path)


def test_masks_in_place_of_points_keep_the_rules_of_points(tmp_path):
    """An object with masks alone is in one image; what a video does not have is refused, be it a point or a mask."""
    mask = {"size": [64, 64], "counts": [4, 4092]}
    alone = {"objects": [{"id": 4, "masks": [mask | {"image": 1}, mask | {"image": 2}]}], "images": ["a.png", "b.png"]}
    with pytest.raises(ValueError, match="object 4 has masks in two images"):
        parse(json.dumps(GOOD | alone), "x", tmp_path, pointless=True)
    write_video(tmp_path / "v.mp4", (np.zeros((64, 64, 3), np.uint8) for _ in range(8)), 4)
    for late, said in ((mask | {"time": 9}, "a mask at 9 s"), (mask | {"time": 1}, None)):
        thing = {"id": 4, "points": [{"x": 3, "y": 1, "time": 0}], "masks": [late]}
        line = parse(json.dumps({"video": "v.mp4", "objects": [thing], "annotations": GOOD["annotations"]}), "x", tmp_path)
        if said:
            with pytest.raises(ValueError, match=f"object 4: {said}, the video ends at 1.75 s"):
                line.load(VIEWS)
        else:
            assert line.load(VIEWS).objects[4].masks


def test_a_bad_line_is_named_with_its_file(tmp_path):
    """File and line (empty lines count) stand in front, for bad JSON, missing pictures, points outside and wrong masks. (A mark of
    the encoding at the beginning of the file, as Windows writes it, is none.)"""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    outside = GOOD | {"objects": [{"id": 4, "points": [{"x": 21, "y": 5}]}]}
    mask = GOOD | {"objects": [{"id": 4, "points": [{"x": 2, "y": 5}], "masks": [{"size": [2, 2], "counts": [4]}]}]}
    texts = [json.dumps(GOOD), "", "{", json.dumps(GOOD | {"images": ["b.png"]}), json.dumps(outside), json.dumps(mask), "\xff"]
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode("latin-1"))
    lines = Lines(tmp_path / "set.jsonl")
    assert lines.size == 6 and lines.record(0, VIEWS).pictures[0].shape == (10, 20, 3)
    for i, (number, said) in enumerate([(3, "Expecting"), (4, "no such file"), (5, "21, 5 is outside the 20 x 10"),
                                        (6, r"size \[2, 2\] on a picture of \[10, 20\]"), (7, "utf-8")], start=1):
        with pytest.raises(ValueError, match=f"set.jsonl:{number}: .*{said}"):
            lines.record(i, VIEWS)


def test_missing_and_empty_files_are_errors(tmp_path):
    """A set without a file or without lines does not begin."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for name, said in (("none.jsonl", "cannot be read"), ("empty.jsonl", "holds no lines")):
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            Lines(tmp_path / name)


def test_points_without_objects_become_objects(tmp_path):
    """The short form, `points` in the annotation, makes an object of each, in the first image unless it says another."""
    said = {"images": ["a.png", "b.png"], "annotations": [
        {"task": "point", "label": "cups", "points": [{"x": 1, "y": 2, "image": 1}, {"x": 3, "y": 4, "image": 2}]},
        {"task": "point", "label": "pens", "points": []}]}
    record = parse(json.dumps(said), "a", tmp_path).record
    assert [thing.points for thing in record.objects.values()] == [{0: (1, 2)}, {1: (3, 4)}]
    assert [one.objects for one in record.annotations] == [[1, 2], []]


def test_moments_belong_to_the_nearest_frame():
    """What was said of a moment holds for the frame nearest to it if that is near, and the nearest of several counts."""
    record = Record("", [None] * 3, [0.0, 0.52, 1.0], {}, [])
    assert [record.picture(moment) for moment in (0, 0.2, 0.3, 0.9, 7)] == [0, 0, 1, 2, 2]
    assert record.seen({0.0: "a", 0.45: "z", 0.5: "c", 1.1: "d", 1.6: "e"}) == {0: "a", 1: "c", 2: "d"}
    assert record.seen({0.55: "a", 0.7: "z", 0.45: "b"}) == {1: "a"}
    assert Record("", [None] * 3, None, {}, []).seen({2: "c", 0: "a"}) == {0: "a", 2: "c"}


def test_what_left_before_a_frame_is_not_seen_there():
    """A track with ten points a second ends at 0.8 s: its object is out of view at 1.0 s, while a moment without neighbours
    holds for a quarter of a second around it."""
    record = Record("", [None] * 3, [0, 0.5, 1.0], {}, [])
    dense = {n / 10: n for n in range(9)}
    assert record.seen(dense) == {0: 0, 1: 5} and record.seen({0.8: 8}) == {2: 8}
    assert record.seen(dict(reversed(dense.items()))) == {0: 0, 1: 5} and record.seen({}) == {}
    assert record.seen({0.46: "a", 0.99: "b"}) == {1: "a", 2: "b"}  # twice a second, a little beside the frames


def test_long_videos_are_thinned_out_with_their_truth(tmp_path):
    """More frames than the model looks at: the kept ones are spread over the video and include the last; what happens between
    them is not put on a neighbour, and nothing is said of what only other frames show."""
    times = [n / 2 for n in range(31)]
    record = Record("", [np.full((4, 4, 3), n, np.uint8) for n in range(31)], times,
                    {1: Object({t: (t, 0) for t in times if t != 1.5}), 2: Object({1.0: (0, 0)})},
                    [Annotation("track", "x", [1]), Annotation("track", "y", [1, 2])])
    record.limited(ViewConfig(max_frames=11))
    assert record.times == [1.5 * n for n in range(11)] and [int(p[0, 0, 0]) for p in record.pictures] == list(range(0, 31, 3))
    assert record.seen(record.objects[1].points) == {n: (1.5 * n, 0) for n in range(11) if n != 1}
    assert [said.label for said in record.annotations] == ["x"]


def test_videos_are_read_at_their_own_times(tmp_path):
    """A video line gets the sampled frames of the file; its points go to the frames of their moments."""
    write_video(tmp_path / "v.mp4", (np.full((20, 30, 3), 8 * n, np.uint8) for n in range(21)), 10)
    said = {"video": "v.mp4", "objects": [{"id": 1, "points": [{"time": t, "x": 5 + t, "y": 5} for t in (0, 0.5, 2)]}],
            "annotations": [{"task": "track", "label": "dog", "objects": [1]}]}
    record = parse(json.dumps(said), "a", tmp_path).load(VIEWS)
    assert record.times == pytest.approx([0, 0.5, 1, 1.5, 2]) and record.medium == "video"
    assert [(p.picture, p.x) for p in data.points_of(record, record.annotations[0])] == [(0, 5), (1, 5.5), (4, 7)]
    said["objects"][0]["points"].append({"time": 3000, "x": 1, "y": 1})
    with pytest.raises(ValueError, match="a point at 3000 s, the video ends at 2 s"):
        parse(json.dumps(said), "a", tmp_path).load(VIEWS)
    said["objects"][0]["points"].pop()
    for change, words in (({"shown": 99}, "object 1: 'shown' is 99, the video is from 0 to 2 s"), ({"start": 500}, "track_from: 'start' is 500, the video")):
        late = {"video": "v.mp4", "objects": [said["objects"][0] | {k: v for k, v in change.items() if k == "shown"}],
                "annotations": [{"task": "track_from", "label": "dog", "objects": [1]} | {k: v for k, v in change.items() if k == "start"}]}
        with pytest.raises(ValueError, match=words):
            parse(json.dumps(late), "a", tmp_path).load(VIEWS)
    said["objects"][0]["points"] = [{"time": 0.7, "x": 1, "y": 1}]
    with pytest.raises(ValueError, match="none of the 2 frames looked at is within"):
        parse(json.dumps(said), "a", tmp_path).load(data.replace(VIEWS, max_frames=2))
    with pytest.raises(ValueError, match="none of the 1 frames looked at is within"):  # and not that the video ends before
        parse(json.dumps(said), "a", tmp_path).load(data.replace(VIEWS, max_frames=1))
    said["objects"].append({"id": 2, "points": [{"time": 2, "x": 1, "y": 1}]})
    said["annotations"] += [{"task": "point", "label": "cat", "objects": [2]}, {"task": "point", "label": "both", "objects": [1, 2]}]
    few = parse(json.dumps(said), "a", tmp_path).load(data.replace(VIEWS, max_frames=2))
    assert [one.label for one in few.annotations] == ["cat"]  # the others point between the frames
    assert json.loads(dump(record, video="v.mp4"))["objects"][0]["points"][1] == {"time": 0.5, "x": 5.5, "y": 5}
