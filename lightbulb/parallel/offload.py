"""AdamW on the host: moments in main memory, stepped by DeepSpeed's vectorised CPU Adam (ZeRO-Offload, Ren et al. 2021,
arXiv:2101.06840), whatever device holds the master weights."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class OffloadedAdamW(torch.optim.Optimizer):
    """Stands where Megatron-core expects a ``torch.optim.AdamW``.

    On CUDA a step brings the gradients to the host and the new weights back; 8 of the optimizer's 12 bytes per
    parameter leave the device. On the CPU nothing is copied.

    Args:
        groups: parameter groups with ``lr`` and ``weight_decay``; other code may change both.
        betas: decay of the moments.
        eps: added to the root of the second moment.

    Raises:
        RuntimeError: DeepSpeed cannot compile its extension here (a C++ compiler and ninja are needed, once).
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float):
        self._host = {p: p.detach().to("cpu") for group in groups for p in group["params"]}
        host_groups = [{**group, "params": [self._host[p] for p in group["params"]]} for group in groups]
        super().__init__(host_groups, {})
        self.param_groups = groups  # set after: a master may be a view into a buffer, which the check refuses
        self._adam = _cpu_adam(host_groups, betas, eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' ``grad``."""
        for ours, theirs in zip(self.param_groups, self._adam.param_groups, strict=True):
            theirs["lr"], theirs["weight_decay"] = ours["lr"], ours["weight_decay"]
        for parameter, host in self._host.items():
            host.grad = None if parameter.grad is None else parameter.grad.to("cpu")
            if parameter in self.state:
                self._adam.state[host] = self.state[parameter]
        self._adam.step()
        for parameter, host in self._host.items():
            if host.grad is not None:
                self.state[parameter] = self._adam.state[host]
            if parameter.device.type != "cpu":
                parameter.copy_(host, non_blocking=True)

    @torch.no_grad()
    def load(self, parameter: Tensor, step: int, moments: dict[str, Tensor]) -> None:
        """Take over a weight that was just written, and its moments (flat or of its shape) after ``step`` updates."""
        self._host[parameter].copy_(parameter)
        if step:
            self.state[parameter] = {"step": step, **{name: moment.cpu() for name, moment in moments.items()}}


def _cpu_adam(groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles at first use: only who asks for it waits

    beside_python = str(Path(sys.executable).parent)  # where pip put ninja, also when nothing activated the environment
    if beside_python not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside_python, os.environ.get("PATH", "")])
    try:
        return DeepSpeedCPUAdam(groups, betas=betas, eps=eps, adamw_mode=True)
    except Exception as error:
        raise RuntimeError(
            f"optimizer.offload: DeepSpeed's CPU Adam could not be compiled ({error}); install a C++ compiler and "
            "ninja, or set optimizer.offload: false"
        ) from error
