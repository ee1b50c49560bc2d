"""Checkpoints: ours and the released ones, loaded strictly, written whole or not at all.

    ours      config.json (the MolmoConfig), tokenizer.json, model.npz: one array per parameter, named as in the model
    released  config.json, tokenizer.json, model*.safetensors: the layout of allenai/Molmo2-* and allenai/MolmoPoint-*

Strictly: every tensor of the file is used once (but ViT blocks above the deepest tap, and copies of tied tables), every parameter
is filled, all shapes are equal; else nothing is loaded and one line names the file and the tensor. No pickle is ever read. The
released layout needs two more packages (requirements-released.txt), imported only then.

    python weights.py runs/stage2/checkpoint exported    # any checkpoint, written in the released layout
"""

import argparse
import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import command
from connector import ConnectorConfig, TemporalConfig
from model import LLMConfig, Molmo, MolmoConfig, Yarn
from pointing import PointConfig
from preprocess import ViewConfig
from tokenizer import RESERVED, ReleasedTokenizer, Tokenizer
from vit import ViTConfig


class CheckpointError(ValueError):
    """One line: the file, what is wrong with it, the tensor."""


def save(folder: str | Path, model: Molmo, tokenizer: Tokenizer, training: dict[str, np.ndarray] | None = None,
         also: Callable[[Path], None] = lambda fresh: None) -> None:
    """`training`: what else a run needs to go on, kept in training.npz; `also` may write more into the folder. Writes the
    folder under another name (`unfinished`) and renames it, so that a reader never meets half a checkpoint. A model that
    came with a released tokenizer is written in the released layout. CheckpointError if something else has that name."""
    if isinstance(tokenizer, ReleasedTokenizer):
        return save_released(folder, model, tokenizer, training, also)
    with _replacing(folder, training, also) as fresh:
        (fresh / "config.json").write_text(model.config.to_json() + "\n")
        tokenizer.save(fresh / "tokenizer.json")
        arrays = {name: p.detach().float().cpu().numpy() for name, p in model.state_dict().items()}
        np.savez(fresh / "model.npz", **arrays)


def load_training(folder: Path) -> dict[str, np.ndarray] | None:
    """What `save` was given as `training`; None if there is no such checkpoint. CheckpointError if it cannot be read."""
    folder = standing(folder)
    if not folder.exists():
        return None
    try:
        with np.load(folder / "training.npz", allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # of numpy, zipfile, zlib, even of Python's tokenizer, which numpy asks about headers
        raise CheckpointError(f"{folder / 'training.npz'}: not readable ({error}): nothing to resume") from None


@contextmanager
def _replacing(folder: str | Path, training: dict[str, np.ndarray] | None, also: Callable[[Path], None]) -> Iterator[Path]:
    """Around the writing of a checkpoint: yields a folder to write to, which gets the name once it is complete, or goes."""
    folder = Path(folder).resolve()  # where a link leads: the link stays; and "." has a name then
    fresh = _fresh(folder)
    try:
        also(fresh)
        yield fresh
        if training is not None:
            np.savez(fresh / "training.npz", **training)
        _swap(fresh, folder)
    except BaseException:  # of Ctrl-C, too
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _fresh(folder: Path) -> Path:
    """A new empty folder beside `folder`, which may be replaced only if it is a checkpoint or empty."""
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise CheckpointError(f"{folder}: is there already and is no checkpoint: give another name")
    recover(folder)
    fresh = unfinished(folder)
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    fresh.mkdir(parents=True)
    return fresh


def unfinished(folder: Path) -> Path:
    """The name of a checkpoint that is being written."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.new")


def _swap(fresh: Path, folder: Path) -> None:
    """Gives a finished folder its name; one that had it goes only then, when the new one is on the disk."""
    for path in filter(Path.is_file, fresh.rglob("*")):
        with open(path, "r+b") as file:  # Windows wants to be able to write
            os.fsync(file.fileno())
    old, inside = folder.with_name(f".{folder.name}.old"), Path.cwd() == folder
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    if inside:  # the process stands in the old one
        os.chdir(folder)
    shutil.rmtree(old, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the last whole checkpoint is: between the two renames of `_swap`, or after a kill there, beside its name."""
    folder = folder.resolve()
    old = folder.with_name(f".{folder.name}.old")
    return old if old.is_dir() and not folder.exists() else folder


def recover(folder: Path) -> None:
    """Gives the last whole checkpoint its name again. For who writes there; others only read (`standing`)."""
    folder = folder.resolve()
    if (old := standing(folder)) != folder:
        with suppress(FileNotFoundError):  # another process did it
            os.rename(old, folder)


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
         released_inference: bool = False) -> tuple[Molmo, Tokenizer]:
    """-> the model in evaluation mode, and its tokenizer, from a folder of either sort. Numbers are float32 if the
    checkpoint is ours and as they are in the file if it was released, unless `dtype` says. `released_inference`: see
    PointConfig. CheckpointError if anything is wrong."""
    folder = standing(Path(folder))
    if is_released(folder):
        return load_released(folder, device, dtype, released_inference)
    if released_inference:
        raise CheckpointError(f"{folder}: --released-inference is for folders of released layout")
    for name in ("config.json", "tokenizer.json", "model.npz"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: not a checkpoint folder, {name} is missing")
    try:
        config = MolmoConfig.from_json((folder / "config.json").read_text())
        with torch.device("meta"):
            model = Molmo(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.base_size != config.llm.vocabulary:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {tokenizer.base_size} base tokens, "
                              f"the config asks for {config.llm.vocabulary}")
    model.load_state_dict(_arrays(folder / "model.npz", model), assign=True)
    return model.to(device, dtype).eval(), tokenizer


def _arrays(path: Path, model: Molmo) -> dict[str, torch.Tensor]:
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    try:
        with np.load(path, allow_pickle=False) as file:
            if odd := sorted(set(file.files) ^ set(wanted)):
                raise CheckpointError(f"{path}: {odd[0]} is {'missing' if odd[0] in wanted else 'not part of this model'}")
            arrays = {name: torch.from_numpy(file[name]).float().clone() for name in wanted}  # torch's alignment: same sums
    except Exception as error:  # as above
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: not readable ({error})") from None
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(arrays[name].shape)}, the config asks for {tuple(shape)}")
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# The released layout: names

MOLMO2 = {  # beginnings of names, ours -> released; the first that fits counts
    "wte.": "model.transformer.wte.",
    "blocks.": "model.transformer.blocks.",
    "ln_f.": "model.transformer.ln_f.",
    "lm_head.embedding": "lm_head.weight",
    "vit.blocks.": "model.vision_backbone.image_vit.transformer.resblocks.",
    "vit.": "model.vision_backbone.image_vit.",
    "connector.": "model.vision_backbone.",
}
MOLMOPOINT = MOLMO2 | {
    "lm_head.embedding": "lm_head.output_embeddings",
    "lm_head.new_embedding": "lm_head.new_output_embeddings",
    "vit.blocks.": "model.vit.transformer.resblocks.",
    "vit.": "model.vit.",
    "connector.": "model.connector.",
    "point_predictor.build_vit_embedding.": "model.build_vit_embedding.",
    "point_predictor.no_more_points": "model.point_predictor.add_no_point_class_embed.vector",
    "point_predictor.": "model.point_predictor.",
}
TABLE = ("wte.embedding", "wte.new_embedding")
PROCESSOR = {"image_use_col_tokens": True, "use_single_crop_col_tokens": False, "use_single_crop_start_token": True,
             "video_use_col_tokens": False, "use_frame_special_tokens": True}


def released_name(name: str, config: MolmoConfig) -> str:
    for ours, theirs in (MOLMOPOINT if config.points_as == "tokens" else MOLMO2).items():
        if name.startswith(ours):
            return theirs + name[len(ours):]
    raise KeyError(name)


# ---------------------------------------------------------------------------------------------------------------------
# The released layout: config.json, in both spellings


class _Entries:
    """A JSON object that is asked for entries by any of their names and complains in one line."""

    def __init__(self, path: Path, values: dict, where: str = ""):
        self.path, self.values, self.where = path, values, where

    def __call__(self, *names: str, default=None):
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is None:
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is missing")
        return default

    def part(self, *names: str) -> "_Entries":
        return _Entries(self.path, self(*names), f"{names[0]}.")

    def whole(self, *names: str, default: int) -> int:
        """A whole number above 0."""
        if type(found := self(*names, default=default)) is not int or found < 1:
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is {found!r}")
        return found

    def flag(self, *names: str, default: bool) -> bool:
        if type(found := self(*names, default=default)) is not bool:
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is {found!r}")
        return found

    def pair(self, *names: str, default: Sequence[int], least: int = 1) -> tuple[int, int]:
        """Two whole numbers, none of them below `least`."""
        found = self(*names, default=default)
        if not isinstance(found, (list, tuple)) or len(found) != 2 or any(type(n) is not int or n < least for n in found):
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is {found!r}")
        return tuple(found)

    def square(self, *names: str, side: int) -> int:
        """The side of a square window."""
        sides = self.pair(*names, default=[side, side])
        if sides[0] != sides[1]:
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is {list(sides)!r}, only squares are supported")
        return sides[0]

    def must(self, expected, *names: str) -> None:
        if (found := self(*names, default=expected)) != expected:
            raise CheckpointError(f"{self.path}: {self.where}{names[0]} is {found!r}, only {expected!r} is supported")


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def is_released(folder: Path) -> bool:
    """Does its config.json have the entries of the released ones?"""
    path = Path(folder) / "config.json"
    return path.is_file() and "model_type" in _read_json(path)


def released_config(folder: str | Path) -> MolmoConfig:
    """config.json, and the preprocessor's settings beside it, as a MolmoConfig. CheckpointError if it is of a model that
    this code is not."""
    folder = Path(folder)
    top = _Entries(folder / "config.json", _read_json(folder / "config.json"))
    kind = top("model_type")
    if kind not in ("molmo2", "molmo_point"):
        raise CheckpointError(f"{top.path}: model_type {kind!r} is not molmo2 or molmo_point")
    pointing = kind == "molmo_point"
    try:
        vit, connector, text = top.part("vit_config", "vision_config"), top.part("adapter_config"), top.part("text_config")
        seeing = _released_vit(vit, connector)
        crop = vit.square("image_default_input_size", "image_size", side=378)
        return MolmoConfig(
            vit=seeing,
            views=_released_views(folder, crop, seeing.patch_size, pointing),
            connector=_released_connector(connector, pointing),
            llm=_released_llm(text, top),
            point=_released_point(top, text) if pointing else PointConfig(),
            points_as="tokens" if pointing else top("points_as", default="text"),
            temporal=TemporalConfig(**top("temporal", default=asdict(TemporalConfig()))),
            optimizer=top("optimizer", default=MolmoConfig.optimizer),
            bidirectional=top.flag("bidirectional", default=True),
        )
    except (TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{top.path}: {error}") from None


def _released_vit(vit: _Entries, connector: _Entries) -> ViTConfig:
    crop, patch = vit.square("image_default_input_size", "image_size", side=378), vit("image_patch_size", "patch_size")
    vit.must("gelu_pytorch_tanh", "hidden_act")
    vit.must(vit("hidden_size") // vit.whole("num_attention_heads", default=16), "head_dim")
    return ViTConfig(width=vit("hidden_size"), layers=vit("num_hidden_layers"), heads=vit("num_attention_heads"),
                     mlp_hidden=vit("intermediate_size"), taps=tuple(connector("vit_layers", "vision_feature_layer")),
                     grid=math.isqrt(vit("image_num_pos", "num_position_embeddings", default=(crop // patch) ** 2)),
                     patch_size=patch, norm_eps=vit("layer_norm_eps"))


def _released_connector(connector: _Entries, pointing: bool) -> ConnectorConfig:
    connector.must("silu", "hidden_act")
    connector.must(True, "pooling_attention_mask")
    if connector("positional_embeddings", default=0):
        raise CheckpointError(f"{connector.path}: a connector with positional_embeddings is not supported")
    return ConnectorConfig(width=connector("hidden_size"), heads=connector("num_attention_heads"),
                           mlp_hidden=connector("intermediate_size"),
                           output_layer=connector("attention_pooling_out_layer", default=not pointing))


def _released_llm(text: _Entries, top: _Entries) -> LLMConfig:
    rope = _Entries(text.path, text.values | text("rope_scaling", default={}) | text("rope_parameters", default={}),
                    "text_config rope: ")
    layers, kind = text("num_hidden_layers"), rope("rope_type", "type", default="default")
    if kind not in ("default", "yarn"):
        raise CheckpointError(f"{text.path}: rope_type {kind!r} is not default or yarn")
    rope.must(True, "truncate")
    if rope("mscale", "mscale_all_dim", default=0):
        raise CheckpointError(f"{text.path}: RoPE with mscale is not supported")
    factor = rope("factor", default=1.0)
    yarn = Yarn(factor, rope("attention_factor", default=1 + 0.1 * math.log(factor)), rope("beta_fast", default=32.0),
                rope("beta_slow", default=1.0), rope("original_max_position_embeddings"),
                tuple(text("rope_scaling_layers", default=range(layers)))) if kind == "yarn" else None
    text.must("silu", "hidden_act")
    text.must(False, "qkv_bias", "attention_bias")
    text.must(True, "use_qk_norm")
    text.must(RESERVED, "additional_vocab_size")
    tied = any(values.get("tie_word_embeddings") for values in (text.values, top.values))
    return LLMConfig(vocabulary=text("vocab_size"), width=text("hidden_size"), layers=layers,
                     heads=text("num_attention_heads"), kv_heads=text("num_key_value_heads"),
                     head_width=text("head_dim"), mlp_hidden=text("intermediate_size"), rope_theta=rope("rope_theta"),
                     norm_eps=text("layer_norm_eps", "rms_norm_eps"), tied=tied,
                     norm_after=text("norm_after", default=False), yarn=yarn,
                     norm_heads=text("qk_norm_type", default="qwen3") == "qwen3", dropout=text("residual_dropout", default=0.0))


def _released_point(top: _Entries, text: _Entries) -> PointConfig:
    for value, name in (("3x3", "patch_location"), (True, "no_more_points_class"), ("linear", "embed_selected_vit_patch"),
                        ("one_d", "token_prediction_rotary"), (True, "layer_norm_x"), (True, "norm_logits"),
                        (False, "embed_location")):
        top.must(value, name)
    return PointConfig(width=top("patch_embed_dim"), rope_theta=top("token_prediction_rotary_theta", default=50_000.0),
                       norm_eps=text("layer_norm_eps", "rms_norm_eps"))


def _released_views(folder: Path, crop: int, patch: int, pointing: bool) -> ViewConfig:
    """From preprocessor_config.json and video_preprocessor_config.json, or processor_config.json, which holds both."""
    def settings(name: str, part: str) -> _Entries:
        if (path := folder / name).is_file():
            return _Entries(path, _read_json(path))
        return _Entries(both.path, both(part, default={}), f"{part}.")

    path = folder / "processor_config.json"
    both = _Entries(path, _read_json(path) if path.is_file() else {})
    for name, value in PROCESSOR.items():
        both.must(value, name)
    if both.values.get("use_single_crop_col_tokens", False) is None:  # the library then goes by image_use_col_tokens
        raise CheckpointError(f"{path}: use_single_crop_col_tokens is null, this code knows False")
    images = settings("preprocessor_config.json", "image_processor")
    videos = settings("video_preprocessor_config.json", "video_processor")
    usual = ViewConfig()
    for pictures in (images, videos):
        pictures.must([0.5, 0.5, 0.5], "image_mean"), pictures.must([0.5, 0.5, 0.5], "image_std"), pictures.must(patch, "patch_size")
    fps = videos("max_fps", default=usual.fps)
    if type(fps) not in (int, float) or not 0 < fps < math.inf:
        raise CheckpointError(f"{videos.path}: {videos.where}max_fps is {fps!r}")
    return ViewConfig(
        crop_size=crop, patch_size=patch, margins=images.pair("overlap_margins", default=usual.margins, least=0),
        image_pool=images.square("pooling_size", side=usual.image_pool), max_crops=images.whole("max_crops", default=usual.max_crops),
        video_pool=videos.square("pooling_size", side=usual.video_pool),
        max_frames=videos.whole("num_frames", default=usual.max_frames), fps=float(fps), low_res_pointing=not pointing)


# ---------------------------------------------------------------------------------------------------------------------
# The released layout: tensors


def _extra(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CheckpointError(f"released checkpoints need the package {name}: "
                              "pip install -r requirements-released.txt") from None


def load_released(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
                  released_inference: bool = False) -> tuple[Molmo, Tokenizer]:
    """A folder as released, or as `save_released` or the `transformers` library write it. The model is built without
    memory and its parameters are the mapped file, converted one by one if `dtype` or `device` ask for it, so that the peak
    stays near the size of the weights. `released_inference`: see PointConfig."""
    folder = Path(folder)
    config, shards = released_config(folder), _shards(folder)
    config = _tied_if_equal(shards, config)
    if released_inference and config.points_as != "tokens":
        raise CheckpointError(f"{folder}: --released-inference is for grounding tokens, this model writes points as {config.points_as}")
    config = replace(config, point=replace(config.point, released_inference=released_inference))
    tokenizer = ReleasedTokenizer.load(folder, config.llm.vocabulary)
    tokenizer.stop_ids = _stop_ids(folder / "generation_config.json", tokenizer)
    try:
        with torch.device("meta"):
            model = Molmo(config)
    except (ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: no model can have these sizes ({error})") from None
    model.load_state_dict(_released_tensors(folder, shards, model, device, dtype), assign=True)
    return model.eval(), tokenizer


def _tied_if_equal(shards: "dict[str, _Shard]", config: MolmoConfig) -> MolmoConfig:
    """The converter of Molmo2 writes tied tables (4B) as two equal ones and does not say so in config.json: trained as they are,
    they would drift apart."""
    if config.llm.tied:
        return config
    as_tied = replace(config, llm=replace(config.llm, tied=True))
    heads, tables = list(_tied_copies(as_tied)), [released_name(name, config) for name in TABLE]
    if not {*heads, *tables} <= shards.keys():
        return config
    head, table = ([shards[name].get(name) for name in names] for names in (heads, tables))
    fits = all(part.shape[1:] == (config.llm.width,) for part in head + table) and len(head[0]) == config.llm.vocabulary
    if not fits or not torch.equal(head[0][:64], table[0][:64]):
        return config  # a few rows tell most apart; what has a wrong shape is refused later
    head, table = torch.cat(head), torch.cat(table)  # copies made by the library may be split at another row
    rows = config.llm.vocabulary + (len(heads) - 1) * RESERVED
    return as_tied if len(head) == rows and torch.equal(head, table[:rows]) else config


def _stop_ids(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: those that generation_config.json names, and the tokenizer's own."""
    named = _read_json(path).get("eos_token_id") if path.is_file() else None
    named = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(i, int) and 0 <= i < tokenizer.size for i in named):
        raise CheckpointError(f"{path}: eos_token_id {named!r} is not among the {tokenizer.size} tokens")
    return tuple({*tokenizer.stop_ids, *named})


def _released_tensors(folder: Path, shards: "dict[str, _Shard]", model: Molmo, device, dtype) -> dict[str, torch.Tensor]:
    """Every parameter of the model by our names."""
    wanted = {released_name(name, model.config): name for name in model.state_dict()}
    tied = _tied_copies(model.config)
    for name, file in shards.items():
        block = re.match(re.escape(released_name("vit.blocks.", model.config)) + r"(\d+)\.", name)
        above = block is not None and len(model.vit.blocks) <= int(block[1]) < model.config.vit.layers  # deeper than any tap
        if name not in wanted and name not in tied and not above:
            raise CheckpointError(f"{file.path}: {name} is not part of this model")
    if missing := sorted(set(wanted) - set(shards)):
        raise CheckpointError(f"{folder}: {missing[0]} is missing" + f", and {len(missing) - 1} more" * (len(missing) > 1))

    def read(name: str) -> torch.Tensor:
        tensor, shape = shards[name].get(name), tuple(model.get_parameter(wanted[name]).shape) if name in wanted else None
        fits = shape is None or tensor.shape == shape or (wanted[name] in TABLE and tensor.shape[1:] == shape[1:])
        if not fits or not tensor.is_floating_point():
            raise CheckpointError(f"{shards[name].path}: {name} is {str(tensor.dtype).removeprefix('torch.')} of shape "
                                  f"{tuple(tensor.shape)}, the config asks for floats of shape {shape}")
        return tensor.to(device, dtype)

    tensors = {ours: read(theirs) for theirs, ours in wanted.items()}
    base, extra = (tensors[name] for name in TABLE)
    if len(base) != model.config.llm.vocabulary:  # a copy made by the library may split the table at another row
        table = torch.cat([base, extra])
        if len(table) != model.config.llm.vocabulary + RESERVED:
            raise CheckpointError(f"{folder}: the word embeddings have {len(table)} rows in all, "
                                  f"the config asks for {model.config.llm.vocabulary} + {RESERVED}")
        tensors |= {TABLE[0]: table[:model.config.llm.vocabulary], TABLE[1]: table[model.config.llm.vocabulary:]}
    elif len(extra) != RESERVED:
        raise CheckpointError(f"{folder}: the extra word embeddings have {len(extra)} rows instead of {RESERVED}")
    for theirs, ours in tied.items():
        if theirs in shards and not torch.equal(read(theirs), tensors[ours]):
            raise CheckpointError(f"{shards[theirs].path}: {theirs} differs from the word embeddings, the config ties them")
    return tensors


def _tied_copies(config: MolmoConfig) -> dict[str, str]:
    """Released name -> ours of the copies that files hold of the word embeddings where the head is tied to them."""
    if not config.llm.tied:
        return {}
    heads = ("lm_head.embedding", "lm_head.new_embedding")[:2 if config.points_as == "tokens" else 1]
    return {released_name(head, config): table for head, table in zip(heads, TABLE)}


class _Shard:
    """A safetensors file, mapped into memory: a tensor is read when its numbers are."""

    def __init__(self, path: Path):
        self.path, safetensors = path, _extra("safetensors")
        try:
            self.file = safetensors.safe_open(path, framework="pt")
            self.names = set(self.file.keys())
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None

    def get(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        return self.file.get_tensor(name)


def _shards(folder: Path) -> dict[str, _Shard]:
    """Tensor name -> its file, from model.safetensors or model.safetensors.index.json and the files it lists."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        shard = _Shard(single)
        return dict.fromkeys(sorted(shard.names), shard)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json"
                              + (f"; {pickles[0]} is a pickle, which is never loaded: convert it" if pickles else ""))
    places, files = _Entries(index, _read_json(index))("weight_map"), {}
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map does not name a file for every tensor")
    for name in sorted(set(places.values())):
        if not (folder / name).is_file() or Path(name).name != name:
            raise CheckpointError(f"{folder / name}: a file of the checkpoint is missing, {index.name} lists it")
        files[name] = _Shard(folder / name)
    for tensor, name in places.items():
        if tensor not in files[name].names:
            raise CheckpointError(f"{folder / name}: {tensor} is not in it, though {index.name} says so")
    for name, shard in files.items():
        if extra := sorted(shard.names - set(places)):
            raise CheckpointError(f"{folder / name}: {extra[0]} is not listed in {index.name}")
    return {tensor: files[name] for tensor, name in places.items()}


def save_released(folder: str | Path, model: Molmo, tokenizer: Tokenizer,
                  training: dict[str, np.ndarray] | None = None, also: Callable[[Path], None] = lambda fresh: None) -> None:
    """Writes the released layout, which the `transformers` library loads too (Molmo2, that is: points as text): the
    tensors in one file, config.json, tokenizer and processor files. The folder appears under its name when complete. ValueError if
    that layout does not hold such a model, CheckpointError if something else has that name or safetensors is missing."""
    save_file, config = _extra("safetensors.torch").save_file, model.config
    if config.points_as == "tokens" and config.views.low_res_pointing:
        raise ValueError("the released layout of a model with grounding tokens does not point in the whole-picture crop; this one does")
    if config.points_as != "tokens" and not (config.connector.output_layer and config.views.low_res_pointing):
        raise ValueError("the released layout of a model that writes points as text has an output layer in the connector's attention "
                         "and points in the whole-picture crop; this one has not")
    tensors = {released_name(name, model.config): p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    tensors |= {theirs: model.get_parameter(ours).detach().cpu().clone() for theirs, ours in _tied_copies(model.config).items()}
    with _replacing(folder, training, also) as fresh:
        save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(fresh / "tokenizer.json")
        for name, values in _released_files(model.config, tokenizer).items():
            (fresh / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (fresh / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# `Tokenizer.chat_prompt` and `preprocess.image_views` for the library's processor: pictures first, then the turns.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0, videos=0) %}{%- for turn in messages if turn.content is not string %}"
    "{%- for piece in turn.content %}{%- if piece.type == 'image' %}{%- set seen.images = seen.images + 1 %}"
    "{%- elif piece.type == 'video' %}{%- set seen.videos = seen.videos + 1 %}{%- endif %}{%- endfor %}{%- endfor %}"
    "{%- for number in range(seen.images) %}{{ 'Image ' ~ (number + 1) if seen.images > 1 else '' }}{{ '<|image|>' }}"
    "{%- endfor %}{{ '<|video|>' * seen.videos }}"
    "{%- for turn in messages %}{{ '<|im_start|>' ~ turn.role ~ '\n' }}"
    "{%- if turn.content is string %}{{ turn.content }}{%- else %}{%- for piece in turn.content if piece.type == 'text' %}"
    "{{ piece.text }}{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def _released_files(config: MolmoConfig, tokenizer: Tokenizer) -> dict[str, dict]:
    """File name -> content: `released_config` read backwards."""
    v, c, t, views = config.vit, config.connector, config.llm, config.views
    ids, pointing = config.token_ids(), config.points_as == "tokens"
    top = {"image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>", "image_patch_id": "<im_patch>",
           "image_col_id": "<im_col>", "low_res_image_start_token_id": "<low_res_im_start>",
           "frame_start_token_id": "<frame_start>", "frame_end_token_id": "<frame_end>"}
    if pointing:
        top |= {"image_non_indexable_patch_id": "<im_low>", "patch_token_id": "<|token_index|>",
                "subpatch_token_id": "<|vit_index|>", "location_token_id": "<|vit_loc|>"}
    name = "molmo_point" if pointing else "molmo2"
    crop = [views.crop_size, views.crop_size]
    text = {
        "model_type": "molmo2_text", "vocab_size": t.vocabulary, "additional_vocab_size": RESERVED,
        "hidden_size": t.width, "num_hidden_layers": t.layers, "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads, "head_dim": t.head_width, "intermediate_size": t.mlp_hidden, "hidden_act": "silu",
        "rope_theta": t.rope_theta, "layer_norm_eps": t.norm_eps, "residual_dropout": t.dropout, "norm_after": t.norm_after, "qkv_bias": False,
        "max_position_embeddings": 36_864,  # the longest sequence of training
        "use_qk_norm": True, "qk_norm_type": "qwen3" if t.norm_heads else "olmo", "tie_word_embeddings": t.tied}
    if t.yarn:
        text |= {"rope_scaling_layers": list(t.yarn.layers), "rope_scaling": {
            "rope_type": "yarn", "factor": t.yarn.factor, "attention_factor": t.yarn.attention_factor,
            "beta_fast": t.yarn.beta_fast, "beta_slow": t.yarn.beta_slow,
            "original_max_position_embeddings": t.yarn.original_length}}
    entries = {
        "model_type": name, "tie_word_embeddings": False, **{entry: ids[token] for entry, token in top.items()},
        "architectures": ["MolmoPointForConditionalGeneration" if pointing else "Molmo2ForConditionalGeneration"],
        "vit_config": {
            "model_type": "molmo2", "hidden_size": v.width, "num_hidden_layers": v.layers, "num_attention_heads": v.heads,
            "num_key_value_heads": v.heads, "head_dim": v.width // v.heads, "intermediate_size": v.mlp_hidden,
            "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": v.norm_eps, "image_default_input_size": crop,
            "image_patch_size": v.patch_size, "image_num_pos": v.grid ** 2},
        "adapter_config": {
            "model_type": name, "vit_layers": list(v.taps), "hidden_size": c.width, "num_attention_heads": c.heads,
            "num_key_value_heads": c.heads, "head_dim": c.width // c.heads, "intermediate_size": c.mlp_hidden,
            "text_hidden_size": t.width, "hidden_act": "silu", "pooling_attention_mask": True}
            | ({"attention_pooling_out_layer": c.output_layer, "positional_embeddings": 0} if pointing else {}),
        "text_config": text}
    if pointing:
        entries |= {"patch_embed_dim": config.point.width, "token_prediction_rotary_theta": config.point.rope_theta,
                    "token_prediction_rotary": "one_d", "patch_location": "3x3", "no_more_points_class": True,
                    "embed_selected_vit_patch": "linear", "embed_location": False, "layer_norm_x": True, "norm_logits": True}
    if config.temporal != TemporalConfig():  # these four are ours: no released model has them
        entries["temporal"] = asdict(config.temporal)
    if config.optimizer != MolmoConfig.optimizer:
        entries["optimizer"] = config.optimizer
    if config.points_as == "tags":
        entries["points_as"] = "tags"
    if not config.bidirectional:
        entries["bidirectional"] = False
    size, normal = {"height": views.crop_size, "width": views.crop_size}, {
        "do_resize": True, "resample": 2, "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    eos = tokenizer.decode([tokenizer.eos_id])
    return {
        "config.json": entries,
        "generation_config.json": {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted({tokenizer.eos_id, *tokenizer.stop_ids})},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": eos,
                                  "bos_token": tokenizer.decode([tokenizer.bos_id])},
        "preprocessor_config.json": {
            "image_processor_type": "Molmo2ImageProcessor", "size": size, **normal, "max_crops": views.max_crops,
            "overlap_margins": list(views.margins), "patch_size": views.patch_size, "pooling_size": [views.image_pool] * 2},
        "video_preprocessor_config.json": {
            "video_processor_type": "Molmo2VideoProcessor", "size": size, **normal, "patch_size": views.patch_size,
            "pooling_size": [views.video_pool] * 2, "num_frames": views.max_frames, "max_fps": views.fps},
        "processor_config.json": {
            "processor_class": "Molmo2Processor", **PROCESSOR}
            | ({"use_low_res_token_for_global_crops": True} if pointing else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The mean of several checkpoints


@torch.no_grad()
def mean(first: str | Path, others: dict[str, float]) -> tuple[Molmo, Tokenizer]:
    """Checkpoints of one training, each with its share; the first has what is left of 1. Late in a training their mean is often better
    than each of them. (Model soups, arXiv 2203.05482.) ValueError if the shares are not above 0 and below 1 together, or if the models
    differ in more than the frames that they look at."""
    shares = list(others.values())
    if not (min(shares) > 0 and sum(shares) < 1):
        raise ValueError(f"--mean-with: shares of {', '.join(f'{share:g}' for share in shares)}: they must be above 0, and less than 1 "
                         "together, for the rest is the first checkpoint's")
    model, tokenizer = load(first)
    spelled, dtype = lambda vocabulary: vocabulary.decode(range(vocabulary.size)), next(model.parameters()).dtype
    parameters = dict(model.float().named_parameters())  # rounded once, in the end
    for p in parameters.values():
        p *= 1 - sum(shares)
    for folder, share in others.items():
        other, words = load(folder)
        config = replace(other.config, views=replace(other.config.views, max_frames=model.config.views.max_frames))
        if config != model.config or spelled(words) != spelled(tokenizer):
            raise ValueError(f"{folder} is another model than {first}")
        for name, p in other.named_parameters():
            parameters[name] += share * p.float()
    return model.to(dtype), tokenizer


def share_of(text: str) -> tuple[str, float]:
    """FOLDER=SHARE of a command line."""
    folder, _, share = text.rpartition("=")
    try:
        if folder:
            return folder, float(share)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER=SHARE, such as runs/stage2/checkpoint=0.4")


def main(argv: list[str] | None = None) -> None:
    with command.one_line("weights.py"):
        parser = command.Parser(prog="weights.py", description="Writes a checkpoint in the released layout, or the mean of several.")
        parser.add_argument("checkpoint", help="a folder of either sort")
        parser.add_argument("out", help="the folder to write")
        parser.add_argument("--mean-with", nargs="+", type=share_of, metavar="FOLDER=SHARE",
                            help="write the mean of the weights with those of other checkpoints, in the layout of the first")
        args = parser.parse_args(argv)
        if Path(args.out).is_dir() and any(Path(args.out).iterdir()):
            raise ValueError(f"{args.out} is not empty: give another folder")
        if args.mean_with:
            if len(dict(args.mean_with)) < len(args.mean_with):
                raise ValueError("--mean-with: a folder is given twice")
            save(args.out, *mean(args.checkpoint, dict(args.mean_with)))
        else:
            save_released(args.out, *load(args.checkpoint))


if __name__ == "__main__":
    main()
