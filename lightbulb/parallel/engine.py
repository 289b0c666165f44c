"""The engine: one model on any layout, driven by Megatron-core's schedules, buckets and optimizer.

Gradients are sums over tokens, divided once by the number of predicted tokens of the *global* batch; with that and
sum-shaped auxiliary losses, micro-batch size and every parallel degree leave the gradient unchanged. A rank holds one
model chunk per pipeline stage it runs: one, or ``parallel.interleave`` of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from lightbulb.models.language import LanguageConfig, LanguageModel
from lightbulb.models.stack import Stage
from lightbulb.models.trainable import Trainable, freeze, trained_names
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise, logical_of, set_values, stored_values
from lightbulb.parallel import megatron_cpu
from lightbulb.parallel.collective import any_rank
from lightbulb.parallel.host import Precision
from lightbulb.parallel.optimizer import (
    OptimizerConfig,
    build_optimizer,
    parts,
    read_state,
    set_learning_rate,
    write_state,
)
from lightbulb.parallel.pipeline_cut import language_stages
from lightbulb.parallel.topology import ParallelConfig, destroy_groups, initialize_groups
from lightbulb.routing.balance import summarise
from lightbulb.routing.router import Router

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class StepResult:
    """What one step did, the same on every rank.

    Attributes:
        loss: mean negative log-likelihood of the global batch, nats per token.
        tokens: predicted tokens.
        grad_norm: norm of the global gradient before clipping.
        clip_coefficient: factor the gradient was scaled by.
        applied: False when the gradient was not finite or over a limit, and the update was skipped on all ranks.
        routers: per router (the layer, see :func:`router_label`): load per expert, balance loss, z-loss, entropy.
        divergence: mean divergence from soft targets, nats per token; 0 without any.
    """

    loss: float
    tokens: int
    grad_norm: float
    clip_coefficient: float
    applied: bool
    routers: dict[str, dict[str, Any]] = field(default_factory=dict)
    divergence: float = 0.0


class Engine:
    """This rank's model chunks with everything needed to train them.

    ``torch.distributed`` must be initialised. The engine creates the process groups of its layout; :meth:`close`
    forgets them.

    Args:
        model: the model's config.
        parallel: degrees, already resolved for this world size.
        optimizer: AdamW settings.
        precision: dtype of weights and activations; masters and moments are always float32, gradient sums too but for
            fp64.
        seed: seeds the initial weights, dropout and router jitter.
        device: where this rank computes.
        trainable: which parameters are trained; the others have neither gradients nor optimizer state.

    Raises:
        ValueError: the model cannot be split that way, or ``trainable`` names nothing in it.
    """

    def __init__(
        self,
        model: LanguageConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: Precision,
        seed: int,
        device: torch.device,
        trainable: Trainable = "all",
    ):
        model.check_parallel(parallel.degrees())
        megatron_cpu.install()
        initialize_groups(parallel)
        self.model_config, self.parallel, self.optimizer_config = model, parallel, optimizer
        self.device, self.seed = device, seed
        self.optimizer_step = 0
        self.trained = trained_names(model, trainable)
        stages = language_stages(model, parallel.num_stages, parallel.stages)
        mine = stages[parallel_state.get_pipeline_model_parallel_rank() :: parallel.pipeline]
        self.chunks: list[LanguageModel] = [self._build_chunk(stage, precision) for stage in mine]
        carried = [model.carried_widths(stage.first) for stage in stages[1:]]
        self.ddp = self._wrap(precision, any(widths != [model.dim] for widths in carried))
        self.optimizer = build_optimizer(optimizer, self.ddp, precision, parallel.distributed_optimizer)
        self._schedule = get_forward_backward_func()

    @property
    def data_rank(self) -> int:
        """Which share of the samples this rank reads."""
        return parallel_state.get_data_parallel_rank()

    @property
    def tensor_rank(self) -> int:
        """Which part of every matrix this rank holds."""
        return parallel_state.get_tensor_model_parallel_rank()

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank speaks for the others of its pipeline stage about what all of them hold alike."""
        return self.tensor_rank == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0

    def train_step(
        self, batches: list[Any], lr: float, max_loss: float = math.inf, max_grad_norm: float = math.inf
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        Args:
            batches: micro-batches with ``tokens``, ``labels`` ``[batch, length]``, ``document_ids`` or None and
                ``sample_ids [batch]``; all of one shape, the same number on every rank. Those with soft ``targets``
                (``SoftTargets``) are learned from besides the labels.
            lr: learning rate of this step.
            max_loss: with a larger loss nothing is updated.
            max_grad_norm: with a larger norm, before clipping, nothing is updated.
        """
        self.forward_backward(batches)
        return self.update(lr, max_loss, max_grad_norm)

    def update(self, lr: float, max_loss: float = math.inf, max_grad_norm: float = math.inf) -> StepResult:
        """Clip and apply the gradients of :meth:`forward_backward`, unless they are not finite or over a limit."""
        result = self._collect()
        self.optimizer.prepare_grads()
        result.grad_norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(result.grad_norm) and math.isfinite(result.loss) and self._has_finite_gradients()
        wanted = finite and result.loss <= max_loss and result.grad_norm <= max_grad_norm
        result.applied = not any_rank(not wanted, self.device)
        if result.applied:
            result.clip_coefficient = min(1.0, self.optimizer_config.clip_grad / (result.grad_norm + 1e-6))
            self._update(result.grad_norm, lr)
            self._set_router_loads(result)
        return result

    def forward_backward(self, batches: list[Any]) -> None:
        """Accumulate and reduce the gradients of a global batch, without updating anything (see :meth:`update`)."""
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._losses = self._run(batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: list[Any]) -> tuple[float, int]:
        """Summed negative log-likelihood and number of predicted tokens over all ranks' batches."""
        for chunk in self.ddp:
            chunk.eval()
        if self.parallel.interleave > 1:  # the schedule wants whole rounds of micro-batches
            missing = -len(batches) % self.parallel.pipeline
            blank = batches[-1]._replace(labels=torch.full_like(batches[-1].labels, IGNORE))
            batches = batches + [blank] * missing
        self._losses = self._run(batches, forward_only=True)
        result = self._collect()
        return result.loss * result.tokens, result.tokens

    def close(self) -> None:
        """Forget the process groups."""
        destroy_groups()

    def all_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Global names and local parameters; a tied table has a copy on the first and on the last stage."""
        for chunk in self.chunks:
            yield from chunk.named_parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Global names and local parameters, without the second copy of a tied table."""
        for name, parameter in self.all_parameters():
            if not getattr(parameter, "shared", False):
                yield name, parameter

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Global names of this rank's routers."""
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                if isinstance(module, Router):
                    yield name, module

    def replicas(self, parameter: nn.Parameter) -> dist.ProcessGroup:
        """The ranks that hold the same part of a parameter and share its optimizer state."""
        if parameter.allreduce:  # type: ignore[attr-defined]
            return parallel_state.get_data_parallel_group(with_context_parallel=True)
        return parallel_state.get_expert_data_parallel_group()

    def read_parameter(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Master weight and moments of the local parameter, gathered from its replicas (a collective over them). A
        frozen parameter has no moments, and is its own master."""
        if not parameter.requires_grad:
            return {"master": stored_values(parameter)}
        state = read_state(parts(self.optimizer, parameter), parameter)
        if self.parallel.distributed_optimizer:
            for tensor in state.values():  # each element is nonzero on one replica, so the sum is exact
                dist.all_reduce(tensor, group=self.replicas(parameter))
        return {name: tensor.view(parameter.shape) for name, tensor in state.items()}

    def write_parameter(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`read_parameter`; no communication."""
        if not parameter.requires_grad:
            set_values(parameter, state["master"])
            return
        write_state(parts(self.optimizer, parameter), parameter, state, self.optimizer_step)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The reduced gradient of the local parameter, gathered from its replicas (a collective over them)."""
        gradient = parameter.main_grad.detach().float().clone()  # type: ignore[attr-defined]
        if self.parallel.distributed_optimizer:
            part = parts(self.optimizer, parameter)
            kept = torch.zeros_like(gradient).flatten()
            if part is not None:
                kept[part.start : part.stop] = gradient.flatten()[part.start : part.stop]
            dist.all_reduce(kept, group=self.replicas(parameter))
            gradient = kept.view_as(gradient)
        return gradient

    def _build_chunk(self, stage: Stage, precision: Precision) -> LanguageModel:
        chunk = self.model_config.build(stage)
        freeze(chunk, self.trained)
        initialise(chunk, self.seed)
        _cast(chunk.to(self.device), precision)
        chunk.recompute = self.parallel.recompute
        chunk.model_type = ModelType.encoder_or_decoder
        return chunk

    def _wrap(self, precision: Precision, boundaries_differ: bool) -> list[DistributedDataParallel]:
        parallel, model = self.parallel, self.model_config
        is_interleaved = parallel.interleave > 1
        config = TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.dim,
            num_attention_heads=parallel.tensor,
            tensor_model_parallel_size=parallel.tensor,
            sequence_parallel=parallel.sequence,
            context_parallel_size=parallel.ulysses,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.interleave if is_interleaved else None,
            # Two ranks that both send and receive in one batch would take each other's messages for the wrong ones.
            overlap_p2p_comm=is_interleaved,
            batch_p2p_comm=not is_interleaved,
            variable_seq_lengths=boundaries_differ,  # each message then goes with its shape
            moe_token_dispatcher_type="alltoall",  # unused, but the default forbids the line above
            pipeline_dtype=DTYPES[precision],
            params_dtype=DTYPES[precision],
            bf16=precision == "bf16",
            calculate_per_token_loss=True,
            finalize_model_grads_func=finalize_model_grads,
            gradient_accumulation_fusion=False,
        )
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=precision != "fp64",
            use_distributed_optimizer=self.parallel.distributed_optimizer,
            overlap_grad_reduce=self.device.type == "cuda",
        )
        # Megatron's disable_bucketing for later chunks would gather bfloat16 and float32 weights in one message, which
        # gloo garbles.
        wrapped = [DistributedDataParallel(config, settings, chunk) for chunk in self.chunks]
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if is_interleaved else no_sync[0]
        return wrapped

    def _run(self, batches: list[Any], forward_only: bool) -> list[Tensor]:
        batch, length = batches[0].tokens.shape
        return self._schedule(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self.ddp] if len(self.ddp) > 1 else iter(batches),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=forward_only,
        )

    def _forward_step(self, batches: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        tokens, labels = batch.tokens.to(self.device), batch.labels.to(self.device)
        documents = None if batch.document_ids is None else batch.document_ids.to(self.device)
        noise = Noise(self.seed, batch.sample_ids, tokens.shape[1])
        soft = getattr(batch, "targets", None)
        losses = model(tokens, labels, documents, noise, None if soft is None else soft.to(self.device))
        return losses, partial(_sum_losses, self.chunks[0].my_positions(labels))

    def _collect(self) -> StepResult:
        """Add losses and router statistics over micro-batches and ranks, in one all-reduce."""
        known = self.model_config.routers()
        row_of = {name: row for row, name in enumerate(known)}
        width = max([2 * num_experts + 3 for num_experts in known.values()], default=3)
        table = torch.zeros(len(known) + 1, width, dtype=torch.float64, device=self.device)
        for losses in self._losses:
            table[-1, :2] += losses.double()
        for chunk in self.chunks:
            if chunk.divergence is not None:
                table[-1, 2] += chunk.divergence.double()
                chunk.divergence = None
        for name, router in self.routers():
            sums = router.statistics.take(self.device)
            table[row_of[name], : len(sums)] = sums
        dist.all_reduce(table)
        table[-1] /= self.parallel.tensor  # whose ranks all counted the same losses
        if not self.parallel.sequence:  # ... and then routed the same tokens
            table[:-1] /= self.parallel.tensor
        table = table.cpu()
        tokens = int(table[-1, 1])
        result = StepResult(float(table[-1, 0]) / max(tokens, 1), tokens, 0.0, 1.0, applied=True)
        result.divergence = float(table[-1, 2]) / max(tokens, 1)
        for name, num_experts in known.items():
            result.routers[router_label(name)] = summarise(table[row_of[name]][: 2 * num_experts + 3], num_experts)
        self._loads = {name: table[row_of[name], :num_experts] for name, num_experts in known.items()}
        return result

    def _has_finite_gradients(self) -> bool:
        """Whether every gradient on this rank is finite. The norm alone would not tell: it counts a parameter that
        tensor ranks replicate on the first of them only."""
        buffers = [b for chunk in self.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return all(math.isfinite(float(buffer.grad_data.sum())) for buffer in buffers)

    def _set_router_loads(self, result: StepResult) -> None:
        for name, router in self.routers():
            router.set_load(self._loads[name].to(self.device))

    def _update(self, grad_norm: float, lr: float) -> None:
        set_learning_rate(self.optimizer, lr)
        for link in self.optimizer.chained_optimizers:
            if link.get_parameters():
                clip_grad_by_total_norm_fp32(link.get_parameters(), self.optimizer_config.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.optimizer_step += 1


def _sum_losses(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's per-token contract: loss sum, token count, and what to report."""
    total = losses.sum()
    tokens = (labels != IGNORE).sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens.to(total.dtype)])


def _cast(model: nn.Module, precision: Precision) -> None:
    if precision == "fp64":
        model.double()  # buffers too
        return
    for parameter in model.parameters():
        if not logical_of(parameter).keep_fp32:
            parameter.data = parameter.data.to(DTYPES[precision])


def router_label(name: str) -> str:
    """``blocks.3.channel.router`` as ``3``, ``blocks.3.token.router`` as ``3.token``: what metrics call it."""
    _, layer, part, *_ = name.split(".")
    return layer if part == "channel" else f"{layer}.{part}"
