"""The door to flash-attn (FlashAttention-2, Dao 2023, arXiv:2307.08691): used where it is installed, never required.

The only file that knows the package. What it cannot do, and why, is one sentence from :func:`obstacle`.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from lightbulb.nn.attention_mask import Visibility


@cache
def package() -> ModuleType | None:
    """flash-attn, or None where it is not installed (or was built for another PyTorch)."""
    try:
        import flash_attn
    except (ImportError, OSError):
        return None
    return flash_attn


def obstacle(query: Tensor, seen: Visibility, sink: Tensor | None) -> str | None:
    """Why flash-attn cannot do this, or None when it can."""
    if package() is None:
        return "the package flash-attn is not installed"
    if query.device.type != "cuda":
        return f"flash-attn runs on CUDA, not on {query.device.type}"
    return unsupported(query, seen, sink)


def unsupported(query: Tensor, seen: Visibility, sink: Tensor | None) -> str | None:
    """Why flash-attn has no kernel for this, wherever it runs."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn computes in float16 or bfloat16, not in {query.dtype}"
    if query.shape[3] > 256:
        return f"flash-attn takes heads up to 256 wide, not {query.shape[3]}"
    if sink is not None:
        return "flash-attn has no sinks"
    if not seen.consecutive or seen.key.present is not None:
        return "flash-attn takes no positions per sample"
    if seen.key.closed is not None:
        return "flash-attn has no mask for gist tokens"
    if seen.rule.num_global and seen.has_far_pairs:
        return "flash-attn has no Lambda mask"
    return None


def flash_self_attention(query: Tensor, key: Tensor, value: Tensor, seen: Visibility) -> Tensor:
    """Attention of whole sequences by flash-attn, ``[batch, heads, length, width]``.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, kv_heads, length, width]``.
        value: as key.
        seen: which tokens see which, without an :func:`obstacle`.
    """
    flash = package()
    assert flash is not None
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    causal, reach, documents = seen.rule.causal, seen.rule.reach, seen.key.documents
    window = (-1, -1) if reach is None else (reach - 1, 0 if causal else reach - 1)
    if documents is None:
        return flash.flash_attn_func(*parts, causal=causal, window_size=window).transpose(1, 2)
    batch, length = documents.shape
    starts, longest = _starts(documents)
    rows = [part.flatten(0, 1) for part in parts]
    ends = (starts, starts, longest, longest)
    mixed = flash.flash_attn_varlen_func(*rows, *ends, causal=causal, window_size=window)
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)


def _starts(documents: Tensor) -> tuple[Tensor, int]:
    """Rows of ``documents [batch, length]``, laid end to end, at which one begins, with the end; and the longest."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = torch.cat((begins.flatten().nonzero()[:, 0], begins.new_full((1,), documents.numel(), dtype=torch.long)))
    return starts.int(), int(starts.diff().max())
