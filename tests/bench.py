"""How fast this machine is, and how near the code comes to it: everything that is compared is measured side by side.

    python tests/bench.py infer            # reading and writing, against `transformers` and against the machine's limits;
                                           # on a GPU first writing with the 8B model's sizes
    python tests/bench.py infer --quick    # fewer repetitions, no compilation
    python tests/bench.py train            # a packed step, attention by length; on a GPU blocks of the 8B model
    python tests/bench.py video [FILE]     # from a file to crops

Weights are random, sizes those of the preset `small` unless it says otherwise; times are medians of repetitions that take turns. Other programs that run
at the same time spoil what uses all cores.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import bench_train  # noqa: E402
import bench_video  # noqa: E402
import command  # noqa: E402
import data  # noqa: E402
import synthetic  # noqa: E402
import weights  # noqa: E402
from attention import compilations, set_cuda_numerics  # noqa: E402
from costs import Work, flops  # noqa: E402
from generate import Speed, bandwidth, generate, step_bytes, to_int8  # noqa: E402
from model import PRESETS, Batch, Molmo, MolmoConfig  # noqa: E402
from packing import collate  # noqa: E402
from preprocess import Views, video_views  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

TOKENIZER = Tokenizer.load(Path(__file__).resolve().parent.parent / "assets/tokenizer.json")
SMALL = PRESETS["small"]
FRAMES, WRITTEN = 8, 65               # of the one question: frames of its clip, tokens of its answer (the first ends the prefill)
SHARED_FRAMES, QUESTIONS, SHORT = 16, 16, 33  # of the many: frames, how many, tokens of each answer


def turns(repetitions: int, measures: dict[str, Callable[[], dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Measures that take turns -> of each the medians of what it gave; once before for warmth."""
    found: dict[str, list] = {name: [] for name in measures}
    for turn in range(repetitions + 1):
        for name, measure in measures.items():
            figures = measure()
            if turn:
                found[name].append(figures)
    return {name: {key: statistics.median(f[key] for f in figures) for key in figures[0]} for name, figures in found.items()}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# infer


def never_ends(logits: torch.Tensor) -> int:
    """The likeliest token but the one that ends a turn: answers of equal length."""
    return int(logits.index_fill(0, torch.tensor(TOKENIZER.eos_id, device=logits.device), float("-inf")).argmax())


def clip(frames: int) -> Views:
    scene = synthetic.clip(0, 0, seconds=8)
    return video_views(list(scene.frames)[:frames], scene.times[:frames], SMALL.views)


def asked(questions: list[str], frames: int) -> Batch:
    return collate([data.prompts(TOKENIZER, clip(frames), questions)])


def ours(model: Molmo, batch: Batch, tokens: int, mode: str = "views") -> dict[str, float]:
    speed = Speed()
    generate(model, batch, data.control_tokens(TOKENIZER), tokens, lambda: never_ends, speed, mode)
    return {"prefill": speed.prompt / speed.prefill, "decode": speed.written / speed.decode, "read": speed.read / speed.decode}


def theirs(model, inputs: dict, tokens: int) -> dict[str, float]:
    """The `transformers` library: prefill is an answer of one token, decoding what a longer one takes more."""
    length = inputs["input_ids"].shape[1]
    write = lambda n: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        one, many = seconds(lambda: write(1)), seconds(lambda: write(tokens))
    return {"prefill": length / one, "decode": (tokens - 1) / (many - one)}


def memory_speed(model: Molmo) -> dict[str, float]:
    """Bytes a second, of the model's own matrices one after the other: `read`, each added up, which is the most that memory gives;
    `multiplied`, each times a vector by the library that multiplies matrices."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [torch.ones(p.shape[1], dtype=p.dtype) for p in matrices]
    ways = {"read": lambda: [a.sum() for a in matrices], "multiplied": lambda: [torch.mv(a, x) for a, x in zip(matrices, vectors)]}
    with torch.inference_mode():
        return {name: sum(p.nbytes for p in matrices) / statistics.median(seconds(way) for _ in range(9)) for name, way in ways.items()}


def matrix_matrix() -> dict[str, float]:
    """FLOPs a second, of a product as large as those of the ViT."""
    a, b = torch.ones(1458, SMALL.vit.width), torch.ones(SMALL.vit.mlp_hidden, SMALL.vit.width)
    with torch.inference_mode():
        return {"flops": 2 * a.numel() * len(b) / statistics.median(seconds(lambda: a @ b.T) for _ in range(9))}


def reference_folder(folder: Path) -> None:
    """A random Molmo2 of the `transformers` library with the sizes of `small`."""
    import differ
    v, t = SMALL.vit, SMALL.llm
    sizes = dict(crop=SMALL.views.crop_size, patch=v.patch_size, vit=(v.width, v.layers, v.heads, v.mlp_hidden), taps=v.taps,
                 pool=SMALL.connector.heads, mlp=SMALL.connector.mlp_hidden, width=t.width, layers=t.layers, heads=t.heads,
                 kv_heads=t.kv_heads, head=t.head_width, hidden=t.mlp_hidden)
    differ.save_reference(differ.reference(sizes=sizes), folder)


def their_inputs(model: Molmo, batch: Batch) -> dict:
    import differ
    inputs = differ.reference_inputs(model, batch, differ.grids(clip(FRAMES), model), video=True)
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def load_theirs(folder: Path):
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import Molmo2ForConditionalGeneration
    return Molmo2ForConditionalGeneration.from_pretrained(folder).eval()


def peak(who: str, folder: str) -> None:
    """In a process of its own: one answer, then its peak memory in bytes on stdout."""
    batch = asked(["How many red cups are there?"], FRAMES)
    model, _ = weights.load(folder)
    if who == "theirs":
        inputs = their_inputs(model, batch)
        del model
        theirs(load_theirs(Path(folder)), inputs, WRITTEN)
    else:
        ours(to_int8(model) if who == "int8" else model, batch, WRITTEN)
    if (status := Path("/proc/self/status")).exists():  # (ru_maxrss begins with that of the process that started this one)
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024)
    else:
        import resource  # not on Windows
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def peaks(folder: Path, *who: str) -> dict[str, int]:
    run = lambda name: subprocess.run([sys.executable, __file__, "peak", name, str(folder)], capture_output=True, text=True, check=True)
    return {name: int(run(name).stdout.split()[-1]) for name in who}


def many(model: Molmo) -> dict[str, float]:
    """Sixteen questions about one clip: as a tree, and one by one."""
    questions = [f"How many {thing} are there?" for thing in ("cups", "boxes", "rings", "red things") * (QUESTIONS // 4)]
    tree, alone = asked(questions, SHARED_FRAMES), [asked([question], SHARED_FRAMES) for question in questions]
    return {"tree": seconds(lambda: ours(model, tree, SHORT)),
            "one by one": seconds(lambda: [ours(model, batch, SHORT) for batch in alone])}


def of_the_limit(config: MolmoConfig, device: str, eight: bool, modes: tuple[str, ...], repetitions: int) -> list[tuple[str, float, str]]:
    """One answer of a model of these sizes in bfloat16, or with the language model's weights in eight bits, by modes of its steps
    (`generate.TreeDecoding`), against what the device's memory moves: rows of name, tokens a second, the rest of the line."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Molmo(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    model = to_int8(model) if eight else model
    batch, limit, rows = asked(["How many red cups are there?"], FRAMES).to(device), bandwidth(torch.device(device)), []
    for mode in modes:
        figures = turns(repetitions, {mode: lambda: ours(model, batch, WRITTEN, mode)})[mode]
        rows.append((f"decode, {'int8' if eight else 'bfloat16'}, {mode}", figures["decode"], f"tokens/s, {figures['read'] / limit:.0%} of {limit / 1e9:.0f} GB/s"))
    return rows


def infer(args: argparse.Namespace) -> None:
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, sizes of molmo2-8b")
        for eight in (False, True):
            for name, value, unit in of_the_limit(PRESETS["molmo2-8b"], "cuda", eight, ("views", "compiled"), 3):
                print(f"{name:32}{value:10.1f} {unit}")
        print(f"graphs compiled: {compilations()}\nthe CPU:")
    if find_spec("transformers") is None:
        raise ValueError("the comparison needs the package transformers: pip install -r requirements-dev.txt")
    repetitions = 3 if args.quick else 7
    batch = asked(["How many red cups are there?"], FRAMES)
    with tempfile.TemporaryDirectory() as folder:
        reference_folder(Path(folder))
        model, other = weights.load(folder)[0], load_theirs(Path(folder))
        small8, inputs = to_int8(weights.load(folder)[0]), their_inputs(model, batch)
        measures = {"machine": lambda: memory_speed(model) | matrix_matrix(), "ours": lambda: ours(model, batch, WRITTEN),
                    "theirs": lambda: theirs(other, inputs, WRITTEN), "int8": lambda: ours(small8, batch, WRITTEN)}
        if not args.quick:
            first = seconds(lambda: ours(model, batch, 3, "compiled"))
            measures |= {"compiled": lambda: ours(model, batch, WRITTEN, "compiled"),
                         "int8, compiled": lambda: ours(small8, batch, WRITTEN, "compiled")}
        found = turns(repetitions, measures)
        memory = peaks(Path(folder), "ours", "int8", "theirs")
    found["many"] = many(Molmo(SMALL).initialize(0).eval())
    machine, mine, its = found["machine"], found["ours"], found["theirs"]
    read = mine["read"] / mine["decode"]  # bytes a token
    limit = machine["read"] / read
    mfu = sum(flops(SMALL, Work.of(model, batch)).values()) * mine["prefill"] / batch.tokens.shape[1] / machine["flops"]
    eight = f", weights {step_bytes(small8) / 1e6:.0f} MB instead of {step_bytes(model) / 1e6:.0f}"
    ways = [("decode", "ours", ""), ("decode, int8", "int8", eight)]
    if not args.quick:
        ways += [("decode, compiled", "compiled", f"; first answer {first:.0f} s, {compilations()} graphs compiled for both"),
                 ("decode, int8, compiled", "int8, compiled", eight)]
    rows = [("reading", machine["read"] / 1e9, "GB/s"), ("matrix x vector", machine["multiplied"] / 1e9, "GB/s"), ("matrix x matrix", machine["flops"] / 1e9, "GFLOP/s"),
            ("decode, limit of the memory", limit, f"tokens/s, {read / 1e6:.0f} MB each"),
            ("decode, transformers", its["decode"], "tokens/s"),
            *((name, found[key]["decode"], f"tokens/s, {found[key]['decode'] / its['decode']:.2f} x transformers, "
               f"{found[key]['read'] / machine['read']:.0%} of the limit{rest}") for name, key, rest in ways)]
    rows += [("prefill, transformers", its["prefill"], f"tokens/s, {batch.tokens.shape[1]} tokens"),
             ("prefill", mine["prefill"], f"tokens/s, {mine['prefill'] / its['prefill']:.2f} x transformers, MFU {mfu:.0%} of matrix x matrix"),
             *((f"peak memory, {name}", size / 1e6, "MB") for name, size in memory.items()),
             (f"{QUESTIONS} questions, one by one", found["many"]["one by one"], f"s, {SHARED_FRAMES} frames, {SHORT} tokens each"),
             (f"{QUESTIONS} questions, a tree", found["many"]["tree"], f"s, {found['many']['one by one'] / found['many']['tree']:.1f} times faster")]
    for name, value, unit in rows:
        print(f"{name:32}{value:10.1f} {unit}")
    print(f"{torch.get_num_threads()} threads, {SMALL.llm.layers} blocks of {SMALL.llm.width}, ViT {SMALL.vit.layers} of {SMALL.vit.width}, float32")
    if args.json:
        Path(args.json).write_text(json.dumps(found | {"memory": memory, "limit": limit}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    with command.one_line("bench.py"):
        args = parse(argv)
        set_cuda_numerics()
        args.run(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="bench.py", description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="what", required=True, parser_class=command.Parser)
    part = parts.add_parser("infer", help="reading and writing")
    part.add_argument("--quick", action="store_true", help="fewer repetitions, no compilation")
    part.add_argument("--json", metavar="FILE", help="all figures")
    part.set_defaults(run=infer)
    part = parts.add_parser("train", help="steps and attention")
    part.add_argument("--quick", action="store_true", help="short rows")
    part.set_defaults(run=lambda args: bench_train.run(args.quick))
    part = parts.add_parser("video", help="from a file to crops")
    part.add_argument("file", nargs="?", help="default: a minute of 640x360, made for the occasion")
    part.set_defaults(run=lambda args: bench_video.run(args.file))
    part = parts.add_parser("peak", help="(of one process, for the others)")
    part.add_argument("who", choices=["ours", "int8", "theirs"])
    part.add_argument("folder")
    part.set_defaults(run=lambda args: peak(args.who, args.folder))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
