"""Message trees: one visual input, many annotations, one sequence.

    trunk: <bos> visual tokens        branch 1: question answer <eos>    branch 2: question answer <eos>   ...
    position 0 1 2 ... n-1                      n n+1 ...                          n n+1 ...

Every branch continues the trunk as if it were alone: its positions restart where the trunk ends, and the mask rule of
model.py keeps branches apart. The pictures are seen once, however many questions are asked about them.
A batch is B such sequences, padded on the right.

T tokens, N crops, S patches per crop, P patch side, M visual tokens, K slots of a pool window, G <|token_index|> tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from model import Batch

IGNORED = 0  # target where there is no loss


@dataclass
class Branch:
    """One annotation. `learned` marks the tokens of the answer (and the <eos> after it) that carry loss."""

    tokens: np.ndarray   # (t,)
    learned: np.ndarray  # (t,) bool
    points: np.ndarray   # (g, 3) visual token of the example, slot, location of each <|token_index|>; stops have token -1


@dataclass
class Example:
    """A message tree: what was seen and what is said about it. All arrays of one example."""

    trunk: np.ndarray    # (t,) tokens up to and with the visual ones
    crops: np.ndarray    # (N, S, 3P²) uint8
    pooling: np.ndarray  # (M, K) into the N*S patches, -1 = empty
    branches: list[Branch]


@dataclass
class Sequence1D:
    """One example laid out in a row; fields as in `Batch`, each (T,)."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray


def lay_out(example: Example) -> Sequence1D:
    """Trunk first, then one branch after the other. The last token of a branch is only ever a target, so it is cut off
    the inputs; the first token of a branch is never a target, since the trunk's end has as many successors as branches."""
    n = len(example.trunk)
    parts = [(example.trunk, np.append(example.trunk[1:], IGNORED), np.zeros(n), np.arange(n), np.zeros(n, int))]
    for number, branch in enumerate(example.branches, start=1):
        t = len(branch.tokens) - 1
        weights = branch.learned[1:].astype(float)
        parts.append((branch.tokens[:-1], branch.tokens[1:], weights, n + np.arange(t), np.full(t, number)))
    return Sequence1D(*(np.concatenate(field) for field in zip(*parts)))


def collate(examples: Sequence[Example]) -> Batch:
    """Examples -> a batch padded on the right; pooling and points are shifted to count over the whole batch."""
    rows = [lay_out(e) for e in examples]
    length = max(len(row.tokens) for row in rows)
    pad = lambda values, fill: np.stack([np.pad(v, (0, length - len(v)), constant_values=fill) for v in values])
    slots = max(e.pooling.shape[1] for e in examples)
    pooling, points, patches, visual = [], [], 0, 0
    for e in examples:
        shifted = np.where(e.pooling >= 0, e.pooling + patches, -1)
        pooling.append(np.pad(shifted, ((0, 0), (0, slots - e.pooling.shape[1])), constant_values=-1))
        own = np.concatenate([b.points for b in e.branches]) if e.branches else np.zeros((0, 3), int)
        points.append(np.where(own[:, :1] >= 0, own + [visual, 0, 0], own))
        patches, visual = patches + e.crops.shape[0] * e.crops.shape[1], visual + len(e.pooling)
    return Batch(
        tokens=torch.from_numpy(pad([r.tokens for r in rows], IGNORED)),
        targets=torch.from_numpy(pad([r.targets for r in rows], IGNORED)),
        loss_weights=torch.from_numpy(pad([r.loss_weights for r in rows], 0)).float(),
        positions=torch.from_numpy(pad([r.positions for r in rows], 0)),
        example_ids=torch.from_numpy(pad([np.zeros(len(r.tokens), int) for r in rows], -1)),
        branch_ids=torch.from_numpy(pad([r.branch_ids for r in rows], 0)),
        crops=torch.from_numpy(np.concatenate([e.crops for e in examples])),
        pooling=torch.from_numpy(np.concatenate(pooling)),
        points=torch.from_numpy(np.concatenate(points)),
    )
