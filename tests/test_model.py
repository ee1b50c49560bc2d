"""The whole model: the decoder, the mask rule, what may influence what, the two generates, gradients, and learning."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
import weights
from attention import may_attend
from connector import ConnectorConfig, TemporalConfig
from generate import Answer, generate, generate_slowly, sampler, speakable
from model import FEW_TOKENS, PRESETS, Batch, LLMConfig, Molmo, MolmoConfig, linear
from packing import Example, collate
from pointing import TOKEN_INDEX, VIT_INDEX, VIT_LOC, PointConfig, grounded_pieces
from preprocess import ViewConfig, Views, image_views, video_views
from records import Annotation, Object, Record
from tokenizer import Tokenizer
from vit import ViTConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = Tokenizer([(34, 62)])  # bytes, and `">` as one token
CONFIG = replace(
    PRESETS["tiny"],
    views=ViewConfig(crop_size=70, margins=(1, 1), max_crops=4, max_frames=6),
    vit=ViTConfig(width=32, layers=3, heads=4, mlp_hidden=48, taps=(-1, -3), grid=5),
    connector=ConnectorConfig(width=32, heads=4, mlp_hidden=40, output_layer=False),
    llm=LLMConfig(vocabulary=TOKENIZER.base_size, width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp_hidden=64, rope_theta=1e4, dropout=0.0),
    point=PointConfig(width=16),
)
CONTROL = data.control_tokens(TOKENIZER)


def scrambled(seed: int, config: MolmoConfig = CONFIG) -> Molmo:
    """A model with every parameter random, biases, norms and the "no more points" vector included."""
    model, generator = Molmo(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") or name == "ln_f.weight" else 0.0, 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Molmo:
    return scrambled(0)


def look(seed: int, images: int = 0, frames: int = 0, sides: tuple[int, int] = (30, 200)) -> Views:
    """Random pictures of random sizes, as the model gets to see them; of nothing, for a text-only row."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (*rng.integers(*sides, 2), 3), dtype=np.uint8) for _ in range(images or frames)]
    if images:
        return image_views(pictures, CONFIG.views)
    if frames:
        return video_views(pictures, [0.5 * i for i in range(frames)], CONFIG.views)
    return Views(np.zeros((0, 25, 588), np.uint8), np.zeros((0, 5)), np.zeros((0, 4), np.int64), np.zeros(0, bool), [], [], None, np.zeros(0, int))


def pointed(views: Views, rng: np.random.Generator, lists: int = 1, most: int = 4) -> tuple[list[str], np.ndarray]:
    """An answer with lists of random points in the order of the rules, as pieces and rows."""
    tokens, slots = np.nonzero((views.pooling >= 0) & views.indexable[:, None])
    pieces, rows = ["Here: "], []
    for _ in range(lists):
        picked = np.sort(rng.choice(len(tokens), rng.integers(1, most + 1), replace=False))
        pieces += grounded_pieces(range(1, len(picked) + 1), "cups")
        rows += [[tokens[i], slots[i], rng.integers(9)] for i in picked] + [[-1, -1, -1]]
    return pieces, np.array(rows, np.int64)


def tree(seed: int, branches: int = 1, lists: int = 1, **seen) -> Example:
    """Pictures and questions about them; every second one is answered with points, if there is anything to point at."""
    views, rng = look(seed, **seen), np.random.default_rng([seed, 1])
    made = []
    for number in range(branches):
        pieces, rows = [f"It is {rng.integers(99)}."], np.zeros((0, 3), np.int64)
        if len(views.pooling) and number % 2 == 0:
            pieces, rows = pointed(views, rng, lists)
        made.append(data.branch(TOKENIZER, [(f"what is {rng.integers(99)}?", pieces)], rows))
    return Example(data.trunk(TOKENIZER, views), views.crops, views.pooling, made, n_past=views.n_past)


def prompt(seed: int, question: str = "where?", **seen) -> Example:
    return data.prompt(TOKENIZER, look(seed, **seen), question)


# ---- the decoder against slow loops ----------------------------------------------------------------------------------


def slow_decoder(model: Molmo, x: np.ndarray, positions: list[int], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (T, d) of one row -> hidden states before the final norm, and logits: loops over places and heads."""
    w, c = {name: p.detach().double().numpy() for name, p in model.named_parameters()}, model.config.llm
    norm = lambda row, weight: row / math.sqrt((row**2).mean() + c.norm_eps) * weight

    def turned(head: np.ndarray, position: int) -> np.ndarray:
        half, out = c.head_width // 2, np.zeros(c.head_width)
        for i in range(half):
            z = complex(head[i], head[half + i]) * np.exp(1j * position * c.rope_theta ** (-2 * i / c.head_width))
            out[i], out[half + i] = z.real, z.imag
        return out

    for layer in range(c.layers):
        name, x = f"blocks.{layer}.", x.copy()
        projected = [w[name + "self_attn.att_proj.weight"] @ norm(row, w[name + "attn_norm.weight"]) for row in x]
        heads = [row.reshape(-1, c.head_width) for row in projected]
        q = [[turned(norm(h, w[name + "self_attn.q_norm.weight"]), p) for h in row[:c.heads]] for row, p in zip(heads, positions)]
        k = [[turned(norm(h, w[name + "self_attn.k_norm.weight"]), p) for h in row[c.heads:c.heads + c.kv_heads]]
             for row, p in zip(heads, positions)]
        v = [row[c.heads + c.kv_heads:] for row in heads]
        for t in range(len(x)):
            mixed = []
            for head in range(c.heads):
                group = head // (c.heads // c.kv_heads)  # neighbouring query heads share a key head
                seen = [s for s in range(len(x)) if mask[t, s]]
                share = np.exp([q[t][head] @ k[s][group] / math.sqrt(c.head_width) for s in seen])
                mixed.append(sum(a * v[s][group] for a, s in zip(share / share.sum(), seen)))
            x[t] += w[name + "self_attn.attn_out.weight"] @ np.concatenate(mixed)
            y = w[name + "mlp.ff_proj.weight"] @ norm(x[t], w[name + "ff_norm.weight"])
            up, gate = y[:c.mlp_hidden], y[c.mlp_hidden:]
            x[t] += w[name + "mlp.ff_out.weight"] @ (gate / (1 + np.exp(-gate)) * up)
    head = "wte" if model.lm_head is None else "lm_head"
    table = np.concatenate([w[head + ".embedding"], w[head + ".new_embedding"]])
    return x, np.array([table @ norm(row, w["ln_f.weight"]) for row in x])


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_equals_slow_loops(tied):
    """Hidden states and logits agree with loops over places and heads, under the mask of a tree with two branches."""
    model = scrambled(1, replace(CONFIG, llm=replace(CONFIG.llm, tied=tied)))
    batch = collate([tree(2, branches=2, images=1, sides=(30, 60))])
    with torch.no_grad():
        visual = model.visual_tokens(batch)
        x, (h, _) = model.input_embeddings(batch, visual), model(batch)
        logits = model.logits(h)
    ids = model.mask_ids(batch)
    mask = may_attend(ids, ids)[0].numpy()
    slow_h, slow_logits = slow_decoder(model, x[0].double().numpy(), batch.positions[0].tolist(), mask)
    np.testing.assert_allclose(h[0].numpy(), slow_h, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[0].numpy(), slow_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [(), (1, 1), (2, 3), (FEW_TOKENS,), (FEW_TOKENS + 1,), (0,)])
@pytest.mark.parametrize("outputs", [24, 23])
def test_few_tokens_times_parts_of_a_matrix(monkeypatch, tokens, outputs):
    """Any number of tokens, in any shape, and outputs that cannot be shared out equally: the products are the matrix's, and
    so are the gradients; only few tokens and equal parts go as a batch."""
    batches, bmm = [], torch.bmm
    monkeypatch.setattr("model.LARGE", 0)
    monkeypatch.setattr(torch, "bmm", lambda a, b: batches.append(a.shape) or bmm(a, b))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*tokens, 10, generator=generator).requires_grad_()
    weight, given = torch.randn(outputs, 10, generator=generator).requires_grad_(), torch.randn(*tokens, outputs, generator=generator)
    ours, plain = ((product, *torch.autograd.grad(product, (x, weight), given)) for product in (linear(x, weight), F.linear(x, weight)))
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other)
    assert len(batches) == (tokens != (FEW_TOKENS + 1,) and outputs == 24)


def test_inputs_equal_a_loop(model):
    """Every embedding is the word's, plus what the connector, the chosen token or the chosen patch adds, place by place."""
    batch = collate([tree(3, images=2, branches=3, lists=2), tree(4), tree(5, frames=3)])
    ids = model.ids
    with torch.no_grad():
        visual, fast = model.visual_tokens(batch), None
        fast = model.input_embeddings(batch, visual)
        patches = model.vit(batch.crops).flatten(0, 1)
    words = torch.cat([model.wte.embedding, model.wte.new_embedding]).detach()
    build = model.point_predictor.build_vit_embedding
    choices, seen, last, kinds = iter(batch.points.tolist()), 0, None, set()
    for row in range(len(batch.tokens)):
        for place, token in enumerate(batch.tokens[row].tolist()):
            expected = words[ids["<im_patch>"] if token == ids["<im_low>"] else token].clone()
            if token in (ids["<im_patch>"], ids["<im_low>"]):
                expected += visual.embeddings[seen]
                seen += 1
            if token == ids[TOKEN_INDEX]:
                last = next(choices)
                kinds.add(last[0] >= 0)
                expected += visual.embeddings[last[0]] if last[0] >= 0 else 0
            if token == ids[VIT_INDEX]:
                expected += build.weight.detach() @ patches[batch.pooling[last[0], last[1]]] + build.bias.detach()
            torch.testing.assert_close(fast[row, place], expected, rtol=1e-5, atol=1e-5)
    assert seen == len(batch.pooling) and next(choices, None) is None and kinds == {True, False}


def test_placeholders_and_windows_must_match(model):
    """A batch with another number of placeholders than pool windows is refused with both numbers."""
    batch = collate([tree(6, images=1)])
    count = len(batch.pooling)
    with pytest.raises(ValueError, match=f"{count} visual placeholder tokens, but {count - 1} pool windows"):
        model.visual_tokens(replace(batch, pooling=batch.pooling[1:]))


def test_initial_weights_are_a_pure_function_of_the_seed():
    """The same seed gives the same weights, another seed others; all are filled and finite, and every norm starts at 1."""
    one, two, other = (Molmo(CONFIG).initialize(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) and one[name].isfinite().all() for name in one)
    assert not torch.equal(one["blocks.0.mlp.ff_out.weight"], other["blocks.0.mlp.ff_out.weight"])
    norms = [name for name in one if name.endswith(("norm.weight", "ln_f.weight"))]
    assert len(norms) == 2 * 3 + 4 * CONFIG.llm.layers + 2 and all((one[name] == 1).all() for name in norms)


@pytest.mark.parametrize("kind, most", [("new", 10), ("shipped", 5)])
def test_visual_tokens_can_hear_the_blocks(kind, most):
    """Visual tokens are not so much larger than what the blocks add to a word that nothing could be added to them: not in
    the shipped model, nor in a new one behind a ViT that has learned to see, whose features are large."""
    model, tokenizer = weights.load(ROOT / "assets/tiny")
    if kind == "new":
        seeing = {name: p.clone() for name, p in model.vit.state_dict().items()}
        model.initialize(0).vit.load_state_dict(seeing)
    tree = data.example(data.draw("clips", 1, 0, 4), tokenizer, model.config, np.random.default_rng(0))
    batch = collate([tree])
    h, visual = model(batch)
    words = torch.ones(batch.tokens.shape, dtype=torch.bool).flatten().index_fill(0, visual.at, False)
    added = (h - model.input_embeddings(batch, visual)).flatten(0, 1)[words]
    assert visual.embeddings.norm(dim=-1).mean() < most * added.norm(dim=-1).mean()


def test_both_forms_of_points_begin_with_equally_large_visual_tokens():
    """The output layer of the pooling attention, which only Molmo2 has, makes the visual tokens of a new model neither larger nor smaller."""
    size = {}
    for layer in (False, True):
        config = replace(PRESETS["tiny"], connector=replace(PRESETS["tiny"].connector, output_layer=layer))
        connector = Molmo(config).initialize(0).connector
        windows = torch.randn(50, 4, config.vit.feature_width, generator=torch.Generator().manual_seed(0))
        size[layer] = connector(windows, torch.ones(50, 4, dtype=torch.bool)).norm(dim=-1).mean()
    assert 0.5 < size[True] / size[False] < 2


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_config_survives_json():
    """Every preset comes back equal from its JSON text."""
    for config in [*PRESETS.values(), CONFIG]:
        assert MolmoConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("old, new, word", [
    ('"layers": 3', '"layers": 3, "depth": 3', "depth"),
    ('"kv_heads": 2,', "", "kv_heads"),
    ('"points_as"', '"points_at"', "points_a"),
    ('"points_as": "tokens"', '"points_as": "pixels"', "pixels"),
])
def test_wrong_configs_are_refused(old, new, word):
    """An unknown, missing or impossible entry of a config raises ValueError that names it."""
    text = CONFIG.to_json()
    assert old in text
    with pytest.raises(ValueError, match=word):
        MolmoConfig.from_json(text.replace(old, new))
    assert MolmoConfig.from_json(text.replace(',\n "bidirectional": true', "")) == CONFIG  # as before there was such an entry


def test_only_models_with_grounding_tokens_speak_them(model):
    """As text the extra tokens have no logits; as grounding tokens only the three of a point can be spoken."""
    h = torch.randn(2, CONFIG.llm.width, generator=torch.Generator().manual_seed(0))
    text = scrambled(0, replace(CONFIG, points_as="text"))
    assert text.point_predictor is None and text.logits(h).shape == (2, TOKENIZER.base_size)
    allowed = speakable(model).nonzero()[:, 0].tolist()
    assert allowed == [*range(TOKENIZER.base_size), *(model.ids[name] for name in (TOKEN_INDEX, VIT_INDEX, VIT_LOC))]


def test_special_tokens_around_pictures_are_visual(model):
    """Start, end, column and placeholder tokens count as visual; text, times, labels and grounding tokens do not."""
    views = look(7, images=2)
    pieces = views.layout + [TOKEN_INDEX, VIT_INDEX, VIT_LOC, "text", "<|im_end|>"]
    for piece in pieces:
        tokens = torch.tensor([TOKENIZER.encode_layout([piece])])
        assert model.is_visual(tokens).all() == model.is_visual(tokens).any() == (piece.startswith("<im_") or piece == "<low_res_im_start>")
    assert model.is_visual(torch.tensor([[model.ids["<frame_start>"], model.ids["<frame_end>"], model.ids["<|image|>"]]])).tolist() == [[True, True, False]]


# ---- what may influence what -----------------------------------------------------------------------------------------


def hidden(model: Molmo, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        return model(batch)[0]


def reached(model: Molmo, batch: Batch, start: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: places whose hidden state may depend on the inputs at `start` (B, T), by walking the mask loop by loop."""
    visual, examples, branches = (ids.tolist() for ids in (model.is_visual(batch.tokens), batch.example_ids, batch.branch_ids))
    changed = start.clone()
    for _ in range(model.config.llm.layers):
        before = changed.clone()
        for b, q in (~before).nonzero().tolist():
            for k in before[b].nonzero()[:, 0].tolist():
                same = examples[b][q] == examples[b][k]
                near = branches[b][k] in (0, branches[b][q])
                changed[b, q] |= same and near and (k <= q or (model.config.bidirectional and visual[b][q] and visual[b][k]))
    return changed


def differing(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    return (one != two).any(-1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("image", [0, 1])
def test_an_image_changes_exactly_what_may_see_it(image, bidirectional):
    """Of two images in one prompt, changing one changes all that sees it, directly or through others, and not a bit else; the other
    image is changed by a later one only if visual tokens look both ways."""
    model = scrambled(0, replace(CONFIG, bidirectional=bidirectional))
    views = look(8, images=2, sides=(30, 80))
    batch = collate([data.prompt(TOKENIZER, views, "where?"), tree(9, branches=2, images=1)])
    patches = np.nonzero(views.patch_boxes[:, 0] == image)[0]
    crops = batch.crops.clone()
    crops[sorted(set(patches // 25))] ^= 255
    placeholder = torch.isin(batch.tokens[0], torch.tensor([model.ids["<im_patch>"], model.ids["<im_low>"]])).nonzero()[:, 0]
    start = torch.zeros_like(batch.tokens, dtype=torch.bool)
    start[0, placeholder[np.isin(views.pooling, patches).any(1)]] = True
    changed = differing(hidden(model, batch), hidden(model, replace(batch, crops=crops)))
    assert torch.equal(changed, reached(model, batch, start))
    assert changed[0].any() and not changed[0].all() and not changed[1].any()
    other = torch.zeros_like(start)
    other[0, placeholder] = True
    assert changed[other & ~start].any() == (image == 0 or bidirectional)


def test_text_before_the_images_never_changes(model):
    """The beginning and the label of the first image are bit-equal whatever the images show; the label of the second is not."""
    views = look(8, images=2, sides=(30, 80))
    batch = collate([data.prompt(TOKENIZER, views, "where?")])
    changed = differing(hidden(model, batch), hidden(model, replace(batch, crops=batch.crops ^ 255)))[0].tolist()
    before = len(TOKENIZER.encode("Image 1")) + 1
    assert not any(changed[:before]) and all(changed[before:])


def test_branches_do_not_see_each_other(model):
    """Changing the tokens of one branch changes that branch from there on, and no bit of the trunk or of other branches."""
    batch = collate([tree(10, branches=3, images=1), tree(11, branches=2, frames=2)])
    place = int((batch.branch_ids[0] == 2).nonzero()[4, 0])
    tokens = batch.tokens.clone()
    tokens[0, place] += 1
    changed = differing(hidden(model, batch), hidden(model, replace(batch, tokens=tokens)))
    expected = (batch.branch_ids == 2) & (torch.arange(batch.tokens.shape[1]) >= place)
    expected[1] = False
    assert torch.equal(changed, expected)


# ---- the two generates -----------------------------------------------------------------------------------------------


def babble(model: Molmo):
    """Samplers that look at nothing but the logits, and begin and end lists often."""
    point, (close,), eos = model.ids[TOKEN_INDEX], CONTROL.close, TOKENIZER.eos_id

    def sample(logits: torch.Tensor) -> int:
        if logits[point].isfinite() and logits[1] > logits[2]:
            return point
        if logits[3] > logits[4] + 1.0:
            return close
        return eos if logits[5] > logits[6] + 1.5 else int(logits[:eos].argmax())

    return lambda: sample


def script(tokens: list[int]):
    """Samplers that say what they are told to."""
    def samplers():
        rest = iter(tokens)

        def sample(logits: torch.Tensor) -> int:
            token = next(rest)
            assert logits[token].isfinite(), "the script asks for a token that may not be said"
            return token

        return sample

    return samplers


SEEN = {"text": {}, "image": {"images": 1, "sides": (100, 200)}, "two images": {"images": 2}, "video": {"frames": 4}}


@pytest.mark.parametrize("seen", SEEN)
def test_cached_equals_slow(model, seen):
    """With and without pictures, the cached answer is the uncached one: tokens, choices and the reason it ended."""
    points = stops = 0
    for seed in range(3):
        batch = collate([prompt(20 + seed, **SEEN[seen])])
        fast, = generate(model, batch, CONTROL, 40, babble(model))
        assert fast == generate_slowly(model, batch, CONTROL, 40, babble(model))
        points += sum(row[2] >= 0 for row in fast.triples)
        stops += sum(row[0] < 0 for row in fast.triples)
    assert (points >= 6 and stops >= 2) if SEEN[seen] else points == stops == 0


@pytest.mark.parametrize("seen", ["image", "two images", "video"])
def test_cached_equals_slow_on_a_script(model, seen):
    """Lists written one after the other by a fixed script, up to the last token that fits, are the same in both."""
    point = model.ids[TOKEN_INDEX]
    listed = TOKENIZER.encode('<points coords="') + [t for i in range(9) for t in (point, TOKENIZER.encode(str(i))[0])]
    tokens = listed + listed + [TOKENIZER.eos_id]
    for seed in range(2):
        batch = collate([prompt(30 + seed, **SEEN[seen])])
        for room in (17, 18, 19, 120):
            fast, = generate(model, batch, CONTROL, room, script(tokens))
            assert fast == generate_slowly(model, batch, CONTROL, room, script(tokens))
            assert fast.finish_reason == ("stop" if room == 120 else "length")
    assert len(fast.triples) == 18


def test_rows_of_a_batch_are_as_if_alone(model):
    """Prompts of different lengths and kinds in one batch get the answers that each gets alone."""
    prompts = [prompt(40, "hm", **SEEN["image"]), prompt(41, "what is the longest question of all?"), prompt(42, **SEEN["video"]),
               prompt(43, "and?", **SEEN["two images"]), prompt(44, "so", **SEEN["image"])]
    together = generate(model, collate(prompts), CONTROL, 40, babble(model))
    assert together == [generate(model, collate([p]), CONTROL, 40, babble(model))[0] for p in prompts]
    assert {answer.finish_reason for answer in together} == {"stop", "length"}, "this test needs answers that end early"
    assert sum(row[2] >= 0 for answer in together for row in answer.triples) >= 4


def test_answers_go_on_after_an_answer_with_points(model):
    """A second turn, with the points of the first among its inputs, is answered alike by both."""
    views, rng = look(50, images=1), np.random.default_rng(50)
    pieces, rows = pointed(views, rng)
    asked = TOKENIZER.chat_prompt("where?") + TOKENIZER.encode_layout(pieces) + [TOKENIZER.eos_id] + TOKENIZER.chat_prompt("and now?")
    example = data.prompt(TOKENIZER, views, "")
    example.branches[0].tokens, example.branches[0].points = np.array(asked + [TOKENIZER.eos_id]), rows
    example.branches[0].loss_mask = np.zeros(len(asked) + 1, bool)
    batch = collate([example])
    fast, = generate(model, batch, CONTROL, 30, babble(model))
    assert fast == generate_slowly(model, batch, CONTROL, 30, babble(model))


def test_end_of_turn(model):
    """The end-of-turn token ends an answer and is not part of it; an answer that is not over ends for its length."""
    batch, words = collate([prompt(45, **SEEN["image"])]), TOKENIZER.encode("cups")
    for run in (lambda room, tokens: generate(model, batch, CONTROL, room, script(tokens))[0],
                lambda room, tokens: generate_slowly(model, batch, CONTROL, room, script(tokens))):
        assert run(9, words + [TOKENIZER.eos_id]) == Answer(words, [], "stop")
        assert run(5, words + [TOKENIZER.eos_id]) == Answer(words, [], "stop")
        assert run(4, words + [TOKENIZER.eos_id]) == Answer(words, [], "length")
        assert run(0, []) == Answer([], [], "length")
        assert run(3, [TOKENIZER.eos_id]) == Answer([], [], "stop")


def test_text_models_generate_alike():
    """A model that writes its points as text has no rules to follow, and both ways agree for it too."""
    model = scrambled(2, replace(CONFIG, points_as="text"))
    batch = collate([prompt(46, **SEEN["image"])])
    fast, = generate(model, batch, CONTROL, 30)
    assert fast == generate_slowly(model, batch, CONTROL, 30) and len(fast.tokens) == 30 and fast.triples == []


def test_sampling_is_reproducible(model):
    """With a temperature the same seed gives the same answer, cached or not, and another seed another answer."""
    batch = collate([prompt(47, **SEEN["image"])])
    run = lambda seed: generate(model, batch, CONTROL, 25, partial(sampler, 1.0, 0.9, seed))[0]
    assert run(1) == run(1) == generate_slowly(model, batch, CONTROL, 25, partial(sampler, 1.0, 0.9, 1))
    assert run(1) != run(2)


def test_sampler():
    """Temperature 0 takes the best token; top-p keeps the fewest tokens that reach it; counts follow the probabilities."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    counts = lambda sample: torch.bincount(torch.tensor([sample(logits) for _ in range(2000)]), minlength=4) / 2000
    assert sampler()(logits) == 1 and sampler(1.0, 0.01)(logits) == 1
    assert counts(sampler(1.0, 0.4)).tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(counts(sampler(1.0, 0.65)), torch.tensor([0, 4 / 7, 0, 3 / 7]), rtol=0, atol=0.04)
    torch.testing.assert_close(counts(sampler(1.0)), logits.exp(), rtol=0, atol=0.04)
    torch.testing.assert_close(counts(sampler(0.5)), (2 * logits).softmax(0), rtol=0, atol=0.04)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: Molmo, batch: Batch) -> dict[str, torch.Tensor | None]:
    """Of the training loss: all sums together, over the summed weights. They must be finite."""
    model.zero_grad()
    losses = model.losses(batch)
    assert all(loss.isfinite() for loss in losses.values()), losses
    (sum(losses[name] for name in train.LOSSES) / batch.loss_weights.sum().clamp(min=1)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradient_reaches_every_parameter():
    """Images, a video and points together move every parameter, but for key biases, which no softmax can feel."""
    found = gradients(scrambled(3), collate([tree(60, branches=2, lists=2, images=2), tree(61, frames=3), tree(62)]))
    unfelt = {name for name in found if name.endswith(("wk.bias", "subpatch_k.bias"))}
    for name, gradient in found.items():
        assert gradient is not None and gradient.isfinite().all(), name
        assert name in unfelt or gradient.abs().max() > 1e-6, f"nothing reaches {name}"
    assert len(unfelt) == CONFIG.vit.layers + 2


def without_loss(batch: Batch) -> Batch:
    return replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))


@pytest.mark.parametrize("batch", [
    lambda: without_loss(collate([tree(63, images=1, branches=2)])),
    lambda: collate([tree(64), tree(65, branches=2)]),
    lambda: without_loss(collate([tree(64)])),
    lambda: collate([prompt(66, images=1), tree(67)]),
    lambda: collate([tree(68), tree(69, frames=2)]),
], ids=["no loss", "no pictures", "neither", "no points", "pictures in one row"])
def test_odd_batches_have_finite_gradients(batch):
    """A batch without loss tokens, without pictures or without points gives finite losses and no NaN gradient."""
    found = gradients(scrambled(3), batch())
    assert all(gradient is None or gradient.isfinite().all() for gradient in found.values())
    assert any(gradient is not None for gradient in found.values())


# ---- learning --------------------------------------------------------------------------------------------------------


def test_a_few_pictures_are_learned_with_adamw():
    """After 60 steps on four small pictures the loss has fallen far and the decoded points lie in the right places. (With Muon thirty
    steps do, on whole scenes: test_train.py.)"""
    config = replace(CONFIG, views=replace(CONFIG.views, max_crops=1), optimizer="adamw")
    rng, examples, answers, prompts = np.random.default_rng(0), [], [], []
    for _ in range(4):
        picture = np.full((70, 70, 3), 40, np.uint8)
        corners = [(x, y) for x, y in rng.integers(0, 4, (2, 2)) * 14 + 7]
        for x, y in corners:
            picture[y:y + 14, x:x + 14] = 250, 220, 30
        views = image_views([picture], config.views)
        things = {i: Object({0: (x + dx, y + dy)}) for i, ((x, y), (dx, dy)) in enumerate(zip(corners, rng.uniform(1, 13, (2, 2))))}
        said = Annotation("point", "spots", [0, 1], question="Where?")
        pieces, rows = data.answer_pieces(said, Record("", [picture], None, things, [said]), views, config)
        examples.append(Example(data.trunk(TOKENIZER, views), views.crops, views.pooling, [data.branch(TOKENIZER, [("Where?", pieces)], rows)]))
        answers.append(Answer(TOKENIZER.encode_layout(pieces), rows.tolist(), "stop"))
        prompts.append(data.prompt(TOKENIZER, views, "Where?"))

    model, batch = Molmo(config).initialize(0), collate(examples)
    optimisers, history = train.optimizers(model, model.config.optimizer), []
    for group in (group for optimiser in optimisers for group in optimiser.param_groups):
        group["lr"] = 3e-3
    for _ in range(60):
        losses = model.losses(batch)
        loss = sum(losses[name] for name in train.LOSSES) / batch.loss_weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0] / 20
    assert generate(model.eval(), collate(prompts), CONTROL, 80) == answers


# ---- through time --------------------------------------------------------------------------------------------------------


def temporal(mode: str, missing: str = "black", seed: int = 0, **changes) -> Molmo:
    return scrambled(seed, replace(CONFIG, temporal=TemporalConfig(mode, missing=missing, width=16, heads=4), **changes))


def moment(seed: int, past: int, question: str = "where?") -> Example:
    """A question about a frame that has `past` frames before it."""
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (60, 90, 3), dtype=np.uint8) for _ in range(past + 1)]
    return data.prompt(TOKENIZER, image_views(frames[-1:], CONFIG.views, frames[:-1]), question)


def near(got: torch.Tensor, wanted: torch.Tensor):
    """To a hundred-thousandth of the scale."""
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


MODES = ["add", "concat", "attention"]


@pytest.mark.parametrize("missing", ["black", "masked"])
@pytest.mark.parametrize("mode", MODES)
def test_history_never_crosses_videos(mode, missing):
    """In a batch of a video, an image, two frames with their past and another video, every example sees what it sees alone:
    2x2 and 3x3 windows, padded rows and packs."""
    model = temporal(mode, missing)
    examples = [prompt(1, frames=6), prompt(2, images=1), moment(3, 4), moment(4, 1), prompt(5, frames=2), moment(6, 0)]
    with torch.no_grad():
        alone = torch.cat([model.visual_tokens(collate([e])).embeddings for e in examples])
        together, packed = model.visual_tokens(collate(examples)), model.visual_tokens(collate([examples[:3], examples[3:]]))
    near(together.embeddings, alone)
    near(packed.embeddings, alone)


@pytest.mark.parametrize("mode", MODES)
def test_the_past_is_seen_and_only_the_four_frames_before(mode):
    """Another frame four back changes a frame's tokens, one five back and one later do not; the order of the four does not
    matter; and the module changes something at all."""
    model, rng = temporal(mode), np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (7, 60, 90, 3), dtype=np.uint8))
    other = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    def tokens(shown):
        views = video_views(shown, [0.5 * i for i in range(7)], CONFIG.views)
        with torch.no_grad():
            return model.visual_tokens(collate([data.prompt(TOKENIZER, views, "?")])).embeddings.view(7, -1, CONFIG.llm.width)[5]
    plain = tokens(frames)
    swapped = lambda i: [*frames[:i], other, *frames[i + 1:]]
    assert not torch.allclose(tokens(swapped(1)), plain, atol=1e-4) and not torch.allclose(tokens(swapped(4)), plain, atol=1e-4)
    torch.testing.assert_close(tokens(swapped(0)), plain)
    torch.testing.assert_close(tokens(swapped(6)), plain)
    near(tokens([frames[i] for i in (0, 3, 1, 4, 2, 5, 6)]), plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_frame_alone_sees_what_it_sees_in_its_video(mode):
    """With windows of one size, the crops before an image are to it what the frames before are to a frame of a video."""
    model = temporal(mode, views=replace(CONFIG.views, image_pool=3, max_crops=1))
    frames = list(np.random.default_rng(0).integers(0, 256, (6, 70, 70, 3), dtype=np.uint8))
    with torch.no_grad():
        views = video_views(frames, [0.5 * i for i in range(6)], model.config.views)
        video = model.visual_tokens(collate([data.prompt(TOKENIZER, views, "?")])).embeddings.view(6, -1, CONFIG.llm.width)
        for number in (0, 2, 5):
            views = image_views(frames[number:number + 1], model.config.views, frames[max(number - 4, 0):number])
            alone = model.visual_tokens(collate([data.prompt(TOKENIZER, views, "?")])).embeddings
            near(alone[:len(video[0])], video[number])


def test_without_a_module_the_past_is_not_looked_at(model, monkeypatch):
    """Frames before an image change nothing, and the ViT is not run on them."""
    calls, real = [], model.vit.forward
    monkeypatch.setattr(model.vit, "forward", lambda crops: calls.append(len(crops)) or real(crops))
    with torch.no_grad():
        one, other = (model.visual_tokens(collate([e])) for e in (moment(3, 4), data.prompt(
            TOKENIZER, image_views([np.random.default_rng(3).integers(0, 256, (5, 60, 90, 3), dtype=np.uint8)[4]], CONFIG.views), "where?")))
    torch.testing.assert_close(one.embeddings, other.embeddings)
    torch.testing.assert_close(one.windows, other.windows)
    assert calls[0] == calls[1] and len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_reaches_the_past(mode, monkeypatch):
    """The frames before a frame are encoded without gradient: the gradients are those of a ViT that was handed their
    features as constants; the module itself learns."""
    model = temporal(mode)
    batch = collate([moment(3, 4)])
    calls, constants, real = [], {}, model.vit.forward

    def gradients(forward):
        monkeypatch.setattr(model.vit, "forward", forward)
        model.zero_grad()
        model.visual_tokens(batch).embeddings.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def recorded(crops):
        calls.append((len(crops), torch.is_grad_enabled()))
        features = real(crops)
        if not torch.is_grad_enabled():
            constants[len(crops)] = features.clone()
        return features

    got = gradients(recorded)
    crops = len(batch.crops) // 5
    assert sorted(calls) == sorted([(crops, True), (4 * crops, False), (1, False)])
    handed = gradients(lambda crops: constants[len(crops)] if len(crops) in constants else real(crops))
    assert got.keys() == handed.keys() and all(torch.equal(gradient, got[name]) for name, gradient in handed.items())
    assert mode != "attention" or all(got[f"connector.adapter.{w}.weight"].any() for w in ("wq", "wk", "wv", "wo"))


@pytest.mark.parametrize("mode", MODES)
def test_both_generates_agree_through_time(mode):
    """The cached one, on a batch of frames and a video, and the oracle, one by one."""
    model = temporal(mode)
    prompts = [moment(3, 4), prompt(1, frames=5), moment(4, 0)]
    together = generate(model, collate(prompts), CONTROL, 12)
    for answer, example in zip(together, prompts):
        assert answer == generate_slowly(model, collate([example]), CONTROL, 12)


def test_a_module_that_starts_at_zero_changes_nothing(model):
    """Bit for bit, in the whole model, losses included; with Xavier's it does."""
    batch = collate([[tree(5, branches=2, frames=5), tree(6, branches=2, images=1)]])
    wanted = {name: loss.detach() for name, loss in model.losses(batch).items()}
    for init, same in (("zero", True), ("xavier", False)):
        made = model.with_temporal(TemporalConfig("attention", width=16, heads=4), init)
        got = made.losses(batch)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted) == same
    assert made.with_temporal(TemporalConfig()).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("mode", MODES)
def test_text_alone_has_no_past(mode):
    """A batch without pictures goes through a model with a temporal module: losses and answers."""
    model = temporal(mode)
    words = Example(data.trunk(TOKENIZER, look(0)), look(0).crops, look(0).pooling, [data.branch(TOKENIZER, [("who?", "me")], np.zeros((0, 3), np.int64))])
    losses = model.losses(collate([words]))
    assert losses["token"] > 0
    losses["token"].backward()
    assert generate(model, collate([prompt(1)]), CONTROL, 4) == [generate_slowly(model, collate([prompt(1)]), CONTROL, 4)]


@pytest.mark.parametrize("wrong", [{"history": 0}, {"heads": 5}, {"heads": 0}])
def test_impossible_modules_are_refused(wrong):
    """When they are described, not when they run."""
    with pytest.raises(ValueError, match="temporal: a history of"):
        TemporalConfig("attention", **({"width": 16, "heads": 4} | wrong))
