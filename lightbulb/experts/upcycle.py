"""From dense models to one mixture of experts: `lightbulb upcycle`.

Read the sources tensor by tensor, write the mixture's first checkpoint piece by piece, run it on text, and let the
receipt decide: where the result must equal the dense model (copies, parts, zero outputs, equal sources) and does not,
nothing is left behind.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightbulb.data.config import DataConfig, DataError
from lightbulb.experts.first_checkpoint import write_first_checkpoint
from lightbulb.experts.pieces import Merge
from lightbulb.experts.receipt import (
    Comparison,
    Digests,
    Receipt,
    RouterRecord,
    Text,
    compare,
    digest,
    parameters,
    watching_routers,
    write_receipt,
)
from lightbulb.experts.router_start import dense_model, filled, learned_routers
from lightbulb.experts.source import Source, open_source
from lightbulb.experts.texts import contexts_of, corpus_contexts, random_contexts
from lightbulb.experts.upcycle_config import SourceConfig, UpcycleConfig, gates_sum_to_one
from lightbulb.folder import built_beside
from lightbulb.nn.parameter import logical_of
from lightbulb.train.checkpoint import Checkpoint
from lightbulb.train.config import RunConfig, TrainConfig
from lightbulb.train.manifest import step_folder
from lightbulb.config import load_config

DATA = Path("data")
"""Corpus of a run none of whose sources has one, to be set before it is trained."""


def upcycle(config: UpcycleConfig) -> Receipt:
    """Write the run that a config describes.

    Raises:
        ConfigError: the sources cannot become this mixture.
        ReceiptError: the result is not the dense model that it should equal.
        CheckpointError, InteropError, DataError, TokenizerError, FolderError: something cannot be read or written.
    """
    out = config.run.expanduser()
    merge = Merge(config, [_open(source.path) for source in config.sources], _open(config.seed_model))
    tensors_in = _digests(merge)
    if config.router_start.kind != "random":
        merge.routers = learned_routers(merge, _cluster_texts(merge))
    merge.compare_with_seed()
    reference = _reference(merge, tensors_in)
    with built_beside(out) as folder:
        tensors_out = write_first_checkpoint(folder, _run_config(merge), merge.pieces(), merge.sources[0].tokenizer_path)
        comparison, routers = _run_on_text(merge, folder, reference)
        receipt = Receipt(
            conversion="upcycle",
            sources=[str(source.path) for source in config.sources],
            architecture=config.method,
            parameters_in=parameters(tensors_in) // len(config.sources),
            parameters_out=merge.mixture.cost().params,
            tensors_in=tensors_in,
            tensors_out=tensors_out,
            comparison=comparison,
            routers=routers,
            notes=_notes(merge, reference, routers),
            versions={name: version(name) for name in ("lightbulb", "torch")},
        )
        if comparison is not None:
            comparison.check(str(out))
        write_receipt(folder, receipt)
    return receipt
