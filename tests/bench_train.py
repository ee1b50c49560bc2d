"""bench.py train: a packed step under each way to attend, and attention alone by length, side by side in one run.

MFU is the FLOPs of costs.py per second over the peak: of the data sheet for GPUs listed here, else of a large matrix product
measured in the same run. Times are medians; on a CPU they are the process's own seconds, which other programs change less.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention  # noqa: E402
import costs  # noqa: E402
import loading  # noqa: E402
import model as model_file  # noqa: E402
from attention import Dense, MaskIds, PerExample, Sparse, rope_cos_sin, rope_frequencies  # noqa: E402
from model import LOSSES, PRESETS, Block, Molmo  # noqa: E402
from packing import collate  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

REPEATS = 3
HOME = Path(__file__).resolve().parent.parent
DATA_SHEETS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOPs a second
WAYS = {"dense": Dense.of, "per example": PerExample.of, "sparse": Sparse.of}


def seconds(work, device: str) -> float:
    """Median over some runs, after one to warm up."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    taken = []
    for _ in range(REPEATS + 1):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return median(taken[1:])


def peak(device: str) -> float:
    """FLOPs a second that the machine could do."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return next((flops for chip, flops in DATA_SHEETS.items() if chip in name), float("nan"))
    x = torch.randn(2048, 2048)
    return 2 * 2048**3 / seconds(lambda: x @ x, device)


def memory(work, device: str) -> str:
    """The most that the work needs on top of what is there, on a GPU."""
    if device != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:8.2f} GiB"


def packed_step(device: str, room: int, top: float):
    """Forward and backward of 16 examples in one pack: with one dense mask, and without what the mask leaves out."""
    tiny = PRESETS["tiny"]  # its crops of 9x9 patches: sixteen pictures fit into a pack
    config = replace(PRESETS["small"], views=tiny.views, vit=replace(PRESETS["small"].vit, grid=tiny.vit.grid))
    tokenizer = Tokenizer.load(HOME / "assets/tokenizer.json")
    rates, each = {"image points": 1.0, "video points": 1.0}, room // 16
    mixture, trees, number = loading.Mixture(loading.synthetic_sets(rates, 0, 6), rates, 0, tokenizer, config, each), [], 0
    while len(trees) < 16:
        tree, number = mixture[number][1], number + 1
        if not isinstance(tree, str) and tree.length > 0.8 * each:
            trees.append(tree)
    batch, model = collate([trees], multiple=128 if device == "cuda" else 1).to(device), Molmo(config).initialize(0).to(device)
    flops, tokens = costs.training_flops(config, costs.Work.of(model, batch)), int((batch.example_ids >= 0).sum())
    print(f"a step on 16 examples in a pack of {batch.tokens.shape[1]} tokens and {len(batch.crops)} crops, the model of preset small")

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = model.losses(batch)
        sum(losses[name] for name in LOSSES).backward()
        model.zero_grad()

    unit = "s" if device == "cuda" else "CPU s"
    found, ways = {}, ("dense", "sparse" if device == "cuda" else "per example")
    for way in ways:
        with mock.patch.object(model_file, "make_mask", WAYS[way]):
            found[way] = seconds(step, device)
            print(f"  {way:12}{found[way]:8.3f} {unit}   {tokens / found[way]:8.0f} tokens/s   MFU {flops / found[way] / top:6.1%}  {memory(step, device)}")
    print(f"  {found[ways[0]] / found[ways[1]]:.2f} times")


def forget_compiled() -> None:
    """So that what is compiled next is made for its own length: from the second length on it would be for any."""
    torch._dynamo.reset()
    attention.compiled.cache_clear()


def attention_by_length(device: str, lengths):
    """Attention alone, forward and backward, heads as in the 8B model; packs of four examples."""
    heads, kv_heads, width = (32, 8, 128) if device == "cuda" else (8, 4, 64)
    print(f"attention by length, {heads} heads, {kv_heads} key heads of {width}, four examples in a pack")
    for length in lengths:
        forget_compiled()
        order = torch.arange(length, device=device)[None]
        ids = MaskIds(order * 4 // length, torch.zeros_like(order), order, order % 10 > 2)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        q, k, v = (torch.randn(1, n, length, width, device=device, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads))
        for way in ("dense", "sparse") if device == "cuda" else ("dense", "per example"):
            if way == "dense" and length > 16_384:
                continue
            mask = WAYS[way](ids)
            work = lambda: mask.attend(q, k, v).sum().backward()
            print(f"  {length:6} tokens  {way:12}{1000 * seconds(work, device):10.1f} ms  {memory(work, device)}")


def blocks_of_8b(length: int, top: float, device: str, layers: int = 8, **sizes):
    """MFU of a packed step through decoder blocks of the 8B model (or of other sizes), which keep their inputs only."""
    config = replace(PRESETS["molmo2-8b"].llm, layers=layers, dropout=0.0, **sizes)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    blocks = [Block(config, layer).to(device, dtype) for layer in range(layers)]
    for p in (p for block in blocks for p in block.parameters()):
        torch.nn.init.normal_(p, 0, 0.02)
    order = torch.arange(length, device=device)[None]
    ids = MaskIds(order * 4 // length, torch.zeros_like(order), order, order % 10 > 2)
    turned = rope_cos_sin(order[..., None], rope_frequencies(config.head_width, config.rope_theta, device), dtype=dtype)
    mask = Sparse.of(ids) if device == "cuda" else PerExample.of(ids)
    x = torch.randn(1, length, config.width, device=device, dtype=dtype, requires_grad=True)

    def step():
        h = x
        for block in blocks:
            h = torch.utils.checkpoint.checkpoint(block, h, turned, mask, None, None, use_reentrant=False)
        h.sum().backward()

    each, visual = length / 4, int((order % 10 > 2).sum()) / 4
    work = costs.Work(0, 0, 9, length, 4 * costs.seen(each, visual), 0)
    flops = 3 * costs.flops(replace(PRESETS["molmo2-8b"], llm=config), work)["llm"]
    print(f"{layers} blocks of {config.width}, {length} tokens: MFU {flops / seconds(step, device) / top:.1%} {memory(step, device)}")


def run(quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    top = peak(device)
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}: peak {top / 1e12:.3f} TFLOP/s")
    packed_step(device, 2048 if quick else 4096, top)
    attention_by_length(device, (512, 1024) if quick else (4096, 8192, 16_384, 36_864) if device == "cuda" else (1024, 2048, 4096))
    if device == "cuda":
        start, before = time.perf_counter(), attention.compilations()
        forget_compiled()
        blocks_of_8b(16_384, top, device)
        print(f"{time.perf_counter() - start:.0f} s with compilation; graphs compiled: {attention.compilations() - before}")

