"""The benchmarks run: every figure they print is made by code that works. (What the figures are is not tested.)"""

from dataclasses import replace

import bench
import bench_train
import bench_video
import pytest
from model import PRESETS


def test_training_is_measured(monkeypatch, capsys):
    """A packed step under both masks and attention by length, on the smallest sizes."""
    monkeypatch.setitem(bench_train.PRESETS, "small", PRESETS["tiny"])
    monkeypatch.setattr(bench_train, "REPEATS", 1)
    before = bench_train.model_file.make_mask
    bench.main(["train", "--quick"])
    said = capsys.readouterr().out
    assert "16 examples in a pack" in said and said.count("per example") >= 2 and " times" in said
    assert bench_train.model_file.make_mask is before
    bench_train.blocks_of_8b(64, 1e9, "cpu", 2, width=32, heads=4, kv_heads=2, head_width=8, mlp_hidden=48)
    assert "2 blocks of 32, 64 tokens: MFU" in capsys.readouterr().out


def test_video_is_measured(monkeypatch, capsys):
    """Both ways from a file to crops give the same crops."""
    monkeypatch.setattr(bench_video, "ROUNDS", 1)
    monkeypatch.setattr(bench_video, "MINUTE", 90)
    bench.main(["video"])
    said = capsys.readouterr().out
    assert "the same crops" in said and "OTHER" not in said and "9 crops" in said


def test_writing_is_held_against_the_memory(monkeypatch):
    """In bfloat16 and in eight bits, as on a GPU: a figure for each mode, and its share of the limit."""
    monkeypatch.setattr(bench, "WRITTEN", 3)
    monkeypatch.setattr(bench, "FRAMES", 2)
    monkeypatch.setattr(bench, "SMALL", PRESETS["tiny"])
    rows = [row for eight in (False, True) for row in bench.of_the_limit(PRESETS["tiny"], "cpu", eight, ("views", "static"), 1)]
    assert [name for name, *_ in rows] == [f"decode, {kind}, {mode}" for kind in ("bfloat16", "int8") for mode in ("views", "static")]
    assert all(value > 0 and "% of" in unit for _, value, unit in rows)


def test_inference_is_measured(monkeypatch, capsys):
    """Ours, the library's, eight bits and the tree of questions, on the smallest sizes; memory is that of whole processes."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "SMALL", replace(PRESETS["tiny"], points_as="tokens"))
    monkeypatch.setattr(bench, "peaks", lambda folder, *who: dict.fromkeys(who, 1))
    for name, value in {"FRAMES": 2, "WRITTEN": 3, "SHARED_FRAMES": 2, "QUESTIONS": 4, "SHORT": 2}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main(["infer", "--quick"])
    said = capsys.readouterr().out
    assert "decode, transformers" in said and "4 questions, a tree" in said
