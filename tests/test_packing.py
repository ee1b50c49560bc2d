"""Message trees, packs and batches: by hand, by brute force, and by what they cost and teach."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
from connector import ConnectorConfig
from attention import MaskIds, may_attend
from model import LOSSES, PRESETS, LLMConfig, Molmo
import packing
from packing import WEIGHTS, Branch, Example, Packer, collate, knapsack, lay_out, packs
from pointing import PointConfig
from preprocess import ViewConfig
from tokenizer import Tokenizer
from vit import ViTConfig

TOKENIZER = Tokenizer([(34, 62)])  # bytes, and `">` as one token
CONFIG = replace(
    PRESETS["tiny"],
    views=ViewConfig(crop_size=70, margins=(1, 1), max_crops=2, max_frames=16),
    vit=ViTConfig(width=32, layers=3, heads=4, mlp_hidden=48, taps=(-1, -3), grid=5),
    connector=ConnectorConfig(width=32, heads=4, mlp_hidden=40, output_layer=False),
    llm=LLMConfig(vocabulary=TOKENIZER.base_size, width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp_hidden=64, rope_theta=1e4, dropout=0.0),
    point=PointConfig(width=16),
)


def by_hand() -> list[Example]:
    """Two small trees of made-up tokens: two branches over four windows, one branch over two wider windows."""
    flags = lambda text: np.array([c == "#" for c in text])
    one = Example(np.array([10, 11, 12]), np.full((2, 3, 5), 1, np.uint8), np.array([[0, 1], [2, -1], [3, 4], [-1, 5]]), [
        Branch(np.array([20, 21, 22, 23]), flags("..##"), np.array([[1, 0, 8], [3, 1, 0], [-1, -1, -1]])),
        Branch(np.array([30, 31, 32]), flags(".##"), np.array([[0, 1, 4], [-1, -1, -1]])),
    ])
    two = Example(np.array([40]), np.full((1, 3, 5), 2, np.uint8), np.array([[0, 1, 2], [-1, 2, -1]]),
                  [Branch(np.array([50, 51]), flags(".#"), np.array([[1, 1, 3]]))])
    return [one, two]


def test_a_tree_by_hand():
    """The trunk comes first; every branch goes on from the trunk's end, predicts its own next tokens, and learns its answer only."""
    row = lay_out(by_hand()[:1])
    #                                      trunk       branch 1    branch 2
    assert row.tokens.tolist() ==         [10, 11, 12, 20, 21, 22, 30, 31]
    assert row.targets[[0, 1]].tolist() == [11, 12]
    assert row.targets[3:].tolist() ==                [21, 22, 23, 31, 32]
    assert row.loss_weights.tolist() ==   [0, 0, 0,    0, 1, 1,    1, 1]
    assert row.positions.tolist() ==      [0, 1, 2,    3, 4, 5,    3, 4]
    assert row.branch_ids.tolist() ==     [0, 0, 0,    1, 1, 1,    2, 2]


def test_a_batch_by_hand():
    """Rows are padded on the right; windows count patches, and points count visual tokens, over the whole batch."""
    batch = collate(by_hand())
    assert batch.tokens.tolist()[1][:2] == [40, 50] and batch.targets.tolist()[1][1] == 51
    assert batch.example_ids.tolist() == [[0] * 8, [0] * 2 + [-1] * 6]
    assert batch.loss_weights.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.branch_ids.tolist()[1] == [0, 1, 0, 0, 0, 0, 0, 0] and batch.positions.tolist()[1][:2] == [0, 1]
    assert batch.pooling.tolist() == [[0, 1, -1], [2, -1, -1], [3, 4, -1], [-1, 5, -1], [6, 7, 8], [-1, 8, -1]]
    assert batch.points.tolist() == [[1, 0, 8], [3, 1, 0], [-1, -1, -1], [0, 1, 4], [-1, -1, -1], [5, 1, 3]]
    assert batch.crops.shape == (3, 3, 5) and batch.crops.flatten(1).float().mean(1).tolist() == [1, 1, 2]
    assert {str(t.dtype) for t in (batch.tokens, batch.targets, batch.positions, batch.pooling, batch.points)} == {"torch.int64"}


def test_a_pack_by_hand():
    """Two trees in one row: positions and branches start again, examples are numbered, points and windows count on."""
    batch = collate([by_hand()])
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 22, 30, 31, 40, 50]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1]]
    assert batch.example_ids.tolist() == [[0] * 8 + [1] * 2]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 0, 1]]
    two_rows = collate(by_hand())
    assert torch.equal(batch.points, two_rows.points) and torch.equal(batch.pooling, two_rows.pooling)


def test_the_mask_is_the_one_drawn():
    """The drawing in the docstring of packing.py, row by row, is what the mask rule gives for that pack."""
    lines = [line.split() for line in packing.__doc__.splitlines()]
    start = lines.index("v v a b b c w d d".split())
    drawn = [[cell == "#" for cell in line[1:]] for line in lines[start + 1:start + 10]]
    names = [line[0] for line in lines[start + 1:start + 10]]
    letters = {name: i for i, name in enumerate("vabcwd")}
    tree = lambda trunk, *branches: Example(
        np.array([letters[t] for t in trunk]), np.zeros((0, 1, 1), np.uint8), np.zeros((0, 1), int),
        [Branch(np.array([letters[t] for t in b + b[-1]]), np.zeros(len(b) + 1, bool), np.zeros((0, 3), int)) for b in branches])
    row = lay_out([tree("vva", "bb", "c"), tree("w", "dd")])
    assert [("vabcwd")[t] for t in row.tokens] == names
    as_row = lambda values: torch.from_numpy(np.asarray(values))[None]
    visual = torch.tensor([[name in "vw" for name in names]])
    ids = MaskIds(as_row(row.example_ids), as_row(row.branch_ids), torch.arange(9)[None], visual)
    assert may_attend(ids, ids)[0].tolist() == drawn


@pytest.mark.parametrize("scheme, category, n, branches, weight", [
    ("paper", "video caption", 50, 3, 0.1), ("paper", "pointing", 9, 3, 0.2), ("paper", "other", 16, 3, 1.0),
    ("released", "pointing", 16, 4, 0.2), ("released", "other", 16, 4, 0.25), ("released", "other", 4, 1, 1.0), ("uniform", "other", 7, 2, 1.0)])
def test_weights_are_the_formulas(scheme, category, n, branches, weight):
    """By the formula, and on every learned token of the row: n answer tokens, and an EOS that counts as one only in a tree of one branch."""
    assert WEIGHTS[scheme](category, n, branches) == pytest.approx(weight)
    learned = n + (branches > 1)
    one = Branch(np.arange(learned + 3), np.arange(learned + 3) >= 3, np.zeros((0, 3), int), category)
    tree = Example(np.array([1, 2]), np.zeros((0, 1, 1), np.uint8), np.zeros((0, 1), int), [one] * branches)
    row = lay_out([tree], scheme)
    assert row.loss_weights.sum() == pytest.approx(weight * learned * branches) and set(row.loss_weights) == {0.0, weight}


# ---- which trees go together -----------------------------------------------------------------------------------------


def value(chosen, tokens, crops) -> int:
    return sum(tokens[i] + packing.CROP_VALUE * crops[i] for i in chosen)


def fits(chosen, tokens, crops, max_tokens, max_crops) -> bool:
    step = packing.unit_of(max_tokens)
    return sum(-(-tokens[i] // step) for i in chosen) <= max_tokens // step and sum(crops[i] for i in chosen) <= max_crops


@pytest.mark.parametrize("seed", range(40))
def test_the_fullest_pack_is_the_best_of_all_subsets(seed):
    """Against brute force on nine items, some too large, some without crops; tokens counted one by one, by fours or by 32."""
    rng = np.random.default_rng(seed)
    scale = (1, 4, 40)[seed % 3]
    tokens, crops = rng.integers(1, 400 * scale, 9).tolist(), rng.integers(0, 9, 9).tolist()
    limits = (int(rng.integers(32, 1000)) if scale == 1 else 512 * scale, int(rng.integers(0, 20)))
    assert packing.unit_of(limits[0]) == {1: 1, 4: 4, 40: 32}[scale]
    chosen = knapsack(tokens, crops, *limits)
    subsets = ([i for i in range(9) if bits >> i & 1] for bits in range(512))
    best = max(value(s, tokens, crops) for s in subsets if fits(s, tokens, crops, *limits))
    assert fits(chosen, tokens, crops, *limits) and chosen == sorted(set(chosen)) and value(chosen, tokens, crops) == best


def test_the_fullest_pack_beats_greedy():
    """On 48 items at full size it is never worse than taking the most valuable, the longest or the first that still fits, and the
    limits hold."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens, crops = rng.integers(200, 9000, 48).tolist(), rng.integers(0, 100, 48).tolist()
        chosen = knapsack(tokens, crops, 16_384, 128)
        assert fits(chosen, tokens, crops, 16_384, 128)
        for order in (lambda i: -value([i], tokens, crops), lambda i: -tokens[i], lambda i: i):
            greedy = []
            for i in sorted(range(48), key=order):
                if fits([*greedy, i], tokens, crops, 16_384, 128):
                    greedy.append(i)
            assert value(chosen, tokens, crops) >= value(greedy, tokens, crops)


def tree_of(tokens: int, crops: int) -> Example:
    return Example(np.arange(tokens), np.zeros((crops, 1, 1), np.uint8), np.zeros((0, 1), int), [])


def test_every_example_is_packed_once_and_the_pool_is_all_the_state():
    """All numbers come out, each once; a packer made again from the numbers of a pool gives the same packs from there."""
    rng = np.random.default_rng(1)
    trees = [tree_of(int(rng.integers(1, 200)), int(rng.integers(1, 6))) for _ in range(120)]
    number = {id(tree): i for i, tree in enumerate(trees)}
    first = list(packs(enumerate(trees), Packer(512, 16)))
    assert sorted(number[id(e)] for pack in first for e in pack) == list(range(120))
    stopped, resumed, given = Packer(512, 16), Packer(512, 16), 0
    pulled = packs(((i, trees[i]) for i in range(120)), stopped)
    for _ in range(4):
        given += len(next(pulled))
    for i in stopped.numbers:
        resumed.add(i, trees[i])
    seen = given + len(stopped.numbers)
    rest = list(packs(((i, trees[i]) for i in range(seen, 120)), resumed))
    assert [[number[id(e)] for e in pack] for pack in first[4:]] == [[number[id(e)] for e in pack] for pack in rest]


@pytest.mark.parametrize("stride", [1, 3])
def test_no_example_waits_for_ever(stride):
    """Of a stream with a few examples that go badly with the others none waits for more than some five pools of others, and packs stay
    full; without that rule such examples fill the pool."""
    rng, packer, packed, filled = np.random.default_rng(0), Packer(1024, 20, stride=stride), 0, []
    for number in range(0, 4000 * stride, stride):
        tokens, crops = (300, 18) if rng.random() < 0.025 else (240, 5)
        packer.add(number, tree_of(tokens, crops))
        if packer.full:
            assert number - packer.numbers[0] <= 5 * 48 * stride
            pack = packer.take()
            packed += len(pack)
            filled.append(max(sum(e.length for e in pack) / 1024, sum(len(e.crops) for e in pack) / 20))
            assert sum(e.length for e in pack) <= 1024 and sum(len(e.crops) for e in pack) <= 20
    assert packed == 4000 - len(packer.pool) and np.mean(filled[-300:]) > 0.97


def test_what_no_pack_holds_is_named():
    """An example with too many tokens or crops is refused with its number and both figures."""
    large = replace(tree_of(600, 2), name="mine")
    for limits in ((512, 16), (1024, 1)):
        with pytest.raises(ValueError, match="mine: 600 tokens and 2 crops"):
            Packer(*limits).add(7, large)


def test_impossible_packs_say_so(monkeypatch, capsys):
    """One too small for any tree is one line."""
    monkeypatch.setattr(data, "RATES", {"stills": 1.0})  # 48 are drawn before
    with pytest.raises(SystemExit) as end:
        packing.main(["--examples", "48", "--max-tokens", "64"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "there is room for 64" in said and said.count("\n") == 1


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Molmo:
    made, generator = Molmo(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") or name == "ln_f.weight" else 0.0, 0.2, generator=generator)
    return made


@pytest.fixture(scope="module")
def exact(model) -> Molmo:
    """The same in float64, where sums in another order, which every processor has its own of, differ by less than a mistake would."""
    return deepcopy(model).to(torch.float64)


@pytest.fixture(scope="module")
def trees() -> list[Example]:
    """A still and a clip with several questions each."""
    records = (data.draw(name, 0, 1, 5) for name in ("stills", "clips"))
    return [data.example(record, TOKENIZER, CONFIG, np.random.default_rng(0)) for record in records]


def losses(model: Molmo, examples: list[Example]) -> dict[str, float]:
    return losses_of(model, collate(examples))


def losses_of(model: Molmo, batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.item() for name, value in model.losses(batch).items()}


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: pytest.approx(sum(part[name] for part in parts), rel=1e-6) for name in parts[0]}


def test_a_tree_costs_what_its_branches_cost_alone(exact, trees):
    """The losses of a tree are the sums over its branches, each alone behind the trunk, in whichever order they stand."""
    for tree in trees:
        whole = losses(exact, [tree])
        assert losses(exact, [replace(tree, branches=tree.branches[::-1])]) == total([whole])
        assert whole == total([losses(exact, [replace(tree, branches=[branch])]) for branch in tree.branches])
        assert whole["token"] > 10 and whole["choices"] > 5


def test_a_batch_costs_what_its_rows_cost_alone(exact, trees):
    """Padding to the longest row, and windows to the widest, changes no loss; nor does the order of the rows."""
    short = replace(trees[0], branches=trees[0].branches[:1])
    alone = total([losses(exact, [tree]) for tree in (*trees, short)])
    assert losses(exact, [*trees, short]) == alone and losses(exact, [short, *trees[::-1]]) == alone


def gradients(model: Molmo, batches: list) -> dict[str, torch.Tensor]:
    """Of the summed losses of several batches."""
    model.zero_grad()
    for batch in batches:
        sum(model.losses(batch)[name] for name in LOSSES).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed_and_alone(trees: list[Example], scheme: str):
    """Three trees in a pack; the same with the weights of all but one at 0, for each; each in a batch of its own."""
    three = [*trees, replace(trees[0], branches=trees[0].branches[::2])]
    pack, alone = collate([three], scheme), [collate([tree], scheme) for tree in three]
    return pack, [replace(pack, loss_weights=pack.loss_weights * (pack.example_ids == number)) for number in range(3)], alone


@pytest.mark.parametrize("scheme", list(WEIGHTS))
def test_a_pack_costs_what_its_trees_cost_alone(exact, trees, scheme):
    """The losses of a pack are the sums over its trees, each in a batch of its own, and so are those of each tree in the pack; the weights,
    by which alone the schemes differ, are equal."""
    pack, of_tree, alone = packed_and_alone(trees, scheme)
    for number, batch in enumerate(alone):
        assert torch.equal(pack.loss_weights[pack.example_ids == number], batch.loss_weights[0])
    parts = [losses_of(exact, batch) for batch in alone]
    for own, part in zip(of_tree, parts):
        for name, value in losses_of(exact, own).items():
            assert name in ("right", "choices") or value == pytest.approx(part[name], rel=1e-6), name
    assert losses_of(exact, pack) == total(parts)


def test_a_pack_teaches_what_its_trees_teach_alone(exact, trees):
    """The gradient of each tree in the pack, in every parameter, is that of the tree alone within a ten-millionth of its largest (in float64,
    with some tables in float32); and those of the pack are their sum."""
    pack, of_tree, alone = packed_and_alone(trees, "paper")
    for own, batch in ([pack], alone), *(([own], [batch]) for own, batch in zip(of_tree, alone)):
        packed, apart = gradients(exact, own), gradients(exact, batch)
        assert packed.keys() == apart.keys()
        largest = max(gradient.abs().max() for gradient in apart.values())
        for name, gradient in packed.items():
            limit = 1e-7 * apart[name].abs().max() + 1e-12 * largest  # (of a key's bias it is 0)
            assert (gradient - apart[name]).abs().max() <= limit, name


def test_nothing_leaks_between_trees_and_branches(model, trees):
    """Another branch, another tree, another trunk or other pixels there change not one bit of the logits of what may not see them."""
    def states(pack):
        with torch.no_grad():
            batch = collate([pack])
            return model.logits(model(batch)[0][0]), batch
    base, batch = states(trees)
    def touched(pack) -> set[tuple[int, int]]:
        now, _ = states(pack)
        changed = (now != base).any(-1)
        return set(zip(batch.example_ids[0][changed].tolist(), batch.branch_ids[0][changed].tolist()))
    first, second = trees
    spoiled = replace(first.branches[1], tokens=first.branches[1].tokens.copy())
    spoiled.tokens[2] = 65  # a letter of the question
    assert touched([replace(first, branches=[first.branches[0], spoiled, *first.branches[2:]]), second]) == {(0, 2)}
    dark = touched([replace(first, crops=255 - first.crops), second])
    assert dark == {(0, b) for b in range(len(first.branches) + 1)}
    dark = touched([first, replace(second, crops=255 - second.crops)])
    assert dark == {(1, b) for b in range(len(second.branches) + 1)}
    spoken = first.trunk.copy()
    spoken[0] = 65  # a letter in place of the first token
    assert touched([replace(first, trunk=spoken), second]) == {(0, b) for b in range(len(first.branches) + 1)}
