"""The proof is worth something only if it fails: each bug here is one that a published system has had."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import megatron.core.tensor_parallel
import pytest
import torch
from torch import Tensor, nn

from lightbulb.evaluation.proof import BOUNDS, compare_layout
from lightbulb.evaluation.trial import RankReport, Reference, Trial, train_layout
from lightbulb.mixers.channel import switch
from lightbulb.nn.groups import Axis, enter_tensor_region
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise
from lightbulb.parallel import engine
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool
from lightbulb.routing.router import Router, Routing


def reduce_experts_over_all_data_ranks(patch: pytest.MonkeyPatch) -> None:
    def initialise_and_mark(model: nn.Module, seed: int) -> None:
        initialise(model, seed)
        for parameter in model.parameters():
            parameter.allreduce = True  # type: ignore[attr-defined]

    patch.setattr(engine, "initialise", initialise_and_mark)


def balance_each_micro_batch(patch: pytest.MonkeyPatch) -> None:
    forward = Router.forward

    def forward_with_own_load(self: Router, x: Tensor, noise: Tensor | None = None) -> Routing:
        with torch.no_grad():
            chosen = torch.nn.functional.linear(x.float(), self.weight).topk(self.config.top_k, dim=-1).indices
            self.set_load(torch.bincount(chosen.flatten(), minlength=self.num_experts))
        return forward(self, x, noise)

    patch.setattr(Router, "forward", forward_with_own_load)


def count_replicated_parameters_on_every_tensor_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(megatron.core.tensor_parallel, "param_is_not_tensor_parallel_duplicate", lambda *_, **__: True)


def keep_gate_gradients_partial(patch: pytest.MonkeyPatch) -> None:
    def skip_gates(x: Tensor, axis: Axis) -> Tensor:
        is_gates = x.dim() == 2 and x.shape[-1] == 2  # [tokens, top_k]
        return x if is_gates else enter_tensor_region(x, axis)

    patch.setattr(switch, "enter_tensor_region", skip_gates)


def average_each_micro_batch(patch: pytest.MonkeyPatch) -> None:
    def mean_losses(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, tokens, report = engine_sum(labels, losses)
        return total / tokens, torch.ones_like(tokens), report

    engine_sum = engine._sum_losses
    patch.setattr(engine, "_sum_losses", mean_losses)


def forget_the_tied_copy(patch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function has its name, too
    patch.setattr(module, "_allreduce_embedding_grad", lambda *_, **__: None)


def share_buckets_between_tied_copies_and_others(patch: pytest.MonkeyPatch) -> None:
    def initialise_and_unmark(model: nn.Module, seed: int) -> None:
        initialise(model, seed)
        for parameter in model.parameters():
            parameter.shared_embedding = False  # type: ignore[attr-defined]

    patch.setattr(engine, "initialise", initialise_and_unmark)


def forget_what_other_positions_add_to_norms(patch: pytest.MonkeyPatch) -> None:
    def initialise_and_unmark(model: nn.Module, seed: int) -> None:
        initialise(model, seed)
        for parameter in model.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]

    patch.setattr(engine, "initialise", initialise_and_unmark)


def draw_dropout_by_place_in_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    class LocalNoise(Noise):
        def __init__(self, seed: int, sample_ids: Tensor, length: int):
            super().__init__(seed, torch.arange(len(sample_ids)), length)

    patch.setattr(engine, "Noise", LocalNoise)


def decay_vectors_too(patch: pytest.MonkeyPatch) -> None:
    build = engine.build_optimizer

    def build_with_decay(*args: object) -> object:
        optimizer = build(*args)  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
        return optimizer

    patch.setattr(engine, "build_optimizer", build_with_decay)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], ParallelConfig, set[str], str]] = [
    # the bug, a layout that shows it, quantities that must show it, a part of the place named
    (reduce_experts_over_all_data_ranks, ParallelConfig(expert=2, data=2), {"gradient", "grad_norm"}, "experts"),
    (balance_each_micro_batch, ParallelConfig(data=1), {"gradient"}, "router"),
    (count_replicated_parameters_on_every_tensor_rank, ParallelConfig(tensor=2, data=1), {"grad_norm", "clip"}, "norm"),
    (keep_gate_gradients_partial, ParallelConfig(tensor=2, data=1), {"gradient"}, "router"),
    (average_each_micro_batch, ParallelConfig(data=2), {"gradient", "grad_norm"}, ""),
    (forget_the_tied_copy, ParallelConfig(pipeline=2, data=1), {"gradient"}, "embedding"),
    (
        share_buckets_between_tied_copies_and_others,
        ParallelConfig(pipeline=2, stages=[3, 1], data=2),
        {"gradient"},
        "emb",
    ),
    (forget_what_other_positions_add_to_norms, ParallelConfig(tensor=2, sequence=True, data=1), {"gradient"}, "norm"),
    (draw_dropout_by_place_in_the_micro_batch, ParallelConfig(data=2), {"loss", "gradient"}, ""),
    (decay_vectors_too, ParallelConfig(data=1), {"weight"}, "norm"),
]


@pytest.mark.parametrize(("bug", "layout", "quantities", "place"), BUGS, ids=[entry[0].__name__ for entry in BUGS])
def test_bug_breaks_the_proof(
    ranks: RankPool,
    referenced: Callable[..., tuple[Trial, Reference, Path]],
    bug: Callable[[pytest.MonkeyPatch], None],
    layout: ParallelConfig,
    quantities: set[str],
    place: str,
) -> None:
    changes = {
        forget_the_tied_copy: {"tie_embeddings": True},
        share_buckets_between_tied_copies_and_others: {"tie_embeddings": True, "vocab_size": 1024},
        draw_dropout_by_place_in_the_micro_batch: {"dropout": 0.2},
    }
    trial, reference, folder = referenced(**changes.get(bug, {}))
    trial = replace(trial, parallel=layout, micro_batch_size=2)
    result = compare_layout(trial, reference, folder, ranks, partial(train_with_bug, bug))
    broken = {quantity for quantity, found in result.worst.items() if not found.value <= BOUNDS[quantity]}
    assert quantities <= broken, result.failures
    assert any(place in line.partition(" is ")[0] for line in result.failures)
    assert all(line.startswith(trial.label()) for line in result.failures)


def train_with_bug(
    bug: Callable[[pytest.MonkeyPatch], None], rank: int, trial: Trial, reference: Reference, folder: Path
) -> RankReport:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        return train_layout(rank, trial, reference, folder)
