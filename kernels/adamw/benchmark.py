"""AdamW with a bfloat16 copy of the weights, against torch's fused step followed by the copy:
``python -m lightbulb.kernels.adamw.benchmark``.

"of copy rate" may exceed 1 on a CPU: a line that is written where it was read is not fetched again, as a copy's is.
"""

import statistics
from functools import partial

import torch
from torch import Tensor

from lightbulb.kernels.adamw import adamw
from lightbulb.kernels.timing import arguments, copy_bytes_per_second, interleaved, ratio, report

BYTES = {"with copy": 30, "without": 28}
"""Of each weight: read and written once."""


class Model:
    """Weights, moments and gradients of one contender."""

    def __init__(self, count: int, size: int, device: str):
        self.params, self.grads = ([torch.randn(size, device=device) for _ in range(count)] for _ in range(2))
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.copies = [p.bfloat16() for p in self.params]
        self.step_number = 0

    def step(self, has_copy: bool) -> None:
        """Ours."""
        self.step_number += 1
        copies: list[Tensor | None] = [*self.copies] if has_copy else [None] * len(self.params)
        steps = [float(self.step_number)] * len(self.params)
        adamw(self.params, self.grads, *self.moments, copies, steps, 1e-3, (0.9, 0.95), 1e-8, 0.1)


class Peer:
    """``torch.optim.AdamW(fused=True)``, and then a copy of each weight."""

    def __init__(self, count: int, size: int, device: str):
        self.params = [torch.randn(size, device=device).requires_grad_() for _ in range(count)]
        for p in self.params:
            p.grad = torch.randn(size, device=device)
        self.copies = [p.detach().bfloat16() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, 1e-3, (0.9, 0.95), 1e-8, 0.1, fused=True)

    def step(self, has_copy: bool) -> None:
        """The peer's."""
        self.optimizer.step()
        if has_copy:
            for copy, p in zip(self.copies, self.params, strict=True):
                copy.copy_(p.detach())


def main() -> None:
    """Measure, print a table and a line of JSON."""
    options = arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit, table, result = copy_bytes_per_second(), [], {}
    for count, size in ((16, 1 << 22), (256, 1 << 15)):
        ours, peer = Model(count, size, device), Peer(count, size, device)
        for name, moved in BYTES.items():
            has_copy = name == "with copy"
            runs = {"ours": partial(ours.step, has_copy), "torch": partial(peer.step, has_copy)}
            seconds = interleaved(runs, options.rounds)
            mine, faster = statistics.median(seconds["ours"]), ratio(seconds, "torch")
            row = {"tensors": count, "each": size, "step": name, "ms": mine * 1e3, "vs torch": faster}
            table.append(row | {"of copy rate": moved * count * size / mine / limit})
            result[f"{count}x{size}_{name.replace(' ', '_')}_vs_torch"] = round(faster, 3)
    report("adamw", table, {"op": "adamw"} | result)


if __name__ == "__main__":
    main()
