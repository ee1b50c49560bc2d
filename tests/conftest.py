"""Shared by all tests: the modules of the repository root, few threads, and a small model with random weights."""

import os
import sys
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what must be equal bit for bit is so on a CPU; one test wants a GPU, if it may see one
os.environ["OMP_NUM_THREADS"] = "1"  # small models: more threads only wait for each other

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_start():
    """Every test begins with the same random numbers and torch's own algorithms, whichever ran before it."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the preset `tiny`. Shared: leave both as they are."""
    from model import PRESETS, Molmo
    from tokenizer import Tokenizer

    return Molmo(PRESETS["tiny"]).initialize(0).eval(), Tokenizer.load(ROOT / "assets/tokenizer.json")
