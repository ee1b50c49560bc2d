"""Writing answers, twice: `generate_slowly`, a few lines that run the whole sequence through the model for every token, and
`generate`, which keeps keys and values; the first is the oracle of the second."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attention import Dense, Ids, masked
from model import Batch, Cache, Molmo
from pointing import TOKEN_INDEX, VIT_INDEX, VIT_LOC, PointDecoder, Sight


class Answer(NamedTuple):
    tokens: list[int]       # without the end-of-turn token
    rows: list[list[int]]   # [visual token of the example, slot, location] of every <|token_index|>
    finish_reason: str      # "stop": the model ended its turn; "length": max_new_tokens were written


class Spelling(NamedTuple):
    """The token ids that steer generation, from the tokenizer."""

    eos: int          # ends a turn
    close: list[int]  # `">`, which must follow "no more points"
    stops: tuple[int, ...] = ()  # others that end an answer


class FreeDecoder:
    """The decoder of a model that writes its points as text: no rules."""

    def __init__(self):
        self.rows: list[list[int]] = []

    def step(self, logits: Tensor, h: Tensor, sample: Callable[[Tensor], int]) -> tuple[int, None]:
        return sample(logits), None


def sampler(temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Callable[[Tensor], int]:
    """Logits (V,) -> token: greedy at temperature 0, else among the fewest tokens whose probabilities reach top_p."""
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        p, order = (logits.float().cpu() / temperature).softmax(-1).sort(descending=True)
        p = p * (p.cumsum(0) - p < top_p)
        return int(order[torch.multinomial(p, 1, generator=generator)])

    return sample


def start_decoder(model: Molmo, h: Tensor, sight: Sight, owner: int, close: Sequence[int]):
    """The decoder of one example of a prompt batch: h (B, T, d) of the prompt."""
    if model.point_predictor is None:
        return FreeDecoder()
    sight = sight.only(sight.owner == owner)
    return PointDecoder(model.point_predictor, h.flatten(0, 1)[sight.at], sight, model.ids, close)


def speakable(model: Molmo, logits: Tensor) -> Tensor:
    """Bars the extra tokens that only a picture or a prompt may bring."""
    spoken = torch.tensor([model.ids[name] for name in (TOKEN_INDEX, VIT_INDEX, VIT_LOC)], device=logits.device)
    number = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill((number >= model.config.llm.vocabulary) & ~torch.isin(number, spoken), float("-inf"))


@torch.inference_mode()
def generate_slowly(model: Molmo, batch: Batch, spelling: Spelling, max_new_tokens: int, sample=sampler()) -> Answer:
    """The oracle: one unpadded prompt, the whole sequence through the model for every token, no cache."""
    tokens, decoder, given = [], None, batch.points.tolist()
    for _ in range(max_new_tokens):
        h, sight = model(batch)
        decoder = decoder or start_decoder(model, h, sight, int(model.owners(batch)[0, -1]), spelling.close)
        token, _ = decoder.step(speakable(model, model.logits(h[0, -1])), h[0, -1], sample)
        if token in (spelling.eos, *spelling.stops):
            return Answer(tokens, decoder.rows, "stop")
        tokens.append(token)
        batch = _with_token(batch, token, given + decoder.rows)
    return Answer(tokens, decoder.rows if decoder else [], "length")


def _with_token(batch: Batch, token: int, rows: list[list[int]]) -> Batch:
    """The batch with one more token, in the branch of the last one, and with the choices made so far."""
    grow = lambda values, last: torch.cat([values, last], dim=1)
    return replace(
        batch,
        tokens=grow(batch.tokens, torch.full_like(batch.tokens[:, -1:], token)),
        positions=grow(batch.positions, batch.positions[:, -1:] + 1),
        example_ids=grow(batch.example_ids, batch.example_ids[:, -1:]),
        branch_ids=grow(batch.branch_ids, batch.branch_ids[:, -1:]),
        points=torch.tensor(rows, dtype=torch.long, device=batch.tokens.device).view(-1, 3),
    )


@torch.inference_mode()
def generate(model: Molmo, batch: Batch, spelling: Spelling, max_new_tokens: int, sample=sampler()) -> list[Answer]:
    """Answers B prompts (padded on the right, one example a row) with a cache; the same answers as `generate_slowly`."""
    # Prefill: the prompts once; their keys and values stay.
    rows, length = batch.tokens.shape
    keys, sight = model.mask_ids(batch), model.see(batch)
    x = model.inputs(batch, sight)
    cache = Cache(model.config.llm, rows, length + max_new_tokens, like=x)
    h = model.decode(x, batch.positions, masked(keys), cache)
    last = (batch.example_ids >= 0).sum(1) - 1
    every = torch.arange(rows, device=x.device)
    owners = model.owners(batch)[every, last]
    decoders = [start_decoder(model, h, sight, int(owner), spelling.close) for owner in owners]
    h, position = h[every, last], batch.positions[every, last]

    # Grow: one token a row; new tokens stand behind the longest prompt, padding between is nobody's example.
    answers, finished = [[] for _ in range(rows)], [False] * rows
    for step in range(max_new_tokens):
        logits = speakable(model, model.logits(h))
        x = model.embed(torch.full((rows, 1), spelling.eos, device=x.device))
        for row in range(rows):
            if finished[row]:
                continue
            token, carried = decoders[row].step(logits[row], h[row], sample)
            if token in (spelling.eos, *spelling.stops):
                finished[row] = True
                continue
            answers[row].append(token)
            x[row, 0] = model.embed(torch.tensor([[token]], device=x.device))[0, 0] + (0 if carried is None else carried)
        if all(finished) or step + 1 == max_new_tokens:
            break
        new = Ids(batch.example_ids[every, last], batch.branch_ids[every, last],
                  torch.full_like(last, length + step), torch.zeros_like(last, dtype=torch.bool))
        new = Ids(*(field[:, None] for field in new))
        keys = Ids(*(torch.cat([old, field], dim=1) for old, field in zip(keys, new)))
        h = model.decode(x, (position + 1 + step)[:, None], Dense.of(new, keys), cache)[:, 0]
    return [Answer(a, d.rows, "stop" if f else "length") for a, d, f in zip(answers, decoders, finished)]
