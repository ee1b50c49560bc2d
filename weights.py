"""Checkpoints: a folder of three files, written whole or not at all, loaded strictly.

    config.json       the MolmoConfig
    tokenizer.json    the vocabulary
    model.npz         one array per parameter, named as in the model (no pickle)
"""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch

from model import Molmo, MolmoConfig
from tokenizer import Tokenizer


class CheckpointError(ValueError):
    """One line: the file, what is wrong with it, the tensor."""


def save(folder: str | Path, model: Molmo, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> None:
    """Writes the folder under another name and renames it, so that a reader never meets half a checkpoint."""
    folder = Path(folder)
    fresh, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    (fresh / "config.json").write_text(model.config.to_json() + "\n")
    tokenizer.save(fresh / "tokenizer.json")
    arrays = {name: p.detach().to(dtype).cpu().numpy() for name, p in model.state_dict().items()}
    np.savez(fresh / "model.npz", **arrays)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Molmo, Tokenizer]:
    """-> the model in float32 and evaluation mode, and its tokenizer. Every array is used once, every parameter is
    filled, shapes are equal; else CheckpointError names the array."""
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.npz"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: not a checkpoint folder, {name} is missing")
    try:
        config = MolmoConfig.from_json((folder / "config.json").read_text())
        with torch.device("meta"):
            model = Molmo(config)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if tokenizer.base_size != config.llm.vocabulary:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: {tokenizer.base_size} base tokens, "
                              f"the config asks for {config.llm.vocabulary}")
    model.load_state_dict(_arrays(folder / "model.npz", model), assign=True)
    return model.to(device).eval(), tokenizer


def _arrays(path: Path, model: Molmo) -> dict[str, torch.Tensor]:
    wanted = {name: p.shape for name, p in model.state_dict().items()}
    try:
        with np.load(path, allow_pickle=False) as file:
            if odd := sorted(set(file.files) ^ set(wanted)):
                raise CheckpointError(f"{path}: {odd[0]} is {'missing' if odd[0] in wanted else 'not part of this model'}")
            arrays = {name: torch.from_numpy(file[name]).float() for name in wanted}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{path}: not readable ({error})") from None
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(arrays[name].shape)}, the config asks for {tuple(shape)}")
    return arrays
