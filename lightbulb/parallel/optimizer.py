"""AdamW through Megatron-core: fp32 master weights and moments, split over the data ranks.

Besides building the optimizer, this file reads and writes its state parameter by parameter, whatever the layout:
Megatron's own state formats follow its buckets, which change with every degree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import ParamKey, ParamPredicate, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from pydantic import Field
from torch import Tensor, nn

from lightbulb.config import Config
from lightbulb.models.scaling import LR_SCALE
from lightbulb.ops import is_one_pass
from lightbulb.parallel.host import Precision
from lightbulb.parallel.offload import OffloadedAdamW
from lightbulb.parallel.one_pass import OnePassAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); norms and other vectors are not decayed."""

    lr: float = Field(3e-4, gt=0, le=10)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices."""
    clip_grad: float = Field(1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    offload: bool = False
    """Keep the moments in main memory and step on the CPU (DeepSpeed's CPU Adam, compiled at first use)."""


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter's optimizer state: ``[start, stop)`` of the flat local parameter."""

    master: Tensor
    start: int
    stop: int
    optimizer: torch.optim.Optimizer


def build_optimizer(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], precision: Precision, distributed: bool
) -> ChainedOptimizer:
    """Megatron-core's optimizer over this rank's chunks (one chain link for shared parameters, one for experts)."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=precision != "fp32",  # float32 masters beside the weights
        use_distributed_optimizer=distributed,
    )
    overrides = get_standard_config_overrides(settings) | _learning_rates(chunks)
    optimizer = get_megatron_optimizer(settings, chunks, overrides, use_gloo_process_groups=False)
    on_cpu = next(chunks[0].parameters()).device.type == "cpu"
    for group in optimizer.param_groups:
        # Megatron-core leaves it to its learning-rate scheduler, which is not used here, to apply the multiplier.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if on_cpu:
            group["fused"], group["foreach"] = True, False  # one pass over memory instead of a dozen
    if config.offload:
        for link in optimizer.chained_optimizers:
            if link.optimizer is not None:
                groups, betas = link.optimizer.param_groups, (config.beta1, config.beta2)
                link.optimizer = OffloadedAdamW(groups, betas, config.eps)
    elif on_cpu and precision != "fp32":
        for link in optimizer.chained_optimizers:
            _step_in_one_pass(link, chunks)
    return optimizer


def _learning_rates(chunks: list[DistributedDataParallel]) -> dict[ParamKey, ParamGroupOverride]:
    """A group of its own for each factor of the learning rate that parameters are marked with."""
    marks = {getattr(parameter, LR_SCALE, 1.0) for chunk in chunks for parameter in chunk.parameters()}
    return {
        ParamKey(predicate=ParamPredicate(f"{LR_SCALE} {mark}", partial(_is_marked, mark=mark))): {"lr_mult": mark}
        for mark in sorted(marks - {1.0})
    }


def _is_marked(parameter: nn.Parameter, mark: float) -> bool:
    return getattr(parameter, LR_SCALE, 1.0) == mark


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Use a learning rate from the next step on, times each parameter's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def _step_in_one_pass(link: MegatronOptimizer, chunks: list[DistributedDataParallel]) -> None:
    """Let the step write the bfloat16 weights too, where there is a kernel that does, instead of Megatron's copy after
    it. (With float32 weights, their own masters, torch's fused step is as fast.)"""
    if link.optimizer is None or not all(is_one_pass(master) for master in _held(link)):
        return
    copies = {}
    for parameter in (p for chunk in chunks for p in chunk.parameters() if p.requires_grad):
        part = _part(link, parameter)
        if part is not None and part.master.dtype != parameter.dtype:
            copies[part.master] = parameter.detach().view(-1)[part.start : part.stop].view_as(part.master)
    link.optimizer = OnePassAdamW(link.optimizer.param_groups, copies)
    link._copy_main_params_to_model_params = lambda: None


def parts(optimizer: ChainedOptimizer, parameter: nn.Parameter) -> Part | None:
    """This rank's part of a parameter's state, or None when the other data ranks hold all of it."""
    for link in optimizer.chained_optimizers:
        found = _part(link, parameter)
        if found is not None:
            return found
    return None


def _part(link: MegatronOptimizer, parameter: nn.Parameter) -> Part | None:
    if link.optimizer is None:
        return None
    if isinstance(link, DistributedOptimizer):
        if parameter not in link.model_param_group_index_map:
            return None
        span = link._get_model_param_range_map(parameter)["param"]
        return Part(_distributed_master(link, parameter), span.start, span.end, link.optimizer)
    master = getattr(parameter, "main_param", parameter)
    if not any(master is held for held in _held(link)):
        return None
    return Part(master, 0, parameter.numel(), link.optimizer)


def _distributed_master(link: DistributedOptimizer, parameter: nn.Parameter) -> Tensor:
    """The master weights of this rank's part of a parameter.

    Megatron-core's ``model_param_group_index_map`` would give another parameter's in a bfloat16 model with float32
    routers: it counts in the order of the gradient buffers, while the optimizer lists float32 parameters first.
    """
    models = [*link.model_fp32_groups, *link.model_float16_groups]
    masters = [*link.shard_fp32_groups, *link.shard_fp32_from_float16_groups]
    for model_group, master_group in zip(models, masters, strict=True):
        for candidate, master in zip(model_group, master_group, strict=True):
            if candidate is parameter:
                return master
    raise ValueError("the optimizer link does not hold the parameter")


def _held(link: MegatronOptimizer) -> Iterator[Tensor]:
    for group in link.optimizer.param_groups:
        yield from group["params"]


def read_state(part: Part | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Master weight and moments as flat float32 tensors of the whole local parameter, zero outside the part."""
    state = {name: torch.zeros(parameter.numel(), device=parameter.device) for name in ("master", *MOMENTS)}
    if part is not None:
        span = slice(part.start, part.stop)
        state["master"][span] = part.master.detach().flatten().float()
        for name in MOMENTS:
            if name in part.optimizer.state[part.master]:
                state[name][span] = part.optimizer.state[part.master][name].flatten()
    return state


@torch.no_grad()
def write_state(part: Part | None, parameter: nn.Parameter, state: dict[str, Tensor], step: int) -> None:
    """Put whole local tensors back: the parameter from its master weight, the part of the state this rank holds."""
    parameter.copy_(state["master"].view_as(parameter))
    if part is None:
        return
    span = slice(part.start, part.stop)
    part.master.copy_(state["master"].flatten()[span].view_as(part.master))
    moments = {name: state[name].flatten()[span].view_as(part.master).clone() for name in MOMENTS}
    if isinstance(part.optimizer, OffloadedAdamW):
        part.optimizer.load(part.master, step, moments)
    elif step:
        # AdamW keeps the counter on the CPU, wherever the moments are.
        part.optimizer.state[part.master] = {"step": torch.tensor(float(step)), **moments}
