"""What a model costs: parameters, FLOPs, memory and time, by formula and without allocating anything.

    python costs.py --preset molmopoint-8b                      # parameters, memory, arithmetic
    python train.py --stage 2 --preset molmo2-8b --plan 64      # a stage on 64 GPUs, on paper

FLOPs: two for each weight that a token is multiplied by; in attention four for each pair of query and key that the mask lets meet
and each channel. Norms, RoPE, softmax and the temporal module are not counted. A backward pass costs twice the forward pass. MFU is
these FLOPs per second of wall clock over what the chip could do; what activation checkpointing computes again (the large presets do,
and a plan reckons with it) does not count as done.

N crops, S patches per crop, M visual tokens, K slots of a pool window, T tokens, P parameters, C processes of a context group.
"""

from dataclasses import dataclass

import torch

import command
from model import PRESETS, Batch, Molmo, MolmoConfig
from tokenizer import RESERVED


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def parameters(config: MolmoConfig) -> dict[str, int]:
    """Parameters per part."""
    with torch.device("meta"):
        model = Molmo(config)
    count = lambda *modules: sum(p.numel() for module in modules if module is not None for p in module.parameters())
    return {"vit": count(model.vit), "connector": count(model.connector), "point predictor": count(model.point_predictor),
            "word embeddings": count(model.wte), "decoder blocks": count(model.blocks, model.ln_f), "head": count(model.lm_head)}


def cache_bytes(config: MolmoConfig) -> int:
    """Bytes that the key-value cache takes per token, in bfloat16."""
    t = config.llm
    return 2 * t.layers * t.kv_heads * t.head_width * 2


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


@dataclass
class Work:
    """How much a forward pass has to do."""

    crops: float    # N
    windows: float  # M
    slots: int      # K
    tokens: float
    pairs: float    # of tokens that may look at each other
    scored: float   # tokens whose logits are computed

    @classmethod
    def of(cls, model: Molmo, batch: Batch) -> "Work":
        """The work of a training batch; its padding is not work."""
        real, visual = batch.example_ids >= 0, model.mask_ids(batch).visual
        pairs = 0
        for row, examples in enumerate(batch.example_ids):
            for example in examples[real[row]].unique():
                here = examples == example
                trunk, *branches = torch.bincount(batch.branch_ids[row, here]).tolist()
                pairs += seen(trunk, int(visual[row, here].sum())) + sum(t * trunk + seen(t, 0) for t in branches)
        return cls(len(batch.crops), *batch.pooling.shape, int(real.sum()), pairs, int((batch.loss_weights > 0).sum()))


def seen(tokens: float, visual: float) -> float:
    """Pairs of tokens that may look at each other in a sequence: each sees itself and those before it, visual ones also the visual
    ones after them."""
    return tokens * (tokens + 1) / 2 + visual * (visual - 1) / 2


def flops(config: MolmoConfig, work: Work) -> dict[str, float]:
    """FLOPs of a forward pass, per part."""
    v, c, t, S = config.vit, config.connector, config.llm, config.views.grid**2
    depth, features, queries = max(v.tapped) + 1, v.feature_width, t.heads * t.head_width
    patch = 3 * v.patch_size**2 * v.width + depth * (4 * v.width**2 + 2 * v.width * v.mlp_hidden)
    window = ((2 * work.slots + 1) * features + (c.width if c.output_layer else 0)) * c.width + (2 * c.width + t.width) * c.mlp_hidden
    token = t.layers * ((2 * queries + 2 * t.kv_heads * t.head_width) * t.width + 3 * t.width * t.mlp_hidden)
    pointing = config.points_as == "tokens"
    return {
        "vit": work.crops * S * (2 * patch + 4 * depth * S * v.width),
        "connector": work.windows * (2 * window + 4 * work.slots * c.width),
        "llm": 2 * token * work.tokens + 4 * t.layers * queries * work.pairs,
        "head": 2 * work.scored * t.width * (t.vocabulary + RESERVED * pointing),
        "point": 2 * work.windows * t.width * config.point.width * pointing,
    }


def training_flops(config: MolmoConfig, work: Work) -> float:
    return 3 * sum(flops(config, work).values())


# ---------------------------------------------------------------------------------------------------------------------
# A stage on paper

# NVIDIA H100 SXM: dense bfloat16 FLOPs a second, bytes of memory; bytes a second between GPUs of a node, and per GPU to other
# nodes over 400 Gbit/s each.
PEAK, MEMORY, NVLINK, NETWORK, NODE = 989e12, 80e9, 450e9, 50e9, 8
EFFICIENCY = 0.5  # of the peak, while it computes: assumed
EXAMPLES = 3.8    # in a pack (Molmo2)
PUBLISHED = {"molmo2-4b": (490, 7500, 3200), "molmo2-8b": (780, 8100, 3300)}  # H100 hours of the stages (Molmo2)


def pack(config: MolmoConfig, tokens: int, crops: int) -> Work:
    """The work of a full pack. Assumed: every crop has as many visual tokens as a video frame, all of them together at most three
    quarters of the pack; half of the other tokens are scored."""
    slots = config.views.video_pool**2
    visual = min(crops * config.views.grid**2 / slots, 0.75 * tokens)
    pairs = EXAMPLES * seen(tokens / EXAMPLES, visual / EXAMPLES)
    return Work(crops, visual, slots, tokens, pairs, (tokens - visual) / 2)


def plan(config: MolmoConfig, stage, gpus: int, context: int, accumulate: int, sharded: bool = True) -> dict[str, float]:
    """A stage (train.Stage) on H100s: bytes per GPU, seconds per step. `sharded`: the parameters are cut over the GPUs and blocks
    are computed again in the backward pass; else every GPU has the whole model and keeps all activations. ValueError if the
    packs cannot be shared out."""
    if gpus % context or stage.packs % (gpus // context * accumulate):
        raise ValueError(f"--plan {gpus}: {stage.packs} packs a step cannot be shared out to {gpus} GPUs in groups of {context}, "
                         f"in {accumulate} parts (--accumulate)")
    if config.llm.heads % context:
        raise ValueError(f"--context-parallel {context}: {config.llm.heads} heads cannot be shared out evenly")
    rows, part = stage.packs * context // (gpus * accumulate), parameters(config)
    P, work, v, t = sum(part.values()), pack(config, stage.tokens, stage.crops), config.vit, config.llm
    S, depth = config.views.grid**2, max(v.tapped) + 1
    qkvo = 2 * (t.heads + t.kv_heads) * t.head_width  # widths of queries, keys, values and what attention gives

    # memory: parameters, gradients and two moments in float32; what is gathered at a time; what the backward pass needs
    gathered = sharded * (8 * (part["word embeddings"] + part["head"]) + 2 * 2 * part["decoder blocks"] / t.layers)
    kept = 2 * (stage.tokens * t.width * t.layers + stage.crops * S * v.width * depth) / context  # the inputs of the blocks
    llm_block = 2 * stage.tokens * (qkvo + 4 * t.mlp_hidden + 6 * t.width) / context  # what is inside of one
    vit_block = 2 * stage.crops * S * (8 * v.width + 2 * v.mlp_hidden) / context
    inside = max(llm_block, vit_block) if sharded else t.layers * llm_block + depth * vit_block
    seen_whole = 2 * v.feature_width * (2 * stage.crops * S + work.windows * work.slots)
    logits = 3 * 4 * work.scored * t.vocabulary / context
    memory = {"states": 16 * P / (gpus if sharded else 1), "gathered": gathered, "activations": rows * (kept + inside + seen_whole + logits)}

    # time: blocks run a second time in the backward pass; collectives run meanwhile, so the longer of the two counts
    useful = stage.packs * training_flops(config, work)
    computing = useful * (4 / 3 if sharded else 1) / (gpus * PEAK * EFFICIENCY)
    # parameters twice in bfloat16 and gradients in float32 for every part of a step; or gradients there and back, once
    shards = (accumulate * (2 * 2 + 4) if sharded else 2 * 4) * P * (gpus - 1) / gpus
    exchanged = 0.0 if context == 1 else accumulate * rows * 3 * 2 * (
        t.layers * stage.tokens / context * qkvo + stage.crops * S * v.feature_width)
    talking = shards / (NVLINK if gpus <= NODE else NETWORK) + exchanged / (NVLINK if context <= NODE else NETWORK)
    step = max(computing, talking)
    return {"packs": stage.packs, "tokens": stage.packs * stage.tokens, "crops": stage.packs * stage.crops, "flops": useful,
            **memory, "memory": sum(memory.values()), "shards": shards, "exchanged": exchanged, "computing": computing,
            "talking": talking, "step": step, "mfu": useful / (step * gpus * PEAK), "gpu hours": step * stage.steps * gpus / 3600}


def print_plan(name: str, config: MolmoConfig, number: int, stage, gpus: int, context: int, accumulate: int, sharded: bool, whole: bool) -> None:
    """Prints `plan`; of a `whole` stage, not only some of its steps, also what was published."""
    p, G = plan(config, stage, gpus, context, accumulate, sharded), 2**30
    print(f"{name}, stage {number}: {stage.steps:,} steps on {gpus} H100, context-parallel {context}, accumulate {accumulate}")
    print(f"a step          {p['packs']:,} packs of {stage.tokens:,} tokens and {stage.crops} crops: {p['tokens']:,} tokens, {p['crops']:,} crops, "
          f"{p['flops']:.2e} FLOPs")
    print(f"memory per GPU  {p['memory'] / G:.1f} GiB of {MEMORY / G:.1f}: states {p['states'] / G:.1f}, gathered {p['gathered'] / G:.1f}, "
          f"activations {p['activations'] / G:.1f}" + (": too much" if p["memory"] > 0.95 * MEMORY else ""))
    print(f"time of a step  {p['step']:.1f} s: computing {p['computing']:.1f} s at {EFFICIENCY:.0%} of the peak, meanwhile collectives {p['talking']:.1f} s "
          f"(per GPU {p['shards'] / G:.0f} GiB for parameters and gradients, {p['exchanged'] / G:.0f} GiB for context parallelism)")
    print(f"the stage       {p['step'] * stage.steps / 3600:.1f} hours, {p['gpu hours']:,.0f} GPU hours, MFU {p['mfu']:.0%}")
    if whole and name in PUBLISHED and number <= 3:
        hours = PUBLISHED[name][number - 1]
        print(f"published       {hours:,} GPU hours, which for these FLOPs is an MFU of {p['flops'] * stage.steps / (hours * 3600 * PEAK):.0%}")


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    with command.one_line("costs.py"):
        parser = command.Parser(prog="costs.py", description="What a preset costs: parameters, memory, arithmetic.")
        parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the model (default: %(default)s)")
        config = PRESETS[parser.parse_args(argv).preset]
        figures = parameters(config)
        for name, value in (figures | {"parameters": sum(figures.values())}).items():
            print(f"{name:24}{value:>18,}{value * 2 / 2**30:>9.2f} GiB bf16{value * 4 / 2**30:>9.2f} GiB float32")
        one = flops(config, Work(crops=1, windows=0, slots=0, tokens=1, pairs=0, scored=1))
        for name, value in {"cache bytes per token": cache_bytes(config), "flops per token": one["llm"] + one["head"],
                            "flops per crop": one["vit"]}.items():
            print(f"{name:24}{value:>18,}")


if __name__ == "__main__":
    main()
