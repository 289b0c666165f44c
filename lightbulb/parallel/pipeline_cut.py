"""Where to cut a model into pipeline stages: the slowest stage sets the pace, so its cost is minimised."""

from itertools import accumulate

from lightbulb.models.language import LanguageConfig
from lightbulb.models.stack import Stage


def cut(costs: list[float], stages: int) -> list[int]:
    """First item of each stage (``stages + 1`` bounds) such that the largest stage sum is smallest.

    Args:
        costs: cost of each item, in order.
        stages: number of consecutive, non-empty parts; at most ``len(costs)``.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [0])}
    for part in range(1, stages + 1):
        for end in range(part, len(costs) + 1):
            options = [
                (max(best[part - 1, start][0], prefix[end] - prefix[start]), [*best[part - 1, start][1], end])
                for start in range(part - 1, end)
                if (part - 1, start) in best
            ]
            best[part, end] = min(options)
    return best[stages, len(costs)][1]


def language_stages(config: LanguageConfig, stages: int, layers: list[int] | None = None) -> list[Stage]:
    """The stages of a language model, cut by FLOPs or by hand; the head's cost falls on the last layer's stage.

    Args:
        config: the model.
        stages: how many.
        layers: layers of each stage, or None to cut by cost.

    Raises:
        ValueError: the layers do not add up to the model's.
    """
    if layers is not None:
        if sum(layers) != config.num_layers:
            raise ValueError(
                f"parallel.stages {layers} has {sum(layers)} layers and model.num_layers is {config.num_layers}; "
                "make them equal"
            )
        bounds = [0, *accumulate(layers)]
    else:
        costs = [cost.forward_flops for cost in config.layer_costs()]
        costs[-1] += config.head_cost().forward_flops
        bounds = cut(costs, stages)
    return [Stage(bounds[i], bounds[i + 1], has_embedding=i == 0, has_head=i == stages - 1) for i in range(stages)]
