"""The connector: a window of patch features becomes one visual token of the language model.

    patches (N*S, v)   pooling (M, K): which patches each window holds, -1 = empty slot
          |               |
          +---- gather ---+--> windows (M, K, v)   past (M, K, v): the same patches, mean of the 4 frames before
                                  |                  |
                                  v                  v
                             temporal module (VideoMolmo; optional): queries = the slots, keys = values = the past
                                  v
                             attention pooling (M, p): query = mean of the valid slots, keys = values = the slots
                                  v
                             gated projector  ->  visual tokens (M, d)

One gather index serves everything: 2x2 windows of images, 3x3 windows of video frames, overlapping crops whose shared
patches are read once, and the empty slots at the rim of a 27x27 grid. (Molmo2, section on the connector.)

N crops of the whole batch, S patches per crop, M visual tokens, K slots per window, v ViT feature width, p pooled width, d LLM width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConnectorConfig:
    width: int = 1152          # p, of the attention pooling
    heads: int = 16
    mlp_hidden: int = 12288
    output_layer: bool = True  # MolmoPoint drops it: the projector follows at once


TEMPORAL = ("none", "add", "concat", "attention")


@dataclass(frozen=True)
class TemporalConfig:
    """What a frame knows of those before it. (VideoMolmo, arXiv 2506.05336.)"""

    mode: str = "none"      # add: the past is added; concat: it joins the keys of the pooling; attention: cross-attention
    history: int = 4        # frames before
    missing: str = "black"  # what stands for frames before the first: "black" frames, which count in the mean, or nothing ("masked")
    width: int = 1024       # of the attention
    heads: int = 16

    @property
    def memory(self) -> int:
        """How many earlier frames influence a frame."""
        return self.history if self.mode != "none" else 0

    def __post_init__(self):
        for name, value, allowed in (("temporal", self.mode, TEMPORAL), ("missing", self.missing, ("black", "masked"))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
        if self.history < 1 or self.heads < 1 or self.width % self.heads:
            raise ValueError(f"temporal: a history of {self.history} frames, {self.heads} heads in a width of {self.width}")


def mean_past(features: Tensor, black: Tensor, n_past: Tensor, c: TemporalConfig) -> tuple[Tensor, Tensor]:
    """For every crop the mean of the same patches in the frames before it; no gradient goes to those.

    features (N, S, v); black (S, v), the features of a black frame; n_past (N,): how many of the crops right before a crop show
    the same place at earlier frames. -> the mean (N, S, v), and whether to use it (N,) bool: with black frames always.
    """
    features = features.detach()
    missing = black if c.missing == "black" else torch.zeros_like(black)
    crop = torch.arange(len(features), device=features.device)
    total = torch.zeros_like(features)  # over the frames before
    for back in range(1, c.history + 1):
        earlier = features[(crop - back).clamp(min=0)]
        total = total + torch.where((n_past >= back)[:, None, None], earlier, missing)
    if c.missing == "black":  # black frames count like any other
        return total / c.history, torch.ones_like(n_past, dtype=torch.bool)
    return total / n_past.clamp(min=1, max=c.history)[:, None, None].to(total.dtype), n_past > 0


class TemporalAttention(nn.Module):
    """Every patch looks at its window in the past: cross-attention, added to what is there."""

    def __init__(self, c: TemporalConfig, feature_width: int):
        super().__init__()
        self.heads = c.heads
        self.wq, self.wk, self.wv = (nn.Linear(feature_width, c.width, bias=False) for _ in range(3))
        self.wo = nn.Linear(c.width, feature_width, bias=False)

    @torch.no_grad()
    def initialize(self, kind: str, seed: int):
        """`zero`: at first it adds nothing; `xavier`: as released."""
        generator = torch.Generator().manual_seed(seed)
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.xavier_normal_(linear.weight, generator=generator)
        if kind == "zero":
            self.wo.weight.zero_()

    def forward(self, windows: Tensor, past: Tensor, valid: Tensor) -> Tensor:
        """windows, past (M, K, v), valid (M, K) -> (M, K, v)."""
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, heads, K, width / heads)
                   for w, x in ((self.wq, windows), (self.wk, past), (self.wv, past)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
        return windows + self.wo(out.transpose(1, 2).flatten(2)) * valid[..., None].to(windows.dtype)


class AttentionPooling(nn.Module):
    """Masked cross-attention from the mean of a window to its slots."""

    def __init__(self, c: ConnectorConfig, feature_width: int):
        super().__init__()
        self.heads = c.heads
        self.wq, self.wk, self.wv = (nn.Linear(feature_width, c.width) for _ in range(3))
        self.wo = nn.Linear(c.width, c.width) if c.output_layer else nn.Identity()

    def forward(self, windows: Tensor, valid: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """windows (M, K, v) with zeros in empty slots, valid (M, K) bool -> (M, p). `more`: windows and valid of further slots,
        which serve as keys and values but do not enter the mean (the query)."""
        mean = windows.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None].to(windows.dtype)
        if more is not None:
            windows, valid = torch.cat([windows, more[0]], dim=1), torch.cat([valid, more[1]], dim=1)
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, heads, 1 or K or 2K, p / heads)
                   for w, x in ((self.wq, mean), (self.wk, windows), (self.wv, windows)))
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])
        return self.wo(pooled.transpose(1, 2).flatten(1))


class Projector(nn.Module):
    def __init__(self, c: ConnectorConfig, out_width: int):
        super().__init__()
        self.w1 = nn.Linear(c.width, c.mlp_hidden, bias=False)
        self.w3 = nn.Linear(c.width, c.mlp_hidden, bias=False)
        self.w2 = nn.Linear(c.mlp_hidden, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def gather_windows(patches: Tensor, pooling: Tensor) -> tuple[Tensor, Tensor]:
    """patches (N*S, v), pooling (M, K) -> windows (M, K, v) with zeros in empty slots, valid (M, K) bool."""
    valid = pooling >= 0
    # empty slots read different patches, then become zeros: if all read the same one, CUDA would add up its gradients one by one
    some = torch.arange(pooling.numel(), device=pooling.device).view_as(pooling) % max(len(patches), 1)
    return patches[torch.where(valid, pooling, some)].masked_fill(~valid[..., None], 0), valid


class Connector(nn.Module):
    def __init__(self, c: ConnectorConfig, temporal: TemporalConfig, feature_width: int, out_width: int):
        super().__init__()
        self.mode = temporal.mode
        self.image_pooling_2d = AttentionPooling(c, feature_width)
        self.image_projector = Projector(c, out_width)
        self.adapter = TemporalAttention(temporal, feature_width) if self.mode == "attention" else None

    def forward(self, windows: Tensor, valid: Tensor, past: Tensor | None = None, known: Tensor | None = None) -> Tensor:
        """windows (M, K, v), valid (M, K) -> visual tokens (M, d). Every window has at least one valid slot. With a
        temporal module also past (M, K, v), zeros in empty slots, and known (M,) bool, whether to use it."""
        more = None
        if self.mode == "add":
            windows = windows + past * known[:, None, None].to(past.dtype)
        elif self.mode == "concat":
            more = past, valid & known[:, None]
        elif self.mode == "attention":
            windows = torch.where(known[:, None, None], self.adapter(windows, past, valid), windows)
        return self.image_projector(self.image_pooling_2d(windows, valid, more))
