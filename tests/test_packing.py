"""Message trees and batches by hand and by their losses; scenes through answers and back to points."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import synthetic
from connector import ConnectorConfig
from model import PRESETS, Answer, LLMConfig, Molmo
from packing import Branch, Example, collate, lay_out
from pointing import TOKEN_INDEX, PointConfig
from preprocess import ViewConfig
from tokenizer import Tokenizer
from vit import ViTConfig

TOKENIZER = Tokenizer([(34, 62)])  # bytes, and `">` as one token
CONFIG = replace(
    PRESETS["tiny"],
    views=ViewConfig(crop_size=70, margins=(1, 1), max_crops=2, max_frames=16),
    vit=ViTConfig(width=32, layers=3, heads=4, mlp_hidden=48, taps=(-1, -3), grid=5),
    connector=ConnectorConfig(width=32, heads=4, mlp_hidden=40, output_layer=False),
    llm=LLMConfig(vocabulary=TOKENIZER.base_size, width=48, layers=3, heads=4, kv_heads=2, head_width=12, mlp_hidden=64, rope_theta=1e4),
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
    row = lay_out(by_hand()[0])
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


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Molmo:
    made, generator = Molmo(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") or name == "ln_f.weight" else 0.0, 0.2, generator=generator)
    return made


@pytest.fixture(scope="module")
def trees() -> list[Example]:
    """A still and a clip with several questions each."""
    return [data.SyntheticSet(0, TOKENIZER, CONFIG, branches=5, videos=share)[i] for i, share in ((0, 0.0), (1, 1.0))]


def losses(model: Molmo, examples: list[Example]) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.item() for name, value in model.losses(collate(examples)).items()}


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: pytest.approx(sum(part[name] for part in parts), rel=1e-5) for name in parts[0]}


def test_a_tree_costs_what_its_branches_cost_alone(model, trees):
    """The losses of a tree are the sums over its branches, each alone behind the trunk."""
    for tree in trees:
        whole = losses(model, [tree])
        assert whole == total([losses(model, [replace(tree, branches=[branch])]) for branch in tree.branches])
        assert whole["token"] > 10 and whole["choices"] > 5


def test_a_batch_costs_what_its_rows_cost_alone(model, trees):
    """Padding to the longest row, and windows to the widest, changes no loss; nor does the order of the rows."""
    short = replace(trees[0], branches=trees[0].branches[:1])
    alone = total([losses(model, [tree]) for tree in (*trees, short)])
    assert losses(model, [*trees, short]) == alone and losses(model, [short, *trees[::-1]]) == alone


def test_padding_changes_no_hidden_state(model, trees):
    """A row has the same hidden states alone and behind a longer row."""
    short = replace(trees[0], branches=trees[0].branches[:1])
    with torch.no_grad():
        alone, together = model(collate([short]))[0][0], model(collate([trees[1], short]))[0][1]
    assert len(together) > len(alone)
    assert (together[:len(alone)] - alone).abs().max() <= 1e-5 * alone.abs().max()  # float32 sums in another order


def test_the_order_of_branches_does_not_matter(model, trees):
    """Branches in another order cost the same."""
    for tree in trees:
        assert losses(model, [replace(tree, branches=tree.branches[::-1])]) == total([losses(model, [tree])])


# ---- scenes, questions, answers --------------------------------------------------------------------------------------


def test_synthetic_examples_are_a_pure_function_of_seed_and_number():
    """The same number gives the same example from a new set, in any order; another seed gives another."""
    make = lambda seed: data.SyntheticSet(seed, TOKENIZER, CONFIG, branches=2, videos=0.5)
    one, two, other = make(3), make(3), make(4)
    for i in (5, 2):
        a, b = collate([one[i]]), collate([two[i]])
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))
    assert not np.array_equal(one[2].crops, other[2].crops)


def test_patches_are_labelled_with_what_they_show():
    """A vivid patch is labelled with the colour that its middle shows, and fewer patches hold a point than show a thing."""
    examples = data.PatchSet(7, PRESETS["tiny"])
    crops, labels = data.collate_patches([examples[i] for i in range(9)])  # three of them are frames of clips
    assert crops.shape[:2] == labels.shape[:2] and crops.dtype == torch.uint8
    assert all(labels[..., i].min() == 0 and labels[..., i].max() < n for i, n in enumerate(data.PATCH_CLASSES))
    assert ((labels[..., 0] > 0) == (labels[..., 1] > 0)).all()
    middle = crops.unflatten(-1, (14, 14, 3))[:, :, 5:9, 5:9].float().mean((2, 3))  # (N, S, 3)
    colors = torch.tensor(list(synthetic.COLORS.values()), dtype=torch.float)
    vivid = (labels[..., 1] > 0) & (middle.max(-1).values - middle.min(-1).values > 120)  # neither grey nor shaded
    nearest = torch.cdist(middle[vivid], colors).argmin(-1) + 1
    assert vivid.sum() > 50 and (nearest == labels[..., 1][vivid]).float().mean() > 0.8  # some parts are shaded
    assert 0 < (labels[..., 2] > 0).sum() < (labels[..., 0] > 0).sum()


def test_points_lie_in_labelled_patches():
    """By hand on one still: the patch that holds a thing's point names its kind, and only those patches do."""
    scene = synthetic.still(7, 0)
    views = data.scene_views(scene, CONFIG)
    labels = data.patch_labels(scene, views.patches)
    for (_, left, top, width, height), (kind, _, pointed) in zip(views.patches, labels):
        inside = [1 + synthetic.KINDS.index(thing.kind) for thing, (x, y) in zip(scene.things, scene.points[0])
                  if left <= x < left + width and top <= y < top + height]
        assert pointed == (inside[-1] if inside else 0)
        x, y = left + width / 2, top + height / 2
        owner = scene.masks[0, :, int(y), int(x)].nonzero()[0]
        assert kind == (1 + synthetic.KINDS.index(scene.things[owner[0]].kind) if len(owner) else 0)


def test_learned_tokens_are_the_answer_and_its_end():
    """A branch is the chat layout around question and answer; exactly the answer and the end token after it are learned."""
    made = data.branch(TOKENIZER, "where <|im_end|>?", ["here ", "<|token_index|>", '">'], np.array([[-1, -1, -1]]))
    text = TOKENIZER.decode(made.tokens)
    assert text == '<|im_start|>user\nwhere <|im_end|>?<|im_end|>\n<|im_start|>assistant\nhere <|token_index|>"><|im_end|>'
    assert TOKENIZER.decode(made.tokens[made.learned]) == 'here <|token_index|>"><|im_end|>' and made.tokens[-1] == TOKENIZER.eos_id
    asked = data.prompt(TOKENIZER, data.scene_views(synthetic.still(0, 0), CONFIG), "where?")
    row = lay_out(asked)
    assert TOKENIZER.decode(row.tokens).endswith("<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n")
    assert row.tokens[0] == TOKENIZER.bos_id and not row.loss_weights.any()


def asked(videos: bool, count: int):
    """Scenes with things to point at, and the questions about them."""
    for index in range(count):
        scene = (synthetic.clip if videos else synthetic.still)(9, index)
        for query in synthetic.queries(scene, np.random.default_rng(index), 8):
            yield scene, query


@pytest.mark.parametrize("videos", [False, True], ids=["stills", "clips"])
@pytest.mark.parametrize("form", ["tokens", "text"])
def test_truth_comes_back_from_the_written_answer(form, videos):
    """Points -> answer -> tokens -> points gives each truth point back: within half a ninth of its patch as grounding tokens,
    within half a thousandth of the sides as text, in its frame."""
    config, seen = replace(PRESETS["tiny"], points_as=form), 0
    for scene, query in asked(videos, 4):
        views = data.scene_views(scene, config)
        map_, points = data.patch_map(views), data.truth(scene, query) if query.task in ("point", "count") else []
        pieces, rows = data.answer_pieces(query, points, views, map_, config)
        answer = Answer(TOKENIZER.encode_layout(pieces), rows.tolist(), "stop")
        text, found = data.read_answer(answer, TOKENIZER, views)
        if not points:
            assert not found and text == (query.answer or "There are none.")
            continue
        targets = {map_.target(*p[1:])[:2] for p in points}
        assert len(found) == (len(targets) if form == "tokens" else len(points))
        assert [p.id for p in found] == list(range(1, len(found) + 1))
        assert answer.tokens.count(TOKENIZER.special[TOKEN_INDEX]) == len(rows) == (len(found) + 1 if form == "tokens" else 0)
        assert text.endswith(f" shows a total of {len(found)}.") == (query.task == "count")
        assert query.label in text
        for p in points if len(found) == len(points) else []:
            token, slot, _ = map_.target(*p[1:])
            width, height = views.patches[views.pooling[token, slot], 3:] / 6 if form == "tokens" else np.array(views.sizes[p.picture]) / 2000
            assert any(q.picture == p.picture and abs(q.x - p.x) <= width + 1e-6 and abs(q.y - p.y) <= height + 1e-6 for q in found)
            seen += 1
    assert seen >= 20


def test_truth_points_lie_in_their_masks():
    """Every truth point lies in the visible mask of its thing, in the frame it names."""
    for videos in (False, True):
        for scene, query in asked(videos, 3):
            for p, thing in zip(data.truth(scene, query), query.targets):
                assert scene.masks[p.picture, thing, int(p.y), int(p.x)]


def test_places_name_images_and_seconds():
    """Images are called by their number from 1, frames by their seconds, as in the visual layout."""
    views = data.scene_views(synthetic.clip(9, 0), CONFIG)
    assert data.places(views)[:2] == ["0.0", "0.5"] and views.layout[0] == "0.0 "
    assert data.places(data.scene_views(synthetic.still(9, 0), CONFIG)) == ["1"]
