"""Message trees, and packs of them: one visual input, many annotations; many trees, one sequence.

    tree:  trunk <bos> visual tokens     branch 1: question answer <eos>     branch 2: question answer <eos>    ...
           position 0 1 2 ... n-1                  n n+1 ...                           n n+1 ...

Every branch continues the trunk as if it were alone: its positions restart where the trunk ends, and the mask rule of
attention.py keeps branches apart. The pictures are seen once, however many questions are asked about them. A *pack* puts
several trees behind each other in one row, blind to each other. The mask of a pack of two trees (rows look at columns),
trunk `v v a` with branches `b b` and `c`, and trunk `w` (a visual token too) with branch `d d`:

            v v a b b c w d d
        v   # # . . . . . . .
        v   # # . . . . . . .
        a   # # # . . . . . .
        b   # # # # . . . . .
        b   # # # # # . . . .
        c   # # # . . # . . .
        w   . . . . . . # . .
        d   . . . . . . # # .
        d   . . . . . . # # #

Which trees go together is an exact knapsack over a pool of them (`knapsack`). A batch is B such rows, padded on the right.

T tokens, N crops, S patches per crop, P patch side, M visual tokens, K slots of a pool window, G <|token_index|> tokens.

    python packing.py    # how full packs are, and what trees and packing are worth here
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

import command
from model import LOSSES, PRESETS, Batch, Molmo

IGNORED = 0      # padding, and the target after a trunk's end. Its weight is 0: any id would do but a grounding token's, which would be counted
CROP_VALUE = 30  # a crop counts as this many tokens when the fullest pack is sought
PATIENCE = 4     # an example that has waited while this many poolfuls of others arrived goes into the next pack
UNITS = 512      # a pack's tokens are counted in about so many units, of 32 tokens at most: a smaller table, hardly a worse pack


# ---------------------------------------------------------------------------------------------------------------------
# Trees


@dataclass
class Branch:
    """One annotation. `loss_mask` marks the tokens of the answer (and the <eos> after it) that carry loss."""

    tokens: np.ndarray     # (t,)
    loss_mask: np.ndarray  # (t,) bool
    points: np.ndarray     # (g, 3) visual token of the example, slot, location of each <|token_index|>; stops have token -1
    category: str = "other"  # "video caption", "pointing" or "other": what its loss weight goes by


@dataclass
class Example:
    """A message tree: what was seen and what is said about it. All arrays of one example."""

    trunk: np.ndarray    # (t,) what all branches share: <bos>, visual tokens, subtitles
    crops: np.ndarray    # (N, S, 3P²) uint8
    pooling: np.ndarray  # (M, K) into the N*S patches, -1 = empty
    branches: list[Branch]
    name: str = ""
    n_past: np.ndarray | None = None  # (N,) as in `Views`: how many crops before each show its past; None: images only

    @property
    def length(self) -> int:
        """Tokens in a row: the last token of a branch is only ever a target."""
        return len(self.trunk) + sum(len(branch.tokens) - 1 for branch in self.branches)


# category, answer tokens n, branches of its tree -> weight of every token that carries loss. The <eos> at an answer's end is counted in n
# if the tree has one branch, and not if it has several. (Molmo2, on token weights; "released": its code. Without weights long captions
# drown short answers.)
FIXED = {"video caption": 0.1, "pointing": 0.2}
WEIGHTS: dict[str, Callable[[str, int, int], float]] = {
    "paper": lambda category, n, branches: FIXED.get(category, 4 / math.sqrt(n)),
    "released": lambda category, n, branches: FIXED.get(category, 2 / math.sqrt(n) / math.sqrt(branches)),
    "uniform": lambda category, n, branches: 1.0,
}


# ---------------------------------------------------------------------------------------------------------------------
# Rows and batches


class Row(NamedTuple):
    """A pack laid out in a row; fields as in `Batch`, each (T,)."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    example_ids: np.ndarray
    branch_ids: np.ndarray


def lay_out(pack: Sequence[Example], weights: str = "uniform") -> Row:
    """Tree after tree, each with its trunk first, then one branch after the other. The last token of a branch is only
    ever a target, so it is cut off the inputs; the first is never a target, since the trunk's end has as many successors
    as branches."""
    parts = []
    for number, example in enumerate(pack):
        n = len(example.trunk)
        parts.append(Row(tokens=example.trunk, targets=np.append(example.trunk[1:], IGNORED), loss_weights=np.zeros(n),
                         positions=np.arange(n), example_ids=np.full(n, number), branch_ids=np.zeros(n, int)))
        for b, branch in enumerate(example.branches, start=1):
            t, loss_mask = len(branch.tokens) - 1, branch.loss_mask[1:]
            learned = int(loss_mask.sum()) - (len(example.branches) > 1)  # the EOS that ends one branch of several is not counted
            weight = WEIGHTS[weights](branch.category, max(learned, 1), len(example.branches))
            parts.append(Row(tokens=branch.tokens[:-1], targets=branch.tokens[1:], loss_weights=weight * loss_mask,
                             positions=n + np.arange(t), example_ids=np.full(t, number), branch_ids=np.full(t, b)))
    return Row(*(np.concatenate(values) for values in zip(*parts)))


def collate(packs: Sequence[Example | Sequence[Example]], weights: str = "uniform", multiple: int = 1) -> Batch:
    """Packs (or single examples) -> a batch, a row each, padded on the right to a multiple of so many tokens; pooling and
    points are shifted to count over the whole batch."""
    packs = [pack if isinstance(pack, Sequence) else [pack] for pack in packs]
    rows = [lay_out(pack, weights) for pack in packs]
    length = -(-max(len(row.tokens) for row in rows) // multiple) * multiple
    def stack(name: str, fill: int) -> torch.Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.from_numpy(np.stack([np.pad(v, (0, length - len(v)), constant_values=fill) for v in values]))

    examples = [example for pack in packs for example in pack]
    slots = max(e.pooling.shape[1] for e in examples)
    pooling, points, patches, visual = [], [], 0, 0
    for e in examples:
        shifted = np.where(e.pooling >= 0, e.pooling + patches, -1)
        pooling.append(np.pad(shifted, ((0, 0), (0, slots - e.pooling.shape[1])), constant_values=-1))
        own = np.concatenate([np.zeros((0, 3), int), *(b.points for b in e.branches)])
        points.append(np.where(own[:, :1] >= 0, own + [visual, 0, 0], own))
        patches, visual = patches + e.crops.shape[0] * e.crops.shape[1], visual + len(e.pooling)
    return Batch(
        tokens=stack("tokens", IGNORED),
        targets=stack("targets", IGNORED),
        loss_weights=stack("loss_weights", 0).float(),
        positions=stack("positions", 0),
        example_ids=stack("example_ids", -1),
        branch_ids=stack("branch_ids", 0),
        crops=torch.from_numpy(np.concatenate([e.crops for e in examples])),
        pooling=torch.from_numpy(np.concatenate(pooling)),
        points=torch.from_numpy(np.concatenate(points)),
        n_past=torch.from_numpy(np.concatenate([np.zeros(len(e.crops), int) if e.n_past is None else e.n_past for e in examples])),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which trees share a row


def unit_of(max_tokens: int) -> int:
    """Tokens a unit: 32 for packs of 16,384."""
    return min(max(max_tokens // UNITS, 1), 32)


def knapsack(tokens: Sequence[int], crops: Sequence[int], max_tokens: int, max_crops: int) -> list[int]:
    """The subset (indices, ascending) with the largest sum of tokens + 30 * crops that fits both limits: exact, but for
    tokens being counted in units (`unit_of`), rounded up.

    best[u, c] is the largest value with u units and c crops at most; items enter one by one, and what entered where is
    kept to walk back. 48 items, 512 x 128 limits: three million additions.
    """
    unit = unit_of(max_tokens)
    units, room = [-(-t // unit) for t in tokens], (max_tokens // unit, max_crops)
    best = np.zeros((room[0] + 1, room[1] + 1), np.int32)
    taken = np.zeros((len(tokens), *best.shape), bool)
    for i, (t, u, c) in enumerate(zip(tokens, units, crops)):
        if u > room[0] or c > room[1]:
            continue
        with_it = best[:room[0] + 1 - u, :room[1] + 1 - c] + (t + CROP_VALUE * c)
        without = best[u:, c:]
        np.greater(with_it, without, out=taken[i, u:, c:])
        best[u:, c:] = np.maximum(with_it, without)
    chosen, (u, c) = [], room
    for i in reversed(range(len(tokens))):
        if taken[i, u, c]:
            chosen.append(i)
            u, c = u - units[i], c - crops[i]
    return chosen[::-1]


@dataclass
class Packer:
    """A pool of examples, by their numbers, which ascend by `stride`; `take` removes the fullest pack. Examples that combine
    badly with others would wait for ever and gradually fill the pool, so an overdue one goes first, with the fullest selection
    that fits beside it. What `take` will give is a function of the numbers in the pool alone, so they are all that a checkpoint needs (`numbers`)."""

    max_tokens: int
    max_crops: int
    size: int = 48
    stride: int = 1
    pool: dict[int, Example] = field(default_factory=dict)

    def add(self, number: int, example: Example) -> None:
        """ValueError, naming the example, if no pack could hold it."""
        unit = unit_of(self.max_tokens)
        room = self.max_tokens // unit * unit
        if example.length > room or len(example.crops) > self.max_crops:
            raise ValueError(f"{example.name}: {example.length} tokens and {len(example.crops)} crops, "
                             f"a pack holds {room} and {self.max_crops}")
        self.pool[number] = example

    @property
    def full(self) -> bool:
        return len(self.pool) >= self.size

    @property
    def numbers(self) -> list[int]:
        return list(self.pool)

    def take(self) -> list[Example]:
        numbers, pack, room = self.numbers, [], (self.max_tokens, self.max_crops)
        if numbers[-1] - numbers[0] > PATIENCE * self.size * self.stride:
            overdue = self.pool.pop(numbers.pop(0))
            pack, room = [overdue], (self.max_tokens - overdue.length, self.max_crops - len(overdue.crops))
        examples = list(self.pool.values())
        chosen = knapsack([e.length for e in examples], [len(e.crops) for e in examples], *room)
        return pack + [self.pool.pop(numbers[i]) for i in chosen]


def packs(examples: Iterable[tuple[int, Example]], packer: Packer) -> Iterator[list[Example]]:
    """Packs from numbered examples: the pool is filled up before every pack; what is left at the end is packed too."""
    for number, example in examples:
        packer.add(number, example)
        if packer.full:
            yield packer.take()
    while packer.pool:
        yield packer.take()


# ---------------------------------------------------------------------------------------------------------------------
# python packing.py


TIMED = 6  # batches of either kind


def useful_tokens(model: Molmo, batches: Sequence[Batch]) -> tuple[int, float]:
    """Tokens with loss, and the seconds that forward and backward took."""
    useful, start = 0, time.perf_counter()
    for batch in batches:
        losses = model.losses(batch)
        sum(losses[name] for name in LOSSES).backward()
        model.zero_grad()
        useful += int((batch.loss_weights > 0).sum())
    return useful, time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    import data  # here only: packing itself needs no data
    import loading
    from tokenizer import Tokenizer

    with command.one_line("packing.py"):
        parser = command.Parser(prog="packing.py", description="How full packs are, and what trees and packing are worth here.")
        parser.add_argument("--examples", type=command.number(int, 48, 10**6), default=400, help="of the mixture (default: %(default)s)")
        parser.add_argument("--branches", type=command.number(int, 1, 100), default=10, help="of an example, at most (default: %(default)s)")
        parser.add_argument("--max-tokens", type=command.number(int, 64, 10**6), default=2048, help="of a pack (default: %(default)s)")
        parser.add_argument("--max-crops", type=command.number(int, 1, 10**6), default=32, help="of a pack (default: %(default)s)")
        args = parser.parse_args(argv)
        tokenizer = Tokenizer.load(command.HOME / "assets/tokenizer.json")
        sets = loading.synthetic_sets(data.RATES, 0, args.branches)
        examples = loading.Mixture(sets, data.RATES, 0, tokenizer, PRESETS["tiny"], args.max_tokens)
        model = Molmo(PRESETS["tiny"]).initialize(0)

        trees = []
        for i in range(args.examples):
            trees.append(examples[i][1])
            if isinstance(trees[-1], str):  # too long
                raise ValueError(f"--max-tokens {args.max_tokens}: {trees[-1]}")
        packer = Packer(args.max_tokens, args.max_crops)
        start = time.perf_counter()
        made = list(packs(enumerate(trees), packer))
        seconds = time.perf_counter() - start
        full = args.examples - packer.size  # until then the pool was full at every choice; the last packs are what is left
        steady = [pack for pack, seen in zip(made, accumulate(map(len, made))) if seen <= full] or made
        filled = [(sum(e.length for e in p) / args.max_tokens, sum(len(e.crops) for e in p) / args.max_crops) for p in steady]
        tokens, crops = np.array(filled).T
        print(f"{args.examples} examples -> {len(made)} packs, {1000 * seconds / len(made):.1f} ms each")
        print(f"examples a pack    {np.mean([len(p) for p in steady]):.2f}")
        print(f"branches a tree    {np.mean([len(e.branches) for e in trees]):.2f}")
        print(f"tokens filled      {tokens.mean():.1%}")
        print(f"crops filled       {crops.mean():.1%}")
        print(f"the fuller of both {np.maximum(tokens, crops).mean():.1%}")

        packed = [collate([pack]) for pack in steady[:TIMED]]
        alone = [replace(e, branches=[b]) for pack in steady[:TIMED] for e in pack for b in e.branches]
        some = np.random.default_rng(0).permutation(len(alone))[:16 * TIMED]
        padded = [collate([alone[i] for i in rows]) for rows in np.array_split(some, -(-len(some) // 16))]
        for batches in (padded, packed):
            useful_tokens(model, batches[:1])  # warm up
        (few, alone_took), (many, packs_took) = useful_tokens(model, padded), useful_tokens(model, packed)
        print(f"useful tokens/s    {few / alone_took:.0f} in padded batches of single annotations, {many / packs_took:.0f} in packs of trees: "
              f"{many / packs_took * alone_took / few:.1f} times")
        print(f"to choose a pack   {seconds / len(made) / (packs_took / len(packed)):.1%} of the time of its forward and backward")


if __name__ == "__main__":
    main()
