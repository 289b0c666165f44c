"""What the operations are computed with on this machine, in words, for `lightbulb doctor`."""

from importlib import metadata
from typing import NamedTuple

import torch

from lightbulb.kernels.block_sparse_attention import CROSSOVER_DENSITY, CROSSOVER_LENGTH
from lightbulb.kernels.choice import HAS_TRITON, VARIABLE, is_reference
from lightbulb.kernels.native import ABSENT, facts, is_built


class Forms(NamedTuple):
    """The forms an operation has besides its naive twin and plain torch."""

    what: str
    """What it computes."""
    native: bool = True
    """C++ on the CPU."""
    triton: bool = True
    """Triton on CUDA devices."""
    remark: str = ""
    """When the forms are taken, if not always."""


FORMS = {
    "adamw": Forms("AdamW in one pass", remark="on CPUs for bfloat16 models; else torch's or Megatron-core's"),
    "block_sparse_attention": Forms(
        "attention to what a mask shows",
        native=False,
        remark=f"on CUDA PyTorch's dense attention up to {CROSSOVER_LENGTH} keys and above {CROSSOVER_DENSITY:.0%} of "
        "visible tiles: by published figures, not measured yet",
    ),
    "causal_attention": Forms(
        "causal attention", triton=False, remark="C++ for float32, and for bfloat16 on CPUs without AMX"
    ),
    "cross_entropy": Forms("cross-entropy of a linear head in chunks", remark="rows; products are the library's"),
    "experts": Forms("mixtures of experts", remark="Triton in 16 bits; C++ rows, products are the library's"),
    "linear_recurrence": Forms("retention and Mamba-2 in chunks"),
    "rms_norm": Forms("RMSNorm, also of a residual sum"),
    "rope": Forms("rotary positions"),
    "softmax": Forms("softmax with mask and sink"),
    "swiglu": Forms("gated activation"),
    "ternary_matmul": Forms("ternary weights by 8-bit inputs", remark="training on CPUs is fake-quantised, in torch"),
}
"""One line for each folder of kernels."""


def machine() -> dict[str, str]:
    """What kernels need and have: the C++ library, its instructions and threads, Triton, and what is forced."""
    found = {"C++ library": "built" if is_built() else ABSENT}
    if is_built():
        instructions, has_threads = facts()
        found["instructions"] = instructions
        threads = f"yes, {torch.get_num_threads()} threads here"
        found["OpenMP"] = (
            threads if has_threads else "no: one thread; compile with a g++ that has libgomp (`make native`)"
        )
    found["Triton"] = _triton()
    found["choice"] = f"naive twins, forced ({VARIABLE} or train.kernels)" if is_reference() else "auto"
    return found


def operations() -> dict[str, str]:
    """A sentence for each operation: what computes it here."""
    return {name: f"{form.what}: {implementation(form)}" for name, form in sorted(FORMS.items())}


def implementation(form: Forms) -> str:
    """What computes an operation here."""
    if is_reference():
        return "naive twin"
    cpu = "C++" if form.native and is_built() else "torch"
    cuda = "Triton" if form.triton and HAS_TRITON else "torch"
    said = f"{cuda} on CUDA, {cpu} on the CPU" if torch.cuda.is_available() else f"{cpu} on the CPU"
    return f"{said} ({form.remark})" if form.remark else said


def _triton() -> str:
    if not HAS_TRITON:
        return "not installed: torch computes on CUDA devices"
    version = metadata.version("triton")
    if not torch.cuda.is_available():
        return f"{version}, unused: there is no CUDA device"
    return f"{version}, for {torch.cuda.get_device_name()}"
