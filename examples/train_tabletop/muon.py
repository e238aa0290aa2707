"""Muon: momentum whose steps are made orthogonal, in float32 and for all matrices of a shape at once.

Based on "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024). torch.optim.Muon iterates in bfloat16, one
matrix after another: on a CPU without bfloat16 arithmetic it takes longer than forward and backward of this model together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of the Newton-Schulz iteration
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Steps have the size of AdamW's: 0.2 of the learning rate, root mean square. `weight_decay` is decoupled."""

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure is called here
        """Take one step with the gradients there are."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for alike in shapes.values():
                steps = orthogonal(torch.stack([self._velocity(parameter, group["momentum"]) for parameter in alike]))
                scale = 0.2 * max(steps.shape[1:]) ** 0.5
                for parameter, step in zip(alike, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"] * scale)

    def _velocity(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        # Nesterov's: the gradient counts once more.
        gradient: torch.Tensor = parameter.grad  # type: ignore[assignment]  # the caller has looked
        state = self.state[parameter]
        average = state.setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, rows, columns] with the same singular vectors and singular values near 1."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.transpose(1, 2) if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if tall else x
