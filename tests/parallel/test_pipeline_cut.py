"""The cut into stages against every possible cut."""

import itertools
import random

import pytest

from lightbulb.config import build_config
from lightbulb.models.language import LanguageConfig
from lightbulb.parallel.pipeline_cut import cut, language_stages


def slowest(costs: list[float], bounds: tuple[int, ...]) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_has_a_faster_slowest_stage(seed: int) -> None:
    generator = random.Random(seed)
    costs = [generator.choice([1.0, 2.0, 5.0, generator.random()]) for _ in range(generator.randint(1, 8))]
    for stages in range(1, len(costs) + 1):
        bounds = tuple(cut(costs, stages))
        assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == stages + 1
        assert all(a < b for a, b in itertools.pairwise(bounds))
        inner = itertools.combinations(range(1, len(costs)), stages - 1)
        best = min(slowest(costs, (0, *middle, len(costs))) for middle in inner)
        assert slowest(costs, bounds) == pytest.approx(best)


def test_a_large_head_gets_fewer_layers() -> None:
    block = {"token": {"type": "attention", "num_heads": 2}, "channel": {"type": "mlp", "hidden_dim": 32}}
    values = {"dim": 16, "num_layers": 8, "context_length": 8, "block_pattern": [block]}
    small = language_stages(build_config(LanguageConfig, values | {"vocab_size": 2}), 2)
    large = language_stages(build_config(LanguageConfig, values | {"vocab_size": 1024}), 2)
    assert (small[1].first, large[1].first) == (4, 7)
    assert [(s.has_embedding, s.has_head) for s in large] == [(True, False), (False, True)]
