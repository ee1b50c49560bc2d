"""Who may look at whom, and four ways to compute it; RMSNorm and RoPE.

One rule, `sees`, holds in training and in inference, for one question and for packs of message trees. How attention
applies it depends on the device and on the length of the rows; every way has the same `attend(q, k, v)`:

    Dense        one mask of all pairs for `scaled_dot_product_attention`: short rows
    DenseDecode  the same for the few queries of tokens that are being written
    PerExample   the same, cut by example: on a CPU a pack then costs the sum of the squares of its examples' lengths
    Sparse       FlexAttention: on a GPU blocks of 128 x 128 pairs are skipped where nobody sees anybody; no mask of all
                 pairs is ever held, so memory grows with the length and not with its square

B sequences, T tokens (Tq of queries, Tk of keys).
"""

from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MOST_DENSE = 4096  # longest row, in tokens, that gets a dense mask on a GPU
MOST_COMPILED = 64  # graphs per function: torch silently stops compiling after 8, and FlexAttention would then materialise all scores


def set_cuda_numerics() -> None:
    """What the commands ask of CUDA, for the whole process: float32 products on tensor cores (TF32, 10 bits of the mantissa), and
    no cuDNN attention, which H100s would otherwise prefer: it builds and keeps a plan for every new shape, and here nearly every
    call has a new shape."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)


class MaskIds(NamedTuple):
    """All that the rule asks of a token; each (B, T)."""

    example: Tensor
    branch: Tensor
    index: Tensor   # place in the row, or in the cache (not the position, which every branch restarts)
    visual: Tensor  # bool: a visual token, or a start, end or column token around them


def sees(q: MaskIds, k: MaskIds) -> Tensor:
    """The rule, for queries and keys of any shapes that broadcast: same example; the key is in the shared trunk or in the
    query's own branch; and it is not later than the query, or both are visual. (Molmo2, arXiv 2601.10611.)"""
    same = (q.example == k.example) & ((k.branch == 0) | (k.branch == q.branch))
    return same & ((k.index <= q.index) | (q.visual & k.visual))


def may_attend(q: MaskIds, k: MaskIds) -> Tensor:
    """Every query with every key: (B, Tq) and (B, Tk) -> (B, Tq, Tk) bool. Trunk `v v v a` with two branches `b b` and
    `c c` (rows look at columns):

                v v v a b b c c
            v   # # # . . . . .
            v   # # # . . . . .
            v   # # # . . . . .
            a   # # # # . . . .
            b   # # # # # . . .
            b   # # # # # # . .
            c   # # # # . . # .
            c   # # # # . . # #
    """
    return sees(MaskIds(*(x[:, :, None] for x in q)), MaskIds(*(x[:, None, :] for x in k)))


# ---------------------------------------------------------------------------------------------------------------------
# Four ways. q (B, heads, Tq, head_width), k, v (B, kv_heads, Tk, head_width) -> (B, heads, Tq, head_width)


class Dense(NamedTuple):
    allowed: Tensor  # (B, Tq, Tk) bool

    @classmethod
    def of(cls, ids: MaskIds) -> "Dense":
        return cls(may_attend(ids, ids))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda:  # the kernels that take a mask and do not hold all scores want a key head for each query head
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed[:, None], enable_gqa=True)


class DenseDecode(NamedTuple):
    """With few queries and many keys, the cost is reading the keys. So the query heads that share a key head are stacked along
    the query axis, as if they were more queries of one head: each key is read once and never copied."""

    allowed: Tensor | None  # (B, Tq, Tk) bool; None: everybody sees everybody

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, kv_heads, heads / kv_heads * Tq, head_width)
        allowed = None if self.allowed is None else self.allowed.repeat(1, q.shape[1] // k.shape[1], 1)[:, None]
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=allowed).reshape(q.shape)


class PerExample(NamedTuple):
    """What lies between two examples is neither stored nor computed. The tokens of an example are neighbours in its row."""

    pieces: list[tuple[int, slice, Dense]]  # row, from where to where, its mask; padding is a piece as well

    @classmethod
    def of(cls, ids: MaskIds) -> "PerExample":
        pieces = []
        for row, example in enumerate(ids.example):
            ends = example.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
            for span in map(slice, [0, *ends], ends):
                part = MaskIds(*(field[row:row + 1, span] for field in ids))
                pieces.append((row, span, Dense.of(part)))
        return cls(pieces)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows: list[list[Tensor]] = [[] for _ in q]
        for row, span, piece in self.pieces:
            rows[row].append(piece.attend(*(x[row:row + 1, :, span] for x in (q, k, v))))
        return torch.cat([torch.cat(row, dim=2) for row in rows])


class Sparse(NamedTuple):
    blocks: BlockMask

    @classmethod
    def of(cls, ids: MaskIds) -> "Sparse":
        (rows, length), device = ids.example.shape, ids.example.device
        make = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        return cls(make(mask_mod(ids), rows, None, length, length, device=device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flex = compiled(flex_attention) if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=self.blocks, enable_gqa=True)


def mask_mod(ids: MaskIds):
    """`sees` in the form FlexAttention needs: a function of the indices of row, head, query and key."""
    return lambda row, head, q, k: sees(MaskIds(*(x[row, q] for x in ids)), MaskIds(*(x[row, k] for x in ids)))


Mask = Dense | DenseDecode | PerExample | Sparse


@cache
def compiled(function, **how):
    """Compiles once for the first row length and once more for all other lengths, unless `how` says otherwise. (A kernel for a single
    length is faster, as it needs fewer registers; on a GPU all rows of a training run have one length.) Past the limit it is an error."""
    if "recompile_limit" in signature(torch.compile).parameters:  # torch 2.13, whose general limit holds for one thread only
        how["recompile_limit"] = MOST_COMPILED
    else:
        torch._dynamo.config.recompile_limit = MOST_COMPILED
    return torch.compile(function, fullgraph=True, **how)


def compilations() -> int:
    """Graphs compiled so far in this program: a number that grows from batch to batch says that something is compiled again."""
    from torch._dynamo.utils import counters  # takes a second to import
    return counters["stats"]["unique_graphs"]


def make_mask(ids: MaskIds) -> Mask:
    """Chooses the way by device and row length; on a GPU short rows are not worth compiling for. (On Apple's GPUs
    FlexAttention has no backward pass; on CUDA it is compiled by Triton, which not every system has.)"""
    on_cuda, length = ids.example.device.type == "cuda", ids.example.shape[1]
    if on_cuda and length <= MOST_DENSE:
        return Dense.of(ids)
    if on_cuda and find_spec("triton"):
        return Sparse.of(ids)
    return PerExample.of(ids)


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm and RoPE: of the decoder's queries and keys, and of those of the pointing head


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, computed in float32 and rounded to x's own dtype, times a learned weight."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


CosSin = tuple[Tensor, Tensor]


def rope_frequencies(width: int, theta: float, device=None) -> Tensor:
    """Radians per position of the width / 2 channel pairs: theta^(-2i/width)."""
    return theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def rope_cos_sin(positions: Tensor, frequencies: Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> CosSin:
    """positions (...), frequencies (c/2,) -> cosines and signed sines for `apply_rope`, each (..., c). Angles are computed in
    float32; `scale` is YaRN's attention factor."""
    angle = positions[..., None].float() * frequencies
    cos, sin = (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotary position embedding, rotate-half: channel i of x (..., c) turns with channel i + c/2."""
    cos, sin = cos_sin
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
