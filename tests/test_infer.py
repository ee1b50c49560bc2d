"""The command line: what is printed, what is written, and how bad input ends."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import infer
import weights
from masks import iou
from generate import Answer
from model import PRESETS, Molmo
from pointing import Point, grounded_pieces, grounding_targets, read_text, write_text
from preprocess import frames_of, image_views, read_image, read_video, video_views, write_video
from records import runs_of

VIEWS = PRESETS["tiny"].views
GREY = 128


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "random"
    weights.save(folder, *tiny)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two grey pictures, a clip of 30 frames at 10 fps, and files that are not what their names say."""
    folder = tmp_path_factory.mktemp("originals")
    for name, size in [("wide.png", (300, 160)), ("tall.png", (120, 260))]:
        Image.new("RGB", size, (GREY,) * 3).save(folder / name)
    write_video(folder / "clip.mp4", (np.full((120, 160, 3), GREY, np.uint8) for _ in range(30)), 10)
    (folder / "empty.png").touch()
    (folder / "empty.mp4").touch()
    (folder / "nothing.ppm").write_bytes(b"P6 0 0 255\n")
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    (folder / "text.mp4").write_text("Hello, I am a text.\n" * 50)
    (folder / "headless.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:-300])
    sound(folder / "sound.mp4")
    return folder


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture
def media(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "media")


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Runs the command in this process: -> exit status, stdout, stderr."""
    def run(*words):
        capsys.readouterr()
        status = 0
        try:
            infer.main([*map(str, words), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"),
                        "--max-new-tokens", "4"])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def will_answer(monkeypatch, tokenizer, views, points, label="cups"):
    """The model's next answer is a list of grounding tokens for `points`; -> the batches it is asked about."""
    rows, ids = grounding_targets(points, data.patch_map(views))
    tokens = tokenizer.encode_layout(["Counting the ", *grounded_pieces(ids, label)])
    return will_write(monkeypatch, Answer(tokens, [*rows.tolist(), [-1, -1, -1]], "stop"))


def will_write(monkeypatch, answer):
    asked = []
    monkeypatch.setattr(infer, "generate", lambda model, batch, *_, **__: asked.append(batch) or [answer])
    return asked


# ---- answers ---------------------------------------------------------------------------------------------------------

def test_points_in_images_come_back_in_pixels(run, media, tmp_path, tiny, monkeypatch):
    """Grounding tokens for known places give these places, to a ninth of a patch, as JSON, text and markers."""
    truth = [Point(1, 0, 60, 40), Point(2, 0, 220, 100), Point(3, 1, 70, 130)]
    paths = [media / "wide.png", media / "tall.png"]
    views = image_views([read_image(path) for path in paths], VIEWS)
    will_answer(monkeypatch, tiny[1], views, truth)
    status, out, err = run(*paths, "Count the cups.", "--json", "-")
    result = json.loads(out)
    assert (status, err) == (0, "") and json.loads((tmp_path / "out/wide.points.json").read_text()) == result
    assert result["media"] == [str(path) for path in paths] and result["prompt"] == "Count the cups."
    assert (result["count"], result["finish_reason"]) == (3, "stop")
    assert [(p["id"], p["image"], p["time"], p["frame"]) for p in result["points"]] == [
        (1, 1, None, None), (2, 1, None, None), (3, 2, None, None)]

    reach = views.patch_boxes[:, 3:].max() / 6 + 0.1
    in_text = read_text(result["text"], ["1", "2"], views.sizes)
    assert [p.picture for p in in_text] == [0, 0, 1] and "<|" not in result["text"]
    for point, written, true in zip(result["points"], in_text, truth):
        assert math.dist((point["x"], point["y"]), (true.x, true.y)) < reach * 1.5
        assert math.dist((point["x"], point["y"]), (written.x, written.y)) < 0.5
        assert point["x"] == round(point["x"], 1)

    assert tree(tmp_path / "out") == {"wide.points.json", "wide.points.png", "tall.points.png"}
    for number, path in enumerate(paths, start=1):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}.points.png")).astype(int)
        assert drawn.shape == np.asarray(Image.open(path)).shape
        changed = np.argwhere((drawn != GREY).any(-1))[:, ::-1] + 0.5
        own = [(p["x"], p["y"]) for p in result["points"] if p["image"] == number]
        distance = np.linalg.norm(changed[:, None] - np.array(own), axis=-1)
        assert (distance.min(1) < 40).all()  # nothing but the markers has changed
        for column in range(len(own)):       # each a ring around its point
            ring = changed[distance[:, column] < 9]
            assert abs(ring.mean(0) - own[column]).max() < 1 and distance[:, column].min() > 2


def test_point_in_video_shows_at_its_moment(run, media, tmp_path, tiny, monkeypatch):
    """The clip keeps its frames, size and rate; the marker comes with the point's frame and is gone after 1 s."""
    frames, times = read_video(media / "clip.mp4", VIEWS.fps, VIEWS.max_frames)
    will_answer(monkeypatch, tiny[1], video_views(frames, times, VIEWS), [Point(1, 2, 80, 60)])
    status, out, _ = run(media / "clip.mp4", "Point to the cup.", "--json", "-")
    (point,) = json.loads(out)["points"]
    assert (status, point["image"], point["time"], point["frame"]) == (0, None, 1.0, 10)
    assert '="1.0 1 ' in json.loads(out)["text"]

    assert tree(tmp_path / "out") == {"clip.points.json", "clip.points.mp4"}
    with av.open(str(tmp_path / "out/clip.points.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
    drawn = [frame for _, frame in frames_of(tmp_path / "out/clip.points.mp4")]
    assert len(drawn) == 30 and drawn[0].shape == (120, 160, 3)
    strength = [abs(frame.astype(int) - GREY).max() for frame in drawn]
    assert max(strength[:10] + strength[20:]) < 20 and min(strength[10:16]) > 100
    assert strength[15] > strength[16] > strength[17] > strength[18] > strength[19] > 15


def test_points_written_as_text(run, media, tmp_path, tiny, monkeypatch):
    """A model that writes coordinates gives the same report, and two points of one id count once."""
    text = '<tracks coords="1 1 100 200;2 1 500 500 2 250 750">cups</tracks>'
    will_write(monkeypatch, Answer(tiny[1].encode(text), [], "length"))
    status, out, _ = run(media / "wide.png", media / "tall.png", "Point to the cups.")
    lines = out.splitlines()
    assert status == 0 and lines[0] == text
    assert [line.split() for line in lines[2:6]] == [["id", "image", "x", "y"], ["1", "1", "30.0", "32.0"],
                                                     ["1", "2", "60.0", "130.0"], ["2", "2", "30.0", "195.0"]]
    assert lines[7:9] == ["count: 2", "finish reason: length"] and lines[9].endswith(" tokens/s")
    assert lines[10:] == [f"wrote {tmp_path / 'out' / name}" for name in
                          ("tall.points.png", "wide.points.json", "wide.points.png")]


def test_several_questions_are_answered_at_once(run, media, tiny):
    """With --ask one prefill serves all questions; each answer is the one it gets alone, and the first has its usual place."""
    questions = ["Point to the cups.", "How many rings are there?", "What is this?"]
    _, out, _ = run(media / "clip.mp4", questions[0], "--ask", questions[1], "--ask", questions[2], "--json", "-")
    together = json.loads(out)
    alone = [json.loads(run(media / "clip.mp4", question, "--json", "-")[1]) for question in questions]
    named = ("prompt", "text", "points", "count", "finish_reason")
    assert together["answers"] == [{name: result[name] for name in named} for result in alone] and "answers" not in alone[0]
    assert {name: together[name] for name in named} == together["answers"][0]
    timing = together["timing"]
    assert timing["prompt_tokens"] < sum(result["timing"]["prompt_tokens"] for result in alone)
    assert timing["tokens"] == sum(result["timing"]["tokens"] for result in alone) and "bandwidth_share" not in timing
    lines = run(media / "clip.mp4", *questions[:1], "--ask", questions[1])[1].splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> " + question for question in questions[:2]]
    assert re.fullmatch(r"prefill \d+ tokens, [\d.]+ tokens/s; decode 8 tokens, [\d.]+ tokens/s", lines[-3]), lines


def test_eight_bit_weights(run, media, monkeypatch):
    """--int8 gives an answer from a language model in eight bits."""
    seen, real = [], infer.generate
    monkeypatch.setattr(infer, "generate", lambda model, *given, **more: seen.append(model.blocks[0].mlp.ff_out.weight.dtype) or real(model, *given, **more))
    status, out, _ = run(media / "wide.png", "Point to the cups.", "--int8")
    assert status == 0 and seen == [torch.int8] and "decode 4 tokens" in out


def test_readable_spells_points_out_wherever_they_stand(tiny):
    """Several lists, and one cut off in the middle of a point, become text with the model's ids; the rest stays."""
    views = image_views([np.zeros((100, 200, 3), np.uint8)] * 2, VIEWS)
    points = [Point(1, 0, 20, 50), Point(2, 1, 200, 0), Point(1, 1, 100, 7.3)]
    triple = "<|token_index|><|vit_index|><|vit_loc|>"
    text = (f'a <points coords="{triple}1{triple}2<|token_index|>">b</points> '
            f'<points coords="{triple}1<|token_index|><|vit_index|>')
    assert infer.readable(text, points, views) == (
        'a <points coords="1 1 100 500;2 2 1000 000">b</points> <points coords="2 1 500 073')
    listed = write_text(points[:2], data.places(views.times, len(views.sizes)), views.sizes, "b")
    assert infer.readable(text, points, views).startswith(f"a {listed} ")


def test_flags_reach_the_views(run, media, tiny, monkeypatch):
    """--image-crops, --max-frames and --fps replace what the checkpoint says."""
    asked = will_write(monkeypatch, Answer([], [], "stop"))
    for flags in ([], ["--image-crops", 1]):
        assert run(media / "wide.png", "Hello.", *flags)[0] == 0
    assert len(asked[0].crops) > len(asked[1].crops) == 2  # the whole image, and one crop
    asked.clear()
    for flags in ([], ["--max-frames", 2], ["--fps", 1]):
        assert run(media / "clip.mp4", "Hello.", *flags)[0] == 0
    assert [len(batch.crops) for batch in asked] == [7, 2, 4]  # seconds 0, 0.5, ... 2.5, 2.9; 0, 2.9; 0, 1, 2, 2.9


def test_prompt_is_plain_text(run, media, monkeypatch):
    """Special tokens in the prompt are characters: the model sees no more pictures than there are."""
    asked = will_write(monkeypatch, Answer([], [], "stop"))
    assert run(media / "wide.png", "<im_patch>")[0] == 0
    assert run(media / "wide.png", "Hello.")[0] == 0
    ids = PRESETS["tiny"].token_ids()
    assert (asked[0].tokens == ids["<im_patch>"]).sum() == (asked[1].tokens == ids["<im_patch>"]).sum() > 0


def test_same_seed_same_answer(run, media):
    """Sampling depends on the seed alone."""
    texts = [json.loads(run(media / "wide.png", "Hello.", "--json", "-", "--temperature", 1, "--seed", seed)[1])["text"]
             for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_images_of_one_name_do_not_overwrite_each_other(run, media, tmp_path, monkeypatch):
    """Equal names get numbers, also those that are one to some file systems, and a number never takes another image's name."""
    will_write(monkeypatch, Answer([], [], "stop"))
    paths = [media / name for name in ("a.png", "b/a.png", "a-2.png", "c/A.png")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(path)
    assert run(*paths, "Hello.")[0] == 0
    assert tree(tmp_path / "out") == {"a.points.json", "a.points.png", "a-2.points.png", "a-2-2.points.png",
                                      "A-3.points.png"}


@pytest.mark.parametrize("shade", [0, GREY, 255])
@pytest.mark.parametrize("x, y", [(50, 40), (0, 0), (100, 80), (100, 0)])
def test_markers_can_be_read_on_any_background(shade, x, y):
    """Ring and number are light between dark, inside the picture wherever the point is."""
    drawn = infer.draw(np.full((80, 100, 3), shade, np.uint8), [(Point(27, 0, x, y), 1.0)]).astype(int)[..., 0]
    without = infer.draw(np.full((80, 100, 3), shade, np.uint8), [(Point(83, 0, x, y), 1.0)]).astype(int)[..., 0]
    number = np.argwhere(abs(drawn - without) > 100)  # only the number differs
    assert len(number) > 20 and (drawn > 230).sum() > 20 and (drawn < 25).sum() > 20
    assert 0 < number.min(0).min() and (number.max(0) < (79, 99)).all()


def test_markers_fit_any_picture():
    """A picture of one pixel, or one far larger than its markers, keeps its size; opacity 0 changes nothing."""
    for height, width in [(1, 1), (1, 3000), (3000, 1)]:
        picture = np.full((height, width, 3), 77, np.uint8)
        assert infer.draw(picture, [(Point(12345, 0, 0.5, 0.5), 1.0)]).shape == picture.shape
        assert (infer.draw(picture, [(Point(1, 0, 0.5, 0.5), 0.0)]) == picture).all()


# ---- the command line ------------------------------------------------------------------------------------------------

def command(*words, cwd):
    return subprocess.run([sys.executable, infer.__file__, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def test_command_writes_inside_out_only(run, media, tmp_path, monkeypatch):
    """From another folder: the report on stdout, nothing on stderr, and only --out has changed."""
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    status, out, err = run("media/wide.png", "media/tall.png", "Point to the cups.")
    assert (status, err) == (0, "")
    assert "\ncount: " in out and "\nfinish reason: length\nprefill " in out and "; decode 4 tokens, " in out
    results = {f"out/{name}" for name in ("wide.points.json", "wide.points.png", "tall.points.png")}
    assert tree(tmp_path) - before == {"out"} | results


@pytest.mark.parametrize("text, count", [("12", 12), ("4.", 4), ("1,204", 1204), ("3.0", 3), ("2.7", 0), ("There are none.", 0), ("At 3 o'clock.", 0)])
def test_a_number_is_a_count(run, media, tiny, monkeypatch, text, count):
    """An answer that is a number and points at nothing counts so many."""
    will_write(monkeypatch, Answer(tiny[1].encode_layout([text]), [], "stop"))
    assert json.loads(run(media / "wide.png", "How many cups are there?", "--json", "-")[1])["count"] == count


def test_command_prints_json_alone(media, tmp_path, checkpoint):
    """As a program of its own, from another folder: with --json, stdout is one JSON value, also for a video, nothing is on stderr, and
    only --out has changed."""
    before = tree(tmp_path)
    done = command("media/clip.mp4", "Point to the cups.", "--json", "-", "--out", "new/results", "--checkpoint", checkpoint,
                   "--max-new-tokens", 3, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path) - before == {"new", "new/results", "new/results/clip.points.json", "new/results/clip.points.mp4"}
    result = json.loads(done.stdout)
    assert set(result) == {"media", "prompt", "text", "points", "count", "finish_reason", "timing"}
    assert result["timing"]["tokens"] == 3 and all(value >= 0 for value in result["timing"].values())
    assert len(list(frames_of(tmp_path / "new/results/clip.points.mp4"))) == 30


def test_traceback_on_request(media, monkeypatch):
    """MOLMO_TRACEBACK=1 lets the exception through, which shows where it went wrong."""
    monkeypatch.setenv("MOLMO_TRACEBACK", "1")
    with pytest.raises(weights.CheckpointError, match="nowhere"):
        infer.main([str(media / "missing.png"), "Hello.", "--checkpoint", "nowhere"])


# ---- bad input -------------------------------------------------------------------------------------------------------

def refused(outcome, *reasons):
    status, out, err = outcome
    assert (status, out) == (2, "") and err.startswith("infer.py: ") and err.count("\n") == 1, outcome
    assert all(reason in err for reason in reasons), err


@pytest.mark.parametrize("words, reason", [
    (["missing.png", "Hello."], "missing.png: no such file"),
    (["missing.mp4", "Hello."], "missing.mp4: no such file"),
    (["empty.png", "Hello."], "empty.png: is an empty file"),
    (["empty.mp4", "Hello."], "empty.mp4: is an empty file"),
    (["nothing.ppm", "Hello."], "nothing.ppm"),
    (["huge.png", "Hello."], "huge.png: 10000x10000 pixels"),
    (["text.mp4", "Hello."], "text.mp4: cannot be read as a video"),
    (["sound.mp4", "Hello."], "no video stream"),
    (["headless.mp4", "Hello."], "headless.mp4: cannot be read as a video"),
    (["wide.png", "text.mp4", "Hello."], "a video must come alone"),
    (["clip.mp4", "clip.mp4", "Hello."], "a video must come alone"),
    (["wide.png", " \n"], "the prompt is empty"),
    (["wide.png"], "PROMPT"),
    ([], "MEDIA"),
    (["wide.png", "Hello.", "--device", "abacus"], "--device: abacus"),
    (["wide.png", "Hello.", "--device", "meta"], "--device: meta"),
    (["clip.mp4", "Hello.", "--max-frames", "0"], "--max-frames"),
    (["clip.mp4", "Hello.", "--max-frames", "2.5"], "--max-frames"),
    (["clip.mp4", "Hello.", "--fps", "0"], "--fps"),
    (["clip.mp4", "Hello.", "--fps", "nan"], "--fps"),
    (["clip.mp4", "Hello.", "--fps", "many"], "--fps"),
    (["wide.png", "Hello.", "--temperature", "-1"], "--temperature"),
    (["wide.png", "Hello.", "--seed", "1e3"], "--seed"),
    (["wide.png", "Hello.", "--json", "file.json"], "--json"),
    (["wide.png", "Hello.", "--colour", "red"], "--colour"),
    (["wide.png", "Hello.", "--masks"], "wide.png: --masks is for videos"),
    (["wide.png", "tall.png", "Hello.", "--per-frame"], "--per-frame is for videos"),
    (["text.mp4", "Hello.", "--masks"], "text.mp4: cannot be read as a video"),
    (["clip.mp4", "Hello.", "--masks", "--sam2", "nowhere"], "SAM 2"),
    (["clip.mp4", "Hello.", "--sam2", "nowhere"], "--sam2 is for --masks"),
    (["clip.mp4", "Hello.", "--ask", "And?", "--per-frame"], "--ask is not for --per-frame"),
    (["clip.mp4", "Hello.", "--ask", "And?", "--masks"], "--ask is not for --masks"),
    (["wide.png", "Hello.", "--ask", " "], "the prompt is empty"),
])
def test_bad_input_ends_in_one_line(run, media, tmp_path, monkeypatch, words, reason):
    """Exit status 2, one line that names the culprit, and nothing is written."""
    monkeypatch.chdir(media)
    before = tree(tmp_path)
    refused(run(*words), reason)
    assert tree(tmp_path) == before


def test_bad_checkpoints_end_in_one_line(media, tmp_path, capsys, tiny):
    """No folder, and weights of another shape than the config."""
    model, tokenizer = tiny
    config = replace(model.config, llm=replace(model.config.llm, mlp_hidden=64))
    weights.save(tmp_path / "other", Molmo(config).initialize(0), tokenizer)
    (tmp_path / "other/config.json").write_text(model.config.to_json())
    for folder, reason in [(tmp_path / "none", "not a checkpoint folder"), (tmp_path / "other", "has shape")]:
        with pytest.raises(SystemExit) as stop:
            infer.main([str(media / "wide.png"), "Hello.", "--checkpoint", str(folder), "--out", str(tmp_path / "out")])
        refused((stop.value.code, *capsys.readouterr()), str(folder), reason)
    assert not (tmp_path / "out").exists()


def test_unwritable_out_ends_in_one_line(media, tmp_path, capsys, checkpoint):
    """A file in the place of the folder, or of one above it, stays as it is."""
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/below", "/dev/null/out"):
        with pytest.raises(SystemExit) as stop:
            infer.main([str(media / "wide.png"), "Hello.", "--checkpoint", str(checkpoint), "--out", str(out)])
        refused((stop.value.code, *capsys.readouterr()), f"--out {out}")
    assert (tmp_path / "file").read_text() == "mine"


def test_failure_while_drawing_leaves_nothing(run, media, tmp_path, monkeypatch):
    """Results appear all together: if the second picture fails, the first and the earlier results are as before. The answer
    has been printed."""
    will_write(monkeypatch, Answer([72, 105], [], "stop"))
    assert run(media / "wide.png", "Earlier.")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pictures = iter([np.zeros((5, 5, 3), np.uint8)])

    def draw(picture, marks):
        if (drawn := next(pictures, None)) is None:
            raise OSError("no space left on device")
        return drawn

    monkeypatch.setattr(infer, "draw", draw)
    status, out, err = run(media / "wide.png", media / "tall.png", "Later.")
    assert status == 2 and "no space left" in err and err.count("\n") == 1
    assert out.startswith("Hi\n") and "count: 0" in out and "wrote" not in out
    status, out, err = run(media / "wide.png", "Later.", "--json", "-")
    assert status == 2 and "no space left" in err and json.loads(out)["text"] == "Hi"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_cut_off_video_is_used_with_a_warning(run, media, tmp_path, monkeypatch):
    """What can be decoded is shown to the model and drawn; one line on stderr says that the rest is missing."""
    will_write(monkeypatch, Answer([], [], "stop"))
    noise = np.random.default_rng(0).integers(0, 256, (30, 60, 80, 3), dtype=np.uint8)
    with av.open(str(media / "cut.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 60, "yuv420p"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    whole = (media / "cut.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(whole[:len(whole) * 2 // 3])
    status, out, err = run(media / "cut.mp4", "Hello.", "--json", "-")
    assert status == 0 and json.loads(out)["finish_reason"] == "stop"
    assert err.startswith("infer.py: warning: ") and "cut.mp4: ends early" in err and err.count("\n") == 1
    assert 10 < len(list(frames_of(tmp_path / "out/cut.points.mp4"))) < 25


def test_a_time_lapse_is_answered_and_drawn(run, media, tmp_path, monkeypatch):
    """Two frames that lie half an hour apart: slower than a clip can be written, and no reason to throw the answer away."""
    will_write(monkeypatch, Answer([], [], "stop"))
    with av.open(str(media / "slow.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 80, 60, "yuv420p", Fraction(1, 1000)
        for seconds in (0, 1800):
            frame = av.VideoFrame.from_ndarray(np.full((60, 80, 3), GREY, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 1000 * seconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    status, out, err = run(media / "slow.mkv", "Hello.", "--json", "-")
    assert (status, err) == (0, "") and json.loads(out)["finish_reason"] == "stop"
    assert len(list(frames_of(tmp_path / "out/slow.points.mp4"))) == 2


# ---- frame by frame ----------------------------------------------------------------------------------------------------


def walk(path, frames: int = 30, fps: float = 10, size=(120, 160)) -> np.ndarray:
    """A red square that walks to the right on grey and a blue one that stands; -> their masks (T, 2, H, W)."""
    truth, shown = np.zeros((frames, 2, *size), bool), []
    for t in range(frames):
        truth[t, 0, 20:50, 10 + 3 * t:40 + 3 * t] = truth[t, 1, 70:100, 60:90] = True
        frame = np.full((*size, 3), 200, np.uint8)
        frame[truth[t, 0]], frame[truth[t, 1]] = (200, 30, 30), (30, 60, 190)
        shown.append(frame)
    write_video(path, iter(shown), fps)
    return truth


def will_point(monkeypatch, tokenizer, places, label="cups"):
    """The model points at places(number of the question); -> the batches it was asked about."""
    asked = []

    def generate(model, batch, *_, **__):
        views = image_views([np.zeros((120, 160, 3), np.uint8)], VIEWS)
        rows, ids = grounding_targets([Point(i, 0, x, y) for i, (x, y) in enumerate(places(len(asked)), start=1)], data.patch_map(views))
        asked.append(batch)
        if not len(rows):
            return [Answer(tokenizer.encode("There are none."), [], "stop")]
        return [Answer(tokenizer.encode_layout(grounded_pieces(ids, label)), [*rows.tolist(), [-1, -1, -1]], "stop")]

    monkeypatch.setattr(infer, "generate", generate)
    return asked


def middles(truth: np.ndarray):
    """The middles of two masks, but of the red one only if it is in view; in the order of the answer, by place."""
    return [(float(columns.mean()) + 0.5, float(rows.mean()) + 0.5) for rows, columns in map(np.nonzero, truth) if len(rows)]


def test_each_sampled_frame_is_asked_about_with_those_before_it(run, checkpoint, media, tmp_path, tiny, monkeypatch):
    """By a model with a temporal module. Half-second steps of a clip of three seconds: seven questions, each about one image; the frames right before it come
    as crops without tokens, none for the first frame; points keep their moments."""
    truth = walk(media / "walk.mp4")
    asked = will_point(monkeypatch, tiny[1], lambda n: middles(truth[min(5 * n, 29)]))
    real = weights.load
    temporal = replace(tiny[0].config.temporal, mode="attention")
    monkeypatch.setattr(weights, "load", lambda *given: (lambda model, tokenizer: (model.with_temporal(temporal), tokenizer))(*real(*given)))
    status, out, err = run(media / "walk.mp4", "Point to the cups.", "--per-frame", "--json", "-")
    result = json.loads(out)
    assert (status, err) == (0, "") and len(asked) == 7 and result["count"] == 2
    alone = image_views([np.zeros((120, 160, 3), np.uint8)], VIEWS)
    for number, batch in enumerate(asked):
        past = min(5 * number, 4)
        assert len(batch.crops) == (1 + past) * len(alone.crops) and len(batch.pooling) == len(alone.pooling)
        assert batch.n_past.tolist() == list(range(past + 1)) * len(alone.crops)
    assert [said["frame"] for said in result["frames"]] == [0, 5, 10, 15, 20, 25, 29]
    assert [(p["frame"], p["time"]) for p in result["points"][::2]] == [(0, 0), (5, 0.5), (10, 1), (15, 1.5), (20, 2), (25, 2.5), (29, 2.9)]
    assert result["text"].splitlines()[1].split("  ")[-1].startswith('<points coords="1 1 ') and "masks" not in result
    assert tree(tmp_path / "out") == {"walk.points.json", "walk.points.mp4"}


@pytest.mark.parametrize("masks", [[], ["--masks"]])
def test_a_number_said_of_a_frame_is_its_count(run, checkpoint, media, tiny, monkeypatch, masks):
    """Frame by frame, too, an answer that is a number counts; of several the largest."""
    walk(media / "walk.mp4")
    answers = iter("2302113")
    monkeypatch.setattr(infer, "generate", lambda *_, **__: [Answer(tiny[1].encode(next(answers)), [], "stop")])
    status, out, err = run(media / "walk.mp4", "How many cups are there?", "--per-frame", *masks, "--json", "-")
    assert (status, err) == (0, "") and json.loads(out)["count"] == 3


def test_masks_of_every_frame_are_written(run, media, tmp_path, tiny, monkeypatch):
    """An overlay, a PNG of object numbers and run lengths for each of the thirty frames, all telling the same, close to the
    truth; ids stay though the answers change their order; a second run replaces the first."""
    truth = walk(media / "walk.mp4")
    for _ in range(2):
        will_point(monkeypatch, tiny[1], lambda n: middles(truth[min(5 * n, 29)])[::-1 if n % 2 else 1])
        status, out, err = run(media / "walk.mp4", "segment the cups", "--masks", "--json", "-")
        assert (status, err) == (0, "")
    result = json.loads(out)
    assert json.loads((tmp_path / "out/walk.points.json").read_text()) == result
    names = {f"walk.masks/{frame:05}.png" for frame in range(30)}
    assert tree(tmp_path / "out") == {"walk.points.json", "walk.points.mp4", "walk.masks.mp4", "walk.masks"} | names
    assert result["count"] == 2 and {p["id"] for p in result["points"]} == {1, 2} and len(result["points"]) == 14
    assert [entry["frame"] for entry in result["masks"]] == list(range(30))
    order = [1, 2] if result["points"][0]["y"] < 60 else [2, 1]
    for entry, true in zip(result["masks"], truth):
        numbers = np.asarray(Image.open(tmp_path / "out" / f"walk.masks/{entry['frame']:05}.png"))
        covered = {one["id"]: runs_of({"size": one["size"], "counts": one["counts"]}).mask() for one in entry["objects"]}
        assert set(covered) == {1, 2} and all(np.array_equal(numbers == i, mask) for i, mask in covered.items())
        assert all(iou(covered[i], true[n]) > 0.8 for n, i in enumerate(order))
    overlay = [frame for _, frame in frames_of(tmp_path / "out/walk.masks.mp4")]
    assert len(overlay) == 30 and overlay[0].shape == (120, 160, 3)
    assert abs(overlay[9][5:12, 100:150].astype(int) - 200).max() < 12 and abs(overlay[9][32:38, 48:56].astype(int) - (200, 30, 30)).max() > 40


def test_nothing_found_is_no_mask(run, media, tmp_path, tiny, monkeypatch):
    """Every frame still has its (empty) picture."""
    walk(media / "walk.mp4", frames=7)
    will_point(monkeypatch, tiny[1], lambda n: [])
    status, out, _ = run(media / "walk.mp4", "segment the cups", "--masks", "--json", "-")
    result = json.loads(out)
    assert status == 0 and result["count"] == 0 and [entry["objects"] for entry in result["masks"]] == [[]] * 7
    assert not np.asarray(Image.open(tmp_path / "out/walk.masks/00003.png")).any()


def test_no_more_frames_are_held_than_lie_between_two_questions(run, media, tiny, monkeypatch):
    """Of a long clip the frames alive at any time are those of a window, however long the clip."""
    walk(media / "long.mp4", frames=120, size=(32, 64))
    will_point(monkeypatch, tiny[1], lambda n: [])
    alive, most = weakref.WeakSet(), []
    real = infer.frames_of

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def counted(path):
        for seconds, frame in real(path):
            frame = frame.view(Frame)
            alive.add(frame)
            most.append(len(alive))
            yield seconds, frame

    monkeypatch.setattr(infer, "frames_of", counted)
    status, *_ = run(media / "long.mp4", "segment the cups", "--masks")
    assert status == 0 and len(most) == 241 and 5 <= max(most[:121]) <= 12  # a question every 5 frames; the overlay reads them again


def test_what_is_not_ours_is_never_replaced(run, media, tmp_path, tiny, monkeypatch):
    """A folder or a file that stands where masks would go ends the command before anything is asked; so does a folder in the
    place of a file, and nothing in it is lost."""
    walk(media / "walk.mp4", frames=7)
    asked = will_point(monkeypatch, tiny[1], lambda n: [])
    for made in ("walk.masks/notes.txt", "walk.masks/00000_png", "walk.masks/00000.png", "walk.masks"):
        path = tmp_path / "out" / made
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        refused(run(media / "walk.mp4", "segment the cups", "--masks"), "walk.masks: holds other things")
        assert path.read_text() == "mine" and not asked
        shutil.rmtree(tmp_path / "out")
    kept = tmp_path / "out/walk.points.json/keep.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    for more in ((), ("--masks",)):
        refused(run(media / "walk.mp4", "Point to the cups.", *more), "walk.points.json: a folder, where a result would go")
    assert kept.read_text() == "mine" and not asked


def test_results_are_written_also_if_nobody_reads_the_answer(media, checkpoint, tmp_path):
    """A reader that goes away, as after `| head`, ends the command with its status, and costs no file."""
    unread, write = os.pipe()
    os.close(unread)
    done = subprocess.run([sys.executable, "infer.py", media / "wide.png", "Hello.", "--json", "-", "--max-new-tokens", "4",
                           "--checkpoint", checkpoint, "--out", tmp_path / "out"], cwd=Path(infer.__file__).parent, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"") and tree(tmp_path / "out") == {"wide.points.json", "wide.points.png"}


def test_a_result_never_replaces_what_is_asked_about(run, media, tmp_path, monkeypatch):
    """A picture with the name that a result would get, in the folder of the results, ends the command before anything is asked."""
    (tmp_path / "out").mkdir()
    theirs = shutil.copy(media / "wide.png", tmp_path / "out/wide.points.png")
    asked = will_write(monkeypatch, Answer([72, 105], [], "stop"))
    refused(run(media / "wide.png", theirs, "Hello."), "wide.points.png: a result would go there")
    assert Path(theirs).read_bytes() == (media / "wide.png").read_bytes() and not asked


def test_results_that_could_not_be_written_are_refused_early(run, media, tmp_path, monkeypatch):
    """Names too long for a file system with the ending of a result, frames too large for the encoder: one line, nothing is asked."""
    asked = will_write(monkeypatch, Answer([72, 105], [], "stop"))
    long = shutil.copy(media / "wide.png", tmp_path / f"{'a' * 240}.png")
    refused(run(long, "Hello."), "too long a name")
    frames = [Image.new("L", (16_386, 2), shade) for shade in (0, 255)]
    frames[0].save(tmp_path / "wide.gif", save_all=True, append_images=frames[1:], duration=100)
    for more in ((), ("--masks",)):
        refused(run(tmp_path / "wide.gif", "Hello.", *more), "16386x2: an annotated clip has sides of 16384 pixels at most")
    assert not asked


def test_too_many_frames_between_two_questions(run, media, tiny, monkeypatch):
    """One line that says what to do, before anything is asked."""
    walk(media / "walk.mp4", frames=20)
    asked = will_point(monkeypatch, tiny[1], lambda n: [])
    monkeypatch.setattr(infer, "MAX_CLIP_PIXELS", 10 * 120 * 160)
    refused(run(media / "walk.mp4", "segment the cups", "--masks", "--max-frames", "1"), "20 frames of 160x120 between two questions")
    assert not asked and run(media / "walk.mp4", "segment the cups", "--masks")[0] == 0
    asked.clear()
    monkeypatch.setattr(infer, "Sam2", lambda *where: infer.Growing())
    monkeypatch.setattr(infer, "MAX_CLIP_PIXELS", 10 * infer.SAM2_PIXELS)  # which of its frames takes more memory than these
    refused(run(media / "walk.mp4", "segment the cups", "--masks", "--sam2", "x", "--max-frames", "1"), "20 frames of 160x120 between two questions")
    assert not asked


def test_object_numbers_beyond_a_byte():
    """Up to 255 a palette, then 16 bits."""
    mask = np.eye(4, dtype=bool)
    small, large = infer.numbered({255: mask}, (4, 4)), infer.numbered({1: ~mask, 300: mask}, (4, 4))
    assert small.mode == "P" and np.asarray(small).max() == 255 and np.asarray(large).max() == 300
    assert np.array_equal(np.asarray(large) == 1, ~mask)
