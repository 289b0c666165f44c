"""Learning from soft targets is the same on every layout, and a source's own targets teach it nothing."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightbulb.config import build_config
from lightbulb.evaluation.trial import Trial, _my_batches, global_batch
from lightbulb.models.language import LanguageConfig
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.nn.noise import Noise
from lightbulb.nn.parameter import initialise
from lightbulb.nn.soft_targets import SoftTargets
from lightbulb.parallel.engine import Engine
from lightbulb.parallel.optimizer import OptimizerConfig
from lightbulb.parallel.topology import ParallelConfig
from lightbulb.parallel.workers import RankPool

K = 5
CONFIG = build_config(LanguageConfig, {
    "vocab_size": 61, "dim": 16, "num_layers": 2, "context_length": 12, "z_loss": 1e-3,
    "block_pattern": [{"token": {"type": "attention", "num_heads": 4}, "channel": {"type": "mlp", "hidden_dim": 32}}],
})  # fmt: skip
TRIAL = Trial(CONFIG, OptimizerConfig(lr=1e-2, eps=1e-5, weight_decay=0.0), 8, 3, 8)


class Batch(NamedTuple):
    tokens: Tensor
    labels: Tensor
    document_ids: None
    sample_ids: Tensor
    targets: SoftTargets


def targets_of(sample_ids: Tensor, share: float) -> SoftTargets:
    """Of each sample the same, whoever asks; every fourth position has none."""
    parts = []
    for sample in sample_ids.tolist():
        generator = torch.Generator().manual_seed(sample)
        order = torch.rand(CONFIG.context_length, CONFIG.vocab_size, generator=generator).argsort(-1)
        parts.append((order[:, :K], torch.rand(CONFIG.context_length, K, generator=generator).softmax(-1) * 0.8))
        parts[-1][1][::4] = 0
    return SoftTargets(*map(torch.stack, zip(*parts, strict=True)), share)


def steps_on(rank: int, parallel: ParallelConfig, share: float) -> list[tuple[float, float, float]]:
    """Loss, divergence and gradient norm of each step."""
    engine = Engine(CONFIG, parallel, TRIAL.optimizer, "fp32", TRIAL.seed, torch.device("cpu"))
    trial = Trial(CONFIG, TRIAL.optimizer, TRIAL.seed, TRIAL.steps, TRIAL.global_batch_size, False, parallel, 2)
    found = []
    for step in range(TRIAL.steps):
        batches = [Batch(b.tokens, b.labels, None, b.sample_ids, targets_of(b.sample_ids, share))
                   for b in _my_batches(engine, trial, step)]  # fmt: skip
        result = engine.train_step(batches, 1e-2)
        found.append((result.loss, result.divergence, result.grad_norm))
    engine.close()
    return found


def plainly(share: float) -> list[tuple[float, float, float]]:
    """The same in plain PyTorch, with whole logits."""
    model = CONFIG.build().train()
    initialise(model, TRIAL.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    found = []
    for step in range(TRIAL.steps):
        batch = global_batch(TRIAL, step)
        logits = model(batch.tokens, noise=Noise(TRIAL.seed, batch.sample_ids, CONFIG.context_length))
        lse, soft, has = logits.logsumexp(-1), targets_of(batch.sample_ids, share), batch.labels != IGNORE
        nats = lse - logits.gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0]
        log_named = logits.gather(-1, soft.ids) - lse[..., None]
        p, rest = soft.probabilities, 1 - soft.probabilities.sum(-1)
        is_target = p.sum(-1) > 0
        divergence = (torch.xlogy(p, p) - p * log_named).sum(-1)
        divergence = divergence + rest * (rest.log() - (1 - log_named.exp().sum(-1)).log())
        divergence = torch.where(is_target, divergence, 0.0)
        regular = CONFIG.z_loss * lse.square()
        tokens = has.sum()
        loss = ((share * nats + (1 - share) * divergence + regular) * has).sum() / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(
            (float(((nats + regular) * has).sum() / tokens), float((divergence * has).sum() / tokens), float(norm))
        )
    return found


LAYOUTS = [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"ulysses": 2}, {"data": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equality_of_layouts_and_plain_pytorch(ranks: RankPool, layout: dict[str, int]) -> None:
    parallel = ParallelConfig(**{"data": 1} | layout)  # type: ignore[arg-type]
    found = ranks.run(parallel.copies * (parallel.data or 1), steps_on, parallel, 0.3)
    wanted = plainly(0.3)
    for one in found:
        for step, expected in zip(one, wanted, strict=True):
            assert step == pytest.approx(expected, abs=2e-5)


def test_with_the_whole_share_targets_change_nothing(ranks: RankPool) -> None:
    parallel = ParallelConfig(data=1, tensor=2)
    found = ranks.run(2, steps_on, parallel, 1.0)[0]
    other = ranks.run(2, steps_on, parallel, 0.3)[0]
    plain = plainly(1.0)
    assert [step[0] for step in found] == pytest.approx([step[0] for step in plain], abs=1e-5)
    assert abs(other[-1][0] - found[-1][0]) > 1e-3
    assert other[-1][1] < found[-1][1]
