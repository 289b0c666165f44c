"""AdamW whose step also writes the weights that the model multiplies, in one pass over memory
(:func:`lightbulb.ops.adamw`), instead of a step and a copy after it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightbulb.ops import adamw


class OnePassAdamW(torch.optim.Optimizer):
    """Stands where Megatron-core expects a ``torch.optim.AdamW``: the same groups, state and arithmetic.

    Args:
        groups: parameter groups of a ``torch.optim.AdamW``; other code may change their numbers.
        copies: of masters the bfloat16 weights of the same shape, in the memory of the model.
    """

    def __init__(self, groups: list[dict[str, Any]], copies: Mapping[Tensor, Tensor]):
        super().__init__([{**group, "params": [p.detach() for p in group["params"]]} for group in groups], {})
        self.param_groups = groups  # set after: a master may be a view into a buffer, which the check refuses
        self._copies = copies

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' ``grad``."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in params]
            for state in states:
                state["step"] += 1
            adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [self._copies.get(p) for p in params],
                [float(state["step"]) for state in states],
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
            )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's, made at its first update."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
