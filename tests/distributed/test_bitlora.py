"""BitLinear and LoRA on split layouts: codes of the whole matrix, frozen parameters, partial gradients of updates."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import TRAIN, losses

import lightbulb.modifiers  # noqa: F401  (registers what model.modifiers can name)
from lightbulb.config import build_config, load_config
from lightbulb.evaluation.proof import compare_layout
from lightbulb.evaluation.trial import Reference, Trial, _my_batches
from lightbulb.inference.generate import SamplingConfig, generate
from lightbulb.models.language import LanguageConfig
from lightbulb.modifiers.bitlinear import BitLinearConfig, BitQuantizer
from lightbulb.modifiers.packed import pack
from lightbulb.nn.linear import ColumnParallelLinear, RowParallelLinear
from lightbulb.nn.parameter import initialise, logical_of, values_of
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig, destroy_groups, initialize_groups
from lightbulb.parallel.workers import RankPool
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, load_into, load_model_for_inference, start_from
from lightbulb.train.config import RunConfig
from lightbulb.train.loop import open_trainer
from lightbulb.train.manifest import TrainState, step_folder
from lightbulb.train.save import Saver

Referenced = Callable[..., tuple[Trial, Reference, Path]]

MLP = {"type": "mlp", "hidden_dim": 128}
SWITCH = {"type": "switch", "num_experts": 4, "hidden_dim": 128, "shared_hidden_dim": 128}
ATTENTION = {"type": "attention", "num_heads": 2, "head_dim": 64, "qk_norm": True}
MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 64,
    "num_layers": 2,
    "context_length": 12,
    "block_pattern": [{"token": ATTENTION, "channel": MLP}, {"token": ATTENTION, "channel": SWITCH}],
}
LORA: dict[str, Any] = {"type": "lora", "rank": 4}
SPLITS = [
    {"tensor": 2, "data": 1},
    {"tensor": 2, "sequence": True, "pipeline": 2, "data": 1},
    {"expert": 2, "data": 2, "distributed_optimizer": False},
    {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2, "data": 1},
    {"ulysses": 2, "data": 1, "recompute": "full"},
]


def name_of(options: dict[str, Any]) -> str:
    return ParallelConfig(**options).label()


def check(ranks: RankPool, trial: tuple[Trial, Reference, Path], options: dict[str, Any]) -> None:
    wanted, reference, folder = trial
    wanted = replace(wanted, parallel=ParallelConfig(**options), micro_batch_size=2)
    result = compare_layout(wanted, reference, folder, ranks)
    assert result.ok, "\n".join(result.failures)


@pytest.mark.slow
@pytest.mark.parametrize("options", SPLITS, ids=name_of)
@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_equality_of_quantised_weights(
    ranks: RankPool, referenced: Referenced, weights: str, options: dict[str, Any]
) -> None:
    bits = {"type": "bitlinear", "weights": weights, "act_bits": 16}
    check(ranks, referenced(**MODEL, modifiers=[bits]), options)


@pytest.mark.slow
@pytest.mark.parametrize("options", SPLITS, ids=name_of)
def test_equality_of_updates(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    check(ranks, referenced(with_documents=True, **MODEL, modifiers=[LORA]), options)


@pytest.mark.slow
@pytest.mark.parametrize("options", SPLITS[:4], ids=name_of)
def test_equality_of_updates_beside_four_bits(ranks: RankPool, referenced: Referenced, options: dict[str, Any]) -> None:
    check(ranks, referenced(**MODEL, modifiers=[LORA | {"quantize": "nf4"}]), options)


def codes_and_product(rank: int, degree: int, kind: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Codes and scales of a column- and a row-parallel layer, the row-parallel layer's quantised input, and its
    product and input gradient, of one made-up input."""
    initialize_groups(ParallelConfig(tensor=degree, data=1))
    config = BitLinearConfig.model_validate({"weights": kind})
    column, row = ColumnParallelLinear(24, 32, 0.3), RowParallelLinear(32, 24, 0.3)
    found: dict[str, Tensor] = {}
    for name, layer in (("column", column), ("row", row)):
        initialise(layer, 5)
        with torch.no_grad():
            whole = torch.ones(layer.logical.shape)
            whole[: len(whole) // 2] = 3.0  # local means would differ
            layer.weight *= whole[layer.logical.slices()]
        layer.quantizer = BitQuantizer(config, layer)
        codes, scale = layer.quantizer.matrix_codes(layer.weight)
        found |= {f"{name} codes": codes, f"{name} scale": scale}
    x = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 32)
    x = x.chunk(degree, -1)[rank].clone().requires_grad_()
    codes, scale = row.quantizer.input_codes(x)  # type: ignore[union-attr]
    found |= {"input codes": codes, "input scale": scale}  # type: ignore[dict-item]
    product = row(x)
    (product * torch.arange(24.0)).sum().backward()
    assert x.grad is not None
    destroy_groups()
    return {name: tensor.detach() for name, tensor in found.items()}, product.detach(), x.grad


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_equality_codes_are_the_same_bits_on_two_ranks(ranks: RankPool, kind: str) -> None:
    ((whole, product, gradient),) = ranks.run(1, codes_and_product, 1, kind)
    parts = ranks.run(2, codes_and_product, 2, kind)
    split = {"column codes": 0, "row codes": 1, "input codes": -1}
    for name, expected in whole.items():
        pieces = [found[name] for found, _, _ in parts]
        if name in split:
            assert torch.equal(torch.cat(pieces, split[name]), expected), name
        elif name == "input scale":  # has the norm in it, a sum over ranks
            assert all(torch.allclose(piece, expected, rtol=1e-6) for piece in pieces)
        else:
            assert all(torch.equal(piece, expected) for piece in pieces), name
    for _, found, _ in parts:
        torch.testing.assert_close(found, product, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, _, part in parts], -1), gradient, rtol=1e-5, atol=1e-5)


def engine(modifiers: list[dict[str, Any]], parallel: ParallelConfig, seed: int = 7, **changes: Any) -> Engine:
    model = build_config(LanguageConfig, MODEL | {"modifiers": modifiers} | changes)
    return Engine(model, parallel, OptimizerConfig(lr=1e-2), "fp32", seed, torch.device("cpu"))


def save(trained: Engine, run: Path) -> None:
    saver = Saver(run, trained, keep=1)
    saver.save(TrainState(2, 0, trained.optimizer_step, 0, {}, {}, trained.parallel.label()))
    saver.wait()


def train_and_save(rank: int, run: Path, modifiers: list[dict[str, Any]], parallel: ParallelConfig) -> None:
    """Two steps on this layout, then a checkpoint."""
    trained = engine(modifiers, parallel)
    trial = Trial(trained.model_config, OptimizerConfig(), 7, 2, 4, False, parallel, 2)
    for step in range(2):
        assert trained.train_step(_my_batches(trained, trial, step), 1e-2).applied
    save(trained, run)
    trained.close()


def load_and_save(
    rank: int, source: Path, target: Path, modifiers: list[dict[str, Any]], parallel: ParallelConfig
) -> None:
    """Load a checkpoint into an engine with other initial weights, and save what it holds."""
    other = engine(modifiers, parallel, seed=8)
    load_into(other, Checkpoint(step_folder(source, 2)))
    save(other, target)
    other.close()


def contents(run: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(step_folder(run, 2))
    records = checkpoint.manifest.tensors
    return {n: checkpoint.read(n, tuple(slice(0, s) for s in r.shape), tuple(r.shape)) for n, r in records.items()}


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_frozen_parameters_are_saved_without_moments_and_move_between_layouts(
    ranks: RankPool, tmp_path: Path, quantize: str | None
) -> None:
    modifiers = [LORA | {"quantize": quantize}]
    first = ParallelConfig(tensor=2, expert=2, data=2)
    ranks.run(4, train_and_save, tmp_path / "a", modifiers, first)
    saved = contents(tmp_path / "a")
    for name in saved:
        if name.endswith(":exp_avg"):
            assert ".adapter." in name
    assert "blocks.0.token.query.weight" in saved and "embedding.weight" in saved
    assert "blocks.1.channel.experts.gate_up.adapter.b:exp_avg_sq" in saved
    for number, parallel in enumerate([ParallelConfig(pipeline=2, data=1), ParallelConfig(data=1)]):
        size = parallel.copies
        ranks.run(size, load_and_save, tmp_path / "a", tmp_path / str(number), modifiers, parallel)
        found = contents(tmp_path / str(number))
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)


def start(rank: int, run: Path, modifiers: list[dict[str, Any]], parallel: ParallelConfig) -> tuple[list[str], bool]:
    """Take another run's weights; what was missing, and whether the rest is the same."""
    fresh = engine(modifiers, parallel, seed=8)
    checkpoint = Checkpoint(step_folder(run, 2))
    missing = start_from(fresh, checkpoint)
    same = all(
        torch.equal(values_of(p), checkpoint.read_parameter(n, logical_of(p), with_moments=False)["master"])
        for n, p in fresh.all_parameters()
        if n not in missing
    )
    fresh.close()
    return missing, same


def test_start_from_takes_what_there_is(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_and_save, tmp_path / "base", [], ParallelConfig(data=2))
    for missing, same in ranks.run(2, start, tmp_path / "base", [LORA], ParallelConfig(tensor=2, data=1)):
        assert same
        assert len(missing) == 2 * 16 and all(".adapter." in name for name in missing)


def refuse(rank: int, run: Path) -> str:
    other = engine([], ParallelConfig(data=1), vocab_size=32)
    with pytest.raises(CheckpointError) as caught:
        start_from(other, Checkpoint(step_folder(run, 2)))
    other.close()
    return str(caught.value)


def test_start_from_another_shape_is_an_error(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, train_and_save, tmp_path / "base", [], ParallelConfig(data=1))
    (message,) = ranks.run(1, refuse, tmp_path / "base")
    assert "has shape (64, 64), the model expects (32, 64)" in message


def pretrain_and_read(rank: int, base: Path, tuned: Path) -> tuple[str, str]:
    """A run of a ternary model, a run of updates that starts from it, begun, ended early and gone on with; and what the
    model of the second says, with its weights packed and not."""
    device = torch.device("cpu")
    for path, steps in ((base, 4), (tuned, 2), (tuned, 4)):
        with open_trainer(load_config(RunConfig, path, [f"train.steps={steps}"]), device) as trainer:
            assert trainer.run()
    texts = []
    for packed in (False, True):
        model, tokenizer, config = load_model_for_inference(Path(load_config(RunConfig, tuned).run))
        if packed:
            assert len(pack(model)) == 2 * 6
        sampling = SamplingConfig(temperature=0, max_new_tokens=6)
        texts.append(tokenizer.decode(list(generate(model, tokenizer.encode_batch(["1 plus"])[0], sampling, None))))
    return texts[0], texts[1]


def test_a_run_of_updates_starts_from_a_run(ranks: RankPool, run_file: Callable[..., Path]) -> None:
    block = {
        "token": {"type": "attention", "num_heads": 4},
        "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
    }
    model = {"vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32, "block_pattern": [block]}
    bits = {"type": "bitlinear"}
    base = run_file("base", model=model | {"modifiers": [bits]}, train=TRAIN | {"keep_checkpoints": 9})
    tuned = run_file(
        "tuned", model=model | {"modifiers": [LORA, bits]}, start_from=str(base.parent / "base"), seed=4321,
        train=TRAIN | {"save_every": 1},
    )  # fmt: skip
    ((plain, packed),) = ranks.run(1, pretrain_and_read, base, tuned)
    assert plain == packed != ""
    first, then = losses(base.parent / "base"), losses(base.parent / "tuned")
    assert sorted(then) == [1, 2, 3, 4]
    assert then[1] < first[1] - 0.2  # weights of the first run, other data order
    start, end = (Checkpoint(step_folder(base.parent / name, 4)) for name in ("base", "tuned"))
    for name, record in start.manifest.tensors.items():
        if not name.endswith((":exp_avg", ":exp_avg_sq", ".load")):
            slices = tuple(slice(0, size) for size in record.shape)
            shape = tuple(record.shape)
            assert torch.equal(start.read(name, slices, shape), end.read(name, slices, shape)), name


def start_from_nothing(rank: int, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_trainer(load_config(RunConfig, path), torch.device("cpu")):
        pass
    return str(caught.value)


def test_starting_from_a_folder_without_a_checkpoint_is_an_error(
    ranks: RankPool, run_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = run_file("tuned", start_from=str(tmp_path / "nowhere"))
    (message,) = ranks.run(1, start_from_nothing, path)
    assert message.startswith(f"start_from: {tmp_path / 'nowhere'}: has no checkpoint")
