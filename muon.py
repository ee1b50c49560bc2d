"""Muon: the matrices inside a network take steps whose singular values are all about one.

The gradient of a matrix has a few large singular values, and a step along it moves little else. Muon keeps a momentum of gradients,
U S V^T, and steps along U V^T (Keller Jordan et al., https://kellerjordan.github.io/posts/muon), here with the scale of Moonlight
(arXiv:2502.16982): a step's entries are as large as AdamW's, so both share one learning rate.

`torch.optim.Muon` is the same in bfloat16 on any device. Processors without instructions for bfloat16 (most laptops) multiply it
many times slower than float32, so here only GPUs that have them round to it."""

import torch
from torch import Tensor


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """(M, N), U S V^T -> about U V^T. Every iteration maps a singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5: five
    bring any s from 0.01 to 1 to between 0.68 and 1.14, with nothing but products of matrices."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T  # the smaller Gram matrix
    x = wide.bfloat16() if wide.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else wide
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1 then
    for _ in range(iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide is matrix else x.T).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices with channels on both sides; tables, norms and biases are AdamW's."""

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(average, group["momentum"])  # Nesterov's: where the momentum will be after this gradient
                parameter.add_(orthogonal(ahead), alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
