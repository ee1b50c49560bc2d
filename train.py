"""Training, top to bottom.

    python train.py --stage 1                                  # stills, from nothing
    python train.py --stage 2 --init runs/stage1/checkpoint    # adds clips
    python train.py --stage 2 --resume                         # goes on where a run of stage 2 was stopped or killed

Writes a run folder: metrics.jsonl (a line per step and per evaluation), curves.png, and a checkpoint for
`infer.py --checkpoint` that also holds all that --resume needs. On the CPU with one thread a resumed run repeats the
uninterrupted one bit for bit (more threads add sums in varying order, resumed or not). SIGTERM and Ctrl-C finish the step, save and end with status 0.
"""

import json
import math
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import weights
from evaluate import evaluate
from model import PRESETS, Molmo
from packing import collate
from tokenizer import Tokenizer

HOME = Path(__file__).resolve().parent
PARTS = ("vit", "connector", "llm", "point")
LOSSES = ("token", "patch", "slot", "location")
SMALL_EVALUATION = 40  # scenes of each sort
LOOK_BATCH, LOOK_LR, LOOK_WARMUP = 10, 3e-3, 20  # of the ViT alone: scenes a step, peak rate, steps


# ---------------------------------------------------------------------------------------------------------------------
# 1. The stages: one row each


@dataclass(frozen=True)
class Stage:
    steps: int
    batch: int                   # scenes a step
    branches: int                # questions a scene
    videos: float                # share of clips
    absent: float                # how many questions about things that are not there, relative to synthetic.MIXTURE
    lr: dict[str, float]         # per part; new token embeddings go with the connector
    warmup: dict[str, int]       # steps, per part
    seed: int                    # of the scenes
    look: int = 0                # steps that teach a ViT that starts from nothing to see, before the whole model trains


def each(*values):
    return dict(zip(PARTS, values))


STAGES = {
    ("tiny", 1): Stage(1050, 4, 10, 0.0, 0.4, each(2e-4, 2e-3, 2e-3, 2e-3), each(20, 20, 20, 20), 1, look=1400),
    ("tiny", 2): Stage(6000, 4, 10, 0.5, 1.0, each(4e-4, 1.5e-3, 1.5e-3, 1.5e-3), each(20, 20, 20, 20), 2),
}


def parse(argv: list[str] | None):
    parser = data.Parser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--preset", default="tiny", choices=sorted({name for name, _ in STAGES}))
    parser.add_argument("--points-as", default="tokens", choices=("tokens", "text"), help="how a new model writes points")
    parser.add_argument("--init", help="checkpoint of the stage before")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the run folder, if there is one")
    parser.add_argument("--freeze", choices=PARTS, action="append", default=[], help="a part that stays as it is")
    parser.add_argument("--out", help="run folder (default: runs/stage<N>)")
    parser.add_argument("--steps", type=data.number(int, 1, 10**9), help="instead of the stage's own number")
    parser.add_argument("--seed", type=data.number(int, 0, 10_000), default=0, help="of the weights and of the scenes")
    parser.add_argument("--eval-every", type=data.number(int, 1, 10**9), default=400, help="steps between small evaluations")
    parser.add_argument("--save-every", type=data.number(int, 1, 10**9), default=200, help="steps between checkpoints")
    parser.add_argument("--workers", type=data.number(int, 0, 256), default=1, help="processes that draw scenes")
    parser.add_argument("--device", type=data.device, default="cuda" if torch.cuda.is_available() else "cpu")
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
    return name.startswith(("wte", "lm_head", "names")) or name == "vit.positional_embedding"


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
        made.append(torch.optim.Muon(groups, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return made


def backward(loss: torch.Tensor, parts: dict[str, dict[str, nn.Parameter]], step: int) -> dict[str, float]:
    """Gradients, clipped to norm 1 in every part; -> the norms before. ValueError if anything is not finite."""
    loss.backward()
    learned = {part: [p for p in params.values() if p.requires_grad] for part, params in parts.items()}
    norms = {part: nn.utils.clip_grad_norm_(params, 1.0).item() for part, params in learned.items() if params}
    if not all(map(math.isfinite, [loss.item(), *norms.values()])):
        raise ValueError(f"step {step}: loss {loss.item()}, gradient norms {norms}: stopped before the step")
    return norms


def update(optimisers: list[torch.optim.Optimizer], rates: dict[str, float]):
    """One step of every optimiser at these rates per part; gradients are gone afterwards."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rates[group["part"]]
        optimiser.step()
        optimiser.zero_grad()


def schedule(peak: float, warmup: int, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    return peak * min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def learning_rates(stage: Stage, step: int) -> dict[str, float]:
    return {part: schedule(stage.lr[part], stage.warmup[part], step, stage.steps) for part in PARTS}


# ---------------------------------------------------------------------------------------------------------------------
# 3. The log: one JSON line per event, and a picture


class Log:
    def __init__(self, folder: Path, step: int | None = None):
        """A new metrics.jsonl, or the old one up to `step`, where a resumed run goes on."""
        folder.mkdir(parents=True, exist_ok=True)
        path, self.folder, self.lines = folder / "metrics.jsonl", folder, []
        if step is not None and path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last
            self.lines = [line for line in map(json.loads, whole) if line["step"] < step]
        self.start = time.time() - (self.lines[-1]["seconds"] if self.lines else 0)
        self.file = open(path, "w")
        self.file.writelines(json.dumps(line) + "\n" for line in self.lines)
        self.file.flush()

    def write(self, **values):
        line = {"seconds": round(time.time() - self.start, 1)} | values
        self.lines.append(line)
        print(json.dumps(line), file=self.file, flush=True)

    def draw(self):
        """curves.png: the losses (log scale) on the left, the evaluated shares on the right; steps below 0 are the ViT's."""
        width, height = 480, 320
        sheet = Image.new("RGB", (2 * width, height), "white")
        shares = ["named"] + sorted({k for line in self.lines for k in line if k.startswith(("stills", "clips"))})
        for x, names, scale in ((0, ["naming", "loss", *LOSSES], lambda v: math.log10(max(v, 1e-3))), (width, shares, float)):
            title = "log10 " if scale is not float else ""
            curves = {title + n: [(line["step"], scale(line[n])) for line in self.lines if n in line] for n in names}
            plot(sheet, x, width, height, curves)
        sheet.save(self.folder / "curves.png")


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


def small_evaluation(model: Molmo, tokenizer: Tokenizer, videos: bool) -> dict[str, float]:
    """The figures to watch, on fresh scenes: a few, so they jump about by some hundredths."""
    figures = {}
    for name in ("stills", "clips") if videos else ("stills",):
        result, _ = evaluate(model, tokenizer, name == "clips", SMALL_EVALUATION, quiet=True)
        figures |= {f"{name} {k}": round(v, 3) for k, v in result.items() if k in ("f1", "count exact", "none recognised")}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# 4. Stopping and going on


@contextmanager
def stoppable():
    """Inside, SIGTERM and Ctrl-C do not end the program but are collected in the list."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda got, frame: asked.append(got)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_usual(worker: int):
    """Worker processes leave Ctrl-C to the program and end on SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def state_of(model: Molmo, optimisers: list[torch.optim.Optimizer], step: int) -> dict[str, np.ndarray]:
    """All that a run is besides its parameters: the scenes of a step are a function of its number."""
    names = {p: name for name, p in model.named_parameters()}
    state = {f"{i}/{names[p]}/{key}": value.cpu().numpy() for i, optimiser in enumerate(optimisers)
             for p, values in optimiser.state.items() for key, value in values.items()}
    return state | {"step": np.array(step), "rng": torch.get_rng_state().numpy()}


def restore(model: Molmo, optimisers: list[torch.optim.Optimizer], state: dict[str, np.ndarray]):
    parameters = dict(model.named_parameters())
    for name, array in state.items():
        if "/" in name:
            i, parameter, key = name.split("/")
            value = torch.from_numpy(array).clone()  # in torch's own memory: its alignment decides how sums are grouped
            optimisers[int(i)].state[parameters[parameter]][key] = value if key == "step" else value.to(parameters[parameter].device)
    torch.set_rng_state(torch.from_numpy(state["rng"]))


# ---------------------------------------------------------------------------------------------------------------------
# 5. A ViT that starts from nothing learns to see


def look(model: Molmo, stage: Stage, workers: int, log: Log, asked: list[int]):
    """Where the papers load SigLIP 2, `tiny` trains its ViT alone for a while: a linear layer on the features, thrown
    away afterwards, names for each patch the kind and colour of the thing at its middle and of which kind of thing it
    holds the point. Steps count up to 0, where the model takes over."""
    device = model.vit.positional_embedding.device
    names = nn.Linear(model.config.vit.feature_width, sum(data.PATCH_CLASSES), device=device)
    nn.init.zeros_(names.weight), nn.init.zeros_(names.bias)
    seeing = nn.ModuleDict({"vit": model.vit, "names": names})
    parts, optimisers = parts_of(seeing), optimizers(seeing, model.config.optimizer)
    scenes = DataLoader(data.PatchSet(stage.seed, model.config), LOOK_BATCH, sampler=range(stage.look * LOOK_BATCH),
                        collate_fn=data.collate_patches, num_workers=workers, worker_init_fn=as_usual)
    bar = tqdm(scenes, total=stage.look, desc="the ViT alone", dynamic_ncols=True)
    for step, (crops, labels) in enumerate(bar):
        scores = names(model.vit(crops.to(device))).flatten(0, 1)
        truth = labels.to(device).flatten(0, 1)
        kind, color, pointed = scores.split(data.PATCH_CLASSES, dim=-1)
        loss = sum(F.cross_entropy(s, t) for s, t in zip((kind, color, pointed), truth.T))
        backward(loss, parts, step - stage.look)
        update(optimisers, dict.fromkeys(PARTS, schedule(LOOK_LR, LOOK_WARMUP, step, stage.look)))
        shown = truth[:, 0] > 0
        line = {"naming": loss.item(), "named": (kind.argmax(-1) == truth[:, 0])[shown].float().mean().item()}
        log.write(step=step - stage.look, **line)
        bar.set_postfix(line)
        if asked:
            break


# ---------------------------------------------------------------------------------------------------------------------
# 6. The run


def main(argv: list[str] | None = None):
    with data.one_line("train.py"):
        run(parse(argv))


def run(args):
    stage = STAGES[args.preset, args.stage]
    steps = args.steps or stage.steps
    stage = replace(stage, steps=steps, look=min(stage.look, args.steps or stage.look), seed=stage.seed + 100 * args.seed)
    folder = Path(args.out or f"runs/stage{args.stage}")
    state = weights.load_training(folder / "checkpoint") if args.resume else None
    if args.init or state:
        model, tokenizer = weights.load(folder / "checkpoint" if state else args.init, args.device)
    else:
        tokenizer = Tokenizer.load(HOME / "assets/tokenizer.json")
        config = replace(PRESETS[args.preset], points_as=args.points_as)
        model = Molmo(config).initialize(args.seed).to(args.device)
    model.train()
    first = int(state["step"]) if state else 0
    log = Log(folder, first if state else None)  # not before bad input is out: it begins a new metrics.jsonl
    with stoppable() as asked:
        if not args.init and not state:
            look(model, stage, args.workers, log, asked)
        for part, params in parts_of(model).items():
            for p in params.values():
                p.requires_grad_(part not in args.freeze)
        optimisers = optimizers(model, model.config.optimizer)
        if state:
            restore(model, optimisers, state)
        if asked:
            print("stopped before the first step: there is nothing to save yet")
        else:
            train(model, tokenizer, optimisers, stage, first, log, args, asked)


def train(model: Molmo, tokenizer: Tokenizer, optimisers, stage: Stage, first: int, log: Log, args, asked: list[int]):
    parts = parts_of(model)
    examples = data.SyntheticSet(stage.seed, tokenizer, model.config, stage.branches, stage.videos, stage.absent)
    loader = DataLoader(examples, stage.batch, sampler=range(first * stage.batch, stage.steps * stage.batch),
                        collate_fn=collate, num_workers=args.workers, worker_init_fn=as_usual)
    bar = tqdm(loader, initial=first, total=stage.steps, desc=f"stage {args.stage}", dynamic_ncols=True)
    started, tokens = time.time(), 0
    for step, batch in enumerate(bar, start=first):
        # forward: sums over all loss tokens, divided once by their summed weights
        batch = batch.to(args.device)
        losses = model.losses(batch)
        divisor = batch.loss_weights.sum().clamp(min=1)
        loss = sum(losses[name] for name in LOSSES if name in losses) / divisor

        # backward and step
        norms = backward(loss, parts, step)
        update(optimisers, learning_rates(stage, step))

        # report
        tokens += int((batch.example_ids >= 0).sum())
        shown = {name: (value / divisor).item() for name, value in losses.items() if name in LOSSES}
        if "right" in losses:  # the share of visual tokens (and of stops) chosen right
            shown["right"] = (losses["right"] / losses["choices"].clamp(min=1)).item()
        log.write(step=step, loss=loss.item(), **shown, norms=norms)
        bar.set_postfix({"loss": loss.item(), **shown, "tokens/s": int(tokens / (time.time() - started))})

        # save, evaluate, stop
        last, due = step + 1 == stage.steps, lambda every: (step + 1) % every == 0
        if last or due(args.save_every) or due(args.eval_every) or asked:  # before evaluating
            weights.save(log.folder / "checkpoint", model, tokenizer, training=state_of(model, optimisers, step + 1))
        if asked:
            bar.write(f"stopped after step {step + 1}: --resume goes on from there")
            return
        if last or due(args.eval_every):
            figures = small_evaluation(model, tokenizer, bool(stage.videos))
            log.write(step=step, **figures)
            log.draw()
            bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
