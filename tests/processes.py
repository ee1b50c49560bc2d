"""What tests run in processes of their own. Of several processes, by hand: torchrun --nproc-per-node N tests/processes.py CHECK ..."""

import io
import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import parallel  # noqa: E402
import train  # noqa: E402
import weights  # noqa: E402
from connector import TemporalConfig  # noqa: E402
from model import Molmo  # noqa: E402
from packing import collate  # noqa: E402
from test_model import CONFIG, TOKENIZER, scrambled, tree  # noqa: E402

TEXT, STILL, ALBUM, CLIP = (dict(seed=1, branches=3), dict(seed=2, branches=3, images=1), dict(seed=3, branches=2, images=2), dict(seed=4, branches=1, frames=4))


def batches(kind: str):
    """Of two processes: a picture; two pictures and a clip. Or text alone on one, so that what can be pointed at
    is on the other only."""
    packs = {"uneven": ([tree(**STILL)], [tree(**ALBUM), tree(**CLIP)]), "text": ([tree(**TEXT)], [tree(**CLIP), tree(**STILL)])}[kind]
    return [collate([pack], "paper", multiple=2) for pack in packs]


def backward(model, some, divisor) -> float:
    """Their loss, and its gradient in the parameters."""
    total = 0.0
    for batch in some:
        losses = model.losses(batch)
        loss = (sum(losses[name] for name in train.LOSSES) + train.Z_LOSS * losses["z"]) / divisor
        loss.backward()
        total += loss.item()
    return total


def step(model, optimisers):
    norms = train.clip(train.parts_of(model), 0.0, 0)
    train.update(optimisers, dict.fromkeys(train.PARTS, 0.1))
    return norms


@torch.no_grad()
def same(found: dict, expected: dict, what: str, tolerance: float = 1e-6):
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())}"
    for name, value in expected.items():
        worst = float((parallel.full(found[name]) - value).abs().max()) / max(float(value.abs().max()), 1e-3)
        assert worst < tolerance, f"{what}: {name} differs by {worst:.1e} of its scale"


def equal(world: parallel.World, config, kind: str, recompute: bool = False, cut: bool = True):
    """Loss, gradients, gradient norms of the parts, and parameters after a step, in float64, where sums in another order differ by
    less than a mistake would."""
    everything = batches(kind)
    divisor = sum(float(batch.loss_weights.sum()) for batch in everything)
    alone, what = scrambled(0, config).double().train(), f"context {world.context}, {kind}"
    model = scrambled(0, config).double().train()
    parallel.shard(model, world, "cpu", recompute) if cut else parallel.replicate(model, world, "cpu")
    assert all(isinstance(p, DTensor) == cut for p in model.parameters())
    expected = backward(alone, everything, divisor)
    own = everything if world.data_size == 1 else [everything[world.data_rank]]
    loss = world.totals({"": backward(model, own, divisor / world.size)})[""] / world.size
    parallel.average(model, world)
    assert abs(loss - expected) < 1e-6 * expected, (what, loss, expected)
    gradients = lambda model: {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    same(gradients(model), gradients(alone), what)
    norms = [step(m, train.optimizers(m, "adamw" if cut else "muon")) for m in (model, alone)]  # as the presets have it
    same(*({name: torch.tensor(norm) for name, norm in n.items()} for n in norms), what)
    before = scrambled(0, config).double().state_dict()
    changes = lambda model: {name: parallel.full(p) - before[name] for name, p in model.named_parameters()}
    same(changes(model), changes(alone), f"{what}, after a step", 1e-3)  # AdamW makes the smallest gradients large, Muon the smallest singular values


def near(world: parallel.World, config, kind: str, half: bool = False):
    """In float32, as in training: the loss within 1e-5, every gradient within 1e-5 of the largest. With `half`, as on GPUs, the loss within
    a thousandth, all gradients together within 15% of their norm (they are 9% off); parameters and gradients are float32 all the same."""
    everything, alone, model = batches(kind), scrambled(0, config).train(), parallel.shard(scrambled(0, config).train(), world, "cpu", half=half)
    divisor = sum(float(batch.loss_weights.sum()) for batch in everything)
    expected = backward(alone, everything, divisor)
    own = everything if world.data_size == 1 else [everything[world.data_rank]]
    loss = world.totals({"": backward(model, own, divisor / world.size)})[""] / world.size
    parallel.average(model, world)
    assert abs(loss - expected) < (1e-3 if half else 1e-5) * expected, (kind, loss, expected)
    found = {name: parallel.full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert half or float((found[name] - value).abs().max()) < 1e-5 * largest, (kind, name)
    norm = lambda gradients: torch.stack([g.norm() for g in gradients]).norm()
    assert norm(found[name] - wanted[name] for name in wanted) < 0.15 * norm(wanted.values())


def check_equal():
    with parallel.together("cpu", 2) as (shared, _):
        apart = replace(shared, context=1, group=None)
        past = replace(CONFIG, temporal=TemporalConfig(mode="attention", width=32, heads=4))
        for world in (apart, shared):
            equal(world, CONFIG, "uneven")
            equal(world, CONFIG, "text", recompute=True)
            equal(world, CONFIG, "text", cut=False)
            equal(world, past, "text")
            near(world, CONFIG, "uneven")
            near(world, CONFIG, "text")
            near(world, CONFIG, "uneven", half=True)
            near(world, CONFIG, "text", half=True)
        one_head = replace(CONFIG, llm=replace(CONFIG.llm, kv_heads=1))
        equal(shared, one_head, "uneven")


def check_grid():
    """Four processes: two groups, each of two that share a batch."""
    with parallel.together("cpu", 2) as (world, _):
        assert (world.data_size, world.context) == (2, 2)
        first, second = batches("uneven")
        assert world.agree(first) is first
        for other in (second, replace(first, crops=first.crops + 1), replace(first, tokens=first.tokens.flip(1))):
            try:
                world.agree(first if world.rank % 2 else other)
                raise AssertionError("different batches went unseen")
            except ValueError as error:
                assert "different batches" in str(error)
        equal(world, CONFIG, "uneven")
        equal(world, CONFIG, "text", cut=False)


def check_resize(source: str, target: str):
    """Goes on from `source`, if there is such a checkpoint, else from nothing with one step; saves in `target`, prints what each
    moment amounts to, what the next batch costs and what it costs after a step on it."""
    with parallel.together("cpu", 1) as (world, _):
        source, target = Path(source), Path(target)
        state = weights.load_training(source / "checkpoint")
        model = weights.load(source / "checkpoint")[0].train() if state else scrambled(0).train()
        model = parallel.shard(model, world, "cpu")
        optimisers = train.optimizers(model, "adamw")
        run = lambda folder: train.Run(model, TOKENIZER, None, {}, None, train.Log(folder, silent=True), [], world)
        if state:
            train.restore(model, optimisers, state, run(source))
        else:
            backward(model, [batches("uneven")[world.rank]], 1.0)
            step(model, optimisers)
        run(target).save(model, optimisers, 1, {"next": [world.rank], "pool": []})
        names = {p: name for name, p in model.named_parameters()}
        said = {f"{names[p]} {key}": float(parallel.full(x).double().square().sum())
                for optimiser in optimisers for p, values in optimiser.state.items() for key, x in values.items()}
        for when in ("before", "after"):
            said[f"loss {when}"] = backward(model, [batches("text")[1]], 1.0)  # the same in every process
            step(model, optimisers)
        if world.rank == 0:
            print(json.dumps(said))


def halved(**changes):
    """From now on the preset `tiny` has half of its blocks."""
    tiny = train.PRESETS["tiny"]
    train.PRESETS["tiny"] = replace(tiny, vit=replace(tiny.vit, layers=3), llm=replace(tiny.llm, layers=2), **changes)


def size(model: Molmo) -> float:
    """Of all parameters together: in place of the figures of an evaluation."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def check_train(model: str, vit_steps: str, dies: str, *words: str):
    """train.py on a small mixture, its model "whole" in every process or in "shards", `vit_steps` steps of which teach the ViT alone;
    process 1 ends without a word after so many steps, or, if that number is negative, is asked to stop (0: neither)."""
    steps = 0
    train.LIGHT = ("tiny",) if model == "whole" else ()
    halved(optimizer="adamw")  # as all models that are cut

    def counted(*given):
        nonlocal steps
        update(*given)
        steps += 1
        if steps == abs(int(dies)) and os.environ.get("RANK") == "1":
            os._exit(9) if int(dies) > 0 else signal.raise_signal(signal.SIGTERM)

    update, train.update = train.update, counted
    train.evaluate = lambda model, tokenizer, records: ({"f1": size(model)}, [])
    train.STAGES["tiny", 2] = replace(train.TINY[3], packs=2, tokens=512, rates={"image points": 8, "text": 2}, pool=2, branches=2,
                                      watch=("stills",), vit_steps=int(vit_steps))
    train.main(["--stage", "2", "--workers", "0", *words])


def small_run(*words: str):
    """train.py with four small steps of the ViT alone and eighteen of the model, and a checkpoint after every second."""
    halved()
    train.STAGES["tiny", 2] = replace(train.STAGES["tiny", 2], packs=1, tokens=600, pool=4, branches=2, vit_steps=4, watch=())
    train.VIT_BATCH = 2
    train.main(["--stage", "2", "--steps", "18", "--workers", "1", "--save-every", "2", *words])


def killed_in_a_save(*words: str):
    """`small_run`, whose fourth save ends in the middle of its largest file: the system kills program and worker."""
    saved = []

    def savez(path: Path, **arrays: np.ndarray):
        whole = io.BytesIO()
        real(whole, **arrays)
        saved.append(path)
        with open(path, "wb") as file:
            file.write(whole.getvalue() if len(saved) < 8 else whole.getvalue()[:99_999])  # two files a save
        if len(saved) == 8:
            os.killpg(0, signal.SIGKILL)

    real, np.savez = np.savez, savez
    small_run(*words)


def killed_after(steps: str, seconds: str, *words: str):
    """`small_run`, program and worker of which the system kills so long after so many steps."""
    done = 0

    def counted(*given):
        nonlocal done
        update(*given)
        done += 1
        if done == int(steps):
            threading.Timer(float(seconds), os.killpg, (0, signal.SIGKILL)).start()

    update, train.update = train.update, counted
    small_run(*words)


def broken(*words: str):
    """`small_run` with a mistake in the program: its sixth step fails as nobody expects."""
    steps = iter(range(5))
    update, train.update = train.update, lambda *given: (next(steps), update(*given))
    small_run(*words)


def check(name: str, *words: str):
    {"equal": check_equal, "grid": check_grid, "resize": check_resize, "train": check_train}[name](*words)


torch.set_num_threads(1)
if __name__ == "__main__":
    check(*sys.argv[1:])
