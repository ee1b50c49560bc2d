"""Every tensor is on the device that was asked for: commands on one that is not the CPU (tests/afar.py)."""

import json

import pytest
from torch.utils import backend_registration

import data
import forks
import infer
import preprocess
import train
from conftest import ROOT


pytestmark = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                                reason="torch before 2.13 cannot be given a device written in Python")


@pytest.fixture
def far(tmp_path):
    """A command on the other device, as tests/afar.py runs it; -> what it prints."""
    import afar

    def far(*words: object) -> str:
        out, err = tmp_path / "out.txt", tmp_path / "err.txt"
        run = forks.start(afar.main, *words, out=out, err=err)
        run.join(300)
        run.kill()
        assert run.exitcode == 0, err.read_text()[-3000:]
        return out.read_text()

    return far


def test_the_other_device_refuses_what_a_gpu_refuses(far, tmp_path):
    """Tensors of two devices do not meet there, a tensor of the CPU is not indexed from there, and nothing is float64; numbers
    and indices may come from the CPU, and copies go both ways."""
    refused = ("x + torch.zeros(2)", "torch.zeros(2)[x.long()]", "x.double()", "torch.cat([x, torch.zeros(2)])", "torch.zeros(2).add_(x)")
    allowed = ("x[torch.tensor([0])] + torch.tensor(1.0)", "torch.zeros(2).to('afar') + x", "x.cpu() + torch.zeros(2)", "torch.tensor([1, 2], device='afar') + x")
    program = tmp_path / "program.py"
    program.write_text(f"import torch\nx = torch.ones(2, device='afar')\nfor line in {refused + allowed}:\n"
                       "    try:\n        eval(line)\n    except (RuntimeError, TypeError):\n        print(line)\n")
    assert tuple(far(program).splitlines()) == refused


@pytest.mark.parametrize("words", (("--int8", "--ask", "How many cups are there?"), ("--temperature", "0.7")))
def test_answers_are_those_of_the_cpu(far, tmp_path, words):
    """A tree of questions, in eight bits, and one question, sampled: the same points. (In a clip of four frames: a long one takes longer
    to be drawn than to be asked about.)"""
    preprocess.write_video(tmp_path / "cups.mp4", preprocess.read_video(ROOT / "assets/cups.mp4", 2, 4)[0], 1)
    words = str(tmp_path / "cups.mp4"), "point to the cups", "--max-frames", "4", *words, "--out"
    infer.main([*words, str(tmp_path / "here"), "--device", "cpu"])
    far("infer.py", *words, tmp_path / "afar", "--device", "afar")
    here, there = (json.loads((tmp_path / name / "cups.points.json").read_text()) | {"timing": None} for name in ("here", "afar"))
    assert here == there and here["points"]


@pytest.mark.parametrize("words", (("--stage", "2", "--points-as", "text"), ("--stage", "4", "--init", "assets/tiny", "--temporal", "attention")))
def test_steps_of_training_are_those_of_the_cpu(far, tmp_path, monkeypatch, words):
    """Tracks through clips as text in a new model, moments as grounding tokens with a temporal module: the same loss and norms of gradients."""
    import afar
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "STAGES", afar.shortened(train.STAGES))
    data.main(["draw", "tracks", str(tmp_path), "--n", "6"])
    words = *words, "--data", str(tmp_path / "tracks.jsonl"), "--steps", "1", "--workers", "0", "--out"
    train.main([*words, str(tmp_path / "here"), "--device", "cpu"])
    far("train.py", *words, tmp_path / "afar", "--device", "afar")
    here, there = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("here", "afar"))
    assert here["loss"] == pytest.approx(there["loss"], rel=1e-4) and here["norms"] == pytest.approx(there["norms"], rel=1e-2)
