"""The README is code: its commands run, the files it names exist."""

import json
import re
import shlex
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import costs
import data
import differ
import evaluate
import infer
import masks
import packing
import preprocess
import pytest
import strangers
import synthetic
import tokenizer
import train
import weights
from generate import generate
from packing import collate

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip()]
PROGRAMS = {"train.py": train.main, "evaluate.py": evaluate.main, "infer.py": infer.main, "synthetic.py": synthetic.main,
            "tokenizer.py": tokenizer.main, "packing.py": packing.main, "weights.py": weights.main, "costs.py": costs.main,
            "data.py": data.main, "masks.py": masks.main, "tests/differ.py": differ.main,
            "tests/strangers.py": strangers.main}
EXTRA = {"weights.py": "safetensors", "runs/released": "safetensors", "tests/differ.py": "transformers"}  # word: package
LESS = {"train.py": ["--steps", "1", "--workers", "0"], "evaluate.py": ["--records", "1"],
        "packing.py": ["--examples", "48", "--branches", "1"]}


def test_the_readme_names_files_that_exist():
    """Every file in backticks or in a link is there."""
    named = re.findall(r"`([\w/.]+\.(?:py|md|txt|json|mp4|png))`", README) + re.findall(r"\]\(([^)#:]+)\)", README)
    missing = [name for name in named if not (ROOT / name).exists() and not name.startswith(("out/", "runs/"))]
    assert len(named) > 10 and not missing, missing


def test_make_targets_are_what_continuous_integration_runs():
    """`make demo` and `make test` stand in the README and in .ci/run."""
    made = [command for command in COMMANDS if command.startswith("make")]
    assert sorted(made) == ["make demo", "make test"]
    assert set(made) <= set((ROOT / ".ci/run").read_text().splitlines())


def test_commands_for_many_processes_are_understood(capsys):
    """What the README starts with torchrun can be shared out to as many GPUs: the plan of the same stage says so."""
    started = [command for command in COMMANDS if "torchrun" in command]
    assert len(started) == 3
    for command in started:
        nodes, each = (int((re.search(rf"--{name} (\d+)", command) or [0, 1])[1]) for name in ("nnodes", "nproc-per-node"))
        words = shlex.split(command[command.index("train.py"):])[1:]
        train.main([*words, "--plan", str(nodes * each)])
        assert "the stage" in capsys.readouterr().out
    planned, = (command for command in COMMANDS if "--plan" in command)
    train.main(shlex.split(planned)[2:])
    assert capsys.readouterr().out in README


def test_the_demo_is_what_the_readme_shows(tmp_path, capsys):
    """The shipped model, asked by the README's first command, points at every cup of the clip by its truth (assets/cups.json), and
    prints what the README says, to a pixel: sums come out a little otherwise on other machines."""
    infer.main([str(ROOT / "assets/cups.mp4"), "point to the cups", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    number = lambda text: [float(value) for value in re.findall(r"-?\d+\.\d+", text)]
    table = lambda text: re.search(r"  id     time .*?\n\n", text, re.S)[0]
    shown = re.search(r"```\n(<points .*?)```", README, re.S)[1]
    assert re.sub(r"\d+", "", shown.splitlines()[0]) == re.sub(r"\d+", "", said.splitlines()[0]) and "count: 3" in shown and "count: 3" in said
    assert number(table(said)) == pytest.approx(number(table(shown)), abs=1)
    result, truth = json.loads((tmp_path / "cups.points.json").read_text()), json.loads((ROOT / "assets/cups.json").read_text())
    cups = [at for thing in truth["things"] if thing["kind"] == "cup" for at in thing["track"] if at["time"] == 0]
    near = lambda cup: [p for p in result["points"] if p["time"] == 0 and abs(p["x"] - cup["x"]) < 20 and abs(p["y"] - cup["y"]) < 20]
    assert len(cups) == len(result["points"]) == 3 and all(len(near(cup)) == 1 for cup in cups)


def test_the_lines_of_python_find_what_the_demo_finds(monkeypatch, capsys):
    """The README's Python, as it stands there, prints the table of its first command."""
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], {})
    printed = [[float(word) for word in line.split()] for line in capsys.readouterr().out.splitlines()]
    table = re.search(r"  id     time .*?\n(.*?)\n\n", README, re.S)[1]
    assert printed == [pytest.approx([float(word) for word in line.split()], abs=1) for line in table.splitlines()]


def test_the_shipped_model_is_small():
    """All of assets/tiny is 12 MB at most."""
    assert sum(path.stat().st_size for path in (ROOT / "assets/tiny").iterdir()) < 12e6


def test_the_shipped_model_knows_its_worlds():
    """On some records of the README's table it is not far from what stands there: what changes crops, wordings or decoding under a trained
    model is noticed."""
    model, tokenizer = weights.load(ROOT / "assets/tiny")
    for name, records, figure, least in (("stills", 12, "f1", 0.85), ("clips", 4, "f1", 0.8), ("tracks", 5, "hota", 0.55), ("image captions", 4, "words f1", 0.8),
                                          ("free stills", 8, "f1", 0.8), ("free clips", 4, "f1", 0.7)):
        figures, _ = evaluate.evaluate(model, tokenizer, evaluate.fresh(name, records, model.config.views))
        assert figures[figure] > least, (name, figures[figure])


def test_every_python_command_runs(tmp_path, monkeypatch, capsys):
    """All commands in their order, in an empty folder with the assets beside it; training and evaluation cut short, packs timed with a
    smaller model. The vocabulary and the clip's truth come out byte for byte as they lie in assets/."""
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("python")]
    assert {words[1] for words in commands} == set(PROGRAMS)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SMALL_EVALUATION", 1)
    monkeypatch.setattr(evaluate, "LONGEST", {False: 16, True: 16})
    monkeypatch.setattr(masks, "CANDIDATES", 1)
    monkeypatch.setattr(packing, "TIMED", 1)
    tiny = packing.PRESETS["tiny"]
    monkeypatch.setattr(packing, "PRESETS", {"tiny": replace(
        tiny, vit=replace(tiny.vit, width=16, heads=2, mlp_hidden=24), connector=replace(tiny.connector, width=16, heads=2, mlp_hidden=24),
        llm=replace(tiny.llm, width=32, layers=2, head_width=8, mlp_hidden=48), point=replace(tiny.point, width=16))})
    monkeypatch.setattr(train, "VIT_BATCH", 2)
    monkeypatch.setattr(strangers, "PICTURES", {"train": 12, "test": 4})
    for key, stage in train.STAGES.items():
        monkeypatch.setitem(train.STAGES, key, replace(stage, packs=1, pool=4, branches=2) if key[0] == "tiny" else stage)
    missing = set()
    for _, program, *words in commands:
        if lacks := {EXTRA[word] for word in [program, *words] if word in EXTRA and find_spec(EXTRA[word]) is None}:
            missing |= lacks  # runs where requirements-dev.txt is installed
            continue
        monkeypatch.setattr("sys.argv", [program, *words, *LESS.get(program, [])])
        status = PROGRAMS[program]()
        assert not status, (program, words)
    assert (tmp_path / "out/cups.points.mp4").stat().st_size > 0
    assert (tmp_path / "runs/stage2/checkpoint/model.npz").stat().st_size > 0
    assert "useful tokens/s" in capsys.readouterr().out
    for made in ("tokenizer.json", "cups.json"):  # the assets are what these commands make
        assert (tmp_path / "runs" / made).read_bytes() == (ROOT / "assets" / made).read_bytes()
    if missing:
        pytest.skip(f"all commands run but those that need {', '.join(sorted(missing))}")


def test_the_shipped_model_takes_other_words():
    """People ask about the sample clip in their own words; of what is nowhere it says so."""
    model, tokenizer = weights.load(ROOT / "assets/tiny")
    frames, times = preprocess.read_video(ROOT / "assets/cups.mp4", model.config.views.fps, model.config.views.max_frames)
    views = preprocess.video_views(frames, times, model.config.views)
    asked = ("point to the cups", "where are the cups?", "find the cups", "Can you point to every cup?", "show me the cups", "Is there a dog?", "point to the elephant")
    batch = collate([data.prompts(tokenizer, views, asked)])
    *cups, dog, elephant = (data.read_answer(answer, tokenizer, views) for answer in generate(model, batch, data.control_tokens(tokenizer), 64))
    assert all(points == cups[0][1] and len(points) == 3 for _, points in cups)
    assert dog[0] == "No." and elephant[0] == "There are none."
