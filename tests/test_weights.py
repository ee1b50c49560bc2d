"""Checkpoints: whole, strict, and never half-written."""

import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import weights
from connector import ConnectorConfig, TemporalConfig
from model import PRESETS, LLMConfig, Molmo
from pointing import PointConfig
from preprocess import ViewConfig
from tokenizer import Tokenizer
from vit import ViTConfig
from weights import CheckpointError, load, save

TOKENIZER = Tokenizer([(34, 62)])
CONFIG = replace(
    PRESETS["tiny"],
    views=ViewConfig(crop_size=70, margins=(1, 1), max_crops=2),
    vit=ViTConfig(width=8, layers=2, heads=2, mlp_hidden=12, taps=(-1, -2), grid=5),
    connector=ConnectorConfig(width=8, heads=2, mlp_hidden=12, output_layer=False),
    llm=LLMConfig(vocabulary=TOKENIZER.base_size, width=12, layers=2, heads=2, kv_heads=1, head_width=6, mlp_hidden=16),
    point=PointConfig(width=4),
)
NAME = "blocks.1.mlp.ff_out.weight"


def made(seed: int = 0, **changes) -> Molmo:
    return Molmo(replace(CONFIG, **changes)).initialize(seed)


@pytest.fixture
def folder(tmp_path) -> Path:
    save(tmp_path / "run", made(), TOKENIZER)
    return tmp_path / "run"


def equal(one: Molmo, two: Molmo) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"points_as": "text"}, {"temporal": TemporalConfig("attention", missing="masked", width=8, heads=2)}, {"llm": replace(CONFIG.llm, tied=True)}])
def test_round_trip(tmp_path, changes):
    """What was saved is loaded bit for bit, config and tokenizer included, in evaluation mode and in float32."""
    model = made(3, **changes)
    save(tmp_path / "run", model, TOKENIZER)
    loaded, tokenizer = load(tmp_path / "run")
    assert equal(model, loaded) and loaded.config == model.config and tokenizer.merges == TOKENIZER.merges
    assert not loaded.training and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in loaded.parameters())


def test_the_mean_of_checkpoints(tmp_path, capsys, monkeypatch):
    """Each parameter by the shares, the first checkpoint's being the rest; one that saw fewer frames is of the same training, one of another
    shape is not; shares are parts of 1."""
    frames = replace(CONFIG.views, max_frames=5)
    models = made(1), made(2, views=frames), made(3)
    for name, model in zip("abc", models):
        save(tmp_path / name, model, TOKENIZER)
    a, b, c, out = (str(tmp_path / name) for name in ("a", "b", "c", "out"))
    weights.main([a, out, "--mean-with", f"{b}=0.25", f"{c}=0.15"])
    found, _ = load(out)
    one, two, three = (model.state_dict() for model in models)
    assert found.config == CONFIG
    monkeypatch.setattr(weights, "load", lambda folder: (load(folder)[0].bfloat16(), TOKENIZER))  # as released folders are: rounded once
    half, exact = weights.mean(a, {b: 0.25, c: 0.15})[0].state_dict(), [model.bfloat16().float().state_dict() for model in map(deepcopy, models)]
    for name, p in half.items():
        assert torch.equal(p, (0.6 * exact[0][name] + 0.25 * exact[1][name] + 0.15 * exact[2][name]).bfloat16()), name
    monkeypatch.undo()
    for name, p in found.state_dict().items():
        torch.testing.assert_close(p, 0.6 * one[name] + 0.25 * two[name] + 0.15 * three[name])
    save(tmp_path / "d", made(llm=replace(CONFIG.llm, width=16)), TOKENIZER)
    for words, said in (([f"{tmp_path / 'd'}=0.5"], "is another model than"), ([f"{b}=0.5", f"{c}=0.5"], "less than 1 together"),
                        ([f"{b}=-0.5"], "above 0"), ([f"{b}=nan"], "above 0"), ([f"{b}=0.1", f"{b}=0.2"], "given twice"), ([b], "is not FOLDER=SHARE"), ([f"{b}=much"], "is not FOLDER=SHARE"), (["=0.5"], "is not FOLDER=SHARE"), ([f"{tmp_path / 'gone'}=0.5"], "gone: not a checkpoint folder")):
        with pytest.raises(SystemExit) as end:
            weights.main([a, str(tmp_path / "new"), "--mean-with", *words])
        assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    """A second save replaces the first; no temporary folder stays."""
    for seed in (1, 2):
        save(tmp_path / "deep" / "run", made(seed), TOKENIZER)
    assert equal(load(tmp_path / "deep" / "run")[0], made(2))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]
    assert sorted(path.name for path in (tmp_path / "deep" / "run").iterdir()) == ["config.json", "model.npz", "tokenizer.json"]


def test_a_link_stays_one(tmp_path):
    """A checkpoint that is a link to another place is replaced there, as often as it is saved."""
    (tmp_path / "large").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large", target_is_directory=True)
    for seed in (1, 2, 3):
        save(tmp_path / "run", made(seed), TOKENIZER)
        assert equal(load(tmp_path / "run")[0], made(seed)) and (tmp_path / "run").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "run"]


def test_interrupted_save_keeps_the_old_checkpoint(folder, monkeypatch):
    """A save that fails half-way leaves the old checkpoint loadable and nothing beside it, and the next save works."""
    def full(path, **arrays):
        Path(path).write_bytes(b"PK half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError):
            save(folder, made(1), TOKENIZER)
    assert equal(load(folder)[0], made(0)) and [path.name for path in folder.parent.iterdir()] == [folder.name]
    save(folder, made(1), TOKENIZER)
    assert equal(load(folder)[0], made(1)) and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_stopped_save_leaves_nothing(folder, monkeypatch):
    """Nor does Ctrl-C in the middle of one leave a copy of the weights under a hidden name."""
    def stopped(path, **arrays):
        Path(path).write_bytes(b"PK half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stopped)
    with pytest.raises(KeyboardInterrupt):
        save(folder, made(1), TOKENIZER)
    assert equal(load(folder)[0], made(0)) and [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_folder_one_stands_in_has_a_name(folder, monkeypatch):
    """"." is a checkpoint like another, to load and to save."""
    monkeypatch.chdir(folder)
    assert equal(load(".")[0], made(0))
    for seed in (1, 2):
        save(".", made(seed), TOKENIZER)
        assert equal(load(".")[0], made(seed)) and equal(load(folder)[0], made(seed))


def test_readers_leave_a_checkpoint_that_is_being_replaced_where_it_is(folder):
    """Between the two renames of a save a reader finds the old checkpoint and moves nothing, so that the save goes on."""
    old = folder.with_name(f".{folder.name}.old")
    folder.rename(old)
    assert equal(load(folder)[0], made(0)) and old.is_dir() and not folder.exists()
    weights.recover(folder)
    assert folder.is_dir() and not old.exists() and equal(load(folder)[0], made(0))


# ---- bad checkpoints -------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes) -> None:
    """Saves the arrays anew; None takes one away."""
    with np.load(folder / "model.npz") as file:
        arrays = dict(file)
    arrays |= changes
    np.savez(folder / "model.npz", **{name: array for name, array in arrays.items() if array is not None})


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def spoil(path: Path) -> None:
    """Changes a byte in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def text(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


BAD = {
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), ["run"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "no weights": (lambda f: (f / "model.npz").unlink(), ["model.npz"]),
    "a folder for a file": (lambda f: ((f / "model.npz").unlink(), (f / "model.npz").mkdir()), ["model.npz"]),
    "missing array": (lambda f: rewrite(f, **{NAME: None}), ["model.npz", NAME, "missing"]),
    "extra array": (lambda f: rewrite(f, extra=np.zeros(3, np.float32)), ["model.npz", "extra"]),
    "wrong shape": (lambda f: rewrite(f, **{NAME: np.zeros((12, 17), np.float32)}), ["model.npz", NAME, "(12, 17)", "(12, 16)"]),
    "transposed": (lambda f: rewrite(f, **{NAME: np.zeros((16, 12), np.float32)}), ["model.npz", NAME, "(16, 12)"]),
    "words for numbers": (lambda f: rewrite(f, **{NAME: np.full((12, 16), "0.5")}), ["model.npz"]),
    "truncated": (lambda f: cut(f / "model.npz", 0.7), ["model.npz"]),
    "nearly whole": (lambda f: cut(f / "model.npz", 0.999), ["model.npz"]),
    "empty": (lambda f: cut(f / "model.npz", 0), ["model.npz"]),
    "bytes flipped": (lambda f: spoil(f / "model.npz"), ["model.npz"]),
    "one array alone": (lambda f: np.save(open(f / "model.npz", "wb"), np.zeros(3)), ["model.npz"]),
    "not a zip": (lambda f: (f / "model.npz").write_text("version https://git-lfs.github.com/spec/v1\n"), ["model.npz"]),
    "config without an entry": (lambda f: text(f / "config.json", '"kv_heads": 1,', ""), ["config.json", "kv_heads"]),
    "config with an unknown entry": (lambda f: text(f / "config.json", '"kv_heads"', '"depth": 1, "kv_heads"'), ["config.json", "depth"]),
    "config for another size": (lambda f: text(f / "config.json", '"mlp_hidden": 16', '"mlp_hidden": 20'), ["model.npz", "ff_"]),
    "config that is no JSON": (lambda f: cut(f / "config.json", 0.5), ["config.json"]),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "config with a word for a number": (lambda f: text(f / "config.json", '"kv_heads": 1', '"kv_heads": "one"'), ["config.json"]),
    "config with pools of no size": (lambda f: text(f / "config.json", '"image_pool": 2', '"image_pool": 0'), ["config.json", "above 0"]),
    "config with a flag for a number": (lambda f: text(f / "config.json", '"kv_heads": 1', '"kv_heads": true'), ["config.json", "kv_heads is True"]),
    "config with a word for a rate": (lambda f: text(f / "config.json", '"fps": 2.0', '"fps": "2"'), ["config.json", "above 0"]),
    "config with a word for a list": (lambda f: text(f / "config.json", '"tied": false', '"tied": "no"'), ["config.json", "tied is 'no'"]),
    "config with patches of two sizes": (lambda f: text(f / "config.json", '"patch_size": 14', '"patch_size": 7'), ["config.json", "patches of 7 px"]),
    "config with patches of no size": (lambda f: text(f / "config.json", '"patch_size": 14', '"patch_size": 0'), ["config.json"]),
    "config that is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), ["config.json"]),
    "tokenizer that is no JSON": (lambda f: cut(f / "tokenizer.json", 0.5), ["tokenizer.json"]),
    "tokenizer of another model": (lambda f: Tokenizer([]).save(f / "tokenizer.json"), ["tokenizer.json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_named_in_one_line(folder, case):
    """A checkpoint that is incomplete, damaged or of another model raises CheckpointError with one line: the file, the array."""
    change, words = BAD[case]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


SPRUNG = []


def spring() -> None:
    SPRUNG.append("a pickle ran")


class Trap:
    """Calls `spring` when it is unpickled."""

    def __reduce__(self):
        return spring, ()


@pytest.mark.parametrize("inside", [True, False], ids=["inside the zip", "the file itself"])
def test_no_pickle_is_loaded(folder, inside):
    """A pickle in the place of an array, or of the whole file, is refused and never run."""
    pickle.loads(pickle.dumps(Trap()))
    assert SPRUNG.pop() == "a pickle ran", "the trap works"
    if inside:
        rewrite(folder, **{NAME: np.array([Trap()], dtype=object)})
    else:
        (folder / "model.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="model.npz"):
        load(folder)
    assert SPRUNG == []
