"""The ViT and the connector, against slow loops written here in numpy."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from connector import Connector, ConnectorConfig, TemporalAttention, TemporalConfig, gather_windows, mean_past
from vit import ViT, ViTConfig

VIT = ViTConfig(width=12, layers=4, heads=3, mlp_hidden=20, taps=(-2, -4), grid=3, patch_size=2)


def scrambled(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The module in float64 with every parameter random, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.4, generator=generator)
    return module


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(x: np.ndarray, w: dict, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(s - max(scores)) for s in scores]
    return [weight / sum(weights) for weight in weights]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> np.ndarray:
    """One query (c,) over keys and values (n, c), head by head."""
    c, out = len(q) // heads, np.zeros(len(q))
    for head in range(heads):
        part = slice(head * c, (head + 1) * c)
        for share, value in zip(softmax([float(q[part] @ key[part]) / math.sqrt(c) for key in k]), v):
            out[part] += share * value[part]
    return out


# ---- the ViT ---------------------------------------------------------------------------------------------------------


def slow_vit(w: dict, c: ViTConfig, crop: np.ndarray) -> list[np.ndarray]:
    """One crop (S, 3P²) -> the output (S, v) of every block."""

    def norm(x, name):
        rows = [(row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + 1e-6) for row in x]
        return np.array(rows) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = np.array([linear((patch / 255 - 0.5) / 0.5, w, "patch_embedding") for patch in crop]) + w["positional_embedding"]
    outputs = []
    for i in range(max(c.tapped) + 1):
        y = norm(x, f"blocks.{i}.attention_norm")
        q, k, v = (linear(y, w, f"blocks.{i}.attention.{name}") for name in ("wq", "wk", "wv"))
        x = x + linear(np.array([attend(row, k, v, c.heads) for row in q]), w, f"blocks.{i}.attention.wo")
        y = linear(norm(x, f"blocks.{i}.ffn_norm"), w, f"blocks.{i}.feed_forward.w1")
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, w, f"blocks.{i}.feed_forward.w2")
        outputs.append(x)
    return outputs


@pytest.fixture(scope="module")
def vit() -> ViT:
    return scrambled(ViT(VIT), 0)


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return torch.randint(0, 256, (3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_vit_equals_slow_loops(vit, crops):
    """The features are the outputs of the tapped blocks, the first tap first, computed crop by crop, head by head."""
    outputs = [slow_vit(arrays(vit), VIT, crop.numpy()) for crop in crops]
    expected = np.array([np.concatenate([blocks[2], blocks[0]], axis=1) for blocks in outputs])
    np.testing.assert_allclose(vit(crops).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_released_taps_are_blocks_24_and_18():
    """Of 27 layers the third- and the ninth-from-last are tapped, and nothing after them is built."""
    assert ViTConfig().tapped == [24, 18] and ViTConfig().feature_width == 2304
    assert len(ViT(VIT).blocks) == 3
    for order in ((0, 1), (1, 0), (-1, -2)):
        assert len(ViT(ViTConfig(width=4, layers=2, heads=1, mlp_hidden=4, grid=1, patch_size=1, taps=order)).blocks) == 2


def test_crops_do_not_see_each_other(vit, crops):
    """Changing one crop leaves the features of the others bit-equal."""
    changed = crops.clone()
    changed[1] = 255 - changed[1]
    same = (vit(changed) == vit(crops)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]


def test_position_table_is_resized_only_for_another_grid(vit):
    """On its own grid the table is used as it is; on another it is resized as Pillow's bicubic filter does."""
    assert vit.positions(9) is vit.positional_embedding
    for side in (2, 5, 7):
        resized = vit.positions(side * side).detach().numpy().reshape(side, side, -1)
        for channel, plane in enumerate(vit.positional_embedding.detach().numpy().T):
            picture = Image.fromarray(plane.reshape(3, 3).astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            np.testing.assert_allclose(resized[..., channel], np.asarray(picture), atol=1e-5)


def test_the_position_table_is_resized_in_bfloat16_too(vit):
    """On a CPU, whose filter knows no bfloat16: the float32 result, rounded."""
    half = deepcopy(vit).bfloat16()
    expected = deepcopy(half).float().positions(25)
    assert half.positions(25).dtype == torch.bfloat16 and torch.equal(half.positions(25), expected.bfloat16())


def test_another_grid_changes_only_the_positions(vit):
    """Crops of 5x5 patches go through, and without a position table patches may come in any order."""
    crops = torch.randint(0, 256, (1, 25, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    flat = scrambled(ViT(VIT), 0)
    with torch.no_grad():
        flat.positional_embedding.zero_()
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(flat(crops[:, order]), flat(crops)[:, order], rtol=0, atol=1e-10)
    assert (vit(crops[:, order]) - vit(crops)[:, order]).abs().max() > 1e-3


# ---- the connector ---------------------------------------------------------------------------------------------------


def slow_connector(w: dict, heads: int, patches: np.ndarray, pooling: np.ndarray) -> np.ndarray:
    """Window by window: the mean of its patches asks, its patches answer, the gated projector follows."""
    tokens = []
    for window in pooling:
        slots = [patches[i] for i in window if i >= 0]
        q = linear(sum(slots) / len(slots), w, "image_pooling_2d.wq")
        k, v = (np.array([linear(slot, w, f"image_pooling_2d.{name}") for slot in slots]) for name in ("wk", "wv"))
        x = attend(q, k, v, heads)
        if "image_pooling_2d.wo.weight" in w:
            x = linear(x, w, "image_pooling_2d.wo")
        gate, value = linear(x, w, "image_projector.w1"), linear(x, w, "image_projector.w3")
        tokens.append(linear(gate / (1 + np.exp(-gate)) * value, w, "image_projector.w2"))
    return np.array(tokens)


def connector(output_layer: bool) -> Connector:
    return scrambled(Connector(ConnectorConfig(width=6, heads=2, mlp_hidden=10, output_layer=output_layer), TemporalConfig(), 8, 5), 4)


IMAGE_WINDOWS = [[0, 1, 5, 6], [2, -1, 7, -1], [-1, -1, -1, 11], [3, 4, 8, 9], [-1, 10, -1, 0]]  # 2x2
FRAME_WINDOWS = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10, -1, 11, 2, -1, -1, -1, -1], [-1] * 8 + [5]]  # 3x3


@pytest.mark.parametrize("output_layer", [True, False])
@pytest.mark.parametrize("windows", [IMAGE_WINDOWS, FRAME_WINDOWS])
def test_connector_equals_slow_loops(windows, output_layer):
    """A visual token is the pooled and projected window of its valid slots, as if the empty ones were not there."""
    model, pooling = connector(output_layer), torch.tensor(windows)
    patches = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    out = model(*gather_windows(patches, pooling)).detach().numpy()
    np.testing.assert_allclose(out, slow_connector(arrays(model), 2, patches.numpy(), pooling.numpy()), rtol=0, atol=1e-10)


def test_more_empty_slots_change_nothing():
    """Windows of four and of nine slots may share a batch: -1 slots added to a window do not change its token."""
    model, pooling = connector(False), torch.tensor(IMAGE_WINDOWS)
    patches = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    wide = torch.cat([pooling, torch.full((5, 5), -1)], dim=1)
    torch.testing.assert_close(model(*gather_windows(patches, wide)), model(*gather_windows(patches, pooling)), rtol=0, atol=1e-12)


def test_empty_slots_carry_no_gradient():
    """Patches that no window names get no gradient, though empty slots gather some patch on the way."""
    patches = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    connector(True)(*gather_windows(patches, torch.tensor([[3, -1, -1, 5], [-1, -1, 7, -1]]))).square().sum().backward()
    assert patches.grad.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5, 7]


def test_what_is_not_finite_stays_in_its_windows():
    """A patch of NaN, be it the first or another, is in the windows that name it and not in empty slots of others."""
    pooling = torch.tensor([[3, -1, -1, 5], [-1, -1, 7, -1]])
    for bad in range(8):
        windows, _ = gather_windows(torch.zeros(8, 2).index_fill(0, torch.tensor(bad), float("nan")), pooling)
        assert torch.equal(windows.isnan().any(-1), pooling == bad)


def test_no_windows_at_all():
    """A batch without pictures gives no visual tokens, through every part."""
    vit, features = scrambled(ViT(VIT), 8), connector(True)
    none = vit(torch.zeros(0, 9, 12, dtype=torch.uint8))
    assert none.shape == (0, 9, 24)
    assert features(*gather_windows(torch.zeros(0, 8, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.long))).shape == (0, 5)


def test_pixels_are_normalised_before_they_are_rounded():
    """A ViT in bfloat16 embeds the normalised pixels rounded once."""
    vit, seen = ViT(VIT).bfloat16(), []
    vit.patch_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    crops = torch.arange(9 * 12, dtype=torch.uint8).view(1, 9, 12) * 2
    with torch.no_grad():
        torch.nn.init.zeros_(vit.positional_embedding)
        vit(crops)
    assert torch.equal(seen[0], ((crops.float() / 255 - 0.5) / 0.5).bfloat16())


# ---- through time --------------------------------------------------------------------------------------------------------


def slow_past(features, black, frames, c):
    """One crop after the other, from the definition."""
    rows, known = [], []
    for n, frame in enumerate(frames.tolist()):
        before = [features[n - back] if frame >= back else black for back in range(1, c.history + 1)
                  if frame >= back or c.missing == "black"]
        rows.append(torch.stack(before).mean(0) if before else torch.zeros_like(black))
        known.append(bool(before))
    return torch.stack(rows), torch.tensor(known)


@pytest.mark.parametrize("missing", ["black", "masked"])
def test_the_past_is_the_mean_of_the_frames_before(missing):
    """Against a loop, on an image, two videos (one longer than the history) and an image again: no history crosses from
    one to the other, and black frames count in the mean."""
    torch.manual_seed(0)
    c, frames = TemporalConfig("attention", missing=missing), torch.tensor([-1, -1, 0, 1, 2, 3, 4, 5, 0, 1, -1])
    features, black = torch.randn(11, 6, 5), torch.randn(6, 5)
    past, known = mean_past(features, black, frames, c)
    wanted, there = slow_past(features, black, frames, c)
    torch.testing.assert_close(past, wanted)
    assert torch.equal(known, there) and known.all() == (missing == "black")


def test_no_gradient_goes_through_the_past():
    """The frames before only lend their features."""
    features = torch.randn(3, 4, 5, requires_grad=True)
    past, _ = mean_past(features, torch.zeros(4, 5), torch.arange(3), TemporalConfig("add"))
    assert not past.requires_grad
    again, _ = mean_past(features.flip(0), torch.zeros(4, 5), torch.arange(3), TemporalConfig("add", history=2))
    first, _ = mean_past(features[[1, 2, 0]], torch.zeros(4, 5), torch.arange(3), TemporalConfig("add", history=2))
    torch.testing.assert_close(again[2], first[2])  # the order of the frames before does not matter


def test_temporal_attention_equals_a_slow_loop():
    """Window by window and head by head: queries from the frame, keys and values from the past, what comes out is added;
    empty slots are neither keys nor changed."""
    c = TemporalConfig("attention", width=12, heads=3)
    adapter = TemporalAttention(c, 8)
    adapter.initialize("xavier", 0)
    torch.manual_seed(1)
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    windows, past = (torch.randn(2, 4, 8) * valid[..., None] for _ in range(2))
    with torch.no_grad():
        got = adapter(windows, past, valid)
        for m in range(2):
            q, k, v = (w(x[m]).view(4, 3, 4) for w, x in ((adapter.wq, windows), (adapter.wk, past), (adapter.wv, past)))
            for slot in range(4):
                heads = []
                for head in range(3):
                    weight = torch.stack([q[slot, head] @ k[other, head] / 2 for other in range(4)])
                    heads.append(weight.masked_fill(~valid[m], -torch.inf).softmax(0) @ v[:, head])
                wanted = windows[m, slot] + (adapter.wo(torch.cat(heads)) if valid[m, slot] else 0)
                torch.testing.assert_close(got[m, slot], wanted)


@pytest.mark.parametrize("mode", ["add", "concat", "attention"])
def test_each_mode_is_its_formula(mode):
    """add: the past is added; concat: it stands among the keys of the pooling, not in its mean; attention: before the
    pooling; where nothing is known of the past, the connector is as without."""
    plain = scrambled(Connector(ConnectorConfig(width=6, heads=2, mlp_hidden=10), TemporalConfig(), 8, 5), 4)
    made = scrambled(Connector(ConnectorConfig(width=6, heads=2, mlp_hidden=10), TemporalConfig(mode, width=4, heads=2), 8, 5), 4)
    made.load_state_dict(plain.state_dict(), strict=False)
    torch.manual_seed(2)
    valid = torch.tensor([[True] * 4, [True, True, False, False], [True] * 4])
    windows, past = (torch.randn(3, 4, 8).double() * valid[..., None] for _ in range(2))
    known = torch.tensor([True, True, False])
    with torch.no_grad():
        got = made(windows, valid, past, known)
        alone = plain(windows, valid)
        assert torch.equal(got[2], alone[2]) and not torch.isclose(got[:2], alone[:2]).all(-1).any()
        if mode == "add":
            torch.testing.assert_close(got[:2], plain(windows + past, valid)[:2])
        if mode == "attention":
            torch.testing.assert_close(got[:2], plain(made.adapter(windows, past, valid), valid)[:2])
        if mode == "concat":
            pool = plain.image_pooling_2d
            for m in (0, 1):
                keys = torch.cat([windows[m][valid[m]], past[m][valid[m]]])
                q = pool.wq(windows[m][valid[m]].mean(0)).view(2, 3)
                heads = [(pool.wk(keys).view(-1, 2, 3)[:, h] @ q[h] / 3**0.5).softmax(0) @ pool.wv(keys).view(-1, 2, 3)[:, h] for h in (0, 1)]
                torch.testing.assert_close(got[m], plain.image_projector(pool.wo(torch.cat(heads))))


def test_modes_that_do_not_exist_are_refused():
    """With the names of those that do."""
    for wrong in ({"mode": "sum"}, {"missing": "white"}):
        with pytest.raises(ValueError, match="must be one of"):
            TemporalConfig(**wrong)
