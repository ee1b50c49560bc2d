"""The connector: a window of patch features becomes one visual token of the language model.

    patches (N*S, v)   pooling (M, K): which patches each window holds, -1 = empty slot
          |               |
          +---- gather ---+--> windows (M, K, v)
                                  |  query = mean of the valid slots, keys = values = the slots
                                  v
                             attention pooling (M, p)  ->  gated projector  ->  visual tokens (M, d)

One gather index serves everything: 2x2 windows of images, 3x3 windows of video frames, overlapping crops whose shared
patches are read once, and the empty slots at the rim of a 27x27 grid. (Molmo2, section on the connector.)

M visual tokens of the whole batch, K slots per window, v ViT feature width, p pooled width, d LLM width.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConnectorConfig:
    width: int = 1152          # p, of the attention pooling
    heads: int = 16
    mlp_hidden: int = 12288
    output_layer: bool = True  # MolmoPoint drops it: the projector follows at once


class AttentionPooling(nn.Module):
    """Masked cross-attention from the mean of a window to its slots."""

    def __init__(self, c: ConnectorConfig, feature_width: int):
        super().__init__()
        self.heads = c.heads
        self.wq, self.wk, self.wv = (nn.Linear(feature_width, c.width) for _ in range(3))
        self.wo = nn.Linear(c.width, c.width) if c.output_layer else nn.Identity()

    def forward(self, windows: Tensor, valid: Tensor) -> Tensor:
        """windows (M, K, v) with zeros in empty slots, valid (M, K) bool -> (M, p)."""
        mean = windows.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None].to(windows.dtype)
        q = self.wq(mean).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (M, heads, 1, p / heads)
        k = self.wk(windows).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (M, heads, K, p / heads)
        v = self.wv(windows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
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
    return patches[pooling.clamp(min=0)] * valid[..., None].to(patches.dtype), valid


class Connector(nn.Module):
    def __init__(self, c: ConnectorConfig, feature_width: int, out_width: int):
        super().__init__()
        self.image_pooling_2d = AttentionPooling(c, feature_width)
        self.image_projector = Projector(c, out_width)

    def forward(self, windows: Tensor, valid: Tensor) -> Tensor:
        """windows (M, K, v), valid (M, K) -> visual tokens (M, d). Every window has at least one valid slot."""
        return self.image_projector(self.image_pooling_2d(windows, valid))
