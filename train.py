"""Training, top to bottom.

    python train.py --stage 1                                  # images, from random weights
    python train.py --stage 2 --init runs/stage1/checkpoint    # adds video, tracking, screens, words
    python train.py --stage 3 --init runs/stage2/checkpoint    # longer videos
    python train.py --stage 4 --init assets/tiny --temporal attention    # VideoMolmo: frame by frame, with a temporal module
    python train.py --stage 2 --resume                         # goes on where a run of stage 2 was stopped or killed
    python train.py --stage 2 --init assets/tiny --data mine.jsonl --steps 500    # your own points (records.py has the format)
    torchrun --nproc-per-node 8 train.py --stage 3 --preset molmo2-8b --init FOLDER --context-parallel 8    # parallel.py
    python train.py --stage 2 --preset molmo2-8b --plan 64     # what that takes on 64 GPUs

Writes a run folder: metrics.jsonl (a line per step and per evaluation), curves.png, and a checkpoint for
`infer.py --checkpoint` that also holds all that --resume needs: on the CPU a resumed run repeats the uninterrupted one
bit for bit. SIGTERM and Ctrl-C finish the step, save and end with status 0. (Under torchrun the status is not 0, and processes
that still run after 30 s are killed: TORCH_ELASTIC_SHUTDOWN_TIMEOUT is that number of seconds.)
"""

import argparse
import json
import math
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import costs
import command
import data
import loading
import parallel
import weights
from attention import compilations, set_cuda_numerics
from connector import TEMPORAL
from evaluate import evaluate, fresh
from model import LOSSES, POINTS_AS, PRESETS, Batch, Molmo, MolmoConfig
from muon import Muon
from packing import WEIGHTS, Packer
from parallel import World
from records import Lines
from tokenizer import Tokenizer

PARTS = ("vit", "connector", "llm", "point")
LIGHT = ("tiny", "small")  # presets that need no care for memory: whole in every process, all activations kept
SMALL_EVALUATION = 40  # records of each set
FORMAT = 9             # what the loader's numbers mean: a run of another format cannot be resumed
Z_LOSS = 1e-4          # weight of the squared log-normaliser of the head, which keeps it from drifting
VIT_BATCH, VIT_LR, VIT_WARMUP = 10, 3e-3, 20  # of the ViT alone: scenes a step, peak rate, steps


# ---------------------------------------------------------------------------------------------------------------------
# 1. The stages: one row for each preset and stage


@dataclass(frozen=True)
class Stage:
    steps: int
    packs: int                   # a step, of all devices
    tokens: int                  # of a pack, at most
    crops: int                   # of a pack, at most
    frames: int                  # of a video, at most
    rates: dict[str, float]      # data.CATEGORIES, or single sets -> share of the examples
    weights: str                 # of loss tokens: packing.WEIGHTS
    lr: dict[str, float]         # per part; new token embeddings go with the connector
    warmup: dict[str, int]       # steps, per part
    watch: tuple[str, ...] = ()  # sets of the small evaluations
    vit_steps: int = 0           # steps that teach the ViT alone to see, before the whole model trains
    vit_scenes: tuple[str, ...] = ("stills", "screens", "clips", "screens", "tracks")  # what it sees there, in turn (loading.PatchSet)
    pool: int = 48               # examples that wait to be packed
    branches: int = 10           # questions about a synthetic record
    more: dict[str, float] = field(default_factory=dict)  # ways of asking that are more or less frequent than in the synthetic mixtures
    vit_frozen_steps: int = 0    # of the whole model, if the data are synthetic
    image_crops: int | None = None  # of an image in training; None: as in inference
    drop_responses_only: bool = False  # dropout acts on what the model learns to say


def per_part(*values):
    return dict(zip(PARTS, values))


# Learning rates of ViT, connector, LLM, pointing head. (Molmo2, MolmoPoint; the LLM's of stage 1 is that of the released script,
# the paper prints 2e-4.)
#         steps, packs, tokens, crops, frames, rates, weights, lr and warm-up of (ViT, connector, LLM, point), watch
RELEASED = {
    1: Stage(32_000, 128, 2_560, 16, 1, {"image captions": 60, "image pointing": 30, "text": 10}, "uniform",
             per_part(6e-6, 2e-4, 2e-5, 1e-4), per_part(2000, 200, 2000, 200), image_crops=8, drop_responses_only=True),
    2: Stage(30_000, 128, 16_384, 128, 128, data.RATES, "paper", per_part(5e-6, 5e-6, 1e-5, 5e-6), per_part(200, 200, 200, 200),
             image_crops=8),
    3: Stage(2_000, 128, 36_864, 384, 384, data.RATES, "paper", per_part(5e-6, 5e-6, 1e-5, 5e-6), per_part(200, 200, 200, 200),
             image_crops=8),
    # VideoMolmo: 4 epochs of 72,000 frames, a frame a pack; every crop comes with those of the four frames before
    4: Stage(1_125, 256, 2_560, 160, 384, {"moments": 1.0}, "paper", per_part(5e-6, 5e-6, 1e-5, 5e-6), per_part(10, 10, 10, 10), image_crops=8,
             pool=1),
}
# If the ViT learned from points at once, it would forget what points do not need: it stays frozen until the language model reads backgrounds
# and colours. After stage 1 the connector has a low rate: nothing bounds the product of its matrices, and visual tokens much larger than what
# the blocks add are hardly changed by the blocks. In `more`, "" stands for questions without a named way of asking: captions and answers in words.
TINY = {
    1: Stage(1160, 2, 1024, 20, 16, {"stills": 95, "text": 5}, "uniform", per_part(2e-4, 2e-3, 2e-3, 2e-3), per_part(20, 20, 20, 20),
             ("stills",), vit_steps=1240, vit_scenes=("stills",), more={"none": 0.4, "": 0.5, "size": 2, "position": 1.5},
             vit_frozen_steps=1160),
    2: Stage(7200, 4, 1024, 20, 16, {"image points": 24, "multi-image points": 7, "screens": 13, "video points": 15, "arrivals": 10, "tracks": 14,
                                     "captions": 14, "image qa": 6, "video qa": 5, "text": 3}, "uniform",
             per_part(2e-4, 3e-4, 2e-3, 2e-3), per_part(20, 20, 20, 20), ("stills", "clips", "screens", "tracks"), vit_steps=10_000,
             more={"none": 1.3, "absent": 1.3, "position": 2.5, "size": 2}, vit_frozen_steps=2200),
    3: Stage(6000, 2, 2048, 40, 32, {"image points": 5, "multi-image points": 6, "screens": 16, "screen qa": 12, "video points": 5, "arrivals": 1,
                                     "tracks": 42, "captions": 30, "image qa": 3, "video qa": 7, "text": 1, "long points": 2, "long tracks": 9,
                                     "free stills": 16, "free clips": 20, "free screens": 10},
             "uniform", per_part(2e-4, 1e-4, 1.2e-3, 1.2e-3), per_part(20, 20, 20, 20), ("video points", "long points", "long tracks"),
             more={"none": 2, "absent": 1.5, "position": 2.5, "size": 2, "place": 3, "all": 3}),
    4: Stage(400, 2, 1024, 100, 32, {"moments": 1.0}, "uniform", per_part(2e-4, 8e-4, 8e-4, 8e-4), per_part(20, 20, 20, 20),
             ("moments",), branches=5),
}
# Crops of 27x27 patches: an image of the synthetic worlds is two of them and 400 tokens. (Not yet trained: that needs a GPU.)
SMALL = {n: replace(TINY[n], packs=packs, tokens=tokens, crops=crops)
         for n, packs, tokens, crops in ((1, 8, 2560, 32), (2, 8, 4096, 64), (3, 4, 8192, 128), (4, 4, 4096, 320))}
POINT = RELEASED | {2: replace(RELEASED[2], steps=22_000, packs=160)}
GUI = POINT | {n: replace(POINT[n], image_crops=48) for n in (2, 3)}
VID = RELEASED | {n: replace(RELEASED[n], steps=steps, packs=64, rates={"video pointing": 1.0}) for n, steps in ((2, 6_000), (3, 800))}
TABLES = {"tiny": TINY, "small": SMALL, "molmo2-4b": RELEASED, "molmo2-8b": RELEASED, "molmo2-o-7b": RELEASED,
          "molmopoint-8b": POINT, "molmopoint-gui-8b": GUI, "molmopoint-vid-4b": VID}
STAGES = {(preset, n): stage for preset, table in TABLES.items() for n, stage in table.items()}


def usual_workers() -> int:
    """Half of the cores that this may use, shared by the training processes of the machine; at most eight each beside a GPU, else four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return max(1, min(share, 8 if torch.cuda.is_available() else 4))


def parse(argv: list[str] | None):
    parser = command.Parser(prog="train.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), required=True,
                        help="1: images; 2: adds video, tracks, screens, captions; 3: longer videos; 4: single frames with those before them (VideoMolmo)")
    parser.add_argument("--preset", default="tiny", choices=sorted({name for name, _ in STAGES}),
                        help="size of the model, and its rows of the stage table (default: %(default)s)")
    parser.add_argument("--points-as", choices=POINTS_AS, help="how the model writes points (default: as the checkpoint or the preset does)")
    parser.add_argument("--causal", action="store_true", help="visual tokens do not see later ones: an ablation (default: as the checkpoint has it, else they do)")
    parser.add_argument("--init", help="checkpoint to start from: of the stage before, assets/tiny, or a folder of released weights "
                                       "(default: runs/stage<N-1>/checkpoint if there is one and no --out; else stages 1 and 2 begin with random weights)")
    parser.add_argument("--data", nargs="+", metavar="FILE.jsonl",
                        help="train on these files instead of the stage's synthetic sets; several get shares by the square roots of their lengths. "
                             "The ViT is then neither trained alone first nor frozen, and nothing is evaluated: begin with --init")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the run folder, if there is one")
    parser.add_argument("--freeze", choices=PARTS, action="append", default=[], help="a part that is not trained (may be given again)")
    parser.add_argument("--temporal", choices=TEMPORAL, help="another temporal module (default: what the checkpoint has)")
    parser.add_argument("--temporal-init", choices=("zero", "xavier"), help="of a new module (default: zero)")
    parser.add_argument("--missing", choices=("black", "masked"), help="with --temporal: what stands for frames before the first (default: as the checkpoint has it, black in a new model)")
    parser.add_argument("--out", help="run folder (default: runs/stage<N>)")
    parser.add_argument("--steps", type=command.number(int, 1, 10**9), help="training steps, and at most as many of the ViT alone (default: the stage's)")
    parser.add_argument("--loss-weights", choices=sorted(WEIGHTS), help="of the tokens (packing.py; default: the stage's)")
    parser.add_argument("--accumulate", type=command.number(int, 1, 10**6),
                        help="parts of a step, for less memory (default: 1; for the large presets, one pack per process at a time)")
    parser.add_argument("--seed", type=command.number(int, 0, 10_000), default=0,
                        help="of new weights, of what is drawn and in which order, and of dropout (default: %(default)s)")
    parser.add_argument("--eval-every", type=command.number(int, 1, 10**9), default=400, help="steps between small evaluations (default: %(default)s)")
    parser.add_argument("--save-every", type=command.number(int, 1, 10**9), default=200, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--workers", type=command.number(int, 0, 256), default=usual_workers(),
                        help="processes that draw scenes or read files, of each training process (here: %(default)s)")
    parser.add_argument("--context-parallel", type=command.number(int, 1, 1024), default=1, metavar="C",
                        help="C processes share every batch, each with a part of its tokens (torchrun)")
    parser.add_argument("--plan", type=command.number(int, 1, 10**6), metavar="GPUS", help="print the estimated memory and time of the stage on so many H100s, and end")
    parser.add_argument("--device", type=command.device, default="usual",
                        help="cpu, cuda or mps (default: cuda if there is one, else cpu)")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The optimisers: every part has its own learning rate, warm-up and gradient norm


def part_of(name: str) -> str:
    if "new_embedding" in name:
        return "connector"
    top = name.split(".")[0]
    return {"vit": "vit", "connector": "connector", "point_predictor": "point"}.get(top, "llm")


def parts_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    parts = {part: {n: p for n, p in model.named_parameters() if part_of(n) == part} for part in PARTS}
    assert sum(map(len, parts.values())) == len(list(model.parameters())), "every parameter belongs to one part"
    return parts


def is_table(name: str) -> bool:
    """Word embeddings, positions and the head: rows that are looked up, not matrices that mix channels."""
    return name.startswith(("wte", "lm_head", "probe")) or name == "vit.positional_embedding"


def optimizers(module: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    """AdamW as in the papers (no weight decay); with "muon", the matrices inside the network go to Muon, scaled so that
    one learning rate serves both."""
    adamw, muon = [], []
    for part, params in parts_of(module).items():
        matrices = {n for n, p in params.items() if kind == "muon" and p.dim() == 2 and not is_table(n)}
        adamw.append({"params": [p for n, p in params.items() if n not in matrices], "part": part})
        muon.append({"params": [p for n, p in params.items() if n in matrices], "part": part})
    made = [torch.optim.AdamW([g for g in adamw if g["params"]], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)]
    if groups := [g for g in muon if g["params"]]:
        made.append(Muon(groups))
    return made


def clip(parts: dict[str, dict[str, nn.Parameter]], loss: float, step: int, names: Callable[[], Sequence[str]] = list) -> dict[str, float]:
    """Gradients clipped to norm 1 in every part; -> the norms before. ValueError, with the names of the batch's
    examples, if anything is not finite."""
    learned = {part: [p for p in params.values() if p.requires_grad] for part, params in parts.items()}
    norms = {part: parallel.full(nn.utils.clip_grad_norm_(params, 1.0)).item() for part, params in learned.items() if params}
    if not all(map(math.isfinite, [loss, *norms.values()])):
        raise ValueError(f"step {step}: loss {loss}, gradient norms {norms}: stopped before the step"
                         + (f"; in the batch: {', '.join(named)}" if (named := names()) else ""))
    return norms


def update(optimisers: list[torch.optim.Optimizer], rates: dict[str, float]):
    """One step of every optimiser at these rates per part; gradients are gone afterwards."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rates[group["part"]]
        optimiser.step()
        optimiser.zero_grad()


def schedule(peak: float, warmup: int, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine to a tenth of it."""
    done = (step + 1 - warmup) / max(steps - warmup, 1)
    return peak * ((step + 1) / warmup if done < 0 else 0.55 + 0.45 * math.cos(math.pi * done))


def learning_rates(stage: Stage, step: int) -> dict[str, float]:
    return {part: schedule(stage.lr[part], stage.warmup[part], step, stage.steps) for part in PARTS}


# ---------------------------------------------------------------------------------------------------------------------
# 3. The log: one JSON line per event, and a picture


class Log:
    def __init__(self, folder: Path, step: int | None = None, silent: bool = False):
        """A new metrics.jsonl, or the old one up to `step`, where a resumed run goes on. `silent`: another process writes."""
        self.folder, self.lines, self.silent, self.start = folder, [], silent, time.time()
        if silent:
            return
        path = folder / "metrics.jsonl"
        for text in path.read_text().splitlines() if step is not None and path.exists() else ():
            try:
                line = json.loads(text)
                if line["step"] < step:
                    self.lines.append(line)
            except (ValueError, KeyError, TypeError):
                pass  # a kill may cut the last
        self.start = time.time() - (self.lines[-1]["seconds"] if self.lines else 0)
        with command.atomic_write(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(path, "a")

    def write(self, **values):
        if self.silent:
            return
        line = {"seconds": round(time.time() - self.start, 1)} | values
        self.lines.append(line)
        print(json.dumps(line), file=self.file, flush=True)

    def evaluated(self, step: int) -> bool:
        return any(line["step"] == step and "loss" not in line for line in self.lines)

    def say(self, text: str):
        if not self.silent:
            tqdm.write(text)

    def draw(self):
        """curves.png: on the left the losses (log scale), on the right F1, HOTA and, of the ViT alone, the shares of patches named and of
        screen elements read right; steps below 0 are the ViT's."""
        if self.silent:
            return
        width, height = 480, 320
        sheet = Image.new("RGB", (2 * width, height), "white")
        shares = ["named", "read"] + sorted({k for line in self.lines for k in line if k.endswith((" f1", " hota"))})
        for x, names, scale in ((0, ["naming", "loss", *LOSSES], lambda v: math.log10(max(v, 1e-3))), (width, shares, float)):
            title = "log10 " if scale is not float else ""
            curves = {title + n: thinned([(line["step"], scale(line[n])) for line in self.lines if n in line]) for n in names}
            plot(sheet, x, width, height, curves)
        with command.atomic_write(self.folder / "curves.png") as part:
            sheet.save(part)


def thinned(curve: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbours, so that noise does not hide the trend."""
    size = -(-len(curve) // most)
    return [tuple(map(float, np.mean(curve[i:i + size], axis=0))) for i in range(0, len(curve), size or 1)]


def plot(sheet: Image.Image, left: int, width: int, height: int, curves: dict[str, list[tuple[float, float]]]):
    colors = ("black", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf")
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return
    draw, top = ImageDraw.Draw(sheet), 14 * len(curves) + 10
    (first, last), (low, high) = ((min(values), max(values)) for values in zip(*points))

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - low) / max(high - low, 1e-9)
        return left + 10 + (width - 20) * (x - first) / max(last - first, 1), height - 10 - (height - 10 - top) * up

    for row, (color, (name, curve)) in enumerate(zip(colors, curves.items())):
        draw.text((left + 10, 5 + 14 * row), f"{name} {curve[-1][1]:.3f}" if curve else name, fill=color)
        if len(curve) > 1:
            draw.line([place(*p) for p in curve], fill=color, width=2)


def small_evaluation(model: Molmo, tokenizer: Tokenizer, sets: Sequence[str], stop_signals: Sequence[int]) -> dict[str, float]:
    """The figures to watch, on a few fresh records, hence noisy by some hundredths. After a stop signal no more records are evaluated."""
    figures, shown = {}, ("precision", "recall", "f1", "hota", "count exact", "none recognised")
    for name in sets:
        records = fresh(name, SMALL_EVALUATION, model.config.views)
        result, _ = evaluate(model, tokenizer, takewhile(lambda record: not stop_signals, records))
        figures |= {f"{name} {k}": round(v, 3) for k, v in result.items() if k in shown}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# 4. Stopping and going on


@contextmanager
def stoppable():
    """Inside, SIGTERM and Ctrl-C do not end the program but are collected in the list."""
    stop_signals: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: stop_signals.append(got)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """What both phases of a run, the ViT alone and the whole model, need and keep."""

    model: Molmo
    tokenizer: Tokenizer
    stage: Stage
    settings: dict  # by which --resume knows the run
    args: argparse.Namespace
    log: Log
    stop_signals: list[int]
    world: World

    @property
    def checkpoint(self) -> Path:
        return self.log.folder / "checkpoint"

    def stops(self) -> bool:
        """Has any process got a stop signal? All of them ask together."""
        return self.world.any(bool(self.stop_signals))

    def save(self, module: nn.Module, optimisers: list[torch.optim.Optimizer], step: int, loader: dict | None = None, **more: np.ndarray):
        """A checkpoint with all that the run is besides the model's parameters; `step` is the next one."""
        names = {p: name for name, p in module.named_parameters()}
        moments = {f"{i}/{names[p]}/{key}": value for i, optimiser in enumerate(optimisers)
                   for p, values in optimiser.state.items() for key, value in values.items()}
        state = {"step": np.array(step), "settings": np.array(json.dumps(self.settings)),
                 "loaders": np.array(json.dumps(self.world.collect(loader)[::self.world.context])),
                 "rng": np.stack(self.world.collect(torch.get_rng_state().numpy()))} | more
        if next(module.parameters()).is_cuda:  # there dropout draws
            state["rng of the GPU"] = np.stack(self.world.collect(torch.cuda.get_rng_state(self.args.device).numpy()))
        if parallel.is_sharded(module):
            full_model = parallel.gather_model(self.model, self.world)
        else:  # the moments are whole in every process: they go into training.npz
            full_model = self.model
            state |= {name: value.cpu().numpy() for name, value in moments.items()}
            moments = {}
        parallel.save(self.checkpoint, moments, self.world, partial(weights.save, self.checkpoint, full_model, self.tokenizer, training=state))
        self.log.draw()


def restore(module: nn.Module, optimisers: list[torch.optim.Optimizer], state: dict[str, np.ndarray], run: Run) -> int:
    """Optimisers and random numbers as they were saved, by however many processes; -> the next step."""
    parameters, shards = dict(module.named_parameters()), run.checkpoint / "shards"
    if shards.is_dir():
        moments = parallel.load(shards, parameters)
    else:  # copied into memory that torch allocated: alignment decides in which order sums are computed, hence their last bits
        moments = {name: torch.from_numpy(array).clone() for name, array in state.items() if "/" in name}
    for name, value in moments.items():
        i, parameter, key = name.split("/")
        p = parameters[parameter]
        optimisers[int(i)].state[p][key] = value if key == "step" else parallel.placed(value, p)
    own = lambda name: torch.from_numpy(state[name][run.world.rank % len(state[name])])
    torch.set_rng_state(own("rng"))
    if next(module.parameters()).is_cuda and "rng of the GPU" in state:
        torch.cuda.set_rng_state(own("rng of the GPU"), run.args.device)
    return int(state["step"])


# ---------------------------------------------------------------------------------------------------------------------
# 5. The ViT learns to see


def pretrain_vit(run: Run, state: dict[str, np.ndarray] | None):
    """Where the papers load SigLIP 2, `tiny` and `small` train their ViT alone at the beginning of a stage: a linear layer on the
    features, thrown away afterwards, classifies every patch in five ways (`loading.PatchSet`): the kind and the colour of the thing
    at its middle, the kind of the thing whose point lies in it, the element of a screen at its middle, and the background of the
    picture. Its steps are numbered from -vit_steps up to 0, where the whole model takes over."""
    model, stage, args, world = run.model, run.stage, run.args, run.world
    probe = nn.Linear(model.config.vit.feature_width, sum(loading.PATCH_CLASSES), device=args.device)
    nn.init.zeros_(probe.weight), nn.init.zeros_(probe.bias)
    seeing = nn.ModuleDict({"vit": model.vit, "probe": probe})
    parts, optimisers, first = parts_of(seeing), optimizers(seeing, model.config.optimizer), -stage.vit_steps
    if state:
        probe.load_state_dict({key: torch.from_numpy(state[f"probe {key}"]) for key in ("weight", "bias")})
        first = restore(seeing, optimisers, state, run)
    share = -(-VIT_BATCH // world.size)  # scenes of a process in a step, rounded up
    each_step = share * world.size       # of all processes
    numbers = range((first + stage.vit_steps) * each_step, stage.vit_steps * each_step)[world.rank::world.size]
    scenes = DataLoader(loading.PatchSet(run.settings["seed"], model.config, stage.vit_scenes), share, sampler=numbers,
                        collate_fn=loading.collate_patches, **loading.in_workers(args.workers))
    bar = tqdm(scenes, initial=first + stage.vit_steps, total=stage.vit_steps, desc="the ViT alone", dynamic_ncols=True,
               disable=run.log.silent)
    for step, (crops, labels) in enumerate(bar, start=first):
        scores = probe(model.vit(crops.to(args.device))).flatten(0, 1).split(loading.PATCH_CLASSES, dim=-1)
        truth = labels.to(args.device).flatten(0, 1)
        loss = sum(F.cross_entropy(s, t, reduction="sum") for s, t in zip(scores, truth.T))
        right = torch.stack([s.argmax(-1) for s in scores], dim=-1) == truth
        sums = {"naming": loss.item(), "patches": len(truth)}
        for name, column, nothing in (("named", loading.KIND, 0), ("read", loading.ELEMENT, 0), ("background", loading.BACKGROUND, loading.UNKNOWN)):
            where = (truth[:, column] != nothing) & (truth[:, column] != loading.UNKNOWN)
            sums[name], sums[f"all {name}"] = right[where, column].sum().item(), where.sum().item()
        totals = world.totals(sums)
        (loss / totals["patches"] * world.size).backward()
        parallel.average(seeing, world)
        drawn = (step + stage.vit_steps) * each_step
        with parallel.said_once():  # by all processes alike
            clip(parts, totals["naming"], step, lambda: [f"scenes {drawn} to {drawn + each_step - 1}"])
        update(optimisers, dict.fromkeys(PARTS, schedule(VIT_LR, VIT_WARMUP, step + stage.vit_steps, stage.vit_steps)))
        line = {"naming": totals["naming"] / totals["patches"]} | {name: totals[name] / totals[f"all {name}"]
                                                                  for name in totals if totals.get(f"all {name}")}
        run.log.write(step=step, **line)
        stop = run.stops()
        if stop or (step + 1) % args.save_every == 0:
            run.save(seeing, optimisers, step + 1, **{f"probe {key}": value.cpu().numpy() for key, value in probe.state_dict().items()})
        bar.set_postfix(line)  # after saving, because it may fail: Ctrl-C may have ended the program that reads the bar, as in `| tee`
        if stop:
            run.log.say(f"stopped {-step - 1} steps before the model takes over: --resume goes on from there")
            return


# ---------------------------------------------------------------------------------------------------------------------
# 6. The run


def main(argv: list[str] | None = None):
    with command.one_line("train.py"):
        with parallel.said_once():
            args = parse(argv)
        if args.plan:
            stage = stage_of(args)
            parts = parts_of_a_step(args, stage, args.plan // args.context_parallel)
            return costs.print_plan(args.preset, PRESETS[args.preset], args.stage, stage, args.plan, args.context_parallel, parts,
                                    sharded=args.preset not in LIGHT, whole=args.steps is None)
        with parallel.together(args.device, args.context_parallel) as (world, device):
            args.device = device  # of several GPUs this process's own
            start(args, world)


def stage_of(args: argparse.Namespace) -> Stage:
    """Its row of the table, with the steps and the loss weights that are asked for."""
    stage = STAGES[args.preset, args.stage]
    return replace(stage, weights=args.loss_weights or stage.weights, steps=args.steps or stage.steps,
                   vit_steps=min(stage.vit_steps, args.steps or stage.vit_steps))


def settings_of(args: argparse.Namespace, stage: Stage) -> dict:
    """What identifies a run: --resume continues no run with other settings."""
    unused = {"steps", "watch", *(("rates", "more", "branches", "vit_steps", "vit_scenes", "vit_frozen_steps") if args.data else ())}
    row = {f"row {name}": value for name, value in asdict(stage).items() if name not in unused}
    return {"stage": args.stage, "preset": args.preset, "freeze": sorted(args.freeze), "seed": args.seed, "steps": stage.steps,
            "data": args.data, "contents of the data": [checksum(path) for path in args.data or []], "format": FORMAT,
            "temporal": args.temporal, "temporal-init": args.temporal_init, "missing": args.missing} | json.loads(json.dumps(row))


def parts_of_a_step(args: argparse.Namespace, stage: Stage, groups: int) -> int:
    """Into how many parts a step is cut, if its packs go to so many groups of processes."""
    return args.accumulate or (1 if args.preset in LIGHT else max(stage.packs // max(groups, 1), 1))


def prepare(args: argparse.Namespace, world: World):
    """-> stage, settings, state (if there is one to go on from), model, tokenizer, loader. ValueError if that cannot be."""
    stage = stage_of(args)
    accumulate = parts_of_a_step(args, stage, world.data_size)
    if stage.packs % (accumulate * world.data_size):
        raise ValueError(f"a step of this stage ({stage.packs} packs) cannot be cut into {accumulate} parts (--accumulate) "
                         f"for {world.data_size} processes")
    if not args.temporal and (args.temporal_init or args.missing):
        raise ValueError("--temporal-init and --missing go with --temporal")
    seed, folder = data_seed(args), run_folder(args)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: a file: give a folder")
    if folder.is_dir():
        with command.alone_in(folder, looking=True):
            weights.recover(folder / "checkpoint")  # a kill may have left it beside its name
    state = weights.load_training(folder / "checkpoint") if args.resume else None
    if not args.resume and (folder / "checkpoint").exists():
        raise ValueError(f"{folder} holds a run: --resume goes on with it, --out FOLDER begins another elsewhere")
    before = Path(f"runs/stage{args.stage - 1}/checkpoint")
    if state is None and not (args.init or args.out) and weights.standing(before).is_dir():
        args.init, stopped = str(before), stopped_early(before)
        if world.rank == 0:
            print(f"begins with {args.init}{stopped}: --init names another")
    if state is None and not args.init and args.stage > 2:
        raise ValueError(f"stage {args.stage} goes on from a trained model: give --init, for one assets/tiny")
    settings = settings_of(args, stage)
    if state:
        same_run(settings, json.loads(str(state["settings"])) if "loaders" in state else {}, folder)
    model, tokenizer = model_for(args, folder, state is not None)
    learn = {part for part, params in parts_of(model).items() if params} - {*args.freeze}
    if stage.vit_frozen_steps and not args.data:
        learn -= {"vit"}
    if not learn:
        raise ValueError("--freeze: nothing is left that could be trained from the first step on")
    if state is None and not args.init and (args.stage > 1 or args.data) and world.rank == 0:
        print("starts from random weights: --init FOLDER goes on from a checkpoint")
    drawn = () if args.data else [one for name in stage.rates for one in data.CATEGORIES.get(name, (name,))]
    if model.config.points_as == "tags" and (several := [name for name in drawn if name in data.SEVERAL]):
        raise ValueError(f"points as tags: they mark points in one picture, and stage {args.stage} draws {several[0]}: give --data")
    if args.temporal and not state:
        temporal = replace(model.config.temporal, mode=args.temporal, missing=args.missing or model.config.temporal.missing)
        if args.temporal_init and temporal.mode != "attention":
            raise ValueError(f"--temporal-init: {temporal.mode} has no weights that could be initialised, only attention has")
        if args.temporal_init and temporal.mode == model.config.temporal.mode:
            raise ValueError(f"--temporal-init: the checkpoint has learned {temporal.mode}, it stays")
        model = model.with_temporal(temporal, args.temporal_init or "zero", args.seed)
    if model.config.llm.heads % world.context:
        raise ValueError(f"--context-parallel {world.context}: {model.config.llm.heads} heads cannot be shared out evenly")
    if stage.frames > 1:  # a stage of images alone says nothing about videos
        model.config = replace(model.config, views=replace(model.config.views, max_frames=stage.frames))
    views = model.config.views
    views = replace(views, max_frames=stage.frames, max_crops=stage.image_crops or views.max_crops)  # crops: in training only
    loader = make_loader(stage, seed, tokenizer, replace(model.config, views=views), args, world, accumulate)
    return stage, settings, state, model.train(), tokenizer, loader


def stopped_early(checkpoint: Path) -> str:
    """" (stopped after step 300 of 1160)", if its run was. ValueError if it had not come to its first step."""
    if not (weights.standing(checkpoint) / "training.npz").is_file():
        return ""
    state = weights.load_training(checkpoint)
    if "probe weight" in state:
        raise ValueError(f"{checkpoint} was stopped while the ViT was alone: --resume goes on with that stage, --init names another checkpoint")
    try:
        step, steps = int(state["step"]), json.loads(str(state["settings"]))["steps"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{checkpoint}/training.npz is not of a training run: --init {checkpoint} takes the model alone") from None
    return f" (stopped after step {step} of {steps})" if step < steps else ""


def model_for(args: argparse.Namespace, folder: Path, resumes: bool):
    """-> model, tokenizer: of the run in the folder, of --init, or new. ValueError if they do not fit the preset."""
    preset, light = PRESETS[args.preset], args.preset in LIGHT
    if not (args.init or resumes):
        tokenizer, config = Tokenizer.load(command.HOME / "assets/tokenizer.json"), preset
        if tokenizer.base_size != config.llm.vocabulary:
            raise ValueError(f"--preset {args.preset} has a vocabulary of {config.llm.vocabulary} tokens, which comes with its "
                             "released weights: give their folder, --init FOLDER")
        if args.points_as in ("text", "tags"):  # the rest as Molmo2 has it, too
            config = replace(config, points_as=args.points_as, views=replace(config.views, low_res_pointing=True),
                             connector=replace(config.connector, output_layer=True))
        return Molmo(replace(config, bidirectional=not args.causal)).initialize(args.seed), tokenizer

    model, tokenizer = weights.load(folder / "checkpoint" if resumes else args.init)
    has, asked = model.config.points_as, args.points_as or model.config.points_as
    shape = attrgetter("llm.width", "llm.layers", "llm.vocabulary")
    wanted, own = shape(preset), shape(model.config)
    if own != wanted:
        raise ValueError(f"--preset {args.preset} is for a language model of width {wanted[0]}, {wanted[1]} layers and {wanted[2]} tokens; "
                         f"the checkpoint's has {own[0]}, {own[1]} and {own[2]}")
    if not light and (has == "tokens") != (preset.points_as == "tokens"):
        raise ValueError(f"--preset {args.preset}: the checkpoint is of the other family, it writes points as {has}")
    if has != asked and (resumes or "tokens" in (has, asked)):  # only these have a pointing head
        raise ValueError(f"--points-as {asked}: the checkpoint writes points as {has}")
    if resumes and args.causal and model.config.bidirectional:
        raise ValueError("--causal: the visual tokens of the run that --resume goes on with see each other")
    model.config = replace(model.config, points_as=asked, bidirectional=model.config.bidirectional and not args.causal)
    if not light:  # released folders are for inference: they name no dropout, or none that training had
        model.config = replace(model.config, llm=replace(model.config.llm, dropout=preset.llm.dropout))
        for block in model.blocks:
            block.dropout.p = preset.llm.dropout
    return model, tokenizer


def checksum(path: str) -> str:
    """Tells the contents of a file from others: a run goes on with the same lines only. ValueError if it cannot be read."""
    total = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total = zlib.crc32(block, total)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return f"{total:08x}"


def run_folder(args: argparse.Namespace) -> Path:
    return Path(args.out or f"runs/stage{args.stage}")


def data_seed(args) -> int:
    """Every stage draws other examples (but the ViT alone learns from those of --seed in each); all below evaluate.EVALUATION_SEED."""
    return args.stage + 100 * args.seed


def same_run(settings: dict, before: dict, folder: Path):
    """ValueError if --resume is asked to go on with another run than the one in the folder."""
    another = f"begin another with --init {folder}/checkpoint and another --out"
    if before.get("format") != settings["format"]:
        raise ValueError(f"--resume: the run in {folder} was written by an older version: {another}")
    for name, value in settings.items():
        if before.get(name, value) == value:
            continue
        if name.startswith("row "):
            raise ValueError(f"--resume: {name[4:]!r} in the stage's row has changed since the run in {folder}: {another}")
        raise ValueError(f"--resume: the run in {folder} has {name} {before[name]}, not {value}: give the same, or another --out")


def make_loader(stage: Stage, seed: int, tokenizer: Tokenizer, config: MolmoConfig, args, world: World, accumulate: int) -> loading.Loader:
    if args.data:
        files = [Lines(path) for path in args.data]
        sets, rates = {"own": [loading.Moments(lines, seed) for lines in files] if args.stage == 4 else files}, {"own": 1.0}
    else:
        sets, rates = loading.synthetic_sets(stage.rates, seed, stage.branches, stage.more), stage.rates
    mixture = loading.Mixture(sets, rates, seed, tokenizer, config, stage.tokens)
    rows = stage.packs // (accumulate * world.data_size)
    cuda = torch.device(args.device).type == "cuda"
    multiple = math.lcm(world.context, stage.tokens if cuda else 1)  # one length: one graph
    return loading.Loader(mixture, Packer(stage.tokens, stage.crops, stage.pool, world.data_size), rows, stage.weights, args.workers,
                          rank=world.data_rank, world=world.data_size, multiple=multiple, pin=cuda)


def start(args: argparse.Namespace, world: World):
    with parallel.said_once():
        set_cuda_numerics()
        stage, settings, state, model, tokenizer, loader = prepare(args, world)
        first = int(state["step"]) if state else None
        if len(set(map(json.dumps, world.collect(settings | {"first step": first})))) > 1:
            raise ValueError("the processes have different settings, or other contents of --data or of the run folder")
    torch.use_deterministic_algorithms(torch.device(args.device).type == "cpu")  # else threads add gradients in any order
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.manual_seed(settings["seed"] + 1_000_003 * world.rank)  # of dropout
    folder = run_folder(args)  # only now, with all bad input ruled out, is anything written
    folder.mkdir(parents=True, exist_ok=True)
    with command.alone_in(folder) if world.rank == 0 else nullcontext(), stoppable() as stop_signals:
        log = Log(folder, first, silent=world.rank > 0)
        run = Run(model, tokenizer, stage, settings, args, log, stop_signals, world)
        resumes = state is not None and "probe weight" in state  # was stopped while the ViT was alone
        begins = state is None and stage.vit_steps > 0 and not args.data and "vit" not in args.freeze
        if resumes or begins:
            parallel.replicate(model, world, args.device)
            pretrain_vit(run, state)
            state = None
        if not run.stops():
            if args.preset in LIGHT:
                parallel.replicate(model, world, args.device)
            else:
                parallel.shard(model, world, args.device, recompute=True, half=has_bfloat16(args.device))
            if state:
                loader.state = loading.reshard_state(json.loads(str(state["loaders"])), world.data_rank, world.data_size)
            with closing(iter(loader)) as batches:  # whatever happens, worker processes end, and the program can
                train(run, loader, batches, state)


def train(run: Run, loader: loading.Loader, batches: Iterator[Batch], state: dict[str, np.ndarray] | None):
    model, stage, args, world, parts = run.model, run.stage, run.args, run.world, parts_of(run.model)
    accumulate = stage.packs // (loader.rows * world.data_size)
    optimisers = optimizers(model, model.config.optimizer)
    first = restore(model, optimisers, state, run) if state else 0
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=f"stage {args.stage}", dynamic_ncols=True,
               disable=run.log.silent)
    started, tokens = time.time(), 0
    evaluation_due = lambda done: stage.watch and not args.data and (done == stage.steps or done % args.eval_every == 0)
    if first and evaluation_due(first) and world.any(not run.log.silent and not run.log.evaluated(first - 1)):
        watch(run, first - 1)  # the run was stopped or killed while it was evaluated
        if run.stops():
            return run.log.say(f"stopped after step {first}: --resume goes on from there")
    for step in bar:
        if step in (first, stage.vit_frozen_steps):  # the ViT may thaw in mid-run
            vit_frozen = step < stage.vit_frozen_steps and not args.data
            for part, params in parts.items():
                learns = part not in args.freeze and not (part == "vit" and vit_frozen)
                for p in params.values():
                    p.requires_grad_(learns)
        totals, norms = gradients(run, parts, loader, islice(batches, accumulate), step)
        update(optimisers, learning_rates(stage, step))

        # report
        shown = {name: totals[name] for name in LOSSES if name in totals}
        if totals["choices"]:  # the share of visual tokens (and of stops) chosen right
            shown["right"] = totals["right"] / totals["choices"]
        tokens += int(totals["tokens"]) // world.context
        left_out = loader.state["left out"]
        run.log.write(step=step, loss=totals["loss"], **shown, norms=norms, **({"left out": len(left_out)} if left_out else {}))

        # save, evaluate, stop
        stop, due = run.stops(), evaluation_due(step + 1)
        if step + 1 == stage.steps or (step + 1) % args.save_every == 0 or due or stop:  # before evaluating
            run.save(model, optimisers, step + 1, loader.state)
        bar.set_postfix({"loss": totals["loss"], **shown, "tokens/s": int(tokens / (time.time() - started))})  # after saving, as above
        if due and not stop:
            watch(run, step)
            stop = run.stops()
        if stop:
            run.log.say(f"stopped after step {step + 1}: --resume goes on from there")
            break
    left_out = world.collect(loader.state["left out"])  # by every process its own
    if count := len({tuple(place) for places in left_out for place in places}):
        run.log.say(f"left out: {count} examples, each with its warning when it came first")
    if graphs := compilations():
        run.log.say(f"{graphs} graphs compiled")


def gradients(run: Run, parts: dict, loader: loading.Loader, batches: Iterable[Batch], step: int) -> tuple[Counter, dict[str, float]]:
    """A step's gradients, of all processes, clipped. -> what its batches amount to (losses a loss weight; tokens, choices), and the
    gradient norms of the parts. ValueError, with the examples' names, if one of these is not finite."""
    model, world, device = run.model, run.world, torch.device(run.args.device).type
    # shards are cast when they are gathered
    autocast = torch.autocast(device, torch.bfloat16, enabled=has_bfloat16(run.args.device) and not parallel.is_sharded(model))
    totals, names = Counter(), []
    for batch in batches:  # each is made while the one before is learned from
        names += loader.names
        totals.update(backward(model, world.agree(batch.to(run.args.device)), autocast, run.stage.drop_responses_only))

    # divided by the summed weights of all processes; `average` makes gradients a mean over processes: hence world.size
    own = totals["loss"]
    totals = world.totals(totals)
    divisor = totals["weights"] or 1.0  # without any token to learn all gradients are 0
    parallel.average(model, world)
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= world.size / divisor
    for name in {"loss", *LOSSES} & totals.keys():
        totals[name] /= divisor
    with parallel.said_once():  # by all processes alike
        blameless = math.isfinite(own) and not math.isfinite(totals["loss"])  # it happened in another process
        return totals, clip(parts, totals["loss"], step, lambda: world.names([] if blameless else names))


def backward(model: Molmo, batch: Batch, autocast: torch.autocast, drop_responses_only: bool) -> dict[str, float]:
    """Adds the gradients of a batch's summed losses; -> the sums: losses, loss weights, tokens, choices."""
    with autocast:
        losses = model.losses(batch, drop_responses_only)
    loss = sum(losses[name] for name in LOSSES if name in losses) + Z_LOSS * losses["z"]
    loss.backward()
    sums = {name: value.item() for name, value in losses.items()} | {"loss": loss.item()}
    return sums | {"weights": model.context.own(batch.loss_weights).sum().item(), "tokens": int((batch.example_ids >= 0).sum())}


def watch(run: Run, step: int):
    """The small evaluations after a step, by one process. A stop signal ends them without figures: the run begins with them when it
    goes on."""
    if (full_model := parallel.gather_model(run.model, run.world)) is not None:
        figures = small_evaluation(full_model.to(run.args.device), run.tokenizer, run.stage.watch, run.stop_signals)
        if not run.stop_signals:
            run.log.write(step=step, **figures)
            run.log.draw()
            shown = ", ".join(f"{k} {v:.2f}" for k, v in figures.items() if not k.endswith(("precision", "recall")))
            run.log.say(f"step {step + 1}: {shown}")
    run.world.wait()


def has_bfloat16(device: str) -> bool:
    """Compute in bfloat16 where that is fast (parameters stay float32)."""
    return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


if __name__ == "__main__":
    main()
