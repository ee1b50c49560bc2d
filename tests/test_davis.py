"""DAVIS-style folders: natural order, several layouts, and what is wrong with a folder, in one line."""

import json

import numpy as np
import pytest
from PIL import Image

import evaluate
from davis import Sequences, inner
from records import Runs, compress, decompress

SIZE = (40, 60)  # height, width


def masks_of(frame: int) -> np.ndarray:
    """Object 1 walks to the right, object 2 stands; in the last of three frames object 7 appears."""
    numbers = np.zeros(SIZE, np.uint8)
    numbers[5:15, 5 + 8 * frame:17 + 8 * frame] = 1
    numbers[25:38, 30:50] = 2
    if frame == 2:
        numbers[20:24, 2:9] = 7
    return numbers


def made(folder, names=("1", "2", "10"), below="", expressions=None):
    """A folder with one sequence `walk` of three frames; -> its path."""
    for frame, name in enumerate(names):
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
            (folder / kind / below / "walk").mkdir(parents=True, exist_ok=True)
        numbers = masks_of(frame)
        picture = np.array([(200, 200, 195), (190, 40, 40), (40, 60, 190), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (30, 140, 60)], np.uint8)[numbers]
        Image.fromarray(picture).save(folder / "JPEGImages" / below / "walk" / f"{name}.jpg", quality=95)
        image = Image.fromarray(numbers)
        image.putpalette(list(range(256)) * 3)
        image.save(folder / "Annotations" / below / "walk" / f"{name}.png")
    said = expressions or {"0": {"exp": "the red thing", "obj_id": "1"}, "1": {"exp": "the blue thing", "obj_id": "2"},
                           "2": {"exp": "what comes at the end", "obj_id": "7"}}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": {"walk": {"expressions": said, "frames": list(names)}}}))
    return folder


@pytest.mark.parametrize("below", ["", "480p"])
def test_frames_come_in_natural_order_with_their_masks(tmp_path, below):
    """1, 2, 10; with a folder of the resolution or without; an id of the last frame alone is an object like others."""
    folder = made(tmp_path, below=below)
    del (values := json.loads((folder / "meta_expressions.json").read_text()))["videos"]["walk"]["frames"]
    (folder / "meta_expressions.json").write_text(json.dumps(values))
    (folder / "JPEGImages" / below / "walk/Thumbs.db").touch()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = Sequences(folder).record(0)
    assert record.name == "walk" and [said.label for said in record.annotations] == ["the red thing", "the blue thing", "what comes at the end"]
    assert [said.objects for said in record.annotations] == [[1], [2], [7]]
    for frame, time in enumerate(record.times):
        for identity in (1, 2):
            assert np.array_equal(record.objects[identity].masks[time].mask(), masks_of(frame) == identity)
            x, y = record.objects[identity].points[time]
            assert masks_of(frame)[int(y), int(x)] == identity
    assert list(record.objects[7].masks) == [record.times[2]]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_mevis_masks_are_run_lengths(tmp_path):
    """Expressions that name several objects, with masks in mask_dict.json, compressed or not, null where there is none."""
    folder = made(tmp_path, expressions={"0": {"exp": "both", "obj_id": [0, 1], "anno_id": [11, 12]}})
    runs = lambda number: [(lambda made: {"size": list(made.size), "counts": compress(made.counts)})(Runs.of(masks_of(f) == number)) for f in range(3)]
    listed = {"11": runs(1), "12": [None, {"size": list(SIZE), "counts": list(Runs.of(masks_of(1) == 2).counts)}, None]}
    (folder / "mask_dict.json").write_text(json.dumps(listed))
    record = Sequences(folder).record(0)
    assert record.annotations[0].objects == [11, 12]
    assert [np.array_equal(record.objects[11].masks[t].mask(), masks_of(f) == 1) for f, t in enumerate(record.times)] == [True] * 3
    assert list(record.objects[12].masks) == [record.times[1]]


def test_compressed_run_lengths_are_read_back():
    """Numbers of all sizes, growing and shrinking."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = [int(n) for n in rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 12))]
        assert decompress(compress(counts)) == counts


def test_the_inner_point_is_in_the_mask():
    """Also of a ring, whose middle is not."""
    ring = np.hypot(*(np.mgrid[:30, :30] - 15)) // 4 == 2
    x, y = inner(ring)
    assert ring[int(y), int(x)]


def test_scores_of_a_folder(tmp_path, capsys, monkeypatch):
    """The true points at every second frame, carried by colour: objects that one looks for are found, with J, F and J&F per
    expression, and the JSON says how it was measured."""
    folder = made(tmp_path)
    evaluate.main(["--davis", str(folder), "--oracle", "--every", "2", "--fusion", "fused", "left", "--json", str(tmp_path / "f.json")])
    figures = json.loads((tmp_path / "f.json").read_text())
    table = figures["figures"][str(folder)]["all"]
    assert table["questions"] == 3 and table["J&F"] > 0.8 and table["f1"] == 1 and table["J&F"] == pytest.approx((table["J"] + table["F"]) / 2)
    assert figures["figures"][str(folder)]["by question"] == {"point/walk": table["J&F"]}
    assert "J&F left" in table and figures["settings"]["points"] == "true" and figures["settings"]["asked every"].startswith("2 frames")
    assert "J&F" in capsys.readouterr().out


def shrink(folder, kind, name):
    path = folder / kind / "walk" / name
    Image.open(path).resize((30, 20), Image.NEAREST).save(path)


def write(folder, values):
    (folder / "meta_expressions.json").write_text(values if isinstance(values, str) else json.dumps(values))


def mevis(folder, masks, **said):
    write(folder, {"videos": {"walk": {"expressions": {"0": {"exp": "x", "anno_id": [3]} | said}}}})
    (folder / "mask_dict.json").write_text(json.dumps(masks))


BAD = {
    "an expression that is a text": (lambda f: write(f, {"videos": {"walk": {"expressions": {"0": "a dog"}}}}), "walk: 'a dog' is not an object in braces"),
    "frames in lists": (lambda f: write(f, {"videos": {"walk": {"expressions": {}, "frames": [["1"]]}}}), "'frames' is"),
    "videos in a list": (lambda f: write(f, {"videos": ["walk"]}), "'videos' is"),
    "odd keys": (lambda f: write(f, {"videos": {"walk": {"expressions": {"\u00b2": {"exp": "x"}, "a": {"exp": "y"}}}}}), "cannot be scored"),
    "no list of annotations": (lambda f: mevis(f, {"3": [None] * 3}, anno_id=None), "cannot be scored"),
    "masks in a list": (lambda f: mevis(f, [1]), "mask_dict.json: not an object"),
    "too few masks": (lambda f: mevis(f, {"3": [None]}), "mask_dict.json: annotation 3: 1 masks for 3 frames"),
    "a mask without counts": (lambda f: mevis(f, {"3": [{}, None, None]}), "annotation 3: 'size' is missing"),
    "a mask that does not add up": (lambda f: mevis(f, {"3": [{"size": [40, 60], "counts": [7]}, None, None]}), "annotation 3: a mask's 'counts' add up to 7"),
    "huge counts": (lambda f: mevis(f, {"3": [{"size": [40, 60], "counts": [10**40]}, None, None]}), "annotation 3: 'counts' is"),
    "run lengths of another size": (lambda f: mevis(f, {"3": [{"size": [60, 40], "counts": [2400]}, None, None]}), "annotation 3: a mask of 40x60, its frame is 60x40"),
    "two frames of one name": (lambda f: (f / "JPEGImages/walk/2.png").write_bytes(b""), "two files of one name"),
    "a missing frame": (lambda f: (f / "JPEGImages/walk/2.jpg").unlink(), "walk has no frame 2"),
    "a missing mask": (lambda f: (f / "Annotations/walk/2.png").unlink(), "walk has no mask for frame 2"),
    "frames of mixed sizes": (lambda f: shrink(f, "JPEGImages", "10.jpg"), "10.jpg: 30x20, the frames before are 60x40"),
    "a mask of another size": (lambda f: shrink(f, "Annotations", "10.png"), "10.png: 30x20, its frame is 60x40"),
    "a mask in colours": (lambda f: Image.new("RGB", (60, 40)).save(f / "Annotations/walk/1.png"), "not numbers of objects"),
    "a damaged mask": (lambda f: (f / "Annotations/walk/1.png").write_bytes(b"PNG"), "cannot be read as a mask"),
    "a damaged frame": (lambda f: (f / "JPEGImages/walk/1.jpg").write_bytes(b"JPG"), "1.jpg: cannot be read as an image"),
    "no such object": (lambda f: write(f, {"videos": {"walk": {"expressions": {"0": {"exp": "x", "obj_id": "5"}}}}}), "no mask has an object 5"),
    "no objects at all": (lambda f: [Image.new("L", (60, 40)).save(f / f"Annotations/walk/{n}.png") for n in (1, 2, 10)], "no mask has an object 1"),
    "a number that is none": (lambda f: write(f, {"videos": {"walk": {"expressions": {"0": {"exp": "x", "obj_id": [1, "2a"]}}}}}), "'2a' is not the number of an object"),
    "nothing to score": (lambda f: write(f, {"videos": {"walk": {"expressions": {"0": {"exp": "x"}}}}}), "cannot be scored"),
    "no such sequence": (lambda f: write(f, {"videos": {"run": {"expressions": {"0": {"exp": "x", "obj_id": "1"}}}}}), "has no folder run"),
    "no videos": (lambda f: write(f, {"videos": {}}), "names no videos"),
    "no JSON": (lambda f: write(f, "{"), "meta_expressions.json: cannot be read"),
    "MeViS without masks": (lambda f: write(f, {"videos": {"walk": {"expressions": {"0": {"exp": "x", "anno_id": [3]}}}}}), "mask_dict.json: cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_end_in_one_line(tmp_path, case, capsys):
    """Status 2 and one line that names the place; nothing in the folder has changed."""
    spoil, said = BAD[case]
    folder = made(tmp_path / "set")
    spoil(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--davis", str(folder), "--oracle"])
    line = capsys.readouterr().err.rsplit("\r", 1)[-1].strip()
    assert end.value.code == 2 and said in line and "\n" not in line and str(folder) in line, line
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
