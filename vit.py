"""The SigLIP 2 vision transformer: flattened patches in, patch features of two tapped layers out.

    crops (N, S, 3P²)  ->  Linear + position table  ->  block 0 ... block i ... block j
                                                                    |           |
                                                    features (N, S, v) = [ block j | block i ]

Pre-norm blocks, biases everywhere, no class token, no final norm. A crop is a row of patches, S = grid * grid; crops
never attend to each other, so N counts crops of the whole batch. Molmo2 taps the third- and the ninth-from-last block: two depths of
the same patch, one more abstract than the other. Blocks after the deepest tap are never built.

N crops, S patches per crop, P patch side in pixels, e width of a block, v = taps * e.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_PATCHES, GPU_PATCHES = 1500, 50_000  # encoded at a time: on a CPU what fits its caches, two crops of 27x27; on a GPU 68 crops


@dataclass(frozen=True)
class ViTConfig:
    width: int = 1152        # e
    layers: int = 27         # of the original network; those after the deepest tap are left out
    heads: int = 16
    mlp_hidden: int = 4304
    taps: tuple[int, ...] = (-3, -9)  # blocks whose outputs are used, joined on channels in this order
    grid: int = 27           # patches per side that the position table was made for
    patch_size: int = 14     # P
    norm_eps: float = 1e-6

    @property
    def tapped(self) -> list[int]:
        """The taps as block numbers from 0."""
        return [tap % self.layers for tap in self.taps]

    @property
    def feature_width(self) -> int:
        return self.width * len(self.taps)


class Attention(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.heads = c.heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, S, e / heads)
                   for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (N, S, e)


class FeedForward(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.w1 = nn.Linear(c.width, c.mlp_hidden)
        self.w2 = nn.Linear(c.mlp_hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.feed_forward = FeedForward(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class ViT(nn.Module):
    def __init__(self, c: ViTConfig):
        super().__init__()
        self.config = c
        self.patch_embedding = nn.Linear(3 * c.patch_size**2, c.width)
        self.positional_embedding = nn.Parameter(torch.empty(c.grid**2, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(max(c.tapped) + 1))

    def positions(self, patches: int) -> Tensor:
        """The position table (S, e), resized when crops have another (square) grid than it was made for."""
        if patches == self.config.grid**2:
            return self.positional_embedding
        table = self.positional_embedding.unflatten(0, (self.config.grid, -1)).permute(2, 0, 1)[None]  # (1, e, grid, grid)
        side = round(patches**0.5)
        table = F.interpolate(table.float(), size=(side, side), mode="bicubic", align_corners=False, antialias=True)  # no bf16 version on CPUs
        return table[0].flatten(1).T.to(self.positional_embedding.dtype)

    def forward(self, crops: Tensor) -> Tensor:
        """(N, S, 3P²) uint8 pixels, each patch flattened (row, column, channel) -> (N, S, v) features. In inference
        mode a few crops at a time: they are independent, so a long video needs memory for its features, not for every layer."""
        at_once = max((CPU_PATCHES if crops.device.type == "cpu" else GPU_PATCHES) // crops.shape[1], 1)
        if not torch.is_inference_mode_enabled() or len(crops) <= at_once:
            return self.features(crops)
        features = self.positional_embedding.new_empty(*crops.shape[:2], self.config.feature_width)
        for out, part in zip(features.split(at_once), crops.split(at_once)):
            out.copy_(self.features(part))
        return features

    def features(self, crops: Tensor) -> Tensor:
        """`forward` on all crops at once: (N, S, 3P²) uint8 -> (N, S, v)."""
        dtype = self.patch_embedding.weight.dtype
        pixels = (crops.to(torch.promote_types(dtype, torch.float32)) / 255 - 0.5) / 0.5  # rounded to bf16 only after that
        x = self.patch_embedding(pixels.to(dtype)) + self.positions(crops.shape[1])  # (N, S, e)
        tapped = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.config.tapped:
                tapped[i] = x
        return torch.cat([tapped[i] for i in self.config.tapped], dim=-1)
