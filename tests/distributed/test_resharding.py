"""A checkpoint of any layout is the same state on any other: fault catalogue 16.

Parameters, moments and router loads are compared bit for bit after gathering. That losses go on as in an uninterrupted
run is shown by ``tests/integration/test_pretrain.py`` and, for four ranks to three and one, by
``benchmarks/resharding.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightbulb.config import build_config
from lightbulb.evaluation.trial import Trial, _my_batches
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import MOMENTS, OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool
from lightbulb.train.boxes import boxes_of_range
from lightbulb.train.checkpoint import Checkpoint, load_into, newest_checkpoint
from lightbulb.train.manifest import TrainState, step_folder
from lightbulb.train.save import Saver

MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "dim": 12,
    "num_layers": 2,
    "context_length": 12,
    "tie_embeddings": True,
    "block_pattern": [
        {
            "token": {"type": "attention", "num_heads": 2, "qk_norm": True},
            "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 16},
        }
    ],
}


def _layout(text: str, plain: bool = False) -> ParallelConfig:
    """``"tensor=2 expert=2 data=2"``."""
    degrees = {key: int(value) for key, value in (pair.split("=") for pair in text.split())}
    return ParallelConfig(**{"data": 1} | degrees, distributed_optimizer=not plain)  # type: ignore[arg-type]


def _engine(parallel: ParallelConfig, seed: int, precision: Any = "fp32") -> Engine:
    model = build_config(LanguageConfig, MODEL)
    return Engine(model, parallel, OptimizerConfig(lr=1e-2), precision, seed, torch.device("cpu"))


def _save(engine: Engine, run: Path, layout: str) -> None:
    saver = Saver(run, engine, keep=1)
    saver.save(TrainState(2, 0, engine.optimizer_step, 0, {}, {}, layout))
    saver.wait()


def train_and_save(rank: int, run: Path, parallel: ParallelConfig, precision: Any) -> None:
    """Two steps on this layout, then a checkpoint."""
    engine = _engine(parallel, 7, precision)
    trial = Trial(engine.model_config, OptimizerConfig(lr=1e-2), 7, 2, 12, False, parallel, 12 // (parallel.data or 1))
    for step in range(2):
        engine.train_step(_my_batches(engine, trial, step), 1e-2)
    _save(engine, run, parallel.label())
    engine.close()


def load_and_save(rank: int, source: Path, target: Path, parallel: ParallelConfig, precision: Any) -> None:
    """Load a checkpoint into an engine that was initialised otherwise, and save what it holds."""
    engine = _engine(parallel, 8, precision)
    load_into(engine, Checkpoint(step_folder(source, 2)))
    _save(engine, target, parallel.label())
    engine.close()


def contents(run: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of the run's checkpoint."""
    checkpoint, problems = newest_checkpoint(run)
    assert checkpoint is not None, problems
    records = checkpoint.manifest.tensors
    return {n: checkpoint.read(n, tuple(slice(0, s) for s in r.shape), tuple(r.shape)) for n, r in records.items()}


@pytest.mark.parametrize(
    "layouts",
    [
        ["tensor=2 expert=2 data=2", "data=3", "data=1", "data=4"],
        ["expert=2 data=2", "expert=1 data=1", "expert=4 data=4"],
        ["pipeline=2", "pipeline=1", "tensor=2", "pipeline=2 data=2"],
    ],
    ids=["4 to 3 to 1 to 4 ranks", "EP 2 to 1 to 4", "PP 2 to 1, TP 1 to 2"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["distributed optimizer", "plain optimizer"])
def test_every_parameter_and_moment_is_the_same_on_every_layout(
    ranks: RankPool, tmp_path: Path, layouts: list[str], plain: bool
) -> None:
    parallel = [_layout(text, plain and index % 2 == 0) for index, text in enumerate(layouts)]
    sizes = [p.tensor * p.pipeline * (p.data or 1) for p in parallel]
    ranks.run(sizes[0], train_and_save, tmp_path / "0", parallel[0], "fp32")
    first = contents(tmp_path / "0")
    assert all(
        f"{name}:{moment}" in first for name in first if ":" not in name and ".load" not in name for moment in MOMENTS
    )
    assert all(tensor.abs().sum() > 0 for tensor in first.values())
    for index in range(1, len(parallel)):
        here, before = tmp_path / str(index), tmp_path / str(index - 1)
        ranks.run(sizes[index], load_and_save, before, here, parallel[index], "fp32")
        found = contents(here)
        assert found.keys() == first.keys()
        assert [name for name in first if not torch.equal(found[name], first[name])] == []


def test_masters_of_a_bfloat16_model_keep_all_their_bits(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_and_save, tmp_path / "a", _layout("expert=2 data=2"), "bf16")
    ranks.run(2, load_and_save, tmp_path / "a", tmp_path / "b", _layout("tensor=2"), "bf16")
    first, found = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert all(torch.equal(found[name], first[name]) for name in first)
    assert any((tensor != tensor.bfloat16()).any() for name, tensor in first.items() if ":" not in name)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 4, 1, 3), ()])
def test_boxes_of_a_range_are_its_values_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    count = whole.numel()
    for start in range(count):
        for stop in range(start + 1, count + 1):
            part = whole.flatten()[start:stop]
            boxes = list(boxes_of_range(shape, start, stop))
            assert len(boxes) <= max(2 * len(shape) - 1, 1)
            assert sum(torch.Size(size).numel() for _, size, _ in boxes) == stop - start
            for first, size, offset in boxes:
                box = tuple(slice(a, a + b) for a, b in zip(first, size, strict=True))
                assert torch.equal(whole[box].flatten(), part[offset : offset + torch.Size(size).numel()])
