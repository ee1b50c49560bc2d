"""Points: pixels and back, the heads and losses against slow loops, the decoding rules under random scores, points as text."""

import math
import random
from time import process_time

import numpy as np
import pytest
import torch

from attention import RMSNorm, apply_rope, rope_cos_sin, rope_frequencies
from pointing import (
    TOKEN_INDEX,
    VIT_INDEX,
    VIT_LOC,
    PatchMap,
    Point,
    PointConfig,
    PointDecoder,
    PointPredictor,
    VisualTokens,
    grounded_pieces,
    grounded_points,
    grounding_targets,
    read_text,
    write_tags,
    write_text,
)
from preprocess import ViewConfig, Views, image_views, video_views

IDS = {TOKEN_INDEX: 20, VIT_INDEX: 21, VIT_LOC: 22}


# ---- pixels <-> targets ----------------------------------------------------------------------------------------------

TINY = ViewConfig(crop_size=126, margins=(1, 1), max_crops=4, max_frames=16)
RELEASED = ViewConfig(max_crops=6)


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Grey pictures of (width, height)."""
    return [np.full((height, width, 3), 128, np.uint8) for width, height in sizes]


VIEWS = {
    "tiny": lambda: image_views(pictures((127, 181)), TINY),
    "tiny, wide": lambda: image_views(pictures((401, 97)), TINY),
    "several": lambda: image_views(pictures((140, 90), (33, 222), (255, 256)), TINY),
    "a pixel": lambda: image_views(pictures((1, 1), (3, 500)), TINY),
    "all pointable": lambda: image_views(pictures((150, 170)), ViewConfig(crop_size=126, margins=(1, 1), max_crops=4, low_res_pointing=True)),
    "frames": lambda: video_views(pictures(*[(203, 131)] * 5), [0, 0.5, 1, 1.5, 1.9], TINY),
    "released": lambda: image_views(pictures((901, 640)), RELEASED),
    "released, several": lambda: image_views(pictures((377, 379), (640, 20)), RELEASED),
    "released, frames": lambda: video_views(pictures((640, 361), (640, 361)), [0, 1], RELEASED),
}


def map_of(views: Views) -> PatchMap:
    return PatchMap(views.patch_boxes, views.pooling, views.indexable)


@pytest.mark.parametrize("name", VIEWS)
def test_a_point_comes_back_within_half_a_cell(name):
    """Pixel -> target -> pixel stays in the picture and within half a ninth of the patch that was chosen, which holds the point."""
    views, rng = VIEWS[name](), np.random.default_rng(0)
    there = map_of(views)
    for picture, (width, height) in enumerate(views.sizes):
        corners = [(0, 0), (width - 1e-6, height - 1e-6), (width / 2, 0), (width, height)]
        for x, y in [*corners, *rng.uniform(0, 1, (60, 2)) * [width, height]]:
            token, slot, location = there.target(picture, x, y)
            assert views.indexable[token] and 0 <= location < 9
            owner, left, top, w, h = views.patch_boxes[views.pooling[token, slot]]
            assert owner == picture and left - 1e-9 <= x <= left + w + 1e-9 and top - 1e-9 <= y <= top + h + 1e-9
            back, x2, y2 = there.pixel(token, slot, location)
            assert back == picture and abs(x2 - x) <= w / 6 + 1e-9 and abs(y2 - y) <= h / 6 + 1e-9


@pytest.mark.parametrize("name", ["tiny", "several", "frames"])
def test_every_target_comes_back(name):
    """The middle of every ninth of every pointable patch leads back to exactly that token, slot and ninth."""
    views = VIEWS[name]()
    there = map_of(views)
    for token, slot in zip(*np.nonzero((views.pooling >= 0) & views.indexable[:, None])):
        for location in range(9):
            assert there.target(*there.pixel(token, slot, location)) == (token, slot, location)


def test_locations_count_down_the_columns():
    """Location is 3 * column + row, each a third of the patch."""
    there = PatchMap(np.array([[0, 30.0, 60.0, 30.0, 15.0]]), np.array([[0]]), np.array([True]))
    assert [there.pixel(0, 0, n)[1:] for n in range(9)] == [(x, y) for x in (35, 45, 55) for y in (62.5, 67.5, 72.5)]
    assert there.target(0, 41, 74) == (0, 0, 5) and there.target(0, 59.9, 60) == (0, 0, 6)
    assert there.target(0, 1000, -1000) == (0, 0, 6), "outside: the nearest patch"


def test_targets_are_sorted_and_merged():
    """Targets ascend by token and slot, ids count in that order, and two points in one slot become one."""
    patches = np.array([[0, 10.0 * i, 0, 10, 10] for i in range(4)])
    there = PatchMap(patches, np.array([[1, 0], [2, 3]]), np.array([True, True]))
    points = [Point(7, 0, 35, 5), Point(8, 0, 15, 5), Point(9, 0, 12, 1), Point(3, 0, 1, 9)]
    triples, ids = grounding_targets(points, there)
    assert triples.tolist() == [[0, 0, 0], [0, 1, 2], [1, 1, 4]] and ids == [1, 2, 3]
    assert grounding_targets([], there)[0].shape == (0, 3)


def test_tracks_are_numbered_by_first_appearance():
    """In tracks an object keeps its number in all frames, and numbers follow the first appearances in the order of targets."""
    views = VIEWS["frames"]()
    points = [Point(40, 1, 150, 100), Point(50, 0, 150, 20), Point(40, 0, 150, 120), Point(60, 1, 10, 10), Point(50, 2, 1, 1)]
    triples, ids = grounding_targets(points, map_of(views), tracks=True)
    assert ids == [1, 2, 3, 2, 1]
    assert triples.tolist() == sorted(triples.tolist())
    assert grounded_pieces([1, 1], "cup", tracks=True) == ['<tracks coords="', TOKEN_INDEX, VIT_INDEX, VIT_LOC, "1", TOKEN_INDEX,
                                                         VIT_INDEX, VIT_LOC, "1", TOKEN_INDEX, '">cup</tracks>']


def test_grounded_points_read_ids_and_skip_what_is_unfinished():
    """The id is the number after the triple; a triple without a number takes its place; an unfinished triple is no point."""
    views = VIEWS["tiny"]()
    first = int(np.nonzero(views.indexable)[0][0])
    rows = [[first + 8, 0, 4], [first + 8, 1, 0], [-1, -1, -1], [first + 9, 2, 8], [first + 9, 3, -1]]
    after = [f"5{TOKEN_INDEX}", f'{TOKEN_INDEX}">12 cups</points>', f"1{TOKEN_INDEX}{VIT_INDEX}"]
    found = grounded_points(rows, after, map_of(views))
    assert [p.id for p in found] == [5, 2, 1]
    assert [(p.picture, p.x, p.y) for p in found] == [map_of(views).pixel(*row) for row in rows if min(row) >= 0]


# ---- heads and losses against slow loops -----------------------------------------------------------------------------


def predictor(seed: int, d: int = 10, features: int = 6, width: int = 8) -> PointPredictor:
    """Every parameter random, the "no more points" vector included."""
    made, generator = PointPredictor(PointConfig(width=width), d, features), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if name == "x_norm.weight" else 0.0, 0.5, generator=generator)
    return made


def test_rope_turns_pairs():
    """Channels i and i + c/2 are one complex number turned by position * theta^(-2i/c); position 0 changes nothing."""
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 7, 300])
    turned = apply_rope(x, rope_cos_sin(positions, rope_frequencies(x.shape[-1], 50_000.0), dtype=x.dtype))
    for row, position in enumerate(positions.tolist()):
        for i in range(3):
            z = complex(x[row, i], x[row, i + 3]) * np.exp(1j * position * 50_000.0 ** (-2 * i / 6))
            assert abs(complex(turned[row, i], turned[row, i + 3]) - z) < 1e-4  # angles are float32
    assert torch.equal(turned[0], x[0])


def test_rms_norm():
    """Rows are divided by their root mean square and weighted."""
    norm, x = RMSNorm(5), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    norm.weight.data = torch.arange(5.0)
    for row, out in zip(x.tolist(), norm(x).tolist()):
        rms = math.sqrt(sum(v * v for v in row) / 5 + 1e-6)
        assert out == pytest.approx([i * v / rms for i, v in enumerate(row)], abs=1e-5)


class Slow:
    """The heads, read off the definition with numpy, one number at a time."""

    def __init__(self, made: PointPredictor):
        self.w = {name: p.detach().double().numpy() for name, p in made.named_parameters()}
        self.width, self.theta = made.config.width, made.config.rope_theta

    def x(self, h):
        return h / math.sqrt((h**2).mean() + 1e-6) * self.w["x_norm.weight"]

    def linear(self, name, x):
        return self.w[name + ".weight"] @ x + self.w[name + ".bias"]

    def turn(self, x, position):
        half = self.width // 2
        z = [complex(x[i], x[half + i]) * np.exp(1j * position * self.theta ** (-i / half)) for i in range(half)]
        return np.array([v.real for v in z] + [v.imag for v in z])

    def patch(self, h, keys, previous_index):
        """keys: (hidden state, index among the indexable) of the tokens that may be chosen -> their scores, then the stop's."""
        q = self.turn(self.linear("patch_q", self.x(h)), previous_index)
        made = [self.turn(self.linear("patch_k", self.x(key)), index) for key, index in keys]
        return [q @ k / math.sqrt(self.width) for k in made + [self.w["no_more_points"]]]

    def slot(self, h, features):
        q = self.linear("subpatch_q", self.x(h))
        return [q @ self.linear("subpatch_k", f) / math.sqrt(self.width) for f in features]

    def location(self, h):
        return list(self.linear("subpatch_loc_k", self.x(h)))


def surprise(scores: list[float], right: int) -> float:
    """Cross-entropy."""
    return math.log(sum(math.exp(s - max(scores)) for s in scores)) + max(scores) - scores[right]


def layout(seed: int):
    """Random B = 2 rows of T = 300: row 0 holds two examples, row 1 one and padding. Each example has visual tokens (a third
    of them not indexable, some slots empty) and three branches of one to three lists of points."""
    rng, K = np.random.default_rng(seed), 4
    targets, owner, branch = rng.integers(0, 20, 600), np.full(600, -1), np.zeros(600, int)
    at, owners, indexable, valid, points = [], [], [], [], []
    for example, start in enumerate((0, 150, 300)):
        first, count, place = len(at), int(rng.integers(4, 9)), start + 2
        at += range(place, place + count)
        owners += [example] * count
        indexable += [i % 3 != 0 for i in range(count)]
        valid += [(rng.random(K) < 0.6) | (np.arange(K) == rng.integers(K)) for _ in range(count)]
        owner[start:place + count] = example
        pairs = [(t, s) for t in range(first, first + count) for s in range(K) if indexable[t] and valid[t][s]]
        place += count
        for number in (1, 2, 3):
            said = []
            for _ in range(rng.integers(1, 4)):
                for i in sorted(rng.choice(len(pairs), rng.integers(1, 4), replace=False)):
                    said += [5, IDS[TOKEN_INDEX], IDS[VIT_INDEX], IDS[VIT_LOC]]
                    points.append((*pairs[i], rng.integers(9)))
                said += [6, IDS[TOKEN_INDEX]]
                points.append((-1, -1, -1))
            part = slice(place, place + len(said))
            targets[part], owner[part], branch[part], place = said, example, number, part.stop
    return targets, owner, branch, np.array(points), np.array(at), np.array(owners), np.array(indexable), np.array(valid)


@pytest.mark.parametrize("seed", range(6))
def test_losses_equal_slow_loops(seed):
    """The three losses, and how many tokens were chosen right, are those of a loop over choices that knows no tensors."""
    targets, owner, branch, points, at, owners, indexable, valid = layout(seed)
    made, rng = predictor(seed), np.random.default_rng([seed, 1])
    h, weights = rng.normal(size=(len(targets), 10)), rng.random(len(targets)) * (rng.random(len(targets)) < 0.8)
    windows = rng.normal(size=(len(at), 4, 6)) * valid[..., None]

    slow = Slow(made)
    expected, right, choices = {"patch": 0.0, "slot": 0.0, "location": 0.0}, 0, 0
    rest, last, list_of, token = iter(points), None, None, None
    for place, target in enumerate(targets):
        if target == IDS[TOKEN_INDEX]:
            if list_of != (owner[place], branch[place]):
                last, list_of = None, (owner[place], branch[place])
            token, slot, location = next(rest)
            mine = [m for m in range(len(at)) if owners[m] == owner[place] and indexable[m]]
            open_ = [m for m in mine if last is None or m >= last]
            scores = slow.patch(h[place], [(h[at[m]], mine.index(m)) for m in open_], 0 if last is None else mine.index(last))
            answer = len(open_) if token < 0 else open_.index(token)
            expected["patch"] += weights[place] * surprise(scores, answer)
            right, choices = right + (int(np.argmax(scores)) == answer), choices + 1
            last = None if token < 0 else token
        elif target == IDS[VIT_INDEX]:
            full = [s for s in range(4) if valid[token, s]]
            expected["slot"] += weights[place] * surprise(slow.slot(h[place], [windows[token, s] for s in full]), full.index(slot))
        elif target == IDS[VIT_LOC]:
            expected["location"] += weights[place] * surprise(slow.location(h[place]), location)

    tensor = lambda values: torch.from_numpy(np.asarray(values))
    visual = VisualTokens.of(tensor(windows).float(), tensor(valid), torch.zeros(len(at), 10), tensor(at), tensor(owners), tensor(indexable))
    found = made.losses(tensor(h).float(), tensor(targets), tensor(weights).float(), tensor(owner), tensor(branch), tensor(points), visual, IDS)
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    assert (int(found["right"]), int(found["choices"])) == (right, choices) and choices >= 12


def test_scores_equal_slow_loops():
    """Patch, slot and location scores agree one by one; empty slots score minus infinity; the stop class comes last."""
    made, rng = predictor(9), np.random.default_rng(9)
    slow, h, keys, windows = Slow(made), rng.normal(size=10), rng.normal(size=(7, 10)), rng.normal(size=(4, 6))
    tensor = lambda values: torch.from_numpy(values).float()
    with torch.no_grad():
        x, index = made.x_norm(tensor(h))[None], torch.tensor([0, 0, 1, 2, 2, 3, 4])
        scores = made.patch_scores(x, torch.tensor([3]), made.patch_keys(made.x_norm(tensor(keys)), index))[0]
        slots = made.slot_scores(x, tensor(windows)[None], torch.tensor([[True, False, True, True]]))[0]
        locations = made.subpatch_loc_k(x)[0]
    np.testing.assert_allclose(scores, slow.patch(h, list(zip(keys, index.tolist())), 3), atol=1e-5)
    np.testing.assert_allclose(slots[[0, 2, 3]], slow.slot(h, windows[[0, 2, 3]]), atol=1e-5)
    assert slots[1] == -math.inf
    np.testing.assert_allclose(locations, slow.location(h), atol=1e-5)


def test_visual_tokens_are_counted_per_example():
    """The index of a key counts the indexable tokens of its own example before it."""
    owner = torch.tensor([3, 3, 3, 3, 8, 8, 5, 9, 9])
    indexable = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0, 1]).bool()
    rows = torch.arange(9)
    visual = VisualTokens.of(torch.zeros(9, 1, 1), torch.ones(9, 1).bool(), torch.zeros(9, 1), rows, owner, indexable)
    assert visual.index.tolist() == [0, 0, 1, 2, 0, 1, 0, 0, 0]
    assert visual.only(owner == 8).at.tolist() == [4, 5] and visual.only(owner == 8).index.tolist() == [0, 1]
    assert visual.index[visual.indexable & (owner == 3)].tolist() == [0, 1, 2]
    empty = VisualTokens.of(torch.zeros(0, 4, 1), torch.ones(0, 4).bool(), torch.zeros(0, 1), rows[:0], owner[:0], indexable[:0])
    assert empty.index.shape == (0,)


# ---- the rules of decoding -------------------------------------------------------------------------------------------

CLOSE = [7, 8]  # `">` as two tokens


def decoder(seed: int, M: int = 6, K: int = 4, pointable: bool = True) -> PointDecoder:
    return decoder_over(seed, M, K, pointable)[0]


def decoder_over(seed: int, M: int, K: int = 4, pointable: bool = True) -> tuple[PointDecoder, torch.Tensor]:
    """Over M random visual tokens, a third of them not indexable, with random empty slots; and their hidden states."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(M, K, generator=generator) < 0.6
    valid[range(M), torch.randint(0, K, (M,), generator=generator)] = True
    indexable = torch.tensor([pointable and i % 3 != 0 for i in range(M)], dtype=torch.bool)
    windows = torch.randn(M, K, 6, generator=generator) * valid[..., None]
    visual = VisualTokens.of(windows, valid, torch.randn(M, 10, generator=generator), torch.arange(M), torch.zeros(M, dtype=torch.long), indexable)
    seen = torch.randn(M, 10, generator=generator)
    return PointDecoder(predictor(seed), seen, visual, IDS, CLOSE), seen


def greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def play(writer: PointDecoder, steps: int, seed: int, eager: float = 3.0, stop: float | None = None) -> list[tuple[int, torch.Tensor | None]]:
    """Random hidden states and logits, the three grounding tokens likely; `stop` shifts the score of "no more points"."""
    generator = torch.Generator().manual_seed(seed)
    if stop is not None:
        scores = writer.predictor.patch_scores
        writer.predictor.patch_scores = lambda *args: scores(*args) + torch.tensor([0.0] * len(writer.keys) + [stop])
    said = []
    with torch.no_grad():
        for _ in range(steps):
            logits = torch.randn(24, generator=generator) + eager * torch.tensor([i in IDS.values() for i in range(24)])
            said.append(writer.step(logits, torch.randn(10, generator=generator), greedy))
    return said


def check(writer: PointDecoder, said: list[tuple[int, torch.Tensor | None]]) -> tuple[int, int]:
    """All rules, on what was written; returns how many lists ended in a stop and the longest list."""
    visual, tokens, rows = writer.visual, [token for token, _ in said], iter(writer.triples)
    current, stops, longest, closing = [], 0, 0, []
    for place, (token, carried) in enumerate(said):
        before = tokens[place - 1] if place else None
        if closing:
            assert token == closing.pop(0), '`">` follows the stop'
            continue
        assert (token == IDS[VIT_INDEX]) == (before == IDS[TOKEN_INDEX]), "<|vit_index|> after <|token_index|>, and only there"
        assert (token == IDS[VIT_LOC]) == (before == IDS[VIT_INDEX]), "<|vit_loc|> after <|vit_index|>, and only there"
        if token == IDS[TOKEN_INDEX]:
            row = next(rows)
            if row[0] < 0:
                assert row == [-1, -1, -1] and current, "at least one point before a stop"
                assert carried is None
                stops, current, closing = stops + 1, [], list(CLOSE)
                tokens[place] = None  # nothing but the closing follows
                continue
            token_, slot, location = row
            assert visual.indexable[token_]
            assert torch.equal(carried, visual.embeddings[token_])
            if place + 1 < len(said):
                assert visual.valid[token_, slot]
                assert not current or (token_, slot) > current[-1], "never backwards, never twice"
                current.append((token_, slot))
                fed = writer.predictor.build_vit_embedding(visual.windows[token_, slot])
                assert torch.equal(said[place + 1][1], fed)
                longest = max(longest, len(current))
            if place + 2 < len(said):
                assert 0 <= location < 9 and said[place + 2][1] is None
        elif token == CLOSE[0]:
            current = []  # closed without a stop
    assert next(rows, None) is None
    return stops, longest


@pytest.mark.parametrize("stop", [-100.0, None, 100.0])
def test_rules_hold_under_random_scores(stop):
    """Whatever the scores and logits, what is written keeps the rules; the stop wins always, sometimes, or only when forced."""
    lengths, stops = [], 0
    for seed in range(12):
        writer = decoder(seed, M=5)
        count, longest = check(writer, play(writer, 250, seed, eager=4.0, stop=stop))
        stops += count
        lengths.append(longest)
    assert stops > 50
    if stop == 100.0:
        assert set(lengths) == {1}
    else:
        assert max(lengths) >= 4


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_the_best_of_the_slow_scores(seed):
    """Greedy decoding takes the token, the slot and the location that score best by the definition among those that the rules allow."""
    asks, number = torch.nn.functional.one_hot(torch.tensor(IDS[TOKEN_INDEX]), 24).float(), lambda x: x.detach().double().numpy()
    writer, seen = decoder_over(seed, M=7)
    slow, visual, generator = Slow(writer.predictor), writer.visual, torch.Generator().manual_seed(seed)
    last, slot, chosen = -1, -1, 0
    for _ in range(60):
        h, expects, forced = torch.randn(10, generator=generator), writer.expects, bool(writer.forced)
        with torch.no_grad():
            writer.step(asks, h, greedy)
        if forced:
            continue
        if expects is None:
            allowed = [m for m in range(7) if visual.indexable[m] and (m > last or m == last and visual.valid[m, slot + 1:].any())]
            scores = slow.patch(number(h), [(number(seen[m]), int(visual.index[m])) for m in allowed], int(visual.index[last]) if last >= 0 else 0)
            best = int(np.argmax(scores if last >= 0 else scores[:-1]))  # a list begins with a point
            wanted = allowed[best] if best < len(allowed) else -1
            slot, last = (slot if wanted == last else -1), wanted
            assert writer.triples[-1][0] == wanted
        elif expects == VIT_INDEX:
            free = [s for s in range(slot + 1, 4) if visual.valid[last, s]]
            slot = free[int(np.argmax(slow.slot(number(h), [number(visual.windows[last, s]) for s in free])))]
            assert writer.triples[-1][1] == slot
        else:
            assert writer.triples[-1][2] == int(np.argmax(slow.location(number(h))))
        chosen += 1
    assert chosen > 20


def test_exhausted_slots_force_the_stop():
    """With "no more points" scored lowest, a list still ends when no slot is left to choose, and the next starts afresh."""
    writer = decoder(0, M=3, K=2)
    said = play(writer, 200, 0, eager=50.0, stop=-100.0)
    stops, _ = check(writer, said)
    pairs = [(t, s) for t in range(3) for s in range(2) if writer.visual.indexable[t] and writer.visual.valid[t, s]]
    assert stops >= 200 / (3 * len(pairs) + 3) - 1
    lists = "".join("." if row[0] < 0 else "#" for row in writer.triples).split(".")[:-1]
    assert len(lists) == stops and len(writer.triples) > 2 * stops


@pytest.mark.parametrize("seen", ["nothing", "only the whole picture"])
def test_without_pointable_tokens_no_point_begins(seen):
    """A text-only prompt, or one whose visual tokens are all <im_low>, never writes a grounding token."""
    writer = decoder(1, M=0) if seen == "nothing" else decoder(1, pointable=False)
    said = play(writer, 100, 1, eager=50.0)
    assert not {token for token, _ in said} & set(IDS.values()) and writer.triples == []


def test_a_closed_list_starts_afresh():
    """After `">`, with or without a stop, the next list may begin at any token again, asked from position 0."""
    writer = decoder(2, M=6)
    queries = []
    scores = writer.predictor.patch_scores
    writer.predictor.patch_scores = lambda x, index, keys: (queries.append(int(index)), scores(x, index, keys))[1]

    def say(token):
        with torch.no_grad():
            return writer.step(torch.nn.functional.one_hot(torch.tensor(token), 24).float(), torch.randn(10), greedy)[0]

    torch.manual_seed(0)
    for _ in range(30):
        written = [say(wanted) for wanted in (IDS[TOKEN_INDEX], 0, 0, CLOSE[0])]  # the middle two are not asked for
        assert written == [*IDS.values(), CLOSE[0]]
        assert (writer.visual_token, writer.slot) == (-1, -1)
    assert set(queries) == {0} and len(queries) == 30


# ---- points as text --------------------------------------------------------------------------------------------------

PLACES, SIZES = ["1", "2", "3"], [(640, 480), (33, 1999), (1000, 1000)]
TIMES, FRAMES = ["0.0", "0.5", "12.5"], [(320, 180)] * 3


def test_written_form():
    """Sorted by picture, x, y after rounding, three digits, ids counting on, four digits only for 1000."""
    points = [Point(1, 1, 33, 0), Point(2, 0, 320.2, 480), Point(3, 0, 320, 24), Point(4, 0, 0.1, 240)]
    assert write_text(points, PLACES, SIZES, "cups") == \
        '<points coords="1 1 000 500 2 500 050 3 500 1000;2 4 1000 000">cups</points>'


def test_written_tracks():
    """In tracks an id names an object in all frames, numbered by first appearance, and a frame is sorted by id."""
    points = [Point(8, 0, 160, 90), Point(5, 0, 16, 9), Point(8, 1, 8, 9), Point(5, 2, 32, 18), Point(8, 2, 8, 9), Point(2, 1, 4, 9)]
    assert write_text(points, TIMES, FRAMES, "cups", tracks=True) == \
        '<tracks coords="0.0 1 050 050 2 500 500;0.5 2 025 050 3 012 050;12.5 1 100 100 2 025 050">cups</tracks>'


def scattered(rng: np.random.Generator, sizes: list[tuple[int, int]], tracks: bool) -> list[Point]:
    """Random points, on the borders too; in tracks of few objects, each at most once in a picture."""
    count = int(rng.integers(1, 8))
    places = {(int(rng.integers(len(sizes))), int(rng.integers(4)) if tracks else i) for i in range(count)}
    share = lambda: float(rng.choice([0, 1, rng.random(), rng.random()]))
    return [Point(identity, picture, share() * sizes[picture][0], share() * sizes[picture][1]) for picture, identity in places]


@pytest.mark.parametrize("tracks", [False, True])
def test_text_round_trip(tracks):
    """What was written is read back within half a thousandth of each side, ids and objects included."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        places, sizes = ((PLACES, SIZES), (TIMES, FRAMES))[trial % 2]
        points = scattered(rng, sizes, tracks)
        found = read_text("Sure: " + write_text(points, places, sizes, "the cups", tracks) + ".", places, sizes)
        assert len(found) == len(points)
        names = {}
        for p in points:  # the nearest one read in that picture
            w, h = sizes[p.picture]
            near = [q for q in found if q.picture == p.picture and abs(q.x - p.x) <= w / 2000 + 1e-9 and abs(q.y - p.y) <= h / 2000 + 1e-9]
            assert near
            if tracks and len(near) == 1:
                assert names.setdefault(p.id, near[0].id) == near[0].id
        assert len(set(names.values())) == len(names)
        ids = [q.id for q in found]
        assert ids == list(range(1, len(ids) + 1)) if not tracks else set(ids) == set(range(1, len(set(ids)) + 1))
        order = [(q.picture, q.id) if tracks else (q.picture, q.x, q.y) for q in found]
        assert order == sorted(order)


def test_frames_that_round_to_one_time_keep_their_tracks():
    """Frames 0.04 s apart, as at the end of a video, are written as one time; an object seen in both is still read, once."""
    points = [Point(1, 0, 10, 10), Point(1, 1, 11, 10)]
    found = read_text(write_text(points, ["2.5", "2.5"], FRAMES[:2], "cup", tracks=True), ["2.5", "2.5"], FRAMES[:2])
    assert [p.id for p in found] == [1]


GOOD = [
    ('<points coords="1 1 010 020">a</points>', [(1, 0, 6.4, 9.6)]),
    ('<points coords="1 1 010 020">a</point>', [(1, 0, 6.4, 9.6)]),  # released data closes so
    ('<tracks coords="1 2 010 020;3 2 1000 000">a</point>', [(2, 0, 6.4, 9.6), (2, 2, 1000, 0)]),
    ('<points coords="3 1 001 1000 2 002 000">a</points> and <points coords="3 1 500 500">b</points>',
     [(1, 2, 1, 1000), (2, 2, 2, 0), (1, 2, 500, 500)]),
    ('<points coords="1 1 010 020">a < b</points><points coords="1 1 010 020">the "Next >" button</points>', [(1, 0, 6.4, 9.6)] * 2),
    ('<points alt="cups" coords="1 1 010 020">cups</points>', [(1, 0, 6.4, 9.6)]),
    ('<points coords="1 1 010 020" alt="a < b">a < b</points>', [(1, 0, 6.4, 9.6)]),
    ('<point x="41.0" y="43.5" alt="a < b">a < b</point>', [(1, 0, 262.4, 208.8)]),
    ('<points coords="1 1 500 500">not closed <points coords="1 1 010 020">a</points>', [(1, 0, 6.4, 9.6)]),
    ('<point x="41.0" y="43.5" alt="a">a</point>', [(1, 0, 262.4, 208.8)]),
    ('<points x1="10.0" y1="20.0" x2="100" y2="0.5" alt="a">a</points>', [(1, 0, 64, 96), (2, 0, 640, 2.4)]),
]


@pytest.mark.parametrize("text, expected", GOOD)
def test_reading(text, expected):
    """Lists of points, tracks and Molmo-1's percent tags are read, each on its own scale."""
    found = read_text(text, PLACES, SIZES)
    assert [p[:2] for p in found] == [e[:2] for e in expected]
    np.testing.assert_allclose([p[2:] for p in found], [e[2:] for e in expected])


@pytest.mark.parametrize("text", [
    '<points coords="1 1 41.0 43.0">a</points>', '<points coords="1 1 41 43">a</points>', '<points coords="1 1 0041 043">a</points>',
    '<points coords="1 1 1001 043">a</points>', '<points coords="1 1 2000 043">a</points>', '<points coords="1 1 -01 043">a</points>',
    '<points coords="1 1 041">a</points>', '<points coords="1 041 043">a</points>', '<points coords="1 1 041 043 ">a</points>',
    '<points coords="1 1  041 043">a</points>', '<points coords="">a</points>', '<points coords=";1 1 041 043">a</points>',
    '<points coords="4 1 041 043">a</points>', '<points coords="0 1 041 043">a</points>', '<points coords="1.0 1 041 043">a</points>',
    '<points coords="01 1 041 043">a</points>', '<points coords="1 2 041 043">a</points>', '<points coords="1 1 041 043 1 050 050">a</points>',
    '<points coords="1 1 041 043 3 050 050">a</points>', '<tracks coords="1 1 041 043 1 050 050">a</tracks>',
    '<points coords="1 1 041 043"a</points>', '<points coords="1 1 041 043">a', '<points coords="1 1 041 043">a</tracks>',
    '<points coords="1 1 \u0660\u0664\u0661 043">a</points>', '<points coords="1 1 \uff10\uff14\uff11 043">a</points>',
    '<points coords="1 1 041\n043">a</points>', "<points coords='1 1 041 043'>a</points>", '<points  coords="1 1 041 043">a</points>',
    '<point x="410" y="430">a</point>', '<point x="100.1" y="43">a</point>', '<point x="41.0">a</point>', '<point y="41.0">a</point>',
    '<points x1="41" y1="430">a</points>', '<points x1="41" y2="43">a</points>', '<points x2="41" y2="43">a</points>',
    '<points x1="41" y1="43" x3="41" y3="43">a</points>', '<point x="-1" y="43">a</point>', '<point x="nan" y="43">a</point>',
    '<point x="1e1" y="43">a</point>', '<point x="\u0664" y="43">a</point>', '<point x="" y="43">a</point>',
    '<point x="10.0" x="20.0" y="30.0">a</point>', '<points x1="10" y1="20" x1="30" y1="40">a</points>',
    '<points x1="10" y1="20" coords="1 1 041 043">a</points>',
])
def test_nothing_is_guessed(text):
    """A tag that breaks any rule gives no point: no other scale, no skipped entry, no unknown picture is assumed."""
    assert read_text(text, PLACES, SIZES) == []


def test_hostile_texts_are_harmless():
    """Huge numbers, endless lists and unclosed tags are read at once, and nothing is raised."""
    nines, start = "9" * 100_000, process_time()
    for text in (f'<points coords="1 1 {nines} 043">a</points>', f'<points coords="{nines} 1 041 043">a</points>',
                 f'<points coords="1 {nines} 041 043">a</points>', f'<point x="{nines}" y="1">a</point>',
                 f'<points x{nines}="1" y{nines}="1">a</points>', '<points coords="' * 20_000, '<point x="1' * 20_000, "<" * 100_000,
                 '<points coords="' + "1 1 041 043;" * 20_000, '<point x="1" ' * 20_000, '<points coords="1 1 041 043">' * 5_000,
                 '<points coords="1 1 041 043">' + "a" * 100_000, "\x00\ud800\U0010ffff"):
        assert read_text(text, PLACES, SIZES) == []
    assert len(read_text(f'<point x="1.{nines}" y="1">a</point>', PLACES, SIZES)) == 1
    assert process_time() - start < 20  # 100,000 characters squared would take hours


def test_fuzzed_texts_give_nothing_or_consistent_points():
    """Valid tags with random edits never raise, and what is read lies in its picture and is written and read back alike."""
    rng, kept, lost = random.Random(0), 0, 0
    seeds = [text for text, _ in GOOD] + [write_text(scattered(np.random.default_rng(i), SIZES, i % 2), PLACES, SIZES, "cup", i % 2)
                                          for i in range(10)]
    for _ in range(4000):
        text = list(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            at, kind = rng.randrange(len(text)), rng.randrange(4)
            if kind == 0 and len(text) > 1:
                del text[at]
            elif kind == 1:
                text.insert(at, rng.choice('0123456789 ;."<>/=xyptracks-\u0663\n'))
            elif kind == 2:
                text[at:at] = text[at:at + rng.randint(1, 12)]
            else:
                text[at] = rng.choice("0123456789")
        text = "".join(text)
        found = read_text(text, PLACES, SIZES)
        kept, lost = kept + bool(found), lost + (not found)
        for p in found:
            assert p.id >= 0 and 0 <= p.x <= SIZES[p.picture][0] and 0 <= p.y <= SIZES[p.picture][1]
        if found and text.count("coords") == 1 and "x=" not in text and "x1=" not in text:
            tracks = "<tracks" in text
            again = read_text(write_text(found, PLACES, SIZES, "a", tracks), PLACES, SIZES)
            objects = lambda points: sorted(sorted(q[1:] for q in points if q.id == p) for p in {q.id for q in points})
            assert sorted(p[1:] for p in again) == sorted(p[1:] for p in found)
            assert not tracks or objects(again) == objects(found)
    assert kept > 200 and lost > 200


def test_tags_in_percent_come_back():
    """Molmo-1's form of one picture: read back to a twentieth of a percent; one point has no number; a quote in the label
    does not end the tag; what lies outside is drawn to the rim."""
    size = (640, 360)
    points = [Point(4, 0, 321.3, 12.0), Point(9, 0, 5.5, 359.9), Point(2, 0, 700, -3)]
    text = write_tags(points, size, 'a "red" cup')
    assert text == '<points x1="0.9" y1="100.0" x2="50.2" y2="3.3" x3="100.0" y3="0.0" alt="a \'red\' cup">a "red" cup</points>'
    assert write_tags(points[:1], size, "cup") == '<point x="50.2" y="3.3" alt="cup">cup</point>'
    found = read_text(text, ["1"], [size])
    assert [p.id for p in found] == [1, 2, 3]
    for got, true in zip(found, [(5.5, 359.9), (321.3, 12.0), (640, 0)]):
        assert abs(got.x - true[0]) <= 0.0005 * 640 + 1e-9 and abs(got.y - true[1]) <= 0.0005 * 360 + 1e-9
