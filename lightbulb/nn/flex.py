"""PyTorch's FlexAttention: kernels that skip blocks of keys no query may see (Dong et al. 2024, arXiv:2412.05496).

On CUDA they are compiled; on CPU only the forward exists, in plain operations, which is there to be tested.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightbulb.nn.attention_mask import Visibility


def flex_self_attention(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, sink: Tensor | None) -> Tensor:
    """Attention over what ``seen`` allows, ``[batch, heads, length, width]``.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``.
        value: as key.
        seen: which tokens see which.
        sink: ``[heads]`` logits of one more key with value zero, or None.

    Raises:
        ValueError: gradients are wanted on CPU.
    """
    on_cuda = query.device.type == "cuda"
    if not on_cuda and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("backend 'flex' has no backward on CPU; set backend: auto")
    length = query.shape[2]

    def mask_mod(sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return seen.at(sample, row, column)

    flex = _flex()
    blocks = flex.create_block_mask(mask_mod, len(query), None, length, length, device=query.device.type)
    grouped = query.shape[1] != key.shape[1]
    run = _compiled() if on_cuda else flex.flex_attention
    mixed, aux = run(query, key, value, block_mask=blocks, enable_gqa=grouped, return_aux=flex.AuxRequest(lse=True))
    if sink is None:
        return mixed
    # exp(lse) / (exp(lse) + exp(sink)): the share of the weights that the keys keep.
    kept = torch.sigmoid(aux.lse - sink.to(aux.lse.dtype)[:, None])
    return mixed * kept[..., None].to(mixed.dtype)


@cache
def _flex() -> ModuleType:
    from torch.nn.attention import flex_attention  # two seconds, with the compiler it brings

    return flex_attention


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_flex().flex_attention)
