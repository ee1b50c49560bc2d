"""Many questions about one thing, the static cache and its bounds, pictures in parts. (That one cached answer is the slow
one is in test_model.py.)"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import data
import generate as generation
from attention import Dense, DenseDecode, MaskIds, make_mask, may_attend
from generate import Linear8, Speed, Frontier, generate, generate_slowly, sampler, step_bytes, to_int8, word_by_word
from model import Cache
from packing import collate
from pointing import PointPredictor
from test_model import CONFIG, SEEN, CONTROL, TOKENIZER, babble, look, model, prompt, scrambled, script  # noqa: F401

QUESTIONS = ["where?", "what is the longest question of all that are asked here?", "and?", "how many of them are there?"]


def tree(seed: int, questions=QUESTIONS, **seen):
    return data.prompts(TOKENIZER, look(seed, **seen), questions)


SEED = {seen: 60 + i for i, seen in enumerate(SEEN)}
KNOWN = {}  # answers of the oracle, which takes its time


def one_by_one(model, seed: int, questions=QUESTIONS, **seen):  # noqa: F811
    for q in questions:
        if (seed, q) not in KNOWN:
            KNOWN[seed, q] = generate_slowly(model, collate([prompt(seed, q, **seen)]), CONTROL, 30, babble(model))
    return [KNOWN[seed, q] for q in questions]


@pytest.mark.parametrize("mode", ["views", "static"])
@pytest.mark.parametrize("seen", SEEN)
def test_answers_of_a_tree_are_those_to_each_question_alone(model, seen, mode):  # noqa: F811
    """Four questions about one thing, answered together, get the answers of the oracle, which is asked one by one."""
    together = generate(model, collate([tree(SEED[seen], **SEEN[seen])]), CONTROL, 30, babble(model), mode=mode)
    assert together == one_by_one(model, SEED[seen], **SEEN[seen])
    assert len({len(answer.tokens) for answer in together}) > 1, "this test needs answers of different lengths"


@pytest.mark.parametrize("mode", ["views", "static"])
def test_trees_of_different_sizes_in_one_batch(model, mode):  # noqa: F811
    """Trees with four, one and two branches, with and without pictures, padded to one length: row by row, branch by branch."""
    asked = [(71, QUESTIONS, SEEN["image"]), (72, QUESTIONS[1:2], SEEN["text"]), (73, QUESTIONS[2:], SEEN["video"])]
    together = generate(model, collate([tree(seed, q, **seen) for seed, q, seen in asked]), CONTROL, 30, babble(model), mode=mode)
    assert together == [answer for seed, q, seen in asked for answer in one_by_one(model, seed, q, **seen)]
    assert {answer.finish_reason for answer in together} == {"stop", "length"}


def test_sampled_answers_of_a_tree_too(model):  # noqa: F811
    """With a temperature every branch draws as if it were asked alone with the same seed, and not what its neighbours draw."""
    samplers = partial(sampler, 1.0, 0.9, 5)
    alone = [generate_slowly(model, collate([prompt(74, q, **SEEN["image"])]), CONTROL, 12, samplers) for q in QUESTIONS]
    assert generate(model, collate([tree(74, **SEEN["image"])]), CONTROL, 12, samplers) == alone
    assert len({tuple(answer.tokens) for answer in alone}) > 1


@pytest.mark.parametrize("changes", [
    {"points_as": "text"}, {"bidirectional": False}, {"llm": replace(CONFIG.llm, norm_after=True, norm_heads=False, kv_heads=CONFIG.llm.heads)}])
def test_trees_of_other_models(changes):
    """The same for a model that writes its points as text, for one whose visual tokens look back only, and for one in OLMo's style."""
    model = scrambled(4, replace(CONFIG, **changes))  # noqa: F811
    alone = [generate_slowly(model, collate([prompt(74, q, **SEEN["image"])]), CONTROL, 20) for q in QUESTIONS]
    for mode in ("views", "static"):
        assert generate(model, collate([tree(74, **SEEN["image"])]), CONTROL, 20, mode=mode) == alone


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS[:1]])
def test_a_compiled_step_writes_the_same(model, monkeypatch, questions, eight):  # noqa: F811
    """Captured as one graph (and run without a compiler's back end), the step gives the same answers, to many questions and to
    one, for which products are loops over rows, in eight bits too; and that one graph serves all tokens."""
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(generation.one_step, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(generation, "compiled", lambda *_, **__: step)
    model, batch = to_int8(deepcopy(model)) if eight else model, collate([tree(74, questions, **SEEN["image"])])
    assert generate(model, batch, CONTROL, 12, mode="compiled") == generate(model, batch, CONTROL, 12)
    assert counter.frame_count == 1
    nodes = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert nodes.count("sum") == (4 * len(model.blocks) + 2 if len(questions) == 1 else 0)  # and the head's two tables
    assert any("lshift" in node for node in nodes) == (eight and len(questions) == 1)  # four weights read as one word


def test_compiled_answers_share_their_cache(model, monkeypatch):  # noqa: F811
    """A second prompt of the same room is answered in the same memory, as if it had been answered first."""
    monkeypatch.setattr(generation, "compiled", lambda *_, **__: generation.one_step)
    generation.static_cache.cache_clear()
    for text in QUESTIONS[:2]:
        batch = collate([prompt(74, text, **SEEN["image"])])
        assert generate(model, batch, CONTROL, 12, mode="compiled") == generate(model, batch, CONTROL, 12)
    assert generation.static_cache.cache_info()[:2] == (1, 1)  # hits, misses


def test_a_trunk_without_questions_goes_on_itself(model):  # noqa: F811
    """Text that only the trunk holds is continued, by both."""
    example = prompt(75)
    example.trunk, example.branches = TOKENIZER.encode("once upon a time"), []
    batch = collate([replace(example, trunk=torch.tensor(example.trunk).numpy())])
    assert generate(model, batch, CONTROL, 9) == [generate_slowly(model, batch, CONTROL, 9)]


def test_only_one_tree_a_row(model):  # noqa: F811
    """Two prompts packed into one row are refused."""
    with pytest.raises(ValueError, match="only one prompt"):
        generate(model, collate([[prompt(76), prompt(77)]]), CONTROL, 4)


def test_pictures_and_their_keys_are_paid_for_once(model, monkeypatch):  # noqa: F811
    """However many questions: one prefill of the trunk, one computation of the keys that are pointed at."""
    calls, real = [], PointPredictor.patch_keys
    monkeypatch.setattr(PointPredictor, "patch_keys", lambda *args: calls.append(1) or real(*args))
    batch, speed = collate([tree(78, **SEEN["video"])]), Speed()
    answers = generate(model, batch, CONTROL, 12, script(TOKENIZER.encode("abcd") * 3), speed)
    assert len(calls) == 1 and batch.crops.shape[0] == SEEN["video"]["frames"]
    assert speed.prompt == (batch.example_ids >= 0).sum() == batch.tokens.shape[1]
    assert speed.written == sum(len(answer.tokens) - 1 for answer in answers), "the last one is never read"
    assert speed.read > 11 * step_bytes(model) and min(speed.prefill, speed.decode) > 0


def test_a_branch_that_ends_makes_the_steps_narrower(model):  # noqa: F811
    """After the end of three of four answers a step has one token."""
    frontier, _ = Frontier.of(collate([tree(79)]))
    assert frontier.column.tolist() == [0, 1, 2, 3] and frontier.row.tolist() == [0] * 4 and frontier.branch.tolist() == [1, 2, 3, 4]
    words, speed = TOKENIZER.encode("a"), Speed()
    scripts = iter([words * 7] + [words + [TOKENIZER.eos_id]] * 3)
    answers = generate(model, collate([tree(79)]), CONTROL, 7, lambda: script(next(scripts))(), speed)
    assert [len(a.tokens) for a in answers] == [7, 1, 1, 1] and speed.written == 4 + 5


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_full_cache_says_so():
    """More tokens than there is room for are refused before anything is written; up to the last place all is well."""
    c = CONFIG.llm
    for whole in (False, True):
        cache, tokens = Cache(c, 1, 5, torch.float32, torch.device("cpu")), torch.ones(1, c.kv_heads, 3, c.head_width)
        cache.reserve(3)
        assert cache.add(0, tokens, tokens)[0].shape[2] == 3
        if whole:
            cache.read_whole()
        with pytest.raises(ValueError, match="3 more tokens do not fit into a cache of 5 that holds 3"):
            cache.reserve(3)
        cache.reserve(2)
        keys, _ = cache.add(0, 2 * tokens[:, :, :2], tokens[:, :, :2])
        assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2]
        with pytest.raises(ValueError, match="1 more tokens"):
            cache.reserve(1)


def test_the_model_refuses_what_does_not_fit(model):  # noqa: F811
    """More tokens than were reserved end in an error, not in overwritten keys."""
    batch = collate([prompt(80)])
    x, length = model.embed(batch.tokens), batch.tokens.shape[1]
    cache = Cache(model.config.llm, 1, length, x.dtype, x.device)
    cache.reserve(length - 1)
    with pytest.raises(RuntimeError, match=rf"size of the tensor \({length - 1}\) must match"):
        model.hidden_states(x, batch.positions, make_mask(model.mask_ids(batch)), cache)


@pytest.mark.parametrize("queries", [1, 3])
def test_few_queries_share_their_keys(queries, monkeypatch):
    """With one mask for all, with none, and with heads that share keys, it is plain attention."""
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((6, queries), (2, 9), (2, 9)))
    order = torch.arange(9).expand(2, 9)
    ids = MaskIds(torch.zeros_like(order), torch.randint(0, 3, (2, 9), generator=generator), order, order < 3)
    new = MaskIds(*(field[:, -queries:] for field in ids))
    torch.testing.assert_close(DenseDecode(may_attend(new, ids)).attend(q, k, v), Dense(may_attend(new, ids)).attend(q, k, v))
    plain = F.scaled_dot_product_attention  # on a GPU some kernels lay their result out token by token
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **more: plain(*given, **more).transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(DenseDecode(None).attend(q, k, v), Dense(torch.ones(2, queries, 9, dtype=torch.bool)).attend(q, k, v))


# ---- eight bits -------------------------------------------------------------------------------------------------------


def test_eight_bits_are_off_by_half_a_step_at_most():
    """Every weight is within half a scale, 1/254 of the largest of its output, and so is every product; a quarter of the bytes
    of float32 remain, and a row of zeros stays one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator) * torch.logspace(-4, 3, 40)[:, None]
    weight[7] = 0
    made, x = Linear8(weight), torch.randn(5, 64, generator=generator)
    error = (made.weight * made.scale[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)).all() and error[7].max() == 0
    bound = x.abs().sum(1, keepdim=True) * weight.abs().amax(1) / 254
    assert ((made(x) - x @ weight.T).abs() <= bound * 1.001 + 1e-9).all()
    assert made.weight.nbytes == weight.nbytes / 4
    half = Linear8(weight.bfloat16())
    error = (half.weight * half.scale.float()[:, None] - weight.bfloat16().float()).abs()
    assert (error <= half.scale.float()[:, None] * 0.51).all()


def test_words_of_four_weights_are_taken_apart():
    """Every value of a byte, in every place of a word, times its own input: in float64 sums that hold exactly."""
    weight = torch.stack([torch.arange(-128, 128).roll(shift) for shift in range(9)]).to(torch.int8)
    x = torch.randint(-99, 99, (1, 1, 256), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(word_by_word(x, weight), F.linear(x, weight.double()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_eight_bits(tied):
    """Blocks and head (unless tied) take about a quarter, everything else is untouched; logits stay near, and both ways of
    generating agree."""
    model = scrambled(5, replace(CONFIG, llm=replace(CONFIG.llm, tied=tied)))  # noqa: F811
    batch, before = collate([prompt(82, **SEEN["image"])]), {name: p.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        exact, size = model.logits(model(batch)[0]), step_bytes(model)
        near = to_int8(model).logits(model(batch)[0])
    assert (near - exact).norm() < 0.05 * exact.norm()
    assert (step_bytes(model) < 0.5 * size) and (model.lm_head is None) == tied
    kept = dict(model.named_parameters())
    assert all(torch.equal(before[name], p) for name, p in kept.items())
    assert all(name in kept for name in before if name.startswith(("vit", "connector", "point_predictor", "wte")))
    assert generate(model, batch, CONTROL, 20, babble(model)) == [generate_slowly(model, batch, CONTROL, 20, babble(model))]


# ---- pictures in parts -----------------------------------------------------------------------------------------------


def test_crops_in_parts_give_the_same_features(model, monkeypatch):  # noqa: F811
    """Five crops at two a time, as they are seen for an answer, and all at once, as in training."""
    import vit
    crops, parts, real = collate([prompt(81, frames=5)]).crops, [], vit.ViT.features
    monkeypatch.setattr(vit, "CPU_PATCHES", 2 * crops.shape[1] + 1)
    monkeypatch.setattr(vit.ViT, "features", lambda self, some: parts.append(len(some)) or real(self, some))
    with torch.no_grad():
        whole = model.vit(crops)
    with torch.inference_mode():
        torch.testing.assert_close(model.vit(crops), whole)
    assert parts == [5, 2, 2, 1]
