"""The naive twins: expert by expert, and pair by pair."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def grouped_linear(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = weight[expert of r] @ rows[r]``."""
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows.split(counts), weight, strict=True)])


def grouped_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = down[e] @ (silu(gate[e] @ rows[r]) * (up[e] @ rows[r]))`` with ``e`` the expert of r."""
    results = []
    for part, (gate, up), back in zip(rows.split(counts), gate_up, down, strict=True):
        results.append((silu(part @ gate.t()) * (part @ up.t())) @ back.t())
    return torch.cat(results)


def spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """``[R, dim]``: the token ``order[r] // top_k`` of ``x [T, dim]``."""
    return x[order // top_k]


def weighted_sum(rows: Tensor, gates: Tensor, order: Tensor) -> Tensor:
    """``y[t] = sum_k gates[t, k] * rows[r]`` over the rows with ``order[r] == t * top_k + k``."""
    weighted = rows * gates.flatten()[order].to(rows.dtype)[:, None]
    return rows.new_zeros(len(gates), rows.shape[1]).index_add(0, order // gates.shape[1], weighted)


def mixture_swiglu(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``y[t] = sum_k gates[t, k] * SwiGLU of expert experts[t, k] (x[t])``."""
    order = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=len(gate_up)).tolist()
    rows = grouped_swiglu(spread(x, order, gates.shape[1]), gate_up, down, counts)
    return weighted_sum(rows, gates, order)


def merged_linear(rows: Tensor, shares: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """``y[r] = (sum_i shares[p, i] weight[i]) @ rows[r]`` with p the piece of r."""
    matrices = torch.einsum("pe,eoi->poi", shares.to(weight.dtype), weight)
    return torch.cat([part @ matrix.t() for part, matrix in zip(rows.split(counts), matrices, strict=True)])


def merged_swiglu(rows: Tensor, shares: Tensor, matrices: tuple[Tensor, Tensor, Tensor], counts: list[int]) -> Tensor:
    """A SwiGLU whose matrices are those of each row's piece."""
    gate, up, down = matrices
    hidden = silu(merged_linear(rows, shares, gate, counts)) * merged_linear(rows, shares, up, counts)
    return merged_linear(hidden, shares, down, counts)
