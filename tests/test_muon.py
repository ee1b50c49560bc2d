"""Steps of Muon, against a singular value decomposition and against torch's own."""

import pytest
import torch

from muon import Muon, orthogonal

SHAPES = [(24, 64), (64, 24), (32, 32)]


def random(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    """What the products of matrices give is U f(S) V^T of the decomposition U S V^T, with f the polynomial five times over, in the
    precision of the matrix; and whatever was not below a hundredth of the norm ends between 0.68 and 1.14."""
    matrix = random(shape)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = expected = s / s.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(orthogonal(matrix), u @ torch.diag(expected) @ v, rtol=0, atol=1e-12)
    assert (s > 0.01).sum() > 20 and ((0.68 < expected) & (expected < 1.14))[s > 0.01].all()
    assert torch.allclose(orthogonal(matrix.float()), orthogonal(matrix).float(), atol=1e-4)  # no detour through bfloat16


def test_steps_are_those_of_torch():
    """Ten steps go where those of `torch.optim.Muon` go, up to its rounding to bfloat16, when the rate changes, too; a parameter without
    gradient and one whose gradient is zero stay where they are, and a state that was saved goes on."""
    def run(make, interrupted=False):
        parameters = [torch.nn.Parameter(random(shape, i, torch.float32)) for i, shape in enumerate([*SHAPES, (8, 8), (8, 8)])]
        optimiser = make(parameters)
        for step in range(10):
            if interrupted and step == 4:
                state, optimiser = optimiser.state_dict(), make(parameters)
                optimiser.load_state_dict(state)
            for i, p in enumerate(parameters[:4]):
                p.grad = random(p.shape, 100 * step + i, torch.float32) * (i < 3)
            optimiser.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimiser.step()
        return [p.detach() - random(p.shape, i, torch.float32) for i, p in enumerate(parameters)]

    ours = run(lambda p: Muon(p, lr=0.01))
    theirs = run(lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    for one, other in zip(ours[:3], theirs[:3]):
        assert (one - other).norm() < 0.02 * other.norm() and other.norm() > 0
    assert not ours[3].any() and not ours[4].any()
    assert all(torch.equal(one, other) for one, other in zip(ours, run(lambda p: Muon(p, lr=0.01), interrupted=True)))
