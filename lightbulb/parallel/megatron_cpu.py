"""Megatron-core 0.16 on CPU and gloo.

Megatron-core's groups, schedules, gradient buckets and distributed optimizer need no CUDA feature, but they name the
device: as the string ``"cuda"``, as tensor types such as ``torch.cuda.FloatTensor``, and as
``torch.cuda.current_device()``. When the machine has no CUDA device, :func:`install` changes exactly those names and
nothing outside ``megatron.core``: string constants are replaced in the code of the listed functions, and the listed
modules see a ``torch`` whose ``cuda`` answers for the CPU. Nothing is wrapped, so a step costs no more than before.
A test checks that each entry still finds what it replaces, and so tells when upstream no longer needs it.

One function is replaced whole: the norm of the gradient, because ``torch.norm`` is inexact on the CPU.
"""

import importlib
import types
from typing import Any

import torch
from torch import Tensor

CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.DoubleTensor",  # float16 is not used here; its float32 masters serve float64 too
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

FUNCTIONS = [
    "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining",
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
    "megatron.core.utils:local_multi_tensor_l2_norm",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.clip_grads:count_zeros_fp32",
    "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.__init__",
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
]

MODULES = [
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.tensor_parallel.mappings",
]

NORM = "megatron.core.optimizer.clip_grads", "l2_norm_impl"
_NORM_ELEMENTS = 1 << 16

_installed = False


def install() -> None:
    """Make Megatron-core allocate and compare on the CPU. Does nothing where CUDA exists, or the second time."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    for path in FUNCTIONS:
        function = resolve(path)
        function.__code__ = replace_constants(function.__code__)
    for name in MODULES:
        importlib.import_module(name).torch = _CPU_TORCH  # type: ignore[attr-defined]
    setattr(importlib.import_module(NORM[0]), NORM[1], l2_norm)
    _installed = True


def l2_norm(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm of all tensors together, with the arguments of Megatron-core's function of that purpose.

    On the CPU ``torch.norm`` adds float32 squares up one after another: 2e-5 off at a million elements and 4e-3 at
    fifty million, and how much depends on how the layout cuts the gradients. The norms of short pieces are right.
    """
    pieces = [piece for tensors in tensor_lists for t in tensors for piece in t.flatten().split(_NORM_ELEMENTS)]
    squares = torch.stack([piece.norm() for piece in pieces]).double().square()
    return squares.sum().sqrt().float().view(1), None


def resolve(path: str) -> types.FunctionType:
    """The function ``module:Qualified.name`` names."""
    module, _, qualified = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return getattr(found, "__func__", found)  # a classmethod's function


def replace_constants(code: types.CodeType) -> types.CodeType:
    """The same code with device names replaced, also in nested functions and constant tuples."""
    return code.replace(co_consts=tuple(_replace(constant) for constant in code.co_consts))


def _replace(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):
        return replace_constants(constant)
    if isinstance(constant, tuple):
        return tuple(_replace(item) for item in constant)
    return CONSTANTS.get(constant, constant) if isinstance(constant, str) else constant


def _cpu_torch() -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda")
    cuda.__dict__.update(torch.cuda.__dict__)
    cuda.__dict__.update(current_device=lambda: "cpu", synchronize=lambda: None)
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    view.__dict__["cuda"] = cuda
    return view


_CPU_TORCH = _cpu_torch()

__all__ = ["CONSTANTS", "FUNCTIONS", "MODULES", "NORM", "install", "l2_norm", "replace_constants", "resolve"]
