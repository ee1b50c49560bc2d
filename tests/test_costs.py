"""What a model costs, against counts by torch and by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import costs
import train
from attention import may_attend
from model import PRESETS
from packing import collate
from test_model import CONFIG, scrambled, tree


def test_flops_are_those_that_torch_counts():
    """On a pack of two trees with pictures the formula gives what torch's counter sees matrix by matrix, part by part, once
    attention is counted by blocks as it is computed, and not by pairs that see each other."""
    model, batch = scrambled(0).eval(), collate([[tree(2, branches=3, images=1), tree(4, branches=2, frames=4)]])
    work = costs.Work.of(model, batch)
    assert work.pairs == may_attend(ids := model.mask_ids(batch), ids).sum()
    lengths = torch.bincount(batch.example_ids[0])
    expected = costs.flops(CONFIG, costs.Work(**vars(work) | {"pairs": float((lengths**2).sum())}))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the other kernels are not counted on a CPU
        model.losses(batch)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    assert (counts["ViT"], counts["Connector"], counts["Block"]) == (expected["vit"], expected["connector"], expected["llm"])
    rest = counts["Global"] - sum(expected.values())
    assert 0 < rest < 0.01 * counts["Global"]  # of the pointing heads more than the keys of visual tokens is not counted


def test_backward_costs_twice_the_forward():
    """torch counts for forward and backward three times the forward, but for the patches, whose inputs need no gradient."""
    model, batch = scrambled(0).train(), collate([[tree(2, branches=3, images=1)]])
    with FlopCounterMode(display=False) as forward:
        losses = model.losses(batch)
    with FlopCounterMode(display=False) as backward:
        sum(losses[name] for name in train.LOSSES).backward()
    assert 1.8 < backward.get_total_flops() / forward.get_total_flops() < 2.3


def test_the_plan_adds_up(capsys):
    """The printed plan of the 8B model's second stage: steps and tokens by hand, 16 bytes of states a parameter over all GPUs or on each, more
    GPUs less time and memory, a longer context group less memory; and what cannot be shared out is one line."""
    stage, config = train.STAGES["molmo2-8b", 2], PRESETS["molmo2-8b"]
    plan = costs.plan(config, stage, 64, 1, 1)
    assert plan["tokens"] == 128 * 16_384 and plan["crops"] == 128 * 128
    assert plan["states"] == 16 * sum(costs.parameters(config).values()) / 64
    assert plan["gpu hours"] == pytest.approx(plan["step"] * 30_000 * 64 / 3600)
    assert 6 * 6.9e9 * plan["tokens"] < plan["flops"] < 12 * 8.7e9 * plan["tokens"]
    whole = costs.plan(config, stage, 64, 1, 1, sharded=False)
    assert whole["states"] == 64 * plan["states"] and whole["computing"] < plan["computing"] and whole["activations"] > plan["activations"]
    more, shared = costs.plan(config, stage, 128, 1, 1), costs.plan(config, stage, 64, 8, 1)
    assert more["step"] < plan["step"] and more["memory"] < plan["memory"]
    assert costs.plan(config, stage, 64, 8, 16)["memory"] < costs.plan(config, stage, 64, 8, 1)["memory"] and shared["exchanged"] > 0
    train.main(["--stage", "2", "--preset", "molmo2-8b", "--plan", "64"])
    said = capsys.readouterr().out
    assert "30,000 steps on 64 H100" in said and "published       8,100 GPU hours" in said
    train.main(["--stage", "2", "--preset", "molmo2-8b", "--plan", "64", "--steps", "300"])
    assert "published" not in capsys.readouterr().out  # those hours are of the whole stage
    for flags, words in ((["2", "--plan", "60"], "--plan 60: 128 packs a step cannot be shared out"),
                         (["3", "--plan", "12", "--context-parallel", "3", "--accumulate", "1"], "--context-parallel 3: 32 heads")):
        with pytest.raises(SystemExit):
            train.main(["--preset", "molmo2-8b", "--stage", *flags])
        assert words in capsys.readouterr().err


def test_presets_have_the_sizes_of_the_released_models(capsys):
    """Parameters near what the names say; the printed figures of the 8B model by hand."""
    billions = {"molmo2-4b": (4.4, 5.0), "molmo2-8b": (8.5, 8.8), "molmo2-o-7b": (7.6, 7.9), "molmopoint-8b": (8.5, 8.8),
                "molmopoint-gui-8b": (8.5, 8.8), "molmopoint-vid-4b": (4.4, 5.0)}
    for name, (low, high) in billions.items():
        assert low < sum(costs.parameters(PRESETS[name]).values()) / 1e9 < high, name
    block = 4096 * (32 + 16) * 128 + 4096 * 4096 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    vit = 588 * 1152 + 1152 + 729 * 1152 + 25 * (4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
    connector = 3 * (2304 * 1152 + 1152) + 1152 * 1152 + 1152 + 2 * 1152 * 12_288 + 12_288 * 4096
    costs.main(["--preset", "molmo2-8b"])
    printed = {line[:24].strip(): int(line[24:].split()[0].replace(",", "")) for line in capsys.readouterr().out.splitlines()}
    assert printed["decoder blocks"] == 36 * block + 4096 and printed["vit"] == vit and printed["connector"] == connector
    assert printed["head"] == 4096 * 151_936 and printed["word embeddings"] == 4096 * (151_936 + 128)
    assert printed["parameters"] == sum(printed[part] for part in ("decoder blocks", "vit", "connector", "head", "word embeddings"))
    assert printed["cache bytes per token"] == 2 * 36 * 8 * 128 * 2
    assert printed["flops per token"] == 2 * (36 * (block - 2 * 4096 - 2 * 128) + 4096 * 151_936)


def test_an_unknown_preset_is_one_line(capsys):
    """costs.py --preset huge: exit status 2 and one line that names it."""
    with pytest.raises(SystemExit) as end:
        costs.main(["--preset", "huge"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "huge" in said and said.count("\n") == 1
