"""Any module once per expert, its parameters stacked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, cat, nn
from torch.func import functional_call

from lightbulb.nn.groups import expert_axis, expert_tensor_axis, inside_experts
from lightbulb.nn.parameter import logical_of, make_parameter, values_of


class ExpertBank(nn.Module):
    """The local experts: ``num_experts`` copies of one module, each parameter ``[experts, *shape]``.

    The experts are spread over the expert axis and split over the expert tensor axis as the module is over its tensor
    axis; results are partial sums over the latter.

    Args:
        num_experts: over all ranks.
        build: makes one expert; its first argument when called is ``[rows, 1, dim]``, and so is (the first of) its
            result.
    """

    def __init__(self, num_experts: int, build: Callable[[], nn.Module]):
        super().__init__()
        with inside_experts():
            self.each = build()
        for owner in list(self.each.modules()):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                one = logical_of(parameter)
                stacked = replace(
                    one,
                    shape=(num_experts, *one.shape),
                    tensor_dim=None if one.tensor_dim is None else one.tensor_dim + 1,
                    tensor=expert_tensor_axis(),
                    expert=expert_axis(),
                    is_expert=True,
                    by_position=False,
                )
                setattr(owner, name, make_parameter(stacked))

    def forward(self, rows: Tensor, counts: list[int], *args: Any) -> Tensor:
        """``rows [R, dim]`` sorted by expert, ``counts`` of them for each local expert; ``args`` go to every expert."""
        stacked = {name: values_of(parameter).unbind(0) for name, parameter in self.each.named_parameters()}
        results = []
        for expert, part in enumerate(rows.split(counts)):
            if len(part):
                own = {name: matrices[expert] for name, matrices in stacked.items()}
                result = functional_call(self.each, own, (part[:, None], *args))
                results.append((result[0] if isinstance(result, tuple) else result)[:, 0])
        if not results:  # the parameters take part all the same: other ranks wait for this one's backward
            return sum((p.sum() * 0 for p in self.each.parameters() if p.requires_grad), rows)
        return cat(results)
