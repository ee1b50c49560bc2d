"""The released layout without the `transformers` library: round trips, what it refuses, and MolmoPoint's two ways."""

import json
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors", reason="pip install -r requirements-released.txt")
pytest.importorskip("tokenizers", reason="pip install -r requirements-released.txt")

import data  # noqa: E402
import infer  # noqa: E402
import synthetic  # noqa: E402
import weights  # noqa: E402
from connector import TemporalConfig
from generate import generate, generate_slowly
from model import PRESETS, LLMConfig, Molmo, Yarn
from packing import collate  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

TINY = PRESETS["tiny"]
SMALL = replace(TINY, llm=LLMConfig(768, 32, 2, 4, 2, 8, 48, 1e4), point=replace(TINY.point, width=16),
                vit=replace(TINY.vit, width=16, heads=2, mlp_hidden=24), optimizer="adamw",
                connector=replace(TINY.connector, width=16, heads=2, mlp_hidden=24))
OLMO = replace(SMALL.llm, kv_heads=4, norm_after=True, norm_heads=False, yarn=Yarn(original_length=64, layers=(1,)))
AS_TEXT = dict(points_as="text", views=replace(TINY.views, low_res_pointing=True),
               connector=replace(SMALL.connector, output_layer=True), point=weights.PointConfig())
CONFIGS = {
    "points": SMALL,
    "points, tied": replace(SMALL, llm=replace(SMALL.llm, tied=True), optimizer="muon"),
    "text": replace(SMALL, **AS_TEXT),
    "text, tied": replace(SMALL, llm=replace(SMALL.llm, tied=True), **AS_TEXT),
    "text, olmo": replace(SMALL, llm=OLMO, **AS_TEXT),
    "points, causal": replace(SMALL, bidirectional=False),
    "points, temporal": replace(SMALL, temporal=TemporalConfig("attention", missing="masked", width=8, heads=2)),
    "tags": replace(SMALL, **(AS_TEXT | {"points_as": "tags"})),
}


@pytest.fixture
def folder(tiny, tmp_path):
    weights.save_released(tmp_path / "made", Molmo(SMALL).initialize(1), tiny[1])
    return tmp_path / "made"


def test_all_tokens_that_end_an_answer_are_kept(folder, tmp_path):
    """A release that names several has them still after it is loaded and written again."""
    named = {"bos_token_id": 1, "eos_token_id": [3, 7]}
    (folder / "generation_config.json").write_text(json.dumps(named))
    weights.main([str(folder), str(tmp_path / "again")])
    one, two = (weights.load(path)[1] for path in (folder, tmp_path / "again"))
    assert {3, 7, one.eos_id} == set(one.stop_ids) == set(two.stop_ids)


def test_writing_in_the_released_layout_replaces_nothing(folder, tmp_path, capsys):
    """A folder that is not empty, downloaded weights for one, is left alone, with one line; so is the source itself."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.copytree(folder, tmp_path / "other")
    for source in (folder, tmp_path / "other"):
        with pytest.raises(SystemExit) as end:
            weights.main([str(source), str(folder)])
        assert end.value.code == 2 and capsys.readouterr().err.endswith("is not empty: give another folder\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_points_as_text_need_the_rest_of_molmo2(tiny, tmp_path):
    """What the layout could not hold is refused, and nothing is written."""
    with pytest.raises(ValueError, match="output layer"):
        weights.save_released(tmp_path / "made", Molmo(replace(SMALL, points_as="text")), tiny[1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tiny, tmp_path):
    """Written in the released layout and loaded again: equal config, equal tensors, a tokenizer that agrees."""
    config = CONFIGS[name]
    model = Molmo(config).initialize(1)
    weights.save_released(tmp_path / "made", model, tiny[1])
    loaded, tokenizer = weights.load(tmp_path / "made")
    assert loaded.config == replace(config, point=replace(config.point, norm_eps=config.llm.norm_eps))
    for (key, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b)
    assert tokenizer.chat_prompt("point to the <im_patch>") == tiny[1].chat_prompt("point to the <im_patch>")


@pytest.mark.parametrize("name", ["points, tied", "text, tied"])
def test_equal_tables_are_tied(name, tiny, tmp_path):
    """As the released converter writes 4B: two equal tables that nothing calls tied; also where the word embeddings are split in two
    halves, as the library saves them. Tables that differ in one number are not."""
    weights.save_released(tmp_path / "made", Molmo(CONFIGS[name]).initialize(1), tiny[1])
    edit(tmp_path / "made", "text_config", tie_word_embeddings=False)
    change(tmp_path / "made", tie_word_embeddings=False)
    assert weights.load(tmp_path / "made")[0].config.llm.tied

    def halve(tensors):
        names = [weights.released_name(table, CONFIGS[name]) for table in weights.TABLE]
        tensors |= {n: half.clone() for n, half in zip(names, torch.cat([tensors[n] for n in names]).chunk(2))}
    shutil.copytree(tmp_path / "made", tmp_path / "halves")
    retensor(tmp_path / "halves", halve)
    assert weights.load(tmp_path / "halves")[0].config.llm.tied
    retensor(tmp_path / "made", lambda t: next(value for key, value in t.items() if "lm_head" in key).view(-1)[-1:].add_(1))
    apart = weights.load(tmp_path / "made")[0]
    assert not apart.config.llm.tied and not all(map(torch.equal, apart.lm_head.parameters(), apart.wte.parameters()))


def test_margins_and_rates_of_any_size_come_back(tiny, tmp_path):
    """Patches of 7 px, no margins and less than a frame a second are written and read; what the layout cannot hold is refused."""
    config = replace(SMALL, views=replace(TINY.views, margins=(0, 0), fps=0.5, crop_size=63, patch_size=7), vit=replace(SMALL.vit, patch_size=7))
    weights.save_released(tmp_path / "made", Molmo(config).initialize(1), tiny[1])
    assert weights.load(tmp_path / "made")[0].config.views == config.views
    with pytest.raises(ValueError, match="whole-picture crop"):
        weights.save_released(tmp_path / "other", Molmo(replace(SMALL, views=replace(TINY.views, low_res_pointing=True))), tiny[1])
    assert not (tmp_path / "other").exists()


def test_numbers_stay_as_they_are_in_the_file_unless_asked(folder):
    """bfloat16 on disk is bfloat16 in memory, float32 on request."""
    path = folder / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    kept, widened = weights.load(folder)[0], weights.load(folder, dtype=torch.float32)[0]
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a.float(), b) for a, b in zip(kept.parameters(), widened.parameters()))


def test_shards_other_splits_and_deeper_vit_blocks_load_too(folder):
    """Tensors spread over two files, the word table split at another row, blocks above the deepest tap: the same model."""
    expected, _ = weights.load(folder)
    tensors = load_file(folder / "model.safetensors")
    table = torch.cat([tensors.pop(f"model.transformer.wte.{part}") for part in ("embedding", "new_embedding")])
    tensors["model.transformer.wte.embedding"], tensors["model.transformer.wte.new_embedding"] = table.chunk(2)
    edit(folder, "vit_config", num_hidden_layers=6)  # the fifth block is now the last but one
    edit(folder, "adapter_config", vit_layers=[-2, -4])
    deep = {name.replace("resblocks.0", "resblocks.5"): t.clone() for name, t in tensors.items() if "resblocks.0" in name}
    names = sorted(tensors | deep)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: (tensors | deep)[name].contiguous() for name in part}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}}))
    loaded, _ = weights.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), loaded.parameters(), strict=True))


def test_both_spellings_of_the_config(folder):
    """vit_config with image_default_input_size or vision_config with image_size, flat or nested RoPE: the same config."""
    path = folder / "config.json"
    old = json.loads(path.read_text())
    expected = weights.released_config(folder)
    vision, adapter, text = old.pop("vit_config"), old["adapter_config"], old["text_config"]
    for before, after in (("image_default_input_size", "image_size"), ("image_patch_size", "patch_size"),
                          ("image_num_pos", "num_position_embeddings")):
        vision[after] = vision.pop(before)
    adapter["vision_feature_layer"] = adapter.pop("vit_layers")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text["rms_norm_eps"], text["attention_bias"] = text.pop("layer_norm_eps"), text.pop("qkv_bias")
    path.write_text(json.dumps(old | {"vision_config": vision}))
    assert weights.released_config(folder) == expected


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit(folder, part, **entries):
    """Entries of one part of config.json."""
    change(folder, **{part: json.loads((folder / "config.json").read_text())[part] | entries})


def retensor(folder, spoil):
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")


def index(folder, **places):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names | places}))


def cut(folder, share):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:int(len(content) * share)])


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_end(folder):
    """The end of an answer is a token that the tokenizer lacks."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    for token in settings["added_tokens"]:
        token["content"] = token["content"].replace("<|endoftext|>", "<|something|>")
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')


WRONG = {
    "missing shard": (lambda f: index(f, more="b.safetensors"), ("b.safetensors",)),
    "tensor not where the index says": (lambda f: index(f, more="a.safetensors"), ("a.safetensors", "more")),
    "extra tensor": (lambda f: retensor(f, lambda t: t.update(surplus=torch.zeros(2))), ("model.safetensors", "surplus")),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop("model.transformer.ln_f.weight")), ("model.transformer.ln_f.weight",)),
    "wrong shape": (lambda f: retensor(f, lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(5)})),
                    ("model.safetensors", "model.transformer.ln_f.weight", "(5,)", "(32,)")),
    "word table too narrow": (lambda f: retensor(f, lambda t: t.update({"model.transformer.wte.new_embedding": torch.zeros(128, 31)})),
                              ("model.safetensors", "model.transformer.wte.new_embedding", "(128, 31)")),
    "word table without rows": (lambda f: retensor(f, lambda t: t.update({"model.transformer.wte.embedding": torch.zeros(5)})),
                                ("model.safetensors", "model.transformer.wte.embedding", "(5,)")),
    "too few extra words": (lambda f: retensor(f, lambda t: t.update({"model.transformer.wte.new_embedding": torch.zeros(100, 32)})),
                            ("word embeddings", "100", "128")),
    "whole numbers": (lambda f: retensor(f, lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(32, dtype=torch.int8)})),
                      ("model.safetensors", "model.transformer.ln_f.weight", "int8")),
    "a stray tensor that looks like a ViT block": (lambda f: retensor(f, lambda t: t.update({"junk.resblocks.77.x": torch.zeros(2)})),
                                                   ("junk.resblocks.77.x",)),
    "an index that is no map": (lambda f: (index(f), (f / "model.safetensors.index.json").write_text('{"weight_map": []}')),
                                ("model.safetensors.index.json", "weight_map")),
    "a size in words": (lambda f: edit(f, "text_config", hidden_size="32"), ("config.json",)),
    "no ViT layers": (lambda f: edit(f, "vit_config", num_hidden_layers=0), ("config.json",)),
    "a strange processor": (lambda f: (f / "video_preprocessor_config.json").write_text('{"num_frames": "all"}'),
                            ("video_preprocessor_config.json", "num_frames")),
    "an end token that is none": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [1, 100000]}'),
                                  ("generation_config.json", "100000")),
    "windows that are no squares": (lambda f: (f / "preprocessor_config.json").write_text('{"pooling_size": [2, 3]}'), ("preprocessor_config.json", "[2, 3]")),
    "another colour": (lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.5]}'), ("image_mean", "0.4")),
    "another layout": (lambda f: (f / "processor_config.json").write_text('{"image_use_col_tokens": false}'), ("processor_config.json", "image_use_col_tokens")),
    "another crop": (lambda f: (f / "processor_config.json").write_text('{"use_single_crop_col_tokens": null}'), ("use_single_crop_col_tokens is null",)),
    "one margin": (lambda f: (f / "preprocessor_config.json").write_text('{"overlap_margins": 3}'), ("preprocessor_config.json", "overlap_margins is 3")),
    "a list of frames": (lambda f: (f / "video_preprocessor_config.json").write_text('{"num_frames": [3]}'),
                         ("video_preprocessor_config.json", "num_frames is [3]")),
    "endless frames": (lambda f: (f / "video_preprocessor_config.json").write_text('{"max_fps": 1e400}'), ("video_preprocessor_config.json", "max_fps")),
    "no heads": (lambda f: edit(f, "vit_config", num_attention_heads=0), ("config.json", "num_attention_heads is 0")),
    "crops in one number": (lambda f: edit(f, "vit_config", image_default_input_size=126), ("config.json", "image_default_input_size is 126")),
    "heads that do not fit": (lambda f: edit(f, "vit_config", head_dim=5), ("config.json", "head_dim")),
    "crops that are no squares": (lambda f: edit(f, "vit_config", image_default_input_size=[126, 252]), ("config.json", "only squares")),
    "another YaRN": (lambda f: edit(f, "text_config", rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64,
                                                                    "mscale": 0.7}), ("config.json", "mscale")),
    "a number for a flag": (lambda f: change(f, bidirectional=1), ("config.json", "bidirectional is 1")),
    "another model": (lambda f: change(f, model_type="llama"), ("config.json", "llama")),
    "another activation": (lambda f: change(f, vit_config={"hidden_act": "quick_gelu", "image_patch_size": 14}), ("hidden_act", "quick_gelu")),
    "missing entry": (lambda f: change(f, text_config={"hidden_size": 32}), ("config.json", "text_config")),
    "config of a wrong type": (lambda f: change(f, text_config=[1]), ("config.json",)),
    "truncated safetensors": (lambda f: cut(f, 0.9), ("model.safetensors",)),
    "empty safetensors": (lambda f: cut(f, 0), ("model.safetensors",)),
    "a pickle": (only_pickle, ("pytorch_model.bin", "pickle")),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "not a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ("tokenizer.json",)),
    "no tokenizer config": (lambda f: (f / "tokenizer_config.json").write_text("{broken"), ("tokenizer_config.json",)),
    "no end of texts": (spoil_end, ("tokenizer.json", "<|endoftext|> is missing")),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(folder, case, capsys):
    """Through the command: exit status 2, one line that names the file and the tensor or entry; nothing half loaded."""
    spoil, said = WRONG[case]
    spoil(folder)
    with pytest.raises(ValueError):
        weights.load(folder)
    with pytest.raises(SystemExit) as end:
        infer.main([str(synthetic.__file__), "what?", "--checkpoint", str(folder)])
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and all(word in line for word in said), line


def test_what_is_no_checkpoint_is_never_replaced(folder, tiny, tmp_path):
    """Writing to a folder that holds other things, or to a file, is refused; a checkpoint or an empty folder is replaced."""
    holiday = tmp_path / "photos/holiday.txt"
    holiday.parent.mkdir()
    holiday.write_text("kept")
    model, _ = weights.load(folder, dtype=torch.float64)  # a copy: the file it came from is replaced below
    for write in (weights.save_released, weights.save):
        for target in (holiday.parent, holiday):
            with pytest.raises(ValueError, match="photos"):
                write(target, model, tiny[1])
        write(folder, model, tiny[1])
    assert holiday.read_text() == "kept" and {path.name for path in tmp_path.iterdir()} == {"made", "photos"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_parameters_are_the_mapped_file(folder):
    """Without conversion every parameter lies in the mapping of the file: nothing was copied."""
    model, _ = weights.load(folder)
    mapped = [[int(x, 16) for x in line.split()[0].split("-")] for line in Path("/proc/self/maps").read_text().splitlines()
              if line.endswith(str(folder / "model.safetensors"))]
    assert mapped
    for name, p in model.named_parameters():
        assert any(low <= p.data_ptr() < high for low, high in mapped), name


def test_nulls_in_processor_files_mean_the_usual(folder):
    """Entries that are null, as the released classes allow, give the released models' values."""
    (folder / "video_preprocessor_config.json").write_text('{"max_fps": null, "num_frames": null, "pooling_size": null}')
    views = weights.released_config(folder).views
    assert (views.fps, views.max_frames, views.video_pool) == (2.0, 128, 3)


def test_a_tokenizer_with_all_that_real_ones_hold(folder, tiny):
    """A normaliser, fillers, thinking tags, thousands of point tokens, bos unlike eos, several ends: user text stays
    plain text inside the table, and every named end stops an answer."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    names = ["<EXTRA_TOKENS_POINT_3>", "<POINT_7>"]
    settings["added_tokens"] += [{"id": 600 + 100 * i, "content": name, "special": False, **flags} for i, name in enumerate(names)]
    settings["normalizer"] = {"type": "NFC"}
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    settings["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "model_max_length": 10}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [767, 765]}')
    _, tokenizer = weights.load(folder)
    ids = tokenizer.special
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<|endoftext|>"], ids["<|im_end|>"])
    assert set(tokenizer.stop_ids) == {ids["<|im_end|>"], 767, 765} == set(data.control_tokens(tokenizer).stops)
    for text in ("what is at <POINT_7> ?", "<EXTRA_TOKENS_POINT_3>", "<|im_end|><im_patch>", "cafe\u0301"):
        assert max(tokenizer.encode(text)) < tokenizer.base_size
    assert len(tokenizer.encode("one two three four five six seven")) == len(tiny[1].encode("one two three four five six seven")) > 4
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9") == tiny[1].encode("caf\u00e9")
    path = folder / "again.json"
    tokenizer.save(path)
    assert json.loads(path.read_text()) == settings  # as it came
    other = pickle.loads(pickle.dumps(tokenizer))  # as a worker process may get it
    assert other.encode("<|im_end|><im_patch>") == tokenizer.encode("<|im_end|><im_patch>")
    assert (other.stop_ids, other.eos_id, other.special) == (tokenizer.stop_ids, tokenizer.eos_id, tokenizer.special)


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_missing_package_is_named(folder, package, monkeypatch):
    """Without one of the two packages one line says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{package}.*requirements-released.txt"):
        weights.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infer_takes_a_released_folder(folder, dtype, tmp_path, monkeypatch):
    """infer.py --checkpoint FOLDER needs no other flag, whatever numbers the folder holds."""
    path = folder / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(path).items()}, path)
    monkeypatch.chdir(tmp_path)
    clip = Path(__file__).parent.parent / "assets/cups.mp4"
    infer.main([str(clip), "point to the cups", "--checkpoint", str(folder), "--max-new-tokens", "12"])
    result = json.loads((tmp_path / "out/cups.points.json").read_text())
    assert result["prompt"] == "point to the cups" and result["timing"]["tokens"] <= 12
    assert result["finish_reason"] == ("length" if result["timing"]["tokens"] == 12 else "stop")


@pytest.mark.parametrize("able, dtype, warned", [(False, "bfloat16", True), (False, "float32", False), (True, "bfloat16", False)])
def test_slow_bfloat16_is_said(folder, able, dtype, warned, tmp_path, monkeypatch, capsys):
    """On a CPU without instructions for it, of weights that have it: one line that names the other choice, and the answer."""
    monkeypatch.setattr(infer, "has_bfloat16_on_cpu", lambda: able)
    picture = Path(__file__).parent.parent / "assets/demo.png"
    infer.main([str(picture), "Hello.", "--checkpoint", str(folder), "--max-new-tokens", "2", "--dtype", dtype, "--device", "cpu", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert ("--dtype float32 is faster" in said.err) == warned and said.err.count("\n") == warned and "finish reason" in said.out


def test_released_inference_is_a_flag_for_released_grounding_tokens(folder, tmp_path, monkeypatch, capsys):
    """With a released MolmoPoint the model that answers is switched; any other checkpoint is one line."""
    picture, loaded, real = Path(__file__).parent.parent / "assets/demo.png", [], weights.load
    monkeypatch.setattr(weights, "load", lambda *given: loaded.append(real(*given)) or loaded[-1])
    monkeypatch.chdir(tmp_path)
    command = [str(picture), "point to the cups", "--max-new-tokens", "4", "--checkpoint"]
    infer.main([*command, str(folder), "--released-inference"])
    infer.main([*command, str(folder)])
    assert [model.config.point.released_inference for model, _ in loaded] == [True, False]
    tokenizer = loaded[0][1]
    weights.save_released("text", Molmo(replace(SMALL, **AS_TEXT)).initialize(0), tokenizer)
    for other, said in (("text", "writes points as text"), (str(picture.parent / "tiny"), "is for folders of released layout")):
        with pytest.raises(SystemExit) as end:
            infer.main([*command, other, "--released-inference"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and said in error and error.count("\n") == 1


def test_the_released_inference_code_differs_in_four_places(tiny):
    """With the switch: scores over sqrt(number of keys), locations from the state before the norm, <|vit_index|> carries
    the patch in place of its word, <im_low> has a word of its own; cached and uncached answers still agree."""
    ours, theirs = (Molmo(replace(SMALL, point=replace(SMALL.point, released_inference=switch))).initialize(2).eval()
                    for switch in (False, True))
    theirs.load_state_dict(ours.state_dict())
    rng = np.random.default_rng(0)
    h, keys = (torch.tensor(rng.normal(size=shape), dtype=torch.float32) for shape in ((3, 32), (6, 16)))
    a, b = (m.point_predictor for m in (ours, theirs))
    with torch.no_grad():
        at = torch.tensor([0, 2, 4])
        assert torch.allclose(a.patch_scores(h, at, keys) * 16**0.5, b.patch_scores(h, at, keys) * 7**0.5, atol=1e-5)
        assert torch.allclose(a.location_scores(h), b.location_scores(a.x_norm(h)), atol=1e-6)
        names = ("<|vit_index|>", "<im_low>", "<im_patch>", "<|token_index|>")
        word = {name: [m.embed(torch.tensor([[m.ids[name]]]))[0, 0] for m in (ours, theirs)] for name in names}
    assert word["<|vit_index|>"][0].abs().sum() > 0 and word["<|vit_index|>"][1].abs().sum() == 0
    assert torch.equal(word["<im_low>"][0], word["<im_patch>"][0]) and not torch.equal(*word["<im_low>"])
    assert torch.equal(*word["<im_patch>"]) and torch.equal(*word["<|token_index|>"])

    tokenizer = tiny[1]
    views = data.views_of(data.draw("stills", 0, 0, 1), SMALL.views)
    batch, control = collate([data.prompt(tokenizer, views, "point to the cups")]), data.control_tokens(tokenizer)
    with torch.no_grad():
        theirs.lm_head.new_embedding[11] += 5 * theirs.ln_f(theirs(batch)[0][0, -1])  # it wants to point
    slow = generate_slowly(theirs, batch, control, 24)
    assert slow.triples and generate(theirs, batch, control, 24) == [slow]
