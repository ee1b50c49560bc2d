"""What tests/test_parallel.py runs in several processes: torchrun --nproc-per-node N tests/processes.py CHECK FOLDER."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import parallel  # noqa: E402
import train  # noqa: E402
from connector import TemporalConfig  # noqa: E402
from packing import collate  # noqa: E402
from test_model import CONFIG, scrambled, tree  # noqa: E402

TEXT, STILL, ALBUM, CLIP = (dict(seed=1, branches=3), dict(seed=2, branches=3, images=1), dict(seed=3, branches=2, images=2), dict(seed=4, branches=1, frames=4))


def packs(kind: str):
    """The packs of two processes: different pictures; text alone on one, so that targets to point at are on the other only."""
    return {"uneven": ([[tree(**STILL)]], [[tree(**ALBUM), tree(**CLIP)]]), "text": ([[tree(**TEXT)]], [[tree(**CLIP), tree(**STILL)]])}[kind]


def gradients(model, batches, divisor):
    """In float64, where sums in another order differ by less than a mistake would. The loss of these batches, and the gradient of every parameter as a whole."""
    total = 0.0
    for batch in batches:
        losses = model.losses(batch)
        loss = (sum(losses[name] for name in train.LOSSES) + train.Z_LOSS * losses["z"]) / divisor
        loss.backward()
        total += loss.item()
    found = {name: parallel.full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return total, found


def same(found, expected, what):
    assert found.keys() == expected.keys(), f"{what}: gradients of {sorted(found.keys() ^ expected.keys())}"
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        worst = float((found[name] - gradient).abs().max()) / scale
        assert worst < 1e-6, f"{what}: {name} differs by {worst:.1e} of its scale"


def check(world, context, config, kind, recompute=False):
    rows = packs(kind)
    multiple = 2
    everything = [collate(pack, "paper", multiple) for pack in rows]
    own = [everything[world.data_rank]] if context == 1 else everything
    weights = sum(float(batch.loss_weights.sum()) for batch in everything)
    expected = gradients(scrambled(0, config).double().train(), everything, weights)
    model = parallel.shard(scrambled(0, config).double().train(), world, "cpu", recompute)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    loss, found = gradients(model, own, weights / world.size)
    loss = float(world.sum(torch.tensor(loss))) / world.size
    assert abs(loss - expected[0]) < 1e-5 * abs(expected[0]), (loss, expected[0])
    same(found, expected[1], f"context {context}, {kind}")


def main(context):
    torch.set_num_threads(1)
    with parallel.together("cpu", context) as (world, _):
        for kind in ("uneven", "text"):
            check(world, context, CONFIG, kind)
        check(world, context, CONFIG, "text", recompute=True)
        past = replace(CONFIG, temporal=TemporalConfig(mode="attention", width=32, heads=4))
        check(world, context, past, "text")
        print("all equal", flush=True)


main(int(sys.argv[1]))
