"""The training command: what it writes, what it refuses, and that every part learns at its own rate."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import forks
import parallel
import questions
import synthetic
import train
import weights
from generate import Answer, generate
from model import PRESETS, Molmo
from muon import Muon
from conftest import ROOT
from packing import collate
from processes import broken, killed_after, killed_in_a_save, small_run
from train import PARTS, STAGES, learning_rates, optimizers, part_of, parts_of
from vit import ViT


QUICK = ["--steps", "3", "--eval-every", "3", "--workers", "0"]
LINE = ["--stage", "1", "--steps", "6", "--workers", "0", "--save-every"]


def shorten(patch: pytest.MonkeyPatch, watch: bool):
    """Stages of small steps, of one pack; where they watch, of two, and one record of every set."""
    for key, stage in STAGES.items():
        if key[0] == "tiny":
            patch.setitem(STAGES, key, train.replace(stage, packs=2 if watch else 1, tokens=600, pool=3, branches=2, watch=stage.watch if watch else (),
                                                     vit_frozen_steps=min(stage.vit_frozen_steps, 3)))
    patch.setattr(train, "SMALL_EVALUATION", 1)
    patch.setattr(evaluate, "LONGEST", {False: 16, True: 16})
    patch.setattr(train, "VIT_BATCH", 2)


@pytest.fixture
def quick(monkeypatch):
    """Three small steps a stage, without evaluations."""
    shorten(monkeypatch, watch=False)
    return QUICK


@pytest.fixture
def watching(monkeypatch):
    """Three small steps a stage and an evaluation."""
    shorten(monkeypatch, watch=True)
    return QUICK


def run_once(folder, words: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, watch=False)
        train.main([*words, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a stage 1 of three steps. Shared: leave it as it is."""
    return run_once(tmp_path_factory.mktemp("first"), ["--stage", "1", *QUICK])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of six steps that nothing stopped. Shared: leave it as it is."""
    return run_once(tmp_path_factory.mktemp("whole"), [*LINE, "6"])


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_three_stages_leave_metrics_curves_and_a_checkpoint(watching, tmp_path, capsys):
    """Each stage, from the checkpoint before, writes a line per step, an evaluation of the sets it watches, a picture of coloured curves
    and a model that moved, and its bar shows the loss, its parts, what is right, the pace and the time left; the last stage looks at
    more frames."""
    folders = [tmp_path / str(stage) for stage in (1, 2, 3)]
    for stage, folder in enumerate(folders, start=1):
        init = ["--init", str(folders[stage - 2] / "checkpoint")] if stage > 1 else []
        train.main(["--stage", str(stage), *init, "--out", str(folder), *watching])
        lines = lines_of(folder)
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == [0, 1, 2]
        alone = [line["step"] for line in lines if "naming" in line]  # the ViT, before the others
        assert alone == ([-3, -2, -1] if stage < 3 else [])
        assert all(line["loss"] >= sum(line.get(name, 0) for name in train.LOSSES) for line in steps)
        shown = {name for line in lines if not line.keys() & {"loss", "naming"} for name in line} - {"seconds", "step"}
        assert {name.rsplit(" ", 1)[0].removesuffix(" count").removesuffix(" none") for name in shown} == set(STAGES["tiny", stage].watch)
        curves = np.asarray(Image.open(folder / "curves.png")).astype(int)
        assert len(np.unique(curves[np.ptp(curves, axis=2) > 60], axis=0)) >= 4
        bar = capsys.readouterr().err.split(f"stage {stage}:")[-1]
        assert all(f"{name}=" in bar for name in ("loss", *train.LOSSES, "right", "tokens/s")) and re.search(r"\[\d\d:\d\d<\d\d:\d\d", bar)
    models = [weights.load(folder / "checkpoint")[0] for folder in folders]
    for before, after in zip(models, models[1:]):
        assert all((a != b).any() for a, b in zip(before.parameters(), after.parameters()))
    assert [model.config.views.max_frames for model in models] == [16, 16, 32]


def test_a_stage_of_images_says_nothing_about_videos(quick, monkeypatch, tmp_path):
    """The released first stage looks at one picture at a time; its checkpoint does not take one frame of a video for all."""
    monkeypatch.setitem(STAGES, ("tiny", 1), replace(STAGES["tiny", 1], frames=1, watch=()))
    train.main(["--stage", "1", "--out", str(tmp_path), *quick])
    assert weights.load(tmp_path / "checkpoint")[0].config.views.max_frames == PRESETS["tiny"].views.max_frames > 1


def test_a_run_is_a_pure_function_of_its_seed(quick, first, tmp_path):
    """The same command in another folder gives the same losses (--resume: there is nothing to go on with), another seed others."""
    train.main(["--stage", "1", "--out", str(tmp_path / "0"), "--resume", *quick])
    train.main(["--stage", "1", "--out", str(tmp_path / "1"), "--seed", "1", *quick])
    assert losses_of(tmp_path / "0") == losses_of(first) and not set(losses_of(tmp_path / "1")) & set(losses_of(first))


def test_text_coordinates_train_with_the_same_command(quick, tmp_path):
    """--points-as text makes a model without grounding heads whose loss has no part but the tokens."""
    train.main(["--stage", "1", "--points-as", "text", "--out", str(tmp_path / "text"), *quick])
    model, _ = weights.load(tmp_path / "text/checkpoint")
    line = next(line for line in lines_of(tmp_path / "text") if "loss" in line)
    assert model.point_predictor is None and "patch" not in line
    assert 0 < line["loss"] - line["token"] < 0.01  # the rest is the z-loss
    pytest.importorskip("safetensors")  # the rest is Molmo2's as well: the released layout holds it
    weights.main([str(tmp_path / "text/checkpoint"), str(tmp_path / "released")])
    assert weights.load(tmp_path / "released")[0].config == train.replace(model.config, point=weights.PointConfig())


@pytest.mark.parametrize("mode", ["none", "add", "concat", "attention"])
def test_a_frame_at_a_time_with_a_temporal_module(watching, mode, tmp_path):
    """Stage 4 from a model without such a module: the checkpoint has it, every part of it has learned, and single frames are watched."""
    weights.save(tmp_path / "before", Molmo(PRESETS["tiny"]).initialize(0), train.Tokenizer.load(ROOT / "assets/tokenizer.json"))
    command = ["--stage", "4", "--temporal", mode, *watching]
    train.main([*command, "--init", str(tmp_path / "before"), "--out", str(tmp_path / "run")])
    model, _ = weights.load(tmp_path / "run/checkpoint")
    assert model.config.temporal.mode == mode and model.config.temporal.width == PRESETS["tiny"].temporal.width
    adapter = model.connector.adapter
    assert (adapter is not None) == (mode == "attention")
    if adapter is not None:
        start = Molmo(model.config).initialize(0).connector.adapter.state_dict()
        assert all((adapter.state_dict()[name] != value).any() for name, value in start.items())
    assert "moments f1" in lines_of(tmp_path / "run")[-1] or "moments none recognised" in lines_of(tmp_path / "run")[-1]


def test_temporal_modules_train_in_any_stage_and_stay(quick, tmp_path, capsys):
    """Stage 2 with attention from Xavier's start and masked history; the next stage keeps what the checkpoint has; resuming
    with another module is refused."""
    first = ["--stage", "2", "--temporal", "attention", "--temporal-init", "xavier", "--missing", "masked", "--out", str(tmp_path / "2"), *quick]
    train.main(first)
    train.main(["--stage", "3", "--init", str(tmp_path / "2/checkpoint"), "--out", str(tmp_path / "3"), *quick])
    model, _ = weights.load(tmp_path / "3/checkpoint")
    assert (model.config.temporal.mode, model.config.temporal.missing) == ("attention", "masked")
    assert model.connector.adapter.wo.weight.abs().max() > 0.01
    again = train.replace(model.config.temporal)
    learned = model.connector.adapter.wo.weight.clone()
    assert torch.equal(model.with_temporal(again).connector.adapter.wo.weight, learned)  # what is there stays
    for words, said in ((["--missing", "masked"], "go with --temporal"),
                        (["--temporal", "add", "--temporal-init", "zero", "--init", str(tmp_path / "2/checkpoint")], "only attention has"),
                        (["--temporal", "attention", "--temporal-init", "zero", "--init", str(tmp_path / "2/checkpoint")], "it stays")):
        with pytest.raises(SystemExit) as end:
            train.main(["--stage", "3", *words, "--out", str(tmp_path / "no"), *quick])
        assert end.value.code == 2 and said in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "2", "--resume", "--temporal", "add", "--out", str(tmp_path / "2"), *quick])
    assert end.value.code == 2 and "has temporal attention, not add" in capsys.readouterr().err


def test_visual_tokens_that_look_back_only(quick, tmp_path, capsys):
    """--causal makes such a model, also of one that looked both ways; it stays so in the next stage; --resume does not change the run's."""
    causal = lambda folder: not weights.load(tmp_path / folder / "checkpoint")[0].config.bidirectional
    train.main(["--stage", "1", "--causal", "--out", str(tmp_path / "1"), *quick])
    train.main(["--stage", "2", "--init", str(tmp_path / "1/checkpoint"), "--out", str(tmp_path / "2"), *quick])
    train.main(["--stage", "1", "--out", str(tmp_path / "both"), *quick])
    assert causal("1") and causal("2") and not causal("both")
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--resume", "--causal", "--out", str(tmp_path / "both"), *quick])
    assert end.value.code == 2 and "see each other" in capsys.readouterr().err
    train.main(["--stage", "2", "--causal", "--init", str(tmp_path / "both/checkpoint"), "--out", str(tmp_path / "both 2"), *quick])
    assert causal("both 2")


def test_tags_train_frame_by_frame(quick, tmp_path, monkeypatch, capsys):
    """--points-as tags makes a model that writes percent, as VideoMolmo does; also of one that wrote coordinates as text,
    which has the same parameters."""
    train.main(["--stage", "2", "--points-as", "text", "--out", str(tmp_path / "text"), *quick])
    train.main(["--stage", "4", "--points-as", "tags", "--init", str(tmp_path / "text/checkpoint"), "--out", str(tmp_path / "tags"), *quick])
    assert weights.load(tmp_path / "tags/checkpoint")[0].config.points_as == "tags"
    for stage, rates in ((2, STAGES["tiny", 2].rates), (1, {"image pointing": 1})):  # by what is drawn, also where the checkpoint says tags
        monkeypatch.setitem(STAGES, ("tiny", stage), replace(STAGES["tiny", stage], rates=rates))
        with pytest.raises(SystemExit):
            train.main(["--stage", str(stage), "--init", str(tmp_path / "tags/checkpoint"), "--out", str(tmp_path / "several"), *quick])
        assert f"stage {stage} draws multi-image points: give --data" in capsys.readouterr().err and not (tmp_path / "several").exists()


@pytest.mark.parametrize("argv, said", [
    (["--stage", "5"], "stage"),
    (["--stage", "1", "--data", "none.jsonl"], "none.jsonl"),
    (["--stage", "1", "--accumulate", "3"], "cannot be cut into 3 parts (--accumulate)"),
    (["--stage", "1", "--context-parallel", "2"], "--context-parallel 2 needs as many processes"),
    (["--stage", "1", "--steps", "0"], "0"),
    (["--stage", "2", "--init", "no/such/folder"], "no/such/folder"),
    (["--stage", "1", "--preset", "huge"], "huge"),
    (["--stage", "1", "--preset", "molmo2-8b"], "--init FOLDER"),
    (["--stage", "3", "--out", "elsewhere"], "stage 3 goes on from a trained model: give --init"),
    (["--stage", "2", "--points-as", "tags"], "they mark points in one picture"),
    (["--stage", "1", "--device", "no-such-device"], "no-such-device"),
])
def test_bad_commands_end_in_one_line(argv, said, tmp_path, capsys):
    """Wrong words on the command line: one line on stderr that names them, exit status 2, and an earlier run is kept."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("kept")
    with pytest.raises(SystemExit) as end:
        train.main([*argv, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and said in error and error.count("\n") == 1
    assert (tmp_path / "run/metrics.jsonl").read_text() == "kept"


def test_another_run_is_not_taken_for_this_one(quick, tmp_path, capsys, monkeypatch):
    """What a checkpoint is not, in one line each, the run in the folder kept: the same command without --resume, another preset, a part
    no longer frozen, another form of points, another size, another row of the table."""
    run, other = ["--stage", "1", "--out", str(tmp_path / "run")], ["--stage", "1", "--out", str(tmp_path / "other")]
    train.main([*run, "--freeze", "vit", *quick])
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    init = ["--init", str(tmp_path / "run/checkpoint")]
    for words, said in (([*run, "--freeze", "vit"], "holds a run: --resume goes on with it"),
                        ([*run, "--resume", "--freeze", "vit", "--preset", "small"], "has preset tiny, not small"),
                        ([*run, "--resume"], "has freeze ['vit'], not []"),
                        ([*other, *init, "--points-as", "text"], "the checkpoint writes points as tokens"),
                        ([*other, *init, "--preset", "small"], "--preset small is for a language model of width 512, 12 layers"),
                        ([*other, *init, "--preset", "molmo2-4b"], "--preset molmo2-4b is for a language model of width 2560")):
        with pytest.raises(SystemExit) as end:
            train.main([*words, *quick])
        assert end.value.code == 2 and said in capsys.readouterr().err
    monkeypatch.setitem(train.STAGES, ("tiny", 1), replace(train.STAGES["tiny", 1], weights="paper"))
    with pytest.raises(SystemExit):
        train.main([*run, "--resume", "--freeze", "vit", *quick])
    assert "'weights' in the stage's row has changed" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before and not (tmp_path / "other").exists()


def with_nan(x: torch.Tensor, where: str) -> torch.Tensor:
    """x with a NaN in the way: as its value, or as what flows back through it."""
    if where == "loss":
        return x * float("nan")
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * float("nan"))
    return x


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_step(quick, where, tmp_path, monkeypatch, capsys):
    """A NaN in the loss or in a gradient ends the run with one line that names the step and the examples; what is saved is from
    before it."""
    losses = Molmo.losses
    monkeypatch.setattr(Molmo, "losses", lambda self, *batch: {k: with_nan(v, where) if k == "token" else v
                                                              for k, v in losses(self, *batch).items()})
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--out", str(tmp_path / "run"), *quick])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "step 0" in said and "in the batch: stills-" in said
    state = weights.load_training(tmp_path / "run/checkpoint")
    assert state["step"] == 0 and "probe weight" in state  # the end of the ViT's own steps
    assert all(p.isfinite().all() for p in weights.load(tmp_path / "run/checkpoint")[0].parameters())


def test_the_vit_alone_stops_as_well(quick, tmp_path, monkeypatch, capsys):
    """A NaN in a gradient while the ViT learns alone: one line with the numbers of the scenes."""
    features = ViT.features
    monkeypatch.setattr(ViT, "features", lambda self, crops: with_nan(features(self, crops), "gradient"))
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--out", str(tmp_path / "run"), *quick])
    assert end.value.code == 2 and "in the batch: scenes 0 to 1" in capsys.readouterr().err.splitlines()[-1]


def test_long_curves_are_drawn_as_means():
    """At most so many points, the means of neighbours in their order; a short curve stays as it is."""
    assert train.thinned([(i, float(i % 2)) for i in range(10)], 5) == [(0.5 + 2 * i, 0.5) for i in range(5)]
    assert train.thinned([(1, 2.0), (3, 4.0)]) == [(1, 2.0), (3, 4.0)] and train.thinned([]) == []


def test_each_parameter_has_one_part_and_one_optimiser(tiny):
    """Every parameter is stepped once, at its part's learning rate; new token embeddings go with the connector; Muon
    gets matrices that mix channels and no table of rows."""
    model = tiny[0]
    made = optimizers(model, model.config.optimizer)
    stepped = [id(p) for optimiser in made for group in optimiser.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    part = {id(p): name for name, params in parts_of(model).items() for p in params.values()}
    assert all(part[id(p)] == group["part"] for o in made for group in o.param_groups for p in group["params"])
    assert part_of("wte.new_embedding") == "connector" and part_of("wte.embedding") == "llm"
    muon = {id(p) for o in made if isinstance(o, Muon) for group in o.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in muon}
    assert "vit.patch_embedding.weight" in names and not any(n.startswith(("wte", "lm_head")) for n in names)
    assert PRESETS["molmopoint-8b"].optimizer == "adamw"


def test_thirty_steps_learn_a_handful_of_scenes(tiny):
    """Two stills and a clip, two questions each, as every run has them: after thirty steps of the preset `tiny` the loss is less
    than a thousandth of what it was, and every answer is written as it was taught, point by point."""
    _, tokenizer = tiny
    config, ways = PRESETS["tiny"], {("point", "kind"): 1, ("point", "color+kind"): 1}
    trees, asked, answers = [], [], []
    for i, scene in enumerate((synthetic.still(7, 0), synthetic.still(7, 1), synthetic.clip(7, 0))):
        record = data.scene_record(scene, questions.queries(scene, np.random.default_rng(i), 2, mixture=ways))
        views = data.views_of(record, config.views)
        trees.append(data.example(record, tokenizer, config, np.random.default_rng(0)))
        asked.append(data.prompts(tokenizer, views, [said.question for said in record.annotations]))
        for said in record.annotations:
            pieces, rows = data.answer_pieces(said, record, views, config)
            answers.append(Answer(tokenizer.encode_layout(pieces), rows.tolist(), "stop"))
    model, batch, history = Molmo(config).initialize(0), collate(trees), []
    optimisers = optimizers(model, config.optimizer)
    for step in range(30):
        losses = model.losses(batch)
        loss = sum(losses[name] for name in train.LOSSES) / batch.loss_weights.sum()
        loss.backward()
        train.clip(parts_of(model), loss.item(), step)
        train.update(optimisers, dict.fromkeys(PARTS, 5e-3 * min(1, (30 - step) / 15)))  # at a constant rate the loss jumps now and then
        history.append(loss.item())
    assert history[-1] < history[0] / 1000
    assert generate(model.eval(), collate(asked), data.control_tokens(tokenizer), 60) == answers and len(answers) == 6


def test_learning_rates_warm_up_and_end_at_a_tenth():
    """Linear from nothing over the part's own warm-up, full after it, half a cosine down to a tenth of the peak at the end."""
    assert train.schedule(1, 100, 549, 1000) == pytest.approx(0.55) and train.schedule(1, 100, 324, 1000) == pytest.approx(0.868, abs=1e-3)
    stage = train.replace(STAGES["tiny", 1], steps=1000, warmup=dict(zip(PARTS, (100, 10, 100, 1))))
    first, later, last = (learning_rates(stage, step) for step in (0, 99, 999))
    assert first["vit"] == pytest.approx(stage.lr["vit"] / 100, rel=1e-3) and first["point"] == pytest.approx(stage.lr["point"])
    assert later["vit"] == pytest.approx(stage.lr["vit"]) and last["llm"] == pytest.approx(0.1 * stage.lr["llm"])


@pytest.mark.parametrize("form", ["tokens", "text"])
def test_the_loss_does_not_depend_on_how_a_step_is_cut(quick, form, tmp_path, monkeypatch):
    """Two packs at once or one after the other: the same losses and, up to rounding, the same parameters after some steps, whatever
    the weights are."""
    monkeypatch.setitem(STAGES, ("tiny", 2), replace(STAGES["tiny", 2], weights="paper", packs=2))
    runs = []
    for parts in ("1", "2"):
        train.main(["--stage", "2", "--points-as", form, "--accumulate", parts, "--out", str(tmp_path / parts), *quick])
        lines = [line for line in lines_of(tmp_path / parts) if "loss" in line]
        runs.append((lines, weights.load(tmp_path / parts / "checkpoint")[0]))
    for one, two in zip(runs[0][0], runs[1][0], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert runs[0][0][0]["loss"] == pytest.approx(runs[1][0][0]["loss"], rel=1e-6)
    assert runs[0][0][0]["norms"] == pytest.approx(runs[1][0][0]["norms"], rel=1e-4)
    one, two = (torch.cat([p.detach().flatten() for p in model.parameters()]) for _, model in runs)
    start = torch.cat([p.detach().flatten() for p in Molmo(runs[0][1].config).initialize(0).parameters()])
    assert (one - two).norm() < 1e-4 * (one - start).norm()


@pytest.mark.parametrize("cores, processes, gpu, workers", [(2, 1, False, 1), (2, 2, False, 1), (16, 1, False, 4), (64, 2, True, 8), (None, 1, False, 1)])
def test_workers_go_by_cores(monkeypatch, cores, processes, gpu, workers):
    """Half of the cores, shared by the training processes of the machine; where the system says which of them a process may use (not on
    a Mac), of these."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores or 0), raising=False)
    if not cores or gpu:
        monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores if gpu or not cores else 99)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert train.usual_workers() == workers


def test_something_must_be_left_to_train(quick, tmp_path, capsys):
    """If every part is frozen, by --freeze or by the stage itself, nothing begins; what is trained later does not help."""
    everything = [word for part in PARTS for word in ("--freeze", part)]
    for words in (["--stage", "3", "--init", "assets/tiny", *everything], ["--stage", "1", *everything[2:]]):
        with pytest.raises(SystemExit) as end:
            train.main([*words, "--out", str(tmp_path / "no"), *quick])
        assert end.value.code == 2 and "nothing is left that could be trained" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_row_of_the_table_is_what_a_step_does(quick, tmp_path, monkeypatch):
    """Crops, shares of questions, loss weights and dropout of the row reach the step, and the logged loss is the weighted sum over the
    sum of the weights."""
    row = replace(STAGES["tiny", 1], weights="paper", packs=2, image_crops=2, drop_responses_only=True, more={"none": 0})
    monkeypatch.setitem(STAGES, ("tiny", 1), row)
    words = ["--stage", "1", "--freeze", "vit", "--steps", "1", "--workers", "0", "--out", str(tmp_path / "run")]
    _, _, _, model, _, loader = train.prepare(train.parse(words), parallel.World())
    batch, only, losses = next(iter(loader)), [], Molmo.losses
    assert loader.examples.config.views.max_crops == 2 < model.config.views.max_crops
    assert loader.examples.all[0].more == row.more and len(batch.loss_weights.unique()) > 2
    made = losses(model, batch)
    total = sum(made[name] for name in train.LOSSES) + train.Z_LOSS * made["z"]
    monkeypatch.setattr(Molmo, "losses", lambda self, b, responses=False: only.append(responses) or losses(self, b, responses))
    train.main(words)
    logged = next(line for line in lines_of(tmp_path / "run") if "loss" in line)
    assert only == [True] and logged["loss"] == pytest.approx((total / batch.loss_weights.sum()).item(), rel=1e-5)


def test_a_step_has_each_parts_rate_and_a_norm_of_one():
    """Gradients are cut to a norm of 1 part by part, and AdamW (the papers' settings) moves each part by its own rate."""
    tops = {"vit": "vit", "connector": "connector", "blocks": "llm", "point_predictor": "point"}
    rates = dict(zip(PARTS, (1e-3, 2e-3, 3e-3, 4e-3)))
    module = torch.nn.ModuleDict({top: torch.nn.Linear(4, 4, bias=False) for top in tops})
    made = optimizers(module, "adamw")
    assert [(g["betas"], g["eps"], g["weight_decay"]) for o in made for g in o.param_groups] == [((0.9, 0.95), 1e-6, 0.0)] * 4
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.full_like(p, 5.0)
    assert train.clip(parts_of(module), 0.0, 0) == dict.fromkeys(PARTS, pytest.approx(20))
    assert all(p.grad.norm() == pytest.approx(1) for p in module.parameters())
    train.update(made, rates)
    for name, p in module.named_parameters():
        assert (before[name] - p).detach().numpy() == pytest.approx(rates[tops[name.split(".")[0]]], rel=1e-3)


def test_a_stage_goes_on_from_the_one_before(quick, tmp_path, monkeypatch, capsys):
    """In the folder `runs` the next stage begins with the checkpoint of the stage before, and says so; with --out it does not."""
    monkeypatch.chdir(tmp_path)
    train.main(["--stage", "1", *quick])
    train.main(["--stage", "2", "--freeze", "llm", "--resume", *quick])  # there is nothing to go on with yet
    assert "begins with runs/stage1/checkpoint" in capsys.readouterr().out
    train.main(["--stage", "2", "--freeze", "llm", "--out", "elsewhere", *quick])
    said = capsys.readouterr().out
    assert "begins with" not in said and "starts from random weights" in said
    one, two, other = (weights.load(folder)[0].blocks.state_dict() for folder in ("runs/stage1/checkpoint", "runs/stage2/checkpoint",
                                                                                  "elsewhere/checkpoint"))
    assert all(torch.equal(one[name], two[name]) for name in one) and not all(torch.equal(one[name], other[name]) for name in one)


def test_a_stage_before_that_was_stopped_is_not_taken_for_a_whole_one(quick, first, tmp_path, monkeypatch, capsys):
    """If its model has had some steps, the line says after how many; if the ViT was still alone, the next stage does not begin."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(first, "runs/stage1")
    state = weights.load_training(first / "checkpoint")
    change = lambda **more: np.savez("runs/stage1/checkpoint/training.npz", **state | more)
    change(step=np.array(2))
    train.main(["--stage", "2", *quick])
    assert "begins with runs/stage1/checkpoint (stopped after step 2 of 3)" in capsys.readouterr().out
    shutil.rmtree("runs/stage2")
    for broken in ({"settings": np.array("[]")}, {"settings": np.array("{}")}, {"step": np.array("soon")}):
        change(**broken)
        with pytest.raises(SystemExit) as end:
            train.main(["--stage", "2", *quick])
        assert end.value.code == 2 and "is not of a training run: --init" in capsys.readouterr().err
    change(**{"step": np.array(-1), "probe weight": np.zeros(3)})
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "2", *quick])
    assert end.value.code == 2 and "stopped while the ViT was alone" in capsys.readouterr().err and not (tmp_path / "runs/stage2").exists()


def test_loss_weights_can_be_chosen(quick, monkeypatch, tmp_path):
    """Each of the three ways reaches the batches, from the row of the table or from the command."""
    seen = []

    class Stop(BaseException):
        pass

    def made(loader):
        seen.append(loader.weights)
        raise Stop

    monkeypatch.setattr(train.loading.Loader, "__iter__", made)
    for words in ([], ["--loss-weights", "released"], ["--loss-weights", "paper"]):
        with pytest.raises(Stop):
            train.main(["--stage", "3", "--init", str(ROOT / "assets/tiny"), "--out", str(tmp_path / str(len(seen))), *quick, *words])
    assert seen == ["uniform", "released", "paper"]


def test_own_points_are_learned_from_files(quick, tmp_path, monkeypatch, capsys):
    """--data trains on JSONL files in place of the stage's sets; a bad line is named, left out and counted. With other lines in the file
    the run does not go on."""
    monkeypatch.setitem(STAGES, ("tiny", 2), replace(STAGES["tiny", 2], packs=2))  # so many that the bad line's turn comes
    path, more = (data.write_set(name, tmp_path, 5, 0, 2) for name in ("image points", "video points"))
    path.write_text(path.read_text() + "{\n")
    train.main(["--stage", "2", "--data", str(path), str(more), "--out", str(tmp_path / "run"), *quick])
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2] and all("loss" in line for line in lines)
    out, err = capsys.readouterr()
    assert f"warning: left out: {path}:6: " in err and lines[-1]["left out"] == 1 and "left out: 1 examples" in out
    path.write_text(path.read_text().replace("{\n", "[\n"))
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "2", "--data", str(path), str(more), "--out", str(tmp_path / "run"), "--resume", *quick])
    assert end.value.code == 2 and "has contents of the data" in capsys.readouterr().err


def test_data_without_a_good_line_end_the_program(tmp_path):
    """With a worker process, too: one line says why, the status is 2, and nothing is left waiting."""
    (tmp_path / "bad.jsonl").write_text("{\n")
    words = ["--stage", "2", "--init", "assets/tiny", "--workers", "1", "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "bad.jsonl:1" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_stage_table_holds_the_papers_numbers():
    """As published: steps, tokens, frames, learning rates, the mixture of stage 1, whose tokens the released script does not weigh; every preset has its stages."""
    assert STAGES["molmopoint-8b", 2].steps == 22_000 and STAGES["molmopoint-8b", 2].packs == 160
    assert [STAGES["molmopoint-vid-4b", n].steps for n in (2, 3)] == [6_000, 800]
    crops = {key: stage.image_crops for key, stage in STAGES.items() if key[0] not in ("tiny", "small")}
    assert crops == {(preset, n): 48 if preset == "molmopoint-gui-8b" and n in (2, 3) else 8 for preset, n in crops}
    assert {key for key in STAGES} == {(preset, n) for preset in PRESETS for n in (1, 2, 3, 4)}
    for n, (steps, tokens, lr, warmup) in {1: (32_000, 2560, (6e-6, 2e-4, 2e-5, 1e-4), (2000, 200, 2000, 200)),
                                           2: (30_000, 16_384, (5e-6, 5e-6, 1e-5, 5e-6), (200,) * 4),
                                           3: (2_000, 36_864, (5e-6, 5e-6, 1e-5, 5e-6), (200,) * 4)}.items():
        row = STAGES["molmo2-8b", n]
        assert (row.steps, row.packs, row.tokens, row.weights) == (steps, 128, tokens, "uniform" if n == 1 else "paper")
        assert (row.lr, row.warmup) == (dict(zip(PARTS, lr)), dict(zip(PARTS, warmup)))
    assert [STAGES["molmo2-8b", n].frames for n in (1, 2, 3)] == [1, 128, 384]
    assert STAGES["molmo2-8b", 1].rates == {"image captions": 60, "image pointing": 30, "text": 10}
    assert data.RATES == {"captions": 13.6, "image qa": 22.7, "video qa": 18.2, "image pointing": 9.1, "video pointing": 13.6,
                          "video tracking": 13.6, "text": 9.1}
    assert sum(STAGES["molmo2-8b", 2].rates.values()) == pytest.approx(100, abs=0.2)


def test_seeds_of_training_stay_clear_of_those_of_evaluation():
    """What is evaluated by default was never trained on: no run, whatever its stage and seed, draws those scenes."""
    runs = [train.parse(["--stage", str(stage), "--seed", str(seed)]) for stage in (1, 2, 3, 4) for seed in (0, 1, 10000)]
    assert len({train.data_seed(args) for args in runs}) == 12 and max(map(train.data_seed, runs)) < evaluate.EVALUATION_SEED
    with pytest.raises(ValueError, match="from 0 to 10,000"):
        train.parse(["--stage", "1", "--seed", "10001"])


def test_dropout_acts_in_training_only(tiny):
    """Residual dropout changes what the decoder gives in training mode, not in evaluation."""
    _, tokenizer = tiny
    config = train.replace(PRESETS["tiny"], llm=train.replace(PRESETS["tiny"].llm, dropout=0.5))
    model = Molmo(config).initialize(0)
    batch = collate([data.example(data.draw("text", 0, 0, 2), tokenizer, config, np.random.default_rng(0))])
    loss = lambda: model.losses(batch)["token"].item()
    assert len({loss() for _ in range(3)}) == 3
    model.eval()
    assert len({loss() for _ in range(3)}) == 1


def test_dropout_on_responses_leaves_prompts_alone(tiny):
    """Where it acts on responses only, hidden states up to the first token of the response keep every bit and later ones
    do not; Molmo2's first stage is like that."""
    _, tokenizer = tiny
    config = train.replace(PRESETS["tiny"], llm=train.replace(PRESETS["tiny"].llm, dropout=0.5))
    model = Molmo(config).initialize(0)
    batch = collate([data.example(data.draw("stills", 0, 0, 1), tokenizer, config, np.random.default_rng(0))])
    with torch.no_grad():
        one, two = (model(batch, batch.loss_weights > 0)[0][0] for _ in range(2))
    first = int((batch.loss_weights[0] > 0).nonzero()[0])
    changed = (one != two).any(-1)
    assert first > 20 and not changed[:first].any() and changed[first:].all()
    assert STAGES["molmo2-8b", 1].drop_responses_only and not STAGES["molmo2-8b", 2].drop_responses_only


def test_the_z_loss_is_the_squared_normaliser(tiny):
    """Sum over loss tokens of weight times log-sum-exp of the logits, squared; the token loss is torch's cross-entropy."""
    model, tokenizer = tiny
    batch = collate([data.example(data.draw("stills", 0, 0, 2), tokenizer, model.config, np.random.default_rng(0))], "paper")
    losses, (h, _) = model.losses(batch), model(batch)
    logits, w = model.logits(h).flatten(0, 1), batch.loss_weights.flatten()
    assert losses["z"].item() == pytest.approx((logits.logsumexp(-1) ** 2 * w).sum().item(), rel=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="none")
    assert losses["token"].item() == pytest.approx((cross_entropy * w).sum().item(), rel=1e-5)


def test_half_precision_trains(quick, tmp_path, monkeypatch):
    """Under bfloat16 autocast, as on a GPU, steps run, losses stay near those of float32 and parameters stay float32."""
    losses = []
    for half in (False, True):
        monkeypatch.setattr(train, "has_bfloat16", lambda device: half)
        train.main(["--stage", "2", "--out", str(tmp_path / str(half)), *quick])
        losses.append([line["loss"] for line in lines_of(tmp_path / str(half)) if "loss" in line])
        assert next(weights.load(tmp_path / str(half) / "checkpoint")[0].parameters()).dtype == torch.float32
    assert losses[1] != losses[0] and losses[1][0] == pytest.approx(losses[0][0], rel=0.05)


# ---- stopping and going on ------------------------------------------------------------------------------------------


def losses_of(folder) -> list[float]:
    """Of the ViT alone and of the steps, in their order."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line.get("loss", line.get("naming")) for line in lines if line.keys() & {"loss", "naming"}]


def test_a_stopped_run_goes_on_bit_for_bit(quick, whole, tmp_path, monkeypatch):
    """SIGTERM in four steps, of the ViT alone, its last, the model's first and a later one: that step is finished and saved, the run
    returns; resumed each time, the losses and the parameters at the end are those of a run that was never stopped, to the last bit."""
    update, steps = train.update, []

    def interrupted(optimisers, rates):
        update(optimisers, rates)
        steps.append(1)
        if len(steps) in (2, 6, 7, 10):  # six steps of the ViT alone come first
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "update", interrupted)
    for done in (2, 6, 7, 10, 12):
        train.main([*LINE, "6", "--out", str(tmp_path / "stopped"), "--resume"])
        assert losses_of(tmp_path / "stopped") == losses_of(whole)[:done]
    same, stopped = (weights.load(folder / "checkpoint")[0].state_dict() for folder in (whole, tmp_path / "stopped"))
    assert all(torch.equal(same[name], stopped[name]) for name in same)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the bar's last words
@pytest.mark.parametrize("stopped_in", [2, 7])
def test_the_step_is_saved_even_if_the_signal_has_ended_who_reads_the_bar(stopped_in, quick, tmp_path, monkeypatch):
    """SIGTERM or Ctrl-C reaches `| tee` as well, and the next word to stderr breaks: of the ViT alone and of the model, the step is
    saved before that."""
    update, steps = train.update, []

    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            if len(steps) >= stopped_in:
                raise BrokenPipeError
            return len(text)

    def interrupted(optimisers, rates):
        update(optimisers, rates)
        steps.append(1)
        if len(steps) == stopped_in:  # six steps of the ViT alone come first
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train, "update", interrupted)
    monkeypatch.setattr(sys, "stderr", Pipe())
    with pytest.raises(SystemExit):
        train.main([*LINE, "100", "--out", str(tmp_path)])
    assert len(steps) == stopped_in and int(weights.load_training(tmp_path / "checkpoint")["step"]) == stopped_in - 6


def test_an_evaluation_that_was_stopped_comes_when_the_run_goes_on(watching, tmp_path, monkeypatch):
    """SIGTERM while the figures to watch are made: what is asked at the moment is answered, the run ends without figures; --resume
    begins with them, once."""
    real, asked = train.evaluate, []

    def stopped(model, tokenizer, records):
        signal.raise_signal(signal.SIGTERM)
        result = real(model, tokenizer, records)
        asked.append(result[0]["questions"])
        return result

    figures = lambda: [line["step"] for line in lines_of(tmp_path / "run") if "loss" not in line and "naming" not in line]
    words = ["--stage", "1", "--steps", "4", "--eval-every", "2", "--workers", "0", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stopped)
        train.main(words)
        train.main([*words, "--resume"])  # stopped there again, before a step
    assert asked == [0, 0] and figures() == [] and len(losses_of(tmp_path / "run")) == 4 + 2
    for _ in range(2):
        train.main([*words, "--resume"])
        assert figures() == [1, 3]


@pytest.fixture
def start(tmp_path):
    """Starts a run of tests/processes.py as a process group of its own; -> it and the file of its complaints. What still runs when the
    test is over is killed."""
    runs = []

    def start(run: Callable, *words: object) -> tuple[BaseProcess, Path]:
        err = tmp_path / f"{len(runs)}.err"
        runs.append(forks.start(run, *words, out=os.devnull, err=err))
        return runs[-1], err

    yield start
    for run in runs:
        if run.is_alive():
            kill(run)


def kill(run: BaseProcess, by: int = signal.SIGKILL):
    """With all that it started; it may have ended."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, by)


def status(run: BaseProcess, seconds: float) -> int | None:
    """Of a run that ends by itself; None if it goes on."""
    run.join(seconds)
    return run.exitcode


def test_kill_9_at_five_random_steps_and_in_a_save_changes_nothing(start, tmp_path):
    """Program and worker killed by the system after three steps of the ViT alone, then while a file of a checkpoint is half written,
    then some moment after each of five random numbers of steps, always in what --resume goes on with: the losses of all steps, and the model
    in the end, are those of a run that was left alone; a line of the metrics that was cut is no obstacle."""
    rng, folder, waiting, reached = np.random.default_rng(0), tmp_path / "killed", [], []
    whole, _ = start(small_run, "--out", tmp_path / "whole")
    killings = [(killed_after, 3, 0), (killed_in_a_save,), *((killed_after, rng.integers(1, 4), rng.uniform(0, 0.05)) for _ in range(5))]
    for number, (program, *when) in enumerate(killings):
        run, err = start(program, *when, "--out", folder, *(["--resume"] if number else []))
        assert status(run, 120) == -signal.SIGKILL, (program, when, err.read_text())
        if program is killed_in_a_save:
            assert (folder / ".checkpoint.new").is_dir()
        state = weights.load_training(weights.standing(folder / "checkpoint"))
        reached.append(int(state["step"]))
        waiting += [loader["pool"] for loader in json.loads(str(state["loaders"])) if loader] if "loaders" in state else []
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{}\nnull\n{"seconds": 1.0, "st')
    last, err = start(small_run, "--out", folder, "--resume")
    assert (status(whole, 120), status(last, 120)) == (0, 0), err.read_text()
    assert losses_of(folder) == losses_of(tmp_path / "whole") and len(losses_of(folder)) == 4 + 18
    one, two = (weights.load(tmp_path / run / "checkpoint")[0].state_dict() for run in ("killed", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert reached == sorted(reached) and reached[:2] == [-2, 4] and any(waiting)  # a pack was half made


def test_a_program_with_a_mistake_ends(start, tmp_path):
    """An error that is not bad input ends in a traceback, and the program, with its worker, in time, though workers ignore SIGTERM."""
    run, err = start(broken, "--out", tmp_path / "run")
    assert status(run, 120) == 1 and "Traceback" in err.read_text() and "StopIteration" in err.read_text(), err.read_text()


def test_a_file_is_no_run_folder(quick, tmp_path, capsys):
    """--out that names a file is one line, and the file stays."""
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--out", str(tmp_path / "mine"), *quick])
    assert end.value.code == 2 and "mine: a file: give a folder" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "mine"


def test_two_runs_do_not_write_to_one_folder(quick, first, tmp_path, capsys):
    """While another process holds the folder --resume is refused in one line and changes nothing; when that is killed, it goes on."""
    folder = shutil.copytree(first, tmp_path / "run")
    hold = "import command, pathlib, sys\nwith command.alone_in(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()"
    words = ["--stage", "1", "--out", str(folder), "--resume", *quick]
    with subprocess.Popen([sys.executable, "-c", hold, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(SystemExit) as end:
            train.main(words)
        assert end.value.code == 2 and f"another run is writing in {folder}" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        other.kill()
    train.main(words)


def test_a_kill_between_the_renames_loses_nothing(quick, whole, tmp_path, monkeypatch):
    """Killed when the old checkpoint has lost its name and the new one has none yet: the old one is found again."""
    folder, rename, renamed = tmp_path / "run", weights.os.rename, []

    class Killed(BaseException):
        pass

    def counted(old, new):
        renamed.append(new)
        if len(renamed) == 3:  # the first save has one rename, the second two
            raise Killed
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "rename", counted)
        with pytest.raises(Killed):
            train.main([*LINE, "2", "--out", str(folder)])
    assert not (folder / "checkpoint").exists()
    train.main([*LINE, "2", "--out", str(folder), "--resume"])
    assert losses_of(folder) == losses_of(whole) and not list(folder.glob(".checkpoint*"))


def test_resume_refuses_a_run_of_another_format(quick, first, monkeypatch, capsys):
    """What an older version has left, whose numbers mean other examples, is one line that says how to begin anew from its model."""
    monkeypatch.setattr(train, "FORMAT", train.FORMAT + 1)
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--out", str(first), "--resume", *quick])
    assert end.value.code == 2 and f"older version: begin another with --init {first}/checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--seed", "3"], ["--steps", "9"], ["--stage", "2"]])
def test_resume_refuses_another_run(quick, first, change, capsys):
    """--resume with another seed, length or stage than the run in the folder is one line that says which."""
    with pytest.raises(SystemExit) as end:
        train.main(["--stage", "1", "--out", str(first), "--resume", *quick, *change])
    assert end.value.code == 2 and f"has {change[0][2:]} " in capsys.readouterr().err


def test_dropout_resumes_too(quick, whole, tmp_path, monkeypatch):
    """With dropout, which changes the losses, a resumed run draws the same masks as one that was never stopped."""
    tiny = PRESETS["tiny"]
    monkeypatch.setitem(train.PRESETS, "tiny", train.replace(tiny, llm=train.replace(tiny.llm, dropout=0.2)))
    train.main([*LINE, "3", "--out", str(tmp_path / "dropped")])
    update, steps = train.update, []

    def stopping(optimisers, rates):
        update(optimisers, rates)
        steps.append(1)
        if len(steps) == 6 + 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", stopping)
        train.main([*LINE, "3", "--out", str(tmp_path / "cut")])
    train.main([*LINE, "3", "--out", str(tmp_path / "cut"), "--resume"])
    dropped = losses_of(tmp_path / "dropped")
    assert losses_of(tmp_path / "cut") == dropped and dropped[:6] == losses_of(whole)[:6] and not set(dropped[6:]) & set(losses_of(whole))


def test_a_signal_to_the_whole_group_saves(start, tmp_path):
    """SIGTERM to program and workers, as a batch system sends it: the step is finished and saved, status 0."""
    (run, err), metrics = start(small_run, "--out", tmp_path / "run", "--steps", 5000), tmp_path / "run/metrics.jsonl"
    for _ in range(1200):
        if not run.is_alive() or metrics.exists() and '"loss"' in metrics.read_text():
            break
        time.sleep(0.1)
    kill(run, signal.SIGTERM)
    assert status(run, 60) == 0, err.read_text()
    assert (tmp_path / "run/checkpoint/training.npz").exists() and losses_of(tmp_path / "run")


def test_resume_with_a_bare_checkpoint_says_so(quick, first, tmp_path, capsys):
    """In a folder whose checkpoint holds no training state, or something else under its name, --resume is one line."""
    shutil.copytree(first, tmp_path / "new")
    state = tmp_path / "new/checkpoint/training.npz"
    for spoil in (lambda: state.write_text("no archive"), lambda: np.save(state.open("wb"), np.zeros(3)), state.unlink):
        spoil()
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train.main(["--stage", "1", "--out", str(tmp_path / "new"), "--resume", *quick])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "training.npz" in said and said.count("\n") == 1


def test_large_presets_train_with_the_papers_dropout(quick, tiny, tmp_path, monkeypatch):
    """A folder as released may name no dropout: a tenth of what attention and MLP add is dropped all the same, and the checkpoint says so.
    Here a tiny model goes by a large one's name."""
    config = tiny[0].config
    monkeypatch.setitem(train.PRESETS, "molmopoint-8b", train.replace(config, llm=train.replace(config.llm, dropout=0.1)))
    monkeypatch.setitem(STAGES, ("molmopoint-8b", 1), STAGES["tiny", 1])
    weights.save(tmp_path / "init", *tiny)
    args = train.parse(["--stage", "1", "--preset", "molmopoint-8b", "--init", str(tmp_path / "init"), "--out", str(tmp_path / "run"), *quick])
    model = train.prepare(args, parallel.World())[3]
    assert model.config.llm.dropout == 0.1 and [block.dropout.p for block in model.blocks] == [0.1] * config.llm.layers


def test_frozen_parts_stay_as_they_are(quick, first, tmp_path):
    """--freeze vit --freeze llm: these keep every bit, the others move."""
    before, _ = weights.load(first / "checkpoint")
    train.main(["--stage", "2", "--init", str(first / "checkpoint"), "--out", str(tmp_path / "b"), "--freeze", "vit",
                "--freeze", "llm", *quick])
    after, _ = weights.load(tmp_path / "b/checkpoint")
    moved = {part_of(name) for (name, a), b in zip(before.named_parameters(), after.parameters()) if not torch.equal(a, b)}
    assert moved == {"connector", "point"}


def test_after_its_own_steps_the_vit_rests(quick, tmp_path, monkeypatch):
    """For as many steps as the stage says it stays as it is, to the last bit, and learns from the next one on; on data of one's own,
    where it has no steps of its own, it learns at once."""
    pretrain, looked = train.pretrain_vit, {}

    def watched(run, state):
        pretrain(run, state)
        looked.update({name: p.detach().clone() for name, p in run.model.vit.named_parameters()})

    monkeypatch.setattr(train, "pretrain_vit", watched)
    train.main(["--stage", "1", "--out", str(tmp_path / "a"), *quick])
    rested = dict(weights.load(tmp_path / "a/checkpoint")[0].vit.named_parameters())
    assert looked and all(torch.equal(rested[name], p) for name, p in looked.items())
    train.main(["--stage", "1", "--out", str(tmp_path / "longer"), *quick, "--steps", "4"])
    learned = dict(weights.load(tmp_path / "longer/checkpoint")[0].vit.named_parameters())
    assert not any(torch.equal(learned[name], p) for name, p in looked.items())
    own = data.write_set("image points", tmp_path, 5, 0, 2)
    train.main(["--stage", "1", "--init", str(tmp_path / "a/checkpoint"), "--data", str(own), "--out", str(tmp_path / "b"), *quick])
    after = weights.load(tmp_path / "b/checkpoint")[0].vit.named_parameters()
    assert all((rested[name] != p).any() for name, p in after)
