"""Molmo: a ViT, a connector and a language model that reads pictures in both directions and answers with points.

    crops ---> ViT ---> connector ---> + word embeddings of the placeholders --+
                 |                                                             v
    tokens ------|--------------------> word embeddings ----------------> decoder blocks ---> h ---> final norm ---> logits
                 |                                                                            |
                 +-- features of each window --------------------------------> point predictor (grounding tokens)

The decoder is Qwen3's: pre-norm, grouped-query attention with an RMSNorm on each head's query and key, RoPE, SwiGLU. (Or OLMo 3's:
norms after attention and MLP, over all heads at once, YaRN on some layers.)
One rule says who may look at whom (attention.py). Modules have the names of the released checkpoints, but for what weights.py translates.

B sequences, T tokens, d LLM width, N crops of the batch, S patches per crop, v ViT feature width, M visual tokens of the
batch, K slots of a pool window, P patch side, G <|token_index|> tokens (points and stops), V rows of the base vocabulary.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import CosSin, Mask, MaskIds, RMSNorm, apply_rope, make_mask, rope_cos_sin, rope_frequencies
from connector import Connector, ConnectorConfig, TemporalConfig, gather_windows, mean_past
from pointing import TOKEN_INDEX, VIT_INDEX, PointConfig, PointPredictor, VisualTokens
from preprocess import ViewConfig
from tokenizer import EXTRA_TOKENS, RESERVED
from vit import ViT, ViTConfig

PLACEHOLDERS = ("<im_patch>", "<im_low>")  # one per visual token
POINTS_AS = ("tokens", "text", "tags")
LOSSES = ("token", "patch", "slot", "location")  # next token; with grounding tokens also visual token (MolmoPoint's "patch"), slot, location
PICTURE_TOKENS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_low>",
                 "<frame_start>", "<frame_end>")  # these see each other in both directions
FEW_TOKENS, MATRICES, LARGE = 16, 8, 2**18  # `linear` on a CPU: most tokens, parts and fewest weights of a matrix that it splits


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Yarn:
    """RoPE stretched to longer texts: slow channel pairs turn `factor` times slower, fast ones as before, those between
    are blended. (YaRN, arXiv 2309.00071; OLMo 3 uses it on some layers.)"""

    factor: float = 8.0
    attention_factor: float = 1.2079441541679836  # 1 + ln(factor) / 10, on queries and on keys
    beta_fast: float = 32.0        # pairs that turn more often than this over the original length stay as they are
    beta_slow: float = 1.0         # those that turn less often are stretched in full
    original_length: int = 8192
    layers: tuple[int, ...] = ()   # which ones

    def frequencies(self, width: int, theta: float, device=None) -> Tensor:
        """As `rope_frequencies`: radians per position of the width / 2 channel pairs."""
        def pair(turns: float) -> float:
            """The channel pair (a fraction) that turns so often over the original length: theta^(-2i/width) solved for i."""
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        plain = rope_frequencies(width, theta, device)
        low, high = max(math.floor(pair(self.beta_fast)), 0), min(math.ceil(pair(self.beta_slow)), width - 1)
        stretched = ((torch.arange(width // 2, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: as it is, 1: in full
        return plain * (1 - stretched) + plain / self.factor * stretched


@dataclass(frozen=True)
class LLMConfig:
    vocabulary: int = 151_936  # V, without the extra tokens
    width: int = 4096          # d
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    mlp_hidden: int = 12_288
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = False         # the head reuses the embedding table
    norm_after: bool = False   # OLMo 3 normalises the outputs of attention and MLP; Qwen 3 their inputs
    norm_heads: bool = True    # one RMSNorm for each head's query and key (Qwen 3) or over all heads at once (OLMo 3)
    yarn: Yarn | None = None
    dropout: float = 0.1       # of what attention and MLP add, in training


@dataclass(frozen=True)
class MolmoConfig:
    views: ViewConfig = field(default_factory=ViewConfig)
    vit: ViTConfig = field(default_factory=ViTConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    temporal: TemporalConfig = field(default_factory=TemporalConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    point: PointConfig = field(default_factory=PointConfig)
    points_as: str = "tokens"  # "tokens": grounding tokens (MolmoPoint); "text": coordinates written out (Molmo2); "tags":
    #                            percent, of one picture (Molmo-1, VideoMolmo)
    bidirectional: bool = True  # visual tokens also see later ones; False: an ablation of Molmo2
    optimizer: str = "adamw"   # "adamw" as in the papers; "muon" for the matrices of small models trained from scratch

    def __post_init__(self):
        if self.points_as not in POINTS_AS:
            raise ValueError(f"points_as must be one of {', '.join(POINTS_AS)}, not {self.points_as!r}")
        if self.views.patch_size != self.vit.patch_size:
            raise ValueError(f"views have patches of {self.views.patch_size} px, the ViT of {self.vit.patch_size}")

    def token_ids(self) -> dict[str, int]:
        """Extra token -> id: they follow the base vocabulary."""
        return {name: self.llm.vocabulary + i for i, name in enumerate(EXTRA_TOKENS)}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "MolmoConfig":
        """Strict inverse of `to_json`: unknown or missing entries raise ValueError (`bidirectional` alone may be missing: it is
        younger than many checkpoints)."""
        return _build(cls, {"bidirectional": True} | dict(json.loads(text)), "config")


def _build(cls, values: dict, name: str):
    parts = {"views": ViewConfig, "vit": ViTConfig, "connector": ConnectorConfig, "temporal": TemporalConfig, "llm": LLMConfig,
             "point": PointConfig, "yarn": Yarn}
    wrong = {f.name for f in fields(cls)} ^ set(values)
    if wrong:
        raise ValueError(f"{name}: unknown or missing: {', '.join(sorted(wrong))}")

    def value(key: str, given):
        if key in parts and given is not None:
            return _build(parts[key], given, key)
        return tuple(given) if isinstance(given, list) else given

    made = cls(**{key: value(key, given) for key, given in values.items()})
    for f in fields(cls):
        found, kind = getattr(made, f.name), type(f.default)
        if kind in (bool, int, float, str) and type(found) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(f"{name}: {f.name} is {found!r}")
    return made


# Sizes: Molmo2 and MolmoPoint papers and the released config files. `tiny` trains on two CPU cores: 126 px crops of 9x9
# patches (odd like 27x27, so that 2x2 pooling leaves an empty column and 3x3 does not), every mechanism of the large ones.
# `small` is for one consumer GPU. Both have the vocabulary of assets/tokenizer.json.
QWEN3_8B = LLMConfig()
QWEN3_4B = replace(QWEN3_8B, width=2560, mlp_hidden=9728, rope_theta=5e6, tied=True)  # 1e6 in the paper's table
OLMO3_7B = LLMConfig(vocabulary=100_278, layers=32, kv_heads=32, mlp_hidden=11_008, rope_theta=5e5, norm_after=True,
                     norm_heads=False, yarn=Yarn(layers=tuple(range(3, 32, 4))))


def _molmo2(llm: LLMConfig) -> MolmoConfig:
    return MolmoConfig(views=ViewConfig(low_res_pointing=True), connector=ConnectorConfig(mlp_hidden=llm.mlp_hidden),
                       llm=llm, points_as="text")


def _molmopoint(llm: LLMConfig, max_crops: int = 24) -> MolmoConfig:
    return MolmoConfig(views=ViewConfig(max_crops=max_crops),
                       connector=ConnectorConfig(mlp_hidden=llm.mlp_hidden, output_layer=False), llm=llm)


PRESETS = {
    "tiny": MolmoConfig(
        views=ViewConfig(crop_size=126, margins=(1, 1), max_crops=4, max_frames=16),
        vit=ViTConfig(width=128, layers=5, heads=4, mlp_hidden=512, taps=(-1, -3), grid=9),
        connector=ConnectorConfig(width=128, heads=4, mlp_hidden=256, output_layer=False),
        temporal=TemporalConfig(width=128, heads=4),
        llm=LLMConfig(vocabulary=768, width=160, layers=4, heads=4, kv_heads=2, head_width=40, mlp_hidden=320,
                      rope_theta=1e4, dropout=0.0),
        point=PointConfig(width=256),
        optimizer="muon",
    ),
    "small": MolmoConfig(  # crops and windows of the released models
        views=ViewConfig(max_crops=8, max_frames=32),
        vit=ViTConfig(width=384, layers=6, heads=6, mlp_hidden=1536, taps=(-1, -3)),
        connector=ConnectorConfig(width=384, heads=6, mlp_hidden=1536, output_layer=False),
        temporal=TemporalConfig(width=384, heads=6),
        llm=LLMConfig(vocabulary=768, width=512, layers=12, heads=8, kv_heads=2, head_width=64, mlp_hidden=1536,
                      rope_theta=1e4, dropout=0.0),
        optimizer="muon",
    ),
    "molmo2-4b": _molmo2(QWEN3_4B),
    "molmo2-8b": _molmo2(QWEN3_8B),
    "molmo2-o-7b": _molmo2(OLMO3_7B),
    "molmopoint-8b": _molmopoint(QWEN3_8B),
    "molmopoint-gui-8b": _molmopoint(QWEN3_8B, max_crops=48),
    "molmopoint-vid-4b": _molmopoint(QWEN3_4B),
}


# ---------------------------------------------------------------------------------------------------------------------
# What the model eats


@dataclass
class Batch:
    """B sequences of T tokens and the pictures in them."""

    tokens: Tensor        # (B, T)
    targets: Tensor       # (B, T) the token to predict at each place
    loss_weights: Tensor  # (B, T) float, 0 = no loss
    positions: Tensor     # (B, T) for RoPE; every branch of a message tree restarts where its trunk ends
    example_ids: Tensor   # (B, T), from 0 in every row, -1 = padding
    branch_ids: Tensor    # (B, T), 0 = the trunk that all branches of the example share
    crops: Tensor         # (N, S, 3P²) uint8
    pooling: Tensor       # (M, K) into the N*S patches, -1 = empty slot, in the order of the visual tokens
    points: Tensor        # (G, 3) visual token of the batch, slot, location of each <|token_index|>; stops have token -1
    n_past: Tensor        # (N,) how many crops right before each show the same place earlier

    def to(self, device) -> "Batch":
        on_gpu = torch.device(device).type == "cuda"  # then the copy goes on after the call, if `pinned` was called before
        return Batch(*(getattr(self, f.name).to(device, non_blocking=on_gpu) for f in fields(self)))

    def pinned(self) -> "Batch":
        """In pinned memory, from which a copy to the GPU does not block the program."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


# ---------------------------------------------------------------------------------------------------------------------
# The language model


class Cache:
    """Keys and values of all layers, allocated once: of each layer (B, kv_heads, room, head_width).

    A layer reads a view of what has been written so far. After `read_whole` it always reads the full capacity (`room`), so
    that shapes never change and one compiled step, or CUDA graph, serves every token; the mask hides what is not yet written.
    """

    def __init__(self, c: LLMConfig, batch: int, room: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, c.kv_heads, room, c.head_width)
        self.keys, self.values = ([torch.empty(shape, dtype=dtype, device=device) for _ in range(c.layers)] for _ in range(2))
        self.room = room
        self.empty()

    def empty(self) -> "Cache":
        """As it was when it was new."""
        self.used, self.whole = 0, False
        self.at: slice | Tensor = slice(0)  # the places reserved last: `add` writes there
        self.end = 0                        # `add` returns keys and values up to here
        return self

    @property
    def bytes_read(self) -> int:
        """Bytes of keys and values that one step reads."""
        return 2 * len(self.keys) * self.keys[0][:, :, :self.end].nbytes

    def read_whole(self) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[:, :, self.used:] = 0  # masked values do no harm, unless they are NaN
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph may write only to what never moves
        self.whole, self.end = True, self.room

    def reserve(self, count: int) -> None:
        """Places for `count` more tokens. ValueError if there are not so many."""
        if self.used + count > self.room:
            raise ValueError(f"{count} more tokens do not fit into a cache of {self.room} that holds {self.used}")
        before, self.used = self.used, self.used + count
        if self.whole:
            self.at = torch.arange(before, self.used, device=self.keys[0].device)
        else:
            self.at, self.end = slice(before, self.used), self.used

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, kv_heads, T, head_width) in the reserved places; returns what is to be read."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.at], values[:, :, self.at] = k, v
        return keys[:, :, :self.end], values[:, :, :self.end]


def compiling_one_token(x: Tensor) -> bool:
    """Is x (..., i) a single token, in a step that is being compiled?"""
    return torch.compiler.is_compiling() and x.numel() == x.shape[-1]


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, ..., 1, i), weight (o, i) -> (1, ..., 1, o) as sums over products, which a compiler turns into a loop over the rows."""
    return (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i), weight (o, i) -> (..., o). A compiled step of one token on a CPU goes row by row, which streams the matrix
    from memory. BLAS is tuned for many tokens and may leave few to one thread or to slow loops: a large float32 matrix is
    therefore multiplied as a batch of smaller ones."""
    few = x.device.type == "cpu" and x.numel() <= FEW_TOKENS * x.shape[-1]
    if few and compiling_one_token(x):
        return row_by_row(x, weight)
    if few and weight.dtype == torch.float32 and weight.numel() >= LARGE and len(weight) % MATRICES == 0:
        columns = x.reshape(-1, x.shape[-1]).T.expand(MATRICES, -1, -1)  # (MATRICES, i, tokens)
        return torch.bmm(weight.unflatten(0, (MATRICES, -1)), columns).flatten(0, 1).T.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight)


class Linear(nn.Linear):
    """Without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class SelfAttention(nn.Module):
    def __init__(self, c: LLMConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.yarn = c.yarn if c.yarn is not None and layer in c.yarn.layers else None
        self.att_proj = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_width)  # rows q, k, v
        self.attn_out = Linear(c.heads * c.head_width, c.width)
        self.q_norm, self.k_norm = (RMSNorm(c.head_width * (1 if c.norm_heads else heads), c.norm_eps)
                                    for heads in (c.heads, c.kv_heads))

    def forward(self, x: Tensor, cos_sin: CosSin, mask: Mask, cache: Cache | None) -> Tensor:
        c = self.c
        qkv = self.att_proj(x).unflatten(-1, (-1, c.head_width))  # (B, T, heads + 2 * kv_heads, head_width)
        q, k, v = qkv.split([c.heads, c.kv_heads, c.kv_heads], dim=2)
        q, k = (apply_rope(a, cos_sin).to(v.dtype) for a in self.qk_norm(q, k))  # under autocast the norms make them float32
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (B, heads or kv_heads, T, head_width)
        if cache is not None:
            k, v = cache.add(self.layer, k, v)
        return self.attn_out(mask.attend(q, k, v).transpose(1, 2).flatten(2))

    def qk_norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, T, heads, head_width), k (B, T, kv_heads, head_width): each head by itself, or all heads at once."""
        if self.c.norm_heads:
            return self.q_norm(q), self.k_norm(k)
        return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)


class MLP(nn.Module):
    """SwiGLU; `ff_proj` holds the rows of (up, gate)."""

    def __init__(self, c: LLMConfig):
        super().__init__()
        self.ff_proj = Linear(c.width, 2 * c.mlp_hidden)
        self.ff_out = Linear(c.mlp_hidden, c.width)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.ff_proj(x).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: LLMConfig, layer: int):
        super().__init__()
        self.norm_after = c.norm_after
        self.attn_norm, self.ff_norm = (RMSNorm(c.width, c.norm_eps) for _ in range(2))
        self.self_attn, self.mlp = SelfAttention(c, layer), MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, cos_sin: CosSin, mask: Mask, cache: Cache | None, drop: Tensor | None) -> Tensor:
        if self.norm_after:
            x = x + self.dropped(self.attn_norm(self.self_attn(x, cos_sin, mask, cache)), drop)
            return x + self.dropped(self.ff_norm(self.mlp(x)), drop)
        x = x + self.dropped(self.self_attn(self.attn_norm(x), cos_sin, mask, cache), drop)
        return x + self.dropped(self.mlp(self.ff_norm(x)), drop)

    def dropped(self, x: Tensor, at: Tensor | None) -> Tensor:
        """Dropout at the tokens marked in `at`, (B, T) bool; at all of them if it is None."""
        if not self.training:
            return x
        return self.dropout(x) if at is None else torch.where(at[..., None], self.dropout(x), x)


class Embedding(nn.Module):
    """Rows of words: the base vocabulary and, trained from nothing, the extra tokens."""

    def __init__(self, c: LLMConfig, extra: bool = True):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(c.vocabulary, c.width))
        self.new_embedding = nn.Parameter(torch.empty(RESERVED, c.width)) if extra else None

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of tokens (...): (..., d), without ever joining the two tables."""
        base = len(self.embedding)
        rows = F.embedding(tokens.clamp(max=base - 1), self.embedding)
        return torch.where((tokens < base)[..., None], rows, F.embedding((tokens - base).clamp(min=0), self.new_embedding))

    def logits(self, x: Tensor, extra: bool) -> Tensor:
        """x (..., d) -> (..., V), or (..., V + RESERVED) with the extra tokens."""
        scores = linear(x, self.embedding)
        return torch.cat([scores, linear(x, self.new_embedding)], dim=-1) if extra else scores


# ---------------------------------------------------------------------------------------------------------------------
# The whole


class Alone:
    """One process does all the work on a batch. `parallel.Context` has the same methods for several: `mask` wraps the
    attention mask, `part` takes this process's tokens, `whole` gathers those of all, `own` zeroes the loss weights of the other
    processes' tokens, and `spread` runs a module on a share of the rows and gathers the results."""

    mask = part = whole = own = staticmethod(lambda x: x)

    @staticmethod
    def spread(module: nn.Module, *rows: Tensor) -> Tensor:
        return module(*rows)


class Molmo(nn.Module):
    def __init__(self, config: MolmoConfig):
        super().__init__()
        self.config = c = config
        self.context = Alone()
        self.ids = c.token_ids()
        self.vit = ViT(c.vit)
        self.connector = Connector(c.connector, c.temporal, c.vit.feature_width, c.llm.width)
        self.wte = Embedding(c.llm)
        self.blocks = nn.ModuleList(Block(c.llm, layer) for layer in range(c.llm.layers))
        self.ln_f = RMSNorm(c.llm.width, c.llm.norm_eps)
        self.lm_head = None if c.llm.tied else Embedding(c.llm, extra=c.points_as == "tokens")  # Molmo2 never says extra tokens
        self.point_predictor = PointPredictor(c.point, c.llm.width, c.vit.feature_width) if c.points_as == "tokens" else None

    @torch.no_grad()
    def initialize(self, seed: int) -> "Molmo":
        """Random weights from a seed. Matrices: normal with standard deviation 1 / sqrt(inputs), twice that in the patch embedding
        (pixels of one patch are much alike), a tenth of it where a matrix writes into the residual stream; tables of embeddings and
        positions: as large as what the blocks add to them; the head: small."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if "norm" in name or name.startswith("ln_f"):
                p.fill_(float(name.endswith("weight")))
            elif p.dim() == 1:
                p.zero_()
            elif name.startswith("lm_head"):
                p.normal_(0, 0.02, generator=generator)
            elif name.endswith("embedding"):
                p.normal_(0, 0.2, generator=generator)
            else:
                # w2 of the connector too: visual tokens much larger than words would hardly be changed by what the blocks add to them
                # (the connector's own wo does not write there: it feeds the projector, which multiplies its input by itself)
                residual = name.endswith(("attention.wo.weight", "w2.weight", "attn_out.weight", "ff_out.weight"))
                gain = 0.1 if residual else 2.0 if name.endswith("patch_embedding.weight") else 1.0
                p.normal_(0, gain * p.shape[1] ** -0.5, generator=generator)
        if self.connector.adapter is not None:
            self.connector.adapter.initialize("zero", seed)
        return self

    def with_temporal(self, temporal: TemporalConfig, init: str = "zero", seed: int = 0) -> "Molmo":
        """The same model with another temporal module; attention that it did not have before is new
        (`TemporalAttention.initialize`)."""
        made = Molmo(replace(self.config, temporal=temporal))
        made.load_state_dict(self.state_dict(), strict=False)  # all but the adapter, which only one of the two may have
        if made.connector.adapter is not None and self.connector.adapter is None:
            made.connector.adapter.initialize(init, seed)
        return made.to(self.wte.embedding.device, self.wte.embedding.dtype).train(self.training)

    def is_any(self, tokens: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) bool: tokens with one of these names."""
        return torch.isin(tokens, torch.tensor([self.ids[name] for name in names], device=tokens.device))

    def is_visual(self, tokens: Tensor) -> Tensor:
        """(B, T) bool: picture tokens and the start, end and column tokens around them."""
        return self.is_any(tokens, PICTURE_TOKENS)

    def visual_tokens(self, batch: Batch) -> VisualTokens:
        """ViT and connector over all pictures of the batch, matched to the placeholders in its tokens. ValueError if there are
        more or fewer of these than pool windows."""
        placeholder = self.is_any(batch.tokens, PLACEHOLDERS)
        if (count := int(placeholder.sum())) != len(batch.pooling):
            raise ValueError(f"{count} visual placeholder tokens, but {len(batch.pooling)} pool windows")
        features = self.encode(batch)
        windows, valid = gather_windows(features.flatten(0, 1), batch.pooling)
        embeddings = self.context.spread(self.connector, windows, valid, *self.past_windows(features, batch))
        at, indexable = placeholder.flatten().nonzero()[:, 0], batch.tokens[placeholder] == self.ids["<im_patch>"]
        return VisualTokens.of(windows, valid, embeddings, at, self.owners(batch)[placeholder], indexable)

    def encode(self, batch: Batch) -> Tensor:
        """ViT features (N, S, v). Crops that no visual token reads serve the temporal module only: they are encoded without
        gradient, or, if there is no such module, not at all."""
        read = torch.zeros(len(batch.crops), dtype=torch.bool, device=batch.crops.device)
        read[batch.pooling[batch.pooling >= 0] // batch.crops.shape[1]] = True
        seen = self.context.spread(self.vit, batch.crops[read])
        if self.config.temporal.mode == "none" and read.all():
            return seen
        features = seen.new_zeros(len(read), *seen.shape[1:]).index_put((read,), seen)
        if self.config.temporal.mode != "none":  # even if every crop here is read: all processes of a group make the same calls
            with torch.no_grad():
                features[~read] = self.context.spread(self.vit, batch.crops[~read])
        return features

    def past_windows(self, features: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        """What the temporal module needs besides the windows themselves: the same windows in the past, and whether there
        is any; () without such a module."""
        if self.config.temporal.mode == "none":
            return ()
        with torch.no_grad():
            black = self.vit(batch.crops.new_zeros(1, *batch.crops.shape[1:]))[0]
        past, known = mean_past(features, black, batch.n_past, self.config.temporal)
        crop = batch.pooling.amax(1) // features.shape[1]
        return gather_windows(past.flatten(0, 1), batch.pooling)[0], known[crop]

    def embed(self, tokens: Tensor) -> Tensor:
        """Word embeddings: tokens (...) -> (..., d); <im_low> shares <im_patch>'s. (The released inference code: <im_low> has its own,
        and what <|vit_index|> carries stands in place of its word embedding.)"""
        if self.config.point.released_inference:
            return self.wte.embed(tokens) * (tokens != self.ids[VIT_INDEX])[..., None]
        tokens = torch.where(tokens == self.ids["<im_low>"], self.ids["<im_patch>"], tokens)
        return self.wte.embed(tokens)

    def input_embeddings(self, batch: Batch, visual: VisualTokens) -> Tensor:
        """Word embeddings, plus what visual and grounding tokens carry: (B, T, d)."""
        x = self.embed(batch.tokens).flatten(0, 1)  # (B*T, d)
        x = x.index_add_(0, visual.at, visual.embeddings.to(x.dtype))  # in place: on MPS some versions of torch are said to return unwritten memory for no indices otherwise
        if self.point_predictor is not None:
            at_token, at_patch = ((batch.tokens.flatten() == self.ids[n]).nonzero()[:, 0] for n in (TOKEN_INDEX, VIT_INDEX))
            chosen = batch.points[:, 0] >= 0  # "no more points" carries nothing
            token, slot, _ = batch.points[chosen].T
            x = x.index_add_(0, at_token[chosen], visual.embeddings[token].to(x.dtype))
            n = len(at_patch)  # one fewer than `token` while an answer that is being written ends with <|token_index|>: its patch is not chosen yet
            patch = self.point_predictor.build_vit_embedding(visual.windows[token[:n], slot[:n]])
            x = x.index_add_(0, at_patch, patch.to(x.dtype))
        return x.view(*batch.tokens.shape, -1)

    def hidden_states(self, x: Tensor, positions: Tensor, mask: Mask, cache: Cache | None = None, drop: Tensor | None = None) -> Tensor:
        """x (B, T, d), positions (B, T) -> hidden states (B, T, d) after the last block, before the final norm. With a cache, the
        caller has reserved T places in it (`Cache.reserve`, which counts in Python: all that is left here can be one compiled graph).
        `drop` (B, T) bool says where dropout acts (None: everywhere)."""
        ropes = {yarn: self.rope(positions, yarn, x.dtype) for yarn in {block.self_attn.yarn for block in self.blocks}}
        for block in self.blocks:
            x = block(x, ropes[block.self_attn.yarn], mask, cache, drop)
        return x

    def rope(self, positions: Tensor, yarn: Yarn | None, dtype: torch.dtype) -> CosSin:
        """positions (B, T) -> cosines and sines, each (B, T, 1, head_width): the same for every head."""
        c = self.config.llm
        frequencies, scale = (rope_frequencies, 1.0) if yarn is None else (yarn.frequencies, yarn.attention_factor)
        return rope_cos_sin(positions[..., None], frequencies(c.head_width, c.rope_theta, positions.device), scale, dtype)

    def logits(self, h: Tensor) -> Tensor:
        """h (..., d) -> (..., V) scores of the base vocabulary, and of the extra tokens if points are grounding tokens."""
        head = self.wte if self.lm_head is None else self.lm_head
        return head.logits(self.ln_f(h), extra=self.point_predictor is not None)

    def owners(self, batch: Batch) -> Tensor:
        """(B, T): one number per example of the batch (`example_ids` are those of a row)."""
        rows, length = batch.tokens.shape
        return batch.example_ids + 1 + torch.arange(rows, device=batch.tokens.device)[:, None] * (length + 1)

    def mask_ids(self, batch: Batch) -> MaskIds:
        order = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        return MaskIds(batch.example_ids, batch.branch_ids, order, self.is_visual(batch.tokens) & self.config.bidirectional)

    def forward(self, batch: Batch, drop: Tensor | None = None) -> tuple[Tensor, VisualTokens]:
        """-> hidden states (B, T, d) and what was seen."""
        visual = self.visual_tokens(batch)        # ViT and connector
        x = self.input_embeddings(batch, visual)  # (B, T, d)
        mask = make_mask(self.mask_ids(batch))
        context = self.context                    # alone: part, mask and whole change nothing
        h = self.hidden_states(context.part(x), context.part(batch.positions), context.mask(mask), drop=context.part(drop))
        return context.whole(h), visual

    def losses(self, batch: Batch, drop_responses_only: bool = False) -> dict[str, Tensor]:
        """Weighted sums: `token`, `z` (the squared log-normaliser of the head), `patch`, `slot`, `location`; and counts
        `right` of `choices`. The caller divides by the summed loss weights (of all devices)."""
        h, visual = self.forward(batch, batch.loss_weights > 0 if drop_responses_only else None)
        h, targets, weights = h.flatten(0, 1), batch.targets.flatten(), self.context.own(batch.loss_weights).flatten()
        rows = weights.nonzero()[:, 0]
        logits = self.logits(h[rows]).float()
        normaliser = logits.logsumexp(-1)
        cross_entropy = normaliser - logits.gather(-1, targets[rows, None])[:, 0]
        losses = {"token": (cross_entropy * weights[rows]).sum(), "z": (normaliser**2 * weights[rows]).sum()}
        if self.point_predictor is not None:
            owners, branches = self.owners(batch).flatten(), batch.branch_ids.flatten()
            losses |= self.point_predictor.losses(h, targets, weights, owners, branches, batch.points, visual, self.ids)
        return losses
