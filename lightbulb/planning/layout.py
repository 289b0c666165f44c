"""Which degrees a model needs on so many ranks, from its config alone: what fits, in order of what costs least.

Data parallelism only exchanges gradients once per step, so it comes first. Expert parallelism exchanges tokens twice
per expert layer, tensor parallelism every activation four times per layer (hence within one machine only), and a
pipeline leaves ranks idle at both ends of a step. Each is used only as far as memory demands.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lightbulb.models.language import LanguageConfig
from lightbulb.nn.parameter import logical_of
from lightbulb.parallel.pipeline_cut import language_stages
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.train.config import RunConfig

GIB = 1 << 30
USABLE = 0.9
"""Part of the memory that is planned with; the rest is for fragments and libraries' buffers."""
FIXED_BYTES = 1.0 * GIB
"""What a process takes before it holds a model: libraries, device context, communication buffers."""
BEFORE = {"embedding": -1, "positions": -2}
"""Places of what the first stage has before its layers; a tied embedding is on the last one, too."""


class Memory(NamedTuple):
    """Bytes the fullest rank needs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """With what a process takes in any case."""
        return sum(self) + FIXED_BYTES


class Choice(NamedTuple):
    """A layout with its memory, and why none before it was taken.

    Attributes:
        parallel: the degrees.
        memory: of the fullest rank.
        fits: False when nothing fits; then it is the layout that needs least.
        rejected: one sentence for each layout tried before.
    """

    parallel: ParallelConfig
    memory: Memory
    fits: bool
    rejected: list[str]


def choose_layout(run: RunConfig, ranks: int, ranks_per_node: int, rank_bytes: float, bf16: bool) -> Choice | None:
    """The first layout that fits; None when the model cannot be split over so many ranks at all.

    Args:
        run: the run file; its own degrees are ignored.
        ranks: processes over all machines.
        ranks_per_node: of one machine; tensor parallelism stays within it.
        rank_bytes: memory of one rank's device.
        bf16: dtype of weights and activations, else float32.
    """
    shapes = parameter_table(run.model)
    rejected: list[str] = []
    least: tuple[ParallelConfig, Memory] | None = None
    for parallel in candidates(run, ranks, ranks_per_node):
        memory = estimate(run, parallel, bf16, shapes)
        if memory.total <= USABLE * rank_bytes:
            return Choice(parallel, memory, True, rejected)
        rejected.append(f"{parallel.label()} needs {memory.total / GIB:.1f} GiB a rank")
        if least is None or memory.total < least[1].total:
            least = parallel, memory
    return None if least is None else Choice(*least, False, rejected)


def candidates(run: RunConfig, ranks: int, ranks_per_node: int) -> Iterator[ParallelConfig]:
    """Layouts the model and the batch can be split over, cheapest communication first."""
    degrees = [d for d in range(1, ranks + 1) if ranks % d == 0]
    for pipeline, tensor in itertools.product(degrees, degrees):
        if ranks % (pipeline * tensor) or tensor > ranks_per_node:
            continue
        data = ranks // (pipeline * tensor)
        for expert in (d for d in degrees if data % d == 0):
            parallel = ParallelConfig(
                tensor=tensor, pipeline=pipeline, expert=expert, data=data,
                distributed_optimizer=run.parallel.distributed_optimizer,
            )  # fmt: skip
            try:
                run.model_copy(update={"parallel": parallel}).resolve(ranks)
            except ValueError:
                continue
            yield parallel


class Shape(NamedTuple):
    """One logical tensor: its layer (:data:`BEFORE` for what comes before them, their number for norm and head) and
    size."""

    layer: int
    size: int
    is_split_by_tensor: bool
    is_expert: bool


def parameter_table(model: LanguageConfig) -> list[Shape]:
    """Every logical tensor of the model, from a build without memory."""
    with torch.device("meta"):
        built = model.build()
    table = []
    for name, parameter in built.named_parameters():
        first, *rest = name.split(".")
        layer = int(rest[0]) if first == "blocks" else BEFORE.get(first, model.num_layers)
        logical = logical_of(parameter)
        table.append(Shape(layer, parameter.numel(), logical.tensor_dim is not None, logical.is_expert))
    return table


def estimate(run: RunConfig, parallel: ParallelConfig, bf16: bool, table: list[Shape]) -> Memory:
    """Memory of the fullest pipeline stage's ranks."""
    stages = language_stages(run.model, parallel.pipeline)
    width, data = 2 if bf16 else 4, parallel.data or 1
    # float32 training keeps its weights as masters; bf16 has float32 masters besides
    state = 12 if bf16 else 8
    fullest = Memory(0, 0, 0, 0)
    for number, stage in enumerate(stages):
        weights = gradients = optimizer = 0.0
        for shape in table:
            tied_copy = shape.layer == -1 and stage.has_head and run.model.tie_embeddings
            here = stage.first <= shape.layer < stage.last
            here |= shape.layer < 0 and stage.has_embedding or shape.layer == run.model.num_layers and stage.has_head
            if not (here or tied_copy):
                continue
            count = shape.size / (parallel.tensor if shape.is_split_by_tensor else 1)
            count /= parallel.expert if shape.is_expert else 1
            replicas = data // parallel.expert if shape.is_expert else data
            weights += width * count
            gradients += 4 * count
            optimizer += state * count / (replicas if parallel.distributed_optimizer else 1)
        layers = range(stage.first, stage.last)
        memory = Memory(weights, gradients, optimizer, _activations(run, parallel, width, layers, number))
        fullest = max(fullest, memory, key=lambda item: item.total)
    return fullest


def _activations(run: RunConfig, parallel: ParallelConfig, width: int, layers: range, stage: int) -> float:
    """What the micro-batches in flight keep for backward (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1).

    Per token and layer, in values: 7.5 times the width for norms and attention without its score matrix, and 9.5 times
    for a channel mixer of 8 width² parameters, scaled by the parameters a token uses; tensor ranks share all but the
    inputs of norms and residuals.
    """
    model, train = run.model, run.train
    tokens = train.micro_batch_size * model.context_length
    micro_batches = train.global_batch_size // (train.micro_batch_size * (parallel.data or 1))
    in_flight = min(parallel.pipeline - stage, micro_batches)  # one forward, one backward: 1F1B
    per_token = 0.0
    for layer in layers:
        channel = model.layer(layer).channel
        active = 0.0 if channel is None else channel.cost(model.dim).active_params / (8 * model.dim**2)
        per_token += model.dim * (2.5 + (5 + 9.5 * active) / parallel.tensor)
    return in_flight * tokens * per_token * width
