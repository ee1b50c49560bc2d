"""The mask rule and the ways to compute attention under it."""

from functools import wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import attention
from attention import Dense, MaskIds, PerExample, Sparse, may_attend


# a: text, v: visual. Example 0: two images of 4 and 5 tokens in the trunk, branches 1 and 2; example 1: one image; padding.
#            0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 1 1 - -
#            0 0 0 0 0 0 0 0 0 0 0 0 1 1 1 2 2 0 0 0 0 1 0 0
DRAWING = """
          a  # . . . . . . . . . . . . . . . . . . . . . . .
          v  # # # # # . # # # # # . . . . . . . . . . . . .
          v  # # # # # . # # # # # . . . . . . . . . . . . .
          v  # # # # # . # # # # # . . . . . . . . . . . . .
          v  # # # # # . # # # # # . . . . . . . . . . . . .
          a  # # # # # # . . . . . . . . . . . . . . . . . .
          v  # # # # # # # # # # # . . . . . . . . . . . . .
          v  # # # # # # # # # # # . . . . . . . . . . . . .
          v  # # # # # # # # # # # . . . . . . . . . . . . .
          v  # # # # # # # # # # # . . . . . . . . . . . . .
          v  # # # # # # # # # # # . . . . . . . . . . . . .
          a  # # # # # # # # # # # # . . . . . . . . . . . .
          a  # # # # # # # # # # # # # . . . . . . . . . . .
          a  # # # # # # # # # # # # # # . . . . . . . . . .
          a  # # # # # # # # # # # # # # # . . . . . . . . .
          a  # # # # # # # # # # # # . . . # . . . . . . . .
          a  # # # # # # # # # # # # . . . # # . . . . . . .
          a  . . . . . . . . . . . . . . . . . # . . . . . .
          v  . . . . . . . . . . . . . . . . . # # # . . . .
          v  . . . . . . . . . . . . . . . . . # # # . . . .
          a  . . . . . . . . . . . . . . . . . # # # # . . .
          a  . . . . . . . . . . . . . . . . . # # # # # . .
          a  . . . . . . . . . . . . . . . . . . . . . . # .
          a  . . . . . . . . . . . . . . . . . . . . . . # #
"""


def test_mask_is_as_drawn():
    """Visual tokens of an example see each other both ways, across images; all else is causal, inside trunk and branch."""
    rows = [line.split() for line in DRAWING.split("\n") if line.strip()]
    example = [0] * 17 + [1] * 5 + [-1] * 2
    branch = [0] * 12 + [1] * 3 + [2] * 2 + [0] * 4 + [1] + [0] * 2
    visual = [row[0] == "v" for row in rows]
    ids = MaskIds(*(torch.tensor([field]) for field in (example, branch, list(range(24)), visual)))
    for seen in (may_attend(ids, ids)[0], unfolded(Sparse.of(ids).blocks, 24)[0]):
        assert [["#" if pair else "." for pair in row] for row in seen.tolist()] == [row[1:] for row in rows]


def test_mask_equals_a_slow_loop():
    """On random ids, with fewer queries than keys as in cached decoding, the predicate is its definition pair by pair."""
    rng = np.random.default_rng(0)
    draw = lambda t: (rng.integers(-1, 2, (3, t)), rng.integers(0, 3, (3, t)), rng.integers(0, 20, (3, t)), rng.random((3, t)) < 0.5)
    q, k = draw(7), draw(15)
    mask = may_attend(MaskIds(*map(torch.from_numpy, q)), MaskIds(*map(torch.from_numpy, k)))
    for b in range(3):
        for i in range(7):
            for j in range(15):
                (qe, qb, qo, qv), (ke, kb, ko, kv) = ([field[b, n] for field in side] for side, n in ((q, i), (k, j)))
                allowed = qe == ke and kb in (0, qb) and (ko <= qo or (qv and kv))
                assert bool(mask[b, i, j]) == allowed



def packed(rng: np.random.Generator, rows: int, length: int) -> MaskIds:
    """Ids of rows of message trees, as packs have them: trunks with pictures, branches, padding at the end."""
    example, branch, visual = np.full((rows, length), -1), np.zeros((rows, length), int), np.zeros((rows, length), bool)
    for row in range(rows):
        at, number = 0, 0
        while at < length - 4 and rng.random() < 0.9:
            trunk, t = rng.integers(1, max(length // 3, 2)), at
            for b, size in enumerate([trunk, *rng.integers(1, max(length // 6, 2), rng.integers(0, 4))]):
                example[row, t:t + size], branch[row, t:t + size] = number, b
                t += size
            visual[row, at + rng.integers(0, trunk):at + trunk] = True
            at, number = t, number + 1
    order = np.tile(np.arange(length), (rows, 1))
    return MaskIds(*(torch.from_numpy(field) for field in (example, branch, order, visual)))


def unfolded(mask: BlockMask, length: int) -> torch.Tensor:
    """What FlexAttention lets through, pair by pair: blocks in its list of full ones whole, those in its list of partial
    ones by their rule, nothing else."""
    rows, side = mask.kv_num_blocks.shape[0], mask.BLOCK_SIZE[0]
    listed = []
    for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
        blocks = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
        for row, i in (counts[:, 0] > 0).nonzero().tolist():
            blocks[row, i, indices[row, 0, i, :counts[row, 0, i]]] = True
        listed.append(blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :length, :length])
    place = torch.arange(length)
    partial, full = listed
    return full | partial & mask.mask_mod(torch.arange(rows)[:, None, None], torch.tensor(0), place[:, None], place)


def test_cut_attention_equals_dense_attention():
    """Rows with two examples, with one, and with padding: cut by example or not, heads and gradients come out the same,
    and the pieces cover every token once."""
    torch.manual_seed(0)
    example = torch.tensor([[0] * 9 + [1] * 7, [0] * 12 + [-1] * 4, [0] * 16])
    branch, order = torch.randint(0, 3, (3, 16)), torch.arange(16).expand(3, 16)
    ids = MaskIds(example, branch, order, torch.rand(3, 16) < 0.4)
    cut, dense = PerExample.of(ids), Dense.of(ids)
    assert [(row, span.start, span.stop) for row, span, _ in cut.pieces] == [(0, 0, 9), (0, 9, 16), (1, 0, 12), (1, 12, 16), (2, 0, 16)]
    q, k, v = (torch.randn(3, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
    one, two = cut.attend(q, k, v), dense.attend(q, k, v)
    torch.testing.assert_close(one, two)
    by = torch.randn_like(one)
    for a, b in zip(torch.autograd.grad(one, (q, k, v), by), torch.autograd.grad(two, (q, k, v), by)):
        torch.testing.assert_close(a, b)


def test_block_sparse_masks_let_through_what_the_rule_does():
    """For some 300 random packs of up to 5 blocks a side, 1 to 5 of them in a batch, the lists of blocks and the rule inside them
    give the dense mask, pair by pair; and blocks without any pair are left out."""
    rng, skipped = np.random.default_rng(1), 0
    for _ in range(100):
        rows, length = int(rng.integers(1, 6)), int(rng.integers(2, 640))
        ids = packed(rng, rows, length)
        blocks = Sparse.of(ids).blocks
        dense = may_attend(ids, ids)
        assert torch.equal(unfolded(blocks, length), dense)
        skipped += int((blocks.to_dense() == 0).sum())
    assert skipped > 1000


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_block_sparse_attention_equals_dense_attention():
    """Heads come out the same on packs of several lengths, with fewer key heads than query heads. (Gradients: on a GPU.)"""
    rng = np.random.default_rng(2)
    for length in (7, 128, 300):
        ids = packed(rng, 2, length)
        q, k, v = (torch.from_numpy(rng.normal(size=(2, heads, length, 16)).astype(np.float32)) for heads in (4, 2, 2))
        torch.testing.assert_close(Sparse.of(ids).attend(q, k, v), Dense.of(ids).attend(q, k, v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward pass on a CPU")
def test_block_sparse_gradients_equal_dense_ones():
    """On a GPU, where it runs compiled."""
    rng = np.random.default_rng(2)
    for length in (128, 300, 1000):
        ids = MaskIds(*(field.cuda() for field in packed(rng, 2, length)))
        q, k, v = (torch.randn(2, heads, length, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2))
        one, two = Sparse.of(ids).attend(q, k, v), Dense.of(ids).attend(q, k, v)
        torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2)
        by = torch.randn_like(one)
        for a, b in zip(torch.autograd.grad(one, (q, k, v), by), torch.autograd.grad(two, (q, k, v), by)):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


def test_one_compilation_serves_all_lengths(monkeypatch):
    """Making the block mask is compiled once for rows of any length, not once a batch."""
    counter, compile = CompileCounterWithBackend("eager"), torch.compile
    compiling = wraps(compile)(lambda function, **how: compile(function, backend=counter, **how))
    monkeypatch.setattr(torch, "compile", compiling)
    make = attention.compiled.__wrapped__(create_block_mask)
    rng = np.random.default_rng(3)
    for length in (300, 200, 450, 520, 301):
        ids = packed(rng, 2, length)
        rule = attention.mask_mod(ids)
        blocks = make(rule, 2, None, length, length, device="cpu")
        assert torch.equal(unfolded(blocks, length), may_attend(ids, ids))
    assert 0 < counter.frame_count <= 2, counter.frame_count


def test_the_way_goes_by_device_and_length():
    """The mask is cut by example; on a GPU by CUDA rows of up to 4096 tokens are dense and no longer row ever is: it is sparse, or cut by
    example where there is no Triton to compile that."""
    ids = lambda device, length: MaskIds(*[SimpleNamespace(device=torch.device(device), shape=(1, length))] * 4)
    assert isinstance(attention.make_mask(packed(np.random.default_rng(4), 1, 50)), PerExample)
    with pytest.MonkeyPatch.context() as patch:
        for way in (Dense, PerExample, Sparse):
            patch.setattr(way, "of", classmethod(lambda cls, *ids: cls))
        for triton, way in ((object(), Sparse), (None, PerExample)):
            patch.setattr(attention, "find_spec", lambda name: triton)
            assert attention.make_mask(ids("cuda", 4096)) is Dense and attention.make_mask(ids("cuda", 4097)) is way
        assert attention.make_mask(ids("mps", 4097)) is PerExample
