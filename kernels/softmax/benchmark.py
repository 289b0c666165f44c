"""Softmax, plain and with a mask and a sink: ``python -m lightbulb.kernels.softmax.benchmark``.

The peers are ``torch.softmax``, and what models write for a sink: a masked fill, one more column, softmax, the column
taken off.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightbulb.kernels.softmax import softmax
from lightbulb.kernels.timing import Run, arguments, memory_bound

Function = Callable[..., Tensor]


def eager(scores: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    """What models write."""
    column = sink.to(scores.dtype).expand(scores.shape[:3])[..., None]
    return torch.cat((scores.masked_fill(~mask, float("-inf")), column), dim=-1).softmax(-1)[..., :-1]


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (4, 32, 2048, 2048) if device == "cuda" else (2, 8, 512, 512)
    mask = torch.ones(shape[2:], dtype=torch.bool, device=device).tril()
    sink = torch.zeros(shape[1], 1, device=device)
    steps: dict[str, tuple[dict[str, Run], int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        scores, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        short, size = str(dtype).removeprefix("torch."), scores.numel() * scores.element_size()
        cases: dict[str, tuple[dict[str, Function], tuple[Tensor, ...]]] = {
            "plain": ({"ours": softmax, "torch": lambda x: x.softmax(-1)}, (scores,)),
            "mask and sink": ({"ours": softmax, "torch": eager}, (scores, mask, sink)),
        }
        for name, (contenders, inputs) in cases.items():
            forward = {who: step(f, inputs, None) for who, f in contenders.items()}
            both = {who: step(f, inputs, grad) for who, f in contenders.items()}
            steps[f"{name} forward {short}"] = forward, 2 * size
            steps[f"{name} both {short}"] = both, 5 * size
    memory_bound("softmax", "softmax, {} x {} x {} x {}".format(*shape), steps, options.rounds)


def step(function: Function, inputs: tuple[Tensor, ...], grad: Tensor | None) -> Run:
    """One forward, or forward and backward."""
    if grad is None:
        return lambda: function(*inputs)
    leaf = inputs[0].detach().requires_grad_()
    return lambda: torch.autograd.grad(function(leaf, *inputs[1:]), leaf, grad)


if __name__ == "__main__":
    main()
