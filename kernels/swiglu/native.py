"""The C++ rows, for float32 and bfloat16 on the CPU."""

import torch
from torch import Tensor

from lightbulb.kernels.native import INT, POINTER, function

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supports(*tensors: Tensor) -> bool:
    """Whether all are of one dtype that has rows here."""
    return tensors[0].dtype in _NAMES and all(t.dtype == tensors[0].dtype for t in tensors)


def forward(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """``out = silu(gate) * up``, all ``[rows, width]`` with columns side by side."""
    call = function(f"swiglu_{_NAMES[gate.dtype]}", *[POINTER, INT] * 3, INT, INT, INT)
    call(*_places(gate, up, out), *gate.shape, torch.get_num_threads())


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, hidden: Tensor | None = None
) -> None:
    """Write both gradients and ``hidden = silu(gate) * up``, ``[rows, width]``; any may lie where an input does."""
    call = function(f"swiglu_grad_{_NAMES[gate.dtype]}", *[POINTER, INT] * 6, INT, INT, INT)
    places = _places(grad, gate, up, grad_gate, grad_up)
    call(*places, *((None, 0) if hidden is None else _places(hidden)), *gate.shape, torch.get_num_threads())


def _places(*tensors: Tensor) -> list[int]:
    """Address and row stride of each tensor."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), tensor.stride(0))]
