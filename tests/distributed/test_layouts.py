"""Layouts against plain PyTorch. `lightbulb prove` does all of them; these are one of each kind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightbulb.evaluation.proof import BOUNDS, compare_layout
from lightbulb.evaluation.trial import Reference, Trial
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

Referenced = Callable[..., tuple[Trial, Reference, Path]]

LAYOUTS = [
    # tensor, pipeline, expert, data, micro-batch
    (1, 1, 1, 1, 4),
    (1, 1, 2, 4, 1),
    (1, 2, 2, 2, 2),
    (1, 4, 1, 1, 4),
    (2, 1, 2, 2, 1),
    (2, 2, 1, 1, 2),
]


def layout(tensor: int, pipeline: int, expert: int, data: int, distributed: bool = True) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, data=data, distributed_optimizer=distributed)


@pytest.mark.parametrize(("tensor", "pipeline", "expert", "data", "micro"), LAYOUTS)
def test_layout_trains_what_one_process_trains(
    ranks: RankPool, referenced: Referenced, tensor: int, pipeline: int, expert: int, data: int, micro: int
) -> None:
    trial, reference, folder = referenced()
    trial = replace(trial, parallel=layout(tensor, pipeline, expert, data), micro_batch_size=micro)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)
    assert result.worst.keys() == BOUNDS.keys()


OPTIONS = [
    {"tensor": 2, "sequence": True, "data": 1},
    {"tensor": 2, "sequence": True, "expert": 2, "data": 2},
    {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2, "data": 1},
    {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 4, "data": 2, "distributed_optimizer": False},
    {"tensor": 2, "sequence": True, "pipeline": 2, "data": 1, "recompute": "selective"},
    {"pipeline": 2, "interleave": 2, "data": 1},
    {"pipeline": 2, "interleave": 2, "data": 2, "expert": 2, "recompute": "full"},
    {"pipeline": 2, "stages": [3, 1], "data": 1},
    {"ulysses": 2, "data": 1},
    {"ulysses": 2, "data": 1, "expert": 2, "distributed_optimizer": False},
    {"ulysses": 2, "tensor": 2, "sequence": True, "data": 1, "recompute": "full"},
    {"ulysses": 2, "pipeline": 2, "data": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ParallelConfig(**options).label())
def test_every_way_to_split_and_recompute(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    trial, reference, folder = referenced(with_documents=True, dropout=0.2)
    trial = replace(trial, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize(("tensor", "pipeline", "expert", "data", "micro"), [(1, 2, 2, 2, 1), (2, 2, 1, 1, 4)])
@pytest.mark.parametrize("distributed", [False, True])
def test_tied_embeddings_and_document_masks(
    ranks: RankPool,
    referenced: Referenced,
    tensor: int,
    pipeline: int,
    expert: int,
    data: int,
    micro: int,
    distributed: bool,
) -> None:
    trial, reference, folder = referenced(with_documents=True, tie_embeddings=True)
    parallel = layout(tensor, pipeline, expert, data, distributed)
    result = compare_layout(replace(trial, parallel=parallel, micro_batch_size=micro), reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize(("tensor", "pipeline", "expert", "data"), [(1, 1, 4, 4), (2, 1, 1, 2), (1, 1, 1, 2)])
def test_plain_optimizer_equals_the_distributed_one(
    ranks: RankPool, referenced: Referenced, tensor: int, pipeline: int, expert: int, data: int
) -> None:
    trial, reference, folder = referenced()
    trial = replace(trial, parallel=layout(tensor, pipeline, expert, data, distributed=False), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def test_gates_from_the_full_softmax_with_one_expert_per_token(ranks: RankPool, referenced: Referenced) -> None:
    router = {"top_k": 1, "normalize_gates": False, "balance_loss": 0.1}
    channel = {"type": "switch", "num_experts": 8, "hidden_dim": 16, "router": router}
    block = {"token": {"type": "attention", "num_heads": 2}, "channel": channel}
    trial, reference, folder = referenced(block_pattern=[block])
    trial = replace(trial, parallel=layout(2, 1, 2, 2), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


def test_the_trial_brings_out_what_it_should(referenced: Referenced) -> None:
    _, reference, _ = referenced()
    assert min(result.clip_coefficient for result in reference.results) < 1.0
    for router in reference.results[0].routers.values():
        assert max(router["load"]) > 1.05 / len(router["load"])  # so that the balance gradient is not zero at step 2


@pytest.mark.parametrize(("tensor", "pipeline", "expert", "data"), [(1, 1, 1, 1), (2, 1, 2, 2)])
@pytest.mark.parametrize("distributed", [False, True])
def test_bfloat16_stays_close(
    ranks: RankPool, referenced: Referenced, tensor: int, pipeline: int, expert: int, data: int, distributed: bool
) -> None:
    trial, reference, folder = referenced()
    parallel = layout(tensor, pipeline, expert, data, distributed)
    trial = replace(trial, parallel=parallel, micro_batch_size=2, precision="bf16")
    worst = compare_layout(trial, reference, folder, ranks).worst
    assert worst["loss"].value < 0.005
    assert worst["grad_norm"].value < 0.02
    assert worst["weight"].value < 0.02


@pytest.mark.parametrize(
    "options", [{"expert": 4, "data": 4}, {"tensor": 2, "expert": 2, "data": 2, "recompute": "full"}]
)
def test_a_shared_expert_while_rows_travel(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    channel = {"type": "switch", "num_experts": 4, "hidden_dim": 16, "shared_hidden_dim": 8}
    trial, reference, folder = referenced(
        block_pattern=[{"token": {"type": "attention", "num_heads": 4}, "channel": channel}]
    )
    trial = replace(trial, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize("options", [{"pipeline": 2, "stages": [3, 1]}, {"pipeline": 2, "interleave": 2}], ids=str)
def test_a_tied_table_that_crosses_shards(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    trial, reference, folder = referenced(tie_embeddings=True, vocab_size=1024)
    trial = replace(trial, parallel=ParallelConfig(**options, data=2), micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, sequence=True, expert_tensor=1, expert=2, data=1),
        ParallelConfig(ulysses=2, pipeline=2, interleave=2, data=1, recompute="full"),
    ],
    ids=ParallelConfig.label,
)
def test_bfloat16_stays_close_on_split_sequences(
    ranks: RankPool, referenced: Referenced, parallel: ParallelConfig
) -> None:
    trial, reference, folder = referenced()
    trial = replace(trial, parallel=parallel, micro_batch_size=2, precision="bf16")
    worst = compare_layout(trial, reference, folder, ranks).worst
    assert worst["loss"].value < 0.005
    assert worst["grad_norm"].value < 0.02
    assert worst["weight"].value < 0.02
