"""Trains a tiny model for a few steps on one rank and on two, and compares: does this installation work at all?

``python -m lightbulb.planning.self_test`` prints one JSON object; `lightbulb doctor --self-test` runs it as a process
of its own, so that what is broken here cannot break the report. On CUDA it also multiplies and reduces on one GPU.
"""

import json
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

STEPS = 3
TOLERANCE = 1e-5
MODEL: dict[str, Any] = {
    "vocab_size": 64, "dim": 32, "num_layers": 2, "context_length": 16,
    "block_pattern": [{
        "token": {"type": "attention", "num_heads": 4},
        "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
    }],
}  # fmt: skip


class Batch(NamedTuple):
    """``[batch, length]`` token ids and ``[batch]`` sample ids, as the engine expects."""

    tokens: Tensor
    labels: Tensor
    sample_ids: Tensor
    document_ids: None = None


def train(rank: int, parallel: ParallelConfig) -> list[float]:
    """Losses of a few steps on the same four contexts, whatever the layout."""
    model = build_config(LanguageConfig, MODEL)
    engine = Engine(model, parallel, OptimizerConfig(lr=1e-2), "fp32", 0, torch.device("cpu"))
    rows = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    rows = rows.chunk(parallel.data or 1)[engine.data_rank]
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.arange(len(rows)))
    losses = [engine.train_step([batch], 1e-2).loss for _ in range(STEPS)]
    engine.close()
    return losses


def multiply_on_gpu() -> str:
    """A product and a reduction by NCCL on the first GPU."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    product = torch.ones(512, 512, device=device) @ torch.ones(512, 512, device=device)
    dist.all_reduce(product)
    dist.destroy_process_group()
    if float(product.mean()) != 512.0:
        raise RuntimeError(f"ones(512, 512) squared has a mean of {float(product.mean())} on the GPU, not 512")
    return torch.cuda.get_device_name(device)


def main() -> int:
    """Print ``{"passed", "seconds", "detail"}``; 0 when the losses agree and fall."""
    begin = time.monotonic()
    try:
        with RankPool(2, timeout_seconds=60.0) as pool:
            (one,) = pool.run(1, train, ParallelConfig(data=1))
            two = pool.run(2, train, ParallelConfig(data=2, expert=2))[0]
        difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
        gpu = f"; GPU: {multiply_on_gpu()}" if torch.cuda.is_available() else ""
        passed = difference < TOLERANCE and one[-1] < one[0]
        detail = (
            f"loss {one[0]:.4f} to {one[-1]:.4f} in {STEPS} steps, one and two ranks differ by {difference:.1e}{gpu}"
        )
    except Exception as error:  # whatever is broken is the result
        passed, detail = False, f"{type(error).__name__}: {error}"
    print(json.dumps({"passed": passed, "seconds": round(time.monotonic() - begin, 1), "detail": detail}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
