"""Training, top to bottom.

    python train.py --stage 1                       # stills, from nothing
    python train.py --stage 2 --init runs/stage1    # adds clips

Writes a run folder: metrics.jsonl (a line per step and per evaluation), curves.png, and a checkpoint for
`infer.py --checkpoint`.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
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


# ---------------------------------------------------------------------------------------------------------------------
# 1. The stages: one row each


@dataclass(frozen=True)
class Stage:
    steps: int
    batch: int                   # scenes a step
    branches: int                # questions a scene
    videos: float                # share of clips
    lr: dict[str, float]         # per part; new token embeddings go with the connector
    warmup: dict[str, int]       # steps, per part
    seed: int                    # of the scenes


def each(*values):
    return dict(zip(PARTS, values))


STAGES = {
    ("tiny", 1): Stage(900, 12, 10, 0.0, each(1e-3, 1e-3, 1e-3, 1e-3), each(20, 20, 20, 20), 1),
    ("tiny", 2): Stage(450, 12, 10, 0.5, each(7e-4, 7e-4, 7e-4, 7e-4), each(20, 20, 20, 20), 2),
}


def parse(argv: list[str] | None):
    parser = data.Parser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--preset", default="tiny", choices=sorted({name for name, _ in STAGES}))
    parser.add_argument("--points-as", default="tokens", choices=("tokens", "text"), help="how a new model writes points")
    parser.add_argument("--init", help="checkpoint of the stage before")
    parser.add_argument("--out", help="run folder (default: runs/stage<N>)")
    parser.add_argument("--steps", type=data.number(int, 1, 10**9), help="instead of the stage's own number")
    parser.add_argument("--seed", type=data.number(int, 0, 10_000), default=0, help="of the weights and of the scenes")
    parser.add_argument("--eval-every", type=data.number(int, 1, 10**9), default=200, help="steps between small evaluations")
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


def parts_of(model: Molmo) -> dict[str, dict[str, nn.Parameter]]:
    parts = {part: {n: p for n, p in model.named_parameters() if part_of(n) == part} for part in PARTS}
    assert sum(map(len, parts.values())) == len(list(model.parameters())), "every parameter belongs to one part"
    return parts


def is_table(name: str) -> bool:
    """Word embeddings, positions and the head: rows that are looked up, not matrices that mix channels."""
    return name.startswith(("wte", "lm_head")) or name == "vit.positional_embedding"


def optimizers(model: Molmo) -> list[torch.optim.Optimizer]:
    """AdamW as in the papers (no weight decay); with "muon", the matrices inside the network go to Muon, scaled so that
    one learning rate serves both."""
    adamw, muon = [], []
    for part, params in parts_of(model).items():
        matrices = {n for n, p in params.items() if model.config.optimizer == "muon" and p.dim() == 2 and not is_table(n)}
        adamw.append({"params": [p for n, p in params.items() if n not in matrices], "part": part})
        muon.append({"params": [p for n, p in params.items() if n in matrices], "part": part})
    made = [torch.optim.AdamW([g for g in adamw if g["params"]], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)]
    if groups := [g for g in muon if g["params"]]:
        made.append(torch.optim.Muon(groups, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return made


def learning_rate(stage: Stage, part: str, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / stage.warmup[part])
    return stage.lr[part] * warm * (0.55 + 0.45 * math.cos(math.pi * step / stage.steps))


# ---------------------------------------------------------------------------------------------------------------------
# 3. The log: one JSON line per event, and a picture


class Log:
    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lines, self.start = folder, [], time.time()
        self.file = open(folder / "metrics.jsonl", "w")

    def write(self, **values):
        line = {"seconds": round(time.time() - self.start, 1)} | values
        self.lines.append(line)
        print(json.dumps(line), file=self.file, flush=True)

    def draw(self):
        """curves.png: the losses (log scale) on the left, the evaluated shares on the right."""
        width, height = 480, 320
        sheet = Image.new("RGB", (2 * width, height), "white")
        shares = sorted({k for line in self.lines for k in line if k.startswith(("stills", "clips"))})
        for x, names, scale in ((0, ["loss", *LOSSES], lambda v: math.log10(max(v, 1e-3))), (width, shares, float)):
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
    low, high, last = min(y for _, y in points), max(y for _, y in points), max(x for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - low) / max(high - low, 1e-9)
        return left + 10 + (width - 20) * x / max(last, 1), height - 10 - (height - 10 - top) * up

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
# 4. The run


def main(argv: list[str] | None = None):
    with data.one_line("train.py"):
        run(parse(argv))


def run(args):
    stage = STAGES[args.preset, args.stage]
    stage = replace(stage, steps=args.steps or stage.steps, seed=stage.seed + 100 * args.seed)
    if args.init:
        model, tokenizer = weights.load(args.init, args.device)
    else:
        tokenizer = Tokenizer.load(HOME / "assets/tokenizer.json")
        config = replace(PRESETS[args.preset], points_as=args.points_as)
        model = Molmo(config).initialize(args.seed).to(args.device)
    model.train()
    log = Log(Path(args.out or f"runs/stage{args.stage}"))  # not before bad input is out: it begins a new metrics.jsonl
    parts, optimisers = parts_of(model), optimizers(model)

    examples = data.SyntheticSet(stage.seed, tokenizer, model.config, stage.branches, stage.videos)
    loader = DataLoader(examples, stage.batch, sampler=range(stage.steps * stage.batch), collate_fn=collate,
                        num_workers=args.workers)
    bar = tqdm(loader, total=stage.steps, desc=f"stage {args.stage}", dynamic_ncols=True)
    started, tokens = time.time(), 0
    for step, batch in enumerate(bar):
        # forward: sums over all loss tokens, divided once by their summed weights
        batch = batch.to(args.device)
        losses = model.losses(batch)
        divisor = batch.loss_weights.sum().clamp(min=1)
        loss = sum(losses[name] for name in LOSSES if name in losses) / divisor

        # backward and step
        loss.backward()
        norms = {part: nn.utils.clip_grad_norm_(params.values(), 1.0).item() for part, params in parts.items() if params}
        if not all(map(math.isfinite, [loss.item(), *norms.values()])):
            raise ValueError(f"step {step}: loss {loss.item()}, gradient norms {norms}: stopped before the step; "
                             f"the last checkpoint is in {log.folder}")
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(stage, group["part"], step)
            optimiser.step()
            optimiser.zero_grad()

        # report
        tokens += int((batch.example_ids >= 0).sum())
        shown = {name: (value / divisor).item() for name, value in losses.items() if name in LOSSES}
        if "right" in losses:  # the share of visual tokens (and of stops) chosen right
            shown["right"] = (losses["right"] / losses["choices"].clamp(min=1)).item()
        log.write(step=step, loss=loss.item(), **shown, norms=norms)
        bar.set_postfix({"loss": loss.item(), **shown, "tokens/s": int(tokens / (time.time() - started))})
        if (step + 1) % args.eval_every == 0 or step + 1 == stage.steps:
            weights.save(log.folder / "checkpoint", model, tokenizer)  # before evaluating
            figures = small_evaluation(model, tokenizer, bool(stage.videos))
            log.write(step=step, **figures)
            log.draw()
            bar.write(f"step {step + 1}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
