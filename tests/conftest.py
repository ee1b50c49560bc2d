"""Shared by all tests: the modules of the repository root, few threads, and a small model with random weights."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # small models: more threads only wait for each other


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the preset `tiny`. Shared: leave both as they are."""
    from model import PRESETS, Molmo
    from tokenizer import Tokenizer

    return Molmo(PRESETS["tiny"]).initialize(0).eval(), Tokenizer.load(ROOT / "assets/tokenizer.json")
