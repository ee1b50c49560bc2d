"""Writing answers, twice: `generate_slowly`, a few lines that run the whole sequence through the model for every token, and
`generate`, which caches keys and values and is tested against the first.

What is asked is a message tree, as in training: a trunk (pictures), read once, and a branch for every question. All branches
grow together, a token each in every step, under the mask rule that holds in training too; one question is a tree with one
branch. The cache after two steps of a tree with two:

                 prompt           step 1   step 2
        trunk    v v v a . . . .   . .      . .
        branch   . . . . b b . .   b .      b .
        branch   . . . . . . c c   . c      . c

A step reads every weight once, whatever the number of branches, so it can be no faster than the memory delivers the weights;
`Speed` measures how close it comes.

B trees, one a row, T tokens of the longest prompt, W branches in all, R of the largest tree, d LLM width.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import DenseDecode, MaskIds, compiled, make_mask, may_attend
from model import Batch, Cache, Embedding, Molmo, compiling_one_token, linear, row_by_row
from pointing import TOKEN_INDEX, VIT_INDEX, VIT_LOC, PointDecoder, VisualTokens
from tokenizer import RESERVED

STATIC_ROOM = 256  # the room of a compiled step's cache is a multiple of this: fewer shapes to compile


class Answer(NamedTuple):
    tokens: list[int]         # without the end-of-turn token
    triples: list[list[int]]  # [visual token of the example, slot, location] of every <|token_index|>
    finish_reason: str        # "stop": the model ended its turn; "length": max_new_tokens were written


class ControlTokens(NamedTuple):
    """The token ids that steer generation, from the tokenizer."""

    stops: tuple[int, ...]  # each ends an answer
    close: list[int]        # `">`, which must follow "no more points"


class FreeDecoder:
    """The decoder of a model that writes its points as text: no rules."""

    def __init__(self):
        self.triples: list[list[int]] = []

    def another(self) -> "FreeDecoder":
        return FreeDecoder()

    def step(self, logits: Tensor, h: Tensor, sample: Callable[[Tensor], int]) -> tuple[int, None]:
        return sample(logits), None


def sampler(temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Callable[[Tensor], int]:
    """Logits (V,) -> token: greedy at temperature 0, else among the fewest tokens whose probabilities reach top_p."""
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        logits = logits.float().cpu()
        p, order = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
        p = p * (p.cumsum(0) - p < top_p)
        return int(order[torch.multinomial(p, 1, generator=generator)])

    return sample


def start_decoder(model: Molmo, h: Tensor, visual: VisualTokens, owner: int, close: Sequence[int]):
    """The decoder of one example of a prompt batch: h (B, T, d) of the prompt."""
    if model.point_predictor is None:
        return FreeDecoder()
    visual = visual.only(visual.owner == owner)
    return PointDecoder(model.point_predictor, h.flatten(0, 1)[visual.at], visual, model.ids, close)


def speakable(model: Molmo, device=None) -> Tensor:
    """(V,) or (V + RESERVED,) bool, the tokens an answer may contain: all but the extra tokens of pictures and prompts."""
    vocabulary, grounding = model.config.llm.vocabulary, model.point_predictor is not None
    spoken = torch.zeros(vocabulary + RESERVED * grounding, dtype=torch.bool, device=device)
    spoken[:vocabulary] = True
    if grounding:
        spoken[[model.ids[name] for name in (TOKEN_INDEX, VIT_INDEX, VIT_LOC)]] = True
    return spoken


@torch.inference_mode()
def generate_slowly(model: Molmo, batch: Batch, control: ControlTokens, max_new_tokens: int, samplers=sampler) -> Answer:
    """The oracle: one unpadded prompt, the whole sequence through the model for every token, no cache."""
    tokens, decoder, sample, given, spoken = [], None, samplers(), batch.points.tolist(), speakable(model, batch.tokens.device)
    for _ in range(max_new_tokens):
        h, visual = model(batch)
        decoder = decoder or start_decoder(model, h, visual, int(model.owners(batch)[0, -1]), control.close)
        token, _ = decoder.step(model.logits(h[0, -1]).where(spoken, float("-inf")), h[0, -1], sample)
        if token in control.stops:
            return Answer(tokens, decoder.triples, "stop")
        tokens.append(token)
        batch = _with_token(batch, token, given + decoder.triples)
    return Answer(tokens, decoder.triples if decoder else [], "length")


def _with_token(batch: Batch, token: int, triples: list[list[int]]) -> Batch:
    """The batch with one more token, in the branch of the last one, and with the choices made so far."""
    grow = lambda values, last: torch.cat([values, last], dim=1)
    return replace(
        batch,
        tokens=grow(batch.tokens, torch.full_like(batch.tokens[:, -1:], token)),
        positions=grow(batch.positions, batch.positions[:, -1:] + 1),
        example_ids=grow(batch.example_ids, batch.example_ids[:, -1:]),
        branch_ids=grow(batch.branch_ids, batch.branch_ids[:, -1:]),
        points=torch.tensor(triples, dtype=torch.long, device=batch.tokens.device).view(-1, 3),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The fast one


@dataclass
class Speed:
    """What generating cost, summed over all calls that were given it."""

    prompt: int = 0       # tokens of the prompts
    prefill: float = 0.0  # seconds they took, pictures included
    written: int = 0      # tokens that went through the model one after the other, of all branches
    decode: float = 0.0   # seconds they took
    read: int = 0         # bytes they had to read: in every step all weights and what the cache holds
    since: float = 0.0    # when `lap` was last called

    def lap(self, device: torch.device) -> float:
        """Seconds since the last call; waits until the device has finished its work."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        before, self.since = self.since, perf_counter()
        return self.since - before


def step_bytes(model: Molmo) -> int:
    """The weights that a step reads: the blocks and the head."""
    parts = model.blocks, model.ln_f, model.wte if model.lm_head is None else model.lm_head
    return sum(tensor.nbytes for part in parts for tensor in chain(part.parameters(), part.buffers()))


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes a second that the device's memory moves: the fastest of some copies, every byte read and written."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**30
    size = min(free // 4, 2**31)  # so much that launching the copy takes no noticeable time
    source, clock, seconds = torch.zeros(size, dtype=torch.uint8, device=device), Speed(), []
    for _ in range(6):
        clock.lap(device)
        source.clone()
        seconds.append(clock.lap(device))
    return 2 * source.nbytes / min(seconds)


class Frontier(NamedTuple):
    """The ends of branches that are being written, row by row and branch by branch; each (W,)."""

    row: Tensor       # of the batch
    column: Tensor    # of the grid (B, R) of new tokens
    example: Tensor   # ids as in Batch
    branch: Tensor
    position: Tensor  # of the next token

    @classmethod
    def of(cls, batch: Batch) -> tuple["Frontier", Tensor]:
        """Of all branches (of the trunk, where there are none), and the place (W,) of their last tokens."""
        if batch.example_ids.max() > 0:
            raise ValueError("a row of the batch can hold only one prompt")
        found = []
        for row, (example, branch) in enumerate(zip(batch.example_ids, batch.branch_ids)):
            branch = branch[example >= 0]
            found += [(row, int((branch == b).nonzero()[-1])) for b in branch.unique() if b > 0 or not branch.any()]
        row, place = torch.tensor(found, device=batch.tokens.device).T
        ids = (values[row, place] for values in (batch.example_ids, batch.branch_ids, batch.positions + 1))
        return cls(row, rank_in_row(row), *ids), place

    def grid(self, values: Tensor, shape: tuple[int, int], fill: int = 0) -> Tensor:
        """values (W, ...) -> (B, R, ...), each in its place."""
        if len(values) == shape[0] * shape[1]:  # every place is taken
            return values.view(*shape, *values.shape[1:])
        return values.new_full((*shape, *values.shape[1:]), fill).index_put_((self.row, self.column), values)

    def of_branches(self, grid: Tensor) -> Tensor:
        """The way back: (B, R, ...) -> (W, ...)."""
        if len(self.row) == grid.shape[0] * grid.shape[1]:
            return grid.flatten(0, 1)
        return grid[self.row, self.column]


def rank_in_row(row: Tensor) -> Tensor:
    """(W,) How many earlier branches are in the same row."""
    return (row[:, None] == row).tril(-1).sum(1)


# Gives the last cache again if all its sizes are the same: a CUDA graph works only on the memory on which it was recorded.
static_cache = functools.lru_cache(1)(Cache)


def one_step(model: Molmo, x: Tensor, position: Tensor, mask: DenseDecode, cache: Cache) -> tuple[Tensor, Tensor]:
    """Inputs (B, R, d) -> hidden states (B, R, d) and logits (B, R, V)."""
    h = model.hidden_states(x, position, mask, cache)
    return h, model.logits(h)


class TreeDecoding:
    """The trees in a cache: their ids, for the mask, and the next step.

    mode: "views" reads what is written, without a mask if it hides nothing, and the grid of new tokens gets narrower as
    branches end; "static" keeps all shapes: a grid as wide as the first, the whole room of the cache, a mask; "compiled" is
    compiled, too.
    """

    def __init__(self, model: Molmo, cache: Cache, ids: MaskIds, frontier: Frontier, mode: str):
        self.model, self.cache, self.frontier, self.static = model, cache, frontier, mode != "views"
        # compiled once for every shape of grid and cache; on a GPU a CUDA graph (not yet run on one)
        self.run = compiled(one_step, mode="reduce-overhead", dynamic=False) if mode == "compiled" else one_step
        empty = lambda field, fill: F.pad(field, (0, cache.room - field.shape[1]), value=fill)
        index = torch.arange(cache.room, device=frontier.row.device).expand(len(ids.index), -1)
        self.ids = MaskIds(empty(ids.example, -1), empty(ids.branch, 0), index, empty(ids.visual, False))
        if self.static:
            cache.read_whole()
        self.reshape()

    def reshape(self) -> None:
        """Lays out the new tokens from here on: in every step one column for each branch of the largest tree, padding where a tree has
        fewer. The cache then fills up as b c b c ..., and as b b b ... once branch c has ended, so that the ids of all steps to
        come can be written now."""
        frontier, used = self.frontier, self.cache.used
        self.shape = len(self.ids.example), int(frontier.column.max()) + 1
        for ids, new, fill in ((self.ids.example, frontier.example, -1), (self.ids.branch, frontier.branch, 0)):
            grids = frontier.grid(new, self.shape, fill).repeat(1, -(-self.cache.room // self.shape[1]))
            ids[:, used:] = grids[:, :self.cache.room - used]
        self.position = frontier.grid(frontier.position, self.shape)
        first, before = self.among(used, used + self.shape[1]), self.among(0, used)
        # with one branch a row, a step that sees everything stays so: later tokens of the branch hide nothing either
        self.unmasked = not self.static and self.shape[1] == 1 and bool(may_attend(first, before).all())

    def among(self, start: int, end: int) -> MaskIds:
        return MaskIds(*(field[:, start:end] for field in self.ids))

    def keep(self, alive: list[int]) -> None:
        """Goes on with the branches in `alive`; the others have ended."""
        frontier = self.frontier._replace(position=self.frontier.of_branches(self.position))
        self.frontier = Frontier(*(field[alive] for field in frontier))
        if not self.static:
            self.frontier = self.frontier._replace(column=rank_in_row(self.frontier.row))
            self.reshape()

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (W, d) of a new token for each branch -> hidden states (W, d) and logits (W, V)."""
        used = self.cache.used
        self.cache.reserve(self.shape[1])
        mask = DenseDecode(None if self.unmasked else may_attend(self.among(used, self.cache.used), self.among(0, self.cache.end)))
        h, logits = self.run(self.model, self.frontier.grid(x, self.shape), self.position, mask, self.cache)
        self.position = self.position + 1
        return self.frontier.of_branches(h), self.frontier.of_branches(logits)


@torch.inference_mode()
def generate(model: Molmo, batch: Batch, control: ControlTokens, max_new_tokens: int,
             samplers: Callable[[], Callable[[Tensor], int]] = sampler, speed: Speed | None = None, mode: str = "views") -> list[Answer]:
    """Answers every branch of B prompts (padded on the right, one tree a row), row by row and branch by branch, as
    `generate_slowly` answers each alone: `samplers` makes a sampler for every branch. `mode` of the steps: see `TreeDecoding`.
    ValueError if a row holds two prompts."""
    # 1. Prefill: every tree once; its keys and values stay.
    device, speed = batch.tokens.device, speed or Speed()
    speed.lap(device)
    frontier, place = Frontier.of(batch)
    ids, visual = model.mask_ids(batch), model.visual_tokens(batch)
    x = model.input_embeddings(batch, visual)
    room = x.shape[1] + max_new_tokens * (int(frontier.column.max()) + 1)
    if mode != "views":
        room = -(-room // STATIC_ROOM) * STATIC_ROOM
    make_cache = static_cache if mode == "compiled" else Cache
    cache = make_cache(model.config.llm, len(x), room, x.dtype, x.device).empty()  # it may be the one of the last call
    cache.reserve(x.shape[1])
    h = model.hidden_states(x, batch.positions, make_mask(ids), cache)
    owners = model.owners(batch)[frontier.row, place].tolist()
    first = {owner: start_decoder(model, h, visual, owner, control.close) for owner in set(owners)}
    decoders = [first[owner].another() for owner in owners]  # branches of a tree share the keys of its visual tokens
    choose = [samplers() for _ in owners]
    h, trees = h[frontier.row, place], TreeDecoding(model, cache, ids, frontier, mode)
    logits = model.logits(h)
    del x, visual
    speed.prompt += int((batch.example_ids >= 0).sum())
    speed.prefill += speed.lap(device)

    # 2. Grow: in every step a token for each branch that has not ended.
    answers, reasons = [[] for _ in decoders], ["length"] * len(decoders)
    spoken, weights = speakable(model, device), step_bytes(model)
    active = list(range(len(decoders)))  # branches that have not ended: row i of h and of the logits is branch active[i]
    for step in range(max_new_tokens):
        logits = logits.where(spoken, float("-inf"))
        alive, tokens, carried = [], [], []  # rows that go on, their new tokens, what is added to the embeddings of those
        for i, branch in enumerate(active):
            token, vector = decoders[branch].step(logits[i], h[i], choose[branch])
            if token in control.stops:
                reasons[branch] = "stop"
                continue
            answers[branch].append(token)
            alive.append(i)
            tokens.append(token)
            carried.append(vector)
        if not alive or step + 1 == max_new_tokens:
            break
        if len(alive) < len(active):
            trees.keep(alive)
        active = [active[i] for i in alive]
        x = model.embed(torch.tensor(tokens, device=device))  # (W, d)
        for i, vector in enumerate(carried):
            if vector is not None:
                x[i] += vector
        h, logits = trees.step(x)
        speed.written += len(alive)
        speed.read += weights + cache.bytes_read
    speed.decode += speed.lap(device)
    return [Answer(tokens, d.triples, reason) for tokens, d, reason in zip(answers, decoders, reasons)]


# ---------------------------------------------------------------------------------------------------------------------
# Weights in eight bits


class Linear8(nn.Module):
    """A linear layer without bias, stored as int8 from -127 to 127 with one scale per output: one byte per weight. No weight is
    off by more than half a scale, which is 1/254 of the largest weight of its output. Arithmetic stays in the dtype of x (in a
    compiled step of one token on a CPU it is in float32): the matrix is converted on every call, in such a step inside its loop."""

    def __init__(self, weight: Tensor):
        super().__init__()
        scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).to(weight.dtype)  # rounded before it is used
        self.register_buffer("weight", (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        if compiling_one_token(x) and x.device.type == "cpu" and self.weight.shape[1] % 4 == 0:
            return (word_by_word(x.float(), self.weight) * self.scale).to(x.dtype)
        weight = self.weight.to(x.dtype)
        if compiling_one_token(x):
            return row_by_row(x, weight) * self.scale
        scale = self.scale.float() if x.is_cuda else self.scale  # or the compiler takes its own product of bytes, which is slower
        return (linear(x, weight) * scale).to(x.dtype)


def word_by_word(x: Tensor, weight: Tensor) -> Tensor:
    """`row_by_row` for float32 x and int8 weights, i a multiple of 4: reads four weights as one word, and shifts each to the word's
    end, on little-endian machines. (Without AVX-512, compiled code takes vectors of integers through the stack: int8 at about
    a seventh of the speed of this.)"""
    words = weight.view(torch.float32).view(torch.int32)
    inputs = torch.stack(x.flatten().view(-1, 4).unbind(1)).clone()  # (4, i / 4), row k for byte k of every word; a copy is read in order
    products = sum(((words << 24 - 8 * byte) >> 24) * inputs[byte] for byte in range(4))
    return products.sum(-1).view(*x.shape[:-1], -1)


class Head8(nn.Module):
    """The head with its base vocabulary in eight bits."""

    def __init__(self, head: Embedding):
        super().__init__()
        self.base, self.new_embedding = Linear8(head.embedding), head.new_embedding

    def logits(self, x: Tensor, extra: bool) -> Tensor:
        return torch.cat([self.base(x), linear(x, self.new_embedding)], dim=-1) if extra else self.base(x)


@torch.no_grad()
def to_int8(model: Molmo) -> Molmo:
    """The language model's matrices in eight bits, in place; ViT, connector, point head, norms and word embeddings (so a
    head tied to them, too) stay as they are."""
    for block in model.blocks:
        for part, name in ((block.self_attn, "att_proj"), (block.self_attn, "attn_out"), (block.mlp, "ff_proj"), (block.mlp, "ff_out")):
            setattr(part, name, Linear8(getattr(part, name).weight))
    if model.lm_head is not None:
        model.lm_head = Head8(model.lm_head)
    return model
