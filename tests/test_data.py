"""Records through prompts and answers and back to points; sets, their mixture, the loader."""

import json
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import loading
import records
import screens
import synthetic
import train
from connector import ConnectorConfig
from data import branch, draw, example, points_of, question_text
from generate import Answer
from loading import Loader, Mixture
from model import PRESETS, LLMConfig, MolmoConfig
from packing import Branch, Example, Packer, collate, lay_out
from pointing import TOKEN_INDEX, Point
from preprocess import ViewConfig, write_video
from records import TASKS, Annotation, Lines, Object, Record, dump
from tokenizer import Tokenizer
from vit import ViTConfig

TOKENIZER = Tokenizer([(34, 62)])  # bytes, and `">` as one token
VIEWS = PRESETS["tiny"].views
RNG = lambda: np.random.default_rng(0)


def answered(record: Record, said: Annotation, config: MolmoConfig) -> tuple[str, list[Point], Answer]:
    """The true answer as the model would write it, read back."""
    views = data.views_of(record, config.views)
    pieces, rows = data.answer_pieces(said, record, views, config)
    pieces = said.messages[0][1] if said.messages else pieces
    tokens = TOKENIZER.encode(pieces) if isinstance(pieces, str) else TOKENIZER.encode_layout(pieces)
    written = Answer(tokens, rows.tolist(), "stop")
    return *data.read_answer(written, TOKENIZER, views), written


# ---- every task, both forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, form", [*((name, form) for name in data.SETS for form in ("tokens", "text")), ("stills", "tags"), ("moments", "tags")])
def test_the_true_answer_scores_full_marks(form, name):
    """Written, tokenised, decoded, read back and measured, every true answer of every set is right; but for tracked things that
    share a patch, or show less of themselves than the ninth of one."""
    config, asked = replace(PRESETS["tiny"], points_as=form), []
    for record in evaluate.fresh(name, 4, VIEWS, seed=9):
        for said in record.annotations:
            text, points, _ = answered(record, said, config)
            a = evaluate.Asked(record, said, data.views_of(record, VIEWS), "", text, points)
            asked.append(replace(a, figures=evaluate.scores(a)))
    figures = evaluate.summarize(asked)
    assert figures.pop("questions") == len(asked) > 4
    assert figures.pop("count error", 0) == figures.pop("number differs", 0) == 0
    assert all(value > (0.9 if "tracks" in name else 0.999) for value in figures.values()), figures


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_points_come_back_where_they_were(form):
    """As grounding tokens within half a ninth of their patch, as text within half a thousandth of the sides, in their picture."""
    config, seen = replace(PRESETS["tiny"], points_as=form), 0
    for name in ("stills", "clips", "multi-image points", "screens"):
        for index in range(4):
            record = draw(name, 9, index, 6)
            views = data.views_of(record, VIEWS)
            map_ = data.patch_map(views)
            for said in record.annotations:
                truth = points_of(record, said) if TASKS[said.task].answer else []
                text, found, written = answered(record, said, config)
                targets = {map_.target(*p[1:])[:2] for p in truth}
                assert len(found) == (len(targets) if form == "tokens" else len(truth))
                assert [p.id for p in found] == list(range(1, len(found) + 1))
                stop = bool(found) and form == "tokens"
                assert written.tokens.count(TOKENIZER.special[TOKEN_INDEX]) == len(written.triples) == (len(found) + 1 if stop else 0)
                for p in truth if len(found) == len(truth) else []:
                    token, slot, _ = map_.target(*p[1:])
                    width, height = (views.patch_boxes[views.pooling[token, slot], 3:] / 6 if form == "tokens"
                                     else np.array(views.sizes[p.picture]) / 2000)
                    assert any(q.picture == p.picture and abs(q.x - p.x) <= width + 1e-6 and abs(q.y - p.y) <= height + 1e-6
                               for q in found)
                    seen += 1
    assert seen >= 60


@pytest.mark.parametrize("form", ["tokens", "text"])
@pytest.mark.parametrize("name", data.SETS)
def test_true_answers_survive_a_pack(form, name):
    """What a row of two trees asks the model to learn, read back branch by branch with nothing but the batch, is every
    record's answers: the same words, and points in the same places."""
    survive([draw(name, 9, index, 4) for index in range(2)], form)


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_every_task_survives_a_pack(form):
    """The same of records that hold every task there is."""
    drawn, records = ((name, index) for index in range(20) for name in ("video qa", "tracks", "image captions", "clips", "multi-image points")), []
    while missing := set(TASKS) - {said.task for record in records for said in record.annotations}:
        name, index = next(drawn)
        record = draw(name, 1, index, 6)
        if missing & {said.task for said in record.annotations}:
            records.append(record)
    for pair in zip(records, records[1:] + records[:1]):
        survive(pair, form)


def survive(records: Sequence[Record], form: str):
    config = replace(PRESETS["tiny"], points_as=form)
    trees = [example(record, TOKENIZER, config, RNG()) for record in records]
    batch = collate([trees])
    chosen, windows = iter(batch.points.tolist()), 0
    for number, (record, tree) in enumerate(zip(records, trees)):
        for b, said in enumerate(record.annotations, start=1):
            here = (batch.example_ids[0] == number) & (batch.branch_ids[0] == b)
            learned = batch.targets[0, here][batch.loss_weights[0, here] > 0].tolist()
            rows = [next(chosen) for _ in range(learned.count(TOKENIZER.special[TOKEN_INDEX]))]
            rows = [[token - windows, slot, place] if token >= 0 else [token, slot, place] for token, slot, place in rows]
            assert learned[-1] == TOKENIZER.eos_id
            if said.messages:
                assert TOKENIZER.decode(learned) == "".join(text + "<|im_end|>" for _, text in said.messages) and not rows
            else:
                found = data.read_answer(Answer(learned[:-1], rows, "stop"), TOKENIZER, data.views_of(record, VIEWS))
                assert found == answered(record, said, config)[:2]
        windows += len(tree.pooling)
    assert next(chosen, None) is None


def film() -> Record:
    """Three seconds at 2 fps: thing 1 all the time, thing 2 from second 1 to 2, thing 3 at 0.5 only."""
    times = [n / 2 for n in range(7)]
    pictures = [np.zeros((100, 200, 3), np.uint8) for _ in times]
    things = {1: Object({t: (20 + 20 * t, 10) for t in times}, shown=1.5), 2: Object({t: (150, 60 + 10 * t) for t in (1.0, 1.5, 2.0)}),
              3: Object({0.5: (100, 50)})}
    return Record("film", pictures, times, things, [])


@pytest.mark.parametrize("task, extra, text", [
    ("point", {}, '<points coords="0.5 1 500 500;1.0 2 750 700;1.5 3 250 100">cups</points>'),
    ("point_count", {}, 'Counting the <points coords="0.5 1 500 500;1.0 2 750 700;1.5 3 250 100">cups</points> shows a total of 3.'),
    ("count_point", {}, 'There are 3 <points coords="0.5 1 500 500;1.0 2 750 700;1.5 3 250 100">cups</points>.'),
    ("count", {}, "3"),
    ("track", {}, '<tracks coords="0.0 1 100 100;0.5 1 150 100 2 500 500;1.0 1 200 100 3 750 700;1.5 1 250 100 3 750 750;'
                  '2.0 1 300 100 3 750 800;2.5 1 350 100;3.0 1 400 100">cups</tracks>'),
    ("track", {"fps": 1.0}, '<tracks coords="0.0 1 100 100;1.0 1 200 100 2 750 700;2.0 1 300 100 2 750 800;3.0 1 400 100">cups</tracks>'),
    ("track_ends", {}, '<tracks coords="0.0 1 100 100;0.5 2 500 500;1.0 3 750 700;2.0 3 750 800;3.0 1 400 100">cups</tracks>'),
    ("track_from", {"objects": [1], "start": 2.0}, '<tracks coords="2.5 1 350 100;3.0 1 400 100">cups</tracks>'),
])
def test_answers_by_hand(task, extra, text):
    """Every way of pointing in a video, as text: sorted by time, ids by first appearance, what is out of view left out; and
    grounding tokens say the same frames, ids and numbers."""
    record, said = film(), Annotation(**{"task": task, "label": "cups", "objects": [1, 2, 3]} | extra)
    config = PRESETS["tiny"]
    assert answered(record, said, replace(config, points_as="text"))[0] == text
    written, points, _ = answered(record, said, config)
    assert re.sub(" coords=.*\">", "", written) == re.sub(" coords=.*\">", "", text)
    in_text = answered(record, said, replace(config, points_as="text"))[1]
    assert Counter(p.picture for p in points) == Counter(p.picture for p in in_text)
    assert {p.id for p in points} == {p.id for p in in_text}


@pytest.mark.parametrize("task", [task for task in TASKS if TASKS[task].answer and task != "track_from"])
def test_none_is_said_in_words(task):
    """Where nothing is meant, every task that points answers `There are none.` and no grounding token."""
    text, points, written = answered(film(), Annotation(task, "cups", []), PRESETS["tiny"])
    assert text == "There are none." and not points and not written.triples


def test_tracks_that_no_asked_frame_shows_are_no_answer():
    """Something that is there, but in none of the frames at the asked rate, is not taught as "There are none.", nor is a chat about it, and
    nothing else is lost; nothing to be tracked is none."""
    late, never = Annotation("track_from", "dogs", [1], start=3.0), Annotation("track", "dogs", [3], fps=1.0)
    chat, none = Annotation("chat", messages=[("Where?", never)]), Annotation("track", "dogs", [], fps=1.0)
    record = film()
    record.annotations = [late, never, none, chat]
    with pytest.warns(UserWarning, match="left out: film: .* asks for no frame that shows"):
        tree = example(record, TOKENIZER, PRESETS["tiny"], RNG())
    assert len(tree.branches) == 1 and "There are none." in TOKENIZER.decode(tree.branches[0].tokens)
    asked = list(evaluate.questions(iter([record]), SimpleNamespace(config=PRESETS["tiny"]), 0))
    assert [a.annotation for a in asked] == [none]


def test_the_number_is_that_of_things_also_in_one_patch():
    """Two things in one patch get one point; that there are three is said all the same, as the answer with the number alone says."""
    record = film()
    record.objects[2] = Object({1.5: (51.0, 11.0)})  # beside thing 1 as it is shown
    for task, words in (("count_point", "There are 3 "), ("point_count", "total of 3."), ("count", "3")):
        text, points, _ = answered(record, Annotation(task, "cups", [1, 2, 3]), PRESETS["tiny"])
        assert words in text and len(points) == (0 if task == "count" else 2)


def test_a_chat_about_what_is_not_shown_is_left_out():
    """Two questions that became a chat are left out with the frames that showed what they are about, as each would be."""
    record = film()
    record.annotations = [Annotation("qa", objects=[i], question=f"What is {i}?", answer="A cup.", about="kind-of") for i in (1, 3)]
    data.dialogue(record, SimpleNamespace(random=lambda: 0.0))
    assert [said.task for said in record.annotations] == ["chat"] and record.answerable() == record.annotations
    assert record.limited(replace(VIEWS, max_frames=2)).annotations == []


def test_styles_that_are_not_for_chat_say_their_name():
    """Chat prompts are the bare words; the others begin with `style: `; every wording is used and fully filled in."""
    record, seen = film(), Counter()
    for task, row in TASKS.items():
        if task == "chat":
            continue  # has its own words
        said = Annotation(task, "cups", [1], question="Which?" if "question" in row.needs else "", answer="a", choices=["a", "b"])
        words = {question_text(said, record, np.random.default_rng(i)) for i in range(60)}
        assert len(words) == len(row.wordings)
        for text in words:
            assert text.startswith(f"{row.style}: ") if row.style else ":" not in text.split()[0]
            assert "{" not in text and ("cups" in text) == ("label" in row.needs)
        seen[bool(row.style)] += 1
    assert seen[True] == 4 and seen[False] >= 6
    choice = question_text(Annotation("choice", question="Which?", answer="b", choices=["a", "b"]), record, RNG())
    assert choice.startswith("Which?") and "A. a\nB. b" in choice
    given = question_text(Annotation("track_from", "cup", [1], start=1.0, fps=1.0), record, RNG())
    assert '<points coords="1.0 1 200 100">cup</points> at 1 fps' in given
    at_one = {question_text(Annotation(task, "cup", [1], fps=1.0), record, np.random.default_rng(i)) for task in ("track", "track_ends") for i in range(9)}
    assert sum("1 fps" in text for text in at_one) == 2 and len(at_one) == 4, "where a rate can be named it is"
    sparse = replace(record, times=[4 * t for t in record.times])  # a frame every two seconds
    for fps in (0.5, 1.0, 4.0):
        assert "at 0.5 fps" in question_text(Annotation("track", "cup", [1], fps=fps), sparse, RNG()), "more than there are cannot be asked for"
    assert "at 0.5 fps" in question_text(Annotation("track_from", "cup", [1], start=0.0), sparse, RNG())


def test_labels_with_an_article_keep_it():
    """"the dog" and expressions such as "a dog on the left" are not asked for as "the a dog"; with "a" goes "is", and with "the"
    no verb."""
    for label in ("the dog", "a dog on the left", "An owl", "another dog", "theatres"):
        for task in ("point", "track", "point_count"):
            asked = {question_text(Annotation(task, label, [1]), film(), np.random.default_rng(i)) for i in range(40)}
            own = label.lower().startswith(("the ", "a ", "an "))
            assert not any(f"{word} {label}" in text.lower() for text in asked for word in ("the the", "the a ", "the an ")), asked
            assert any(f"the {label}" in text for text in asked) is not own or task == "point_count"
            assert task != "point_count" or any(text == f"How many {label.split(' ', 1)[1] if own else label} are there?" for text in asked), asked
            where = {text for text in asked if text.startswith("Where")}
            assert task != "point" or where == (set() if label == "the dog" else {f"Where {'is' if own else 'are the'} {label}?"}), asked


def test_several_images_are_these():
    """The wordings of tasks say "this image" of one image only, "this video" of all frames of a video."""
    album = Record("album", [np.zeros((9, 9, 3), np.uint8)] * 2, None, {1: Object({0: (2, 2)})}, [])
    for record, words in ((film(), "this video"), (album, "these images"), (replace(album, pictures=album.pictures[:1]), "this image")):
        asked = [question_text(Annotation(task, "cups", [1]), record, np.random.default_rng(i)) for task in ("point_count", "caption", "transcript") for i in range(40)]
        assert any(words in text for text in asked) and not any(other in text for text in asked for other in {"this video", "these images", "this image"} - {words})


def test_sets_that_tags_cannot_mark():
    """Those of `SEVERAL`, and no others, point in records of more than one picture."""
    points = lambda said: TASKS[said.task].answer and said.task != "count" and said.objects
    several = {name for name in data.SETS for index in range(3) for record in [draw(name, 0, index, 8)]
               if len(record.pictures) > 1 and any(map(points, record.annotations))}
    assert several == set(data.SEVERAL)


def test_verbs_agree_with_what_is_asked_for():
    """One thing moves and "does" go somewhere, be it named with "a" or by how it moves; several "do"."""
    for said, words in ((Annotation("track", "a dog", [1], fps=1.0), "Where does a dog go? Answer at 1 fps."),
                        (Annotation("track", "dog that rests", [1], fps=1.0, about="motion"), "Where does the dog that rests go? Answer at 1 fps."),
                        (Annotation("track", "dogs", [1], fps=1.0), "Where do the dogs go? Answer at 1 fps."),
                        (Annotation("point", "dog that rests", [1], about="motion"), "Where is the dog that rests?"),
                        (Annotation("track_ends", "cups", [1]), "video_point_ground_start_end: Where do the cups first and last appear?")):
        assert words in {question_text(said, film(), np.random.default_rng(i)) for i in range(40)}


def test_an_own_question_replaces_the_wordings():
    """A question that came with the annotation is asked as it is, and no random number is drawn for it."""
    rng = RNG()
    assert question_text(Annotation("point", "cups", [1], question="Cups?"), film(), rng) == "Cups?"
    assert rng.random() == RNG().random()
    assert question_text(Annotation("count", "cups", [1], question="Cups?"), film(), rng) == "only_count: Cups?"


# ---- trees -------------------------------------------------------------------------------------------------------------


def test_learned_tokens_are_the_answers_and_their_ends():
    """A branch is the chat layout around its turns; exactly the answers and the end tokens after them are learned, and
    special tokens that somebody typed are plain text."""
    pieces = ["here ", "<|token_index|>", '">']
    made = branch(TOKENIZER, [("where <|im_end|>?", pieces)], np.array([[-1, -1, -1]]))
    text = TOKENIZER.decode(made.tokens)
    assert text == '<|im_start|>user\nwhere <|im_end|>?<|im_end|>\n<|im_start|>assistant\nhere <|token_index|>"><|im_end|>'
    assert TOKENIZER.decode(made.tokens[made.loss_mask]) == 'here <|token_index|>"><|im_end|>' and made.tokens[-1] == TOKENIZER.eos_id
    made = branch(TOKENIZER, [("a", "<|im_end|>"), ("b", "c")], np.zeros((0, 3), int))
    assert TOKENIZER.decode(made.tokens) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|><|im_end|>\n"
                                             "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>")
    assert TOKENIZER.decode(made.tokens[made.loss_mask]) == "<|im_end|><|im_end|>c<|im_end|>"
    assert (made.tokens == TOKENIZER.eos_id).sum() == 4, "the typed one is ten characters"


def test_a_later_turn_is_asked_as_it_was_learned():
    """The prompt of a chat's second turn is what training saw up to its answer, the first answer included."""
    views, turns = data.views_of(draw("stills", 0, 0, 1), VIEWS), [("What is this?", "A cup."), ("Which color?", "Red.")]
    none = np.zeros((0, 3), int)
    waiting = data.prompts(TOKENIZER, views, ["Which color?", "How many?"], before=[(turns[:1], none), ([], none)]).branches
    assert not any(one.loss_mask.any() for one in waiting)
    seen = branch(TOKENIZER, turns, np.zeros((0, 3), int)).tokens
    n = len(waiting[0].tokens) - 1  # the last is never an input
    assert n > len(branch(TOKENIZER, turns[:1], np.zeros((0, 3), int)).tokens) and (waiting[0].tokens[:n] == seen[:n]).all()
    assert TOKENIZER.decode(seen[n:]) == "Red.<|im_end|>"
    assert waiting[1].tokens.tolist()[:-1] == TOKENIZER.chat_prompt("How many?")


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_a_chat_may_point(form, tmp_path, capsys):
    """Turns of a chat that point or count survive the file and a pack, are asked one by one behind the true answers before them, and
    are measured as what they are."""
    config, record = replace(PRESETS["tiny"], points_as=form), draw("stills", 9, 0, 3)
    ids = list(record.objects)
    turns = [("Hi.", "Hello."), ("Where?", Annotation("point", "first things", ids[:1])), ("How many?", Annotation("count", "things", ids)),
             ("And all?", Annotation("point_count", "things", ids)), ("Bye.", "Bye.")]
    record.annotations = [Annotation("chat", messages=turns)]
    assert [part.task for part in record.annotations[0].parts] == ["point", "count", "point_count"]
    Image.fromarray(record.pictures[0]).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(dump(record, ["a.png"]))
    again = Lines(tmp_path / "a.jsonl").record(0, VIEWS)
    assert again.annotations == record.annotations
    made, views = example(again, TOKENIZER, config, RNG()).branches[0], data.views_of(again, VIEWS)
    assert data.check(str(tmp_path / "a.jsonl"), TOKENIZER, config, 1024, 20) == 0 and "same patch" not in capsys.readouterr().out
    assert made.category == "pointing" and len(made.points) == (1 + 1 + len(ids) + 1 if form == "tokens" else 0)
    answers, rows = TOKENIZER.decode(made.tokens[made.loss_mask]).split("<|im_end|>")[:-1], iter(made.points.tolist())
    for turn, ((_, said), text) in enumerate(zip(turns, answers, strict=True)):
        own = [next(rows) for _ in range(text.count(TOKEN_INDEX))]
        tokens = TOKENIZER.encode_layout(re.split(r"(<\|\w+\|>)", text))
        text, points = data.read_answer(Answer(tokens, own, "stop"), TOKENIZER, views)
        figures = evaluate.scores(evaluate.Asked(again, again.annotations[0], views, "", text, points, {}, turn))
        assert figures["text exact" if isinstance(said, str) else "count exact" if said.task == "count" else "f1"] == 1, (turn, text)
    asked = evaluate.Asked(again, again.annotations[0], views, "And all?", turn=3)
    waiting = data.prompts(TOKENIZER, views, ["And all?"], before=[evaluate.turns_before(asked, SimpleNamespace(config=config))]).branches[0]
    n = len(waiting.tokens) - 1
    assert (made.tokens[:n] == waiting.tokens[:n]).all() and len(waiting.points) == (2 if form == "tokens" else 0)


@pytest.mark.parametrize("task, still, clip", [("caption", "other", "video caption"), ("transcript", "other", "video caption"), ("qa", "other", "other"),
                                               ("count", "other", "other"), ("point", "pointing", "pointing"), ("track", None, "pointing")])
def test_loss_weights_go_by_category(task, still, clip):
    """Captions of videos, answers that point, and all others; a number alone does not point."""
    for kind, found in (("stills", still), ("clips", clip)):
        record = draw(kind, 0, 0, 1)
        said = Annotation(task, "things", [0], question="What?", answer="That.")
        assert found is None or data.category(said, record) == found


@pytest.mark.parametrize("mode, seen", [("none", 0), ("attention", 4)])
def test_the_past_reaches_training_and_evaluation(tiny, mode, seen, monkeypatch):
    """A frame that is asked about comes with the crops of the four before it, if the model has a temporal module; the frames of a clip
    are each other's past."""
    model, batches = tiny[0].with_temporal(replace(tiny[0].config.temporal, mode=mode)), []
    record = next(r for i in range(9) if len((r := draw("moments", 5, i, 3)).before) == 4)
    monkeypatch.setattr(evaluate, "generate", lambda m, batch, *_: batches.append(batch) or [Answer([], [], "stop")] * int(batch.branch_ids.max()))
    tree, alone = example(record, tiny[1], model.config, RNG()), len(data.views_of(record, VIEWS, 0).crops)
    evaluate.evaluate(model, tiny[1], iter([record]))
    for made in (tree, batches[0]):
        assert len(made.crops) == (1 + seen) * alone and made.n_past.max() == seen
    clip = draw("clips", 5, 0, 1)
    assert example(clip, tiny[1], model.config, RNG()).n_past.tolist() == list(range(len(clip.times)))


def test_a_prompt_is_the_example_up_to_the_answer():
    """What inference feeds is a prefix of what training saw, subtitles included."""
    record = draw("video qa", 0, next(i for i in range(50) if draw("video qa", 0, i, 3).subtitles), 3)
    tree, views = example(record, TOKENIZER, PRESETS["tiny"], RNG()), data.views_of(record, VIEWS)
    said = record.annotations[0]
    asked = said.messages[0][0] if said.messages else question_text(said, record, RNG())
    one, two = lay_out([tree]), lay_out([data.prompt(TOKENIZER, views, asked, record.subtitles)])
    assert np.array_equal(one.tokens[:len(two.tokens)], two.tokens) and not two.loss_weights.any()
    assert TOKENIZER.decode(tree.trunk).endswith("subtitle" + record.subtitles) and record.subtitles.startswith("\n")


def test_places_name_images_and_seconds():
    """Images are called by their number from 1, frames by their seconds, as in the visual layout."""
    clip, stills = draw("clips", 9, 0, 1), draw("multi-image points", 9, 0, 1)
    assert data.places(clip.times, len(clip.pictures))[:2] == ["0.0", "0.5"]
    assert data.views_of(clip, VIEWS).layout[0] == "0.0 " and data.views_of(stills, VIEWS).layout[0] == "Image 1"
    assert data.places(None, 3) == ["1", "2", "3"]


def test_text_alone_has_no_pictures(tiny):
    """A record without pictures makes an example without crops, alone in a batch and beside others, and it trains."""
    model, tokenizer = tiny
    trees = [example(draw(name, 0, 0, 3), tokenizer, model.config, RNG()) for name in ("text", "stills")]
    assert trees[0].crops.shape == (0, 81, 588) and len(trees[0].pooling) == 0 and len(trees[0].trunk) == 1
    alone = model.losses(collate([trees[0]]))
    both = model.losses(collate([trees]))
    apart = model.losses(collate([trees[1]]))
    assert alone["token"] > 0 and alone["patch"] == 0
    assert both["token"].item() == pytest.approx((alone["token"] + apart["token"]).item(), rel=1e-5)


# ---- synthetic sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.SETS)
def test_synthetic_records_are_a_pure_function_of_seed_and_number(name):
    """The same number gives the same record, whatever was drawn before; another number or seed gives another."""
    def content(seed, index):
        record = draw(name, seed, index, 4)
        return [p.tobytes() for p in record.pictures], record.times, record.annotations, record.objects
    first, between, again = content(3, 5), content(3, 6), content(3, 5)
    assert first == again != between and first != content(4, 5)


def test_truth_points_lie_in_their_masks():
    """In every set every point lies on its object, at every moment that has one, and what is shown is in view."""
    for name in data.SETS:
        for index in range(2):
            record = draw(name, 5, index, 4, masks=True)
            for thing in record.objects.values():
                for moment, (x, y) in thing.points.items():
                    assert thing.masks[moment].mask()[int(y), int(x)]
                assert thing.shown is None or thing.shown in thing.points


def test_every_task_is_drawn_somewhere():
    """Captions spoken and written, short and long answers, choices, chats, all ways to count, point and track, and "none"."""
    tasks, none = Counter(), 0
    for name in data.SETS:
        for index in range(4):
            said = draw(name, 1, index, 6).annotations
            tasks.update(one.task for one in said)
            none += sum(bool(one.label) and not one.objects for one in said)
    assert set(tasks) == set(TASKS) and none > 20


def test_tracking_questions_are_answered_by_what_is_in_view():
    """At 1 fps only whole seconds; from a given point on; ends are ends; hidden moments are left out."""
    seen = Counter()
    for index in range(30):
        record = draw("tracks", 2, index, 8)
        for said in record.annotations:
            points = points_of(record, said)
            seen[said.task, said.fps] += 1
            for p in points:
                assert record.times[p.picture] in record.objects[p.id].points
                assert said.fps == 2 or record.times[p.picture] == int(record.times[p.picture])
            if said.task == "track_from":
                assert len({p.id for p in points}) <= 1 and all(record.times[p.picture] > said.start for p in points)
            if said.task == "track_ends":
                assert max(Counter(p.id for p in points).values(), default=0) <= 2
    assert all(seen[task, fps] for task in ("track", "track_from") for fps in (1, 2)) and seen["track_ends", 2]


def test_subtitles_leave_room_for_other_questions():
    """Of few questions about a clip with subtitles one is about them; of as many as training asks, all three that there are."""
    heard = lambda branches: {repr(one.annotations).count("What is said at") for one in
                              (data.draw("video qa", 0, index, branches) for index in range(12)) if one.subtitles}
    assert heard(3) == {1} and heard(16) == {3}


def test_several_images_are_asked_about_together():
    """Points name the image they are in, and things that match are found in all images."""
    shared = 0
    for index in range(12):
        record = draw("multi-image points", 0, index, 6)
        assert 2 <= len(record.pictures) <= 3 and record.times is None
        for said in record.annotations:
            shared += len({p.picture for p in points_of(record, said)}) > 1
            assert "this image" not in said.question
    assert shared > 5


# ---- patches -----------------------------------------------------------------------------------------------------------

CONFIG = replace(
    PRESETS["tiny"],
    views=ViewConfig(crop_size=70, margins=(1, 1), max_crops=2, max_frames=16),
    vit=ViTConfig(width=32, layers=3, heads=4, mlp_hidden=48, taps=(-1, -3), grid=5),
    connector=ConnectorConfig(width=32, heads=4, mlp_hidden=40, output_layer=False),
    llm=LLMConfig(vocabulary=TOKENIZER.base_size, width=48, layers=2, heads=4, kv_heads=2, head_width=12, mlp_hidden=64, rope_theta=1e4, dropout=0.0),
)


def test_patches_are_labelled_with_what_they_show():
    """A vivid patch is labelled with the colour that its middle shows, and fewer patches hold a point than show a thing."""
    examples = loading.PatchSet(7, PRESETS["tiny"], ("stills", "stills", "clips"))
    crops, labels = loading.collate_patches([examples[i] for i in range(9)])  # three of them are frames of clips
    assert crops.shape[:2] == labels.shape[:2] and crops.dtype == torch.uint8
    assert all(labels[..., i].min() == 0 and labels[..., i].max() < n for i, n in enumerate(loading.PATCH_CLASSES))
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    middle = crops.unflatten(-1, (14, 14, 3))[:, :, 5:9, 5:9].float().mean((2, 3))  # (N, S, 3)
    colors = torch.tensor(list(synthetic.COLORS.values()), dtype=torch.float)
    vivid = (labels[..., 1] > 0) & (middle.max(-1).values - middle.min(-1).values > 120)  # neither grey nor shaded
    nearest = torch.cdist(middle[vivid], colors).argmin(-1) + 1
    assert vivid.sum() > 50 and (nearest == labels[..., 1][vivid]).float().mean() > 0.8  # some parts are shaded
    assert 0 < (labels[..., 2] > 0).sum() < (labels[..., 0] > 0).sum()


def test_points_lie_in_labelled_patches():
    """By hand on one still: the patch that holds a thing's point names its kind, and only those patches do; all name the
    background."""
    scene = synthetic.still(7, 0)
    views = data.views_of(data.scene_record(scene, []), CONFIG.views)
    labels = loading.patch_labels(scene, views.patch_boxes)
    assert {synthetic.BACKGROUNDS[label] for label in labels[:, 4]} == {scene.background} and not labels[:, 3].any()
    for (_, left, top, width, height), (kind, _, pointed, *_) in zip(views.patch_boxes, labels):
        inside = [1 + synthetic.KINDS.index(thing.kind) for thing, (x, y) in zip(scene.things, scene.points[0])
                  if left <= x < left + width and top <= y < top + height]
        assert pointed == (inside[-1] if inside else 0)
        x, y = left + width / 2, top + height / 2
        owner = scene.masks[0, :, int(y), int(x)].nonzero()[0]
        assert kind == (1 + synthetic.KINDS.index(scene.things[owner[0]].kind) if len(owner) else 0)


def test_patches_of_screens_are_labelled_with_their_elements():
    """What a screen shows at the middle of a patch, by its name, unless nobody can read that; no background is asked for there."""
    unread = 0
    for index in range(8):
        scene = screens.screen(7, index)
        boxes = data.views_of(data.scene_record(scene, []), CONFIG.views).patch_boxes
        labels = loading.patch_labels(scene, boxes)
        assert not labels[:, :3].any() and (labels[:, 4] == loading.UNKNOWN).all() and len(loading.ELEMENTS) == loading.PATCH_CLASSES[3] - 1
        for (_, left, top, width, height), label in zip(boxes, labels[:, 3]):
            owner = scene.masks[0, :, int(top + height / 2), int(left + width / 2)].nonzero()[0]
            element = scene.things[owner[0]] if len(owner) else None
            readable = element and np.isfinite(scene.points[0, owner[0], 0])
            assert label == (1 + loading.ELEMENTS.index((element.sort, element.word)) if readable else loading.UNKNOWN if element else 0)
            unread += label == loading.UNKNOWN
    assert unread
    seen = loading.PatchSet(7, PRESETS["tiny"], ("stills", "clips", "screens", "tracks"))
    shown = [tuple((seen[i][1][..., column] > 0).any().item() for column in (0, 3)) for i in range(4)]
    assert shown == [(True, False), (True, False), (False, True), (True, False)]


# ---- mixture and loader --------------------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """A finite set of tiny records that say their number."""

    tag: str
    size: int
    bad: tuple[int, ...] = ()

    def record(self, index: int, config: ViewConfig) -> Record:
        if index in self.bad:
            raise ValueError(f"{self.tag}.jsonl:{index + 1}: broken")
        words = "x" * (20 + 13 * index % 40)
        return Record(f"{self.tag}{index}", [], None, {}, [Annotation("qa", question=words, answer=str(index))])


def mixture(sets: dict[str, list], rates: dict[str, float], seed: int = 0, max_tokens: int = 256) -> Mixture:
    return Mixture(sets, rates, seed, TOKENIZER, CONFIG, max_tokens)


def test_sampled_shares_are_the_rates():
    """In every thousand numbers each category has its rate to a thousandth; inside, sets go by the square root of their size."""
    rates = {"captions": 13.6, "qa": 22.7, "text": 9.1}
    mix = mixture({"captions": [Numbers("a", 100), Numbers("b", 400)], "qa": [Numbers("c", 50)], "text": [Numbers("d", 9)]}, rates)
    for block in (0, 3):
        drawn = Counter(mix.all[mix.place(n)[0]].tag for n in range(1000 * block, 1000 * block + 1000))
        total = sum(rates.values())
        assert drawn["a"] + drawn["b"] == pytest.approx(1000 * 13.6 / total, abs=2) and drawn["c"] == pytest.approx(500, abs=1)
        assert drawn["b"] == pytest.approx(2 * drawn["a"], abs=2) and drawn["d"] == pytest.approx(1000 * 9.1 / total, abs=1)


def test_many_sets_do_not_change_the_rates():
    """Six hundred files in one category and one in another: half each, every file there; with more than a thousand files, too."""
    for files in (600, 1200):
        mix = mixture({"a": [Numbers(f"a{i}", 5) for i in range(files)], "b": [Numbers("b", 50)]}, {"a": 1, "b": 1})
        drawn = Counter(mix.all[mix.place(n)[0]].tag for n in range(mix.block))
        assert drawn["b"] == mix.block // 2 and len(drawn) == files + 1


def test_what_is_packed_has_the_rates_too():
    """The packer chooses, but cannot favour for long: what came out of the packs of stage 2's mixture has its rates, but for what
    may still wait."""
    stage, rng = train.STAGES["tiny", 2], np.random.default_rng(0)
    sizes = {name: (int(rng.integers(100, 600)), int(rng.integers(1, 17))) for name in stage.rates}
    mix = mixture({name: [Numbers(name, None)] for name in stage.rates}, stage.rates)
    packer, packed, drawn, waiting = Packer(stage.tokens, stage.crops, stage.pool), Counter(), Counter(), Counter()
    for number in range(1600):
        name = mix.all[mix.place(number)[0]].tag
        tokens, crops = sizes[name]
        drawn[name] += 1
        packer.add(number, Example(np.arange(tokens), np.zeros((crops, 1, 1), np.uint8), np.zeros((0, 1), int), [], name))
        if packer.full:
            assert number - packer.numbers[0] <= 5 * stage.pool, "nobody waits for ever"
            packed.update(example.name for example in packer.take())
    waiting.update(example.name for example in packer.pool.values())
    total = sum(stage.rates.values())
    for name, rate in stage.rates.items():
        assert packed[name] + waiting[name] == drawn[name] == pytest.approx(1600 * rate / total, abs=8)
        assert waiting[name] <= stage.pool / 2


def test_finite_sets_are_gone_through_epoch_by_epoch():
    """Each epoch holds every line once, in an order of its own; the place of a number does not depend on what was asked before."""
    mix = mixture({"a": [Numbers("a", 40)], "b": [Numbers("b", 7)]}, {"a": 1, "b": 1})
    places = [mix.place(n) for n in range(3000)]
    of_a = [index for chosen, index in places if chosen == 0]
    epochs = [of_a[i:i + 40] for i in range(0, 1200, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and len(set(map(tuple, epochs))) == len(epochs)
    again = mixture({"a": [Numbers("a", 40)], "b": [Numbers("b", 7)]}, {"a": 1, "b": 1})
    assert [again.place(n) for n in (2999, 17, 1200)] == [places[n] for n in (2999, 17, 1200)]
    other = mixture({"a": [Numbers("a", 40)], "b": [Numbers("b", 7)]}, {"a": 1, "b": 1}, seed=1)
    assert [other.place(n) for n in range(100)] != places[:100]


def test_a_category_without_a_set_is_an_error():
    """A missing set stops before training."""
    with pytest.raises(ValueError, match="there is no set for 'b'"):
        mixture({"a": [Numbers("a", 4)]}, {"a": 1, "b": 1})


def test_a_way_of_asking_that_there_is_not_is_an_error():
    """A mistyped way in a stage's `more` is named; those of all stages are right."""
    with pytest.raises(ValueError, match="in the way siez: .*, size"):
        loading.synthetic_sets(["stills"], 0, 4, {"siez": 2, "none": 1})
    for stage in train.STAGES.values():
        loading.synthetic_sets([], 0, 4, stage.more)


def test_branches_are_shuffled_and_cut_to_fit():
    """Epoch by epoch the annotations of a line come in another order; those that do not fit are left out, none is an error. One that
    would not fit alone is named in a warning."""
    class Long:
        size = 1

        def record(self, index, config):
            return Record("long", [], None, {}, [Annotation("qa", question="q", answer=str(n) * 20) for n in range(6)])

    mix = mixture({"a": [Long()]}, {"a": 1}, max_tokens=200)
    trees = [mix[n][1] for n in range(12)]
    firsts = {TOKENIZER.decode(tree.branches[0].tokens)[-30] for tree in trees}
    assert len(firsts) > 2 and all(tree.length <= 200 and 3 <= len(tree.branches) < 6 for tree in trees)
    assert "tokens, there is room for 40" in mixture({"a": [Long()]}, {"a": 1}, max_tokens=40)[0][1]
    tree = Example(np.arange(10), np.zeros((0, 1, 1), np.uint8), np.zeros((0, 1), int),
                   [Branch(np.arange(n), np.ones(n, bool), np.zeros((0, 3), int)) for n in (10, 32, 31, 9)], "mine")
    with pytest.warns(UserWarning, match="left out: mine: 1 of its annotations, longer than a pack of 40 tokens"):
        assert [len(one.tokens) for one in data.trim_to_fit(tree, 40).branches] == [10, 9]


def loader(mix: Mixture, **options) -> Loader:
    return Loader(mix, Packer(256, 4, size=8), 2, "uniform", **options)


def same(one, two) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in vars(one))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_its_state(workers):
    """After any batch the state (a few numbers) is all it takes: a new loader, in another number of workers, gives the same
    batches from there, in the middle of a pool too."""
    sets = {"a": [Numbers("a", 40)], "b": [Numbers("b", 7)]}
    straight = loader(mixture(sets, {"a": 3, "b": 1}))
    batches, states = [], []
    for batch in islice(straight, 8):
        batches.append(batch)
        states.append(straight.state)
    assert len({str(state) for state in states}) == 8 and all(state["pool"] for state in states)
    for stop in (0, 3, 6):
        resumed = loader(mixture(sets, {"a": 3, "b": 1}), workers=workers, state=json.loads(json.dumps(states[stop])))
        again = list(islice(resumed, 7 - stop))
        assert len(again) == 7 - stop and all(same(a, b) for a, b in zip(batches[stop + 1:], again))


def test_no_example_is_lost_or_doubled_in_packs():
    """Over the batches of two loaders that share the work, each number comes at most once and in its own half."""
    sets = {"a": [Numbers("a", 1000)]}
    names = []
    for rank in (0, 1):
        half = loader(mixture(sets, {"a": 1}), rank=rank, world=2)
        mine = [name for _ in islice(half, 20) for name in half.names]
        waiting = [mixture(sets, {"a": 1})[n][1].name for n in half.state["pool"]]
        numbers = sorted(mixture(sets, {"a": 1}).place(n)[1] for n in range(rank, half.state["next"][0], 2))
        assert sorted(int(name[1:]) for name in mine + waiting) == numbers
        names += mine
    assert len(set(names)) == len(names) > 100


def test_bad_items_are_named_and_a_limit_stops(monkeypatch):
    """A line that cannot be used is named in a warning and left out, epoch after epoch; too many different ones end the run, and a
    set without a good one does not keep it waiting for ever."""
    mix = mixture({"a": [Numbers("a", 40, bad=(3, 4))]}, {"a": 1})
    with pytest.warns(UserWarning) as warned:
        names = [name for one in [loader(mix)] for _ in islice(one, 6) for name in one.names]
    assert any("left out: a.jsonl:4: broken" in str(w.message) for w in warned) and names and not {"a3", "a4"} & set(names)
    monkeypatch.setattr(Loader, "MOST_SKIPPED", 5)
    with pytest.warns(UserWarning):
        assert len(list(islice(loader(mixture({"a": [Numbers("a", 4, bad=(1,))]}, {"a": 1})), 30))) == 30
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than 5 examples cannot be used; the last: a.jsonl:.: broken"):
        list(islice(loader(mixture({"a": [Numbers("a", 8, bad=tuple(range(8)))]}, {"a": 1})), 1))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than 5 examples in a row cannot be used; the last"):
        next(iter(loader(mixture({"a": [Numbers("a", 2, bad=(0, 1))]}, {"a": 1}))))


class Moody(Numbers):
    """What is wrong is said in other words each time."""

    def record(self, index: int, config: ViewConfig) -> Record:
        Moody.said += 1
        if index in self.bad:
            raise ValueError(f"{self.tag}.jsonl:{index + 1}: {Moody.said} tokens")
        return super().record(index, config)


def test_a_bad_line_counts_once(monkeypatch):
    """Whatever the words are in which it is refused, over many epochs; and a run that goes on knows what was left out before."""
    monkeypatch.setattr(Moody, "said", 0, raising=False)
    monkeypatch.setattr(Loader, "MOST_SKIPPED", 5)
    made = lambda **more: loader(mixture({"a": [Moody("a", 8, bad=(1, 4))]}, {"a": 1}), **more)
    first = made()
    with pytest.warns(UserWarning) as warned:
        assert len(list(islice(first, 40))) == 40
    assert len(warned) == 2 and first.state["left out"] == [(0, 1), (0, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(islice(made(state=first.state), 3))) == 3


def test_loaders_that_become_one_know_more_bad_lines_than_one_may_find():
    """The lines that many processes have left out do not end the run of fewer; the next new one does."""
    known = [(0, n) for n in range(100, 100 + Loader.MOST_SKIPPED + 7)]
    made = lambda bad: loader(mixture({"a": [Numbers("a", 8, bad=bad)]}, {"a": 1}), state={"next": [0], "pool": [], "left out": known})
    assert len(list(islice(made(()), 20))) == 20
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="more than 100 examples cannot be used"):
        list(islice(made((3,)), 20))


def test_a_bad_line_of_frames_counts_once(tmp_path):
    """A video that is not there is one bad line, although eight of its frames are asked for; in the state too."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in (
        {"images": ["a.png"], "before": ["a.png"], "annotations": [{"task": "point", "label": "a", "points": [{"x": 1, "y": 1}]}]},
        {"video": "gone.mp4", "annotations": [{"task": "point", "label": "a", "points": [{"x": 1, "y": 1, "time": 0}]}]})))
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    made = loader(mixture({"a": [loading.Moments(Lines(tmp_path / "a.jsonl"), 0)]}, {"a": 1}))
    with pytest.warns(UserWarning) as warned:
        assert len(list(islice(made, 8))) == 8
    assert len(warned) == 1 and made.state["left out"] == [(0, 1)]


class Held:
    """Worker processes, say."""


@pytest.mark.parametrize("wrong", [ValueError, OSError, MemoryError])
def test_what_fails_in_the_loaders_thread_holds_nothing(wrong):
    """What goes wrong there is raised here, after the items before it, and what its frames held is free then."""
    alive = []

    def items():
        held = Held()
        alive.append(weakref.ref(held))
        yield 1
        try:
            raise KeyError
        except KeyError as error:
            raise wrong("gone") from error

    got = loading.prefetch(items())
    assert next(got) == 1
    with pytest.raises(wrong, match="gone"):
        next(got)
    assert alive[0]() is None


def test_an_example_that_does_not_fit_is_named_by_its_line(tmp_path):
    """Also if its record has a name of its own."""
    said = [{"task": "qa", "question": "q", "answer": "long " * 90}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "mine", "annotations": said}))
    assert mixture({"a": [Lines(tmp_path / "a.jsonl")]}, {"a": 1}, max_tokens=90)[0][1].startswith(f"{tmp_path / 'a.jsonl'}:1: mine: ")


# ---- commands ----------------------------------------------------------------------------------------------------------


def test_check_names_bad_lines_and_counts(tmp_path, capsys):
    """All bad lines are named with what is wrong, those too that are larger than a pack, the good ones counted; the exit
    status says whether there were any."""
    assert data.main(["draw", "image points", str(tmp_path), "--n", "3"]) == 0
    path = tmp_path / "image-points.jsonl"
    capsys.readouterr()
    assert data.main(["check", str(path)]) == 0
    good = capsys.readouterr().out
    assert good.startswith("3 lines, 0 bad") and "image 3" in good and "tokens" in good
    assert data.main(["check", str(path), "--max-crops", "1"]) == 2 and "crops, there is room for 1" in capsys.readouterr().out
    data.main(["check", str(path), "--max-tokens", "200"])
    assert "do not fit beside the others" in capsys.readouterr().out and "same patch" not in good
    record = json.loads(path.read_text().splitlines()[0])
    record["annotations"].append({"task": "caption", "answer": "words " * 900})
    (tmp_path / "long.jsonl").write_text(json.dumps(record))
    assert data.main(["check", str(tmp_path / "long.jsonl"), "--max-tokens", "1000"]) == 0
    assert "; 1 annotations are too long for a pack" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.main(["check", str(path), "--checkpoint", "nowhere"])
    assert "nowhere: not a checkpoint folder" in capsys.readouterr().err
    close = {"images": ["image-points-0-1.png"], "annotations": [{"task": "point", "label": "dots", "points": [{"x": 30, "y": 30}, {"x": 31, "y": 30}]}]}
    (tmp_path / "close.jsonl").write_text(json.dumps(close))
    assert data.main(["check", str(tmp_path / "close.jsonl")]) == 0 and "; 1 points lie in the same patch as another" in capsys.readouterr().out
    mask = np.zeros((40, 60), bool)
    mask[5:15, 45:55] = True
    Image.new("RGB", (60, 40)).save(tmp_path / "mask.png")
    for runs, said in ((records.Runs.of(mask), ""), (records.Runs((40, 60), records.Runs.of(mask.T).counts), "; 1 points lie outside of their")):
        line = {"images": ["mask.png"], "objects": [{"id": 1, "points": [{"x": 49, "y": 10}], "masks": [{"size": runs.size, "counts": runs.counts}]}],
                "annotations": [{"task": "point", "label": "dots", "objects": [1]}]}
        (tmp_path / "mask.jsonl").write_text(json.dumps(line))
        assert data.main(["check", str(tmp_path / "mask.jsonl")]) == 0 and ("outside of" in (out := capsys.readouterr().out)) == bool(said) and said in out
    assert data.main(["check", str(tmp_path / "mask.jsonl"), "--max-crops", "1"]) == 2  # of bad lines nothing else is counted
    assert "1 lines, 1 bad\n" in capsys.readouterr().out
    data.write_video(tmp_path / "v.mp4", [np.full((40, 60, 3), n, np.uint8) for n in range(21)], 10)
    between = {"video": "v.mp4", "annotations": [{"task": "point", "label": "dots", "points": [{"x": 30, "y": 30, "time": t}]} for t in (0.7, 2)]}
    (tmp_path / "between.jsonl").write_text(json.dumps(between))
    assert data.main(["check", str(tmp_path / "between.jsonl"), "--max-frames", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 lines, 0 bad; 1 annotations point between the frames") and "point 1" in out
    path.write_text(path.read_text() + '{"images": ["gone.png"], "annotations": [{"task": "caption", "answer": "a"}]}\n{\n')
    assert data.main(["check", str(path)]) == 2
    out = capsys.readouterr().out
    assert "image-points.jsonl:4: " in out and "image-points.jsonl:5: " in out and "5 lines, 2 bad" in out


@pytest.mark.parametrize("name", ["tracks", "multi-image points", "text"])
def test_show_draws_an_example(name, tmp_path, capsys):
    """A sheet per record: its pictures come first, marked with points, and the colours of all branches are on it."""
    data.main(["draw", name, str(tmp_path), "--n", "2"])
    stem = name.replace(" ", "-")
    data.main(["show", str(tmp_path / f"{stem}.jsonl"), "--out", str(tmp_path / "out"), "--n", "1"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"{stem}-1.show.png"]
    page = np.asarray(Image.open(tmp_path / "out" / f"{stem}-1.show.png"))
    record = Lines(tmp_path / f"{stem}.jsonl").record(0, VIEWS)
    for color in data.COLORS[:len(record.annotations)]:
        assert (page == np.array(tuple(bytes.fromhex(color[1:])))).all(-1).sum() > 20
    if record.pictures:
        height, width, _ = record.pictures[0].shape
        assert (page[:height, :width] == record.pictures[0]).all(-1).mean() > 0.9


def test_a_sheet_gives_each_branch_one_color(tmp_path, tiny):
    """Also after an annotation that no frame at its rate shows, which is no branch: the points of the next have the branch's colour."""
    seen = {1: Object({0.5: (30, 30)}), 2: Object({n / 2: (60, 40) for n in range(5)})}
    asked = [Annotation("track", "dot", [1], fps=1.0), Annotation("track", "dog", [2])]
    record = Record("film", [np.zeros((80, 100, 3), np.uint8)] * 5, [n / 2 for n in range(5)], seen, asked)
    with pytest.warns(UserWarning, match="left out: film"):
        page = np.asarray(data.sheet(record, tiny[1], tiny[0].config))
    first, second = ((page[:80, :100] == np.array(tuple(bytes.fromhex(color[1:])))).all(-1).sum() for color in data.COLORS[:2])
    assert first > 5 and not second


def test_corpus_holds_the_words_of_every_set(tmp_path):
    """The texts, as many as asked for and the same each time (of the beginning: drawing takes a while), hold 97% of the words that
    prompts and answers use (but where other words are asked for), and the pieces around points."""
    data.main(["corpus", str(tmp_path / "new/corpus.txt"), "--n", "6000"])
    texts = (tmp_path / "new/corpus.txt").read_bytes().decode().removesuffix("\n").split("\n")
    assert len(texts) == 6000 and texts[:1000] == list(data.corpus(1000, 0))
    known = {word for text in texts for word in re.findall(r"\w+", text)}
    used = Counter(word for name in sorted({*data.SETS} - {*data.FREE}) for index in range(500, 504) for tree in [draw(name, 1, index, 6)]
                   for said in tree.annotations for word in re.findall(r"\w+", f"{said.question} {said.label} {said.answer}"))
    assert sum(n for word, n in used.items() if word in known) > 0.97 * used.total()
    assert {"There are none.", '<tracks coords="', "user", "0.5 "} <= set(texts) and "" not in texts


@pytest.mark.parametrize("argv, said", [
    ([], "required: command"), (["check", "none.jsonl"], "none.jsonl: cannot be read"), (["draw", "cats", "x"], "invalid choice: 'cats'"),
    (["show", "none.jsonl"], "none.jsonl: cannot be read"), (["draw", "text", "x", "--n", "0"], "'0' is not a whole number"),
])
def test_bad_commands_end_in_one_line(argv, said, tmp_path, monkeypatch, capsys):
    """Exit status 2 and one line on stderr, nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        data.main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.startswith("data.py: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- moments ---------------------------------------------------------------------------------------------------------------


def test_a_moment_is_what_its_frame_shows():
    """One frame as an image, with those before it; points, masks and counts are of what is in view there; tracks become
    points, but for one from a given point, which only that tells from its like, and words are left out."""
    record = data.draw("tracks", 4, 2, 8, masks=True)
    assert any(said.task == "track_from" for said in record.annotations)
    record.annotations += [Annotation("qa", question="Who?", answer="Me."), Annotation("count", "cups", count=3)]
    kept = [said for said in record.annotations if said.task not in ("track_from", "qa", "count")]
    hidden = 0
    for frame in range(len(record.pictures)):
        here = record.moment(frame, 4)
        assert here.times is None and len(here.pictures) == 1 and here.pictures[0] is record.pictures[frame]
        assert [id(picture) for picture in here.before] == [id(picture) for picture in record.pictures[max(0, frame - 4):frame]]
        for said, one in zip(kept, here.annotations, strict=True):
            assert one.task == "point" and one.objects == [i for i in said.objects if frame in record.seen(record.objects[i].points)]
            hidden += len(one.objects) < len(said.objects)
        for identity, thing in here.objects.items():
            assert thing.points == {0: record.seen(record.objects[identity].points)[frame]}
            assert np.array_equal(thing.masks[0].mask(), record.seen(record.objects[identity].masks)[frame].mask())
    assert hidden and record.moment(0, 4).before == []


def test_moments_ask_what_moves():
    """Most of their questions are about motion, which the frame alone cannot answer; all are about one image with up to four frames
    before it, and where motion is asked about, with all four."""
    records = [data.draw("moments", 5, index, 5) for index in range(40)]
    said = [one for record in records for one in record.annotations]
    asked = [[one.about in ("moving", "direction") for one in record.annotations] for record in records]
    assert sum(map(sum, asked)) > 0.4 * len(said) > 50 and 0.6 < sum(map(any, asked)) / len(records) < 0.9
    assert all(record.times is None and len(record.pictures) == 1 and len(record.before) <= 4 for record in records)
    assert all(len(record.before) == 4 for record, motion in zip(records, asked) if any(motion))
    assert any(len(record.before) < 4 for record in records)
    assert not any("video" in one.question for one in said)


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_a_moment_has_no_more_questions_than_asked_for(branches):
    """A moment has at least one question and at most `branches`, even if only one fits; its name says which frame it is."""
    for index in range(8):
        record = data.draw("moments", 6, index, branches)
        assert 1 <= len(record.annotations) <= branches and record.name == f"moments-{index}, frame {len(record.before)}"


def test_what_is_half_hidden_in_a_moment_is_not_asked_about(monkeypatch):
    """Of what shows too little for a point, but something, nobody can say whether it is there: no question means it."""
    films, film = [], synthetic.World.film
    monkeypatch.setattr(synthetic.World, "film", lambda *words: films.append(film(*words)) or films[-1])
    half = 0
    for index in range(40):
        record, scene = data.draw("moments", 5, index, 8), films[-1]
        for i, (mask, point) in enumerate(zip(scene.masks[-1], scene.points[-1])):
            if mask.any() and np.isnan(point[0]):
                half += 1
                names = {scene.things[i].kind, scene.things[i].color, *scene.things[i].name.split()}
                assert not any(said.label in (f"{scene.things[i].name}s", "things") or set(said.label.removesuffix("s").split()) <= names
                               for said in record.annotations if " that " not in said.label), (index, scene.things[i].name)
    assert half > 5


def test_videos_of_a_file_become_moments(tmp_path):
    """Eight frames of each, drawn from those with points; an image among them is named."""
    lines = Lines(data.write_set("clips", tmp_path, 2, 0, 3))
    moments = loading.Moments(lines, 0)
    assert moments.size == 16
    for index in range(16):
        record = moments.record(index, VIEWS)
        assert record.times is None and record.objects and record.before is not None and record.name.startswith(f"clips-{index // 8}")
    assert len({moments.record(index, VIEWS).name for index in range(8)}) > 2
    stills = Lines(data.write_set("stills", tmp_path, 1, 0, 3))
    with pytest.raises(ValueError, match="no video with points"):
        loading.Moments(stills, 0).record(0, VIEWS)


def test_a_thing_with_one_moment_is_not_away_from_all_others(tmp_path):
    """Of a video whose things are marked once each nobody is told that they are out of view elsewhere: what is said of them is left out
    frame by frame, and a video with nothing else is named."""
    write_video(tmp_path / "v.mp4", np.zeros((9, 40, 60, 3), np.uint8), 4)
    once = lambda i, *moments: {"id": i, "points": [{"time": t, "x": 9, "y": 9} for t in moments]}
    objects = [once(0, 0.5), once(1, 0, 0.25, 0.5, 0.75, 1)]
    asked = [{"task": "point", "label": label, "objects": ids} for label, ids in (("cup", [0]), ("dog", [1]), ("both", [0, 1]), ("cat", []))]
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(json.dumps({"video": "v.mp4", "objects": some, "annotations": said}) for some, said in
                              ((objects, asked), (objects[:1], asked[:1]))))
    moments = loading.Moments(Lines(path), 0)
    for index in range(8):
        record = moments.record(index, VIEWS)
        assert [(said.label, said.objects) for said in record.annotations] == [("dog", [1]), ("cat", [])]
    with pytest.raises(ValueError, match="v.jsonl:2: no video with points at several moments"):
        moments.record(8, VIEWS)


@pytest.mark.parametrize("label, about", [("the red cup", ""), ("the two dogs", ""), ("a man in red", ""), ("red cups", ""), ("cup that rests", "motion")])
def test_a_prompt_does_not_tell_how_many_there_are(label, about):
    """Whether nothing, one thing or several are meant, a label is asked for in the same words; verbs agree with it."""
    for task, times in (("point", None), ("track", [0.0, 0.5]), ("track_ends", [0.0, 0.5])):
        things = {i: Object({moment: (9, 9) for moment in times or [0]}) for i in range(3)}
        record = Record("", [np.zeros((40, 60, 3), np.uint8)] * len(times or [0]), times, things, [])
        said = [{data.question_text(Annotation(task, label, ids, about=about), record, np.random.default_rng(seed)) for seed in range(60)}
                for ids in ([], [1], [1, 2])]
        assert said[0] == said[1] == said[2]
        verbs = {word.lower() for text in said[0] for word in re.findall(r"\w+", text)} & {"is", "are", "do", "does"}
        assert verbs <= (set() if label.startswith("the") else {"are", "do"} if label == "red cups" else {"is", "does"}), verbs


def test_tags_are_for_one_picture():
    """In a video they cannot say where: the message says what to do."""
    record = next(evaluate.fresh("clips", 1, VIEWS))
    with pytest.raises(ValueError, match="ask frame by frame"):
        data.example(record, TOKENIZER, replace(PRESETS["tiny"], points_as="tags"), np.random.default_rng(0))
