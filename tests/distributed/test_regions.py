"""What crosses between ranks inside layers: sequence exchange, regions, and pipeline boundaries."""

from pathlib import Path

import deepspeed.sequence.layer
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightbulb.config import build_config
from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Trial, train_reference
from lightbulb.mixers.base import Context, ModelState
from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.stack import Stage
from lightbulb.nn.groups import Axis, share_in_tensor_region
from lightbulb.nn.ulysses import gather_heads, scatter_heads
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

LENGTH, BATCH, WIDTH = 6, 2, 3


def exchange_heads(rank: int) -> list[Tensor]:
    """Our exchange and DeepSpeed's over the same ranks: query, key, and the way back, each with its gradient."""
    axis = Axis(dist.group.WORLD, rank, dist.get_world_size())
    deepspeed.sequence.layer.dist = dist  # its own communication layer compiles an extension first
    theirs = deepspeed.sequence.layer.single_all_to_all
    torch.manual_seed(rank)
    query, key = (torch.randn(LENGTH // axis.size, BATCH, heads, WIDTH, requires_grad=True) for heads in (4, 2))
    scattered = scatter_heads([query, key], axis)
    back = gather_heads(scattered[0], axis)
    wanted = [theirs(part.detach(), 2, 0, 1, dist.group.WORLD) for part in (query, key)]
    assert all(torch.equal(ours, expected) for ours, expected in zip(scattered, wanted, strict=True))
    assert torch.equal(back, theirs(wanted[0], 0, 2, 1, dist.group.WORLD))
    assert torch.equal(back, query)
    weights = torch.randn_like(scattered[1])
    (scattered[1] * weights).sum().backward()
    assert key.grad is not None
    assert torch.equal(key.grad, theirs(weights, 0, 2, 1, dist.group.WORLD))
    return [part.detach() for part in scattered]


def test_the_exchange_of_heads_is_deepspeeds(ranks: RankPool) -> None:
    results = ranks.run(2, exchange_heads)
    assert [part.shape for part in results[0]] == [(LENGTH, BATCH, 2, WIDTH), (LENGTH, BATCH, 1, WIDTH)]


def share_with_strided_gradient(rank: int) -> Tensor:
    x = torch.zeros(2, 3, requires_grad=True)
    shared = share_in_tensor_region(x, Axis(dist.group.WORLD, rank, 2))
    (shared.t() * (torch.arange(6.0).view(3, 2) + 10 * rank)).sum().backward()
    assert x.grad is not None
    return x.grad


def test_gradients_are_summed_whatever_their_strides(ranks: RankPool) -> None:
    expected = 2 * torch.arange(6.0).view(3, 2).t() + 10
    assert all(torch.equal(gradient, expected) for gradient in ranks.run(2, share_with_strided_gradient))


class TwoStreamsConfig(LanguageConfig):
    """Also carries half of the embedding's features through all stages and adds them at the end."""

    def carried_widths(self, layer: int) -> list[int]:
        return [self.dim, self.dim // 2]

    def build(self, stage: Stage | None = None) -> LanguageModel:
        return TwoStreams(self, stage or Stage(0, self.num_layers, True, True))


class TwoStreams(LanguageModel):
    """See :class:`TwoStreamsConfig`."""

    def run_blocks(
        self, carried: list[Tensor], context: Context, state: ModelState | None = None
    ) -> tuple[list[Tensor], ModelState]:
        half = carried[0][..., ::2] if self.pre_process else carried[1]
        (x,), state = super().run_blocks(carried[:1], context, state)
        return [x + half.repeat(1, 1, 2)] if self.post_process else [x, half], state


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pipeline=2, data=1),
        ParallelConfig(pipeline=4, data=1),
        ParallelConfig(pipeline=2, interleave=2, data=2),
        ParallelConfig(pipeline=2, tensor=2, sequence=True, data=1),
    ],
    ids=ParallelConfig.label,
)
def test_a_boundary_may_carry_several_tensors_of_other_widths(
    ranks: RankPool, tmp_path: Path, parallel: ParallelConfig
) -> None:
    block = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "mlp", "hidden_dim": 16}}
    values = {"vocab_size": 32, "dim": 8, "num_layers": 4, "context_length": 8, "block_pattern": [block]}
    model = build_config(TwoStreamsConfig, values)
    trial = Trial(model, OptimizerConfig(lr=1e-3, eps=1e-5), 3, 2, 8, parallel=parallel, micro_batch_size=1)
    (reference,) = ranks.run(1, train_reference, trial, tmp_path)
    result = compare_layout(trial, reference, tmp_path, ranks)
    assert result.ok, "\n".join(result.failures)
